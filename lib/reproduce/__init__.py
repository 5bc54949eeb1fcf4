"""Full-size experiments: ``python -m lib.reproduce <stem>`` runs one, its chapter reads the result.

A run survives a kill: every epoch ends with a checkpoint that replaces the last one atomically,
and the same command goes on from there, to the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lib._common import check_positive
from lib.training import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_fabric import Fabric

__all__ = ["environment", "full_result", "save_result", "train"]

RESULTS = Path(__file__).resolve().parents[2] / "results"


def full_result(stem: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The stored full-size result of a chapter, or None where there is none or but a trial.

    >>> full_result("no-such-stem") is None
    True
    """
    path = folder / f"{stem}.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    trial = result.get("protocol", {}).get("full") is False
    return None if trial else result


def save_result(stem: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``result`` to ``<folder>/<stem>.json``, replacing an older one in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    text = json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    _replace(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
    return path


def environment(fabric: Fabric) -> dict[str, Any]:
    """What a number depends on besides the seed: torch, the kind of device, how many, threads."""
    return {
        "torch": torch.__version__,
        "device": fabric.device.type,
        "processes": fabric.world_size,
        "threads": torch.get_num_threads(),
    }


def train(
    fabric: Fabric,
    name: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Sequence[Tensor],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    folder: Path,
    lengths: Tensor | None = None,
) -> dict[str, Any]:
    """Minimise the mean of ``module(*batch)``, the losses (B,) of a batch, over ``data``.

    Each global batch is split over the processes, so the numbers depend on their count only
    through the order of summation. Order and noise of an epoch depend on seed and epoch alone:
    a run resumed from its checkpoint ``<folder>/<name>-<settings>.pt`` repeats the uninterrupted
    one. The settings in that name are a digest of model, optimizer, data and numbers: a run with
    others, as a trial on a few examples, starts afresh and leaves the checkpoint to its own.
    With ``lengths`` (N,), batches hold examples of like length, which saves padding.

    Returns:
        ``losses``, the mean loss of each epoch, and ``seconds``, the time spent training.
    """
    check_positive(epochs, "epochs")
    check_positive(batch_size, "batch_size")
    numbers = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
    tensors = [*data] if lengths is None else [*data, lengths]
    path = folder / f"{name}-{_digest(module, optimizer, numbers, tensors=tensors)}.pt"
    model, optimizer = fabric.setup(module, optimizer)
    state: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "losses": [],
        "seconds": 0.0,
    }
    if path.exists():
        fabric.load(path, state)
    rank, world = fabric.global_rank, fabric.world_size
    for epoch in range(len(state["losses"]), epochs):
        started, total = time.perf_counter(), 0.0
        torch.manual_seed(hash((seed, epoch, rank)) % 2**31)
        order = _batches(len(data[0]), batch_size, hash((seed, epoch)) % 2**31, lengths)
        steps = [rows for rows in order if len(rows) >= world]
        for rows in progress(steps, f"{name}, epoch {epoch + 1} of {epochs}"):
            batch = [tensor[rows[rank::world]].to(fabric.device) for tensor in data]
            optimizer.zero_grad()
            # the mean over processes of these is the mean over the global batch
            loss = model(*batch).sum() * (world / len(rows))
            fabric.backward(loss)
            optimizer.step()
            total += loss.item() * len(rows)
        everywhere = torch.as_tensor(fabric.all_gather(torch.tensor(total, dtype=torch.float64)))
        mean = everywhere.mean().item() / sum(map(len, steps))
        if not math.isfinite(mean):
            raise FloatingPointError(f"{name}: the loss is {mean} in epoch {epoch + 1}")
        state["losses"].append(mean)
        state["seconds"] += time.perf_counter() - started
        _replace(path, lambda unfinished: fabric.save(unfinished, state), fabric)
        fabric.print(f"{name}: epoch {epoch + 1} of {epochs}, loss {state['losses'][-1]:.4f}")
    return {"losses": state["losses"], "seconds": state["seconds"]}


def _digest(*settings: object, tensors: Sequence[Tensor]) -> str:
    """Twelve hexadecimal digits that tell apart settings, as printed, and contents of tensors."""
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tensor.shape)).encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def _batches(size: int, batch_size: int, seed: int, lengths: Tensor | None) -> list[Tensor]:
    """A random order of all rows in batches; with ``lengths``, sorted within 50 batches first."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator)
    if lengths is None:
        return list(order.split(batch_size))
    batches = [
        rows
        for pool in order.split(50 * batch_size)
        for rows in pool[lengths[pool].argsort()].split(batch_size)
    ]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def _replace(path: Path, write: Callable[[Path], Any], fabric: Fabric | None = None) -> None:
    """Let ``write`` fill a file beside ``path``, then put it there: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(path.suffix + ".unfinished")
    write(unfinished)
    if fabric is None or fabric.is_global_zero:
        os.replace(unfinished, path)
    if fabric is not None:
        fabric.barrier()
