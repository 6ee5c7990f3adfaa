"""training.py: draws, optimisers, schedule, EMA, and state that survives kills."""
import copy
import json
import os
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

import training
from decoder import Decoder, DecoderConfig
from encoder import EncoderConfig, MotionEncoder
from generator import Generator, GeneratorConfig
from media import charts
from media.files import InputError
from media.weights import save_weights
from sample import load_models

SHAPE = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "heads": 1, "token_dim": 8}
META = {"latents": "pixel", "size": 32, "steps": 1, "trained_steps": 20, "audio": "mel", "gen_steps": 4,
        "guidance": 1.5}


def networks(seed=0, **decoder):
    """All three, no parameter left at zero."""
    torch.manual_seed(seed)
    models = {"encoder": MotionEncoder(EncoderConfig(**SHAPE)),
              "decoder": Decoder(DecoderConfig(**SHAPE, tokens_per_motion=2, **decoder)),
              "generator": Generator(GeneratorConfig(token_dim=8, width=32, depth=1, heads=1, window=4,
                                                     past=4, lookahead=1))}
    for model in models.values():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return models


# ---- processes and randomness ------------------------------------------------------------------------------

@pytest.fixture
def release(tmp_path):
    save_weights(tmp_path / "w.safetensors", networks(), META)
    return tmp_path / "w.safetensors"


def test_draws_repeat_and_differ():
    def first(*place):
        return tuple(torch.rand(4, generator=training.step_rng(*place)).tolist())

    places = [(seed, rank, step) for seed in range(4) for rank in range(4) for step in range(6)]
    assert len({first(*place) for place in places}) == len(places)           # seed, rank and step all count
    assert all(first(*place) == first(*place) for place in places)
    torch.rand(3)                                                            # the global source does not
    assert first(1, 2, 3) == first(1, 2, 3)


def test_start_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert training.init_distributed("cpu") == (0, 1, torch.device("cpu"))
    model = nn.Linear(2, 2)
    assert training.ddp_wrap(model, 1, torch.device("cpu")) is model
    assert training.any_rank(True, "cpu") is True and training.any_rank(False, "cpu") is False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_a_wish_and_the_second_ends(number, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    stopper = training.Stopper()
    assert not stopper.wanted
    os.kill(os.getpid(), number)
    assert stopper.wanted and signal.getsignal(number) == signal.SIG_DFL


def test_under_torchrun_a_second_signal_changes_nothing(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    stopper = training.Stopper()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopper.wanted


TWO = """
import atexit, sys, time
atexit.register(sum, range(10**8))              # the last act of an interpreter; it keeps its lock meanwhile
import torch, training

def main():
    atexit.register(print, "the interpreter ends")
    rank, world, device = training.init_distributed("cpu")
    torch.set_num_threads(int(sys.argv[1]))
    model = training.ddp_wrap(torch.nn.Linear(64, 64), world, device)
    for _ in range(3):
        model(torch.ones(8, 64)).sum().backward()
    assert training.any_rank(rank == 1, device)
    print("worked")
    time.sleep(rank / 2)                                         # a collective ends later than the first one
    torch.distributed.all_reduce(torch.ones(8), async_op=True)
    time.sleep(rank / 2)
    return 130                                                   # as a run that was stopped

training.shutdown(main)
"""


def environ_of_two():
    """-> what torchrun tells each of two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [{"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(rank)}
            for rank in range(2)]


LONG = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize("starts, threads", [
    (1, 2), pytest.param(150, 1, marks=LONG), pytest.param(150, 2, marks=LONG)])
def test_two_processes_end_with_their_own_status(tmp_path, monkeypatch, starts, threads):
    """The interpreter is not taken down under a thread of the group that frees a tensor: with Python 3.11
    that is SIGABRT, "terminate called without an active exception"."""
    (tmp_path / "two.py").write_text(TWO)
    monkeypatch.setenv("PYTHONPATH", str(Path(training.__file__).parent))
    for _ in range(starts):
        runs = [subprocess.Popen([sys.executable, tmp_path / "two.py", str(threads)], text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 env={**os.environ, **environ})
                for environ in environ_of_two()]
        for run in runs:
            out, err = run.communicate(timeout=300)
            assert (run.returncode, out) == (130, "worked\n"), err
            assert "terminate" not in err and "Traceback" not in err, err


def fail(environ, how, log):
    """One of two processes, which ends in an error or in a sentence, or is stopped."""
    def main():
        rank, world, device = training.init_distributed("cpu")
        model = training.ddp_wrap(nn.Linear(8, 8), world, device)
        model(torch.ones(2, 8)).sum().backward()
        if how == "fails" and rank == 1:
            raise KeyError("a fault of ours")
        if how == "tells":
            raise SystemExit("not finite")
        return 130

    os.environ.update(environ)
    sys.stderr = open(log, "w")
    training.shutdown(main)


@pytest.mark.parametrize("how, statuses, words",
                         [("fails", [130, 1], "a fault of ours"), ("tells", [1, 1], "not finite")])
def test_a_process_that_fails_waits_for_nobody(fork, tmp_path, how, statuses, words):
    runs = [fork.Process(target=fail, args=(environ, how, tmp_path / f"log {rank}"))
            for rank, environ in enumerate(environ_of_two())]
    for run in runs:
        run.start()
    for run in runs:
        run.join(300)
    assert [run.exitcode for run in runs] == statuses and words in (tmp_path / "log 1").read_text()


def test_one_process_ends_as_ever():
    for status in (0, 130):
        with pytest.raises(SystemExit) as stop:
            training.shutdown(lambda status=status: status)
        assert stop.value.code == status
    with pytest.raises(KeyError):
        training.shutdown(lambda: {}["x"])


# ---- optimisation ------------------------------------------------------------------------------------------

def test_every_parameter_has_one_optimiser():
    model = nn.ModuleDict(networks(frames=4))
    adam, muon = training.optimisers(model, lr=1e-3, muon_lr=0.02)
    assert isinstance(adam, torch.optim.AdamW) and isinstance(muon, torch.optim.Muon)
    held = [id(p) for o in (adam, muon) for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())         # all, each once
    name = {id(p): n for n, p in model.named_parameters()}
    of_muon = {name[id(p)] for group in muon.param_groups for p in group["params"]}
    layers = {f"{part}.weight" for part in ("attention.qkv", "attention.out", "mlp.0", "mlp.2")}
    listen = {f"{part}.weight" for at in ("cross_attn_audio", "cross_attn_ref")
              for part in (f"{at}.q", f"{at}.kv", f"{at}.out")}
    want = {f"{kind}.blocks.0.{layer}" for kind in model
            for layer in layers | (listen if kind == "generator" else set())}
    assert of_muon == want                                           # no embedding, norm, bias, adaLN or head
    assert (adam.param_groups[0]["peak"], muon.param_groups[0]["peak"]) == (1e-3, 0.02)


def test_without_a_rate_for_muon_adamw_has_all():
    model = networks()["decoder"]
    adam, = training.optimisers(model, 1e-3, None)
    assert isinstance(adam, torch.optim.AdamW)
    assert len(adam.param_groups[0]["params"]) == len(list(model.parameters()))


def test_a_model_without_blocks_needs_no_muon():
    assert [type(o) for o in training.optimisers(nn.Linear(3, 3), 1e-3, 0.02)] == [torch.optim.AdamW]


def test_rate_warms_up_holds_and_decays():
    found = training.optimisers(networks()["encoder"], lr=1e-3, muon_lr=0.02)
    for step, factor in ((0, 0.02), (24, 0.5), (49, 1), (500, 1), (700, 1), (850, 0.5), (970, 0.1),
                         (999, 1 / 300), (1000, 0)):
        training.set_lr(found, step, 1000, warmup=50)
        assert [o.param_groups[0]["lr"] for o in found] == pytest.approx([1e-3 * factor, 0.02 * factor])
    training.set_lr(found, 0, 1, warmup=50)                                # a run of one step still moves
    assert found[0].param_groups[0]["lr"] == pytest.approx(1e-3 / 50)


@pytest.mark.parametrize("step, decay", [(0, 0.1), (8, 0.5), (100_000, 0.999)])
def test_ema_equals_the_formula(step, decay):
    old, new = networks(0)["encoder"], networks(1)["encoder"]
    new.running_norm.mean.fill_(3.0)
    new.running_norm.count.fill_(7.0)
    before, now = copy.deepcopy(old.state_dict()), new.state_dict()
    want = {name: decay * value + (1 - decay) * now[name] for name, value in before.items()}
    training.update_ema(old, new, step)
    for name, value in old.state_dict().items():
        torch.testing.assert_close(value, want[name], msg=name)
    assert old.running_norm.mean[0] == pytest.approx(3 * (1 - decay), rel=1e-4)       # statistics too
    assert torch.equal(old.pos_embed, new.pos_embed)


def run_of(seed=0, frames=1, steps=2):
    """A model, its EMA and its optimisers after two steps on a made-up loss."""
    models = networks(seed, frames=frames)
    model, configs = nn.ModuleDict(models), {kind: m.config for kind, m in models.items()}
    ema, found = copy.deepcopy(model), training.optimisers(model, 1e-3, 0.02)
    for step in range(steps):
        sum(p.square().sum() for p in model.parameters()).backward()
        for optimiser in found:
            optimiser.step()
            optimiser.zero_grad()
        training.update_ema(ema, model, step)
    return configs, model, ema, found


ARGS = Namespace(out="here", device="cpu", steps=4, lr=1e-3, data=["synthetic"], mask_max=0.5)


def save(path, configs, model, ema, found):
    training.save_checkpoint(path, 2, ARGS, configs, model, ema, found)


def test_resume_restores_everything(tmp_path):
    configs, *old = run_of()
    _, *new = run_of(seed=1, steps=0)
    assert training.resume(tmp_path / "state.pt", ARGS, configs, *new) == 0     # nothing there yet: a new run
    save(tmp_path / "state.pt", configs, *old)
    torch.load(tmp_path / "state.pt", weights_only=True)                     # plain data, no pickled code
    assert training.resume(tmp_path / "state.pt", ARGS, configs, *new) == 2
    for a, b in zip(old[:2], new[:2], strict=True):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    for a, b in zip(old[2], new[2], strict=True):
        a, b = a.state_dict(), b.state_dict()
        assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys() != set()
        for i, held in a["state"].items():
            assert all(torch.equal(v, b["state"][i][k]) for k, v in held.items())


def test_resume_refuses_a_state_that_another_node_does_not_see(tmp_path, monkeypatch):
    """The other one sees the opposite."""
    monkeypatch.setattr(training, "any_rank", lambda wish, device: True)
    for seen in (False, True):
        with pytest.raises(InputError, match="state.pt.*share"):
            training.resume(tmp_path / "state.pt", ARGS, *run_of(steps=0))
        if not seen:
            save(tmp_path / "state.pt", *run_of())


def test_resume_refuses_other_networks(tmp_path):
    save(tmp_path / "state.pt", *run_of())
    other = run_of(frames=4, steps=0)
    before = copy.deepcopy(other[1].state_dict())
    with pytest.raises(InputError, match="state.pt.*--out"):
        training.resume(tmp_path / "state.pt", ARGS, *other)
    assert all(torch.equal(v, before[k]) for k, v in other[1].state_dict().items())


def test_resume_refuses_other_settings_by_name(tmp_path):
    save(tmp_path / "state.pt", *run_of())
    changed = Namespace(**{**vars(ARGS), "mask_max": 0.9, "data": ["a", "synthetic"]})
    with pytest.raises(InputError) as refused:
        training.resume(tmp_path / "state.pt", changed, *run_of(steps=0))
    said = str(refused.value)
    assert "--mask-max 0.5 -> 0.9" in said and "--data ['synthetic'] -> ['a', 'synthetic']" in said
    assert "--lr" not in said and "--steps" not in said
    elsewhere = Namespace(**{**vars(ARGS), "out": "there", "device": "cuda", "save_every": 7})
    assert training.resume(tmp_path / "state.pt", elsewhere, *run_of(steps=0)) == 2


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_resume_refuses_what_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "state.pt"
    if content is None:                                                      # a checkpoint without settings
        torch.save({"step": 3}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match="state.pt is not a training checkpoint"):
        training.resume(path, ARGS, *run_of(steps=0))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    training.make_run_folder(tmp_path / "a/b")
    assert os.listdir(tmp_path / "a/b") == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="--out .*file.* cannot be written"):
        training.make_run_folder(tmp_path / "file/run")


def test_settings_are_printed(capsys):
    training.print_settings(ARGS, nn.Linear(1000, 1000), 0, more=3)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert "mask_max: 0.5" in lines and "parameters: 1.0 million" in lines and lines[-1] == "more: 3"
    training.print_settings(ARGS, nn.Linear(1, 1), ARGS.steps)
    assert capsys.readouterr().err.splitlines()[-1] == "finished at step 4, nothing to do"


# ---- starting from a release -------------------------------------------------------------------------------

def test_a_video_model_starts_as_the_image_model(release):
    image, video = networks()["decoder"], Decoder(DecoderConfig(**SHAPE, tokens_per_motion=2, frames=4))
    training.init_from(release, load_models(release)[0], decoder=video)
    for block in video.temporal:
        assert not block.attention.out.weight.any() and not block.attention.out.bias.any()
    image = load_models(release)[0]["decoder"]
    z, m = torch.randn(5, 3, 32, 32), torch.randn(5, 1, 8)
    one, many = (model(z[1:], torch.full((4,), 0.7), m[1:], model.encode_reference(z[:1], m[:1]))
                 for model in (image, video))
    torch.testing.assert_close(many, one)
    assert one.abs().mean() > 0.1


def test_init_from_says_what_is_wrong(tmp_path, release):
    with pytest.raises(ValueError, match="w.safetensors holds no poser, only encoder, decoder, generator"):
        training.init_from(release, load_models(release)[0], poser=nn.Linear(2, 2))
    save_weights(tmp_path / "video.safetensors", {"decoder": networks(frames=4)["decoder"]}, META)
    with pytest.raises(ValueError, match="video.safetensors: its decoder has another shape"):
        path = tmp_path / "video.safetensors"
        training.init_from(path, load_models(path)[0], decoder=networks()["decoder"])
    for change in ({"depth": 2}, {"width": 64}):
        with pytest.raises(ValueError, match="w.safetensors: its encoder has another shape"):
            training.init_from(release, load_models(release)[0],
                               encoder=MotionEncoder(EncoderConfig(**{**SHAPE, **change})))


# ---- log ---------------------------------------------------------------------------------------------------

def test_log_lines_are_json(tmp_path, monkeypatch):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1e-9, "name": "a\nb"}]
    monkeypatch.setattr(training, "save_curves", charts.save_curves)
    for row in rows:
        training.log(tmp_path, **row)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == rows
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "progress.png"]
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
