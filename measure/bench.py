"""How fast it is on this machine: medians after a warm-up, with their range.

    python -m measure.bench                      all of the following
    python -m measure.bench sample               photo and sound to mp4: each stage, then end to end, and the
                                                 peak memory of the process (--seconds: of longer sound)
    python -m measure.bench beside               sample.py alone, then two of them at the same time
    python -m measure.bench train                presets: parameters, FLOPs, memory, speed of a step

FLOPs are those of forward and backward pass, as torch counts them: two for a multiplication and its addition.
State is weights, gradients, their average and the optimisers'; MB a picture is what the forward pass keeps
for the backward. MFU is their rate as a share of what the machine itself reaches with a large matrix product
(bf16; fp32 where bf16 is not fast).
"""
import copy
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import soundfile
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
from encoder import MotionEncoder, random_masking
from generator import Generator, generate_motion
from measure.checkpoint import command_parser, table, write_json
from media import audio_features
from media.compose import pictures_to_frames, read_photo
from media.device import autocast, autocast_iter, fast_bf16, pick_device
from media.face import load_detector
from media.files import command
from media.sound import FPS, SAMPLE_RATE, audio_chunks, load_audio
from media.video import VideoWriter
from world.render import MOTION
from world.speech import speak

ROOT = Path(__file__).resolve().parent.parent


def timed(work, device, rounds):
    """Time work(), once to warm up and then `rounds` times -> seconds (median, least, most)."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), min(seconds[1:]), max(seconds[1:])


def measure_peak_flops(device):
    """Measure the FLOP/s of a large matrix product, in the precision that training uses here."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if fast_bf16(device) else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / timed(lambda: a @ b, device, 10)[0]


def peak_memory_mb(device):
    """Return the most memory that was used so far, in MB: of the GPU, or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    in_bytes = sys.platform == "darwin"                                              # elsewhere it is in KB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if in_bytes else 2**10)


# ---- sampling ----------------------------------------------------------------------------------------------

def bench_sample(args, device):
    """Time what sample.py does, stage by stage and as a whole; imports and loading of weights not counted."""
    models, meta = sample.load_models(args.ckpt, device)
    num_frames, kind = round(args.seconds * FPS), (meta["audio"], meta.get("whisper"))
    first_frame = []                                                  # seconds until it, in each round
    with tempfile.TemporaryDirectory() as folder:
        wav, out = os.path.join(folder, "in.wav"), os.path.join(folder, "out.mp4")
        speech = audio_features.normalise_loudness(speak(torch.arange(1), num_frames)["wave"])[0]
        soundfile.write(wav, speech.numpy(), SAMPLE_RATE)
        detector = load_detector()
        image, composer, _ = read_photo(args.img, meta["size"], detector)
        space, z_r, m_ref, rng, noise = sample.prepare_reference(models, meta, image, 0)
        wave, silence_features = load_audio(wav)[None], sample.encode_silence(*kind)
        features = audio_features.extract_features(wave, *kind)[0]

        def generate():
            windows = generate_motion(models["generator"], m_ref, iter([features]), rng, silence_features,
                                      meta["gen_steps"], meta["guidance"])
            return torch.cat(list(autocast_iter(device, windows)))

        def decode():
            batches = sample.decode_frames(models["decoder"], z_r, m_ref, iter([motions]), noise,
                                           meta["steps"])
            return list(autocast_iter(device, batches))

        def paste():
            return list(pictures_to_frames(space, pictures, composer))

        def write():
            with VideoWriter(out, composer.size, wav) as video:
                for frame in frames:
                    video.write(frame)

        def end_to_end():
            start, features = time.perf_counter(), audio_features.stream_features(audio_chunks(wav), *kind)
            image, composer, _ = read_photo(args.img, meta["size"], detector)
            with VideoWriter(out, composer.size, wav) as video:
                for frame in sample.animate_from_audio(models, meta, image, features, composer=composer):
                    if not video.frames:
                        first_frame.append(time.perf_counter() - start)
                    video.write(frame)

        motions = generate()
        pictures = decode()
        frames = paste()
        work = {"read the photo, find its face": lambda: read_photo(args.img, meta["size"], detector),
                "read the sound, twice": lambda: [audio_features.scan_audio(wav), list(audio_chunks(wav))],
                "audio features": lambda: audio_features.extract_features(wave, *kind),
                "motion generator": generate, "decoder": decode, "put into the photo": paste,
                "H.264, AAC, mp4": write, "end to end": end_to_end}
        stages = {name: timed(stage, device, args.rounds) for name, stage in work.items()}
    total, first, memory = stages["end to end"][0], statistics.median(first_frame[1:]), peak_memory_mb(device)
    width, height = composer.size
    print(f"{args.seconds:g} s of sound, {num_frames} frames of {width}x{height}, "
          f"face square {composer.square.size:.0f}; "
          f"steps: generator {meta['gen_steps']}, decoder {meta['steps']}")
    rows = [[name, f"{1e3 * median:.1f}", f"{1e3 * low:.1f}-{1e3 * high:.1f}",
             f"{1e3 * median / num_frames:.3f}"] for name, (median, low, high) in stages.items()]
    table(["stage", "ms", "range", "ms a frame"], rows)
    print(f"{num_frames / total:.1f} frames/s, real-time factor {total / args.seconds:.3f}, "
          f"first frame after {first:.2f} s, peak memory {memory:.0f} MB")
    return {"stages": stages, "fps": num_frames / total, "real_time_factor": total / args.seconds,
            "first_frame": first, "memory_mb": memory}


def bench_beside(args, device):
    """Time sample.py alone and two at a time, each a process: the share of the speed that each keeps."""
    with tempfile.TemporaryDirectory() as folder:
        wav = os.path.join(folder, "in.wav")
        speech = audio_features.normalise_loudness(speak(torch.arange(1), round(args.seconds * FPS))["wave"])
        soundfile.write(wav, speech[0].numpy(), SAMPLE_RATE)
        words = [sys.executable, str(ROOT / "sample.py"), "--img", args.img, "--wav", wav,
                 "--ckpt", args.ckpt, "--device", str(device), "--out"]

        def speeds(count):
            jobs = [subprocess.Popen([*words, os.path.join(folder, f"{k}.mp4")], stdout=subprocess.PIPE,
                                     stderr=subprocess.DEVNULL, text=True) for k in range(count)]
            return [float(re.search(r"made at ([\d.]+) fps", job.communicate()[0])[1]) for job in jobs]

        (alone,), both = speeds(1), speeds(2)
    shares = [speed / alone for speed in both]
    print(f"frames/s of sample.py alone {alone:.1f}; of two at the same time "
          f"{' and '.join(f'{speed:.1f} ({share:.0%})' for speed, share in zip(both, shares, strict=True))}")
    return {"alone": alone, "both": both, "shares": shares}


# ---- training ----------------------------------------------------------------------------------------------

def stage_1(name, persons, device):
    """Build the AutoEncoder of a preset -> it, a function that makes a loss on random pictures, their number.

    persons: in one pass (None: the preset's). The loss is that of the last part of a run, with all its terms.
    """
    preset = train_ae.PRESETS[name]
    e, persons = preset["encoder"], persons or preset["persons"]
    count = persons * preset["targets"]
    model = train_ae.AutoEncoder(MotionEncoder(e), Decoder(preset["decoder"]), preset["loss"]).to(device)
    reference, target, noise = (torch.randn(n, e.channels, e.image_size, e.image_size, device=device)
                                for n in (persons, count, count))
    regions = torch.rand(count, 3, e.image_size, e.image_size, device=device)
    factors = torch.randn(count, len(MOTION), device=device)
    batch = data.Batch(reference, target, torch.cat([reference, target]), regions, factors, "synthetic")
    average = copy.deepcopy(model).eval().requires_grad_(False)
    weights, t = train_ae.schedule(train_ae.parse(["--preset", name]), 0.8), torch.ones(count, device=device)
    patches = (e.image_size // e.patch_size) ** 2
    ids_keep = random_masking(persons + count, patches, weights["mask_max"] / 2, device=device)
    return model, lambda: model(batch, noise, t, ids_keep, weights, average=average), count


def stage_2(name, windows, device):
    """Build the Generator of a preset -> it, a function that makes a loss on random windows, their frames."""
    preset, tokens = train_gen.PRESETS[name], train_ae.PRESETS[name]["encoder"]
    c = replace(preset["generator"], num_tokens=tokens.num_tokens, token_dim=tokens.token_dim,
                audio_dim=audio_features.FEATURE_DIM[preset.get("audio", "mel")])
    model, n = Generator(c).to(device), windows or preset["windows"]
    motion = torch.randn(n, c.window, c.token_dim, device=device)
    past = torch.randn(n, c.past, c.token_dim, device=device)
    audio = torch.randn(n, c.rows, c.audio_dim, device=device)
    t, drop = torch.rand(n, device=device), torch.rand(n, device=device) < 0.1
    return model, lambda: flow.flow_loss(model, motion, torch.randn_like(motion), t, past=past,
                                         reference=past[:, 0], audio=audio, drop=drop), n * c.window


def training_cost(model, loss_fn, count, device, rounds):
    """Measure one pass and step, as the training scripts take it, on `count` pictures -> what it costs."""
    optimisers, saved = training.optimisers(model, 1e-4, 1e-3), {}
    parameters = sum(p.numel() for p in model.parameters())
    of_model = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):                                             # what the backward pass needs, each storage once
        storage = x.untyped_storage()
        if storage.data_ptr() not in of_model:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    def forward_backward():
        with autocast(device):
            loss = loss_fn()
        loss.backward()
        return loss.item()

    def step():
        training.clip_and_step(model, optimisers, forward_backward(), 0, "", device)

    with saved_tensors_hooks(keep, lambda x: x), autocast(device):
        loss_fn()
    with FlopCounterMode(display=False) as flops:
        forward_backward()
    median, low, high = timed(step, device, rounds)
    moments = [x for o in optimisers for s in o.state.values() for x in s.values()]
    state = 3 * 4 * parameters + sum(x.numel() * x.element_size() for x in moments)
    return {"parameters": parameters, "flops": flops.get_total_flops() / count, "speed": count / median,
            "speed_low": count / high, "speed_high": count / low,
            "state_gb": state / 1e9, "kept_mb": sum(saved.values()) / count / 1e6}


def bench_train(args, device):
    """Measure a training step of the presets."""
    peak_flops, rows, results = measure_peak_flops(device), [], {}
    for name in args.presets:
        persons = 1 if device.type == "cpu" and name not in ("nano", "tiny") else None
        for stage, build, count in (("stage 1", stage_1, persons), ("stage 2", stage_2, None)):
            r = training_cost(*build(name, count, device), device, args.rounds)
            r["mfu"] = r["flops"] * r["speed"] / peak_flops
            results[f"{name}, {stage}"] = r
            rows.append([f"{name}, {stage}", f"{r['parameters'] / 1e6:.2f}", f"{r['flops'] / 1e9:.3g}",
                         f"{r['state_gb']:.2f}", f"{r['kept_mb']:.3g}", f"{r['speed']:.1f}",
                         f"{r['speed_low']:.1f}-{r['speed_high']:.1f}", f"{r['mfu']:.0%}"])
    precision = "bf16" if fast_bf16(device) else "fp32"
    print(f"{precision} matrix products reach {peak_flops / 1e12:.3g} TFLOP/s")
    table(["training", "M parameters", "GFLOP a picture", "GB of state", "MB a picture", "pictures/s",
           "range", "MFU"], rows)
    return {"peak_flops": peak_flops, "presets": results}


PARTS = {"sample": bench_sample, "beside": bench_beside, "train": bench_train}


def parse(argv):
    parser = command_parser("bench", __doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--img", default=str(ROOT / "examples" / "portrait.png"))
    parser.add_argument("--seconds", type=float, default=20,
                        help="sample, beside: length of the sound (default: %(default)s)")
    parser.add_argument("--presets", nargs="+", choices=train_ae.PRESETS, default=["tiny", "small", "paper"])
    parser.add_argument("--rounds", type=int, default=5,
                        help="measurements of each figure (default: %(default)s)")
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args(argv)
    if args.rounds < 1 or not 0.1 <= args.seconds <= 1e5:
        parser.error("--rounds must be at least 1, --seconds from 0.1 to 100000")
    if not set(args.parts) <= set(PARTS):
        parser.error(f"the parts are {', '.join(PARTS)}, not {' '.join(args.parts)}")
    return args


@command("measure.bench")
def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    print(f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    results = {name: PARTS[name](args, device) for name in args.parts or PARTS}
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    sys.exit(main())
