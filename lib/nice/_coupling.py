"""The invertible layers: additive and affine coupling, and the scaling that ends a flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor, nn

from lib._common import check_positive
from lib.nice._door import check_even, enter, require_finite
from lib.nice._linear import ColumnLinear

__all__ = ["AdditiveCoupling", "AffineCoupling", "Coupling", "Scaling", "join", "split"]


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) -> its even and its odd coordinates, (..., D/2) each."""
    return x[..., 0::2].contiguous(), x[..., 1::2].contiguous()


def join(even: Tensor, odd: Tensor) -> Tensor:
    """The inverse of ``split``."""
    return torch.stack((even, odd), -2).mT.flatten(-2)


class _ReLUNetwork(nn.Sequential):
    """Layers with a ReLU after each but the last; as modules of their own, ReLUs cost 2 %."""

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self
        for layer in inner:
            x = layer(x).relu_()
        return last(x)


def _network(
    inputs: int, outputs: int, hidden: int, num_hidden: int, linear: Callable[..., nn.Module]
) -> nn.Module:
    """A ReLU network that starts lively inside (He et al., 2015) and timid at its output.

    torch's default weights shrink a signal by about 2.4 in each ReLU layer, so that five layers
    leave next to nothing; large outputs, on the other hand, would start far from the data.
    """
    widths = [inputs] + [hidden] * num_hidden
    layers = [linear(before, after) for before, after in pairwise(widths)]
    last = linear(hidden, outputs)
    for layer, gain in [*((layer, math.sqrt(2)) for layer in layers), (last, 0.1)]:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return _ReLUNetwork(*layers, last)


class Coupling(nn.Module):
    """What couplings share: one half of the coordinates is kept and decides how the other moves.

    A subclass says how, in ``move`` and ``move_back``, and how many numbers its network returns
    for each moved coordinate.
    """

    outputs_per_coordinate = 1

    def __init__(
        self,
        dim: int,
        *,
        swap: bool = False,
        hidden: int = 1000,
        num_hidden: int = 5,
        linear: Callable[..., nn.Module] = ColumnLinear,
        net: nn.Module | None = None,
    ) -> None:
        check_even(dim)
        check_positive(hidden, "hidden")
        check_positive(num_hidden, "num_hidden")
        super().__init__()
        self.dim, self.swap = dim, swap
        self.outputs = self.outputs_per_coordinate * dim // 2
        if net is None:
            net = _network(dim // 2, self.outputs, hidden, num_hidden, linear)
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, got {net!r}")
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., D) -> (z (..., D), log |det dz/dx| (...,))."""
        even, odd = split(self._enter(x, "x"))
        even, odd, log_abs_det = self.couple(even, odd, even.new_zeros(even.shape[:-1]))
        return join(even, odd), log_abs_det

    def inverse(self, z: Tensor) -> Tensor:
        """The x (..., D) that ``forward`` maps to ``z``."""
        return join(*self.uncouple(*split(self._enter(z, "z"))))

    def couple(
        self, even: Tensor, odd: Tensor, log_abs_det: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``forward`` on halves (..., D/2) that are already split, added to a log |det| so far."""
        kept, moved = (odd, even) if self.swap else (even, odd)
        moved, log_abs_det = self.move(moved, self._network_output(kept), log_abs_det)
        return (moved, kept, log_abs_det) if self.swap else (kept, moved, log_abs_det)

    def uncouple(self, even: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
        """``inverse`` on halves (..., D/2) that are already split."""
        kept, moved = (odd, even) if self.swap else (even, odd)
        moved = self.move_back(moved, self._network_output(kept))
        return (moved, kept) if self.swap else (kept, moved)

    def move(self, moved: Tensor, output: Tensor, log_abs_det: Tensor) -> tuple[Tensor, Tensor]:
        """The moved half and log |det| so far, given what the network said of the kept half."""
        raise NotImplementedError

    def move_back(self, moved: Tensor, output: Tensor) -> Tensor:
        """The inverse of ``move`` in its first argument."""
        raise NotImplementedError

    def last_shift(self) -> Tensor:
        """The part (D/2,) of the network's last bias that shifts every point alike: a view.

        Raises:
            TypeError: if the network does not end in a layer with such a bias.
        """
        last = self.net
        while isinstance(last, nn.Sequential):
            last = last[-1]
        bias = getattr(last, "bias", None)
        if not isinstance(bias, nn.Parameter) or bias.shape != (self.outputs,):
            raise TypeError(
                f"net must end in a layer with a bias ({self.outputs},) for its shift to be "
                f"changed, got {last}"
            )
        return bias[-self.dim // 2 :]

    def extra_repr(self) -> str:
        """The numbers that ``repr`` shows."""
        return f"dim={self.dim}, swap={self.swap}"

    def _dtype(self, default: torch.dtype) -> torch.dtype:
        parameter = next(self.net.parameters(), None)
        return default if parameter is None else parameter.dtype

    def _enter(self, x: Tensor, name: str) -> Tensor:
        dtype = x.dtype if isinstance(x, Tensor) and x.is_floating_point() else torch.float32
        x = enter(x, self.dim, self._dtype(dtype), name)
        require_finite(x, name)
        return x

    def _own_input(self, kept: Tensor) -> Tensor:
        """What the network may have: a copy, unless it begins linearly and so does not write."""
        first: nn.Module | None = self.net
        while isinstance(first, nn.Sequential) and type(first) in (nn.Sequential, _ReLUNetwork):
            first = next(iter(first), None)
        weight = first._parameters.get("weight") if isinstance(first, nn.Linear) else None
        dtype = self._dtype(kept.dtype) if weight is None else weight.dtype  # a walk is slow
        return kept.to(dtype, copy=not isinstance(first, nn.Linear))

    def _network_output(self, kept: Tensor) -> Tensor:
        output = self.net(self._own_input(kept))
        expected = (*kept.shape[:-1], self.outputs)
        if not isinstance(output, Tensor) or output.shape != expected:
            seen = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"net must map {tuple(kept.shape)} to {expected}, got {seen}")
        return output


class AdditiveCoupling(Coupling):
    """One half is kept, the other is shifted by what a network says of it; the volume stays.

    z_1 = x_1,  z_2 = x_2 + m(x_1),  log |det dz/dx| = 0

    x_1 are the even coordinates and x_2 the odd ones; with ``swap`` it is the other way round.
    The inverse x_2 = z_2 - m(z_1) costs the same and asks of m only that it returns the same for
    the same x_1 (so no dropout while training): it may be any such network.

    Args:
        dim: D, even.
        swap: keep the odd coordinates and move the even ones.
        hidden: width of the hidden layers of m.
        num_hidden: their number.
        linear: makes each linear layer from (inputs, outputs), e.g. ``OneDNNLinear``.
        net: use this module, (..., D/2) -> (..., D/2), as m instead.

    Raises:
        ValueError: if ``dim`` is odd, or a tensor's last axis is not ``dim`` or it is not finite,
            or ``net`` returns another shape.
        TypeError: if a tensor is not floating-point, or ``net`` is not a module.

    Source: chapter `nice`, eq-nice-coupling; Dinh, Krueger and Bengio (2015).

    >>> coupling = AdditiveCoupling(4, hidden=8, num_hidden=1)
    >>> x = torch.tensor([[0.5, -1.0, 2.0, 0.25]])
    >>> z, log_abs_det = coupling(x)
    >>> z[:, 0::2].equal(x[:, 0::2]), log_abs_det.tolist()
    (True, [0.0])
    >>> torch.allclose(coupling.inverse(z), x)
    True
    """

    def move(self, moved: Tensor, output: Tensor, log_abs_det: Tensor) -> tuple[Tensor, Tensor]:
        """x_2 + m(x_1), and no change of volume."""
        return moved + output, log_abs_det

    def move_back(self, moved: Tensor, output: Tensor) -> Tensor:
        """z_2 - m(z_1)."""
        return moved - output


class AffineCoupling(Coupling):
    """Additive coupling that also stretches: the step from NICE to RealNVP.

    z_1 = x_1,  z_2 = x_2 e^{s(x_1)} + t(x_1),  log |det dz/dx| = sum_i s_i(x_1)

    The log-scales are kept in (-bound, bound) by s = bound tanh(raw / bound), so that no stack of
    a few layers can overflow.

    Args:
        dim, swap, hidden, num_hidden, linear: as in ``AdditiveCoupling``.
        net: use this module, (..., D/2) -> (..., D), instead: raw log-scales, then shifts.
        bound: largest log-scale, positive and finite.

    Raises:
        ValueError: if ``dim`` is odd, ``bound`` is not positive and finite, the last axis is not
            ``dim``, or a tensor is not finite.
        TypeError: if a tensor is not floating-point.

    Source: chapter `nice`, eq-nice-affine; Dinh, Sohl-Dickstein and Bengio (2017).

    >>> coupling = AffineCoupling(4, hidden=8, num_hidden=1)
    >>> x = torch.tensor([[0.5, -1.0, 2.0, 0.25]])
    >>> z, log_abs_det = coupling(x)
    >>> torch.allclose(coupling.inverse(z), x), log_abs_det.shape
    (True, torch.Size([1]))
    """

    outputs_per_coordinate = 2

    def __init__(
        self,
        dim: int,
        *,
        swap: bool = False,
        hidden: int = 1000,
        num_hidden: int = 5,
        linear: Callable[..., nn.Module] = ColumnLinear,
        net: nn.Module | None = None,
        bound: float = 2.0,
    ) -> None:
        super().__init__(
            dim, swap=swap, hidden=hidden, num_hidden=num_hidden, linear=linear, net=net
        )
        if not (isinstance(bound, Real) and 0 < bound < math.inf):
            raise ValueError(f"bound must be positive and finite, got {bound!r}")
        self.bound: float = float(bound)

    def move(self, moved: Tensor, output: Tensor, log_abs_det: Tensor) -> tuple[Tensor, Tensor]:
        """x_2 e^s + t, and the sum of the log-scales s."""
        log_scale, shift = self._log_scale_and_shift(moved, output)
        return moved * log_scale.exp() + shift, log_abs_det + log_scale.sum(-1)

    def move_back(self, moved: Tensor, output: Tensor) -> Tensor:
        """(z_2 - t) e^-s."""
        log_scale, shift = self._log_scale_and_shift(moved, output)
        return (moved - shift) * (-log_scale).exp()

    def _log_scale_and_shift(self, moved: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = output.to(moved.dtype).chunk(2, -1)
        return self.bound * torch.tanh(raw / self.bound), shift


class Scaling(nn.Module):
    """Stretch each coordinate by its own learned factor: the only volume change in NICE.

    z_i = x_i e^{s_i},  log |det dz/dx| = sum_i s_i

    With a standard prior this is the same as a learned prior with standard deviations e^{-s_i}.

    Args:
        dim: D.

    Raises:
        ValueError: if ``dim`` is not positive, or a tensor's last axis is not ``dim`` or it is not
            finite.
        TypeError: if a tensor is not floating-point.

    Source: chapter `nice`, eq-nice-scaling; Dinh, Krueger and Bengio (2015).

    >>> scaling = Scaling(3)
    >>> with torch.no_grad():
    ...     _ = scaling.log_scale.copy_(torch.tensor([0.0, 1.0, -2.0]))
    >>> z, log_abs_det = scaling(torch.ones(2, 3))
    >>> log_abs_det.tolist()
    [-1.0, -1.0]
    """

    def __init__(self, dim: int) -> None:
        check_positive(dim, "dim")
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., D) -> (z (..., D), log |det dz/dx| (...,))."""
        z, log_abs_det = self.stretch(self._enter(x, "x"))
        return z, log_abs_det.clone()  # one memory for each, so that it can be added to in place

    def inverse(self, z: Tensor) -> Tensor:
        """The x (..., D) that ``forward`` maps to ``z``."""
        return self.shrink(self._enter(z, "z"))

    def stretch(self, x: Tensor, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """``forward`` on points that have been checked, or on a ``part`` of their coordinates."""
        log_scale = self.log_scale[part].to(x.dtype)
        return x * log_scale.exp(), log_scale.sum().expand(x.shape[:-1])

    def shrink(self, z: Tensor) -> Tensor:
        """``inverse`` on points that have been checked."""
        return z * (-self.log_scale.to(z.dtype)).exp()

    def _enter(self, x: Tensor, name: str) -> Tensor:
        x = enter(x, self.log_scale.numel(), self.log_scale.dtype, name)
        require_finite(x, name)
        return x

    def extra_repr(self) -> str:
        """The number that ``repr`` shows."""
        return f"dim={self.log_scale.numel()}"
