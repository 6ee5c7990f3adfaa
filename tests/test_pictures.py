"""pictures.py: directions, names, attention and errors against planted cases; the command."""
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_prepared import make_set

from decoder import Decoder, DecoderConfig
from encoder import EncoderConfig, MotionEncoder
from generator import Generator, GeneratorConfig
from measure import pictures
from measure.pictures import NAMES, SHOWN
from media.charts import to_image
from media.files import write_lines
from media.weights import save_weights
from sample import load_models

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

META = {"size": 32, "audio": "mel", "latents": "pixel", "steps": 1}
SHAPE = {"image_size": 32, "patch_size": 8, "width": 32, "heads": 2, "token_dim": 12}
RELEASE = SimpleNamespace(meta=META, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A small untrained release, and its encoder alone."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    models = {"encoder": MotionEncoder(EncoderConfig(**SHAPE, depth=2)),
              "decoder": Decoder(DecoderConfig(**SHAPE, depth=1, tokens_per_motion=2))}
    save_weights(folder / "w.safetensors", models, META)
    save_weights(folder / "e.safetensors", {"encoder": models["encoder"]}, META)
    return folder


@pytest.fixture(scope="module")
def with_moods(given):
    """The release with a generator that has experts, m.safetensors."""
    models, meta = load_models(given / "w.safetensors")
    models["generator"] = Generator(GeneratorConfig(token_dim=12, width=16, depth=1, heads=1, experts=2))
    save_weights(given / "m.safetensors", models, {**META, "gen_steps": 1, "guidance": 1.0})
    return given


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(pictures, "FRAMES", {"clip": 6, "pca": 40, "speech": 20})


@pytest.fixture
def sheets(monkeypatch):
    """What pictures.sheet was given."""
    asked = []
    real = pictures.sheet
    monkeypatch.setattr(pictures, "sheet", lambda *args: asked.append(args) or real(*args))
    return asked


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_factor_names_its_direction_and_moves_the_token(monkeypatch, sheets, sign):
    """The token is the jaw along one line, and noise: direction 1 is that line, towards an open jaw."""
    draw = torch.Generator().manual_seed(0)
    line, jaw = torch.nn.functional.normalize(torch.randn(12, generator=draw), dim=0), NAMES.index("jaw")
    monkeypatch.setattr(pictures, "render_batched", lambda people, motion, size: motion)

    def either(x, full_matrices, real=torch.linalg.svd):
        u, values, axes = real(x, full_matrices)
        return sign * u, values, sign * axes

    monkeypatch.setattr(torch.linalg, "svd", either)
    noise = 0.01 * torch.randn(40, 12, generator=draw)
    monkeypatch.setattr(pictures, "encode", lambda release, x: 5 * x[:, jaw, None] * line + noise)
    found = pictures.token_pca(RELEASE)
    tokens = pictures.encode(None, found.motion)
    variances = torch.linalg.eigvalsh(torch.cov(tokens.T)).flip(0)
    assert torch.allclose(found.shares, (variances / variances.sum())[:8], atol=1e-4)
    assert found.shares[0] > 0.99 and torch.allclose(found.axes[0], line, atol=0.02)
    assert found.correlations[0].argmax() == jaw and found.correlations[0, jaw] > 0.999
    assert (found.correlations.max(1).values >= found.correlations.min(1).values.abs()).all()
    assert torch.allclose(found.scores.std(0), torch.ones(8), atol=1e-3)
    assert torch.corrcoef(torch.stack([found.scores[:, 0], found.motion[:, jaw]]))[0, 1] > 0.999

    moves = []

    def decode_clip(checkpoint, photo, tokens, *_):
        moves.append(tokens)
        return photo.expand(5, -1, -1, -1)

    monkeypatch.setattr(pictures, "encode", lambda release, x: torch.full((1, 12), 3.0))
    monkeypatch.setattr(pictures, "decode_clip", decode_clip)
    pictures.directions(RELEASE, torch.zeros(3, 32, 32), found)
    (_, head, rows, side), = sheets
    assert "jaw +1.00" in side[0] and "100.0% of variance" in side[0] and "jaw +1.00" not in side[1]
    assert len(side) == len(rows) == 8 and {len(row) for row in rows} == {len(head)} and head[2] == "as it is"
    moved = (moves[0] - 3) @ line / (5 * found.motion[:, jaw].std())
    assert torch.allclose(moved, torch.tensor([-2.0, -1, 0, 1, 2]), atol=0.01) and (moves[0][2] == 3).all()


def test_recomputed_attention_is_that_of_the_layer():
    torch.manual_seed(1)
    encoder = MotionEncoder(EncoderConfig(**SHAPE, depth=3, num_tokens=2)).eval()
    with torch.inference_mode():
        for block in encoder.blocks:                                      # far from uniform, and heads unlike
            block.attention.qkv.weight *= 6
        layer, x = encoder.blocks[0].attention, torch.randn(2, 18, 32)
        weights, (_, _, v) = pictures.attention_weights(layer, x), layer.project(x)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 18), atol=1e-5) and weights.amax() > 0.3
        assert torch.allclose(layer.out((weights @ v).transpose(1, 2).flatten(2)), layer(x), atol=1e-5)

        inputs = []                                                    # the layers' inputs, seen from outside
        for block in encoder.blocks:
            block.norm1.register_forward_hook(lambda module, given, out: inputs.append(out))
        z = torch.rand(2, 3, 32, 32) * 2 - 1
        found = pictures.token_attention(encoder, z)
        assert found.shape == (2, 3, 18) and torch.allclose(found.sum(-1), torch.ones(2, 3), atol=1e-5)
        for k, block in enumerate(encoder.blocks):
            direct = pictures.attention_weights(block.attention, inputs[k])[:, :, 16:].mean((1, 2))
            assert torch.allclose(found[:, k], direct, atol=1e-6)
        assert not any(block.attention._forward_hooks for block in encoder.blocks)


def test_the_overlay_glows_where_the_token_looks(monkeypatch, sheets):
    planted = torch.full((1, 2, 17), 0.01)
    planted[0, 0, 1 * 4 + 3], planted[0, 1, 16] = 0.5, 0.9        # row 1, column 3; layer 2: the token itself
    monkeypatch.setattr(pictures, "token_attention", lambda *given: planted)
    release = SimpleNamespace(encoder=MotionEncoder(EncoderConfig(**SHAPE, depth=2)),
                              space=SimpleNamespace(encode=lambda x: x), device=torch.device("cpu"))
    pictures.attention(release, torch.zeros(1, 3, 32, 32))
    (frame, _), (layer, note), (even, _) = ((x.sum(0), note) for x, note in sheets[0][2][0])
    where = layer.argmax()
    assert 8 <= where // 32 < 16 and 24 <= where % 32 < 32 and layer[12, 28] > layer[20, 12] + 1.5
    assert note == "50%" and even.std() < 0.01 and (frame == frame[0, 0]).all()


def test_errors_are_those_of_the_frame_least_like_the_photo(monkeypatch, sheets):
    """Grey clips: frame 2 differs most and drives. A decoder 0.2 too bright: x 4 is 40% of the scale."""
    grey = torch.tensor([0.0, 0.1, 0.7, -0.3]).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    clips = [(grey - shift, torch.tensor([0, 0, 0.9, 0])[:, None], torch.zeros(32)) for shift in (0, 0.1)]
    monkeypatch.setattr(pictures, "encode", lambda release, x: x[:, :1, 0, 0])
    def grey_picture(value):
        return value.view(1, 1, 1, 1).expand(1, 3, 32, 32)

    monkeypatch.setattr(pictures, "decode_clip", lambda release, photo, m_t, *_: grey_picture(m_t) + 0.2)
    monkeypatch.setattr(pictures, "render_batched", lambda people, motion, size: grey_picture(motion))
    pictures.errors(RELEASE, clips)
    first, second = ([x.mean((1, 2)).tolist() for x, _ in row] for row in sheets[0][2])
    shown = [first[k][0] for k in (0, 1, 2, 4, 5, 6)]
    assert shown == pytest.approx([0, 0.7, 0.9, -0.1, 0.9, 0.9], abs=0.01)
    assert first[3] == pytest.approx([1, -0.6, -1], abs=0.02)                      # 0.4: red, a little yellow
    assert first[7] == pytest.approx([-1, -1, -1]) and second[7][0] > -0.5
    assert sheets[0][2][0][3][1] == "20.0 dB"


def test_trajectories_follow_where_the_token_is_the_factor(monkeypatch):
    """The token is the motion itself: each curve is the true one. A token of noise gives another curve."""
    pytest.importorskip("matplotlib")
    n, pick = len(SHOWN), [NAMES.index(name) for name in SHOWN]
    eye, motion = torch.eye(len(NAMES))[pick], torch.zeros(3, len(NAMES))
    motion[:, 0], scores = torch.tensor([-0.2, 0.2, 0.0]), torch.tensor([[-2.0, 2], [2, 2], [0, -2]])
    monkeypatch.setattr(pictures, "render_batched", lambda people, motion, size: motion)
    monkeypatch.setattr(pictures, "encode", lambda release, x: x)

    def drawn(sign):
        found = SimpleNamespace(mean=torch.zeros(17), axes=sign * eye, deviations=torch.full((n,), 0.5),
                                correlations=sign * eye, scores=scores, motion=motion)
        *left, right, colours = (axes for part in pictures.trajectories(RELEASE, found).subfigs
                                 for axes in part.axes)
        curves = [[line.get_ydata() for line in axes.lines] for axes in left]              # n x (true, token)
        return torch.tensor(np.array(curves)), left, right, colours

    for sign in (1, -1):
        curves, left, right, colours = drawn(sign)
        clip = pictures.random_clip(torch.tensor([pictures.HELD_OUT]), 20)["motion"][0][:, pick].T
        want = (clip - clip.mean(1, keepdim=True)) / clip.std(1, keepdim=True).clamp(min=1e-6)
        assert torch.allclose(curves[:, 0], want, atol=1e-5) and torch.allclose(curves[:, 1], want, atol=1e-4)
        assert left[0].get_title("right") == "correlation 1.00"
        assert left[0].lines[0].get_xdata()[-1] == pytest.approx(19 / 25)
        points = right.collections[0]
        assert np.allclose(points.get_offsets(), scores)
        assert np.allclose(points.get_array(), [-11.459, 11.459, 0], atol=1e-2)
        path = np.array(right.lines[0].get_xydata())
        assert np.allclose(path, sign * 2 * clip[:2].T, atol=1e-4) and colours.get_ylabel() == "yaw (degrees)"
    noise = torch.Generator().manual_seed(0)
    monkeypatch.setattr(pictures, "encode", lambda release, x: torch.randn(x.shape, generator=noise))
    curves = drawn(1)[0]
    assert ((curves[:, 0] - curves[:, 1]).abs().mean(1) > 0.5).all()


def test_no_label_is_cut_off():
    """All texts of a sheet lie within it, and the pictures keep their pixels."""
    pytest.importorskip("matplotlib")
    red = torch.tensor([1.0, -1, -1])[:, None, None].expand(3, 32, 32)
    title = "a long title, longer than the single picture under it is wide,\nand then a second line of it"
    figure = pictures.sheet(title, ["head\nof two lines"], [[(red, "20 dB")]], ["a label at its left"])
    to_image(figure)                                                                       # lays it out
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert 0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height
    axes, = figure.axes
    image, = axes.images
    assert (image.get_array() == (255, 0, 0)).all() and image.get_array().shape == (32, 32, 3)
    assert axes.get_ylabel() == "a label at its left" and axes.texts[0].get_text() == "20 dB"


def test_the_command_draws_six_pictures(with_moods, tmp_path, capsys, sheets, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(pictures, "MOMENT", 2)
    weights = str(with_moods / "m.safetensors")
    assert pictures.main(["--ckpt", weights, "--rival", weights, "--out", str(tmp_path / "out"), "--device",
                          "cpu"]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["attention.png", "conflict.webp", "directions.png",
                                                    "emotions.webp", "errors.png", "trajectories.png"]
    sizes = {path.stem: Image.open(path).size for path in (tmp_path / "out").iterdir()}
    assert sizes["trajectories"] == (1200, 640)
    assert len(Image.open(tmp_path / "out" / "trajectories.png").getcolors(10**6)) > 10
    names = "errors", "directions", "attention", "emotions", "conflict"
    for name, asked, columns, rows in zip(names, sheets, (8, 6, 3, 5, 5), (5, 8, 5, 6, 6), strict=True):
        assert len(asked[1]) == columns and len(asked[2]) == rows
        assert sizes[name][0] >= 130 * columns and 0 < sizes[name][1] - 130 * rows < 150
    assert "errors.png" in capsys.readouterr().out


def test_of_real_people_only_what_is_known_is_shown(given, tmp_path, capsys, sheets):
    pytest.importorskip("matplotlib")
    greys = 80 * np.arange(3)[:, None] + 6 * np.arange(8)
    rows = make_set(tmp_path, zip("abc", ("train", "test", "test"), greys, strict=True))
    args = ["--ckpt", str(given / "w.safetensors"), "--device", "cpu", "--data", str(tmp_path)]
    args += ["--out", str(tmp_path / "out")]
    assert pictures.main(args) == 0 and len(os.listdir(tmp_path / "out")) == 4
    errors = sheets[0]
    assert len(errors[1]) == 6 and not any("true" in text for text in errors[1])
    assert [len(row) for row in errors[2]] == [6, 6]
    shown = [[(row[k][0].mean().item() + 1) * 127.5 for k in (0, 1, 4)] for row in errors[2]]
    assert np.abs(np.array(shown) - [[80, 110, 160], [160, 190, 80]]).max() < 6  # of 6 frames the last drives
    write_lines(tmp_path / "manifest.jsonl", rows[:2])
    refused(capsys, pictures.main(args), "one person")


def refused(capsys, status, *words):
    """Status 2, one line on stderr that holds the words."""
    said = capsys.readouterr().err.splitlines()
    assert status == 2 and len(said) == 1 and said[0].startswith("measure.pictures: ")
    assert all(word in said[0] for word in words), said


def test_what_cannot_be_used_is_refused_and_leaves_nothing(given, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = ["--out", str(tmp_path / "out")]
    (tmp_path / "bad").write_bytes((given / "w.safetensors").read_bytes()[:5000])
    good = ["--ckpt", str(given / "w.safetensors"), *out]
    refused(capsys, pictures.main(["--ckpt", str(tmp_path / "bad"), *out]), "bad", "not a readable")
    refused(capsys, pictures.main(["--ckpt", str(given / "e.safetensors"), *out]), "no decoder")
    refused(capsys, pictures.main([*good, "--device", "abacus"]), "abacus")
    refused(capsys, pictures.main([*good, "--rival", str(given / "w.safetensors")]), "no generator")
    refused(capsys, pictures.main([*good, "--data", str(tmp_path)]), "manifest.jsonl")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("a file")
    refused(capsys, pictures.main([*good, "--device", "cpu"]), "out")
    assert sorted(os.listdir(tmp_path)) == ["bad", "out"]


def test_emotions_are_drawn_by_intensity_and_beside_those_of_a_rival(with_moods, monkeypatch, sheets):
    """Of a generator that makes each face as bright as its mood is strong, and darker by the voice."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(pictures, "MOMENT", 2)
    release = pictures.open_with_experts(SimpleNamespace(ckpt=with_moods / "m.safetensors", device="cpu"))
    person = pictures.Person(release, None, None, pictures.FACE)

    def generated(release, photo, waves, moods, seed, frames=27):
        assert waves.shape[1] == frames * 640
        loud = torch.stack([(wave - person.waves[0, :frames * 640]).abs().mean() > 0 for wave in waves])
        strength = moods[:, 1:].sum(1) / release.fade - loud.expand(len(moods)).float()
        return strength[:, None, None].expand(-1, frames, 1)

    release.fade, rival = 1, SimpleNamespace(meta=META, fade=2)
    monkeypatch.setattr(pictures, "generate_moods", generated)
    monkeypatch.setattr(pictures, "decode_clip", lambda release, photo, tokens, steps, seed:
                        tokens[:, :, None, None].expand(-1, 3, 32, 32) / 2)
    pictures.emotions(release, person)
    pictures.conflict(release, rival, person)
    (_, head, grown, labels), (_, _, disputed, _) = sheets
    assert labels == pictures.EMOTIONS[1:] and len(head) == 5 and len(grown) == len(disputed) == 6
    for k in range(6):
        assert torch.equal(grown[k][0][0], disputed[k][0][0])
        assert [x.mean().item() for x, _ in grown[k][1:]] == pytest.approx([0, 0.25, 0.5, 0.75])
        assert [x.mean().item() for x, _ in disputed[k][1:]] == pytest.approx([0.5, 0, 0.25, -0.25])
        voice = disputed[k][2][1].removesuffix(" voice")
        assert voice in pictures.EMOTIONS[1:] and voice != labels[k] and disputed[k][1][1] == ""
