"""The judge of real faces on curves and meshes whose answer is known."""
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from measure import landmarks
from measure.checkpoint import cell
from media.files import InputError

T = np.arange(100)
SINE = np.sin(2 * np.pi * T / 20)


def curves(**given):
    """A reading in which every factor is a sine, but for those given."""
    lids = 0.3 + 0.01 * SINE
    return {name: given.get(name, lids if name == "lids" else SINE) for name in landmarks.FACTORS}


def blinking(at, length=100, wide=3):
    """Lids of 0.3 that are shut for `wide` frames round each frame of `at`, most in the middle."""
    lids = np.full(length, 0.3)
    for frame in at:
        lids[frame - wide // 2: frame + wide // 2 + 1] = 0.1
        lids[frame] = 0.05
    return lids


def test_a_curve_follows_itself_without_lag():
    assert landmarks.follow(SINE, SINE) == pytest.approx(
        {"correlation": 1, "near": 1, "amplitude": 1, "concordance": 1, "best": 1, "lag": 0, "error": 0})


@pytest.mark.parametrize("lag", [-3, -2, -1, 1, 2, 3])
def test_a_late_curve_has_its_lag_and_the_correlation_of_its_phase(lag):
    found = landmarks.follow(SINE, np.sin(2 * np.pi * (T - lag) / 20))
    assert found["lag"] == lag and found["best"] == pytest.approx(1)
    assert found["correlation"] == pytest.approx(np.cos(2 * np.pi * lag / 20), abs=1e-6)    # five periods
    assert found["near"] == pytest.approx(np.cos(2 * np.pi * (abs(lag) - 1) / 20), abs=0.02)


def test_scale_and_offset_show_in_amplitude_and_concordance_alone():
    found = landmarks.follow(SINE, 0.4 * SINE)
    assert (found["correlation"], found["amplitude"]) == pytest.approx((1, 0.4))
    assert found["concordance"] == pytest.approx(2 * 0.4 / (1 + 0.4**2))
    moved = landmarks.follow(SINE, SINE + 2)
    assert (moved["correlation"], moved["amplitude"], moved["error"]) == pytest.approx((1, 1, 2))
    assert moved["concordance"] == pytest.approx(2 * 0.5 / (0.5 + 0.5 + 4))         # a sine's variance is 0.5
    assert landmarks.follow(SINE, -SINE)["correlation"] == pytest.approx(-1)


def test_what_does_not_move_is_undefined_in_the_truth_and_zero_in_the_result():
    still = np.full(100, 0.7)
    assert all(np.isnan(x) for x in landmarks.follow(still, SINE).values())
    assert np.isnan(landmarks.correlation(still, still))
    dead = landmarks.follow(SINE, still)
    names = ("correlation", "near", "amplitude", "concordance", "best")
    assert [dead[name] for name in names] == pytest.approx([0] * 5)
    assert np.isnan(dead["lag"])


def test_frames_without_a_face_are_left_out_until_they_are_most():
    gaps = SINE.copy()
    gaps[::3] = np.nan
    assert landmarks.follow(SINE, gaps)["correlation"] == pytest.approx(1)
    assert landmarks.follow(gaps, SINE)["correlation"] == pytest.approx(1)
    gaps[:60] = np.nan
    assert landmarks.follow(SINE, gaps)["correlation"] == 0         # no face does not follow
    found = landmarks.scores(curves(), curves(opening=gaps))
    assert found["missing"] == np.isnan(gaps).sum() and found["frames"] == 100
    assert np.isnan(landmarks.follow(np.full(100, np.nan), SINE)["correlation"])


def test_blinks_are_found_where_the_lids_are_nearest():
    assert landmarks.blinks(blinking([10, 40, 97])) == [10, 40, 97]
    assert landmarks.blinks(np.full(100, 0.3)) == [] and landmarks.blinks(np.full(9, np.nan)) == []
    half = np.full(100, 0.3)
    half[50] = 0.3 * 0.56                                                       # just above the limit
    assert landmarks.blinks(half) == []
    half[50] = 0.3 * 0.54
    assert landmarks.blinks(half) == [50]
    assert landmarks.blinks(blinking([0, 30])) == [0, 30]                   # shut when the clip begins


def test_a_blink_matches_one_other_within_three_frames():
    assert landmarks.matches([10, 40, 70], [13, 37, 74]) == 2
    assert landmarks.matches([10, 12], [11]) == 1 and landmarks.matches([11], [10, 12]) == 1
    assert landmarks.matches([], [5]) == landmarks.matches([5], []) == 0


def test_f1_and_rate_of_constructed_blinks():
    """4 true, 3 made, of which 2 match: precision 2/3, recall 1/2, F1 4/7; 3 in 4 s are 45 a minute."""
    clip = landmarks.scores(curves(lids=blinking([10, 30, 50, 70])), curves(lids=blinking([12, 47, 90])))
    row = landmarks.summary([clip], ["a"])
    assert row["blink_f1"]["value"] == pytest.approx(4 / 7)
    assert row["blinks_a_minute"]["value"] == pytest.approx(45)
    assert row["no_face"]["value"] == 0


def test_a_person_counts_once_whatever_the_clips():
    good, bad = landmarks.scores(curves(), curves()), landmarks.scores(curves(), curves(opening=-SINE))
    row = landmarks.summary([good] * 8 + [bad, bad], list("aaaaaaaa") + ["b", "c"])
    found = row["opening_correlation"]
    assert [found[k] for k in ("value", "low", "high")] == pytest.approx([-1, -1, 1])
    mixed = landmarks.summary([good, bad], ["a", "a"])["opening_correlation"]     # mean of one's clips
    assert mixed["value"] == mixed["low"] == mixed["high"] == pytest.approx(0)


def test_clips_that_cannot_be_judged_are_left_out():
    still = curves(opening=np.full(100, 0.1))
    clips = [landmarks.scores(true, curves()) for true in (still, curves())]
    row = landmarks.summary(clips, ["a", "b"])
    assert row["opening_correlation"]["value"] == pytest.approx(1)
    none = landmarks.summary([landmarks.scores(still, curves())], ["a"])
    assert none["opening_correlation"]["value"] is None
    assert cell(none["opening_correlation"], 2, True) == ["-", ""]


def test_factors_of_a_known_mesh():
    """A face 100 px high, turned, nodded, rolled: distances in the picture plane, angles from depth."""
    points = np.zeros((1, 478, 3))
    for index, place in {10: (0, -50), 152: (0, 50), 13: (0, 20), 14: (0, 30), 61: (-20, 25), 291: (20, 25),
                         234: (-40, 0), 454: (40, 0), 33: (-30, -20), 133: (-10, -20), 159: (-20, -23),
                         145: (-20, -17), 362: (10, -20), 263: (30, -20), 386: (20, -22),
                         374: (20, -18)}.items():
        points[0, index, :2] = place
    assert {k: x.item() for k, x in landmarks.factors(points).items()} == pytest.approx(
        {"opening": 0.1, "width": 0.4, "lids": (6 / 20 + 4 / 20) / 2, "yaw": 0, "pitch": 0, "corners": 0})
    smile = points.copy()
    smile[0, [61, 291], 1] -= 6                         # corners 6 px up, of a face 100 px high
    assert landmarks.factors(smile)["corners"].item() == pytest.approx(0.06)
    for name, (a, b), angle in (("yaw", (0, 2), 25), ("pitch", (1, 2), -15)):
        cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        turned, x, y = points.copy(), points[..., a], points[..., b]
        turned[..., a], turned[..., b] = cos * x - sin * y, sin * x + cos * y
        assert landmarks.factors(turned)[name].item() == pytest.approx(angle)
    roll = points @ np.array([[0.8, 0.6, 0], [-0.6, 0.8, 0], [0, 0, 1]])
    assert {k: x.item() for k, x in landmarks.factors(roll).items()} == pytest.approx(
        {k: x.item() for k, x in landmarks.factors(points).items()}, abs=1e-9)


def test_the_head_is_measured_in_degrees_and_the_mouth_in_silence():
    turning = landmarks.scores(curves(), curves(yaw=10 * SINE, pitch=np.full(100, 3.0)))
    assert turning["yaw_std"] == pytest.approx(10 / 2**0.5) and turning["pitch_std"] == pytest.approx(0)
    closing = np.array([0.2] * 5 + [0.02] * 20)         # 0.2 s to close
    true = np.linspace(0.1, 0.2, 101)
    assert landmarks.silence(closing, true) == pytest.approx(
        {"silence_opening": 0.02, "photo_opening": 0.1, "shut_opening": 0.11})
    assert np.isnan(landmarks.silence(np.full(25, np.nan), true)["silence_opening"])


def test_another_interpreter_reads_and_its_failure_is_one_sentence(tmp_path):
    frames = np.zeros((2, 256, 256, 3), np.uint8)
    with pytest.raises(InputError, match="cannot be run"):
        landmarks.read(frames, str(tmp_path / "no-python"))
    without = tmp_path / "python"                   # an interpreter without MediaPipe
    without.write_text(f"#!{sys.executable}\nimport runpy, sys\nsys.modules['mediapipe'] = None\n"
                       "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    without.chmod(0o755)
    with pytest.raises(InputError, match="mediapipe==0.10.21") as error:
        landmarks.read(frames, str(without))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="256"):
        landmarks.read(frames[:, :64, :64], sys.executable)


@pytest.mark.skipif(importlib.util.find_spec("mediapipe") is None,
                    reason="MediaPipe is not installed (requirements-measure.txt)")
def test_the_mesh_reads_a_drawn_face_and_an_empty_frame(tmp_path):
    portrait = Path(__file__).parents[1] / "examples" / "portrait.png"
    face = Image.open(portrait).convert("RGB").resize((256, 256))
    read = landmarks.read(np.stack([np.zeros((256, 256, 3), np.uint8), np.asarray(face)]), sys.executable)
    assert set(read) == {*landmarks.FACTORS, "corners"} and all(np.isnan(curve[0]) for curve in read.values())
    assert 0 <= read["opening"][1] < 0.2 and 0.2 < read["width"][1] < 0.6 and abs(read["yaw"][1]) < 20
