"""lib.vae against a linear-Gaussian model, where every quantity has a closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from lib.vae import VAE, gaussian_kl

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


class Linear(nn.Module):
    """p(x|z) = N(W z + c, s I) with its exact posterior, of which only the diagonal is kept.

    With orthogonal columns of W the posterior is diagonal, and the ELBO is tight.
    """

    def __init__(self, seed: int, d: int = 5, latent: int = 2, variance: float = 0.3):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
        scale = 0.5 + torch.rand(latent, generator=generator, dtype=torch.float64)
        self.w = nn.Parameter(q[:, :latent] * scale)
        self.c = nn.Parameter(torch.randn(d, generator=generator, dtype=torch.float64))
        self.s = variance

    def forward(self, z):
        return z @ self.w.T + self.c

    def posterior(self, x):
        precision = 1 + self.w.square().sum(0) / self.s
        mean = (x - self.c) @ self.w / self.s / precision
        return mean, -precision.log().expand_as(mean)

    def log_prob(self, x):
        covariance = self.w @ self.w.T + self.s * torch.eye(len(self.c), dtype=torch.float64)
        return MultivariateNormal(self.c, covariance).log_prob(x)


class Encoder(nn.Module):
    def __init__(self, model, shift=0.0, widen=0.0):
        super().__init__()
        self.model, self.shift, self.widen = [model], shift, widen

    def forward(self, x):
        mean, log_var = self.model[0].posterior(x)
        return mean + self.shift, log_var + self.widen


class Halves(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)).chunk(2, -1)


def linear_vae(seed, **encoder_options):
    model = Linear(seed)
    vae = VAE(Encoder(model, **encoder_options), model, 2, likelihood="gaussian", variance=0.3)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return model, vae, x


def bernoulli_vae(event=(6,), latent=3, seed=0, **options):
    torch.manual_seed(seed)
    size = math.prod(event)
    decoder = nn.Sequential(nn.Linear(latent, size), nn.Unflatten(1, event))
    return VAE(Halves(size, 2 * latent), decoder, latent, **options)


@pytest.mark.parametrize("seed", range(3))
def test_gaussian_kl_is_torch_s(seed):
    mean, log_var = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed)).double()
    q = Independent(Normal(mean, (0.5 * log_var).exp()), 1)
    p = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 1)
    torch.testing.assert_close(gaussian_kl(mean, log_var), kl_divergence(q, p))


def test_gaussian_kl_keeps_its_digits_near_zero():
    log_var = torch.tensor([[1e-4]])
    exact = 0.5 * (torch.expm1(log_var.double()) - log_var.double()).sum(-1)
    assert exact.item() == pytest.approx(2.5e-9, rel=1e-3)
    assert gaussian_kl(torch.zeros(1, 1), log_var).item() == pytest.approx(exact.item(), rel=1e-2)


@pytest.mark.parametrize("seed", range(4))
def test_at_the_true_posterior_the_fully_sampled_elbo_is_log_p_for_every_draw(seed):
    model, vae, x = linear_vae(seed)
    for num_samples in (1, 5):
        bound = vae.elbo(x, num_samples=num_samples, analytic_kl=False)
        torch.testing.assert_close(bound.value, model.log_prob(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(vae.iwae_bound(x, 9), model.log_prob(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_the_gap_of_the_elbo_is_the_divergence_from_the_true_posterior(seed):
    model, vae, x = linear_vae(seed, shift=0.4, widen=-0.7)
    mean, log_var = model.posterior(x)
    q = Independent(Normal(mean + 0.4, (0.5 * (log_var - 0.7)).exp()), 1)
    gap = kl_divergence(q, Independent(Normal(mean, (0.5 * log_var).exp()), 1))
    n = 40_000
    bound = vae.elbo(x, num_samples=n, generator=torch.Generator().manual_seed(seed))
    spread = 3.0  # a generous standard deviation of log p(x|z) under q
    assert ((bound.value - (model.log_prob(x) - gap)).abs() < 5 * spread / math.sqrt(n)).all()
    torch.testing.assert_close(bound.value, bound.reconstruction - bound.kl)


@pytest.mark.parametrize("analytic", [True, False])
def test_the_elbo_s_parts_match_their_definitions_draw_by_draw(analytic):
    _, vae, x = linear_vae(3, shift=0.2)
    draws = torch.Generator().manual_seed(8)
    bound = vae.elbo(x, num_samples=4, analytic_kl=analytic, generator=draws)
    posterior = vae.encode(x)
    noise = torch.randn(4, 7, 2, generator=draws.manual_seed(8), dtype=torch.float64)
    z = posterior.mean + posterior.stddev * noise
    torch.testing.assert_close(bound.reconstruction, vae.decode(z).log_prob(x).mean(0))
    sampled = (posterior.log_prob(z) - Normal(0.0, 1.0).log_prob(z).sum(-1)).mean(0)
    kl = gaussian_kl(posterior.mean, 2 * posterior.stddev.log()) if analytic else sampled
    torch.testing.assert_close(bound.kl, kl)


def test_iwae_with_one_draw_is_the_fully_sampled_elbo():
    vae, x = bernoulli_vae(), torch.rand(4, 6)
    one = vae.iwae_bound(x, 1, generator=torch.Generator().manual_seed(2))
    elbo = vae.elbo(x, analytic_kl=False, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(one, elbo.value)


def test_iwae_tightens_and_the_prior_bound_is_looser():
    model, vae, x = linear_vae(1, shift=0.8, widen=0.5)
    draws = torch.Generator().manual_seed(0)
    means = [
        torch.stack([vae.iwae_bound(x, k, generator=draws).mean() for _ in range(300)]).mean()
        for k in (1, 5, 50, 200)
    ]
    exact = model.log_prob(x).mean()
    assert means[0] < means[1] < means[2] < means[3] < exact
    # The gap is var(weight) / 2k to first order
    assert 0.15 < (exact - means[3]) / (exact - means[2]) < 0.4
    prior = torch.stack([vae.prior_bound(x, 5, generator=draws).mean() for _ in range(300)]).mean()
    assert prior < means[1] - 0.5


def test_the_prior_bound_shares_its_draws_with_the_batch():
    _, vae, x = linear_vae(2)
    draws = torch.Generator().manual_seed(4)
    value = vae.prior_bound(x, 6, generator=draws)
    z = torch.randn(6, 2, generator=draws.manual_seed(4), dtype=torch.float64)
    expected = vae.decode(z[:, None]).log_prob(x).exp().mean(0).log()
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("bound", ["iwae_bound", "prior_bound"])
def test_chunks_do_not_change_the_bound(bound):
    _, vae, x = linear_vae(2, shift=0.3)
    draws = torch.Generator()
    whole = getattr(vae, bound)(x, 10, generator=draws.manual_seed(4))
    parts = getattr(vae, bound)(x, 10, chunk_size=10, generator=draws.manual_seed(4))
    torch.testing.assert_close(whole, parts)
    uneven = getattr(vae, bound)(x, 10, chunk_size=3, generator=draws.manual_seed(4))
    assert uneven.shape == whole.shape
    assert uneven.isfinite().all()


def test_gradients_are_those_of_finite_differences():
    _, vae, x = linear_vae(5, shift=0.3)

    def value(w):
        with torch.no_grad():
            vae.decoder.w.copy_(w)
        return vae.elbo(x, generator=torch.Generator().manual_seed(1)).value.sum()

    w = vae.decoder.w.detach().clone()
    vae.zero_grad()
    value(w).backward()
    gradient = vae.decoder.w.grad.clone()
    step = torch.zeros_like(w)
    step[3, 1] = 1e-6
    slope = (value(w + step) - value(w - step)) / 2e-6
    assert slope.item() == pytest.approx(gradient[3, 1].item(), rel=1e-6)


@pytest.mark.parametrize("event", [(6,), (1, 3, 4), (2, 5)])
def test_any_event_shape(event):
    vae = bernoulli_vae(event)
    x = torch.rand(4, *event)
    assert vae.elbo(x, num_samples=3).value.shape == (4,)
    assert vae.iwae_bound(x, 3).shape == vae.prior_bound(x, 3).shape == (4,)
    assert vae.sample(5).shape == (5, *event)
    assert vae.reconstruct(x).shape == x.shape
    assert vae.decode(torch.zeros(2, 3, 3)).batch_shape == (2, 3)


def test_bernoulli_log_likelihood_is_the_cross_entropy_summed_over_pixels():
    vae, x = bernoulli_vae(), torch.rand(4, 6)
    z = torch.randn(4, 3)
    expected = -nn.functional.binary_cross_entropy_with_logits(
        vae.decoder(z), x, reduction="none"
    ).sum(1)
    torch.testing.assert_close(vae.decode(z).log_prob(x), expected)


def test_a_learned_variance_goes_to_the_mean_squared_error():
    torch.manual_seed(0)
    vae = VAE(Halves(4, 2), nn.Linear(1, 4), 1, likelihood="gaussian", variance="learned")
    assert "log_variance" in vae.state_dict()
    x, z = torch.randn(50, 4), torch.zeros(50, 1)
    error = (x - vae.decoder(z)).square().mean().item()
    optimizer = torch.optim.LBFGS([vae.log_variance], line_search_fn="strong_wolfe", max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = -vae.decode(z).log_prob(x).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert vae.log_variance.exp().item() == pytest.approx(error, rel=1e-3)


def test_state_dict_names():
    assert set(bernoulli_vae().state_dict()) == {
        "encoder.weight",
        "encoder.bias",
        "decoder.0.weight",
        "decoder.0.bias",
    }


def test_active_units():
    class Encode(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0], 0.05 * x[:, 1], 0 * x[:, 2]], 1), torch.zeros(len(x), 3)

    vae = VAE(Encode(), nn.Linear(3, 3), 3, likelihood="gaussian")
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    assert vae.active_units(x).tolist() == [True, False, False]
    assert vae.active_units(x, threshold=1e-3).tolist() == [True, True, False]
    with pytest.raises(ValueError, match="at least two examples, got 1"):
        vae.active_units(x[:1])


def test_draws_follow_their_generator():
    vae, x = bernoulli_vae(), torch.rand(4, 6)
    for draw in (
        lambda g: vae.elbo(x, generator=g).value,
        lambda g: vae.iwae_bound(x, 3, generator=g),
        lambda g: vae.prior_bound(x, 3, generator=g),
        lambda g: vae.sample(3, generator=g),
    ):
        first, second = (draw(torch.Generator().manual_seed(5)) for _ in range(2))
        assert first.equal(second)
        assert not first.equal(draw(torch.Generator().manual_seed(6)))


def test_the_input_is_left_alone_and_grey_pixels_are_allowed():
    vae, x = bernoulli_vae(), torch.tensor([[0.0, 1.0, 0.5, 0.2, 0.9, 0.0]])
    before = x.clone()
    assert vae.elbo(x).value.isfinite().all()
    assert x.equal(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_and_autocast_give_float32(dtype):
    vae = bernoulli_vae((40,))
    x = torch.rand(4, 40, generator=torch.Generator().manual_seed(0))
    exact = vae.elbo(x, generator=torch.Generator().manual_seed(1)).value
    with torch.autocast("cpu", dtype=dtype):
        value = vae.elbo(x.to(dtype), generator=torch.Generator().manual_seed(1)).value
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("bound", ["elbo", "iwae", "prior"])
def test_bf16_autocast_rounds_the_networks_and_nothing_else(bound, likelihood):
    """Sums over 784 pixels would lose whole nats in bfloat16: only the products may be rounded."""
    vae = bernoulli_vae((1, 28, 28), latent=5, likelihood=likelihood)
    x = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    seen = []
    vae.decoder.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))

    def value_and_gradient():
        draws = torch.Generator().manual_seed(1)
        bounds = {
            "elbo": lambda: vae.elbo(x, generator=draws).value,
            "iwae": lambda: vae.iwae_bound(x, 4, generator=draws),
            "prior": lambda: vae.prior_bound(x, 4, generator=draws),
        }
        value = bounds[bound]()
        gradient = torch.autograd.grad(value.sum(), list(vae.decoder.parameters()))
        return value, torch.cat([g.flatten() for g in gradient])

    exact, exact_gradient = value_and_gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = value_and_gradient()
    assert seen == [torch.float32, torch.bfloat16]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=1e-3, atol=0)
    assert nn.functional.cosine_similarity(gradient, exact_gradient, dim=0) > 0.999


@pytest.mark.parametrize("device", DEVICES)
def test_results_follow_the_device(device):
    vae = bernoulli_vae().to(device)
    x = torch.rand(4, 6, device=device)
    assert vae.elbo(x).value.device.type == device
    assert vae.sample(2).device.type == device


def test_compiles_whole_and_maps():
    vae = bernoulli_vae(validate_args=False)
    x = torch.rand(4, 6)
    compiled = torch.compile(lambda x: vae.elbo(x).value, fullgraph=True, backend="eager")
    torch.manual_seed(3)
    expected = vae.elbo(x).value
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(x), expected)
    mapped = torch.func.vmap(lambda row: vae.elbo(row[None]).kl[0], randomness="different")(x)
    torch.testing.assert_close(mapped, vae.elbo(x).kl)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.full((2, 6), 1.5), r"x must lie in \[0, 1\] under a Bernoulli .*got \[1.5, 1.5\]"),
        (torch.full((2, 6), -0.1), r"x must lie in \[0, 1\]"),
        (torch.full((2, 6), math.nan), r"x must lie in \[0, 1\]"),
        (torch.rand(6), r"x must have shape \(B, \*event\), got \(6,\)"),
    ],
)
def test_bad_images_are_refused(x, message):
    vae = bernoulli_vae()
    for call in (vae.elbo, vae.reconstruct, lambda x: vae.iwae_bound(x, 2)):
        with pytest.raises(ValueError, match=message):
            call(x)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_codes_that_are_not_finite_are_refused(value):
    vae = bernoulli_vae()
    z = torch.zeros(2, 3)
    z[1, 2] = value
    for call in (vae.decode, vae.log_prior):
        with pytest.raises(ValueError, match="z must be finite, got NaN or infinite values"):
            call(z)
    with pytest.raises(ValueError, match="log_var must be finite, got NaN or infinite values"):
        gaussian_kl(torch.zeros(2, 3), z)
    with pytest.raises(ValueError, match="mean must be finite, got NaN or infinite values"):
        gaussian_kl(z, torch.zeros(2, 3))


def test_codes_of_the_wrong_kind_are_refused():
    vae = bernoulli_vae()
    with pytest.raises(TypeError, match=r"z must be a floating-point tensor, got torch\.int64"):
        vae.decode(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"z must have shape \(\.\.\., 3\), got \(2, 4\)"):
        vae.log_prior(torch.zeros(2, 4))
    with pytest.raises(TypeError, match=r"log_var must be a floating-point tensor, got torch\.int"):
        gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"same shape \(\.\.\., L\), got \(\) and \(\)"):
        gaussian_kl(torch.zeros(()), torch.zeros(()))
    with pytest.raises(ValueError, match=r"threshold must be at least 0, got nan"):
        vae.active_units(torch.rand(4, 6), threshold=math.nan)


def test_integer_images_are_refused():
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch\.uint8"):
        bernoulli_vae().elbo(torch.zeros(2, 6, dtype=torch.uint8))


def test_gaussian_pixels_must_be_finite():
    _, vae, x = linear_vae(0)
    x[1, 2] = math.inf
    with pytest.raises(ValueError, match="x must be finite"):
        vae.elbo(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "poisson"}, "got 'poisson'"),
        ({"likelihood": "gaussian", "variance": 0.0}, r"variance must be a positive number.*0\.0"),
        ({"likelihood": "gaussian", "variance": math.inf}, "variance must be"),
        ({"likelihood": "gaussian", "variance": "free"}, "got 'free'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bernoulli_vae(**options)


def test_bad_counts_are_refused():
    vae, x = bernoulli_vae(), torch.rand(2, 6)
    for call in (
        lambda: vae.elbo(x, num_samples=0),
        lambda: vae.iwae_bound(x, 0),
        lambda: vae.prior_bound(x, -1),
        lambda: vae.sample(0),
        lambda: vae.iwae_bound(x, 4, chunk_size=0),
    ):
        with pytest.raises(ValueError, match="must be at least 1"):
            call()
    for call in (
        lambda: vae.iwae_bound(x, 2.0),
        lambda: vae.prior_bound(x, True),
        lambda: vae.elbo(x, num_samples="3"),
        lambda: VAE(vae.encoder, vae.decoder, 3.0),
    ):
        with pytest.raises(TypeError, match="must be an integer, got"):
            call()


def test_networks_of_the_wrong_shape_are_refused():
    with pytest.raises(
        ValueError, match=r"encoder must return mean of shape .*\(2, 4\), got \(2, 3\)"
    ):
        VAE(Halves(6, 6), nn.Linear(4, 6), 4).elbo(torch.rand(2, 6))
    with pytest.raises(
        ValueError, match=r"decoder must return examples of shape \(6,\).*got \(5,\)"
    ):
        VAE(Halves(6, 6), nn.Linear(3, 5), 3).elbo(torch.rand(2, 6))
    with pytest.raises(ValueError, match=r"z must have shape \(\.\.\., 3\), got \(2, 4\)"):
        bernoulli_vae().decode(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="mean and log_var must have the same shape"):
        gaussian_kl(torch.zeros(2, 3), torch.zeros(3))


def test_networks_that_break_are_named():
    x = torch.rand(2, 6)
    vae = bernoulli_vae()
    with torch.no_grad():
        vae.encoder.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="encoder returned mean with values that are not finite"):
        vae.elbo(x)
    vae = bernoulli_vae()
    with torch.no_grad():
        vae.encoder.bias[3:] = 100.0  # exp(100) does not exist in float32
    for call in (vae.elbo, vae.encode, lambda x: vae.iwae_bound(x, 2)):
        with pytest.raises(ValueError, match=r"log_var up to [\d.]+, whose exponential"):
            call(x)
    vae = bernoulli_vae()
    with torch.no_grad():
        vae.decoder[0].bias[2] = math.nan
    for call in (vae.elbo, lambda x: vae.iwae_bound(x, 2), lambda x: vae.prior_bound(x, 2)):
        with pytest.raises(ValueError, match="decoder returned values whose log-likelihood is NaN"):
            call(x)
    for call in (vae.reconstruct, lambda x: vae.sample(3)):
        with pytest.raises(ValueError, match="decoder returned values that are NaN"):
            call(x)


def test_an_encoder_that_returns_one_tensor_is_refused():
    vae = VAE(nn.Linear(6, 6), nn.Linear(3, 6), 3)
    for batch in (2, 5):  # a tensor of two rows would unpack
        with pytest.raises(TypeError, match=r"encoder must return \(mean, log_var\), got Tensor"):
            vae.elbo(torch.rand(batch, 6))


def test_plain_functions_serve_as_networks():
    w = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    vae = VAE(lambda x: (x[:, :2], -x[:, 2:4].abs()), lambda z: z @ w.T, 2, likelihood="gaussian")
    assert vae.elbo(torch.randn(4, 5)).value.shape == (4,)
    draws = torch.Generator().manual_seed(3)
    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(vae.sample(6, generator=draws), z @ w.T)
