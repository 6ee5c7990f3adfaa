"""Rectified flow: fields whose answer is known in closed form, and diffusers' own sampler."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import flow


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- path and loss -----------------------------------------------------------------------------------------

def test_path_goes_from_data_to_noise():
    z, eps = draw(3, 2, 4), draw(3, 2, 4, seed=1)
    at = flow.interpolate(z, eps, torch.tensor([0, 1, 0.25], dtype=torch.float64))
    assert torch.equal(at[0], z[0]) and torch.equal(at[1], eps[1])
    torch.testing.assert_close(at[2], 0.75 * z[2] + 0.25 * eps[2])


def test_velocity_points_to_the_data():
    """Eqs. (2) and (8) together: z_t + t v is the data, z_t + (t - 1) v the noise, and v = -dz_t/dt."""
    z, eps = draw(5, 4), draw(5, 4, seed=1)
    t = torch.rand(5, dtype=torch.float64)
    v = z - eps                                                              # eq. (8)
    torch.testing.assert_close(flow.interpolate(z, eps, t) + t[:, None] * v, z)
    torch.testing.assert_close(flow.interpolate(z, eps, t) + (t[:, None] - 1) * v, eps)
    slope = (flow.interpolate(z, eps, t + 1e-3) - flow.interpolate(z, eps, t - 1e-3)) / 2e-3
    torch.testing.assert_close(slope, -v)
    torch.testing.assert_close(flow.integrate(lambda *_: v, eps, 3), z)


def test_loss_equals_hand_computation():
    z, eps, t = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[0.0, 0], [1, 0]]), torch.tensor([0.5, 1.0])
    seen = []

    def model(z_t, t, extra):
        seen.append((z_t, t, extra))
        return torch.zeros(2, 2)

    loss = flow.flow_loss(model, z, eps, t, extra="condition")
    assert loss == pytest.approx(((1 + 4) / 2 + (4 + 16) / 2) / 2)
    torch.testing.assert_close(seen[0][0], torch.tensor([[0.5, 1], [1, 0]]))
    assert torch.equal(seen[0][1], t) and seen[0][2] == "condition"
    weight = torch.tensor([3.0, 0.5])
    assert flow.flow_loss(model, z, eps, t, weight, extra=0) == pytest.approx((3 * 2.5 + 0.5 * 10) / 2)
    assert flow.flow_loss(lambda z_t, t: z - eps, z, eps, t) == 0    # a straight field: nothing left to learn


def test_loss_is_fp32_and_has_a_gradient():
    z, eps = torch.randn(4, 3).bfloat16(), torch.randn(4, 3).bfloat16()
    scale = torch.ones((), requires_grad=True)
    loss = flow.flow_loss(lambda z_t, t: scale * z_t, z, eps, torch.rand(4))
    assert loss.dtype == torch.float32
    loss.backward()
    assert scale.grad.isfinite() and scale.grad != 0


def test_training_times():
    t = flow.sample_timesteps(20000, torch.Generator().manual_seed(0), p_pure_noise=0.3)
    assert t.shape == (20000,) and (t > 0).all() and (t <= 1).all()
    assert (t == 1).float().mean() == pytest.approx(0.3, abs=0.02)
    logit = torch.logit(t[t < 1].double())
    assert logit.mean() == pytest.approx(0.8, abs=0.03) and logit.std() == pytest.approx(0.8, abs=0.03)
    assert torch.equal(t, flow.sample_timesteps(20000, torch.Generator().manual_seed(0), p_pure_noise=0.3))
    assert not (flow.sample_timesteps(1000, p_pure_noise=0) == 1).any()
    assert (flow.sample_timesteps(1000, p_pure_noise=1) == 1).all()


# ---- samplers ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_a_point_is_found_in_any_number_of_steps(steps):
    """The true field of data that is one point a is (a - z) / t: straight lines, so any steps are exact."""
    point = draw(4, 3, 2)

    def field(z, t):
        return flow.x_to_v(point, z, t, t_min=1e-6)

    out = flow.integrate(field, draw(4, 3, 2, seed=1), steps)
    torch.testing.assert_close(out, point, atol=1e-9, rtol=0)


def test_velocity_from_data_stops_growing_near_the_data():
    x, z = draw(3, 2), draw(3, 2, seed=1)
    v = flow.x_to_v(x, z, torch.tensor([1, 0.5, 0.01], dtype=torch.float64))
    torch.testing.assert_close(v, (x - z) / torch.tensor([[1], [0.5], [0.05]], dtype=torch.float64))
    eps, t = draw(3, 2, seed=2), torch.full((3,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(flow.x_to_v(x, flow.interpolate(x, eps, t), t), x - eps)     # eq. (8) again


MEAN, DEVIATION = 2.0, 0.5


def gaussian(z, t):
    """E[z - eps | z_t] when data are N(MEAN, DEVIATION^2): linear in z_t."""
    t = t.view(-1, 1)
    variance = (1 - t) ** 2 * DEVIATION**2 + t**2
    return MEAN + ((1 - t) * DEVIATION**2 - t) / variance * (z - (1 - t) * MEAN)


def test_noise_becomes_the_gaussian_of_the_data():
    out = flow.integrate(gaussian, draw(20000, 1), 200)
    assert out.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert out.std().item() == pytest.approx(DEVIATION, abs=0.02)


def test_halving_the_step_halves_the_error():
    noise = draw(500, 1)
    exact = MEAN + DEVIATION * noise                                  # the flow keeps the order of the points
    error = {steps: (flow.integrate(gaussian, noise, steps) - exact).abs().mean() for steps in (40, 80, 160)}
    for steps in (40, 80):
        assert error[steps] / error[2 * steps] == pytest.approx(2, abs=0.2)


def test_steps_left_to_take():
    """skip_last=1 of 4 steps ends at t = 1/4, from which one more step is the whole walk."""
    noise = draw(5, 3)
    z = flow.integrate(gaussian, noise, 4, skip_last=1)
    torch.testing.assert_close(z + gaussian(z, torch.full((5,), 0.25)) / 4,
                               flow.integrate(gaussian, noise, 4))
    assert torch.equal(flow.integrate(gaussian, noise, 1, skip_last=1), noise)


def test_calls_and_times_of_a_walk():
    times = []

    def model(z, t, tag):
        assert tag == "kept" and t.shape == (3,)
        times.append(t[0].item())
        return torch.zeros_like(z)

    flow.integrate(model, torch.zeros(3, 2), 5, tag="kept")
    assert times == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])                             # never asks at t = 0


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_trajectory_equals_diffusers(steps):
    """diffusers: sigma = our t, model output = noise - data = -v, its time = 1000 t."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(7, 16), torch.nn.Tanh(), torch.nn.Linear(16, 6))

    @torch.no_grad()
    def field(z, t):
        return net(torch.cat([z, t[:, None]], 1))

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    noise = draw(8, 6).float()
    z = noise
    for time in scheduler.timesteps:
        z = scheduler.step(-field(z, time.expand(8) / 1000), time, z).prev_sample
    torch.testing.assert_close(flow.integrate(field, noise, steps), z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [0, -1])
def test_bad_walks_are_refused(steps):
    with pytest.raises(ValueError, match=f"not {steps}"):
        flow.integrate(gaussian, draw(2, 1), steps)


# ---- guidance ----------------------------------------------------------------------------------------------

def conditional(z, t, audio, past):
    return z * t[:, None] + past + (0 if audio is None else audio)


def test_guidance_formula():
    z, t = draw(3, 2), torch.rand(3, dtype=torch.float64)
    cond = {"audio": draw(3, 2, seed=1), "past": draw(3, 2, seed=2)}
    assert flow.with_cfg(conditional, 1, {"audio": None}) is conditional
    free = conditional(z, t, None, cond["past"])                            # only what null names is replaced
    for s in (0, 0.5, 2.5):
        want = free + s * (conditional(z, t, **cond) - free)
        torch.testing.assert_close(flow.with_cfg(conditional, s, {"audio": None})(z, t, **cond), want)
    torch.testing.assert_close(flow.with_cfg(conditional, 0, {"audio": None})(z, t, **cond), free)


def test_guidance_nearly_one_is_nearly_the_model():
    cond = {"audio": draw(3, 2, seed=1), "past": draw(3, 2, seed=2)}
    plain = flow.integrate(conditional, draw(3, 2), 4, **cond)
    nearly = flow.with_cfg(conditional, 1 + 1e-9, {"audio": None})
    torch.testing.assert_close(flow.integrate(nearly, draw(3, 2), 4, **cond), plain)
