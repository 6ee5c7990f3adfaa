// Sound files -> samples; frames in step with the sound; recording what is played.

const FPS = 25, MAX_BYTES = 100e6, MAX_SECONDS = 600, AHEAD = 24, TAPED = 600;      // frames made before they are shown; when recording, all if there are no more
const TYPES = ["video/mp4;codecs=avc1.42E01E,mp4a.40.2", "video/webm;codecs=vp8,opus", "video/webm;codecs=vp9,opus", "video/webm"];

export async function openSound(blob, rate) {                // -> samples at `rate`, one channel, and the sound to play
  if (blob.size > MAX_BYTES) throw new Error(`That sound has ${Math.round(blob.size / 1e6)} MB; give one of at most ${MAX_BYTES / 1e6} MB.`);
  const bytes = await blob.arrayBuffer();
  let sound, buffer;
  try {
    sound = await new OfflineAudioContext(1, 1, 48000).decodeAudioData(bytes.slice(0));
    buffer = await new OfflineAudioContext(1, 1, rate).decodeAudioData(bytes);
  } catch {
    throw new Error("That is not a sound this browser can read; give a wav, mp3, ogg, flac or m4a.");
  }
  if (buffer.duration < 0.1) throw new Error(`That sound is ${buffer.duration.toFixed(2)} seconds long; give at least 0.1.`);
  if (buffer.duration > MAX_SECONDS) throw new Error(`That sound is ${Math.round(buffer.duration)} seconds long; give at most ${MAX_SECONDS}.`);
  const wave = new Float32Array(buffer.length);
  for (let c = 0; c < buffer.numberOfChannels; c++) buffer.getChannelData(c).forEach((v, n) => { wave[n] += v / buffer.numberOfChannels; });
  if (!wave.every(Number.isFinite)) throw new Error("That sound holds broken samples; export it again as wav.");
  return { wave, sound };
}

export function recorder(canvas, track) {                    // -> {start, pause, resume, stop: Promise of a Blob}
  const stream = canvas.captureStream(FPS), mimeType = TYPES.find(type => MediaRecorder.isTypeSupported(type)), parts = [];
  if (track) stream.addTrack(track);
  const media = new MediaRecorder(stream, { mimeType, videoBitsPerSecond: 4e6 });
  media.ondataavailable = ({ data }) => parts.push(data);
  const ended = new Promise(resolve => { media.onstop = () => resolve(new Blob(parts, { type: mimeType.split(";")[0] })); });
  return { start: () => media.start(), pause: () => media.state === "recording" && media.pause(),
    resume: () => media.state === "paused" && media.resume(), stop: () => { media.stop(); return ended; } };
}

export function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: `${name}.${blob.type.split("/")[1]}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

export class Player {                                        // plays one thing at a time; show(frame) draws, moved(share) tells how far
  constructor(worker, show, moved) {
    Object.assign(this, { worker, show, moved, id: 0, frames: [], now: null });
  }

  async play({ sound, wave, seed, noise, record }) {         // -> Blob of the recording, or undefined, when it has ended
    this.stop();
    const id = ++this.id, context = this.context ||= new AudioContext(), source = new AudioBufferSourceNode(context, { buffer: sound });
    const destination = context.createMediaStreamDestination(), total = Math.max(1, Math.round(wave.length / this.worker.rate * FPS));
    source.connect(record ? destination : context.destination);
    const tape = record ? recorder(record, destination.stream.getAudioTracks()[0]) : null;
    this.frames = [];
    this.worker.postMessage({ kind: "talk", id, wave, seed, noise });
    this.worker.postMessage({ kind: "want", frames: record ? TAPED : AHEAD });
    await context.suspend();
    const enough = () => this.frames.length >= Math.min(record ? TAPED : AHEAD / 2, total - shown);
    let start = null, shown = 0, waits = 0;
    const blob = await new Promise(resolve => {
      this.now = { id, total, end: resolve };
      const tick = () => {
        if (this.id !== id || !this.now) return;
        requestAnimationFrame(tick);
        if (context.state === "suspended") {                 // at the start, or when frames came too slowly
          if (!enough()) return;
          if (start === null) { start = context.currentTime; source.start(start); tape?.start(); }
          tape?.resume();
          context.resume();
          return;
        }
        const due = (context.currentTime - start) * FPS;
        while (this.frames.length && this.frames[0].number <= due) {
          const frame = this.frames.shift(), last = !this.frames.length || this.frames[0].number > due;
          this.worker.postMessage({ kind: "want", frames: 1 });
          shown = frame.number + 1;
          if (last) this.show(frame);
        }
        this.moved(Math.min(1, due / total));
        if (due >= total + (record ? 3 : 0)) resolve(tape?.stop());
        else if (!this.frames.length && shown < total && due > shown) { waits++; tape?.pause(); context.suspend(); }
      };
      tick();
    });
    Object.assign(this, { waits, now: null });
    try { source.stop(); } catch { /* never started */ }
    return blob;
  }

  async listen(rate, started) {                              // live: the microphone, until stop(); shows frames as they come
    this.stop();
    const id = ++this.id, media = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, autoGainControl: false } });
    const context = new AudioContext({ sampleRate: rate });
    await context.audioWorklet.addModule("microphone.js");
    const node = new AudioWorkletNode(context, "microphone");
    this.frames = [];
    this.worker.postMessage({ kind: "talk", id, wave: null, seed: id });
    this.worker.postMessage({ kind: "want", frames: AHEAD });
    node.port.onmessage = ({ data }) => this.worker.postMessage({ kind: "hear", samples: data }, [data.buffer]);
    context.createMediaStreamSource(media).connect(node);
    started();
    await new Promise(resolve => {
      let due = 0;
      this.now = { id, end: resolve };
      const tick = time => {
        if (this.id !== id || !this.now) return;
        requestAnimationFrame(tick);
        if (!this.frames.length || time < due) return;
        due = Math.max(due + 1000 / FPS, time - 100);
        this.worker.postMessage({ kind: "want", frames: 1 });
        this.show(this.frames.shift());
      };
      requestAnimationFrame(tick);
    });
    this.now = null;
    media.getTracks().forEach(track => track.stop());
    await context.close();
  }

  receive(frame) { if (this.now && frame.id === this.id) this.frames.push(frame); }

  stop() {
    if (!this.now) return;
    this.now.end();
    this.now = null;
    this.worker.postMessage({ kind: "stop" });
  }
}
