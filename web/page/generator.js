// Rows of speech -> motion tokens, a window at a time; the last written are the past of the next. As Python's generator loop.

export function gaussian(seed) {                             // -> a source of normal numbers (mulberry32, Box-Muller)
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6D2B79F5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
}

export class MotionStream {
  // velocity(z, t, past, audio, mood) -> Promise of v; all Float32Array. g: the "generator" part of model.json, width: of a token,
  // still: the photo's token, silence: a row of no sound, normal: source of noise.
  constructor({ velocity, g, width, still, silence, normal }) {
    Object.assign(this, { velocity, g, width, silence, normal, mood: g.moods.map(() => 0) });
    this.past = new Float32Array(g.past * width);
    for (let k = 0; k < g.past; k++) this.past.set(still, k * width);
    this.rows = Array(g.past).fill(silence);                 // past rows, then those to come
    this.ended = false;
  }

  get ready() {
    const { past, window, ahead } = this.g;
    return this.ended ? this.rows.length > past : this.rows.length >= past + window + ahead;
  }

  async next() {                                             // -> the tokens of the next window, fewer at the end
    const { g, width } = this, need = g.past + g.window + g.ahead;
    const count = Math.min(g.window, this.rows.length - g.past);
    const audio = new Float32Array(need * this.silence.length);
    for (let k = 0; k < need; k++) audio.set(this.rows[k] || this.silence, k * this.silence.length);
    let z = Float32Array.from({ length: g.window * width }, this.normal);
    for (let k = 0; k < g.steps; k++) {
      const v = await this.velocity(z, 1 - k / g.steps, this.past, audio, this.mood);
      z = z.map((value, n) => value + v[n] / g.steps);
    }
    const joined = new Float32Array(this.past.length + z.length);
    joined.set(this.past);
    joined.set(z, this.past.length);
    this.past = joined.slice(-g.past * width);
    this.rows = this.rows.slice(g.window);
    return Array.from({ length: count }, (_, k) => z.slice(k * width, (k + 1) * width));
  }
}
