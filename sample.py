"""The main job: a photo and a speech recording, or a driving video -> a talking portrait video.

    python sample.py --img x.png --wav y.wav [--out out.mp4]
    python sample.py --img x.png --wav y.wav --emotion "neutral, happy:0.6+surprised:0.4@2.5"
    python sample.py --img x.png --video driving.mp4
    python sample.py --img x.png --controls "yaw=-10:10 blink=0,1,0" --seconds 4
    python sample.py --img x.png --wav - --out -      live: raw 16 kHz sound in, a fragmented mp4 out

    photo --encoder--> reference motion --+-----------------------------------------+
    sound --rows, 25 a second--> generator, 16 tokens a pass --> motion --> decoder --> frames --> mp4

Memory does not grow with the length of the sound or the video. The same seed gives the same frames. Exit
status: 0 with a complete file, 2 after one sentence about bad input, 130 when interrupted, 1 when the reader
of `--out -` went away; else no file is left.
"""
import argparse
import math
import os
import signal
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")      # waiting threads leave their core to others

import torch
from tqdm import tqdm

from decoder import Decoder, DecoderConfig, Picture
from emotion import TEXT_MODEL, FromVoice, Schedule, VoiceConfig, VoiceEmotion, parse_emotion, text_palette
from encoder import EncoderConfig, MotionEncoder
from flow import integrate
from generator import Generator, GeneratorConfig, generate_motion
from media import audio_features
from media.compose import pictures_to_frames, read_photo
from media.controls import parse_controls
from media.device import autocast, autocast_iter, pick_device
from media.face import frame_video, load_detector
from media.files import InputError, check_file, command, printable, remove_unfinished
from media.latents import SD, SPACES, load_latents
from media.sound import FPS, SAMPLES_PER_FRAME, audio_chunks, has_audio, live_chunks, rechunk
from media.video import PROVENANCE, VideoWriter, write_all
from media.weights import load_weights, resolve

BATCH = 16  # frames decoded, or encoded, at once
ABSOLUTE = 0.5  # share of a driving video's own pose, see reenact
DEFAULT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", "semo-tiny.safetensors")
MODELS = {"encoder": (MotionEncoder, EncoderConfig), "decoder": (Decoder, DecoderConfig),
          "generator": (Generator, GeneratorConfig), "voice": (VoiceEmotion, VoiceConfig)}


def load_models(path, device="cpu"):
    """Load weights -> ({kind: model in eval mode}, meta). Raises InputError.
    path: a file, or owner/name[@revision] on the model hub."""
    models, meta = load_weights(resolve(path), MODELS, device)
    possible = {"size": range(16, 8193, 2), "latents": SPACES, "steps": range(1, 1001)}
    if "generator" in models:
        possible |= {"audio": audio_features.FEATURE_DIM, "gen_steps": range(1, 1001)}
        if not isinstance(meta.get("guidance", 1), (int, float)) or not 0 <= meta.get("guidance", 1) <= 100:
            possible["guidance"] = ()
    for name in possible.keys() & meta.keys():
        if not isinstance(meta[name], (str, int)) or meta[name] not in possible[name]:
            raise InputError(f"{path}: its {name} is {meta[name]!r}, which cannot be; the file is damaged or "
                             "of another version")
    return models, meta


def encode_silence(kind, whisper=None):
    """The speech features of no sound, (A,)."""
    return audio_features.extract_features(torch.zeros(1, SAMPLES_PER_FRAME), kind, whisper)[0, 0]


def prepare_reference(models, meta, image, seed):
    """What all jobs start with -> space of the latents, z_r, m_ref, source of noise, noise of the frames.
    z_r (1, C, H, W): the photo in that space, m_ref (1, L*D): its motion, noise (1, C, H, W). Noise is drawn
    on the CPU, so that every device gets the same."""
    device = next(models["decoder"].parameters()).device
    space = load_latents(meta["latents"], meta.get("vae", SD), device)
    rng = torch.Generator().manual_seed(seed)
    with torch.inference_mode(), autocast(device):
        z_r = space.encode(image[None].to(device))
        m_ref = models["encoder"](z_r).flatten(1)
    return space, z_r, m_ref, rng, torch.randn(z_r.shape, generator=rng).to(device)


@torch.no_grad()
def decode_frames(decoder, z_r, m_ref, motions, noise, steps=1):
    """Generate a frame for every motion; memory does not grow with their number.

    z_r (1, C, H, W), m_ref (1, L*D): the photo and its motion; motions: iterator of (n, L*D); noise (1, C, H,
    W) -> iterator of Pictures, (n', C, H, W) each, in pixel space with the parts of the last step.

    Every frame starts from the same noise, so that what the noise decides does not flicker (ours). A video
    model decodes F frames at once. The image model decodes what is there, up to BATCH, and waits for nothing,
    the first frame alone, so that it is shown early.
    """
    c = decoder.config
    size = c.frames
    cache = decoder.encode_reference(z_r, m_ref.unflatten(1, (c.num_tokens, c.token_dim)))
    for part in rechunk(motions, c.frames) if c.frames > 1 else motions:
        while len(part):
            chunk, part = part[:size], part[size:]
            size = c.frames if c.frames > 1 else BATCH
            start = noise.expand(len(chunk), *noise.shape[1:])
            cond = {"m_t": chunk.unflatten(1, (c.num_tokens, c.token_dim)), "cache": cache}
            if c.predict == "v":
                yield Picture(integrate(decoder, start, steps, **cond))
            else:                                                 # the last step ends at the picture itself
                z = integrate(decoder, start, steps, skip_last=1, **cond)
                yield decoder(z, z.new_full((len(z),), 1 / steps), **cond, as_picture=True)


def decode_motions(models, meta, reference, motions, steps=None, composer=None):
    """Motions, iterator of (n, L*D) -> (H, W, 3) uint8 frames, as many, as they are made.
    reference: what prepare_reference gives. steps: those of the weights (meta) where None. composer: makes
    frames whole photos (media/compose.py)."""
    space, z_r, m_ref, _, noise = reference
    pictures = decode_frames(models["decoder"], z_r, m_ref, motions, noise, steps or meta["steps"])
    return pictures_to_frames(space, autocast_iter(z_r.device, pictures), composer)


def animate_from_audio(models, meta, image, features, seed=0, steps=None, guidance=None, emotion=None,
                       composer=None):
    """Let a photo speak: (3, H, W) in [-1, 1] -> frames as of decode_motions, as many as rows of features.
    features: iterator of (n, A) speech features. Frames come as soon as those of a window and its look-ahead
    are there: of 16 + 3 frames with the embedded weights (0.8 s), of 30 s with weights trained on Whisper.
    steps and guidance are those of the weights (meta) where None. emotion: called with each part of features,
    it returns their moods (emotion.py)."""
    reference = _, _, m_ref, rng, _ = prepare_reference(models, meta, image, seed)
    silence_features = encode_silence(meta["audio"], meta.get("whisper"))
    guidance = meta["guidance"] if guidance is None else guidance
    features = autocast_iter(m_ref.device, features, models=False)                     # sound stays in fp32
    motions = generate_motion(models["generator"], m_ref, features, rng, silence_features,
                              steps or meta["gen_steps"], guidance, emotion)
    return decode_motions(models, meta, reference, motions, steps, composer)


def reenact(models, meta, image, video, seed=0, steps=None, absolute=ABSOLUTE, composer=None):
    """Let a photo move as a video does: iterator of (3, H, W) in [-1, 1], as the photo -> frames, as many.

    absolute: 0: the changes since the video's first frame are added to the photo's motion (Siarohin et al.
    2019, FOMM): lips that are shut in the photo cannot follow if the driver's were open at first. 1: the
    motions as they are: they also tell a little of the driver's face and place. Between: in proportion.
    """
    reference = space, _, m_ref, _, _ = prepare_reference(models, meta, image, seed)

    def motions():
        offset = None
        for frames in rechunk((frame[None] for frame in video), BATCH):
            motion = models["encoder"](space.encode(frames.to(m_ref.device))).flatten(1)           # (n, L*D)
            offset = (1 - absolute) * (m_ref - motion[:1]) if offset is None else offset
            yield motion + offset

    return decode_motions(models, meta, reference, motions(), steps, composer)


def animate_from_changes(models, meta, image, changes, seed=0, steps=None, composer=None):
    """Let the motion of a photo change by changes (n, L*D) -> frames, as many."""
    reference = _, _, m_ref, _, _ = prepare_reference(models, meta, image, seed)
    return decode_motions(models, meta, reference, iter([m_ref + changes.to(m_ref)]), steps, composer)


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--img", required=True, help="the photo: jpg, png or webp")
    p.add_argument("--face", type=int, metavar="N",
                   help="the N-th face of the photo from the left (default: the largest)")
    p.add_argument("--detector", metavar="YUNET.onnx",
                   help="find faces with this file of OpenCV's YuNet (default: with the cascades in OpenCV)")
    drive = p.add_mutually_exclusive_group(required=True)
    drive.add_argument("--wav",
                       help="the speech: wav, flac, ogg, mp3, m4a or a video with sound; -: raw from stdin, "
                            "as it arrives (signed 16-bit little-endian PCM, mono, 16 kHz)")
    drive.add_argument("--video", help="a driving video instead: its motion and its sound")
    drive.add_argument("--controls", metavar="TEXT",
                       help="known movements instead, changes from the photo: 'yaw=-10:10 blink=0,1,0' goes "
                            "from -10 to 10 degrees and blinks once (web/controls.py)")
    p.add_argument("--seconds", type=float, default=4.0,
                   help="with --controls: length of the video (default: %(default)s)")
    p.add_argument("--absolute", type=float, metavar="SHARE",
                   help="with --video: 1: its poses as they are; 0: its changes of pose alone "
                        f"(default: {ABSOLUTE})")
    p.add_argument("--out", default="out.mp4",
                   help="the video to write; -: to stdout, as it is made (default: %(default)s)")
    p.add_argument("--size", type=int, default=1080,
                   help="long side of the video, at most (default: %(default)s)")
    p.add_argument("--crop", action="store_true", help="write the square of the face, not the whole photo")
    p.add_argument("--ckpt", default=DEFAULT,
                   help="weights: a .safetensors file, or owner/name[@revision] on the model hub (default: "
                        "the embedded ones)")
    p.add_argument("--vae", help="folder of the autoencoder of sd weights (default: as in training)")
    p.add_argument("--whisper", help="folder of the Whisper model of the weights (default: as in training)")
    p.add_argument("--steps", type=int, help="sampling steps of both models (default: as released)")
    p.add_argument("--guidance", type=float,
                   help="how much the sound counts; 1: as it is (default: as released)")
    mood = p.add_mutually_exclusive_group()
    mood.add_argument("--emotion",
                      help="neutral, happy, sad, angry, afraid, disgusted or surprised; mixed: "
                           "happy:0.6+surprised:0.4; in time: 'neutral, happy@2.5, sad@6' (seconds); auto: "
                           "as the voice sounds; none: no opinion (default)")
    mood.add_argument("--emotion-text", metavar="WORDS",
                      help='the emotion in words, such as "a bitter smile"')
    p.add_argument("--text-model", default=TEXT_MODEL,
                   help="what reads the words: hub id or folder (default: %(default)s)")
    p.add_argument("--intensity", type=float,
                   help="of the emotion, 0 (a calm face) to 1.5 (beyond training) (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="another number, another take (default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    args = p.parse_args(argv)
    for name, low, high in (("seconds", 0.04, 3600), ("size", 32, 8192), ("steps", 1, 1000),
                            ("guidance", 0, 100), ("intensity", 0, 1.5), ("absolute", 0, 1),
                            ("seed", 0, 2**63 - 1)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            p.error(f"--{name} is {value}; give {low} to {high}")
    for name, value in vars(args).items():
        if value == "":                                           # such as an unset variable of the shell
            p.error(f"--{name.replace('_', '-')} is empty")
    if args.emotion is not None and args.emotion.strip().lower() == "none":
        args.emotion = None
    asked = args.emotion is not None or args.emotion_text is not None
    if args.absolute is None:
        args.absolute = ABSOLUTE
    elif not args.video:
        p.error("--absolute goes with --video")
    if asked and args.video is not None:
        p.error("--emotion and --emotion-text go with --wav: with --video the face takes the video's motion")
    if args.intensity is not None and not asked:
        p.error("--intensity goes with --emotion or --emotion-text")
    return args


def choose_emotion(args, models, seconds):
    """What --emotion and --emotion-text ask for, in so many seconds -> Schedule, FromVoice or None."""
    if args.emotion is None and args.emotion_text is None:
        return None
    intensity, config = 1.0 if args.intensity is None else args.intensity, models["generator"].config
    if not (config.experts or config.mood_table):
        raise InputError(f"{args.ckpt} was trained without emotions; leave --emotion out, or give weights "
                         "that train_gen.py makes")
    if args.emotion_text is not None:
        palette = text_palette(args.emotion_text, args.text_model)
        if palette.topk(2).values.diff().abs() < 0.1:
            print_note("the words of --emotion-text leave two emotions almost as likely")
        return Schedule([(0.0, palette)], intensity)
    if args.emotion.strip().lower() != "auto":
        return Schedule(parse_emotion(args.emotion, seconds), intensity)
    if "voice" not in models:
        raise InputError(f"{args.ckpt} cannot hear emotions, so not --emotion auto; name one, or give "
                         "weights that train_gen.py makes")
    return FromVoice(models["voice"], intensity)


def frames_and_sound(args, models, meta, image, composer, detector):
    """What the arguments ask for -> iterator of frames, their number, sound for VideoWriter, emotion.
    The number is None where it is not known yet."""
    common = {"seed": args.seed, "steps": args.steps, "composer": composer}
    if args.controls is not None:
        token = models["encoder"].config.num_tokens * models["encoder"].config.token_dim
        changes = parse_controls(args.controls, meta.get("controls"), token, round(args.seconds * FPS))
        return animate_from_changes(models, meta, image, changes, **common), len(changes), None, None
    if args.video is not None:
        video, note = frame_video(args.video, meta["size"], detector)
        print_note(note)
        frames = reenact(models, meta, image, video, absolute=args.absolute, **common)
        return frames, None, args.video if has_audio(args.video) else None, None
    if args.wav == "-":
        chunks, sound = live_chunks(sys.stdin.buffer)
        chunks, total = audio_features.streaming_gain(chunks), None
    else:
        gain, total = audio_features.scan_audio(args.wav)
        chunks, sound = (chunk * gain for chunk in audio_chunks(args.wav)), args.wav
    emotion = choose_emotion(args, models, total / FPS if total else math.inf)
    features = audio_features.stream_features(chunks, meta["audio"], meta.get("whisper"))
    common |= {"guidance": args.guidance, "emotion": emotion}
    return animate_from_audio(models, meta, image, features, **common), total, sound, emotion


def print_note(note):
    """Tell the user, if there is something to tell. Not on stdout, which may be the video."""
    if note:
        print(f"sample.py: {note}", file=sys.stderr)


def run(args):
    """The whole job, from names to a finished file. Raises InputError for what cannot be used."""
    source, live = args.wav or args.video, args.out == "-"
    if live and sys.stdout.isatty():
        raise InputError("--out - would print a video on the terminal; pipe it to a player or give a name "
                         "that ends in .mp4")
    if args.wav == "-" and sys.stdin.isatty():
        raise InputError("--wav - reads sound from a pipe, but stdin is the terminal; pipe 16-bit mono PCM "
                         "of 16 kHz to it")
    check_file(resolve(args.ckpt), "a .safetensors file, such as the embedded weights/semo-tiny.safetensors")
    for path in filter(None, (args.img, source, args.ckpt)):
        both = not live and path != "-" and os.path.exists(path) and os.path.exists(args.out)
        if both and os.path.samefile(path, args.out):
            raise InputError(f"--out {args.out} would overwrite an input; choose another name")
    models, meta = load_models(args.ckpt, pick_device(args.device))
    wanted = {"size", "latents", "steps"}
    wanted |= {"audio", "gen_steps", "guidance"} if "generator" in models else set()
    if lacking := sorted(wanted - meta.keys()):
        raise InputError(f"{args.ckpt} does not say its {', '.join(lacking)}; the file is damaged or of "
                         "another version")
    meta.update({name: given for name, given in (("vae", args.vae), ("whisper", args.whisper)) if given})
    if args.wav is not None and "generator" not in models:
        raise InputError(f"{args.ckpt} holds no motion generator; give another, or --video in place of --wav")
    detector = load_detector(args.detector)
    image, composer, note = read_photo(args.img, meta["size"], detector, args.size, args.crop, args.face)
    print_note(note)
    frames, total, sound, emotion = frames_and_sound(args, models, meta, image, composer, detector)
    comment = PROVENANCE if emotion is None else f"{PROVENANCE} Emotion: {emotion.describe()}."
    out = open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) if live else args.out
    if not live:
        remove_unfinished(args.out)
    start = time.perf_counter()
    with (VideoWriter(out, composer.size, sound, comment) as video,
          tqdm(total=total, unit="frame", disable=None) as bar):
        write_all(video, frames, bar.update)
    rate, report = video.frames / (time.perf_counter() - start), sys.stderr if live else sys.stdout
    print(f"{printable(args.out)}: {video.frames} frames, {video.frames / FPS:.2f} s, made at {rate:.1f} fps",
          file=report)
    if emotion is not None:
        print(f"emotion: {emotion.describe()}", file=report)


@command("sample.py")
def main(argv=None):
    args = parse(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        print("sample.py: interrupted" + ", no file was written" * (args.out != "-"), file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))       # so that a kill, too, cleans up
    sys.exit(main())
