"""reader.py: the motion reader, its frames, its file, its training."""
import os

import torch

from measure import reader
from world.people import HELD_OUT, random_motion
from world.render import IDENTITY, random_identity, render


def pictures(n=3, size=24, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_reader_survives_its_file_and_any_picture_size(tmp_path):
    made = reader.FactorRegressor().eval()
    reader.save_regressor(tmp_path / "r.safetensors", made)
    again = reader.load_regressor(tmp_path / "r.safetensors")
    assert os.path.getsize(tmp_path / "r.safetensors") < 2e6
    x = pictures(2, 128)
    assert torch.allclose(again(x), made(x), atol=1e-2) and again(x[:, :, ::2, ::2]).shape == (2, 17)


def test_a_mirrored_frame_has_mirrored_motion():
    """Where the world is symmetric, a mirrored picture is that of the mirrored motion."""
    people = random_identity(torch.arange(4))
    people[:, [IDENTITY.index(name) for name in ("parting", "back_dir", "back_wave", "hair_volume")]] = 0.5
    images = render(people, motion := random_motion(torch.arange(4)))
    flipped, told = reader.mirror(images, motion)
    near = (render(people, told) - flipped).abs()[:, :, 20:110].mean()
    wrong = (render(people, motion) - flipped).abs()[:, :, 20:110].mean()
    assert near < 0.35 * wrong and torch.equal(reader.mirror(flipped, told)[1], motion)


def test_reader_frames_are_of_the_people_asked_for():
    images, motion = reader.true_frames(2, 8, HELD_OUT)
    ids = HELD_OUT + 16 + torch.arange(8)
    assert torch.equal(images, render(random_identity(ids), motion))
    free = random_motion(ids)
    assert torch.equal(motion[4:], free[4:]) and not torch.equal(motion[:4], free[:4])


def test_training_the_reader_lowers_its_error(tmp_path, monkeypatch, capsys):
    frames = reader.true_frames(0, 8)
    monkeypatch.setattr(reader, "true_frames", lambda *given, **named: frames)
    reader.train_regressor(tmp_path / "r.safetensors", minutes=0.03, batch=8, compiled=False)
    said = capsys.readouterr().out
    assert "correlation" in said and float(said.split("loss ")[1].split(":")[0]) < 0.35
    reader.load_regressor(tmp_path / "r.safetensors")
