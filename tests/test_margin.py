"""lib.margin against high-precision arithmetic, finite differences, brute force and a peer."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mpmath import acos, cos, exp, log, mp, mpf, pi, sin
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lib.margin import (
    MarginHead,
    SentenceEncoder,
    am_softmax_loss,
    arc_softmax_loss,
    retrieval_accuracy,
    simple_a_softmax_loss,
)

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ),
]
LOSSES = [am_softmax_loss, arc_softmax_loss, simple_a_softmax_loss]
KINDS = ["softmax", "am", "arc", "simple_a"]


def precise_psi(kind: str, c: mpf, margin: float) -> mpf:
    """The target's cosine after the margin, in 300 digits, through the angle itself."""
    theta = acos(c)
    if kind == "arc":
        m = mpf(margin)
        return cos(theta + m) if theta + m <= pi else c - m * sin(m)
    if kind == "simple_a":
        return min(cos(int(margin) * theta), c)
    return c - mpf(margin)


def precise_loss(kind: str, row: list[float], target: int, margin: float, scale: float) -> float:
    """-log of the target's share, straight from the definition, in 300 digits."""
    with mp.workdps(300):
        own = exp(mpf(scale) * precise_psi(kind, mpf(row[target]), margin))
        rest = sum(exp(mpf(scale) * mpf(c)) for i, c in enumerate(row) if i != target)
        return float(-log(own / (own + rest)))


def random_cosine(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1).to(dtype)


def by_kind(kind: str, margin: float) -> Callable[..., Tensor]:
    if kind == "simple_a":
        return lambda c, t, **more: simple_a_softmax_loss(c, t, m=int(margin), **more)
    function = arc_softmax_loss if kind == "arc" else am_softmax_loss
    return lambda c, t, **more: function(c, t, margin=margin, **more)


# the functional losses


@pytest.mark.parametrize("scale", [1.0, 7.5, 30.0, 64.0, 250.0])
@pytest.mark.parametrize(
    ("kind", "margin"),
    [("softmax", 0.0), ("am", 0.35), ("am", 0.5), ("arc", 0.5), ("arc", 1.3), ("arc", math.pi)]
    + [("simple_a", m) for m in (1, 2, 3, 4, 7)],
)
def test_loss_equals_its_definition_in_300_digits(kind: str, margin: float, scale: float) -> None:
    cosine, target = random_cosine(3, 6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    cosine[0, 0], cosine[1, 4], cosine[2, 2] = 1.0, -1.0, 0.999
    expected = [
        precise_loss(kind, row, t, margin, scale)
        for row, t in zip(cosine.tolist(), target.tolist(), strict=True)
    ]
    loss = by_kind(kind, margin)
    double = loss(cosine, target, scale=scale, reduction="none")
    torch.testing.assert_close(
        double, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )
    cosine = cosine.float()
    expected = [
        precise_loss(kind, row, t, margin, scale)
        for row, t in zip(cosine.tolist(), target.tolist(), strict=True)
    ]
    single = loss(cosine, target, scale=scale, reduction="none")
    assert single.dtype == torch.float32
    # the logits are of size scale: one rounding there is a relative error of the small losses
    tolerance = 4e-7 * scale * (int(margin) ** 2 if kind == "simple_a" else 2) + 1e-6
    torch.testing.assert_close(single, torch.tensor(expected), rtol=tolerance, atol=1e-37)


def test_defaults_are_those_of_the_documentation() -> None:
    cosine, target = random_cosine(5, 4, 6), torch.tensor([5, 0, 3, 3])
    for loss, kind, margin in [
        (am_softmax_loss, "am", 0.35),
        (arc_softmax_loss, "arc", 0.5),
        (simple_a_softmax_loss, "simple_a", 4),
    ]:
        rows = zip(cosine.tolist(), target.tolist(), strict=True)
        mean = sum(precise_loss(kind, row, t, margin, 30.0) for row, t in rows) / 4
        assert loss(cosine, target).item() == pytest.approx(mean, rel=1e-12)


def subtraction_loss(cosine: Tensor, target: Tensor, margin: float, scale: float) -> Tensor:
    """The essay's sparse form: append the margin's logit, subtract the plain one from log Z."""
    own = scale * cosine.gather(1, target.unsqueeze(1))
    logits = torch.cat([scale * cosine, own - scale * margin], dim=1)
    log_z = logits.logsumexp(1)
    log_z = log_z + torch.log(1 - torch.exp(own.squeeze(1) - log_z))
    return log_z - (own.squeeze(1) - scale * margin)


@pytest.mark.parametrize(
    ("margin", "scale"), [(0.35, 30.0), (0.5, 30.0), (0.35, 64.0), (0.5, 64.0)]
)
def test_well_fitted_samples_survive_float32(margin: float, scale: float) -> None:
    """The regression the chapter is about: subtracting the own logit from log Z fails, ours not."""
    generator = torch.Generator().manual_seed(0)
    cosine = 0.25 * torch.randn(64, 9000, generator=generator, dtype=torch.float64).clamp(-4, 4) / 2
    target = torch.randint(9000, (64,), generator=generator)
    own = torch.linspace(0.8, 1.0, 64, dtype=torch.float64)
    cosine = cosine.scatter(1, target.unsqueeze(1), own.unsqueeze(1)).float()
    gap = cosine.double() - cosine.double().gather(1, target.unsqueeze(1)) + margin
    exact = gap.mul(scale).exp().scatter(1, target.unsqueeze(1), 0.0).sum(1).log1p()
    safe = am_softmax_loss(cosine, target, margin=margin, scale=scale, reduction="none")
    torch.testing.assert_close(safe.double(), exact, rtol=2e-5, atol=0)
    broken = subtraction_loss(cosine, target, margin, scale)
    worst = (broken.double() - exact)[-16:].abs().max()
    if scale == 64:
        assert not broken[-16:].isfinite().any()
    elif margin == 0.5:
        assert not worst < 1  # nats, or not finite
    else:
        assert 3e-3 < worst < 0.1  # of losses that are themselves smaller
    if scale == 30:  # in double precision there are digits to lose: it is rounding, not algebra
        double = subtraction_loss(cosine.double(), target, margin, scale)
        torch.testing.assert_close(double, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("seed", range(2))
def test_gradients_of_the_functional_losses(loss: Callable[..., Tensor], seed: int) -> None:
    cosine = random_cosine(seed, 4, 6).requires_grad_()
    target = torch.tensor([5, 0, -100, 3])
    for reduction in ("none", "mean", "sum"):
        settings = {"scale": 6.0, "reduction": reduction}
        assert torch.autograd.gradcheck(partial(loss, target=target, **settings), (cosine,))
    curved = partial(loss, target=target[:2], scale=6.0)
    assert torch.autograd.gradgradcheck(curved, (cosine.detach()[:2].requires_grad_(),))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 30.0, 64.0, 1000.0])
def test_gradients_are_finite_where_the_angle_has_no_slope(
    loss: Callable[..., Tensor], dtype: torch.dtype, scale: float
) -> None:
    own = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0 - 1e-7], dtype=dtype)
    cosine = torch.full((5, 3), 0.5, dtype=dtype)
    cosine[2:4, 1] = torch.tensor([1.0, -1.0], dtype=dtype)
    cosine[:, 0] = own
    cosine.requires_grad_()
    loss(cosine, torch.zeros(5, dtype=torch.long), scale=scale).backward()
    assert cosine.grad is not None
    assert cosine.grad.dtype == dtype
    assert cosine.grad.isfinite().all()


def test_arc_gradient_at_the_pole_is_the_limit_along_the_sphere() -> None:
    """d loss / d theta at theta = 0 is s sin(m) (1 - p): finite, though dc/dtheta is 0 there."""
    theta = torch.tensor([1e-3], dtype=torch.float64, requires_grad=True)
    cosine = torch.stack([theta.cos(), torch.full_like(theta, 0.6)], dim=1)
    loss = arc_softmax_loss(cosine, torch.tensor([0]), margin=0.5, scale=8.0, reduction="sum")
    (slope,) = torch.autograd.grad(loss, theta)
    share = 1 - math.exp(-loss.item())
    assert slope.item() == pytest.approx(8 * math.sin(0.501) * share, rel=1e-6)


def test_losses_are_ordered_as_the_margins() -> None:
    cosine, target = random_cosine(11, 200, 7), torch.arange(200) % 7
    plain = am_softmax_loss(cosine, target, margin=0.0, reduction="none")
    torch.testing.assert_close(
        plain, F.cross_entropy(30 * cosine, target, reduction="none"), rtol=1e-9, atol=1e-12
    )
    for margin, more in [(0.1, 0.2), (0.35, 0.5)]:
        less = am_softmax_loss(cosine, target, margin=margin, reduction="none")
        assert (plain < less).all()
        assert (less < am_softmax_loss(cosine, target, margin=more, reduction="none")).all()
    simple = simple_a_softmax_loss(cosine, target, reduction="none")
    own = cosine.gather(1, target[:, None]).squeeze(1)
    free = torch.cos(4 * own.acos()) >= own
    assert 0.2 < free.double().mean() < 0.8
    assert torch.equal(
        simple[free], am_softmax_loss(cosine, target, margin=0.0, reduction="none")[free]
    )
    assert (simple[~free] > plain[~free]).all()


def test_reductions_and_ignored_samples() -> None:
    cosine, target = random_cosine(1, 5, 4), torch.tensor([3, -100, 0, -100, 1])
    cosine[1] = math.nan
    cosine[3] = 7.0
    cosine.requires_grad_()
    kept = torch.tensor([0, 2, 4])
    for loss in LOSSES:
        each = loss(cosine, target, reduction="none")
        alone = loss(cosine[kept], target[kept], reduction="none")
        assert torch.equal(each[kept], alone)
        assert torch.equal(each[[1, 3]], torch.zeros(2, dtype=torch.float64))
        assert loss(cosine, target, reduction="sum").item() == pytest.approx(alone.sum().item())
        mean = loss(cosine, target)
        assert mean.item() == pytest.approx(alone.mean().item(), rel=1e-14)
        (gradient,) = torch.autograd.grad(mean, cosine)
        assert torch.equal(gradient[[1, 3]], torch.zeros(2, 4, dtype=torch.float64))
        assert gradient.isfinite().all()
        other = loss(cosine[kept], target[kept] - (target[kept] == 0).long(), ignore_index=-1)
        assert other.item() == pytest.approx(alone[[0, 2]].mean().item())


@pytest.mark.parametrize("loss", LOSSES)
def test_edges_of_the_functional_losses(loss: Callable[..., Tensor]) -> None:
    one = torch.tensor([[0.3], [-1.0]], requires_grad=True)
    value = loss(one, torch.zeros(2, dtype=torch.long))
    value.backward()
    assert value.item() == 0
    assert torch.equal(one.grad, torch.zeros(2, 1))
    empty = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    assert loss(*empty, reduction="none").shape == (0,)
    assert loss(*empty, reduction="sum").item() == 0
    with pytest.raises(ValueError, match="batch is empty"):
        loss(*empty)
    cosine, target = random_cosine(2, 3, 2, 5), torch.tensor([[1, 2], [0, 4], [3, -100]])
    flat = loss(cosine.flatten(0, 1), target.flatten(), reduction="none")
    assert torch.equal(loss(cosine, target, reduction="none").flatten(), flat)
    assert loss(cosine[0, 0], target[0, 0]).item() == pytest.approx(flat[0].item(), rel=1e-14)
    before = cosine.clone(), target.clone()
    loss(cosine, target)
    assert torch.equal(cosine, before[0])
    assert torch.equal(target, before[1])
    for dtype in (torch.int32, torch.uint8):
        assert loss(cosine[0], target[0].to(dtype)).item() == loss(cosine[0], target[0]).item()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_a_scale_in_a_tensor_is_a_number(
    loss: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Its axes and its precision leave no mark on the losses."""
    cosine, target = (
        random_cosine(3, 2, 4, 5, dtype=torch.float32),
        torch.tensor([[1, 0, 4, 4]] * 2),
    )
    scale = torch.full(shape, 24, dtype=dtype)
    for c, t in ((cosine, target), (cosine[0], target[0]), (cosine[0, 0], target[0, 0])):
        given = loss(c, t, scale=scale, reduction="none")
        expected = loss(c, t, scale=24.0, reduction="none")
        assert given.shape == t.shape
        torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_learned_scale_never_reads_ignored_samples(loss: Callable[..., Tensor]) -> None:
    cosine, target = random_cosine(8, 4, 3), torch.tensor([2, -100, 0, -100])
    cosine[1], cosine[3] = math.nan, math.inf
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(cosine, target, scale=scale), scale)
    kept = cosine[[0, 2]], target[[0, 2]]
    around = [loss(*kept, scale=7 + step).item() for step in (-1e-6, 1e-6)]
    assert slope.item() == pytest.approx((around[1] - around[0]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_class_alone_has_no_curvature(loss: Callable[..., Tensor]) -> None:
    """Nothing is left of the sum without the target: 0, to every order, and not NaN."""
    target = torch.zeros(3, dtype=torch.long)
    hessian = torch.autograd.functional.hessian(
        partial(loss, target=target), random_cosine(1, 3, 1)
    )
    assert torch.equal(hessian, torch.zeros(3, 1, 3, 1, dtype=torch.float64))
    for scale in (6.0, torch.tensor(6.0, dtype=torch.float64, requires_grad=True)):
        head = MarginHead(4, 1, scale=scale, dtype=torch.float64)
        x = torch.randn(3, 4, dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(partial(head.loss, target=target), x)
        assert torch.equal(hessian, torch.zeros(3, 4, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize("loss", LOSSES)
def test_bad_input_to_the_functional_losses(loss: Callable[..., Tensor]) -> None:
    cosine, target = random_cosine(4, 3, 4), torch.tensor([0, 3, 1])
    for value in (1.01, -30.0, math.nan, math.inf):
        wrong = cosine.clone()
        wrong[1, 2] = value
        with pytest.raises(ValueError, match=r"cosine must lie in \[-1, 1\]"):
            loss(wrong, target)
    loss((1 + 5e-7) * torch.ones(1, 2), torch.tensor([0]))  # a rounding error is none
    for bad in (4, -1, -101):
        with pytest.raises(ValueError, match=rf"target must lie in 0 \.\. 3.*got {bad}"):
            loss(cosine, torch.tensor([0, bad, 1]))
    with pytest.raises(ValueError, match="every target is ignore_index"):
        loss(cosine, torch.full((3,), -100))
    assert loss(cosine, torch.full((3,), -100), reduction="sum").item() == 0
    assert loss(cosine, torch.full((3,), -100), validate_args=False).item() == 0
    with pytest.raises(ValueError, match=r"target must have shape \(3,\), got \(3, 1\)"):
        loss(cosine, target.unsqueeze(1))
    with pytest.raises(ValueError, match="last axis of classes"):
        loss(torch.zeros(3, 0), target)
    with pytest.raises(TypeError, match="target must be a tensor of integers"):
        loss(cosine, target.double())
    with pytest.raises(TypeError, match="target must be a tensor of integers, got list"):
        loss(cosine, [0, 3, 1])
    with pytest.raises(TypeError, match="cosine must be a floating-point tensor"):
        loss(cosine.long(), target)
    for scale in (0.0, -30.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale must be positive"):
            loss(cosine, target, scale=scale)
    with pytest.raises(ValueError, match="reduction must be"):
        loss(cosine, target, reduction="average")


def test_bad_margins() -> None:
    cosine, target = random_cosine(4, 3, 4), torch.tensor([0, 3, 1])
    for margin in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="margin must be at least 0"):
            am_softmax_loss(cosine, target, margin=margin)
    for margin in (-0.1, 28.6, math.nan):
        with pytest.raises(ValueError, match="margin must be an angle"):
            arc_softmax_loss(cosine, target, margin=margin)
    for loss in (am_softmax_loss, arc_softmax_loss):
        for margin in ("0.35", None, True, torch.rand(3)):
            with pytest.raises(TypeError, match="margin must be a number, got"):
                loss(cosine, target, margin=margin)
    for scale in ("30", None, True, torch.rand(2)):
        with pytest.raises(TypeError, match="scale must be a number, got"):
            am_softmax_loss(cosine, target, scale=scale)
    with pytest.raises(ValueError, match="scale must be positive and finite, got -3"):
        am_softmax_loss(cosine, target, scale=torch.tensor(-3.0))
    for index in (None, "0", 1.0, True):
        with pytest.raises(TypeError, match="ignore_index must be an integer"):
            am_softmax_loss(cosine, target, ignore_index=index)
    ignored = am_softmax_loss(cosine, target, ignore_index=np.int64(3))
    assert torch.equal(ignored, am_softmax_loss(cosine, target, ignore_index=3))
    with pytest.raises(ValueError, match="m must be at least 1"):
        simple_a_softmax_loss(cosine, target, m=0)
    with pytest.raises(TypeError, match="m must be an integer"):
        simple_a_softmax_loss(cosine, target, m=4.0)


@pytest.mark.parametrize("loss", LOSSES)
def test_functional_losses_under_transforms(loss: Callable[..., Tensor]) -> None:
    cosine, target = random_cosine(6, 3, 5, 4), torch.arange(15).reshape(3, 5) % 4
    each = torch.stack([loss(c, t) for c, t in zip(cosine, target, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(cosine, target), each)
    torch.testing.assert_close(
        torch.func.vmap(loss, in_dims=(None, 0))(cosine[0], target),
        torch.stack([loss(cosine[0], t) for t in target]),
    )
    gradients = torch.func.vmap(torch.func.grad(loss))(cosine, target)
    leaf = cosine.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(map(loss, leaf, target)), leaf)
    torch.testing.assert_close(gradients, expected)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(cosine[0], target[0]), each[0])


# the head


def plain_loss(
    head: MarginHead, x: Tensor, target: Tensor, weight: Tensor, **more: object
) -> Tensor:
    """The head's loss without fusion: normalise, multiply, hand over to the functional loss."""
    cosine = F.normalize(x, dim=1) @ F.normalize(weight, dim=1).t()
    return by_kind(head.kind, head.margin)(cosine, target, scale=head.scale, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("class_chunk", [None, 1, 3, 7, 100])
def test_head_gradients_against_finite_differences(kind: str, class_chunk: int | None) -> None:
    torch.manual_seed(0)
    head = MarginHead(5, 7, loss=kind, scale=9.0, class_chunk=class_chunk, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([6, 0, -100, 3])

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(Caller(head), {"head.weight": weight}, (x, target))

    class Caller(torch.nn.Module):
        def __init__(self, head: MarginHead) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return self.head.loss(x, target, reduction="none")

    assert torch.autograd.gradcheck(loss, (x, head.weight))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 30.0, 64.0, 400.0])
@pytest.mark.parametrize("class_chunk", [None, 999, 5000])
def test_fused_equals_plain(kind: str, scale: float, class_chunk: int | None, device: str) -> None:
    """Beyond one tile of classes, with repeated targets, at both ends of the range of the scale."""
    torch.manual_seed(1)
    head = MarginHead(
        6, 4100, loss=kind, scale=scale, class_chunk=class_chunk, dtype=torch.float64, device=device
    )
    x = torch.randn(9, 6, dtype=torch.float64, device=device, requires_grad=True)
    target = torch.tensor([0, 4099, 2047, 2048, 17, 17, 17, -100, 998], device=device)
    with torch.no_grad():
        head.weight[17] = 3 * x[4]  # a sample that is all but perfect
        x[5] = -head.weight[17]
    for reduction in ("mean", "sum"):
        fused = head.loss(x, target, reduction=reduction)
        plain = plain_loss(head, x, target, head.weight, reduction=reduction)
        torch.testing.assert_close(fused, plain, rtol=1e-11, atol=1e-12)
        ours = torch.autograd.grad(fused, (x, head.weight))
        theirs = torch.autograd.grad(plain, (x, head.weight))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * scale)


@pytest.mark.parametrize("class_chunk", [None, 300])
@pytest.mark.parametrize("kind", ["am", "arc"])
def test_head_against_a_peer(kind: str, class_chunk: int | None) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(2)
    head = MarginHead(16, 1000, loss=kind, scale=30.0, class_chunk=class_chunk)
    if kind == "am":
        peer = losses.CosFaceLoss(1000, 16, margin=0.35, scale=30)
    else:
        peer = losses.ArcFaceLoss(1000, 16, margin=math.degrees(0.5), scale=30)
    peer.W.data = head.weight.detach().t().clone()
    x, target = torch.randn(50, 16, requires_grad=True), torch.randint(1000, (50,))
    with torch.no_grad():
        x[0] = -head.weight[target[0]]  # beyond pi - m
    ours, theirs = head.loss(x, target), peer(x, target)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    (grad_x, grad_w) = torch.autograd.grad(ours, (x, head.weight))
    (peer_x, peer_w) = torch.autograd.grad(theirs, (x, peer.W))
    # row 0 sits on the pole, where the peer differentiates arccos
    torch.testing.assert_close(
        grad_x[1:], peer_x[1:], rtol=1e-4, atol=1e-6 * grad_x.abs().max().item()
    )
    others = torch.arange(1000) != target[0]
    torch.testing.assert_close(
        grad_w[others], peer_w.t()[others], rtol=1e-4, atol=1e-6 * grad_w.abs().max().item()
    )


def test_float32_gradients_are_as_good_as_float32_allows() -> None:
    for class_chunk in (None, 500):
        torch.manual_seed(3)
        head = MarginHead(32, 3000, scale=64.0, margin=0.5, class_chunk=class_chunk)
        x, target = torch.randn(40, 32, requires_grad=True), torch.randint(3000, (40,))
        single = torch.autograd.grad(head.loss(x, target), (x, head.weight))
        exact_x, exact_w = (
            x.detach().double().requires_grad_(),
            head.weight.detach().double().requires_grad_(),
        )
        exact = torch.autograd.grad(plain_loss(head, exact_x, target, exact_w), (exact_x, exact_w))
        for a, b in zip(single, exact, strict=True):
            assert (a - b).abs().max() <= 3e-6 * b.abs().max()


def test_head_keeps_at_most_one_matrix_of_cosines() -> None:
    """What autograd saves, counted: B x C once, and nothing of that size with class chunks."""
    batch, classes, dim = 64, 5000, 8
    for class_chunk, allowed in ((None, batch * classes), (512, 0)):
        head = MarginHead(dim, classes, class_chunk=class_chunk)
        x, target = torch.randn(batch, dim, requires_grad=True), torch.randint(classes, (batch,))
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            head.loss(x, target).backward()
        saved.pop(head.weight.data_ptr(), None)
        assert sum(saved.values()) <= allowed + 2 * classes + 12 * batch * dim


class Products(TorchDispatchMode):
    """Remembers every matrix product that is made, and so keeps it from being overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if "mm" in func.__name__:
            self.made.append(result)
        return result


def test_without_gradient_one_tile_is_enough() -> None:
    head, x = MarginHead(4, 9000), torch.randn(8, 4)
    buffers = {}
    for needed in (True, False):
        with torch.set_grad_enabled(needed), Products() as products:
            head.loss(x, torch.arange(8))
        buffers[needed] = len({one.untyped_storage().data_ptr() for one in products.made})
    assert buffers == {True: 5, False: 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("class_chunk", [None, 3])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learned_scale_gets_its_gradient(
    kind: str, class_chunk: int | None, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(12)
    start = torch.nn.Parameter(torch.full(shape, 9.0, dtype=torch.float64))
    given = MarginHead(3, 7, loss=kind, scale=start, class_chunk=class_chunk, dtype=torch.float64)
    later = MarginHead(3, 7, loss=kind, class_chunk=class_chunk, dtype=torch.float64)
    later.weight, later.scale = given.weight, start
    x, target = torch.randn(4, 3, dtype=torch.float64), torch.tensor([6, 0, -100, 3])
    step = 1e-6
    for head in (given, later):
        assert sorted(head.state_dict()) == ["scale", "weight"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert "scale=9.0" in repr(head)
        assert "scale=nan" in repr(copy.deepcopy(head).to("meta"))
        (slope,) = torch.autograd.grad(head.loss(x, target), start)
        fixed = MarginHead(3, 7, loss=kind, dtype=torch.float64)
        fixed.weight, around = head.weight, []
        for fixed.scale in (9 - step, 9 + step):
            around.append(fixed.loss(x, target).item())
        assert slope.shape == shape
        assert slope.item() == pytest.approx((around[1] - around[0]) / (2 * step), rel=1e-6)
        fixed.scale = 9.0
        torch.testing.assert_close(head.loss(x, target), fixed.loss(x, target))


def test_a_scale_that_has_turned_negative_is_refused() -> None:
    x, target = torch.randn(3, 2), torch.tensor([0, 4, 1])
    for scale in (8.0, torch.nn.Parameter(torch.tensor(8.0))):
        head = MarginHead(2, 5, scale=scale)
        with torch.no_grad():
            head.scale -= 11
        with pytest.raises(ValueError, match="scale must be positive and finite, got -3"):
            head.loss(x, target)
    head.validate_args = False
    assert head.loss(x, target).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lengths_that_cannot_be_squared_are_refused(dtype: torch.dtype) -> None:
    torch.manual_seed(13)
    head, x, target = MarginHead(5, 7, dtype=dtype), torch.randn(3, 5, dtype=dtype), torch.arange(3)
    expected, info = head(x), torch.finfo(dtype)
    good = (1e-15, 1e18) if dtype == torch.float32 else (1e-145, 1e153)
    bad = (1e-22, 1e-30, 1e25) if dtype == torch.float32 else (1e-160, 1e-200, 1e200)
    for factor in good:
        torch.testing.assert_close(head(factor * x), expected, rtol=0, atol=8 * info.eps)
    for factor in bad:
        for call in (head, lambda x: head.loss(x, target)):
            with pytest.raises(
                ValueError, match=r"x needs rows with a direction.*\(in torch.float"
            ):
                call(factor * x)
        with torch.no_grad():
            head.weight[2] *= factor
        with pytest.raises(ValueError, match="weight needs rows with a direction, but row 2"):
            head.loss(x, target)
        head.reset_parameters()


def test_backward_may_run_again_and_in_part() -> None:
    for class_chunk in (None, 4):
        torch.manual_seed(4)
        head = MarginHead(3, 11, class_chunk=class_chunk)
        x, target = torch.randn(5, 3, requires_grad=True), torch.arange(5)
        loss = head.loss(x, target)
        first = torch.autograd.grad(loss, (x, head.weight), retain_graph=True)
        again = torch.autograd.grad(loss, (x, head.weight), retain_graph=True)
        assert all(map(torch.equal, first, again))
        assert torch.equal(
            torch.autograd.grad(head.loss(x.detach(), target), head.weight)[0], first[1]
        )
        head.weight.requires_grad_(False)
        assert torch.equal(torch.autograd.grad(head.loss(x, target), x)[0], first[0])
        weights = torch.tensor([0.0, 1.0, 2.0, -1.0, 5.0])
        (weighted,) = torch.autograd.grad(head.loss(x, target, reduction="none"), x, weights)
        torch.testing.assert_close(weighted, first[0] * 5 * weights.unsqueeze(1))
        with torch.no_grad():
            assert torch.equal(head.loss(x, target), loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("class_chunk", [None, 16])
def test_half_precision_is_raised_to_float32(dtype: torch.dtype, class_chunk: int | None) -> None:
    torch.manual_seed(5)
    head = MarginHead(12, 40, loss="arc", scale=64.0, class_chunk=class_chunk, dtype=dtype)
    x, target = torch.randn(7, 12, dtype=dtype, requires_grad=True), torch.arange(7)
    loss = head.loss(x, target)
    loss.backward()
    assert loss.dtype == head(x).dtype == torch.float32
    assert x.grad.dtype == head.weight.grad.dtype == dtype
    exact = plain_loss(head, x.detach().double(), target, head.weight.detach().double())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_autocast_leaves_the_head_in_float32() -> None:
    torch.manual_seed(6)
    head, layer = MarginHead(12, 40, scale=64.0), torch.nn.Linear(12, 12)
    x, target = torch.randn(7, 12), torch.arange(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = layer(x)
        assert features.dtype == torch.bfloat16
        loss = head.loss(features, target)
        cosine = head(features)
        loss.backward()  # inside on purpose: the backward pass, too, must not drop to half
    assert (
        loss.dtype == cosine.dtype == head.weight.dtype == head.weight.grad.dtype == torch.float32
    )
    features = features.detach().float()
    torch.testing.assert_close(cosine, head(features))
    (expected,) = torch.autograd.grad(head.loss(features, target), head.weight)
    torch.testing.assert_close(head.weight.grad, expected, rtol=1e-6, atol=1e-7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert am_softmax_loss(cosine.bfloat16(), target).dtype == torch.float32
    double = head.loss(features.double(), target)
    assert double.dtype == torch.float64


def test_autocast_leaves_a_gradient_that_has_a_derivative_in_float32() -> None:
    torch.manual_seed(6)
    head, x, target = MarginHead(32, 50), torch.randn(8, 32, requires_grad=True), torch.arange(8)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = head.loss(x, target)
            found.append(torch.autograd.grad(loss, (x, head.weight), create_graph=True))
    for single, mixed in zip(*found, strict=True):
        assert torch.equal(single, mixed)


def test_head_under_transforms() -> None:
    torch.manual_seed(7)
    head = MarginHead(4, 6, dtype=torch.float64)
    x, target = torch.randn(3, 5, 4, dtype=torch.float64), torch.arange(15).reshape(3, 5) % 6
    each = torch.stack([head.loss(a, t) for a, t in zip(x, target, strict=True)])
    torch.testing.assert_close(torch.func.vmap(head.loss)(x, target), each)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(map(head.loss, leaf, target)), leaf)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(head.loss))(x, target), expected)
    hessian = torch.func.hessian(lambda a: head.loss(a, target[0]))(x[0])
    assert hessian.isfinite().all()
    torch._dynamo.reset()
    compiled = torch.compile(head.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x[0], target[0]), each[0])


@pytest.mark.parametrize("class_chunk", [None, 4])
def test_second_derivatives_are_those_of_the_plain_loss(class_chunk: int | None) -> None:
    torch.manual_seed(7)
    head = MarginHead(4, 6, class_chunk=class_chunk, dtype=torch.float64)
    x, target = torch.randn(5, 4, dtype=torch.float64), torch.tensor([2, -100, 0, 5, 2])

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        cosine = torch.cosine_similarity(x[:, None], weight, dim=2)
        return am_softmax_loss(cosine, target)

    def fused(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(head, {"weight": weight}, (x,))

    head.forward = lambda x: head.loss(x, target)  # type: ignore[method-assign]
    points = x, head.weight.detach()
    expected = torch.autograd.functional.hessian(plain, points)
    for ours, theirs in zip(
        torch.autograd.functional.hessian(fused, points), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    alone = torch.autograd.functional.hessian(lambda x: head.loss(x, target), x)
    torch.testing.assert_close(alone, expected[0][0])


def test_forward_gives_cosines_and_the_weight_is_the_only_state() -> None:
    torch.manual_seed(8)
    head = MarginHead(3, 5, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.cosine_similarity(x[:, None], head.weight, dim=2)
    torch.testing.assert_close(head(x), expected)
    assert torch.autograd.gradcheck(head, (x,))
    assert list(head.state_dict()) == ["weight"]
    assert head.weight.shape == (5, 3)
    assert (
        repr(MarginHead(3, 5))
        == "MarginHead(3, 5, loss='am', margin=0.35, scale=30.0, class_chunk=None)"
    )
    assert [MarginHead(3, 5, loss=kind).margin for kind in KINDS] == [0.0, 0.35, 0.5, 4]
    large = MarginHead(400, 1000).weight.norm(dim=1)
    assert (large.mean() - 1).abs() < 0.01
    empty = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    assert head(empty).shape == (0, 5)
    head.loss(empty, torch.zeros(0, dtype=torch.long), reduction="sum").backward()
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_ignored_features_are_never_read() -> None:
    torch.manual_seed(9)
    for class_chunk in (None, 2):
        head = MarginHead(3, 5, class_chunk=class_chunk)
        x, target = torch.randn(4, 3), torch.tensor([1, -100, 4, -100])
        expected = head.loss(x[[0, 2]], target[[0, 2]])
        x[1], x[3] = 0.0, math.nan
        x.requires_grad_()
        loss = head.loss(x, target)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert torch.equal(x.grad[[1, 3]], torch.zeros(2, 3))
        assert head.weight.grad.isfinite().all()


def test_head_with_one_class_has_nothing_to_learn() -> None:
    for class_chunk in (None, 1):
        head = MarginHead(3, 1, class_chunk=class_chunk)
        loss = head.loss(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(head.weight.grad, torch.zeros(1, 3))


def test_bad_input_to_the_head() -> None:
    head = MarginHead(3, 5)
    x, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 4])
    for call in (lambda x: head(x), lambda x: head.loss(x, target)):
        for value, length in ((0.0, "0.0"), (math.nan, "nan"), (math.inf, "inf")):
            wrong = x.clone()
            wrong[2] = value
            with pytest.raises(
                ValueError, match=f"x needs rows with a direction, but row 2 has length {length}"
            ):
                call(wrong)
        with pytest.raises(ValueError, match=r"x must have shape \(B, 3\), got \(4, 2\)"):
            call(x[:, :2])
        with pytest.raises(ValueError, match=r"x must have shape \(B, 3\), got \(3,\)"):
            call(x[0])
        with pytest.raises(TypeError, match="x must be a floating-point tensor"):
            call(x.long())
    for bad in (5, -1):
        with pytest.raises(ValueError, match=rf"target must lie in 0 \.\. 4.*got {bad}"):
            head.loss(x, torch.tensor([0, 1, 2, bad]))
        with pytest.raises(IndexError):
            MarginHead(3, 5, validate_args=False).loss(x, torch.tensor([0, 1, 2, bad]))
    with pytest.raises(ValueError, match=r"target must have shape \(4,\), got \(3,\)"):
        head.loss(x, target[:3])
    with pytest.raises(ValueError, match="every target is ignore_index"):
        head.loss(x, torch.full((4,), -100))
    with pytest.raises(ValueError, match="batch is empty"):
        head.loss(x[:0], target[:0])
    with pytest.raises(TypeError, match="target must be a tensor of integers"):
        head.loss(x, target.float())
    with pytest.raises(ValueError, match="reduction must be"):
        head.loss(x, target, reduction="average")
    with torch.no_grad():
        head.weight[3] = 0
    with pytest.raises(ValueError, match="weight needs rows with a direction, but row 3"):
        head.loss(x, target)
    trusting = MarginHead(3, 5, validate_args=False)
    loss = trusting.loss(torch.zeros(1, 3, requires_grad=True), torch.tensor([0]))
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"loss": "cos"}, ValueError, "loss must be one of am"),
        ({"loss": ["am"]}, ValueError, "loss must be one of am"),
        ({"margin": "0.35"}, TypeError, "margin must be a number, got '0.35'"),
        ({"scale": None}, TypeError, "scale must be a number, got None"),
        ({"margin": -0.1}, ValueError, "margin must be at least 0"),
        ({"loss": "arc", "margin": 28.6}, ValueError, "margin must be an angle"),
        ({"loss": "simple_a", "margin": 0.35}, TypeError, "margin must be an integer"),
        ({"loss": "softmax", "margin": 0.1}, ValueError, "margin must be 0"),
        ({"scale": 0.0}, ValueError, "scale must be positive"),
        ({"class_chunk": 0}, ValueError, "class_chunk must be at least 1"),
        ({"dim": 0}, ValueError, "dim must be at least 1"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an integer"),
    ],
)
def test_bad_settings_of_the_head(settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MarginHead(**{"dim": 3, "num_classes": 5, **settings})


def test_head_trains() -> None:
    torch.manual_seed(10)
    centres = F.normalize(torch.randn(20, 16), dim=1)
    target = torch.randint(20, (400,))
    x = centres[target] + 0.1 * torch.randn(400, 16)
    for kind in KINDS:
        head = MarginHead(16, 20, loss=kind, scale=16.0)
        optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            head.loss(x, target).backward()
            optimizer.step()
        assert (head(x).argmax(1) == target).double().mean() > 0.97


# the encoder


def reference_states(encoder: SentenceEncoder, words: list[int]) -> Tensor:
    """The last state of the GRU, gate by gate from its definition, in double precision."""
    gru = encoder.gru
    w_ih, w_hh = gru.weight_ih_l0.double(), gru.weight_hh_l0.double()
    b_ih, b_hh = gru.bias_ih_l0.double(), gru.bias_hh_l0.double()
    h = torch.zeros(gru.hidden_size, dtype=torch.float64)
    for word in words:
        i_r, i_z, i_n = (w_ih @ encoder.embedding.weight[word].double() + b_ih).chunk(3)
        h_r, h_z, h_n = (w_hh @ h + b_hh).chunk(3)
        r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
        h = (1 - z) * torch.tanh(i_n + r * h_n) + z * h
    return h / h.norm()


def test_encoder_equals_the_gru_word_by_word() -> None:
    torch.manual_seed(11)
    encoder = SentenceEncoder(9, dim=3, hidden=5)
    ids = torch.tensor([[3, 1, 4, 1, 8, 0], [2, 0, 0, 0, 0, 0], [7, 7, 2, 6, 5, 3]])
    vectors = encoder(ids)
    assert vectors.shape == (3, 5)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    for row, vector in zip(ids.tolist(), vectors, strict=True):
        expected = reference_states(encoder, [word for word in row if word])
        torch.testing.assert_close(vector.double(), expected, rtol=1e-5, atol=1e-6)


def test_padding_is_never_read() -> None:
    torch.manual_seed(12)
    encoder = SentenceEncoder(9, dim=3, hidden=5)
    plain = encoder(torch.tensor([[3, 1, 4]]))
    with torch.no_grad():
        encoder.embedding.weight[0] = math.nan
    padded = torch.tensor([[3, 1, 4, 0, 0], [0, 0, 3, 1, 4], [0, 3, 0, 1, 4]])
    torch.testing.assert_close(encoder(padded), plain.expand(3, 5))
    masked = torch.tensor([[3, 8, 1, 4], [3, 1, 4, 8]])
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]])
    torch.testing.assert_close(encoder(masked, mask), plain.expand(2, 5))
    torch.testing.assert_close(encoder(masked, mask.bool()), plain.expand(2, 5))
    encoder(padded).sum().backward()
    gradient = encoder.embedding.weight.grad
    assert torch.equal(gradient[0], torch.zeros(3))
    assert (gradient[[1, 3, 4]] != 0).any(dim=1).all()
    assert torch.equal(gradient[[2, 5, 6, 7, 8]], torch.zeros(5, 3))


def test_encoder_precision_and_state() -> None:
    torch.manual_seed(13)
    encoder = SentenceEncoder(9, dim=3, hidden=5)
    ids = torch.tensor([[3, 1, 4, 0], [2, 5, 8, 8]])
    for dtype in (torch.int32, torch.uint8, torch.uint16, torch.uint32):
        assert torch.equal(encoder(ids.to(dtype)), encoder(ids))
        assert encoder(ids.to(dtype)).dtype == torch.float32
    empty = encoder(torch.zeros(0, 4, dtype=torch.long))
    assert empty.shape == (0, 5)
    empty.sum().backward()  # as an empty share of a batch must allow
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors = encoder(ids)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, encoder(ids), rtol=0.1, atol=0.05)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    assert encoder.double()(ids).dtype == torch.float64
    assert sorted(encoder.state_dict()) == [
        "embedding.weight",
        "gru.bias_hh_l0",
        "gru.bias_ih_l0",
        "gru.weight_hh_l0",
        "gru.weight_ih_l0",
    ]


def test_bad_input_to_the_encoder() -> None:
    encoder = SentenceEncoder(9, dim=3, hidden=5)
    ids = torch.tensor([[3, 1, 4], [2, 5, 0]])
    with pytest.raises(ValueError, match="row 1 is all padding"):
        encoder(torch.tensor([[3, 1], [0, 0]]))
    with pytest.raises(ValueError, match="row 0 is all padding"):
        encoder(ids, torch.tensor([[0, 0, 0], [1, 1, 1]]))
    with pytest.raises(ValueError, match="row 0 is all padding"):
        encoder(ids[:, :0])
    for bad in (9, -1):
        with pytest.raises(ValueError, match=r"ids must lie in 0 \.\. 8"):
            encoder(torch.tensor([[3, bad]]))
    with pytest.raises(ValueError, match=r"ids must have shape \(B, T\), got \(3,\)"):
        encoder(ids[0])
    with pytest.raises(TypeError, match="ids must be a tensor of integers"):
        encoder(ids.float())
    with pytest.raises(TypeError, match="ids must be a tensor of integers, got list"):
        encoder([[1, 2]])
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3\)"):
        encoder(ids, torch.ones(2, 4))
    with pytest.raises(TypeError, match="mask must be bool or integer"):
        encoder(ids, torch.ones(2, 3))
    with pytest.raises(ValueError, match="vocab_size must be at least 2"):
        SentenceEncoder(1)
    with pytest.raises(ValueError, match="hidden must be at least 1"):
        SentenceEncoder(9, hidden=0)
    sizes = [np.int64(size) for size in (9, 3, 5)]
    assert SentenceEncoder(sizes[0], dim=sizes[1], hidden=sizes[2])(ids).shape == (2, 5)


# retrieval


def slow_accuracy(vectors: Tensor, groups: list[int], k: int) -> float:
    """Sort the cosines of every query and look at the first k neighbours."""
    hits = []
    for q, group in enumerate(groups):
        if groups.count(group) < 2:
            continue
        cosine = torch.cosine_similarity(vectors[q : q + 1], vectors, dim=1)
        nearest = [i for i in cosine.argsort(descending=True).tolist() if i != q][:k]
        hits.append(any(groups[i] == group for i in nearest))
    return sum(hits) / len(hits)


@pytest.mark.parametrize("seed", range(4))
def test_retrieval_against_sorting(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = 5 * torch.randn(60, 4, generator=generator, dtype=torch.float64)
    groups = torch.randint(25, (60,), generator=generator)
    expected = {k: slow_accuracy(vectors, groups.tolist(), k) for k in (1, 3, 10, 59)}
    assert retrieval_accuracy(vectors, groups, k=(1, 3, 10, 59)) == pytest.approx(expected)
    monkeypatch.setattr("lib.margin.retrieval._CELLS", 130)  # two or three queries at a time
    assert retrieval_accuracy(vectors, groups.tolist(), k=[1, 3, 10, 59]) == pytest.approx(expected)
    assert retrieval_accuracy(vectors, groups, k=3) == pytest.approx({3: expected[3]})
    shuffled = torch.randperm(60, generator=generator)
    assert retrieval_accuracy(vectors[shuffled], groups[shuffled], k=1)[1] == pytest.approx(
        expected[1]
    )


def test_retrieval_from_a_gallery() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    gallery = torch.tensor([[2.0, 0.1], [0.3, 3.0], [1.0, -1.0]])
    found = retrieval_accuracy(queries, [1, 2, 9], gallery=(gallery, [1, 1, 2]), k=(1, 2, 3))
    assert found == {1: 0.5, 2: 0.5, 3: 1.0}  # group 9 has no answer and is left out
    same = retrieval_accuracy(queries, [1, 2, 9], gallery=(queries, [1, 2, 9]), k=1)
    assert same == {1: 1.0}


def test_a_collapsed_encoder_scores_nothing() -> None:
    groups = torch.arange(12) // 2
    assert retrieval_accuracy(torch.ones(12, 3), groups, k=(1, 9)) == {1: 0.0, 9: 0.0}
    assert retrieval_accuracy(torch.ones(12, 3), groups, k=11) == {11: 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "dim"), [(12, 3), (77, 7), (130, 768), (1003, 128)])
def test_one_direction_for_all_is_a_tie_of_all(size: int, dim: int, dtype: torch.dtype) -> None:
    """Also where rounding gives equal products unequal values, column by column."""
    generator = torch.Generator().manual_seed(size)
    groups = torch.arange(size) // 2
    for _ in range(3):
        direction = torch.randn(dim, generator=generator, dtype=dtype)
        vectors = direction * (0.1 + torch.rand(size, 1, generator=generator, dtype=dtype))
        assert retrieval_accuracy(vectors, groups, k=(1, 9)) == {1: 0.0, 9: 0.0}
        assert retrieval_accuracy(direction.expand(size, dim), groups, k=1) == {1: 0.0}


def exact_accuracy(vectors: list[list[int]], groups: list[int], k: int) -> float:
    """From the definition in fractions: cosines compare as their signed squares times |q|^2."""

    def nearness(q: int, j: int) -> Fraction:
        dot = sum(a * b for a, b in zip(vectors[q], vectors[j], strict=True))
        return Fraction(dot * abs(dot), sum(a * a for a in vectors[j]))

    hits = []
    for q, group in enumerate(groups):
        others = [j for j in range(len(groups)) if j != q]
        fellows = [nearness(q, j) for j in others if groups[j] == group]
        if fellows:
            ahead = sum(nearness(q, j) >= max(fellows) for j in others if groups[j] != group)
            hits.append(ahead < k)
    return sum(hits) / len(hits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_retrieval_with_many_ties_against_fractions(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-3, 4, (60, 3), generator=generator)
    vectors[vectors.eq(0).all(1)] = 1
    groups = torch.randint(20, (60,), generator=generator).tolist()
    expected = {k: exact_accuracy(vectors.tolist(), groups, k) for k in (1, 2, 5, 20)}
    assert 0 < expected[1] < expected[5] < 1
    found = retrieval_accuracy(0.37 * vectors.to(dtype), groups, k=(1, 2, 5, 20))
    assert found == pytest.approx(expected, rel=1e-12)


def test_retrieval_ranks_float32_vectors_as_exactly_as_they_are_given() -> None:
    """Features that share one large direction: their cosines differ by less than float32 holds."""
    generator = torch.Generator().manual_seed(2)
    centre, pairs = torch.randn(64, generator=generator), torch.arange(400) // 2
    vectors = centre + 1e-3 * torch.randn(200, 64, generator=generator)[pairs]
    vectors = vectors + 3e-4 * torch.randn(400, 64, generator=generator)
    exact = retrieval_accuracy(vectors.double(), pairs, k=(1, 5))
    assert retrieval_accuracy(vectors, pairs, k=(1, 5)) == exact
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert retrieval_accuracy(vectors, pairs, k=(1, 5)) == exact


def test_bad_input_to_retrieval() -> None:
    vectors, groups = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    with pytest.raises(ValueError, match="k must be at most the number of candidates 5"):
        retrieval_accuracy(vectors, groups, k=6)
    with pytest.raises(ValueError, match="k must be at most the number of candidates 4"):
        retrieval_accuracy(vectors, groups, k=5, gallery=(vectors[:4], groups[:4]))
    with pytest.raises(ValueError, match="k must be at least 1"):
        retrieval_accuracy(vectors, groups, k=(1, 0))
    with pytest.raises(TypeError, match="k must be an integer"):
        retrieval_accuracy(vectors, groups, k=(1.0,))
    with pytest.raises(ValueError, match="k must hold at least one number"):
        retrieval_accuracy(vectors, groups, k=())
    with pytest.raises(ValueError, match="no query has a partner"):
        retrieval_accuracy(vectors, torch.arange(6), k=1)
    with pytest.raises(ValueError, match=r"groups must have shape \(6,\), got \(5,\)"):
        retrieval_accuracy(vectors, groups[:5], k=1)
    for wrong in (groups.double(), list("aabbcc"), None, [None] * 6):
        with pytest.raises(TypeError, match="groups must be integers"):
            retrieval_accuracy(vectors, wrong, k=1)
    for wrong in (1.5, None, "5", True, torch.tensor(1.5), torch.tensor([[1]])):
        with pytest.raises(TypeError, match="k must be an integer"):
            retrieval_accuracy(vectors, groups, k=wrong)
    for right in (np.array([1, 5]), torch.tensor([1, 5]), (np.int64(1), 5)):
        found = retrieval_accuracy(vectors, groups, k=right)
        assert [(type(k), k) for k in found] == [(int, 1), (int, 5)]
    assert list(retrieval_accuracy(vectors, groups, k=torch.tensor(3))) == [3]
    for wrong in (vectors, (vectors,), 0):
        with pytest.raises(TypeError, match=r"gallery must be \(vectors, groups\), got"):
            retrieval_accuracy(vectors, groups, k=1, gallery=wrong)
    with pytest.raises(ValueError, match="no query has a partner: none finds its group there"):
        retrieval_accuracy(vectors, groups, k=1, gallery=(vectors, groups + 9))
    with pytest.raises(ValueError, match=r"vectors must have shape \(N, D\)"):
        retrieval_accuracy(vectors[0], groups, k=1)
    with pytest.raises(ValueError, match="at least one vector"):
        retrieval_accuracy(vectors[:0], groups[:0], k=1)
    with pytest.raises(ValueError, match="gallery vectors must have dimension 3, got 2"):
        retrieval_accuracy(vectors, groups, k=1, gallery=(vectors[:, :2], groups))
    for value, seen in ((0.0, "0.0"), (math.nan, "nan")):
        wrong = vectors.clone()
        wrong[4] = value
        with pytest.raises(ValueError, match=re.escape(f"row 4 has length {seen}")):
            retrieval_accuracy(wrong, groups, k=1)
