"""A variational autoencoder whose prior is a mixture, with its components read off as clusters."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lib._common import at_least_float32, check_positive, noise_source
from lib.vae import VAE
from lib.vae._door import ask

__all__ = ["ClusterELBO", "ClusterVAE", "cluster_accuracy", "purity"]


class ClusterELBO(NamedTuple):
    """The bound and its three parts, each of shape (B,), in nats per example.

    ``value = reconstruction - alignment - balance``; training minimises ``-value.mean()``.
    """

    value: Tensor
    reconstruction: Tensor
    alignment: Tensor
    balance: Tensor


class ClusterVAE(VAE):
    """A VAE with a discrete latent y beside z, whose posterior q(y|z) names the cluster of x.

    p(x, z, y) = p(x|z) N(z; means_y, I) / K,  q(z, y|x) = q(y|z) N(z; mean(x), diag var(x)).

    ``iwae_bound`` and ``prior_bound`` are those of ``VAE`` with the mixture as the prior of z.

    Args:
        encoder, decoder, latent_dim, likelihood, variance, validate_args: as in ``VAE``, but for
            the likelihood's default, which is ``"gaussian"``, as in the essay.
        num_clusters: K.
        classifier: q(y|z): ``"network"``, a hidden layer of 256 units as in the essay; ``"bayes"``,
            the optimum, which has no parameters: the mixture's own posterior, proportional to
            N(z; means_y, I); or a module that maps z (B, L) to logits (B, K).

    Raises:
        ValueError: as ``VAE``, if ``num_clusters`` is below 1, if the classifier returns another
            shape or values that are not finite, or if the means have diverged.
        TypeError: as ``VAE``, or if ``num_clusters`` is not an integer.

    Source: chapter ``vae_clustering``, eq-vae-clustering-loss; Su (2018), archive 5887.

    >>> class Halves(nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x).chunk(2, -1)
    >>> _ = torch.manual_seed(0)
    >>> model = ClusterVAE(Halves(6, 4), nn.Linear(2, 6), 2, num_clusters=3)
    >>> bound = model.elbo(torch.rand(5, 6))
    >>> bound.value.shape, bool((bound.balance >= 0).all()), model.predict(torch.rand(5, 6)).shape
    (torch.Size([5]), True, torch.Size([5]))
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], tuple[Tensor, Tensor]],
        decoder: Callable[[Tensor], Tensor],
        latent_dim: int,
        num_clusters: int,
        *,
        likelihood: Literal["bernoulli", "gaussian"] = "gaussian",
        variance: float | Literal["learned"] = 1.0,
        classifier: Literal["network", "bayes"] | nn.Module = "network",
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(
            encoder,
            decoder,
            latent_dim,
            likelihood=likelihood,
            variance=variance,
            validate_args=validate_args,
        )
        check_positive(num_clusters, "num_clusters")
        self.num_clusters = num_clusters
        self.means = nn.Parameter(torch.zeros(num_clusters, latent_dim))
        self.classifier: nn.Module | None
        if isinstance(classifier, nn.Module):
            self.classifier = classifier
        elif classifier == "network":
            self.classifier = nn.Sequential(
                nn.Linear(latent_dim, 256), nn.ReLU(), nn.Linear(256, num_clusters)
            )
        elif classifier == "bayes":
            # Equal means would stay equal: the Bayes rule gives all of them the same gradient
            nn.init.normal_(self.means)
            self.classifier = None
        else:
            seen = repr(classifier)
            raise ValueError(f'classifier must be "network", "bayes" or a module, got {seen}')

    def extra_repr(self) -> str:
        """The options that are no modules."""
        return f"{super().extra_repr()}, num_clusters={self.num_clusters}"

    def log_prior(self, z: Tensor) -> Tensor:
        """log p(z) = log 1/K sum_y N(z; means_y, I) for z (..., L), shape (...), in nats."""
        return self._log_components(self._codes(z)).logsumexp(-1) - math.log(self.num_clusters)

    def log_classes(self, z: Tensor) -> Tensor:
        """log q(y|z) for z (..., L), shape (..., K).

        Source: chapter ``vae_clustering``, eq-vae-clustering-bayes.
        """
        z = self._codes(z)
        if self.classifier is None:
            return self._log_components(z).log_softmax(-1)
        flat = z.reshape(-1, self.latent_dim)
        logits = at_least_float32(ask(self.classifier, flat, "z"), "classifier output")
        expected = (len(flat), self.num_clusters)
        if tuple(logits.shape) != expected:
            seen = tuple(logits.shape)
            raise ValueError(f"classifier must return logits of shape {expected}, got {seen}")
        log_classes = logits.to(z.dtype).log_softmax(-1)
        if self._may_read(log_classes) and not log_classes.isfinite().all():
            raise ValueError(
                f"classifier returned logits that are not finite in {z.dtype}, "
                f"or whose differences are not"
            )
        return log_classes.reshape(*z.shape[:-1], self.num_clusters)

    def elbo(  # type: ignore[override]
        self, x: Tensor, *, num_samples: int = 1, generator: torch.Generator | None = None
    ) -> ClusterELBO:
        """The bound and what it is made of, averaged over ``num_samples`` draws z ~ q(z|x).

        reconstruction = log p(x|z); alignment = sum_y q(y|z) log q(z|x) / p(z|y), the pull of z
        towards a class mean; balance = KL(q(y|z) || uniform), which on average over x and z is
        I(z; y) + KL(q(y) || uniform).

        Source: chapter ``vae_clustering``, eq-vae-clustering-loss.
        """
        x = self._checked(x)
        mean, log_var = self._posterior(x)
        z, log_q = self._draw(mean, log_var, num_samples, generator)
        log_classes = self.log_classes(z)  # (S, B, K)
        classes = log_classes.exp()
        reconstruction = self._log_likelihood(x, z).mean(0)
        alignment = (log_q - (classes * self._log_components(z)).sum(-1)).mean(0)
        balance = ((classes * log_classes).sum(-1) + math.log(self.num_clusters)).mean(0)
        value = reconstruction - alignment - balance
        return ClusterELBO(value, reconstruction, alignment, balance)

    def predict_proba(self, x: Tensor) -> Tensor:
        """q(y|z) at the encoder's mean, shape (B, K)."""
        return self.log_classes(self._posterior(self._checked(x))[0]).exp()

    def predict(self, x: Tensor) -> Tensor:
        """The most probable cluster of each example, (B,) long."""
        return self.predict_proba(x).argmax(-1)

    def sample(
        self, n: int, cluster: int | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Decoder means (n, *event) at draws of one cluster, or of all in equal shares at random.

        Raises:
            TypeError: if ``n`` or ``cluster`` is not an integer.
            ValueError: if ``n`` is below 1 or ``cluster`` is not in [0, K).
        """
        check_positive(n, "n")
        if isinstance(cluster, bool) or not isinstance(cluster, int | Integral | None):
            raise TypeError(f"cluster must be an integer, got {cluster!r}")
        if cluster is not None and not 0 <= cluster < self.num_clusters:
            raise ValueError(f"cluster must be in [0, {self.num_clusters}), got {cluster}")
        return self._mean_image(self._draw_prior(n, self.means, generator, cluster))

    def _draw_prior(
        self, n: int, like: Tensor, generator: torch.Generator | None, cluster: int | None = None
    ) -> Tensor:
        if cluster is None:
            source = noise_source(self.means.device, generator)
            y = torch.randint(self.num_clusters, (n,), **source).to(self.means.device)
        else:
            y = torch.full((n,), int(cluster), device=self.means.device)
        return self.means[y] + self._normal((n,), self.means, generator)

    def _log_components(self, z: Tensor) -> Tensor:
        """log N(z; means_y, I), shape (..., K)."""
        # Differences, not |z|^2 - 2 z.m + |m|^2: no cancellation, and no product under autocast
        distance = (z.unsqueeze(-2) - self.means.to(z.dtype)).square().sum(-1)
        if self._may_read(distance) and not distance.isfinite().all():
            raise ValueError(
                f"means must be finite, and so near that squared distances to z are finite in "
                f"{distance.dtype}; the largest is {self.means.abs().max().item():.4g}"
            )
        return -0.5 * (distance + self.latent_dim * math.log(2 * math.pi))


def cluster_accuracy(labels: Any, clusters: Any) -> float:
    """The best accuracy of a one-to-one naming of clusters by labels (Hungarian matching).

    max over injections s of mean_i [s(cluster_i) = label_i]; a cluster left unnamed is wrong.

    Args:
        labels: (N,) the truth: integers, bools or strings, whatever their values.
        clusters: (N,) the assignment, likewise; it may hold more or fewer different values.

    Raises:
        ValueError: if the shapes differ, are not (N,), or N = 0, or for values of other kinds.
        ImportError: if scipy is missing.

    Source: chapter ``vae_clustering``, eq-vae-clustering-accuracy.

    >>> cluster_accuracy([0, 0, 1, 1, 1], [7, 7, 3, 3, 7])
    0.8
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("cluster_accuracy needs scipy: pip install scipy") from error
    table = _contingency(labels, clusters)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / table.sum())


def purity(labels: Any, clusters: Any) -> float:
    """The accuracy if each cluster takes the name of its most frequent label.

    1/N sum_k max_j |cluster k and label j|: at least ``cluster_accuracy``, and 1 when every example
    is its own cluster.

    Arguments and errors as ``cluster_accuracy``, without scipy.

    Source: chapter ``vae_clustering``, eq-vae-clustering-purity.

    >>> purity([0, 0, 1, 1, 1], [7, 7, 3, 4, 7])
    0.8
    """
    table = _contingency(labels, clusters)
    return float(table.max(0).sum() / table.sum())


def _contingency(labels: Any, clusters: Any) -> np.ndarray:
    """How often each label (row) meets each cluster (column)."""
    rows, columns = _numbered(labels, "labels"), _numbered(clusters, "clusters")
    if len(rows) != len(columns):
        raise ValueError(
            f"labels and clusters must have the same length, got {len(rows)} and {len(columns)}"
        )
    table = np.zeros((rows.max() + 1, columns.max() + 1), dtype=np.int64)
    np.add.at(table, (rows, columns), 1)
    return table


def _numbered(values: Any, name: str) -> np.ndarray:
    """``values`` (N,) as numbers from 0, equal where they are equal."""
    if isinstance(values, Tensor):
        values = values.tolist()
    array = np.asarray(values)
    if array.dtype.kind in "OT":  # pandas keeps strings as objects
        array = np.asarray(values := array.tolist())
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iubUS":
        raise ValueError(
            f"{name} must be integers of shape (N,), N >= 1, or bools or strings, "
            f"got {array.dtype} of shape {array.shape}"
        )
    # NumPy takes 1 for the string "1", and a missing value for "nan"
    word = {"U": str, "S": bytes}.get(array.dtype.kind, object)
    if not all(isinstance(value, word) for value in values):
        raise ValueError(f"{name} must be all integers or all strings, got both")
    return np.unique(array, return_inverse=True)[1]
