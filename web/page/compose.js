// Frames at the photo's own resolution, in WebGL: the photo's face square moved by the network's field, its own details kept
// where nothing is painted. out = up(low) + (moved_hi - up(moved)) * (1 - up(alpha)), up: bicubic. As Python's composer.

const VERTEX = `#version 300 es
void main() { gl_Position = vec4(gl_VertexID == 1 ? 3.0 : -1.0, gl_VertexID == 2 ? 3.0 : -1.0, 0.0, 1.0); }`;

function finer({ data, width, height }) {                    // twice the pixels but one, those between by cubic interpolation
  const w = 2 * width - 1, h = 2 * height - 1, out = new Uint8ClampedArray(4 * w * h);
  const between = (from, at, step, most) => {                // between `at` and the next of a line of most + 1
    const tap = k => from(Math.min(Math.max(at + k, 0), most) * step);
    return 0.59375 * (tap(0) + tap(1)) - 0.09375 * (tap(-1) + tap(2));
  };
  for (let y = 0; y < height; y++) for (let x = 0; x < w; x++) for (let c = 0; c < 4; c++) {
    const at = n => data[4 * y * width + n + c];
    out[4 * (2 * y * w + x) + c] = x % 2 ? between(at, x >> 1, 4, width - 1) : at(2 * x);
  }
  for (let y = 1; y < h; y += 2) for (let n = 0; n < 4 * w; n++) out[4 * y * w + n] = between(k => out[k + n], y >> 1, 8 * w, height - 1);
  return { data: out, width: w, height: h };
}

function edgeWindow(size, border, still) {                   // 0 in the outer `still` cells, 1 from the share `border` inwards
  const ramp = Float32Array.from({ length: size }, (_, k) => {
    const depth = (Math.min(k, size - 1 - k) + 1 - still) / Math.max(1, border * size - still);
    return 0.5 - 0.5 * Math.cos(Math.PI * Math.min(Math.max(depth, 0), 1));
  });
  return Float32Array.from({ length: size * size }, (_, k) => ramp[k % size] * ramp[Math.floor(k / size)]);
}

export class Composer {
  static async make(canvas, model, base) {                   // base: address of the folder that holds the shaders
    const text = async name => (await fetch(new URL(name, base))).text();
    return new Composer(canvas, model, await text("widen.glsl"), await text("frame.glsl"));
  }

  constructor(canvas, model, widen, frame) {
    const gl = canvas.getContext("webgl2", { preserveDrawingBuffer: true, antialias: false });
    if (!gl || !gl.getExtension("EXT_color_buffer_float")) throw new Error("This browser has no WebGL 2 with float textures, which the page needs.");
    Object.assign(this, { gl, canvas, model, view: 0 });
    this.paintWindow = edgeWindow(model.size, model.border, 2);
    this.fieldWindow = edgeWindow(model.size, model.border, 1);
    this.widen = this.program(widen, ["painted", "moved"]);
    this.frame = this.program(frame, ["photo", "painted", "moved", "field"]);
    [this.photo, this.painted, this.moved, this.wideA, this.wideB, this.field] = Array.from({ length: 6 }, () => gl.createTexture());
    this.buffer = gl.createFramebuffer();
  }

  program(source, samplers) {
    const { gl } = this, program = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, source]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(`WebGL: ${gl.getProgramInfoLog(program)}`);
    gl.useProgram(program);
    samplers.forEach((name, unit) => gl.uniform1i(gl.getUniformLocation(program, name), unit));
    return { program, at: name => gl.getUniformLocation(program, name) };
  }

  texture(texture, internal, width, height, format, type, data, filter) {
    const { gl } = this;
    gl.activeTexture(gl.TEXTURE0);
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
    gl.texImage2D(gl.TEXTURE_2D, 0, internal, width, height, 0, format, type, data);
    for (const side of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) gl.texParameteri(gl.TEXTURE_2D, side, gl.CLAMP_TO_EDGE);
    for (const scale of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, scale, filter);
  }

  bind(...textures) {
    textures.forEach((texture, unit) => {
      this.gl.activeTexture(this.gl.TEXTURE0 + unit);
      this.gl.bindTexture(this.gl.TEXTURE_2D, texture);
    });
  }

  setPhoto(image) {                                          // ImageData
    const { gl } = this;
    Object.assign(this.canvas, { width: image.width, height: image.height });
    const { data, width, height } = finer(image);            // linear sampling of it keeps a moved photo sharp
    this.texture(this.photo, gl.RGBA, width, height, gl.RGBA, gl.UNSIGNED_BYTE, data, gl.LINEAR);
  }

  setSquare(square) {                                        // {cx, cy, side, angle} in pixels of the photo
    const { gl } = this, width = Math.max(1, Math.round(square.side)), size = this.model.size;
    Object.assign(this, { square, width });
    for (const wide of [this.wideA, this.wideB]) this.texture(wide, gl.RGBA16F, width, size, gl.RGBA, gl.HALF_FLOAT, null, gl.LINEAR);
    gl.bindFramebuffer(gl.FRAMEBUFFER, this.buffer);
    gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, this.wideA, 0);
    gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT1, gl.TEXTURE_2D, this.wideB, 0);
  }

  draw(parts) {                                              // of Networks.frame
    const { gl, square, model: { size } } = this, n = size * size, { x, moved, alpha } = parts, field = parts.field.slice();
    const painted = new Float32Array(4 * n), below = new Float32Array(4 * n);
    for (let k = 0; k < n; k++) {
      const w = this.paintWindow[k];
      for (let c = 0; c < 3; c++) {
        const m = moved[c * n + k];
        painted[4 * k + c] = m + (Math.min(Math.max(x[c * n + k], -1), 1) - m) * w;
        below[4 * k + c] = m;
      }
      painted[4 * k + 3] = Math.min(Math.max(alpha[k], 0), 1) * w;
      field[2 * k] *= this.fieldWindow[k];
      field[2 * k + 1] *= this.fieldWindow[k];
    }
    this.texture(this.painted, gl.RGBA32F, size, size, gl.RGBA, gl.FLOAT, painted, gl.NEAREST);
    this.texture(this.moved, gl.RGBA32F, size, size, gl.RGBA, gl.FLOAT, below, gl.NEAREST);
    this.texture(this.field, gl.RG32F, size, size, gl.RG, gl.FLOAT, field, gl.NEAREST);

    gl.useProgram(this.widen.program);
    gl.bindFramebuffer(gl.FRAMEBUFFER, this.buffer);
    gl.drawBuffers([gl.COLOR_ATTACHMENT0, gl.COLOR_ATTACHMENT1]);
    gl.viewport(0, 0, this.width, size);
    gl.uniform1f(this.widen.at("width"), this.width);
    this.bind(this.painted, this.moved);
    gl.drawArrays(gl.TRIANGLES, 0, 3);

    gl.useProgram(this.frame.program);
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.viewport(0, 0, this.canvas.width, this.canvas.height);
    const at = this.frame.at;
    gl.uniform2f(at("centre"), square.cx, square.cy);
    gl.uniform2f(at("turn"), Math.cos(square.angle), Math.sin(square.angle));
    gl.uniform1f(at("side"), square.side);
    gl.uniform1i(at("view"), this.view);
    this.bind(this.photo, this.wideA, this.wideB, this.field);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
  }

  clear() {                                                  // the photo as it is
    const none = new Float32Array(3 * this.model.size ** 2);
    this.draw({ x: none, moved: none, alpha: none, field: none });
  }
}
