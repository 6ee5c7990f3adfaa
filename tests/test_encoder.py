"""The motion encoder: values against torch's own layers, masks that hide, statistics that processes share."""
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from encoder import (
    Attention,
    Block,
    EncoderConfig,
    MotionEncoder,
    RunningNorm,
    attention,
    patchify,
    random_masking,
    rms_norm,
    sincos,
    sincos_2d,
    unpatchify,
)

SMALL = {"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "heads": 2, "token_dim": 6}
N = 16                                                                       # patches of SMALL


def encoder(**change):
    torch.manual_seed(0)
    return MotionEncoder(EncoderConfig(**{**SMALL, **change})).eval()


def images(count, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


# ---- patches and positions ---------------------------------------------------------------------------------

@pytest.mark.parametrize("channels, size, p", [(3, 16, 4), (4, 12, 2), (1, 8, 8), (3, 6, 1)])
def test_patches_come_back(channels, size, p):
    x = torch.randn(2, channels, size, size)
    assert patchify(x, p).shape == (2, (size // p) ** 2, p * p * channels)
    assert torch.equal(unpatchify(patchify(x, p), p), x)


def test_patches_are_in_reading_order():
    x = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    patches = patchify(x, 4)
    for n, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        block = x[:, :, row:row + 4, column:column + 4]                      # (B, C, p, p)
        assert torch.equal(patches[:, n], block.permute(0, 2, 3, 1).flatten(1))


def test_positions_are_sines_of_row_and_column():
    table = sincos(torch.arange(5), 8)
    assert table.shape == (5, 8)
    frequency = torch.tensor([1, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4])
    torch.testing.assert_close(table[3], torch.cat([(3 * frequency).sin(), (3 * frequency).cos()]))
    grid = sincos_2d(3, 16)
    row, column = sincos(torch.tensor([1, 2]), 8)
    assert torch.equal(grid[5], torch.cat([row, column]))
    assert len(grid.unique(dim=0)) == 9


# ---- attention ---------------------------------------------------------------------------------------------

def torch_attention(out, q, k, v, heads):
    """torch's own, of what is projected already, queries and keys normalised, and its last layer `out`."""
    width = out.in_features
    q, k = (F.rms_norm(part.unflatten(-1, (heads, -1)), (width // heads,), eps=1e-6).flatten(-2)
            for part in (q, k))
    theirs = torch.nn.MultiheadAttention(width, heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.eye(width).repeat(3, 1))
        theirs.in_proj_bias.zero_()
    theirs.out_proj = out
    return theirs(q, k, v, need_weights=False)[0]


def test_attention_equals_torch():
    torch.manual_seed(0)
    ours, x = Attention(24, 3), torch.randn(2, 7, 24)
    want = torch_attention(ours.out, *ours.qkv(x).chunk(3, dim=-1), heads=3)
    torch.testing.assert_close(ours(x), want, atol=1e-5, rtol=1e-5)


def test_block_is_a_prenorm_transformer_block():
    torch.manual_seed(0)
    block, x = Block(24, 2), torch.randn(2, 5, 24)
    y = x + block.attention(F.layer_norm(x, (24,)))
    first, second = block.mlp[0], block.mlp[2]
    y = y + second(F.gelu(first(F.layer_norm(y, (24,))), approximate="tanh"))
    torch.testing.assert_close(block(x), y)


def test_attention_trains_as_torch_does():
    """While gradients flow on a CPU, attention writes the products out; the numbers are those of the fused
    kernel."""
    torch.manual_seed(0)
    ours = [torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 9, 9)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    out, want = attention(*ours), F.scaled_dot_product_attention(*theirs)
    torch.testing.assert_close(out, want)
    slope = torch.randn_like(out)
    out.backward(slope), want.backward(slope)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(attention(*(x.detach() for x in ours)), want.detach())


def test_rms_norm_equals_torch():
    x = torch.randn(4, 10) * 7
    torch.testing.assert_close(rms_norm(x), F.rms_norm(x, (10,), eps=1e-6))


# ---- masks -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ratio, left", [(0, 64), (0.5, 32), (0.9, 7), (0.999, 1), (1.0, 1)])
def test_kept_patches(ratio, left):
    keep = random_masking(50, 64, ratio, torch.Generator().manual_seed(0))
    assert keep.shape == (50, left) and keep.min() >= 0 and keep.max() < 64
    assert (keep.diff(dim=1) > 0).all()                                      # sorted, and none twice
    assert torch.equal(keep, random_masking(50, 64, ratio, torch.Generator().manual_seed(0)))
    if 1 < left < 64:
        assert len(keep.unique(dim=0)) == 50                                 # a subset for each sample
        assert not torch.equal(keep, random_masking(50, 64, ratio, torch.Generator().manual_seed(1)))


def test_every_patch_is_kept_equally_often():
    counts = random_masking(4000, 16, 0.75, torch.Generator().manual_seed(0)).flatten().bincount(minlength=16)
    assert (counts - 1000).abs().max() < 150                                 # 5 standard deviations


def test_dropped_patches_cannot_change_the_motion():
    model, x = encoder(), images(3)
    keep = random_masking(3, N, 0.6, torch.Generator().manual_seed(0))
    patches = patchify(x, 4)
    dropped = torch.ones(3, N, dtype=torch.bool).scatter(1, keep, False)
    spoiled = unpatchify(torch.where(dropped[..., None], torch.nan, patches), 4)
    assert spoiled.isnan().any() and model(spoiled).isnan().all()            # unmasked, they would
    assert torch.equal(model(spoiled, keep), model(x, keep))


def test_each_kept_patch_changes_the_motion():
    model, keep = encoder(), torch.tensor([[1, 6, 11]])
    patches = patchify(images(1), 4).expand(3, -1, -1).clone()
    patches[torch.arange(3), keep[0]] += 1
    motion, plain = model(unpatchify(patches, 4), keep.expand(3, -1)), model(images(1), keep)
    assert ((motion - plain).abs().amax((1, 2)) > 1e-4).all()


def test_a_patch_keeps_its_position_when_others_leave():
    """Positions are added before the mask: two equal patches at different places give different motion."""
    model, x = encoder(), torch.ones(2, 3, 16, 16)
    motion = model(x, torch.tensor([[0], [9]]))
    assert (motion[0] - motion[1]).abs().max() > 1e-4


def test_keeping_all_is_no_mask():
    model, x = encoder(), images(2)
    torch.testing.assert_close(model(x, torch.arange(N).expand(2, -1)), model(x))
    torch.testing.assert_close(model(x, random_masking(2, N, 0)), model(x))


# ---- the token ---------------------------------------------------------------------------------------------

def test_samples_are_independent():
    model, x = encoder(), images(3)
    changed = x.clone()
    changed[1] += 1
    torch.testing.assert_close(model(x)[[0, 2]], model(changed)[[0, 2]])
    assert (model(x)[1] - model(changed)[1]).abs().max() > 1e-3
    torch.testing.assert_close(model(x[[2, 0, 1]]), model(x)[[2, 0, 1]])


def test_token_k_is_token_k():
    """Output k belongs to learned token k, its D numbers to it alone: by hand, so a scrambled reshape
    fails."""
    model, x = encoder(num_tokens=3), images(2)
    z = model.embed(patchify(x, 4)) + model.pos_embed
    start = model.token_init.project(model.token_init.patch_summary(z).flatten(1)).view(2, 3, 24)
    z = torch.cat([z, model.tokens + start], 1)
    for block in model.blocks:
        z = block(z)
    for k in range(3):
        state = z[:, N + k]
        # a new RunningNorm changes nothing
        number = F.layer_norm(model.head[1](F.layer_norm(state, (24,))), (6,))
        torch.testing.assert_close(model(x)[:, k], number, atol=1e-4, rtol=1e-4)
    order = torch.tensor([2, 0, 1])
    before = model(x)
    model.tokens.data = model.tokens.data[order]
    weight = model.token_init.project.weight
    weight.data = weight.data.view(3, 24, -1)[order].flatten(0, 1)
    # learned tokens carry no place
    torch.testing.assert_close(model(x), before[:, order], atol=1e-5, rtol=1e-5)


def test_a_token_learns_by_itself():
    """Without blocks tokens cannot speak to each other: changing learned token 2 changes output 2 only."""
    model, x = encoder(num_tokens=3, depth=0), images(2)
    before = model(x)
    model.tokens.data[2] += torch.randn(24)
    assert torch.equal(model(x)[:, :2], before[:, :2])
    assert (model(x)[:, 2] - before[:, 2]).abs().max() > 1e-2


def test_shape_precision_and_gradients():
    model = encoder(num_tokens=2, channels=4, image_size=8, patch_size=2).train()
    motion = model(torch.randn(5, 4, 8, 8), random_masking(5, N, 0.5))
    assert motion.shape == (5, 2, 6) and motion.dtype == torch.float32
    (motion * torch.randn_like(motion)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(5, 4, 8, 8)).dtype == torch.float32
    assert "pos_embed" not in model.state_dict()


def test_hidden_patches_add_nothing_to_the_first_token():
    """token_init: the visible patches' part of the sum over all, scaled up for those that are hidden."""
    model, keep = encoder(), torch.tensor([[1, 6, 11], [0, 1, 15]])
    z = torch.randn(2, 3, 24)
    got = model.token_init(z, keep, N)
    weight = model.token_init.project.weight.view(24, N, 16)
    want = torch.einsum("enk,bnk->be", weight[:, keep[0]], model.token_init.patch_summary(z[:1]) * N / 3)
    torch.testing.assert_close(got[:1, 0], want, atol=1e-5, rtol=1e-5)
    assert got.shape == (2, 1, 24)


@pytest.mark.parametrize("off", [{"token_init": 0}, {"running_norm": False}])
def test_each_shortcut_can_be_left_out(off):
    model, whole = encoder(**off).train(), encoder()
    motion = model(images(3), random_masking(3, N, 0.5))
    (motion * torch.randn_like(motion)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert sum(x.numel() for x in model.state_dict().values()) < sum(x.numel()
                                                                     for x in whole.state_dict().values())


def test_without_running_norm_the_token_is_layer_normalised():
    motion = encoder(running_norm=False)(images(3))
    torch.testing.assert_close(motion.mean(2), torch.zeros(3, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(motion.var(2, correction=0), torch.ones(3, 1), atol=1e-3, rtol=0)


def test_in_use_motion_is_the_mean_of_five_views():
    model, x, index = encoder(view_shift=3), images(2), torch.arange(16)
    later, sooner = (index + 3).clamp(max=15), (index - 3).clamp(min=0)
    views = [x, x[:, :, later], x[:, :, sooner], x[..., later], x[..., sooner]]
    one = encoder()
    one.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), sum(map(one, views)) / 5, atol=1e-5, rtol=1e-5)
    assert (model(x) - one(x)).abs().max() > 0.01


def test_training_and_masks_see_one_view():
    model, x, ids_keep = encoder(view_shift=3), images(2), random_masking(2, N, 0.5)
    torch.testing.assert_close(model(x, ids_keep), model.encode_view(x, ids_keep))
    model.train()
    model.running_norm.eval()
    torch.testing.assert_close(model(x), model.encode_view(x))


@pytest.mark.parametrize("wrong, words", [({"image_size": 17}, "17.*4"), ({"width": 25}, "25.*2"),
                                          ({"heads": 5}, "24.*5"), ({"width": 22, "heads": 2}, "22"),
                                          ({"view_shift": 4}, "4.*4"), ({"view_shift": -1}, "-1.*4")])
def test_config_errors_name_the_numbers(wrong, words):
    with pytest.raises(ValueError, match=words):
        EncoderConfig(**{**SMALL, **wrong})


# ---- RunningNorm -------------------------------------------------------------------------------------------

def lopsided(count, seed=0):
    """(count, 2, 3) with means 5, -2, 0 and deviations 0.1, 3, 1."""
    x = torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([0.1, 3, 1]) + torch.tensor([5.0, -2, 0])


def test_running_norm_makes_zero_mean_and_unit_variance():
    norm = RunningNorm(3)
    assert not list(norm.parameters())
    torch.testing.assert_close(norm.eval()(lopsided(4)), lopsided(4))        # before any data: nothing
    norm.train()
    for seed in range(100):
        norm(lopsided(64, seed))
    out = norm.eval()(lopsided(4000, 1000)).flatten(0, 1)
    torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=0.1, rtol=0)
    torch.testing.assert_close(out.var(0), torch.ones(3), atol=0.1, rtol=0)


def test_running_norm_averages_plainly_at_first():
    """Until 1 / momentum updates the statistics are those of all that was seen; then old data fades."""
    norm = RunningNorm(3)
    for seed in range(50):
        norm(lopsided(8, seed))
    seen = torch.cat([lopsided(8, seed) for seed in range(50)]).flatten(0, 1)
    torch.testing.assert_close(norm.mean, seen.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm.square, seen.square().mean(0), atol=1e-3, rtol=1e-4)
    for seed in range(300):
        norm(lopsided(8, seed) + 10)
    torch.testing.assert_close(norm.mean, seen.mean(0) + 10, atol=0.3, rtol=0)


def test_evaluation_does_not_update():
    norm = RunningNorm(3)
    norm(lopsided(8))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.eval()(lopsided(8) + 100)
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())
    assert set(before) == {"mean", "square", "count"}                        # they travel with the weights


def test_a_number_that_never_changes_stays_finite():
    norm = RunningNorm(3)
    for _ in range(3):
        out = norm(torch.full((4, 1, 3), 1e3))
    assert out.isfinite().all() and out.abs().max() < 1


def run_two(half, folder):
    """Run half(rank, folder) in two processes, forked where that is safe: a new one imports for seconds."""
    fork = sys.platform == "linux" and not torch.cuda.is_available()
    mp.start_processes(half, (str(folder),), nprocs=2, start_method="fork" if fork else "spawn")


def half(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    norm = RunningNorm(3)
    outs = [norm(lopsided(8, seed)[4 * rank:4 * rank + 4]) for seed in range(3)]
    torch.save((norm.state_dict(), torch.stack(outs)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_the_statistics_of_the_whole_batch(tmp_path):
    run_two(half, tmp_path)
    one = RunningNorm(3)
    whole = torch.stack([one(lopsided(8, seed)) for seed in range(3)])
    for rank in range(2):
        state, outs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in one.state_dict().items():
            torch.testing.assert_close(state[name], value)
        torch.testing.assert_close(outs, whole[:, 4 * rank:4 * rank + 4], atol=1e-5, rtol=1e-5)
