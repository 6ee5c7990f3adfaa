"""ablate.py: what each variant changes, the loop over runs, resuming, tables."""
import json
import os
import signal
from dataclasses import asdict, replace

import pytest
import torch
from test_sample import META, small_models

import train_ae
from decoder import Decoder
from encoder import MotionEncoder
from generator import Generator
from measure import ablate, clips
from media.weights import save_weights
from sample import load_models

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_every_variant_differs_from_the_base_in_one_thing_and_can_be_built():
    for table, variants in ablate.TABLES.items():
        if table in ablate.STAGE_2:
            continue
        assert [row for row, change in variants.items() if not change], f"{table} lacks the base"
        for row, change in variants.items():
            preset = {**ablate.BASE, **change}
            encoder, decoder = MotionEncoder(preset["encoder"]), Decoder(preset["decoder"])
            picture = torch.zeros(2, 3, 32, 32)
            motion = encoder(picture)
            count, width = motion.shape[1:]
            if table == "count":                                                    # both budgets are fixed
                assert count * width == 64 and decoder.config.tokens_per_motion * count == 8
            if table in ("width", "count"):
                assert f"{count} x {width}" == row
            v = decoder(picture, torch.ones(2), motion, decoder.encode_reference(picture, motion))
            assert v.shape == picture.shape
    names = list(ablate.runs(list(ablate.TITLES)))
    assert len(names) == len(set(names)) == 1 + 3 + 3 + 2 + 1 + 1 + 1 + 9 + 2 + 4
    for change in ablate.TABLES["emotion"].values():
        assert Generator(change["generator"]).config.audio_dim == 320


def test_each_shortcut_stands_alone_beside_the_papers_method():
    """A row of the table differs from `paper` in what its name says, and `base` has all of them."""
    table = {row: {**ablate.BASE, **change} for row, change in ablate.TABLES["shortcuts"].items()}
    paper, base = table["paper"], table["base"]

    def switches(preset):
        fields = {**asdict(preset["encoder"]), **asdict(preset["decoder"])}
        return {**fields, **{name: preset[name] for name in ("loss", "curriculum", "near", "mask_max")}}

    alone = {row: {name for name, value in switches(preset).items() if value != switches(paper)[name]}
             for row, preset in table.items()}
    for row in ("token_init", "running_norm", "motion_delta", "ref_context", "tokens_per_motion"):
        assert alone[row] == {row} and switches(table[row])[row] == switches(base)[row]
    assert alone["weighted loss"] == {"loss"} and alone["curriculum"] == {"curriculum", "near", "mask_max"}
    assert set.union(*(alone[row] for row in table if row not in ("base", "ours"))) == alone["base"] - {
        "full_attention", "predict"}                                         # these have tables of their own
    assert (paper["loss"], table["ours"]["loss"]) == ("velocity", "region")


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Runs of two steps on small networks, measured on little."""
    monkeypatch.setattr(ablate, "CLIPS", {"reconstruct": 1, "probe": 10, "talk": 1})
    for command, frames in {"reconstruct": 3, "probe": 2, "talk": 12}.items():
        monkeypatch.setitem(clips.FRAMES, command, frames)
    small = {"width": 32, "depth": 1}
    encoder, decoder = (replace(ablate.BASE[name], **small) for name in ("encoder", "decoder"))
    monkeypatch.setattr(ablate, "BASE", {**ablate.BASE, "encoder": encoder, "decoder": decoder, "persons": 2,
                                         "targets": 1})
    monkeypatch.setitem(ablate.TABLES, "prediction", {"x": {}, "v": {"decoder": replace(decoder,
                                                                                        predict="v")}})
    generator = replace(ablate.GENERATOR["generator"], **small)
    monkeypatch.setattr(ablate, "GENERATOR", {**ablate.GENERATOR, "generator": generator, "windows": 2,
                                              "clips": 1, "seconds": 2})
    yield tmp_path
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_the_tables_hold_what_the_runs_measured(quick, capsys):
    words = ["--out", str(quick / "runs"), "--only", "prediction", "--seeds", "0", "1", "--steps", "2",
             "--device", "cpu"]
    assert ablate.main([*words, "--json", str(quick / "all.json")]) == 0
    said, found = capsys.readouterr().out, json.loads((quick / "all.json").read_text())
    assert sorted(found) == ["base", "prediction-v"]
    assert found["base"][0] != found["base"][1] and found["base"][0] != found["prediction-v"][0]
    measured = json.loads((quick / "runs/base-1/reconstruct.json").read_text())
    assert found["base"][1]["PSNR"] == measured["rows"]["ours, 1 step"]["psnr"]["mean"]
    a, b = sorted(numbers["B as A"] for numbers in found["prediction-v"])
    row, = (line for line in said.splitlines() if line.startswith("| v |"))
    assert f"{(a + b) / 2:.2f} [{a:.2f} {b:.2f}]" in row
    _, meta = load_models(quick / "runs/base-0/semo.safetensors")
    assert meta["trained_steps"] == 2
    before = os.stat(quick / "runs/base-0/reconstruct.json").st_mtime_ns
    assert ablate.main(words) == 0 and capsys.readouterr().out == said          # again: nothing is done twice
    assert os.stat(quick / "runs/base-0/reconstruct.json").st_mtime_ns == before


def test_stage_2_is_measured_by_its_speech(quick, capsys):
    save_weights(quick / "w.safetensors", small_models(), META)
    words = ["--out", str(quick / "runs"), "--only", "past", "--seeds", "0", "--steps", "2",
             "--device", "cpu", "--ckpt", str(quick / "w.safetensors")]
    assert ablate.main([*words, "--json", str(quick / "all.json")]) == 0
    found = json.loads((quick / "all.json").read_text())
    assert sorted(found) == ["past-0to20", "past-none"]
    measured = json.loads((quick / "runs/past-none-0/talk.json").read_text())
    assert found["past-none"][0]["jaw"] == measured["rows"]["ours"]["jaw"]["mean"]
    assert "| none |" in capsys.readouterr().out


def test_a_stopped_run_ends_the_command_and_can_go_on(quick, monkeypatch, capsys):
    monkeypatch.setattr(train_ae, "train", lambda args, preset: 130)
    words = ["--out", str(quick), "--only", "prediction", "--seeds", "0", "--steps", "2", "--device", "cpu"]
    assert ablate.main(words) == 130 and capsys.readouterr().out == ""


def test_what_cannot_be_used_is_refused(quick, capsys):
    with pytest.raises(SystemExit):
        ablate.main(["--only", "luck"])
    with pytest.raises(SystemExit):
        ablate.main(["--seeds", "-1"])
    assert ablate.main(["--out", str(quick), "--ckpt", "none.safetensors", "--seeds", "0", "--steps",
                        "1"]) == 2
    assert "none.safetensors: not a readable" in capsys.readouterr().err and os.listdir(quick) == []
