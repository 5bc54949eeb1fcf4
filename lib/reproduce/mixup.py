"""Many small networks trained side by side, one for each way of mixing and each seed.

Chapter ``mixup`` compares nine ways over five seeds; as one batched product for all 45 the
comparison costs half a minute on one thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from lib.training import progress

__all__ = ["Networks", "calibration_error", "gradient", "probabilities", "soft_loss", "train"]

# changes a batch: x (B, D), y (B, C), generator, epoch -> x, y
Recipe = Callable[[Tensor, Tensor, torch.Generator, int], tuple[Tensor, Tensor]]


class Networks(nn.Module):
    """M perceptrons of one shape with ReLU: x (M, B, D) -> scores (M, B, C), or x (B, D) for all.

    Network ``m * seeds + s`` starts from the weights of seed s, whatever m: He's initial values,
    half of them in the last layer.
    """

    def __init__(
        self, methods: int, seeds: int, sizes: Sequence[int], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        last = len(sizes) - 2
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            scale = (2 / inputs) ** 0.5 * (0.5 if layer == last else 1)
            weight = scale * torch.randn(seeds, inputs, outputs, generator=generator)
            self.weights.append(weight.repeat(methods, 1, 1))
            self.biases.append(torch.zeros(methods * seeds, 1, outputs))

    def forward(self, x: Tensor, before: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """``before(layer, h)`` may change what enters each layer."""
        if x.ndim == 2:
            x = x.expand(len(self.weights[0]), *x.shape)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.relu(x) if layer else x
            x = before(layer, x) if before else x
            x = torch.baddbmm(bias, x, weight)
        return x


def soft_loss(scores: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with soft labels (M, B, C), the mean over B, the sum over networks."""
    return -(y * log_softmax(scores, -1)).sum(-1).mean(1).sum()


def train(
    recipes: Mapping[str, Recipe],
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    manifold: Collection[str] = (),
    hidden: Sequence[int] = (128, 128),
    batch_size: int = 100,
    lr: float = 2e-3,
    loss: Callable[[Tensor, Tensor], Tensor] = soft_loss,
    after_epoch: Callable[[int, Networks], None] | None = None,
) -> Networks:
    """Train one network for each recipe and each seed, all at once.

    Every network of a seed sees the same batches in the same order and draws from a generator of
    its own, so that a recipe's numbers do not depend on the company it keeps. Adam with a learning
    rate that rises for a tenth of the steps and falls to zero.

    Args:
        recipes: name -> what changes a batch before the loss is taken.
        x: (S, N, D), the training inputs of each seed.
        y: (S, N, C), one-hot labels or targets.
        epochs: passes over N.
        manifold: names whose recipe is applied before a layer drawn anew for each batch.
        hidden: widths of the hidden layers.
        batch_size: examples per step.
        lr: the highest learning rate.
        loss: of scores and labels (M, B, C), summed over M.
        after_epoch: called with the number of the epoch just finished, from 0, and the networks.

    Returns:
        The networks, recipe by recipe, each with its seeds in order.
    """
    seeds, n = x.shape[:2]
    sizes = [x.shape[2], *hidden, y.shape[2]]
    order = torch.Generator().manual_seed(0)
    networks = Networks(len(recipes), seeds, sizes, order)
    draws = [torch.Generator().manual_seed(1000 + s) for _ in recipes for s in range(seeds)]
    steps = n // batch_size * epochs
    adam = torch.optim.Adam(networks.parameters(), lr=lr, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, lr, steps, pct_start=0.1, cycle_momentum=False)
    for epoch in progress(range(epochs), f"{len(draws)} networks"):
        shuffled = torch.stack([torch.randperm(n, generator=order) for _ in range(seeds)])
        for rows in shuffled[:, : n - n % batch_size].split(batch_size, 1):
            batch = [t.gather(1, rows[..., None].expand(-1, -1, t.shape[2])) for t in (x, y)]
            scores, labels = _forward(networks, recipes, manifold, batch, draws, epoch)
            adam.zero_grad(set_to_none=True)
            loss(scores, labels).backward()
            adam.step()
            rate.step()
        if after_epoch is not None:
            after_epoch(epoch, networks)
    return networks.requires_grad_(False)


def _forward(
    networks: Networks,
    recipes: Mapping[str, Recipe],
    manifold: Collection[str],
    batch: Sequence[Tensor],
    draws: Sequence[torch.Generator],
    epoch: int,
) -> tuple[Tensor, Tensor]:
    """Scores and labels (M, B, C) of one batch, changed by each network's recipe."""
    seeds = len(batch[0])
    inputs, labels, deep = [], [], {}
    for m, (name, recipe) in enumerate(recipes.items()):
        first = draws[m * seeds]
        layers = len(networks.weights) if name in manifold else 1
        layer = int(torch.randint(layers, (1,), generator=first)) if layers > 1 else 0
        if layer:
            deep[m * seeds] = layer, recipe
        for s, (x, y) in enumerate(zip(*batch, strict=True)):
            if not layer:
                x, y = recipe(x, y, draws[m * seeds + s], epoch)
            inputs.append(x)
            labels.append(y)

    def before(layer: int, h: Tensor) -> Tensor:
        for start, (where, recipe) in deep.items():
            if where == layer:
                rows = range(start, start + seeds)
                mixed = [recipe(h[i], labels[i], draws[i], epoch) for i in rows]
                h = torch.cat([h[:start], torch.stack([x for x, _ in mixed]), h[start + seeds :]])
                labels[start : start + seeds] = [y for _, y in mixed]
        return h

    scores = networks(torch.stack(inputs), before if deep else None)
    return scores, torch.stack(labels)


@torch.no_grad()
def probabilities(networks: Networks, x: Tensor, chunk: int = 500) -> Tensor:
    """Class probabilities (M, N, C) of inputs (N, D) that are the same for all, or (M, N, D)."""
    return torch.cat([networks(part).softmax(-1) for part in x.split(chunk, -2)], 1)


def calibration_error(p: Tensor, y: Tensor, bins: int = 15) -> Tensor:
    """The expected calibration error (M,) of probabilities (M, N, C) for classes (N,).

    Predictions are put into bins of equal width by their confidence; the error is the mean over
    predictions of |accuracy - mean confidence| in their bin.
    """
    confidence, guess = p.double().max(-1)
    into = (confidence * bins).long().clamp(max=bins - 1)
    surplus = torch.zeros(len(p), bins, dtype=torch.float64)
    surplus.scatter_add_(1, into, confidence - (guess == y).double())
    return surplus.abs().sum(1) / p.shape[1]


def gradient(networks: Networks, x: Tensor, y: Tensor) -> Tensor:
    """The gradient (M, N, D) of -log p_y at inputs (N, D) with classes (N,)."""
    x = x.expand(len(networks.weights[0]), *x.shape).clone().requires_grad_()
    log_p = networks(x).log_softmax(-1)
    own = log_p.gather(2, y.expand(len(log_p), -1)[..., None])
    return torch.autograd.grad(-own.sum(), x)[0]
