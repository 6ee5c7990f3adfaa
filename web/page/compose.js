// Frames at the photo's own resolution, in WebGL: inside the face square the photo's pixels are moved and
// faded, and a residual is added. The network gives all three: see Edit in web/export.py.

const VERTEX = `#version 300 es
void main() { gl_Position = vec4(gl_VertexID == 1 ? 3.0 : -1.0, gl_VertexID == 2 ? 3.0 : -1.0, 0.0, 1.0); }`;

function double(data, width, height) {
  // RGBA pixels -> twice as many in each row but one, those between by cubic interpolation; rows become
  // columns, so that two calls double both. Linear sampling of the result keeps a moved photo sharp.
  const out = new Uint8ClampedArray(4 * (2 * width - 1) * height);
  for (let y = 0; y < height; y++) {
    const pixel = x => 4 * (y * width + Math.min(Math.max(x, 0), width - 1));
    for (let x = 0; x < 2 * width - 1; x++) {
      const to = 4 * (x * height + y), [a, b, c, d] = [-1, 0, 1, 2].map(k => pixel((x >> 1) + k));
      for (let n = 0; n < 4; n++) {
        const between = 0.59375 * (data[b + n] + data[c + n]) - 0.09375 * (data[a + n] + data[d + n]);
        out[to + n] = x % 2 ? between : data[b + n];
      }
    }
  }
  return out;
}

export class Composer {
  constructor(canvas, shader) {
    const gl = canvas.getContext("webgl2", { preserveDrawingBuffer: true, antialias: false, alpha: false });
    if (!gl) throw new Error("This browser has no WebGL 2, which the page needs.");
    const program = gl.createProgram(), uniform = name => gl.getUniformLocation(program, name);
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, shader]]) {
      const compiled = gl.createShader(kind);
      gl.shaderSource(compiled, source);
      gl.compileShader(compiled);
      gl.attachShader(program, compiled);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
    gl.useProgram(program);
    const set = (key, value) => gl.texParameteri(gl.TEXTURE_2D, key, value);
    ["photo", "edit", "field"].forEach((name, unit) => {
      gl.activeTexture(gl.TEXTURE0 + unit);
      gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
      gl.uniform1i(uniform(name), unit);
      for (const axis of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) set(axis, gl.CLAMP_TO_EDGE);
      for (const filter of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) set(filter, gl.LINEAR);
    });
    // 32 bits are faster where WebGL runs in software, but not every device can filter them
    const bits = gl.getExtension("OES_texture_float_linear") ? "32F" : "16F";
    Object.assign(this, { gl, canvas, uniform, bits, view: 0 });
  }

  upload(unit, internal, width, height, format, type, data) {
    const { gl } = this;
    gl.activeTexture(gl.TEXTURE0 + unit);
    gl.texImage2D(gl.TEXTURE_2D, 0, internal, width, height, 0, format, type, data);
  }

  setPhoto({ width, height, data }) {
    const { gl } = this, wide = 2 * width - 1, high = 2 * height - 1;
    const doubled = new Uint8Array(double(double(data, width, height), height, wide).buffer);
    Object.assign(this.canvas, { width, height });
    this.upload(0, gl.RGBA, wide, high, gl.RGBA, gl.UNSIGNED_BYTE, doubled);
  }

  setSquare({ cx, cy, size, angle }) {                       // and shows the photo as it is
    const { gl, uniform, canvas: { width, height } } = this, cos = Math.cos(angle), sin = Math.sin(angle);
    const reach = Math.ceil(size / 2 * (Math.abs(cos) + Math.abs(sin))) + 1;
    gl.uniform2f(uniform("centre"), cx, cy);
    gl.uniform2f(uniform("turn"), cos, sin);
    gl.uniform1f(uniform("size"), size);
    gl.viewport(0, 0, width, height);
    gl.disable(gl.SCISSOR_TEST);
    this.draw({ edit: new Float32Array([0, 0, 0, 1]), field: new Float32Array(2) });
    gl.enable(gl.SCISSOR_TEST);                              // from now on, only around the square
    gl.scissor(Math.floor(cx) - reach, Math.floor(height - cy) - reach, 2 * reach + 1, 2 * reach + 1);
  }

  draw({ edit, field }) {
    const { gl, bits } = this, fine = Math.sqrt(edit.length / 4), coarse = Math.sqrt(field.length / 2);
    this.upload(1, gl[`RGBA${bits}`], fine, fine, gl.RGBA, gl.FLOAT, edit);
    this.upload(2, gl[`RG${bits}`], coarse, coarse, gl.RG, gl.FLOAT, field);
    gl.uniform1i(this.uniform("view"), this.view);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
  }
}
