"""measure/metrics.py: every measure against a direct computation or a case whose answer is known."""
import math

import pytest
import torch

import flow
from measure import metrics
from world.people import random_motion
from world.render import IDENTITY, MOTION, random_identity

NAMES = list(MOTION)


def pictures(n=3, size=24, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ------------------------------------------------------------------------------------------- picture measures
def test_psnr_and_l1_are_on_the_unit_scale():
    true = pictures()
    made = true + torch.tensor([0.2, 0.02, 0.0]).view(3, 1, 1, 1)           # 0.1 and 0.01 of [0, 1]
    assert torch.allclose(metrics.psnr(made, true), torch.tensor([20.0, 40.0, 100.0]), atol=1e-3)
    assert torch.allclose(metrics.l1(made, true), torch.tensor([0.1, 0.01, 0.0]), atol=1e-5)


def test_a_box_counts_its_pixels_alone():
    true, made, box = pictures(1), pictures(1), torch.zeros(1, 24, 24, dtype=torch.bool)
    box[:, 3:9, 5:20] = True
    made[:, :, 3:9, 5:20] += 0.2
    made[:, :, 20:] = 0                                                     # outside: must not matter
    assert metrics.psnr(made, true, box).item() == pytest.approx(20, abs=1e-3)
    assert metrics.l1(made, true, box).item() == pytest.approx(0.1, abs=1e-5)


def direct_ssim(a, b):
    """The definition, one window and one channel at a time, in double precision -> map (H-10, W-10) for one
    picture."""
    line = torch.tensor([math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)], dtype=torch.float64)
    window = torch.outer(line, line) / line.sum() ** 2
    a, b = (a.double() + 1) / 2, (b.double() + 1) / 2
    size, total = a.shape[-1] - 10, torch.zeros(a.shape[-2] - 10, a.shape[-1] - 10, dtype=torch.float64)
    for c in range(3):
        for y in range(len(total)):
            for x in range(size):
                p, q = a[c, y: y + 11, x: x + 11], b[c, y: y + 11, x: x + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                p, q = p - mp, q - mq
                vp, vq, vpq = ((window * x).sum() for x in (p * p, q * q, p * q))
                total[y, x] += ((2 * mp * mq + 0.01**2) * (2 * vpq + 0.03**2)
                                / ((mp**2 + mq**2 + 0.01**2) * (vp + vq + 0.03**2))) / 3
    return total


def test_ssim_is_its_definition():
    true = pictures(2, 16)
    made = (0.7 * true + 0.3 * pictures(2, 16, seed=1)).clamp(-1, 1)
    maps = torch.stack([direct_ssim(a, b) for a, b in zip(made, true, strict=True)]).float()
    assert torch.allclose(metrics.ssim(made, true), maps, atol=1e-4)
    assert torch.allclose(metrics.ssim(true, true), torch.ones(2, 6, 6), atol=1e-5)
    box = torch.zeros(2, 16, 16, dtype=torch.bool)
    box[:, 6:9, 5:11] = True                                     # centres 6..8, 5..10 are map rows 1..3, 0..5
    found = metrics.compare(made, true, box, 8)
    assert found["ssim"] == pytest.approx(maps.mean().item(), abs=1e-4)
    assert found["face_ssim"] == pytest.approx(maps[:, 1:4, 0:6].mean().item(), abs=1e-4)


def test_blur_is_a_convolution():
    x = pictures(2, 20)[..., :17]
    line = torch.tensor([math.exp(-((i - 3) ** 2) / (2 * 1.2**2)) for i in range(7)])
    kernel = (torch.outer(line, line) / line.sum() ** 2).expand(3, 1, 7, 7)
    for pad in (True, False):
        direct = torch.nn.functional.conv2d(x, kernel, padding=3 * pad, groups=3)
        assert torch.allclose(metrics.blur(x, 1.2, 7, pad), direct, atol=1e-5)


def test_sharpness_is_a_ratio_of_gradients():
    true = pictures()
    assert torch.allclose(metrics.sharpness(true, true), torch.ones(3))
    assert torch.allclose(metrics.sharpness(0.5 * true + 0.3, true), torch.full((3,), 0.5), atol=1e-5)
    assert (metrics.sharpness(metrics.blur(true, 1.2, 7), true) < 0.5).all()


def test_seams_are_found_at_patch_borders_only():
    true = pictures(1, 32) * 0.1
    assert metrics.blockiness(true, true, 8).item() == pytest.approx(1)
    board = torch.ones(4, 4)
    board[1::2, ::2] = board[::2, 1::2] = -1
    tiles = 0.3 * board.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert metrics.blockiness(true + tiles, true, 8).item() > 3
    assert metrics.blockiness(true + tiles.roll((4, 4), (0, 1)), true, 8).item() < 0.6
    smooth = torch.arange(16.0).expand(1, 3, 16, 16).clone()
    smooth[..., 8:] += 3                                             # steps of 1 inside, 4 at the border of 8
    smooth += smooth.transpose(2, 3).clone()
    assert metrics.border_ratio(smooth, 8).item() == pytest.approx(4)


def test_a_seam_is_a_step_at_the_border_of_the_square():
    """A photo that rises by 2 a pixel; a square put in 10 brighter has steps of 12 on two sides, 8 on two."""
    ramp = 2 * torch.arange(40)
    photo = (20 + ramp[:, None, None] + ramp[:, None]).expand(40, 40, 3).byte().numpy()
    frames = photo[None].repeat(2, 0)
    assert metrics.seam_ratio(frames, photo, 8, 24) == pytest.approx(1)
    frames[:, 8:32, 8:32] += 10
    assert metrics.seam_ratio(frames, photo, 8, 24) == pytest.approx((12 + 8) / (2 + 2))
    assert metrics.seam_ratio(frames, photo, 4, 32) == pytest.approx(1)         # its border is elsewhere


# -------------------------------------------------------------------------------------------- signal measures
def test_a_shifted_signal_is_found_with_its_lag():
    x = torch.randn(80, generator=torch.Generator().manual_seed(0))
    for lag in (-4, 0, 3):
        made = x.roll(lag)                                                  # positive: late
        best, found, now = metrics.lag_correlation(2 * made[10:70] + 1, x[10:70])
        assert found == lag and best == pytest.approx(1, abs=1e-5)
        assert now == pytest.approx(torch.corrcoef(torch.stack([made[10:70], x[10:70]]))[0, 1].item(),
                                    abs=1e-5)


def test_correlation_by_column():
    a, b = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    b[:, 1], b[:, 2] = -3 * a[:, 1] + 2, 7.0
    found = metrics.correlation(a, b)
    assert found[0].item() == pytest.approx(torch.corrcoef(torch.stack([a[:, 0], b[:, 0]]))[0, 1].item(),
                                            abs=1e-5)
    assert found[1].item() == pytest.approx(-1, abs=1e-5) and found[2] == 0
    clips = [torch.randn(20, 2) + 100 * k for k in range(3)]       # what differs between clips does not count
    assert metrics.motion_correlation(clips, [x.roll(7, 0) for x in clips])[0] < 0.6
    moved = [2 * x - 50 * k for k, x in enumerate(clips)]
    assert metrics.motion_correlation(clips, moved) == pytest.approx([1, 1], abs=1e-4)


def test_blinks_are_counted_once():
    signal = torch.zeros(60)
    signal[5:9], signal[20:22], signal[22], signal[23], signal[40] = 0.9, 0.6, 0.4, 0.6, 0.45
    assert metrics.count_events(signal) == 2                  # the dip to 0.4 is no new one, 0.45 none at all


def test_interval_is_about_two_standard_errors():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    found = metrics.interval(values)
    assert found["mean"] == pytest.approx(sum(values) / 400)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * torch.tensor(values).std().item() / 20,
                                                         rel=0.1)
    assert metrics.interval([3.0]) == {"mean": 3.0, "low": 3.0, "high": 3.0}


def test_a_ratio_is_of_sums_over_people():
    a, b = torch.tensor([1.0, 9.0]), torch.tensor([2.0, 3.0])
    assert metrics.ratio_interval(a, b) == pytest.approx({"mean": 2, "low": 0.5, "high": 3})
    assert metrics.ratio_interval(2 * b, b) == pytest.approx({"mean": 2, "low": 2, "high": 2})


def test_the_probe_reads_what_is_there_and_nothing_else():
    number = torch.arange(200).repeat_interleave(5)
    motion, people = random_motion(torch.arange(1000)), random_identity(number)
    noise = torch.randn(1000, 12, generator=torch.Generator().manual_seed(0))
    turned = motion @ torch.linalg.qr(torch.randn(17, 17, generator=torch.Generator().manual_seed(1))).Q
    m, i = metrics.probe_tokens(torch.cat([turned, noise], 1), motion, people, number)
    assert list(m) == NAMES and list(i) == IDENTITY
    assert min(m.values()) > 0.99 and abs(sum(i.values()) / len(i)) < 0.1
    m, i = metrics.probe_tokens(noise, motion, people, number)
    assert all(abs(x) < 0.1 for x in m.values()) and abs(sum(i.values()) / len(i)) < 0.1
    m, _ = metrics.probe_tokens(motion[:, :1] + 0.5 * motion[:, :1].std() * noise[:, :1], motion, people,
                                number)
    assert m["yaw"] == pytest.approx(0.8, abs=0.06)                         # signal 1, noise 1/4


# --------------------------------------------------------------------------------------------- sampling paths
def test_straightness_of_known_paths():
    """Velocity 3 in the first half of the walk, 1 in the second: mean square 5, chord 2. Straight: 0."""
    noise = torch.randn(4, 3, dtype=torch.float64)
    two = metrics.straightness(lambda z, t: torch.where(t[:, None] > 0.525, 3.0, 1.0).expand_as(z), noise, 20)
    torch.testing.assert_close(two, torch.full((4,), 0.25))
    point = metrics.straightness(lambda z, t: flow.x_to_v(torch.zeros_like(z), z, t), noise, 8)
    torch.testing.assert_close(point, torch.zeros(4), atol=1e-5, rtol=0)
