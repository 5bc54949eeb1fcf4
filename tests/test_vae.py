"""lib.vae against a linear-Gaussian model, where every quantity has a closed form."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import math
import pickle
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from lib.vae import VAE, gaussian_kl
from lib.vae._weights import log_mean_exp

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
    draws.manual_seed(4)
    sums = [getattr(vae, bound)(x, n, generator=draws) + math.log(n) for n in (3, 3, 3, 1)]
    torch.testing.assert_close(uneven, torch.stack(sums).logsumexp(0) - math.log(10))


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


@pytest.mark.parametrize("validate", [None, False])
def test_compiles_whole_and_maps(validate):
    vae = bernoulli_vae(validate_args=validate)
    x = torch.rand(4, 6)
    compiled = torch.compile(lambda x: vae.elbo(x).value, fullgraph=True, backend="eager")
    torch.manual_seed(3)
    expected = vae.elbo(x).value
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(x), expected)
    mapped = torch.func.vmap(lambda row: vae.elbo(row[None]).kl[0], randomness="different")(x)
    torch.testing.assert_close(mapped, vae.elbo(x).kl)
    for ask in (
        lambda x: vae.encode(x).mean,
        lambda x: vae.decode(x[:, :3]).log_prob(x),
        vae.reconstruct,
        vae.active_units,
        lambda x: vae.prior_bound(x, 2),
        lambda x: vae.iwae_bound(x, 5, chunk_size=2),
        lambda x: vae.elbo(x).value,
        lambda x: vae.sample(len(x)),
    ):
        compiled = torch.compile(ask, fullgraph=True, backend="eager")
        for batch in (x, x[:3], x[:2]):  # from the second size on, sizes are symbols
            assert len(compiled(batch)) == len(ask(batch))


def test_gradients_example_by_example():
    vae, x = bernoulli_vae(), torch.rand(4, 6)
    parameters = dict(vae.named_parameters())

    def kl(parameters, row):
        return torch.func.functional_call(vae, parameters, (row[None],)).kl[0]

    each = torch.func.vmap(torch.func.grad(kl), in_dims=(None, 0), randomness="different")
    found = each(parameters, x)["encoder.bias"]
    for row, gradient in zip(x, found, strict=True):
        vae.zero_grad()
        vae.elbo(row[None]).kl.sum().backward()
        torch.testing.assert_close(gradient, vae.encoder.bias.grad)


def test_calling_the_module_is_asking_for_the_elbo():
    vae, x = bernoulli_vae(), torch.rand(4, 6)
    called = vae(x, num_samples=3, generator=torch.Generator().manual_seed(1))
    asked = vae.elbo(x, num_samples=3, generator=torch.Generator().manual_seed(1))
    assert called.value.equal(asked.value)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.full((2, 6), 1.5), r"x must lie in \[0, 1\] under a Bernoulli .*got \[1.5, 1.5\]"),
        (torch.full((2, 6), -0.1), r"x must lie in \[0, 1\]"),
        (torch.full((2, 6), math.nan), r"x must lie in \[0, 1\]"),
        (
            torch.full((2, 6), 1 + 1e-6),
            r"x must lie in \[0, 1\] .*got \[1\.00000095, 1\.00000095\]",
        ),
        (torch.full((2, 6), 255.0), r"x must lie in \[0, 1\]"),
        (torch.rand(6), r"x must have shape \(B, \*event\), got \(6,\)"),
        (torch.tensor(0.5), r"x must have shape \(B, \*event\), got \(\)"),
    ],
)
def test_bad_images_are_refused(x, message):
    vae = bernoulli_vae()
    calls = (vae.elbo, vae.encode, vae.reconstruct, vae.active_units)
    for call in (*calls, lambda x: vae.iwae_bound(x, 2), lambda x: vae.prior_bound(x, 2)):
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
        ({"variance": 0.5}, r"a Bernoulli likelihood has no variance to set, got 0\.5"),
        ({"variance": "learned"}, "a Bernoulli likelihood has no variance to set, got 'learned'"),
        ({"likelihood": "gaussian", "variance": True}, "variance must be a positive number"),
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


def toy_vae():
    """z ~ N(0, 1), y|z ~ N(z, 0.1), q(z|y) = N(0.6 y, 0.3): log p(y) = log N(y; 0, 1.1)."""
    return VAE(
        lambda y: (0.6 * y, math.log(0.3) + 0 * y),
        nn.Identity(),
        1,
        likelihood="gaussian",
        variance=0.1,
    )


def test_iwae_climbs_to_log_p_as_far_as_a_thousand_draws():
    draws = torch.Generator().manual_seed(0)
    gaps = []
    for k in (1, 2, 5, 10, 50, 200, 1000):
        y = 1.1**0.5 * torch.randn(400_000 // (k + 20), 1, generator=draws, dtype=torch.float64)
        log_r = toy_vae().iwae_bound(y, k, generator=draws) - Normal(0, 1.1**0.5).log_prob(y)[:, 0]
        excess = log_r.expm1() - log_r  # E r = 1, so its mean is the gap, with less noise in it
        gaps.append((k, excess.mean().item(), excess.std().item() / len(y) ** 0.5))
    for (_, gap, error), (_, less, its) in itertools.pairwise(gaps):
        assert gap - less > 3 * (error + its)
    # The essay's toy, by integration over y and z: gaps of 1.131, 0.104 and 0.008 nats
    for k, expected in ((1, 1.131), (5, 0.104), (50, 0.008)):
        gap, error = next(g[1:] for g in gaps if g[0] == k)
        assert abs(gap - expected) < 4 * error + 5e-4
    assert 0 < gaps[-1][1] < 1e-3


def test_the_elbo_and_its_gradient_have_the_closed_form_as_expectation():
    """E_q log p(x|z) of a linear decoder is that at the mean, minus sum_l sd_l^2 |w_l|^2 / 2v."""
    model, _, x = linear_vae(4)
    leaves = [(t.detach() + 0.3).requires_grad_() for t in model.posterior(x)] + [model.w]
    vae = VAE(lambda x: leaves[:2], model, 2, likelihood="gaussian", variance=model.s)

    mean_image = leaves[0] @ model.w.T + model.c
    spread = (leaves[1].exp() * model.w.square().sum(0)).sum(1) / (2 * model.s)
    exact = Normal(mean_image, model.s**0.5).log_prob(x).sum(1) - spread
    q = Normal(leaves[0], (0.5 * leaves[1]).exp())
    exact = exact - kl_divergence(q, Normal(0.0, 1.0)).sum(1)
    wanted = torch.cat([t.flatten() for t in torch.autograd.grad(exact.sum(), leaves)])

    draws = torch.Generator().manual_seed(0)
    for analytic in (True, False):
        values, slopes = [], []
        for _ in range(200):
            value = vae.elbo(x, num_samples=100, analytic_kl=analytic, generator=draws).value
            gradient = torch.autograd.grad(value.sum(), leaves)
            values.append(value.detach())
            slopes.append(torch.cat([t.flatten() for t in gradient]))
        for found, expected in ((values, exact.detach()), (slopes, wanted)):
            found = torch.stack(found)
            error = found.std(0) / len(found) ** 0.5
            assert ((found.mean(0) - expected).abs() < 4.5 * error + 1e-9).all()
            assert error.max() < 0.1  # sharp enough to tell one formula from another


def test_the_sampled_kl_has_the_analytic_one_as_expectation():
    vae, x = bernoulli_vae(), torch.rand(3, 6)
    draws = torch.Generator().manual_seed(0)
    sampled = torch.stack(
        [vae.elbo(x, num_samples=50, analytic_kl=False, generator=draws).kl for _ in range(400)]
    )
    error = sampled.std(0) / len(sampled) ** 0.5
    assert ((sampled.mean(0) - vae.elbo(x).kl).abs() < 4.5 * error).all()
    assert error.max() < 0.01


def test_the_gradient_of_iwae_is_that_of_the_log_weights_in_proportion_to_the_weights():
    """Normalised weights, no gradient through them: Burda et al. (2016), equation 14."""
    _, vae, x = linear_vae(6, shift=0.4)
    draws = torch.Generator().manual_seed(2)
    bound = vae.iwae_bound(x, 5, generator=draws)
    gradient = torch.autograd.grad(bound.sum(), vae.decoder.w)[0]
    q = vae.encode(x)
    noise = torch.randn(5, 7, 2, generator=draws.manual_seed(2), dtype=torch.float64)
    z = q.mean + q.stddev * noise
    log_w = vae.decode(z).log_prob(x) + Normal(0.0, 1.0).log_prob(z).sum(-1) - q.log_prob(z)
    weights = log_w.softmax(0).detach()
    expected = torch.autograd.grad((weights * log_w).sum(), vae.decoder.w)[0]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("bound", ["iwae_bound", "prior_bound"])
def test_log_weights_of_minus_a_million_keep_their_digits(bound):
    w = 30 * torch.ones(3, 2000, dtype=torch.float64)
    x = 10 * torch.randn(5, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaf = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def ask(dtype):
        vae = VAE(
            lambda x: (x[:, :3] * 0 + leaf.to(dtype), x[:, :3] * 0 - 2),
            lambda z: z @ w.to(dtype) + leaf.to(dtype).sum(),
            3,
            likelihood="gaussian",
            variance=0.1,
        )
        vae._normal = lambda shape, like, generator: noise[: shape[0]].to(like.dtype)
        shape = (50, 5, 3) if bound == "iwae_bound" else (50, 3)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        value = getattr(vae, bound)(x.to(dtype), 50)
        return value, torch.autograd.grad(value.sum(), leaf)[0]

    (single, gradient), (double, exact) = ask(torch.float32), ask(torch.float64)
    assert double.max() < -9e5
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item())


@pytest.mark.parametrize("log_var", [-100.0, -30.0, -1e-3, 0.0, 1e-3, 0.7, 30.0, 85.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_gaussian_kl_against_sixty_digits(log_var, dtype):
    mean = torch.tensor([[3.0, -0.5]], dtype=dtype, requires_grad=True)
    variances = torch.full((1, 2), log_var, dtype=dtype, requires_grad=True)
    found = gaussian_kl(mean, variances)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == work
    v = Decimal(variances[0, 0].item())
    exact = sum((Decimal(m) ** 2 + v.exp() - 1 - v) / 2 for m in (3.0, -0.5))
    largest = torch.finfo(work).max
    if exact > largest:
        assert found.isinf()
        return
    assert found.item() == pytest.approx(float(exact), rel=4 * torch.finfo(work).eps)
    found.sum().backward()
    torch.testing.assert_close(mean.grad, mean.detach())
    slope = float((v.exp() - 1) / 2)
    if slope < torch.finfo(dtype).max:
        tolerance = max(4 * torch.finfo(work).eps, torch.finfo(dtype).eps)
        assert variances.grad[0, 0].item() == pytest.approx(slope, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_kl_is_never_negative(dtype):
    small = torch.logspace(-20, 0, 2001, dtype=dtype)[:, None]
    for log_var in (small, -small):
        assert gaussian_kl(torch.zeros_like(log_var), log_var).min() >= 0


def test_second_derivatives_of_the_divergence():
    mean, log_var = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    inputs = mean.requires_grad_(), log_var.requires_grad_()
    assert torch.autograd.gradcheck(gaussian_kl, inputs)
    assert torch.autograd.gradgradcheck(gaussian_kl, inputs)


def test_the_slope_of_a_learned_variance():
    """d/d log v of log p(x|z) = (|x - x_hat|^2 / v - D) / 2, at any v."""
    torch.manual_seed(0)
    vae = VAE(Halves(4, 2), nn.Linear(1, 4), 1, likelihood="gaussian", variance="learned").double()
    x, z = torch.randn(5, 4).double(), torch.randn(5, 1).double()
    for log_v in (-3.0, 0.0, 2.0):
        vae.log_variance.data.fill_(log_v)
        (slope,) = torch.autograd.grad(vae.decode(z).log_prob(x).sum(), vae.log_variance)
        error = (x - vae.decoder(z)).square().sum()
        torch.testing.assert_close(slope, 0.5 * (error / math.exp(log_v) - 20))


@pytest.mark.parametrize("event", [(6,), (1, 3, 4)])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_an_empty_batch_has_empty_bounds(event, likelihood):
    vae = bernoulli_vae(event, likelihood=likelihood)
    x = torch.rand(0, *event)
    for analytic in (True, False):
        bound = vae.elbo(x, num_samples=2, analytic_kl=analytic)
        assert all(part.shape == (0,) for part in bound)
    assert vae.iwae_bound(x, 3, chunk_size=2).shape == vae.prior_bound(x, 3).shape == (0,)
    assert vae.reconstruct(x).shape == x.shape
    assert vae.encode(x).batch_shape == (0,)
    vae.elbo(x).value.sum().backward()
    assert all((p.grad == 0).all() for p in vae.parameters())
    with pytest.raises(ValueError, match="at least two examples, got 0"):
        vae.active_units(x)


def test_codes_in_half_precision_are_raised_to_float32():
    vae = bernoulli_vae()
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).half()
    assert vae.log_prior(z).dtype == vae.decode(z).mean.dtype == torch.float32
    assert vae.log_prior(z).equal(vae.log_prior(z.float()))
    assert vae.decode(z).mean.equal(vae.decode(z.float()).mean)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_half_parameters_cost_precision_of_the_networks_alone(half, likelihood):
    vae = bernoulli_vae((40,), likelihood=likelihood)
    x = torch.rand(4, 40, generator=torch.Generator().manual_seed(0)).to(half)
    small = copy.deepcopy(vae).to(half)

    def answers(model, x):
        draws = torch.Generator().manual_seed(1)
        yield model.elbo(x, generator=draws).value
        yield model.iwae_bound(x, 3, generator=draws)
        yield model.prior_bound(x, 3, generator=draws)
        yield model.reconstruct(x)
        yield model.sample(3, generator=draws)

    for given in (x, x.float()):
        for found, exact in zip(answers(small, given), answers(vae, x.float()), strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_double_networks_give_double_bounds_of_single_images(likelihood):
    vae = bernoulli_vae((40,), likelihood=likelihood).double()
    x = torch.rand(4, 40, generator=torch.Generator().manual_seed(0))
    for ask in (
        lambda x, g: vae.elbo(x, generator=g).value,
        lambda x, g: vae.elbo(x, generator=g).reconstruction,
        lambda x, g: vae.iwae_bound(x, 3, generator=g),
    ):
        single, double = (ask(x, torch.Generator().manual_seed(1)) for x in (x, x.double()))
        assert single.dtype == torch.float64
        torch.testing.assert_close(single, double, rtol=1e-14, atol=1e-14)
    assert vae.prior_bound(x, 3).dtype == vae.sample(2).dtype == torch.float64


def test_images_more_precise_than_the_parameters_are_refused():
    with pytest.raises(TypeError, match=r"x is torch\.float64 but the parameters .*torch\.float32"):
        bernoulli_vae().elbo(torch.rand(2, 6, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"z is torch\.float64 but the parameters .*torch\.float32"):
        bernoulli_vae().decode(torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("encoder", "decoder", "error", "message"),
    [
        (None, nn.Linear(3, 6), TypeError, "encoder must be a module or a function, got None"),
        (Halves(6, 6), 7, TypeError, "decoder must be a module or a function, got 7"),
        (lambda x: (x, x, x), None, TypeError, r"return \(mean, log_var\), got 3 values"),
        (lambda x: {"mean": x}, None, TypeError, r"return \(mean, log_var\), got dict"),
        (lambda x: ([0.0], x), None, TypeError, "encoder's mean must be .* got list"),
        (lambda x: (x[:, :3], x.long()), None, TypeError, r"encoder's log_var .*torch\.int64"),
        (lambda x: (x[:, None, :3],) * 2, None, ValueError, r"\(2, 3\), got \(2, 1, 3\)"),
        (None, lambda z: (z, z), TypeError, "decoder output must be .* got tuple"),
        (None, lambda z: None, TypeError, "decoder output must be .* got NoneType"),
        (None, lambda z: z.sum(), ValueError, r"decoder must map \(2, 3\) .* got \(\)"),
        (None, lambda z: z[:1], ValueError, r"decoder must map \(2, 3\) .* got \(1, 3\)"),
        (None, lambda z: z[:, :1], ValueError, r"examples of shape \(6,\) like x, got \(1,\)"),
    ],
)
def test_networks_of_the_wrong_kind_are_refused(encoder, decoder, error, message):
    named = message.startswith(("encoder must be", "decoder must be"))
    encoder = encoder if encoder or named else Halves(6, 6)
    decoder = decoder if decoder or named else nn.Linear(3, 6)
    with pytest.raises(error, match=message):
        VAE(encoder, decoder, 3).elbo(torch.rand(2, 6))


@pytest.mark.parametrize("value", [math.inf, 1e30, math.nan])
def test_images_decoded_beyond_the_dtype_are_named_not_scored(value):
    vae, x = bernoulli_vae(likelihood="gaussian"), torch.rand(2, 6)
    vae.decoder[0].bias.data[2] = value
    for call in (vae.elbo, lambda x: vae.iwae_bound(x, 2), lambda x: vae.prior_bound(x, 2)):
        with pytest.raises(ValueError, match="whose log-likelihood is NaN or infinite"):
            call(x)
    if not math.isfinite(value):
        for call in (vae.reconstruct, lambda x: vae.sample(2)):
            with pytest.raises(ValueError, match="decoder returned values that are NaN or infin"):
                call(x)


def test_a_posterior_too_narrow_for_a_density_still_has_an_elbo():
    vae = VAE(lambda x: (x[:, :3], x[:, :3] * 0 - 400), nn.Linear(3, 6), 3, likelihood="gaussian")
    x = torch.rand(2, 6)
    bound = vae.elbo(x)
    exact = Normal(vae.decoder(x[:, :3]), 1.0).log_prob(x).sum(1)
    torch.testing.assert_close(bound.reconstruction, exact)
    torch.testing.assert_close(bound.kl, 0.5 * (x[:, :3].square() - 1 + 400).sum(1))
    with pytest.raises(ValueError, match=r"log_var down to -400, whose exponential.* is zero in"):
        vae.encode(x)


def test_a_subclass_with_another_prior_is_not_given_the_divergence_from_the_old_one():
    class Shifted(VAE):
        def log_prior(self, z):
            return super().log_prior(z - 3)

    shifted = Shifted(Halves(6, 6), nn.Linear(3, 6), 3)
    x = torch.rand(2, 6)
    with pytest.raises(ValueError, match=r"but Shifted has a log_prior of its own.*=False"):
        shifted.elbo(x)
    bound = shifted.elbo(x, analytic_kl=False, generator=torch.Generator().manual_seed(1))
    one = shifted.iwae_bound(x, 1, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(bound.value, one)


def test_a_variance_may_be_a_number_of_numpy():
    x = torch.rand(2, 6)
    values = [
        bernoulli_vae(likelihood="gaussian", variance=v).elbo(
            x, generator=torch.Generator().manual_seed(0)
        )
        for v in (0.25, np.float32(0.25), np.float64(0.25))
    ]
    assert values[0].value.equal(values[1].value)
    assert values[0].value.equal(values[2].value)


def test_the_layout_of_the_images_does_not_matter():
    vae = bernoulli_vae((2, 4, 3))
    x = torch.rand(5, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    sparse = torch.rand(10, 2, 4, 3)
    sparse[::2] = x
    copies = [
        x.to(memory_format=torch.channels_last),
        sparse[::2],
        x.clone().requires_grad_(),
        x.mT.contiguous().mT,
    ]
    expected = vae.elbo(x, generator=torch.Generator().manual_seed(1)).value
    for same in copies:
        value = vae.elbo(same, generator=torch.Generator().manual_seed(1)).value
        torch.testing.assert_close(value, expected)
    shared = vae.elbo(x[:1].expand(5, -1, -1, -1), generator=torch.Generator().manual_seed(1))
    alone = vae.elbo(x[:1].repeat(5, 1, 1, 1), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(shared.value, alone.value)


def test_the_elbo_can_be_differentiated_with_respect_to_the_images():
    _, vae, x = linear_vae(3, shift=0.2)

    def value(x):
        return vae.elbo(x, generator=torch.Generator().manual_seed(1)).value

    assert torch.autograd.gradcheck(value, x.requires_grad_())


@pytest.mark.parametrize("variance", [0.3, "learned"])
def test_copies_pickles_and_checkpoints_give_the_same_bound(variance):
    vae, x = bernoulli_vae(likelihood="gaussian", variance=variance), torch.rand(3, 6)
    file = io.BytesIO()
    torch.save(vae.state_dict(), file)
    file.seek(0)
    loaded = bernoulli_vae(seed=9, likelihood="gaussian", variance=variance)
    loaded.load_state_dict(torch.load(file), strict=True)
    expected = vae.elbo(x, generator=torch.Generator().manual_seed(1)).value
    for other in (loaded, copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert other.elbo(x, generator=torch.Generator().manual_seed(1)).value.equal(expected)


def test_sample_and_reconstruct_are_the_decoder_s_means():
    vae, x = bernoulli_vae(), torch.rand(4, 6)
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    draws = torch.Generator().manual_seed(2)
    torch.testing.assert_close(vae.sample(5, generator=draws), vae.decoder(z).sigmoid())
    torch.testing.assert_close(vae.reconstruct(x), vae.decoder(vae.encoder(x)[0]).sigmoid())


def test_the_prior_is_the_standard_normal_law():
    z = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prior = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    torch.testing.assert_close(bernoulli_vae().log_prior(z), prior.log_prob(z))


def test_active_units_are_those_whose_means_vary():
    x = torch.rand(2, 3) * torch.tensor([1.0, 0.14, 0.01])
    vae = VAE(lambda x: (x, 0 * x), nn.Linear(3, 3), 3)
    variances = np.var(x.numpy(), axis=0, ddof=1)
    for threshold in (0.0, 1e-5, 0.01, 1.0, *(0.9 * variances).tolist()):
        assert vae.active_units(x, threshold).tolist() == (variances > threshold).tolist()
    assert vae.active_units(x).dtype == torch.bool
    assert vae.active_units(x[:1].expand(4, -1), threshold=0).tolist() == [False] * 3


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_distributions_that_are_handed_out_check_what_they_are_asked(likelihood):
    vae, x = bernoulli_vae(likelihood=likelihood), torch.rand(4, 6)
    p, q = vae.decode(torch.zeros(4, 3)), vae.encode(x)
    assert p.log_prob(x).isfinite().all()  # grey values too
    assert set(p.sample((9,)).unique().tolist()) == {0.0, 1.0} or likelihood == "gaussian"
    torch.testing.assert_close(kl_divergence(p, p), torch.zeros(4))
    bad = 255 * x if likelihood == "bernoulli" else math.nan * x
    for law, value in ((p, bad), (p, torch.rand(4, 5)), (q, torch.full((4, 3), math.nan))):
        with pytest.raises(ValueError, match=r"[Vv]alue"):
            law.log_prob(value)
    unchecked = bernoulli_vae(likelihood=likelihood, validate_args=False)
    assert unchecked.decode(torch.zeros(4, 3)).log_prob(bad).shape == (4,)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_bernoulli_densities_are_computed_in_at_least_float32(half):
    vae = bernoulli_vae((784,))
    x = torch.rand(4, 784, generator=torch.Generator().manual_seed(0))
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))

    def exact(x):
        rho = vae.decoder(z).double().sigmoid()
        return (x * rho.log() + (1 - x) * (1 - rho).log()).sum(1)

    found = vae.decode(z).log_prob(x.to(half))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact(x.to(half).double()), rtol=1e-6, atol=0)
    for binary in (x > 0.5, (x > 0.5).long()):
        found = vae.decode(z).log_prob(binary)
        torch.testing.assert_close(found.double(), exact(binary.double()), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"[Vv]alue"):
        vae.decode(z).log_prob(2 * binary)
    double = copy.deepcopy(vae).double().decode(z).log_prob(x)
    torch.testing.assert_close(double, exact(x.double()), rtol=1e-6, atol=0)


def test_a_learned_variance_in_half_precision_loses_no_nats():
    vae = bernoulli_vae((784,), likelihood="gaussian", variance="learned")
    x = torch.rand(4, 784, generator=torch.Generator().manual_seed(0))
    vae.log_variance.data.fill_(-3.1)
    half = copy.deepcopy(vae).bfloat16()
    mean = half.decoder(torch.zeros(4, 3, dtype=torch.bfloat16)).double()
    variance = half.log_variance.double().exp()
    expected = Normal(mean, variance.sqrt()).log_prob(x.double()).sum(1)
    found = half.decode(torch.zeros(4, 3)).log_prob(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("variance", [1e39, 1e-40, Fraction(1, 3), np.float16(0.3)])
def test_any_positive_number_is_a_variance(variance):
    """Also one whose square root, though not itself, is an ordinary number of float32."""
    vae = VAE(
        Halves(6, 6),
        lambda z: 0 * z @ torch.ones(3, 6),
        3,
        likelihood="gaussian",
        variance=variance,
    )
    x = torch.zeros(2, 6)
    expected = Normal(0.0, float(variance) ** 0.5).log_prob(torch.zeros(2, 6).double()).sum(1)
    torch.testing.assert_close(vae.elbo(x).reconstruction.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("variance", [np.array([0.5, 0.5]), torch.ones(2), [1.0, 2.0], None])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_a_variance_for_each_pixel_is_refused(variance, likelihood):
    with pytest.raises(ValueError, match="variance must be a positive number"):
        bernoulli_vae(likelihood=likelihood, variance=variance)


@pytest.mark.parametrize("bound", ["iwae_bound", "prior_bound"])
def test_chunks_leave_nothing_behind(bound):
    """What is kept of each chunk pins the heap between the large blocks that are freed."""
    calls, alive = itertools.count(), {}
    w = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))

    def decoder(z):
        call = next(calls)
        if call in (2, 29):
            alive[call] = sum(type(thing) is torch.Tensor for thing in gc.get_objects())
        return z @ w

    vae = VAE(lambda x: (x[:, :2], x[:, 2:4]), decoder, 2)
    with torch.no_grad():
        getattr(vae, bound)(torch.rand(3, 5), 60, chunk_size=2)
    assert next(calls) == 30
    assert alive[29] <= alive[2]


@pytest.mark.parametrize("bound", ["iwae_bound", "prior_bound"])
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_many_chunks_cost_no_digits_and_have_the_same_gradient(bound, chunk_size):
    w = torch.randn(2, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = 3 * torch.randn(4, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = torch.randn(300, 4, 2, generator=torch.Generator().manual_seed(2)).double()
    noise = noise if bound == "iwae_bound" else noise[:, 0]

    def ask(dtype, chunk_size):
        leaf = torch.zeros(2, dtype=dtype, requires_grad=True)
        vae = VAE(
            lambda x: (x[:, :2] + leaf, x[:, 2:4]),
            lambda z: z @ w.to(dtype) + leaf.sum(),
            2,
            likelihood="gaussian",
        )
        left = iter(noise.to(dtype))
        vae._normal = lambda shape, *_: torch.stack([next(left) for _ in range(shape[0])])
        value = getattr(vae, bound)(x.to(dtype), 300, chunk_size=chunk_size)
        return value.double(), torch.autograd.grad(value.sum(), leaf)[0].double()

    value, gradient = ask(torch.float64, None)
    double, its = ask(torch.float64, chunk_size)
    torch.testing.assert_close(double, value, rtol=1e-13, atol=0)
    torch.testing.assert_close(its, gradient, rtol=1e-9, atol=1e-9)
    single, its = ask(torch.float32, chunk_size)
    torch.testing.assert_close(single, value, rtol=1e-6, atol=0)
    torch.testing.assert_close(its, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("order", [1, -1])
def test_chunks_of_weights_thousands_of_nats_apart(order):
    log_w = order * torch.linspace(-4000.0, 4000.0, 21)[:, None]
    none, all_of_it = torch.full((21, 1), -math.inf), torch.full((21, 1), math.inf)
    log_w = torch.cat([log_w, none, all_of_it], 1)
    left = iter(log_w)
    found = log_mean_exp(lambda n: torch.stack([next(left) for _ in range(n)]), 21, 4)
    assert found[0].item() == pytest.approx(4000 - math.log(21))
    assert found[1:].tolist() == [-math.inf, math.inf]
