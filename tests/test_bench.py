"""bench.py: its figures agree with each other and with counts made by hand."""
import json
from types import SimpleNamespace

import pytest
import torch
from test_sample import META, small_models

import train_ae
from measure import bench
from media.weights import save_weights

CPU = torch.device("cpu")


def test_flops_and_parameters_are_those_of_the_network():
    """A linear layer: 2 n a b forward, the same for its weights' gradient; the input needs none."""
    layer, x = torch.nn.Linear(64, 32), torch.randn(10, 64)
    found = bench.training_cost(layer, lambda: layer(x).sum(), 10, CPU, 1)
    assert found["parameters"] == 64 * 32 + 32 and found["flops"] == 2 * (2 * 64 * 32)
    assert found["speed_low"] <= found["speed"] <= found["speed_high"]
    assert found["state_gb"] == pytest.approx(5 * 4 * found["parameters"] / 1e9, rel=0.01)     # two moments
    assert 10 * 64 * 2 <= found["kept_mb"] * 10 * 1e6 <= 10 * 64 * 4 + 64 * 32 * 4


def test_cost_a_picture_does_not_depend_on_their_number():
    few, many = (bench.training_cost(*bench.stage_1("nano", n, CPU), CPU, 1) for n in (2, 8))
    assert few["parameters"] == many["parameters"] and few["flops"] == pytest.approx(many["flops"], rel=0.01)
    model, _, count = bench.stage_2("nano", 6, CPU)
    assert count == 6 * model.config.window


def test_the_table_of_presets(tmp_path):
    words = ["train", "--presets", "nano", "--rounds", "1", "--device", "cpu", "--json",
             str(tmp_path / "out.json")]
    assert bench.main(words) == 0
    found = json.loads((tmp_path / "out.json").read_text())["train"]
    first = found["presets"]["nano, stage 1"]
    assert first["mfu"] == pytest.approx(first["flops"] * first["speed"] / found["peak_flops"])
    assert set(found["presets"]) == {"nano, stage 1", "nano, stage 2"}


@pytest.mark.parametrize("platform, unit", [("linux", 2**10), ("darwin", 1)])
def test_memory_is_told_in_megabytes_of_the_platform(platform, unit, monkeypatch):
    monkeypatch.setattr(bench.sys, "platform", platform)
    usage = SimpleNamespace(ru_maxrss=300 * 2**20 / unit)
    monkeypatch.setattr(bench.resource, "getrusage", lambda process: usage)
    assert bench.peak_memory_mb(CPU) == 300


def test_a_device_that_is_not_there_is_refused(capsys):
    assert bench.main(["train", "--presets", "nano", "--rounds", "1", "--device", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / "w.safetensors"
    save_weights(path, small_models(), META)
    return str(path)


def test_stages_of_sampling(release, tmp_path, capsys):
    words = ["--ckpt", release, "--rounds", "1", "--seconds", "1", "--device", "cpu", "--json",
             str(tmp_path / "out.json")]
    assert bench.main(["sample", *words]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    whole = found["sample"]
    assert whole["fps"] == pytest.approx(25 / whole["stages"]["end to end"][0])
    assert whole["real_time_factor"] == pytest.approx(25 / whole["fps"])
    assert 0 < whole["first_frame"] <= whole["stages"]["end to end"][2]
    assert "frames/s, real-time factor" in capsys.readouterr().out


def test_two_at_once_are_compared_with_one(release, tmp_path, monkeypatch, capsys):
    """In place of sample.py: 30 fps, shared by those that run."""
    (tmp_path / "sample.py").write_text("""
import os, sys, time
out = sys.argv[-1]
open(out, "w")
time.sleep(0.5)
running = sum(name.endswith(".mp4") for name in os.listdir(os.path.dirname(out)))
print(f"o.mp4: 9 frames, made at {30 / running} fps")
time.sleep(0.5)
os.remove(out)
""")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    words = ["--ckpt", release, "--seconds", "0.2", "--device", "cpu", "--json", str(tmp_path / "out.json")]
    assert bench.main(["beside", *words]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["beside"]
    assert found == {"alone": 30, "both": [15, 15], "shares": [0.5, 0.5]}
    assert "alone 30.0; of two at the same time 15.0 (50%) and 15.0 (50%)" in capsys.readouterr().out


def test_a_length_that_is_no_number_is_refused():
    with pytest.raises(SystemExit) as end:
        bench.main(["sample", "--seconds", "nan"])
    assert end.value.code == 2


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["trian"])
    assert "sample, beside, train" in capsys.readouterr().err


def test_real_presets_are_measured_as_they_train():
    """The pass that is timed is that of the training script: targets of so many people."""
    _, _, count = bench.stage_1("tiny", None, CPU)
    assert count == train_ae.PRESETS["tiny"]["persons"] * train_ae.PRESETS["tiny"]["targets"]
