"""How fast it is on this machine, and what waits for what. Medians after a warm-up, with their spread.

    python -m measure.bench                      all of the following
    python -m measure.bench sample               photo and sound to mp4 with the embedded weights: each stage,
                                                 then end to end
    python -m measure.bench variants             side by side, in turn: attention, cached reference,
                                                 precision, compiled, batch
    python -m measure.bench train [--data DIR]   every preset: parameters, FLOPs, memory, speed; and what
                                                 loading DIR gives
    python -m measure.bench scale [--png FILE]   longer sound, more frames at once, more training
                                                 processes (minutes; not in "all")

FLOPs are those of forward and backward pass, as torch counts them: two for a multiplication and its addition.
State is weights, gradients, their average and the optimisers'; MB a picture is what the forward pass keeps
for the backward. MFU is their rate as a share of what the machine itself reaches with a large matrix product
(bf16; fp32 where bf16 is not fast).
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import soundfile
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import data
import encoder
import flow
import sample
import train_ae
import train_gen
import training
from decoder import Decoder, decode_frames
from encoder import MotionEncoder, random_masking
from generator import Generator, generate_motion
from measure import charts
from measure.checkpoint import table
from media import audio_features
from media.compose import read_photo
from media.device import autocast, fast_bf16, pick_device
from media.face import load_detector
from media.files import InputError, atomic_write
from media.sound import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, audio_chunks, load_audio
from media.video import VideoWriter
from world import speech

ROOT = Path(__file__).resolve().parent.parent


def timed(work, device, rounds):
    """Seconds of work(), once to warm up and then `rounds` times -> (median, least, most)."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), min(seconds[1:]), max(seconds[1:])


def side_by_side(cases, device, rounds):
    """As timed(), of {name: work}, each in turn, so that a busy moment hits all."""
    seconds = {name: [] for name in cases}
    for _ in range(rounds):
        for name, work in cases.items():
            seconds[name].append(timed(work, device, 1)[0])
    return {name: (statistics.median(x), min(x), max(x)) for name, x in seconds.items()}


def peak(device):
    """FLOP/s of a large matrix product, in the precision that training uses here."""
    n = 8192 if device.type == "cuda" else 2048
    kind = torch.bfloat16 if fast_bf16(device) else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    return 2 * n**3 / timed(lambda: a @ b, device, 10)[0]


# ---- sampling ----------------------------------------------------------------------------------------------

def synthetic_speech(seconds):
    """Speech of the synthetic world, levelled, (S,)."""
    return audio_features.normalise_loudness(speech.speak(torch.arange(1), round(seconds * FPS))["wave"])[0]


def sampling(args, device):
    """What sample.py does, stage by stage and as a whole; imports and loading of weights not counted."""
    models, meta = sample.load_models(args.ckpt, device)
    frames, kind = round(args.seconds * FPS), (meta["audio"], meta.get("whisper"))
    with tempfile.TemporaryDirectory() as folder:
        wav, out = os.path.join(folder, "in.wav"), os.path.join(folder, "out.mp4")
        soundfile.write(wav, synthetic_speech(args.seconds).numpy(), SAMPLE_RATE)
        detector = load_detector()
        image, composer, _ = read_photo(args.img, meta["size"], detector)
        space, z_r, m_ref, rng, noise = sample.prepare_reference(models, meta, image, 0)
        wave = load_audio(wav)
        features = audio_features.extract_features(wave[None], *kind)[0]
        silence_features = audio_features.extract_features(torch.zeros(1, SAMPLES_PER_FRAME), *kind)[0, 0]

        def motion():
            outputs = generate_motion(models["generator"], m_ref, iter([features]), rng, silence_features,
                                      meta["gen_steps"], meta["guidance"])
            return torch.cat(list(sample.autocast_iter(device, outputs)))

        def painted():
            outputs = decode_frames(models["decoder"], z_r, m_ref, iter([motions]), noise, meta["steps"],
                                    sample.BATCH, True)
            return list(sample.autocast_iter(device, outputs))

        def written():
            with VideoWriter(out, composer.size, wav) as video:
                for frame in arrays:
                    video.write(frame)

        def end_to_end():
            started, features = time.perf_counter(), audio_features.stream_features(audio_chunks(wav), *kind)
            image, composer, _ = read_photo(args.img, meta["size"], detector)
            with VideoWriter(out, composer.size, wav) as video:
                for frame in sample.animate_from_audio(models, meta, image, features, composer=composer):
                    if not video.frames:
                        first.append(time.perf_counter() - started)
                    video.write(frame)

        motions, first = motion(), []
        pictures = painted()
        arrays = list(sample.pictures_to_frames(space, pictures, composer))
        stages = {name: timed(work, device, args.rounds) for name, work in {
            "read the photo, find its face": lambda: read_photo(args.img, meta["size"], detector),
            "read the sound, twice": lambda: [sample.scan_audio(wav), list(audio_chunks(wav))],
            "audio features": lambda: audio_features.extract_features(wave[None], *kind),
            "motion generator": motion, "decoder": painted,
            "put into the photo": lambda: list(sample.pictures_to_frames(space, pictures, composer)),
            "H.264, AAC, mp4": written, "end to end": end_to_end}.items()}
    total, first = stages["end to end"][0], statistics.median(first[1:])
    wide, high = composer.size
    print(f"{args.seconds:g} s of sound, {frames} frames of {wide}x{high}, face square "
          f"{composer.square.side:.0f}; "
          f"steps: generator {meta['gen_steps']}, decoder {meta['steps']}")
    table(["stage", "ms", "spread", "ms a frame"],
          [[name, f"{1e3 * middle:.1f}", f"{1e3 * low:.1f}-{1e3 * high:.1f}", f"{1e3 * middle / frames:.3f}"]
           for name, (middle, low, high) in stages.items()])
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated() / 2**20
    else:
        most = peak_mb(resource.getrusage(resource.RUSAGE_SELF))
    print(f"{frames / total:.1f} frames/s, real-time factor {total / args.seconds:.3f}, first frame after "
          f"{first:.2f} s, "
          f"peak memory {most:.0f} MB")
    return {"stages": stages, "fps": frames / total, "real_time_factor": total / args.seconds,
            "first_frame": first, "memory_mb": most}


@contextmanager
def attention_as(plain):
    """Compute attention by plain products for a while, or as released."""
    encoder.PLAIN_ATTENTION = plain
    try:
        yield
    finally:
        encoder.PLAIN_ATTENTION = False


@torch.inference_mode()
def variants(args, device):
    """One thing changed at a time, on the released decoder painting 16 frames of --img in one step."""
    models, meta = sample.load_models(args.ckpt, device)
    decoder, fast, n = models["decoder"], fast_bf16(device), 16
    c = decoder.config
    _, photo, m_ref, rng, noise = sample.prepare_reference(models, meta,
                                                           read_photo(args.img, meta["size"],
                                                                      load_detector())[0], 0)
    sounds = synthetic_speech(2), torch.zeros(SAMPLES_PER_FRAME)
    rows, silence_features = (audio_features.extract_features(x[None], meta["audio"], meta.get("whisper"))[0]
                              for x in sounds)
    motions = generate_motion(models["generator"], m_ref, iter([rows]), rng, silence_features[0],
                              meta["gen_steps"], meta["guidance"])
    moved = torch.cat(list(sample.autocast_iter(device, motions)))[-n:]                             # (n, L*D)
    moved, m_ref = (x.unflatten(1, (c.num_tokens, c.token_dim)) for x in (moved, m_ref))
    noise = noise.expand(n, -1, -1, -1)
    full = Decoder(replace(c, full_attention=True)).to(device).eval()
    compiled = torch.compile(decoder, dynamic=False) if args.compile else None

    def picture(model=decoder, bf16=fast, plain=False, cached=True, batch=n):
        """-> a function that paints n frames."""
        def work():
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16), attention_as(plain):
                frames = []
                for z, m in zip(noise.split(batch), moved.split(batch), strict=True):
                    if cached:
                        kv = cache
                    else:
                        kv = model.encode_reference(photo.expand(len(z), -1, -1, -1),
                                                    m_ref.expand(len(z), -1, -1))
                    frames.append(flow.integrate(model, z, 1, m_t=m, cache=kv))
            return torch.cat(frames)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            cache = model.encode_reference(photo, m_ref)
        return work

    cases = {"as it is": picture(), "in the other precision": picture(bf16=not fast),
             "attention by plain products": picture(plain=True),
             "reference computed for every frame": picture(cached=False),
             "reference sees the target (paper; other weights)": picture(model=full, cached=False)}
    cases |= {f"{batch} at a time": picture(batch=batch) for batch in (1, 4)}
    cases |= {"compiled": picture(model=compiled)} if compiled else {}
    right, seconds = cases["as it is"](), side_by_side(cases, device, args.rounds)
    rows, results = [], {}
    for name, (middle, low, high) in seconds.items():
        off = None if "paper" in name else (cases[name]() - right).abs().max().item()
        results[name] = {"ms": 1e3 * middle / n, "speed": seconds["as it is"][0] / middle, "difference": off}
        rows.append([name, f"{1e3 * middle / n:.2f}", f"{1e3 * low / n:.2f}-{1e3 * high / n:.2f}",
                     f"{results[name]['speed']:.2f}", "" if off is None else f"{off:.4f}"])
    print(f"decoder, {n} frames; speed: times as fast as it is; difference: largest of a pixel in [-1, 1]")
    table(["", "ms a frame", "spread", "speed", "difference"], rows)
    return results


# ---- training ----------------------------------------------------------------------------------------------

def stage_1(name, people, device):
    """Build AutoEncoder of a preset -> it, a function that makes its loss on random pictures, pictures a
    pass.

    The loss is that of the last part of a run, with all its terms.
    """
    preset = train_ae.PRESETS[name]
    e, people = preset["encoder"], people or preset["persons"]
    count = people * preset["targets"]
    model = train_ae.AutoEncoder(MotionEncoder(e), Decoder(preset["decoder"]), preset["loss"]).to(device)
    reference, target, noise = (torch.randn(n, e.channels, e.image_size, e.image_size, device=device)
                                for n in (people, count, count))
    regions = torch.rand(count, 3, e.image_size, e.image_size, device=device)
    batch = data.Batch(reference, target, torch.cat([reference, target]), regions, None, "synthetic")
    weights, t = train_ae.schedule(train_ae.parse(["--preset", name]), 0.8), torch.ones(count, device=device)
    ids_keep = random_masking(people + count, (e.image_size // e.patch_size) ** 2, weights["mask_max"] / 2,
                              device=device)
    return model, lambda: model(batch, noise, t, ids_keep, weights), count


def stage_2(name, windows, device):
    """-> Generator of a preset, a function that makes its loss on random windows, frames of video a pass."""
    preset, tokens = train_gen.PRESETS[name], train_ae.PRESETS[name]["encoder"]
    c = replace(preset["generator"], num_tokens=tokens.num_tokens, token_dim=tokens.token_dim,
                audio_dim=audio_features.FEATURE_DIM[preset.get("audio", "mel")])
    model, n = Generator(c).to(device), windows or preset["windows"]
    motion, past, features = (torch.randn(n, rows, width, device=device) for rows, width in (
        (c.window, c.token_dim), (c.past, c.token_dim), (c.past + c.window + c.lookahead, c.audio_dim)))
    t, drop = torch.rand(n, device=device), torch.rand(n, device=device) < 0.1
    return model, lambda: flow.flow_loss(model, motion, torch.randn_like(motion), t, past=past,
                                         reference=past[:, 0], audio=features, drop=drop), n * c.window


def training_cost(model, loss_fn, count, device, rounds):
    """One pass and step as the training scripts take it -> what it costs."""
    optimisers, saved, seen = training.optimisers(model, 1e-4, 1e-3), [], set()
    bf16 = autocast(device)

    def keep(x):                                             # what the backward pass needs, each storage once
        if x.untyped_storage().data_ptr() not in seen:
            seen.add(x.untyped_storage().data_ptr())
            saved.append(x.untyped_storage().nbytes())
        return x

    def passes():
        with bf16:
            loss = loss_fn()
        loss.backward()
        return loss

    def step():
        loss = passes()
        training.clip_and_step(model, optimisers, loss.item(), 0, "", device)

    seen |= {p.untyped_storage().data_ptr() for p in model.parameters()}
    with saved_tensors_hooks(keep, lambda x: x), bf16:
        loss_fn()
    with FlopCounterMode(display=False) as flops:
        passes()
    seconds = timed(step, device, rounds)
    parameters = sum(p.numel() for p in model.parameters())
    state = sum(x.numel() * x.element_size() for o in optimisers for s in o.state.values()
                for x in s.values())
    return {"parameters": parameters, "flops": flops.get_total_flops() / count, "speed": count / seconds[0],
            "speed_low": count / seconds[2], "speed_high": count / seconds[1],
            "state_gb": (state + 3 * 4 * parameters) / 1e9, "kept_mb": sum(saved) / count / 1e6}


def loaded(folders, preset, workers, device, batches=12):
    """Pictures a second that the loader gives to stage 1 of a preset, read but not trained on."""
    args = train_ae.parse(["--preset", preset, "--data", *folders, "--workers", str(workers)])
    real = train_ae.real_clips(args, train_ae.PRESETS[preset], "train")
    items = iter(data.loader(real, iter(range(batches + 2 * workers + 2)), workers))
    for _ in range(2 * workers + 1):
        next(items)                                                 # workers start, and read ahead
    start, count = time.perf_counter(), 0
    for batch in items:
        count += len(batch.reference) + len(batch.target)
    return count / (time.perf_counter() - start)


def presets(args, device):
    """The table of all presets, and what waits: loading or training."""
    best, rows, results = peak(device), [], {}
    for name in args.presets:
        people = args.people or (1 if device.type == "cpu" and name != "tiny" else None)
        for stage, build, count in (("stage 1", stage_1, people), ("stage 2", stage_2, args.windows)):
            r = training_cost(*build(name, count, device), device, args.rounds)
            r["mfu"] = r["flops"] * r["speed"] / best
            results[f"{name}, {stage}"] = r
            rows.append([f"{name}, {stage}", f"{r['parameters'] / 1e6:.2f}", f"{r['flops'] / 1e9:.3g}",
                         f"{r['state_gb']:.2f}",
                         f"{r['kept_mb']:.3g}", f"{r['speed']:.1f}",
                         f"{r['speed_low']:.1f}-{r['speed_high']:.1f}", f"{r['mfu']:.0%}"])
    precision = "bf16" if fast_bf16(device) else "fp32"
    print(f"{precision} matrix products reach {best / 1e12:.3g} TFLOP/s")
    table(["training", "M parameters", "GFLOP a picture", "GB of state", "MB a picture", "pictures/s",
           "spread", "MFU"], rows)
    for name in args.presets if args.data else ():
        r = results[f"{name}, stage 1"]
        r["loaded"] = loaded(args.data, name, args.workers, device)
        waits = "training waits for loading" if r["loaded"] < r["speed"] else "loading waits for training"
        print(f"{name}: {r['loaded']:.0f} pictures/s loaded, {r['speed']:.0f} trained: {waits}")
    return {"peak_flops": best, "presets": results}


# ---- growth ------------------------------------------------------------------------------------------------

def scaling(args, device):
    """Frames/s and memory over the length of the sound, frames/s over the batch, training pictures/s over
    processes."""
    if args.png:
        charts.require()                                            # refuse now, not minutes later
    results = {"seconds of sound": {}, "peak MB": {}, "frames at once": {}, "training processes": {}}
    with tempfile.TemporaryDirectory() as folder:
        wav, out = os.path.join(folder, "in.wav"), os.path.join(folder, "out.mp4")
        for seconds in args.lengths:
            speech_20 = synthetic_speech(20).repeat(-(-seconds // 20))
            soundfile.write(wav, speech_20[: seconds * SAMPLE_RATE].numpy(), SAMPLE_RATE)
            words = ["sample.py", "--img", args.img, "--wav", wav, "--out", out, "--ckpt", args.ckpt,
                     "--device", args.device]
            output, usage = run_child([sys.executable, *words], folder)
            results["seconds of sound"][seconds] = float(output.split("made at ")[1].split(" fps")[0])
            results["peak MB"][seconds] = peak_mb(usage)
        for count in args.processes:
            words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}",
                     "train_ae.py", "--preset", "tiny",
                     "--steps", str(args.steps), "--out", os.path.join(folder, str(count)), "--device",
                     args.device]
            run_child([sys.executable, *words], folder, threads="1")
            with open(os.path.join(folder, str(count), "log.jsonl")) as log:
                results["training processes"][count] = json.loads(log.readlines()[-1])["pictures_per_second"]
    checkpoint = sample.load_models(args.ckpt, device)[0]["decoder"]
    results["frames at once"] = speed_by_batch(checkpoint, device, args.rounds)
    for title, values in results.items():
        heading = {"peak MB": "MB by seconds of sound",
                   "training processes": "pictures/s by processes, a thread each"}.get(title)
        table([heading or f"frames/s by {title}", *map(str, values)],
              [["", *(f"{v:.1f}" for v in values.values())]])
    if args.png:
        charts.save(plot(results), args.png)
    return {title: {str(k): v for k, v in values.items()} for title, values in results.items()}


def peak_mb(usage):
    """The most memory that a process held, from its resource usage: in bytes on macOS, in KB elsewhere."""
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def run_child(words, folder, threads=None):
    """Run a command of this repository to its end -> what it printed, its resource usage. Raises InputError
    with the sentence of one that was given bad input, RuntimeError with all that it said if it fails
    otherwise."""
    env = {**os.environ, **({"OMP_NUM_THREADS": threads} if threads else {})}
    with open(os.path.join(folder, "log"), "w+") as log:
        work = subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=log)
        _, status, usage = os.wait4(work.pid, 0)
        log.seek(0)
        text = log.read()
    if status:
        bad_input = os.waitstatus_to_exitcode(status) == 2 and text.strip()
        if bad_input:
            raise InputError(text.strip().splitlines()[-1])
        raise RuntimeError(f"{' '.join(words[1:4])} failed:\n{text}")
    return text, usage


@torch.inference_mode()
def speed_by_batch(decoder, device, rounds):
    """Frames a second of one step, {frames at once: frames/s}."""
    c, fps = decoder.config, {}
    for n in (1, 2, 4, 8, 16, 32):
        z = torch.randn(n, c.channels, c.image_size, c.image_size, device=device)
        m = torch.randn(n, c.num_tokens, c.token_dim, device=device)
        with autocast(device):
            cache = decoder.encode_reference(z[:1], m[:1])
            seconds = timed(lambda z=z, m=m, cache=cache: flow.integrate(decoder, z, 1, m_t=m, cache=cache),
                            device, rounds)[0]
        fps[n] = n / seconds
    return fps


def plot(results, width=320, height=240):
    """Draw each curve {x: y} of results in a chart of its own: x logarithmic, y from 0 -> figure of
    matplotlib."""
    titles = {"peak MB": "peak MB by seconds of sound", "training processes": "pictures/s by processes"}
    fig = charts.figure(width * len(results), height)
    for (title, values), ax in zip(results.items(), fig.subplots(1, len(results), squeeze=False)[0],
                                   strict=True):
        ax.semilogx(list(values), list(values.values()), "o-", color="navy", markersize=4)
        for x, y in values.items():
            ax.annotate(f"{y:.0f}", (x, y), (0, 4), textcoords="offset points", ha="center", va="bottom")
        ax.set_title(titles.get(title, f"frames/s by {title}"))
        ax.set_xticks(list(values), list(values), minor=False)
        ax.set_xticks([], minor=True)
        ax.set_ylim(0, 1.15 * max(values.values()))
        ax.margins(x=0.1)
    return fig


PARTS = {"sample": sampling, "variants": variants, "train": presets, "scale": scaling}


def parse(argv):
    p = argparse.ArgumentParser(prog="python -m measure.bench", description=__doc__.split("\n")[0],
                                allow_abbrev=False)
    p.add_argument("parts", nargs="*", metavar="part",
                   help="sample, variants, train, scale (default: all but scale)")
    p.add_argument("--ckpt", default=sample.DEFAULT,
                   help="sample, variants: released weights (default: the embedded ones)")
    p.add_argument("--img", default=str(ROOT / "examples" / "portrait.png"))
    p.add_argument("--seconds", type=float, default=20,
                   help="sample: length of the sound (default: %(default)s)")
    p.add_argument("--compile", action="store_true", help="variants: also torch.compile (a minute or two)")
    p.add_argument("--presets", nargs="+", choices=train_ae.PRESETS, default=["tiny", "small", "paper"])
    p.add_argument("--people", type=int,
                   help="people a pass of stage 1 (default: the preset's; 1 for all but tiny on a CPU)")
    p.add_argument("--windows", type=int, help="windows a pass of stage 2 (default: the preset's)")
    p.add_argument("--data", nargs="+", metavar="DIR",
                   help="also measure how fast clips of these folders are loaded")
    p.add_argument("--workers", type=int, default=2, help="processes that load (default: %(default)s)")
    p.add_argument("--lengths", nargs="+", type=int, default=[1, 10, 60, 600],
                   help="scale: seconds of sound (default: %(default)s)")
    p.add_argument("--processes", nargs="+", type=int, default=[1, 2],
                   help="scale: training processes (default: %(default)s)")
    p.add_argument("--steps", type=int, default=30,
                   help="scale: steps each of them trains (default: %(default)s)")
    p.add_argument("--png", help="scale: also draw the curves to this file")
    p.add_argument("--rounds", type=int, default=5, help="measurements of each figure (default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    p.add_argument("--json", help="also write the numbers to this file")
    args = p.parse_args(argv)
    if min(args.rounds, args.steps, *args.lengths,
           *args.processes) < 1 or args.workers < 0 or args.seconds < 0.1:
        p.error("--rounds, --steps, --lengths and --processes must be at least 1, --workers not negative, "
                "--seconds at least 0.1")
    if not set(args.parts) <= set(PARTS):
        p.error(f"the parts are {', '.join(PARTS)}, not {' '.join(args.parts)}")
    return args


def main(argv=None):
    args = parse(argv)
    try:
        device = pick_device(args.device)
        print(f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        results = {name: PARTS[name](args, device) for name in args.parts or ("sample", "variants", "train")}
        if args.json:
            with atomic_write(args.json, make_folder=True) as temporary:
                Path(temporary).write_text(json.dumps(results, indent=1) + "\n")
    except InputError as error:
        print(f"measure.bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
