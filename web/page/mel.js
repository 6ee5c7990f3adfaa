// Sound -> rows of log-mel features, 25 a second, streaming; and loudness. As Python's audio_features.

const roundHalfEven = x => Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x);
const join = (a, b) => Float32Array.from([...a, ...b]);

export class MelStream {
  // push(samples) -> rows, end() -> the last ones. compute(samples of a frame and its context) -> its row.
  constructor(compute, { frame, context }) {
    const held = new Float32Array(context);                  // silence before the first frame
    Object.assign(this, { compute, frame, context, held, samples: 0, done: 0 });
  }

  async take(count) {
    const rows = [], length = this.frame + 2 * this.context;
    for (let k = 0; k < count; k++) {
      const part = this.held.slice(k * this.frame, k * this.frame + length);
      rows.push(await this.compute(join(part, new Float32Array(length - part.length))));
    }
    this.held = this.held.slice(count * this.frame);
    this.done += count;
    return rows;
  }

  push(samples) {
    this.held = join(this.held, samples);
    this.samples += samples.length;
    return this.take(Math.max(0, Math.floor((this.held.length - 2 * this.context) / this.frame)));
  }

  end() { return this.take(Math.max(1, roundHalfEven(this.samples / this.frame)) - this.done); }
}

function gainOf(powers, target = 0.1) {                      // as gain_from_power in Python
  const sorted = powers.filter(p => p > 1e-12).sort((a, b) => a - b);
  if (!sorted.length) return 1;
  const [low, high] = [0.1, 0.95].map(q => sorted[Math.trunc(q * (sorted.length - 1))]);
  const loudest = sorted.filter(p => p > high / 100);
  const loud = Math.sqrt(loudest.reduce((a, b) => a + b) / loudest.length);
  if (loud < 10 ** (-66 / 20)) return 1;
  return Math.min(target / loud, high < low * 10 ** 0.6 ? 1 : 100);
}

const meanSquare = x => x.reduce((sum, v) => sum + v * v, 0) / x.length;

export function levelGain(wave, frame) {                     // what brings a whole recording to one loudness
  const powers = [];
  for (let n = 0; n < wave.length; n += frame) powers.push(meanSquare(wave.subarray(n, n + frame)));
  return gainOf(powers);
}

export class RunningLevel {                                  // live sound: as streaming_gain in Python
  constructor(frame) { Object.assign(this, { frame, powers: [], logGain: 0, held: new Float32Array(0) }); }

  push(samples) {                                            // -> the whole frames of it, levelled, joined
    const all = join(this.held, samples), whole = all.length - all.length % this.frame;
    const out = all.slice(0, whole);
    for (let n = 0; n < whole; n += this.frame) {
      const part = out.subarray(n, n + this.frame), power = meanSquare(part);
      if (power > 1e-12) {
        if (this.powers.length >= 3000) this.powers = this.powers.filter((_, k) => k % 2 === 0);
        this.powers.push(power);
        const step = Math.log(gainOf(this.powers)) - this.logGain;
        this.logGain += step * Math.max(1 / this.powers.length, step > 0 ? 1 / 25 : 1 / 3);
      }
      part.forEach((v, k) => { part[k] = v * Math.exp(this.logGain); });
    }
    this.held = all.slice(whole);
    return out;
  }
}
