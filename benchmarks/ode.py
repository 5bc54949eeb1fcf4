"""lib.ode against torchdiffeq: Lotka-Volterra competition, forward and backward.

Run ``python benchmarks/ode.py``. "Same field" gives every solver the same plain module; "own field"
is ``LotkaVolterraCompetition``, the same equation as the library writes it.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable

import torch
import torchdiffeq
from _timing import arguments, interleave, median_ms, print_table, ratio
from torch import Tensor, nn

from lib.ode import LotkaVolterraCompetition, odeint, odeint_adjoint

CONSTANTS = ((0.1, 0.3), (1e-4, 2e-4), (0.002, 0.003))


class Plain(nn.Module):
    """The equation as one writes it down."""

    def __init__(self) -> None:
        super().__init__()
        r, a, n = (nn.Parameter(torch.tensor(values)) for values in CONSTANTS)
        self.r, self.a, self.n = r, a, n

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.r * y * (1 - y * self.n) - self.a * y * y.flip(-1)


def start(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    y0 = torch.rand(batch, 2, generator=generator) * 200 + 50
    return y0[0] if batch == 1 else y0


def race(title: str, rivals: dict[str, Callable[[], object]], goals: dict[str, str],
         rounds: int) -> None:  # fmt: skip
    times = interleave(rivals, rounds, seconds=0.0, warmup=1)
    first = next(iter(rivals))
    rows = [
        [name, f"{median_ms(times[name]):.1f}", f"{ratio(times, first, name):.2f}",
         goals.get(name, "")]
        for name in rivals
    ]  # fmt: skip
    print_table(title, ["solver", "ms", "x " + first, "target"], rows)


def solves(batch: int, rounds: int) -> None:
    plain, own, y0, t = Plain(), LotkaVolterraCompetition(*CONSTANTS), start(batch), grid()
    with torch.no_grad():
        race(
            f"RK4, 1000 steps, forward, B={batch}",
            {
                "torchdiffeq": lambda: torchdiffeq.odeint(plain, y0, t, method="rk4"),
                "same field": lambda: odeint(plain, y0, t),
                "own field": lambda: odeint(own, y0, t),
            },
            {"same field": ">= 1.6", "own field": ">= 3.5"},
            rounds,
        )


def gradients(batch: int, rounds: int) -> None:
    plain, own, y0, t = Plain(), LotkaVolterraCompetition(*CONSTANTS), start(batch), grid()

    def turn(solver: Callable[..., Tensor], field: nn.Module, method: str = "rk4") -> list[Tensor]:
        y = y0.clone().requires_grad_()
        loss = solver(field, y, t, method=method).square().mean()
        return list(torch.autograd.grad(loss, [y, *field.parameters()]))

    race(
        f"RK4, 1000 steps, forward and backward, B={batch}",
        {
            "torchdiffeq": lambda: turn(torchdiffeq.odeint, plain),
            "same field": lambda: turn(odeint, plain),
            "own field": lambda: turn(odeint, own),
        },
        {"own field": ">= 10" if batch == 1 else ">= 7"},
        rounds,
    )
    gaps = []
    for _ in range(2):  # float32, then float64; their rk4 is the 3/8 rule
        ours, theirs = turn(odeint, own, "rk4_38"), turn(torchdiffeq.odeint, plain)
        pairs = zip(ours, theirs, strict=True)
        gaps.append(max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs))
        own.double(), plain.double()
        y0, t = y0.double(), t.double()
    print(
        "  gradients by the same rule differ, relative to the largest entry, by "
        f"{gaps[0]:.1e} in float32 and {gaps[1]:.1e} in float64 (target 1e-5)\n"
    )


def adaptive(batch: int, rounds: int) -> None:
    plain, own, y0 = Plain(), LotkaVolterraCompetition(*CONSTANTS), start(batch)
    t = torch.tensor([0.0, 10.0])
    bounds = {"method": "dopri5", "rtol": 1e-6, "atol": 1e-6}
    rivals: dict[str, Callable[[], Tensor]] = {
        "torchdiffeq": lambda: torchdiffeq.odeint(plain, y0, t, **bounds),
        "same field": lambda: odeint(plain, y0, t, **bounds),
        "own field": lambda: odeint(own, y0, t, **bounds),
    }
    with torch.no_grad():
        exact = odeint(Plain().double(), y0.double(), t.double(), step_size=1e-2)[-1]
        race(f"dopri5, 1e-6 on [0, 10], B={batch}", rivals, {"same field": ">= 2.2"}, rounds)
        errors = {name: float((run()[-1] - exact).abs().max()) for name, run in rivals.items()}
    print("  errors: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()) + "\n")


def memory() -> None:
    """Peak memory above the start of a gradient, each in a process of its own."""
    rows = []
    for solver in ("odeint", "odeint_adjoint"):
        row = [solver]
        for count in (500, 2000):
            done = subprocess.run(
                [sys.executable, __file__, "--peak", solver, str(count)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            row.append(done.stdout.strip())
        rows.append(row)
    print_table("Peak memory of a gradient, net of 64 units, B=2000, MB",
                ["solver", "500 steps", "2000 steps"], rows)  # fmt: skip


def peak(solver: str, count: int) -> None:
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
    y0 = torch.randn(2000, 16, requires_grad=True)
    run = {"odeint": odeint, "odeint_adjoint": odeint_adjoint}[solver]

    def field(t: Tensor, y: Tensor) -> Tensor:
        return net(y)

    run(field, y0, [0.0, 0.01], step_size=0.01)[-1].sum().backward()  # what every run needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(field, y0, [0.0, 1.0], method="euler", step_size=1 / count)[-1].sum().backward()
    print(f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.0f}")


def grid() -> Tensor:
    return torch.linspace(0, 100, 1001)


def main() -> None:
    options = arguments(__doc__.splitlines()[0], rounds=5)
    memory()  # first: a process inherits the peak of the one that started it
    for batch in (1, 100):
        solves(batch, options.rounds)
        gradients(batch, options.rounds)
        adaptive(batch, options.rounds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        peak(sys.argv[2], int(sys.argv[3]))
    else:
        main()
