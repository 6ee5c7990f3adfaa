// Sound files -> samples; frames in step with the sound, or written to a video.
import { checkBytes } from "./image.js";
import { FPS, liveRecorder, VideoWriter } from "./video.js";

const MAX_BYTES = 100e6, AHEAD = 24;                         // frames that are computed before they are shown

export async function openSound(file, rate) {
  // -> wave: samples at `rate`, one channel; sound: the AudioBuffer to play; total: number of frames
  checkBytes(file, MAX_BYTES);
  const data = await file.arrayBuffer();
  const decode = (bytes, rate) => new OfflineAudioContext(1, 1, rate).decodeAudioData(bytes);
  const [sound, low] = await Promise.all([decode(data.slice(0), 48000), decode(data, rate)]).catch(() => {
    throw new Error("That is not a sound this browser can read; give a wav, mp3, ogg, flac or m4a.");
  });
  if (low.duration < 0.1 || low.duration > 600) {
    throw new Error(`That sound has ${low.duration.toFixed(2)} seconds; give 0.1 to 600.`);
  }
  const wave = new Float32Array(low.length), channels = low.numberOfChannels;
  for (let c = 0; c < channels; c++) low.getChannelData(c).forEach((v, n) => { wave[n] += v / channels; });
  if (!wave.every(Number.isFinite)) throw new Error("That sound has broken samples; give it as wav.");
  return { wave, sound, total: Math.max(1, Math.round(wave.length / rate * FPS)) };
}

export class Player {
  // One thing at a time. show(frame) draws, moved(share) tells how far it is. A job: what the worker computes
  // (see `begin` there), its sound and its number of frames.
  id = 0; frames = []; now = null;
  constructor(worker, show, moved) { Object.assign(this, { worker, show, moved }); }

  begin(job) {
    this.stop();
    this.frames = [];
    this.now = { wake() {} };
    this.worker.postMessage({ kind: "talk", id: ++this.id, wanted: AHEAD, ...job });
    return this.now;
  }

  stop() {
    this.now?.wake();
    this.now = null;
    this.worker.postMessage({ kind: "stop" });
  }

  receive(frame) {
    if (frame.id === this.id) this.frames.push(frame);
    this.now?.wake();
  }

  async take(now, enough) {                                  // -> the next frame when so many are there
    while (this.now === now && this.frames.length < enough) {
      await new Promise(resolve => { now.wake = resolve; });
    }
    if (this.now !== now) return null;
    this.worker.postMessage({ kind: "want", frames: 1 });
    return this.frames.shift();
  }

  async play({ sound, total = Infinity, listeners = [], ...job }, now = this.begin(job)) {
    // -> whether it went on to the end, without stop(). Live sound has no total, and each of its frames is
    // shown as soon as it can be. listeners: nodes that hear the sound, too
    const context = this.context ||= new AudioContext();
    const source = new AudioBufferSourceNode(context, { buffer: sound });
    const buffered = total === Infinity ? 1 : AHEAD / 2;
    await context.suspend();
    for (const node of [context.destination, ...listeners]) source.connect(node);
    source.start();
    const start = context.currentTime, due = () => (context.currentTime - start) * FPS;
    const until = async number => {
      while (this.now === now && due() < number) await new Promise(requestAnimationFrame);
    };
    for (let number = 0; number < total; number++) {
      const empty = !this.frames.length;                     // at the start, or frames are slow: sound waits
      if (empty) await context.suspend();
      const frame = await this.take(now, empty ? Math.min(buffered, total - number) : 1);
      if (!frame) break;
      if (empty) await context.resume();
      await until(number);
      if (due() < number + 1 || !this.frames.length) this.show(frame);       // of several, the last
      this.moved(number / total);
    }
    await until(total);
    source.stop();
    const whole = this.now === now;
    if (whole) this.stop();
    return whole;
  }

  async record(canvas, job) {                                // as write(), by playing it
    const context = this.context ||= new AudioContext(), video = liveRecorder(canvas, context);
    const whole = await this.play({ ...job, listeners: [video.sound] }), made = await video.end();
    return whole ? made : null;
  }

  async write(canvas, { sound, total, ...job }) {
    // -> the video, a Blob; nothing after stop()
    const now = this.begin(job), video = new VideoWriter(canvas, sound);
    for (let number = 0; number < total; number++) {
      const frame = await this.take(now, 1);
      if (!frame) return null;
      this.show(frame);
      this.moved(number / total);
      await video.add(number);
    }
    this.stop();
    return video.end();
  }

  async listen(rate, started) {
    // the microphone, until stop()
    const job = { wave: null }, now = this.begin(job);
    const audio = { channelCount: 1, autoGainControl: false };
    const media = await navigator.mediaDevices.getUserMedia({ audio });
    const context = new AudioContext({ sampleRate: rate });
    await context.audioWorklet.addModule("microphone.js");
    const node = new AudioWorkletNode(context, "microphone");
    node.port.onmessage = ({ data }) => this.worker.postMessage({ kind: "hear", samples: data });
    context.createMediaStreamSource(media).connect(node);
    if (this.now === now) started();
    await this.play(job, now);
    media.getTracks().forEach(track => track.stop());
    await context.close();
  }
}
