// What the visitor sees and does. Computing is in worker.js, drawing in compose.js, sound in player.js.
import { Composer } from "./compose.js";
import { facePixels, middleSquare, openPhoto, toPixels } from "./image.js";
import { openSound, Player, recorder, save } from "./player.js";

const $ = id => document.getElementById(id), canvas = $("picture"), overlay = $("overlay"), pen = overlay.getContext("2d");
const LABELS = { jaw: "Jaw", lip_width: "Lip width", lip_corner: "Lip corners", blink_l: "Blink left", blink_r: "Blink right",
  gaze_x: "Gaze sideways", gaze_y: "Gaze up, down", brow_raise: "Brows raised", brow_furrow: "Brows drawn", yaw: "Turn (yaw)",
  pitch: "Nod (pitch)", roll: "Tilt (roll)", light_x: "Light from", light: "Light strength", shift_x: "Move sideways",
  shift_y: "Move up, down", scale: "Nearer" };
const WORKS = 0.5;                                           // a slider is shown if its value is read back with this correlation
const worker = new Worker("worker.js", { type: "module" }), player = new Player(worker, show, share => { $("progress").value = share; });
const app = { worker, player, values: {}, seed: 0, path: null, shown: [], ready: false, pending: false };
let frame, again = false, later, adjusting = false;

const tell = text => { $("status").textContent = text; };
const fail = error => { $("error").textContent = error?.message || String(error); };
const guarded = job => async (...args) => {                  // one sentence for whatever goes wrong
  if (args[0] instanceof Event) $("error").textContent = "";
  try { await job(...args); } catch (error) {
    fail(error.name === "NotAllowedError" ? new Error("The browser was not allowed to use it; allow it and try again.")
      : error.name === "NotFoundError" ? new Error("There is none on this device.") : error);
  }
};
const on = (id, kind, job) => $(id).addEventListener(kind, guarded(job));

// ---- photo and face square

function usePhoto(image) {
  player.stop();
  app.image = image;
  Object.assign(overlay, { width: image.width, height: image.height });
  app.composer.setPhoto(image);
  setSquare(middleSquare(image));
}

function setSquare(square) {
  const { width, height } = app.image, clamp = (v, low, high) => Math.min(Math.max(v, low), high);
  app.square = { cx: clamp(square.cx, 0, width), cy: clamp(square.cy, 0, height), angle: square.angle,
    side: clamp(square.side, 24, 1.5 * Math.max(width, height)) };
  app.composer.setSquare({ ...app.square });
  app.composer.clear();
  drawOverlay();
  clearTimeout(later);
  later = setTimeout(() => worker.postMessage({ kind: "photo", pixels: facePixels(app.image, app.square, app.model.size), seed: app.seed }), 60);
}

function drawOverlay() {
  const { width, height } = overlay, unit = Math.max(width, height) / 400;
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.clearRect(0, 0, width, height);
  if (!app.square) return;
  const { cx, cy, side, angle } = app.square;
  pen.translate(cx, cy);
  pen.rotate(angle);
  pen.lineWidth = 2 * unit;
  if (adjusting) {
    pen.strokeStyle = "#000";
    pen.strokeRect(-side / 2 - unit, -side / 2 - unit, side + 2 * unit, side + 2 * unit);
    pen.strokeStyle = "#fff";
    pen.strokeRect(-side / 2, -side / 2, side, side);
  }
  if (app.composer.view === 3 && frame) {                    // the field: from where each place takes its look
    const { size } = app.model, { field } = frame.parts, n = 16, s = side / 2;
    pen.strokeStyle = "#0a7";
    pen.fillStyle = "#e33";
    pen.lineWidth = unit;
    for (let j = 0; j < n; j++) for (let i = 0; i < n; i++) {
      const x = (2 * i + 1) / n - 1, y = (2 * j + 1) / n - 1, at = 2 * (Math.floor((j + 0.5) / n * size) * size + Math.floor((i + 0.5) / n * size));
      pen.beginPath();
      pen.moveTo(s * (x + field[at]), s * (y + field[at + 1]));
      pen.lineTo(s * x, s * y);
      pen.stroke();
      pen.fillRect(s * x - unit, s * y - unit, 2 * unit, 2 * unit);
    }
  }
}

const pointers = new Map();

overlay.addEventListener("pointerdown", event => {
  if (!adjusting) return;
  overlay.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
});
overlay.addEventListener("pointermove", event => {
  const scale = overlay.width / overlay.clientWidth, here = [event.offsetX, event.offsetY], before = pointers.get(event.pointerId);
  if (adjusting && before) {
    const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1], { cx, cy, side, angle } = app.square;
    pointers.set(event.pointerId, here);
    if (other) {                                             // two fingers: size and angle
      const span = p => [p[0] - other[0], p[1] - other[1]], [a, b] = [span(before), span(here)];
      setSquare({ cx, cy, side: side * Math.hypot(...b) / Math.max(1, Math.hypot(...a)), angle: angle + Math.atan2(b[1], b[0]) - Math.atan2(a[1], a[0]) });
    } else setSquare({ cx: cx + (here[0] - before[0]) * scale, cy: cy + (here[1] - before[1]) * scale, side, angle });
  } else if ($("lead").checked && !$("puppet").hidden && app.square) {
    const x = (here[0] * scale - app.square.cx) / app.square.side, y = (here[1] * scale - app.square.cy) / app.square.side;
    for (const [name, share] of [["gaze_x", 2 * x], ["gaze_y", 2 * y], ["yaw", 1.5 * x], ["pitch", 1.5 * y]]) {
      if (name in app.values) setSlider(name, Math.min(1, Math.max(-1, share)) * app.model.controls[name].high);
    }
    pose();
  }
});
for (const kind of ["pointerup", "pointercancel"]) overlay.addEventListener(kind, event => pointers.delete(event.pointerId));
overlay.addEventListener("wheel", event => {
  if (!adjusting) return;
  event.preventDefault();
  setSquare({ ...app.square, side: app.square.side * Math.exp(event.deltaY / 1000) });
}, { passive: false });
overlay.addEventListener("keydown", event => {
  const { cx, cy, side, angle } = app.square || {}, step = side / 50;
  const moves = { ArrowLeft: { cx: cx - step }, ArrowRight: { cx: cx + step }, ArrowUp: { cy: cy - step }, ArrowDown: { cy: cy + step },
    "+": { side: 1.04 * side }, "-": { side: side / 1.04 }, ",": { angle: angle - 0.02 }, ".": { angle: angle + 0.02 } };
  if (!adjusting || !moves[event.key]) return;
  event.preventDefault();
  setSquare({ ...app.square, ...moves[event.key] });
});

on("adjust", "click", () => {
  player.stop();
  adjusting = !adjusting;
  $("adjust").setAttribute("aria-pressed", adjusting);
  overlay.classList.toggle("adjusting", adjusting);
  if (adjusting) overlay.focus();
  drawOverlay();
});
on("photo", "change", async ({ target }) => { if (target.files[0]) usePhoto(await openPhoto(target.files[0])); target.value = ""; });
on("example", "click", useExample);
document.addEventListener("dragover", event => event.preventDefault());
const take = guarded(async (event, files) => {               // dropped or pasted: a sound, or else a picture
  if (!files?.length || !app.ready) return;
  event.preventDefault();
  if (/^(audio|video)\//.test(files[0].type)) await useSound(files[0]);
  else usePhoto(await openPhoto(files[0]));
});
document.addEventListener("drop", event => { event.preventDefault(); take(event, event.dataTransfer.files); });
document.addEventListener("paste", event => take(event, event.clipboardData.files));

const video = document.querySelector("#camera video");
on("webcam", "click", async () => {
  video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user" } });
  $("camera").showModal();
});
on("shoot", "click", async () => {
  const image = toPixels(video, video.videoWidth, video.videoHeight);
  $("camera").close();
  usePhoto(image);
});
on("close-camera", "click", () => $("camera").close());
on("camera", "close", () => video.srcObject?.getTracks().forEach(track => track.stop()));

// ---- talk

async function useSound(blob) {
  player.stop();
  Object.assign(app, await openSound(blob, worker.rate));
  $("sound-name").textContent = `${blob.name || "Sound"}, ${app.sound.duration.toFixed(1)} s`;
}

async function talk(record) {
  for (const id of ["download", "take"]) $(id).disabled = true;
  $("play").textContent = "Stop";
  if (record) tell("Recording while it plays …");
  const blob = await player.play({ sound: app.sound, wave: app.wave, seed: app.seed, record: record && canvas });
  $("play").textContent = "Play";
  for (const id of ["download", "take"]) $(id).disabled = false;
  if (record && blob?.size) { save(app.saved = blob, "talking"); tell("The video is in your downloads."); }
}

on("sound", "change", async ({ target }) => { if (target.files[0]) await useSound(target.files[0]); target.value = ""; });
on("play", "click", () => player.now ? player.stop() : talk(false));
on("download", "click", () => talk(true));
on("take", "click", () => { app.seed++; return talk(false); });
on("microphone", "click", async ({ currentTarget: button }) => {
  if (player.now) return player.stop();
  button.setAttribute("aria-pressed", true);
  try { await player.listen(worker.rate, () => tell("Listening; the face follows 0.8 seconds later.")); } finally { button.setAttribute("aria-pressed", false); }
});

// ---- puppet

function setSlider(name, value) {
  app.values[name] = value;
  $(`slider-${name}`).value = value;
  $(`value-${name}`).textContent = `${value.toFixed(app.model.controls[name].unit ? 0 : 2)}${app.model.controls[name].unit === "degrees" ? "°" : ""}`;
}

function addSlider(box, id, label, low, high, changed) {
  const row = document.createElement("div");
  row.className = "slider";
  row.innerHTML = `<label for="slider-${id}">${label}</label><input id="slider-${id}" type="range" min="${low}" max="${high}"
    step="${(high - low) / 200}" value="0"><output id="value-${id}" for="slider-${id}"></output>`;
  row.querySelector("input").addEventListener("input", ({ target }) => changed(+target.value));
  $(box).append(row);
}

function makeSliders() {
  const { controls, generator: { moods } } = app.model;
  for (const name of Object.keys(LABELS).filter(name => controls[name]?.correlation >= WORKS)) {
    addSlider("sliders", name, LABELS[name], controls[name].low, controls[name].high, value => { setSlider(name, value); pose(); });
    setSlider(name, 0);
  }
  app.mood = moods.map(() => 0);
  moods.forEach((name, k) => addSlider("moods", name, name[0].toUpperCase() + name.slice(1), 0, 1, value => {
    app.mood[k] = value;
    worker.postMessage({ kind: "mood", weights: app.mood });
  }));
}

function pose(token) {                                       // ask for the sliders' face; while one is computed, only the last counts
  if (!app.still) return;
  if (!token) {
    token = app.still.slice();
    for (const [name, value] of Object.entries(app.values)) app.model.controls[name].direction.forEach((d, n) => { token[n] += value * d; });
  }
  app.token = token;
  if (app.pending) { again = true; return; }
  app.pending = true;
  worker.postMessage({ kind: "pose", token });
}

async function replay(record) {
  const tape = record ? recorder(canvas) : null, start = performance.now();
  tape?.start();
  for (let n; (n = Math.floor((performance.now() - start) / 40)) < app.path.length;) {
    pose(app.path[n]);
    await new Promise(requestAnimationFrame);
  }
  const blob = await tape?.stop();
  if (blob?.size) { save(app.saved = blob, "puppet"); tell("The video is in your downloads."); }
}

on("reset", "click", () => { Object.keys(app.values).forEach(name => setSlider(name, 0)); pose(); });
let clock;
on("record", "click", ({ currentTarget: button }) => {       // keeps the token, 25 times a second
  const recording = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", recording);
  clearInterval(clock);
  if (recording) { app.path = []; clock = setInterval(() => app.path.push(app.token || app.still), 40); }
  for (const id of ["replay", "save-path"]) $(id).disabled = recording || !app.path.length;
});
on("replay", "click", () => replay(false));
on("save-path", "click", () => replay(true));

const tabs = ["talk", "puppet"];
for (const name of tabs) {
  const tab = $(`tab-${name}`);
  tab.addEventListener("click", () => {
    player.stop();
    for (const other of tabs) {
      $(other).hidden = other !== name;
      $(`tab-${other}`).setAttribute("aria-selected", other === name);
      $(`tab-${other}`).tabIndex = other === name ? 0 : -1;
    }
    if (name === "puppet") pose();
  });
  tab.addEventListener("keydown", ({ key }) => { if (/^Arrow/.test(key)) { const next = $(`tab-${tabs[1 - tabs.indexOf(name)]}`); next.click(); next.focus(); } });
}

// ---- what comes back

function show(next) {
  frame = next;
  const start = performance.now();
  app.composer.draw(frame.parts);
  const now = performance.now();
  app.shown = [...app.shown.filter(time => now - time < 1000), now];
  if (!$("inside").open) return;
  const bars = $("bars").getContext("2d"), { width, height } = bars.canvas, step = width / frame.token.length;
  bars.clearRect(0, 0, width, height);
  frame.token.forEach((v, k) => {
    bars.fillStyle = v < 0 ? "#d2691e" : "#2a7fd4";
    bars.fillRect(k * step + 1, height / 2, step - 2, Math.max(-1, Math.min(1, -v / 3)) * height / 2);
  });
  drawOverlay();
  const times = { "Sound to features, a second": frame.ms.mel, "Generator, a window": frame.ms.generator,
    "Decoder, a picture": frame.ms.decoder, "Drawing, a picture": now - start, "Pictures a second": app.shown.length };
  $("times").innerHTML = Object.entries(times).map(([name, ms]) => `<tr><th scope="row">${name}</th><td>${ms.toFixed(1)}</td></tr>`).join("");
}

const replies = {
  async ready({ model, threads }) {
    Object.assign(app, { model, composer: await Composer.make(canvas, model, location), ready: true });
    worker.rate = model.mel.rate;
    makeSliders();
    tell(`Ready: ${model.release}, ${model.size} x ${model.size} pixels inside, ${threads} thread${threads > 1 ? "s" : ""}.`);
    await useExample();
    for (const id of ["play", "download", "take"]) $(id).disabled = false;
  },
  photo({ token }) { app.still = token; app.pending = again = false; pose(); },
  frame(next) {
    if (next.number >= 0) return player.receive(next);
    app.pending = false;
    if (!player.now) show(next);
    if (again) { again = false; pose(app.token); }
  },
  error: ({ text }) => { app.pending = false; player.stop(); fail(text); },
};

async function useExample() {
  const get = async name => (await fetch(`example/${name}`)).blob();
  usePhoto(await openPhoto(await get("portrait.png")));
  if (!app.wave) { await useSound(await get("speech.wav")); $("sound-name").textContent = `Example speech, ${app.sound.duration.toFixed(1)} s`; }
}

for (const layer of document.querySelectorAll("[name=layer]")) layer.addEventListener("change", () => {
  app.composer.view = +layer.value;
  if (frame) show(frame);
  drawOverlay();
});
on("inside", "toggle", () => { if (frame) show(frame); });
worker.onmessage = ({ data }) => guarded(replies[data.kind])(data);
worker.onerror = event => fail(`The page's worker stopped: ${event.message || "it could not be loaded"}.`);
const wish = new URLSearchParams(location.search);
worker.postMessage({ kind: "load", base: new URL(".", location).href, backend: wish.get("backend") || "wasm",
  threads: Math.min(4, Math.max(1, (navigator.hardwareConcurrency || 1) - 1)) });         // one core is for drawing

export { app };
