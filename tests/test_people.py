"""world/people.py: factors in range and repeatable, clips that agree with the voice."""

import av
import numpy as np
import pytest
import soundfile
import torch
from test_image import read_video

from media.sound import FPS
from world import people
from world.people import HELD_OUT, consecutive_frames, random_clip, random_motion, random_pairs
from world.render import IDENTITY, MOTION, POSE, random_identity, render
from world.speech import EMOTIONS, speak

LOW, HIGH = torch.tensor(list(MOTION.values())).unbind(1)


# ---- factors -----------------------------------------------------------------------------------------------

def test_identities_are_spread_over_their_range():
    people = random_identity(torch.arange(4000))
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
        deviation = column[name].std() / (MOTION[name][1] - MOTION[name][0])
        assert deviation.item() == pytest.approx(24**-0.5, abs=0.01)


@pytest.mark.parametrize("make", [random_identity, random_motion,
                                  lambda seeds: random_clip(seeds, 7)["motion"]])
def test_draws_depend_on_the_seed_alone(make):
    seeds = torch.tensor([3, HELD_OUT + 3, 123_456, 0])
    whole = make(seeds)
    torch.testing.assert_close(make(seeds), whole, atol=0, rtol=0)
    torch.testing.assert_close(torch.cat([make(seeds[:1]), make(seeds[1:])]), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(make(seeds.flip(0)), whole.flip(0), atol=1e-6, rtol=0)
    assert all((whole[i] - whole[j]).abs().max() > 0.1 for i in range(4) for j in range(i))


# ---- pairs -------------------------------------------------------------------------------------------------

def drawn(seeds, targets, near, **more):
    """What random_pairs draws in turn, people (R, 1+T, I), motion (R, 1+T, M); what it returns of numbers."""
    asked = []

    def draw(people, motion, size):
        asked.append((people.unflatten(0, (-1, 1 + targets)), motion.unflatten(0, (-1, 1 + targets))))
        number = torch.arange(float(len(people))) + 100 * (len(asked) - 1)
        return number.view(-1, 1, 1, 1).expand(-1, 3, size, size)

    pictures, motion, views = random_pairs(torch.tensor(seeds), targets, near, 8, draw, **more)
    return asked, pictures[..., 0, 0, 0], motion, views[..., 0, 0, 0]


def test_pairs_are_pictures_of_the_same_people():
    pictures, motion, views = random_pairs(torch.tensor([5, 6]), 3, 0.5, 32)
    assert pictures.shape == (2, 4, 3, 32, 32) and motion.shape == (2, 4, len(MOTION)) and views is pictures
    (people, asked), = drawn([5, 6], 3, 0.5)[0]
    assert (people == people[:, :1]).all() and not torch.equal(people[0], people[1])
    assert torch.equal(motion, asked)
    whole = render(people.flatten(0, 1), motion.flatten(0, 1), 32).unflatten(0, (2, 4))
    torch.testing.assert_close(pictures, whole, atol=1e-5, rtol=0)


def test_swapped_views_show_another_person_in_the_same_motion():
    asked, pictures, motion, views = drawn(list(range(8)), 2, 0.5, swap=True)
    (people, first), (others, second) = asked
    assert torch.equal(first, motion) and torch.equal(second, motion)
    assert (people != others).any(2).all() and (others == others[:, :1]).all()
    swapped = views >= 100                                                   # (R, 1+T)
    assert torch.equal(views[~swapped], pictures[~swapped])
    assert torch.equal(views[swapped] - 100, pictures[swapped])              # each in its place
    assert swapped[:, 1:].all(1).tolist() == [k % 4 != 3 for k in range(8)]
    assert swapped[:, 0].tolist() == [k % 2 == 0 for k in range(8)]


def test_consecutive_frames_are_of_one_clip():
    seeds = torch.tensor([5, 6])
    pictures, motion, views = consecutive_frames(seeds, 3, 32)
    made = random_clip(seeds, 12)
    for k in range(2):
        same = (made["motion"][k][:, None] == motion[k]).all(2)              # (12, 1+F)
        place = same.float().argmax(0)
        assert same.any(0).all() and place[1:].tolist() == list(range(place[1], place[1] + 3))
        drawn = render(made["identity"][k].expand(4, -1), motion[k], 32)
        torch.testing.assert_close(pictures[k], drawn, atol=1e-5, rtol=0)
    assert pictures.shape == (2, 4, 3, 32, 32) and torch.equal(views, pictures)


def test_references_of_the_video_stage_come_from_anywhere():
    seeds, clip = torch.arange(12), {}
    def black(people, motion, size):
        return torch.zeros(len(people), 3, 8, 8)

    _, motion, _ = consecutive_frames(seeds, 2, 8, black)
    made = random_clip(seeds, 8)["motion"]
    clip = [(made[k][:, None] == motion[k]).all(2).float().argmax(0) for k in range(12)]
    assert len({place[0].item() for place in clip}) > 4 and len({place[1].item() for place in clip}) > 4
    assert len({(place[1] - place[0]).item() for place in clip}) > 4


@pytest.mark.parametrize("near, count", [(0, 0), (0.5, 4), (0.6, 5), (1, 8)])
def test_the_near_share_keeps_pose_and_light(near, count):
    _, _, motion, _ = drawn(list(range(8)), 2, near)
    still = torch.tensor([name in (*POSE, "light_x", "light") for name in MOTION])
    kept = (motion[..., still] == motion[:, :1, still]).flatten(1).all(1)    # (R,)
    assert kept.tolist() == [True] * count + [False] * (8 - count)
    moved = (motion[:, 1:] != motion[:, :1]).any(1)                          # (R, M)
    assert count == 8 or moved[count:].float().mean() > 0.9
    # a random half of the face, another for each
    assert count == 0 or 0.3 < moved[:count, ~still].float().mean() < 0.6
    assert count == 0 or len(set(map(tuple, moved[:count].tolist()))) == count
    assert not torch.equal(motion[:, 1], motion[:, 2])


@pytest.mark.parametrize("seed", [7, HELD_OUT - 1, HELD_OUT // 2, HELD_OUT, HELD_OUT + 10**6])
def test_training_pairs_never_show_a_held_out_person(seed, monkeypatch):
    used = []
    for name in ("random_identity", "random_motion"):
        made = getattr(people, name)
        monkeypatch.setattr(people, name, lambda seeds, made=made: used.append(seeds) or made(seeds))
    drawn([seed, seed], 3, 0, swap=True)
    assert len(used) == 3 and all(((part >= HELD_OUT) == (seed >= HELD_OUT)).all() for part in used)


# ---- clips -------------------------------------------------------------------------------------------------

SEEDS = torch.tensor([1, 2, HELD_OUT, 77])
LONG = random_clip(SEEDS, 30 * FPS)


def factor(made, name):
    return made["motion"][..., list(MOTION).index(name)]


def test_clips_agree_with_the_voice():
    made, said = random_clip(SEEDS, 50), speak(SEEDS, 50)
    assert made["motion"].shape == (4, 50, len(MOTION)) and made["wave"].shape == (4, 50 * 640)
    assert torch.equal(made["identity"], random_identity(SEEDS))
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
    short = random_clip(SEEDS, 40)
    torch.testing.assert_close(LONG["motion"][:, :40], short["motion"], atol=1e-4, rtol=0)
    torch.testing.assert_close(LONG["wave"][:, :40 * 640], short["wave"], atol=1e-4, rtol=0)


def test_emotions_show_on_the_face():
    seeds, mute, moods = torch.tensor([4]).expand(7), torch.zeros(7, 100), torch.eye(7)
    shown = factor({"motion": people.perform(seeds, mute, mute, moods)}, "lip_corner").mean(1)
    corner = dict(zip(EMOTIONS, shown, strict=True))
    assert corner["happy"] > corner["neutral"] + 0.3 > corner["sad"] + 0.6


def moved(mood, frames=20 * FPS, count=24, movement=True):
    """Motion of people who say nothing, in one mood (7,) or (F, 7)."""
    mute = torch.zeros(count, frames)
    return {"motion": people.perform(torch.arange(count), mute, mute, mood.expand(count, *mood.shape),
                                     movement)}


def pace(made):
    """How fast the head turns, how far, and how often the eyes jump: a mean over people each."""
    yaw, jumps = factor(made, "yaw"), factor(made, "gaze_x").diff(dim=1).abs() > 1e-3
    return yaw.diff(dim=1).abs().mean(), yaw.std(1).mean(), jumps.float().mean()


def test_emotions_show_in_movement_where_asked_for():
    eye = dict(zip(EMOTIONS, torch.eye(7), strict=True))
    calm, sad, afraid = (moved(eye[name]) for name in ("neutral", "sad", "afraid"))
    droop = factor(sad, "blink_l").median() - factor(calm, "blink_l").median()
    assert droop.item() == pytest.approx(0.2, abs=0.03)
    ratio = [(a / b).item() for a, b in zip(pace(sad), pace(calm), strict=True)]
    assert ratio == pytest.approx([0.36, 0.6, 1], abs=0.06)               # reach times tempo, reach, no haste
    ratio = [(a / b).item() for a, b in zip(pace(afraid), pace(calm), strict=True)]
    assert ratio[2] == pytest.approx(2, abs=0.1) and ratio[0] > 1.5   # some turns end at the range's limit
    for name in EMOTIONS:                                             # without movement: the expression alone
        plain = moved(eye[name], 50, 4, movement=False)
        assert torch.equal(factor(plain, "yaw"), factor(moved(eye["neutral"], 50, 4), "yaw"))
    assert torch.equal(moved(eye["neutral"], 50)["motion"],
                       moved(eye["neutral"], 50, movement=False)["motion"])


def test_six_emotions_are_six_directions():
    """Shifts of face and lids, logs of tempo and gaze rate: a palette can be read back from a clip."""
    table = [[people.EMOTION_FACE[e].get(name, 0.0) for name in ("lip_corner", "brow_raise", "brow_furrow")]
             + list(people.EMOTION_MOVEMENT[e]) for e in EMOTIONS[1:]]
    assert torch.linalg.matrix_rank(torch.tensor(table)) == 6


def test_moods_may_change_within_a_clip():
    eye = torch.eye(7)
    mood = eye[EMOTIONS.index("happy")].repeat(100, 1)
    mood[50:] = eye[EMOTIONS.index("sad")]
    switched, happy = moved(mood, 100)["motion"], moved(eye[EMOTIONS.index("happy")], 100)["motion"]
    torch.testing.assert_close(switched[:, :50], happy[:, :50])
    corner = list(MOTION).index("lip_corner")
    assert (switched[:, 50:, corner] < happy[:, 50:, corner] - 1).float().mean() > 0.9
    assert torch.equal(moved(mood[:1].expand(100, -1), 100)["motion"], happy)      # (F, 7) that stays is (7,)


def test_voice_and_face_may_feel_apart():
    eye, seeds = torch.eye(7), SEEDS
    angry, happy = (eye[[EMOTIONS.index(name)]].expand(4, -1) for name in ("angry", "happy"))
    plain, made = random_clip(seeds, 50, emotion=angry), random_clip(seeds, 50, face=happy, emotion=angry)
    assert torch.equal(made["wave"], plain["wave"]) and torch.equal(made["emotion"], angry)
    assert torch.equal(factor(made, "jaw"), factor(plain, "jaw"))            # the voice moves the mouth
    assert (factor(made, "lip_corner").mean(1) > factor(plain, "lip_corner").mean(1) + 0.8).all()
    own = random_clip(seeds, 50, emotion=random_clip(seeds, 1)["emotion"])
    assert torch.equal(own["wave"], random_clip(seeds, 50)["wave"]) and torch.equal(own["motion"],
        random_clip(seeds, 50)["motion"])


def test_moods_of_training_clips():
    voice, face, change = people.random_moods(torch.arange(4000), 100)
    assert voice.shape == (4000, 7) and face.shape == (4000, 100, 7) and change.shape == (4000,)
    for mood in (voice, face):
        assert mood.min() >= 0
        torch.testing.assert_close(mood.sum(-1), torch.ones(mood.shape[:-1]))
    first, last = face[:, 0], face[:, -1]
    assert (change < 100).float().mean() == pytest.approx(0.5, abs=0.03)
    assert change.min() >= 25
    assert change[change < 100].max() < 75
    assert torch.equal(first[change == 100], last[change == 100])
    switched = face[change < 100]
    before = torch.arange(100) <= change[change < 100][:, None]              # the fade begins at the change
    assert torch.equal(torch.where(before[..., None], switched, 0),
                       torch.where(before[..., None], switched[:, :1], 0))
    assert (first == voice).all(1).float().mean() == pytest.approx(0.2, abs=0.05)
    one = first[:, 1:].amax(1) > 0
    assert (first[one][:, 1:] >= 0.39).any(1).float().mean() > 0.6
    own = people.random_mood(torch.arange(4000), 43)
    seen = {tuple(EMOTIONS[1 + k] for k in mood[1:].nonzero()[:, 0].tolist()) for mood in own
            if (mood[1:] > 0).sum() == 2}
    assert len(seen) == 10 and not seen & set(people.UNSEEN_PAIRS)           # 15 pairs in all


def test_other_moods_keep_what_is_said():
    seed = torch.tensor([HELD_OUT + 3])
    motion = random_clip(seed, 40)["motion"][0]
    other = people.other_moods(seed, motion[None], 4)                        # frames from all over the clip
    column = {name: k for k, name in enumerate(MOTION)}
    lips, face = ([column[name] for name in names] for names in (
        ("jaw", "lip_width"), ("brow_raise", "brow_furrow", "lip_corner")))
    assert other.shape == (4, len(MOTION)) and torch.equal(other[:, lips], motion[[5, 15, 25, 35]][:, lips])
    assert (other[:, face] - motion[[5, 15, 25, 35]][:, face]).abs().amax(1).min() > 0.05


def test_a_clip_of_which_nothing_new_is_asked_is_as_ever():
    """Sums of numbers that weights and published results rest on."""
    made = random_clip(torch.tensor([5, HELD_OUT + 5]), 50)
    found = [made[name].double().abs().sum((1, 2) if name == "motion" else 1).tolist()
             for name in ("motion", "wave", "emotion")]
    assert found == [pytest.approx(row, rel=1e-5)
                     for row in [[164.9775, 205.1789], [1698.0209, 350.6903], [1.0, 1.0]]]


# ---- the command -------------------------------------------------------------------------------------------

def test_the_command_writes_clips_and_their_factors(tmp_path):
    assert people.main(f"--out {tmp_path}/made --clips 1 --seconds 0.8 --size 32 --seed 5".split()) == 0
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["000005.mp4", "000005.npz",
        "000005.wav"]
    true, stem = random_clip(torch.tensor([5]), 20), str(tmp_path / "made" / "000005")
    with np.load(stem + ".npz") as kept:                                     # no pickle inside
        assert kept["identity_names"].tolist() == IDENTITY and kept["motion_names"].tolist() == list(MOTION)
        assert kept["emotion_names"].tolist() == list(EMOTIONS)
        for name in ("identity", "motion", "emotion"):
            np.testing.assert_allclose(kept[name], true[name][0].numpy(), atol=1e-6)
    sound, rate = soundfile.read(stem + ".wav", dtype="float32")
    assert rate == 16000
    np.testing.assert_allclose(sound, true["wave"][0].numpy(), atol=1e-4)
    frames = torch.stack(list(read_video(stem + ".mp4", 32)))
    assert frames.shape == (20, 3, 32, 32)
    drawn = render(true["identity"].expand(20, -1), true["motion"][0], 32)
    assert (frames - drawn).abs().mean() < 0.06                              # H.264 halves the colours
    with av.open(stem + ".mp4") as container:
        assert len(container.streams.audio) == 1 and container.streams.video[0].average_rate == FPS


def test_the_command_counts_on_from_its_seed(tmp_path):
    assert people.main(f"--out {tmp_path} --clips 2 --seconds 0.04 --size 32 --seed {HELD_OUT}".split()) == 0
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == [f"{HELD_OUT}.npz", f"{HELD_OUT + 1}.npz"]


@pytest.mark.parametrize("bad", ["--clips 0", "--seconds 0", "--seconds -1", "--seconds nan", "--seconds inf",
                                 "--size 0", "--size 33", f"--seed {2**63 - 1}", f"--seed {2**70}"])
def test_bad_numbers_are_explained(bad, tmp_path, capsys):
    assert people.main(["--out", str(tmp_path), "--clips", "1", "--seconds", "0.04", *bad.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("world.people: ") and bad.split()[0] in error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_is_explained(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert people.main(["--out", str(tmp_path / "file"), "--clips", "1", "--seconds", "0.04"]) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize("bad", ["--clip 1", "--clips many", "--what"])
def test_unknown_arguments_are_refused(bad):
    with pytest.raises(SystemExit, match="2"):
        people.main(bad.split())
