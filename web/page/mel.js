// Sound -> rows of log-mel features, 25 a second, streaming; and loudness. The same numbers as Python's audio features.

const roundHalfEven = x => { const r = Math.round(x); return Math.abs(x % 1) === 0.5 && r % 2 ? r - 1 : r; };

export const frameCount = (samples, frame) => Math.max(1, roundHalfEven(samples / frame));

export class MelStream {
  // push(samples) -> array of rows (Float32Array), end() -> the last ones. m: the "mel" part of model.json.
  constructor(m) {
    this.m = m;
    this.perFrame = m.frame / m.hop;
    this.context = m.fft / 2 - m.hop / 2;
    this.held = new Float32Array(this.context);              // silence before the first frame
    this.samples = 0;
    this.done = 0;
    const half = m.fft / 2 + 1, top = 2595 * Math.log10(1 + m.rate / 2 / 700);
    this.window = Float64Array.from({ length: m.fft }, (_, n) => 0.5 - 0.5 * Math.cos(2 * Math.PI * n / m.fft));
    this.cos = Float64Array.from({ length: m.fft }, (_, n) => Math.cos(2 * Math.PI * n / m.fft));
    this.sin = Float64Array.from({ length: m.fft }, (_, n) => Math.sin(2 * Math.PI * n / m.fft));
    const corner = Array.from({ length: m.bins + 2 }, (_, k) => 700 * (10 ** (top * k / (m.bins + 1) / 2595) - 1));
    this.filters = Array.from({ length: m.bins }, (_, b) => {     // triangles: [first line, weights]
      const [left, centre, right] = corner.slice(b, b + 3), weights = [];
      let first = -1;
      for (let k = 0; k < half; k++) {
        const f = k * m.rate / m.fft, w = Math.min((f - left) / (centre - left), (right - f) / (right - centre));
        if (w > 0) { if (first < 0) first = k; weights.push(w); }
      }
      return [first, weights];
    });
    this.power = new Float64Array(half);
  }

  row(at) {                                                  // the row of the frame whose context begins at `at`
    const { m } = this, out = new Float32Array(m.bins * this.perFrame), x = new Float64Array(m.fft);
    for (let w = 0; w < this.perFrame; w++) {
      for (let n = 0; n < m.fft; n++) x[n] = (this.held[at + w * m.hop + n] || 0) * this.window[n];
      for (let k = 0; k < this.power.length; k++) {
        let re = 0, im = 0;
        for (let n = 0, p = 0; n < m.fft; n++, p += k, p = p >= m.fft ? p - m.fft : p) {
          re += x[n] * this.cos[p];
          im += x[n] * this.sin[p];
        }
        this.power[k] = re * re + im * im;
      }
      this.filters.forEach(([first, weights], b) => {
        let sum = 0;
        weights.forEach((weight, k) => { sum += weight * this.power[first + k]; });
        out[w * m.bins + b] = (Math.log10(Math.max(sum, m.floor)) - m.mean) / m.std;
      });
    }
    return out;
  }

  take(count) {
    const rows = Array.from({ length: count }, (_, k) => this.row(k * this.m.frame));
    this.held = this.held.slice(Math.min(count * this.m.frame, this.held.length));
    this.done += count;
    return rows;
  }

  push(samples) {
    const joined = new Float32Array(this.held.length + samples.length);
    joined.set(this.held);
    joined.set(samples, this.held.length);
    this.held = joined;
    this.samples += samples.length;
    return this.take(Math.max(0, Math.floor((joined.length - 2 * this.context) / this.m.frame)));
  }

  end() {
    return this.samples ? this.take(Math.max(0, frameCount(this.samples, this.m.frame) - this.done)) : [];
  }
}

function gainOf(power, target = 0.1) {                       // the gain of frames' powers: see gain_from_power in Python
  power = power.filter(p => p > 1e-12).sort((a, b) => a - b);
  if (!power.length) return 1;
  const at = q => power[Math.trunc(q * (power.length - 1))], high = at(0.95);
  const loudest = power.filter(p => p > high / 100);
  const loud = Math.sqrt(loudest.reduce((a, b) => a + b, 0) / loudest.length);
  if (loud < 10 ** (-66 / 20)) return 1;
  return Math.min(target / loud, high < at(0.1) * 10 ** 0.6 ? 1 : 100);
}

const meanSquare = x => x.reduce((sum, v) => sum + v * v, 0) / x.length;

export function levelGain(wave, frame) {                     // the factor that brings a whole recording to one loudness
  const power = [];
  for (let n = 0; n < wave.length; n += frame) power.push(meanSquare(wave.subarray(n, n + frame)));
  return gainOf(power);
}

export class RunningLevel {                                  // the same for live sound: levelled by its past alone
  constructor(frame) { Object.assign(this, { frame, power: [], logGain: 0, held: new Float32Array(0) }); }

  push(samples) {                                            // -> the whole frames of it, levelled
    const all = new Float32Array(this.held.length + samples.length), out = [];
    all.set(this.held);
    all.set(samples, this.held.length);
    let n = 0;
    for (; n + this.frame <= all.length; n += this.frame) {
      const part = all.slice(n, n + this.frame), power = meanSquare(part);
      if (power > 1e-12) {
        if (this.power.length >= 3000) this.power = this.power.filter((_, k) => k % 2 === 0);
        this.power.push(power);
        const step = Math.log(gainOf(this.power)) - this.logGain;
        this.logGain += step * Math.max(1 / this.power.length, step > 0 ? 1 / 25 : 1 / 3);
      }
      out.push(part.map(v => v * Math.exp(this.logGain)));
    }
    this.held = all.slice(n);
    return out;
  }
}
