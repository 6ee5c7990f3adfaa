"""train_ae.py: the loss by hand, exact resume, several processes, the video stage; all runs are of the nano preset."""
import copy
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import data
import train_ae
import training
from decoder import Decoder
from encoder import MotionEncoder, random_masking
from generator import Generator, GeneratorConfig
from media.files import write_lines
from media.latents import Pixel
from media.video import VideoWriter
from media.weights import save_weights
from sample import load_models
from world import people as people_module
from world.people import HELD_OUT, random_clip, random_motion
from world.render import MOTION, random_identity, render

torch.set_num_threads(1)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NANO = train_ae.PRESETS["nano"]
CPU = torch.device("cpu")
NONE = torch.zeros(0, len(MOTION))                                 # nothing is known of the motion
TRUTH = random_motion(torch.arange(6))


@pytest.fixture(autouse=True)
def signals():
    """main() takes SIGTERM and Ctrl-C for itself; give them back to pytest."""
    kept = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    yield
    for name, handler in kept.items():
        signal.signal(name, handler)


def train(out, *more, steps=4):
    return train_ae.main(["--preset", "nano", "--device", "cpu", "--out", str(out), "--steps", str(steps), *more])


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


def auto_encoder(seed=0, nudge=0.05, depth=1, frames=1):
    """Fresh, then nudged, so that no layer is left at zero."""
    torch.manual_seed(seed)
    model = train_ae.AutoEncoder(MotionEncoder(replace(NANO["encoder"], depth=depth)),
                                 Decoder(replace(NANO["decoder"], depth=depth, frames=frames)))
    for parameter in model.parameters():
        parameter.data += nudge * torch.randn(parameter.shape)
    model.encoder.tokens.data.normal_()                                      # tiny tokens and young statistics would
    model.encoder.running_norm.count.fill_(1)                                 # magnify rounding
    return model


@pytest.fixture
def people(monkeypatch):
    """Every identity that is drawn, in order."""
    seen, draw = [], random_identity
    monkeypatch.setattr(people_module, "random_identity", lambda ids: seen.extend(ids.tolist()) or draw(ids))
    return seen


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(train_ae, "save_samples", lambda *_: (0.0, 0.0))


def around_step(monkeypatch, hook):
    """Call hook(step) before the work of each step."""
    work = train_ae.train_step

    def step(args, preset, loss_of, batches, number, *more):
        hook(number)
        return work(args, preset, loss_of, batches, number, *more)

    monkeypatch.setattr(train_ae, "train_step", step)


def ask_to_stop_at(monkeypatch, when):
    around_step(monkeypatch, lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == when else None)


# ---- data and randomness --------------------------------------------------------------------------------------------

def test_no_two_steps_or_processes_draw_the_same_people(people):
    args, model = train_ae.parse(["--preset", "nano", "--accumulate", "2"]), auto_encoder()
    for rank in range(2):
        numbers = [(step * 2 + part) * 2 + rank for step in range(3) for part in range(2)]
        batches = train_ae.batches(args, NANO, None, numbers, render)
        for step in range(3):
            train_ae.train_step(args, NANO, model, batches, step, rank, 2, Pixel(), CPU, torch.autocast("cpu", enabled=False))
    assert len(set(people)) == 3 * 2 * 2 * args.persons                         # steps, ranks, passes, people of each


@pytest.mark.parametrize("seed", [0, 1, 999])
@pytest.mark.parametrize("frames", [1, 4])
def test_held_out_people_are_never_trained_on(people, no_pictures, tmp_path, seed, frames):
    assert train(tmp_path, "--seed", str(seed), "--frames", str(frames), steps=2) == 0
    assert len(set(people)) == 4 and max(people) < HELD_OUT
    args = train_ae.parse(["--preset", "nano", "--seed", str(seed), "--frames", str(frames)])
    people.clear()
    train_ae.synthetic_batch(args, NANO, 10**9 // 3, render)                 # nor after a billion passes
    assert max(people) < HELD_OUT
    people.clear()
    train_ae.synthetic_batch(args, NANO, 0, render, held_out=True)
    assert min(people) >= HELD_OUT


def test_a_batch_depends_on_its_number_alone():
    args = train_ae.parse(["--preset", "nano"])
    one, again, other = (train_ae.synthetic_batch(args, NANO, number, render) for number in (3, 3, 4))
    assert one[0].shape == (2, 3, 32, 32) and one[1].shape == (4, 3, 32, 32)
    assert same(list(one), list(again)) and not torch.equal(one[0], other[0])


def test_clips_are_frames_in_a_row_of_one_person():
    """A drawing that writes its frame's motion and person into the picture names every picture."""
    def draw(people, motion, size):
        return torch.cat([people, motion], dim=1)[:, None, None]

    seeds = torch.tensor([5, 6])
    reference, target, _ = train_ae.synthetic_video_batch(seeds, 3, 32, draw)
    made = random_clip(seeds, 6)
    for k in range(2):
        want = torch.cat([made["identity"][k].expand(6, -1), made["motion"][k]], dim=1)[:, None, None]   # (6, 1, 1, I+M)
        assert torch.equal(reference[k], want[0]) and torch.equal(target[3 * k:3 * k + 3], want[3:])


def test_randomness_starts_pure_and_ends_as_in_the_paper():
    args = train_ae.parse(["--preset", "nano"])
    shape = (4, 3, 32, 32)
    noise, t, keep = train_ae.sample_noise_t_mask(args, NANO["encoder"], shape, 0, 0, progress=0)
    assert noise.shape == shape and (t == 1).all() and torch.equal(keep, torch.arange(16).expand(6, 16))
    late = [train_ae.sample_noise_t_mask(args, NANO["encoder"], shape, number, 0, progress=1) for number in range(400)]
    times = torch.cat([t for _, t, _ in late])
    assert (times == 1).float().mean() == pytest.approx(0.9, abs=0.03) and (times > 0).all()
    left = torch.tensor([keep.shape[1] for _, _, keep in late])              # 16 - floor(16 U(0, 0.9)): 2 .. 16
    assert (left.min(), left.max()) == (2, 16) and left.float().mean() == pytest.approx(9.3, abs=0.7)
    assert all(keep.shape[0] == 6 and (keep.diff() > 0).all() for _, _, keep in late)
    again = train_ae.sample_noise_t_mask(args, NANO["encoder"], shape, 7, 0, progress=1)
    assert same(list(again), list(late[7])) and not torch.equal(late[6][0], late[7][0])
    assert not torch.equal(again[0], train_ae.sample_noise_t_mask(args, NANO["encoder"], shape, 7, 1, progress=1)[0])


def test_the_frames_of_a_clip_share_their_time():
    args = train_ae.parse(["--preset", "nano", "--frames", "4"])
    t = train_ae.sample_noise_t_mask(args, NANO["encoder"], (8, 3, 32, 32), 2, 0, progress=1)[1].view(2, 4)
    assert (t == t[:, :1]).all()
    many = [train_ae.sample_noise_t_mask(args, NANO["encoder"], (8, 3, 32, 32), k, 0, progress=1)[1].view(2, 4)[:, 0]
            for k in range(20)]
    assert any(a != b for a, b in many)                                      # but not clips


def test_processes_share_neither_people_nor_clips(folder, people, no_pictures, monkeypatch, tmp_path):
    """main() as each of two processes, without the other."""
    drawn, clips, read = {}, {}, data.Clips.__getitem__
    monkeypatch.setattr(training, "ddp_wrap", lambda model, *_: model)
    for rank in range(2):
        monkeypatch.setattr(training, "init_distributed", lambda _, rank=rank: (rank, 2, CPU))
        numbers = clips[rank] = []
        monkeypatch.setattr(data.Clips, "__getitem__", lambda self, n, numbers=numbers: numbers.append(n) or read(self, n))
        people.clear()
        assert train(tmp_path / str(rank), "--data", folder, "synthetic", "--workers", "0", "--accumulate", "2") == 0
        drawn[rank] = set(people)
    assert min(map(len, [*drawn.values(), *clips.values()])) > 2
    assert not drawn[0] & drawn[1] and not set(clips[0]) & set(clips[1])


def test_compiled_shapes_stand_still(no_pictures, monkeypatch, tmp_path):
    """Masks come and go, but nothing is compiled again after the first step."""
    graphs, compiled, make = [], [], torch.compile

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda what, **more: make(what, backend=count, **more))
    around_step(monkeypatch, lambda number: compiled.append(len(graphs)))
    assert train(tmp_path, "--compile", "--checkpoint-activations", steps=10) == 0
    assert compiled[0] == 0 and compiled[1] > 1 and set(compiled[1:]) == {compiled[1]} == {len(graphs)}


# ---- loss and gradients ---------------------------------------------------------------------------------------------

def given_batch():
    """Two people: reference (2, ...), target and noise (4, ...), t (4,), keep (6, 10)."""
    draw = torch.Generator().manual_seed(0)
    reference, target, _ = train_ae.synthetic_batch(train_ae.parse(["--preset", "nano"]), NANO, 0, render)
    target[3] = reference[1]                                                 # one that copying gets right
    return [reference, target, torch.randn(target.shape, generator=draw), torch.tensor([1, 0.8, 0.5, 0.2]),
            random_masking(6, 16, 0.4, draw)]


def test_a_fresh_models_loss_is_that_of_copying():
    """It paints the reference, so v = (z_r - z_t)/t and v - (z - eps) = (z_r - z)/t; copying weighs 1 / (its error + 0.002)."""
    reference, target, noise, t, keep = given_batch()
    loss = auto_encoder(nudge=0)(reference, target, noise, t, keep, NONE, 0.0)
    error = (reference[[0, 0, 1, 1]] - target).square().mean((1, 2, 3))
    assert loss.item() == pytest.approx((0.1 * error / t**2 / (error + 0.002)).mean().item(), rel=1e-5)


def test_known_motion_enters_with_its_weight_and_unknown_does_not():
    model, given = auto_encoder().eval(), given_batch()                      # eval: the running statistics stand still
    plain = model(*given, NONE, 0.7)
    told = model.label_head(model.encoder(torch.cat(given[:2]), given[4]).flatten(1))
    error = (told - train_ae.normalise_factors(TRUTH)).square().mean()
    assert model(*given, TRUTH, 0.7).item() == pytest.approx((plain + 0.7 * error).item(), rel=1e-4)
    assert not torch.equal(model(*given, TRUTH, 0.7), plain) and torch.equal(model(*given, TRUTH, 0.0), plain)
    many = train_ae.normalise_factors(random_motion(torch.arange(4000)))
    assert many.shape == (4000, len(MOTION)) and 0.4 < many.std(0).min() and many.std(0).max() < 1.7


def test_accumulated_gradients_are_the_mean_of_the_passes():
    args, model = train_ae.parse(["--preset", "nano", "--accumulate", "2"]), auto_encoder()
    other, plain = copy.deepcopy(model), torch.autocast("cpu", enabled=False)
    batches = train_ae.batches(args, NANO, None, [6, 7], render)
    loss = train_ae.train_step(args, NANO, model, batches, 3, 0, 1, Pixel(), CPU, plain)
    losses, want = [], {name: 0 for name, _ in other.named_parameters()}
    for number in (6, 7):                                                    # step 3 of 2 passes each
        reference, target, truth = train_ae.synthetic_batch(args, NANO, number, render)
        other.zero_grad()
        random = train_ae.sample_noise_t_mask(args, NANO["encoder"], target.shape, number, 0, 3 / 20)
        losses.append(other(reference, target, *random, truth, 0.3 * 13 / 16))   # fades over 16 of 20 steps; 3 are gone
        losses[-1].backward()
        want = {name: want[name] + p.grad / 2 for name, p in other.named_parameters()}
    assert loss == pytest.approx(sum(losses).item() / 2)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.fixture
def alone(tmp_path):
    """A process group of one: its collectives are real."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_only_the_last_pass_of_a_step_sends_gradients(alone):
    """And each number once; the gradients are those of all passes, with activations checkpointed too."""
    args, plain = train_ae.parse(["--preset", "nano", "--accumulate", "3"]), torch.autocast("cpu", enabled=False)
    model, sent = auto_encoder(), []
    other = copy.deepcopy(model)
    training.checkpoint_activations(model)
    wrapped = training.ddp_wrap(model, 2, CPU)

    def hook(_, bucket):
        sent.append(bucket.buffer().numel())
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    wrapped.register_comm_hook(None, hook)
    for loss_of in (wrapped, other):
        batches = train_ae.batches(args, NANO, None, [12, 14, 16], render)        # those of step 2, process 0 of 2
        train_ae.train_step(args, NANO, loss_of, batches, 2, 0, 2, Pixel(), CPU, plain)
    assert sum(sent) == sum(p.numel() for p in model.parameters())
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_one_batch_is_learnt(monkeypatch, no_pictures, tmp_path):
    args, losses, work = train_ae.parse(["--preset", "nano"]), [], train_ae.train_step
    data = train_ae.synthetic_batch(args, NANO, 0, render)
    luck = train_ae.sample_noise_t_mask(args, NANO["encoder"], data[1].shape, 0, 0, progress=0)
    monkeypatch.setattr(train_ae, "synthetic_batch", lambda *_: data)
    monkeypatch.setattr(train_ae, "sample_noise_t_mask", lambda *_: luck)
    monkeypatch.setattr(train_ae, "train_step", lambda *given: losses.append(work(*given)) or losses[-1])
    assert train(tmp_path, "--label-weight", "0", steps=60) == 0
    assert losses[0] > 0.05 and losses[-1] < losses[0] / 5


def half(rank, folder):
    """One of two processes: one step's gradients on person `rank` and their two targets."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(minutes=2))
    try:
        reference, target, noise, t, keep = given_batch()
        mine = slice(2 * rank, 2 * rank + 2)
        model = auto_encoder(seed=rank)                                      # the first process's weights must win
        rows, truth = (torch.cat([x[rank:rank + 1], x[2:][mine]]) for x in (keep, TRUTH))
        wrapped = training.ddp_wrap(model, 2, CPU)
        wrapped(reference[rank:rank + 1], target[mine], noise[mine], t[mine], rows, truth, 0.3).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)              # as in main(): length 1
        wishes = [training.any_rank(wish, CPU) for wish in (rank == 1, False)]
        torch.save({"gradients": {name: p.grad for name, p in model.named_parameters()}, "wishes": wishes,
                    "buffers": dict(model.named_buffers())}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(half, (str(tmp_path),), nprocs=2)
    model = auto_encoder()
    model(*given_batch(), TRUTH, 0.3).backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert got["wishes"] == [True, False]                                # one wish is enough, on every process
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
            size.append((x, x.untyped_storage().nbytes()))                   # held, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(*given_batch(), TRUTH, 0.3)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, sum(n for _, n in size)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_activations_change_memory_alone(bf16, compiled):
    plain = auto_encoder(depth=2, frames=2)                                  # with temporal blocks
    other = copy.deepcopy(plain)
    names = list(other.state_dict())
    training.checkpoint_activations(other)
    for model in (plain, other) if compiled else ():
        model.decoder.compile(dynamic=False, backend="aot_eager")
    want, much = gradients(plain, bf16=bf16)
    got, little = gradients(other, bf16=bf16)
    assert list(other.state_dict()) == names and same(dict(plain.named_buffers()), dict(other.named_buffers()))
    assert same(want, got) and little < 0.5 * much


# ---- whole runs -----------------------------------------------------------------------------------------------------

def test_a_run_writes_its_files(tmp_path, capsys):
    assert train(tmp_path, "--save-every", "2", "--accumulate", "2") == 0
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "semo.safetensors", "state.pt", "step000002.png", "step000004.png"]
    rows = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(math.isfinite(row[name]) for row in rows for name in ("loss", "psnr", "psnr_copy", "pictures_per_second"))
    models, meta = load_models(tmp_path / "semo.safetensors")
    assert list(models) == ["encoder", "decoder"] and (meta["trained_steps"], meta["size"]) == (4, 32)
    ema = state(tmp_path)["ema"]
    for name, value in {f"{kind}.{k}": v for kind, m in models.items() for k, v in m.state_dict().items()}.items():
        torch.testing.assert_close(value, ema[name], rtol=1e-3, atol=1e-6, msg=name)     # the release is the EMA
    assert "loss=" in capsys.readouterr().err                                # the bar


def test_pictures_show_reference_target_and_output(tmp_path):
    model, args = auto_encoder(nudge=0), train_ae.parse(["--preset", "nano"])
    psnr, copied = train_ae.save_samples(tmp_path / "p.png", model, Pixel(), args, NANO, CPU)
    reference, target, _ = train_ae.synthetic_batch(args, NANO, 0, render, held_out=True)
    reference = reference[[0, 0, 1, 1]]
    assert copied == pytest.approx(-10 * math.log10((reference - target).square().mean() / 4), abs=1e-3)
    assert psnr == pytest.approx(copied, abs=1e-3)                           # a fresh model copies
    got = torch.tensor(np.asarray(Image.open(tmp_path / "p.png"))).permute(2, 0, 1) / 127.5 - 1
    assert got.shape == (3, 4 * 32, 4 * 32)                                  # 4 rows of 4 targets
    for row, want in enumerate((reference, target, reference, reference)):
        for k in range(4):
            torch.testing.assert_close(got[:, 32 * row:32 * row + 32, 32 * k:32 * k + 32], want[k], atol=0.01, rtol=0)


def test_stop_and_resume_give_the_same_run(monkeypatch, tmp_path):
    assert train(tmp_path / "whole", steps=10) == 0
    with monkeypatch.context() as patch:
        ask_to_stop_at(patch, 4)                                             # while the fifth step is computed
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


def test_a_finished_run_does_nothing_more(tmp_path):
    assert train(tmp_path) == 0
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    assert train(tmp_path) == 0
    assert before == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}


def test_a_kill_while_the_last_step_is_saved_costs_no_release(monkeypatch, tmp_path):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_ae, "save_samples", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    assert train(tmp_path) == 0                                              # the same command again
    assert load_models(tmp_path / "semo.safetensors")[1]["trained_steps"] == 4


def test_nan_stops_the_run_and_spares_the_state(monkeypatch, no_pictures, tmp_path):
    assert train(tmp_path / "whole", steps=6) == 0
    make, out = train_ae.synthetic_batch, tmp_path / "out"

    def spoilt(args, preset, number, *more):
        reference, target, truth = make(args, preset, number, *more)
        return reference, target * (float("nan") if number == 3 else 1), truth

    with monkeypatch.context() as patch:
        patch.setattr(train_ae, "synthetic_batch", spoilt)
        with pytest.raises(SystemExit) as end:
            train(out, "--save-every", "2", steps=6)
    assert str(end.value).startswith("loss nan") and "step 3" in str(end.value) and "state.pt" in str(end.value)
    assert end.value.code not in (None, 0)
    held = state(out)
    assert held["step"] == 2 and all(v.isfinite().all() for kind in ("model", "ema") for v in held[kind].values())
    load_models(out / "semo.safetensors")
    assert train(out, "--save-every", "2", steps=6) == 0                     # the same command again, without the fault
    assert same(state(out), state(tmp_path / "whole"))


def test_an_infinite_gradient_stops_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(SystemExit, match="gradient inf at step 0"):
        train(tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_video_stage_starts_from_the_image_release(monkeypatch, tmp_path):
    image = auto_encoder(seed=5)
    save_weights(tmp_path / "image.safetensors", {"encoder": image.encoder, "decoder": image.decoder}, {})
    first = []
    make = training.optimisers
    monkeypatch.setattr(training, "optimisers", lambda model, *rates: first.append(copy.deepcopy(model)) or make(model, *rates))
    assert train(tmp_path / "video", "--frames", "4", "--init", str(tmp_path / "image.safetensors"), steps=2) == 0
    held = first[0].state_dict()
    for name, value in image.state_dict().items():
        if not name.startswith("label_head."):                               # of no use in shared weights
            torch.testing.assert_close(held[name], value, rtol=1e-3, atol=1e-6, msg=name)
    models, _ = load_models(tmp_path / "video" / "semo.safetensors")
    assert models["decoder"].config.frames == 4 and len(models["decoder"].temporal) == 1
    assert models["decoder"].temporal[0].attention.out.weight.any()          # it learns
    with pytest.raises(SystemExit, match="other sizes"):
        train(tmp_path / "video", steps=2)                                   # the image stage in the video run's folder


def torchrun(out, *words, log=subprocess.DEVNULL, more=()):
    """Start training of the nano preset by torchrun; words are its own, more those of train_ae.py."""
    command = [sys.executable, "-m", "torch.distributed.run", *words, "train_ae.py", "--preset", "nano", "--device", "cpu", "--steps",
               "12", "--accumulate", "2", "--out", str(out), *more]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)


def wait_for(found, process, seconds=100):
    """Until found() is true, while the process runs."""
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)


def children(process):
    """The processes that torchrun started: {rank: pid}."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        pids = [int(word) for word in file.read().split()]
    ranks = {pid: re.search(rb"\0RANK=(\d+)\0", open(f"/proc/{pid}/environ", "rb").read()) for pid in pids}
    return {int(rank[1]): pid for pid, rank in ranks.items() if rank}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of two processes from its beginning to its end."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert torchrun(out, "--standalone", "--nproc_per_node=2").wait(100) == 0
    return out


def test_torchrun_with_two_processes(unbroken):
    assert sorted(os.listdir(unbroken)) == ["log.jsonl", "semo.safetensors", "state.pt", "step000012.png"]
    assert len(open(unbroken / "log.jsonl").readlines()) == 1                # one process writes
    assert state(unbroken)["step"] == 12
    load_models(unbroken / "semo.safetensors")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_costs_no_bit(unbroken, tmp_path, rank):
    """torchrun ends the other one, which must neither hang nor save, and starts both again."""
    process = torchrun(tmp_path, "--standalone", "--nproc_per_node=2", "--max-restarts=3", more=["--save-every", "3"])
    wait_for((tmp_path / "state.pt").exists, process)
    os.kill(children(process)[rank], signal.SIGKILL)
    assert state(tmp_path)["step"] < 12
    assert process.wait(100) == 0
    assert same(state(tmp_path), state(unbroken))                            # weights, EMA, optimisers


def test_two_nodes_train_as_one(unbroken, tmp_path):
    """Two torchruns that meet at a port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=semo", f"--rdzv_endpoint=localhost:{port}",
             "--local_addr=localhost"]
    with open(tmp_path / "log", "w") as log:
        nodes = [torchrun(tmp_path, *words, f"--node_rank={k}", log=log) for k in range(2)]
        assert [node.wait(100) for node in nodes] == [0, 0], (tmp_path / "log").read_text()[-4000:]
    assert same(state(tmp_path), state(unbroken))


def test_torchruns_end_is_a_wish_to_stop_and_readers_outlive_it(folder, tmp_path):
    """It signals whole process groups; a reader that fell to it would take training down before it could save."""
    with open(tmp_path / "log", "w") as log:
        process = torchrun(tmp_path, "--standalone", "--nproc_per_node=1", log=log, more=[
            "--data", folder, "--workers", "1", "--save-every", "9999", "--steps", "9999"])
        wait_for(lambda: "loss=" in (tmp_path / "log").read_text(), process)
        process.terminate()
        assert process.wait(100) != 0
    assert 0 < state(tmp_path)["step"] < 9999, (tmp_path / "log").read_text()[-3000:]


# ---- refusals -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong", [["--steps", "-1"], ["--persons", "-2"], ["--frames", "0"], ["--accumulate", "0"],
                                   ["--save-every", "0"], ["--mask-max", "1"], ["--mask-max", "-0.1"], ["--mask-max", "nan"],
                                   ["--preset", "huge"], ["--step", "3"], ["--steps", "many"], ["extra"]])
def test_bad_arguments_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as end:
        train_ae.main(["--preset", "nano", *wrong])
    assert end.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["--steps", "--persons"])
def test_zero_is_refused(name):
    with pytest.raises(SystemExit) as end:
        train_ae.parse(["--preset", "nano", name, "0"])
    assert end.value.code == 2


def test_a_wrong_init_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="train_ae.py: .*none.safetensors") as end:
        train(tmp_path, "--init", str(tmp_path / "none.safetensors"))
    assert end.value.code not in (None, 0)


# ---- real clips -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared set of two people, one of them a test person: grey pictures of 100 and of 200, a bar moving across."""
    made = tmp_path_factory.mktemp("set")
    (made / "clips").mkdir()
    for person in range(2):
        with VideoWriter(made / f"clips/{person}.mp4", 32) as video:
            for k in range(30):
                picture = np.full((32, 32, 3), 100 * (person + 1), np.uint8)
                picture[:, k:k + 2] = 20
                video.write(picture)
    rows = [{"file": f"clips/{k}.mp4", "identity": str(k), "split": split, "frames": 30, "sound": False}
            for k, split in enumerate(("train", "test"))]
    write_lines(made / "manifest.jsonl", rows)
    return str(made)


def test_real_clips_train_and_resume_like_drawn_ones(folder, monkeypatch, tmp_path):
    for workers in ("0", "1"):
        assert train(tmp_path / workers, "--data", folder, "synthetic", "--workers", workers, steps=6) == 0
    with monkeypatch.context() as patch:
        ask_to_stop_at(patch, 2)
        assert train(tmp_path / "parts", "--data", folder, "synthetic", "--workers", "0", steps=6) == 130
    assert train(tmp_path / "parts", "--data", folder, "synthetic", "--workers", "0", steps=6) == 0
    assert same(state(tmp_path / "0"), state(tmp_path / "1")) and same(state(tmp_path / "0"), state(tmp_path / "parts"))


def test_sets_share_the_batches_and_test_people_are_only_shown(folder):
    args = train_ae.parse(["--preset", "nano", "--data", folder, "synthetic", "--workers", "0"])
    real = train_ae.real_clips(args, NANO, "train")
    grey = [(x[0][:, 0] - x[0][:, 1]).std().item() < 0.05 for x in train_ae.batches(args, NANO, real, range(40), render)]
    assert 18 <= sum(grey) <= 22
    assert train_ae.held_out_batch(args, NANO)[0].median() > 0.3             # the test person


def test_the_video_stage_takes_real_clips(folder, tmp_path):
    assert train(tmp_path, "--data", folder, "--frames", "4", "--workers", "0", steps=2) == 0


def test_a_folder_that_was_not_prepared_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no manifest.jsonl"):
        train(tmp_path / "out", "--data", str(tmp_path))


@pytest.mark.parametrize("name", ["small", "paper"])
def test_the_larger_presets_are_what_readme_says(name):
    preset = train_ae.PRESETS[name]
    assert preset["encoder"].token_dim == preset["decoder"].token_dim and train_ae.image_px(preset) == 256
    assert (preset["encoder"].num_tokens, preset["encoder"].token_dim) == (1, {"small": 128, "paper": 512}[name])


# ---- reflow ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A release whose decoder paints at random, along bent paths, with a generator that must survive."""
    path, model = tmp_path_factory.mktemp("teacher") / "t.safetensors", auto_encoder()
    torch.manual_seed(5)
    for p in model.decoder.parameters():
        p.data += 0.1 * torch.randn_like(p)
    generator = Generator(GeneratorConfig(token_dim=8, width=32, depth=1, heads=1, window=4, past=4, lookahead=1))
    save_weights(path, {"encoder": model.encoder, "decoder": model.decoder, "generator": generator},
                          {"latents": "pixel", "size": 32, "steps": 20, "audio": "mel", "gen_steps": 2, "guidance": 1.5})
    return str(path)


def test_reflow_pairs_are_what_the_teacher_paints(teacher):
    models, _ = load_models(teacher)
    reference, target, _ = train_ae.synthetic_batch(train_ae.parse(["--preset", "nano"]), NANO, 0, render)
    noise = torch.randn(target.shape)
    goal = train_ae.reflow_pairs(models, reference, target, noise, 3)
    with torch.no_grad():
        cache = models["decoder"].encode_reference(reference, models["encoder"](reference))
        z, m_t = noise, models["encoder"](target)
        for t in (1, 2 / 3, 1 / 3):
            z = z + models["decoder"](z, torch.full((len(z),), t), m_t, cache) / 3
    torch.testing.assert_close(goal, z, atol=1e-4, rtol=1e-4)
    model, t = auto_encoder().eval(), torch.ones(len(noise))
    keep = random_masking(len(reference) + len(target), 16, 0.0)
    here, there = (model(reference, target, noise, t, keep, NONE, 0.0, goal) for goal in (target, z))
    plain = model(reference, target, noise, t, keep, NONE, 0.0)
    assert torch.equal(here, plain) and not torch.isclose(there, plain)


@pytest.mark.parametrize("more", [[], ["--one-step"]])
def test_a_student_nears_its_teacher_in_one_step(teacher, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    words = ["--preset", "nano", "--reflow", teacher, "--teacher-steps", "4", "--steps", "200", "--device", "cpu"]
    assert train_ae.main([*words, *more]) == 0
    student, meta = load_models(tmp_path / "runs/reflow_ae/semo.safetensors")
    models, _ = load_models(teacher)
    assert same(student["encoder"].state_dict(), models["encoder"].state_dict())
    assert same(student["generator"].state_dict(), models["generator"].state_dict())
    assert (meta["steps"], meta["gen_steps"], meta["guidance"]) == (1, 2, 1.5)
    args = train_ae.parse(["--preset", "nano"])
    reference, target, _ = train_ae.synthetic_batch(args, NANO, 0, render, held_out=True)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    want = train_ae.reflow_pairs(models, reference, target, noise, 4)
    before, after = ((train_ae.reflow_pairs(m, reference, target, noise, 1) - want).square().mean() for m in (models, student))
    assert after < 0.7 * before, (before, after)


def test_reflow_and_its_options_are_refused_where_they_say_nothing(tmp_path, teacher):
    for wrong in (["--one-step"], ["--reflow", teacher, "--init", teacher], ["--reflow", teacher, "--teacher-steps", "0"]):
        with pytest.raises(SystemExit) as end:
            train_ae.parse(["--preset", "nano", *wrong])
        assert end.value.code == 2
    with pytest.raises(SystemExit, match="none.safetensors"):
        train(tmp_path, "--reflow", str(tmp_path / "none.safetensors"))
    with pytest.raises(SystemExit, match="needs the preset it was trained with"):
        train_ae.main(["--preset", "tiny", "--reflow", teacher, "--out", str(tmp_path), "--device", "cpu"])
