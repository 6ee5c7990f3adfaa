// The face square: where it is at first, how it is shown, and moved by pointer, wheel, two fingers and keys.

const KEYS = {                                               // right, down, larger (in sides), turn (radians)
  ArrowLeft: [-0.02, 0, 0, 0], ArrowRight: [0.02, 0, 0, 0], "-": [0, 0, -0.04, 0], "+": [0, 0, 0.04, 0],
  ArrowUp: [0, -0.02, 0, 0], ArrowDown: [0, 0.02, 0, 0], ",": [0, 0, 0, -0.02], ".": [0, 0, 0, 0.02],
};

export function middleSquare({ width, height }) {
  // as Python's middle_square: a tenth of what is cut off lies above
  const size = Math.min(width, height);
  return { cx: width / 2, cy: (height - size) / 10 + size / 2, size, angle: 0 };
}

export function placeSquare(element, { cx, cy, size, angle }, { width, height }) {
  const left = 100 * (cx - size / 2) / width, top = 100 * (cy - size / 2) / height;
  element.style = `left: ${left}%; top: ${top}%; width: ${100 * size / width}%; rotate: ${angle}rad`;
}

export function adjustable(view, point, square, change) {
  // point(event) -> [x, y] of the photo; square() -> the square, null while it stays; change(square)
  const fingers = new Map();
  const listen = (kind, job) => view.addEventListener(kind, event => { if (square()) job(event, square()); });
  listen("pointerdown", event => {
    view.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, point(event));
  });
  listen("pointermove", (event, { cx, cy, size, angle }) => {
    const from = fingers.get(event.pointerId), to = point(event);
    if (!from) return;
    const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
    fingers.set(event.pointerId, to);
    if (!other) return change({ cx: cx + to[0] - from[0], cy: cy + to[1] - from[1], size, angle });
    const [before, after] = [from, to].map(([x, y]) => [x - other[0], y - other[1]]);
    const slope = ([x, y]) => Math.atan2(y, x), length = ([x, y]) => Math.max(1, Math.hypot(x, y));
    const turned = angle + slope(after) - slope(before);
    change({ cx, cy, size: size * length(after) / length(before), angle: turned });
  });
  for (const kind of ["pointerup", "pointercancel"]) listen(kind, event => fingers.delete(event.pointerId));
  listen("wheel", (event, { size, ...rest }) => {
    event.preventDefault();
    change({ ...rest, size: size * Math.exp(event.deltaY / 1000) });
  });
  listen("keydown", (event, { cx, cy, size, angle }) => {
    if (!KEYS[event.key]) return;
    event.preventDefault();
    const [right, down, larger, turn] = KEYS[event.key];
    change({ cx: cx + right * size, cy: cy + down * size, size: size * (1 + larger), angle: angle + turn });
  });
}
