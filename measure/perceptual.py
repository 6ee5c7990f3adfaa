"""Measures by trained networks: LPIPS, FID, FVD, lip sync (Sync-C, Sync-D), identity (CSIM), expression.

    measures, absent = load("nets")         what the folder holds, and a sentence for each network it lacks
    measures["lpips"](pred, target)         -> (B,)           Zhang et al. 2018, AlexNet; lower is closer
    measures["inception"](x)                -> (B, 2048)      features for frechet: FID, Heusel et al. 2017
    measures["i3d"](frames)                 -> (F//16, 400)   likewise: FVD, Unterthiner et al. 2018
    measures["syncnet"](frames, wave)       -> sync_c, sync_d, offset; Chung and Zisserman 2016
    measures["csim"](a, b)                  -> (B,)           cosine of two faces' embeddings
    measures["expression"](x)               -> (B, 7)         probabilities of EMOTIONS

Pictures are (B, 3, H, W) float in [-1, 1], a clip's frames (F, 3, H, W) at 25 a second; any other range is
refused, since each of these networks turns it into a number that looks right. Pictures are resized bilinearly
without anti-aliasing, as the published measures do. A face is a detector's box, in shares of the picture.
"""
import math
import warnings
from functools import partial
from pathlib import Path

import cv2
import torch
import torch.nn.functional as F
from torch import nn

from media.files import InputError
from media.image import to_uint8
from media.sound import SAMPLES_PER_FRAME

CLIP = 16                     # frames of an FVD clip
FEW = 50                      # a Frechet distance of fewer clips says more about their number than about them
FACE = (0.2, 0.2, 0.8, 0.8)   # left, top, right, bottom: where data.py puts a face
PUBLISHED = {                 # what each network measures, its files, and where they come from
    "lpips": ("LPIPS", {
        "alexnet-owt-7be5be79.pth": "https://download.pytorch.org/models",
        "alex.pth": "https://github.com/richzhang/PerceptualSimilarity/tree/master/lpips/weights/v0.1"}),
    "inception": ("FID", {
        "inception-2015-12-05.pt":
            "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics"}),
    "i3d": ("FVD", {
        "i3d_torchscript.pt": "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt"}),
    "syncnet": ("Sync-C and Sync-D", {
        "syncnet_v2.model": "http://www.robots.ox.ac.uk/~vgg/software/lipsync/data"}),
    "csim": ("CSIM", {
        "MobileFaceNet.onnx": "weights/ of https://github.com/foamliu/MobileFaceNet and its forks"}),
    "expression": ("expression", {
        "facial_expression_recognition_mobilefacenet_2022july.onnx":
            "https://github.com/opencv/opencv_zoo/tree/main/models/facial_expression_recognition"}),
}
# its classes in the words and the order of EMOTIONS: theirs are angry, disgust, fearful, happy, neutral, ...
EXPRESSIONS = [4, 3, 5, 0, 2, 1, 6]


def check(x):
    """Refuse (ValueError) what is not pictures (B, 3, H, W) in [-1, 1], also if it only looks like [0, 1]."""
    if x.ndim != 4 or x.shape[1] != 3 or not len(x):
        raise ValueError(f"pictures of shape {tuple(x.shape)}; give (B, 3, H, W)")
    if not x.is_floating_point():
        raise ValueError(f"pictures of {x.dtype}; give floats in [-1, 1]")
    low, high = x.min().item(), x.max().item()
    if not (low >= -1.05 and high <= 1.05):                                       # false for not-a-number too
        raise ValueError(f"pictures from {low:.4g} to {high:.4g}; give them in [-1, 1]")
    if low >= 0 and len(x) > 2:
        raise ValueError(f"{len(x)} pictures, nothing below 0: they look like [0, 1]; give them in [-1, 1]")


def crop(x, face, size, scale=1.0):
    """Cut the square over a face box -> (B, 3, size, size); what lies outside the picture is grey.

    It starts at the top of the square round the box and is `scale` times as large, to the sides and down.
    """
    h, w = x.shape[2:]
    left, top, right, bottom = face[0] * w, face[1] * h, face[2] * w, face[3] * h
    box = max(right - left, bottom - top)
    width = round(scale * box)
    if width < 1 or min(right, bottom) <= 0 or left >= w or top >= h:
        raise InputError(f"face {tuple(face)} holds no pixel; give left, top, right, bottom as shares")
    x0, y0 = round((left + right - scale * box) / 2), round((top + bottom - box) / 2)
    x = F.pad(x, (-x0, x0 + width - w, -y0, y0 + width - h), value=110 / 127.5 - 1)    # negative padding cuts
    return F.interpolate(x, (size, size), mode="bilinear")


def in_parts(net, x, size, device):
    """Run net on x (n, ...), `size` items at a time, on the device -> its outputs, on the CPU."""
    return torch.cat([net(part.to(device)).float().cpu() for part in x.split(size)])


def frechet(a, b):
    """Compute the Frechet distance of the Gaussians fitted to two sets of features (n, d), (m, d).

    |ma - mb|^2 + tr(Sa + Sb - 2 (Sa Sb)^1/2), covariances over n - 1. Of centred rows A, B the last trace is
    the sum of the singular values of A B^T: no square root of a d x d matrix, which is singular with fewer
    rows than columns. Frames of one clip are near copies: how far to trust a distance, the number of clips
    says, not that of the features.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Frechet distance of {len(a)} and {len(b)} samples; give at least 2 of each")
    a, b = a.double(), b.double()
    mean, factors = (a.mean(0) - b.mean(0)).square().sum(), []
    for x in (a, b):
        x = (x - x.mean(0)) / math.sqrt(len(x) - 1)
        if len(x) > x.shape[1]:
            x = torch.linalg.qr(x, mode="r").R                                  # the same x^T x, of d rows
        factors.append(x)
    both = factors[0].square().sum() + factors[1].square().sum()
    return max(0.0, (mean + both - 2 * torch.linalg.svdvals(factors[0] @ factors[1].T).sum()).item())


def script(net, x, file, width, size, device, **options):
    """Run a TorchScript network -> features (n, width). InputError if they are of another width."""
    features = in_parts(lambda part: net(part, return_features=True, **options), x, size, device)
    if features.shape != (len(x), width):
        raise InputError(f"{file} gave {tuple(features.shape)} for {len(x)} inputs; get it anew")
    return features


def inception(net, x, device="cpu"):
    """Pictures -> (B, 2048). The network takes bytes of any size and resizes them as the first FID did."""
    check(x)
    return script(net, to_uint8(x), "inception-2015-12-05.pt", 2048, 32, device)


def i3d(net, frames, device="cpu"):
    """Frames of a clip -> (F//16, 400), logits of Kinetics-400; the rest after the last 16 is not used."""
    check(frames)
    n = len(frames) // CLIP
    if n == 0:
        return torch.zeros(0, 400)
    segments = F.interpolate(frames[: n * CLIP].float(), (224, 224), mode="bilinear")
    segments = segments.unflatten(0, (n, CLIP)).transpose(1, 2)                         # (n, 3, 16, 224, 224)
    return script(net, segments, "i3d_torchscript.pt", 400, 4, device, rescale=False, resize=False)


class Lpips(nn.Module):
    """AlexNet up to its last convolution, and weights of its channels; parameters named as published."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU())
        for k, width in enumerate((64, 192, 384, 256, 256)):
            linear = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{k}", nn.ModuleDict({"model": linear}))

    def forward(self, a, b):
        shift, scale = (torch.tensor(v, device=a.device).view(3, 1, 1)
                        for v in ([-.030, -.088, -.188], [.458, .448, .450]))
        a, b, stage, total = (a - shift) / scale, (b - shift) / scale, 0, 0
        for layer in self.features:
            a, b = layer(a), layer(b)
            if isinstance(layer, nn.ReLU):                                     # the channels to unit length
                ua, ub = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
                total = total + getattr(self, f"lin{stage}")["model"]((ua - ub).square()).mean((1, 2, 3))
                stage += 1
        return total                                                                                 # (B,)


def lpips(net, pred, target, device="cpu"):
    """Two sets of pictures -> (B,)."""
    check(pred)
    check(target)
    pairs = torch.cat([pred, target], 1).float()                                                # (B, 6, H, W)
    return in_parts(lambda part: net(part[:, :3], part[:, 3:]), pairs, 16, device)


class SyncNet(nn.Module):
    """Five frames of a mouth (B, 3, 5, 224, 224), and 0.2 s of sound (B, 1, 13, 20) -> (B, 1024) each."""

    def __init__(self):
        super().__init__()

        def conv(kind, norm, before, width, kernel, stride=1, padding=0):
            return [kind(before, width, kernel, stride, padding), norm(width), nn.ReLU()]

        flat, deep = partial(conv, nn.Conv2d, nn.BatchNorm2d), partial(conv, nn.Conv3d, nn.BatchNorm3d)
        same, pool = (0, 1, 1), partial(nn.MaxPool3d, (1, 3, 3), (1, 2, 2))
        self.netcnnaud = nn.Sequential(
            *flat(1, 64, 3, 1, 1), nn.Identity(), *flat(64, 192, 3, 1, 1), nn.MaxPool2d(3, (1, 2)),
            *flat(192, 384, 3, 1, 1), *flat(384, 256, 3, 1, 1), *flat(256, 256, 3, 1, 1), nn.MaxPool2d(3, 2),
            *flat(256, 512, (5, 4)))
        self.netcnnlip = nn.Sequential(
            *deep(3, 96, (5, 7, 7), (1, 2, 2)), pool(),
            *deep(96, 256, (1, 5, 5), (1, 2, 2), same), pool(padding=same),
            *deep(256, 256, (1, 3, 3), 1, same), *deep(256, 256, (1, 3, 3), 1, same),
            *deep(256, 256, (1, 3, 3), 1, same), pool(),
            *deep(256, 512, (1, 6, 6)))
        self.netfcaud, self.netfclip = (
            nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024))
            for _ in range(2))

    def lip(self, x):
        return self.netfclip(self.netcnnlip(x).flatten(1))

    def sound(self, x):
        return self.netfcaud(self.netcnnaud(x).flatten(1))


def mfcc(wave):
    """Sound (S,) in [-1, 1] at 16 kHz -> (n, 13) cepstral coefficients, 100 a second; the first: log energy.

    Those that SyncNet was trained on (python_speech_features with its defaults): whole numbers of 16 bits,
    pre-emphasis 0.97, 25 ms frames without a window, 26 triangles on a mel scale cut to whole bins of 512,
    lifter 22.
    """
    x = (wave.double().cpu() * 32768).round().clamp(-32768, 32767)
    x = torch.cat([x[:1], x[1:] - 0.97 * x[:-1]])
    x = F.pad(x, (0, 400 + 160 * max(0, math.ceil((len(x) - 400) / 160)) - len(x)))
    power = torch.fft.rfft(x.unfold(0, 400, 160), 512).abs().square() / 512                         # (n, 257)
    mels = torch.linspace(0, 2595 * math.log10(1 + 8000 / 700), 28, dtype=torch.float64)
    edge = (513 / 16000 * 700 * (10 ** (mels / 2595) - 1)).floor()[:, None]                          # (28, 1)
    bins, gap = torch.arange(257).double(), edge.diff(dim=0)
    bank = torch.minimum((bins - edge[:-2]) / gap[:-1], (edge[2:] - bins) / gap[1:]).clamp(min=0)  # (26, 257)
    log = [torch.where(e == 0, torch.finfo(e.dtype).eps, e).log()
           for e in (power.sum(1, keepdim=True), power @ bank.T)]
    k = torch.arange(1, 13).double()[:, None]
    cosine = (math.pi / 26 * k * (torch.arange(26) + 0.5)).cos() / math.sqrt(13)                    # (12, 26)
    return torch.cat([log[0], log[1] @ (cosine * (1 + 11 * (math.pi * k / 22).sin())).T], 1)


def match(lips, sounds, reach=15):
    """Compare embeddings (n, d) of frames and sound -> Sync-C, Sync-D, offset (frames the picture is late).

    D is the least over shifts of the mean distance, C the median less that. As published the sound is silent
    (zeros) beyond its ends, so of clips under some 50 frames most shifts compare with nothing.
    """
    sounds = F.pad(sounds, (0, 0, reach, reach))
    distance = torch.stack([F.pairwise_distance(lips, sounds[k: k + len(lips)]).mean()
                            for k in range(2 * reach + 1)])
    least, at = distance.min(0)
    return {"sync_c": (distance.median() - least).item(), "sync_d": least.item(), "offset": reach - at.item()}


def syncnet(net, frames, wave, face=FACE, device="cpu"):
    """Measure frames of a clip and its sound (S,) or (1, S) in [-1, 1] at 16 kHz -> Sync-C, Sync-D, offset.

    face: one box for the clip, cut as the published pipeline does. That also codes frames as JPEG, which is
    left out here; so real clips measured the same way are the scale, not a number from a paper.
    """
    check(frames)
    count = min(len(frames), wave.shape[-1] // SAMPLES_PER_FRAME) - 5                  # windows, as published
    if count < 1:
        raise InputError(f"{len(frames)} frames and {wave.shape[-1]} samples are too short for lip sync; "
                         "give at least 6 frames")
    windows = to_uint8(crop(frames.float(), face, 224, 1.4)).flip(1).float()                             # BGR
    windows = windows.unfold(0, 5, 1)[:count].permute(0, 1, 4, 2, 3)                     # (n, 3, 5, 224, 224)
    sounds = mfcc(wave.flatten()).float().unfold(0, 20, 4)[:count, None]                      # (n, 1, 13, 20)
    return match(in_parts(net.lip, windows, 20, device), in_parts(net.sound, sounds, 20, device))


def embed(net, x, face, mean=(.485, .456, .406), std=(.229, .224, .225)):
    """Faces -> (B, d), one at a time: MobileFaceNet joins the embeddings of a batch into one."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    embeddings = []
    for one in ((crop(x.float(), face, 112).cpu() + 1) / 2 - mean) / std:
        net.setInput(one[None].numpy())
        embeddings.append(torch.from_numpy(net.forward().copy()).flatten())
    return torch.stack(embeddings)


def csim(net, a, b, face=FACE):
    """Compute the cosine of the embeddings of a (B or 1) and b (B) -> (B,); 1 means the same face.

    One box for all. Faces are not turned upright, so a turned head costs some, with true frames too.
    """
    check(a)
    check(b)
    return F.cosine_similarity(embed(net, a, face), embed(net, b, face))


def expression(net, x, face=FACE):
    """Recognise the expressions of faces -> probabilities (B, 7) in the order of EMOTIONS.

    Published for faces turned upright by five points. Here one box for all is cut, raised by 7% of its
    height: eyes and mouth of YuNet's boxes (medians of 24 photos) are then within 2 pixels of those points.
    """
    check(x)
    left, top, right, bottom = face
    up = 0.07 * (bottom - top)
    logits = embed(net, x, (left, top - up, right, bottom - up), (.5, .5, .5), (.5, .5, .5))
    return logits[:, EXPRESSIONS].softmax(1)


def load_network(net, weights, path):
    """Put all weights by name into net. InputError names the file."""
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{path} does not hold this network's weights; get it anew") from error
    return net.eval().requires_grad_(False)


def read(path, device):
    """Open a published file: a state dict (only tensors are unpickled), or TorchScript. Raises InputError."""
    try:
        if path.suffix != ".pt":                                    # as a dict it may lack BatchNorm's counts
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                         # TorchScript is deprecated, and published
            net = torch.jit.load(path, map_location=device).eval()
    except Exception as error:                                             # a damaged file fails in many ways
        raise InputError(f"{path} cannot be read; get it anew") from error
    if "return_features" not in [argument.name for argument in net.forward.schema.arguments]:
        raise InputError(f"{path} gives no features; get it anew")
    return net


def read_faces(path):
    """Open an ONNX face recogniser for pictures of 112 x 112. Raises InputError."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    try:
        net = cv2.dnn.readNetFromONNX(str(path))
        embed(net, torch.zeros(1, 3, 112, 112), FACE)
    except cv2.error as error:
        raise InputError(f"{path} is not a face recogniser that OpenCV can read; get it anew") from error
    return net


def load(folder, device="cpu"):
    """Load the networks of a folder, or None -> {name: function}, sentences about the absent. InputError."""
    if not folder:
        return {}, ["LPIPS, FID, FVD, Sync and CSIM need published networks: --networks DIR"]
    nets, absent = {}, []
    for name, (measure, files) in PUBLISHED.items():
        paths = [Path(folder, file) for file in files]
        lacking = [f"{path.name} (from {files[path.name]})" for path in paths if not path.is_file()]
        if lacking:
            absent.append(f"no {measure}: {folder} has no {' and no '.join(lacking)}")
        elif name == "lpips":
            trunk, linear = (read(path, device) for path in paths)
            trunk = {key: value for key, value in trunk.items() if not key.startswith("classifier.")}
            net = load_network(Lpips(), trunk | linear, " + ".join(map(str, paths))).to(device)
            nets[name] = partial(lpips, net, device=device)
        elif name == "syncnet":
            net = load_network(SyncNet(), read(paths[0], device), paths[0]).to(device)
            nets[name] = partial(syncnet, net, device=device)
        elif name in ("csim", "expression"):
            nets[name] = partial({"csim": csim, "expression": expression}[name], read_faces(paths[0]))
        else:
            measure = {"inception": inception, "i3d": i3d}[name]
            nets[name] = partial(measure, read(paths[0], device), device=device)
    return nets, absent
