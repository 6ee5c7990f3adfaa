// Picture files -> pixels; the face square -> the network's picture, by the same steps as Python's.

const MAX_BYTES = 50e6, MAX_SIDE = 1280, MIN_SIDE = 16;

export async function openPhoto(blob) {                      // a file or other blob -> ImageData, upright, at most MAX_SIDE wide or high
  if (blob.size > MAX_BYTES) throw new Error(`That picture has ${Math.round(blob.size / 1e6)} MB; give one of at most ${MAX_BYTES / 1e6} MB.`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    throw new Error("That is not a picture this browser can read; give a jpg, png or webp.");
  }
  if (Math.min(bitmap.width, bitmap.height) < MIN_SIDE) throw new Error(`That picture is ${bitmap.width} x ${bitmap.height} pixels; give at least ${MIN_SIDE} x ${MIN_SIDE}.`);
  return toPixels(bitmap, bitmap.width, bitmap.height);
}

export function toPixels(source, width, height) {            // a bitmap or video -> ImageData
  const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
  const canvas = new OffscreenCanvas(...[width, height].map(n => Math.max(2, 2 * Math.round(n * scale / 2))))     // even, for video;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "rgb(128, 128, 128)";                  // under transparent pictures, as in Python
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

export function middleSquare({ width, height }) {            // as Python's middle_square: a tenth of what is cut lies above
  const side = Math.min(width, height);
  return { cx: width / 2, cy: (height - side) / 10 + side / 2, side, angle: 0 };
}

function shrink({ data, width, height }, newWidth, newHeight) {       // each new pixel the mean of those it covers
  const covers = (size, wanted) => Array.from({ length: wanted }, (_, k) => {
    const low = k * size / wanted, high = (k + 1) * size / wanted, shares = [];
    for (let n = Math.floor(low); n < Math.min(size, Math.ceil(high)); n++) shares.push([n, (Math.min(high, n + 1) - Math.max(low, n)) * wanted / size]);
    return shares;
  });
  const columns = covers(width, newWidth), wide = new Float32Array(height * newWidth * 4), out = new Uint8ClampedArray(newHeight * newWidth * 4);
  for (let y = 0; y < height; y++) columns.forEach((shares, i) => {
    for (const [x, share] of shares) for (let c = 0; c < 3; c++) wide[(y * newWidth + i) * 4 + c] += share * data[(y * width + x) * 4 + c];
  });
  const line = new Float32Array(newWidth * 4);
  covers(height, newHeight).forEach((shares, j) => {
    line.fill(0);
    for (const [y, share] of shares) for (let n = 0; n < line.length; n++) line[n] += share * wide[y * line.length + n];
    out.set(line, j * line.length);
  });
  return { data: out, width: newWidth, height: newHeight };
}

function cubic(f) {                                          // weights of four neighbours, a = -0.75 as OpenCV
  const a = -0.75, near = d => ((a + 2) * d - (a + 3)) * d * d + 1, far = d => ((a * d - 5 * a) * d + 8 * a) * d - 4 * a;
  return [far(1 + f), near(f), near(1 - f), far(2 - f)];
}

export function facePixels(image, { cx, cy, side, angle }, size) {     // the square, upright, edges repeated -> (3, s, s) in [-1, 1]
  const factor = side / size, fine = factor > 1 ? 2 * size : size, share = fine / size;
  let pixels = image, fx = 1, fy = 1;
  if (factor > 2) {                                          // first to about twice the pixels wanted
    pixels = shrink(image, Math.max(1, Math.round(2 * image.width / factor)), Math.max(1, Math.round(2 * image.height / factor)));
    [fx, fy] = [pixels.width / image.width, pixels.height / image.height];
  }
  const { data, width, height } = pixels, step = side * Math.sqrt(fx * fy) / fine, cos = step * Math.cos(angle), sin = step * Math.sin(angle);
  const out = new Float32Array(3 * size * size), clamp = (v, most) => Math.min(Math.max(v, 0), most), byte = new Uint8ClampedArray(1);
  for (let j = 0; j < fine; j++) for (let i = 0; i < fine; i++) {
    const u = i - (fine - 1) / 2, v = j - (fine - 1) / 2, x = cx * fx - 0.5 + cos * u - sin * v, y = cy * fy - 0.5 + sin * u + cos * v;
    const x0 = Math.floor(x), y0 = Math.floor(y), wx = cubic(x - x0), wy = cubic(y - y0);
    for (let c = 0; c < 3; c++) {
      let sum = 0;
      for (let n = 0; n < 16; n++) {
        sum += wx[n & 3] * wy[n >> 2] * data[4 * (clamp(y0 + (n >> 2) - 1, height - 1) * width + clamp(x0 + (n & 3) - 1, width - 1)) + c];
      }
      byte[0] = sum;
      out[(c * size + Math.floor(j / share)) * size + Math.floor(i / share)] += byte[0] / share ** 2;
    }
  }
  return out.map(v => Math.round(v) / 127.5 - 1);
}
