"""lib.ode against closed forms, float64, finite differences and torchdiffeq."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from lib import ode
from lib.ode import METHODS, ODERNN, fit, odeint, odeint_adjoint, step

FIXED = [name for name in METHODS if name != "dopri5"]
EXPLICIT = [name for name in FIXED if METHODS[name].explicit]
THEIRS = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "heun2": "heun2",
          "heun3": "heun3", "rk4_38": "rk4"}  # fmt: skip
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DOUBLE = {"dtype": torch.float64}


class Net(nn.Module):
    """A field that depends on time, state and parameters; rows do not feel each other."""

    def __init__(self, dim=3, hidden=8, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: nn.Parameter(  # noqa: E731
            torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[0])
        )
        self.enter, self.leave, self.bias = draw(dim, hidden), draw(hidden, dim), draw(hidden)

    def forward(self, t, y):
        return torch.tanh(y @ self.enter + self.bias * torch.cos(2 * t)) @ self.leave


def swing(t, y):
    """A rotation whose speed depends on time: y(t) = rotation by sin(t) of y(0)."""
    return torch.stack([-y[..., 1], y[..., 0]], dim=-1) * torch.cos(t)


def turned(y0, t):
    angle = torch.sin(t) - torch.sin(t[0])
    x, z = y0.unbind(-1)
    return torch.stack([x * angle.cos() - z * angle.sin(), x * angle.sin() + z * angle.cos()], -1)


def random_times(seed, count=7, *, descending=False, start=-0.4):
    generator = torch.Generator().manual_seed(seed)
    t = start + torch.rand(count, generator=generator, **DOUBLE).cumsum(0) / 2
    return t.flip(0) if descending else t


# ---------------------------------------------------------------- against torchdiffeq


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.float64)])
@pytest.mark.parametrize("descending", [False, True])
def test_euler_is_torchdiffeqs_bit_by_bit(seed, dtypes, descending):
    theirs = pytest.importorskip("torchdiffeq")
    y0 = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).to(dtypes[0])
    t = random_times(seed, 23, descending=descending).to(dtypes[1])
    field = Net(seed=seed).to(dtypes[0])
    with torch.no_grad():
        ours = odeint(field, y0, t, method="euler")
        assert torch.equal(ours, theirs.odeint(field, y0, t, method="euler"))
        for step_size in (0.037, 0.1):
            ends = t[[0, -1]]
            got = odeint(field, y0, ends, method="euler", step_size=step_size)
            want = theirs.odeint(field, y0, ends, method="euler", options={"step_size": step_size})
            assert torch.equal(got, want)


@pytest.mark.parametrize(("ours", "name"), THEIRS.items())
@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 2)])
def test_shared_methods_agree_with_torchdiffeq(ours, name, shape):
    theirs = pytest.importorskip("torchdiffeq")
    y0 = torch.randn(shape, generator=torch.Generator().manual_seed(3), **DOUBLE)
    t = random_times(4, 12)
    field = lambda t, y: torch.sin(y) * t - 0.3 * y  # noqa: E731
    got, want = odeint(field, y0, t, method=ours), theirs.odeint(field, y0, t, method=name)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("descending", [False, True])
def test_dopri5_is_no_less_exact_than_torchdiffeq(descending):
    theirs = pytest.importorskip("torchdiffeq")
    field, t = Net(), random_times(5, 9, descending=descending)
    y0 = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), **DOUBLE)
    with torch.no_grad():
        exact = odeint(field, y0, t, step_size=1e-3)
        for tolerance in (1e-4, 1e-6, 1e-9):
            bounds = {"rtol": tolerance, "atol": tolerance, "method": "dopri5"}
            ours = (odeint(field, y0, t, **bounds) - exact).abs().max()
            other = (theirs.odeint(field, y0, t, **bounds) - exact).abs().max()
            assert ours <= max(1.2 * other, 1e-12)


def test_tuple_states_and_tolerances_run_as_in_torchdiffeq():
    theirs = pytest.importorskip("torchdiffeq")
    y0 = (torch.randn(4, 3, **DOUBLE), torch.randn(3, **DOUBLE))
    t = torch.tensor([1.0, 0.4, -0.5], **DOUBLE)
    field = lambda t, s: (s[1] * t.cos() - s[0], -s[0].mean(0))  # noqa: E731
    for keywords in (
        {},
        {"rtol": (1e-8, 1e-9), "atol": (1e-9, 1e-10)},
        {"options": {"norm": lambda s: max(part.abs().max() for part in s)}},
    ):
        got = odeint(field, y0, t, method="dopri5", **keywords)
        want = theirs.odeint(field, y0, t, method="dopri5", **keywords)
        assert isinstance(got, tuple)
        for ours, other, first in zip(got, want, y0, strict=True):
            assert ours.shape == (3, *first.shape)
            torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- orders and exactness


@pytest.mark.parametrize("method", list(METHODS))
def test_measured_order(method):
    y0 = torch.tensor([0.7, -1.1], **DOUBLE)
    end = torch.tensor(1.3, **DOUBLE)
    want = turned(y0, torch.stack([torch.zeros((), **DOUBLE), end]))[-1]
    errors = []
    for count in (16, 32, 64):
        y, dt = y0, end.item() / count
        for index in range(count):
            y = step(swing, index * dt, dt, y, method=method)
        errors.append((y - want).norm().item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders[-1] == pytest.approx(METHODS[method].order, abs=0.25)


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].explicit])
def test_tableau_satisfies_the_order_conditions(method):
    tableau = METHODS[method]
    size = len(tableau.b)
    a = torch.zeros(size, size, **DOUBLE)
    for i, row in enumerate(tableau.a):
        a[i, : len(row)] = torch.tensor(row, **DOUBLE)
    b, c = torch.tensor(tableau.b, **DOUBLE), torch.tensor(tableau.c, **DOUBLE)
    torch.testing.assert_close(a.sum(1), c)
    conditions = {
        1: [(b.sum(), 1)],
        2: [(b @ c, 1 / 2)],
        3: [(b @ c**2, 1 / 3), (b @ a @ c, 1 / 6)],
    }
    conditions[4] = [
        (b @ c**3, 1 / 4), (b * c @ a @ c, 1 / 8), (b @ a @ c**2, 1 / 12), (b @ a @ a @ c, 1 / 24)
    ]  # fmt: skip
    conditions[5] = [(b @ c**4, 1 / 5), (b @ a @ a @ a @ c, 1 / 120), (b @ (a @ c) ** 2, 1 / 20)]
    for order in range(1, tableau.order + 1):
        for value, want in conditions[order]:
            assert value.item() == pytest.approx(want, abs=1e-14)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("descending", [False, True])
def test_a_fixed_step_lands_on_every_requested_time(method, descending):
    t = random_times(6, 6, descending=descending)
    y0 = torch.tensor([0.4, 0.9], **DOUBLE)
    both = odeint(swing, y0, t, method=method, step_size=0.05)
    error = (both - turned(y0, t)).abs().max()
    assert error < {1: 0.2, 2: 4e-3, 3: 1e-4, 4: 1e-5}[METHODS[method].order]
    seen = []
    with torch.no_grad():  # else one call more asks whether the field wants a gradient
        odeint(lambda t, y: seen.append(t.item()) or y, y0, t, method="euler", step_size=0.05)
    assert set(t[:-1].tolist()) <= set(seen)
    gaps = torch.tensor(seen, **DOUBLE).diff().abs()
    assert gaps.max() <= 0.05 + 1e-12
    assert gaps.min() > 1e-9


@torch.no_grad()
def test_whole_steps_are_not_split_by_rounding():
    calls = []
    field = lambda t, y: calls.append(0) or -y  # noqa: E731
    for dtype in (torch.float32, torch.float64):
        for end, count in ((1.0, 10), (0.3, 3), (0.7, 7), (42.0, 420)):
            calls.clear()
            odeint(field, torch.ones(1), torch.tensor([0.0, end], dtype=dtype), method="euler",
                   step_size=0.1)  # fmt: skip
            assert len(calls) == count


def test_dopri5_between_its_steps_and_at_its_last_time():
    t = torch.linspace(0, 3, 301, **DOUBLE)
    y0 = torch.tensor([0.4, 0.9], **DOUBLE)
    seen = []
    got = odeint(lambda t, y: seen.append(t.item()) or swing(t, y), y0, t, method="dopri5")
    assert (got - turned(y0, t)).abs().max() < 2e-6
    assert max(seen) == 3.0  # never beyond
    assert len(seen) < 1000  # 300 outputs cost no steps
    alone = odeint(swing, y0, t[[0, -1]], method="dopri5")
    torch.testing.assert_close(got[-1], alone[-1], rtol=0, atol=0)


def test_dopri5_obeys_its_options():
    y0, t, calls = torch.ones(1, **DOUBLE), torch.tensor([0.0, 1.0], **DOUBLE), []
    field = lambda t, y: calls.append(float(t)) or -y  # noqa: E731
    odeint(field, y0, t, method="dopri5", options={"first_step": 0.01, "max_step": 0.01})
    assert len(calls) == 1 + 6 * 100
    calls.clear()
    odeint(field, y0, t, method="dopri5", options={"step_t": [0.123, 0.5], "first_step": 1.0})
    assert {0.123, 0.5} <= set(calls)
    jump = lambda t, y: torch.where(t < 0.5, 1.0, -2.0) * torch.ones_like(y)  # noqa: E731
    got = odeint(jump, y0, t, method="dopri5", options={"jump_t": torch.tensor([0.5])})
    assert got[-1].item() == pytest.approx(1 + 0.5 - 1.0, abs=1e-6)


def test_grid_constructor():
    grid = torch.tensor([0.0, 0.1, 0.35, 0.8, 1.0], **DOUBLE)
    t = torch.tensor([0.0, 0.8, 1.0], **DOUBLE)
    y0 = torch.tensor([1.0, 2.0], **DOUBLE)
    got = odeint(swing, y0, t, method="heun", options={"grid_constructor": lambda f, y, t: grid})
    torch.testing.assert_close(got, odeint(swing, y0, grid, method="heun")[[0, 3, 4]])
    with pytest.raises(ValueError, match="grid_constructor"):
        odeint(swing, y0, t, options={"grid_constructor": lambda f, y, t: grid[1:]})


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (2, 1, 3), (0, 2)])
def test_any_shape_and_dtype(method, shape):
    y0 = torch.rand(shape, generator=torch.Generator().manual_seed(0), **DOUBLE) + 0.5
    t = torch.linspace(0, 1, 41, **DOUBLE)
    want = y0 * torch.exp(-t).reshape(-1, *[1] * y0.dim())
    bound = {"euler": 1e-2, "implicit_euler": 2e-2, "midpoint": 1e-4, "heun": 1e-4, "heun2": 1e-4,
             "implicit_midpoint": 1e-4}.get(method, 1e-6)  # fmt: skip
    for dtype in (torch.float64, torch.float32, torch.complex128, torch.float16, torch.bfloat16):
        got = odeint(lambda t, y: -y, y0.to(dtype), t, method=method, rtol=1e-5, atol=1e-6)
        assert got.dtype == dtype
        assert got.shape == (41, *shape)
        slack = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}.get(dtype, 0.0)
        torch.testing.assert_close(
            got.to(want.dtype if not dtype.is_complex else dtype),
            want.to(dtype) if dtype.is_complex else want,
            rtol=0,
            atol=1.5 * max(bound, 1e-5) + slack,
        )


def test_half_precision_is_added_up_in_float32():
    y0 = torch.ones(3, dtype=torch.bfloat16)
    got = odeint(lambda t, y: -y, y0, torch.linspace(0, 1, 2001), method="euler")
    assert abs(got[-1].float() - math.exp(-1)).max() < 4e-3  # in bfloat16 it would not move


@pytest.mark.parametrize("times", [(0.0, 0.5, 1.0), [0, 0.5, 1], torch.tensor([0, 1, 2]),
                                   [torch.tensor(0.0), torch.tensor(1.0)]])  # fmt: skip
def test_times_may_be_numbers(times):
    got = odeint(lambda t, y: -y, torch.ones(2), times, step_size=0.1)
    want = torch.exp(-torch.as_tensor([float(x) for x in times]))
    torch.testing.assert_close(got[:, 0], want, rtol=0, atol=1e-5)


def test_a_single_time_is_the_initial_state():
    y0 = torch.randn(3, requires_grad=True)
    got = odeint(lambda t, y: -y, y0, torch.tensor([2.0]))
    assert torch.equal(got, y0[None])
    got.sum().backward()
    assert torch.equal(y0.grad, torch.ones(3))


def test_forward_and_back_again():
    field, t = Net(), torch.linspace(0.2, 1.4, 30, **DOUBLE)
    y0 = torch.randn(5, 3, **DOUBLE)
    with torch.no_grad():
        end = odeint(field, y0, t)[-1]
        back = odeint(field, end, t.flip(0))[-1]
        assert (back - y0).abs().max() < 1e-5
        for method in ("implicit_midpoint",):  # symmetric: its own inverse, to Newton's accuracy
            end = odeint(field, y0, t, method=method)[-1]
            back = odeint(field, end, t.flip(0), method=method)[-1]
            assert (back - y0).abs().max() < 1e-12


def test_inputs_are_left_alone():
    y0, t = torch.randn(4, 3, **DOUBLE), random_times(0)
    kept = y0.clone(), t.clone()
    for method in METHODS:
        odeint(Net(), y0, t, method=method)
    assert torch.equal(y0, kept[0])
    assert torch.equal(t, kept[1])


@pytest.mark.parametrize("device", DEVICES)
def test_device_follows_y0(device):
    y0 = torch.tensor([0.4, 0.9], device=device, requires_grad=True)
    t = torch.linspace(0, 1, 30)  # on the CPU, as torchdiffeq allows
    for method in METHODS:
        got = odeint(swing, y0, t, method=method, rtol=1e-5, atol=1e-6)
        assert got.device.type == device
        (gradient,) = torch.autograd.grad(got[-1].sum(), y0)
        assert gradient.isfinite().all()


# ---------------------------------------------------------------- implicit steps


def test_implicit_steps_have_the_stability_functions_of_theory():
    z = torch.tensor([-0.3, -2.0, -50.0, -1e4], **DOUBLE)
    one = torch.ones(4, **DOUBLE)
    field = lambda t, y: z * y  # noqa: E731
    torch.testing.assert_close(
        step(field, 0.0, 1.0, one, method="implicit_midpoint"), (1 + z / 2) / (1 - z / 2)
    )
    torch.testing.assert_close(step(field, 0.0, 1.0, one, method="implicit_euler"), 1 / (1 - z))


def test_implicit_midpoint_keeps_a_quadratic_invariant():
    y0 = torch.tensor([0.6, -0.8], **DOUBLE)
    t = torch.linspace(0, 50, 201, **DOUBLE)
    norms = odeint(swing, y0, t, method="implicit_midpoint").norm(dim=-1)
    assert (norms - 1).abs().max() < 1e-12
    assert (odeint(swing, y0, t, method="midpoint").norm(dim=-1) - 1).abs().max() > 1e-3


def test_a_stiff_field_needs_few_implicit_steps():
    field = lambda t, y: -1e6 * (y - torch.cos(t)) - torch.sin(t)  # noqa: E731
    t = torch.linspace(0, 2, 21, **DOUBLE)
    one = torch.ones(1, **DOUBLE)
    error = lambda name: (odeint(field, one, t, method=name)[:, 0] - t.cos()).abs()  # noqa: E731
    # The midpoint rule damps nothing here: an error dt^2 / 4 |y''| swings to and fro.
    assert error("implicit_midpoint").max() == pytest.approx(0.1**2 / 4, rel=0.01)
    assert error("implicit_euler").max() < 1e-6
    with pytest.raises(ode.NonFiniteError):
        odeint(field, one, torch.linspace(0, 20, 201, **DOUBLE))


@pytest.mark.parametrize("method", ["implicit_midpoint", "implicit_euler"])
@pytest.mark.parametrize("transform", [lambda f: f, lambda f: torch.func.vmap(f)])
def test_newton_is_as_exact_for_small_states_as_for_large_ones(method, transform):
    def scaled(size):
        field = lambda t, y: -5 / size * y * y  # noqa: E731
        solve = transform(lambda y: odeint(field, y, [0.0, 0.25, 0.5, 1.0], method=method))
        return solve(size * torch.tensor([1.0, 0.3], **DOUBLE)) / size

    want = scaled(1.0)
    for size in (1e-6, 1e-12, 1e9):
        torch.testing.assert_close(scaled(size), want, rtol=1e-12, atol=0)
    assert torch.equal(transform(lambda y: odeint(lambda t, y: -y, y, [0.0, 1.0], method=method))(
        torch.zeros(2, **DOUBLE)), torch.zeros(2, 2, **DOUBLE))  # fmt: skip


def test_newton_that_cannot_converge_says_so():
    with pytest.raises(ode.NewtonError, match="step_size") as caught:
        odeint(lambda t, y: y * y, torch.ones(2), torch.linspace(0, 2, 9), method="implicit_euler")
    assert 0 < caught.value.t < 1
    assert caught.value.y.isfinite().all()


# ---------------------------------------------------------------- gradients


def _loop(field, y0, t, method):
    """The plain loop over steps, for comparison: no trick can hide in it."""
    y, out = y0, [y0]
    for start, end in pairwise(t):
        y = step(field, start, end - start, y, method=method)
        out.append(y)
    return torch.stack(out)


FIELDS = {
    "net": Net(),
    "stacked": lambda t, y: torch.stack([y[..., 1] * y[..., 2], t - y[..., 0], y.sum(-1)], -1),
    "rows coupled": lambda t, y: torch.tanh(y) - 1e-6 * y.mean(0),
    "not for vmap": lambda t, y: y * math.sin(t.item()),
    "branching": lambda t, y: -y if y.sum() > 0 else y.sin(),
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 2, 3)])
@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5", "implicit_midpoint"])
def test_gradients_equal_those_of_the_loop(name, shape, method):
    field, t = FIELDS[name], torch.linspace(0.1, 0.9, 20, **DOUBLE)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(7), **DOUBLE)
    weights = torch.randn(20, *shape, generator=torch.Generator().manual_seed(8), **DOUBLE)
    parameters = list(field.parameters()) if isinstance(field, nn.Module) else []
    found = []
    for solve in (odeint, _loop):
        y0 = start.clone().requires_grad_()
        keywords = {"rtol": 1e-11, "atol": 1e-11} if solve is odeint else {}
        value = (solve(field, y0, t, method=method, **keywords) * weights).sum()
        found.append(torch.autograd.grad(value, [y0, *parameters]))
    bound = 1e-5 if method == "dopri5" else 1e-12
    for ours, plain in zip(*found, strict=True):
        assert (ours - plain).abs().max() <= bound * plain.abs().max()


def test_the_fast_gradient_is_taken_where_it_may_be_and_nowhere_else():
    def name(field, shape, **keywords):
        y0 = torch.ones(shape, requires_grad=True)
        return odeint(field, y0, torch.linspace(0, 1, 30), **keywords).grad_fn.name()

    net = Net().float()
    assert "Path" in name(net, (3,))
    assert "Path" in name(net, (50, 3))
    assert "Path" not in name(net, (3,), method="implicit_euler")
    assert "Path" not in name(FIELDS["rows coupled"], (4, 3))
    assert "Path" not in name(FIELDS["not for vmap"], (3,))
    assert "Path" not in name(lambda t, y: y * torch.rand(()), (3,))
    off = ode.LotkaVolterraCompetition((0.1, 0.3), (1e-4, 2e-4), (0.002, 0.003))
    assert "Path" in name(off, (5, 2))
    off.pointwise = False
    assert "Path" not in name(off, (5, 2))


def test_a_random_field_is_differentiated_along_the_path_it_took():
    noise = []

    def field(t, y):
        noise.append(torch.randn(()))
        return -y * noise[-1]

    y0 = torch.ones(1, requires_grad=True)
    t = torch.linspace(0, 1, 20)
    end = odeint(field, y0, t, method="euler")[-1]
    end.sum().backward()
    used = torch.stack(noise[-19:])
    torch.testing.assert_close(y0.grad[0], torch.prod(1 - t.diff() * used))


@pytest.mark.parametrize("method", list(METHODS))
def test_gradcheck(method):
    net = Net(2, 3)
    t = random_times(2, 18 if METHODS[method].explicit else 5)
    few = t if method != "dopri5" else t[::6]

    def solve(y0, t, *parameters):
        return odeint(net, y0, t, method=method, rtol=1e-10, atol=1e-10)

    inputs = (torch.randn(2, 2, requires_grad=True, **DOUBLE), few.requires_grad_(),
              *net.parameters())  # fmt: skip
    assert torch.autograd.gradcheck(solve, inputs, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("method", ["rk4", "implicit_midpoint"])
def test_second_derivatives(method):
    net, t = Net(2, 2), torch.linspace(0, 1, 17 if method == "rk4" else 4, **DOUBLE)

    def solve(y0, *parameters):
        return odeint(net, y0, t, method=method)[-1]

    inputs = (torch.randn(2, requires_grad=True, **DOUBLE), *net.parameters())
    assert torch.autograd.gradgradcheck(solve, inputs, fast_mode=True)


def test_gradients_reach_tensors_the_field_closes_over():
    leaf = torch.randn(3, 3, requires_grad=True, **DOUBLE)
    weight = leaf * 2  # not a leaf
    t = torch.linspace(0, 1, 25, **DOUBLE)
    y0 = torch.randn(3, **DOUBLE)
    field = lambda t, y: torch.tanh(y @ weight)  # noqa: E731
    got = odeint(field, y0, t)[-1].sum()
    want = _loop(field, y0, t, "rk4")[-1].sum()
    for inputs in (leaf, weight):
        torch.testing.assert_close(
            *(torch.autograd.grad(value, inputs, retain_graph=True)[0] for value in (got, want))
        )


@pytest.mark.parametrize("solver", [odeint, odeint_adjoint])
def test_frozen_states_and_fields_have_no_graph(solver):
    net = Net().requires_grad_(False)
    got = solver(net, torch.ones(3, **DOUBLE), torch.linspace(0, 1, 20, **DOUBLE))
    assert not got.requires_grad
    with torch.no_grad():
        assert not solver(Net(), torch.ones(3, **DOUBLE), [0.0, 1.0]).requires_grad


SHARED = {
    "same leaf": lambda x: (x, x),
    "view": lambda x: (x, x.reshape(1)),
    "same tensor": lambda x: (x * torch.ones(2, **DOUBLE),) * 2,
    "common leaf": lambda x: (x, x * torch.ones(2, **DOUBLE)),
}


@pytest.mark.parametrize("name", SHARED)
def test_derivatives_when_field_and_start_share_a_parameter(name):
    x, t = torch.tensor(0.6, requires_grad=True, **DOUBLE), torch.linspace(0, 1, 21, **DOUBLE)

    def solve(solver):  # x exp(x t), whose derivatives are known
        rate, y0 = SHARED[name](x)
        return solver(lambda t, y: rate * y, y0, t)[-1].reshape(-1)[0]

    (first,) = torch.autograd.grad(solve(odeint), x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    growth = math.exp(0.6)
    assert first.item() == pytest.approx((1 + 0.6) * growth, abs=1e-6)
    assert second.item() == pytest.approx((2 + 0.6) * growth, abs=1e-5)
    for solver in (odeint, odeint_adjoint):
        (plain,) = torch.autograd.grad(solve(solver), x)
        assert plain.item() == pytest.approx((1 + 0.6) * growth, abs=1e-6)


class Remembering(nn.Module):
    """A field that changes itself when it is called: in place, by a new buffer or attribute."""

    def __init__(self, how):
        super().__init__()
        self.how, self.norm, self.layer = how, nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.last = torch.zeros(3)

    def forward(self, t, y):
        if self.how == "norm":
            return self.layer(self.norm(y))
        if self.how == "in place":
            self.mean.lerp_(y.detach().mean(0), 0.1)
        elif self.how == "buffer":
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        else:
            self.last = y.detach().mean(0)
        return torch.tanh(self.layer(y))


@pytest.mark.parametrize("how", ["norm", "in place", "buffer", "attribute"])
@pytest.mark.parametrize("bound", [False, True])
def test_no_trial_touches_what_a_field_remembers(how, bound):
    field, t = Remembering(how), torch.linspace(0, 1, 30)
    y0 = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    path = odeint(field.forward if bound else field, y0, t, method="euler")
    path.sum().backward()
    assert y0.grad.isfinite().all()
    for value in (*field.state_dict().values(), field.last):
        assert (value + 0).isfinite().all()  # also: no wrapper of vmap has escaped
    if how == "attribute":
        torch.testing.assert_close(field.last, path[-2].detach().mean(0))


def test_batch_norm_hidden_in_a_closure_is_not_poisoned():
    norm = nn.BatchNorm1d(3)
    y0 = torch.randn(6, 3, requires_grad=True)
    odeint(lambda t, y: norm(y), y0, torch.linspace(0, 1, 30))
    assert norm.running_mean.isfinite().all()


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("method", ["euler", "implicit_euler"])
def test_the_grid_of_a_step_size_moves_with_the_first_time(method, descending):
    t = torch.tensor([0.05, 0.5, 1.02], **DOUBLE)
    t = (t.flip(0) if descending else t).requires_grad_()
    y0 = torch.tensor([0.4, -0.9], **DOUBLE)
    field = lambda t, y: swing(t, y) * (1 + t)  # noqa: E731
    assert torch.autograd.gradcheck(
        lambda t: odeint(field, y0, t, method=method, step_size=0.12), (t,)
    )


# ---------------------------------------------------------------- the adjoint


@pytest.mark.parametrize("method", ["rk4", "dopri5", "implicit_midpoint"])
@pytest.mark.parametrize("descending", [False, True])
def test_adjoint_gradients_tend_to_those_of_odeint(method, descending):
    net, t = Net(2, 4), random_times(3, 4, descending=descending)
    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), **DOUBLE)
    keywords = {"rtol": 1e-9, "atol": 1e-9} if method == "dopri5" else {"step_size": 0.02}
    found = []
    for solve in (odeint_adjoint, odeint):
        y0, times = start.clone().requires_grad_(), t.clone().requires_grad_()
        value = solve(net, y0, times, method=method, **keywords).square().sum()
        found.append(torch.autograd.grad(value, [y0, times, *net.parameters()]))
    bound = {"rk4": 1e-6, "dopri5": 1e-6, "implicit_midpoint": 1e-3}[method]
    for ours, plain in zip(*found, strict=True):
        assert (ours - plain).abs().max() <= bound * (1 + plain.abs().max())


def test_adjoint_equals_torchdiffeqs():
    theirs = pytest.importorskip("torchdiffeq")
    net, t = Net(), torch.tensor([0.0, 0.4, 1.3], **DOUBLE)
    start = torch.randn(5, 3, **DOUBLE)
    options = {"step_size": 0.1}
    found = []
    for solve, method in ((odeint_adjoint, "rk4_38"), (theirs.odeint_adjoint, "rk4")):
        y0, times = start.clone().requires_grad_(), t.clone().requires_grad_()
        value = solve(net, y0, times, method=method, options=options).square().sum()
        found.append(torch.autograd.grad(value, [y0, times, *net.parameters()]))
    # Our grid ends a step on every requested time, theirs interpolates to 0.4 and 1.3.
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_adjoint_finds_parameters_and_refuses_to_miss_one():
    late = torch.tensor(0.3, requires_grad=True, **DOUBLE)
    rate = torch.tensor(-0.7, requires_grad=True, **DOUBLE)
    one = torch.ones((), **DOUBLE)
    value = odeint_adjoint(lambda t, y: rate * y, one, [0.0, 2.0], step_size=0.01)[-1]
    value.backward()
    assert rate.grad.item() == pytest.approx(2 * math.exp(-1.4), abs=1e-8)

    def switched(t, y):
        return rate * y if t < 1 else late * y

    value = odeint_adjoint(switched, one, [0.0, 2.0], step_size=0.01)[-1]
    with pytest.raises(RuntimeError, match="adjoint_params"):
        value.backward()
    value = odeint_adjoint(switched, one, [0.0, 2.0], step_size=0.01, adjoint_params=(rate, late))[
        -1
    ]
    value.backward()
    assert late.grad.item() == pytest.approx(math.exp(-0.4), abs=1e-2)


def test_adjoint_of_a_tuple_and_its_second_derivative():
    y0 = (
        torch.randn(2, requires_grad=True, **DOUBLE),
        torch.randn(2, requires_grad=True, **DOUBLE),
    )
    field = lambda t, s: (s[1], -s[0])  # noqa: E731
    got = odeint_adjoint(field, y0, [0.0, 1.0], step_size=0.01)
    got[0][-1].sum().backward()
    torch.testing.assert_close(y0[0].grad, torch.full((2,), math.cos(1.0), **DOUBLE))
    torch.testing.assert_close(y0[1].grad, torch.full((2,), math.sin(1.0), **DOUBLE))
    got = odeint_adjoint(field, y0, [0.0, 1.0], step_size=0.01)
    with pytest.raises(RuntimeError, match="odeint"):
        torch.autograd.grad(got[0][-1].sum(), y0[0], create_graph=True)


def test_adjoint_norms():
    net, calls = Net(2, 4), []
    y0 = (torch.ones(3, 2, **DOUBLE), torch.ones((), **DOUBLE))

    def field(t, s):
        calls.append(0)
        return net(t, s[0]), -s[1]

    def look(parts):
        shapes = [(), (3, 2), (), (3, 2), (), *(p.shape for p in net.parameters())]
        assert [tuple(part.shape) for part in parts] == [tuple(shape) for shape in shapes]
        return max(part.abs().max() for part in parts)

    found = {}
    for norm in (None, "seminorm", look):
        out = odeint_adjoint(
            field, y0, [0.0, 1.0], method="dopri5", adjoint_params=net.parameters(),
            adjoint_options=None if norm is None else {"norm": norm},
        )  # fmt: skip
        calls.clear()
        found[norm] = torch.autograd.grad(out[0].square().sum(), list(net.parameters()))
        found[norm, "calls"] = len(calls)
    for norm in ("seminorm", look):
        for ours, plain in zip(found[norm], found[None], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert found["seminorm", "calls"] <= found[None, "calls"]
    with pytest.raises(ValueError, match="seminorm"):
        odeint_adjoint(field, y0, [0.0, 1.0], adjoint_options={"norm": "max"})


def test_adjoint_says_where_it_does_not_work():
    y0 = torch.ones(4, 2, **DOUBLE)
    for transform in (torch.func.vmap, lambda f: torch.func.grad(lambda y: f(y).sum())):
        with pytest.raises(ValueError, match="odeint with a method of fixed steps"):
            transform(lambda y: odeint_adjoint(swing, y, [0.0, 1.0]))(y0)
    rtol = torch.full((4, 2), 1e-6, **DOUBLE)
    with pytest.raises(ValueError, match="adjoint_rtol"):
        odeint_adjoint(swing, y0, [0.0, 1.0], method="dopri5", rtol=rtol)
    y0.requires_grad_()
    odeint_adjoint(swing, y0, [0.0, 1.0], method="dopri5", rtol=rtol, adjoint_rtol=1e-6)[
        -1
    ].sum().backward()
    assert y0.grad.isfinite().all()


def test_adjoint_keeps_no_more_for_more_steps():
    def kept(solver, count):
        sizes = []
        y0 = torch.randn(200, 4, requires_grad=True, **DOUBLE)
        net = Net(4, 16)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.numel()) or x, lambda x: x
        ):
            solver(net, y0, [0.0, 1.0], step_size=1 / count)
        return sum(sizes)

    assert kept(odeint_adjoint, 200) == kept(odeint_adjoint, 20)
    assert kept(odeint, 200) > 5 * kept(odeint, 20)


# ---------------------------------------------------------------- transforms


@pytest.mark.parametrize("method", ["euler", "rk4", "implicit_midpoint"])
def test_vmap_and_jacobians(method):
    net, t = Net(), torch.linspace(0, 1, 6, **DOUBLE)
    y0 = torch.randn(4, 3, **DOUBLE)
    want = torch.stack([odeint(net, y, t, method=method) for y in y0])
    got = torch.func.vmap(lambda y: odeint(net, y, t, method=method))(y0)
    torch.testing.assert_close(got, want)
    scaled = torch.func.vmap(lambda s: odeint(net, y0[0], t * s, method=method))(
        torch.tensor([1.0, 0.5], **DOUBLE)
    )
    torch.testing.assert_close(scaled[1], odeint(net, y0[0], t * 0.5, method=method))
    stepped = torch.func.vmap(lambda y: odeint(net, y, t[[0, -1]], method=method, step_size=0.2))
    torch.testing.assert_close(stepped(y0)[:, -1], want[:, -1])
    end = lambda y: odeint(net, y, t, method=method)[-1]  # noqa: E731
    forward, reverse = torch.func.jacfwd(end)(y0[1]), torch.func.jacrev(end)(y0[1])
    torch.testing.assert_close(forward, torch.autograd.functional.jacobian(end, y0[1]))
    torch.testing.assert_close(forward, reverse)


def test_dopri5_under_vmap_says_what_to_do():
    y0 = torch.ones(2)
    for solve, batch in (
        (lambda t: odeint(swing, y0, t, method="dopri5"), torch.tensor([[0.0, 1.0], [0.0, 2.0]])),
        (lambda y: odeint(swing, y, [0.0, 1.0], method="dopri5"), torch.ones(3, 2)),
        (lambda r: odeint(lambda t, y: r * y, y0, [0.0, 1.0], method="dopri5"), torch.ones(3)),
    ):
        with pytest.raises(ValueError, match="fixed steps"):
            torch.func.vmap(solve)(batch)
    slope = torch.func.grad(lambda y: odeint(swing, y, [0.0, 1.0], method="dopri5")[-1, 0])(y0)
    angle = math.sin(1.0)
    assert slope.tolist() == pytest.approx([math.cos(angle), -math.sin(angle)], abs=1e-5)


def test_compile_without_a_break():
    weight = torch.randn(3, 3)
    field = lambda t, y: torch.tanh(y @ weight) * torch.cos(t)  # noqa: E731
    competing = ode.LotkaVolterraCompetition((0.1, 0.3), (1e-4, 2e-4), (0.002, 0.003))
    y0, t = torch.randn(4, 3), torch.linspace(0, 1, 4)
    calls = {
        "times": lambda y, t: odeint(field, y, t),
        "numbers": lambda y, t: odeint(field, y, (0.0, 1.0), method="heun", step_size=0.25),
        "rnn": lambda y, t: ODERNN(field, dt=0.1, method="euler")(y, 3),
        "step": lambda y, t: step(field, t[1], 0.1, y),
        "competition": lambda y, t: odeint(competing, y[:, :2], t),
    }
    for call in calls.values():
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(y0, t), call(y0, t))


# ---------------------------------------------------------------- the recurrent network


@pytest.mark.parametrize("method", list(METHODS))
def test_the_network_is_the_solver(method):
    net, y0 = Net().float(), torch.randn(4, 3)
    network = ODERNN(net, dt=0.125, method=method)  # a power of two: no rounding in the times
    states = network(y0, 12)
    y, loop = y0, [y0]
    for index in range(12):
        y = step(net, index * 0.125, 0.125, y, method=method)
        loop.append(y)
    assert torch.equal(states, torch.stack(loop))
    if method != "dopri5":
        assert torch.equal(states, odeint(net, y0, torch.arange(13) * 0.125, method=method))
    assert set(network.state_dict()) == {"func.enter", "func.leave", "func.bias"}


def test_an_euler_cell_is_written_out():
    net, y = Net(), torch.randn(5, 3, **DOUBLE)
    with torch.no_grad():
        got = ODERNN(net, dt=0.1, method="euler")(y, 4, t0=0.3)
        for index in range(4):
            y = y + 0.1 * net(torch.tensor(0.3 + index * 0.1, **DOUBLE), y)
            torch.testing.assert_close(got[index + 1], y, rtol=1e-14, atol=1e-15)


def test_the_step_can_be_learned():
    dt = torch.tensor(0.2, requires_grad=True, **DOUBLE)
    end = lambda dt: ODERNN(swing, dt=dt)(torch.ones(2, **DOUBLE), 5)[-1]  # noqa: E731
    assert torch.autograd.gradcheck(end, (dt,))
    back = ODERNN(swing, dt=-0.1)(ODERNN(swing, dt=0.1)(torch.ones(2, **DOUBLE), 5)[-1], 5, t0=0.5)
    torch.testing.assert_close(back[-1], torch.ones(2, **DOUBLE), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- fields


@pytest.mark.parametrize("shape", [(2,), (5, 2), (3, 4, 2)])
def test_fields_follow_their_formulas(shape):
    y = torch.rand(shape, **DOUBLE) * 100
    x1, x2 = y.unbind(-1)
    zero = torch.tensor(0.0)
    r, a, n = (0.11, 0.32), (1.3e-4, 2.1e-4), (0.0021, 0.0034)
    want = torch.stack([r[0] * x1 * (1 - x1 * n[0]) - a[0] * x1 * x2,
                        r[1] * x2 * (1 - x2 * n[1]) - a[1] * x1 * x2], -1)  # fmt: skip
    field = ode.LotkaVolterraCompetition(*(torch.tensor(p, **DOUBLE) for p in (r, a, n)))
    torch.testing.assert_close(field(zero, y), want)
    torch.testing.assert_close(field(zero, y.to(torch.complex128)).real, want)
    assert list(field.state_dict()) == ["growth", "competition", "inverse_capacity"]
    want = torch.stack([x1 * (0.5 - 0.03 * x2), x2 * (0.02 * x1 - 0.8)], -1)
    torch.testing.assert_close(
        ode.PredatorPrey(*(torch.tensor(p, **DOUBLE) for p in (0.5, 0.03, 0.02, 0.8)))(zero, y),
        want,
    )
    growth = ode.LogisticGrowth(torch.tensor(0.7, **DOUBLE), torch.tensor(0.01, **DOUBLE))
    torch.testing.assert_close(growth(zero, y), 0.7 * y * (1 - 0.01 * y))


def test_a_field_that_is_overridden_or_watched_is_called_as_it_stands():
    class Harvested(ode.LotkaVolterraCompetition):
        def forward(self, t, y):
            return super().forward(t, y) - 10.0

    arguments = ((0.1, 0.3), (1e-4, 2e-4), (0.002, 0.003))
    field, y0, t = Harvested(*arguments), torch.tensor([100.0, 150.0]), torch.linspace(0, 5, 20)
    want = odeint(lambda t, y: field(t, y), y0, t)
    torch.testing.assert_close(odeint(field, y0, t), want)
    seen, plain = [], ode.LotkaVolterraCompetition(*arguments)
    assert (odeint(plain, y0, t)[-1] - want[-1] > 10).all()
    plain.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        odeint(plain, y0, t, method="euler")
    assert len(seen) == 19


def test_fields_keep_float32_inside_autocast():
    field = ode.LotkaVolterraCompetition((0.1, 0.3), (1e-4, 2e-4), (0.002, 0.003))
    y0, t = torch.tensor([[100.0, 150.0], [90.0, 10.0]]), torch.linspace(0, 10, 30)
    want = odeint(field, y0, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(odeint(field, y0, t), want)


def test_logistic_growth_has_its_closed_form():
    t = torch.linspace(0, 10, 50, **DOUBLE)
    got = odeint(ode.LogisticGrowth(0.7, 0.01), torch.tensor([5.0, 130.0], **DOUBLE), t)
    y0 = got[0]
    want = 100 / (1 + (100 / y0 - 1) * torch.exp(-0.7 * t[:, None]))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_predator_and_prey_keep_their_invariant():
    field = ode.PredatorPrey(*(torch.tensor(p, **DOUBLE) for p in (0.5, 0.025, 0.02, 0.8)))
    path = odeint(field, torch.tensor([30.0, 10.0], **DOUBLE), [0.0, 5.0, 30.0], method="dopri5")
    x, z = path.unbind(-1)
    invariant = 0.02 * x - 0.8 * x.log() + 0.025 * z - 0.5 * z.log()
    torch.testing.assert_close(invariant, invariant[:1].expand(3), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- fitting


TIMES = torch.tensor([0.0, 10, 15, 30, 36, 40, 42], **DOUBLE)
TABLE = torch.tensor([[100.0, 150], [165, 283], [197, 290], [280, 276], [305, 269], [318, 266],
                      [324, 264]], **DOUBLE)  # fmt: skip


def competition(growth=(0.1, 0.3), a=(1e-4, 2e-4), n=(0.002, 0.003)):
    return ode.LotkaVolterraCompetition(*(torch.as_tensor(p, **DOUBLE) for p in (growth, a, n)))


def test_the_essays_table_is_eulers_solution_rounded():
    with torch.no_grad():
        rough = odeint(competition(), TABLE[0], TIMES, method="euler", step_size=0.1)
        exact = odeint(competition(), TABLE[0], TIMES, step_size=0.1)
    assert torch.equal(rough.round(), TABLE)
    assert not torch.equal(exact.round(), TABLE)


@pytest.mark.parametrize(("method", "least", "growth"), [("euler", 0.697, 0.2796),
                                                         ("rk4", 0.529, 0.2987)])  # fmt: skip
def test_fit_finds_the_least_squares_of_the_table(method, least, growth):
    field = competition((0.1, 0.1), (1e-3, 1e-3), (1e-3, 1e-3))
    before = {name: value.clone() for name, value in field.state_dict().items()}
    result = fit(field, TABLE[0], TIMES, TABLE, method=method, step_size=1.0)
    assert result.converged
    assert result.residual == pytest.approx(least, abs=1e-3)
    assert result.parameters["growth"][1].item() == pytest.approx(growth, abs=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in field.state_dict().items())
    assert torch.equal(result.field.growth, result.parameters["growth"])
    assert "x1" in result.equation
    assert "±" in str(result)


def test_fit_agrees_with_scipy_and_its_errors_with_the_normal_equations():
    optimize = pytest.importorskip("scipy.optimize")
    field, start = competition(), [0.1, 0.3, 1e-4, 2e-4, 0.002, 0.003]

    def residuals(v):
        v = torch.tensor(v, **DOUBLE)
        with torch.no_grad():
            y = odeint(competition(v[:2], v[2:4], v[4:]), TABLE[0], TIMES, step_size=1.0)
        return (y - TABLE)[1:].flatten().numpy()

    theirs = optimize.least_squares(residuals, start, x_scale=start, method="lm")
    ours = fit(field, TABLE[0], TIMES, TABLE, step_size=1.0)
    found = torch.cat([ours.parameters[n].detach() for n in field.state_dict()])
    torch.testing.assert_close(found, torch.tensor(theirs.x, **DOUBLE), rtol=1e-4, atol=0)
    jacobian = torch.tensor(theirs.jac, **DOUBLE)
    scale = torch.tensor(start, **DOUBLE)
    gram = (jacobian * scale).T @ (jacobian * scale)
    spread = (torch.linalg.inv(gram).diagonal() * 2 * theirs.cost / (12 - 6)).sqrt() * scale
    errors = torch.cat([ours.standard_errors[n] for n in field.state_dict()])
    torch.testing.assert_close(errors, spread, rtol=1e-2, atol=0)


@pytest.mark.parametrize("method", ["rk4", "dopri5", "implicit_midpoint"])
def test_fit_recovers_what_made_the_data(method):
    size = None if method == "dopri5" else 2.0
    keywords = {"method": method, "step_size": size, "rtol": 1e-8, "atol": 1e-10}
    with torch.no_grad():
        seen = odeint(competition(), TABLE[0], TIMES, **keywords)
    start = competition((0.12, 0.25), (1.3e-4, 1.5e-4), (0.0022, 0.0027))
    result = fit(start, TABLE[0], TIMES, seen, **keywords)
    for name, want in competition().named_parameters():
        torch.testing.assert_close(result.parameters[name], want.detach(), rtol=1e-5, atol=0)
    assert result.converged


def test_standard_errors_are_the_spread_of_repeated_fits():
    t = torch.arange(0, 12, **DOUBLE)
    with torch.no_grad():
        clean = odeint(ode.LogisticGrowth(0.7, 0.01), torch.tensor(5.0, **DOUBLE), t)
    generator = torch.Generator().manual_seed(0)
    found, claimed = [], []
    for _ in range(40):
        seen = clean + torch.randn(12, generator=generator, **DOUBLE)
        result = fit(ode.LogisticGrowth(0.6, 0.012), torch.tensor(5.0, **DOUBLE), t, seen)
        found.append(result.parameters["growth"].item())
        claimed.append(result.standard_errors["growth"].item())
    spread = torch.tensor(found).std().item()
    assert spread == pytest.approx(sum(claimed) / 40, rel=0.35)  # 40 draws: +- 11 % is one sigma


def test_fit_with_missing_data_an_observed_function_and_a_free_start():
    t = torch.arange(0, 10, **DOUBLE)
    field = ode.LogisticGrowth(0.7, 0.01)
    with torch.no_grad():
        y = odeint(field, torch.tensor(5.0, **DOUBLE), t)
    seen, mask = y.log(), torch.ones(10, dtype=torch.bool)
    mask[[0, 4]] = False
    seen[~mask] = torch.nan
    result = fit(ode.LogisticGrowth(0.5, 0.02), torch.tensor(8.0, **DOUBLE), t, seen,
                 mask=mask, observe=torch.log, fit_y0=True)  # fmt: skip
    assert result.parameters["y0"].item() == pytest.approx(5.0, rel=1e-5)
    assert result.parameters["growth"].item() == pytest.approx(0.7, rel=1e-5)
    assert set(result.standard_errors) == {"growth", "inverse_capacity", "y0"}


def test_what_the_data_leave_open_has_an_infinite_error():
    class Redundant(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.tensor(x, **DOUBLE)) for x in (0.3, 0.4))
            self.c = nn.Parameter(torch.tensor(2.0, **DOUBLE))

        def forward(self, t, y):
            return -(self.a + self.b) * y + self.c

    t = torch.linspace(0, 3, 8, **DOUBLE)
    seen = torch.exp(-t) + 0.5 * (1 - torch.exp(-t)) + 1e-3 * torch.sin(9 * t)
    result = fit(Redundant(), torch.tensor(1.0, **DOUBLE), t, seen, step_size=0.1)
    assert result.standard_errors["a"].isinf()
    assert result.standard_errors["b"].isinf()
    assert result.standard_errors["c"].isfinite()
    total = result.parameters["a"] + result.parameters["b"]
    assert total.item() == pytest.approx(1.0, abs=0.02)
    assert "a = " in result.equation


def test_fit_in_float32_and_with_a_batch_of_trajectories():
    field = ode.PredatorPrey(0.5, 0.025, 0.02, 0.8)
    t = torch.linspace(0, 6, 13)
    y0 = torch.tensor([[30.0, 10.0], [20.0, 25.0], [50.0, 5.0]])
    with torch.no_grad():
        seen = odeint(field, y0, t, step_size=0.1)
    result = fit(ode.PredatorPrey(0.45, 0.03, 0.018, 0.7), y0, t, seen, step_size=0.1)
    assert result.converged
    assert result.parameters["growth"].dtype == torch.float32
    for name, want in field.named_parameters():
        assert result.parameters[name].item() == pytest.approx(want.item(), rel=1e-3)


def test_standard_errors_are_those_of_curve_fit():
    optimize = pytest.importorskip("scipy.optimize")
    t = torch.arange(0, 10, **DOUBLE)
    curve = lambda t, r, n: 1 / (n + (1 / 5 - n) * (-r * t).exp())  # noqa: E731
    seen = curve(t, 0.7, 0.01) + torch.randn(10, generator=torch.Generator().manual_seed(1),
                                             **DOUBLE)  # fmt: skip
    theirs, covariance = optimize.curve_fit(
        lambda t, r, n: curve(torch.tensor(t), r, n).numpy(), t.numpy(), seen.numpy(), (0.5, 0.02)
    )
    # Row 0 is a measurement like the others here: the start, 5, is known apart from it.
    start = torch.tensor(5.0, **DOUBLE)
    ours = fit(ode.LogisticGrowth(0.5, 0.02), start, t, seen, step_size=0.05)
    for index, name in enumerate(("growth", "inverse_capacity")):
        assert ours.parameters[name].item() == pytest.approx(theirs[index], rel=1e-4)
        error = ours.standard_errors[name].item()
        assert error == pytest.approx(covariance[index, index] ** 0.5, rel=1e-3)


class Product(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(x, dtype=dtype)) for x in (0.3, 1.7))
        self.unused = nn.Parameter(torch.tensor(2.0, dtype=dtype))

    def forward(self, t, y):
        return -self.a * self.b * y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "implicit_midpoint"])
def test_what_cannot_be_told_apart_is_infinite_in_any_precision(dtype, method):
    t = torch.linspace(0, 3, 8, dtype=dtype)
    seen = torch.exp(-t) + 0.01 * torch.sin(9 * t)
    size = None if method == "dopri5" else 0.1
    result = fit(Product(dtype), torch.ones((), dtype=dtype), t, seen, method=method,
                 step_size=size, rtol=1e-5, atol=1e-6)  # fmt: skip
    assert all(error.isinf() for error in result.standard_errors.values())
    rate = (result.parameters["a"] * result.parameters["b"]).item()
    assert rate == pytest.approx(1.0, abs=0.03)
    assert result.parameters["unused"] == 2.0


@pytest.mark.parametrize("method", ["rk4", "dopri5", "implicit_midpoint"])
def test_a_fit_with_nothing_to_learn(method):
    field, t = Product(torch.float64), torch.linspace(0, 1, 4, **DOUBLE)
    for times in (t, t[:1]):
        seen = torch.full((len(times),), 2.0, **DOUBLE)
        result = fit(field, torch.zeros((), **DOUBLE), times, seen, method=method)
        assert result.residual == pytest.approx(4.0 * len(times))
        assert all(error.isinf() for error in result.standard_errors.values())
    alone = fit(field, torch.zeros((), **DOUBLE), t[:1], seen, method=method, fit_y0=True)
    assert alone.parameters["y0"].item() == pytest.approx(2.0)


def test_frozen_parameters_stay():
    field = competition((0.12, 0.25))
    field.competition.requires_grad_(False)
    result = fit(field, TABLE[0], TIMES, TABLE, step_size=1.0)
    assert set(result.parameters) == {"growth", "inverse_capacity"}
    assert torch.equal(result.field.competition, field.competition)


# ---------------------------------------------------------------- what goes wrong, by name


def test_blow_up_names_time_and_state():
    t = torch.linspace(0, 2, 201, **DOUBLE)
    y0 = torch.tensor([1.0, 0.5], **DOUBLE)
    for method in ("rk4", "dopri5"):
        with pytest.raises(ode.SolverError) as caught:
            odeint(lambda t, y: y * y, y0, t, method=method)
        error = caught.value
        assert 0.95 < error.t < 1.1
        assert error.y.shape == (2,)
        assert error.y.isfinite().all()
        assert f"{error.t:.6g}" in str(error)
    with pytest.raises(ode.StepUnderflowError):
        odeint(lambda t, y: y * y, y0, t, method="dopri5")
    with pytest.raises(ode.NonFiniteError):
        odeint(lambda t, y: y * y, y0, t)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_field_that_returns_nan(method):
    def field(t, y):
        return torch.where(t > 0.5, torch.nan, -y)

    y0 = (torch.ones(2), torch.ones(3))
    with pytest.raises(ode.NonFiniteError) as caught:
        odeint(lambda t, s: tuple(field(t, y) for y in s), y0, torch.linspace(0, 1, 11),
               method=method, rtol=1e-4, atol=1e-6)  # fmt: skip
    assert 0.35 <= caught.value.t <= 0.6 + 1e-6  # Euler looks at 0.6 only from there on
    assert [y.shape for y in caught.value.y] == [(2,), (3,)]
    assert isinstance(caught.value, FloatingPointError)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("bad", [lambda y: y[:1], lambda y: y.sum(0), lambda y: y[None],
                                 lambda y: None, lambda y: y * 1j])  # fmt: skip
def test_a_field_that_changes_shape(method, bad):
    def field(t, y):
        return bad(y) if t > 0.5 else -y

    with pytest.raises(ode.FieldError, match="func must return") as caught:
        odeint(field, torch.ones(4, 2), torch.linspace(0, 1, 11), method=method)
    assert 0 <= caught.value.t <= 0.6 + 1e-6
    assert caught.value.y.shape == (4, 2)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_tuple_may_hold_a_single_number(method):
    t = torch.linspace(0, 1, 21, **DOUBLE)
    y0 = (torch.tensor(1.0, **DOUBLE), torch.ones(2, 1, **DOUBLE))
    got = odeint(lambda t, s: (-s[0], -2 * s[1]), y0, t, method=method)
    alone = odeint(lambda t, y: -y, y0[0], t, method=method)
    torch.testing.assert_close(got[0], alone, rtol=1e-6, atol=0)
    assert [x.shape for x in got] == [(21,), (21, 2, 1)]


def test_a_tuple_field_that_changes_shape():
    with pytest.raises(ode.FieldError, match="tuple of the shapes"):
        odeint(lambda t, s: (s[0], s[0]), (torch.ones(2), torch.ones(3)), [0.0, 1.0])


@pytest.mark.parametrize("t", [[0.0, 1.0, 0.5], [0.0, 0.0], [1.0, 0.5, 0.5], [0.0, math.nan],
                               [0.0, math.inf]])  # fmt: skip
@pytest.mark.parametrize("solver", [odeint, odeint_adjoint])
def test_times_out_of_order(t, solver):
    with pytest.raises(ode.TimeOrderError, match=r"t\[|finite"):
        solver(lambda t, y: -y, torch.ones(2), torch.tensor(t))


def test_a_stiff_problem_stops_at_the_step_limit():
    with pytest.raises(ode.StepLimitError, match="stiff") as caught:
        odeint(lambda t, y: -1e6 * (y - torch.cos(t)), torch.ones(1), [0.0, 10.0],
               method="dopri5", options={"max_num_steps": 200})  # fmt: skip
    assert 0 < caught.value.t < 1


@pytest.mark.parametrize(("keywords", "match"), [
    ({"method": "rk5"}, "method must be one of"),
    ({"step_size": 0.0}, "step_size"),
    ({"step_size": -0.1}, "step_size"),
    ({"step_size": math.nan}, "step_size"),
    ({"step_size": 0.1, "options": {"step_size": 0.1}}, "twice"),
    ({"step_size": 0.1, "method": "dopri5"}, "no option 'step_size'"),
    ({"options": {"stepsize": 0.1}}, "no option 'stepsize'"),
    ({"method": "dopri5", "rtol": -1.0}, "rtol"),
    ({"method": "dopri5", "atol": math.inf}, "atol"),
    ({"method": "dopri5", "rtol": 0.0, "atol": 0}, "both"),
    ({"method": "dopri5", "rtol": torch.zeros(2), "atol": torch.tensor([1.0, 0.0])}, "both"),
    ({"method": "dopri5", "rtol": torch.tensor([1e-3, -1e-3])}, "rtol must be finite"),
    ({"method": "dopri5", "atol": torch.tensor(math.nan)}, "atol must be finite"),
    ({"method": "dopri5", "rtol": torch.ones(2, 1)}, "rtol must broadcast"),
    ({"method": "dopri5", "rtol": torch.ones(3)}, "rtol must broadcast"),
    ({"method": "dopri5", "options": {"first_step": 0.0}}, "first_step"),
    ({"method": "dopri5", "options": {"first_step": -1.0}}, "first_step"),
    ({"method": "dopri5", "options": {"min_step": -1.0}}, "min_step"),
    ({"method": "dopri5", "options": {"max_step": 0.0}}, "max_step"),
    ({"method": "dopri5", "options": {"min_step": 2.0, "max_step": 1.0}}, "max_step"),
    ({"method": "dopri5", "options": {"max_num_steps": 0}}, "max_num_steps"),
    ({"method": "dopri5", "options": {"safety": 0.0}}, "safety"),
    ({"method": "dopri5", "options": {"ifactor": 0.5}}, "ifactor"),
    ({"method": "dopri5", "options": {"dfactor": 1.5}}, "dfactor"),
    ({"step_size": 1e-12}, "spacing"),
])  # fmt: skip
def test_bad_settings(keywords, match):
    with pytest.raises(ValueError, match=match):
        odeint(lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]), **keywords)


def test_bad_states_and_times():
    field, t = (lambda t, y: -y), torch.tensor([0.0, 1.0])
    with pytest.raises(TypeError, match="y0"):
        odeint(field, torch.ones(2, dtype=torch.long), t)
    with pytest.raises(TypeError, match="y0"):
        odeint(field, 1.0, t)
    with pytest.raises(ValueError, match="y0 must be finite"):
        odeint(field, torch.tensor([1.0, math.nan]), t)
    with pytest.raises(ValueError, match="t must have shape"):
        odeint(field, torch.ones(2), t[None])
    with pytest.raises(ValueError, match="t must have shape"):
        odeint(field, torch.ones(2), t[:0])
    with pytest.raises(TypeError, match="t must be a tensor"):
        odeint(field, torch.ones(2), [[0.0, 1.0]])
    with pytest.raises(ValueError, match="steps"):
        ODERNN(field, dt=0.1)(torch.ones(2), 0)
    with pytest.raises(ValueError, match="dt"):
        ODERNN(field, dt=0.0)


def test_states_of_mixed_kinds():
    t = [0.0, 1.0]
    mixed = (torch.ones(2, dtype=torch.long), torch.ones(3))
    with pytest.raises(TypeError, match="int64"):  # it would be rounded to whole numbers
        odeint(lambda t, s: (0.5 * s[0], s[1]), mixed, t)
    waves = (torch.ones(2, dtype=torch.complex128), torch.zeros(1, **DOUBLE))
    got = odeint(lambda t, s: (1j * s[0], s[0].abs().sum()[None]), waves, t, step_size=0.01)
    assert [x.dtype for x in got] == [torch.complex128, torch.float64]
    assert got[0][-1, 0].item() == pytest.approx(complex(math.cos(1), math.sin(1)), abs=1e-8)
    assert got[1][-1].item() == pytest.approx(2.0)
    with pytest.raises(ode.FieldError, match="real"):
        odeint(lambda t, s: (1j * s[0], 1j * s[1]), waves, t)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_half_precision_that_is_complex_or_wrong():
    y0 = torch.ones(1, dtype=torch.complex32)
    got = odeint(lambda t, y: 1j * y, y0, [0.0, 1.0], step_size=0.1)
    assert got.dtype == torch.complex32
    end = got[-1].to(torch.complex64).item()
    assert end == pytest.approx(complex(math.cos(1), math.sin(1)), abs=2e-3)
    for bad in (lambda t, y: None, lambda t, y: y[None]):
        with pytest.raises(ode.FieldError):
            odeint(bad, torch.ones(1, dtype=torch.float16), [0.0, 1.0])
    with pytest.raises(ode.FieldError):
        odeint(lambda t, s: None, (torch.ones(1),), [0.0, 1.0])
    with pytest.raises(TypeError, match="func"):
        odeint(None, torch.ones(1), [0.0, 1.0])


def test_whole_times_beyond_the_precision_of_the_state():
    t = torch.tensor([2**24, 2**24 + 1, 2**24 + 2])
    got = odeint(lambda t, y: torch.ones_like(y), torch.zeros(1), t, method="euler")
    assert got.flatten().tolist() == [0.0, 1.0, 2.0]


def test_dopri5_at_rest_at_a_late_time():
    for start in (1e9, -1e9, 1.7e9):  # a clock in seconds: the first guess of a step is too short
        got = odeint(lambda t, y: 0 * y, torch.zeros(2, **DOUBLE), [start, start + 10],
                     method="dopri5")  # fmt: skip
        assert torch.equal(got, torch.zeros(2, 2, **DOUBLE))
    # Nothing absolute is allowed, and one component stays at zero.
    got = odeint(lambda t, y: -y, torch.tensor([1.0, 0.0], **DOUBLE), [0.0, 1.0], method="dopri5",
                 atol=0.0)  # fmt: skip
    assert got[-1].tolist() == pytest.approx([math.exp(-1), 0.0], abs=1e-6)


@pytest.mark.parametrize("given", [0.5, [torch.tensor(0.5)], torch.tensor([0.5, 9.0])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("descending", [False, True])
def test_the_field_is_looked_at_on_both_sides_of_a_jump(given, dtype, late, descending):
    def jump(t, y):
        first = t <= 0.5 if late else t < 0.5
        return torch.where(first, 1.0, -2.0).to(y.dtype) * torch.ones_like(y)

    t = [1.0, 0.0] if descending else [0.0, 1.0]
    got = odeint(jump, torch.zeros(1, dtype=dtype), t, method="dopri5", rtol=1e-3,
                 options={"jump_t": given})  # fmt: skip
    assert got[-1].item() == pytest.approx(0.5 if descending else -0.5, abs=1e-6)


def test_a_step_is_a_scalar():
    many, field = torch.ones(3, 1), lambda t, y: -y
    for call in (lambda: step(field, 0.0, many, torch.ones(3)),
                 lambda: step(field, many, 0.1, torch.ones(3)),
                 lambda: ODERNN(field, dt=many)):  # fmt: skip
        with pytest.raises(ValueError, match="scalar"):
            call()


def test_bad_fits():
    field = competition()
    with pytest.raises(ValueError, match="observations must have the shape"):
        fit(field, TABLE[0], TIMES, TABLE[1:])
    with pytest.raises(ValueError, match="must be finite"):
        fit(field, TABLE[0], TIMES, TABLE * torch.nan)
    with pytest.raises(ValueError, match="mask"):
        fit(field, TABLE[0], TIMES, TABLE, mask=torch.ones(7, 1))
    with pytest.raises(ValueError, match="mask keeps no"):
        fit(field, TABLE[0], TIMES, TABLE, mask=torch.zeros(7, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="field must be a"):
        fit(lambda t, y: -y, TABLE[0], TIMES, TABLE)
    with pytest.raises(TypeError, match="y0"):
        fit(field, (100.0, 150.0), TIMES, TABLE)
    with pytest.raises(TypeError, match="observations"):
        fit(field, TABLE[0], TIMES, TABLE.tolist())
    with pytest.raises(TypeError, match="complex"):
        fit(field, TABLE[0], TIMES, TABLE.to(torch.complex128))
    for observe in (lambda y: (y - 200).log(), lambda y: 1 / (y - TABLE[0])):
        with pytest.raises(ValueError, match="observe must be finite"):
            fit(field, TABLE[0], TIMES, TABLE, observe=observe)
    for bad in (math.nan, math.inf, 0.0, -1.0):
        with pytest.raises(ValueError, match="noise_std"):
            fit(field, TABLE[0], TIMES, TABLE, noise_std=bad)
        with pytest.raises(ValueError, match="tolerance"):
            fit(field, TABLE[0], TIMES, TABLE, tolerance=bad)
    with pytest.raises(ValueError, match="no parameter"):
        fit(competition().requires_grad_(False), TABLE[0], TIMES, TABLE)
    with pytest.raises(ValueError, match="growth must have shape"):
        ode.LotkaVolterraCompetition((0.1,), (1e-4, 2e-4), (0.002, 0.003))
    with pytest.raises(ValueError, match="2 species"):
        field(torch.tensor(0.0), torch.ones(3, **DOUBLE))


# ---------------------------------------------------------------- where it may be called from


class Bounded(nn.Module):
    """A field that is defined from t = 1 on alone, and keeps a buffer."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.4, 0.9, 1.3], **DOUBLE))
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 0.5], **DOUBLE))

    def forward(self, t, y):
        if bool((t < 1).any()):
            raise RuntimeError("too early")
        return -self.rate * self.scale * y


def test_a_field_is_tried_at_no_time_but_its_own():
    field, t = Bounded(), torch.linspace(1, 2, 30, **DOUBLE)
    y0 = torch.ones(3, **DOUBLE)
    path = odeint(field, y0, t)
    want = torch.exp(-field.rate * field.scale * (t[:, None] - 1))
    torch.testing.assert_close(path, want, rtol=1e-6, atol=0)
    start = copy.deepcopy(field)
    with torch.no_grad():
        start.rate += 0.1
    found = fit(start, y0, t, path.detach()).parameters["rate"]
    torch.testing.assert_close(found, field.rate.detach(), rtol=1e-6, atol=0)


ROWS = {
    "compared": lambda t, y: -y + torch.where(y > 0, y, 0 * y).mean(0),
    "counted": lambda t, y: (y.detach() > 0).sum(0) * torch.sin(y) * 0.1,
    "driven": lambda t, y: torch.cos(t) - y + torch.where(y > 0, y, 0 * y).mean(0),
    "hidden": lambda t, y: torch.nan_to_num(y).sum(0) * 0.1 - y,
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("sign", [1.0, 0.0, -1.0])
def test_rows_that_feel_each_other_through_a_comparison(name, sign):
    start = sign * torch.ones(4, 3, **DOUBLE)  # equal rows: one alone moves as all together
    t = torch.linspace(0, 1, 25, **DOUBLE)
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), **DOUBLE)
    found = []
    for solve in (odeint, _loop):
        y0 = start.clone().requires_grad_()
        value = (solve(ROWS[name], y0, t, method="rk4")[-1] * weights).sum()
        found.append(torch.autograd.grad(value, y0)[0])
    torch.testing.assert_close(*found)


class ByNumber(nn.Module):
    """Each row has its own rate, found by its place in the batch."""

    def __init__(self, *rates):
        super().__init__()
        self.rates = nn.Parameter(torch.tensor(rates, **DOUBLE))

    def forward(self, t, y):
        return -self.rates[: len(y), None] * y


def test_fit_of_rows_that_differ_by_their_place():
    t = torch.linspace(0, 2, 9, **DOUBLE)
    y0 = torch.tensor([[1.0, 2.0], [0.5, 1.5], [2.0, 0.3]], **DOUBLE)
    rates = torch.tensor([0.3, 0.8, 1.7], **DOUBLE)
    seen = y0 * torch.exp(-rates[:, None] * t[:, None, None])
    result = fit(ByNumber(0.5, 0.5, 0.5), y0, t, seen, step_size=0.05, noise_std=0.1)
    torch.testing.assert_close(result.parameters["rates"], rates, rtol=1e-5, atol=0)
    slopes = t[:, None, None] * seen  # minus the derivative of each row by its own rate
    errors = 0.1 / slopes.square().sum((0, 2)).sqrt()
    torch.testing.assert_close(result.standard_errors["rates"], errors, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_changes_nothing(method, made_inside):
    field = lambda t, y: -60.0 * (y - torch.cos(t)) * y  # noqa: E731
    t, y0 = torch.linspace(0, 1, 41, **DOUBLE), torch.tensor([0.7, 1.2], **DOUBLE)
    want = odeint(field, y0, t, method=method)
    with torch.inference_mode():
        start = y0.clone() if made_inside else y0
        got = odeint(field, start, t, method=method)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["rk4", "dopri5", "implicit_midpoint"])
@pytest.mark.parametrize("made_inside", [False, True])
def test_fit_in_inference_mode(method, made_inside):
    keywords = {"method": method, "step_size": None if method == "dopri5" else 0.1}
    t = torch.arange(0, 8, **DOUBLE)
    with torch.no_grad():
        seen = odeint(ode.LogisticGrowth(0.7, 0.01), torch.tensor(5.0, **DOUBLE), t, **keywords)
    with torch.inference_mode():
        rows = seen.clone() if made_inside else seen
        result = fit(ode.LogisticGrowth(0.5, 0.02), rows[0], t, rows, **keywords)
    assert result.converged
    assert result.parameters["growth"].item() == pytest.approx(0.7, rel=1e-5)


@pytest.mark.parametrize("descending", [False, True])
def test_second_derivatives_of_dopri5_by_the_times(descending):
    t = random_times(2, 3, descending=descending).requires_grad_()
    y0 = torch.tensor([0.4, 0.8], requires_grad=True, **DOUBLE)

    def solve(y0, t):
        field = lambda t, y: torch.stack([-y[1] * y[0], y[0] + t * t])  # noqa: E731
        return odeint(field, y0, t, method="dopri5", rtol=1e-10, atol=1e-10)

    assert torch.equal(solve(y0, t)[0], y0)
    assert torch.autograd.gradcheck(solve, (y0, t), atol=1e-5)
    assert torch.autograd.gradgradcheck(solve, (y0, t), atol=1e-5)


@pytest.mark.parametrize("method", ["rk4", "implicit_midpoint"])
def test_adjoint_parameters_may_have_a_graph_and_come_twice(method):
    leaf = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), **DOUBLE).requires_grad_()
    weight = torch.tanh(leaf)
    field = lambda t, y: torch.tanh(y @ weight)  # noqa: E731
    found = []
    for solver, keywords in (
        (odeint, {}),
        (odeint_adjoint, {"adjoint_params": (weight,)}),
        (odeint_adjoint, {"adjoint_params": (leaf, leaf)}),
    ):
        end = solver(field, torch.ones(3, **DOUBLE), [0.0, 1.0], step_size=0.01, method=method,
                     **keywords)[-1]  # fmt: skip
        found.append(torch.autograd.grad(end.square().sum(), leaf, retain_graph=True)[0])
    for got in found[1:]:
        torch.testing.assert_close(got, found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["implicit_midpoint", "implicit_euler"])
def test_implicit_steps_of_complex_and_empty_states(method):
    rate = torch.tensor(0.3 - 0.8j, dtype=torch.complex128, requires_grad=True)
    start = torch.tensor([1.0 + 0.5j, 0.2 - 1.0j], dtype=torch.complex128).conj()
    assert start.is_conj()
    field = lambda t, y: (rate.conj() * y.conj() * y).conj()  # noqa: E731
    found = []
    for solver in (odeint, odeint_adjoint):
        y0 = start.clone().requires_grad_()
        path = solver(field, y0, [0.0, 0.2], step_size=4e-3, method=method)
        found.append([path, *torch.autograd.grad(path[-1].abs().square().sum(), [y0, rate])])
        plain = solver(field, start, [0.0, 0.2], step_size=4e-3, method=method)
        torch.testing.assert_close(plain, path)
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-3)
    empty = torch.ones(3, 0, requires_grad=True, **DOUBLE)
    odeint_adjoint(lambda t, y: -y, empty, [0.0, 1.0], method=method).sum().backward()
    assert empty.grad.shape == (3, 0)


@pytest.mark.parametrize("t", [None, 5.0, [[0.0, 1.0]], np.array([[0.0, 1.0]]), ["0", "1"]])
@pytest.mark.parametrize("solver", [odeint, odeint_adjoint])
def test_times_that_are_none(t, solver):
    with pytest.raises(TypeError, match="t must be a tensor"):
        solver(lambda t, y: -y, torch.ones(1), t)


def test_times_and_settings_as_numpy_and_torchdiffeq_write_them():
    y0 = torch.ones(1, **DOUBLE)
    want = odeint(lambda t, y: -y, y0, [0.0, 0.5, 1.0], method="dopri5")
    unset = {"first_step": None, "step_t": None, "jump_t": None}
    for t in (np.array([0.0, 0.5, 1.0]), (x / 2 for x in range(3))):
        assert torch.equal(odeint(lambda t, y: -y, y0, t, method="dopri5", options=unset), want)
