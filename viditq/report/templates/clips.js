"use strict";
// One clock for all clips of the page, so that every clip shows the same frame at the same moment.

const root = document.documentElement;
root.classList.replace("no-js", "js");
addEventListener("error", (event) => { root.dataset.error = event.message; });
addEventListener("unhandledrejection", (event) => { root.dataset.error = String(event.reason); });

const clipData = JSON.parse(document.getElementById("clip-data").textContent);

class Clock {
  constructor(frames, framesPerSecond) {
    this.frames = frames;
    this.framesPerSecond = framesPerSecond;
    this.speed = 1;
    this.frame = 0;
    this.playing = false;
    this.onChange = () => {};
    this.elapsed = 0;
  }

  show(frame) {
    this.frame = ((frame % this.frames) + this.frames) % this.frames;
    this.onChange();
  }

  step(by) {
    this.pause();
    this.show(this.frame + by);
  }

  play() {
    if (this.playing || this.frames < 2) return;
    this.playing = true;
    this.elapsed = 0;
    let before = performance.now();
    const tick = (now) => {
      if (!this.playing) return;
      this.elapsed += Math.min(now - before, 250) * this.speed; // a tab in the background does not rush afterwards
      before = now;
      const length = 1000 / this.framesPerSecond;
      const steps = Math.floor(this.elapsed / length);
      this.elapsed -= steps * length;
      if (steps) this.show(this.frame + steps);
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
    this.onChange();
  }

  pause() {
    this.playing = false;
    this.onChange();
  }

  toggle() {
    if (this.playing) this.pause();
    else this.play();
  }
}

// Draws frame number `frame` of a contact sheet over the whole canvas.
function drawFrame(context, sheet, clip, frame) {
  const i = frame % clip.frames;
  const x = (i % clip.columns) * clip.width;
  const y = Math.floor(i / clip.columns) * clip.height;
  context.drawImage(sheet, x, y, clip.width, clip.height, 0, 0, clip.width, clip.height);
}

function makeCanvas(clip) {
  const canvas = document.createElement("canvas");
  canvas.width = clip.width;
  canvas.height = clip.height;
  return canvas;
}

// |a - b| * gain, channel by channel.
function drawDifference(context, sheets, clip, frame, gain) {
  const [a, b] = sheets.map((sheet) => {
    const scratch = makeCanvas(clip).getContext("2d", { willReadFrequently: true });
    drawFrame(scratch, sheet, clip, frame);
    return scratch.getImageData(0, 0, clip.width, clip.height);
  });
  for (let i = 0; i < a.data.length; i++) {
    if (i % 4 !== 3) a.data[i] = Math.abs(a.data[i] - b.data[i]) * gain; // the array clamps to 255
  }
  context.putImageData(a, 0, 0);
}
