"""train_ae.py: the loss by hand, exact resume, several processes, the video stage; runs of preset nano."""
import copy
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from test_encoder import run_two
from test_latents import vae_folder  # noqa: F401
from test_prepared import make_set
from torch.distributed import run
from torch.distributed.launcher.api import elastic_launch

import data
import flow
import train_ae
import training
from decoder import Decoder
from encoder import MotionEncoder, random_masking
from generator import Generator, GeneratorConfig
from media.device import autocast
from media.files import read_lines, write_lines
from media.landmarks import FACTORS, SCALE
from media.latents import Pixel
from media.mesh import Reading
from media.weights import save_weights
from sample import load_models
from world import people as people_module
from world.people import HELD_OUT, random_motion
from world.render import MOTION, normalise_factors, random_identity, render

torch.set_num_threads(1)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NANO = train_ae.PRESETS["nano"]
CPU = torch.device("cpu")
PLAIN = {"mask_max": 0.0, "p_pure_noise": 1.0, "label": 0.0, "cycle": 0.0, "mesh": 0.0, "warped": 0.0,
         "structure": 0.0}                                                  # a schedule


def train(out, *more, steps=4):
    return train_ae.main(["--preset", "nano", "--device", "cpu", "--out", str(out), "--steps", str(steps),
                          *more])


def state(out):
    return torch.load(out / "state.pt", weights_only=True)


def same(a, b):
    """Equal to the last bit: nested dicts and lists of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def auto_encoder(seed=0, nudge=0.05, depth=1, frames=1, loss="region"):
    """Fresh, then nudged, so that no layer is left at zero."""
    torch.manual_seed(seed)
    model = train_ae.AutoEncoder(MotionEncoder(replace(NANO["encoder"], depth=depth)),
                                 Decoder(replace(NANO["decoder"], depth=depth, frames=frames)), loss)
    for parameter in model.parameters():
        parameter.data += nudge * torch.randn(parameter.shape)
    model.encoder.tokens.data.normal_()             # tiny tokens and young statistics would magnify rounding
    model.encoder.running_norm.count.fill_(1)
    return model


@pytest.fixture
def people(monkeypatch):
    """Every identity that is drawn, in order."""
    seen, draw = [], random_identity
    monkeypatch.setattr(people_module, "random_identity", lambda ids: seen.extend(ids.tolist()) or draw(ids))
    return seen


@pytest.fixture
def seeds(monkeypatch):
    """Every seed of a person that is asked for, in order; not who lends them another face."""
    asked = []
    for name in ("random_pairs", "consecutive_frames"):
        made = getattr(train_ae, name)
        monkeypatch.setattr(train_ae, name, lambda seeds, *more, made=made: (
            asked.extend(seeds.tolist()) or made(seeds, *more)))
    return asked


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(train_ae, "held_out_batch", lambda *_: None)
    monkeypatch.setattr(train_ae, "save_samples", lambda *_: {})


def around_step(monkeypatch, hook):
    """Call hook(step) before the work of each step."""
    set_lr = training.set_lr
    monkeypatch.setattr(training, "set_lr", lambda optimisers, step, *more, **named: (
        hook(step), set_lr(optimisers, step, *more, **named)))


def ask_to_stop_at(monkeypatch, when):
    around_step(monkeypatch, lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == when else None)


@pytest.fixture
def passed(monkeypatch):
    """Loss and gradients of every step of a run, before they are clipped."""
    seen, clip_and_step = [], training.clip_and_step

    def record(model, optimisers, loss, *more):
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        seen.append((loss, grads))
        return clip_and_step(model, optimisers, loss, *more)

    monkeypatch.setattr(training, "clip_and_step", record)
    return seen


@pytest.fixture
def begun(monkeypatch):
    """A copy of each model before its first step."""
    models, make = [], training.optimisers
    monkeypatch.setattr(training, "optimisers", lambda model, *rates: (
        models.append(copy.deepcopy(model)) or make(model, *rates)))
    return models


# ---- data and randomness -----------------------------------------------------------------------------------

def test_no_two_steps_draw_the_same_people(seeds, no_pictures, tmp_path):
    assert train(tmp_path, "--accumulate", "2", steps=6) == 0
    assert len(seeds) == len(set(seeds)) == 6 * 2 * NANO["persons"]


@pytest.mark.parametrize("seed, frames", [(0, 1), (999, 4)])
def test_held_out_people_are_never_trained_on(people, no_pictures, tmp_path, seed, frames):
    assert train(tmp_path, "--seed", str(seed), "--frames", str(frames), steps=2) == 0
    assert len(set(people)) >= 4 and max(people) < HELD_OUT
    args = train_ae.parse(["--preset", "nano", "--seed", str(seed), "--frames", str(frames)])
    people.clear()
    train_ae.synthetic_batch(args, NANO, 10**9 // 3, render)                 # nor after a billion passes
    assert max(people) < HELD_OUT
    people.clear()
    train_ae.synthetic_batch(args, NANO, 0, render, held_out=True)
    assert min(people) >= HELD_OUT


def test_a_batch_depends_on_its_number_alone():
    args = train_ae.parse(["--preset", "nano"])
    one, again, other = (vars(train_ae.synthetic_batch(args, NANO, number, render)) for number in (3, 3, 4))
    assert one["reference"].shape == (2, 3, 32, 32) and one["target"].shape == (4, 3, 32, 32)
    assert one["regions"].shape == (4, 3, 32, 32) and one["factors"].shape == (4, len(MOTION))
    assert same(one, again) and not torch.equal(one["reference"], other["reference"])


def test_batches_are_drawn_on_the_training_device():
    """The device "meta" refuses whatever lies elsewhere."""
    for frames in ("1", "4"):
        args = train_ae.parse(["--preset", "nano", "--frames", frames])
        batch = train_ae.synthetic_batch(args, NANO, 1, render, device="meta")
        assert {x.device.type for x in vars(batch).values() if torch.is_tensor(x)} == {"meta"}


def test_every_second_batch_of_a_curriculum_shows_another_person_to_the_encoder():
    args = train_ae.parse(["--preset", "nano", "--persons", "4"])
    for number, curriculum, held_out, want in ((0, True, False, 0), (1, True, False, 6), (1, False, False, 0),
                                               (1, True, True, 0)):
        args.curriculum = curriculum
        batch = train_ae.synthetic_batch(args, NANO, number, render, held_out=held_out)
        own = torch.cat([batch.reference, batch.target])
        differ = (batch.encoder_views - own).flatten(1).abs().amax(1) > 0.1
        assert differ[4:].sum() == want, (number, curriculum)


def test_known_motion_is_the_difference_of_target_and_reference():
    args = train_ae.parse(["--preset", "nano"])
    batch = train_ae.synthetic_batch(args, NANO, 0, render)
    _, motion, _ = people_module.random_pairs(torch.arange(2), 2, 0.5, 32, render)
    target, reference = motion[:, 1:].flatten(0, 1), motion[[0, 0, 1, 1], 0]
    want = normalise_factors(target) - normalise_factors(reference)
    torch.testing.assert_close(batch.factors, want)
    many = normalise_factors(random_motion(torch.arange(4000)))
    assert many.shape == (4000, len(MOTION)) and 0.4 < many.std(0).min() and many.std(0).max() < 1.7


def drawn(args, number, progress, rank=0, shape=(4, 3, 32, 32)):
    return train_ae.sample_noise_t_mask(args, NANO["encoder"], shape, number, rank,
                                        train_ae.schedule(args, progress))


def test_a_curriculum_starts_at_pure_noise_without_masks():
    args = train_ae.parse(["--preset", "nano"])
    noise, t, keep = drawn(args, 0, 0.0)
    assert noise.shape == (4, 3, 32, 32) and (t == 1).all()
    assert torch.equal(keep, torch.arange(16).expand(6, 16))
    late = [drawn(args, number, 1.0) for number in range(400)]
    times = torch.cat([t for _, t, _ in late])
    assert (times == 1).float().mean() == pytest.approx(0.9, abs=0.03) and (times > 0).all()
    left = torch.tensor([keep.shape[1] for _, _, keep in late])            # 16 - floor(16 U(0, 0.9)): 2 .. 16
    assert (left.min(), left.max()) == (2, 16) and left.float().mean() == pytest.approx(9.3, abs=0.7)
    assert all(keep.shape[0] == 6 and (keep.diff() > 0).all() for _, _, keep in late)
    assert same(list(drawn(args, 7, 1.0)), list(late[7])) and not torch.equal(late[6][0], late[7][0])
    assert not torch.equal(late[7][0], drawn(args, 7, 1.0, rank=1)[0])


def test_without_a_curriculum_times_are_uniform_and_masks_there_from_the_first_step():
    args = train_ae.parse(["--preset", "nano"])
    args.curriculum = False
    found = [drawn(args, number, 0.0) for number in range(400)]
    times = torch.cat([t for _, t, _ in found]).sort().values                # 1600
    torch.testing.assert_close(times, torch.linspace(0, 1, 1600), atol=0.05, rtol=0)
    left = torch.tensor([keep.shape[1] for _, _, keep in found])
    assert (left.min(), left.max()) == (2, 16)


def test_the_frames_of_a_clip_share_time_and_noise():
    args = train_ae.parse(["--preset", "nano", "--frames", "4"])
    many = []
    for number in range(20):
        noise, t, _ = drawn(args, number, 1.0, shape=(8, 3, 32, 32))
        noise, t = noise.unflatten(0, (2, 4)), t.view(2, 4)
        assert (t == t[:, :1]).all() and (noise == noise[:, :1]).all() and not torch.equal(noise[0], noise[1])
        many.append(t[:, 0])
    assert any(a != b for a, b in many)                                      # but not clips


def test_processes_share_neither_people_nor_clips(folder, seeds, no_pictures, monkeypatch, tmp_path):
    """main() as each of two processes, without the other."""
    drawn, clips, read = {}, {}, data.Clips.__getitem__
    monkeypatch.setattr(training, "ddp_wrap", lambda model, *_: model)
    for rank in range(2):
        monkeypatch.setattr(training, "init_distributed", lambda _, rank=rank: (rank, 2, CPU))
        numbers = clips[rank] = []
        monkeypatch.setattr(data.Clips, "__getitem__", lambda self, n, numbers=numbers: (
            numbers.append(n) or read(self, n)))
        seeds.clear()
        words = ["--data", folder, "synthetic", "--workers", "0", "--accumulate", "2"]
        assert train(tmp_path / str(rank), *words) == 0
        drawn[rank] = set(seeds)
    assert min(map(len, [*drawn.values(), *clips.values()])) > 2
    assert not drawn[0] & drawn[1] and not set(clips[0]) & set(clips[1])


def test_compiled_shapes_stand_still(no_pictures, monkeypatch, tmp_path):
    """Masks come and go, but nothing is compiled again after the first step, and that at which the cycle term
    enters, with another number of pictures (at 30%)."""
    graphs, compiled, make = [], [], torch.compile

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda what, **more: make(what, backend=count, **more))
    around_step(monkeypatch, lambda number: compiled.append(len(graphs)))
    assert train(tmp_path, "--compile", steps=10) == 0
    assert compiled[0] == 0 and compiled[1] > 1 and set(compiled[1:4]) == {compiled[1]}
    assert set(compiled[5:]) == {compiled[1] + 1} == {len(graphs)}


# ---- loss and gradients ------------------------------------------------------------------------------------

def given_batch():
    """Two people with four targets, noise and t (4,), keep (6, 10)."""
    draw = torch.Generator().manual_seed(0)
    batch = train_ae.synthetic_batch(train_ae.parse(["--preset", "nano"]), NANO, 0, render)
    batch.target[3] = batch.reference[1]                                     # one that copying gets right
    return [batch, torch.randn(batch.target.shape, generator=draw), torch.tensor([1, 0.8, 0.5, 0.2]),
            random_masking(6, 16, 0.4, draw)]


def mean(error, weight):
    return (error * weight).sum((1, 2)) / weight.sum((1, 2))


def copy_error(batch):
    """Distance of reference and target at each pixel -> (4, H, W)."""
    return ((batch.reference[[0, 0, 1, 1]] - batch.target).square().mean(1) + 1e-4).sqrt()


def test_region_loss_of_a_copy_is_the_sum_of_the_weights():
    """Nearly: 0.02 and 0.03 stand beside the copy's own error, so that a copy that is right already asks for
    little."""
    model, (batch, noise, t, keep) = auto_encoder(nudge=0), given_batch()
    error, (features, upper, face) = copy_error(batch), batch.regions.unbind(1)
    whole, part, eyes = mean(error, 0.2 + 0.8 * face), mean(error, features), mean(error, upper)
    want = (model.WHOLE * whole / (whole + 0.02) + model.MOUTH_EYES * part / (part + 0.03)
            + model.UPPER * eyes / (eyes + 0.03))                            # (4,)
    assert (want[:2] > 0.7 * (model.WHOLE + model.MOUTH_EYES + model.UPPER)).all()
    assert want[3] == pytest.approx(model.WHOLE / 3 + (model.MOUTH_EYES + model.UPPER) / 4, rel=1e-3)
    assert model(batch, noise, t, keep, PLAIN).item() == pytest.approx(want.mean().item(), rel=1e-4)
    # a fresh model's warped reference is the copy
    warped = model(batch, noise, t, keep, {**PLAIN, "warped": 0.5})
    assert warped.item() == pytest.approx(1.5 * want.mean().item(), rel=1e-4)
    perfect = model.region_loss(batch.target, batch.target, batch.reference[[0, 0, 1, 1]], batch.regions, 0.5)
    assert perfect < 0.25 * want.mean()


def test_structure_counts_blurring():
    model, (batch, *_) = auto_encoder(nudge=0), given_batch()
    copies = batch.reference[[0, 0, 1, 1]]
    blurred = torch.nn.functional.avg_pool2d(batch.target, 5, 1, 2)
    with_it, without = (model.region_loss(blurred, batch.target, copies, batch.regions, s)
                        for s in (0.5, 0.0))
    assert with_it > without + 0.2


def test_velocity_and_weighted_loss_of_a_copy():
    """A fresh model decodes the reference, so v = (z_r - z_t)/t and v - (z - eps) = (z_r - z)/t; weighted: by
    0.1 over the error of copying."""
    batch, noise, t, keep = given_batch()
    error = (batch.reference[[0, 0, 1, 1]] - batch.target).square().mean((1, 2, 3))
    loss = auto_encoder(nudge=0, loss="velocity")(batch, noise, t, keep, PLAIN)
    assert loss.item() == pytest.approx((error / t**2).mean().item(), rel=1e-5)
    loss = auto_encoder(nudge=0, loss="weighted")(batch, noise, t, keep, PLAIN)
    assert loss.item() == pytest.approx((0.1 * error / t**2 / (error + 0.0005)).mean().item(), rel=1e-5)


def test_dssim_is_that_of_the_definition():
    x, y = torch.rand(2, 1, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    got = train_ae.dssim(x, y)
    assert got.shape == (1, 1, 5, 5)
    a, b = (z[0].mean(0)[3:10, 9:16].flatten().double() for z in (x, y))     # the window at (3, 9)
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    covariance = ((a - a.mean()) * (b - b.mean())).mean()
    ssim = ((2 * a.mean() * b.mean() + c1) * (2 * covariance + c2)
            / ((a.mean() ** 2 + b.mean() ** 2 + c1) * (a.var(correction=0) + b.var(correction=0) + c2)))
    assert got[0, 0, 1, 3].item() == pytest.approx(((1 - ssim) / 2).item(), abs=1e-4)
    assert train_ae.dssim(x, x).abs().max() < 1e-5


def test_field_roughness_is_the_squared_difference_of_neighbours_in_pixels():
    assert train_ae.field_roughness(torch.full((2, 8, 8, 2), 0.3)) == 0
    step = torch.zeros(1, 8, 8, 2)
    step[:, :, 4:, 0] = 2 / 8                                          # one pixel, x, between columns 3 and 4
    assert train_ae.field_roughness(step).item() == pytest.approx(1 / (7 * 2))


def squared_to_three(error):
    """Half the square up to 3, beyond it the tangent there; the mean."""
    return torch.where(error.abs() < 3, error**2 / 2, 3 * error.abs() - 4.5).mean()


def test_known_motion_enters_with_its_weight():
    model, (batch, *given) = auto_encoder().eval(), given_batch()   # eval: the running statistics stand still
    plain = model(batch, *given, PLAIN)
    motion = model.encoder(batch.encoder_views, given[2])
    delta = (motion[2:] - motion[[0, 0, 1, 1]]).flatten(1)
    head = model.label_heads["synthetic"]
    head.xx, head.xy = delta.T @ delta, torch.randn(head.xy.shape, generator=torch.Generator().manual_seed(0))
    read = head(delta)
    error = squared_to_three(read - batch.factors.clamp(-8, 8))
    labelled = model(batch, *given, {**PLAIN, "label": 0.7})
    assert labelled.item() == pytest.approx((plain + 0.7 * error).item(), rel=1e-4)
    unknown = model(replace(batch, factors=None), *given, {**PLAIN, "label": 0.7})
    assert torch.equal(unknown, plain) and error > 0.01


def test_motion_read_from_decoded_pictures_trains_the_networks_but_not_the_reader():
    """Read by the averaged weights, from the targets and from each person with the other's motion."""
    model, (batch, *given) = auto_encoder(), given_batch()
    average = auto_encoder(seed=1).eval().requires_grad_(False)
    head = average.label_heads["synthetic"]
    head.xx, head.xy = torch.eye(8), torch.randn(head.xy.shape, generator=torch.Generator().manual_seed(0))
    before = {name: x.clone() for name, x in average.state_dict().items()}
    model.eval()                                                    # the running statistics stand still
    plain = model(batch, *given, PLAIN)
    assert torch.equal(model(batch, *given, PLAIN, average=average), plain)
    loss = model(batch, *given, {**PLAIN, "cycle": 0.7}, average=average)
    motion = model.encoder(batch.encoder_views, given[2])
    cache = model.decoder.encode_reference(batch.reference, motion[:2])
    z_t = flow.interpolate(batch.target, given[0], given[1])
    picture = model.decoder(z_t, given[1], motion[2:], cache, as_picture=True).x
    borrowed = motion[:2] + (motion[[2, 4]] - motion[:2])[[1, 0]]
    crossed = model.decoder(given[0][[0, 2]], torch.ones(2), borrowed, cache, as_picture=True).x
    origin = average.encoder(batch.reference)
    own, other = average.encoder(picture) - origin[[0, 0, 1, 1]], average.encoder(crossed) - origin
    known = batch.factors.clamp(-8, 8)
    error = (squared_to_three(head(own.flatten(1)) - known)
             + 2 / 3 * squared_to_three(head(other.flatten(1)) - known[[2, 0]]))
    assert loss.item() == pytest.approx((plain + 0.7 * error).item(), rel=1e-4) and error > 0.01
    (loss - plain).backward()
    trained = model.encoder.embed.weight, model.decoder.blocks[0].mlp[0].weight
    assert all(parameter.grad.abs().max() > 0 for parameter in trained)
    assert same(dict(average.state_dict()), before)


class Mesh:
    """Reads known functions of a picture's colours; pixel (0, 0) moves the points."""

    def __call__(self, x, axes, eyes=None):
        points = torch.zeros(468, 2)
        points[10, 1], points[152, 1] = -0.5, 0.5                            # a face as high as 1
        colour = x.mean((2, 3))
        factors = torch.cat([colour, torch.zeros(len(x), len(FACTORS) - 3)], 1)
        return Reading(points + x[:, 0, :1, :1], factors, [torch.zeros(len(x), 1, 4, 4) + x[:, 2:, -1:, -1:]])


def test_a_mesh_reads_real_faces_and_those_with_the_motion_of_another():
    model, (batch, *_), axes = auto_encoder(), given_batch(), torch.eye(2, 3).expand(2, 2, 3)
    scale = torch.tensor(SCALE)[:3, None, None]
    level = torch.zeros(8, 3, 32, 32)
    own, target, crossed = level[:2].clone(), level[:4].clone(), level[:2].clone()
    own[1] += scale                                          # person 1 differs from person 0
    target[0] += 2 * scale                                   # person 0 moves by 2 units, person 1 by 1
    target[2] += 2 * scale
    crossed[0] += scale
    crossed[1] += 3 * scale
    for x in (own, target, crossed):
        x[..., 0, 0], x[..., -1, -1] = 0, 0
    batch = replace(batch, reference=own, target=target, kind="real")

    def error(picture, crossed):
        return model.mesh_loss(picture, crossed, batch, Mesh(), axes).item()

    none = error(target, crossed)
    assert none == pytest.approx(0, abs=1e-4)
    wrong = crossed.clone()
    wrong[1] -= scale * torch.tensor([1.0, 0, 0])[:, None, None]              # opening, by 1 unit of 1 of 2
    wrong[..., 0, 0], wrong[..., -1, -1] = 0, 0
    expected = 2.0 / 2 / len(FACTORS) / 2                    # its weight, half the square, the mean
    assert error(target, wrong) == pytest.approx(expected, rel=0.02)
    wrong = target.clone()
    wrong[3] += 5 * scale * torch.tensor([0, 1.0, 0])[:, None, None]          # width, beyond 3 units
    expected = 2 * 2.0 * (3 * 5 - 4.5) / len(FACTORS) / 4
    assert error(wrong, crossed) == pytest.approx(expected, rel=0.02)
    wrong = target.clone()
    wrong[0, 0, 0, 0] += 0.04                                # all points of 1 of 4 by 4% of the face
    assert error(wrong, crossed) == pytest.approx((0.3 + 0.2) * 4 / 4, rel=0.02)
    wrong = target.clone()
    batch.target[1, 2, -1, -1] = 0.2                         # features: an error as large as that of a copy
    assert error(wrong, crossed) == pytest.approx(1.25 * 0.2 / (0.2 + 0.05 / 2) / 4, rel=0.02)


def test_a_mesh_takes_the_place_of_the_encoder_where_faces_are_real():
    model, (batch, *given), axes = auto_encoder().eval(), given_batch(), torch.eye(2, 3).expand(2, 2, 3)
    average = auto_encoder(seed=1).eval().requires_grad_(False)
    weights = {**PLAIN, "cycle": 0.7, "mesh": 0.3}
    plain = model(batch, *given, PLAIN)
    assert torch.equal(model(batch, *given, weights, average=average, mesh=Mesh(), axes=axes),
                       model(batch, *given, weights, average=average))        # drawn faces: no mesh
    real = replace(batch, factors=None, kind="real")
    loss = model(real, *given, weights, mesh=Mesh(), axes=axes)
    assert (loss - plain).item() > 0.01
    (loss - plain).backward()
    trained = model.encoder.embed.weight, model.decoder.blocks[0].mlp[0].weight
    assert all(parameter.grad.abs().max() > 0 for parameter in trained)


def test_labels_of_real_clips_count_by_their_weight():
    """Nothing is read by heads that learned nothing, so the error is that of the labels."""
    model, (batch, *_) = auto_encoder().eval(), given_batch()
    for column, size, want in ((0, 0.5, 2.0 / 8), (4, 5.0, 3 * 5 - 4.5), (9, 9.0, 0.6 * (3 * 8 - 4.5))):
        factors = torch.zeros(4, len(FACTORS))                               # opening, yaw, furrow
        factors[:, column] = size
        real = replace(batch, factors=factors, kind="real")
        loss = model.label_loss(torch.randn(2, 1, 8), torch.randn(4, 1, 8), real)
        assert loss.item() == pytest.approx(want / len(FACTORS))


def test_unknown_rows_neither_count_nor_teach():
    """Of 4 differences the second is not known at all, the third not in one column: as if absent."""
    rng = torch.Generator().manual_seed(0)
    m_r, m_t = torch.randn(2, 1, 8, generator=rng), torch.randn(4, 1, 8, generator=rng)
    factors = torch.randn(4, len(FACTORS), generator=rng)
    factors[1], factors[2, 5] = torch.nan, torch.nan

    def run(m_t, factors):
        model, batch = auto_encoder(), replace(given_batch()[0], factors=factors, kind="real")
        head = model.label_heads["real"]
        head.count += 200
        head.xx, head.xy = torch.eye(8), torch.linspace(-1, 1, head.xy.numel()).view_as(head.xy)
        return model.label_loss(m_r, m_t, batch), head

    tokens = m_t.clone().requires_grad_()
    (loss, head), (alone, taught) = run(tokens, factors), run(m_t[[0, 3]], factors[[0, 3]])
    assert loss.item() == pytest.approx(alone.item() / 2, rel=1e-5) and loss > 0.01      # mean of 4, not of 2
    torch.testing.assert_close(head.xx, taught.xx)
    torch.testing.assert_close(head.xy, taught.xy)
    loss.backward()
    assert (tokens.grad != 0).any((1, 2)).tolist() == [True, False, False, True]


def test_every_process_sums_though_it_knows_nothing(monkeypatch):
    """One sum and one count of each head, whatever is known: others wait for them."""
    model, (batch, *_) = auto_encoder(), given_batch()
    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda x: calls.append(tuple(x.shape)))
    for factors in (None, batch.factors, torch.full_like(batch.factors, torch.nan)):
        loss = model.label_loss(torch.randn(2, 1, 8), torch.randn(4, 1, 8), replace(batch, factors=factors))
        assert math.isfinite(loss)
    once = [shape for columns in (len(MOTION), len(FACTORS)) for shape in ((8, 8 + columns), ())]
    assert calls == 3 * once
    assert all(x.isfinite().all() for x in model.label_heads.buffers())


def test_running_ridge_is_ridge_regression_of_all_batches():
    """Plain averages in the first batches, so the fit is that of their concatenation, here in closed form."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 20, 5, generator=rng), torch.randn(3, 20, 2, generator=rng)
    head = train_ae.RunningRidge(5, 2)
    for batch_x, batch_y in zip(x, y, strict=True):
        head.update(batch_x, batch_y)
    head.update(x[0, :0], y[0, :0])                                          # nothing known in this one
    wide, target = x.flatten(0, 1), y.flatten(0, 1)
    ridge = 0.01 * wide.square().mean() + 1e-6
    want = torch.linalg.solve(wide.T @ wide / 60 + ridge * torch.eye(5), wide.T @ target / 60)
    torch.testing.assert_close(head(x[2]), x[2] @ want, rtol=1e-4, atol=1e-5)


def test_accumulated_gradients_are_the_mean_of_the_passes(begun, passed, no_pictures, tmp_path):
    assert train(tmp_path, "--accumulate", "2", steps=3) == 0
    args = train_ae.parse(["--preset", "nano", "--accumulate", "2", "--steps", "3"])
    model, losses = begun[0].train(), []
    for number in (0, 1):                                                    # the two passes of step 0
        batch, now = train_ae.synthetic_batch(args, NANO, number, render), train_ae.schedule(args, 0)
        random = train_ae.sample_noise_t_mask(args, NANO["encoder"], batch.target.shape, number, 0, now)
        with autocast(CPU):
            losses.append(model(batch, *random, now) / 2)
        losses[-1].backward()
    assert passed[0][0] == pytest.approx(sum(losses).item()) and len(passed) == 3
    for name, p in model.named_parameters():
        torch.testing.assert_close(passed[0][1][name], p.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.fixture
def alone(tmp_path):
    """A process group of one: its collectives are real."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_only_the_last_pass_of_a_step_sends_gradients(alone, no_pictures, monkeypatch, tmp_path):
    """And each number once; the run is that without DistributedDataParallel, with activations checkpointed
    too."""
    sent, wrap = [], training.ddp_wrap

    def hook(_, bucket):
        sent.append(bucket.buffer().numel())
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    def wrapped(model, world, device):
        ddp = wrap(model, world, device)
        ddp.register_comm_hook(None, hook)
        return ddp

    monkeypatch.setattr(training, "init_distributed", lambda _: (0, 2, CPU))
    for name, how, more in (("ddp", wrapped, ["--checkpoint-activations"]),
                            ("plain", lambda model, *_: model, [])):
        monkeypatch.setattr(training, "ddp_wrap", how)
        assert train(tmp_path / name, "--accumulate", "3", *more, steps=2) == 0
    assert sum(sent) == 2 * sum(p.numel() for p in auto_encoder().parameters())
    one, two = (state(tmp_path / name)["model"] for name in ("ddp", "plain"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-4, rtol=1e-3, msg=name)


def test_one_batch_is_learnt(monkeypatch, no_pictures, passed, tmp_path):
    args = train_ae.parse(["--preset", "nano"])
    batch = train_ae.synthetic_batch(args, NANO, 0, render)
    luck = train_ae.sample_noise_t_mask(args, NANO["encoder"], batch.target.shape, 0, 0, PLAIN)
    monkeypatch.setattr(train_ae, "synthetic_batch", lambda *_: batch)
    monkeypatch.setattr(train_ae, "sample_noise_t_mask", lambda *_: luck)
    monkeypatch.setattr(train_ae, "schedule", lambda *_: PLAIN)
    assert train(tmp_path, "--label-weight", "0", steps=30) == 0
    assert passed[-1][0] < passed[0][0] / 2, (passed[0][0], passed[-1][0])


ALL = {**PLAIN, "label": 0.3, "warped": 0.5, "structure": 0.5}


def half(rank, folder):
    """One of two processes: one step's gradients on person `rank` and their two targets."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=timedelta(minutes=2))
    try:
        batch, noise, t, keep = given_batch()
        mine, rows = slice(2 * rank, 2 * rank + 2), [rank, 2 + 2 * rank, 3 + 2 * rank]
        model = auto_encoder(seed=rank)                                 # the first process's weights must win
        wrapped = training.ddp_wrap(model, 2, CPU)
        part = data.Batch(batch.reference[rank:rank + 1], batch.target[mine], batch.encoder_views[rows],
                          batch.regions[mine], batch.factors[mine], batch.kind)
        wrapped(part, noise[mine], t[mine], keep[rows], ALL).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)              # as in main(): length 1
        wishes = [training.any_rank(wish, CPU) for wish in (rank == 1, False)]
        torch.save({"gradients": {name: p.grad for name, p in model.named_parameters()}, "wishes": wishes,
                    "buffers": dict(model.named_buffers())}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
    os._exit(0)                                                              # as training.shutdown does


def test_two_processes_have_the_gradients_of_one(tmp_path):
    run_two(half, tmp_path)
    model = auto_encoder()
    model(*given_batch(), ALL).backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert got["wishes"] == [True, False]                           # one wish is enough, on every process
        for name, p in model.named_parameters():
            torch.testing.assert_close(got["gradients"][name], p.grad, atol=1e-6, rtol=0, msg=name)
        for name, value in model.named_buffers():
            torch.testing.assert_close(got["buffers"][name], value, atol=1e-6, rtol=1e-6, msg=name)


def gradients(model, bf16=False):
    """Of one batch -> {name: gradient}, bytes that the forward pass keeps beside the weights."""
    seen, size = {p.untyped_storage().data_ptr() for p in model.parameters()}, []

    def keep(x):
        if x.untyped_storage().data_ptr() not in seen:
            seen.add(x.untyped_storage().data_ptr())
            size.append((x, x.untyped_storage().nbytes()))              # held, so that no address comes twice
        return x

    with (torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
          torch.autocast("cpu", torch.bfloat16, enabled=bf16)):
        loss = model(*given_batch(), ALL)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, sum(n for _, n in size)


@pytest.mark.parametrize("bf16, compiled", [(False, False), (True, False), (True, True)])
def test_checkpointed_activations_change_memory_alone(bf16, compiled):
    """Of the networks; what the loss on regions keeps lies outside of their blocks."""
    depth = 1 if compiled else 2
    plain = auto_encoder(depth=depth, frames=2, loss="velocity")             # with temporal blocks
    other = copy.deepcopy(plain)
    names = list(other.state_dict())
    training.checkpoint_activations(other)
    for model in (plain, other) if compiled else ():
        model.decoder.compile(dynamic=False, backend="aot_eager")
    want, much = gradients(plain, bf16=bf16)
    got, little = gradients(other, bf16=bf16)
    assert list(other.state_dict()) == names
    assert same(dict(plain.named_buffers()), dict(other.named_buffers()))
    assert same(want, got) and little < (0.6 if compiled else 0.5) * much


# ---- whole runs --------------------------------------------------------------------------------------------

def test_a_run_writes_its_files(tmp_path, capsys):
    assert train(tmp_path, "--save-every", "2", "--accumulate", "2") == 0
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "progress.png", "semo.safetensors", "state.pt",
                                            "step000002.png", "step000004.png"]
    rows = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(math.isfinite(row[name]) for row in rows
               for name in ("loss", "psnr", "psnr_copy", "pictures_per_second"))
    assert {row["shown"] for row in rows} == {"synthetic"}
    models, meta = load_models(tmp_path / "semo.safetensors")
    assert list(models) == ["encoder", "decoder"] and (meta["trained_steps"], meta["size"]) == (4, 32)
    ema = state(tmp_path)["ema"]
    for kind, model in models.items():                                       # the release is the EMA
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, ema[f"{kind}.{name}"], rtol=1e-3, atol=1e-6, msg=name)
    assert "loss=" in capsys.readouterr().err                                # the bar


def test_pictures_show_reference_target_and_output(tmp_path):
    model, args = auto_encoder(nudge=0).eval(), train_ae.parse(["--preset", "nano"])
    held_out = train_ae.held_out_batch(args, NANO)
    found = train_ae.save_samples(tmp_path / "p.png", model, Pixel(), held_out, 0, CPU)
    batch = train_ae.synthetic_batch(args, NANO, 0, render, held_out=True)
    reference, target = batch.reference[[0, 0, 1, 1]], batch.target
    assert found["psnr_copy"] == pytest.approx(-10 * math.log10((reference - target).square().mean() / 4),
                                               abs=1e-3)
    assert found["psnr"] == pytest.approx(found["psnr_copy"], abs=1e-3)      # a fresh model copies
    got = torch.tensor(np.asarray(Image.open(tmp_path / "p.png"))).permute(2, 0, 1) / 127.5 - 1
    assert got.shape == (3, 4 * 32, 4 * 32)                                  # 4 rows of 4 targets
    for row, want in enumerate((reference, target, reference, reference)):
        for k in range(4):
            cell = got[:, 32 * row:32 * row + 32, 32 * k:32 * k + 32]
            torch.testing.assert_close(cell, want[k], atol=0.01, rtol=0)


def test_stop_and_resume_give_the_same_run(monkeypatch, tmp_path):
    assert train(tmp_path / "whole", steps=10) == 0
    with monkeypatch.context() as patch:
        ask_to_stop_at(patch, 4)                                            # while the fifth step is computed
        assert train(tmp_path / "parts", steps=10) == 130
    assert state(tmp_path / "parts")["step"] == 5
    load_models(tmp_path / "parts" / "semo.safetensors")
    assert train(tmp_path / "parts", steps=10) == 0
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole["step"] == 10 and len(whole["optimisers"]) == 2 and whole["optimisers"][1]["state"]
    assert same(whole, parts)                                                # weights, EMA, optimisers
    name = "semo.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert not same(whole["model"], whole["ema"])


def test_saving_does_not_change_the_run(no_pictures, tmp_path, monkeypatch):
    assert train(tmp_path / "a") == 0
    monkeypatch.undo()                                                       # with pictures
    assert train(tmp_path / "b", "--save-every", "1") == 0
    assert same(state(tmp_path / "a"), state(tmp_path / "b"))


def test_a_finished_run_says_so_and_does_nothing_more(tmp_path, capsys):
    assert train(tmp_path) == 0
    assert "nothing to do" not in capsys.readouterr().err
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    assert train(tmp_path) == 0
    assert "finished at step 4, nothing to do" in capsys.readouterr().err
    assert before == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}


def refused(capsys, status, *words):
    """Status 2, the last line on stderr holds the words."""
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and said.startswith("train_ae.py: ") and all(word in said for word in words), said


def test_other_settings_are_refused_by_name(no_pictures, tmp_path, capsys):
    assert train(tmp_path) == 0
    before = (tmp_path / "state.pt").read_bytes()
    refused(capsys, train(tmp_path, "--seed", "1", "--mask-max", "0.5"), "state.pt", "--mask-max 0.9 -> 0.5",
            "--seed 0 -> 1")
    refused(capsys, train(tmp_path, steps=9), "--steps 4 -> 9")
    assert (tmp_path / "state.pt").read_bytes() == before


def test_an_out_that_cannot_be_written_is_refused_before_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_ae, "real_clips", None)                        # not reached
    (tmp_path / "file").write_text("in the way")
    refused(capsys, train(tmp_path / "file/out"), "cannot be written to")


def test_what_a_run_does_is_printed_at_its_start(no_pictures, tmp_path, capsys):
    assert train(tmp_path, steps=1) == 0
    said = capsys.readouterr().err
    for words in ("preset: nano", "label_weight: 0.3", "parameters: ", "schedule at 0%: {'mask_max': 0.0",
                  "schedule at 100%"):
        assert words in said


def test_a_kill_while_the_last_step_is_saved_costs_no_release(monkeypatch, tmp_path):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_ae, "save_samples", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    assert train(tmp_path) == 0                                              # the same command again
    assert load_models(tmp_path / "semo.safetensors")[1]["trained_steps"] == 4


@pytest.mark.parametrize("ended_at", ["save_checkpoint", "log"])
def test_a_step_stands_in_the_log_at_most_once(monkeypatch, no_pictures, tmp_path, ended_at):
    """A run that is killed while it saves for the second time, and is started again."""
    calls, function = [], getattr(training, ended_at)

    def killed(*given, **named):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return function(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(training, ended_at, killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, "--save-every", "1", steps=3)
    assert train(tmp_path, "--save-every", "1", steps=3) == 0
    steps = [json.loads(line)["step"] for line in open(tmp_path / "log.jsonl")]
    assert steps == ([1, 3] if ended_at == "log" else [1, 2, 3])


def test_nan_stops_the_run_and_spares_the_state(monkeypatch, no_pictures, tmp_path):
    assert train(tmp_path / "whole", steps=6) == 0
    make, out = train_ae.synthetic_batch, tmp_path / "out"

    def spoilt(args, preset, number, *more):
        batch = make(args, preset, number, *more)
        return replace(batch, target=batch.target * (float("nan") if number == 3 else 1))

    with monkeypatch.context() as patch:
        patch.setattr(train_ae, "synthetic_batch", spoilt)
        with pytest.raises(SystemExit) as end:
            train(out, "--save-every", "2", steps=6)
    said = str(end.value)
    assert said.startswith("loss nan") and "step 3" in said and "state.pt" in said
    assert end.value.code not in (None, 0)
    held = state(out)
    assert held["step"] == 2 and all(v.isfinite().all() for kind in ("model", "ema")
                                     for v in held[kind].values())
    load_models(out / "semo.safetensors")
    assert train(out, "--save-every", "2", steps=6) == 0           # the same command again, without the fault
    assert same(state(out), state(tmp_path / "whole"))


def test_an_infinite_gradient_stops_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(SystemExit, match="gradient inf at step 0"):
        train(tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_video_stage_starts_from_the_image_release(begun, tmp_path, capsys):
    image = auto_encoder(seed=5)
    save_weights(tmp_path / "image.safetensors", {"encoder": image.encoder, "decoder": image.decoder},
                 {"latents": "pixel", "size": 32, "steps": 1})
    assert train(tmp_path / "video", "--frames", "4", "--init", str(tmp_path / "image.safetensors"),
                 steps=2) == 0
    held = begun[0].state_dict()
    for name, value in image.state_dict().items():
        if not name.startswith("label_heads."):                              # of no use in a release
            torch.testing.assert_close(held[name], value, rtol=1e-3, atol=1e-6, msg=name)
    models, _ = load_models(tmp_path / "video" / "semo.safetensors")
    assert models["decoder"].config.frames == 4 and len(models["decoder"].temporal) == 1
    assert models["decoder"].temporal[0].attention.out.weight.any()          # it learns
    # the image stage in the video run's folder
    refused(capsys, train(tmp_path / "video", steps=2), "other sizes")


def wait_for(found, process, seconds=300):
    """Until found() is true, while the process runs."""
    end = time.monotonic() + seconds
    while not found():
        assert process.exitcode is None and time.monotonic() < end
        time.sleep(0.005)


def worker(out, more):
    """One process of several: its number and id in a file, then training."""
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    (out.parent / f"{out.name} rank {rank}").write_text(str(os.getpid()))
    assert train(out, "--accumulate", "2", *more, steps=12) == 0
    dist.destroy_process_group()


def torchrun(words, out, more):
    """As torch.distributed.run with these words, but that its processes are forked: none imports torch."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    args = run.parse_args([*words, "train_ae.py"])
    if args.standalone:
        args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "c10d", "localhost:0", out.name
    config, *_ = run.config_from_args(args)
    config.start_method = "fork"
    elastic_launch(config, worker)(out, more)


def start(fork, out, *words, more=()):
    process = fork.Process(target=torchrun, args=(words, out, more))
    process.start()
    return process


def finish(*processes):
    """-> the exit statuses."""
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def unbroken(fork, tmp_path_factory):
    """A run of two processes from its beginning to its end."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert finish(start(fork, out, "--standalone", "--nproc_per_node=2")) == [0]
    return out


def test_one_of_two_processes_writes(unbroken):
    assert sorted(os.listdir(unbroken)) == ["log.jsonl", "progress.png", "semo.safetensors", "state.pt",
                                            "step000012.png"]
    assert len(open(unbroken / "log.jsonl").readlines()) == 1
    assert state(unbroken)["step"] == 12
    load_models(unbroken / "semo.safetensors")


def test_killed_processes_cost_no_bit(fork, unbroken, tmp_path):
    """torchrun ends the other one, which must neither hang nor save, and starts both again."""
    out = tmp_path / "out"
    process = start(fork, out, "--standalone", "--nproc_per_node=2", "--max-restarts=3",
                    more=["--save-every", "3"])
    for rank, step in ((0, 0), (1, 3)):                                      # each after a save of its start
        wait_for((out / "state.pt").exists, process)
        wait_for(lambda step=step: state(out)["step"] > step, process)
        os.kill(int((tmp_path / f"out rank {rank}").read_text()), signal.SIGKILL)
        assert state(out)["step"] < 12
    assert finish(process) == [0]
    assert same(state(out), state(unbroken))                                 # weights, EMA, optimisers


def test_two_nodes_train_as_one(fork, unbroken, tmp_path):
    """Two torchruns that meet at a port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=semo",
             f"--rdzv_endpoint=localhost:{port}", "--local_addr=localhost"]
    nodes = [start(fork, tmp_path / "out", *words, f"--node_rank={k}") for k in range(2)]
    assert finish(*nodes) == [0, 0]
    assert same(state(tmp_path / "out"), state(unbroken))


def test_torchruns_end_is_a_wish_to_stop_and_readers_outlive_it(folder, tmp_path):
    """It signals whole process groups; a reader that fell to it would take training down before it could
    save. Started as README says."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
               "train_ae.py", "--preset", "nano", "--device", "cpu", "--out", str(tmp_path), "--data", folder,
               "--workers", "1", "--save-every", "9999", "--steps", "9999"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log,
                                   stderr=log)
    end = time.monotonic() + 300
    while "loss=" not in (tmp_path / "log").read_text():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.terminate()
    assert process.wait(300) != 0
    assert 0 < state(tmp_path)["step"] < 9999, (tmp_path / "log").read_text()[-3000:]


# ---- refusals ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong", [
    "--steps 0", "--steps -1", "--steps many", "--persons 0", "--persons -2", "--frames 0", "--accumulate 0",
    "--save-every 0", "--mask-max 1", "--mask-max -0.1", "--mask-max nan", "--preset huge", "--step 3",
    f"--seed {2**31}", "--lr nan", "--muon-lr -1", "--label-weight inf", "--init=", "extra"])
def test_bad_arguments_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as end:
        train_ae.main(["--preset", "nano", *wrong.split()])
    assert end.value.code == 2 and "error: " in capsys.readouterr().err


def test_a_wrong_init_is_one_sentence(tmp_path, capsys):
    refused(capsys, train(tmp_path, "--init", str(tmp_path / "none.safetensors")), "none.safetensors")


# ---- real clips --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared set of two people, one of them a test person: grey pictures of 100 and of 200, a bar moving
    across."""
    made, pictures = tmp_path_factory.mktemp("set"), np.full((2, 30, 40, 40, 3), 100, np.uint8)
    pictures[1] = 200
    for k in range(30):
        pictures[:, k, :, k + 4:k + 6] = 20
    make_set(made, [("0", "train", pictures[0]), ("1", "test", pictures[1])])
    return str(made)


def test_real_clips_train_and_resume_like_drawn_ones(folder, monkeypatch, tmp_path):
    assert train(tmp_path / "whole", "--data", folder, "synthetic", "--workers", "0", steps=6) == 0
    with monkeypatch.context() as patch:
        ask_to_stop_at(patch, 2)
        assert train(tmp_path / "parts", "--data", folder, "synthetic", "--workers", "0", steps=6) == 130
    assert train(tmp_path / "parts", "--data", folder, "synthetic", "--workers", "0", steps=6) == 0
    assert same(state(tmp_path / "whole"), state(tmp_path / "parts"))


def test_sets_share_the_batches_and_test_people_are_only_shown(folder):
    args = train_ae.parse(["--preset", "nano", "--data", folder, "synthetic", "--workers", "0"])
    real = train_ae.real_clips(args, NANO, "train")
    kinds = [batch.kind for _, batch in train_ae.batches(args, NANO, real, range(40), render, CPU)]
    assert 18 <= kinds.count("real") <= 22 and set(kinds) == {"real", "synthetic"}
    args = train_ae.parse(["--preset", "nano", "--data", "synthetic", "synthetic"])
    kinds = [batch.kind for _, batch in train_ae.batches(args, NANO, None, range(3), render, CPU)]
    assert kinds == ["synthetic"] * 3 and train_ae.held_out_batch(args, NANO)[1] == "synthetic"
    args = train_ae.parse(["--preset", "nano", "--data", folder, "synthetic", "--workers", "0"])
    shown, split = train_ae.held_out_batch(args, NANO)
    assert shown.reference.median() > 0.3 and split == "test"                # the test person
    args = train_ae.parse(["--preset", "nano"])
    assert train_ae.held_out_batch(args, NANO)[1] == "synthetic"


def test_a_damaged_test_clip_is_told_before_the_first_step(folder, tmp_path, capsys):
    """Not replaced by synthetic people, as a set without a test split is."""
    shutil.copytree(folder, tmp_path / "set")
    clip = tmp_path / "set/clips/1.mp4"
    clip.write_bytes(clip.read_bytes()[:500])
    refused(capsys, train(tmp_path / "out", "--data", str(tmp_path / "set"), "--workers", "0"), str(clip))
    assert not (tmp_path / "out/state.pt").exists()
    write_lines(tmp_path / "set/manifest.jsonl", read_lines(f"{folder}/manifest.jsonl")[:1])
    args = train_ae.parse(["--preset", "nano", "--data", str(tmp_path / "set")])
    assert train_ae.held_out_batch(args, NANO)[1] == "synthetic"


def test_the_decoder_alone_learns_and_the_rest_of_the_file_stays(folder, tmp_path, capsys):
    generator = Generator(GeneratorConfig(width=32, depth=1, heads=1, window=4, past=4, token_dim=8))
    first = auto_encoder()
    save_weights(tmp_path / "all.safetensors", {"encoder": first.encoder, "decoder": first.decoder,
                                                "generator": generator},
                 {"size": 32, "steps": 1, "gen_steps": 4, "guidance": 3.5, "audio": "mel",
                  "latents": "pixel"})
    words = "--init", str(tmp_path / "all.safetensors"), "--decoder-only"
    assert train(tmp_path / "out", *words, "--data", folder, "synthetic", "--workers", "0") == 0
    before, _ = load_models(tmp_path / "all.safetensors")
    after, meta = load_models(tmp_path / "out/semo.safetensors")
    equal = {kind: same(before[kind].state_dict(), after[kind].state_dict()) for kind in after}
    assert equal == {"encoder": True, "decoder": False, "generator": True} and meta["guidance"] == 3.5
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path / "other", "--decoder-only")
    assert "--init" in capsys.readouterr().err


def test_saved_weights_may_be_a_mean_with_the_first(folder, tmp_path, capsys):
    model = auto_encoder()
    first = tmp_path / "first.safetensors"
    save_weights(first, {"encoder": model.encoder, "decoder": model.decoder},
                 {"size": 32, "steps": 1, "latents": "pixel"})

    def decoder(path):
        return torch.nn.utils.parameters_to_vector(load_models(path)[0]["decoder"].parameters())

    for share in ("0", "0.25", "1"):
        assert train(tmp_path / share, "--init", str(first), "--blend", share, "--lr", "0.3", steps=3) == 0
    old, new = decoder(first), decoder(tmp_path / "0/semo.safetensors")
    torch.testing.assert_close(decoder(tmp_path / "0.25/semo.safetensors"), 0.25 * old + 0.75 * new,
                               atol=2e-3, rtol=0)
    assert (new - old).abs().max() > 0.02
    torch.testing.assert_close(decoder(tmp_path / "1/semo.safetensors"), old, atol=1e-6, rtol=0)
    assert same(state(tmp_path / "0")["model"], state(tmp_path / "1")["model"])         # the run is the same
    capsys.readouterr()
    for wrong in (["--blend", "0.5"], ["--blend", "2", "--init", str(first)]):
        with pytest.raises(SystemExit, match="2"):
            train_ae.parse(["--preset", "nano", *wrong])
        assert "--blend" in capsys.readouterr().err


def test_a_mesh_is_asked_for_by_its_folder(folder, tmp_path, capsys, monkeypatch):
    words = "--data", folder, "--mesh"
    refused(capsys, train(tmp_path / "out", *words, str(tmp_path)), "face_landmark.tflite")
    seen = []
    opened = SimpleNamespace(to=lambda device: None)
    monkeypatch.setattr(train_ae, "FaceMesh", lambda path: seen.append(path) or opened)
    assert train(tmp_path / "out", "--data", folder, "--mesh", "DIR", "--workers", "0", steps=1) == 0
    assert seen == ["DIR"]
    with pytest.raises(SystemExit, match="2"):
        train_ae.parse(["--preset", "large", "--data", folder, "--mesh", "DIR"])
    assert "latents" in capsys.readouterr().err
    for wrong in (["synthetic"], [folder, "--reflow", "weights"]):
        with pytest.raises(SystemExit, match="2"):
            train_ae.parse(["--preset", "nano", "--mesh", "DIR", "--data", *wrong])
        assert "--mesh" in capsys.readouterr().err


def test_the_video_stage_takes_real_clips(folder, tmp_path):
    assert train(tmp_path, "--data", folder, "--frames", "4", "--workers", "0", steps=2) == 0


def test_a_folder_that_was_not_prepared_is_refused(tmp_path, capsys):
    refused(capsys, train(tmp_path / "out", "--data", str(tmp_path)), "no manifest.jsonl")


@pytest.mark.parametrize("name", ["small", "large", "paper"])
def test_the_larger_presets_are_of_256_pixels_and_one_token(name):
    preset = train_ae.PRESETS[name]
    assert preset["encoder"].token_dim == preset["decoder"].token_dim and train_ae.image_px(preset) == 256
    assert (preset["encoder"].num_tokens, preset["encoder"].token_dim) == (1, {"small": 128}.get(name, 512))


# ---- the paper's own method --------------------------------------------------------------------------------

def test_the_preset_paper_has_none_of_our_changes():
    preset, args = train_ae.PRESETS["paper"], train_ae.parse(["--preset", "paper"])
    encoder, decoder = preset["encoder"], preset["decoder"]
    assert not encoder.token_init and not encoder.running_norm
    assert decoder.full_attention and decoder.predict == "v" and decoder.tokens_per_motion == 1
    assert not decoder.motion_delta and not decoder.ref_context and not decoder.overlap
    assert preset["loss"] == "velocity" and preset["latents"] == "sd"
    assert not args.curriculum and preset["near"] == 0 and args.label_weight == 0 and args.mask_max == 0.9
    assert args.muon_lr is None and args.lr == 1e-4
    assert all(train_ae.schedule(args, p)["mask_max"] == 0.9 for p in (0, 0.5, 1))
    assert all(train_ae.schedule(args, p)["label"] == 0 for p in (0, 0.5, 1))


def test_the_preset_paper_trains_with_smaller_networks(vae_folder, tmp_path):                  # noqa: F811
    """Two steps on latents of a random autoencoder, in the preset's own space and with all its switches."""
    small, paper = dict(width=32, depth=1, heads=1, token_dim=8), train_ae.PRESETS["paper"]
    preset = {**paper, "encoder": replace(paper["encoder"], **small),
              "decoder": replace(paper["decoder"], **small)}
    args = train_ae.parse(["--preset", "paper", "--vae", vae_folder, "--steps", "2", "--persons",
                           "1", "--device", "cpu", "--out", str(tmp_path / "run")], {"paper": preset})
    assert train_ae.train(args, preset) == 0
    models, meta = load_models(tmp_path / "run/semo.safetensors")
    assert (meta["latents"], meta["size"], meta["trained_steps"]) == ("sd", 256, 2)
    assert models["decoder"].config.channels == 4 and models["decoder"].config.full_attention
    held = state(tmp_path / "run")
    assert len(held["optimisers"]) == 1 and held["step"] == 2                # AdamW alone


# ---- reflow ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A release whose decoder paints at random, along bent paths, with a generator that must survive."""
    path, model = tmp_path_factory.mktemp("teacher") / "t.safetensors", auto_encoder()
    torch.manual_seed(5)
    for p in model.decoder.parameters():
        p.data += 0.1 * torch.randn_like(p)
    generator = Generator(GeneratorConfig(token_dim=8, width=32, depth=1, heads=1, window=4, past=4,
                                          lookahead=1))
    meta = {"latents": "pixel", "size": 32, "steps": 20, "audio": "mel", "gen_steps": 2, "guidance": 1.5}
    save_weights(path, {"encoder": model.encoder, "decoder": model.decoder, "generator": generator}, meta)
    return str(path)


def test_reflow_pairs_are_what_the_teacher_decodes(teacher):
    models, _ = load_models(teacher)
    # the encoder sees others
    batch = train_ae.synthetic_batch(train_ae.parse(["--preset", "nano"]), NANO, 1, render)
    noise = torch.randn(batch.target.shape)
    goal = train_ae.reflow_pairs(models, batch, noise, 3)
    with torch.no_grad():
        cache = models["decoder"].encode_reference(batch.reference,
                                                   models["encoder"](batch.encoder_views[:2]))
        z, m_t = noise, models["encoder"](batch.encoder_views[2:])
        for t in (1, 2 / 3, 1 / 3):
            z = z + models["decoder"](z, torch.full((len(z),), t), m_t, cache) / 3
    torch.testing.assert_close(goal, z, atol=5e-3, rtol=0)                  # rounding, divided by small times
    model, t, keep = auto_encoder(loss="weighted").eval(), torch.ones(len(noise)), random_masking(6, 16, 0.0)
    here, there = (model(batch, noise, t, keep, PLAIN, goal) for goal in (batch.target, z))
    assert torch.equal(here, model(batch, noise, t, keep, PLAIN)) and not torch.isclose(there, here)


def test_reflow_draws_pure_noise_alone_for_one_step():
    for preset, more, share in (("nano", ["--one-step"], 1.0), ("nano", [], 0.5),
                                ("paper", ["--one-step"], 1.0)):
        args = train_ae.parse(["--preset", preset, "--reflow", "x", *more])
        t = torch.cat([drawn(args, number, 0.5)[1] for number in range(100)])
        assert (t == 1).float().mean() == pytest.approx(share, abs=0.1)


def test_a_student_nears_its_teacher_in_one_step(teacher, no_pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_ae.main(["--preset", "nano", "--reflow", teacher, "--teacher-steps", "4", "--steps", "60",
                          "--lr", "0.01", "--muon-lr", "0.06", "--one-step", "--device", "cpu"]) == 0
    student, meta = load_models(tmp_path / "runs/reflow_ae/semo.safetensors")
    models, _ = load_models(teacher)
    assert same(student["encoder"].state_dict(), models["encoder"].state_dict())
    assert same(student["generator"].state_dict(), models["generator"].state_dict())
    assert (meta["steps"], meta["gen_steps"], meta["guidance"]) == (1, 2, 1.5)
    batch = train_ae.synthetic_batch(train_ae.parse(["--preset", "nano"]), NANO, 0, render, held_out=True)
    noise = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(0))
    want = train_ae.reflow_pairs(models, batch, noise, 4)
    before, after = ((train_ae.reflow_pairs(m, batch, noise, 1) - want).square().mean()
                     for m in (models, student))
    assert after < 0.7 * before, (before, after)


def test_reflow_and_its_options_are_refused_where_they_say_nothing(tmp_path, teacher, capsys):
    for wrong in (["--one-step"], ["--reflow", teacher, "--init", teacher],
                  ["--reflow", teacher, "--teacher-steps", "0"]):
        with pytest.raises(SystemExit) as end:
            train_ae.parse(["--preset", "nano", *wrong])
        assert end.value.code == 2
    refused(capsys, train(tmp_path, "--reflow", str(tmp_path / "none.safetensors")), "none.safetensors")
    status = train_ae.main(["--preset", "tiny", "--reflow", teacher, "--out", str(tmp_path), "--device",
                            "cpu"])
    refused(capsys, status, "needs the preset it was trained with")
