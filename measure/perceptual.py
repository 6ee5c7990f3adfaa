"""The measures of pictures that need a trained network: LPIPS, FID, FVD, lip sync (Sync-C, Sync-D), identity
(CSIM).

    measures, absent = load("nets")         what the folder holds, and a sentence for each network it does not
                                            hold
    measures["lpips"](made, true)           -> (B,)           Zhang et al. 2018, AlexNet; lower is closer
    measures["inception"](x)                -> (B, 2048)      rows for frechet: FID, Heusel et al. 2017
    measures["i3d"](frames)                 -> (F//16, 400)   rows for frechet: FVD, Unterthiner et al. 2018
    measures["syncnet"](frames, wave)       -> sync_c, sync_d, offset; Chung and Zisserman 2016
    measures["csim"](a, b)                  -> (B,)           cosine of two faces' embeddings

Pictures are (B, 3, H, W) float in [-1, 1], a clip's frames (F, 3, H, W) at 25 a second; any other range is
refused, since each of these networks turns it into a number that looks right. Wherever a picture is resized
here, it is bilinear without anti-aliasing, as the published measures do. A face is a detector's box, its
sides as shares of the picture's.
"""
import math
import warnings
from functools import partial
from pathlib import Path

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
    "lpips": ("LPIPS", {"alexnet-owt-7be5be79.pth": "https://download.pytorch.org/models",
                        "alex.pth": "https://github.com/richzhang/PerceptualSimilarity/tree/master/lpips/weights/v0.1"}),
    "inception": ("FID", {"inception-2015-12-05.pt":
                          "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics"}),
    "i3d": ("FVD", {"i3d_torchscript.pt": "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt"}),
    "syncnet": ("Sync-C and Sync-D",
                {"syncnet_v2.model": "http://www.robots.ox.ac.uk/~vgg/software/lipsync/data"}),
    "csim": ("CSIM", {"MobileFaceNet.onnx": "weights/ of https://github.com/foamliu/MobileFaceNet and its "
                                            "forks"}),
}


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
        raise ValueError(f"{len(x)} pictures and nothing below 0: they look like [0, 1]; give "
                         f"them in [-1, 1]")


def crop(x, face, size, wide=1.0):
    """The square over a face box -> (B, 3, size, size); what lies outside the picture is grey.

    It starts at the top of the square round the box and is `wide` times as large, to the sides and downwards.
    """
    h, w = x.shape[2:]
    left, top, right, bottom = face[0] * w, face[1] * h, face[2] * w, face[3] * h
    half, side = max(right - left, bottom - top) / 2, round(wide * max(right - left, bottom - top))
    if side < 1 or min(right, bottom) <= 0 or left >= w or top >= h:
        raise InputError(f"face {tuple(face)} holds no pixel; give left, top, right, bottom as shares of the "
                         f"picture's sides")
    x0, y0 = round((left + right) / 2 - wide * half), round((top + bottom) / 2 - half)
    x = F.pad(x, (-x0, x0 + side - w, -y0, y0 + side - h), value=110 / 127.5 - 1)      # negative padding cuts
    return F.interpolate(x, (size, size), mode="bilinear")


def in_parts(net, x, size, device):
    """net on x (n, ...), `size` rows at a time, each moved to the device -> its rows, on the CPU."""
    return torch.cat([net(part.to(device)).float().cpu() for part in x.split(size)])


def frechet(a, b):
    """Frechet distance of the Gaussians fitted to two sets of features (n, d), (m, d).

    |ma - mb|^2 + tr(Sa + Sb - 2 (Sa Sb)^1/2), covariances over n - 1. Of centred rows A, B the last trace is
    the sum of the singular values of A B^T: no square root of a d x d matrix, which is singular with fewer
    rows than columns.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Frechet distance of {len(a)} and {len(b)} samples; give at least 2 of each")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}; give (n, d) and (m, d)")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features that are not finite have no Frechet distance; look at the pictures they "
                         "come from")
    a, b = a.double(), b.double()
    mean, factors = (a.mean(0) - b.mean(0)).square().sum(), []
    for x in (a, b):
        x = (x - x.mean(0)) / math.sqrt(len(x) - 1)
        # same x^T x, at most d rows
        factors.append(torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x)
    both = factors[0].square().sum() + factors[1].square().sum()
    return max(0.0, (mean + both - 2 * torch.linalg.svdvals(factors[0] @ factors[1].T).sum()).item())


def frechet_text(a, b, clips):
    """The distance to print, never without its number of clips: frames or pieces of one clip are near copies,
    so that number, not that of the rows, says how far to trust it."""
    if not 1 <= clips <= min(len(a), len(b)):
        raise ValueError(f"{clips} clips cannot give {len(a)} and {len(b)} rows; give the number of clips of "
                         f"the smaller set")
    return f"{frechet(a, b):.1f} (n={clips} clips{': few' if clips < FEW else ''})"


def script(net, x, file, width, size, device, **options):
    """Rows of a TorchScript network. InputError if they are not of its width."""
    rows = in_parts(lambda part: net(part, return_features=True, **options), x, size, device)
    if rows.shape != (len(x), width):
        raise InputError(f"{file} gave {tuple(rows.shape)} for {len(x)} inputs, not {width} features each; "
                         f"get it anew")
    return rows


@torch.no_grad()
def inception(net, x, device="cpu"):
    """Pictures -> (B, 2048). The file takes bytes of any size and resizes them itself, as the first FID
    did."""
    check(x)
    return script(net, to_uint8(x), "inception-2015-12-05.pt", 2048, 32, device)


def cut(frames):
    """Frames of a clip (F, 3, H, W) -> (F//16, 3, 16, H, W): no frame twice, the rest at the end left out."""
    n = len(frames) // CLIP
    return frames[: n * CLIP].unflatten(0, (n, CLIP)).transpose(1, 2)


@torch.no_grad()
def i3d(net, frames, device="cpu"):
    """Frames of a clip -> (F//16, 400), logits of Kinetics-400; none of a clip under 16 frames."""
    check(frames)
    if len(frames) < CLIP:
        return torch.zeros(0, 400)
    segments = cut(F.interpolate(frames.float(), (224, 224), mode="bilinear"))
    return script(net, segments, "i3d_torchscript.pt", 400, 4, device, rescale=False, resize=False)


class Lpips(nn.Module):
    """AlexNet up to its last convolution, and a weight for each channel of its five stages; parameters named
    as published."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU())
        for k, width in enumerate((64, 192, 384, 256, 256)):
            self.add_module(f"lin{k}", nn.ModuleDict({"model": nn.Sequential(nn.Identity(),
                nn.Conv2d(width, 1, 1, bias=False))}))

    def forward(self, a, b):
        shift, scale = (torch.tensor(v, device=a.device).view(3, 1, 1)
                        for v in ([-.030, -.088, -.188], [.458, .448, .450]))
        a, b, stage, total = (a - shift) / scale, (b - shift) / scale, 0, 0
        for layer in self.features:
            a, b = layer(a), layer(b)
            if isinstance(layer, nn.ReLU):
                # unit length, each pixel
                ua, ub = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
                total = total + getattr(self, f"lin{stage}")["model"]((ua - ub).square()).mean((1, 2, 3))
                stage += 1
        return total                                                                                 # (B,)


@torch.no_grad()
def lpips(net, pred, target, device="cpu"):
    """Two sets of pictures -> (B,)."""
    check(pred)
    check(target)
    if pred.shape != target.shape:
        raise ValueError(f"pictures of shapes {tuple(pred.shape)} and {tuple(target.shape)}; give the same")
    pairs = torch.cat([pred, target], 1).float()                                                # (B, 6, H, W)
    return in_parts(lambda part: net(part[:, :3], part[:, 3:]), pairs, 16, device)


class SyncNet(nn.Module):
    """Five frames of a mouth (B, 3, 5, 224, 224), and 0.2 s of sound (B, 1, 13, 20) -> (B, 1024) each."""

    def __init__(self):
        super().__init__()

        def conv(kind, norm, before, width, kernel, stride=1, padding=0):
            return [kind(before, width, kernel, stride, padding), norm(width), nn.ReLU()]

        flat, deep = partial(conv, nn.Conv2d, nn.BatchNorm2d), partial(conv, nn.Conv3d, nn.BatchNorm3d)
        side, pool = (0, 1, 1), partial(nn.MaxPool3d, (1, 3, 3), (1, 2, 2))
        self.netcnnaud = nn.Sequential(
            *flat(1, 64, 3, 1, 1), nn.Identity(), *flat(64, 192, 3, 1, 1), nn.MaxPool2d(3, (1, 2)),
            *flat(192, 384, 3, 1, 1),
            *flat(384, 256, 3, 1, 1), *flat(256, 256, 3, 1, 1), nn.MaxPool2d(3, 2), *flat(256, 512, (5, 4)))
        self.netcnnlip = nn.Sequential(
            *deep(3, 96, (5, 7, 7), (1, 2, 2)), pool(), *deep(96, 256, (1, 5, 5), (1, 2, 2), side),
            pool(padding=side),
            *deep(256, 256, (1, 3, 3), 1, side), *deep(256, 256, (1, 3, 3), 1, side),
            *deep(256, 256, (1, 3, 3), 1, side), pool(), *deep(256, 512, (1, 6, 6)))
        self.netfcaud, self.netfclip = (
            nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024))
            for _ in range(2))

    def lip(self, x):
        return self.netfclip(self.netcnnlip(x).flatten(1))

    def sound(self, x):
        return self.netfcaud(self.netcnnaud(x).flatten(1))


def mfcc(wave):
    """Sound (S,) in [-1, 1] at 16 kHz -> (n, 13) cepstral coefficients, 100 a second, the first the log
    energy.

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
    """Embeddings (n, d) of frames and of sound -> Sync-C, Sync-D, and by how many frames the picture is late.

    D is the least over shifts of the mean distance, C the median less that. As published the sound is silent
    (zeros) beyond its ends, so of clips under some 50 frames most shifts compare with nothing.
    """
    sounds = F.pad(sounds, (0, 0, reach, reach))
    distance = torch.stack([F.pairwise_distance(lips, sounds[k: k + len(lips)]).mean()
                            for k in range(2 * reach + 1)])
    least, at = distance.min(0)
    return {"sync_c": (distance.median() - least).item(), "sync_d": least.item(), "offset": reach - at.item()}


@torch.no_grad()
def syncnet(net, frames, wave, face=FACE, device="cpu"):
    """Frames of a clip (25 a second) and its sound (S,) or (1, S) in [-1, 1] at 16 kHz -> Sync-C, Sync-D,
    offset.

    face: one box for the clip; the square cut is that of the published pipeline. That also codes frames as
    JPEG, which is left out here; so real clips measured the same way are the scale, not a number from a
    paper.
    """
    check(frames)
    count = min(len(frames), wave.shape[-1] // SAMPLES_PER_FRAME) - 5                  # windows, as published
    if count < 1:
        raise InputError(f"{len(frames)} frames and {wave.shape[-1]} samples are too short for lip sync; "
                         f"give at least 6 frames")
    if not wave.is_floating_point() or wave.numel() != wave.shape[-1] or not wave.abs().max() <= 1.05:
        raise ValueError(f"sound of shape {tuple(wave.shape)} and {wave.dtype}; give one channel of floats "
                         f"in [-1, 1] at 16 kHz")
    windows = to_uint8(crop(frames.float(), face, 224, 1.4)).flip(1).float()                             # BGR
    windows = windows.unfold(0, 5, 1)[:count].permute(0, 1, 4, 2, 3)                     # (n, 3, 5, 224, 224)
    sounds = mfcc(wave.flatten()).float().unfold(0, 20, 4)[:count, None]                      # (n, 1, 13, 20)
    return match(in_parts(net.lip, windows, 20, device), in_parts(net.sound, sounds, 20, device))


def embed(net, x, face):
    """Faces -> (B, d), one at a time: this file joins the rows of a batch into one."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([.485, .456, .406], [.229, .224, .225]))
    rows = []
    for one in ((crop(x.float(), face, 112).cpu() + 1) / 2 - mean) / std:
        net.setInput(one[None].numpy())
        rows.append(torch.from_numpy(net.forward().copy()).flatten())
    return torch.stack(rows)


@torch.no_grad()
def csim(net, a, b, face=FACE):
    """Cosine of the embeddings of a (B or 1) and b (B) -> (B,). One box for all; 1 means the same face.

    The face is not turned upright before; so a turned head costs some, with true frames too: print their
    number beside.
    """
    check(a)
    check(b)
    if len(a) not in (1, len(b)):
        raise ValueError(f"{len(a)} and {len(b)} pictures to compare; give as many of each, or one first")
    return F.cosine_similarity(embed(net, a, face), embed(net, b, face))


def load_network(net, weights, path):
    """Put all weights by name into net. InputError names the file."""
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{path} does not hold this network's weights; get it anew") from error
    return net.eval().requires_grad_(False)


def read(path, device):
    """A published file: a state dict (only tensors are unpickled), or TorchScript. InputError if it is
    neither."""
    try:
        if path.suffix != ".pt":                                                 # alex.pth was saved on a GPU
            # a plain dict may lack BatchNorm's counts
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
    """An ONNX face recogniser for pictures of 112 x 112."""
    import cv2
    # version 5 warns of a setting of its own
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    try:
        net = cv2.dnn.readNetFromONNX(str(path))
        embed(net, torch.zeros(1, 3, 112, 112), FACE)
    except cv2.error as error:
        raise InputError(f"{path} is not a face recogniser that OpenCV can read; get it anew") from error
    return net


def load(folder, device="cpu"):
    """-> {name: function} of the networks in the folder, and for each that is absent a sentence. InputError
    names a bad file."""
    nets, absent = {}, []
    for name, (measure, files) in PUBLISHED.items():
        paths = [Path(folder, file) for file in files]
        lacking = [f"{path.name} (from {files[path.name]})" for path in paths if not path.is_file()]
        if lacking:
            absent.append(f"no {measure}: {folder} has no {' and no '.join(lacking)}")
        elif name == "lpips":
            trunk = {key: value for key,
                     value in read(paths[0], device).items() if not key.startswith("classifier.")}
            nets[name] = partial(lpips,
                                 load_network(Lpips(), trunk | read(paths[1], device),
                                              " + ".join(map(str, paths))).to(device),
                                  device=device)
        elif name == "syncnet":
            nets[name] = partial(syncnet,
                                 load_network(SyncNet(), read(paths[0], device), paths[0]).to(device),
                                 device=device)
        elif name == "csim":
            try:
                nets[name] = partial(csim, read_faces(paths[0]))
            except ImportError:
                absent.append("no CSIM: it needs OpenCV; pip install opencv-python-headless")
        else:
            nets[name] = partial({"inception": inception, "i3d": i3d}[name], read(paths[0], device),
                                 device=device)
    return nets, absent
