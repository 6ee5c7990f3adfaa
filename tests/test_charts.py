"""measure/charts.py: figures of the wanted size; without matplotlib one sentence, and no file."""
import sys

import numpy as np
import pytest
from PIL import Image

from measure import bench, charts
from media.files import InputError


def test_a_figure_has_the_wanted_size_and_shows_its_curve(tmp_path):
    pytest.importorskip("matplotlib")
    fig = charts.figure(300, 200)
    fig.subplots().plot([1, 2, 3], [3, 1, 2], color=(1, 0, 0), linewidth=3)
    charts.save(fig, tmp_path / "new folder" / "c.png")
    picture = np.asarray(Image.open(tmp_path / "new folder" / "c.png"))
    assert picture.shape == (200, 300, 3) and (picture[0, 0] == 255).all()
    red = (picture == (255, 0, 0)).all(2)
    assert red.sum() > 200 and np.ptp(red.any(0).nonzero()) > 200


def test_without_matplotlib_it_is_said_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install"):
        charts.require()
    assert bench.main(["scale", "--png", str(tmp_path / "c.png"), "--device", "cpu"]) == 2
    assert "matplotlib" in capsys.readouterr().err and not list(tmp_path.iterdir())
