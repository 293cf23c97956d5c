// The choice of activation ranges, and the copy button.

function chooseRange(select, panels) {
  const chosen = select.value;
  panels.querySelector(".chosen")?.remove();
  const template = chosen.startsWith("layer-") ? document.getElementById(chosen) : null;
  for (const panel of panels.children) panel.hidden = chosen !== "" && panel.id !== chosen;
  if (template) {
    const copy = template.content.cloneNode(true).querySelector("figure");
    copy.classList.add("chosen");
    panels.append(copy);
  }
  panels.classList.toggle("one", chosen !== "");
}

async function copyText(button) {
  const source = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(source);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}

const rangeChoice = document.getElementById("range-choice");
if (rangeChoice) {
  const panels = document.getElementById("range-panels");
  rangeChoice.addEventListener("change", () => chooseRange(rangeChoice, panels));
  chooseRange(rangeChoice, panels);
}
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", () => copyText(button));
}
