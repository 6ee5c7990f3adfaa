#version 300 es
// The whole photo; inside the face square its pixels are moved and faded, and the residual is added.
precision highp float;

uniform sampler2D photo, edit, field;        // photo, edit: doubled; edit: residual, share of the photo kept
uniform vec2 centre, turn;                   // of the square: in pixels of the photo; cos, sin of its angle
uniform float size;                          // of the square, in pixels of the photo
uniform int view;                            // 0: the frame, 1: alpha, 2: residual, 3: a moved grid
out vec4 colour;

vec4 doubled(sampler2D image, vec2 at) {     // at: in texels of the image before it was doubled
  return texture(image, (2.0 * at - 0.5) / vec2(textureSize(image, 0)));
}

void main() {
  float height = float(textureSize(photo, 0).y + 1) * 0.5;
  vec2 at = vec2(gl_FragCoord.x, height - gl_FragCoord.y), d = at - centre;
  vec2 p = vec2(turn.x * d.x + turn.y * d.y, turn.x * d.y - turn.y * d.x) / size + 0.5;   // 0 to 1
  bool inside = all(lessThan(abs(p - 0.5), vec2(0.5)));
  vec2 move = inside ? texture(field, p).xy * 0.5 : vec2(0.0);                  // in sizes
  vec4 part = inside ? doubled(edit, p * float(textureSize(edit, 0).x + 1) * 0.5) : vec4(0.0, 0.0, 0.0, 1.0);
  vec2 from = at + size * vec2(turn.x * move.x - turn.y * move.y, turn.y * move.x + turn.x * move.y);
  vec3 x = doubled(photo, from).rgb * part.a + part.rgb;
  if (inside && view == 1) x = 3.0 * (1.0 - part.a) - vec3(0.0, 1.0, 2.0);
  if (inside && view == 2) x = 0.5 + 0.5 * part.rgb;
  if (inside && view == 3 && any(lessThan(fract(16.0 * (p + move)), vec2(0.1)))) x = 1.0 - x;
  colour = vec4(x, 1.0);
}
