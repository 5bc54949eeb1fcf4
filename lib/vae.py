"""Variational autoencoders whose bounds are log-probabilities in nats, nothing rescaled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal

from lib._common import at_least_float32, check_positive, values_readable

__all__ = ["ELBO", "VAE", "gaussian_kl"]


class ELBO(NamedTuple):
    """The evidence lower bound and its two parts, each of shape (B,), in nats per example.

    ``value = reconstruction - kl``; training minimises ``-value.mean()``.
    """

    value: Tensor
    reconstruction: Tensor
    kl: Tensor


def gaussian_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL divergence from the standard normal prior to a diagonal Gaussian.

    KL(N(mean, exp(log_var)) || N(0, I)) = 1/2 sum_l (mean_l^2 + exp(log_var_l) - 1 - log_var_l).

    Args:
        mean: (..., L).
        log_var: (..., L), logarithms of the variances.

    Returns:
        (...), in nats, at least float32.

    Raises:
        ValueError: if the shapes differ, or values are not finite (not checked while compiling).
        TypeError: if one is not floating.

    Source: chapter ``vae``, eq-vae-kl; Kingma and Welling (2014), appendix B.

    >>> gaussian_kl(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2))
    tensor([0.5000])
    """
    mean, log_var = at_least_float32(mean, "mean"), at_least_float32(log_var, "log_var")
    if mean.shape != log_var.shape or mean.ndim < 1:
        seen = f"{tuple(mean.shape)} and {tuple(log_var.shape)}"
        raise ValueError(f"mean and log_var must have the same shape (..., L), got {seen}")
    if __debug__ and values_readable(mean, log_var):
        for name, value in (("mean", mean), ("log_var", log_var)):
            if not value.isfinite().all():
                raise ValueError(f"{name} must be finite, got NaN or infinite values")
    return _gaussian_kl(mean, log_var)


def _gaussian_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    # expm1(v) - v, not exp(v) - 1 - v: near v = 0 the difference of two numbers near 1 is noise
    return 0.5 * (mean.square() + torch.expm1(log_var) - log_var).sum(-1)


class VAE(nn.Module):
    """A variational autoencoder with a standard normal prior and a diagonal Gaussian posterior.

    p(x, z) = p(x|z) N(z; 0, I),  q(z|x) = N(z; mean(x), diag exp(log_var(x))).

    Args:
        encoder: maps x (B, *event) to ``(mean, log_var)``, both (B, L). A module, if it is to be
            trained; any function will do.
        decoder: maps z (B, L) to the logits (Bernoulli) or the means (Gaussian) of x (B, *event).
        latent_dim: L.
        likelihood: ``"bernoulli"``, for pixels in [0, 1] (grey values are allowed, but
            exp(log_prob) is then not a density), or ``"gaussian"``.
        variance: of the Gaussian likelihood: a positive number, or ``"learned"`` for one scalar
            parameter ``log_variance``.
        validate_args: check values (support of x, what the networks return), which reads tensors;
            by default as torch.distributions does. Turn it off for
            ``torch.compile(fullgraph=True)`` and ``torch.func.vmap``.

    Raises:
        ValueError: if an argument makes no sense, if the encoder or decoder returns other shapes
            or values that are not finite, or if x holds NaN or leaves the support.
        TypeError: if x is not floating, or the encoder returns no pair.

    Source: chapter ``vae``, eq-vae-elbo; Kingma and Welling (2014).

    >>> class Halves(nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x).chunk(2, -1)
    >>> _ = torch.manual_seed(0)
    >>> model = VAE(Halves(6, 4), nn.Linear(2, 6), latent_dim=2)
    >>> bound = model.elbo(torch.rand(3, 6))
    >>> bound.value.shape, bool((bound.kl >= 0).all())
    (torch.Size([3]), True)
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], tuple[Tensor, Tensor]],
        decoder: Callable[[Tensor], Tensor],
        latent_dim: int,
        *,
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
        variance: float | Literal["learned"] = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        check_positive(latent_dim, "latent_dim")
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f'likelihood must be "bernoulli" or "gaussian", got {likelihood!r}')
        is_number = isinstance(variance, int | float) and not isinstance(variance, bool)
        if variance != "learned" and not (is_number and 0 < variance < math.inf):
            raise ValueError(f'variance must be a positive number or "learned", got {variance!r}')
        self.encoder, self.decoder, self.latent_dim = encoder, decoder, latent_dim
        self.likelihood, self.variance = likelihood, variance
        self.validate_args = __debug__ if validate_args is None else validate_args
        if likelihood == "gaussian" and variance == "learned":
            self.log_variance = nn.Parameter(torch.zeros(()))

    def extra_repr(self) -> str:
        """The options that are no modules."""
        return f"{self.latent_dim}, likelihood={self.likelihood!r}, variance={self.variance!r}"

    def encode(self, x: Tensor) -> Independent:
        """The posterior q(z|x), a distribution over z (B, L)."""
        mean, log_var = self._posterior(x)
        return Independent(Normal(mean, (0.5 * log_var).exp(), validate_args=False), 1)

    def decode(self, z: Tensor) -> Independent:
        """The likelihood p(x|z) for z (..., L), a distribution over x with batch shape (...)."""
        self._check_latent(z)
        flat = self.decoder(z.reshape(-1, self.latent_dim))
        if len(flat) != z[..., 0].numel() or flat.ndim < 2:
            raise ValueError(
                f"decoder must map ({z[..., 0].numel()}, {self.latent_dim}) to as many examples, "
                f"got {tuple(flat.shape)}"
            )
        output = at_least_float32(flat, "decoder output").reshape(*z.shape[:-1], *flat.shape[1:])
        base: Distribution
        if self.likelihood == "bernoulli":
            base = Bernoulli(logits=output, validate_args=False)
        else:
            base = Normal(output, self._deviation(output), validate_args=False)
        return Independent(base, flat.ndim - 1, validate_args=False)

    def log_prior(self, z: Tensor) -> Tensor:
        """log p(z) for z (..., L), shape (...), in nats."""
        self._check_latent(z)
        return _log_normal(z)

    def elbo(
        self,
        x: Tensor,
        *,
        num_samples: int = 1,
        analytic_kl: bool = True,
        generator: torch.Generator | None = None,
    ) -> ELBO:
        """The evidence lower bound E_q[log p(x|z)] - KL(q(z|x) || p(z)) <= log p(x).

        Args:
            x: (B, *event).
            num_samples: draws of z per example; their mean estimates the expectation.
            analytic_kl: take the KL in closed form; else average log q(z|x) - log p(z) over the
                same draws, an estimator with the same expectation.
            generator: source of the draws.

        Source: chapter ``vae``, eq-vae-elbo and eq-vae-losses.
        """
        x = self._checked(x)
        mean, log_var = self._posterior(x)
        z, log_q = self._draw(mean, log_var, num_samples, generator)
        reconstruction = self._log_likelihood(x, z).mean(0)
        kl = _gaussian_kl(mean, log_var) if analytic_kl else (log_q - self.log_prior(z)).mean(0)
        return ELBO(reconstruction - kl, reconstruction, kl)

    def iwae_bound(
        self,
        x: Tensor,
        k: int,
        *,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The importance-weighted bound log 1/k sum_i p(x|z_i) p(z_i) / q(z_i|x), z_i ~ q(z|x).

        Its expectation grows with k towards log p(x); k = 1 is the fully sampled ELBO.

        Args:
            x: (B, *event).
            k: draws per example.
            chunk_size: draws decoded at a time, to bound the memory where no gradient is needed.
            generator: source of the draws.

        Returns:
            (B,), in nats.

        Source: chapter ``vae``, eq-vae-iwae; Burda, Grosse and Salakhutdinov (2016).
        """
        x = self._checked(x)
        mean, log_var = self._posterior(x)
        log_weights = []
        for size in _chunks(k, chunk_size):
            z, log_q = self._draw(mean, log_var, size, generator)
            log_weights.append(self._log_likelihood(x, z) + self.log_prior(z) - log_q)
        return torch.cat(log_weights).logsumexp(0) - math.log(k)

    def prior_bound(
        self,
        x: Tensor,
        k: int,
        *,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The estimator that fails: log 1/k sum_i p(x|z_i) with z_i ~ p(z), shared by the batch.

        Its mean is a lower bound of log p(x) too, but at a price that grows exponentially with
        the latent dimension.

        Args and returns as ``iwae_bound``.

        Source: chapter ``vae``, eq-vae-prior-bound.
        """
        x = self._checked(x)
        log_likelihoods = []
        for size in _chunks(k, chunk_size):
            z = self._draw_prior(size, x, generator)[:, None]  # (k, 1, L)
            log_likelihoods.append(self._log_likelihood(x, z))
        return torch.cat(log_likelihoods).logsumexp(0) - math.log(k)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Decoder means (n, *event) at ``n`` draws of the prior."""
        check_positive(n, "n")
        reference = next(self.parameters(), torch.empty(()))
        return self._mean_image(self._draw_prior(n, reference, generator))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Decoder means (B, *event) at the posterior means of x."""
        return self._mean_image(self._posterior(self._checked(x))[0])

    def active_units(self, x: Tensor, threshold: float = 0.01) -> Tensor:
        """Which latent units carry information: (L,), True where Var_x[mean_l(x)] > threshold.

        Source: chapter ``vae``; Burda, Grosse and Salakhutdinov (2016).
        """
        if not threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {threshold}")
        if len(x) < 2:
            raise ValueError(f"x must hold at least two examples, got {len(x)}")
        return self._posterior(self._checked(x))[0].var(0) > threshold

    def _check_latent(self, z: Tensor) -> None:
        if not z.is_floating_point():
            raise TypeError(f"z must be a floating-point tensor, got {z.dtype}")
        if z.ndim < 1 or z.shape[-1] != self.latent_dim:
            raise ValueError(f"z must have shape (..., {self.latent_dim}), got {tuple(z.shape)}")
        if self.validate_args and not z.isfinite().all():
            raise ValueError("z must be finite, got NaN or infinite values")

    def _mean_image(self, z: Tensor) -> Tensor:
        mean = self.decode(z).mean
        if self.validate_args and mean.isnan().any():
            raise ValueError("decoder returned values that are NaN")
        return mean

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.encoder(x)
        if not isinstance(posterior, tuple | list) or len(posterior) != 2:
            seen = type(posterior).__name__
            raise TypeError(f"encoder must return (mean, log_var), got {seen}")
        mean, log_var = posterior
        expected = (len(x), self.latent_dim)
        for name, value in (("mean", mean), ("log_var", log_var)):
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"encoder must return {name} of shape (B, latent_dim) = {expected}, "
                    f"got {tuple(value.shape)}"
                )
            if self.validate_args and not value.isfinite().all():
                raise ValueError(f"encoder returned {name} with values that are not finite")
        mean, log_var = at_least_float32(mean), at_least_float32(log_var)
        if self.validate_args and not log_var.exp().isfinite().all():
            raise ValueError(
                f"encoder returned log_var up to {log_var.max().item():.4g}, whose exponential, "
                f"the variance, is not finite in {log_var.dtype}"
            )
        return mean, log_var

    def _deviation(self, reference: Tensor) -> Tensor:
        if isinstance(self.variance, str):
            return (0.5 * self.log_variance).exp().to(reference.dtype)
        return reference.new_tensor(self.variance).sqrt()

    def _checked(self, x: Tensor) -> Tensor:
        """``x`` in at least float32, inside the support of the likelihood."""
        x = at_least_float32(x, "x")
        if x.ndim < 2:
            raise ValueError(f"x must have shape (B, *event), got {tuple(x.shape)}")
        if self.validate_args and x.numel():
            low, high = x.aminmax()
            if self.likelihood == "bernoulli" and not (low >= 0 and high <= 1):
                seen = f"[{low.item():.4g}, {high.item():.4g}]"
                raise ValueError(f"x must lie in [0, 1] under a Bernoulli likelihood, got {seen}")
            if not (low.isfinite() and high.isfinite()):
                raise ValueError("x must be finite, got NaN or infinite values")
        return x

    def _log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), shape (S, B), for x (B, *event) and z (S, B, L) or (S, 1, L)."""
        likelihood = self.decode(z)
        if likelihood.event_shape != x.shape[1:]:
            raise ValueError(
                f"decoder must return examples of shape {tuple(x.shape[1:])} like x, "
                f"got {tuple(likelihood.event_shape)}"
            )
        log_likelihood = likelihood.log_prob(x)
        if self.validate_args and log_likelihood.isnan().any():
            raise ValueError("decoder returned values whose log-likelihood is NaN")
        return log_likelihood

    def _normal(
        self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        return torch.randn(
            *shape,
            self.latent_dim,
            generator=generator,
            device=like.device,
            dtype=torch.float64 if like.dtype == torch.float64 else torch.float32,
        )

    def _draw_prior(self, n: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """z (n, L) from p(z)."""
        return self._normal((n,), like, generator)

    def _draw(
        self,
        mean: Tensor,
        log_var: Tensor,
        num_samples: int,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """z = mean + deviation * noise (S, B, L), and log q(z|x) (S, B)."""
        check_positive(num_samples, "num_samples")
        noise = self._normal((num_samples, len(mean)), mean, generator)
        z = mean + (0.5 * log_var).exp() * noise
        return z, _log_normal(noise) - 0.5 * log_var.sum(-1)


def _log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I) over the last axis."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)


def _chunks(k: int, size: int | None) -> Iterator[int]:
    """k as a sum of numbers of at most ``size``."""
    check_positive(k, "k")
    size = k if size is None else size
    check_positive(size, "chunk_size")
    for start in range(0, k, size):
        yield min(size, k - start)
