#version 300 es
// The whole photo; inside the face square its pixels are moved, faded, and the residual is added.
precision highp float;

uniform sampler2D photo, parts, field;                       // photo, parts: doubled; parts: residual, share of the photo that stays
uniform vec2 centre, turn;                                   // of the square, in pixels of the photo; cos and sin of its angle
uniform float side;                                          // of the square
uniform int view;                                            // 0: the frame, 1: alpha, 2: residual
out vec4 colour;

vec4 doubled(sampler2D image, vec2 at) {                     // at: in texels of the image before it was doubled
  return texture(image, (2.0 * at - 0.5) / vec2(textureSize(image, 0)));
}

void main() {
  float height = float(textureSize(photo, 0).y + 1) * 0.5;
  vec2 at = vec2(gl_FragCoord.x, height - gl_FragCoord.y), d = at - centre;
  vec2 p = vec2(turn.x * d.x + turn.y * d.y, turn.x * d.y - turn.y * d.x) / side + 0.5;          // in the square, 0 to 1
  bool inside = all(lessThan(abs(p - 0.5), vec2(0.5)));
  vec2 move = inside ? texture(field, p).xy * side * 0.5 : vec2(0.0);
  vec4 part = inside ? doubled(parts, p * float(textureSize(parts, 0).x + 1) * 0.5) : vec4(0.0, 0.0, 0.0, 1.0);
  vec3 moved = doubled(photo, at + vec2(turn.x * move.x - turn.y * move.y, turn.y * move.x + turn.x * move.y)).rgb * 2.0 - 1.0;
  vec3 x = part.rgb + moved * clamp(part.a, 0.0, 1.0);
  float alpha = 3.0 * (1.0 - part.a);
  if (inside && view == 1) x = vec3(alpha, alpha - 1.0, alpha - 2.0) * 2.0 - 1.0;
  if (inside && view == 2) x = part.rgb;
  colour = vec4(x * 0.5 + 0.5, 1.0);
}
