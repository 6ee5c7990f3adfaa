#version 300 es
// The whole photo; inside the face square moved, faded and painted over. Columns of low, alpha and moved: bicubic.
precision highp float;
vec4 cubic(float f) {                                        // weights of four neighbours, a = -0.75 as torch
  const float a = -0.75;
  vec4 d = abs(vec4(f + 1.0, f, 1.0 - f, 2.0 - f));
  vec4 near = ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0, far = ((a * d - 5.0 * a) * d + 8.0 * a) * d - 4.0 * a;
  return vec4(far.x, near.y, near.z, far.w);
}

uniform sampler2D photo, painted, moved, field;              // photo: twice as fine; painted, moved: (width, s); field: (s, s)
uniform vec2 centre, turn;                                   // of the square, in pixels of the photo; cos and sin of its angle
uniform float side;                                          // of the square
uniform int view;                                            // 0: the frame, 1: alpha, 2: residual
out vec4 colour;

vec4 column(sampler2D image, int x, float y, vec4 w) {       // bicubic along columns
  int most = textureSize(image, 0).y - 1, i = int(floor(y)) - 1;
  return w.x * texelFetch(image, ivec2(x, clamp(i, 0, most)), 0) + w.y * texelFetch(image, ivec2(x, clamp(i + 1, 0, most)), 0)
    + w.z * texelFetch(image, ivec2(x, clamp(i + 2, 0, most)), 0) + w.w * texelFetch(image, ivec2(x, clamp(i + 3, 0, most)), 0);
}

vec2 displacement(vec2 p) {                                  // bilinear, edges repeated
  ivec2 most = textureSize(field, 0) - 1;
  vec2 at = clamp((p * 0.5 + 0.5) * vec2(most + 1) - 0.5, vec2(0.0), vec2(most));
  ivec2 i = ivec2(at), j = min(i + 1, most);
  vec2 f = at - vec2(i);
  return mix(mix(texelFetch(field, i, 0).xy, texelFetch(field, ivec2(j.x, i.y), 0).xy, f.x),
             mix(texelFetch(field, ivec2(i.x, j.y), 0).xy, texelFetch(field, j, 0).xy, f.x), f.y);
}

vec3 sharp(vec2 at) {                                        // the photo at a place in its pixels
  return texture(photo, (2.0 * at - 0.5) / vec2(textureSize(photo, 0))).rgb;
}

void main() {
  float height = float(textureSize(photo, 0).y + 1) * 0.5;
  vec2 at = vec2(gl_FragCoord.x, height - gl_FragCoord.y), d = at - centre;
  colour = vec4(sharp(at), 1.0);
  vec2 p = vec2(turn.x * d.x + turn.y * d.y, turn.x * d.y - turn.y * d.x) * 2.0 / side;          // in the square, -1 to 1
  if (max(abs(p.x), abs(p.y)) > 1.0) return;
  ivec2 wide = textureSize(painted, 0);
  int u = min(int((p.x * 0.5 + 0.5) * float(wide.x)), wide.x - 1);
  float y = (p.y * 0.5 + 0.5) * float(wide.y) - 0.5;
  vec4 w = cubic(fract(y)), a = column(painted, u, y, w), b = column(moved, u, y, w);
  vec2 move = displacement(p) * side * 0.5;
  vec3 fine = sharp(at + vec2(turn.x * move.x - turn.y * move.y, turn.y * move.x + turn.x * move.y)) * 2.0 - 1.0;
  vec3 x = a.rgb + (fine - b.rgb) * clamp(1.0 - a.a, 0.0, 1.0);
  if (view == 1) x = vec3(3.0 * a.a, 3.0 * a.a - 1.0, 3.0 * a.a - 2.0) * 2.0 - 1.0;
  if (view == 2) x = a.rgb - b.rgb * (1.0 - a.a);
  colour = vec4(x * 0.5 + 0.5, 1.0);
}
