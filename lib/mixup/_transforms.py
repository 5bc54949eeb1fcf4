"""mixup, SamplePairing and CutMix of a batch that is there."""

from __future__ import annotations

import torch
from torch import Tensor

from lib._common import check_positive
from lib.mixup._blend import (
    Pairing,
    both_shares,
    draw_beta,
    draw_box,
    draw_partner,
    is_plain,
    mix,
    mix_labels,
    partners,
    share_memory,
)

__all__ = ["cutmix", "mixup", "sample_pairing"]


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
    ``torch.nn.functional.cross_entropy``. Gradients flow into x and soft y, so hidden layers can be
    mixed too; ``torch.func`` transforms (vmap with ``randomness=``) and ``torch.compile`` work
    where ``generator`` and ``out`` are None, but then class numbers are not checked.

    Args:
        x: (B, ...), floating point; entries and their differences finite, or mixtures are not.
        y: (B,) integer classes, which need ``num_classes``; (B, C) multi-hot, of 0 and 1; or
            floating-point labels or targets (B, ...), which mix as they are.
        alpha: of the Beta law; 1 is uniform, 0 leaves everything unmixed.
        num_classes: C, for integer classes.
        pairing: ``"random"`` draws a permutation; ``"halves"`` takes j = (i + B // 2) mod B, which
            needs no copy of the partners and is up to twice as fast. Where the loader has shuffled
            the batch, i and j are two random examples either way (by halves never the same one).
            That is true of one call: a batch that is mixed twice by halves meets the same partners,
            and one in the order of its classes meets the wrong ones.
        per_sample: draw one lambda for each example instead of one for the batch.
        out: a tensor like ``x`` to write into; ``out=x`` mixes in place. Not for gradients.
        generator: source of all draws, on its own device; None is torch's own on the CPU.

    Returns:
        The mixed x (B, ...), and the mixed labels, floating point: (B, C) from classes, in at least
        float32, else as y.

    Raises:
        TypeError: if x, y or out is not a tensor, x is not floating point, or y is complex.
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
    shares = both_shares(draw_beta(alpha, len(x) if per_sample else 1, generator))
    partner = draw_partner(x, pairing, generator)
    labels = mix_labels(y, num_classes, shares, partner, x.dtype)
    return mix(x, shares, partner, out), labels


def sample_pairing(
    x: Tensor,
    y: Tensor,
    *,
    pairing: Pairing = "random",
    out: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Average every example with a partner and keep its own label: x'_i = (x_i + x_j) / 2.

    Arguments, errors and the mixed x as in ``mixup``; the labels come back as they are, even where
    ``out`` is written over them.

    Source: chapter ``mixup``, eq-mixup-sample-pairing; Inoue (2018).

    >>> sample_pairing(torch.tensor([[0.0], [4.0]]), torch.tensor([5, 6]), pairing="halves")
    (tensor([[2.],
            [2.]]), tensor([5, 6]))
    """
    _check_batch(x, y, out)
    halves = torch.full((1, 2), 0.5, device=x.device)
    if out is not None and share_memory(y, out):
        y = y.clone()
    return mix(x, halves, draw_partner(x, pairing, generator), out), y


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

    The box has sides H sqrt(1 - lambda) and W sqrt(1 - lambda), rounded down to even numbers, about
    a uniform centre, and is cut at the border. The labels use the share of the image that it
    leaves, not the lambda drawn. An image with a side of 1 or 2 has no room for a box and stays
    whole. The size of the box is a number in Python: no vmap, no compile.

    Args:
        x: images (B, ..., H, W).
        y: as in ``mixup``.
        alpha: as in ``mixup``.
        num_classes: as in ``mixup``.
        pairing: as in ``mixup``.
        generator: as in ``mixup``.

    Returns:
        New images like x, and the mixed labels as in ``mixup``.

    Source: chapter ``mixup``; Yun et al. (2019).

    >>> images = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 1, 4, 4)
    >>> mixed, soft = cutmix(images, torch.arange(3), num_classes=3, pairing="halves")
    >>> torch.allclose(mixed.mean((1, 2, 3)), soft @ torch.arange(3.0))
    True
    """
    _check_batch(x, y, None)
    if x.ndim < 3 or 0 in x.shape[-2:]:
        raise ValueError(f"x must be images (B, ..., H, W), got shape {tuple(x.shape)}")
    _check_labels(y, num_classes)
    drawn = draw_beta(alpha, 1, generator).item()
    partner = draw_partner(x, pairing, generator)
    rows, columns = (draw_box(size, drawn, generator) for size in x.shape[-2:])
    mixed = x.clone()
    mixed[..., rows, columns] = partners(x[..., rows, columns], partner)
    covered = (rows.stop - rows.start) * (columns.stop - columns.start)
    share = 1 - covered / (x.shape[-2] * x.shape[-1])
    shares = torch.tensor([[share, 1 - share]], dtype=torch.float64, device="cpu")
    return mixed, mix_labels(y, num_classes, shares, partner, x.dtype)


def _check_batch(x: Tensor, y: Tensor, out: Tensor | None) -> None:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        seen = f"{type(x).__name__} and {type(y).__name__}"
        raise TypeError(f"x and y must be tensors, got {seen}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.ndim < 1 or len(x) == 0:
        raise ValueError(f"x must hold at least one example (B, ...), got shape {tuple(x.shape)}")
    if y.ndim < 1 or len(y) != len(x):
        raise ValueError(f"y must have {len(x)} entries like x, got shape {tuple(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"y must be on {x.device} like x, got {y.device}")
    if out is None:
        return
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        wanted, seen = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (x, out))
        raise ValueError(f"out must be like x, {wanted}, got {seen}")
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError("out must be None where gradients are recorded, got a tensor")


def _check_labels(y: Tensor, num_classes: int | None) -> None:
    if y.is_complex():
        raise TypeError(f"y must hold classes or floating-point labels, got {y.dtype}")
    if num_classes is not None:
        check_positive(num_classes, "num_classes")
    classes = y.ndim == 1 and not y.is_floating_point()
    if classes and num_classes is None:
        raise ValueError("num_classes must be given for integer labels of shape (B,)")
    if not classes and num_classes is not None and y.shape[1:2] != (num_classes,):
        raise ValueError(
            f"y must be classes (B,) or labels (B, {num_classes}) where num_classes={num_classes}, "
            f"got {y.dtype} of shape {tuple(y.shape)}"
        )
    if y.is_floating_point() or y.is_meta or y.numel() == 0 or not is_plain(y):
        return
    if classes and y.dtype != torch.int64:
        y = y.long()  # torch orders no unsigned integers but bytes
    low, high = (bound.item() for bound in y.aminmax())
    if classes and num_classes is not None and not 0 <= low <= high < num_classes:
        raise ValueError(f"y must hold classes in [0, {num_classes}), got {low} to {high}")
    if not classes and not 0 <= low <= high <= 1:
        raise ValueError(f"y of {y.dtype} must be multi-hot, of 0 and 1, got {low} to {high}")
