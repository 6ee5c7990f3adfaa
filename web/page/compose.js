// Frames at the photo's own resolution, in WebGL: the pixels of the photo's face square are moved by the network's
// displacements, faded by alpha, and the residual is added. out = moved * up(keep) + up(residual). As media/compose.py.

const VERTEX = `#version 300 es
void main() { gl_Position = vec4(gl_VertexID == 1 ? 3.0 : -1.0, gl_VertexID == 2 ? 3.0 : -1.0, 0.0, 1.0); }`;

const clamp = (v, low, high) => Math.min(Math.max(v, low), high);

function edgeWindow(size, border, still) {                   // 0 in the outer `still` cells, 1 from the share `border` inwards
  const ramp = Float32Array.from({ length: size }, (_, k) => {
    const depth = (Math.min(k, size - 1 - k) + 1 - still) / Math.max(1, border * size - still);
    return 0.5 - 0.5 * Math.cos(Math.PI * clamp(depth, 0, 1));
  });
  return Float32Array.from({ length: size * size }, (_, k) => ramp[k % size] * ramp[Math.floor(k / size)]);
}

function greatestNear(values, size) {                        // the maximum over 3 x 3 cells, one axis after the other
  const along = (from, step) => from.map((v, k) => {
    const at = Math.floor(k / step) % size;
    return Math.max(v, at ? from[k - step] : v, at < size - 1 ? from[k + step] : v);
  });
  return along(along(values, 1), size);
}

export class Composer {
  static async make(canvas, model, base) {                   // base: address of the folder that holds the shaders
    const text = async name => (await fetch(new URL(name, base))).text();
    return new Composer(canvas, model, await text("double.glsl"), await text("frame.glsl"));
  }

  constructor(canvas, model, double, frame) {
    const gl = canvas.getContext("webgl2", { preserveDrawingBuffer: true, antialias: false });
    if (!gl || !gl.getExtension("EXT_color_buffer_float")) {
      throw new Error("This browser has no WebGL 2 with float textures, which the page needs.");
    }
    Object.assign(this, { gl, canvas, model, view: 0, buffer: gl.createFramebuffer() });
    this.paintWindow = edgeWindow(model.size, model.border, 2);
    this.fieldWindow = edgeWindow(model.size, model.border, 1);
    this.double = this.program(double, ["image"]);
    this.frame = this.program(frame, ["photo", "parts", "field"]);
    const fine = gl.getExtension("OES_texture_float_linear");                             // faster where WebGL runs in software
    [this.four, this.two] = fine ? [gl.RGBA32F, gl.RG32F] : [gl.RGBA16F, gl.RG16F];
    for (const name of ["photo", "parts", "given", "turned", "field"]) this[name] = gl.createTexture();
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

  doubled(target, internal, width, height, type, data) {     // target becomes data, twice as fine: linear sampling keeps it sharp
    const { gl } = this;
    this.texture(this.given, internal, width, height, gl.RGBA, type, data, gl.NEAREST);
    gl.useProgram(this.double.program);
    gl.bindFramebuffer(gl.FRAMEBUFFER, this.buffer);
    for (const [from, to] of [[this.given, this.turned], [this.turned, target]]) {
      [width, height] = [height, 2 * width - 1];             // each pass doubles the columns and makes rows of them
      this.texture(to, internal, width, height, gl.RGBA, type, null, to === target ? gl.LINEAR : gl.NEAREST);
      gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, to, 0);
      gl.viewport(0, 0, width, height);
      gl.bindTexture(gl.TEXTURE_2D, from);
      gl.drawArrays(gl.TRIANGLES, 0, 3);
    }
  }

  setPhoto({ width, height, data }) {                        // ImageData
    const { gl } = this;
    Object.assign(this.canvas, { width, height });
    this.doubled(this.photo, gl.RGBA, width, height, gl.UNSIGNED_BYTE, data);
  }

  setSquare(square) { Object.assign(this, { square, fresh: true }); }     // {cx, cy, side, angle} in pixels of the photo

  draw({ x, moved, alpha, field }) {                         // of Networks.frame
    const { gl, model: { size, changed } } = this, n = size * size, parts = new Float32Array(4 * n), move = new Float32Array(2 * n);
    const paint = (c, k) => clamp(x[c * n + k], -1, 1) - moved[c * n + k];
    const change = new Float32Array(n).map((_, k) => 127.5 * Math.max(Math.abs(paint(0, k)), Math.abs(paint(1, k)), Math.abs(paint(2, k))));
    greatestNear(change, size).forEach((most, k) => {        // where little changes, the photo keeps its own detail
      const w = this.paintWindow[k], keep = 1 - clamp(alpha[k], 0, 1) * Math.min(1, most / changed) * w;
      for (let c = 0; c < 3; c++) parts[4 * k + c] = moved[c * n + k] * (1 - keep) + paint(c, k) * w;
      parts[4 * k + 3] = keep;
      for (const at of [2 * k, 2 * k + 1]) move[at] = field[at] * this.fieldWindow[k];
    });
    this.doubled(this.parts, this.four, size, size, gl.FLOAT, parts);
    this.texture(this.field, this.two, size, size, gl.RG, gl.FLOAT, move, gl.LINEAR);
    this.fill();
  }

  fill() {                                                   // the canvas: all of it at first, then around the square alone
    const { gl, canvas: { width, height }, square: { cx, cy, side, angle } } = this, { program, at } = this.frame;
    const cos = Math.cos(angle), sin = Math.sin(angle), reach = Math.ceil(side / 2 * (Math.abs(cos) + Math.abs(sin))) + 1;
    gl.useProgram(program);
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.viewport(0, 0, width, height);
    if (!this.fresh) gl.enable(gl.SCISSOR_TEST);
    gl.scissor(Math.floor(cx) - reach, Math.floor(height - cy) - reach, 2 * reach + 1, 2 * reach + 1);
    gl.uniform2f(at("centre"), cx, cy);
    gl.uniform2f(at("turn"), cos, sin);
    gl.uniform1f(at("side"), side);
    gl.uniform1i(at("view"), this.view);
    [this.photo, this.parts, this.field].forEach((texture, unit) => {
      gl.activeTexture(gl.TEXTURE0 + unit);
      gl.bindTexture(gl.TEXTURE_2D, texture);
    });
    gl.drawArrays(gl.TRIANGLES, 0, 3);
    gl.disable(gl.SCISSOR_TEST);
    this.fresh = false;
  }

  clear() {                                                  // the photo as it is
    const none = new Float32Array(3 * this.model.size ** 2);
    this.draw({ x: none, moved: none, alpha: none, field: none });
  }
}
