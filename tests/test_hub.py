"""web/hub.py against a folder of the hub's cache layout, without a network."""
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

import sample
from emotion import text_palette
from media import audio_features, weights
from media.files import InputError
from media.latents import load_latents
from media.weights import HUB_FILE, resolve
from web import hub

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that holds owner/face at its branch main and at revision v1; the hub itself is out of reach."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(weights, "hub_answers", lambda: False)
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


class NothingFound(BaseHTTPRequestHandler):
    """A hub without a single repository."""

    def do_HEAD(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub_server(tmp_path, monkeypatch):
    """A hub that accepts connections, and answers none before the function that this gives is called."""
    constants = pytest.importorskip("huggingface_hub.constants")
    server = HTTPServer(("127.0.0.1", 0), NothingFound)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    from diffusers import AutoencoderKL  # noqa: F401
    from transformers import AutoModel, WhisperModel  # noqa: F401
    thread = threading.Thread(target=server.serve_forever)
    weights.hub_answers.cache_clear()
    yield thread.start
    weights.hub_answers.cache_clear()
    if thread.ident:
        server.shutdown()
        thread.join()
    server.server_close()


@pytest.mark.parametrize("load", [
    resolve, lambda name: load_latents("sd", name), audio_features.load_whisper,
    lambda name: text_palette("a smile", name)], ids=["weights", "autoencoder", "whisper", "text"])
def test_a_hub_that_does_not_answer_is_asked_once(hub_server, monkeypatch, load):
    """Its library asks six times, with pauses of 23 s in all, and again for each file."""
    monkeypatch.setattr(weights, "HUB_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(InputError, match="owner/face") as caught:
        load("owner/face")
    assert time.monotonic() - began < 15 and "\n" not in str(caught.value)


def test_a_hub_that_answers_is_believed(hub_server):
    hub_server()
    with pytest.raises(InputError, match=f"the model hub has no {HUB_FILE}"):
        resolve("owner/face")


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
