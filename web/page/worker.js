// All computing: the page sends a photo, sound or tokens, and gets frames back, never more than it asked for.
import { gaussian, MotionStream } from "./generator.js";
import { levelGain, MelStream, RunningLevel } from "./mel.js";
import { Networks } from "./networks.js";

const inbox = [], ms = { mel: 0, generator: 0, decoder: 0 };           // ms: of the last of each stage
const draws = {};                                            // of each take, so that it can be made again
let net, mood, talk = null, wake = () => {};

async function load({ base, backend, threads }) {
  const file = backend === "webgpu" ? "ort.webgpu.bundle.min.mjs" : "ort.wasm.bundle.min.mjs";
  const ort = await import(new URL(`ort/${file}`, base));
  ort.env.wasm.wasmPaths = new URL("ort/", base).href;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? threads : 1;
  ort.env.logLevel = "error";
  const options = { executionProviders: [backend], graphOptimizationLevel: "all" };
  net = await Networks.load(ort, new URL("model/", base), options);
  postMessage({ kind: "ready", model: net.model, threads: ort.env.wasm.numThreads });
}

function begin({ id, wanted, wave, tokens, take, noise }) {
  // wave: a whole recording, or null for live sound, which comes by "hear"; or the tokens themselves
  const { mel, generator: g } = net.model;
  talk = { id, wanted, wave, at: 0, drawn: 0, tokens: tokens || [] };
  if (tokens) return;
  const still = net.still.data, silence = new Float32Array(g.audio).fill(g.silence);
  const drawn = noise || (draws[take] ||= []);
  const normal = wave ? () => drawn[talk.drawn++] ??= gaussian() : gaussian;
  talk.stream = new MotionStream({ velocity: net.velocity, g, still, silence, normal });
  talk.mel = new MelStream(net.row, mel);
  talk.level = new RunningLevel(mel.frame);
  if (wave) talk.gain = levelGain(wave, mel.frame);
}

async function hear(samples) {
  if (talk?.stream) talk.stream.rows.push(...await timed("mel", () => talk.mel.push(samples)));
}

async function timed(stage, job) {
  const start = performance.now(), result = await job();
  ms[stage] = performance.now() - start;
  return result;
}

async function step() {                                      // one piece of work -> whether there was any
  const { window } = net.model.generator, { rate } = net.model.mel;
  if (!talk) return false;
  if (talk.tokens.length && talk.wanted > 0) {
    const token = talk.tokens.shift(), parts = await timed("decoder", () => net.frame(token));
    const frame = { kind: "frame", id: talk.id, token, parts, ms };
    talk.wanted--;
    postMessage(frame, Object.values(parts).map(part => part.buffer));
  } else if (talk.stream?.ready && talk.tokens.length < 2 * window) {
    talk.stream.mood = mood || talk.stream.mood;
    talk.tokens.push(...await timed("generator", () => talk.stream.next()));
  } else if (talk.wave && talk.at < talk.wave.length && !talk.stream.ready) {
    await hear(talk.wave.slice(talk.at, talk.at + rate).map(v => v * talk.gain));
    talk.at += rate;                                         // the next second
    if (talk.at < talk.wave.length) return true;
    talk.stream.rows.push(...await talk.mel.end());
    talk.stream.ended = true;
  } else return false;
  return true;
}

const turns = {
  load, talk: begin,
  photo: async ({ pixels }) => postMessage({ kind: "photo", token: await net.setPhoto(pixels) }),
  want: ({ frames }) => { if (talk) talk.wanted += frames; },
  mood: ({ weights }) => { mood = weights; },
  stop: () => { talk = null; },
  hear: ({ samples }) => talk?.level && !talk.wave && hear(talk.level.push(samples)),
};

const channel = new MessageChannel();
const messages = () => new Promise(resolve => {              // lets messages in, without a timer's 4 ms
  channel.port1.onmessage = resolve;
  channel.port2.postMessage(0);
});

onmessage = ({ data }) => { inbox.push(data); wake(); };

async function run() {
  for (;;) {
    const message = inbox.shift();
    try {
      if (message) await turns[message.kind](message);
      else if (net && await step()) await messages();
      else await new Promise(resolve => { wake = resolve; });
    } catch (error) {
      talk = null;
      postMessage({ kind: "error", text: error.message });
    }
  }
}
run();
