"""Training on mixtures of examples: mixup, SamplePairing, CutMix, and mixing in a DataLoader."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

__all__ = ["MixupCollate", "cutmix", "mixup", "sample_pairing"]

Pairing = Literal["random", "halves"]

# Bytes mixed at a time in place: large enough to hide a call's overhead, small enough for a cache
_CHUNK = 1 << 18


def mixup(
    x: Tensor,
    y: Tensor,
    *,
    alpha: float = 1.0,
    num_classes: int | None = None,
    pairing: Pairing = "random",
    per_sample: bool = False,
    out: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix every example with a partner, and its label in the same proportion.

    x'_i = lambda x_i + (1 - lambda) x_j,  y'_i = lambda y_i + (1 - lambda) y_j,
    lambda ~ Beta(alpha, alpha), j the partner of i. Soft labels go straight into
    ``torch.nn.functional.cross_entropy``.

    Args:
        x: (B, ...), floating point.
        y: (B,) integer classes, which need ``num_classes``; or (B, C) soft or multi-hot labels, or
            floating-point targets (B, ...), which mix as they are.
        alpha: of the Beta law; 1 is uniform, 0 leaves everything unmixed.
        num_classes: C, for integer classes.
        pairing: ``"random"`` draws a permutation; ``"halves"`` takes j = (i + B // 2) mod B, which
            is several times faster. Where the loader has shuffled the batch, i and j are two random
            examples either way (by halves never the same one). That is true of one call: a batch
            that is mixed twice by halves meets the same partners.
        per_sample: draw one lambda for each example instead of one for the batch.
        out: a tensor like ``x`` to write into; ``out=x`` mixes in place.
        generator: source of all draws, on its own device.

    Returns:
        The mixed x (B, ...), and the mixed labels, floating point: (B, C) from classes, else as y.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if sizes, classes or options make no sense, naming what was seen.

    Source: chapter ``mixup``, eq-mixup-definition; Zhang, Cisse, Dauphin and Lopez-Paz (2018).

    >>> x, y = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([0, 1, 0, 2])
    >>> generator = torch.Generator().manual_seed(0)
    >>> mixed, soft = mixup(x, y, num_classes=3, pairing="halves", generator=generator)
    >>> mixed.shape, soft.sum(1)
    (torch.Size([4, 1]), tensor([1., 1., 1., 1.]))
    """
    _check_batch(x, y, out)
    _check_labels(y, num_classes)
    weight = _draw_beta(alpha, len(x) if per_sample else 1, x, generator)
    partner = _partner(len(x), pairing, x.device, generator)
    labels = _mix_labels(y, num_classes, weight, partner, x.dtype)
    return _mix(x, weight, partner, out), labels


def sample_pairing(
    x: Tensor,
    y: Tensor,
    *,
    pairing: Pairing = "random",
    out: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Average every example with a partner and keep its own label: x'_i = (x_i + x_j) / 2.

    Arguments, errors and the mixed x as in ``mixup``; the labels come back as they are.

    Source: chapter ``mixup``, eq-mixup-sample-pairing; Inoue (2018).

    >>> sample_pairing(torch.tensor([[0.0], [4.0]]), torch.tensor([5, 6]), pairing="halves")
    (tensor([[2.],
            [2.]]), tensor([5, 6]))
    """
    _check_batch(x, y, out)
    return _mix(x, 0.5, _partner(len(x), pairing, x.device, generator), out), y


def cutmix(
    x: Tensor,
    y: Tensor,
    *,
    alpha: float = 1.0,
    num_classes: int | None = None,
    pairing: Pairing = "random",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Paste a box of the partner's image over every image; labels mix by the area that is left.

    The box has sides H sqrt(1 - lambda) and W sqrt(1 - lambda) about a uniform centre and is cut at
    the border; the labels use the share of the image that it leaves, not the lambda drawn.

    Args:
        x: images (B, ..., H, W).
        y, alpha, num_classes, pairing, generator: as in ``mixup``.

    Returns:
        New images like x, and the mixed labels as in ``mixup``.

    Source: chapter ``mixup``; Yun et al. (2019).

    >>> images = torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
    >>> mixed, soft = cutmix(images, torch.tensor([0, 1]), num_classes=2, pairing="halves")
    >>> torch.allclose(mixed.mean((1, 2, 3)), soft[:, 1])
    True
    """
    _check_batch(x, y, None)
    if x.ndim < 3:
        raise ValueError(f"x must be images (B, ..., H, W), got shape {tuple(x.shape)}")
    _check_labels(y, num_classes)
    drawn = float(_draw_beta(alpha, 1, x, generator))
    partner = _partner(len(x), pairing, x.device, generator)
    rows, columns = (_interval(size, drawn, generator) for size in x.shape[-2:])
    mixed = x.clone(memory_format=torch.contiguous_format)
    mixed[..., rows, columns] = x[..., rows, columns][partner]
    covered = (rows.stop - rows.start) * (columns.stop - columns.start)
    kept = 1 - covered / (x.shape[-2] * x.shape[-1])
    return mixed, _mix_labels(y, num_classes, kept, partner, x.dtype)


class MixupCollate:
    """Collate the samples of a DataLoader into a batch and mix it.

    Each worker draws from a generator of its own, seeded by the loader's seed for that worker; in
    the main process ``generator`` is used.

    Args:
        num_classes: C, for integer classes.
        transform: ``mixup``, ``cutmix``, ``sample_pairing``, or a function with their signature.
        generator: source of the draws in the main process.
        collate: makes the batch (x, y) from a list of samples.
        **options: passed on to ``transform``, such as ``alpha=0.2`` or ``pairing="halves"``.

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
            raise ValueError(f"samples must collate to a pair (x, y), got {type(batch).__name__}")
        return self.transform(*batch, generator=self._own_generator(), **self.options)

    def _own_generator(self) -> torch.Generator | None:
        info = get_worker_info()
        if info is None:
            return self.generator
        # A copy of the parent's generator would draw the same numbers in every worker
        if self._worker is None or self._worker[0] != info.seed:
            self._worker = info.seed, torch.Generator().manual_seed(info.seed)
        return self._worker[1]


def _check_batch(x: Tensor, y: Tensor, out: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.ndim < 1 or len(x) == 0:
        raise ValueError(f"x must hold at least one example (B, ...), got shape {tuple(x.shape)}")
    if y.ndim < 1 or len(y) != len(x):
        raise ValueError(f"y must have {len(x)} entries like x, got shape {tuple(y.shape)}")
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
        seen = f"{out.dtype} of shape {tuple(out.shape)}"
        raise ValueError(f"out must be {x.dtype} of shape {tuple(x.shape)} like x, got {seen}")


def _check_labels(y: Tensor, num_classes: int | None) -> None:
    if y.is_floating_point() or y.ndim > 1:
        return
    if num_classes is None:
        raise ValueError("num_classes must be given for integer labels of shape (B,)")
    low, high = (int(bound) for bound in y.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(f"y must hold classes in [0, {num_classes}), got {low} to {high}")


def _mix_labels(
    y: Tensor,
    num_classes: int | None,
    weight: float | Tensor,
    partner: Tensor | int,
    dtype: torch.dtype,
) -> Tensor:
    """Mixed labels: floating point as they are, classes and multi-hot in at least float32."""
    dtype = dtype if dtype == torch.float64 else torch.float32
    if y.is_floating_point() or y.ndim > 1:
        return _mix(y if y.is_floating_point() else y.to(dtype), weight, partner)
    own = y.long()
    other = own.roll(-partner) if isinstance(partner, int) else own[partner]
    share = torch.as_tensor(weight, dtype=dtype, device=y.device).expand(len(y))[:, None]
    soft = torch.zeros(len(y), num_classes or 0, dtype=dtype, device=y.device)
    return soft.scatter_(1, own[:, None], share).scatter_add_(1, other[:, None], 1 - share)


def _draw_beta(
    alpha: float, n: int, like: Tensor, generator: torch.Generator | None
) -> float | Tensor:
    """One draw of Beta(alpha, alpha) as a float, or n as a tensor on the device of ``like``."""
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be a finite number of at least 0, got {alpha}")
    if alpha == 0:
        return 1.0
    device = "cpu" if generator is None else generator.device
    if alpha == 1:
        drawn = torch.rand(n, dtype=torch.float64, device=device, generator=generator)
        return drawn.item() if n == 1 else drawn.to(like.device)
    shape = torch.full((2, n), alpha + 1.0, dtype=torch.float64, device=device)
    # Gamma(a) = Gamma(a + 1) U^(1/a), in logarithms: U^(1/a) underflows where a is small
    uniform = 1 - torch.rand(2, n, dtype=torch.float64, device=device, generator=generator)
    log_gamma = torch._standard_gamma(shape, generator=generator).log() + uniform.log() / alpha
    drawn = torch.sigmoid(log_gamma[0] - log_gamma[1])
    return drawn.item() if n == 1 else drawn.to(like.device)


def _partner(
    n: int, pairing: Pairing, device: torch.device, generator: torch.Generator | None
) -> Tensor | int:
    """The partners as an index (B,), or as a shift for pairing by halves."""
    if pairing == "halves":
        return n // 2
    if pairing == "random":
        own = device if generator is None else generator.device
        return torch.randperm(n, generator=generator, device=own).to(device)
    raise ValueError(f'pairing must be "random" or "halves", got {pairing!r}')


def _mix(
    x: Tensor, weight: float | Tensor, partner: Tensor | int, out: Tensor | None = None
) -> Tensor:
    """weight x + (1 - weight) x[partner]."""
    if isinstance(weight, Tensor):
        weight = weight.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    in_place = out is not None and out.data_ptr() == x.data_ptr()
    if isinstance(partner, Tensor):
        if out is None or in_place:
            mixed = x.index_select(0, partner).lerp_(x, weight)
            return mixed if out is None else out.copy_(mixed)
        return torch.index_select(x, 0, partner, out=out).lerp_(x, weight)
    if x.requires_grad and torch.is_grad_enabled():
        return torch.lerp(x.roll(-partner, 0), x, weight)
    if in_place:
        return _mix_halves_in_place(x, weight, partner)
    out = torch.empty_like(x) if out is None else out
    first, second = _rows(weight, 0, len(x) - partner), _rows(weight, len(x) - partner, len(x))
    torch.lerp(x[partner:], x[: len(x) - partner], first, out=out[: len(x) - partner])
    torch.lerp(x[:partner], x[len(x) - partner :], second, out=out[len(x) - partner :])
    return out


def _mix_halves_in_place(x: Tensor, weight: float | Tensor, shift: int) -> Tensor:
    if len(x) % 2:
        return _mix(x.clone(), weight, shift, x)
    step = max(1, _CHUNK // max(1, x[0].numel() * x.element_size()))
    for start in range(0, shift, step):
        stop = min(start + step, shift)
        a, b = x[start:stop], x[start + shift : stop + shift]
        own = _rows(weight, start, stop)
        mixed = torch.lerp(b, a, own)
        b.lerp_(a, 1 - _rows(weight, start + shift, stop + shift))
        a.copy_(mixed)
    return x


def _rows(weight: float | Tensor, start: int, stop: int) -> float | Tensor:
    return weight[start:stop] if isinstance(weight, Tensor) else weight


def _interval(size: int, kept: float, generator: torch.Generator | None) -> slice:
    """Where a box with sides sqrt(1 - kept) lies along one axis, cut at the border."""
    device = "cpu" if generator is None else generator.device
    centre = int(torch.randint(size, (1,), device=device, generator=generator))
    half = int(size * math.sqrt(1 - kept)) // 2
    return slice(max(centre - half, 0), min(centre + half, size))
