"""media/curves.py: what is logged is read back, shares panels by name, and is drawn."""
import json

import numpy as np
import pytest
from PIL import Image

from media.curves import main, panels_of, read_log, save_curves


@pytest.fixture
def log(tmp_path):
    rows = [{"step": s, "loss": 1 / s, "psnr": 20 + s, "psnr_copy": 20, "note": "x"} for s in (100, 200, 300)]
    rows.insert(2, {"step": 200, "loss": 9.0, "psnr": float("nan")})       # a crash: step 200 is logged twice
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 400, "lo')
    return path


def test_the_later_of_two_lines_counts_and_what_is_no_number_is_left_out(log):
    curves = read_log(log)
    assert curves["loss"] == ([100, 200, 300], [0.01, 9.0, 1 / 300])
    assert curves["psnr"] == ([100, 300], [120, 320]) and set(curves) == {"loss", "psnr", "psnr_copy"}


def test_names_share_panels():
    assert panels_of(["loss", "psnr", "psnr_copy", "loss_held_out"]) == [["loss", "loss_held_out"],
        ["psnr", "psnr_copy"]]


def test_curves_are_drawn(log, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    assert save_curves(log, tmp_path / "progress.png")
    picture = np.asarray(Image.open(tmp_path / "progress.png").convert("RGB"))
    assert picture.shape[1] > 2 * picture.shape[0] and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_command(log, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    assert main([str(log)]) == 0 and (tmp_path / "progress.png").is_file()
    assert main([str(tmp_path / "none.jsonl")]) == 2 and capsys.readouterr().err.count("\n") == 1
