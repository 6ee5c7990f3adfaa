"""The decoder: the cached reference against attention written out in full, clips, conditioning,
x-prediction."""

import pytest
import torch
import torch.nn.functional as F

from decoder import Decoder, DecoderConfig, DiTBlock, TemporalBlock, TimeEmbed, modulate, warp_and_blend
from encoder import patchify, unpatchify
from flow import integrate

SMALL = {"image_size": 8, "patch_size": 4, "width": 24, "depth": 2, "heads": 2, "token_dim": 5,
         "tokens_per_motion": 3}


def decoder(lively=True, **change):
    """A small decoder; lively: every weight that starts at zero made random, so that all paths show."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(**{**SMALL, **change})).eval()
    if lively:
        for weight in model.parameters():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.3)
        if model.config.predict == "x":
            # displacements within the picture
            model.head.weight.data[-2 * model.config.warp_grid**2:] *= 0.03
    return model


def inputs(references=2, frames=1, seed=1, tokens=1):
    """-> z_r, m_r of the references; z_t, t, m_t of references * frames targets."""
    draw = torch.Generator().manual_seed(seed)
    n = references * frames
    return (torch.randn(references, 3, 8, 8, generator=draw),
            torch.randn(references, tokens, 5, generator=draw),
            torch.randn(n, 3, 8, 8, generator=draw), 0.1 + 0.9 * torch.rand(n, generator=draw),
            torch.randn(n, tokens, 5, generator=draw))


def velocity(model, z_r, m_r, z_t, t, m_t):
    return model(z_t, t, m_t, model.encode_reference(z_r, m_r))


def differ(a, b, by=1e-4):
    """Each sample of a is unlike its fellow in b."""
    return ((a - b).abs().flatten(1).amax(1) > by).all()


# ---- blocks ------------------------------------------------------------------------------------------------

def test_time_embedding_is_of_a_thousand_t():
    torch.manual_seed(0)
    embed = TimeEmbed(8)
    t = torch.tensor([0, 0.3, 1])
    angle = 1000 * t[:, None] * torch.tensor([1, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4])
    torch.testing.assert_close(embed(t), embed.mlp(torch.cat([angle.sin(), angle.cos()], 1)), atol=1e-4,
                               rtol=1e-4)
    raw = TimeEmbed(64)
    raw.mlp = torch.nn.Identity()
    near = F.cosine_similarity(raw(torch.tensor([0.4])), raw(torch.tensor([0.5])))
    assert near < 0.8                                                       # times that differ look different


def test_modulate_of_zero_is_nothing():
    x = torch.randn(2, 3, 4)
    assert torch.equal(modulate(x, torch.zeros(2, 4), torch.zeros(2, 4)), x)
    torch.testing.assert_close(modulate(x, torch.ones(2, 4), torch.full((2, 4), 2.0)), 3 * x + 1)


def test_a_zero_modulation_is_the_identity():
    block, x = DiTBlock(24, 2), torch.randn(2, 5, 24)
    torch.nn.init.zeros_(block.modulation[1].weight), torch.nn.init.zeros_(block.modulation[1].bias)
    assert torch.equal(block(x, torch.randn(2, 24))[0], x)


def by_hand(model, z_r, m_r, z_t, t, m_t, sees):
    """Decoder's output as one joint sequence of reference and target under a mask: sees (2n, 2n), row sees
    column."""
    c = model.config
    row, moving = model.embed_target(z_t, t, m_t, z_r, m_r)
    rows = [model.embed_tokens(z_r, m_r, 0), row]
    n, patches = rows[0].shape[1], (c.image_size // c.patch_size) ** 2
    still = moving if c.full_attention else model.ref_condition.expand_as(moving)
    condition = torch.stack([still, moving], 1).repeat_interleave(n, 1)       # (B, 2n, E): one for each token
    x = torch.cat(rows, 1)
    for block in model.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(condition).chunk(6, -1)
        y = F.layer_norm(x, (c.width,), eps=1e-6) * (1 + scale1) + shift1
        y = F.scaled_dot_product_attention(*block.attention.project(y), attn_mask=sees)
        x = x + gate1 * block.attention.out(y.transpose(1, 2).flatten(2))
        x = x + gate2 * block.mlp(F.layer_norm(x, (c.width,), eps=1e-6) * (1 + scale2) + shift2)
    shift, scale = model.modulation(moving)[:, None].chunk(2, -1)
    out = model.head(F.layer_norm(x[:, n:n + patches], (c.width,), eps=1e-6) * (1 + scale) + shift)
    return unpatchify(out, c.patch_size)


@pytest.mark.parametrize("full", [False, True])
def test_decoder_equals_one_joint_sequence(full):
    """The cache is a shortcut for: the reference sees the reference, the target sees both (full: all see
    all)."""
    model, given = decoder(lively=True, predict="v", full_attention=full), inputs()
    n = 4 + 3                                                             # patches and motion tokens of a row
    sees = torch.ones(2 * n, 2 * n, dtype=torch.bool)
    if not full:
        sees[:n, n:] = False
    torch.testing.assert_close(velocity(model, *given), by_hand(model, *given, sees), atol=1e-5, rtol=1e-5)
    assert differ(velocity(model, *given), by_hand(model, *given, sees.T if not full else sees.tril()), 1e-3)


@pytest.mark.parametrize("full", [False, True])
def test_only_full_attention_lets_the_reference_see_the_target(full):
    model = decoder(full_attention=full)
    z_r, m_r, z_t, t, m_t = inputs(1)
    states = []
    model.blocks[-1].register_forward_hook(lambda block, given, out: states.append(out[0]))
    for target in (z_t, z_t + 1):
        velocity(model, z_r, m_r, target, t, m_t)
    first, second = states[::len(states) // 2]                      # the states that hold the reference's row
    same = torch.allclose(first[:, :7], second[:, :7], atol=1e-6)
    assert same is not full


# ---- the reference, computed once --------------------------------------------------------------------------

@pytest.mark.parametrize("full", [False, True])
def test_a_cache_serves_every_step(full):
    model = decoder(lively=True, full_attention=full)
    z_r, m_r, z_t, t, m_t = inputs()
    cache = model.encode_reference(z_r, m_r)
    first = model(z_t, t, m_t, cache)
    model(z_t + 1, t / 2, m_t - 1, cache)                                    # another step leaves no trace
    assert torch.equal(model(z_t, t, m_t, cache), first)
    assert torch.equal(velocity(model, z_r, m_r, z_t, t, m_t), first)


@pytest.mark.parametrize("change", [{}, {"full_attention": True}, {"predict": "v"}, {"num_tokens": 2}])
def test_two_references_of_three_targets_each(change):
    """(b f): targets 0 1 2 belong to reference 0, targets 3 4 5 to reference 1."""
    model = decoder(lively=True, **change)
    z_r, m_r, z_t, t, m_t = inputs(2, 3, tokens=change.get("num_tokens", 1))
    together = velocity(model, z_r, m_r, z_t, t, m_t)
    for k in range(6):
        r = slice(k // 3, k // 3 + 1)
        alone = velocity(model, z_r[r], m_r[r], z_t[k:k + 1], t[k:k + 1], m_t[k:k + 1])
        torch.testing.assert_close(together[k:k + 1], alone, atol=1e-4, rtol=1e-4)


# ---- frames ------------------------------------------------------------------------------------------------

def test_frames_of_an_image_model_are_independent():
    model = decoder(lively=True)
    z_r, m_r, z_t, t, m_t = inputs(2, 3)
    plain = velocity(model, z_r, m_r, z_t, t, m_t)
    changed = z_t.clone()
    changed[1] += 1
    out = velocity(model, z_r, m_r, changed, t, m_t)
    torch.testing.assert_close(out[[0, 2, 3, 4, 5]], plain[[0, 2, 3, 4, 5]], atol=1e-5, rtol=1e-5)
    assert differ(out[1:2], plain[1:2])
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    permuted = velocity(model, z_r, m_r, z_t[order], t[order], m_t[order])
    torch.testing.assert_close(permuted, plain[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_frames_of_a_video_model_see_each_other(full):
    model = decoder(lively=True, frames=4, full_attention=full)
    z_r, m_r, z_t, t, m_t = inputs(2, 4)
    plain = velocity(model, z_r, m_r, z_t, t, m_t)
    changed = z_t.clone()
    changed[1] += 1
    out = velocity(model, z_r, m_r, changed, t, m_t)
    assert differ(out[:4], plain[:4])                                        # all frames of clip 0
    torch.testing.assert_close(out[4:], plain[4:], atol=1e-5, rtol=1e-5)     # none of clip 1
    for clip in range(2):
        k = slice(4 * clip, 4 * clip + 4)
        alone = velocity(model, z_r[clip:clip + 1], m_r[clip:clip + 1], z_t[k], t[k], m_t[k])
        torch.testing.assert_close(plain[k], alone, atol=1e-4, rtol=1e-4)


def test_temporal_block_keeps_to_a_position():
    torch.manual_seed(0)
    block, x = TemporalBlock(24, 2), torch.randn(2 * 3, 5, 24)
    assert torch.equal(block(x, 3), x)                                       # adds nothing at first
    torch.nn.init.normal_(block.attention.out.weight, std=0.2)
    changed = x.clone()
    changed[1, 2] += torch.randn(24)                                         # clip 0, frame 1, position 2
    moved = (block(changed, 3) - block(x, 3)).abs().amax(2) > 1e-5           # (B*F, n)
    assert moved[:3, 2].all() and moved.sum() == 3
    by_position = x.unflatten(0, (2, 3)).transpose(1, 2).flatten(0, 1)       # (B*n, F, E)
    y = F.layer_norm(by_position, (24,)) + sinusoid(3, 24)
    want = by_position + block.attention(y)
    torch.testing.assert_close(block(x, 3), want.unflatten(0, (2, 5)).transpose(1, 2).flatten(0, 1))


def sinusoid(frames, width):
    angle = torch.arange(frames)[:, None] * 10000.0 ** -torch.linspace(0, 1, width // 2)
    return torch.cat([angle.sin(), angle.cos()], 1)


def test_a_new_video_model_equals_its_image_model():
    image, video = decoder(), decoder(lively=False, frames=4)
    missing, unexpected = video.load_state_dict(image.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("temporal.") for name in missing) and missing
    given = inputs(2, 4)
    torch.testing.assert_close(velocity(video, *given), velocity(image, *given))


def test_one_frame_of_a_video_model_equals_the_image_model():
    image, video = decoder(lively=True), decoder(lively=True, frames=4)
    video.load_state_dict(image.state_dict(), strict=False)
    assert torch.equal(velocity(video, *inputs()), velocity(image, *inputs()))
    assert differ(velocity(video, *inputs(2, 4)), velocity(image, *inputs(2, 4)))


# ---- conditions --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("which, name", list(enumerate(["z_r", "m_r", "z_t", "t", "m_t"])))
def test_every_input_matters_from_the_start(which, name, full):
    model, given = decoder(predict="v", full_attention=full), inputs()
    changed = list(given)
    changed[which] = given[which] * 0.5
    assert differ(velocity(model, *changed), velocity(model, *given))


def test_motion_tokens_stand_in_order():
    """Row = patches, then token 0's `tokens_per_motion` tokens, then token 1's: token l, part k comes from
    part k of the layer."""
    model = decoder(num_tokens=2)
    z_r, m_r, *_ = inputs(tokens=2)
    row = model.embed_tokens(z_r, m_r, segment=1)
    assert row.shape == (2, 4 + 2 * 3, 24)
    torch.testing.assert_close(row[:, :4],
                               model.embed(patchify(z_r, 4)) + model.pos_embed + model.segment_embed[1])
    for token in range(2):
        for part in range(3):
            rows = slice(24 * part, 24 * part + 24)
            want = F.linear(m_r[:, token], model.motion.weight[rows], model.motion.bias[rows])
            place = 3 * token + part
            torch.testing.assert_close(row[:, 4 + place],
                                       want + model.motion_pos_embed[place] + model.segment_embed[1])


OFF = [{"motion_delta": False}, {"ref_context": False}, {"tokens_per_motion": 1}]    # the decoder's shortcuts


@pytest.mark.parametrize("change", [{}, {"frames": 2}, {"predict": "v"}, {"num_tokens": 2},
                                    {"full_attention": True}, {"overlap": True, "warp_grid": 4}, *OFF])
def test_every_parameter_learns_from_the_first_step(change):
    model = decoder(**change).train()
    v = velocity(model, *inputs(2, 2, tokens=change.get("num_tokens", 1)))
    (v * torch.randn_like(v)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    waits = {name for name, p in model.named_parameters() if not p.grad.any()}
    # behind a zero layer
    assert all(name.startswith("temporal.") and "attention.out" not in name for name in waits)


@pytest.mark.parametrize("change", OFF)
def test_a_shortcut_left_out_saves_parameters(change):
    whole, without = (sum(p.numel() for p in decoder(**c).parameters()) for c in ({}, change))
    assert without < whole
    assert velocity(decoder(**change), *inputs(2, 3)).shape == (6, 3, 8, 8)


# ---- what comes out ----------------------------------------------------------------------------------------

def answer(paint=0.0, fade=0.0, right=0.0, down=0.0):
    """Bias of the head that says the same in every patch of 4 x 4 pixels -> (4*4*3 + 4*4 + 2,)."""
    return torch.cat([torch.full((48,), paint), torch.full((16,), fade), torch.tensor([right, down])])


def test_velocity_follows_from_the_predicted_picture():
    """v = (x - z_t) / t, t not below 0.05 in training, which bounds gradients, and 0.001 in sampling."""
    z_r, m_r, z_t, t, m_t = inputs(1, 4)
    t, model = torch.tensor([1, 0.5, 0.01, 1e-4]), decoder(lively=False)
    model.head.bias.data = answer(paint=0.3, fade=0.5)
    for training, least in ((False, 1e-3), (True, 0.05)):
        v = velocity(model.train(training), z_r, m_r, z_t, t, m_t)
        want = (0.5 * z_r + 0.3 - z_t) / t.clamp(min=least).view(4, 1, 1, 1)
        torch.testing.assert_close(v, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_any_number_of_steps_ends_at_the_predicted_picture(steps):
    model = decoder(lively=False)
    model.head.bias.data = answer(paint=0.3, fade=0.5)
    z_r, m_r, z_t, _, m_t = inputs()
    out = integrate(model, z_t, steps, m_t=m_t, cache=model.encode_reference(z_r, m_r))
    torch.testing.assert_close(out, 0.5 * z_r + 0.3, atol=1e-4, rtol=0)


STILL = torch.zeros(1, 2, 3)                                                   # affine


def blended(z_r, affine=STILL, right=0.0, down=0.0, alpha=0.0, residual=0.0):
    """The same displacement, alpha and residual everywhere."""
    displacement = torch.tensor([right, down]).view(1, 2, 1, 1)
    return warp_and_blend(z_r, affine, displacement, torch.full((1, 1, 8, 8), alpha),
                          torch.full((1, 3, 8, 8), residual))


def test_the_reference_is_warped_and_blended():
    z_r, pixel = torch.randn(1, 3, 8, 8), 2 / 8                             # a pixel in halves of the picture
    torch.testing.assert_close(blended(z_r, alpha=0.75, residual=0.3).x, 0.25 * z_r + 0.3)
    left = blended(z_r, right=pixel).x                                     # each pixel looks one to its right
    torch.testing.assert_close(left[..., :-1], z_r[..., 1:])
    torch.testing.assert_close(left[..., -1], z_r[..., -1])                  # beyond the edge: the edge
    up = blended(z_r, down=2 * pixel).x
    torch.testing.assert_close(up[:, :, :-2], z_r[:, :, 2:])
    turned = torch.tensor([[[-1.0, -1, 0], [1, -1, 0]]])                   # plus the identity: a quarter turn
    torch.testing.assert_close(blended(z_r, turned).x, z_r.rot90(1, (2, 3)))


def test_the_parts_of_a_picture():
    z_r = torch.randn(1, 3, 8, 8)
    picture = blended(z_r, torch.tensor([[[0.0, 0, 0.25], [0, 0, 0]]]), down=0.5, alpha=0.75, residual=0.3)
    torch.testing.assert_close(picture.field, torch.tensor([0.25, 0.5]).expand(1, 8, 8, 2))
    torch.testing.assert_close(picture.moved[..., :6, :7], z_r[..., 2:, 1:])
    torch.testing.assert_close(picture.x, 0.25 * picture.moved + 0.3)
    assert (picture.alpha == 0.75).all() and picture.alpha.shape == (1, 1, 8, 8)


def test_displacements_run_smoothly_across_patches():
    """A horizontal ramp, displaced more on the right: no step at the border between pixels 3 and 4."""
    ramp = torch.linspace(-1, 1, 8).expand(1, 3, 8, 8)
    displacement = torch.tensor([[0.0, 0.5], [0.0, 0.0]]).view(1, 2, 1, 2)
    row = warp_and_blend(ramp, STILL, displacement, torch.zeros(1, 1, 8, 8),
                         torch.zeros(1, 3, 8, 8)).x[0, 0, 4]
    assert (row.diff()[1:5] > 0).all() and row.diff()[:6].max() < 2.5 * ramp[0, 0, 0].diff().max()


@pytest.mark.parametrize("overlap", [False, True])
def test_what_each_patch_says_lands_at_its_place(overlap):
    """Patch 1 (upper right) alone answers: red residual 1, displacement down 1."""
    model = decoder(overlap=overlap, warp_grid=2)
    k = (64 if overlap else 16)
    out = torch.zeros(1, 4, 4 * k + 8)
    residual = out[0, 1, :3 * k].view(3, k)[0] if overlap else out[0, 1, :3 * k].view(k, 3)[:, 0]
    residual.fill_(1)
    out[0, 1, 4 * k:].view(4, 2)[:, 1] = 1
    affine, displacement, alpha, residual = model.split_head(out, torch.zeros(1, 24))
    assert affine.shape == (1, 2, 3) and displacement.shape == (1, 2, 4, 4) and alpha.shape == (1, 1, 8, 8)
    assert not residual[:, 1:].any() and not alpha.any()
    want = torch.zeros(4, 4)
    want[:2, 2:] = 1
    assert torch.equal(displacement[0, 1], want) and not displacement[0, 0].any()
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[:6, 2:] = True                                                 # twice the patch, cut at the border
    if not overlap:
        inside = want.bool().repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(residual[0, 0] > 0, inside)


def test_equal_overlapping_windows_add_up_to_a_constant():
    """Also at the border of the picture, where fewer windows meet."""
    model = decoder(overlap=True)
    painted = torch.cat([torch.full((3 * 64,), 0.3), torch.full((64,), 0.75), torch.zeros(2)])
    _, _, alpha, residual = model.split_head(painted.expand(1, 4, -1), torch.zeros(1, 24))
    torch.testing.assert_close(residual, torch.full((1, 3, 8, 8), 0.3))
    torch.testing.assert_close(alpha, torch.full((1, 1, 8, 8), 0.75))


def test_a_new_decoder_copies_the_reference():
    model = decoder(lively=False)
    z_r, m_r, z_t, _, m_t = inputs(2, 3)
    cache = model.encode_reference(z_r, m_r)
    for steps in (1, 4):
        copy = integrate(model, z_t, steps, m_t=m_t, cache=cache)
        torch.testing.assert_close(copy, z_r.repeat_interleave(3, 0), atol=1e-5, rtol=0)


def test_output_is_fp32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        v = velocity(decoder(), *inputs())
    assert v.dtype == torch.float32 and v.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("wrong, words", [({"image_size": 9}, "9.*4"), ({"width": 25}, "25.*2"),
                                          ({"heads": 5}, "24.*5"), ({"predict": "eps"}, "'eps'")])
def test_config_errors_name_the_values(wrong, words):
    with pytest.raises(ValueError, match=words):
        DecoderConfig(**{**SMALL, **wrong})
