"""Mixing in a DataLoader, each worker with draws of its own."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from lib.mixup._transforms import mixup

__all__ = ["MixupCollate"]

# A worker's torch generator is seeded by the loader too: ours must not repeat its numbers
_OWN_STREAM = 0x5693


class MixupCollate:
    """Collate the samples of a DataLoader into a batch and mix it.

    In a worker process the draws come from a generator of its own, seeded by the seed that the
    loader gives this worker: workers draw differently, every epoch anew, and all is repeated where
    the loader's own ``generator`` is seeded alike.

    Args:
        num_classes: C, for integer classes.
        transform: ``mixup``, ``cutmix``, ``sample_pairing``, or a function with their signature.
        generator: source of the draws in the main process, where there are no workers.
        collate: makes the batch (x, y) from a list of samples.
        **options: passed on to ``transform``, such as ``alpha=0.2`` or ``pairing="halves"``.

    Raises:
        ValueError: when called, if the samples do not collate to a pair (x, y); in a worker, if
            there is a buffer ``out``, which its next batch would overwrite before this one is read.

    >>> data = [(torch.full((3,), float(i)), i % 2) for i in range(8)]
    >>> loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=MixupCollate(2))
    >>> [soft.shape for _, soft in loader]
    [torch.Size([4, 2]), torch.Size([4, 2])]
    """

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        transform: Callable[..., tuple[Tensor, Tensor]] = mixup,
        generator: torch.Generator | None = None,
        collate: Callable[[list[Any]], Any] = default_collate,
        **options: Any,
    ) -> None:
        if num_classes is not None:
            options["num_classes"] = num_classes
        self.transform, self.generator, self.collate = transform, generator, collate
        self.options = options
        self._worker: tuple[int, torch.Generator] | None = None

    def __call__(self, samples: list[Any]) -> tuple[Tensor, Tensor]:
        batch = self.collate(samples)
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            seen = type(batch).__name__
            seen += f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
            raise ValueError(f"samples must collate to a pair (x, y), got {seen}")
        return self.transform(*batch, generator=self._own_generator(), **self.options)

    def __getstate__(self) -> dict[str, Any]:
        # A worker has no use for it, and torch cannot hand one to a process while it spawns it
        spawning = get_spawning_popen() is not None
        return self.__dict__ | ({"generator": None} if spawning else {})

    def _own_generator(self) -> torch.Generator | None:
        info = get_worker_info()
        if info is None:
            return self.generator
        if self.options.get("out") is not None:
            raise ValueError("out must be None in a worker process, got a tensor")
        # A copy of the parent's generator would draw the same numbers in every worker
        if self._worker is None or self._worker[0] != info.seed:
            self._worker = info.seed, torch.Generator().manual_seed(info.seed ^ _OWN_STREAM)
        return self._worker[1]
