"""A procedural talking head: every motion factor and every identity factor of a frame is a known number.

    ids ----> identity (B, I) --\
                                 >-- render --> (B, 3, size, size)
    seeds --> motion   (B, M) --/

The head is a shaded 2.5D portrait: features are painted on an ellipsoid, so that yaw and pitch move near parts more than
far ones. All shapes are signed distances turned into coverage over one pixel (analytic anti-aliasing), all colours are
blended back to front, and everything is a batched torch expression: it runs on CPU and GPU and can be compiled.

Units: image plane x, y in [-1, 1] (right, down); angles in radians. Everything here is ours; the paper uses real video.
"""
import math

import torch

from world.speech import uniform

# Motion: what changes from frame to frame. Name -> range.
MOTION = {
    "yaw": (-0.26, 0.26), "pitch": (-0.18, 0.18), "roll": (-0.16, 0.16),            # radians: as far as speakers turn
    "shift_x": (-1, 1), "shift_y": (-1, 1), "scale": (-1, 1),                        # of 0.05, 0.04 and 5%
    "jaw": (0, 1), "lip_width": (-1, 1), "lip_corner": (-1, 1),                      # closed-open, round-spread, sad-smile
    "blink_l": (0, 1), "blink_r": (0, 1), "gaze_x": (-1, 1), "gaze_y": (-1, 1),      # open-closed, right and down positive
    "brow_raise": (-1, 1), "brow_furrow": (0, 1),
    "light_x": (-1, 1), "light": (0, 1),                                             # where from, how strong
}
SHIFT_X, SHIFT_Y, SCALE, ZOOM = 0.05, 0.04, 0.05, 1.12       # how far the head goes at 1, and its size at scale 0
POSE = ("yaw", "pitch", "roll", "shift_x", "shift_y", "scale")
# Identity: what makes a person and a place. All in [0, 1]; render() turns them into sizes and colours.
IDENTITY = ["skin", "skin_hue", "hair_light", "hair_red", "hair_length", "hair_volume", "hairline", "parting",
            "face_width", "face_height", "jaw_width", "eye_size", "eye_spacing", "eye_hue", "brow_thick", "brow_tilt",
            "nose_length", "nose_width", "lip_full", "mouth_width", "lip_red", "glasses", "beard", "ears",
            "clothes_hue", "clothes_light", "clothes_stripe", "collar", "back_hue", "back_light", "back_wave", "back_dir"]


def random_identity(ids):
    """Factors of the people `ids` (B,) integers -> (B, I) in [0, 1]. ids >= HELD_OUT are never trained on."""
    return uniform(ids, len(IDENTITY), stream=10)


def hsv(h, s, v):
    """Hue, saturation, value, each broadcastable to (B, 1, 1) -> (B, 3, 1, 1) in [0, 1]."""
    h, s, v = torch.broadcast_tensors(h, torch.as_tensor(s, device=h.device), torch.as_tensor(v, device=h.device))
    k = [(h * 6 + n) % 6 for n in (5, 3, 1)]
    return torch.stack([v - v * s * torch.minimum(torch.minimum(a, 4 - a), torch.ones_like(a)).clamp(min=0) for a in k], 1)


def rgb(*channels):
    """Three (B, 1, 1) or numbers -> (B, 3, 1, 1)."""
    like = next(c for c in channels if torch.is_tensor(c))
    return torch.stack([c + torch.zeros_like(like) for c in channels], 1)


def over(image, colour, alpha):
    """Paint colour (B, 3, 1 or H, 1 or W) on image (B, 3, H, W) where alpha (B, H, W)."""
    return image + alpha[:, None] * (colour - image)


def render(identity, motion, size=128):
    """Draw people (B, I) in motion (B, M) -> images (B, 3, size, size) in [-1, 1]."""
    p = {name: identity[:, k, None, None] for k, name in enumerate(IDENTITY)}
    m = {name: motion[:, k, None, None] for k, name in enumerate(MOTION)}
    px = 2 / size
    axis = (torch.arange(size, device=identity.device, dtype=identity.dtype) + 0.5) * px - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    y, x = y[None], x[None]

    fw, fh = 0.45 + 0.09 * p["face_width"], 0.60 + 0.08 * p["face_height"]                # half width, half height

    def cover(distance):                       # signed distance (inside positive) -> coverage of the pixel
        return (0.5 + distance / px).clamp(0, 1)

    def soft(distance, width):                 # a blurred edge
        return torch.sigmoid(4 * distance / width)

    def ellipse(x, y, a, b):                   # approximate signed distance to an ellipse
        return (1 - torch.sqrt((x / a) ** 2 + (y / b) ** 2 + 1e-8)) * torch.minimum(fw * 0 + a, fw * 0 + b)

    # -- pose: undo shift, roll (about the neck) and scale, then turn the ellipsoid back ------------------------------
    cos, sin = torch.cos(m["roll"]), torch.sin(m["roll"])
    zoom = ZOOM * (1 + SCALE * m["scale"])
    xs, ys = (x - SHIFT_X * m["shift_x"]) / zoom, (y - SHIFT_Y * m["shift_y"] - 0.45) / zoom
    u, v = cos * xs + sin * ys, cos * ys - sin * xs + 0.45 + 0.02                                       # (B, H, W)
    u = u - 0.10 * torch.sin(m["yaw"])
    v = v + 0.02 - 0.05 * torch.sin(m["pitch"])
    rx, ry = 1.15 * fw, 1.20 * fh
    s = rx * torch.sin(torch.asin((u / rx).clamp(-0.999, 0.999)) - m["yaw"])                # surface coordinates (B, H, W)
    t = ry * torch.sin(torch.asin((v / ry).clamp(-0.999, 0.999)) - m["pitch"])

    # -- colours ------------------------------------------------------------------------------------------------------
    tone = 0.36 + 0.60 * p["skin"]
    skin = rgb(tone, tone * (0.70 + 0.08 * p["skin_hue"] + 0.06 * p["skin"]),
               tone * (0.52 + 0.12 * p["skin_hue"] + 0.12 * p["skin"]))
    light = 0.08 + 0.75 * p["hair_light"] ** 1.5
    hair = rgb(light, light * (0.82 - 0.32 * p["hair_red"]), light * (0.62 - 0.42 * p["hair_red"]))
    lips = skin * rgb(0.92 - 0.05 * p["lip_red"], 0.66 - 0.28 * p["lip_red"], 0.68 - 0.22 * p["lip_red"])
    iris = hsv(0.07 + 0.55 * p["eye_hue"], 0.65, 0.32 + 0.33 * p["eye_hue"])
    cloth = hsv(p["clothes_hue"], 0.55, 0.25 + 0.65 * p["clothes_light"])

    # -- background, hair behind, clothes, neck -----------------------------------------------------------------------
    angle = 6.283 * p["back_dir"]
    wave = torch.sin((3 + 9 * p["back_wave"]) * (x * torch.cos(angle) + y * torch.sin(angle)) + 12 * p["back_dir"])
    back = hsv(p["back_hue"], 0.40, 0.35 + 0.50 * p["back_light"])
    image = back * (0.95 + 0.10 * wave - 0.12 * y)[:, None]                                             # (B, 3, H, W)
    volume = 0.03 + 0.09 * p["hair_volume"]
    strands = 1 + 0.07 * torch.sin(20 * s / fw + 6 * t + 20 * p["parting"])
    long = 1.1 * (p["hair_length"] - 0.35).clamp(min=0)
    behind = ellipse(u, v - 0.45 * long + 0.03, fw + volume + 0.06, fh + volume + 0.60 * long)
    image = over(image, hair * (0.72 * strands)[:, None], cover(behind))
    bx, by = x - 0.02 * m["shift_x"], y - 0.015 * m["shift_y"]
    shoulder = 0.92 - 0.22 * torch.exp(-(bx / 0.55) ** 4) + 0.10 * bx**2
    stripe = 1 - 0.25 * (p["clothes_stripe"] - 0.4).clamp(min=0) * (1 + torch.sin(46 * by))
    image = over(image, cloth * (stripe * (1.05 - 0.25 * bx.abs()))[:, None], cover(by - shoulder))
    neck = torch.minimum(0.20 + 0.05 * p["jaw_width"] + 0.25 * (v - 0.62).clamp(min=0) - (bx + 0.4 * (u - bx)).abs(), v - 0.2)
    vee = 0.88 + 0.12 * p["collar"] - 0.9 * bx.abs()
    image = over(image, skin * 0.74, cover(torch.minimum(neck, torch.maximum(shoulder + 0.02, vee) - by)))

    # -- ears and head, shaded like an ellipsoid ----------------------------------------------------------------------
    ear = 0.07 + 0.04 * p["ears"]
    for side in (-1, 1):
        ears = ellipse(u - side * (fw + 0.015) + 0.22 * torch.sin(m["yaw"]), v - 0.04 - 0.15 * torch.sin(m["pitch"]), ear, 1.6 * ear)
        image = over(image, skin * 0.86, cover(ears))
    low = v.clamp(min=0)
    taper = 1 - (0.42 - 0.24 * p["jaw_width"]) * (low / fh) ** 2
    head = ellipse(u / taper, v, fw, torch.where(v > 0, fh + 0.075 * m["jaw"], fh + 0 * v))             # (B, H, W)
    nx, ny = u / rx, v / ry
    nz = torch.sqrt((1 - nx**2 - ny**2).clamp(min=0.02))
    shade = 0.80 + 0.16 * nz - 0.05 * ny + (0.06 + 0.42 * m["light"]) * (nx * m["light_x"] + 0.35 * (nz - 0.7))
    image = over(image, skin * shade[:, None], cover(head))

    # -- beard, cheeks, nose ------------------------------------------------------------------------------------------
    mouth_y = 0.345 + 0.03 * p["nose_length"]
    whisker = (2 * p["beard"] - 1).clamp(min=0)                                               # half of the people have none
    jawline = soft(t - 0.24 - 0.15 * torch.cos(2.2 * s / fw), 0.16)
    jawline = jawline * (1 - soft(ellipse(s, t - mouth_y - 0.03, 0.17, 0.10), 0.05))
    moustache = soft(ellipse(s, t - mouth_y + 0.085, 0.19, 0.045), 0.04)
    fuzz = torch.maximum(jawline, moustache) * cover(head) * whisker
    image = over(image, hair * (0.8 * strands * shade)[:, None], 0.85 * fuzz)
    for side in (-1, 1):
        cheek = soft(ellipse(s - side * 0.27, t - 0.17, 0.13, 0.10), 0.15) * cover(head)
        image = over(image, skin * rgb(1.0 + 0 * tone, 0.80, 0.80), 0.35 * cheek)
    ns, nt = s - 0.10 * torch.sin(m["yaw"]), t - 0.06 * torch.sin(m["pitch"])                # the nose stands out
    tip, wide = 0.12 + 0.07 * p["nose_length"], 0.05 + 0.035 * p["nose_width"]
    ridge = soft(wide * (0.35 + 0.65 * ((nt + 0.12) / (tip + 0.12)).clamp(0, 1)) - ns.abs(), 0.05)
    ridge = ridge * soft(nt + 0.14, 0.2) * cover(tip + 0.02 - nt)
    lit = shade * (1.03 - 0.9 * (ns * (-0.4 - m["light_x"])).clamp(min=-0.1))
    image = over(image, skin * lit[:, None] * 1.04, 0.55 * ridge)
    image = over(image, skin * 0.66, 0.8 * soft(ellipse(ns, nt - tip - 0.01, wide * 1.25, 0.022), 0.03))
    image = over(image, skin * 1.12, 0.5 * soft(ellipse(ns + 0.02 * m["light_x"], nt - tip + 0.045, 0.5 * wide, 0.04), 0.04))

    # -- eyes, brows, glasses -----------------------------------------------------------------------------------------
    ew, spacing = 0.118 + 0.028 * p["eye_size"], 0.205 + 0.03 * p["eye_spacing"]
    eh, eye_y, white = 0.70 * ew, -0.06, rgb(0.95 + 0 * tone, 0.94, 0.92)
    for side, blink in ((-1, m["blink_l"]), (1, m["blink_r"])):
        ex, ey = s - side * spacing, t - eye_y
        arch = (1 - (ex / ew) ** 2)
        inside = arch.clamp(min=-1)
        upper, lower = -eh * inside, 0.72 * eh * inside
        lid = upper + (lower - upper + 0.012) * blink
        opening = torch.minimum(torch.minimum(ey - lid, lower - ey), ew - ex.abs())
        socket = soft(ellipse(ex, ey, 1.45 * ew, 1.55 * eh), 0.10)
        image = over(image, skin * 0.80, 0.45 * socket)
        image = over(image, white * (0.86 + 0.14 * soft(ey - lid, 0.06))[:, None], cover(opening))
        gx, gy = ex - 0.052 * m["gaze_x"], ey - 0.008 - 0.036 * m["gaze_y"]
        r = torch.sqrt(gx**2 + gy**2 + 1e-8)
        disc = torch.minimum(opening, 0.52 * ew - r)
        image = over(image, iris * (0.75 + 5 * r)[:, None], cover(disc))
        image = over(image, 0 * iris + 0.04, cover(torch.minimum(disc, 0.24 * ew - r)))
        glint = 0.14 * ew - torch.sqrt((gx + 0.2 * ew) ** 2 + (gy + 0.2 * ew) ** 2 + 1e-8)
        image = over(image, white, 0.9 * cover(torch.minimum(glint, opening)))
        lash = 0.016 - (ey - lid).abs() / (1 + 2 * (ex / ew).abs())
        image = over(image, hair * 0.2, 0.85 * cover(torch.minimum(lash, ew * 1.06 - ex.abs())))
        tilt = 0.22 * (p["brow_tilt"] - 0.5) + 0.42 * m["brow_furrow"]
        by_ = t - eye_y + 0.155 + 0.065 * m["brow_raise"] - 0.055 * m["brow_furrow"] + 0.02 * p["eye_size"]
        bx_ = side * (s - side * (spacing + 0.01 - 0.035 * m["brow_furrow"]))                # outwards positive
        curve = by_ + tilt * bx_ + 1.3 * bx_**2 - 0.02
        thick = (0.018 + 0.020 * p["brow_thick"]) * (1 - 2.2 * bx_.clamp(min=0))
        image = over(image, hair * 0.55, 0.92 * cover(torch.minimum(thick - curve.abs(), 1.15 * ew - bx_.abs())))
        lens = ellipse(ex - 0.01 * side, ey - 0.02, 1.55 * ew, 1.70 * eh)
        frame = (p["glasses"] > 0.7) * cover(0.013 - lens.abs())
        image = over(image, 0.16 + 0 * skin, 0.95 * frame)
    bridge = (p["glasses"] > 0.7) * cover(torch.minimum(0.012 - (t - eye_y).abs(), spacing - 1.5 * ew - s.abs()))
    image = over(image, 0.16 + 0 * skin, 0.95 * bridge)

    # -- mouth: lips around an opening with teeth and tongue ----------------------------------------------------------
    mw = (0.155 + 0.045 * p["mouth_width"]) * (1 + 0.34 * m["lip_width"])
    full = (0.034 + 0.026 * p["lip_full"]) * (1 - 0.22 * m["lip_width"])
    mx, my = s, t - mouth_y + 0.085 * m["lip_corner"] * ((s / mw) ** 2 - 0.35).clamp(max=1.2)
    bow = (1 - (mx / mw) ** 2)
    arch = bow.clamp(min=0) ** 0.7
    gap = 0.235 * m["jaw"] * bow.clamp(min=0) ** 0.6
    top, bottom = -0.18 * gap, 0.82 * gap
    ends = (mw - mx.abs())
    outer = torch.minimum(torch.minimum(my - top + full * arch, bottom + 1.25 * full * arch - my), ends)
    image = over(image, skin * 0.72, 0.5 * soft(ellipse(mx, my - bottom - 2.1 * full, 0.6 * mw, 0.03), 0.04))
    image = over(image, lips * shade[:, None], cover(outer))
    inner = torch.minimum(torch.minimum(my - top, bottom - my), ends - 0.012)
    image = over(image, rgb(0.22 + 0 * tone, 0.05, 0.07), cover(inner) * (m["jaw"] > 0))
    image = over(image, rgb(0.72 + 0 * tone, 0.30, 0.32), cover(torch.minimum(inner, my - 0.45 * gap - 0.25 * mx**2 / mw - 0.015)))
    image = over(image, rgb(0.96 + 0 * tone, 0.95, 0.91), cover(torch.minimum(inner, top + 0.052 - my)))
    seam = 0.009 - (my - 0.5 * (top + bottom)).abs()
    image = over(image, lips * 0.45, cover(torch.minimum(seam, ends)) * (1 - 12 * m["jaw"]).clamp(min=0))

    # -- hair in front ------------------------------------------------------------------------------------------------
    line = -0.30 - 0.13 * p["hairline"] - 0.16 * (p["parting"] - 0.5) * s / fw + (0.55 + 0.4 * p["hair_length"]) * s**2
    cap = ellipse(u, v + 0.03, fw + volume, fh + volume)
    cap = torch.minimum(cap, torch.maximum(line - t, 0.10 + 0.3 * long - v - 9 * (fw + 0.01 - (s).abs()).clamp(min=0)))
    image = over(image, hair * (strands * (0.55 + 0.5 * shade))[:, None], cover(torch.minimum(cap, 0.14 + 1.2 * long - v)))
    return image.clamp(0, 1) * 2 - 1


def face_box(people, motion, size):
    """The upright box round the head, from the known factors (I,) or (n, I) and (n, M) -> mask (n, size, size).

    The renderer's pose, forwards: the head's ellipse, nodded and turned, rolled about the neck, scaled, shifted.
    """
    p = dict(zip(IDENTITY, people.expand(len(motion), -1).unbind(1), strict=True))
    m = dict(zip(MOTION, motion.unbind(1), strict=True))
    wide, high = 0.45 + 0.09 * p["face_width"], 0.60 + 0.08 * p["face_height"]
    cos, sin, zoom = torch.cos(m["roll"]), torch.sin(m["roll"]), ZOOM * (1 + SCALE * m["scale"])
    u = 0.10 * torch.sin(m["yaw"])
    v = 0.05 * torch.sin(m["pitch"]) - 0.02 + 0.0375 * m["jaw"] - 0.47
    high = high + 0.0375 * m["jaw"]                                                       # the chin goes down
    x, y = zoom * (cos * u - sin * v) + SHIFT_X * m["shift_x"], zoom * (sin * u + cos * v) + 0.45 + SHIFT_Y * m["shift_y"]
    half_x, half_y = zoom * torch.hypot(wide * cos, high * sin), zoom * torch.hypot(wide * sin, high * cos)
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    across = (axis - x[:, None]).abs() <= half_x[:, None]                                 # (n, W)
    down = (axis - y[:, None]).abs() <= half_y[:, None]                                   # (n, H)
    return down[:, :, None] & across[:, None, :]                                          # (n, H, W)


def region_ellipses(motion):
    """Where mouth, left eye, right eye and face are, roughly, for motion (..., M) -> (..., 4, 4): x, y, half width, half height
    in [-1, 1] of the picture. Of an average identity."""
    m = dict(zip(MOTION, motion.unbind(-1), strict=True))
    rx, ry = 1.15 * 0.495, 1.20 * 0.64
    cos, sin, zoom = torch.cos(m["roll"]), torch.sin(m["roll"]), 1.12 * (1 + 0.05 * m["scale"])
    rows = []
    for s, t, wide, high in ((0, 0.40, 0.27, 0.20), (-0.22, -0.06, 0.18, 0.13), (0.22, -0.06, 0.18, 0.13), (0, 0.05, 0.58, 0.78)):
        u = rx * torch.sin(math.asin(s / rx) + m["yaw"]) + 0.10 * torch.sin(m["yaw"])
        v = ry * torch.sin(math.asin(t / ry) + m["pitch"]) + 0.05 * torch.sin(m["pitch"]) - 0.49
        x, y = (cos * u - sin * v) * zoom + 0.05 * m["shift_x"], (sin * u + cos * v) * zoom + 0.45 + 0.04 * m["shift_y"]
        rows.append(torch.stack([x, y, torch.full_like(x, wide), torch.full_like(x, high)], -1))
    return torch.stack(rows, -2)
