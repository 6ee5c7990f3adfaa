"""What both training scripts need: options, processes, random draws, optimisers, EMA, checkpoints, log.

Plain functions; the loops themselves stand in train_ae.py and train_gen.py.

`state.pt` (torch.save, loads under weights_only=True) holds what a run needs to go on: weights, EMA,
optimisers, step. What a user needs is another file (media/weights.py). Both are written to a temporary name
and moved into place, so that a kill at any moment leaves a good file.
"""
import argparse
import gc
import json
import math
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from media.charts import save_curves
from media.device import pick_device
from media.files import InputError, atomic_write, remove_unfinished

# ---- options -----------------------------------------------------------------------------------------------

def make_parser(description, presets):
    """-> a parser of the options that both stages have."""
    p = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=presets, default="tiny", help="sizes of the networks and of the run")
    p.add_argument("--out", help="folder of this run; an unfinished one is resumed (default: under runs/)")
    p.add_argument("--init", metavar="WEIGHTS", help="start from these weights; what they lack starts afresh")
    p.add_argument("--reflow", metavar="TEACHER",
                   help="learn the straight line from noise to what these weights make of it; in place of "
                        "--init and --ae")
    p.add_argument("--one-step", action="store_true", help="with --reflow: the step from pure noise alone")
    p.add_argument("--teacher-steps", type=int, default=20,
                   help="with --reflow: steps of the teacher (default: %(default)s)")
    p.add_argument("--data", nargs="+", metavar="DIR", default=["synthetic"],
                   help="folders made by data.py prepare, drawn equally; the word synthetic stands for the "
                        "synthetic world (default)")
    p.add_argument("--steps", type=int, help="length of the run (default: the preset's)")
    p.add_argument("--mask-max", type=float,
                   help="masks hide a share U(0, this) of the patches (paper: 0.9, in stage 2 0.2)")
    p.add_argument("--seed", type=int, default=0, help="of weights, data and noise (default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                   help="use torch.compile: 1-2 minutes to start, then faster (needs a C++ compiler on CPUs)")
    p.add_argument("--save-every", type=int, default=200,
                   help="steps between checkpoints and samples (default: %(default)s)")
    return p


def check_options(p, args, preset) -> None:
    """Take from the preset what was not given, and refuse values that cannot be."""
    for name, value in vars(args).items():
        if value is None and name in preset:
            setattr(args, name, preset[name])
    if args.init and args.reflow:
        p.error("--reflow begins from its teacher, without --init")
    if args.one_step and not args.reflow:
        p.error("--one-step goes with --reflow")
    for name, value in vars(args).items():
        option, least = f"--{name.replace('_', '-')}", 0 if name in ("seed", "workers") else 1
        if type(value) is int and not least <= value < 2**31:                  # step_rng multiplies the seed
            p.error(f"{option} is {value}; give {least} to {2**31 - 1}")
        if type(value) is float and not 0 <= value < math.inf:
            p.error(f"{option} is {value}; give a number from 0 on")
        if value == "":
            p.error(f"{option} is empty; give a name or leave it out")
    if not 0 <= args.mask_max < 1:
        p.error(f"--mask-max is {args.mask_max}; give a number in [0, 1)")


# ---- processes and randomness ------------------------------------------------------------------------------

def init_distributed(device="auto"):
    """Join the other processes, if torchrun started us -> (rank, world, device). NCCL on GPUs, else gloo."""
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = str(pick_device(device))
    if device == "cuda":
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if world > 1 and not dist.is_initialized():
        backend, store = "nccl" if device.startswith("cuda") else "gloo", rendezvous_store(rank, world)
        hour = timedelta(hours=1)                    # one may encode its clips while the others wait
        dist.init_process_group(backend, timeout=hour, store=store, rank=rank, world_size=world)
    return rank, world, torch.device(device)


def rendezvous_store(rank, world):
    """Where the processes of this start find each other; None leaves it to torch.
    torchrun's own store still holds the addresses of dead processes after a restart (torch 2.13), on which a
    new start fails or hangs. So only the place of a fresh one is read there, until it answers."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host = os.environ["MASTER_ADDR"]
    board = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False)
    if rank == 0:
        store = dist.TCPStore(host, 0, world, is_master=True, wait_for_workers=False)
        board.set("semo", str(store.port))
        return store
    while True:
        port = int(board.get("semo"))
        try:
            socket.create_connection((host, port), timeout=5).close()
            return dist.TCPStore(host, port, world, is_master=False)
        except OSError:                                            # the place of a start that is over
            time.sleep(0.2)


def shutdown(main):
    """Run main() and end the process with its exit status; one that failed waits for no other.
    One of several processes ends without the interpreter's end, which under the threads of a gloo group is a
    SIGABRT now and then, after all work (Python up to 3.13; pytorch issue 190489)."""
    try:
        sys.exit(main())
    except BaseException as end:
        if not dist.is_initialized():
            raise
        status = end.code if isinstance(end, SystemExit) else traceback.format_exc()
    if isinstance(status, str):
        print(status, file=sys.stderr)
    gc.collect()                                                   # reading processes end with their loader
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if isinstance(status, str) else status or 0)


def ddp_wrap(model, world, device):
    """The same model, its gradients averaged over all processes.
    Buffers are not sent: those that change (running statistics) are the same everywhere. Gradients live in
    the buckets that are sent, not beside them."""
    if world == 1:
        return model
    devices = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, devices, forward_sync_buffers=False,
                                               gradient_as_bucket_view=True)


def checkpoint_activations(model):
    """Let each transformer block keep only its input for the backward pass, which computes the rest again.
    Less memory for about a third more arithmetic. In place; names of weights stay."""
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)         # there is no dropout
    for name, module in model.named_modules():
        if name.split(".")[-2:-1] in (["blocks"], ["temporal"]):
            module.forward = partial(again, module.forward)


def step_rng(seed, rank, step):
    """The source of every random number of one step on one process: resuming needs nothing but the step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 4099 + rank)


class Stopper:
    """Turns the first SIGTERM or Ctrl-C into a wish to stop after the current step; a second ends at once.
    Under torchrun it does not: a scheduler's signal comes twice there, from itself and passed on, and
    torchrun kills after its own 30 seconds."""

    def __init__(self):
        self.wanted = False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self.ask)

    def ask(self, number, frame):
        self.wanted = True
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(number, signal.SIG_DFL)


def any_rank(flag, device):
    """Whether the flag of any process is set; all must ask at the same step."""
    if not dist.is_initialized():
        return flag
    total = torch.tensor(float(flag), device=device)
    dist.all_reduce(total, dist.ReduceOp.MAX)
    return bool(total)


# ---- optimisation ------------------------------------------------------------------------------------------

def optimisers(model, lr, muon_lr, weight_decay=0.01):
    """Muon (Jordan et al. 2024) for the matrices of attention and MLP, unless muon_lr is None; else AdamW."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        inner = p.ndim == 2 and "blocks" in name.split(".") and "modulation" not in name
        (matrices if inner and muon_lr is not None else rest).append(p)
    fused = all(p.is_cuda for p in rest)
    optimisers = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=fused)]
    if matrices:
        optimisers.append(torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return optimisers


def set_lr(optimisers, step, steps, warmup, decay=0.3):
    """Warm up linearly, hold, and go down to zero linearly over the last share `decay` of the run."""
    factor = min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, decay * steps))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * factor


def clip_and_step(model, optimisers, loss, step, state, device):
    """Change the weights by the gradients at hand, their norm clipped to 1.
    Where the loss or a gradient of any process is not finite, all end with a sentence that names the last
    good state, and nothing is changed."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if any_rank(not (math.isfinite(loss) and norm.isfinite()), device):
        raise SystemExit(f"loss {loss:.4g}, length of the gradient {norm:.4g} at step {step}: not finite, so "
                         f"training ends. The last good state is in {state}; try a lower learning rate.")
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def ema_decay(steps):
    """The average remembers a two-hundredth of a run (a twentieth was 2 dB behind at Muon's full rate)."""
    return 1 - 1 / (1 + steps / 200)


@torch.no_grad()
def update_ema(ema, model, step, decay=0.999):
    """ema <- decay ema + (1 - decay) model, weights and statistics; a shorter memory in the first steps."""
    rate = 1 - min(decay, (1 + step) / (10 + step))
    old, new = ema.state_dict(), model.state_dict()
    torch._foreach_lerp_([old[k] for k in old], [new[k] for k in old], rate)


# ---- files -------------------------------------------------------------------------------------------------

def atomic_save(path, **state):
    with atomic_write(path, make_folder=True) as temporary:
        torch.save(state, temporary)


def settings(args):
    """The arguments that a run's result depends on, {name: value}; not where it runs or when it saves."""
    free = ("out", "device", "save_every", "workers", "compile", "checkpoint_activations")
    return {name: value for name, value in vars(args).items() if name not in free}


def print_settings(args, model, step, **more):
    """Print what this run does, once, at its start."""
    count = sum(p.numel() for p in model.parameters())
    for name, value in {**vars(args), "parameters": f"{count / 1e6:.1f} million", **more}.items():
        print(f"{name:>24}: {value}", file=sys.stderr)
    if step >= args.steps:
        print(f"finished at step {step}, nothing to do", file=sys.stderr)


def make_run_folder(folder):
    """Make the folder of a run, check that it can be written to, remove what a killed run left unfinished.
    Raises InputError."""
    try:
        os.makedirs(folder, exist_ok=True)
        remove_unfinished(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written to ({error.strerror}); give another") from None


def save_checkpoint(path, step, args, configs, model, ema, optimisers):
    """Write all that `resume` needs."""
    atomic_save(path, step=step, settings=json.dumps(settings(args)),
                configs={kind: asdict(config) for kind, config in configs.items()}, model=model.state_dict(),
                ema=ema.state_dict(), optimisers=[optimiser.state_dict() for optimiser in optimisers])


def resume(path, args, configs, model, ema, optimisers):
    """Go on from `path`, if it exists -> the number of steps done.
    Raises InputError if that run has other networks or other settings, or if only some processes see it: they
    would train different steps."""
    exists, device = os.path.exists(path), next(model.parameters()).device
    if any_rank(exists, device) and any_rank(not exists, device):
        raise InputError(f"{path}: seen by some nodes only; give an --out on a disk that all of them share")
    if not exists:
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, step = json.loads(state["settings"]), state["step"]
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.PickleError) as error:
        raise InputError(f"{path} is not a training checkpoint of this version ({type(error).__name__}); "
                         "give another --out, or remove it to start anew") from None
    if state["configs"] != {kind: asdict(config) for kind, config in configs.items()}:
        raise InputError(f"{path}: this run has networks of other sizes; give another --out, or the --preset "
                         "of the run")
    given = json.loads(json.dumps(settings(args)))
    changed = [f"--{name.replace('_', '-')} {saved.get(name)} -> {given.get(name)}"
               for name in sorted({*saved, *given}) if saved.get(name) != given.get(name)]
    if changed:
        raise InputError(f"{path}: this run has other settings ({', '.join(changed)}); give its own, or "
                         "another --out")
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    for optimiser, saved_optimiser in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved_optimiser)
    return step


def init_from(path, loaded, **models):
    """Start from the models `loaded` from `path`. Raises InputError for other networks.

    What they lack (the temporal blocks of a video model, the experts of a generator, the directions that it
    truncates) keeps its first values.
    """
    for kind, model in models.items():
        if kind not in loaded:
            raise InputError(f"{path} holds no {kind}, only {', '.join(loaded)}")
        try:
            missing, unexpected = model.load_state_dict(loaded[kind].state_dict(), strict=False)
        except RuntimeError as error:
            missing, unexpected = [], [str(error)]
        new = {"temporal", "experts", "truncated"}
        if unexpected or any(not new & set(name.split(".")) for name in missing):
            raise InputError(f"{path}: its {kind} has another shape; it needs the preset it was trained with")


def log(folder, **fields):
    """Add one line to log.jsonl of the folder, and draw its curves as progress.png."""
    path = os.path.join(folder, "log.jsonl")
    with open(path, "a") as file:
        file.write(json.dumps(fields) + "\n")
    save_curves(path, os.path.join(folder, "progress.png"))
