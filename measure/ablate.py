"""The paper's ablations (tables 5 to 7, figure 9) and our own choices, on the synthetic world.

    python -m measure.ablate                        train and measure what is missing, print tables
    python -m measure.ablate --only width mask      some of them: width, count, mask, attention, prediction,
                                                    label, shortcuts, past, emotion

No loss has a label but that of the row which says so.

Every variant differs from `base` in one thing, the shortcuts alone from the paper's method. Each is trained
from every seed on the same people, in the same order, and measured on unseen ones by evaluate.py. Ctrl-C
saves; the same command goes on. Tables are Markdown: mean over seeds, and in brackets the lowest and the
highest seed. --out keeps a folder for each run, with its log, weights and measurements.
"""
import contextlib
import functools
import json
import operator
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import sample
import train_ae
import train_gen
from decoder import DecoderConfig
from encoder import EncoderConfig
from generator import GeneratorConfig
from measure import evaluate
from measure.checkpoint import command_parser, write_json
from media.files import InputError, command

SHAPE = dict(image_size=32, patch_size=8, num_tokens=1, token_dim=64)
BASE = dict(encoder=EncoderConfig(**SHAPE, width=96, depth=3, heads=2),
            decoder=DecoderConfig(**SHAPE, width=128, depth=3, heads=2), loss="weighted", curriculum=True,
            steps=1000, persons=16, targets=4, near=0.5, mask_max=0.5, label_weight=0.0,
            lr=1e-3, muon_lr=0.02)
GENERATOR = dict(generator=GeneratorConfig(), steps=1000, windows=32, clips=256, seconds=4, voices=1,
                 balanced=True, augment=True, mask_max=0.2, lr=1e-3, muon_lr=0.02)
EXPERTS = GeneratorConfig(experts=16)


def token(count, width):
    """Give the base `count` tokens of `width` numbers, of which the decoder makes eight of its own in all."""
    return {"encoder": replace(BASE["encoder"], num_tokens=count, token_dim=width),
            "decoder": replace(BASE["decoder"], num_tokens=count, token_dim=width,
                               tokens_per_motion=8 // count)}


def decoder(**changes):
    return {"decoder": replace(BASE["decoder"], **changes)}


def paper(encoder=(), decoder=(), **changes):
    """Make the paper's method in the base's sizes and with its optimiser, changed in what is given."""
    off = dict(token_init=0, running_norm=False)
    return {"encoder": replace(BASE["encoder"], **{**off, **dict(encoder)}),
            "decoder": replace(BASE["decoder"], **{**train_ae.PAPER, **dict(decoder)}),
            "loss": "velocity", "curriculum": False, "near": 0.0, "mask_max": 0.9, **changes}


# table: {row: what differs from BASE, in the tables of stage 2 from GENERATOR}
TABLES = {
    "width": {"1 x 32": token(1, 32), "1 x 64": {}, "1 x 256": token(1, 256), "1 x 1024": token(1, 1024)},
    "count": {"1 x 64": {}, "2 x 32": token(2, 32), "4 x 16": token(4, 16), "8 x 8": token(8, 8)},
    "mask": {"none": {"mask_max": 0.0}, "0 to 50%": {}, "0 to 90%": {"mask_max": 0.9}},
    "attention": {"reference cached": {}, "full, as in the paper": decoder(full_attention=True)},
    "prediction": {"x": {}, "v": decoder(predict="v")},
    "label": {"none": {}, "known motion, fading": {"label_weight": 0.3}},
    "shortcuts": {"paper": paper(), "token_init": paper(encoder={"token_init": 16}),
                  "running_norm": paper(encoder={"running_norm": True}),
                  "motion_delta": paper(decoder={"motion_delta": True}),
                  "ref_context": paper(decoder={"ref_context": True}),
                  "tokens_per_motion": paper(decoder={"tokens_per_motion": 8}),
                  "weighted loss": paper(loss="weighted"),
                  "curriculum": paper(curriculum=True, near=BASE["near"], mask_max=BASE["mask_max"]),
                  "base": {}, "ours": {"loss": "region", **decoder(warp_grid=4, overlap=True)}},
    "past": {"none": {"mask_max": 0.0}, "0 to 20%": {"mask_max": 0.2}},
    "emotion": {"experts": {"generator": EXPERTS},
                "a table of seven vectors": {"generator": GeneratorConfig(mood_table=True)},
                "learned gates, as in MoEE": {
                    "generator": replace(EXPERTS, mood_table=True, learned_gates=True)},
                "experts, moods never disagree": {"generator": EXPERTS, "agree": True}},
}
TITLES = {"width": "One token, its width (paper: table 5)",
          "count": "64 numbers in 1 to 8 tokens (paper: table 6)",
          "mask": "Masked patches in stage 1 (paper: table 7, figure 9)", "attention": "Who sees the target",
          "prediction": "What the decoder predicts",
          "label": "A label in the loss of stage 1",
          "shortcuts": "The paper's method, each shortcut alone, all of them (base), as released (ours)",
          "past": "Masked patches of the past frames in stage 2",
          "emotion": "How the generator is told an emotion"}
CLIPS = {"reconstruct": 12, "probe": 300, "talk": 12, "emotion": 8}
# what is measured: title -> (file, path to the number, digits)
MEASURES = {
    "PSNR": ("reconstruct", ("rows", "ours, 1 step", "psnr", "mean"), 2),
    "SSIM": ("reconstruct", ("rows", "ours, 1 step", "ssim", "mean"), 3),
    "face PSNR": ("reconstruct", ("rows", "ours, 1 step", "face_psnr", "mean"), 2),
    "B as A": ("reconstruct", ("rows", "B as A, 1 step", "psnr", "mean"), 2),
    "motion R²": ("probe", ("means", "0% masked", "motion"), 3),
    "yaw": ("probe", ("motion", "yaw"), 3),
    "jaw": ("probe", ("motion", "jaw"), 3),
    "identity R²": ("probe", ("means", "0% masked", "identity"), 3),
    "motion R², 90% masked": ("probe", ("means", "90% masked", "motion"), 3),
}
TALK_MEASURES = {
    "jaw": ("talk", ("rows", "ours", "jaw", "mean"), 3),
    "lip width": ("talk", ("rows", "ours", "lip_width", "mean"), 3),
    "other sound": ("talk", ("rows", "other sound", "jaw", "mean"), 3),
    "yaw, degrees": ("talk", ("rows", "ours", "yaw_std", "mean"), 2),
    "blinks a minute": ("talk", ("rows", "ours", "blinks_per_minute", "mean"), 1)}
EMOTION_MEASURES = {
    "accuracy": ("emotion", ("rows", "ours", "accuracy", "mean"), 2),
    "size of corners": ("emotion", ("rows", "ours", "gain_corner", "mean"), 2),
    "accuracy, voice of another emotion": (
        "emotion", ("rows", "voice of another emotion", "accuracy", "mean"), 2),
    "crosstalk": ("emotion", ("rows", "ours", "crosstalk"), 3),
    "mouth, worst change": ("emotion", ("rows", "ours", "mouth_worst"), 3),
    "compounds, seen": ("emotion", ("compounds_seen",), 2),
    "unseen": ("emotion", ("compounds_unseen",), 2),
    "80% of a switch, s": ("emotion", ("switch_80_percent_seconds",), 2)}
STAGE_2 = {"past": TALK_MEASURES, "emotion": EMOTION_MEASURES}


def folders(table):
    """-> {variant: its run's folder}; variants that change nothing share the run `base`."""
    return {variant: re.sub("[ %]", "", f"{table}-{variant}").replace(",", "-") if change else "base"
            for variant, change in TABLES[table].items()}


def runs(tables):
    """List the runs of tables -> {folder: (preset, measures)}."""
    return {folder: ({**(GENERATOR if table in STAGE_2 else BASE), **TABLES[table][variant]},
                     STAGE_2.get(table, MEASURES))
            for table in tables for variant, folder in folders(table).items()}


def run_evaluation(folder, command, args):
    """Run measure.evaluate COMMAND on a run's weights, once -> its report. Its table goes to a file."""
    path = os.path.join(folder, f"{command}.json")
    if not os.path.exists(path):
        words = [command, "--ckpt", os.path.join(folder, "semo.safetensors"), "--json", path, "--clips",
                 str(CLIPS[command]), "--device", args.device]
        with open(os.path.join(folder, f"{command}.txt"), "w") as log, contextlib.redirect_stdout(log):
            if evaluate.main(words):
                raise InputError(f"evaluate.py {command} failed on {folder}; its sentence stands above")
    return json.loads(Path(path).read_text())


def run(folder, preset, measures, seed, args):
    """Train one variant from one seed, or what is left of it -> {measure: number}, None if it was stopped."""
    words = ["--preset", "ablation", "--out", folder, "--seed", str(seed), "--device", args.device]
    words += ["--steps", str(args.steps)] if args.steps else []
    script = train_ae
    if "generator" in preset:
        script, words = train_gen, [*words, "--ae", args.ckpt, "--mask-max", str(preset["mask_max"])]
    status = script.train(script.parse(words, {"ablation": preset}), preset)
    signal.signal(signal.SIGINT, signal.default_int_handler)        # training took them over
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if status:
        return None
    reports = {command: run_evaluation(folder, command, args) for command, *_ in measures.values()}
    return {name: functools.reduce(operator.getitem, path, reports[command])
            for name, (command, path, _) in measures.items()}


def print_table(table, results):
    """Print one table as Markdown, from results {folder: [{measure: number} of each seed]}."""
    measures = STAGE_2.get(table, MEASURES)
    print(f"\n**{TITLES[table]}**\n\n| | {' | '.join(measures)} |\n|{'---|' * (len(measures) + 1)}")
    for variant, folder in folders(table).items():
        cells = []
        for name, (_, _, digits) in measures.items():
            values = [seed[name] for seed in results[folder]]
            numbers = sum(values) / len(values), min(values), max(values)
            mean, low, high = (f"{x:.{digits}f}" for x in numbers)
            cells.append(f"{mean} [{low} {high}]")
        print(f"| {variant} | {' | '.join(cells)} |")


def parse(argv):
    parser = command_parser("ablate", __doc__)
    parser.add_argument("--out", default="runs/ablate", help="folder of all runs (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=TITLES, default=list(TITLES),
                        help="tables (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="(default: 0 1)")
    parser.add_argument("--steps", type=int,
                        help=f"steps of each run (default: {BASE['steps']}, stage 2 {GENERATOR['steps']})")
    parser.add_argument("--json", help="also write the numbers of every seed to this file")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1 or min(args.seeds) < 0:
        parser.error("--steps must be at least 1, --seeds not negative")
    return args


@command("measure.ablate")
def main(argv=None):
    """-> exit status: 0, 130 if it was stopped and can go on, 2 for bad input."""
    args, results = parse(argv), {}
    if set(args.only) & set(STAGE_2):
        sample.load_models(args.ckpt)                        # refuse now what cannot be read hours later
    for seed in args.seeds:                                  # all variants of a seed first: a table early
        for name, variant in runs(args.only).items():
            numbers = run(os.path.join(args.out, f"{name}-{seed}"), *variant, seed, args)
            if numbers is None:
                return 130
            results.setdefault(name, []).append(numbers)
    for table in args.only:
        print_table(table, results)
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    sys.exit(main())
