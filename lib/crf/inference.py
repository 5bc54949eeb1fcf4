"""What the distribution asks for, differentiable: expectations, pair marginals, covariances.

The gradient of log Z is the expectation of what its scores count, and the gradient of an
expectation is a covariance. So :class:`Expectations` returns its own gradient as an output, and a
second derivative is one more pair of recursions (:class:`Covariance`) instead of a tape over T.

Each function takes the scores ``(emissions (B, T, C), transitions (C, C), start (C,), end (C,),
mask (B, T))``, goes the scaled route where float64 can hold the messages and through log space
where it cannot. To torch.compile they are single operations; under vmap they run once per slice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lib.crf import scaled, viterbi
from lib.crf.semiring import Chain, backward, forward, logsumexp

__all__ = [
    "Expectations",
    "LogMessages",
    "PairMarginals",
    "best_path",
    "gradient_wanted",
    "log_partition",
    "path_score",
    "transformed",
]


def path_score(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor, tags: Tensor
) -> Tensor:
    """The score (...,) in float64 of ``tags`` (..., B, T); padding counts as tag C."""
    num_tags = len(start)
    tags = torch.where(mask, tags, num_tags)
    node = emissions.expand(*tags.shape, num_tags)
    node = node.gather(-1, tags.clamp(max=num_tags - 1).unsqueeze(-1)).squeeze(-1)
    node = torch.where(mask, node, 0).sum(-1, dtype=torch.float64)
    table = pad(torch.cat([transitions, end.unsqueeze(1)], 1).double(), (0, 0, 0, 1)).flatten()
    moves = tags * (num_tags + 1) + pad(tags[..., 1:], (0, 1), value=num_tags)
    edge = table.gather(0, moves.flatten()).view_as(moves).sum(-1)
    first = start.double().gather(0, tags[..., 0].flatten()).view_as(node)
    return first + node + edge


def _check_paths(log_z: Tensor) -> None:
    """Refuse sequences without a path."""
    empty = (log_z == -torch.inf).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"no path is allowed: every score is -inf in sequences {empty}")


def _log_messages(*scores: Tensor) -> tuple[Tensor, Tensor]:
    """Logs of ``before`` and ``behind`` (N, B, K), up to a constant for each time and sequence."""
    messages = scaled.log_messages(*scores)
    if messages is None:
        chain = Chain.pad(*scores)
        messages = forward(chain), backward(chain)
        _check_paths(messages[0][-1, :, -1])
    return messages


def _log_partition(*scores: Tensor) -> Tensor:
    log_z = scaled.log_partition(*scores)
    if log_z is None:
        chain = Chain.pad(*scores)
        log_z = forward(chain)[-1, :, -1] + chain.offset
        _check_paths(log_z)
    return log_z


def _log_expectations(*scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log Z (B,), p(y_t = k) (N, B, K) and expected transitions (B, K, K), in log space."""
    chain = Chain.pad(*scores)
    before, behind = forward(chain), backward(chain)
    log_z = before[-1, :, -1]
    _check_paths(log_z)
    after, ahead = before + chain.emissions, behind + chain.emissions - log_z.unsqueeze(1)
    edges = torch.zeros_like(chain.transitions).repeat(len(log_z), 1, 1)
    for here, there in zip(after[:-1], ahead[1:], strict=True):
        edges += (here.unsqueeze(2) + chain.transitions + there.unsqueeze(1)).exp()
    return log_z + chain.offset, (before + ahead).exp(), edges


def _subtract_path(
    scores: tuple[Tensor, ...], tags: Tensor, log_z: Tensor, node: Tensor, edges: Tensor
) -> None:
    """Subtract in place what is known of one path: its score and what it counts.

    NumPy and torch read the same here; on the CPU it is NumPy, for its small overhead.
    """
    arrays: Any = (x.detach() for x in (*scores, tags, log_z, node, edges))
    xp: Any = torch
    if tags.device.type == "cpu":
        arrays, xp = (x.numpy() for x in arrays), np
    emissions, transitions, start, end, mask, tags, log_z, node, edges = arrays
    batch, size = edges.shape[:2]
    rows, times = xp.where(mask)  # sequence by sequence
    tag = tags[rows, times]
    next_tag = xp.full_like(tag, size - 1)
    next_tag[:-1] = xp.where(rows[1:] == rows[:-1], tag[1:], size - 1)
    table = xp.zeros_like(edges[0])
    table[:-1, :-1], table[:-1, -1] = transitions, end
    score = emissions[rows, times, tag] + table[tag, next_tag]
    log_z -= start[tags[:, 0]] + xp.bincount(rows, score, batch)
    node[times, rows, tag] -= 1.0
    moves = (rows * size + tag) * size + next_tag
    edges -= xp.bincount(moves, None, batch * size**2).reshape(edges.shape)


def _expectations(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    mask: Tensor,
    tags: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What :class:`Expectations` returns."""
    scores = emissions, transitions, start, end, mask
    log_z, node, edges = scaled.expectations(*scores) or _log_expectations(*scores)
    if tags is not None and len(tags):
        _subtract_path(scores, tags, log_z, node, edges)
    marginals = torch.empty_like(emissions, memory_format=torch.contiguous_format)
    return log_z, marginals.copy_(node[:-1, :, :-1].transpose(0, 1)), edges


def _softmax(scores: Tensor, dim: int) -> Tensor:
    """Softmax; 0 where all scores are -inf."""
    total = logsumexp(scores, dim).unsqueeze(dim)
    return (scores - torch.where(total == -torch.inf, 0, total)).exp()


def _pair_marginals(*scores: Tensor) -> Tensor:
    """p(y_t = i, y_{t+1} = j), (B, T-1, C, C)."""
    chain = Chain.pad(*scores)
    before, behind = _log_messages(*scores)
    ahead = behind + chain.emissions
    after = before + chain.emissions
    pair = after[:-2].unsqueeze(3) + chain.transitions + ahead[1:-1].unsqueeze(2)
    pair = _softmax(pair.flatten(2), 2).view_as(pair)[..., :-1, :-1]
    return pair.transpose(0, 1).to(scores[0].dtype).contiguous()


def _covariance(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    mask: Tensor,
    node: Tensor,
    edges: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cov(counts, S) for S(y) = sum_t node_t(y_t) + sum_t edges_t(y_t, y_{t+1}).

    With the posterior kernels P(y_{t-1} = i | y_t = j, past) and P(y_{t+1} = j | y_t = i, future),
    the parts of S before and behind t have conditional means

        F_t(j) = node_t(j) + sum_i P(i | j) [F_{t-1}(i) + edges_{t-1}(i, j)],
        R_t(i) = sum_j P(j | i) [edges_t(i, j) + node_{t+1}(j) + R_{t+1}(j)],

    and the covariance with the count of tag i at t is p_t(i) (F_t(i) + R_t(i) - E S).

    ``node`` is (B, T, C), ``edges`` is (B, T or 1, K, K).
    """
    scores = emissions, transitions, start, end, mask
    chain = Chain.pad(*scores)
    before, behind = _log_messages(*scores)
    after, ahead = before + chain.emissions, behind + chain.emissions
    node = pad(node.double().transpose(0, 1), (0, 1, 0, 0, 0, 1))  # (N, B, K)
    edges = edges.double().transpose(0, 1).expand(len(node) - 1, -1, -1, -1)  # (T, B, K, K)
    p = _softmax(before + ahead, 2)

    past, kernels = [node[0]], []
    for t in range(1, len(node)):
        kernels.append(_softmax(after[t - 1].unsqueeze(2) + chain.transitions, 1))
        mean = (kernels[-1] * (past[-1].unsqueeze(2) + edges[t - 1])).sum(1)
        past.append(node[t] + mean)
    rest = [torch.zeros_like(node[0])]
    for t in range(len(node) - 2, -1, -1):
        kernel = _softmax(chain.transitions + ahead[t + 1].unsqueeze(1), 2)
        mean = (kernel * (edges[t] + (node[t + 1] + rest[-1]).unsqueeze(1))).sum(2)
        rest.append(mean)
    rest.reverse()

    mean = (p[0] * (past[0] + rest[0])).sum(1, keepdim=True)  # E S, (B, 1)
    node_grad = p * (torch.stack(past) + torch.stack(rest) - mean)
    edge_grad = torch.zeros_like(chain.transitions)
    for t, kernel in enumerate(kernels):
        total = past[t].unsqueeze(2) + edges[t] + (node[t + 1] + rest[t + 1] - mean).unsqueeze(1)
        edge_grad += (p[t + 1].unsqueeze(1) * kernel * total).sum(0)
    return (
        node_grad[:-1, :, :-1].transpose(0, 1).to(emissions.dtype).contiguous(),
        edge_grad[:-1, :-1].to(transitions.dtype).contiguous(),
        node_grad[0, :, :-1].sum(0).to(start.dtype),
        edge_grad[:-1, -1].to(end.dtype).contiguous(),
    )


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
    "expectations", "(Tensor, Tensor, Tensor)", _expectations, _fake_expectations
)
_run_pair_marginals = _operation("pair_marginals", "Tensor", _pair_marginals, _fake_pairs)
_run_covariance = _operation(
    "covariance",
    "(Tensor, Tensor, Tensor, Tensor)",
    _covariance,
    lambda *arguments: tuple(x.new_empty(x.shape) for x in arguments[:4]),
)
_run_log_messages = _operation("log_messages", "(Tensor, Tensor)", _log_messages, _fake_messages)
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

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *scores, node, edges = ctx.saved_tensors
        total: tuple[Tensor, ...] | None = None
        grad_log_z, grad_node, grad_edges = grads
        if grad_log_z is not None:
            weight = grad_log_z.to(node.dtype)
            moves = (grad_log_z @ edges.flatten(1)).view(edges.shape[1:])  # (K, K)
            total = (
                weight[:, None, None] * node,
                moves[:-1, :-1].to(scores[1].dtype),
                (weight @ node[:, 0]).to(scores[2].dtype),
                moves[:-1, -1].to(scores[3].dtype),
            )
        if grad_node is not None or grad_edges is not None:
            grad_node = torch.zeros_like(node) if grad_node is None else grad_node
            grad_edges = torch.zeros_like(edges) if grad_edges is None else grad_edges
            second = Covariance.apply(*scores, grad_node, grad_edges.unsqueeze(1))
            total = second if total is None else tuple(map(torch.add, total, second))
        return (*(total or (None,) * 4), None, None)


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
        return (*Covariance.apply(*scores, torch.zeros_like(scores[0]), edges), None)


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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    return transformed() or (torch.is_grad_enabled() and any(x.requires_grad for x in scores))


def log_partition(*scores: Tensor) -> Tensor:
    """log Z (B,) in float64, by half a sweep where no gradient is wanted."""
    if gradient_wanted(*scores):
        return Expectations.apply(*scores, None)[0]
    return _log_partition(*scores)


def best_path(*scores: Tensor) -> Tensor:
    """The best tags (B, T), -1 in the padding."""
    if transformed():
        return _BestPath.apply(*(x.detach() for x in scores))
    return viterbi.best_path(*scores)
