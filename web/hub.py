"""Make a folder in the model hub's format, to upload.

    python -m web.hub [--ckpt F] --out DIR            DIR/semo.safetensors, README.md (the card), preview.mp4

`--ckpt owner/name[@revision]` then loads these weights anywhere (media/weights.py).
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

import sample
from media.files import InputError, atomic_write
from media.weights import HUB_FILE

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

`{file}`: {millions:.1f} million numbers, {size} x {size} pixels, motion token of {tokens} x {width},
networks: {kinds}.

```
python sample.py --ckpt OWNER/NAME --img photo.jpg --wav speech.wav
```
`preview.mp4` was made by these weights from the repository's example photo and speech.
"""
TEXT = """# SeMo

Open implementation of "Semantic Latent Motion" (arXiv 2503.10096): one photo and a voice make a talking
portrait video. The video is generated: say so where it is shown, and use only photos of people who agree."""


def card(path):
    """Text of the model card of the weights in a file."""
    from safetensors import safe_open
    with safe_open(path, framework="pt") as f:
        meta = json.loads(f.metadata()["semo"])
        numbers = sum(f.get_tensor(key).numel() for key in f.keys())
    config = next(iter(meta["configs"].values()))
    text = (ROOT / "MODEL_CARD.md").read_text() if (ROOT / "MODEL_CARD.md").is_file() else TEXT
    return CARD.format(text=text.strip(), file=HUB_FILE, millions=numbers / 1e6, size=meta["size"],
                       tokens=config["num_tokens"],
                       width=config["token_dim"], kinds=", ".join(meta["configs"]))


def write_folder(ckpt, out):
    """The folder to upload: weights, card, preview. Raises InputError."""
    sample.load_models(ckpt)                                      # refuses what is no sound file of weights
    out = Path(out)
    with atomic_write(out / HUB_FILE, make_folder=True) as temporary:
        shutil.copyfile(ckpt, temporary)
    with atomic_write(out / "README.md") as temporary:
        Path(temporary).write_text(card(ckpt))
    example = [str(ROOT / "examples" / name) for name in ("portrait.png", "speech.wav")]
    if sample.main(["--img", example[0], "--wav", example[1], "--ckpt", str(out / HUB_FILE), "--out",
                    str(out / "preview.mp4")]):
        raise InputError(f"{ckpt}: the preview could not be made")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m web.hub", description=__doc__.split("\n")[0],
                                     allow_abbrev=False)
    parser.add_argument("--ckpt", default=sample.DEFAULT,
                        help="weights, .safetensors (default: the embedded ones)")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    try:
        write_folder(args.ckpt, args.out)
    except (InputError, OSError) as error:
        print(f"web.hub: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
