"""Weights by name: a folder in the model hub's format, and loading from the hub.

    python -m media.hub [--ckpt F] --out DIR          DIR/semo.safetensors, README.md (the model card), preview.mp4

`--ckpt owner/name` or `--ckpt owner/name@revision` then loads them anywhere, from the hub or from its cache.
"""
import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path

from media.files import InputError, atomic_write

FILE = "semo.safetensors"
ROOT = Path(__file__).resolve().parent.parent
CARD = """---
license: mit
library_name: semo
pipeline_tag: image-to-video
tags:
- talking-head
- portrait-animation
- audio-driven
---
{text}

## This file

`{file}`: {millions:.1f} million numbers, {size} x {size} pixels, motion token of {tokens} x {width}, networks: {kinds}.

```
python sample.py --ckpt OWNER/NAME --img photo.jpg --wav speech.wav
```
`preview.mp4` was made by these weights from the repository's example photo and speech.
"""
TEXT = """# SeMo

Open implementation of "Semantic Latent Motion" (arXiv 2503.10096): one photo and a voice make a talking portrait video.
The video is generated: say so where it is shown, and use only photos of people who agree."""


def resolve(name):
    """A path, or owner/name[@revision] on the model hub -> path of the file. Raises InputError in one sentence."""
    if os.path.exists(name) or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) or name.endswith(".safetensors"):
        return name
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise InputError(f"{name} is no file, and to load it from the model hub: pip install huggingface_hub") from None
    repository, _, revision = name.partition("@")
    try:
        return hf_hub_download(repository, FILE, revision=revision or None)
    except LocalEntryNotFoundError:                               # before its parent class EntryNotFoundError
        raise InputError(f"{name} is no file, is not in the cache of the model hub, and the hub cannot be reached; give the "
                         "path of a .safetensors file") from None
    except RepositoryNotFoundError:
        raise InputError(f"{name} is no file and the model hub has no {repository}; give a path or owner/name") from None
    except RevisionNotFoundError:
        raise InputError(f"{repository} on the model hub has no revision {revision}") from None
    except EntryNotFoundError:
        raise InputError(f"{repository} on the model hub holds no {FILE}") from None
    except Exception as error:                                    # of the network, in the words of several libraries
        raise InputError(f"{name} cannot be loaded from the model hub ({str(error).splitlines()[0][:120]})") from None


def card(path):
    """Text of the model card of the weights in a file."""
    from safetensors import safe_open
    with safe_open(path, framework="pt") as f:
        meta = json.loads(f.metadata()["semo"])
        numbers = sum(f.get_tensor(key).numel() for key in f.keys())
    config = next(iter(meta["configs"].values()))
    text = (ROOT / "MODEL_CARD.md").read_text() if (ROOT / "MODEL_CARD.md").is_file() else TEXT
    return CARD.format(text=text.strip(), file=FILE, millions=numbers / 1e6, size=meta["size"], tokens=config["num_tokens"],
                       width=config["token_dim"], kinds=", ".join(meta["configs"]))


def write_folder(ckpt, out):
    """The folder to upload: weights, card, preview. Raises InputError."""
    import sample
    sample.load_models(ckpt)                                      # refuses what is no sound file of weights
    out = Path(out)
    with atomic_write(out / FILE, make_folder=True) as temporary:
        shutil.copyfile(ckpt, temporary)
    with atomic_write(out / "README.md") as temporary:
        Path(temporary).write_text(card(ckpt))
    example = [str(ROOT / "examples" / name) for name in ("portrait.png", "speech.wav")]
    if sample.main(["--img", example[0], "--wav", example[1], "--ckpt", str(out / FILE), "--out", str(out / "preview.mp4")]):
        raise InputError(f"{ckpt}: the preview could not be made")


def main(argv=None):
    import sample
    parser = argparse.ArgumentParser(prog="python -m media.hub", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--ckpt", default=sample.DEFAULT, help="weights, .safetensors (default: the embedded ones)")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    try:
        write_folder(args.ckpt, args.out)
    except (InputError, OSError) as error:
        print(f"media.hub: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
