"""Does the face feel what it is told: emotions read off generated frames, beside what can be read at all.

Everything is of unseen people of the synthetic world, whose mood is known: the photo is neutral, and so is
the voice where nothing else is said. An emotion is read as the nearest of seven means of lip corners, brow
raise and brow furrow over a clip without its first second. The world adds emotions linearly, so compounds
test the network and say nothing of faces.
"""
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from emotion import FromVoice, Schedule
from generator import generate_motion
from measure import metrics, reader
from measure.checkpoint import decode_clip, encode, open_checkpoint, render_batched, table
from media import audio_features
from media.device import autocast
from media.files import InputError
from media.sound import FPS, SAMPLES_PER_FRAME
from training import step_rng
from world import speech
from world.people import EMOTION_FACE, HELD_OUT, UNSEEN_PAIRS, perform, random_clip
from world.render import MOTION
from world.speech import EMOTIONS, speak

FRAMES = 150
STRIDE = 3                                             # frames from one that is decoded and read to the next
NAMES = list(MOTION)
FACE = [NAMES.index(name) for name in ("lip_corner", "brow_raise", "brow_furrow")]
LIDS, MOUTH = ([NAMES.index(name) for name in pair]
               for pair in (("blink_l", "blink_r"), ("jaw", "lip_width")))
YAW = NAMES.index("yaw")
OTHERS = [k for k, name in enumerate(NAMES) if k not in FACE + LIDS + MOUTH and not name.startswith("gaze")]
INTENSITIES = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)
EYE = torch.eye(len(EMOTIONS))


def face_means(clips=300):
    """Mean expression of each emotion over training clips: (7, 3)."""
    seeds, mute = torch.arange(clips), torch.zeros(clips, FRAMES)
    moods = [perform(seeds, mute, mute, mood.expand(len(seeds), -1), movement=True) for mood in EYE]
    return torch.stack([motion[:, FPS:, FACE].mean((0, 1)) for motion in moods])


def generate(checkpoint, photo, wave, seed, emotion=None):
    """Tokens (n, L*D) of photo (3, H, W) and sound (1, S) in the moods that `emotion` returns (None: no
    opinion)."""
    meta, sounds = checkpoint.meta, (audio_features.normalise_loudness(wave),
                                     torch.zeros(1, SAMPLES_PER_FRAME))
    features, silence = (audio_features.extract_features(x, meta["audio"], meta.get("whisper"))[0]
                         for x in sounds)
    m_ref = encode(checkpoint, photo[None])
    with autocast(checkpoint.device):
        return torch.cat(list(generate_motion(checkpoint.generator, m_ref, iter([features]),
                                              step_rng(3, 0, seed), silence[0],
                                              checkpoint.meta["gen_steps"], meta["guidance"], emotion)))


def cost(checkpoint, photo, wave, runs=5):
    """Processor time of the generator with a mood by that without: the median of `runs`, taken in turn."""
    spent = {False: [], True: []}
    for _ in range(runs):
        for wished, seconds in spent.items():
            began = time.process_time()
            generate(checkpoint, photo, wave, 0, Schedule([(0.0, EYE[1])]) if wished else None)
            seconds.append(time.process_time() - began)
    return sorted(spent[True])[runs // 2] / sorted(spent[False])[runs // 2]


def spearman(values):
    """Rank correlation of values (n,) with their order."""
    ranks = values.argsort().argsort().float()
    return metrics.correlation(ranks[:, None], torch.arange(len(values)).float()[:, None]).item()


def voice_accuracy(checkpoint, people):
    """Seven-way accuracy of VoiceEmotion on one-emotion voices of unseen people; that of a network that is
    told the exact pitch, range, vocal tract, effort, rate and tilt of the voice (a ceiling); and the shift of
    the face by a neutral voice."""
    meta, right, palettes = checkpoint.meta, [], []
    for k, mood in enumerate(EYE):
        wave = audio_features.normalise_loudness(speak(HELD_OUT + torch.arange(people), FRAMES,
                                                       mood.expand(people, -1))["wave"])
        for features in audio_features.extract_features(wave, meta["audio"], meta.get("whisper")):
            palettes.append(FromVoice(checkpoint.voice)(features)[-1].cpu())
            right.append(palettes[-1].argmax() == k)
    calm = torch.stack(palettes[:people]).mean(0) - EYE[0]
    shift = calm @ torch.tensor([[EMOTION_FACE[e].get(NAMES[k], 0.0) for k in FACE] for e in EMOTIONS])

    def known(seeds, which):
        v = speech.voice(seeds, EYE[which])
        return torch.cat([v["pitch"].log(), v["range"].log(), v["tract"], v["effort"].log(), v["rate"].log(),
                          v["tilt"]], 1)

    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        which, test = torch.randint(7, (40_000,)), torch.arange(4000) % 7
        x, y = known(torch.arange(len(which)), which), known(HELD_OUT + torch.arange(len(test)), test)
        x, y = (x - x.mean(0)) / x.std(0), (y - x.mean(0)) / x.std(0)
        network = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 64), torch.nn.GELU(),
                                      torch.nn.Linear(64, 7))
        optimiser = torch.optim.AdamW(network.parameters(), 1e-2)
        for _ in range(800):
            chosen = torch.randint(len(x), (512,))
            loss = F.cross_entropy(network(x[chosen]), which[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        ceiling = (network(y).argmax(1) == test).float().mean().item()
    return torch.stack(right).float().mean().item(), ceiling, shift.norm().item()


def emotion(args):
    """All rows of the table; --clips: people."""
    checkpoint, read_motion = open_checkpoint(args, "encoder", "decoder",
                                              "generator"), reader.load_regressor(args.reader)
    config, size = checkpoint.generator.config, checkpoint.meta["size"]
    steps = args.steps or checkpoint.meta["steps"]
    if not (config.experts or config.mood_table):
        raise InputError(f"{args.ckpt} was trained without emotions; train_gen.py makes weights with them")
    picks, means = torch.arange(FPS, FRAMES, STRIDE), face_means()
    pairs = [(a, b) for a in range(1, 7) for b in range(a + 1, 7)]
    unseen = torch.tensor([(EMOTIONS[a], EMOTIONS[b]) in UNSEEN_PAIRS for a, b in pairs])
    rows = {name: [] for name in ("true factors", "true frames", "true tokens decoded", "ours",
                                  "voice of another emotion")}
    none, mixed, mixed_true, slopes, courses = [], [], [], [], []
    for k in tqdm(range(args.clips), unit="person", disable=None):
        seed = torch.tensor([HELD_OUT + k])
        voices = [speak(seed, FRAMES, mood[None]) for mood in EYE]
        jaw, lips = voices[0]["jaw"], voices[0]["lip_width"]
        truth = [perform(seed, jaw, lips, mood[None], movement=True)[0] for mood in EYE]
        clip = random_clip(seed, 1)
        photo = render_batched(clip["identity"][0], truth[0][:1], size)[0]

        def shown(wave, *stops, intensity=1.0, at=picks, photo=photo, k=k):
            tokens = generate(checkpoint, photo, wave, k, Schedule(stops, intensity) if stops else None)
            return read_motion(decode_clip(checkpoint, photo, tokens[at], steps, k))

        frames = [render_batched(clip["identity"][0], motion[picks], size) for motion in truth]
        rows["true factors"].append(torch.stack([motion[picks] for motion in truth]))              # (7, n, M)
        rows["true frames"].append(torch.stack([read_motion(x) for x in frames]))
        rows["true tokens decoded"].append(torch.stack([read_motion(decode_clip(checkpoint, photo,
            encode(checkpoint, x), steps, k))
                                                        for x in frames]))
        rows["ours"].append(torch.stack([shown(voices[0]["wave"], (0.0, mood)) for mood in EYE]))
        rows["voice of another emotion"].append(torch.stack([shown(voices[1 + (e + 2) % 6]["wave"],
                                                                   (0.0, mood))
                                                             for e, mood in enumerate(EYE)]))
        none.append(shown(voices[0]["wave"]))
        if k < max(1, args.clips // 4):                             # the longer rows: a quarter of the people
            calm = rows["ours"][-1][0][:, FACE].mean(0)
            halves = [(EYE[a] + EYE[b]) / 2 for a, b in pairs]
            mixed.append(torch.stack([shown(voices[0]["wave"], (0.0, mood))[:, FACE].mean(0) - calm
                                      for mood in halves]))
            mixed_true.append(torch.stack([perform(seed, jaw, lips, mood[None],
                                                   movement=True)[0, FPS:, FACE].mean(0)
                                           - truth[0][FPS:, FACE].mean(0) for mood in halves]))
            for e in range(1, 7):
                way = truth[e][FPS:, FACE].mean(0) - truth[0][FPS:, FACE].mean(0)
                reach = [shown(voices[0]["wave"], (0.0, EYE[e]), intensity=x)[:, FACE].mean(0)
                         for x in INTENSITIES]
                reach = [(face - calm) @ way / way.square().sum() for face in reach]
                slopes.append(torch.stack(reach))
            course = shown(voices[0]["wave"], (0.0, EYE[1]), (3.0, EYE[2]),
                           at=torch.arange(50, 125))[:, FACE[0]]
            courses.append(course)
    rows = {name: torch.stack(value) for name, value in rows.items()}                           # (P, 7, n, M)
    none, target = torch.stack(none), rows["true factors"]
    measures = {}
    ranges = torch.tensor([high - low for low, high in MOTION.values()])
    for name, x in {**rows, "no emotion": none[:, None].expand_as(target),
                    "other label": rows["ours"].roll(1, 1)}.items():
        means_of = x[..., FACE].mean(2)                                                            # (P, 7, 3)
        right = torch.cdist(means_of.flatten(0, 1), means).argmin(1).view(-1, 7) == torch.arange(7)
        shift, true_shift = (y - y[:, :1] for y in (means_of, target[..., FACE].mean(2)))
        gain = (shift * true_shift).sum((0, 1)) / true_shift.square().sum((0, 1))
        lids, true_lids = (y[..., LIDS].mean(3).median(2).values for y in (x, target))
        mouth = torch.stack([metrics.correlation(a, b) for a,
                             b in zip(x[..., MOUTH].flatten(0, 1), target[..., MOUTH].flatten(0, 1),
                                                                       strict=True)]).view(len(x), 7,
                                                                           2).mean(2)
        crosstalk = ((x - x[:, :1]).mean((0, 2)).abs() / ranges)[1:, OTHERS].amax()
        blinks = [sum(metrics.count_events(clip[:, LIDS[0]]) for clip in y.flatten(0, 1))
                  for y in (x, target)]
        measures[name] = {
            "accuracy": right.float().mean().item(), "per_emotion": right.float().mean(0).tolist(),
            "gain_corner": gain[0].item(), "gain_raise": gain[1].item(), "gain_furrow": gain[2].item(),
            "lids_sad": ((lids[:, 2] - lids[:, 0]).mean()
                         / (true_lids[:, 2] - true_lids[:, 0]).mean()).item(),
            "crosstalk": crosstalk.item(),
            "yaw_std": (x[..., YAW].std(2).mean() / target[..., YAW].std(2).mean()).item(),
            "blinks": blinks[0] / max(1, blinks[1]), "mouth": mouth.mean().item(),
            "mouth_worst": (mouth.mean(0) - mouth[:, 0].mean()).min().item()}
    print(f"{args.clips} unseen people, neutral photo, {FRAMES / FPS:g} s, {size} px; read off every "
          f"{STRIDE}rd frame; chance 0.14")
    keys = list(measures["ours"])
    keys.remove("per_emotion")
    table(["", *keys], [[name, *(f"{m[key]:.2f}" for key in keys)] for name, m in measures.items()])
    print("\naccuracy of each emotion")
    table(["", *EMOTIONS], [[name, *(f"{value:.2f}" for value in m["per_emotion"])] for name,
                            m in measures.items()])
    far = (torch.stack(mixed) - torch.stack(mixed_true)).norm(dim=2).mean(0)                           # (15,)
    slope = torch.stack(slopes).mean(0)
    course = torch.stack(courses).mean(0)                                                   # frames 50 to 124
    before, after = course[:25].mean(), course[-25:].mean()
    share = ((course - before) / (after - before))[25:]
    extra = {
        "compounds_seen": far[~unseen].mean().item(), "compounds_unseen": far[unseen].mean().item(),
        "compounds_true_size": torch.stack(mixed_true).norm(dim=2).mean().item(),
        "intensity": [round(value, 3) for value in slope.tolist()], "intensity_spearman": spearman(slope),
        "switch_80_percent_seconds": ((share > 0.8).float().argmax() / FPS).item(),
        "switch_largest_step": share.diff().abs().max().item(),
        "time_with_emotion": cost(checkpoint, photo, voices[0]["wave"])}
    if hasattr(checkpoint, "voice"):
        found = voice_accuracy(checkpoint, args.clips)
        extra["voice_accuracy"], extra["voice_ceiling"], extra["voice_neutral_shift"] = found
    print()
    table(["", ""], [[name, str(value) if isinstance(value, list) else f"{value:.3f}"] for name,
                     value in extra.items()])
    return {"rows": measures, **extra}
