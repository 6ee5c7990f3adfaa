"""A release -> what the page needs: four ONNX graphs, their weights and model.json.

    python -m web.export [--ckpt F] [--out web/page/model] [--device cpu]

    encoder.onnx     picture (1, 3, s, s) -> token (1, L*D)
    reference.onnx   picture, its token -> what every frame needs of the photo (keys and values of each layer)
    target.onnx      noised picture, t, token, reference -> the picture, the photo moved, alpha, displacements
    generator.onnx   noised motion, t, past, reference token, speech rows, guidance (and mood) -> velocity of
                     the new frames

Weights are stored as the release stores them (matrices in half precision); all arithmetic is in fp32. The
last step, which puts the parts together at the photo's own resolution, is not in a graph: the page does it in
WebGL.
"""
import argparse
import hashlib
import json
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from media import audio_features
from media.compose import BORDER, CHANGED
from media.files import InputError, atomic_write, command
from media.sound import SAMPLE_RATE, SAMPLES_PER_FRAME
from sample import DEFAULT, load_models
from web.controls import fit_controls
from world.speech import EMOTIONS

MODEL = Path(__file__).resolve().parent / "page" / "model"
WEIGHTS = "weights.bin"
LIMIT = 20_000_000                                                # bytes of all graphs together
OPSET = 20


class Reference(nn.Module):
    """Photo and its token -> the tensors of the decoder's cache, in a fixed order."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, photo, token):
        c = self.decoder.config
        cache = self.decoder.encode_reference(photo, token.unflatten(1, (c.num_tokens, c.token_dim)))
        return tuple(pytree.tree_flatten(cache)[0])


class Target(nn.Module):
    """One decoder call -> the picture x (1, 3, s, s), the moved reference (1, 3, s, s), alpha (1, 1, s, s)
    and field (1, s, s, 2). cache: the outputs of Reference, whose structure is `spec`."""

    def __init__(self, decoder, spec):
        super().__init__()
        self.decoder, self.spec = decoder, spec

    def forward(self, z_t, t, token, *cache):
        c = self.decoder.config
        token = token.unflatten(1, (c.num_tokens, c.token_dim))
        return tuple(self.decoder(z_t, t, token, pytree.tree_unflatten(cache, self.spec), as_picture=True))


class Guided(nn.Module):
    """The generator with classifier-free guidance -> velocity (1, K, L*D)."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, m_t, t, past, reference, audio, guidance, mood=None):
        uncond = self.generator(m_t, t, past, reference, mood=mood)
        cond = self.generator(m_t, t, past, reference, audio, mood=mood)
        return uncond + guidance * (cond - uncond)                      # flow.with_cfg, guidance as a tensor


def halve(model):
    """Store the tensors of an ONNX model that lose nothing by it in half precision, each followed by a cast
    to fp32."""
    from onnx import TensorProto, helper, numpy_helper
    casts = []
    for weight in model.graph.initializer:
        if weight.data_type == TensorProto.FLOAT and len(weight.dims) > 1:
            name, value = weight.name, numpy_helper.to_array(weight)
            half = value.astype(np.float16)
            if not np.array_equal(half.astype(np.float32), value):
                continue                                        # a table of ours, not a weight of the release
            weight.CopyFrom(numpy_helper.from_array(half, name + ".half"))
            casts.append(helper.make_node("Cast", [name + ".half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]                                 # only slows loading down
    return model


class Weights:
    """The weights of all graphs, each stored once, as external data in one file."""

    def __init__(self):
        self.data, self.places = bytearray(), {}

    def take(self, model):
        """Move the large initializers of an ONNX model here; the model keeps their places."""
        from onnx import TensorProto
        for weight in model.graph.initializer:
            if len(weight.raw_data) < 256:
                continue
            place = self.places.setdefault(weight.raw_data, len(self.data))
            if place == len(self.data):
                self.data += weight.raw_data
            for key, value in (("location", WEIGHTS), ("offset", place), ("length", len(weight.raw_data))):
                weight.external_data.add(key=key, value=str(value))
            weight.ClearField("raw_data")
            weight.data_location = TensorProto.EXTERNAL


def to_onnx(module, inputs, input_names, output_names, weights):
    """-> the bytes of a graph of fixed shapes; its weights go to `weights`."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        inputs = tuple(x.clone() for x in inputs)              # one tensor given twice would become one input
        program = torch.onnx.export(module.eval(), inputs, dynamo=True, input_names=input_names,
                                    output_names=output_names, opset_version=OPSET, verbose=False)
    model = halve(program.model_proto)
    for node in model.graph.node:
        del node.metadata_props[:]                                # stack traces: paths of this machine
        node.doc_string = ""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    weights.take(model)
    return model.SerializeToString()


def moods_of(generator):
    """The names of the moods that a generator knows."""
    return list(EMOTIONS) if generator.config.experts or generator.config.mood_table else []


def graphs(models):
    """{"encoder", "decoder", "generator"} -> {file name: bytes}, and the number of tensors in the
    reference."""
    encoder, decoder, generator = models["encoder"], models["decoder"], models["generator"]
    c, g, weights = decoder.config, generator.config, Weights()
    motion = c.num_tokens * c.token_dim
    photo, token, t = torch.zeros(1, 3, c.image_size, c.image_size), torch.zeros(1, motion), torch.ones(1)
    with torch.no_grad():
        m_ref = token.unflatten(1, (c.num_tokens, c.token_dim))
        cache, spec = pytree.tree_flatten(decoder.encode_reference(photo, m_ref))
    names = [f"cache{k}" for k in range(len(cache))]
    speech = torch.zeros(1, g.rows, g.audio_dim)
    new, past = torch.zeros(1, g.window, motion), torch.zeros(1, g.past, motion)
    jobs = {
        "encoder": (nn.Sequential(encoder, nn.Flatten()), [photo], ["photo"], ["token"]),
        "reference": (Reference(decoder), [photo, token], ["photo", "token"], names),
        "target": (Target(decoder, spec), [photo, t, token, *cache], ["z", "t", "token", *names],
                   ["x", "moved", "alpha", "field"]),
        "generator": (Guided(generator), [new, t, past, token, speech, torch.tensor(1.5)],
                      ["z", "t", "past", "reference", "audio", "guidance"], ["v"])}
    if moods_of(generator):
        jobs["generator"][1].append(torch.zeros(1, g.past + g.window, len(moods_of(generator))))
        jobs["generator"][2].append("mood")
    files = {f"{name}.onnx": to_onnx(*job, weights) for name, job in jobs.items()}
    return {**files, WEIGHTS: bytes(weights.data)}, len(cache)


def fingerprint(ckpt):
    """What an export depends on: the release and this file."""
    return hashlib.sha256(Path(ckpt).read_bytes() + Path(__file__).read_bytes()).hexdigest()


def export(ckpt, out):
    """Write the graphs and model.json of a release to the folder `out`. Raises InputError."""
    models, meta = load_models(ckpt)
    lacking = [kind for kind in ("encoder", "decoder", "generator") if kind not in models]
    if lacking:
        raise InputError(f"{ckpt} holds no {lacking[0]}; the page needs encoder, decoder and generator")
    c = models["decoder"].config
    if meta["latents"] != "pixel" or c.predict != "x" or c.frames > 1 or meta["audio"] != "mel":
        raise InputError(f"{ckpt} is not for the page: it needs an image model in pixel space with mel "
                         f"features")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError("the export needs onnx and onnxscript: pip install -r "
                         "requirements-web.txt") from None
    logging.disable(logging.WARNING)                              # the exporter's chatter
    files, count = graphs(models)
    logging.disable(logging.NOTSET)
    total = sum(map(len, files.values()))
    if total > LIMIT:
        raise InputError(f"{ckpt} is too large for a page: {total / 1e6:.0f} MB of graphs, at most "
                         f"{LIMIT / 1e6:.0f} MB")
    g = models["generator"].config
    about = {
        "format": "semo-web-1", "release": Path(ckpt).name, "fingerprint": fingerprint(ckpt),
        "bytes": {name: len(data) for name, data in files.items()}, "cache": count,
        "size": meta["size"], "border": BORDER, "changed": CHANGED, "token": c.num_tokens * c.token_dim,
        "steps": meta["steps"],
        "generator": {"window": g.window, "past": g.past, "ahead": g.lookahead, "steps": meta["gen_steps"],
                      "guidance": meta["guidance"], "moods": moods_of(models["generator"])},
        "mel": {"rate": SAMPLE_RATE, "frame": SAMPLES_PER_FRAME, "bins": audio_features.BINS,
                "fft": audio_features.N_FFT,
                "hop": audio_features.STEP, "floor": audio_features.MEL_FLOOR,
                "mean": audio_features.MEL_MEAN, "std": audio_features.MEL_STD},
        "controls": meta.get("controls") or fit_controls(models, meta),
    }
    out = Path(out)
    for name, data in files.items():
        with atomic_write(out / name, make_folder=True) as temporary:
            Path(temporary).write_bytes(data)
    with atomic_write(out / "model.json") as temporary:           # last: then all files are there
        Path(temporary).write_text(json.dumps(about))
    return about


def exported(ckpt, out):
    """model.json of the folder `out` if it holds this very release, else None."""
    try:
        about = json.loads((Path(out) / "model.json").read_text())
        complete = all((Path(out) / name).stat().st_size == size for name, size in about["bytes"].items())
        same = about["format"] == "semo-web-1" and about["fingerprint"] == fingerprint(ckpt)
    except (OSError, ValueError, KeyError):
        return None
    return about if complete and same else None


@command("web.export")
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--ckpt", default=DEFAULT, help="released weights (default: the embedded ones)")
    parser.add_argument("--out", default=str(MODEL), help="folder for the graphs (default: %(default)s)")
    args = parser.parse_args(argv)
    about = export(args.ckpt, args.out)
    print(f"{args.out}: {sum(about['bytes'].values()) / 1e6:.1f} MB in {len(about['bytes'])} files")


if __name__ == "__main__":
    sys.exit(main())
