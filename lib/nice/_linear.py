"""Linear layers that a CPU computes faster: by columns for few rows, or on oneDNN in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib._common import is_transformed

__all__ = ["ColumnLinear", "OneDNNLinear"]

# Products of columns gained 2 to 12 % for 16 to 128 rows and weights of 392 x 500 or more; with one
# row, with thousands, or with weights of 256 x 256 they lost
_ROWS, _WEIGHTS = 16, 1 << 17


def _available() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNNProduct(torch.autograd.Function):
    """x W^T + b with both gradients through the same kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        # with create_graph=True the gradient must have a derivative, and the kernels have none
        product = F.linear if torch.is_grad_enabled() else _product
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            product(rows, weight.T, None).view(x.shape) if need_x else None,
            product(rows.T, x.flatten(0, -2).T, None) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


class ColumnLinear(nn.Linear):
    """``nn.Linear`` that computes (W x^T + b)^T where a small batch meets large weights on a CPU.

    Matrix libraries there are faster with the longer side first. Where gradients are recorded it
    *is* ``nn.Linear``: the backward pass would lose more than the forward pass gains.

    >>> layer = ColumnLinear(512, 512)
    >>> x = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    >>> with torch.no_grad():
    ...     torch.allclose(layer(x), x @ layer.weight.T + layer.bias, atol=1e-5)
    True
    """

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in_features) -> x W^T + b (..., out_features)."""
        weight, bias = self.weight, self.bias  # once: a parametrisation may learn from each look
        if bias is None or torch.is_grad_enabled() or not _few_rows(input, weight):
            return F.linear(input, weight, bias)
        return torch.addmm(bias.unsqueeze(1), weight, input.T).T


def _few_rows(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dim() == 2
        and _ROWS <= len(x) <= min(weight.shape) // 2
        and weight.numel() >= _WEIGHTS
        and x.is_cpu
        and not torch.compiler.is_compiling()
    )


class OneDNNLinear(nn.Linear):
    """A drop-in for ``nn.Linear`` whose float32 products run on oneDNN where the CPU allows.

    On processors where torch's default library misses the widest vector units this is faster at
    equal precision; elsewhere nothing is lost but the gain. Parameters, their names and the
    results (to float32 rounding) are those of ``nn.Linear``. On other devices and dtypes, inside
    autocast, ``torch.func``, ``torch.compile``, ``torch.jit.trace`` and forward-mode
    differentiation it *is* ``nn.Linear``, and so are its gradients of gradients.

    Use it as ``NICE(784, linear=OneDNNLinear)``.

    Source: chapter `nice`, section "In code".

    >>> layer = OneDNNLinear(6, 4)
    >>> x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(layer(x), x @ layer.weight.T + layer.bias, atol=1e-6)
    True
    """

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in_features) -> x W^T + b (..., out_features)."""
        weight, bias = self.weight, self.bias  # once, as above
        if _for_onednn(input, weight):
            return _OneDNNProduct.apply(input, weight, bias)
        return F.linear(input, weight, bias)


def _for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        not is_transformed()
        and not torch.jit.is_tracing()
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() > 1
        and x.numel() > 0
        and x.shape[-1] == weight.shape[1]
        and not torch.is_autocast_enabled("cpu")
        and _available()
    )
