"""The main job: a photo and a speech recording -> a talking portrait video. Or the photo moves as a driving video does.

    python sample.py --img x.png --wav y.wav [--out out.mp4] [--ckpt F] [--steps N] [--guidance S] [--seed N]
                     [--device auto]
    python sample.py --img x.png --video driving.mp4 [--out out.mp4]

    photo --encoder--> reference motion --+-----------------------------------------+
    sound --rows, 25 a second--> generator, 16 tokens a pass --> motion --> decoder --> frames --> mp4, as they come

Memory does not grow with the length of the sound or the video. The same seed gives the same frames.
Exit status: 0 with a complete file, 2 after one sentence about bad input, 130 when interrupted; else no file is left.
"""
import argparse
import contextlib
import os
import signal
import sys
import time

import torch
from tqdm import tqdm

import audio
import data
import flow
from latents import load_latents
from training import fast_bf16, load_release

BATCH = 16  # frames painted, or watched, at once
DEFAULT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", "semo-tiny.safetensors")


def pick_device(name="auto"):
    """"auto" -> the best there is. Raises InputError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise data.InputError(f"--device {name} cannot be used here; give auto, cpu, cuda or mps") from error


def draws(seed, device):
    """A function shape -> normal noise on `device`: drawn on the CPU, so that every device gets the same."""
    source = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=source).to(device)


def compute(device):
    """The context of every call of a model. It is left before frames are handed out: a generator must not leak it."""
    stack = contextlib.ExitStack()
    stack.enter_context(torch.inference_mode())
    if fast_bf16(device):
        stack.enter_context(torch.autocast(device.type, torch.bfloat16))
    return stack


def hear(rows, config, silence):
    """Iterator of (n, A) -> iterator of what the generator hears in one pass, (P+K+ahead, A), and how many of its K new
    rows are real. silence (A,), the row of no sound, stands before the first row and after the last."""
    P, K, span = config.past, config.window, config.past + config.window + config.ahead
    held = silence.expand(P, -1)
    for block in rows:
        held = torch.cat([held, block])
        while len(held) >= span:
            yield held[:span], K
            held = held[K:]
    while len(held) > P:
        yield torch.cat([held, silence.expand(span, -1)])[:span], min(K, len(held) - P)
        held = held[K:]


def dream(generator, still, rows, draw, steps, guidance, silence):
    """Motion for a sound: still (1, L*D), the photo's motion; rows, iterator of (n, A) -> iterator of (n, L*D)."""
    model = flow.guide(generator, guidance, null={"audio": None})
    past = still[:, None].expand(1, generator.config.past, -1)                              # (1, P, L*D)
    for heard, count in hear(rows, generator.config, silence):
        noise = draw(1, generator.config.window, still.shape[1])
        with compute(still.device):
            motion = flow.sample(model, noise, steps, past=past, reference=still, audio=heard[None].to(still.device))
        past = torch.cat([past, motion], dim=1)[:, -past.shape[1]:]                         # (1, P, L*D)
        yield motion[0, :count]


def watch(encoder, space, video, device):
    """Motion of a video: iterator of (3, H, W) frames -> iterator of (n, L*D). As it is, not relative to the first."""
    for frames in data.rechunk((frame[None] for frame in video), BATCH):
        with compute(device):
            motion = encoder(space.encode(frames.to(device))).flatten(1)
        yield motion


def paint(decoder, z_r, still, motions, draw, steps):
    """Frames for motions. z_r (1, C, H, W), still (1, L*D), motions: iterator of (n, L*D) -> iterator of (n', C, H, W).

    Every frame starts from the same noise, so that what the noise decides stands still (ours). The video model takes
    as many frames at once as it was trained on, and as there, a noise for each.
    """
    shape, device, video = z_r.shape[1:], z_r.device, decoder.config.frames > 1
    size = decoder.config.frames if video else BATCH
    tokens = decoder.config.num_tokens, decoder.config.token_dim
    with compute(device):
        cache = decoder.reference(z_r, still.unflatten(1, tokens))
    shared = draw(1, *shape)
    for motion in data.rechunk(motions, size):
        noise = draw(size, *shape)[:len(motion)] if video else shared.expand(len(motion), *shape)
        with compute(device):
            frames = flow.sample(decoder, noise, steps, m_t=motion.unflatten(1, tokens), cache=cache)
        yield frames


def to_bytes(space, frames):
    """Latents (n, C, H, W) -> n arrays (H, W, 3) uint8."""
    with torch.inference_mode():
        pixels = ((space.decode(frames) + 1) * 127.5).round().clamp(0, 255).byte()
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())


def begin(models, meta, image):
    """What both jobs start with -> space of the latents, photo (1, C, H, W) in it, the photo's motion (1, L*D)."""
    device = next(models["decoder"].parameters()).device
    space = load_latents(meta["latents"], device=device)
    with compute(device):
        z_r = space.encode(image[None].to(device))
        return space, z_r, models["encoder"](z_r).flatten(1)


def talk(models, meta, image, rows, seed=0, steps=None, guidance=None):
    """A photo speaks. image (3, H, W) in [-1, 1]; rows: iterator of (n, A) sound features -> (H, W, 3) uint8 frames,
    as many as rows, yielded as they are made. steps and guidance are the release's own (meta) where None."""
    space, z_r, still = begin(models, meta, image)
    silence = audio.features(torch.zeros(1, audio.FRAME), meta["audio"])[0, 0]              # (A,)
    guidance = meta["guidance"] if guidance is None else guidance
    motions = dream(models["generator"], still, rows, draws(2 * seed, z_r.device), steps or meta["gen_steps"], guidance,
                    silence)
    draw = draws(2 * seed + 1, z_r.device)
    for frames in paint(models["decoder"], z_r, still, motions, draw, steps or meta["steps"]):
        yield from to_bytes(space, frames)


def reenact(models, meta, image, video, seed=0, steps=None):
    """A photo moves as a video. image (3, H, W) in [-1, 1]; video: iterator of such -> (H, W, 3) uint8, as many."""
    space, z_r, still = begin(models, meta, image)
    motions = watch(models["encoder"], space, video, z_r.device)
    draw = draws(2 * seed + 1, z_r.device)
    for frames in paint(models["decoder"], z_r, still, motions, draw, steps or meta["steps"]):
        yield from to_bytes(space, frames)


def loudness(path):
    """A first pass over the sound: it can be used, and -> the gain that levels it, its length in video frames."""
    sizes = []

    def counted():
        for chunk in data.audio_chunks(path):
            sizes.append(len(chunk))
            yield chunk

    return audio.level_gain(counted()), audio.frames(sum(sizes))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--img", required=True, help="the photo: jpg, png or webp, one face")
    drive = parser.add_mutually_exclusive_group(required=True)
    drive.add_argument("--wav", help="the speech: wav, flac, ogg, mp3, m4a or a video with sound")
    drive.add_argument("--video", help="a driving video instead: its motion and its sound")
    parser.add_argument("--out", default="out.mp4", help="the video to write (default: %(default)s)")
    parser.add_argument("--ckpt", default=DEFAULT, help="released weights, .safetensors (default: the embedded ones)")
    parser.add_argument("--steps", type=int, help="sampling steps of both models (default: as released)")
    parser.add_argument("--guidance", type=float, help="how much the sound counts; 1: as it is (default: as released)")
    parser.add_argument("--seed", type=int, default=0, help="another number, another take (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps is {args.steps}; give 1 or more")
    return args


def run(args):
    """The whole job, from names to a finished file. Raises InputError or ValueError for what cannot be used."""
    source = args.wav or args.video
    data.check_file(args.ckpt, "a .safetensors release, such as the embedded weights/semo-tiny.safetensors")
    for path in (args.img, source, args.ckpt):
        if os.path.exists(path) and os.path.exists(args.out) and os.path.samefile(path, args.out):
            raise data.InputError(f"--out {args.out} would overwrite an input; choose another name")
    models, meta = load_release(args.ckpt, pick_device(args.device))
    if args.wav and "generator" not in models:
        raise data.InputError(f"{args.ckpt} holds no motion generator; give another, or --video in place of --wav")
    image = data.load_image(args.img, meta["size"])
    if args.wav:
        gain, total = loudness(args.wav)
        rows = audio.stream_features((chunk * gain for chunk in data.audio_chunks(args.wav)), meta["audio"])
        frames, sound = talk(models, meta, image, rows, args.seed, args.steps, args.guidance), args.wav
    else:
        frames = reenact(models, meta, image, data.read_video(args.video, meta["size"]), args.seed, args.steps)
        total, sound = None, args.video if data.has_audio(args.video) else None
    start = time.perf_counter()
    with data.VideoWriter(args.out, meta["size"], sound) as video, tqdm(total=total, unit="frame", disable=None) as bar:
        for frame in frames:
            video.write(frame)
            bar.update()
    spent = time.perf_counter() - start
    print(f"{args.out}: {video.frames} frames, {video.frames / data.FPS:.2f} s, made at {video.frames / spent:.1f} fps")


def main(argv=None):
    """-> exit status: 0 with a complete file, 2 for bad input, 130 when interrupted."""
    args = parse(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        print("sample.py: interrupted, no file was written", file=sys.stderr)
        return 130
    except (data.InputError, ValueError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))       # so that a kill, too, cleans up
    sys.exit(main())
