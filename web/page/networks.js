// The networks, under onnxruntime: the graphs of web/export.py, which says what they take and give.

export class Networks {
  static async load(ort, base, options) {
    const get = async (name, kind = "arrayBuffer") => {
      const answer = await fetch(new URL(name, base));
      if (answer.ok) return answer[kind]();
      throw new Error(`The model file ${name} is not there (${answer.status}); run python -m web.`);
    };
    const net = Object.assign(new Networks(), { ort, model: await get("model.json", "json") });
    const externalData = [{ path: "weights.bin", data: new Uint8Array(await get("weights.bin")) }];
    for (const name of ["encoder", "reference", "target", "mel", "generator"]) {
      net[name] = await ort.InferenceSession.create(await get(`${name}.onnx`), { ...options, externalData });
    }
    return net;
  }

  tensor(data, ...shape) { return new this.ort.Tensor("float32", data, shape); }

  async setPhoto(pixels) {                                   // (3, s, s) in [-1, 1] -> the photo's token
    const photo = this.tensor(pixels, 1, 3, this.model.size, this.model.size);
    const { token } = await this.encoder.run({ photo });
    Object.assign(this, { still: token, cache: await this.reference.run({ photo, token }) });
    return token.data;
  }

  async frame(token) {
    const out = await this.target.run({ ...this.cache, token: this.tensor(token, 1, token.length) });
    return { x: out.x.data, edit: out.edit.data, field: out.field.data };
  }

  row = async wave => (await this.mel.run({ wave: this.tensor(wave, 1, wave.length) })).row.data;

  velocity = async (z, t, past, audio, mood) => {            // mood: a weight for each of the moods
    const { generator: g, token: width } = this.model, frames = g.past + g.window;
    const moods = Float32Array.from({ length: frames * mood.length }, (_, n) => mood[n % mood.length]);
    const { v } = await this.generator.run({
      z: this.tensor(z, 1, g.window, width),
      t: this.tensor([t], 1),
      past: this.tensor(past, 1, g.past, width),
      reference: this.still,
      audio: this.tensor(audio, 1, frames + g.ahead, g.audio),
      guidance: this.tensor([g.guidance]),
      ...(mood.length && { mood: this.tensor(moods, 1, frames, mood.length) }),
    });
    return v.data;
  };
}
