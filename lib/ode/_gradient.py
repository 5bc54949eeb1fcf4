"""The gradient of a fixed-step solution, with the Jacobians of all its steps taken at once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from lib._common import is_transformed

from ._fixed import Schedule, march
from ._methods import Field, Method

__all__ = ["agrees", "all_steps", "leaves", "march_in_parallel", "step_jacobians", "vectorised"]

_WIDEST_STATE = 8  # one product with all the Jacobians for each component
_LARGEST_STATE = 2048  # beyond, a step is work enough to hide what it costs to call it
_FEWEST_STEPS = 16

# Maps the times and scales of all steps and the states before them to the states after them.
Steps = Callable[[Tensor, Tensor, Tensor], Tensor]


def march_in_parallel(func: Field, y: Tensor, plan: Schedule, method: Method) -> Tensor | None:
    """``march``, differentiable by one pass over all steps at once; None where that cannot be.

    The march itself leaves no graph. One step from all its states together does, and holds in it
    the Jacobian of every step; what remains to be done one step after the other is the product
    lambda_n = g_n + J_n^T lambda_(n+1) of small matrices.

    A field whose attribute ``pointwise`` is true is called with all states at once, time being
    their first axis. Any other is tried under vmap and must come to the states of the march.

    Returns:
        The states at the wanted points (T, *y.shape).
    """
    if not _worth_it(y, plan, method):
        return None
    asked = y.requires_grad or plan.points.requires_grad
    if not asked and not func(plan.points[0].to(y.dtype), y).requires_grad:
        return None  # the march itself notices a gradient that is asked for later
    field, size = vectorised(func, y, plan.points[0])
    if field is None:
        return None
    with torch.no_grad():
        path = torch.stack(march(func, y, plan, method, range(len(plan) + 1)))
    before = path[:-1].clone().requires_grad_()
    try:
        after = all_steps(field, before, plan, method)
    except Exception:
        return None  # the march will raise it again, if it was not for vmap
    if not agrees(after, path):
        return None
    found = [leaf for leaf in leaves(after) if leaf is not before]
    if not (found or y.requires_grad):
        return path[_index(plan, y)]
    again = _Again(func, plan, method)
    states = _Path.apply(again, [path], size, y, after, before, *found)
    return states if len(plan.wanted) == len(path) else states[_index(plan, y)]


def leaves(value: Tensor, stops: Collection[Any] = ()) -> list[Tensor]:
    """The tensors at which the graph of ``value`` begins; at the nodes ``stops`` it ends."""
    pending, seen, found = [value.grad_fn], set(stops), []
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        pending += [parent for parent, _ in node.next_functions]
    return found


def _worth_it(y: Tensor, plan: Schedule, method: Method) -> bool:
    return (
        torch.is_grad_enabled()
        and method.explicit
        and not y.is_complex()
        and 0 < y.numel() <= _LARGEST_STATE
        and len(plan) >= _FEWEST_STEPS
        and not is_transformed()
    )


def vectorised(
    func: Field, y: Tensor, t: Tensor, *, tried: bool = False
) -> tuple[Field | None, int]:
    """``func`` for many states at once, and how many components of a state hang together.

    It is tried at the time ``t``; ``tried`` says that this field has passed already.
    """
    declared = getattr(func, "pointwise", None)
    if declared is False:
        return None, 0
    if declared and y.dim() and y.shape[-1] <= _WIDEST_STATE:
        return func, y.shape[-1]
    if y.numel() <= _WIDEST_STATE:
        sample, size = y.shape, y.numel()
    elif y.dim() > 1 and y.shape[-1] <= _WIDEST_STATE:
        sample, size = torch.Size([*[1] * (y.dim() - 1), y.shape[-1]]), y.shape[-1]
    else:
        return None, 0

    def single(t: Tensor, y: Tensor) -> Tensor:
        return func(t, y.reshape(sample)).reshape(-1)

    def many(t: Tensor, states: Tensor) -> Tensor:
        rows = states.reshape(-1, size)
        times = t.reshape(len(t), 1).expand(len(t), len(rows) // len(t)).reshape(-1)
        return torch.func.vmap(single)(times, rows).reshape(states.shape)

    if tried:
        return many, size
    state, now = y.detach(), t.detach().to(y.dtype)
    if _remembers(func, now, state):
        return None, 0
    try:
        with torch.no_grad():
            many(now.expand(2), torch.stack([state, state]))
            apart = size == y.numel() or _rows_are_apart(func, now, state)
    except Exception:
        return None, 0
    return (many, size) if apart else (None, 0)


def _remembers(func: Field, t: Tensor, y: Tensor) -> bool:
    """Whether a call leaves its mark on the module (running statistics): no trial may, then."""
    owner = getattr(func, "owner", None)
    before = _kept(owner)
    if not before:
        return False
    with torch.no_grad():
        func(t, y)
    after = _kept(owner)
    return len(before) != len(after) or any(
        a is not b or m != n for (a, m), (b, n) in zip(before, after, strict=True)
    )


def _kept(owner: nn.Module | None) -> list[tuple[Tensor, int]]:
    """The tensors of a module other than its parameters, each with its version."""
    return [
        (x, 0 if x.is_inference() else x._version)
        for module in (() if owner is None else owner.modules())
        for x in (*vars(module).values(), *module.buffers(recurse=False))
        if isinstance(x, Tensor)
    ]


def _rows_are_apart(func: Field, t: Tensor, y: Tensor) -> bool:
    """Whether no row of the slope feels another row: half of the rows are poisoned in turn.

    Not a number betrays the faintest touch, but a comparison swallows it, as in torch.where;
    so numbers of either sign have to leave no mark either.
    """
    rows = torch.arange(y.numel() // y.shape[-1], device=y.device).reshape(*y.shape[:-1], 1)
    slope, far = func(t, y), y.abs() + 1
    slack = 64 * torch.finfo(y.dtype).eps * slope.abs().max()
    for half in (rows % 2 == 0, rows % 2 == 1):
        if not bool((func(t, torch.where(half, torch.nan, y)).isfinite() | half).all()):
            return False
        for poison in (far, -far):
            moved = func(t, torch.where(half, poison, y)) - slope
            if not bool(((moved.abs() <= slack) | half).all()):
                return False
    return True


def all_steps(field: Field, states: Tensor, plan: Schedule, method: Method) -> Tensor:
    """Take the step from every state (n, *shape) at once."""
    shape = (-1, *[1] * (states.dim() - 1))
    times = [column.reshape(shape) for column in plan.times(method, states).unbind(1)]
    scales = [column.reshape(shape) for column in plan.scales(method, states).unbind(1)]
    return method.advance(field, times, scales, states)


def agrees(after: Tensor, path: Tensor) -> bool:
    """Whether all steps taken at once lead where the march (n+1, *shape) went, but for rounding."""
    rounding = 256 * torch.finfo(path.dtype).eps * float(path.abs().max())
    return torch.allclose(after.detach(), path[1:], rtol=0.0, atol=rounding)


def _index(plan: Schedule, y: Tensor) -> Tensor:
    return torch.tensor(plan.wanted, device=y.device)


class _Again:
    """The march with its graph, for gradients that are to be differentiated themselves."""

    def __init__(self, func: Field, plan: Schedule, method: Method) -> None:
        self.func, self.plan, self.method = func, plan, method

    def gradients(
        self, y: Tensor, others: tuple[Tensor, ...], gradient: Tensor
    ) -> list[Tensor | None]:
        path = torch.stack(march(self.func, y, self.plan, self.method, range(len(self.plan) + 1)))
        inputs = [x for x in (y, *others) if x.requires_grad]
        found = torch.autograd.grad(path, inputs, gradient, create_graph=True, allow_unused=True)
        by_input = {id(x): g for x, g in zip(inputs, found, strict=True)}
        first, *rest = [by_input.get(id(x)) for x in (y, *others)]
        if y.requires_grad and others:  # autograd will add once more what reaches them through y
            through = torch.autograd.grad(y, others, first, create_graph=True, allow_unused=True)
            pairs = zip(rest, through, strict=True)
            rest = [g if g is None or h is None else g - h for g, h in pairs]
        return [first, *rest]


class _Path(torch.autograd.Function):
    """The path of states as a function of its first one and of what changes the steps."""

    @staticmethod
    def forward(
        ctx: Any,
        again: _Again,
        path: list[Tensor],
        size: int,
        y: Tensor,
        after: Tensor,
        before: Tensor,
        *others: Tensor,
    ) -> Tensor:
        ctx.again, ctx.size = again, size
        ctx.save_for_backward(y, after, before, *others)
        return path[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, after, before, *others = ctx.saved_tensors
        if torch.is_grad_enabled():
            first, *rest = ctx.again.gradients(y, tuple(others), gradient)
            return None, None, None, first, None, None, *rest
        sensitivity = _reverse(step_jacobians(after, before, ctx.size), gradient)
        steps = sensitivity[1:] if others else None  # their graph leads on to ``others``
        return None, None, None, sensitivity[0], steps, None, *[None] * len(others)


def step_jacobians(after: Tensor, before: Tensor, size: int) -> Tensor:
    """d after[n, b, i] / d before[n, b, j] as (n, B, i, j), from one product per component."""
    rows = []
    for component in range(size):
        seed = torch.zeros_like(after)
        seed.view(-1, size)[:, component] = 1.0
        (row,) = torch.autograd.grad(after, before, seed, retain_graph=True)
        rows.append(row.reshape(len(after), -1, size))
    return torch.stack(rows, dim=-2)


def _reverse(jacobians: Tensor, gradient: Tensor) -> Tensor:
    """lambda_N = g_N, lambda_n = g_n + J_n^T lambda_(n+1); ``gradient`` (n+1, *shape)."""
    steps, samples, size, _ = jacobians.shape
    rows = gradient.reshape(steps + 1, samples, 1, size).unbind()
    current = rows[-1]
    out = [current]
    for row, matrix in zip(reversed(rows[:-1]), reversed(jacobians.unbind()), strict=True):
        current = torch.baddbmm(row, current, matrix)  # (B, 1, D)
        out.append(current)
    return torch.stack(out[::-1]).reshape(gradient.shape)
