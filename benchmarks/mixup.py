"""mixup against timm's algorithm and the plain expression, soft labels included.

    python benchmarks/mixup.py [--rounds N] [--threads N]

timm needs torchvision to be imported, so its batch mode is written here after its description:
the reversed batch, scaled, added to the scaled batch in place, and smoothed one-hot labels of both
sides. Its element mode, which gives every example a lambda of its own, is a loop over examples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from _timing import arguments, interleave, median_ms, print_table, ratio
from torch import Tensor

from lib.mixup import mixup

Random = np.random.RandomState  # what timm draws from
PEER, PEER_EACH = "timm, in place", "timm, a lambda each"
PLAIN = "lam * x + (1 - lam) * x[perm]"
BARE = "one lerp, nothing else"


def smooth_one_hot(y: Tensor, classes: int, smoothing: float = 0.1) -> Tensor:
    """One-hot labels (B, C) with the smoothing's share spread over all classes."""
    off = smoothing / classes
    return torch.full((len(y), classes), off).scatter_(1, y[:, None], 1 - smoothing + off)


def mixed_labels(y: Tensor, share: float | Tensor, classes: int) -> Tensor:
    """Both sides made dense, the other one in reversed order, and blended."""
    own, other = smooth_one_hot(y, classes), smooth_one_hot(y.flip(0), classes)
    return own * share + other * (1 - share)


def timm_batch(x: Tensor, y: Tensor, classes: int, random: Random) -> tuple[Tensor, Tensor]:
    """One lambda for the batch: a flipped copy, then three passes over memory; x is overwritten."""
    share = float(random.beta(1.0, 1.0))
    flipped = x.flip(0).mul_(1.0 - share)
    x.mul_(share).add_(flipped)
    return x, mixed_labels(y, share, classes)


def timm_each(x: Tensor, y: Tensor, classes: int, random: Random) -> tuple[Tensor, Tensor]:
    """A lambda for every example, one example after the other; x is overwritten."""
    shares = random.beta(1.0, 1.0, size=len(x)).astype(np.float32)
    original = x.clone()
    for i, share in enumerate(shares):
        x[i] = x[i] * float(share) + original[len(x) - i - 1] * (1 - float(share))
    return x, mixed_labels(y, torch.from_numpy(shares)[:, None], classes)


def plain(x: Tensor, y: Tensor, classes: int, random: Random) -> tuple[Tensor, Tensor]:
    """What papers print."""
    share, perm = float(random.beta(1.0, 1.0)), torch.randperm(len(x))
    dense = smooth_one_hot(y, classes)
    return share * x + (1 - share) * x[perm], share * dense + (1 - share) * dense[perm]


def bare(x: Tensor, out: Tensor) -> None:
    """The arithmetic of pairing by halves without draws, checks and labels: a bound."""
    pair = 2, len(x) // 2, *x.shape[1:]
    a, b = x.view(pair)
    shares = torch.tensor([0.3, 0.7]).view(2, *[1] * x.ndim)
    torch.lerp(b.expand(pair), a.expand(pair), shares, out=out.view(pair))


def rivals(x: Tensor, y: Tensor, classes: int) -> dict[str, Callable[[], object]]:
    """Name -> a call that mixes a batch of images and its labels."""
    random = Random(0)
    generator = torch.Generator().manual_seed(0)
    theirs, each, ours, buffer = x.clone(), x.clone(), x.clone(), torch.empty_like(x)

    def call(pairing: str, out: Tensor | None = None, per_sample: bool = False) -> Callable:
        given = ours if out is ours else x
        options = {"pairing": pairing, "per_sample": per_sample, "out": out}
        return lambda: mixup(given, y, num_classes=classes, generator=generator, **options)

    return {
        PEER: lambda: timm_batch(theirs, y, classes, random),
        PEER_EACH: lambda: timm_each(each, y, classes, random),
        PLAIN: lambda: plain(x, y, classes, random),
        BARE: lambda: bare(x, buffer),
        "halves, new tensor": call("halves"),
        "halves, reused buffer": call("halves", buffer),
        "halves, in place": call("halves", ours),
        "halves, a lambda each": call("halves", buffer, per_sample=True),
        "random, new tensor": call("random"),
        "random, reused buffer": call("random", buffer),
    }


def compare(shape: tuple[int, ...], classes: int, targets: dict[str, float], rounds: int) -> None:
    """Print one table for images of one shape."""
    y = torch.randint(classes, (shape[0],), generator=torch.Generator().manual_seed(1))
    # many short rounds: a few disturbed ones do not move their median
    times = interleave(rivals(torch.rand(shape), y, classes), rounds, seconds=0.02)
    rows = [
        [name, median_ms(times[name]), ratio(times, PEER, name), targets.get(name)]
        for name in times
    ]
    megabytes = 4 * torch.Size(shape).numel() / 1e6
    print_table(
        f"{shape}, {megabytes:.0f} MB, {classes} classes",
        ["mixing", "ms", "x timm", "target"],
        rows,
    )
    price = ratio(times, "halves, a lambda each", "halves, reused buffer")
    each = ratio(times, PEER_EACH, "halves, a lambda each")
    print(f"a lambda each costs {price:.2f} times one lambda (target 1); {each:.0f} x timm's")


def main() -> None:
    """Print all tables."""
    options = arguments(__doc__ or "", rounds=21)
    torch.manual_seed(0)
    # as a training program does: from then on glibc keeps up to twice as much of what is freed,
    # and new tensors of 3 MB do not pay page faults
    torch.empty(31 << 20, dtype=torch.uint8)
    small = {"halves, new tensor": 3.0, "halves, reused buffer": 3.0, "random, new tensor": 2.0}
    large = {"halves, reused buffer": 4.0, "halves, in place": 6.0}
    compare((256, 3, 32, 32), 10, small, options.rounds)
    compare((256, 3, 224, 224), 1000, large, options.rounds)


if __name__ == "__main__":
    main()
