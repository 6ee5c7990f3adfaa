// The networks, under onnxruntime: photo -> token and reference; token -> how to move, fade and paint the photo.

export class Networks {
  static async load(ort, base, options) {
    const get = async name => {
      const answer = await fetch(new URL(name, base));
      if (!answer.ok) throw new Error(`The model file ${name} is not there (${answer.status}); run python -m web.`);
      return answer;
    };
    const net = new Networks();
    net.ort = ort;
    net.model = await (await get("model.json")).json();
    const weights = new Uint8Array(await (await get("weights.bin")).arrayBuffer());
    for (const name of ["encoder", "reference", "target", "generator"]) {
      const graph = new Uint8Array(await (await get(`${name}.onnx`)).arrayBuffer());
      net[name] = await ort.InferenceSession.create(graph, { ...options, externalData: [{ path: "weights.bin", data: weights }] });
    }
    return net;
  }

  tensor(data, ...shape) { return new this.ort.Tensor("float32", data, shape); }

  picture(data) { return this.tensor(data, 1, 3, this.model.size, this.model.size); }

  async setPhoto(pixels, noise) {                            // (3, s, s) in [-1, 1] -> its token
    const photo = this.picture(pixels);
    const { token } = await this.encoder.run({ photo });
    Object.assign(this, { photo, still: token, noise, cache: await this.reference.run({ photo, token }) });
    return token.data;
  }

  async frame(token) {                                       // token -> x, moved, alpha, field
    const { steps } = this.model;
    let z = this.noise, parts;
    for (let k = 0; k < steps; k++) {
      const t = 1 - k / steps;
      const feeds = { z: this.picture(z), t: this.tensor([t], 1), token: this.tensor(token, 1, token.length), ...this.cache };
      const out = await this.target.run(feeds);
      parts = Object.fromEntries(Object.entries(out).map(([name, value]) => [name, value.data]));
      if (k < steps - 1) {
        z = z.map((value, n) => value + (parts.x[n] - value) / Math.max(t, 0.05) / steps);
      }
    }
    return parts;
  }

  velocity = async (z, t, past, audio, mood) => {              // mood: a weight for each of the generator's moods
    const g = this.model.generator, width = this.model.token, rows = g.past + g.window + g.ahead, frames = g.past + g.window;
    const moods = Float32Array.from({ length: frames * g.moods.length }, (_, n) => mood[n % g.moods.length]);
    const { v } = await this.generator.run({
      z: this.tensor(z, 1, g.window, width), t: this.tensor([t], 1), past: this.tensor(past, 1, g.past, width),
      reference: this.still, audio: this.tensor(audio, 1, rows, audio.length / rows), guidance: this.tensor([g.guidance]),
      ...(g.moods.length && { mood: this.tensor(moods, 1, frames, g.moods.length) }),
    });
    return v.data;
  };
}
