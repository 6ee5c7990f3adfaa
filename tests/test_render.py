"""world/render.py: every factor is visible, in its place."""
import pytest
import torch
import torch.nn.functional as F

from measure.metrics import NAMES
from world.people import HELD_OUT, random_motion
from world.render import IDENTITY, MOTION, face_box, random_identity, region_ellipses, render

LOW, HIGH = torch.tensor(list(MOTION.values())).unbind(1)
PEOPLE = random_identity(torch.arange(8))


def rest(count=8, **factors):
    """Motion (count, M): zero but for `factors`."""
    motion = torch.zeros(count, len(MOTION))
    for name, value in factors.items():
        motion[:, list(MOTION).index(name)] = value
    return motion


def changed(people, a, b, size=64):
    """How much each pixel differs between two motions: (B, H, W)."""
    return (render(people, a, size) - render(people, b, size)).abs().amax(1)


# ---- pictures ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [32, 64, 128])
def test_pictures_are_pictures(size):
    images = render(random_identity(torch.arange(40, 50)), random_motion(torch.arange(10)), size)
    assert images.shape == (10, 3, size, size) and images.isfinite().all() and images.abs().max() <= 1
    assert (images.std((1, 2, 3)) > 0.15).all()


def test_a_picture_depends_on_its_own_factors():
    motion = random_motion(torch.arange(8))
    whole = render(PEOPLE, motion, 32)
    assert torch.equal(render(PEOPLE, motion, 32), whole)
    parts = torch.cat([render(PEOPLE[:3], motion[:3], 32), render(PEOPLE[3:], motion[3:], 32)])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [32, 64])
def test_small_pictures_are_large_ones_made_small(size):
    motion = random_motion(torch.arange(8))
    large = F.avg_pool2d(render(PEOPLE, motion, 2 * size), 2)
    assert (large - render(PEOPLE, motion, size)).abs().mean((1, 2, 3)).max() < 0.02


@pytest.mark.parametrize("name", MOTION)
def test_every_motion_factor_shows_on_everyone(name):
    other = {"light_x": {"light": 0.5}, "light": {"light_x": 1}}.get(name, {})
    low, high = (rest(**{**other, name: value}) for value in MOTION[name])
    middle = rest(**{**other, name: sum(MOTION[name]) / 2})
    for a, b in ((low, high), (low, middle), (middle, high)):
        assert changed(PEOPLE, a, b).amax((1, 2)).min() > 0.05


@pytest.mark.parametrize("name", IDENTITY)
def test_every_identity_factor_shows(name):
    people = torch.full((2, len(IDENTITY)), 0.5)
    ends = [0.0, 0.5] if "hue" in name else [0.1, 0.9]                       # hues are a circle
    people[:, IDENTITY.index(name)] = torch.tensor(ends)
    first, second = render(people, rest(2, jaw=0.2), 64)
    assert (first - second).abs().max() > 0.05


def test_a_shift_moves_the_face():
    """At 200 pixels, shift_x = 1 moves the same face 5 pixels to the right, shift_y = 1 moves it 4 down."""
    face = (slice(None), slice(None), slice(60, 140), slice(60, 140))
    plain, right, down = (render(PEOPLE, rest(**m), 200) for m in ({}, {"shift_x": 1}, {"shift_y": 1}))
    torch.testing.assert_close(right.roll(-5, 3)[face], plain[face], atol=2e-3, rtol=0)
    torch.testing.assert_close(down.roll(-4, 2)[face], plain[face], atol=2e-3, rtol=0)


def test_the_jaw_opens_in_the_lower_half_alone():
    moved = changed(PEOPLE, rest(), rest(jaw=1)) > 0.01                      # (B, H, W)
    assert not moved[:, :32].any() and (moved.sum((1, 2)) > 40).all()


def test_the_wider_the_jaw_the_larger_the_opening():
    quarter, half, wide = (changed(PEOPLE, rest(), rest(jaw=jaw)).sum((1, 2)) for jaw in (0.25, 0.5, 1))
    assert (quarter > 0).all() and (half > 1.1 * quarter).all() and (wide > 1.1 * half).all()


@pytest.mark.parametrize("eye, columns", [("blink_l", slice(32, 64)), ("blink_r", slice(0, 32))])
def test_an_eye_blinks_on_its_side_of_the_picture(eye, columns):
    moved = changed(PEOPLE, rest(), rest(**{eye: 1})) > 0.01
    assert moved.any((1, 2)).all() and not moved[:, :, columns].any() and not moved[:, 40:].any()


@pytest.mark.parametrize("gaze, axis", [("gaze_x", 2), ("gaze_y", 1)])
def test_the_dark_of_the_eye_goes_where_it_looks(gaze, axis):
    there, back = (render(PEOPLE, rest(**{gaze: x}), 64) for x in (1, -1))
    change = (there - back).mean(1)                                                                # (B, H, W)
    place = torch.arange(64.0).view(*((1, 1, 64) if axis == 2 else (1, 64, 1)))
    darker, lighter = (part / part.sum((1, 2), keepdim=True)
                       for part in ((-change).clamp(min=0), change.clamp(min=0)))
    assert ((darker * place).sum((1, 2)) > (lighter * place).sum((1, 2))).all()


def test_light_comes_from_its_side():
    def cheeks(light_x):
        image = render(PEOPLE, rest(light=1, light_x=light_x), 64).mean(1)[:, 34:40]
        return image[:, :, 22:27].mean((1, 2)) - image[:, :, 37:42].mean((1, 2))                # left - right

    assert (cheeks(1) < cheeks(-1) - 0.02).all()


@pytest.mark.parametrize("name, axis", [("shift_x", 3), ("shift_y", 2)])
def test_the_face_box_moves_as_far_as_the_head(name, axis):
    before, after = rest(1, **{name: -1}), rest(1, **{name: 1})
    a, b = (render(PEOPLE[:1], motion, 256) for motion in (before, after))
    inside = (slice(None), slice(None), slice(80, 170), slice(90, 160))      # of the face, all of which moves
    moved = min(range(30), key=lambda d: (a.roll(d, axis)[inside] - b[inside]).abs().mean())
    middles = [face_box(PEOPLE[0], motion, 256)[0].nonzero()[:, axis - 2].float().mean()
               for motion in (before, after)]
    assert (middles[1] - middles[0]).item() == pytest.approx(moved, abs=1)


def test_the_face_box_grows_as_the_head_does():
    before, after = rest(1, scale=-1), rest(1, scale=1)
    a, b = (render(PEOPLE[:1], motion, 256) for motion in (before, after))

    def error(ratio):                                                   # a enlarged about the neck, (0, 0.45)
        grid = F.affine_grid(torch.tensor([[[1 / ratio, 0, 0], [0, 1 / ratio, 0.45 - 0.45 / ratio]]]),
                             a.shape, align_corners=False)
        return (F.grid_sample(a, grid, align_corners=False) - b)[:, :, 80:170, 90:160].abs().mean()

    grown = min((1 + k / 200 for k in range(60)), key=error)
    heights = [face_box(PEOPLE[0], motion, 256)[0].any(1).sum().item() for motion in (before, after)]
    assert heights[1] / heights[0] == pytest.approx(grown, abs=0.02)


def test_the_face_box_holds_the_face_and_ends_at_the_chin():
    ids = HELD_OUT + torch.arange(12)
    people, motion = random_identity(ids), random_motion(ids)
    people[:, IDENTITY.index("hair_length")] = 0                            # no hair below the chin
    motion[:, NAMES.index("jaw")] = motion[:, NAMES.index("jaw")].clamp(min=0.05)
    box, drawn = face_box(people, motion, 128), render(people, motion)
    other = motion.clone()
    for name in ("gaze_x", "gaze_y", "brow_raise", "lip_width", "lip_corner"):
        other[:, NAMES.index(name)] = -other[:, NAMES.index(name)]
    moved = (render(people, other) - drawn).abs().amax(1) > 0.02
    assert (moved & box).sum() >= 0.995 * moved.sum() and 0.2 < box.float().mean() < 0.6
    other = motion.clone()
    other[:, NAMES.index("light_x")] *= -1                                  # light is on the head alone
    lit = (render(people, other) - drawn).abs().amax(1) > 0
    bottom, edge = (torch.tensor([m.any(1).nonzero().max() for m in masks]) for masks in (lit, box))
    assert (bottom - edge).abs().float().mean() < 2 and (bottom - edge).max() <= 3


def inside(ellipse, size):
    """Ellipse (4,): x, y, half width, half height in [-1, 1] -> (size, size) bool."""
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    x, y, a, b = ellipse
    return ((axis - x) / a) ** 2 + ((axis[:, None] - y) / b) ** 2 < 1


@pytest.mark.parametrize("pose", [{}, {"yaw": 0.3}, {"pitch": 0.2}, {"roll": 0.2},
                                  {"shift_x": 1, "shift_y": -1, "scale": 1}])
@pytest.mark.parametrize("number, factors", [(0, {"jaw": 1}), (1, {"blink_l": 1}), (2, {"blink_r": 1})])
def test_mouth_and_eyes_move_within_their_ellipses(number, factors, pose):
    """Most of the change that the jaw and the lids make lies in the ellipse of that part."""
    found = region_ellipses(rest(**pose))
    assert found.shape == (8, 4, 4)
    moved = changed(PEOPLE, rest(**pose), rest(**pose, **factors))           # (B, H, W)
    share = torch.stack([(part * inside(ellipse[number], 64)).sum() / part.sum()
                         for part, ellipse in zip(moved, found, strict=True)])
    assert share.mean() > 0.8 and share.min() > 0.65, share


def test_the_ellipse_of_the_face_holds_the_face():
    motion = random_motion(torch.arange(8))
    for box, ellipses in zip(face_box(PEOPLE, motion, 64), region_ellipses(motion), strict=True):
        face = inside(ellipses[3], 64)
        assert (box & face).sum() > 0.75 * box.sum()
        assert all((inside(part, 64) & face).sum() > 0.9 * inside(part, 64).sum() for part in ellipses[:3])
