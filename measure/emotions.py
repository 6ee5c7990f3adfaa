"""Does the face show the emotion that is wished? Read off generated frames, beside what can be read at all.

Of unseen people of the synthetic world, whose mood is known: the photo is neutral, and so is the voice where
nothing else is said. An emotion is read as the nearest of seven means of lip corners, brow raise and brow
furrow over a clip without its first second. The world adds emotions linearly, so compounds test the network
and say nothing of faces. Of real people no true mood is known: what a face mesh reads is compared with the
same person's neutral face.
"""
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from emotion import FromVoice, Schedule, describe, intensify, text_palette
from measure import landmarks, metrics, perceptual, reader
from measure.checkpoint import (
    decode_clip,
    encode,
    generate,
    interval_table,
    open_checkpoint,
    render_batched,
    table,
)
from measure.clips import read_faces, test_clips
from measure.metrics import NAMES, ratio_interval
from media import audio_features
from media.files import InputError
from media.sound import FPS, SAMPLE_RATE
from world import speech
from world.people import EMOTION_FACE, HELD_OUT, UNSEEN_PAIRS, perform, random_clip
from world.render import MOTION
from world.speech import EMOTIONS, speak

FRAMES = 150
STRIDE = 3                             # frames from one that is read to the next; a blink takes five
SLOW_SHARE = 4                        # compounds and intensities: of one person in so many
FACE = [NAMES.index(name) for name in ("lip_corner", "brow_raise", "brow_furrow")]
LIDS = [NAMES.index(name) for name in ("blink_l", "blink_r")]
MOUTH = [NAMES.index(name) for name in ("jaw", "lip_width")]
YAW = NAMES.index("yaw")
OTHERS = [k for k, name in enumerate(NAMES) if k not in FACE + LIDS + MOUTH and not name.startswith("gaze")]
INTENSITIES = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)
EYE = torch.eye(len(EMOTIONS))
PAIRS = [(a, b) for a in range(1, 7) for b in range(a + 1, 7)]
PICKS = slice(FPS, None, STRIDE)                                       # frames that are read, of all FRAMES
SLOW_PICKS = slice(FPS, None, 2 * STRIDE)                              # where only the mean over them counts
PHRASES = (                                                            # everyday words, and what they mean
    ("a poker face", "neutral"), ("reading the news", "neutral"), ("grinning from ear to ear", "happy"),
    ("over the moon", "happy"), ("telling a good joke", "happy"), ("about to cry", "sad"),
    ("a broken heart", "sad"), ("missing an old friend", "sad"), ("seeing red", "angry"),
    ("fed up with everything", "angry"), ("slamming the door", "angry"), ("scared to death", "afraid"),
    ("alone in a dark house", "afraid"), ("a bit nervous", "afraid"), ("this milk is sour", "disgusted"),
    ("what an awful smell", "disgusted"), ("ugh, gross", "disgusted"), ("her jaw dropped", "surprised"),
    ("I can't believe my eyes", "surprised"), ("what, really?", "surprised"))


# ---- moods -> tokens ---------------------------------------------------------------------------------------

def open_with_experts(args):
    """Open the checkpoint of a command. Raises InputError if it was trained without emotions."""
    checkpoint = open_checkpoint(args, "encoder", "decoder", "generator")
    if not (checkpoint.generator.config.experts or checkpoint.generator.config.mood_table):
        raise InputError(f"{args.ckpt} was trained without emotions; train_gen.py makes weights with them")
    return checkpoint


def generate_moods(checkpoint, photo, waves, moods, seed):
    """Generate the motion of one photo (3, H, W) in each of B moods, with the same noise -> (B, n, L*D).

    waves (1 or B, S): the sound; moods (B, 7) or (B, n, 7).
    """
    moods = moods[:, None] if moods.ndim == 2 else moods                               # (B, 1 or n, 7)
    tokens = generate(checkpoint, photo, waves, seed, batch=len(moods),
                      emotion=lambda features: moods.expand(-1, features.shape[-2], -1))
    return tokens.view(len(moods), -1, tokens.shape[-1])


def time_with_mood(checkpoint, photo, wave, runs=5):
    """Divide the generator's processor time with a mood by that without: medians of `runs`, in turn."""
    seconds = {False: [], True: []}
    for _ in range(runs):
        for with_mood, times in seconds.items():
            start = time.process_time()
            generate(checkpoint, photo, wave, 0, emotion=Schedule([(0.0, EYE[1])]) if with_mood else None)
            times.append(time.process_time() - start)
    return sorted(seconds[True])[runs // 2] / sorted(seconds[False])[runs // 2]


# ---- people of the synthetic world -------------------------------------------------------------------------

class Person:
    """A person of the synthetic world; in each mood truth (7, n, M) is the motion, waves (7, S) the voice,
    mouths (7, n, 2) what that moves. The photo is neutral."""

    def __init__(self, checkpoint, read_motion, steps, number):
        self.checkpoint, self.read_motion, self.steps, self.number = checkpoint, read_motion, steps, number
        self.seed = torch.tensor([HELD_OUT + number])
        voices = [speak(self.seed, FRAMES, mood[None]) for mood in EYE]
        self.waves = torch.cat([voice["wave"] for voice in voices])
        self.mouths = torch.stack([torch.cat([voice["jaw"], voice["lip_width"]]).T for voice in voices])
        self.truth = self.true_motion(EYE)
        self.identity = random_clip(self.seed, 1)["identity"][0]
        self.photo = render_batched(self.identity, self.truth[0, :1], checkpoint.meta["size"])[0]

    def true_motion(self, moods):
        """Motion (B, n, M) in moods (B, 7), the mouth as the neutral voice moves it."""
        jaw, lip_width = (x.expand(len(moods), -1) for x in self.mouths[0].T)
        return perform(self.seed.expand(len(moods)), jaw, lip_width, moods, movement=True)

    def read_tokens(self, tokens):
        """Decode tokens (B, n, L*D), and read motion (B, n, M) off the frames."""
        frames = decode_clip(self.checkpoint, self.photo, tokens.flatten(0, 1), self.steps, self.number)
        return self.read_motion(frames).unflatten(0, tokens.shape[:2])

    def generated(self, waves, moods, picks):
        """Generate from sound (1 or B, S) in moods (B, 7) or (B, F, 7), read motion (B, n, M) off `picks`."""
        tokens = generate_moods(self.checkpoint, self.photo, waves, moods, self.number)
        return self.read_tokens(tokens[:, picks])

    def main_rows(self):
        """Read the face in each of the seven moods -> {row: (motion, its truth)}, (7, n, M) each."""
        true = self.truth[:, PICKS]
        frames = render_batched(self.identity, true.flatten(0, 1), self.checkpoint.meta["size"])
        tokens = encode(self.checkpoint, frames)
        other_voice = torch.tensor([1 + (e + 2) % 6 for e in range(7)])       # never neutral, never the mood
        plain = generate(self.checkpoint, self.photo, self.waves[:1], self.number)[PICKS]
        ours, other = self.generated(torch.cat([self.waves[:1].expand(7, -1), self.waves[other_voice]]),
                                     EYE.repeat(2, 1), PICKS).split(7)
        other_true = true.clone()
        other_true[..., MOUTH] = self.mouths[other_voice][:, PICKS]
        return {"true factors": (true, true), "true frames": (self.read_motion(frames).view_as(true), true),
                "true tokens decoded": (self.read_tokens(tokens.unflatten(0, true.shape[:2])), true),
                "ours": (ours, true), "voice of another emotion": (other, other_true),
                "no emotion": (self.read_tokens(plain[None]).expand_as(true), true),
                "other label": (ours.roll(1, 0), true)}

    def compounds(self, calm):
        """Mix every pair of emotions half and half -> shifts of the face from calm, the true: (15, 3)."""
        moods = torch.stack([(EYE[a] + EYE[b]) / 2 for a, b in PAIRS])
        shift = self.generated(self.waves[:1], moods, SLOW_PICKS)[..., FACE].mean(1) - calm
        return shift, (self.true_motion(moods) - self.truth[:1])[:, FPS:, FACE].mean(1)

    def slopes(self, calm):
        """Measure how far each emotion moves the face along its true shift by intensity -> (6, I)."""
        moods = torch.stack([intensify(EYE[e], x) for e in range(1, 7) for x in INTENSITIES])
        face = self.generated(self.waves[:1], moods, SLOW_PICKS)[..., FACE].mean(1).unflatten(0, (6, -1))
        way = (self.truth[1:] - self.truth[:1])[:, FPS:, FACE].mean(1)[:, None]                    # (6, 1, 3)
        return ((face - calm) * way).sum(2) / way.square().sum(2)

    def switch(self):
        """Follow the lip corners over a switch from happy to sad, from 1 s before to 2 s after -> (75,)."""
        moods = Schedule([(0.0, EYE[1]), (3.0, EYE[2])])(torch.zeros(FRAMES, 1))                  # (F, 7)
        return self.generated(self.waves[:1], moods[None], slice(2 * FPS, 5 * FPS))[0, :, FACE[0]]


def face_means(clips=300):
    """Compute the mean expression of each emotion over training clips: (7, 3)."""
    seeds, mute = torch.arange(clips), torch.zeros(clips, FRAMES)
    moods = [perform(seeds, mute, mute, mood.expand(len(seeds), -1), movement=True) for mood in EYE]
    return torch.stack([motion[:, FPS:, FACE].mean((0, 1)) for motion in moods])


def measure_rows(x, target, means):
    """Compare motion x (P, 7, n, M) of P people in seven moods with the true target.

    means: face_means(). -> {measure: {mean, low, high}}: accuracy (nearest of the means); gains: size of the
    shift of each face factor from neutral by the true one, likewise of the lids of sad people; spread of yaw
    and blinks by the true; mouth: correlation of jaw and lip width; mouth_worst: of the worst emotion less
    that of neutral. crosstalk: the largest shift of another factor, by its range. per_emotion: accuracies.
    """
    people = len(x)
    faces, true_faces = (y[..., FACE].mean(2) for y in (x, target))                                # (P, 7, 3)
    right = (torch.cdist(faces.flatten(0, 1), means).argmin(1).view(-1, 7) == torch.arange(7)).float()
    shift, true_shift = faces - faces[:, :1], true_faces - true_faces[:, :1]
    products, sizes = (shift * true_shift).sum(1), true_shift.square().sum(1)                       # (P, 3)
    lids, true_lids = (y[..., LIDS].mean(3).median(2).values for y in (x, target))                    # (P, 7)
    yaw, true_yaw = (y[..., YAW].std(2).mean(1) for y in (x, target))                                   # (P,)
    blinks, true_blinks = (torch.tensor([sum(metrics.count_events(clip[:, LIDS[0]]) for clip in person)
                                         for person in y]) for y in (x, target))
    pairs = zip(x[..., MOUTH].flatten(0, 1), target[..., MOUTH].flatten(0, 1), strict=True)
    mouth = torch.stack([metrics.correlation(a, b).mean() for a, b in pairs]).view(people, 7)
    ranges = torch.tensor([high - low for low, high in MOTION.values()])
    crosstalk = ((x - x[:, :1]).mean((0, 2)).abs() / ranges)[1:, OTHERS].amax().item()
    worst = (mouth.mean(0) - mouth[:, 0].mean()).min().item()
    one = torch.ones(people)
    return {"accuracy": ratio_interval(right.mean(1), one),
            **{f"gain_{name}": ratio_interval(products[:, k], sizes[:, k])
               for k, name in enumerate(("corner", "raise", "furrow"))},
            "lids_sad": ratio_interval(lids[:, 2] - lids[:, 0], true_lids[:, 2] - true_lids[:, 0]),
            "yaw_std": ratio_interval(yaw, true_yaw), "blinks": ratio_interval(blinks, true_blinks),
            "mouth": ratio_interval(mouth.mean(1), one), "mouth_worst": worst, "crosstalk": crosstalk,
            "per_emotion": right.mean(0).tolist()}


def rank_correlation(values):
    """Correlate the ranks of values (n,) with their order (Spearman)."""
    ranks = values.argsort().argsort().float()
    return metrics.correlation(ranks[:, None], torch.arange(len(values)).float()[:, None]).item()


def switch_time(course):
    """Measure a change of course (n,) after its first second, from that one's mean to that of the last.

    -> seconds until four fifths of it are done, the largest step from frame to frame as a share of it.
    """
    start, end = course[:FPS].mean(), course[-FPS:].mean()
    share = ((course - start) / (end - start))[FPS:]
    return ((share > 0.8).float().argmax() / FPS).item(), share.diff().abs().max().item()


def synthetic_people(args):
    """Measure all rows of the table; --clips: people."""
    checkpoint, read_motion = open_with_experts(args), reader.load_regressor(args.reader)
    steps, means = args.steps or checkpoint.meta["steps"], face_means()
    rows, compounds, slopes, courses = {}, [], [], []
    for number in tqdm(range(args.clips), unit="person", disable=None):
        person = Person(checkpoint, read_motion, steps, number)
        for name, pair in person.main_rows().items():
            rows.setdefault(name, []).append(pair)
        courses.append(person.switch())
        if number < max(1, args.clips // SLOW_SHARE):
            calm = rows["ours"][-1][0][0, ::2][:, FACE].mean(0)                     # SLOW_PICKS of PICKS
            compounds.append(person.compounds(calm))
            slopes.append(person.slopes(calm))
    report = {name: measure_rows(*map(torch.stack, zip(*pairs, strict=True)), means)
              for name, pairs in rows.items()}
    print(f"{args.clips} unseen people, neutral photo, {FRAMES / FPS:g} s, {checkpoint.meta['size']} px; "
          f"read off every {STRIDE}rd frame; mean [95%]; chance 0.14")
    print_rows(report)
    shift, true_shift = (torch.stack(x) for x in zip(*compounds, strict=True))                 # (P, 15, 3)
    distance = (shift - true_shift).norm(dim=2).mean(0)
    untrained = torch.tensor([(EMOTIONS[a], EMOTIONS[b]) in UNSEEN_PAIRS for a, b in PAIRS])
    slope = torch.stack(slopes).mean((0, 1))
    seconds, largest = switch_time(torch.stack(courses).mean(0))
    two_seconds = person.waves[:1, : 2 * SAMPLE_RATE]
    extra = {"compounds_seen": distance[~untrained].mean().item(),
             "compounds_unseen": distance[untrained].mean().item(),
             "compounds_true_size": true_shift.norm(dim=2).mean().item(),
             "intensity": [round(value, 3) for value in slope.tolist()],
             "intensity_spearman": rank_correlation(slope),
             "switch_80_percent_seconds": seconds, "switch_largest_step": largest,
             "time_with_emotion": time_with_mood(checkpoint, person.photo, two_seconds)}
    if hasattr(checkpoint, "voice"):
        extra |= voice_accuracy(checkpoint, args.clips)
    print()
    table(["", ""], [[name, str(value) if isinstance(value, list) else f"{value:.3f}"]
                     for name, value in extra.items()])
    return {"rows": report, **extra}


def print_rows(report):
    """Print {row: measure_rows()} as two tables: with intervals, and by emotion."""
    intervals = [name for name, value in report["ours"].items() if isinstance(value, dict)]
    interval_table(report, intervals, 2)
    print()
    table(["", "mouth_worst", "crosstalk", *(f"accuracy: {name}" if k == 0 else name
                                             for k, name in enumerate(EMOTIONS))],
          [[name, *(f"{x:.2f}" for x in (entry["mouth_worst"], entry["crosstalk"], *entry["per_emotion"]))]
           for name, entry in report.items()])


# ---- the voice ---------------------------------------------------------------------------------------------

def voice_accuracy(checkpoint, people):
    """Measure VoiceEmotion on one-emotion voices of unseen people.

    -> voice_accuracy, seven-way; voice_neutral_shift, how far the mood heard in neutral voices would move the
    face; voice_ceiling and voice_ceiling_shift, both of a network that is told the voice's true parameters.
    """
    meta, palettes = checkpoint.meta, []
    for mood in EYE:
        waves = speak(HELD_OUT + torch.arange(people), FRAMES, mood.expand(people, -1))["wave"]
        waves = audio_features.normalise_loudness(waves)
        last = [FromVoice(checkpoint.voice)(features)[-1].cpu() for features in
                 audio_features.extract_features(waves, meta["audio"], meta.get("whisper"))]
        palettes.append(torch.stack(last))                                                      # (P, 7)
    accuracy, shift = judge_palettes(torch.stack(palettes))
    ceiling, ceiling_shift = voice_ceiling()
    return {"voice_accuracy": accuracy, "voice_neutral_shift": shift,
            "voice_ceiling": ceiling, "voice_ceiling_shift": ceiling_shift}


def judge_palettes(palettes):
    """Palettes (7, P, 7) of P voices of each emotion -> share of them whose first emotion is right, and the
    length of the mean change of the face by neutral voices."""
    right = palettes.argmax(2) == torch.arange(7)[:, None]
    face = torch.tensor([[EMOTION_FACE[name].get(NAMES[k], 0.0) for k in FACE] for name in EMOTIONS])
    shift = (palettes[0].mean(0) - EYE[0]) @ face                                                    # (3,)
    return right.float().mean().item(), shift.norm().item()


def voice_ceiling(train=40_000, test=4000, steps=800):
    """Train a network on the exact pitch, range, tract, effort, rate and tilt of voices, all emotions equally
    often -> judge_palettes() of unseen people."""
    def parameters(seeds, which):
        v = speech.voice(seeds, EYE[which])
        return torch.cat([v["pitch"].log(), v["range"].log(), v["tract"], v["effort"].log(), v["rate"].log(),
                          v["tilt"]], 1)

    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        which, test_which = torch.randint(7, (train,)), torch.arange(7).repeat_interleave(test // 7)
        x = parameters(torch.arange(train), which)
        test_x = (parameters(HELD_OUT + torch.arange(len(test_which)), test_which) - x.mean(0)) / x.std(0)
        x = (x - x.mean(0)) / x.std(0)
        network = nn.Sequential(nn.Linear(x.shape[1], 64), nn.GELU(), nn.Linear(64, 7))
        optimiser = torch.optim.AdamW(network.parameters(), 1e-2)
        for _ in range(steps):
            batch = torch.randint(len(x), (512,))
            loss = F.cross_entropy(network(x[batch]), which[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        return judge_palettes(network(test_x).softmax(1).view(7, -1, 7))


# ---- words -------------------------------------------------------------------------------------------------

def words(args):
    """Print what --emotion-text makes of the names of the emotions and of PHRASES.

    -> names, phrases: the shares whose first emotion is as meant; palettes: {words: weights (7)}.
    """
    meant = [*zip(EMOTIONS, EMOTIONS, strict=True), *PHRASES]
    palettes = [text_palette(text, args.text_model) for text, _ in meant]
    right = [EMOTIONS[palette.argmax()] == name for palette, (_, name) in zip(palettes, meant, strict=True)]
    table(["words", "meant", "", "came out"],
          [[text, name, "" if hit else "not", describe(palette)]
           for (text, name), hit, palette in zip(meant, right, palettes, strict=True)])
    report = {"names": sum(right[:7]) / 7, "phrases": sum(right[7:]) / len(PHRASES)}
    print("\nfirst emotion as meant: names {names:.2f}, phrases {phrases:.2f}; chance 0.14".format(**report))
    return {**report, "palettes": {text: palette.tolist()
                                   for (text, _), palette in zip(meant, palettes, strict=True)}}


# ---- real people -------------------------------------------------------------------------------------------

def real_people(args):
    """Show each emotion on the first frame of real clips, with their sound, and compare with `neutral`.

    Prints and returns {emotion: {measure}}: changes of lip corners, lip width and lids from neutral, in
    heights of the face (lids: widths of the eye); correlation of the opening of the mouth with neutral's;
    csim with the photo; recognised: the share of frames that show the wished expression. Medians over people.
    """
    checkpoint = open_with_experts(args)
    nets, absent = perceptual.load(args.networks, checkpoint.device)
    steps, by_emotion, people = args.steps or checkpoint.meta["steps"], {name: [] for name in EMOTIONS}, []
    for c in test_clips(args, checkpoint.meta["size"], sound=True):
        people.append(c.person)
        tokens = generate_moods(checkpoint, c.images[0], c.wave, EYE, c.number)[:, FPS // 5:]
        tokens = tokens[:, ::max(1, tokens.shape[1] // 25)]                           # 25 to 49 of each clip
        frames = decode_clip(checkpoint, c.images[0], tokens.flatten(0, 1), steps, c.number)
        frames = frames.unflatten(0, tokens.shape[:2])                                     # (7, n, 3, H, W)
        curves = read_faces(args, list(frames)) if args.landmarks else [{}] * len(EMOTIONS)
        for name, read, shown in zip(EMOTIONS, curves, frames, strict=True):
            measured = {factor: landmarks.known_mean(read[factor] - curves[0][factor])
                        for factor in ("corners", "width", "lids") if read}
            if read:
                measured["opening"] = landmarks.correlation(curves[0]["opening"], read["opening"])
            if "csim" in nets:
                measured["csim"] = nets["csim"](c.images[:1], shown, c.face).mean().item()
            if "expression" in nets:
                recognised = nets["expression"](shown, c.face).argmax(1) == EMOTIONS.index(name)
                measured["recognised"] = recognised.float().mean().item()
            by_emotion[name].append(measured)
    rows = {name: landmarks.summary(measured, people) for name, measured in by_emotion.items()}
    print(f"{len(people)} clips of {len(set(people))} unseen people of {args.data}, their own sound; changes "
          f"from neutral, median over people [95%]")
    interval_table(rows, by_emotion["neutral"][0], 3)
    print(*absent, sep="\n")
    return {"rows": rows}
