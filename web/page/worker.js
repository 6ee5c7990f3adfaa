// All computing: the page sends a photo, sound or tokens, and gets frames back, never more than it asked for.
import { gaussian, MotionStream } from "./generator.js";
import { Networks } from "./decoder.js";
import { frameCount, levelGain, MelStream, RunningLevel } from "./mel.js";

let net, mood = null, talk = null, pose = null, busy = false, more = false;
const sum = { generator: 0, decoder: 0, mel: 0 };            // milliseconds of the last of each stage

async function load({ base, backend, threads }) {
  const file = backend === "webgpu" ? "ort.webgpu.bundle.min.mjs" : "ort.wasm.bundle.min.mjs";
  const ort = await import(new URL(`ort/${file}`, base));
  ort.env.wasm.wasmPaths = new URL("ort/", base).href;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? threads : 1;
  ort.env.logLevel = "error";
  net = await Networks.load(ort, new URL("model/", base), { executionProviders: [backend], graphOptimizationLevel: "all" });
  postMessage({ kind: "ready", model: net.model, threads: ort.env.wasm.numThreads });
}

const timed = async (stage, job) => {
  const start = performance.now(), result = await job;
  sum[stage] = performance.now() - start;
  return result;
};

async function photo({ pixels, noise, seed = 0 }) {
  talk = pose = null;
  const normal = gaussian(seed ^ 0x5eed);
  const token = await net.setPhoto(pixels, noise || Float32Array.from({ length: pixels.length }, normal));
  postMessage({ kind: "photo", token });
}

function begin({ id, wave, seed = 0, noise }) {              // wave: a whole recording, or null: live, by "hear"
  const { mel, generator: g, token: width } = net.model;
  let n = 0;
  const silence = new MelStream(mel).push(new Float32Array(mel.frame + mel.fft))[0];
  const stream = new MotionStream({ velocity: net.velocity, g, width, still: net.still.data, silence,
    normal: noise ? () => noise[n++] : gaussian(seed) });
  talk = { id, stream, mel: new MelStream(mel), wave, at: 0, level: new RunningLevel(mel.frame), tokens: [], frames: 0, wanted: 0,
    total: wave ? frameCount(wave.length, mel.frame) : Infinity, gain: wave ? levelGain(wave, mel.frame) : 1 };
  pose = null;
}

function hear(job) {                                         // the next second of the recording -> rows
  const start = performance.now(), part = job.wave.slice(job.at, job.at + net.model.mel.rate);
  job.at += part.length;
  job.stream.rows.push(...job.mel.push(part.map(v => v * job.gain)));
  if (job.at >= job.wave.length) {
    job.stream.rows.push(...job.mel.end());
    job.stream.ended = true;
  }
  sum.mel = performance.now() - start;
}

async function step() {                                      // one piece of work -> whether there was any
  if (pose) {
    const token = pose;
    pose = null;
    return send(await timed("decoder", net.frame(token)), { token, number: -1 });
  }
  const job = talk;
  if (!job) return false;
  if (job.tokens.length && job.wanted > 0) {
    const token = job.tokens.shift();
    job.wanted--;
    const parts = await timed("decoder", net.frame(token));
    return send(parts, { token, number: job.frames++, id: job.id, total: job.total });
  }
  if (job.tokens.length < 2 * net.model.generator.window && job.stream.ready) {
    if (mood) job.stream.mood = mood;
    job.tokens.push(...await timed("generator", job.stream.next()));
    return true;
  }
  if (job.wave && job.at < job.wave.length && !job.stream.ready) {
    hear(job);
    return true;
  }
  return false;
}

function send(parts, about) {
  const buffers = Object.values(parts).map(part => part.buffer);
  postMessage({ kind: "frame", parts, ms: { ...sum }, ...about }, buffers);
  return true;
}

const channel = new MessageChannel();
const breath = () => new Promise(resolve => {                // lets messages come in between, without a timer's 4 ms
  channel.port1.onmessage = resolve;
  channel.port2.postMessage(0);
});

async function work() {
  more = true;
  if (busy) return;                                          // the loop that runs sees `more`
  busy = true;
  try {
    while (more) for (more = false; await step();) await breath();
  } catch (error) {
    postMessage({ kind: "error", text: error.message });
  }
  busy = false;
}

const turns = {
  load, photo, talk: begin,
  want: ({ frames }) => { if (talk) talk.wanted += frames; },
  mood: ({ weights }) => { mood = weights; },
  pose: ({ token }) => { talk = null; pose = token; },
  stop: () => { talk = pose = null; },
  hear: ({ samples, end }) => {
    if (!talk || talk.wave) return;
    for (const part of talk.level.push(samples)) talk.stream.rows.push(...talk.mel.push(part));
    if (end) {
      talk.stream.rows.push(...talk.mel.end());
      talk.stream.ended = true;
      talk.total = frameCount(talk.mel.samples, net.model.mel.frame);
    }
  },
};

let queue = Promise.resolve();
onmessage = ({ data }) => {
  queue = queue.then(() => turns[data.kind](data)).then(() => { if (net) work(); })
    .catch(error => postMessage({ kind: "error", text: error.message }));
};
