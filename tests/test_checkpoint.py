"""measure/checkpoint.py: the parts of a checkpoint, its tokens and frames, means with intervals, tables."""
import json
from types import SimpleNamespace

import pytest
import torch
from test_sample import META, small_models

from measure import checkpoint, metrics
from media.files import InputError
from media.weights import save_weights
from world.people import random_motion
from world.render import random_identity, render


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    path, models = tmp_path_factory.mktemp("release") / "w.safetensors", small_models()
    save_weights(path, {kind: models[kind] for kind in ("encoder", "decoder")}, META)
    return str(path)


@pytest.fixture(scope="module")
def opened(release):
    return checkpoint.open_checkpoint(SimpleNamespace(ckpt=release, device="cpu"), "encoder", "decoder")


def test_a_checkpoint_without_a_wanted_network_is_refused(release):
    args = SimpleNamespace(ckpt=release, device="cpu")
    assert checkpoint.open_checkpoint(args, "encoder").meta["size"] == 32
    with pytest.raises(InputError, match="no generator, only encoder, decoder"):
        checkpoint.open_checkpoint(args, "generator")


@torch.no_grad()
def test_tokens_are_the_encoders_however_many_images(opened):
    images = torch.rand(60, 3, 32, 32) * 2 - 1                              # more than one batch of 50
    tokens = checkpoint.encode(opened, images)
    assert tokens.shape == (60, 8)
    assert torch.allclose(tokens[51:], opened.encoder(images[51:]).flatten(1), atol=2e-2)      # bf16 on some
    masked = [checkpoint.encode(opened, images[:4], 0.5, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*masked) and not torch.allclose(masked[0], tokens[:4], atol=1e-2)


@torch.no_grad()
def test_frames_depend_on_photo_motion_and_seed_alone(opened):
    photo = torch.rand(3, 32, 32) * 2 - 1
    motions = checkpoint.encode(opened, torch.rand(3, 3, 32, 32) * 2 - 1)
    frames = checkpoint.decode_clip(opened, photo, motions, 1, 7)
    assert frames.shape == (3, 3, 32, 32) and frames.abs().max() <= 1
    m_ref = checkpoint.encode(opened, photo[None])
    assert torch.equal(frames, checkpoint.decode_clip(opened, photo, motions, 1, 7, m_ref))
    assert not torch.equal(frames, checkpoint.decode_clip(opened, photo, motions, 1, 8))
    assert not torch.equal(frames, checkpoint.decode_clip(opened, photo, motions.flip(0), 1, 7))


def test_one_person_and_one_each_are_drawn_alike():
    people, motion = random_identity(torch.arange(30)), random_motion(torch.arange(30))
    each, one = (checkpoint.render_batched(p, motion, 16) for p in (people, people[3]))
    assert torch.allclose(each, render(people, motion, 16), atol=1e-5)
    assert torch.allclose(one[28:], render(people[3].expand(2, -1), motion[28:], 16), atol=1e-5)


def test_summary_and_cells():
    got = checkpoint.summary([{"psnr": 20.0, "l1": 1.0}, {"psnr": 30.0, "l1": 1.0}])
    assert got == {"psnr": metrics.interval([20.0, 30.0]), "l1": metrics.interval([1.0, 1.0])}
    assert got["psnr"]["mean"] == 25
    value = {"mean": 1.234, "low": 1.0, "high": 1.5}
    assert checkpoint.cell(value, 2) == ["1.23"]
    assert checkpoint.cell(value, 1, True) == ["1.2", "[1.0 1.5]"]


def test_a_table_is_aligned(capsys):
    checkpoint.table(["", "ms", "spread"], [["decoder", "1.5", "1-2"], ["all", "10.0", ""]])
    assert capsys.readouterr().out == "           ms  spread\ndecoder   1.5     1-2\nall      10.0\n"


def test_json_is_written_whole_into_a_new_folder(tmp_path):
    checkpoint.write_json(tmp_path / "new" / "o.json", {"a": [1, 2.5]})
    assert json.loads((tmp_path / "new" / "o.json").read_text()) == {"a": [1, 2.5]}
