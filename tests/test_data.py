"""data.py: pairs of frames, augmentation; batches are functions of their number."""
import cv2
import numpy as np
import pytest
import test_prepared
import torch
from test_prepared import FRAMES, WIDE, numbers_of
from torch.utils.data import DataLoader

import data
from media import landmarks, prepared
from media.image import from_uint8
from media.prepare import MARGIN

sets, labelled = test_prepared.sets, test_prepared.labelled


def test_mined_pairs_have_the_same_pose_and_another_mouth():
    """Ten frames have the pose of frame 0, four of them another mouth; the other poses differ in the mouth
    even more."""
    factors = np.zeros((40, len(landmarks.FACTORS)), np.float32)
    factors[10:, 4], factors[10:, 0] = 1.0, 9.0                              # yaw, opening
    factors[5:9, 0] = 2.0
    factors[[1, 6], 2] = np.nan                                              # not seen
    for seed in range(10):
        found = data.mine_pairs(np.random.default_rng(seed), factors, 0, (0, 1), 2)
        assert len(set(found)) == 2 and set(found) <= {2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13}
        assert 6 not in found and 1 not in found and 0 not in found
    factors[10:, 0] = 0.0
    seen = {k for seed in range(20) for k in data.mine_pairs(np.random.default_rng(seed), factors, 0, (0, 1),
                                                             1)}
    assert seen <= {5, 7, 8} and len(seen) > 1


def test_some_people_of_a_batch_are_mined(labelled):
    """Of 8 people 3 for the mouth, 1 for the lids; frame 0 has the pose of every other frame."""
    clips = data.Clips([str(labelled)], 8, 2, 0.0, 32)
    factors = np.zeros((FRAMES, len(landmarks.FACTORS)), np.float32)
    factors[10:14, 0], factors[4:8, 2] = 1.0, 1.0
    for seed in range(10):
        first, *others = clips.frame_numbers(np.random.default_rng(seed), FRAMES, factors, 2)
        assert (first in range(10, 14)) != all(k in range(10, 14) for k in others)
        first, *others = clips.frame_numbers(np.random.default_rng(seed), FRAMES, factors, 3)
        assert (first in range(4, 8)) != all(k in range(4, 8) for k in others)
    free = [clips.frame_numbers(np.random.default_rng(seed), FRAMES, factors, 7)[1] for seed in range(40)]
    assert len(set(free)) > 20


def test_mirrored_factors_swap_the_lids_and_negate_yaw_and_roll(labelled, monkeypatch):
    clips, frame, found = data.Clips([str(labelled)], 2, 2, 0.0, 32), data.Clips.frame, {}
    for mirrored in (False, True):
        monkeypatch.setattr(data.Clips, "frame", lambda self, *given, flag=mirrored: (
            *frame(self, *given)[:3], torch.full((2,), flag)))
        batch = clips[3]
        found[mirrored] = dict(zip(landmarks.FACTORS, batch.factors.T, strict=True))
        assert batch.kind == "real" and batch.factors.shape == (4, len(landmarks.FACTORS))
    plain, other = found[False], found[True]
    assert all(value.any() for value in plain.values())
    torch.testing.assert_close(other["lid_left"], plain["lid_right"])
    torch.testing.assert_close(other["lid_right"], plain["lid_left"])
    for name in ("yaw", "roll"):
        torch.testing.assert_close(other[name], -plain[name])
    for name in ("opening", "width", "pitch", "brow", "corner", "furrow"):
        torch.testing.assert_close(other[name], plain[name])


def test_without_landmarks_nothing_is_known(sets):
    assert data.Clips(sets, 2, 2, 0.5, 32)[0].factors is None


def test_what_is_not_known_stays_unknown(labelled, monkeypatch):
    """In frame 5 no face was found; factor j of frame k is k + j."""
    clips = data.Clips([str(labelled)], 1, 3, 0.0, 32, augment=False)
    monkeypatch.setattr(clips, "frame_numbers", lambda *_: [4, 7, 5, 3])
    want = torch.tensor([3.0, torch.nan, -1.0])[:, None] / torch.tensor(landmarks.SCALE)
    torch.testing.assert_close(clips[0].factors, want, equal_nan=True)
    monkeypatch.setattr(clips, "frame_numbers", lambda *_: [5, 7, 5, 3])     # compared with no face
    assert clips[0].factors is None


# ---- regions -----------------------------------------------------------------------------------------------

def test_regions_are_soft_masks_of_the_ellipses():
    ellipses = torch.tensor([[0.0, 0.5, 0.3, 0.2], [-0.4, -0.4, 0.2, 0.1], [0.4, -0.4, 0.2, 0.1],
                             [0.0, 0.0, 0.7, 0.9]])
    features, upper, face = data.draw_regions(ellipses[None], 64)[0]
    assert features.shape == (64, 64) and 0 <= features.min() and features.max() <= 1
    at = [(48, 32), (19, 19), (19, 44)]                                      # rows, columns of mouth and eyes
    assert all(features[place] > 0.9 for place in at) and all(face[place] > 0.5 for place in at)
    assert features[32, 32] < 0.1 and face[32, 32] > 0.9 and features[2, 2] < 0.01 and face[2, 2] < 0.1
    torch.testing.assert_close(features[48, 32 + 9], torch.tensor(0.5), atol=0.1, rtol=0)       # its rim
    assert upper[48, 32] < 0.01 and upper[19, 19] > 0.9                      # mouth, eye, brow above it
    torch.testing.assert_close(upper[14, 19], torch.tensor(0.5), atol=0.05, rtol=0)


def test_regions_of_a_target_are_those_of_both_pictures():
    masks = torch.zeros(2, 3, 3, 4, 4)
    masks[0, 0, 0, 0, 0], masks[0, 2, 0, 1, 1], masks[1, 1, 1, 2, 2] = 1, 1, 1
    pictures = torch.arange(6.0).view(2, 3, 1, 1, 1).expand(2, 3, 3, 4, 4)
    batch = data.make_batch(pictures, 10 + pictures, masks, None, "real")
    assert batch.reference[:, 0, 0, 0].tolist() == [0, 3] and batch.target[:, 0, 0, 0].tolist() == [1, 2, 4,
        5]
    assert batch.encoder_views[:, 0, 0, 0].tolist() == [10, 13, 11, 12, 14, 15]
    assert batch.regions.flatten(1).sum(1).tolist() == [1, 2, 1, 0]
    assert batch.regions[1, 0, 0, 0] == batch.regions[1, 0, 1, 1] == batch.regions[2, 1, 2, 2] == 1


# ---- batches -----------------------------------------------------------------------------------------------

def equal(a, b):
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
               for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_a_batch_is_a_function_of_its_number(sets, fork, monkeypatch):
    clips = data.Clips(sets, 4, 2, 0.5, 32)
    assert equal(clips[5], data.Clips(sets, 4, 2, 0.5, 32)[5])
    plain = data.Clips(sets, 4, 2, 0.5, 32, augment=False)
    assert len({numbers_of(plain[k].reference)[0] for k in range(30)}) > 10
    assert not torch.equal(clips[5].reference, data.Clips(sets, 4, 2, 0.5, 32, seed=1)[5].reference)
    monkeypatch.setattr(data, "DataLoader", lambda *given, **options: DataLoader(
        *given, **{**options, "multiprocessing_context": fork if options["num_workers"] else None}))
    one, two = (list(data.loader(clips, [3, 4, 5], workers)) for workers in (0, 2))
    assert all(map(equal, one, two)) and equal(one[2], clips[5])


def test_near_people_are_shown_within_a_fifth_of_a_second(sets):
    clips = data.Clips(sets, 4, 3, 0.5, 32, augment=False)
    far = []
    for k in range(20):
        first, others = numbers_of(clips[k].reference), numbers_of(clips[k].target)
        gaps = [abs(other - first[n // 3]) for n, other in enumerate(others)]
        assert max(gaps[:6]) <= 5
        far += gaps[6:]
    assert max(far) > 30


def test_the_video_stage_gets_frames_in_a_row(sets):
    clips = data.Clips(sets, 2, 6, 0, 32, rows=True, augment=False)
    for k in range(10):
        for clip in torch.tensor(numbers_of(clips[k].target)).view(2, 6):
            assert (clip.diff() == 1).all()


def test_sets_are_drawn_equally_and_test_people_never(sets):
    clips = data.Clips(sets, 1, 1, 0, 32, augment=False)
    pictures = torch.cat([clips[k].reference for k in range(80)])
    of_b = (pictures[:, 2, 20:].amax((1, 2)) > 0).float().mean()
    assert of_b == pytest.approx(0.5, abs=0.15)                              # one clip against two
    # green 100: the clip of the test person
    assert ((pictures[:, 1, 20:].mean((1, 2)) + 1) * 127.5).max() < 75
    held = data.Clips(sets[:1], 1, 1, 0, 32, split="test", augment=False)
    assert ((held[0].reference[:, 1, 20:].mean() + 1) * 127.5) > 85


# ---- augmentation ------------------------------------------------------------------------------------------

def test_without_augmentation_pictures_are_the_middle_of_the_prepared_square(sets):
    clips = data.Clips(sets[1:], 2, 2, 0, 32, augment=False)
    batch = clips[4]
    numbers = numbers_of(batch.target)
    want = from_uint8(prepared.read_at(f"{sets[1]}/clips/0.mp4", numbers, 32))
    assert torch.equal(batch.target, want)
    assert torch.equal(batch.encoder_views, torch.cat([batch.reference, batch.target]))
    mouth = batch.regions[0, 0, round(16 * 1.33), 16]                 # at its usual place of the tight square
    assert mouth > 0.9 and batch.regions.shape == (4, 3, 32, 32)


def test_views_that_vary_nothing_are_the_middle_of_the_prepared_square(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, 0.5))
    monkeypatch.setattr(torch, "randn", lambda *shape, generator: torch.zeros(shape))
    affine, mirrored = data.random_framing(None, 2)
    grid = data.random_warp(None, affine, 32, 0.05) / MARGIN
    assert not mirrored.any()
    wide = torch.arange(3.0 * WIDE * WIDE).view(1, 3, WIDE, WIDE).expand(2, -1, -1, -1)
    view = torch.nn.functional.grid_sample(wide, grid, align_corners=False)
    torch.testing.assert_close(view, wide[:, :, 4:36, 4:36], atol=1e-2, rtol=1e-5)


def test_augmentation_is_one_for_all_pictures_of_a_person(sets, monkeypatch):
    """Set b is blue on the left: mirrored on the right; alike in reference and targets. Half of the encoder's
    views differ, leaving blur aside."""
    monkeypatch.setattr(data, "random_blur", lambda views, rng: views)
    clips = data.Clips(sets[1:], 2, 2, 0, 32)
    flipped, tints, apart = [], set(), []
    for k in range(12):
        batch = clips[k]
        # (R, 1+T, 3, H, W)
        pictures = torch.cat([batch.reference[:, None], batch.target.unflatten(0, (2, 2))], 1)
        for x in pictures:
            side = (x[:, 2, 26:, :8].mean((1, 2)) > x[:, 2, 26:, 24:].mean((1, 2))).tolist()
            assert len(set(side)) == 1
            flipped.append(side[0])
            blue = x[:, 2, 26:].amax((1, 2))
            assert blue.max() - blue.min() < 0.05
            tints.add(round(blue[0].item(), 2))
        apart += (batch.encoder_views[:2] != batch.reference).flatten(1).any(1).tolist()
        assert batch.reference.abs().max() <= 1 and batch.encoder_views.abs().max() <= 1
    assert 5 < sum(flipped) < 19 and len(tints) > 8 and 5 < sum(apart) < 19


def test_regions_follow_the_pictures_that_are_mirrored_and_moved(labelled):
    """A dark spot at the mouth of the ellipses stays in the mask, whatever the view."""
    clips = data.Clips([str(labelled)], 4, 1, 0.0, 32)
    ellipses = torch.tensor(landmarks.USUAL).expand(4, 2, 4, 4) / MARGIN
    ellipses = ellipses + torch.tensor([0.2, 0, 0, 0])                 # to the right, so that mirroring shows
    wide = 1 - 2 * data.draw_regions(ellipses.flatten(0, 1), WIDE)[:, :1].expand(-1, 3, -1, -1)
    clips.augment = True
    for seed in range(5):
        pictures, masks, _, _ = clips.frame(wide.unflatten(0, (4, 2)), ellipses,
                                            torch.Generator().manual_seed(seed))
        dark = (1 - pictures.mean(2)) / 2                                    # (R, 2, H, W), colours varied
        for spot, mask in zip(dark.flatten(0, 1), masks[:, :, 0].flatten(0, 1), strict=True):
            assert torch.corrcoef(torch.stack([spot.flatten(), mask.flatten()]))[0, 1] > 0.8


def test_views_are_blurred_as_opencv_does():
    """40 persons of two views; the amounts are drawn first, so they are known."""
    rng = torch.Generator().manual_seed(5)
    views = torch.rand(40, 2, 3, 24, 24, generator=rng) * 2 - 1
    got = data.random_blur(views, torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(1)
    blurred = torch.rand(40, 1, generator=rng) < 0.6
    sigma = (1.5 * torch.rand(40, 2, generator=rng) * blurred).clamp(min=0.01)
    noisy = torch.rand(40, 1, generator=rng)[:, 0] < 0.4
    assert 0 < (~noisy & ~blurred[:, 0]).sum() < 40
    for k in (~noisy).nonzero()[:, 0]:
        for view, s, x in zip(views[k], sigma[k], got[k], strict=True):
            want = cv2.GaussianBlur(view.permute(1, 2, 0).numpy(), (9, 9), s.item(),
                                    borderType=cv2.BORDER_REPLICATE)
            torch.testing.assert_close(x.permute(1, 2, 0), torch.from_numpy(want), rtol=0, atol=1e-4)
    change = (got - views).abs().mean((1, 2, 3, 4))
    assert (change[noisy] > 1e-4).all() and (change[~noisy & ~blurred[:, 0]] < 1e-6).all()
