"""The motion generator: each condition reaches the new frames, speech is heard in time, windows follow each
other."""

import pytest
import torch
import torch.nn.functional as F
from test_encoder import torch_attention

import flow
from generator import CrossAttention, Experts, Generator, GeneratorBlock, GeneratorConfig, generate_motion

SMALL = {"token_dim": 6, "audio_dim": 5, "width": 24, "depth": 2, "heads": 2, "window": 4, "past": 3,
         "lookahead": 2}
ROWS = 3 + 4 + 2                                                             # of speech in one pass of SMALL


def generator(lively=True, **change):
    """A small generator; lively: its zero weights made random, so that all paths show."""
    torch.manual_seed(0)
    model = Generator(GeneratorConfig(**{**SMALL, **change})).eval()
    if lively:
        for p in model.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.3)
    return model


def inputs(batch=2, seed=1, motion=6):
    """-> what forward takes: m_t, t, past, reference, audio."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 4, motion, generator=draw), 0.1 + 0.8 * torch.rand(batch, generator=draw),
            torch.randn(batch, 3, motion, generator=draw), torch.randn(batch, motion, generator=draw),
            torch.randn(batch, ROWS, 5, generator=draw)]


def differ(a, b, by=1e-4):
    """Each frame of a is unlike its fellow in b."""
    return ((a - b).abs().amax(2) > by).all()


# ---- layers and start --------------------------------------------------------------------------------------

def test_cross_attention_equals_torch():
    torch.manual_seed(0)
    ours, x, context = CrossAttention(24, 3), torch.randn(2, 4, 24), torch.randn(2, 7, 24)
    want = torch_attention(ours.out, ours.q(x), *ours.kv(context).chunk(2, -1), heads=3)
    torch.testing.assert_close(ours(x, context), want, atol=1e-5, rtol=1e-5)


def test_blocks_start_as_identity_and_the_output_as_zero():
    model = generator(lively=False)
    x = torch.randn(2, 7, 24)
    given = torch.randn(2, 24), model.pos_embed[:7], torch.randn(2, ROWS, 24), torch.randn(2, 1, 24)
    assert all(torch.equal(block(x, *given), x) for block in model.blocks)
    assert not model(*inputs()).any()


def test_every_parameter_learns():
    model = generator(num_tokens=2, experts=3, mood_table=True).train()      # (softmax over one token is 1)
    v = model(*inputs(motion=12), drop=torch.tensor([True, False]), mood=MOOD)
    (v * torch.randn_like(v)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert "clock" not in model.state_dict()


# ---- conditions --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("which", range(5), ids=["m_t", "t", "past", "reference", "audio"])
def test_new_frames_depend_on(which):
    model, given = generator(), inputs()
    changed = list(given)
    changed[which] = given[which] * 0.5
    assert differ(model(*changed), model(*given))


@pytest.mark.parametrize("frame", range(3))
def test_every_past_frame_is_seen(frame):
    model, given = generator(), inputs()
    plain = model(*given)
    given[2] = given[2].clone()
    given[2][:, frame] += 1
    assert differ(model(*given), plain, 1e-5)


@pytest.mark.parametrize("row", range(ROWS))
def test_every_row_of_speech_is_heard(row):
    """Those of the past, of the window, and those ahead of it."""
    model, given = generator(), inputs()
    plain = model(*given)
    given[4] = given[4].clone()
    given[4][:, row] += 1
    assert differ(model(*given), plain, 1e-5)


@pytest.mark.parametrize("which", [0, 2, 4], ids=["m_t", "past", "audio"])
def test_order_in_time_matters(which):
    model, given = generator(), inputs()
    plain = model(*given)
    given[which] = given[which].flip(1)
    back = model(*given)
    assert differ(back.flip(1) if which == 0 else back, plain)


def test_past_and_new_frames_are_told_apart():
    """The frame before the window and the first of it swap places: not the same, apart from the clock."""
    model = generator()
    model.pos_embed.zero_()
    m_t, t, past, reference, audio = inputs()
    plain = model(m_t, t, past, reference, audio)[:, 1:]
    first, last = m_t[:, :1], past[:, -1:]
    swapped = model(torch.cat([last, m_t[:, 1:]], 1), t, torch.cat([past[:, :-1], first], 1), reference,
                    audio)[:, 1:]
    assert differ(plain, swapped, 1e-5)


def test_samples_are_independent():
    model, given = generator(), inputs(3)
    plain = model(*given)
    for k in range(3):
        torch.testing.assert_close(model(*(part[k:k + 1] for part in given)), plain[k:k + 1], atol=1e-5,
                                   rtol=1e-5)


# ---- speech left out ---------------------------------------------------------------------------------------

def test_no_audio_is_all_rows_dropped():
    model, (*given, audio) = generator(), inputs()
    silent = model(*given, None)
    torch.testing.assert_close(model(*given, audio, drop=torch.tensor([True, True])), silent)
    torch.testing.assert_close(model(*given, audio * 7, drop=torch.tensor([True, True])), silent)
    torch.testing.assert_close(model(*given, audio, drop=torch.tensor([False, False])), model(*given, audio))
    assert differ(silent, model(*given, audio))


def test_drop_is_of_each_sample():
    model, (*given, audio) = generator(), inputs(3)
    some = model(*given, audio, drop=torch.tensor([False, True, False]))
    torch.testing.assert_close(some[[0, 2]], model(*given, audio)[[0, 2]])
    torch.testing.assert_close(some[1], model(*given, None)[1])


# ---- shapes ------------------------------------------------------------------------------------------------

def test_two_tokens_a_frame():
    model, given = generator(num_tokens=2), inputs(motion=12)
    v = model(*given)
    assert v.shape == (2, 4, 12) and v.dtype == torch.float32
    reference = given[3].clone()
    changed = reference.unflatten(1, (2, 6)).flip(1).flatten(1)              # the same set of two tokens
    torch.testing.assert_close(model(*given[:3], changed, given[4]), v)      # (B, L, D), not (B, D, L)
    changed = reference.unflatten(1, (6, 2)).transpose(1, 2).flatten(1)
    assert differ(model(*given[:3], changed, given[4]), v)


def test_output_is_fp32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert generator()(*inputs(), drop=torch.tensor([True, False])).dtype == torch.float32


@pytest.mark.parametrize("which, words",
                         [(0, "not 3, 3 and 9"), (2, "not 4, 2 and 9"), (4, "not 4, 3 and 8")])
def test_lengths_that_disagree_are_refused(which, words):
    given = inputs()
    given[which] = given[which][:, 1:]
    with pytest.raises(ValueError, match=f"4 new and 3 past frames and 9 rows.*{words}"):
        generator()(*given)


@pytest.mark.parametrize("wrong, words", [({"heads": 5}, "24.*5"), ({"width": 9, "heads": 3}, "9"),
                                          ({"window": 0}, "0"), ({"past": 0}, "0"),
                                          ({"lookahead": -1}, "-1")])
def test_config_errors_name_the_numbers(wrong, words):
    with pytest.raises(ValueError, match=words):
        GeneratorConfig(**{**SMALL, **wrong})


# ---- learning ----------------------------------------------------------------------------------------------

def learn(model, batches, steps, rate=5e-3):
    """-> the losses of training on batches() of (z, t, cond)."""
    optimiser, losses, draw = torch.optim.Adam(model.parameters(),
                                               lr=rate), [], torch.Generator().manual_seed(0)
    for _ in range(steps):
        z, t, cond = batches(draw)
        loss = flow.flow_loss(model, z, torch.randn(z.shape, generator=draw), t, **cond)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_a_small_batch_is_learned_by_heart():
    m, _, past, reference, audio = inputs(4)
    cond = {"past": past, "reference": reference, "audio": audio}
    losses = learn(generator(lively=False).train(), lambda draw: (m, torch.full((4,), 0.7), cond), 100)
    assert sum(losses[-20:]) / 20 < sum(losses[:5]) / 5 / 5


def test_a_frame_learns_to_hear_its_own_row():
    """Motion of frame f is row f of speech: found only if tokens and speech share a clock."""
    def batches(draw):
        audio = torch.randn(64, ROWS, 5, generator=draw)
        z = F.pad(audio, (0, 1))[:, 3:7]                                     # (B, K, L*D)
        return z, torch.ones(64), {"past": torch.zeros(64, 3, 6), "reference": torch.zeros(64, 6),
                                   "audio": audio}

    model = generator(lively=False, depth=1).train()
    learn(model, batches, 80, 1e-2)
    z, _, cond = batches(torch.Generator().manual_seed(1))
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        error = (flow.integrate(model.eval(), noise, 1, **cond) - z)[..., :5].square().mean()
    assert error < 0.3                                               # 1 without hearing, 2 with the wrong row


# ---- sampling ----------------------------------------------------------------------------------------------

SILENCE = torch.linspace(-1, 1, 5)


def speech(count):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(3))


def generated(model, rows, **options):
    still = torch.linspace(-2, 2, 6)[None]
    return list(generate_motion(model, still, rows, torch.Generator().manual_seed(4), SILENCE, **options))


def window_by_window(model, rows, steps, guidance):
    """generate_motion, with all of the speech at hand."""
    c, still, draw = model.config, torch.linspace(-2, 2, 6), torch.Generator().manual_seed(4)
    silent = SILENCE.expand(c.past + c.window + c.lookahead, -1)
    padded, past, out = torch.cat([silent[:c.past], rows, silent]), still.expand(1, c.past, -1), []
    for start in range(0, len(rows), c.window):
        cond = {"past": past, "reference": still[None], "audio": padded[None, start:start + len(silent)]}
        field = flow.with_cfg(model, guidance, {"audio": None})
        out.append(flow.integrate(field, torch.randn(1, c.window, 6, generator=draw), steps, **cond)[0])
        past = torch.cat([past[0], out[-1]])[None, -c.past:]
    return torch.cat(out)[:len(rows)].detach()


@pytest.mark.parametrize("past", [3, 6], ids=["past shorter than window", "longer"])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 7, 9, 12])
def test_a_motion_is_generated_for_every_row_of_speech(count, past):
    model, rows = generator(past=past), speech(count)
    parts = generated(model, [rows], steps=2, guidance=1.5)
    assert [len(part) for part in parts] == [4] * (count // 4) + [count % 4] * (count % 4 > 0)
    torch.testing.assert_close(torch.cat(parts), window_by_window(model, rows, 2, 1.5), atol=1e-5, rtol=1e-5)
    assert not parts[0].requires_grad


@pytest.mark.parametrize("sizes", [1, 3, 9, [5, 0, 4], [8, 1]])
def test_it_does_not_matter_how_speech_arrives(sizes):
    model, rows = generator(), speech(9)
    torch.testing.assert_close(torch.cat(generated(model, iter(rows.split(sizes)))),
                               torch.cat(generated(model, [rows])))


def test_a_window_comes_as_soon_as_its_speech_is_there():
    given = []

    def source():
        for row in speech(30).split(1):
            given.append(row)
            yield row

    motions = generate_motion(generator(), torch.zeros(1, 6), source(), torch.Generator(), SILENCE)
    for k in range(3):
        next(motions)
        assert len(given) == 4 * (k + 1) + 2                              # the window and what is ahead of it


def test_the_first_past_is_the_photo():
    model, seen = generator(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["past"]), with_kwargs=True)
    motion = torch.cat(generated(model, [speech(9)], steps=1))
    assert torch.equal(seen[0], torch.linspace(-2, 2, 6).expand(1, 3, -1))
    assert torch.equal(seen[1][0], motion[1:4]) and torch.equal(seen[2][0], motion[5:8])


@pytest.mark.parametrize("split", [9, 2])
def test_several_photos_and_voices_at_once(split):
    """As one after the other; each has the same noise, its own photo, voice and mood."""
    model = generator(experts=2)
    photos, voices, moods = torch.randn(2, 6), torch.randn(2, 9, 5), torch.rand(2, 9, 7)

    def motions(photos, voices, moods):
        mood = iter(moods.split(split, dim=-2))
        windows = generate_motion(model, photos, voices.split(split, dim=-2),
                                  torch.Generator().manual_seed(4), SILENCE, emotion=lambda rows: next(mood))
        return torch.cat(list(windows), dim=-2)

    both = motions(photos, voices, moods)
    one_voice = motions(photos, voices[0], moods)
    assert both.shape == (2, 9, 6) and motions(photos[:1], voices[0], moods[0]).shape == (9, 6)
    for k in range(2):
        torch.testing.assert_close(both[k], motions(photos[k:k + 1], voices[k], moods[k]))
        torch.testing.assert_close(one_voice[k], motions(photos[k:k + 1], voices[0], moods[k]))


def test_no_speech_is_no_motion():
    assert generated(generator(), []) == [] and generated(generator(), [speech(0)]) == []


# ---- truncation --------------------------------------------------------------------------------------------

def test_truncated_directions_have_no_noise():
    model, plain, seen = generator(truncated=2), generator(), []
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(generated(model, [speech(9)]), generated(plain, [speech(9)]))     # none so far
    model.truncated.copy_(torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(8))).Q)
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    generated(model, [speech(9)], steps=1)
    noise = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(4))
    along = model.truncated @ model.truncated.T                                # a projection: P P = P
    torch.testing.assert_close(along @ along, along)
    torch.testing.assert_close(seen[0], noise - noise @ along)
    assert (seen[0] @ model.truncated).abs().max() < 1e-6 < 0.1 < seen[0].std()


# ---- experts -----------------------------------------------------------------------------------------------

MOOD = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(7)) / 7                       # (B, P+K, 7)


def test_no_mood_is_a_mood_of_zeros_and_the_generator_without_experts():
    plain, model = generator(), generator(experts=3)
    model.load_state_dict(plain.state_dict(), strict=False)                  # all but the experts
    want = plain(*inputs())
    assert torch.equal(model(*inputs()), want) and torch.equal(model(*inputs(), mood=torch.zeros(2, 7, 7)),
                                                               want)
    assert differ(model(*inputs(), mood=MOOD), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(*inputs(), mood=torch.zeros(2, 7, 7)), plain(*inputs()))


def test_fresh_experts_change_nothing():
    torch.manual_seed(0)
    block = GeneratorBlock(24, 2, experts=3)
    torch.nn.init.normal_(block.modulation[1].weight)
    torch.nn.init.zeros_(block.experts.down.weight)
    given = torch.randn(2, 7, 24), torch.randn(2, 24), torch.randn(7, 24), torch.randn(2, ROWS,
        24), torch.randn(2, 1, 24)
    assert torch.equal(block(*given, MOOD), block(*given))
    assert not any(b.experts.down.weight.any() for b in generator(lively=False, experts=3).blocks)


@pytest.mark.parametrize("which", range(7))
def test_a_frame_of_one_emotion_teaches_one_expert(which):
    model = generator(experts=3).train()
    mood = torch.eye(7)[which].expand(2, 7, 7)
    (model(*inputs(), mood=mood) * torch.randn(2, 4, 6)).sum().backward()
    for block in model.blocks:
        taught = [block.experts.up.weight.grad.unflatten(0, (7, 3)).abs().sum((1, 2)),
                  block.experts.up.bias.grad.unflatten(0, (7, 3)).abs().sum(1),
                  block.experts.down.weight.grad.unflatten(1, (7, 3)).abs().sum((0, 2))]
        for grad in taught:
            assert grad[which] > 0 and not grad[torch.arange(7) != which].any()


def test_a_mood_is_felt_at_its_frame_first():
    """Without attention between frames, a mood changes its own frame alone."""
    model, mood = generator(experts=3), MOOD.clone()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)
        torch.nn.init.zeros_(block.attention.out.bias)
    plain = model(*inputs(), mood=mood)
    mood[:, 3 + 2] += 0.5                                                    # the third new frame
    moved = (model(*inputs(), mood=mood) - plain).abs().amax(2) > 1e-5
    assert moved.tolist() == [[False, False, True, False]] * 2


def test_a_table_of_moods():
    model = generator(mood_table=True)
    assert torch.equal(model(*inputs()), model(*inputs(), mood=torch.zeros(2, 7, 7)))
    assert differ(model(*inputs(), mood=MOOD), model(*inputs()))


def test_learned_gates_come_from_the_features():
    """A sigmoid of each frame scales what enters an expert, a softmax of their mean what leaves it (MoEE)."""
    torch.manual_seed(0)
    experts, x = Experts(24, 3, learned_gates=True), torch.randn(2, 5, 24)
    torch.nn.init.normal_(experts.down.weight)
    local_gate, global_gate = experts.gates(x).split(7, dim=2)
    share = experts.gates(x.mean(1))[:, 7:].softmax(1)                                             # (2, 7)
    torch.testing.assert_close(share, global_gate.mean(1).softmax(1))
    up, down = experts.up(x).unflatten(2, (7, 3)), experts.down.weight.unflatten(1, (7, 3))
    want = 0
    for e in range(7):
        seen = local_gate[..., e, None].sigmoid() * up[:, :, e]                                    # (2, 5, 3)
        want += share[:, None, e, None] * F.gelu(seen, approximate="tanh") @ down[:, e].T
    torch.testing.assert_close(experts(x, MOOD[:, :5]), want)
    model = generator(experts=3, mood_table=True, learned_gates=True)
    assert torch.equal(model(*inputs()), model(*inputs(), mood=torch.zeros(2, 7, 7)))
    assert differ(model(*inputs(), mood=MOOD), model(*inputs()))


class Numbered:
    """Moods that name their frame: row i is i/100 everywhere."""

    def __init__(self):
        self.done = 0

    def __call__(self, rows):
        self.done += len(rows)
        return (torch.arange(self.done - len(rows), self.done) / 100)[:, None].expand(-1, 7)


@pytest.mark.parametrize("count, sizes", [(9, 9), (9, 1), (9, [5, 0, 4]), (2, 2), (12, [11, 1])])
def test_moods_keep_step_with_speech(count, sizes):
    model, seen = generator(experts=3), []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["mood"][0, :, 0]),
                                    with_kwargs=True)
    motion = torch.cat(generated(model, iter(speech(count).split(sizes)), steps=1, emotion=Numbered()))
    for k, mood in enumerate(seen):                                # P=3 frames before, K=4 new; ends repeated
        torch.testing.assert_close(mood, torch.arange(4 * k - 3, 4 * k + 4).clamp(0, count - 1) / 100)
    assert len(seen) == -(-count // 4) and len(motion) == count


def test_with_a_mood_it_does_not_matter_how_speech_arrives():
    model, rows = generator(experts=3), speech(9)
    whole, parts, none, zero = (
        torch.cat(generated(model, given, emotion=emotion, guidance=1.5))
        for given, emotion in (([rows], Numbered()), (rows.split(2), Numbered()), ([rows], None),
                               ([rows], lambda rows: torch.zeros(len(rows), 7))))
    torch.testing.assert_close(parts, whole)
    assert torch.equal(zero, none) and not torch.equal(whole, none)
