"""How fast it is on this machine, and what waits for what. Medians after a warm-up, with their spread.

    python bench.py [--data DIR]     every preset: parameters, FLOPs, memory, speed of training; and what loading DIR gives

FLOPs are those of forward and backward pass, as torch counts them: two for a multiplication and its addition. State is
weights, gradients, their average and the optimisers'; MB a picture is what the forward pass keeps for the backward. MFU is
their rate as a share of what the machine itself reaches with a large matrix product (bf16; fp32 where bf16 is not fast).
"""
import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import data
import flow
import sample
import train_ae
import train_gen
import training
from decoder import Decoder
from encoder import MotionEncoder, random_keep
from evaluate import table
from generator import Generator
from media import InputError


def timed(work, device, rounds):
    """Seconds of work(), once to warm up and then `rounds` times -> (median, least, most)."""
    spent = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent[1:]), min(spent[1:]), max(spent[1:])


def peak(device):
    """FLOP/s of a large matrix product, in the precision that training uses here."""
    n = 8192 if device.type == "cuda" else 2048
    kind = torch.bfloat16 if training.fast_bf16(device) else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    return 2 * n**3 / timed(lambda: a @ b, device, 10)[0]


# ---- training -------------------------------------------------------------------------------------------------------

def stage_1(name, people, device):
    """-> AutoEncoder of a preset, a function that makes its loss on random pictures, pictures a pass."""
    preset = train_ae.PRESETS[name]
    e, people = preset["encoder"], people or preset["refs"]
    count = people * preset["targets"]
    model = train_ae.AutoEncoder(MotionEncoder(e), Decoder(preset["decoder"])).to(device)
    reference, target, noise = (torch.randn(n, e.channels, e.image_size, e.image_size, device=device) for n in (people, count, count))
    t, unknown = torch.ones(count, device=device), torch.zeros(0, len(train_ae.synthetic.MOTION), device=device)
    keep = random_keep(people + count, (e.image_size // e.patch_size) ** 2, preset["mask_max"] / 2, device=device)
    return model, lambda: model(reference, target, noise, t, keep, unknown, 0.0), count


def stage_2(name, windows, device):
    """-> Generator of a preset, a function that makes its loss on random windows, frames of video a pass."""
    preset, tokens = train_gen.PRESETS[name], train_ae.PRESETS[name]["encoder"]
    c = replace(preset["generator"], num_tokens=tokens.num_tokens, token_dim=tokens.token_dim,
                audio_dim=train_gen.audio.FEATURE_DIM[preset.get("audio", "mel")])
    model, n = Generator(c).to(device), windows or preset["windows"]
    motion, past, heard = (torch.randn(n, rows, width, device=device) for rows, width in (
        (c.window, c.token_dim), (c.past, c.token_dim), (c.past + c.window + c.ahead, c.audio_dim)))
    t, drop = torch.rand(n, device=device), torch.rand(n, device=device) < 0.1
    return model, lambda: flow.flow_loss(model, motion, torch.randn_like(motion), t, past=past, reference=past[:, 0], audio=heard,
                                         drop=drop), n * c.window


def measure(made, loss_of, count, device, rounds):
    """One pass and step as the training scripts take it -> what it costs."""
    optimisers, saved, seen = training.optimisers(made, 1e-4, 1e-3), [], set()
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=training.fast_bf16(device))

    def keep(x):                                                    # what the backward pass needs, each storage once
        if x.untyped_storage().data_ptr() not in seen:
            seen.add(x.untyped_storage().data_ptr())
            saved.append(x.untyped_storage().nbytes())
        return x

    def passes():
        with bf16:
            loss = loss_of()
        loss.backward()
        return loss

    def step():
        loss = passes()
        training.descend(made, optimisers, loss.item(), 0, "", device)

    seen |= {p.untyped_storage().data_ptr() for p in made.parameters()}
    with saved_tensors_hooks(keep, lambda x: x), bf16:
        loss_of()
    with FlopCounterMode(display=False) as flops:
        passes()
    spent = timed(step, device, rounds)
    parameters = sum(p.numel() for p in made.parameters())
    state = sum(x.numel() * x.element_size() for o in optimisers for s in o.state.values() for x in s.values())
    return {"parameters": parameters, "flops": flops.get_total_flops() / count, "speed": count / spent[0],
            "speed_low": count / spent[2], "speed_high": count / spent[1], "state_gb": (state + 3 * 4 * parameters) / 1e9,
            "kept_mb": sum(saved) / count / 1e6}


def loaded(folders, preset, workers, device, batches=12):
    """Pictures a second that the loader gives to stage 1 of a preset, read but not trained on."""
    args = train_ae.parse(["--preset", preset, "--data", *folders, "--workers", str(workers)])
    real = train_ae.real_clips(args, train_ae.PRESETS[preset], "train")
    items = iter(data.loader(real, iter(range(batches + 2 * workers + 2)), workers))
    for _ in range(2 * workers + 1):
        next(items)                                                 # workers start, and read ahead
    start, count = time.perf_counter(), 0
    for pictures in items:
        count += sum(len(part) for part in pictures)
    return count / (time.perf_counter() - start)


def presets(args, device):
    """The table of all presets, and what waits: loading or training."""
    best, rows, found = peak(device), [], {}
    for name in args.presets:
        people = args.people or (1 if device.type == "cpu" and name != "tiny" else None)
        for stage, build, count in (("stage 1", stage_1, people), ("stage 2", stage_2, args.windows)):
            r = measure(*build(name, count, device), device, args.rounds)
            r["mfu"] = r["flops"] * r["speed"] / best
            found[f"{name}, {stage}"] = r
            rows.append([f"{name}, {stage}", f"{r['parameters'] / 1e6:.2f}", f"{r['flops'] / 1e9:.3g}", f"{r['state_gb']:.2f}",
                         f"{r['kept_mb']:.3g}", f"{r['speed']:.1f}", f"{r['speed_low']:.1f}-{r['speed_high']:.1f}", f"{r['mfu']:.0%}"])
    precision = "bf16" if training.fast_bf16(device) else "fp32"
    print(f"{device.type}, {torch.get_num_threads()} threads, {precision}; matrix products reach {best / 1e12:.3g} TFLOP/s")
    table(["training", "M parameters", "GFLOP a picture", "GB of state", "MB a picture", "pictures/s", "spread", "MFU"], rows)
    for name in args.presets if args.data else ():
        r = found[f"{name}, stage 1"]
        r["loaded"] = loaded(args.data, name, args.workers, device)
        waits = "training waits for loading" if r["loaded"] < r["speed"] else "loading waits for training"
        print(f"{name}: {r['loaded']:.0f} pictures/s loaded, {r['speed']:.0f} trained: {waits}")
    return {"peak_flops": best, "presets": found}


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--presets", nargs="+", choices=train_ae.PRESETS, default=["tiny", "small", "paper"])
    p.add_argument("--people", type=int, help="people a pass of stage 1 (default: the preset's; 1 for all but tiny on a CPU)")
    p.add_argument("--windows", type=int, help="windows a pass of stage 2 (default: the preset's)")
    p.add_argument("--data", nargs="+", metavar="DIR", help="also measure how fast clips of these folders are loaded")
    p.add_argument("--workers", type=int, default=2, help="processes that load (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=5, help="measurements of each figure (default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    p.add_argument("--json", help="also write the numbers to this file")
    args = p.parse_args(argv)
    if args.rounds < 1 or args.workers < 0:
        p.error("--rounds must be at least 1, --workers not negative")
    return args


def main(argv=None):
    args = parse(argv)
    try:
        found = presets(args, sample.pick_device(args.device))
    except (InputError, ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    if args.json:
        training.replace(args.json, lambda name: Path(name).write_text(json.dumps(found, indent=1) + "\n"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
