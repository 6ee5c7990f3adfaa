"""media/controls.py: values along the time axis become sums of directions of the token."""
import pytest
import torch

from media.controls import parse_controls
from media.files import InputError

CONTROLS = {"yaw": {"direction": [1.0, 0.0, 0.0], "low": -10, "high": 10, "unit": "degrees"},
            "blink_l": {"direction": [0.0, 2.0, 0.0], "low": 0, "high": 1, "unit": ""},
            "blink_r": {"direction": [0.0, 0.0, 4.0], "low": 0, "high": 1, "unit": ""}}


@pytest.mark.parametrize("text, want", [("yaw=5", [5, 5, 5, 5, 5]), ("yaw=-10:10", [-10, -5, 0, 5, 10]),
                                        ("yaw=0,10,0", [0, 5, 10, 5, 0])])
def test_a_value_stays_or_moves_evenly_in_time(text, want):
    assert torch.allclose(parse_controls(text, CONTROLS, 3, 5), torch.tensor([[w, 0.0, 0.0] for w in want]))


def test_blink_is_both_eyes_and_controls_add_up():
    path = parse_controls("yaw=-10:10 blink=0,1,0 blink_l=1", CONTROLS, 3, 5)
    assert torch.allclose(path[:, 0], torch.tensor([-10.0, -5, 0, 5, 10]))
    assert torch.allclose(path[:, 1], torch.tensor([2.0, 3, 4, 3, 2]))
    assert torch.allclose(path[:, 2], torch.tensor([0.0, 2, 4, 2, 0]))


def test_one_frame_takes_the_first_value():
    assert parse_controls("yaw=-10:10", CONTROLS, 3, 1).tolist() == [[-10, 0, 0]]


@pytest.mark.parametrize("text, word", [("", "empty"), ("nod=1", "'nod'"), ("yaw", "yaw"), ("yaw=a", "yaw=a"),
                                        ("yaw=11", "-10 to 10 degrees"), ("blink=nan", "0 to 1")])
def test_what_cannot_be_is_refused_in_one_sentence(text, word):
    with pytest.raises(InputError, match=word) as error:
        parse_controls(text, CONTROLS, 3, 5)
    assert "\n" not in str(error.value)


def test_weights_without_controls_are_told_apart():
    with pytest.raises(InputError, match="hold none"):
        parse_controls("yaw=1", None, 3, 5)


@pytest.mark.parametrize("damage", [
    [1], 3, "x", {"yaw": 3}, {"yaw": {}}, {"yaw": {"direction": [1, 2], "low": 0, "high": 9}},
    {"yaw": {"direction": ["a"] * 3, "low": 0, "high": 9}}, {"yaw": {"direction": [0, 0, 0], "low": 0}},
    {"yaw": {"direction": [0, float("nan"), 0], "low": 0, "high": 9}}])
def test_damaged_controls_are_told(damage):
    with pytest.raises(InputError, match="damaged"):
        parse_controls("yaw=1", damage, 3, 5)
