"""Derivatives, vmap and torch.compile for what :mod:`lib.crf.inference` computes.

The gradient of log Z is the expectation of what its scores count, and the gradient of an
expectation is a covariance. So :class:`Expectations` returns its own gradient as an output, and a
second derivative is one more pair of recursions (:class:`Covariance`) instead of a tape over T.

Read forwards, a covariance is also what a change of the scores does to an expectation (jvp). To
torch.compile each of these is a single operation; vmap calls them once per slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import pad

from lib.crf import inference, viterbi

__all__ = [
    "LogMessages",
    "PairMarginals",
    "best_path",
    "expectations",
    "gradient_wanted",
    "log_partition",
    "transformed",
]


def _operation(name: str, outputs: str, implementation: Callable, fake: Callable) -> Callable:
    """Call ``implementation`` directly, but as one opaque operation inside torch.compile."""
    extra = {"expectations": ", Tensor? tags", "covariance": ", Tensor node, Tensor edges"}
    scores = "Tensor emissions, Tensor transitions, Tensor start, Tensor end, Tensor mask"
    operation = torch.library.custom_op(
        f"why_it_works::crf_{name}",
        implementation,
        mutates_args=(),
        schema=f"({scores}{extra.get(name, '')}) -> {outputs}",
    )
    operation.register_fake(fake)

    def call(*arguments: Tensor | None) -> Any:
        if torch.compiler.is_compiling():
            return operation(*arguments)
        return implementation(*arguments)

    return call


def _fake_expectations(emissions: Tensor, transitions: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    batch, size = emissions.shape[0], len(transitions) + 1
    double = emissions.new_empty(batch, dtype=torch.float64)
    return double, emissions.new_empty(emissions.shape), double.new_empty(batch, size, size)


def _fake_pairs(emissions: Tensor, *_: Tensor) -> Tensor:
    batch, length, tags = emissions.shape
    return emissions.new_empty(batch, length - 1, tags, tags)


def _fake_messages(emissions: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, tags = emissions.shape
    shape = (length + 1, batch, tags + 1)
    message = emissions.new_empty(shape, dtype=torch.float64)
    return message, torch.empty_like(message)


_run_expectations = _operation(
    "expectations", "(Tensor, Tensor, Tensor)", inference.expectations, _fake_expectations
)
_run_pair_marginals = _operation("pair_marginals", "Tensor", inference.pair_marginals, _fake_pairs)
_run_covariance = _operation(
    "covariance", "(Tensor, Tensor)", inference.covariance, lambda *x: _fake_expectations(*x)[1:]
)
_run_log_messages = _operation(
    "log_messages", "(Tensor, Tensor)", inference.log_messages, _fake_messages
)
_run_best_path = _operation(
    "best_path",
    "Tensor",
    viterbi.best_path,
    lambda emissions, *_: emissions.new_empty(emissions.shape[:2], dtype=torch.long),
)


class _PerSlice(torch.autograd.Function):
    """A function that vmap calls once per slice."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple, *arguments: Tensor) -> tuple[Any, Any]:
        outputs = []
        for index in range(info.batch_size):
            slices = (
                x if dim is None else x.select(dim, index)
                for x, dim in zip(arguments, in_dims, strict=True)
            )
            outputs.append(cls.apply(*slices))
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        stacked = tuple(torch.stack(column) for column in zip(*outputs, strict=True))
        return stacked, (0,) * len(stacked)


def _gradients(
    scores: Sequence[Tensor], weight: Tensor, node: Tensor, edges: Tensor
) -> tuple[Tensor, ...]:
    """Counts (B, T, C) and (B, K, K), weighted (B,), as gradients of the scores they belong to."""
    moves = (weight @ edges.flatten(1)).view(edges.shape[1:])  # (K, K)
    return (
        weight.to(node.dtype)[:, None, None] * node,
        moves[:-1, :-1].to(scores[1].dtype),
        (weight @ node[:, 0].double()).to(scores[2].dtype),
        moves[:-1, -1].to(scores[3].dtype),
    )


class Expectations(_PerSlice):
    """log Z (B,), p(y_t = i) (B, T, C) and the expected number of transitions (B, K, K).

    With ``tags`` (B, T), each less what it is on that path: -log p(tags) and its gradient.
    """

    @staticmethod
    def forward(
        emissions: Tensor,
        transitions: Tensor,
        start: Tensor,
        end: Tensor,
        mask: Tensor,
        tags: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _run_expectations(emissions, transitions, start, end, mask, tags)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1], *output[1:])
        ctx.save_for_forward(*inputs[:-1], *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *scores, node, edges = ctx.saved_tensors
        total: tuple[Tensor, ...] | None = None
        grad_log_z, grad_node, grad_edges = grads
        if grad_log_z is not None:
            total = _gradients(scores, grad_log_z, node, edges)
        if grad_node is not None or grad_edges is not None:
            grad_node = torch.zeros_like(node) if grad_node is None else grad_node
            grad_edges = torch.zeros_like(edges) if grad_edges is None else grad_edges
            counts = Covariance.apply(*scores, grad_node, grad_edges.unsqueeze(1))
            second = _gradients(scores, edges.new_ones(len(edges)), *counts)
            total = second if total is None else tuple(map(torch.add, total, second))
        return (*(total or (None,) * 4), None, None)


class _DualExpectations(Expectations):
    """With tangents, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        *scores, node, edges = ctx.saved_tensors
        h, a, s, e = (
            torch.zeros_like(score) if tangent is None else tangent
            for score, tangent in zip(scores, tangents[:4], strict=False)
        )
        h = torch.cat([h[:, :1] + s, h[:, 1:]], 1)  # the start score counts at the first tag
        a = pad(torch.cat([a, e.unsqueeze(1)], 1), (0, 0, 0, 1)).expand_as(edges)  # (B, K, K)
        counts = Covariance.apply(*scores, h, a.unsqueeze(1))
        log_z = (node.double() * h).sum((1, 2)) + (edges * a).sum((1, 2))
        return log_z, *counts


class PairMarginals(_PerSlice):
    """p(y_t = i, y_{t+1} = j), (B, T-1, C, C)."""

    @staticmethod
    def forward(
        emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor
    ) -> Tensor:
        return _run_pair_marginals(emissions, transitions, start, end, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores = ctx.saved_tensors
        edges = pad(grad, (0, 1, 0, 1, 0, 1))  # (B, T, K, K)
        counts = Covariance.apply(*scores, torch.zeros_like(scores[0]), edges)
        weight = torch.ones(len(grad), dtype=torch.float64, device=grad.device)
        return (*_gradients(scores, weight, *counts), None)


class Covariance(_PerSlice):
    """Cov(counts, S) for a sum S of node and edge terms: what derives an expectation."""

    @staticmethod
    def forward(
        emissions: Tensor,
        transitions: Tensor,
        start: Tensor,
        end: Tensor,
        mask: Tensor,
        node: Tensor,
        edges: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return _run_covariance(emissions, transitions, start, end, mask, node, edges)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError("lib.crf has no third derivatives of log Z")


class LogMessages(_PerSlice):
    """Logs of ``before`` and ``behind`` (N, B, K), up to a constant for each time and sequence."""

    @staticmethod
    def forward(
        emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _run_log_messages(emissions, transitions, start, end, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(*output)


class _BestPath(_PerSlice):
    @staticmethod
    def forward(
        emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor
    ) -> Tensor:
        return _run_best_path(emissions, transitions, start, end, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)


def transformed() -> bool:
    """Whether torch.compile is tracing or a torch.func transform is active."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def gradient_wanted(*scores: Tensor) -> bool:
    """Whether a derivative of these may be asked for."""
    return (
        transformed()
        or (torch.is_grad_enabled() and any(x.requires_grad for x in scores))
        or any(forward_ad.unpack_dual(x).tangent is not None for x in scores)
    )


def expectations(*arguments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """:class:`Expectations` of the scores and, or None, the tags: differentiable in every mode."""
    kind = Expectations if torch.compiler.is_compiling() else _DualExpectations
    return kind.apply(*arguments)


def log_partition(*scores: Tensor) -> Tensor:
    """log Z (B,) in float64, by half a sweep where no gradient is wanted."""
    if gradient_wanted(*scores):
        return expectations(*scores, None)[0]
    return inference.log_partition(*scores)


def best_path(*scores: Tensor) -> Tensor:
    """The best tags (B, T), -1 in the padding."""
    if transformed():
        return _BestPath.apply(*(x.detach() for x in scores))
    return viterbi.best_path(*scores)
