"""What chapter ``vae_clustering`` trains: the essay's convolutions, and small models together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import avg_pool2d

from lib.training import fit
from lib.vae_clustering import ClusterVAE, cluster_accuracy, purity

if TYPE_CHECKING:
    from lib.data import Dataset

__all__ = ["Halves", "Pictures", "essay_model", "pictures", "scores", "train_together"]

Pictures = dict[str, tuple[Tensor, Tensor]]  # split -> images (N, D) in [0, 1], labels (N,)


class Halves(nn.Sequential):
    """Layers whose output is split into mean and log-variance."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` through all layers, then the two halves of the last axis."""
        mean, log_var = super().forward(x).chunk(2, -1)
        return mean, log_var


def essay_model(**options: Any) -> ClusterVAE:
    """The essay's model: four convolutions and their mirror image, 20 latent units, 10 clusters.

    A reconstruction weight of 2.5 is a variance of 0.4.
    """

    def leaky(layer: nn.Module) -> list[nn.Module]:
        return [layer, nn.LeakyReLU(0.2)]

    same: dict[str, Any] = {"kernel_size": 3, "padding": 1}
    half, double = same | {"stride": 2}, same | {"stride": 2, "output_padding": 1}
    encoder = Halves(
        *leaky(nn.Conv2d(1, 32, **half)),
        *leaky(nn.Conv2d(32, 32, **same)),
        *leaky(nn.Conv2d(32, 64, **half)),
        *leaky(nn.Conv2d(64, 64, **same)),
        *(nn.Flatten(), nn.Linear(64 * 7 * 7, 2 * 20)),
    )
    decoder = nn.Sequential(
        *(nn.Linear(20, 64 * 7 * 7), nn.Unflatten(1, (64, 7, 7))),
        *leaky(nn.ConvTranspose2d(64, 64, **same)),
        *leaky(nn.ConvTranspose2d(64, 64, **double)),
        *leaky(nn.ConvTranspose2d(64, 32, **same)),
        *leaky(nn.ConvTranspose2d(32, 32, **double)),
        *(nn.ConvTranspose2d(32, 1, **same), nn.Sigmoid()),
    )
    return ClusterVAE(encoder, decoder, 20, 10, variance=0.4, **options)


def pictures(data: Dataset, num_train: int, num_test: int) -> Pictures:
    """The first pictures of both splits, 14x14 by averaging blocks of four pixels, and labels."""
    chosen = {}
    for split, size in (("train", num_train), ("test", num_test)):
        images, labels = data[split]
        large = torch.tensor(images[:size])[:, None].float() / 255  # (N, 1, 28, 28)
        chosen[split] = avg_pool2d(large, 2).flatten(1), torch.tensor(labels[:size])
    return chosen


def train_together(
    models: Sequence[nn.Module],
    loss: Callable[[nn.Module, Tensor], Tensor],
    x: Tensor,
    *,
    steps: int,
    batch_size: int = 100,
    learning_rate: float = 0.01,
    seed: int = 0,
    description: str = "training",
) -> None:
    """Train models of one architecture side by side, by Adam, each on its own order of ``x``.

    Equal layers become one batched product, which costs less than one model after the other.

    Args:
        models: changed in place.
        loss: maps a model and a batch to a scalar, without branching on values (vmap).
        x: (N, D).
        steps: batches, rounded up to whole passes over ``x``.
        batch_size: examples per model and step.
        learning_rate: of Adam.
        seed: of orders and noise.
        description: text before the progress bar.
    """
    parameters, buffers = stack_module_state(list(models))
    caller = _Caller(models[0], loss)

    def one(state: dict[str, Tensor], batch: Tensor) -> Tensor:
        return functional_call(caller, {f"model.{k}": v for k, v in state.items()}, (batch,))

    every = vmap(one, randomness="different")
    torch.manual_seed(seed)
    orders = torch.stack([torch.randperm(len(x)) for _ in models], 1)  # (N, S)
    fit(
        lambda rows: every({**parameters, **buffers}, x[rows.T]).sum(),
        torch.optim.Adam(parameters.values(), lr=learning_rate, fused=True),
        [orders],
        epochs=-(-steps * batch_size // len(x)),
        batch_size=batch_size,
        description=description,
    )
    for i, model in enumerate(models):
        model.load_state_dict({k: v[i].detach() for k, v in parameters.items()}, strict=False)


class _Caller(nn.Module):
    """The loss as a forward pass, so that ``functional_call`` can change the model's parameters."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.model, x)


def scores(labels: Tensor, clusters: Tensor) -> dict[str, float]:
    """Purity, accuracy, NMI and ARI of an assignment, and the number of clusters in use."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    return {
        "purity": purity(labels, clusters),
        "accuracy": cluster_accuracy(labels, clusters),
        "NMI": float(normalized_mutual_info_score(labels, clusters)),
        "ARI": float(adjusted_rand_score(labels, clusters)),
        "clusters": len(clusters.unique()),
    }
