// Rows of speech -> motion tokens, a window at a time; the last are the past of the next. As generator.py.

export const gaussian = () =>                                // Box-Muller
  Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());

export class MotionStream {
  // velocity: of Networks; g: "generator" of model.json; still: the photo's token; silence: a row without
  // sound; normal: a source of noise. The caller adds to `rows`.
  constructor({ velocity, g, still, silence, normal }) {
    Object.assign(this, { velocity, g, still, silence, normal, mood: g.moods.map(() => 0), ended: false });
    this.past = Array(g.past).fill(still);
    this.rows = Array(g.past).fill(silence);
  }

  get ready() {
    const { past, window, ahead } = this.g;
    return this.rows.length >= past + (this.ended ? 1 : window + ahead);
  }

  async next() {                                             // -> tokens of the next window, fewer at the end
    const { g, still: { length: width } } = this, rows = [...this.rows], count = rows.length - g.past;
    while (rows.length < g.past + g.window + g.ahead) rows.push(this.silence);
    const flat = arrays => Float32Array.from(arrays.flatMap(array => [...array]));
    const past = flat(this.past), audio = flat(rows.slice(0, g.past + g.window + g.ahead));
    let z = Float32Array.from({ length: g.window * width }, this.normal);
    for (const axis of g.truncated) for (let k = 0; k < z.length; k += width) {
      const along = axis.reduce((sum, value, n) => sum + value * z[k + n], 0);
      axis.forEach((value, n) => { z[k + n] -= along * value; });
    }
    for (let k = 0; k < g.steps; k++) {
      const v = await this.velocity(z, 1 - k / g.steps, past, audio, this.mood);
      z = z.map((value, n) => value + v[n] / g.steps);
    }
    const tokens = Array.from({ length: g.window }, (_, k) => z.slice(k * width, (k + 1) * width));
    this.past = [...this.past, ...tokens].slice(-g.past);
    this.rows.splice(0, g.window);
    return tokens.slice(0, count);
  }
}
