"""Every command: a user's mistake is one sentence and status 2; a fault of ours keeps its traceback."""
import pytest
import torch

import sample
from measure import ablate, bench, evaluate, pictures, reader
from media.files import InputError
from world import people

torch.set_num_threads(1)

COMMANDS = [  # module, what of it is made to fail, arguments
    (sample, "run", ["--img", "x.png", "--wav", "y.wav"]), (evaluate.COMMANDS, "talk", ["talk"]), (bench.PARTS, "train", ["train"]),
    (ablate, "run", ["--seeds", "0", "--only", "prediction"]), (pictures, "open_checkpoint", []), (reader, "train_regressor", []),
    (people, "random_clip", ["--out", "made"])]
MAIN = {id(evaluate.COMMANDS): evaluate, id(bench.PARTS): bench}


def run(monkeypatch, place, name, words, error):
    def fail(*args):
        raise error

    (monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr)(place, name, fail)
    return MAIN.get(id(place), place).main(words)


@pytest.mark.parametrize("place, name, words", COMMANDS)
def test_bad_input_is_told_in_a_sentence(place, name, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, place, name, words, InputError("x.png is not a picture")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(": x.png is not a picture")


@pytest.mark.parametrize("place, name, words", COMMANDS)
def test_a_fault_of_ours_does_not_look_like_bad_input(place, name, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="not enough values"):
        run(monkeypatch, place, name, words, ValueError("not enough values to unpack"))
