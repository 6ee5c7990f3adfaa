#version 300 es
// Twice as many texels in each row but one, those between by cubic interpolation (a = -0.75, as OpenCV). Rows become columns:
// two passes double both.
precision highp float;

uniform sampler2D image;
out vec4 colour;

void main() {
  int column = int(gl_FragCoord.y), row = int(gl_FragCoord.x), at = column / 2, most = textureSize(image, 0).x - 1;
  colour = texelFetch(image, ivec2(at, row), 0);
  if (column % 2 == 0) return;
  vec4 next = texelFetch(image, ivec2(min(at + 1, most), row), 0), after = texelFetch(image, ivec2(min(at + 2, most), row), 0);
  vec4 before = texelFetch(image, ivec2(max(at - 1, 0), row), 0);
  colour = 0.59375 * (colour + next) - 0.09375 * (before + after);
}
