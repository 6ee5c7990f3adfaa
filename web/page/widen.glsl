#version 300 es
// The network's pictures, (s, s), made as wide as the face square: bicubic along rows.
precision highp float;
vec4 cubic(float f) {                                        // weights of four neighbours, a = -0.75 as torch
  const float a = -0.75;
  vec4 d = abs(vec4(f + 1.0, f, 1.0 - f, 2.0 - f));
  vec4 near = ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0, far = ((a * d - 5.0 * a) * d + 8.0 * a) * d - 4.0 * a;
  return vec4(far.x, near.y, near.z, far.w);
}

uniform sampler2D painted, moved;                            // (s, s): low and alpha; moved
uniform float width;
layout(location = 0) out vec4 a;
layout(location = 1) out vec4 b;
void main() {
  ivec2 size = textureSize(painted, 0);
  float x = gl_FragCoord.x / width * float(size.x) - 0.5;
  vec4 w = cubic(fract(x));
  a = b = vec4(0.0);
  for (int k = 0; k < 4; k++) {
    ivec2 at = ivec2(clamp(int(floor(x)) + k - 1, 0, size.x - 1), int(gl_FragCoord.y));
    a += w[k] * texelFetch(painted, at, 0);
    b += w[k] * texelFetch(moved, at, 0);
  }
}
