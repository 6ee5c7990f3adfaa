"""media/charts.py: figures have the wanted size; what is logged is read back, grouped by name, and drawn."""
import json
import sys

import numpy as np
import pytest
from PIL import Image

from measure import pictures
from media import charts
from media.files import InputError


def test_a_figure_has_the_wanted_size_and_shows_its_curve(tmp_path):
    pytest.importorskip("matplotlib")
    figure = charts.new_figure(300, 200)
    figure.subplots().plot([1, 2, 3], [3, 1, 2], color=(1, 0, 0), linewidth=3)
    charts.save_figure(figure, tmp_path / "new folder" / "c.png")
    picture = np.asarray(Image.open(tmp_path / "new folder" / "c.png"))
    assert picture.shape == (200, 300, 3) and (picture[0, 0] == 255).all()
    red = (picture == (255, 0, 0)).all(2)
    assert red.sum() > 200 and np.ptp(red.any(0).nonzero()) > 200


def test_without_matplotlib_it_is_said_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install"):
        charts.new_figure(10, 10)
    assert pictures.main(["--out", str(tmp_path / "pictures"), "--device", "cpu"]) == 2
    assert "matplotlib" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.fixture
def log(tmp_path):
    rows = [{"step": s, "loss": 1 / s, "psnr": 20 + s, "psnr_copy": 20, "note": "x"} for s in (100, 200, 300)]
    rows.insert(2, {"step": 200, "loss": 9.0, "psnr": float("nan")})       # a crash: step 200 is logged twice
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 400, "lo')
    return path


def test_the_later_of_two_lines_counts_and_what_is_no_number_is_left_out(log):
    curves = charts.read_log(log)
    assert curves["loss"] == ([100, 200, 300], [0.01, 9.0, 1 / 300])
    assert curves["psnr"] == ([100, 300], [120, 320]) and set(curves) == {"loss", "psnr", "psnr_copy"}


def test_names_share_panels():
    names = ["loss", "psnr", "psnr_copy", "loss_held_out"]
    assert charts.group_names(names) == [["loss", "loss_held_out"], ["psnr", "psnr_copy"]]


def test_curves_are_drawn(log, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    charts.save_curves(log, tmp_path / "progress.png")
    picture = np.asarray(Image.open(tmp_path / "progress.png"))
    assert picture.shape == (320, 2 * 420, 3) and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_without_matplotlib_training_draws_nothing(log, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    charts.save_curves(log, tmp_path / "progress.png")
    assert not (tmp_path / "progress.png").exists()
