"""The synthetic world: factors in range and repeatable, each visible in its place, clips that agree with the voice."""

import av
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

import synthetic
from media import read_video
from speech import EMOTIONS, FPS, speak
from synthetic import HELD_OUT, IDENTITY, MOTION, POSE, clip, identity, pairs, random_motion, render, render_clip

torch.set_num_threads(1)
LOW, HIGH = torch.tensor(list(MOTION.values())).unbind(1)
PEOPLE = identity(torch.arange(8))


def rest(count=8, **factors):
    """Motion (count, M): zero but for `factors`."""
    motion = torch.zeros(count, len(MOTION))
    for name, value in factors.items():
        motion[:, list(MOTION).index(name)] = value
    return motion


def changed(people, a, b, size=64):
    """How much each pixel differs between two motions: (B, H, W)."""
    return (render(people, a, size) - render(people, b, size)).abs().amax(1)


# ---- factors --------------------------------------------------------------------------------------------------------

def test_identities_are_spread_over_their_range():
    people = identity(torch.arange(4000))
    assert people.shape == (4000, len(IDENTITY)) and (people >= 0).all() and (people < 1).all()
    torch.testing.assert_close(people.mean(0), torch.full((len(IDENTITY),), 0.5), atol=0.03, rtol=0)
    torch.testing.assert_close(people.std(0), torch.full((len(IDENTITY),), 12**-0.5), atol=0.02, rtol=0)
    correlation = torch.corrcoef(people.T) - torch.eye(len(IDENTITY))
    assert correlation.abs().max() < 0.1


def test_motions_fill_their_ranges():
    motion = random_motion(torch.arange(4000))
    assert motion.shape == (4000, len(MOTION)) and (motion >= LOW).all() and (motion <= HIGH).all()
    span = HIGH - LOW
    assert ((motion.amax(0) - motion.amin(0)) / span > 0.95).all()
    column = dict(zip(MOTION, motion.T, strict=True))
    assert (column["jaw"] == 0).float().mean() == pytest.approx(0.2, abs=0.03)
    assert (column["blink_l"] == 0).float().mean() == pytest.approx(0.5, abs=0.03)
    assert ((column["blink_l"] == 0) == (column["blink_r"] == 0)).all()
    assert (column["blink_l"] == column["blink_r"]).float().mean() == pytest.approx(0.5 + 0.5 * 0.7, abs=0.03)
    for name in POSE:                                                        # the sum of two dice, not one
        assert (column[name].std() / (MOTION[name][1] - MOTION[name][0])).item() == pytest.approx(24**-0.5, abs=0.01)


@pytest.mark.parametrize("make", [identity, random_motion, lambda seeds: clip(seeds, 7)["motion"]])
def test_draws_depend_on_the_seed_alone(make):
    seeds = torch.tensor([3, HELD_OUT + 3, 123_456, 0])
    whole = make(seeds)
    torch.testing.assert_close(make(seeds), whole, atol=0, rtol=0)
    torch.testing.assert_close(torch.cat([make(seeds[:1]), make(seeds[1:])]), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(make(seeds.flip(0)), whole.flip(0), atol=1e-6, rtol=0)
    assert all((whole[i] - whole[j]).abs().max() > 0.1 for i in range(4) for j in range(i))


# ---- pictures -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [32, 64, 128])
def test_pictures_are_pictures(size):
    images = render(identity(torch.arange(40, 50)), random_motion(torch.arange(10)), size)
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
    """At 200 pixels, shift_x = 1 is 5 pixels to the right and shift_y = 1 is 4 down: the same face, elsewhere."""
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
    change = (render(PEOPLE, rest(**{gaze: 1}), 64) - render(PEOPLE, rest(**{gaze: -1}), 64)).mean(1)   # (B, H, W)
    place = torch.arange(64.0).view(*((1, 1, 64) if axis == 2 else (1, 64, 1)))
    darker, lighter = (part / part.sum((1, 2), keepdim=True) for part in ((-change).clamp(min=0), change.clamp(min=0)))
    assert ((darker * place).sum((1, 2)) > (lighter * place).sum((1, 2))).all()


def test_light_comes_from_its_side():
    def cheeks(light_x):
        image = render(PEOPLE, rest(light=1, light_x=light_x), 64).mean(1)[:, 34:40]
        return image[:, :, 22:27].mean((1, 2)) - image[:, :, 37:42].mean((1, 2))                        # left - right

    assert (cheeks(1) < cheeks(-1) - 0.02).all()


# ---- pairs ----------------------------------------------------------------------------------------------------------

def drawn(seeds, targets, near):
    """What pairs asks to be drawn: people (R, 1+T, I), motion (R, 1+T, M); and what it gives back, as numbers."""
    asked = []

    def draw(people, motion, size):
        asked.extend((people, motion, size))
        return torch.arange(float(len(people))).view(-1, 1, 1, 1).expand(-1, 3, size, size)

    first, others, _ = pairs(torch.tensor(seeds), targets, near, 8, draw)
    people, motion = (part.unflatten(0, (-1, 1 + targets)) for part in asked[:2])
    return people, motion, first[:, 0, 0, 0], others[:, 0, 0, 0]


def test_pairs_are_pictures_of_the_same_people():
    first, others, truth = pairs(torch.tensor([5, 6]), 3, 0.5, 32)
    assert first.shape == (2, 3, 32, 32) and others.shape == (6, 3, 32, 32)
    people, motion, *_ = drawn([5, 6], 3, 0.5)
    assert torch.equal(truth, torch.cat([motion[:, 0], motion[:, 1:].flatten(0, 1)]))
    whole = render(people.flatten(0, 1), motion.flatten(0, 1), 32).unflatten(0, (2, 4))
    torch.testing.assert_close(first, whole[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(others, whole[:, 1:].flatten(0, 1), atol=1e-5, rtol=0)


def test_targets_follow_their_reference():
    people, _, first, others = drawn([5, 6], 3, 0.5)
    assert first.tolist() == [0, 4] and others.tolist() == [1, 2, 3, 5, 6, 7]
    assert (people == people[:, :1]).all() and not torch.equal(people[0], people[1])


@pytest.mark.parametrize("near, count", [(0, 0), (0.5, 4), (0.6, 5), (1, 8)])
def test_the_near_share_keeps_pose_and_light(near, count):
    _, motion, *_ = drawn(list(range(8)), 2, near)
    still = torch.tensor([name in (*POSE, "light_x", "light") for name in MOTION])
    kept = (motion[..., still] == motion[:, :1, still]).flatten(1).all(1)    # (R,)
    assert kept.tolist() == [True] * count + [False] * (8 - count)
    moved = (motion[:, 1:] != motion[:, :1]).any(1)                          # (R, M)
    assert count == 8 or moved[count:].float().mean() > 0.9
    assert count == 0 or 0.3 < moved[:count, ~still].float().mean() < 0.6    # a random half of the face, another for each
    assert count == 0 or len(set(map(tuple, moved[:count].tolist()))) == count
    assert not torch.equal(motion[:, 1], motion[:, 2])


@pytest.mark.parametrize("seed", [7, HELD_OUT - 1, HELD_OUT // 2, HELD_OUT, HELD_OUT + 10**6])
def test_training_pairs_never_show_a_held_out_person(seed, monkeypatch):
    used = []
    for name in ("identity", "random_motion"):
        made = getattr(synthetic, name)
        monkeypatch.setattr(synthetic, name, lambda seeds, made=made: used.append(seeds) or made(seeds))
    drawn([seed, seed], 3, 0)
    assert len(used) == 2 and all(((part >= HELD_OUT) == (seed >= HELD_OUT)).all() for part in used)


# ---- clips ----------------------------------------------------------------------------------------------------------

SEEDS = torch.tensor([1, 2, HELD_OUT, 77])
LONG = clip(SEEDS, 30 * FPS)


def factor(made, name):
    return made["motion"][..., list(MOTION).index(name)]


def test_clips_agree_with_the_voice():
    made, said = clip(SEEDS, 50), speak(SEEDS, 50)
    assert made["motion"].shape == (4, 50, len(MOTION)) and made["wave"].shape == (4, 50 * 640)
    assert torch.equal(made["identity"], identity(SEEDS))
    torch.testing.assert_close(factor(made, "jaw"), said["jaw"])
    torch.testing.assert_close(factor(made, "lip_width"), said["lip_width"])
    torch.testing.assert_close(made["wave"], said["wave"])
    torch.testing.assert_close(made["emotion"], said["emotion"])


def test_clips_stay_in_range_and_move_smoothly():
    motion = LONG["motion"]
    assert motion.isfinite().all() and (motion >= LOW).all() and (motion <= HIGH).all()
    for name in (*POSE, "light_x", "light", "lip_corner", "brow_raise"):
        low, high = MOTION[name]
        assert factor(LONG, name).diff(dim=1).abs().max() < 0.15 * (high - low)
        assert (factor(LONG, name).std(1) > 0.005 * (high - low)).any()
    assert (factor(LONG, "yaw").std(1) > 0.02).all()


def test_eyes_blink():
    blink = factor(LONG, "blink_l") > 0.5
    count = (blink[:, 1:] & ~blink[:, :-1]).sum(1)                           # every 2 to 4.5 seconds, of 30
    assert (count >= 5).all() and (count <= 16).all()
    assert blink.float().mean() < 0.12 and torch.equal(factor(LONG, "blink_l"), factor(LONG, "blink_r"))
    jumps = (factor(LONG, "gaze_x").diff(dim=1).abs() > 1e-3).sum(1)         # eyes rest between jumps
    assert (jumps >= 10).all() and (jumps <= 45).all()


def test_a_longer_clip_starts_with_the_shorter():
    short = clip(SEEDS, 40)
    torch.testing.assert_close(LONG["motion"][:, :40], short["motion"], atol=1e-4, rtol=0)
    torch.testing.assert_close(LONG["wave"][:, :40 * 640], short["wave"], atol=1e-4, rtol=0)


def test_emotions_show_on_the_face():
    seeds, mute, moods = torch.tensor([4]).expand(7), torch.zeros(7, 100), torch.eye(7)
    shown = factor({"motion": synthetic.perform(seeds, mute, mute, moods)}, "lip_corner").mean(1)
    corner = dict(zip(EMOTIONS, shown, strict=True))
    assert corner["happy"] > corner["neutral"] + 0.3 > corner["sad"] + 0.6


def test_clip_frames_are_the_rendered_ones():
    motion = LONG["motion"][0, :20]
    frames = np.stack(list(render_clip(LONG["identity"][0], motion, 32)))
    assert frames.shape == (20, 32, 32, 3) and frames.dtype == np.uint8
    want = (render(LONG["identity"][:1].expand(20, -1), motion, 32) + 1) * 127.5
    assert np.abs(frames - want.permute(0, 2, 3, 1).numpy()).max() <= 0.51


# ---- the command ----------------------------------------------------------------------------------------------------

def test_the_command_writes_clips_and_their_factors(tmp_path):
    assert synthetic.main(f"--out {tmp_path}/made --clips 1 --seconds 0.4 --size 32 --seed 5".split()) == 0
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["000005.mp4", "000005.npz", "000005.wav"]
    true, stem = clip(torch.tensor([5]), 10), str(tmp_path / "made" / "000005")
    with np.load(stem + ".npz") as kept:                                     # no pickle inside
        assert kept["identity_names"].tolist() == IDENTITY and kept["motion_names"].tolist() == list(MOTION)
        assert kept["emotion_names"].tolist() == list(EMOTIONS)
        for name in ("identity", "motion", "emotion"):
            np.testing.assert_allclose(kept[name], true[name][0].numpy(), atol=1e-6)
    sound, rate = soundfile.read(stem + ".wav", dtype="float32")
    assert rate == 16000
    np.testing.assert_allclose(sound, true["wave"][0].numpy(), atol=1e-4)
    frames = torch.stack(list(read_video(stem + ".mp4", 32)))
    assert frames.shape == (10, 3, 32, 32)
    drawn = render(true["identity"].expand(10, -1), true["motion"][0], 32)
    assert (frames - drawn).abs().mean() < 0.06                              # H.264 halves the colours
    with av.open(stem + ".mp4") as container:
        assert len(container.streams.audio) == 1 and container.streams.video[0].average_rate == FPS


def test_the_command_counts_on_from_its_seed(tmp_path):
    assert synthetic.main(f"--out {tmp_path} --clips 2 --seconds 0.04 --size 32 --seed {HELD_OUT}".split()) == 0
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == [f"{HELD_OUT}.npz", f"{HELD_OUT + 1}.npz"]


@pytest.mark.parametrize("bad", ["--clips 0", "--seconds 0", "--seconds -1", "--seconds nan", "--seconds inf",
                                 "--size 0", "--size 33"])
def test_bad_numbers_are_explained(bad, tmp_path, capsys):
    assert synthetic.main(["--out", str(tmp_path), "--clips", "1", "--seconds", "0.04", *bad.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("synthetic.py: ") and bad.split()[0] in error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_is_explained(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert synthetic.main(["--out", str(tmp_path / "file"), "--clips", "1", "--seconds", "0.04"]) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize("bad", ["--clip 1", "--clips many", "--what"])
def test_unknown_arguments_are_refused(bad, capsys):
    with pytest.raises(SystemExit) as stop:
        synthetic.main(bad.split())
    assert stop.value.code == 2
