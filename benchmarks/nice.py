"""NICE against nflows, normflows and zuko: log_prob, a training step, and sampling.

    python benchmarks/nice.py [--rounds N] [--threads N]

All flows have the same couplings and a standard normal prior; ours has the scaling besides.
"Products" are the matrix products of the networks alone, on operands that are ready; "with ReLU"
adds the activations, which no implementation can do without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _timing import arguments, interleave, median_ms, print_table, ratio
from torch import Tensor, nn

from lib.nice import NICE, OneDNNLinear

Calls = dict[str, Callable[[], object]]
ESSAY = {"dim": 784, "couplings": 4, "width": 1000, "depth": 5, "batch": 128}
TURN = 0.05  # seconds: short turns and many rounds, so that drift of the machine cancels
SMALL = {"dim": 64, "couplings": 4, "width": 256, "depth": 2, "batch": 256}


def ours(size: dict, **options: Any) -> NICE:
    """Our flow at a size."""
    return NICE(
        size["dim"],
        num_couplings=size["couplings"],
        hidden=size["width"],
        num_hidden=size["depth"],
        prior="normal",
        **options,
    )


def nflows_flow(size: dict) -> nn.Module:
    """nflows: additive couplings with alternating masks."""
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import AdditiveCouplingTransform, CompositeTransform

    class Net(nn.Sequential):
        def forward(self, x: Tensor, context: None = None) -> Tensor:
            return super().forward(x)

    def net(inputs: int, outputs: int) -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(size["depth"]):
            layers += [nn.Linear(inputs, size["width"]), nn.ReLU()]
            inputs = size["width"]
        return Net(*layers, nn.Linear(inputs, outputs))

    masks = [torch.arange(size["dim"]) % 2 == i % 2 for i in range(size["couplings"])]
    layers = [AdditiveCouplingTransform(mask.int(), net) for mask in masks]
    return Flow(CompositeTransform(layers), StandardNormal([size["dim"]]))


def normflows_flow(size: dict) -> nn.Module:
    """normflows: volume-preserving coupling blocks on contiguous halves, swapped between."""
    import normflows as nf

    half, layers = size["dim"] // 2, []
    for _ in range(size["couplings"]):
        net = nf.nets.MLP([half, *[size["width"]] * size["depth"], half])
        layers += [
            nf.flows.AffineCouplingBlock(net, scale=False),
            nf.flows.Permute(2 * half, "swap"),
        ]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(2 * half, trainable=False), layers)


def zuko_flow(size: dict) -> nn.Module:
    """zuko: its NICE with additive transforms."""
    import zuko

    return zuko.flows.NICE(
        size["dim"],
        transforms=size["couplings"],
        univariate=zuko.transforms.AdditiveTransform,
        shapes=[()],
        hidden_features=[size["width"]] * size["depth"],
    )


def bare_products(flow: NICE, batch: int, *, activate: bool = False) -> Callable[[], None]:
    """The matrix products of the flow's networks, bias included; ReLUs too if asked."""
    layers = [m for m in flow.modules() if isinstance(m, nn.Linear)]
    hidden = {m.out_features for m in layers} - {flow.dim // 2}
    inputs = {width: torch.randn(batch, width) for width in {m.in_features for m in layers}}

    @torch.no_grad()
    def run() -> None:
        for layer in layers:
            product = torch.addmm(layer.bias, inputs[layer.in_features], layer.weight.T)
            if activate and layer.out_features in hidden:
                torch.relu_(product)

    return run


def step(flow: nn.Module, log_prob: Callable[[Tensor], Tensor], x: Tensor, fused: bool) -> Callable:
    """One Adam step on the negative log-likelihood."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-5, fused=fused)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        (-log_prob(x).mean()).backward()
        optimizer.step()

    return run


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """torch's global setting for float32 products, restored afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def calls(size: dict, task: str, *, fast: bool) -> Calls:
    """name -> call for one task; ``fast`` gives everybody a fused optimiser."""
    x, batch = torch.randn(size["batch"], size["dim"]), size["batch"]
    flow = ours(size)
    peers = {
        "nflows": nflows_flow(size),
        "normflows": normflows_flow(size),
        "zuko": zuko_flow(size),
    }
    everyone = {**peers, "ours": flow}
    if task == "log_prob":
        result: Calls = {
            name: torch.no_grad()(lambda flow=flow: density(flow)(x))
            for name, flow in everyone.items()
        }
        result["products"] = bare_products(flow, batch)
        result["with ReLU"] = bare_products(flow, batch, activate=True)
        return result
    if task == "sample":
        return {
            name: torch.no_grad()(lambda flow=flow: draw(flow, batch))
            for name, flow in everyone.items()
        }
    return {name: step(flow, density(flow), x, fast) for name, flow in everyone.items()}


def density(flow: nn.Module) -> Callable[[Tensor], Tensor]:
    """The flow's log_prob; zuko's flow makes a distribution first."""
    return flow.log_prob if hasattr(flow, "log_prob") else lambda x: flow().log_prob(x)


def draw(flow: nn.Module, n: int) -> object:
    """The flow's samples."""
    return flow.sample(n) if hasattr(flow, "sample") else flow().sample((n,))


def compare(title: str, size: dict, target: str, *, fast: bool, rounds: int) -> None:
    """Print one table: a row per task, a column per rival."""
    rows = []
    for task in ("log_prob", "step", "sample"):
        with matmul_precision("medium" if fast else "highest"):
            times = interleave(calls(size, task, fast=fast), rounds, seconds=TURN)
        row = [task, median_ms(times["ours"])]
        for peer in ("nflows", "normflows", "zuko", "products", "with ReLU"):
            row += [ratio(times, peer, "ours") if peer in times else None]
        rows.append(row)
    header = ["task", "ours ms", "x nflows", "x normflows", "x zuko", "x products", "x with ReLU"]
    print_table(f"{title} - target: {target}", header, rows)


def onednn_gain(size: dict, rounds: int) -> None:
    """What oneDNN gains over torch's default: by our layer, and by torch's global setting."""
    x, rows = torch.randn(size["batch"], size["dim"]), []
    flows = {
        "plain": ours(size),
        "OneDNNLinear": ours(size, linear=OneDNNLinear),
        "medium": ours(size),
    }
    tasks: dict[str, Callable[[NICE], Callable]] = {
        "log_prob": lambda flow: torch.no_grad()(lambda: flow.log_prob(x)),
        "step, fused Adam": lambda flow: step(flow, flow.log_prob, x, True),
        "sample": lambda flow: lambda: flow.sample(size["batch"]),
    }
    for task, make in tasks.items():
        calls = {name: make(flow) for name, flow in flows.items()}
        calls["medium"] = matmul_precision("medium")(calls["medium"])
        times = interleave(calls, rounds, seconds=TURN)
        row = [task, *(median_ms(times[name]) for name in flows)]
        rows.append(row + [ratio(times, "plain", name) for name in ("OneDNNLinear", "medium")])
    header = ["task", "plain ms", "OneDNNLinear ms", "'medium' ms", "x OneDNNLinear", "x 'medium'"]
    print_table("oneDNN at the essay's size, fused Adam for all", header, rows)
    weight = torch.randn(size["width"], size["width"])
    exact = weight.double() @ weight.double()
    errors = []
    for precision in ("highest", "medium"):
        with matmul_precision(precision):
            errors.append(float((weight @ weight - exact).abs().max() / exact.abs().max()))
    print("largest error of a product: {:.0e}, with 'medium' {:.0e}".format(*errors))


if __name__ == "__main__":
    options = arguments(__doc__.splitlines()[0], rounds=21)
    torch.manual_seed(0)
    compare(
        "784 dimensions, 4 couplings of 5x1000, batch 128, as shipped",
        ESSAY,
        "log_prob >= 1.05 x nflows, >= 0.97 x products, >= 1 x all",
        fast=False,
        rounds=options.rounds,
    )
    compare(
        "the same, all with matmul precision 'medium' and fused Adam",
        ESSAY,
        ">= 1 x all",
        fast=True,
        rounds=options.rounds,
    )
    compare(
        "64 dimensions, 4 couplings of 2x256, batch 256, as shipped",
        SMALL,
        ">= 1 x all",
        fast=False,
        rounds=options.rounds,
    )
    onednn_gain(ESSAY, options.rounds)
