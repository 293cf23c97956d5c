// The pairs: four views, one clock, an order, a filter, the keyboard.

const MODES = ["side", "toggle", "slider", "difference"];

class PairView {
  constructor(card, clip) {
    this.card = card;
    this.clip = clip;
    this.words = card.querySelector(".prompt").textContent.toLowerCase();
    this.stage = card.querySelector(".stage");
    this.figures = [...card.querySelectorAll(".view")];
    this.sheets = this.figures.map((figure) => figure.querySelector("img"));
    this.visible = true;
    this.mode = "side";
    this.quantized = false; // which one the toggle shows
    this.split = 0.5;
    this.single = this.makeSingle();
    this.contexts = [...this.figures, this.single].map((figure) => this.addCanvas(figure));
    for (const button of card.querySelectorAll("[data-mode]")) {
      button.addEventListener("click", () => this.press(button.dataset.mode));
    }
    this.setMode("side");
  }

  makeSingle() {
    const figure = document.createElement("figure");
    figure.className = "view single";
    const slider = document.createElement("input");
    Object.assign(slider, { type: "range", min: 0, max: 100, value: 50, className: "split" });
    slider.setAttribute("aria-label", "Where float ends and quantized begins");
    slider.addEventListener("input", () => { this.split = slider.value / 100; this.draw(); });
    this.slider = slider;
    this.caption = document.createElement("figcaption");
    figure.append(slider, this.caption);
    this.stage.append(figure);
    return figure;
  }

  addCanvas(figure) {
    const canvas = makeCanvas(this.clip);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", figure.querySelector("figcaption").textContent || "both");
    figure.prepend(canvas);
    if (figure === this.single) this.listen(canvas);
    return canvas.getContext("2d");
  }

  listen(canvas) {
    const follow = (event) => {
      if (this.mode !== "slider") return;
      const box = canvas.getBoundingClientRect();
      this.split = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
      this.slider.value = Math.round(100 * this.split);
      this.draw();
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (this.mode === "slider") { canvas.setPointerCapture(event.pointerId); follow(event); }
    });
    canvas.addEventListener("pointermove", (event) => { if (event.buttons) follow(event); });
    canvas.addEventListener("click", () => { if (this.mode === "toggle") this.flip(); });
  }

  // A second press on Toggle flips.
  press(mode) {
    if (mode === "toggle" && this.mode === "toggle") this.flip();
    else this.setMode(mode);
  }

  setMode(mode) {
    this.mode = mode;
    this.card.dataset.mode = mode;
    for (const figure of this.figures) figure.hidden = mode !== "side";
    this.single.hidden = mode === "side";
    this.slider.hidden = mode !== "slider";
    for (const button of this.card.querySelectorAll("[data-mode]")) {
      button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
    }
    this.draw();
  }

  flip() {
    if (this.mode === "toggle") this.quantized = !this.quantized;
    else { this.quantized = true; this.mode = "toggle"; }
    this.setMode("toggle");
  }

  draw(first = false) {
    if (!(this.visible || first) || this.card.hidden || !this.sheets.every((sheet) => sheet.complete && sheet.naturalWidth)) return;
    const frame = clock.frame;
    if (this.mode === "side") this.sheets.forEach((sheet, i) => drawFrame(this.contexts[i], sheet, this.clip, frame));
    else this.drawSingle(this.contexts[2], frame);
    this.card.dataset.frame = frame;
  }

  drawSingle(context, frame) {
    const { width, height } = this.clip;
    let words = "";
    if (this.mode === "toggle") {
      drawFrame(context, this.sheets[Number(this.quantized)], this.clip, frame);
      words = this.quantized ? "quantized" : "float";
    } else if (this.mode === "slider") {
      drawFrame(context, this.sheets[1], this.clip, frame);
      context.save();
      context.beginPath();
      context.rect(0, 0, this.split * width, height);
      context.clip();
      drawFrame(context, this.sheets[0], this.clip, frame);
      context.restore();
      this.single.style.setProperty("--split", this.split);
      words = "float left, quantized right";
    } else {
      drawDifference(context, this.sheets, this.clip, frame, gain());
      words = `difference × ${gain()}`;
    }
    if (this.caption.textContent !== words) {
      this.caption.textContent = words;
      context.canvas.setAttribute("aria-label", words);
    }
  }
}

const numFrames = Math.max(1, ...clipData.clips.map((clip) => clip.frames));
const clock = new Clock(numFrames, clipData.framesPerSecond);
const element = (id) => document.getElementById(id);
const gain = () => Number(element("gain").value);
const views = [...document.querySelectorAll(".pair")].map((card, i) => new PairView(card, clipData.clips[i]));

function drawAll() {
  for (const view of views) view.draw();
}

function showClock() {
  drawAll();
  root.dataset.frame = clock.frame;
  const play = element("play");
  if (!play) return;
  play.textContent = clock.playing ? "Pause" : "Play";
  play.setAttribute("aria-pressed", String(clock.playing));
  element("frame").value = clock.frame;
  element("frame-words").textContent = `${clock.frame + 1} / ${clock.frames}`;
}

function arrange() {
  const words = element("filter").value.trim().toLowerCase();
  const list = document.querySelector(".pairs");
  for (const i of clipData.orders[element("sort").value]) list.append(views[i].card);
  for (const view of views) view.card.hidden = !view.words.includes(words);
  const count = views.filter((view) => !view.card.hidden).length;
  element("shown").textContent = `${count} shown`;
  element("none-shown").hidden = count > 0;
  drawAll();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  const at = event.target instanceof Element ? event.target : document.body;
  if (at.matches("input:not([type=range]), select, textarea")) return;
  const card = at.closest(".pair");
  const chosen = card ? views.filter((view) => view.card === card) : views;
  const isVideo = clock.frames > 1;
  if (event.key === " " && isVideo && !at.matches("button, summary, a, audio")) clock.toggle();
  else if (event.key === "ArrowLeft" && isVideo && !at.matches("[type=range], .scroll, audio")) clock.step(-1);
  else if (event.key === "ArrowRight" && isVideo && !at.matches("[type=range], .scroll, audio")) clock.step(1);
  else if (event.key === "t") {
    const target = chosen.every((view) => view.mode === "toggle") ? !chosen[0].quantized : true;
    for (const view of chosen) { view.quantized = target; view.setMode("toggle"); }
  } else if ("1234".includes(event.key)) for (const view of chosen) view.setMode(MODES[Number(event.key) - 1]);
  else return;
  event.preventDefault();
}

function startPairs() {
  clock.onChange = showClock;
  element("sort").addEventListener("change", arrange);
  element("filter").addEventListener("input", arrange);
  element("mode").addEventListener("change", () => { for (const view of views) view.setMode(element("mode").value); });
  element("gain").addEventListener("change", drawAll);
  if (numFrames > 1) {
    element("play").addEventListener("click", () => clock.toggle());
    element("frame").addEventListener("input", () => { clock.pause(); clock.show(Number(element("frame").value)); });
    element("speed").addEventListener("change", () => { clock.speed = Number(element("speed").value); });
  }
  addEventListener("keydown", onKey);
  // one sound at a time, so that float and quantized can be told apart
  addEventListener("play", (event) => { for (const audio of document.querySelectorAll("audio")) if (audio !== event.target) audio.pause(); }, true);
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const view = views[Number(entry.target.dataset.pair)];
      view.visible = entry.isIntersecting;
      view.draw();
    }
  }, { rootMargin: "200px" });
  for (const view of views) watcher.observe(view.card);
  arrange();
  for (const view of views) {
    Promise.all(view.sheets.map((sheet) => sheet.decode())).then(() => { view.draw(true); root.dataset.drawn = "true"; });
  }
  showClock();
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) clock.play();
}

if (views.length) startPairs();
