// Picture files -> pixels; the face square -> the network's picture.

const MAX_BYTES = 50e6, MAX_SIDE = 1280, MIN_SIDE = 16;

export function checkBytes(file, most) {
  if (file.size <= most) return;
  throw new Error(`That file has ${Math.round(file.size / 1e6)} MB; give one of at most ${most / 1e6} MB.`);
}

export async function openPhoto(file) {
  // -> ImageData, upright, at most MAX_SIDE wide and high
  checkBytes(file, MAX_BYTES);
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" }).catch(() => {
    throw new Error("That is not a picture this browser can read; give a jpg, png or webp.");
  });
  const { width, height } = bitmap;
  if (Math.min(width, height) < MIN_SIDE) {
    throw new Error(`That picture is ${width} x ${height} pixels; give at least ${MIN_SIDE} x ${MIN_SIDE}.`);
  }
  return toPixels(bitmap, width, height);
}

export function toPixels(source, width, height) {
  // a bitmap or video -> ImageData with even sides, as videos need them
  const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
  const [w, h] = [width, height].map(n => Math.max(2, 2 * Math.round(n * scale / 2)));
  const context = new OffscreenCanvas(w, h).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "rgb(128, 128, 128)";                  // under transparent pictures, as in Python
  context.fillRect(0, 0, w, h);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, w, h);
  return context.getImageData(0, 0, w, h);
}

export function facePixels({ data, width, height }, { cx, cy, size: side, angle }, size) {
  // The square, upright, edges repeated -> (3, s, s) in [-1, 1], as Python's crop_square. Each pixel is the
  // mean of n x n points, at most a pixel of the photo apart, each linear between four pixels.
  const n = Math.ceil(side / size), step = side / size / n, middle = (size * n - 1) / 2;
  const cos = step * Math.cos(angle), sin = step * Math.sin(angle), out = new Float32Array(3 * size * size);
  const inside = (at, length) => Math.min(Math.max(at, 0), length - 1);
  const pixel = (x, y) => 4 * (inside(y, height) * width + inside(x, width));
  for (let j = 0; j < size * n; j++) {
    for (let i = 0; i < size * n; i++) {
      const u = i - middle, v = j - middle;
      const x = cx - 0.5 + cos * u - sin * v, y = cy - 0.5 + sin * u + cos * v;
      const left = Math.floor(x), top = Math.floor(y), right = x - left, down = y - top;
      const corners = [0, 1, 2, 3].map(n => pixel(left + n % 2, top + (n >> 1)));
      for (let k = 0; k < 3; k++) {
        const [a, b, c, d] = corners.map(at => data[at + k]), above = a + right * (b - a);
        const value = above + down * (c + right * (d - c) - above);
        out[(k * size + Math.floor(j / n)) * size + Math.floor(i / n)] += value;
      }
    }
  }
  return out.map(sum => Math.round(sum / n ** 2) / 127.5 - 1);
}
