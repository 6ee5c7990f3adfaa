// What the visitor sees and does. Computing is in worker.js, drawing in compose.js, playing in player.js.
import { Composer } from "./compose.js";
import { facePixels, openPhoto, toPixels } from "./image.js";
import { openSound, Player } from "./player.js";
import { adjustable, middleSquare, placeSquare } from "./square.js";
import { FPS } from "./video.js";

const $ = id => document.getElementById(id);
const canvas = $("picture"), view = $("view"), camera = $("camera-video");
const worker = new Worker("worker.js", { type: "module" });
const player = new Player(worker, show, share => { $("progress").value = share; });
export const app = { worker, player, sliders: {}, values: {}, takes: 0, path: [], shown: [] };
let frame, wanted = null, later, clock;   // wanted: the token after the pending one
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const tell = text => { $("status").textContent = text; };
const fail = error => { $("error").textContent = error.message; };
const press = (button, pressed) => button.setAttribute("aria-pressed", pressed);
const pressed = button => button.getAttribute("aria-pressed") === "true";
const enable = (...ids) => { for (const id of ids) $(id).disabled = false; };

function on(target, kind, job) {                             // one sentence for whatever goes wrong
  target.addEventListener(kind, async event => {
    $("error").textContent = "";
    try { await job(event); } catch (error) { fail(error); }
  });
}
const onClick = (id, job) => on($(id), "click", job);

// ---- photo and face square
function usePhoto(image, square) {                           // without a square, one is shown to be adjusted
  player.stop();
  app.image = image;
  app.composer.setPhoto(image);
  press($("adjust"), !square);
  setSquare(square || middleSquare(image));
}

function setSquare({ cx, cy, size, angle }) {
  const { width, height } = app.image, largest = 1.5 * Math.max(width, height);
  app.square = { cx: clamp(cx, 0, width), cy: clamp(cy, 0, height), size: clamp(size, 24, largest), angle };
  app.composer.setSquare(app.square);
  placeSquare($("square"), app.square, app.image);
  clearTimeout(later);
  later = setTimeout(() => {
    worker.postMessage({ kind: "photo", pixels: facePixels(app.image, app.square, app.model.size) });
  }, 60);
}

function point({ clientX, clientY }) {                       // of an event -> [x, y] in pixels of the photo
  const { left, top, width } = canvas.getBoundingClientRect(), scale = canvas.width / width;
  return [(clientX - left) * scale, (clientY - top) * scale];
}

adjustable(view, point, () => pressed($("adjust")) ? app.square : null, setSquare);
onClick("adjust", () => {
  player.stop();
  press($("adjust"), !pressed($("adjust")));
  view.focus();
});

async function receive(event, [file]) {                      // a photo, chosen, dropped or pasted
  if (!file || !app.model) return;
  event.preventDefault();
  usePhoto(await openPhoto(file));
}

on($("photo"), "change", event => receive(event, event.target.files));
on($("sound"), "change", ({ target }) => useSound(target.files[0]));
for (const id of ["photo", "sound"]) onClick(id, ({ target }) => { target.value = ""; });
onClick("example", useExample);
document.addEventListener("dragover", event => event.preventDefault());
on(document, "drop", event => receive(event, event.dataTransfer.files));
on(document, "paste", event => receive(event, event.clipboardData.files));
onClick("webcam", async () => {
  camera.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user" } });
  $("camera").showModal();
});
onClick("shoot", () => usePhoto(toPixels(camera, camera.videoWidth, camera.videoHeight)));
on($("camera"), "close", () => camera.srcObject.getTracks().forEach(track => track.stop()));

// ---- talk
async function useSound(file, name = file.name || "Sound") {
  player.stop();
  app.speech = await openSound(file, app.model.mel.rate);
  $("sound-name").textContent = `${name}, ${app.speech.sound.duration.toFixed(1)} s`;
}

let release = () => {};                                      // of the button whose work goes on

async function start(button, job) {                          // the button is pressed until the job ends
  release();
  const own = release = () => press(button, false);
  press($("adjust"), false);
  press(button, true);
  try { await job(); } finally { if (release === own) own(); }
}
const toggle = (id, job) => onClick(id, () => pressed($(id)) ? player.stop() : start($(id), job));

async function download(name, job) {
  tell("Writing the video …");
  const codecs = globalThis.VideoEncoder && globalThis.AudioEncoder;
  const video = await (codecs ? player.write(canvas, job) : player.record(canvas, job));
  tell(video ? "The video is in your downloads." : "No video was written.");
  if (!video) return;
  const href = URL.createObjectURL(video), ending = video.type.match(/mp4|webm/);
  Object.assign(document.createElement("a"), { href, download: `${name}.${ending}` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60000);
}

const speech = () => ({ ...app.speech, take: app.takes }), talk = () => player.play(speech());
toggle("play", talk);
onClick("take", () => { app.takes++; return start($("play"), talk); });
onClick("download", () => download("talking", speech()));
const listening = () => tell("Listening; the face follows 0.8 seconds later.");
toggle("microphone", () => player.listen(app.model.mel.rate, listening));

// ---- puppet
function addSlider(box, id, { label, low, high, unit }, changed) {       // -> a function that sets it
  $(box).insertAdjacentHTML("beforeend", `<div class="slider"><label for="slider-${id}">${label}</label>
    <input id="slider-${id}" type="range" min="${low}" max="${high}" step="${(high - low) / 200}">
    <output for="slider-${id}"></output></div>`);
  const [, input, output] = $(box).lastElementChild.children, set = value => {
    input.value = value;
    output.textContent = unit === "degrees" ? `${value.toFixed(0)}°` : value.toFixed(2);
    changed(value);
  };
  on(input, "input", () => set(+input.value));
  set(0);
  return set;
}

function makeSliders({ controls, generator: { moods } }) {
  for (const [name, control] of Object.entries(controls)) {
    app.sliders[name] = addSlider("sliders", name, control, value => { app.values[name] = value; pose(); });
  }
  const weights = moods.map(() => 0);
  moods.forEach((name, k) => {
    const changed = value => { weights[k] = value; worker.postMessage({ kind: "mood", weights }); };
    addSlider("moods", name, { label: name, low: 0, high: 1 }, changed);
  });
}

function pose() {                                            // shows the face of the sliders
  if (!app.still) return;
  const token = app.still.slice();
  for (const [name, value] of Object.entries(app.values)) {
    app.model.controls[name].direction.forEach((d, n) => { token[n] += value * d; });
  }
  app.token = wanted = token;
  if (!app.following) return follow();
}

async function follow() {                                    // meanwhile, only the last wish counts
  app.following = true;
  while (wanted) {
    const now = player.begin({ tokens: [wanted] });
    wanted = null;
    const face = await player.take(now, 1);                  // none if something else is to be played
    if (face) requestAnimationFrame(() => show(face));
    if (player.now === now && !wanted) player.stop();
  }
  app.following = false;
}

view.addEventListener("pointermove", event => {              // the pointer leads gaze and head
  if (pressed($("adjust")) || !$("lead").checked || !$("puppet").open) return;
  const { cx, cy, size } = app.square, [x, y] = point(event);
  const right = (x - cx) / size, down = (y - cy) / size;
  const shares = { gaze_x: 2 * right, gaze_y: 2 * down, yaw: 1.5 * right, pitch: 1.5 * down };
  for (const [name, share] of Object.entries(shares)) {
    app.sliders[name]?.(clamp(share, -1, 1) * app.model.controls[name].high);
  }
});
onClick("reset", () => { for (const set of Object.values(app.sliders)) set(0); });
onClick("record", ({ currentTarget: button }) => {           // keeps the token, 25 times a second
  const recording = !pressed(button);
  press(button, recording);
  clearInterval(clock);
  if (!recording) return enable("replay", "save-path");
  app.path = [];
  clock = setInterval(() => app.path.push(app.token), 1000 / FPS);
});
const recorded = () => ({ tokens: app.path, total: app.path.length });
toggle("replay", () => player.play(recorded()));
onClick("save-path", () => download("puppet", recorded()));
for (const mode of ["talk", "puppet"]) on($(mode), "toggle", pose);

// ---- what comes back
function show(received) {
  frame = received;
  const start = performance.now();
  app.composer.draw(frame.parts);
  const now = performance.now();
  app.shown = [...app.shown.filter(time => now - time < 1000), now];
  if ($("inside").open) lookInside(now - start);
}

function lookInside(drawing) {
  const bars = $("bars").getContext("2d"), { width, height } = bars.canvas, step = width / frame.token.length;
  bars.clearRect(0, 0, width, height);
  frame.token.forEach((value, k) => {
    bars.fillStyle = value < 0 ? "#d2691e" : "#2a7fd4";
    bars.fillRect(k * step + 1, height / 2, step - 2, clamp(-value / 3, -1, 1) * height / 2);
  });
  [...Object.values(frame.ms), drawing, app.shown.length].forEach((value, k) => {
    $("times").rows[k].cells[1].textContent = value.toFixed(1);
  });
}

const replies = {
  async ready({ model, threads }) {
    const shader = await (await fetch("frame.glsl")).text();
    Object.assign(app, { model, composer: new Composer(canvas, shader) });
    makeSliders(model);
    tell(`Ready: ${model.release}, ${model.size} x ${model.size} pixels inside, threads: ${threads}.`);
    await useExample();
    enable("photo", "webcam", "example", "adjust", "sound", "microphone", "play", "download", "take");
  },
  photo({ token }) { player.stop(); app.still = token; return pose(); },
  frame(received) { player.receive(received); },
  error({ text }) { player.stop(); throw new Error(text); },
};

async function useExample() {
  const get = async name => (await fetch(`example/${name}`)).blob();
  usePhoto(await openPhoto(await get("portrait.png")), app.model.example);
  if (!app.speech) await useSound(await get("speech.wav"), "Example speech");
}

on($("layers"), "change", ({ target }) => { app.composer.view = +target.value; show(frame); });
on($("inside"), "toggle", () => frame && show(frame));
worker.onmessage = async ({ data }) => {
  try { await replies[data.kind](data); } catch (error) { tell(""); fail(error); }
};
worker.onerror = ({ message }) => fail(new Error(`The page's worker stopped: ${message || "not loaded"}.`));
const backend = new URLSearchParams(location.search).get("backend") || "wasm";
const threads = clamp((navigator.hardwareConcurrency || 1) - 1, 1, 4);         // one core is for drawing
worker.postMessage({ kind: "load", base: new URL(".", location).href, backend, threads });
