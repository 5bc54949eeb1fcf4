"""One short training loop, the choice of the device, seeding, and progress bars that stay quiet."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lib._common import check_positive

__all__ = ["batches", "choose_device", "fit", "mean_std", "progress", "seed_everything"]


def choose_device() -> torch.device:
    """The first CUDA or MPS device if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def seed_everything(seed: int) -> torch.Generator:
    """Seed Python, NumPy and torch, and return a CPU generator with the same seed.

    Raises:
        ValueError: if ``seed`` is negative or has more than 32 bits, which NumPy cannot take.

    >>> generator = seed_everything(7)
    >>> torch.rand(1, generator=generator).equal(torch.rand(1))
    True
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), got {seed}")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries that still draw from the global state
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def progress(iterable: Iterable, description: str = "", *, total: int | None = None) -> Iterable:
    """A progress bar that vanishes when it is done; without tqdm the iterable itself.

    It is written to standard error, which the book does not print.
    """
    try:
        from tqdm.auto import tqdm
        from tqdm.std import tqdm as plain
    except ImportError:
        return iterable
    import importlib.util

    bar = tqdm if importlib.util.find_spec("ipywidgets") else plain
    return bar(iterable, desc=description, total=total, leave=False)


def batches(
    *tensors: Tensor,
    batch_size: int,
    shuffle: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield aligned slices of ``tensors`` (N, ...) on ``device``, the last one possibly smaller.

    Raises:
        ValueError: if ``batch_size`` or N is below 1, or the tensors have not the same N.

    >>> [len(x) for (x,) in batches(torch.arange(5), batch_size=2, shuffle=False)]
    [2, 2, 1]
    """
    check_positive(batch_size, "batch_size")
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) != 1:
        raise ValueError(f"tensors must have the same first dimension, got {sorted(sizes)}")
    n = sizes.pop()
    if n == 0:
        raise ValueError("tensors must hold at least one example, got none")
    order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
    for rows in order.split(batch_size):
        yield tuple(tensor[rows].to(device) for tensor in tensors)


def fit(
    loss: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    data: Sequence[Tensor],
    *,
    epochs: int,
    batch_size: int,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
    description: str = "training",
    after_epoch: Callable[[int], None] | None = None,
) -> list[float]:
    """Minimise ``loss(*batch)`` and return its mean per epoch.

    Args:
        loss: maps a batch, one tensor per tensor of ``data``, to a scalar.
        optimizer: holds the parameters.
        data: tensors with the same first dimension.
        epochs: passes over the data.
        batch_size: examples per step.
        generator: source of the shuffling.
        device: where the batches go.
        description: text before the progress bar.
        after_epoch: called with the number of the epoch just finished, from 0.

    Raises:
        FloatingPointError: before the step with a loss that is not finite, naming epoch and step.
        ValueError: if ``epochs`` is below 1, the loss is not a scalar, or as in ``batches``.

    >>> weight = torch.zeros(1, requires_grad=True)
    >>> x = torch.linspace(-1, 1, 64)
    >>> history = fit(lambda x: (weight * x - 2 * x).square().mean(),
    ...               torch.optim.SGD([weight], lr=0.5), [x], epochs=20, batch_size=16)
    >>> round(weight.item(), 3)
    2.0
    """
    check_positive(epochs, "epochs")
    history = []
    for epoch in progress(range(epochs), description):
        total = torch.zeros((), dtype=torch.float64)
        for step, batch in enumerate(
            batches(*data, batch_size=batch_size, generator=generator, device=device)
        ):
            optimizer.zero_grad(set_to_none=True)
            value = loss(*batch)
            if value.numel() != 1:
                raise ValueError(f"loss must return a scalar, got shape {tuple(value.shape)}")
            if not torch.isfinite(value):
                raise FloatingPointError(f"loss is {value.item()} at epoch {epoch}, step {step}")
            value.backward()
            optimizer.step()
            total += value.item() * len(batch[0])
        history.append(total.item() / len(data[0]))
        if after_epoch is not None:
            after_epoch(epoch)
    return history


def mean_std(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) of at least two numbers.

    >>> mean_std([1.0, 2.0, 3.0])
    (2.0, 1.0)
    """
    array = np.asarray(list(values), dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"values must be at least two numbers, got shape {array.shape}")
    return float(array.mean()), float(array.std(ddof=1))
