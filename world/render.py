"""A procedural talking head: every motion factor and every identity factor of a frame is a known number.

    ids ----> identity (B, I) --\
                                 >-- render --> (B, 3, size, size)
    seeds --> motion   (B, M) --/

The head is a shaded 2.5D portrait: features are painted on an ellipsoid, so that yaw and pitch move near
parts more than far ones. All shapes are signed distances turned into coverage over one pixel (analytic
anti-aliasing), all colours are blended back to front, and everything is a batched torch expression: it runs
on CPU and GPU and can be compiled.

Units: image plane x, y in [-1, 1] (right, down); angles in radians. Everything here is ours; the paper uses
real video.
"""
import math

import torch

from world.speech import uniform

# Motion: what changes from frame to frame. Name -> range.
MOTION = {
    "yaw": (-0.26, 0.26), "pitch": (-0.18, 0.18), "roll": (-0.16, 0.16),   # radians: as far as speakers turn
    "shift_x": (-1, 1), "shift_y": (-1, 1), "scale": (-1, 1),                    # of 0.05, 0.04 and 5%
    "jaw": (0, 1), "lip_width": (-1, 1), "lip_corner": (-1, 1),       # closed-open, round-spread, sad-smile
    "blink_l": (0, 1), "blink_r": (0, 1),                                        # open-closed
    "gaze_x": (-1, 1), "gaze_y": (-1, 1),                                        # right and down positive
    "brow_raise": (-1, 1), "brow_furrow": (0, 1),
    "light_x": (-1, 1), "light": (0, 1),                                         # where from, how strong
}
SHIFT_X, SHIFT_Y, SCALE, ZOOM = 0.05, 0.04, 0.05, 1.12  # how far the head goes at 1, and its size at scale 0
POSE = ("yaw", "pitch", "roll", "shift_x", "shift_y", "scale")
# Identity: what makes a person and a place. All in [0, 1]; render() turns them into sizes and colours.
IDENTITY = ["skin", "skin_hue", "hair_light", "hair_red", "hair_length", "hair_volume", "hairline", "parting",
            "face_width", "face_height", "jaw_width", "eye_size", "eye_spacing", "eye_hue", "brow_thick",
            "brow_tilt", "nose_length", "nose_width", "lip_full", "mouth_width", "lip_red", "glasses",
            "beard", "ears", "clothes_hue", "clothes_light", "clothes_stripe", "collar", "back_hue",
            "back_light", "back_wave", "back_dir"]


def random_identity(ids):
    """Factors of the people `ids` (B,) integers -> (B, I) in [0, 1]. ids >= HELD_OUT are never trained on."""
    return uniform(ids, len(IDENTITY), stream=10)


def normalise_factors(factors):
    """Motion factors of the synthetic world (..., M) -> each with zero mean and about unit variance."""
    low, high = torch.tensor(list(MOTION.values()), device=factors.device).unbind(1)
    return (2 * (factors - low) / (high - low) - 1) * 3**0.5


def hsv(h, s, v):
    """Hue and value (B, 1, 1), saturation as a number -> (B, 3, 1, 1) in [0, 1]."""
    k = [(h * 6 + n) % 6 for n in (5, 3, 1)]
    return torch.stack([v - v * s * torch.minimum(a, 4 - a).clamp(0, 1) for a in k], 1)


def over(image, colour, alpha):
    """Paint colour (B, 3, 1 or H, 1 or W), or a grey number, on image (B, 3, H, W) where alpha (B, H, W)."""
    return image + alpha[:, None] * (colour - image)


def soft(distance, width):
    """Turn a signed distance into a blurred edge of this width."""
    return torch.sigmoid(4 * distance / width)


class Geometry:
    """The pixels of B pictures in the coordinates of the head, and what all parts of the drawing share.

    Undoes the pose for every pixel: identity p and motion m are {name: (B, 1, 1)}. Fields are (B, H, W),
    those of one number a person (B, 1, 1), so that they combine by broadcasting.
    """
    eye_y = -0.06                                                        # height of the eyes on the surface

    def __init__(self, p, m, size):
        like, self.px = p["skin"], 2 / size                                                # width of a pixel
        axis = (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) * self.px - 1
        self.x, self.y = axis[None, None], axis[None, :, None]                               # the image plane
        self.half_width = 0.45 + 0.09 * p["face_width"]                                          # of the face
        self.half_height = 0.60 + 0.08 * p["face_height"]
        self.mouth_y = 0.345 + 0.03 * p["nose_length"]                                       # on the surface
        self.hair_volume = 0.03 + 0.09 * p["hair_volume"]
        self.hair_length = 1.1 * (p["hair_length"] - 0.35).clamp(min=0)

        # the head's own plane: shift, roll about the neck and scale undone
        cos, sin = torch.cos(m["roll"]), torch.sin(m["roll"])
        zoom = ZOOM * (1 + SCALE * m["scale"])
        x, y = (self.x - SHIFT_X * m["shift_x"]) / zoom, (self.y - SHIFT_Y * m["shift_y"] - 0.45) / zoom
        u, v = cos * x + sin * y, cos * y - sin * x + 0.45 + 0.02
        u, v = u - 0.10 * torch.sin(m["yaw"]), v + 0.02 - 0.05 * torch.sin(m["pitch"])
        self.u, self.v = u, v

        # the head's surface: the ellipsoid turned back
        radius_x, radius_y = 1.15 * self.half_width, 1.20 * self.half_height
        self.s = radius_x * torch.sin(torch.asin((u / radius_x).clamp(-0.999, 0.999)) - m["yaw"])
        self.t = radius_y * torch.sin(torch.asin((v / radius_y).clamp(-0.999, 0.999)) - m["pitch"])

        # brightness of the surface, by its normal (nx, ny, nz), and of the hair
        nx, ny = u / radius_x, v / radius_y
        nz = torch.sqrt((1 - nx**2 - ny**2).clamp(min=0.02))
        shade = 0.80 + 0.16 * nz - 0.05 * ny
        self.shade = shade + (0.06 + 0.42 * m["light"]) * (nx * m["light_x"] + 0.35 * (nz - 0.7))
        self.strands = 1 + 0.07 * torch.sin(20 * self.s / self.half_width + 6 * self.t + 20 * p["parting"])

        # coverage of the head: narrower towards the chin, longer where the jaw goes down
        taper = 1 - (0.42 - 0.24 * p["jaw_width"]) * (v.clamp(min=0) / self.half_height) ** 2
        below = torch.where(v > 0, self.half_height + 0.075 * m["jaw"], self.half_height)
        self.head = self.cover(self.ellipse(u / taper, v, self.half_width, below))

    def cover(self, distance):
        """Turn a signed distance (inside positive) into coverage of the pixel."""
        return (0.5 + distance / self.px).clamp(0, 1)

    def ellipse(self, x, y, a, b):
        """Compute the approximate signed distance to an ellipse with half axes a, b."""
        radius = torch.minimum(self.half_width * 0 + a, self.half_width * 0 + b)
        return (1 - torch.sqrt((x / a) ** 2 + (y / b) ** 2 + 1e-8)) * radius


class Colours:
    """Colours (B, 3, 1, 1) in [0, 1] of the identities p, and some that all share, (3, 1, 1)."""

    def __init__(self, p):
        tone = 0.36 + 0.60 * p["skin"]                                           # the red of the skin
        self.skin = torch.stack([tone, tone * (0.70 + 0.08 * p["skin_hue"] + 0.06 * p["skin"]),
                                 tone * (0.52 + 0.12 * p["skin_hue"] + 0.12 * p["skin"])], 1)
        light = 0.08 + 0.75 * p["hair_light"] ** 1.5
        self.hair = torch.stack([light, light * (0.82 - 0.32 * p["hair_red"]),
                                 light * (0.62 - 0.42 * p["hair_red"])], 1)
        red = torch.stack([0.92 - 0.05 * p["lip_red"], 0.66 - 0.28 * p["lip_red"],
                           0.68 - 0.22 * p["lip_red"]], 1)
        self.lips = self.skin * red
        self.iris = hsv(0.07 + 0.55 * p["eye_hue"], 0.65, 0.32 + 0.33 * p["eye_hue"])
        self.cloth = hsv(p["clothes_hue"], 0.55, 0.25 + 0.65 * p["clothes_light"])

    def constant(self, r, g, b):
        """The same colour for everyone."""
        return self.skin.new_tensor([r, g, b])[:, None, None]


# ---- the parts, back to front: each paints on image (B, 3, H, W) and returns it ---------------------------

def draw_background(geo, p):
    """Begin a picture: a coloured wall with soft waves."""
    angle = 6.283 * p["back_dir"]
    across = geo.x * torch.cos(angle) + geo.y * torch.sin(angle)
    wave = torch.sin((3 + 9 * p["back_wave"]) * across + 12 * p["back_dir"])
    wall = hsv(p["back_hue"], 0.40, 0.35 + 0.50 * p["back_light"])
    return wall * (0.95 + 0.10 * wave - 0.12 * geo.y)[:, None]


def draw_hair_behind(image, geo, colour):
    """Paint the hair that the head hides in part."""
    half_width = geo.half_width + geo.hair_volume + 0.06
    half_height = geo.half_height + geo.hair_volume + 0.60 * geo.hair_length
    behind = geo.ellipse(geo.u, geo.v - 0.45 * geo.hair_length + 0.03, half_width, half_height)
    return over(image, colour.hair * (0.72 * geo.strands)[:, None], geo.cover(behind))


def draw_clothes(image, geo, colour, p, m):
    """Paint shoulders, neck, and the skin in the collar. The body follows a part of the head's shift."""
    x, y = geo.x - 0.02 * m["shift_x"], geo.y - 0.015 * m["shift_y"]
    shoulder = 0.92 - 0.22 * torch.exp(-(x / 0.55) ** 4) + 0.10 * x**2
    stripe = 1 - 0.25 * (p["clothes_stripe"] - 0.4).clamp(min=0) * (1 + torch.sin(46 * y))
    image = over(image, colour.cloth * (stripe * (1.05 - 0.25 * x.abs()))[:, None], geo.cover(y - shoulder))
    neck = 0.20 + 0.05 * p["jaw_width"] + 0.25 * (geo.v - 0.62).clamp(min=0) - (x + 0.4 * (geo.u - x)).abs()
    neck = torch.minimum(neck, geo.v - 0.2)
    collar = 0.88 + 0.12 * p["collar"] - 0.9 * x.abs()
    skin = torch.minimum(neck, torch.maximum(shoulder + 0.02, collar) - y)
    return over(image, colour.skin * 0.74, geo.cover(skin))


def draw_head(image, geo, colour, p, m):
    """Paint ears, head, beard and cheeks."""
    size = 0.07 + 0.04 * p["ears"]
    for sign in (-1, 1):
        ear = geo.ellipse(geo.u - sign * (geo.half_width + 0.015) + 0.22 * torch.sin(m["yaw"]),
                          geo.v - 0.04 - 0.15 * torch.sin(m["pitch"]), size, 1.6 * size)
        image = over(image, colour.skin * 0.86, geo.cover(ear))
    image = over(image, colour.skin * geo.shade[:, None], geo.head)

    s, t, mouth_y = geo.s, geo.t, geo.mouth_y
    density = (2 * p["beard"] - 1).clamp(min=0)                               # half of the people have none
    beard = soft(t - 0.24 - 0.15 * torch.cos(2.2 * s / geo.half_width), 0.16)
    beard = beard * (1 - soft(geo.ellipse(s, t - mouth_y - 0.03, 0.17, 0.10), 0.05))
    moustache = soft(geo.ellipse(s, t - mouth_y + 0.085, 0.19, 0.045), 0.04)
    beard = torch.maximum(beard, moustache) * geo.head * density
    image = over(image, colour.hair * (0.8 * geo.strands * geo.shade)[:, None], 0.85 * beard)
    for sign in (-1, 1):
        cheek = soft(geo.ellipse(s - sign * 0.27, t - 0.17, 0.13, 0.10), 0.15) * geo.head
        image = over(image, colour.skin * colour.constant(1.0, 0.80, 0.80), 0.35 * cheek)
    return image


def draw_nose(image, geo, colour, p, m):
    """Paint the ridge of the nose, the shadow under its tip, and the light on that."""
    s, t = geo.s - 0.10 * torch.sin(m["yaw"]), geo.t - 0.06 * torch.sin(m["pitch"])     # nearer than the face
    tip, width = 0.12 + 0.07 * p["nose_length"], 0.05 + 0.035 * p["nose_width"]
    ridge = soft(width * (0.35 + 0.65 * ((t + 0.12) / (tip + 0.12)).clamp(0, 1)) - s.abs(), 0.05)
    ridge = ridge * soft(t + 0.14, 0.2) * geo.cover(tip + 0.02 - t)
    shade = geo.shade * (1.03 - 0.9 * (s * (-0.4 - m["light_x"])).clamp(min=-0.1))
    image = over(image, colour.skin * shade[:, None] * 1.04, 0.55 * ridge)
    shadow = soft(geo.ellipse(s, t - tip - 0.01, width * 1.25, 0.022), 0.03)
    image = over(image, colour.skin * 0.66, 0.8 * shadow)
    highlight = soft(geo.ellipse(s + 0.02 * m["light_x"], t - tip + 0.045, 0.5 * width, 0.04), 0.04)
    return over(image, colour.skin * 1.12, 0.5 * highlight)


def draw_eyes(image, geo, colour, p, m):
    """Paint both eyes with lids and lashes, the brows, and glasses."""
    width, spacing = 0.118 + 0.028 * p["eye_size"], 0.205 + 0.03 * p["eye_spacing"]
    height, white = 0.70 * width, colour.constant(0.95, 0.94, 0.92)
    glasses, frame_colour = p["glasses"] > 0.7, 0.16
    tilt = 0.22 * (p["brow_tilt"] - 0.5) + 0.42 * m["brow_furrow"]
    for sign, blink in ((-1, m["blink_l"]), (1, m["blink_r"])):
        x, y = geo.s - sign * spacing, geo.t - geo.eye_y                          # from the middle of the eye
        arch = (1 - (x / width) ** 2).clamp(min=-1)
        upper, lower = -height * arch, 0.72 * height * arch
        lid = upper + (lower - upper + 0.012) * blink
        opening = torch.minimum(torch.minimum(y - lid, lower - y), width - x.abs())
        socket = soft(geo.ellipse(x, y, 1.45 * width, 1.55 * height), 0.10)
        image = over(image, colour.skin * 0.80, 0.45 * socket)
        image = over(image, white * (0.86 + 0.14 * soft(y - lid, 0.06))[:, None], geo.cover(opening))

        gaze_x, gaze_y = x - 0.052 * m["gaze_x"], y - 0.008 - 0.036 * m["gaze_y"]  # from the pupil
        radius = torch.sqrt(gaze_x**2 + gaze_y**2 + 1e-8)
        disc = torch.minimum(opening, 0.52 * width - radius)
        image = over(image, colour.iris * (0.75 + 5 * radius)[:, None], geo.cover(disc))
        pupil = torch.minimum(disc, 0.24 * width - radius)
        image = over(image, 0.04, geo.cover(pupil))
        glint = 0.14 * width - torch.sqrt((gaze_x + 0.2 * width) ** 2 + (gaze_y + 0.2 * width) ** 2 + 1e-8)
        image = over(image, white, 0.9 * geo.cover(torch.minimum(glint, opening)))
        lash = 0.016 - (y - lid).abs() / (1 + 2 * (x / width).abs())
        image = over(image, colour.hair * 0.2, 0.85 * geo.cover(torch.minimum(lash, width * 1.06 - x.abs())))

        brow_y = y + 0.155 + 0.065 * m["brow_raise"] - 0.055 * m["brow_furrow"] + 0.02 * p["eye_size"]
        brow_x = sign * (geo.s - sign * (spacing + 0.01 - 0.035 * m["brow_furrow"]))    # outwards positive
        curve = brow_y + tilt * brow_x + 1.3 * brow_x**2 - 0.02
        thick = (0.018 + 0.020 * p["brow_thick"]) * (1 - 2.2 * brow_x.clamp(min=0))
        brow = torch.minimum(thick - curve.abs(), 1.15 * width - brow_x.abs())
        image = over(image, colour.hair * 0.55, 0.92 * geo.cover(brow))
        lens = geo.ellipse(x - 0.01 * sign, y - 0.02, 1.55 * width, 1.70 * height)
        image = over(image, frame_colour, 0.95 * (glasses * geo.cover(0.013 - lens.abs())))
    bridge = torch.minimum(0.012 - (geo.t - geo.eye_y).abs(), spacing - 1.5 * width - geo.s.abs())
    return over(image, frame_colour, 0.95 * (glasses * geo.cover(bridge)))


def draw_mouth(image, geo, colour, p, m):
    """Paint the lips round an opening with tongue and teeth, and the line between closed lips."""
    width = (0.155 + 0.045 * p["mouth_width"]) * (1 + 0.34 * m["lip_width"])            # half of it
    full = (0.034 + 0.026 * p["lip_full"]) * (1 - 0.22 * m["lip_width"])
    x = geo.s
    y = geo.t - geo.mouth_y + 0.085 * m["lip_corner"] * ((x / width) ** 2 - 0.35).clamp(max=1.2)
    bow = 1 - (x / width) ** 2
    arch = bow.clamp(min=0) ** 0.7
    gap = 0.235 * m["jaw"] * bow.clamp(min=0) ** 0.6
    top, bottom = -0.18 * gap, 0.82 * gap
    ends = width - x.abs()
    chin_shadow = soft(geo.ellipse(x, y - bottom - 2.1 * full, 0.6 * width, 0.03), 0.04)
    image = over(image, colour.skin * 0.72, 0.5 * chin_shadow)
    outer = torch.minimum(torch.minimum(y - top + full * arch, bottom + 1.25 * full * arch - y), ends)
    image = over(image, colour.lips * geo.shade[:, None], geo.cover(outer))
    inner = torch.minimum(torch.minimum(y - top, bottom - y), ends - 0.012)
    image = over(image, colour.constant(0.22, 0.05, 0.07), geo.cover(inner) * (m["jaw"] > 0))
    tongue = torch.minimum(inner, y - 0.45 * gap - 0.25 * x**2 / width - 0.015)
    image = over(image, colour.constant(0.72, 0.30, 0.32), geo.cover(tongue))
    teeth = torch.minimum(inner, top + 0.052 - y)
    image = over(image, colour.constant(0.96, 0.95, 0.91), geo.cover(teeth))
    seam = torch.minimum(0.009 - (y - 0.5 * (top + bottom)).abs(), ends)
    return over(image, colour.lips * 0.45, geo.cover(seam) * (1 - 12 * m["jaw"]).clamp(min=0))


def draw_hair(image, geo, colour, p):
    """Paint the hair in front: a cap above the hairline, and what hangs down at the sides."""
    s, v = geo.s, geo.v
    line = -0.30 - 0.13 * p["hairline"] - 0.16 * (p["parting"] - 0.5) * s / geo.half_width
    line = line + (0.55 + 0.4 * p["hair_length"]) * s**2
    cap = geo.ellipse(geo.u, v + 0.03, geo.half_width + geo.hair_volume, geo.half_height + geo.hair_volume)
    sides = 0.10 + 0.3 * geo.hair_length - v - 9 * (geo.half_width + 0.01 - s.abs()).clamp(min=0)
    cap = torch.minimum(cap, torch.maximum(line - geo.t, sides))
    cap = torch.minimum(cap, 0.14 + 1.2 * geo.hair_length - v)
    return over(image, colour.hair * (geo.strands * (0.55 + 0.5 * geo.shade))[:, None], geo.cover(cap))


def render(identity, motion, size=128):
    """Draw people (B, I) in motion (B, M) -> images (B, 3, size, size) in [-1, 1]."""
    p = {name: identity[:, k, None, None] for k, name in enumerate(IDENTITY)}
    m = {name: motion[:, k, None, None] for k, name in enumerate(MOTION)}
    geo, colour = Geometry(p, m, size), Colours(p)
    image = draw_background(geo, p)
    image = draw_hair_behind(image, geo, colour)
    image = draw_clothes(image, geo, colour, p, m)
    image = draw_head(image, geo, colour, p, m)
    image = draw_nose(image, geo, colour, p, m)
    image = draw_eyes(image, geo, colour, p, m)
    image = draw_mouth(image, geo, colour, p, m)
    image = draw_hair(image, geo, colour, p)
    return image.clamp(0, 1) * 2 - 1


def pose_forwards(u, v, m):
    """Roll a point of the nodded and turned head about the neck, scale and shift it, as Geometry undoes it.

    -> its x, y in the picture, cosine and sine of the roll, zoom.
    """
    cos, sin, zoom = torch.cos(m["roll"]), torch.sin(m["roll"]), ZOOM * (1 + SCALE * m["scale"])
    x = zoom * (cos * u - sin * v) + SHIFT_X * m["shift_x"]
    y = zoom * (sin * u + cos * v) + 0.45 + SHIFT_Y * m["shift_y"]
    return x, y, cos, sin, zoom


def face_box(people, motion, size):
    """Mark the box round the head of people (I,) or (n, I) in motion (n, M) -> mask (n, size, size)."""
    p = dict(zip(IDENTITY, people.expand(len(motion), -1).unbind(1), strict=True))
    m = dict(zip(MOTION, motion.unbind(1), strict=True))
    wide, high = 0.45 + 0.09 * p["face_width"], 0.60 + 0.08 * p["face_height"]
    high = high + 0.0375 * m["jaw"]                                                       # the chin goes down
    v = 0.05 * torch.sin(m["pitch"]) - 0.02 + 0.0375 * m["jaw"] - 0.47
    x, y, cos, sin, zoom = pose_forwards(0.10 * torch.sin(m["yaw"]), v, m)
    half_x, half_y = zoom * torch.hypot(wide * cos, high * sin), zoom * torch.hypot(wide * sin, high * cos)
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    across = (axis - x[:, None]).abs() <= half_x[:, None]                                 # (n, W)
    down = (axis - y[:, None]).abs() <= half_y[:, None]                                   # (n, H)
    return down[:, :, None] & across[:, None, :]                                          # (n, H, W)


def region_ellipses(motion):
    """Compute roughly where mouth, left eye, right eye and face of an average person are, in motion (..., M).

    -> (..., 4, 4): x, y, half width, half height, in [-1, 1] of the picture.
    """
    m = dict(zip(MOTION, motion.unbind(-1), strict=True))
    rx, ry, ellipses = 1.15 * 0.495, 1.20 * 0.64, []
    for s, t, wide, high in ((0, 0.4, 0.27, 0.2), (-0.22, -0.06, 0.18, 0.13), (0.22, -0.06, 0.18, 0.13),
                             (0, 0.05, 0.58, 0.78)):
        u = rx * torch.sin(math.asin(s / rx) + m["yaw"]) + 0.10 * torch.sin(m["yaw"])
        v = ry * torch.sin(math.asin(t / ry) + m["pitch"]) + 0.05 * torch.sin(m["pitch"]) - 0.49
        x, y, *_ = pose_forwards(u, v, m)
        ellipses.append(torch.stack([x, y, torch.full_like(x, wide), torch.full_like(x, high)], -1))
    return torch.stack(ellipses, -2)
