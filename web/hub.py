"""Make a folder in the model hub's format, to upload.

    python -m web.hub [--ckpt F] --out DIR            DIR/semo.safetensors, README.md (the card), preview.mp4

`--ckpt owner/name[@revision]` then loads these weights anywhere (media/weights.py).
"""
import argparse
import shutil
import sys
from pathlib import Path

import sample
from media.files import InputError, atomic_write, command
from media.weights import HUB_FILE, resolve

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


def write_folder(ckpt, out):
    """Write the folder to upload: weights, card, preview. Raises InputError."""
    ckpt = resolve(ckpt)
    models, meta = sample.load_models(ckpt)
    config = models["encoder"].config
    numbers = sum(x.numel() for model in models.values() for x in model.state_dict().values())
    card = CARD.format(text=(ROOT / "MODEL_CARD.md").read_text().strip(), file=HUB_FILE,
                       millions=numbers / 1e6, size=meta["size"], tokens=config.num_tokens,
                       width=config.token_dim, kinds=", ".join(models))
    with atomic_write(out / HUB_FILE, make_folder=True) as temporary:
        shutil.copyfile(ckpt, temporary)
    with atomic_write(out / "README.md") as temporary:
        Path(temporary).write_text(card)
    if sample.main(["--img", str(ROOT / "examples/portrait.png"), "--wav", str(ROOT / "examples/speech.wav"),
                    "--ckpt", str(out / HUB_FILE), "--out", str(out / "preview.mp4")]):
        raise InputError(f"{ckpt}: the preview could not be made")


@command("web.hub")
def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m web.hub", description=__doc__.split("\n")[0],
                                     allow_abbrev=False)
    parser.add_argument("--ckpt", default=sample.DEFAULT,
                        help="weights, .safetensors (default: the embedded ones)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    write_folder(args.ckpt, args.out)


if __name__ == "__main__":
    sys.exit(main())
