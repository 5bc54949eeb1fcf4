"""How a solution moves with its parameters: forward sensitivities, all steps at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._fixed import march, schedule
from ._gradient import agrees, all_steps, step_jacobians, vectorised
from ._problem import Problem
from ._settings import choose, gather_settings
from ._solve import solve

__all__ = ["Model"]


class Model:
    """The predictions of a field as a function of one vector of parameters.

    The vector holds the parameters of ``field`` that require a gradient, in the order of
    ``named_parameters``, and then, if ``moves`` is true, the initial state.
    """

    def __init__(
        self,
        field: nn.Module,
        y0: Tensor,
        t: Tensor | Sequence[float],
        *,
        method: str | None,
        step_size: float | None,
        rtol: float,
        atol: float,
        observe: Callable[[Tensor], Tensor],
        moves: bool,
    ) -> None:
        self.field, self.y0, self.observe, self.moves = field, y0.detach(), observe, moves
        self.method, self.adaptive = choose(method)
        self.settings = gather_settings(self.method, self.adaptive, step_size, None)
        self.tolerances = (rtol, atol)
        self.t = t.detach() if isinstance(t, Tensor) else t
        self.parameters = {n: p for n, p in field.named_parameters() if p.requires_grad}
        pieces = {**self.parameters, **({"y0": y0} if moves else {})}
        if not pieces:
            raise ValueError("field has no parameter that requires a gradient")
        self.shapes = {name: piece.shape for name, piece in pieces.items()}
        self.start = torch.cat([p.detach().reshape(-1).double() for p in pieces.values()])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """The pieces of a vector by name, in their shapes."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        pieces = vector.split(sizes)
        return {
            name: piece.reshape(shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }

    def predict(self, vector: Tensor) -> Tensor:
        """What is observed of the solution (T, ...), in float64, without a graph."""
        with torch.no_grad():
            return self.observe(self._solve(self.load(vector))).double()

    def load(self, vector: Tensor) -> Tensor:
        """Put a vector into the field and return the initial state that goes with it."""
        pieces = self.split(vector.detach())
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(pieces[name])
        return pieces["y0"].to(self.y0.dtype) if self.moves else self.y0

    def jacobian(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The predictions (T, ...) and their derivatives (T, ..., P)."""
        vector = vector.detach()
        found = None if self.adaptive or not self.method.explicit else self._forward(vector)
        if found is None:
            return self._backward(vector)
        states, moved = found
        with torch.no_grad():
            pushed = torch.func.vmap(
                lambda direction: torch.func.jvp(self.observe, (states,), (direction,))[1],
                in_dims=-1,
            )(moved)
            return self.observe(states).double(), pushed.double().movedim(0, -1)

    def _solve(self, y0: Tensor) -> Tensor:
        problem = Problem.of(self.field, y0, self.t)
        return solve(problem, self.method, self.adaptive, dict(self.settings), *self.tolerances)

    def _forward(self, vector: Tensor) -> tuple[Tensor, Tensor] | None:
        """States (T, *shape) and S = dy/dvector (T, *shape, P), by S_(n+1) = J_n S_n + G_n."""
        y0 = self.load(vector)
        problem = Problem.of(self.field, y0, self.t)
        plan = schedule(problem.t, problem.values, y0, **self.settings)
        if not len(plan) or not y0.numel():
            return None
        many, size = vectorised(problem.func, y0, plan.points[0])
        if many is None:
            return None
        with torch.no_grad():
            path = torch.stack(march(problem.func, y0, plan, self.method, range(len(plan) + 1)))
        before = path[:-1].clone().requires_grad_()
        with torch.enable_grad():
            ahead = all_steps(many, before, plan, self.method)
            if not agrees(ahead, path):
                return None
            matrices = step_jacobians(ahead, before, size)

        def after(vector: Tensor) -> Tensor:
            field, _ = vectorised(self._with(vector), y0, plan.points[0], tried=True)
            assert field is not None
            return all_steps(field, before.detach(), plan, self.method)

        width = len(vector)
        inputs = torch.func.jacfwd(after)(vector).to(y0.dtype).reshape(len(plan), -1, size, width)
        start = torch.zeros(y0.numel(), width, dtype=y0.dtype, device=y0.device)
        if self.moves:
            start[:, -y0.numel() :] = torch.eye(y0.numel(), dtype=y0.dtype, device=y0.device)
        moved = [start.reshape(-1, size, width)]
        for row, matrix in zip(inputs.unbind(), matrices.unbind(), strict=True):
            moved.append(torch.baddbmm(row, matrix, moved[-1]))
        wanted = torch.tensor(plan.wanted, device=y0.device)
        return path[wanted], torch.stack(moved).reshape(*path.shape, width)[wanted]

    def _with(self, vector: Tensor) -> Callable[..., Any]:
        """The field as a function of a vector, for derivatives by it."""
        pieces = self.split(vector)
        named = {name: pieces[name].to(p.dtype) for name, p in self.parameters.items()}

        def func(t: Tensor, y: Tensor) -> Tensor:
            return torch.func.functional_call(self.field, named, (t, y))

        func.pointwise = getattr(self.field, "pointwise", None)  # type: ignore[attr-defined]
        return func

    def _backward(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The same through the graph of the solution, all rows at once."""
        y0 = self.load(vector)
        if self.moves:
            y0 = y0.clone().requires_grad_()
        inputs = [*self.parameters.values(), *([y0] if self.moves else [])]
        with torch.enable_grad():
            predicted = self.observe(self._solve(y0))
        rows = torch.eye(predicted.numel(), dtype=predicted.dtype, device=predicted.device)
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if predicted.requires_grad:
            found = torch.autograd.grad(
                predicted,
                inputs,
                rows.reshape(-1, *predicted.shape),
                allow_unused=True,
                is_grads_batched=True,
            )
        columns = [
            torch.zeros(len(rows), x.numel()).to(rows) if g is None else g.reshape(len(rows), -1)
            for g, x in zip(found, inputs, strict=True)
        ]
        matrix = torch.cat([column.double() for column in columns], dim=1)
        return predicted.detach().double(), matrix.reshape(*predicted.shape, len(vector))
