"""Time and memory of the margin head against pytorch-metric-learning and against plain torch.

Run with ``python benchmarks/margin.py``; about a minute. A step is the loss and its gradient by
features and centres; memory is what one step adds to the resident set at its peak, in a fresh
process.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from _timing import arguments, interleave, median_ms, print_table, ratio
from pytorch_metric_learning.losses import ArcFaceLoss, CosFaceLoss
from torch import Tensor, nn

from lib.margin import MarginHead, SentenceEncoder, am_softmax_loss

BATCH, DIM, LENGTH = 256, 128, 32
PEER = "PML CosFaceLoss"
TARGETS = {  # class count -> what the fused head must reach, as a multiple of the peer's speed
    10_000: {"MarginHead": 1.6},
    90_000: {"MarginHead": 2.5, "MarginHead, class chunks": 2.5},
}
MEMORY_TARGETS = {"MarginHead": 0.65, "MarginHead, class chunks": 0.3}


class PlainHead(nn.Module):
    """The loss as one would write it: normalise, multiply, hand the cosines over."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, DIM))

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        """The mean loss of features (B, D)."""
        cosine = F.normalize(x, dim=1) @ F.normalize(self.weight, dim=1).t()
        return am_softmax_loss(cosine, target)


def rivals(num_classes: int) -> dict[str, Callable[[], nn.Module]]:
    """Name -> what builds the head."""
    return {
        PEER: lambda: CosFaceLoss(num_classes, DIM, margin=0.35, scale=30),
        "PML ArcFaceLoss": lambda: ArcFaceLoss(num_classes, DIM, scale=30),
        "am_softmax_loss": lambda: PlainHead(num_classes),
        "MarginHead": lambda: MarginHead(DIM, num_classes),
        "MarginHead, class chunks": lambda: MarginHead(DIM, num_classes, class_chunk=2048),
    }


def loss_of(head: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The peer's heads are called, ours have a method."""
    return getattr(head, "loss", head)


def stepper(head: nn.Module, num_classes: int) -> Callable[[], None]:
    """A call that makes the loss and all its gradients, from none."""
    x, target = torch.randn(BATCH, DIM, requires_grad=True), torch.randint(num_classes, (BATCH,))
    inputs, loss = [x, *head.parameters()], loss_of(head)
    return lambda: torch.autograd.grad(loss(x, target), inputs) and None


def peak_megabytes(name: str, num_classes: int) -> float:
    """What one step adds to the resident set at its peak; to be called in a fresh process."""
    stepper(rivals(100)[name](), 100)()  # libraries and threads are not the step's
    step = stepper(rivals(num_classes)[name](), num_classes)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    step()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """A figure of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def in_a_fresh_process(name: str, num_classes: int) -> float:
    """`peak_megabytes`, where nothing has been allocated before."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(peak_megabytes, name, num_classes).result()


def losses_table(num_classes: int, rounds: int) -> None:
    """Speed at a number of classes, and memory where it is large."""
    calls = {name: stepper(make(), num_classes) for name, make in rivals(num_classes).items()}
    times = interleave(calls, rounds, warmup=1)
    del calls
    peaks: dict[str, float] = {}
    if num_classes in TARGETS and num_classes > 50_000 and Path("/proc/self/clear_refs").exists():
        peaks = {name: in_a_fresh_process(name, num_classes) for name in (PEER, *MEMORY_TARGETS)}
    rows = []
    for name in times:
        share = peaks[name] / peaks[PEER] if name in peaks else None
        target = TARGETS[num_classes].get(name)
        ceiling = MEMORY_TARGETS.get(name) if peaks else None
        speed = ratio(times, PEER, name)
        rows.append([name, median_ms(times[name]), speed, target, peaks.get(name), share, ceiling])
    header = ["loss and gradient", "ms", "speed", "target", "peak MB", "of PML", "at most"]
    print_table(f"B={BATCH}, D={DIM}, C={num_classes:,}", header, rows)


def step_table(num_classes: int, target: float, rounds: int) -> None:
    """A whole training step of the essay's model: embedding, GRU, head, Adam."""
    batch = 100
    ids = torch.randint(1, 5000, (batch, LENGTH))
    classes = torch.randint(num_classes, (batch,))

    def trainer(head: nn.Module, **adam: bool) -> Callable[[], None]:
        encoder = SentenceEncoder(5000)
        parameters = [*encoder.parameters(), *head.parameters()]
        optimizer = torch.optim.Adam(parameters, **adam)

        def step() -> None:
            optimizer.zero_grad()
            loss_of(head)(encoder(ids), classes).backward()
            optimizer.step()

        return step

    make = rivals(num_classes)
    calls = {
        PEER: trainer(make[PEER]()),
        f"{PEER}, fused Adam": trainer(make[PEER](), fused=True),
        "MarginHead, fused Adam": trainer(make["MarginHead"](), fused=True),
    }
    times = interleave(calls, rounds, warmup=1)
    rows = [
        [
            name,
            median_ms(times[name]),
            ratio(times, PEER, name),
            target if name.startswith("MarginHead") else None,
            1e3 * batch / median_ms(times[name]),
        ]
        for name in times
    ]
    header = ["training step", "ms", "speed", "target", "sentences/s"]
    print_table(f"GRU encoder and head, B={batch}, T={LENGTH}, C={num_classes:,}", header, rows)


def main() -> None:
    """Print all tables."""
    options = arguments(__doc__ or "", rounds=3)
    torch.manual_seed(0)
    for num_classes in TARGETS:
        losses_table(num_classes, options.rounds)
    for num_classes, target in ((30_000, 1.7), (90_000, 2.3)):
        step_table(num_classes, target, options.rounds)


if __name__ == "__main__":
    main()
