"""A release -> what the page needs: four ONNX graphs, their weights and model.json.

    python -m web.export [--ckpt F] [--out web/page/model]

    encoder.onnx     picture (1, 3, s, s) -> token (1, L*D)
    reference.onnx   picture, its token -> what every frame needs of the photo (keys and values of each layer)
    target.onnx      token, reference -> the picture, and how to move, fade and edit the photo
    mel.onnx         the sound of a frame -> speech row
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
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from flow import integrate
from media import audio_features
from media.compose import CHANGED, REPAINTED, edge_window
from media.face import frame_photo, load_detector
from media.files import InputError, atomic_write, command
from media.image import open_image
from media.sound import SAMPLE_RATE, SAMPLES_PER_FRAME
from sample import DEFAULT, load_models
from web.controls import fit_controls
from world.speech import EMOTIONS

MODEL = Path(__file__).resolve().parent / "page" / "model"
WEIGHTS = "weights.bin"
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LABELS = {"jaw": "Jaw", "lip_width": "Lip width", "lip_corner": "Lip corners", "blink_l": "Blink left",
          "blink_r": "Blink right", "gaze_x": "Gaze sideways", "gaze_y": "Gaze up, down",
          "brow_raise": "Brows raised", "brow_furrow": "Brows drawn", "yaw": "Turn (yaw)",
          "pitch": "Nod (pitch)", "roll": "Tilt (roll)", "light_x": "Light from", "light": "Light strength",
          "shift_x": "Move sideways", "shift_y": "Move up, down", "scale": "Nearer"}     # in this order
MIN_CORRELATION, MIN_GAIN = 0.5, 0.1                              # of a value with what is read back
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
    """A token -> the picture x (1, 3, s, s), and Edit's two outputs, which move the photo itself.

    cache: the outputs of Reference, whose structure is `spec`; steps: of the sampler. All frames start from
    the same noise, which is in the graph.
    """

    def __init__(self, decoder, spec, steps):
        super().__init__()
        self.decoder, self.spec, self.steps = decoder, spec, steps
        size, random = decoder.config.image_size, torch.Generator().manual_seed(0)
        self.edit = Edit(size)
        self.register_buffer("noise", torch.randn(1, 3, size, size, generator=random))

    def forward(self, token, *cache):
        c = self.decoder.config
        cond = {"m_t": token.unflatten(1, (c.num_tokens, c.token_dim)),
                "cache": pytree.tree_unflatten(cache, self.spec)}
        z = integrate(self.decoder, self.noise, self.steps, skip_last=1, **cond)
        picture = self.decoder(z, torch.full((1,), 1 / self.steps), **cond, as_picture=True)
        return picture.x, *self.edit(*picture)


class Edit(nn.Module):
    """The part of media.compose.Composer.frame that is at the network's resolution: a Picture -> two arrays.

    edit (2s-1, 2s-1, 4): a residual (RGB) and a share, frame = moved photo * share + residual on [0, 1];
    field (s, s, 2): the displacements that move the photo.
    """

    def __init__(self, size):
        super().__init__()
        for name, still in (("field_window", 1), ("edit_window", 2)):
            self.register_buffer(name, torch.from_numpy(edge_window(size, still)[..., 0]))

    def forward(self, x, moved, alpha, field):
        change = (x.clamp(-1, 1) - moved) / 2                                             # (1, 3, s, s)
        largest = 255 * F.max_pool2d(change.abs().amax(1, keepdim=True), 3, stride=1, padding=1)
        start, end = REPAINTED
        fade = torch.maximum(alpha.clamp(0, 1) * (largest / CHANGED).clamp(max=1),
                             ((largest - start) / (end - start)).clamp(0, 1)) * self.edit_window
        parts = torch.cat([(moved + 1) / 2, fade, change * self.edit_window], dim=1)
        coarse, fade, change = double(double(parts).mT).mT.split([3, 1, 3], dim=1)
        fade = fade.clamp(0, 1)                                        # cubic interpolation overshoots
        edit = torch.cat([coarse * fade + change, 1 - fade], dim=1)                       # (1, 4, 2s-1, 2s-1)
        return edit[0].permute(1, 2, 0), field[0] * self.field_window[..., None]


def double(x):
    """Rows (..., h, w) -> (..., 2h-1, w): between each two rows one by cubic interpolation (a = -0.75)."""
    padded = torch.cat([x[..., :1, :], x, x[..., -1:, :]], dim=-2)
    near, far = x[..., :-1, :] + x[..., 1:, :], padded[..., :-3, :] + padded[..., 3:, :]  # (..., h-1, w)
    between = 0.59375 * near - 0.09375 * far
    pairs = torch.stack([x[..., :-1, :], between], dim=-2).flatten(-3, -2)                # (..., 2h-2, w)
    return torch.cat([pairs, x[..., -1:, :]], dim=-2)


class Mel(nn.Module):
    """audio_features.mel_features for one frame: sound (1, 640 + 2 * CONTEXT) -> (1, 320). By matrices, since
    the runtime has no fast Fourier transform."""

    def __init__(self):
        super().__init__()
        n = torch.arange(audio_features.N_FFT, dtype=torch.float64)
        angle = 2 * torch.pi / len(n) * n[:, None] * n[: len(n) // 2 + 1]
        window = torch.hann_window(len(n), dtype=torch.float64)[:, None]
        self.register_buffer("fourier", (window * torch.cat([angle.cos(), angle.sin()], dim=1)).float())
        self.register_buffer("filters", audio_features.mel_filters())

    def forward(self, wave):
        starts = range(0, wave.shape[-1] - audio_features.N_FFT + 1, audio_features.STEP)
        windows = torch.cat([wave[:, k: k + audio_features.N_FFT] for k in starts])      # (4, N_FFT)
        real, imaginary = (windows @ self.fourier).chunk(2, dim=1)
        mel = (real.square() + imaginary.square()) @ self.filters                        # (4, BINS)
        mel = mel.clamp(min=audio_features.MEL_FLOOR).log10()
        return ((mel - audio_features.MEL_MEAN) / audio_features.MEL_STD).flatten()[None]


class Guided(nn.Module):
    """The generator with classifier-free guidance -> velocity (1, K, L*D)."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, m_t, t, past, reference, audio, guidance, mood=None):
        def twice(x):                                             # with speech, and without
            return None if x is None else x.expand(2, *x.shape[1:])

        inputs = [twice(x) for x in (m_t, t, past, reference, audio)]
        cond, uncond = self.generator(*inputs, drop=torch.tensor([False, True]), mood=twice(mood)).split(1)
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


def graphs(models, steps=1):
    """{"encoder", "decoder", "generator"}, steps of the decoder -> {file name: bytes}, and the number of
    tensors in the reference."""
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
        "mel": (Mel(), [torch.zeros(1, SAMPLES_PER_FRAME + 2 * audio_features.CONTEXT)], ["wave"], ["row"]),
        "reference": (Reference(decoder), [photo, token], ["photo", "token"], names),
        "target": (Target(decoder, spec, steps), [token, *cache], ["token", *names],
                   ["x", "edit", "field"]),
        "generator": (Guided(generator), [new, t, past, token, speech, torch.tensor(1.5)],
                      ["z", "t", "past", "reference", "audio", "guidance"], ["v"])}
    if moods_of(generator):
        jobs["generator"][1].append(torch.zeros(1, g.past + g.window, len(moods_of(generator))))
        jobs["generator"][2].append("mood")
    files = {f"{name}.onnx": to_onnx(*job, weights) for name, job in jobs.items()}
    return {**files, WEIGHTS: bytes(weights.data)}, len(cache)


def labelled(controls):
    """The controls that are read back well enough for a slider, each with its label."""
    return {name: {**controls[name], "label": label} for name, label in LABELS.items() if name in controls
            and controls[name]["correlation"] >= MIN_CORRELATION and controls[name]["gain"] >= MIN_GAIN}


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
    files, count = graphs(models, meta["steps"])
    logging.disable(logging.NOTSET)
    total = sum(map(len, files.values()))
    if total > LIMIT:
        raise InputError(f"{ckpt} is too large for a page: {total / 1e6:.0f} MB of graphs, at most "
                         f"{LIMIT / 1e6:.0f} MB")
    g = models["generator"].config
    silence = float(Mel()(torch.zeros(1, SAMPLES_PER_FRAME + 2 * audio_features.CONTEXT)).mean())
    about = {
        "format": "semo-web-1", "release": Path(ckpt).name, "fingerprint": fingerprint(ckpt),
        "bytes": {name: len(data) for name, data in files.items()}, "cache": count,
        "size": meta["size"], "token": c.num_tokens * c.token_dim,
        "generator": {"window": g.window, "past": g.past, "ahead": g.lookahead, "steps": meta["gen_steps"],
                      "guidance": meta["guidance"], "audio": g.audio_dim, "silence": silence,
                      "moods": moods_of(models["generator"]),
                      "truncated": models["generator"].truncated.T.tolist() if g.truncated else []},
        "mel": {"rate": SAMPLE_RATE, "frame": SAMPLES_PER_FRAME, "context": audio_features.CONTEXT},
        "controls": labelled(meta.get("controls") or fit_controls(models, meta)),
        "example": asdict(frame_photo(open_image(EXAMPLES / "portrait.png"), load_detector())[0]),
    }
    out = Path(out)
    for name, data in files.items():
        with atomic_write(out / name, make_folder=True) as temporary:
            Path(temporary).write_bytes(data)
    with atomic_write(out / "model.json") as temporary:           # last: then all files are there
        Path(temporary).write_text(json.dumps(about))
    return about


def exported(ckpt, out):
    """Whether the folder `out` holds this very release, complete."""
    try:
        about = json.loads((Path(out) / "model.json").read_text())
        return about["fingerprint"] == fingerprint(ckpt) and all(
            (Path(out) / name).stat().st_size == size for name, size in about["bytes"].items())
    except (OSError, ValueError, KeyError):
        return False


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
