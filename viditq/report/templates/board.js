"use strict";
document.documentElement.classList.replace("no-js", "js");
const words = document.getElementById("words"), most = document.getElementById("most");
const shown = document.getElementById("shown"), order = document.getElementById("order"), all = document.getElementById("all");
const tables = [...document.querySelectorAll("table.board")];
const everyRow = tables.flatMap((table) => [...table.tBodies[0].rows]);
const ranked = new Map(everyRow.map((row, i) => [row, i]));

function filterRows() {
  const wanted = words.value.toLowerCase().split(/\s+/);
  for (const row of everyRow) {
    const text = row.textContent.toLowerCase();
    const fits = most.value === "" || Number(row.dataset.megabytes) <= Number(most.value);
    row.hidden = !fits || !wanted.every((word) => text.includes(word));
  }
  shown.textContent = `${everyRow.filter((row) => !row.hidden).length} of ${everyRow.length} shown`;
}

function sortTable(table, column, up) {
  const key = (row) => row.cells[column].dataset.key;
  const absent = (text) => text === "nan" || text === "";
  const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (absent(x) || absent(y)) return absent(x) - absent(y);
    return up ? compare(x, y) : compare(y, x);
  });
  for (const head of table.tHead.rows[0].cells) head.removeAttribute("aria-sort");
  table.tHead.rows[0].cells[column].setAttribute("aria-sort", up ? "ascending" : "descending");
  table.tBodies[0].append(...rows);
}

// The order of all tables by the column of that name, best first; as ranked without one.
function orderAll(label) {
  for (const table of tables) {
    const heads = [...table.tHead.rows[0].cells];
    const column = heads.findIndex((head) => head.dataset.column === label);
    if (column >= 0) {
      sortTable(table, column, heads[column].dataset.best !== "high");
    } else if (label === "") {
      for (const head of heads) head.removeAttribute("aria-sort");
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => ranked.get(a) - ranked.get(b)));
    }
  }
}

for (const input of [words, most]) input.addEventListener("input", filterRows);
order.addEventListener("change", () => orderAll(order.value));
const showAll = () => { for (const table of tables) table.classList.toggle("few", !all.checked); };
all?.addEventListener("change", showAll);
if (all) showAll();
for (const button of document.querySelectorAll("thead button")) {
  const head = button.parentElement;
  button.addEventListener("click", () => sortTable(head.closest("table"), head.cellIndex, head.getAttribute("aria-sort") !== "ascending"));
}
filterRows();
