"""perceptual.py: every measure against a direct computation, on small random networks of the same formats."""
import copy
import math
import os
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from measure import perceptual
from measure.perceptual import frechet
from media.files import InputError
from media.image import to_uint8

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(n=3, size=64, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class TinyInception(nn.Module):
    """Says what it was given: mean bytes of the three colours, the least and the greatest byte."""

    def __init__(self, width: int = 2048):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.width = width

    def forward(self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False):
        assert img.dtype == torch.uint8
        x = img.float()
        said = torch.cat([x.mean((2, 3)), x.amin((1, 2, 3))[:, None], x.amax((1, 2, 3))[:, None]], 1)
        return F.pad(said, (0, self.width - 5)) * self.weight if return_features else said


class TinyI3D(nn.Module):
    """Says what it was given: the mean of each frame, its size, and its flags."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(400))

    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = True,
                return_features: bool = False):
        flags = torch.tensor([x.shape[3], x.shape[4], int(rescale), int(resize)], dtype=x.dtype)
        said = torch.cat([x.mean((1, 3, 4)), flags.expand(len(x), 4)], 1)
        return F.pad(said, (0, 380)) * self.weight if return_features else said


class NoFeatures(nn.Module):
    def forward(self, x: torch.Tensor):
        return x


def script(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))


def field(number, value):
    """One field of a protocol buffer: a number, or text, bytes, or a list of fields."""
    def varint(n):
        return bytes([n]) if n < 128 else bytes([n % 128 + 128]) + varint(n // 128)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, list):
        value = b"".join(value)
    elif isinstance(value, str):
        value = value.encode()
    return varint(number << 3 | 2) + varint(len(value)) + value


EXPRESSION = "facial_expression_recognition_mobilefacenet_2022july.onnx"


def save_onnx(path):
    """An ONNX network 1 x 3 x 112 x 112 -> 1 x 3: the mean of each colour."""
    def tensor(name, *shape):
        sizes = [field(1, [field(1, n)]) for n in shape]
        return [field(1, name), field(2, [field(1, [field(1, 1), field(2, sizes)])])]
    nodes = [field(1, [field(1, a), field(2, b), field(3, b), field(4, kind)])
             for a, b, kind in (("x", "y", "GlobalAveragePool"), ("y", "z", "Flatten"))]
    graph = nodes + [field(2, "g"), field(11, tensor("x", 1, 3, 112, 112)), field(12, tensor("z", 1, 3))]
    path.write_bytes(b"".join([field(1, 8), field(7, graph), field(8, [field(1, ""), field(2, 13)])]))


def scatter(net):
    """Random weights and statistics, so that no layer passes for another."""
    for k, (name, x) in enumerate(net.state_dict().items()):
        if x.is_floating_point():
            near, noise = 1.0 if name.endswith("running_var") else 0.0, draws(*x.shape, seed=k)
            x.copy_(near + 0.2 * noise.clamp(-2, 2) if x.ndim < 2 else noise * (2 / x[0].numel()) ** 0.5)
    return net.eval()


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """A folder of all files, as they are published."""
    folder = tmp_path_factory.mktemp("nets")
    script(TinyInception(), folder / "inception-2015-12-05.pt")
    script(TinyI3D(), folder / "i3d_torchscript.pt")
    weights = scatter(perceptual.Lpips()).state_dict()
    trunk = {name: x for name, x in weights.items() if name.startswith("features.")}
    torch.save(trunk | {"classifier.1.weight": torch.zeros(2, 2)}, folder / "alexnet-owt-7be5be79.pth")
    with pytest.MonkeyPatch.context() as patch:                         # the published one was saved on a GPU
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        linear = {name: x.abs() for name, x in weights.items() if name.startswith("lin")}
        torch.save(linear, folder / "alex.pth")
    weights = scatter(perceptual.SyncNet()).state_dict()
    torch.save({name: x for name, x in weights.items() if "num_batches" not in name},
               folder / "syncnet_v2.model")
    for file in ("MobileFaceNet.onnx", EXPRESSION):
        save_onnx(folder / file)
    return folder


@pytest.fixture(scope="module")
def measures(nets):
    """Loaded from it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")                           # TorchScript's deprecation is not the user's
        found, absent = perceptual.load(nets)
    assert list(found) == ["lpips", "inception", "i3d", "syncnet", "csim", "expression"] and not absent
    return found


# -------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("x, word", [
    ((pictures() + 1).mul(127.5).byte(), "uint8"), ((pictures() + 1) * 127.5, "from"),
    (pictures() + 0.08, "from"), (pictures() - 0.08, "from"), (pictures() / 2 + 0.5, "[0, 1]"),
    (pictures() * float("nan"), "nan"), (pictures()[0], "shape"), (pictures()[:, :1], "shape"),
    (pictures()[:0], "shape")])
def test_other_ranges_and_shapes_are_refused_by_every_measure(x, word):
    for call in (perceptual.check, lambda x: perceptual.inception(None, x), lambda x: perceptual.i3d(None, x),
                 lambda x: perceptual.lpips(None, x, x), lambda x: perceptual.lpips(None, pictures(), x),
                 lambda x: perceptual.syncnet(None, x, torch.zeros(1, 9600)),
                 lambda x: perceptual.csim(None, x, x), lambda x: perceptual.csim(None, pictures(), x),
                 lambda x: perceptual.expression(None, x)):
        with pytest.raises(ValueError) as error:
            call(x)
        assert word in str(error.value) and "give" in str(error.value) and "\n" not in str(error.value)


def test_what_is_in_range_passes():
    perceptual.check(pictures())
    perceptual.check(pictures() * 1.05)                                  # filters ring a little
    perceptual.check(pictures(2) / 2 + 0.5)                              # two light pictures may be just that
    perceptual.check(-torch.ones(3, 3, 8, 8))
    perceptual.check(pictures().half())


# ------------------------------------------------------------------------------------------- Frechet distance
def exactly(mean, covariance, n, seed=0):
    """n samples whose own mean (d,) and covariance (d, d) are those given."""
    x = draws(n, len(mean), seed=seed).double()
    x = torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(n - 1)                 # columns still sum to zero
    return x @ torch.linalg.cholesky(covariance).T + mean


def by_eigenvalues(a, b):
    """numpy, through the symmetric square root of one covariance."""
    a, b = a.double().numpy(), b.double().numpy()
    sa, sb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(sa)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sb @ root).clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sa) + np.trace(sb) - 2 * cross


def test_frechet_distance_of_known_gaussians():
    d = torch.float64
    a = exactly(torch.tensor([1, 0, 2], dtype=d), torch.tensor([1, 4, 9], dtype=d).diag(), 20)
    b = exactly(torch.tensor([0, 0, 0], dtype=d), torch.tensor([4, 4, 1], dtype=d).diag(), 31, seed=1)
    assert frechet(a, b) == pytest.approx(5 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2, abs=1e-9)
    turn = torch.linalg.qr(draws(3, 3).double()).Q                          # no change in a turned frame
    assert frechet(a @ turn, b @ turn) == pytest.approx(10, abs=1e-9)
    assert frechet(a, a + torch.tensor([0, 3.0, 4.0])) == pytest.approx(25, abs=1e-9)
    assert frechet(a, 2 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(1 + 4 + 9, abs=1e-9)


@pytest.mark.parametrize("n, m, d", [(60, 80, 12), (9, 7, 30), (40, 6, 20)])
def test_frechet_distance_by_eigenvalues(n, m, d):
    mix = draws(d, d, seed=2)
    a, b = draws(n, d) @ mix, draws(m, d, seed=1) + 0.3
    # of singular covariances the roots are less exact
    assert frechet(a, b) == pytest.approx(by_eigenvalues(a, b), rel=1e-6)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-12)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_few_samples_with_nothing_in_common():
    """They spread in different columns: no cross term, only the variances and the means are left."""
    a, b = F.pad(draws(5, 20), (0, 30)), F.pad(draws(7, 30, seed=1), (20, 0))
    want = a.var(0).sum() + b.var(0).sum() + (a.mean(0) - b.mean(0)).square().sum()
    assert frechet(a, b) == pytest.approx(want.item(), rel=1e-6)


def test_frechet_distance_is_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Features(nn.Module):
        num_features = 12

        def forward(self, x):
            return F.adaptive_avg_pool2d(x.double() / 255, 2).flatten(1)

    metric, net = fid.FrechetInceptionDistance(feature=Features()).set_dtype(torch.float64), Features()
    a, b = (to_uint8(pictures(n, 8, seed) ** power) for n, seed, power in ((40, 0, 1), (30, 1, 3)))
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet(net(a), net(b)) == pytest.approx(metric.compute().item(), rel=1e-6)


@pytest.mark.parametrize("n, m", [(1, 5), (5, 0)])
def test_one_sample_has_no_distance(n, m):
    with pytest.raises(ValueError, match="at least 2"):
        frechet(draws(n, 4), draws(m, 4))


# ------------------------------------------------------------------------------------ features of FID and FVD
def test_inception_is_given_rounded_bytes(measures):
    x = pictures(40, 16)                                                    # more than one part
    x[0, 0, 0, 0], x[0, 0, 0, 1] = -1.04, 1.04
    found = measures["inception"](x)
    assert found.shape == (40, 2048) and found.dtype == torch.float32
    true = ((x + 1) * 127.5).round().clamp(0, 255)
    assert torch.allclose(found[:, :3], true.mean((2, 3)), atol=1e-3)
    assert found[0, 3:5].tolist() == [0, 255]


def test_i3d_is_given_the_clip_as_it_is(measures):
    frames = pictures(35, 16)
    found = measures["i3d"](frames)
    assert found.shape == (2, 400)
    means = frames[:32].mean((1, 2, 3))                                     # in [-1, 1], in order, none twice
    assert torch.allclose(found[:, :16].flatten(), means, atol=1e-3)
    assert found[0, 16:20].tolist() == [224, 224, 0, 0]
    assert measures["i3d"](frames[:15]).shape == (0, 400)


def test_features_of_another_width_are_refused(tmp_path):
    script(TinyInception(1000), tmp_path / "inception-2015-12-05.pt")
    found, _ = perceptual.load(tmp_path)
    with pytest.raises(ValueError, match="inception-2015-12-05.pt"):
        found["inception"](pictures())


# ------------------------------------------------------------------------------------------------------ LPIPS
def direct_lpips(a, b, weights):
    """The definition, in double precision, layer by layer."""
    w, total = {name: x.double() for name, x in weights.items()}, 0
    stages = []
    for x in (a.double(), b.double()):
        shift, scale = (x.new_tensor(v).view(3, 1, 1) for v in ([-.030, -.088, -.188], [.458, .448, .450]))
        x = (x - shift) / scale
        out = []
        layers = (0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)
        for k, (place, stride, padding) in enumerate(layers):
            x = F.max_pool2d(x, 3, 2) if k in (1, 2) else x
            weight, bias = w[f"features.{place}.weight"], w[f"features.{place}.bias"]
            x = F.conv2d(x, weight, bias, stride, padding).relu()
            out.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        stages.append(out)
    for k, (x, y) in enumerate(zip(*stages, strict=True)):
        total = total + F.conv2d((x - y) ** 2, w[f"lin{k}.model.1.weight"]).mean((1, 2, 3))
    return total


def test_lpips_is_its_definition(measures, nets):
    true = pictures(20)                                                     # more than one part
    made = (true + 0.2 * draws(20, 3, 64, 64)).clamp(-1, 1)
    made[3] = true[3]
    linear = torch.load(nets / "alex.pth", map_location="cpu")
    weights = torch.load(nets / "alexnet-owt-7be5be79.pth") | linear
    found = measures["lpips"](made, true)
    assert torch.allclose(found.double(), direct_lpips(made, true, weights), rtol=1e-4)
    assert found[3] == 0 and (found[4:] > 0).all() and found.shape == (20,)
    assert torch.allclose(measures["lpips"](true, made), found)


def test_lpips_weights_are_named_as_published():
    shapes = {name: tuple(x.shape) for name, x in perceptual.Lpips().state_dict().items()}
    widths = [3, 64, 192, 384, 256, 256]
    want = {f"lin{k}.model.1.weight": (1, width, 1, 1) for k, width in enumerate(widths[1:])}
    for k, (place, side) in enumerate([(0, 11), (3, 5), (6, 3), (8, 3), (10, 3)]):
        want[f"features.{place}.weight"] = (widths[k + 1], widths[k], side, side)
        want[f"features.{place}.bias"] = (widths[k + 1],)
    assert shapes == want


# --------------------------------------------------------------------------------------------------- lip sync
def test_syncnet_weights_are_named_as_published():
    want = {}

    def layer(name, place, *shape):
        want[f"{name}.{place}.weight"], want[f"{name}.{place}.bias"] = shape, shape[:1]
        if not (name.startswith("netfc") and place == 3):                   # BatchNorm follows
            for part in ("weight", "bias", "running_mean", "running_var"):
                want[f"{name}.{place + 1}.{part}"] = shape[:1]

    for place, shape in {0: (64, 1, 3, 3), 4: (192, 64, 3, 3), 8: (384, 192, 3, 3), 11: (256, 384, 3, 3),
                         14: (256, 256, 3, 3), 18: (512, 256, 5, 4)}.items():
        layer("netcnnaud", place, *shape)
    for place, shape in {0: (96, 3, 5, 7, 7), 4: (256, 96, 1, 5, 5), 8: (256, 256, 1, 3, 3),
                         11: (256, 256, 1, 3, 3), 14: (256, 256, 1, 3, 3), 18: (512, 256, 1, 6, 6)}.items():
        layer("netcnnlip", place, *shape)
    for name in ("netfcaud", "netfclip"):
        layer(name, 0, 512, 512)
        layer(name, 3, 1024, 512)
    shapes = {name: tuple(x.shape) for name, x in perceptual.SyncNet().state_dict().items()}
    assert {name: shape for name, shape in shapes.items() if "num_batches" not in name} == want


def direct_mfcc(samples):
    """numpy, one frame, one filter and one coefficient at a time: whole numbers (S,) -> (n, 13)."""
    x = np.append(samples[0], samples[1:] - 0.97 * samples[:-1])
    count = 1 + max(0, math.ceil((len(x) - 400) / 160))
    x = np.append(x, np.zeros(240 + 160 * count - len(x)))
    hertz = [700 * (10 ** (k * 2595 * math.log10(1 + 8000 / 700) / 27 / 2595) - 1) for k in range(28)]
    edges, rows = [math.floor(513 * f / 16000) for f in hertz], []
    for frame in range(count):
        power = np.abs(np.fft.rfft(x[160 * frame: 160 * frame + 400], 512)) ** 2 / 512
        logs = []
        for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False):
            energy = sum(power[i] * (i - low) / (middle - low) for i in range(low, middle))
            energy += sum(power[i] * (high - i) / (high - middle) for i in range(middle, high))
            logs.append(math.log(energy or np.finfo(float).eps))
        row = [math.log(power.sum() or np.finfo(float).eps)]
        for k in range(1, 13):
            value = sum(x * math.cos(math.pi * k * (2 * n + 1) / 52) for n, x in enumerate(logs))
            value *= math.sqrt(2 / 26)
            row.append(value * (1 + 11 * math.sin(math.pi * k / 22)))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("length", [300, 401, 3200])
def test_mfcc_is_its_definition(length):
    samples = (draws(length) * 20000).round().double().numpy()              # some are clipped
    samples[length // 2: length // 2 + 900] = 0                             # silence has a floor
    wave = torch.from_numpy(samples) / 32768
    assert np.allclose(perceptual.mfcc(wave), direct_mfcc(samples.clip(-32768, 32767)), atol=1e-6)
    assert np.isfinite(perceptual.mfcc(wave).numpy()).all()


def test_mfcc_is_python_speech_features():
    speech = pytest.importorskip("python_speech_features")
    samples = (draws(6400) * 3000).round().clamp(-32768, 32767)
    want = speech.mfcc(samples.numpy().astype(np.int16), 16000)
    assert np.allclose(perceptual.mfcc(samples / 32768), want, atol=1e-6)
    assert perceptual.mfcc(samples / 32768).shape == (39, 13)


def test_sync_of_shifted_embeddings():
    lips = draws(80, 16)
    for late in (3, 0, -7):
        heard = lips.roll(-late, 0) + 0.1 * draws(80, 16, seed=1)   # lips at i say what was heard at i - late
        found = perceptual.match(lips, heard)
        assert found["offset"] == late and found["sync_c"] > 2
        padded, means = torch.cat([torch.zeros(15, 16), heard, torch.zeros(15, 16)]), []
        for shift in range(31):
            means.append(sum((lips[i] - padded[i + shift]).norm() for i in range(80)).item() / 80)
        assert found["sync_d"] == pytest.approx(min(means), rel=1e-4)
        assert found["sync_c"] == pytest.approx(sorted(means)[15] - min(means), rel=1e-4)
    assert perceptual.match(lips, draws(80, 16, seed=2))["sync_c"] < 0.5     # nothing in common


class Flashes(nn.Module):
    """Reads light off frames and loudness off sound, one number a frame: two views of the same five bits."""

    def lip(self, x):
        assert x.shape[1:] == (3, 5, 224, 224)
        return (x.mean((1, 3, 4)) > 127).float()

    def sound(self, x):
        assert x.shape[1:] == (1, 13, 20)
        steps = x[:, 0, 0].unflatten(1, (5, 4))[..., :2]                    # those that end in the same frame
        return (steps.mean(2) > 21).float()


@pytest.mark.parametrize("late", [0, 3, -4])
def test_frames_and_sound_are_aligned(late):
    on = (draws(70) > 0).float()
    frames = (on.roll(late).view(70, 1, 1, 1) * 1.8 - 0.9).expand(70, 3, 32, 32)
    wave = (on.repeat_interleave(640) * 0.5 + 0.001) * draws(70 * 640).clamp(-1.5, 1.5)
    found = perceptual.syncnet(Flashes(), frames, wave[None])
    assert found["offset"] == late
    assert found["sync_d"] < 0.25 and found["sync_c"] > 0.5


def test_the_network_is_given_blue_first_in_bytes():
    seen = []

    class Look(Flashes):
        def lip(self, x):
            seen.append(x)
            return super().lip(x)

    frames = torch.tensor([1.0, 0, -1]).view(1, 3, 1, 1).expand(8, 3, 32, 32)
    perceptual.syncnet(Look(), frames, torch.zeros(8 * 640), face=(0.3, 0.1, 0.6, 0.4))
    assert seen[0].shape[0] == 8 - 5                                        # as many windows as published
    assert seen[0][:, :, 0, 0, 0].tolist() == [[0, 128, 255]] * 3


def test_sync_of_the_real_shape(measures):
    found = measures["syncnet"](pictures(7, 32), 0.1 * draws(1, 7 * 640))
    assert math.isfinite(found["sync_d"]) and found["sync_d"] > 0 and found["sync_c"] >= 0


@pytest.mark.parametrize("frames, samples", [(5, 9600), (9, 3000), (9, 0)])
def test_a_clip_too_short_for_sync_is_refused(frames, samples):
    with pytest.raises(InputError, match="give at least 6 frames"):
        perceptual.syncnet(None, pictures(frames), torch.zeros(1, samples))


# -------------------------------------------------------------------------------------------- faces, identity
def test_the_square_over_a_face():
    x = pictures(2, 100)
    inside = perceptual.crop(x, (0.3, 0.2, 0.5, 0.6), 40)       # 20 wide, 40 high: 40 square round its middle
    assert torch.equal(inside, x[:, :, 20:60, 20:60])
    wide = perceptual.crop(x, (0.3, 0.2, 0.5, 0.6), 56, 1.4)    # the published square: same top, 1.4 as large
    assert torch.equal(wide, x[:, :, 20:76, 12:68])
    beyond = perceptual.crop(x, (0.8, 0.8, 1.0, 1.0), 28, 1.4)
    assert torch.equal(beyond[:, :, :20, :24], x[:, :, 80:, 76:])
    assert torch.allclose(to_uint8(beyond[:, :, 20:]).float(), torch.tensor(110.0))
    assert torch.equal(perceptual.crop(x, (0, 0, 1, 1), 50),
                       F.interpolate(x, (50, 50), mode="bilinear", align_corners=False))
    for face in ((0.5, 0.5, 0.5, 0.5), (1.1, 0.2, 1.4, 0.5), (0.2, -0.5, 0.4, -0.1)):
        with pytest.raises(ValueError, match="holds no pixel"):
            perceptual.crop(x, face, 40)


def test_csim_is_the_cosine_of_embeddings(measures):
    a, b = pictures(4, 112), pictures(4, 112, seed=1) * 0.5 + 0.2 * draws(4, 3, 1, 1).clamp(-2, 2)
    mean, std = torch.tensor([[.485, .456, .406]]), torch.tensor([[.229, .224, .225]])
    ea, eb = (((x + 1) / 2).mean((2, 3)).sub(mean).div(std) for x in (a, b))     # of save_onnx's network
    want = (ea * eb).sum(1) / ea.norm(dim=1) / eb.norm(dim=1)
    assert torch.allclose(measures["csim"](a, b, (0, 0, 1, 1)), want, atol=1e-4)
    assert torch.allclose(measures["csim"](a[:1], b, (0, 0, 1, 1))[0], want[0], atol=1e-4)
    assert torch.allclose(measures["csim"](a, a), torch.ones(4), atol=1e-5)


def test_expressions_come_in_our_order(measures, monkeypatch):
    """Of save_onnx's network, made seven wide, on pictures whose upper part is above the face box."""
    seen = []

    def classify(net, x, face, mean, std):
        seen.append(perceptual.crop(x, face, 112))
        return 5 * torch.eye(7)                              # angry, disgust, fearful, happy, neutral, ...

    x = pictures(7, 112)
    monkeypatch.setattr(perceptual, "embed", classify)
    found = measures["expression"](x, (0.2, 0.3, 0.8, 0.8))
    assert found.argmax(0).tolist() == [4, 3, 5, 0, 2, 1, 6] and torch.allclose(found.sum(1), torch.ones(7))
    torch.testing.assert_close(seen[0], perceptual.crop(x, (0.2, 0.265, 0.8, 0.765), 112))


# -------------------------------------------------------------------------------------------------- the files
def test_every_absent_network_has_its_sentence(tmp_path, nets):
    found, absent = perceptual.load(tmp_path / "nowhere")
    assert found == {} and len(absent) == 6
    for text, measure, file, site in zip(
            absent, ("LPIPS", "FID", "FVD", "Sync-C", "CSIM", "expression"),
            ("alex.pth", "inception-2015-12-05.pt", "i3d_torchscript.pt", "syncnet_v2.model",
             "MobileFaceNet.onnx", EXPRESSION),
            ("PerceptualSimilarity", "nvlabs", "dropbox", "robots.ox.ac.uk", "foamliu", "opencv_zoo"),
            strict=True):
        assert all(word in text for word in (measure, file, site, "nowhere")) and "\n" not in text
    (tmp_path / "alex.pth").write_bytes((nets / "alex.pth").read_bytes())
    _, absent = perceptual.load(tmp_path)
    assert "alexnet-owt" in absent[0] and "alex.pth" not in absent[0]        # only what lacks


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("file", [file for _, files in perceptual.PUBLISHED.values() for file in files])
@pytest.mark.parametrize("damage", ["cut", "other", "pickle"])
def test_a_bad_file_is_named(nets, tmp_path, monkeypatch, file, damage):
    monkeypatch.chdir(tmp_path)
    for name in ("alex.pth", "alexnet-owt-7be5be79.pth") if file.startswith("alex") else ():
        if name != file:
            os.symlink(nets / name, tmp_path / name)
    path = tmp_path / file
    if damage == "cut":
        path.write_bytes((nets / file).read_bytes()[:os.path.getsize(nets / file) * 2 // 3])
    elif damage == "pickle":
        torch.save(Harm(), path)
    elif file.endswith(".pt"):
        script(NoFeatures(), path)
    elif file.endswith(".onnx"):
        path.write_bytes(b"not a network")
    else:
        weights = torch.load(nets / file, map_location="cpu")
        name = next(iter(weights))
        torch.save({**weights, name: weights[name][:0]}, path)              # another shape
        with pytest.raises(ValueError, match=file):
            perceptual.load(tmp_path)
        torch.save({key: x for key, x in weights.items() if key != name}, path)       # one too few
    with pytest.raises(ValueError, match=file) as error:
        perceptual.load(tmp_path)
    assert "\n" not in str(error.value) and not os.path.exists("harmed")


def test_what_is_loaded_is_what_was_saved(measures, nets):
    net = measures["syncnet"].args[0]
    saved = torch.load(nets / "syncnet_v2.model")
    assert all(torch.equal(net.state_dict()[name], x) for name, x in saved.items())
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    again = copy.deepcopy(net).train()
    x = draws(4, 1, 13, 20)
    assert not torch.allclose(again.sound(x), net.sound(x))                 # the saved statistics are used
