"""web/hub.py against a folder of the hub's cache layout, without a network."""
from pathlib import Path

import pytest
import yaml

import sample
from media.files import InputError
from media.weights import HUB_FILE, resolve
from web import hub

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that holds owner/face at its branch main and at revision v1; the hub itself is out of reach."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    base = tmp_path / "models--owner--face"
    for revision, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        (base / "snapshots" / commit).mkdir(parents=True)
        (base / "snapshots" / commit / HUB_FILE).symlink_to(sample.DEFAULT)
        (base / "refs").mkdir(exist_ok=True)
        (base / "refs" / revision).write_text(commit)
    return base


@pytest.mark.parametrize("name, commit",
                         [("owner/face", "a"), ("owner/face@v1", "b"), ("owner/face@" + "b" * 40, "b")])
def test_weights_are_loaded_by_name(cache, name, commit):
    path = resolve(name)
    assert Path(path).parent.name == commit * 40
    models, _ = sample.load_models(name)
    assert set(models) == {"encoder", "decoder", "generator", "voice"}


@pytest.mark.parametrize("name", ["owner/other", "owner/face@v2"])
def test_what_is_not_in_the_cache_is_refused_in_a_sentence(cache, name):
    with pytest.raises(InputError, match=f"^{name} is no file.*") as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_paths_are_left_alone(tmp_path):
    for name in ("weights/missing.safetensors", "/no/such/file", str(tmp_path), "plain"):
        assert resolve(name) == name


def test_sample_refuses_an_unknown_name_with_status_2(cache, tmp_path, capsys):
    assert sample.main(["--img", str(ROOT / "examples" / "portrait.png"), "--wav",
                        str(ROOT / "examples" / "speech.wav"), "--ckpt", "owner/none", "--out",
                        str(tmp_path / "x.mp4")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "owner/none" in said


def test_folder_for_the_hub(tmp_path, monkeypatch):
    """The weights byte for byte, a card whose header is YAML, a preview. (Sampling is tested elsewhere.)"""
    asked = []

    def short(argv):
        asked.append(argv)
        Path(argv[-1]).write_bytes(b"a video")
        return 0

    monkeypatch.setattr(sample, "main", short)
    assert hub.main(["--out", str(tmp_path / "release")]) == 0
    assert (tmp_path / "release" / HUB_FILE).read_bytes() == Path(sample.DEFAULT).read_bytes()
    header = (tmp_path / "release" / "README.md").read_text().split("---")[1]
    assert yaml.safe_load(header)["license"] == "mit"
    assert asked[0][asked[0].index("--ckpt") + 1] == str(tmp_path / "release" / HUB_FILE)
    assert (tmp_path / "release" / "preview.mp4").is_file()


def test_no_folder_of_a_bad_file(tmp_path, capsys):
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    assert hub.main(["--ckpt", str(tmp_path / "bad.safetensors"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()
