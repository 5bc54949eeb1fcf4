"""The model: two networks, a prior, and the bounds of log p(x) that they give."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal, constraints

from lib._common import at_least_float32, check_positive, noise_source, values_readable
from lib.vae._door import as_codes, as_images, as_posterior, ask
from lib.vae._gaussian import divergence, log_standard_normal
from lib.vae._weights import log_mean_exp

__all__ = ["ELBO", "VAE"]


class ELBO(NamedTuple):
    """The evidence lower bound and its two parts, each of shape (B,), in nats per example.

    ``value = reconstruction - kl``; training minimises ``-value.mean()``.
    """

    value: Tensor
    reconstruction: Tensor
    kl: Tensor


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
            by default on, unless Python runs with ``-O``. Inside ``torch.compile`` and
            ``torch.func`` values cannot be read, and are not checked; nor does ``torch.compile``
            take a ``generator``.

    Networks are called in the precision of their parameters; all else is at least float32. A
    subclass with another prior overrides ``log_prior``, and ``_draw_prior`` for what draws from it.

    Raises:
        ValueError: if an argument makes no sense, if the encoder or decoder returns other shapes
            or values that are not finite, or if x holds NaN or leaves the support.
        TypeError: if x is not floating or more precise than the parameters, if a network is not
            callable, or if the encoder returns no pair.

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
        for name, network in (("encoder", encoder), ("decoder", decoder)):
            if not callable(network):
                raise TypeError(f"{name} must be a module or a function, got {network!r}")
        check_positive(latent_dim, "latent_dim")
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f'likelihood must be "bernoulli" or "gaussian", got {likelihood!r}')
        if isinstance(variance, str):
            legal = variance == "learned"
        else:
            is_number = isinstance(variance, Real) and not isinstance(variance, bool)
            legal = is_number and 0 < variance < math.inf
        if not legal:
            raise ValueError(f'variance must be a positive number or "learned", got {variance!r}')
        if likelihood == "bernoulli" and variance != 1:
            raise ValueError(f"a Bernoulli likelihood has no variance to set, got {variance!r}")
        self.encoder, self.decoder, self.latent_dim = encoder, decoder, latent_dim
        self.likelihood = likelihood
        self.variance = variance if isinstance(variance, str) else float(variance)
        self.validate_args = __debug__ if validate_args is None else validate_args
        if variance == "learned":
            self.log_variance = nn.Parameter(torch.zeros(()))

    def extra_repr(self) -> str:
        """The options that are no modules."""
        return f"{self.latent_dim}, likelihood={self.likelihood!r}, variance={self.variance!r}"

    def forward(self, x: Tensor, **options: Any) -> Any:
        """``elbo``, for all that wants to call a module: hooks, DDP, ``functional_call``."""
        return self.elbo(x, **options)

    def encode(self, x: Tensor) -> Independent:
        """The posterior q(z|x), a distribution over z (B, L)."""
        mean, log_var = self._posterior(self._checked(x))
        if self._may_read(log_var) and not (log_var.exp() > 0).all():
            raise ValueError(
                f"encoder returned log_var down to {log_var.min().item():.4g}, whose exponential, "
                f"the variance, is zero in {log_var.dtype}"
            )
        law = Normal(mean, (0.5 * log_var).exp(), validate_args=self._may_read(mean))
        return Independent(law, 1, validate_args=False)

    def decode(self, z: Tensor) -> Independent:
        """The likelihood p(x|z) for z (..., L), a distribution over x with batch shape (...)."""
        output = self._decoded(z)
        law = self._pixel_law(output, validate_args=self._may_read(output))
        return Independent(law, output.ndim - z.ndim + 1, validate_args=False)

    def log_prior(self, z: Tensor) -> Tensor:
        """log p(z) for z (..., L), shape (...), in nats."""
        return log_standard_normal(self._codes(z))

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

        Raises:
            ValueError: besides what ``VAE`` names, if ``num_samples`` is below 1, or if
                ``analytic_kl`` is asked of a subclass with another ``log_prior``.

        Source: chapter ``vae``, eq-vae-elbo and eq-vae-losses.
        """
        x = self._checked(x)
        mean, log_var = self._posterior(x)
        z, log_q = self._draw(mean, log_var, num_samples, generator)
        reconstruction = self._log_likelihood(x, z).mean(0)
        kl = self._kl(mean, log_var) if analytic_kl else (log_q - self.log_prior(z)).mean(0)
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
            chunk_size: draws made and decoded at a time, all k if None: bounds the memory where no
                gradient is needed. The same seed gives other draws in other chunks.
            generator: source of the draws.

        Returns:
            (B,), in nats.

        Source: chapter ``vae``, eq-vae-iwae; Burda, Grosse and Salakhutdinov (2016).
        """
        x = self._checked(x)
        mean, log_var = self._posterior(x)

        def log_weights(n: int) -> Tensor:
            z, log_q = self._draw(mean, log_var, n, generator)
            return self._log_likelihood(x, z) + self.log_prior(z) - log_q

        return log_mean_exp(log_weights, k, chunk_size)

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

        def log_likelihoods(n: int) -> Tensor:
            z = self._draw_prior(n, x, generator)[:, None]  # (n, 1, L)
            return self._log_likelihood(x, z)

        return log_mean_exp(log_likelihoods, k, chunk_size)

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
        x = self._checked(x)
        if len(x) < 2:
            raise ValueError(f"x must hold at least two examples, got {len(x)}")
        return self._posterior(x)[0].var(0) > threshold

    def _may_read(self, tensor: Tensor) -> bool:
        return self.validate_args and values_readable(tensor)

    def _checked(self, x: Tensor) -> Tensor:
        unit_interval = self.likelihood == "bernoulli"
        return as_images(x, unit_interval=unit_interval, validate=self.validate_args)

    def _codes(self, z: Tensor) -> Tensor:
        return as_codes(z, self.latent_dim, validate=self.validate_args)

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = len(x), self.latent_dim
        return as_posterior(ask(self.encoder, x, "x"), shape, validate=self.validate_args)

    def _kl(self, mean: Tensor, log_var: Tensor) -> Tensor:
        if type(self).log_prior is not VAE.log_prior:
            raise ValueError(
                f"analytic_kl=True is the divergence from N(0, I), but {type(self).__name__} has "
                f"a log_prior of its own: ask for analytic_kl=False"
            )
        return divergence(mean, log_var)

    def _decoded(self, z: Tensor) -> Tensor:
        """What the decoder says of z (..., L): logits or means (..., *event)."""
        z = self._codes(z)
        flat = z.reshape(-1, self.latent_dim)
        output = at_least_float32(ask(self.decoder, flat, "z"), "decoder output")
        if output.ndim < 2 or len(output) != len(flat):
            raise ValueError(
                f"decoder must map {tuple(flat.shape)} to as many examples, "
                f"got {tuple(output.shape)}"
            )
        return output.reshape(*z.shape[:-1], *output.shape[1:])

    def _pixel_law(self, output: Tensor, *, validate_args: bool = False) -> Distribution:
        """p(x_d|z), pixel by pixel."""
        if self.likelihood == "bernoulli":
            return _Pixels(logits=output, validate_args=validate_args)
        if isinstance(self.variance, str):
            deviation = (0.5 * self.log_variance.to(output.dtype)).exp()
        else:
            deviation = output.new_tensor(math.sqrt(self.variance))
        return Normal(output, deviation, validate_args=validate_args)

    def _log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), shape (S, B), for x (B, *event) and z (S, B, L) or (S, 1, L)."""
        output = self._decoded(z)
        if output.shape[2:] != x.shape[1:]:
            raise ValueError(
                f"decoder must return examples of shape {tuple(x.shape[1:])} like x, "
                f"got {tuple(output.shape[2:])}"
            )
        # Not by ``decode``, whose Independent fails on an empty batch
        each = self._pixel_law(output).log_prob(x)
        log_likelihood = each.sum(tuple(range(2, each.ndim)))
        if self._may_read(log_likelihood) and not log_likelihood.isfinite().all():
            raise ValueError("decoder returned values whose log-likelihood is NaN or infinite")
        return log_likelihood

    def _mean_image(self, z: Tensor) -> Tensor:
        mean = self._pixel_law(self._decoded(z)).mean
        if self._may_read(mean) and not mean.isfinite().all():
            raise ValueError("decoder returned values that are NaN or infinite")
        return mean

    def _normal(
        self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        shape = *shape, self.latent_dim
        noise = torch.randn(shape, dtype=dtype, **noise_source(like.device, generator))
        return noise.to(like.device)

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
        return z, log_standard_normal(noise) - 0.5 * log_var.sum(-1)


class _Pixels(Bernoulli):
    """A Bernoulli law whose log_prob takes grey values too."""

    support = constraints.unit_interval  # type: ignore[assignment]

    def log_prob(self, value: Tensor) -> Tensor:
        # Cross-entropy comes in the precision of its target, not of the logits
        return super().log_prob(value.to(torch.promote_types(value.dtype, self.logits.dtype)))
