"""lib.nice against Jacobians, quadrature, closed forms and three other libraries."""

from __future__ import annotations

import copy
import io
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Independent,
    Normal,
    TransformedDistribution,
)
from torch.func import functional_call, grad, jacfwd, jacrev, stack_module_state, vmap

from lib.nice import (
    NICE,
    AdditiveCoupling,
    AffineCoupling,
    FlowTransform,
    Logistic,
    OneDNNLinear,
    Scaling,
    bits_per_dim,
    dequantize,
)
from lib.nice._linear import ColumnLinear

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SEEDS = [0, 1, 2]


def randomise(module: nn.Module, seed: int, gain: float = 1.5) -> nn.Module:
    """Give every parameter a generic value: weights of order gain / sqrt(fan in)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = gain / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 0.7
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("log_scale"):
                noise -= 0.3
            parameter.copy_(scale * noise)
    return module


def small_flow(seed: int = 0, dim: int = 6, gain: float = 1.5, **options: object) -> NICE:
    """A flow in float64 with generic parameters."""
    options = {"num_couplings": 4, "hidden": 11, "num_hidden": 2, **options}
    return randomise(NICE(dim, **options).double(), seed, gain)


def points(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return 1.3 * torch.randn(shape, generator=generator, dtype=dtype)


def slogdet(f, x: Tensor) -> Tensor:
    """log |det df/dx| at each row of x, from the Jacobian that autograd builds."""
    rows = [torch.autograd.functional.jacobian(f, row) for row in x]
    return torch.stack([torch.linalg.slogdet(j).logabsdet for j in rows])


def smooth(flow: NICE) -> NICE:
    """Replace ReLU by tanh, so that quadrature converges fast."""
    for coupling in flow.couplings:
        *inner, last = coupling.net
        coupling.net = nn.Sequential(*(m for layer in inner for m in (layer, nn.Tanh())), last)
    return flow


# --- the Jacobian -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dim", [6, 8])
@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_log_det_is_that_of_the_autograd_jacobian(dim, seed, coupling):
    flow = small_flow(seed, dim, coupling=coupling)
    x = points(5, dim, seed=seed)
    _, log_abs_det = flow(x)
    expected = slogdet(lambda row: flow(row)[0], x)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(log_abs_det, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("layer", [AdditiveCoupling, AffineCoupling])
def test_a_coupling_alone(layer, swap):
    coupling = randomise(layer(8, swap=swap, hidden=9, num_hidden=1).double(), 3)
    x = points(4, 8)
    z, log_abs_det = coupling(x)
    expected = slogdet(lambda row: coupling(row)[0], x)
    torch.testing.assert_close(log_abs_det, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(coupling.inverse(z), x, rtol=1e-10, atol=1e-10)
    kept = slice(1 if swap else 0, None, 2)
    moved = slice(0 if swap else 1, None, 2)
    assert torch.equal(z[:, kept], x[:, kept])
    assert ((z - x)[:, moved].abs() > 1e-3).all()


def test_additive_coupling_is_unit_triangular_once_the_halves_are_sorted():
    coupling = randomise(AdditiveCoupling(6, hidden=9, num_hidden=1).double(), 1)
    jacobian = jacrev(lambda row: coupling(row)[0])(points(6))
    order = [0, 2, 4, 1, 3, 5]
    block = jacobian[order][:, order]
    assert torch.equal(block.triu(), torch.eye(6, dtype=torch.float64))
    assert (block[3:, :3].abs() > 1e-6).all()


def test_affine_coupling_with_no_log_scale_is_additive():
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(x), x.sin()], -1)

    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin()

    x = points(3, 4)
    affine, additive = AffineCoupling(4, net=Net()), AdditiveCoupling(4, net=Shift())
    torch.testing.assert_close(affine(x), additive(x))
    assert affine(x)[0].dtype == torch.float64


def test_the_log_scales_of_an_affine_coupling_are_bounded():
    coupling = randomise(AffineCoupling(6, hidden=9, num_hidden=1, bound=0.5).double(), 0, gain=50)
    _, log_abs_det = coupling(100 * points(20, 6))
    assert log_abs_det.abs().max() <= 3 * 0.5
    assert log_abs_det.abs().max() > 0.5


def test_scaling():
    scaling = randomise(Scaling(5).double(), 4)
    x = points(3, 5)
    z, log_abs_det = scaling(x)
    torch.testing.assert_close(z, x @ torch.diag(scaling.log_scale.exp()))
    torch.testing.assert_close(log_abs_det, slogdet(lambda row: scaling(row)[0], x))
    torch.testing.assert_close(scaling.inverse(z), x, rtol=1e-12, atol=1e-12)


def test_log_dets_can_be_added_to_in_place():
    flow, x = small_flow().requires_grad_(False), points(3, 6)
    for log_abs_det in (
        flow(x)[1],
        flow.couplings[0](x)[1],
        flow.scaling(x)[1],
        flow.transform.log_abs_det_jacobian(x, x),
    ):
        expected = log_abs_det + torch.arange(3)
        assert torch.equal(log_abs_det.add_(torch.arange(3)), expected)


@pytest.mark.parametrize("dim", [2, 4, 8])
@pytest.mark.parametrize("num_couplings", [1, 2, 3, 4])
def test_three_couplings_mix_everything(num_couplings, dim):
    flow = small_flow(2, dim, num_couplings=num_couplings, hidden=40)
    jacobians = vmap(jacrev(lambda row: flow(row)[0]))(points(30, dim))
    reached = (jacobians.abs() > 1e-12).any(0)
    assert reached.all().item() == (num_couplings >= (2 if dim == 2 else 3))


# --- the inverse --------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["additive", "affine"])
@pytest.mark.parametrize("seed", SEEDS)
def test_round_trips_in_float64(seed, coupling):
    # stretching multiplies rounding errors, so the affine flow gets weights of usual size
    flow = small_flow(seed, 8, 1.5 if coupling == "additive" else 1.0, coupling=coupling)
    x = points(50, 8, seed=seed)
    assert (flow.inverse(flow(x)[0]) - x).abs().max() < 1e-10
    assert (flow(flow.inverse(x))[0] - x).abs().max() < 1e-10


@pytest.mark.parametrize("linear", [nn.Linear, ColumnLinear, OneDNNLinear])
def test_round_trip_at_the_essays_size(linear):
    flow = randomise(NICE(784, linear=linear), 0, gain=1.0)  # shifts as large as the pixels
    x = torch.rand(32, 784, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z, _ = flow(x)
        assert (z - x).abs().mean() > 0.5
        assert (flow.inverse(z) - x).abs().max() < 1e-4
        if linear is not OneDNNLinear:
            x = x.double()
            flow = flow.double()
            assert (flow.inverse(flow(x)[0]) - x).abs().max() < 1e-10


def test_parameters_at_the_essays_size():
    flow = NICE(784)
    ends, inner = 392 * 1000 + 1000 + 1000 * 392 + 392, 4 * (1000 * 1000 + 1000)
    assert [sum(p.numel() for p in c.parameters()) for c in flow.couplings] == 4 * [ends + inner]
    assert sum(p.numel() for p in flow.parameters()) == 4 * (ends + inner) + 784 == 19_158_352


# --- the density --------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["logistic", "normal"])
@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_the_density_integrates_to_one(prior, coupling):
    flow = smooth(small_flow(5, 2, prior=prior, coupling=coupling))
    with torch.no_grad():
        flow.scaling.log_scale.copy_(torch.tensor([0.2, 0.6]))
        axis = torch.arange(-35, 35, 0.07, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        total = sum(flow.log_prob(part).exp().sum() for part in grid.split(100_000)) * 0.07**2
    assert total.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("prior", ["logistic", "normal"])
def test_log_prob_is_the_change_of_variables_formula(prior):
    flow = small_flow(1, prior=prior)
    x = points(7, 6)
    z, _ = flow(x)
    if prior == "normal":
        base = (torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)).log().sum(-1)
    else:
        base = (torch.exp(-z) / (1 + torch.exp(-z)).square()).log().sum(-1)
    expected = base + slogdet(lambda row: flow(row)[0], x)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(flow.prior.log_prob(z), base, rtol=1e-10, atol=1e-10)


def test_batch_shapes():
    flow = small_flow()
    x = points(2, 3, 6)
    flat = flow.log_prob(x.view(6, 6))
    torch.testing.assert_close(flow.log_prob(x), flat.view(2, 3))
    torch.testing.assert_close(flow.log_prob(x[0, 1]), flat[1])
    assert flow.log_prob(x[:0]).shape == (0, 3)
    assert flow.inverse(x).shape == x.shape


def test_the_scaling_learns_the_prior():
    """With a normal prior the best log-scale is minus the log standard deviation."""
    data = points(400, 4) * torch.tensor([0.1, 1.0, 3.0, 0.5])
    flow = NICE(4, hidden=3, num_hidden=1, prior="normal").double()
    for coupling in flow.couplings:
        nn.init.zeros_(coupling.net[-1].weight)
        nn.init.zeros_(coupling.net[-1].bias)
    with torch.no_grad():
        flow.scaling.log_scale.copy_(-0.5 * data.square().mean(0).log())
    flow.log_prob(data).mean().backward()
    assert flow.scaling.log_scale.grad.abs().max() < 1e-12
    deviation = data.square().mean(0).sqrt()
    learned_prior = Normal(torch.zeros(4, dtype=torch.float64), deviation)
    torch.testing.assert_close(flow.log_prob(data), learned_prior.log_prob(data).sum(-1))


def test_training_finds_a_dependence():
    """x_2 = x_1^2 + noise: the best density is known, and couplings can reach it."""
    torch.manual_seed(0)
    x1 = torch.randn(3000)
    x = torch.stack([x1, x1.square() + 0.3 * torch.randn(3000)], -1)
    best = Normal(0, 1).entropy() + Normal(0, 0.3).entropy()
    flow = NICE(2, hidden=32, num_hidden=2, prior="normal")
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        loss = -flow.log_prob(x).mean()
        loss.backward()
        optimizer.step()
    assert abs(loss.item() - best.item()) < 0.1


# --- gradients, torch.func and compilation ------------------------------------------------------


@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_gradcheck(coupling):
    flow = smooth(small_flow(3, 4, coupling=coupling, hidden=5))
    names = list(dict(flow.named_parameters()))
    values = [p.detach().requires_grad_() for p in flow.parameters()]

    def log_prob(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        z, log_abs_det = functional_call(flow, named, (x,))
        return flow.prior.log_prob(z) + log_abs_det

    x = points(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(log_prob, (x, *values))
    assert torch.autograd.gradcheck(flow.inverse, (x,))


@pytest.mark.parametrize("linear", [nn.Linear, ColumnLinear, OneDNNLinear])
def test_vmap_and_grad(linear):
    flow = randomise(NICE(6, hidden=11, num_hidden=2, linear=linear), 0)
    x = points(5, 6, dtype=torch.float32)
    torch.testing.assert_close(vmap(flow.log_prob)(x), flow.log_prob(x))
    torch.testing.assert_close(vmap(flow.inverse)(x), flow.inverse(x))
    leaf = x.clone().requires_grad_()
    flow.log_prob(leaf).sum().backward()
    torch.testing.assert_close(vmap(grad(flow.log_prob))(x), leaf.grad)


@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_compile_without_graph_breaks(coupling):
    torch._dynamo.reset()
    flow = randomise(NICE(6, hidden=11, num_hidden=2, coupling=coupling), 0)
    x = points(5, 6, dtype=torch.float32)
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), flow.log_prob(x))
    back = torch.compile(flow.inverse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(back(x), flow.inverse(x))


def test_compiled_draws_of_changing_size():
    torch._dynamo.reset()
    flow = randomise(NICE(6, num_couplings=1, hidden=3, num_hidden=1, prior="normal"), 0)
    spread = torch.compile(dequantize, fullgraph=True, backend="aot_eager")
    sample = torch.compile(flow.sample, fullgraph=True, backend="aot_eager")
    draw = torch.compile(
        lambda n: Logistic(0.0, 1.0).rsample((n,)), fullgraph=True, backend="aot_eager"
    )
    for n in (3, 7, 12):
        x = torch.arange(2 * n).view(n, 2)
        assert torch.equal((spread(x) * 256).floor().long(), x)
        assert sample(n).shape == (n, 6)
        assert draw(n).shape == (n,)


def test_inputs_are_not_modified():
    flow = small_flow()
    x = points(4, 6)
    before = x.clone()
    flow.log_prob(x)
    flow.inverse(x)
    assert torch.equal(x, before)
    images = torch.arange(6)
    dequantize(images)
    assert torch.equal(images, torch.arange(6))


# --- precision and devices ----------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device_follow_the_input(device, dtype):
    flow = NICE(6, hidden=11, num_hidden=2).to(device, dtype)
    x = points(4, 6, dtype=dtype).to(device)
    z, log_abs_det = flow(x)
    made = flow.sample(3)
    for tensor in (z, log_abs_det, flow.log_prob(x), flow.inverse(z), made):
        assert tensor.dtype == dtype
        assert tensor.device.type == device


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_inputs_are_raised_to_float32(half):
    flow = randomise(NICE(6, hidden=11, num_hidden=2), 0)
    x = points(4, 6, dtype=torch.float32).to(half)
    z, log_abs_det = flow(x)
    assert z.dtype == log_abs_det.dtype == torch.float32
    torch.testing.assert_close(flow.log_prob(x), flow.log_prob(x.float()), rtol=0, atol=0)


@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_half_parameters_cost_precision_of_the_networks_alone(coupling):
    flow = randomise(NICE(6, hidden=11, num_hidden=2, coupling=coupling), 0)
    exact = flow.log_prob(x := points(40, 6, dtype=torch.float32))
    half = copy.deepcopy(flow).bfloat16()
    z, log_abs_det = half(x)
    assert z.dtype == log_abs_det.dtype == half.log_prob(x.bfloat16()).dtype == torch.float32
    assert half.sample(2).dtype == torch.float32
    assert (half.log_prob(x) - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("linear", [nn.Linear, ColumnLinear, OneDNNLinear])
def test_autocast_keeps_the_density_in_float32(device, linear):
    flow = randomise(NICE(32, hidden=40, num_hidden=2, linear=linear), 0, gain=1.0).to(device)
    x = points(64, 32, dtype=torch.float32).to(device)
    exact = flow.log_prob(x)
    with torch.autocast(device, torch.bfloat16):
        z, log_abs_det = flow(x)
        value = flow.log_prob(x)
        back = flow.inverse(z)
        value.mean().backward()
    assert z.dtype == log_abs_det.dtype == value.dtype == back.dtype == torch.float32
    assert (value - exact).abs().max() < 0.01 * exact.abs().max()
    assert not torch.equal(value, exact)
    assert (back - x).abs().max() < 0.05
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in flow.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu():
    flow = randomise(NICE(32, hidden=40, num_hidden=2), 0)
    x = points(16, 32, dtype=torch.float32)
    expected = flow.log_prob(x)
    torch.testing.assert_close(flow.cuda().log_prob(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-3)
    drawn = flow.sample(5, generator=torch.Generator().manual_seed(0))
    assert drawn.device.type == "cuda"


def test_mixed_precisions_are_refused():
    with pytest.raises(TypeError, match=r"x is torch.float64 but the parameters are torch.float32"):
        NICE(4, hidden=3).log_prob(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match="float64"):
        AdditiveCoupling(4, hidden=3)(torch.zeros(2, 4, dtype=torch.float64))
    wide = NICE(4, hidden=3).double()
    assert wide.log_prob(torch.zeros(2, 4)).dtype == torch.float64


# --- the layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("rows", [16, 131, 181])
def test_columns_give_the_numbers_of_rows(rows, dtype, bound):
    torch.manual_seed(rows)
    layer = ColumnLinear(363, 397, dtype=dtype)
    x = torch.randn(rows, 363, dtype=dtype)
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    assert layer(x).is_contiguous()  # gradients are recorded: rows
    with torch.no_grad():
        y = layer(x)
        assert y.T.is_contiguous()
        assert (y - exact).abs().max() < bound
        transposed = x.T.contiguous().T  # what the layer before hands on
        assert (layer(transposed) - exact).abs().max() < bound


def test_columns_follow_autocast():
    layer, x = ColumnLinear(363, 397), torch.randn(9, 363)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("shape", [(363,), (0, 363), (7, 363), (182, 363), (2, 9, 363)])
def test_columns_are_for_small_batches(shape):
    layer = ColumnLinear(363, 397)
    x = torch.randn(shape)
    with torch.no_grad():
        assert layer(x).equal(nn.functional.linear(x, layer.weight, layer.bias))
        layer = ColumnLinear(363, 397, bias=False)
        assert layer(torch.randn(9, 363)).is_contiguous()


class Counted(nn.Module):
    """A parametrisation that counts how often it is asked: spectral_norm learns each time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return 2 * weight


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("rows", [3, 17])
@pytest.mark.parametrize("layer", [ColumnLinear, OneDNNLinear])
def test_layers_and_couplings_compute_a_parametrised_weight_once(layer, rows, gradients):
    counted, linear = Counted(), layer(363, 397)
    nn.utils.parametrize.register_parametrization(linear, "weight", counted)
    coupling = AdditiveCoupling(726, net=nn.Sequential(linear, nn.Tanh(), nn.Linear(397, 363)))
    before = counted.calls
    with torch.set_grad_enabled(gradients):
        coupling(torch.zeros(rows, 726))
    assert counted.calls == before + 1


def test_columns_under_transforms():
    layer, x = ColumnLinear(363, 397), torch.randn(4, 17, 363)
    expected = nn.functional.linear(x, layer.weight, layer.bias).detach()
    direction = torch.ones_like(x[0])
    with torch.no_grad():
        torch.testing.assert_close(vmap(layer)(x), expected, rtol=1e-4, atol=1e-5)
        pushed = torch.func.jvp(layer, (x[0],), (direction,))[1]
    torch.testing.assert_close(pushed, direction @ layer.weight.detach().T, rtol=1e-4, atol=1e-4)


# --- the oneDNN layer ---------------------------------------------------------------------------


def test_onednn_linear_is_a_linear_layer():
    torch.manual_seed(0)
    plain, fast = nn.Linear(37, 23), OneDNNLinear(37, 23)
    fast.load_state_dict(plain.state_dict())
    x = torch.randn(5, 3, 37)
    upstream = torch.randn(5, 3, 23)
    gradients = []
    for layer in (plain, fast):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(upstream)
        gradients.append((y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 4)])
def test_onednn_linear_on_all_shapes(shape):
    layer = OneDNNLinear(4, 3, bias=False)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)


def test_onednn_linear_steps_aside():
    layer = OneDNNLinear(4, 3).double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))
    layer = layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 5))
    frozen = OneDNNLinear(4, 3).requires_grad_(False)
    leaf = torch.randn(2, 4, requires_grad=True)
    frozen(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, frozen.weight.sum(0).expand(2, 4))


def test_onednn_linear_without_onednn():
    layer, x = OneDNNLinear(4, 3), torch.randn(5, 4)
    with torch.backends.mkldnn.flags(enabled=False):
        y = layer(x)
    assert y.grad_fn.name() == nn.functional.linear(x, layer.weight, layer.bias).grad_fn.name()


def gradient_of_a_penalty(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of |d(sum of layer(x)^2)/dx|^2, asked of autograd in the way that skips nodes."""
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
    return list(torch.autograd.grad(slope.square().sum(), [leaf, *layer.parameters()]))


def test_onednn_linear_can_be_differentiated_twice():
    torch.manual_seed(0)
    plain, fast = nn.Linear(4, 3), OneDNNLinear(4, 3)
    fast.load_state_dict(plain.state_dict())
    x = torch.randn(5, 4)
    weight, bias = plain.weight.detach(), plain.bias.detach()
    slope = 2 * (x @ weight.T + bias) @ weight  # d/dx of |W x + b|^2, by hand
    expected = 2 * slope @ weight.T @ weight * 2
    ours = gradient_of_a_penalty(fast, x)
    torch.testing.assert_close(ours[0], expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours, gradient_of_a_penalty(plain, x), rtol=1e-4, atol=1e-4)
    # a gradient that does not depend on x still depends on the weights
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(fast(leaf).sum(), leaf, create_graph=True)
    (of_weight,) = torch.autograd.grad(slope.square().sum(), fast.weight)
    torch.testing.assert_close(of_weight, (2 * 5 * weight.sum(0)).expand(3, 4))


@pytest.mark.parametrize("prior", ["logistic", "normal"])
def test_the_hessian_of_the_density_with_the_onednn_layer(prior):
    flow = randomise(NICE(4, hidden=5, num_hidden=1, prior=prior, linear=OneDNNLinear), 3)
    x = points(4, dtype=torch.float32)
    batch = torch.autograd.functional.hessian(lambda rows: flow.log_prob(rows).sum(), x[None])
    exact = copy.deepcopy(flow).double()
    step, columns = 1e-6, []
    for i in range(4):  # differences of the float64 gradient
        ends = x.double() + step * torch.tensor([[1.0], [-1.0]]) * torch.eye(4)[i]
        ends = ends.requires_grad_()
        (slopes,) = torch.autograd.grad(exact.log_prob(ends).sum(), ends)
        columns.append((slopes[0] - slopes[1]) / (2 * step))
    torch.testing.assert_close(batch[0, :, 0], torch.stack(columns).float(), rtol=1e-3, atol=1e-3)


def test_onednn_linear_under_batched_gradients():
    layer, x = OneDNNLinear(4, 3), torch.randn(5, 4)
    jacobian = torch.autograd.functional.jacobian(layer, x, vectorize=True)
    expected = torch.einsum("nm,oi->nomi", torch.eye(5), layer.weight.detach())
    torch.testing.assert_close(jacobian, expected)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_onednn_linear_in_torch_func_of_its_parameters(name):
    torch.manual_seed(0)
    layer, x = OneDNNLinear(4, 3), torch.randn(5, 4)
    value = getattr(layer, name).detach()
    row, column = torch.eye(3), x if name == "weight" else torch.ones(5, 1)

    def call(parameter: Tensor) -> Tensor:
        return functional_call(layer, {name: parameter}, (x,))

    expected = torch.einsum("oi,nj->noij", row, column).view(5, 3, *value.shape)
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(call)(value), expected)
    ensemble = torch.stack([value, 2 * value, -value])
    outputs = vmap(call)(ensemble)
    torch.testing.assert_close(outputs, torch.stack([call(value) for value in ensemble]))


@pytest.mark.parametrize("linear", [nn.Linear, ColumnLinear, OneDNNLinear])
def test_an_ensemble_of_flows_and_gradients_by_functional_call(linear):
    flows = [randomise(NICE(6, hidden=11, num_hidden=2, linear=linear), seed) for seed in range(3)]
    x = points(5, 6, dtype=torch.float32)
    stacked, _ = stack_module_state(flows)

    def log_prob(parameters: dict[str, Tensor]) -> Tensor:
        z, log_abs_det = functional_call(flows[0], parameters, (x,))
        return flows[0].prior.log_prob(z) + log_abs_det

    together = vmap(log_prob)(stacked)
    torch.testing.assert_close(together, torch.stack([flow.log_prob(x) for flow in flows]))
    slopes = grad(lambda parameters: log_prob(parameters).sum())(dict(flows[0].named_parameters()))
    flows[0].log_prob(x).sum().backward()
    for name, parameter in flows[0].named_parameters():
        torch.testing.assert_close(slopes[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_onednn_linear_in_forward_mode_and_under_the_tracer():
    torch.manual_seed(0)
    layer, x, direction = OneDNNLinear(4, 3), torch.randn(5, 4), torch.randn(5, 4)
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))).tangent
        weight = {"weight": forward_ad.make_dual(layer.weight, layer.weight)}
        of_weight = forward_ad.unpack_dual(functional_call(layer, weight, (x,))).tangent
    torch.testing.assert_close(slope, direction @ layer.weight.T)
    torch.testing.assert_close(of_weight, x @ layer.weight.T)
    traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(direction), layer(direction))


# --- names --------------------------------------------------------------------------------------


def test_state_dict_names():
    flow = NICE(6, num_couplings=2, hidden=5, num_hidden=1)
    assert {name: tuple(value.shape) for name, value in flow.state_dict().items()} == {
        "couplings.0.net.0.weight": (5, 3),
        "couplings.0.net.0.bias": (5,),
        "couplings.0.net.1.weight": (3, 5),
        "couplings.0.net.1.bias": (3,),
        "couplings.1.net.0.weight": (5, 3),
        "couplings.1.net.0.bias": (5,),
        "couplings.1.net.1.weight": (3, 5),
        "couplings.1.net.1.bias": (3,),
        "scaling.log_scale": (6,),
    }


def test_saving_copying_and_pickling():
    flow, x = small_flow(), points(3, 6)
    expected = flow.log_prob(x)
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    other = small_flow(seed=9)
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (other, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(twin.log_prob(x), expected)
    fast = small_flow(seed=9, linear=OneDNNLinear)
    fast.load_state_dict(flow.state_dict())
    assert "prior='logistic'" in repr(flow)


# --- other libraries ----------------------------------------------------------------------------


def copy_layers(source: nn.Module, target: nn.Module) -> None:
    """Copy the linear layers of one network into another of the same shapes."""
    pairs = [[m for m in net.modules() if hasattr(m, "weight")] for net in (source, target)]
    for ours, theirs in zip(*pairs, strict=True):
        theirs.load_state_dict(ours.state_dict())


def unscaled_flow(prior: str = "normal") -> NICE:
    flow = small_flow(7, 6, prior=prior)
    nn.init.zeros_(flow.scaling.log_scale)
    return flow


def test_zuko_with_the_same_weights():
    zuko = pytest.importorskip("zuko")
    flow = unscaled_flow()
    other = zuko.flows.NICE(
        6,
        transforms=4,
        univariate=zuko.transforms.AdditiveTransform,
        shapes=[()],
        hidden_features=(11, 11),
    ).double()
    odd_first = torch.arange(6) % 2 == 0
    for ours, theirs in zip(flow.couplings, other.transform.transforms, strict=True):
        assert torch.equal(theirs.mask, odd_first ^ ours.swap)
        copy_layers(ours.net, theirs.hyper)
    x = points(5, 6)
    torch.testing.assert_close(other().log_prob(x), flow.log_prob(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(other().transform(x), flow(x)[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(other().transform.inv(x), flow.inverse(x), rtol=1e-10, atol=1e-10)


def test_nflows_with_the_same_weights():
    transforms = pytest.importorskip("nflows.transforms")
    flow = unscaled_flow()

    class Net(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, context: None = None) -> Tensor:
            return self.net(x)

    layers = [
        transforms.AdditiveCouplingTransform(
            torch.tensor([0, 1] * 3) if not c.swap else torch.tensor([1, 0] * 3),
            lambda inputs, outputs, c=c: Net(c.net),
        )
        for c in flow.couplings
    ]
    other = transforms.CompositeTransform(layers)
    x = points(5, 6)
    for ours, theirs in zip(flow(x), other(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(other.inverse(x)[0], flow.inverse(x), rtol=1e-10, atol=1e-10)


def test_normflows_affine_coupling_with_the_same_weights():
    flows = pytest.importorskip("normflows").flows
    coupling = randomise(AffineCoupling(6, hidden=7, num_hidden=1).double(), 2)

    class Net(nn.Module):
        """normflows reads shift and log-scale from alternating channels."""

        def forward(self, x: Tensor) -> Tensor:
            raw, shift = coupling.net(x).chunk(2, -1)
            return torch.stack([shift, 2 * torch.tanh(raw / 2)], -1).flatten(1)

    x = points(5, 6)
    theirs, log_det = flows.AffineCoupling(Net())([x[:, 0::2], x[:, 1::2]])
    z, log_abs_det = coupling(x)
    torch.testing.assert_close(theirs[1], z[:, 1::2], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(log_det, log_abs_det, rtol=1e-10, atol=1e-10)


# --- torch.distributions ------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["logistic", "normal"])
@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_transformed_distribution(prior, coupling):
    flow = small_flow(1, prior=prior, coupling=coupling)
    density = TransformedDistribution(flow.prior, [flow.transform.inv])
    x = density.rsample((50,))
    assert x.shape == (50, 6)
    assert x.requires_grad
    torch.testing.assert_close(density.log_prob(x), flow.log_prob(x), rtol=1e-10, atol=1e-10)
    assert density.event_shape == (6,)
    back = TransformedDistribution(density, [flow.transform])
    z = points(4, 6)
    torch.testing.assert_close(back.log_prob(z), flow.prior.log_prob(z), rtol=1e-9, atol=1e-9)


def test_the_transform_is_a_citizen_of_torch_distributions():
    flow = small_flow()
    transform, x = flow.transform, points(2, 5, 6)
    assert isinstance(transform, FlowTransform)
    assert transform.bijective
    assert transform.event_dim == 1
    assert transform.inv.inv is transform
    assert flow.transform == flow.transform
    assert flow.transform != small_flow().transform
    z = transform(x)
    torch.testing.assert_close(z, flow(x)[0])
    torch.testing.assert_close(transform.inv(z), x, rtol=1e-10, atol=1e-10)
    forward, backward = (
        transform.log_abs_det_jacobian(x, z),
        transform.inv.log_abs_det_jacobian(z, x),
    )
    torch.testing.assert_close(forward, flow(x)[1])
    torch.testing.assert_close(backward, -forward)
    assert transform.forward_shape((3, 6)) == transform.inverse_shape((3, 6)) == (3, 6)
    cached = transform.with_cache(1)
    assert cached.inv(y := cached(x)) is x
    assert torch.equal(y, z)
    assert transform.with_cache(0) is transform
    pickle.loads(pickle.dumps(transform))
    unit = ComposeTransform([AffineTransform(0, 2, event_dim=1), transform])
    wide = Independent(Normal(torch.zeros(6).double(), torch.ones(6).double()), 1)
    density = TransformedDistribution(wide, [unit.inv])
    expected = wide.log_prob(flow(2 * x)[0]) + flow(2 * x)[1] + 6 * math.log(2)
    torch.testing.assert_close(density.log_prob(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_the_log_det_of_the_transform_refuses_what_forward_refuses(coupling):
    flow = randomise(NICE(4, hidden=3, num_hidden=1, coupling=coupling), 0)
    log_det, x = flow.transform.log_abs_det_jacobian, points(2, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x must have shape \(..., 4\), got \(2, 5\)"):
        log_det(torch.zeros(2, 5), torch.zeros(2, 5))
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch.int64"):
        log_det(torch.zeros(2, 4).long(), x)
    with pytest.raises(TypeError, match=r"x is torch.float64 but the parameters are torch.float32"):
        log_det(x.double(), x)
    half = x.bfloat16()
    torch.testing.assert_close(log_det(half, half), flow(half)[1], rtol=0, atol=0)


# --- the logistic distribution ------------------------------------------------------------------


def test_logistic_closed_forms():
    loc, scale = torch.tensor([[0.3], [-2.0]]).double(), torch.tensor([0.5, 1.0, 3.0]).double()
    law = Logistic(loc, scale)
    x = points(7, 2, 3)
    u = torch.exp(-(x - loc) / scale)
    torch.testing.assert_close(law.log_prob(x), (u / scale / (1 + u).square()).log())
    torch.testing.assert_close(law.cdf(x), 1 / (1 + u))
    torch.testing.assert_close(law.icdf(law.cdf(x)), x, rtol=1e-9, atol=1e-9)
    assert law.batch_shape == law.mean.shape == law.mode.shape == (2, 3)
    torch.testing.assert_close(law.stddev, (math.pi / math.sqrt(3) * scale).expand(2, 3))
    axis = torch.linspace(-150, 150, 200_001, dtype=torch.float64)
    step, wide = axis[1] - axis[0], Logistic(loc.new_tensor(0.3), loc.new_tensor(3.0))
    density = wide.log_prob(axis).exp()
    assert (density.sum() * step).item() == pytest.approx(1, abs=1e-10)
    entropy = -(density * density.log()).sum() * step
    assert entropy.item() == pytest.approx(wide.entropy().item(), rel=1e-10)
    variance = (density * (axis - 0.3).square()).sum() * step
    assert variance.item() == pytest.approx(wide.variance.item(), rel=1e-10)


def test_logistic_tails():
    law = Logistic(torch.zeros(()), torch.ones(()))
    x = torch.tensor([-1e4, -90.0, 90.0, 1e4], requires_grad=True)
    value = law.log_prob(x)
    torch.testing.assert_close(value, -x.abs(), rtol=1e-6, atol=0)
    value.sum().backward()
    torch.testing.assert_close(x.grad, -x.sign())
    x = torch.tensor([19.0, 21.0, -25.0]).double()
    expected = -x.abs() - 2 * torch.log1p((-x.abs()).exp())
    torch.testing.assert_close(
        Logistic(x.new_zeros(()), x.new_ones(())).log_prob(x), expected, rtol=1e-14, atol=0
    )


def test_logistic_log_prob_is_even_to_the_ends():
    law = Logistic(0.0, 1.0, validate_args=False)
    ends = torch.tensor([math.inf, 3e38, 1e-3, 0.0])
    assert torch.equal(law.log_prob(ends), law.log_prob(-ends))
    assert law.log_prob(-ends)[:2].tolist() == [-math.inf, -ends[1].item()]
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.functional.hessian(law.log_prob, x).item() == -0.5


def test_logistic_samples():
    torch.manual_seed(0)
    law = Logistic(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])).expand((3, 2))
    x = law.rsample((40_000,))
    assert x.shape == (40_000, 3, 2)
    u = law.cdf(x).flatten(1).sort(0).values
    uniform = (torch.arange(40_000) + 0.5) / 40_000
    assert (u - uniform[:, None]).abs().max() < 1.95 / math.sqrt(40_000)  # Kolmogorov, p = 0.001
    scale = torch.tensor(2.0, requires_grad=True)
    Logistic(torch.tensor(0.0), scale).rsample((5,)).sum().backward()
    assert scale.grad is not None


def test_logistic_never_draws_infinity(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.zeros(shape))
    assert Logistic(torch.zeros(3), torch.ones(3)).rsample().isfinite().all()


def test_logistic_refuses_bad_arguments():
    with pytest.raises(ValueError, match="scale"):
        Logistic(torch.zeros(2), torch.tensor([1.0, -1.0]), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        Logistic(0.0, torch.ones(2), validate_args=True).log_prob(torch.tensor([0.0, math.nan]))
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"probabilities, got 1 outside 0 .. 1"):
            Logistic(0.0, 1.0, validate_args=True).icdf(torch.tensor([0.5, bad]))
    assert Logistic(0.0, 1.0).icdf(torch.tensor([0.0, 1.0])).tolist() == [-math.inf, math.inf]
    for validate_args in (False, True):
        with pytest.raises(TypeError, match=r"tensor of probabilities, got float"):
            Logistic(0.0, 1.0, validate_args=validate_args).icdf(0.5)


@pytest.mark.parametrize("scale", [1.5, torch.tensor(1.5), torch.tensor([1.5, 1.5])])
def test_a_logistic_at_integer_locations_keeps_its_scale(scale):
    law = Logistic(torch.tensor([3, -2]), scale)
    assert law.loc.tolist() == [3.0, -2.0]
    assert law.scale.tolist() == [1.5, 1.5]
    assert law.loc.dtype == law.scale.dtype == law.sample().dtype == torch.float32
    counts = Logistic(torch.tensor(3), torch.tensor(2))
    assert counts.sample((2,)).dtype == torch.float32
    assert Logistic(torch.tensor(3), torch.tensor(1.5).double()).scale.dtype == torch.float64


# --- sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["logistic", "normal"])
def test_samples_are_the_inverse_of_scaled_noise(prior):
    flow = small_flow(2, prior=prior)
    x = flow.sample(20_000, temperature=0.6, generator=torch.Generator().manual_seed(1))
    assert x.shape == (20_000, 6)
    assert not x.requires_grad
    z = flow(x)[0]
    deviation = 0.6 * (1 if prior == "normal" else math.pi / math.sqrt(3))
    assert (z.std(0) - deviation).abs().max() < 5 * deviation / math.sqrt(20_000)
    assert z.mean(0).abs().max() < 5 * deviation / math.sqrt(20_000)
    off_diagonal = torch.corrcoef(z.T) - torch.eye(6)
    assert off_diagonal.abs().max() < 5 / math.sqrt(20_000)
    cold = flow.sample(2, temperature=0)
    torch.testing.assert_close(cold, flow.inverse(torch.zeros(2, 6).double()))


@pytest.mark.parametrize("half", [np.float64(0.5), np.float32(0.5), Fraction(1, 2)])
def test_numbers_of_any_kind(half):
    flow = randomise(NICE(6, hidden=5, num_hidden=1), 0)

    def draw(temperature: float) -> Tensor:
        return flow.sample(4, temperature=temperature, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(draw(half), draw(0.5), rtol=0, atol=0)
    torch.manual_seed(0)
    x = points(3, 6, dtype=torch.float32)
    coupling = AffineCoupling(6, hidden=5, num_hidden=1, bound=half)
    torch.manual_seed(0)
    torch.testing.assert_close(coupling(x), AffineCoupling(6, hidden=5, num_hidden=1, bound=0.5)(x))
    bits = bits_per_dim(half, 3)
    assert isinstance(bits, float)
    assert bits == 8 - 0.5 / (3 * math.log(2))


def test_sampling_is_reproducible():
    flow = small_flow()
    first = flow.sample(4, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(8)
    second = flow.sample(4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, second)
    torch.manual_seed(3)
    assert not torch.equal(flow.sample(4), flow.sample(4))


def test_temperature_anneals_the_density_of_an_additive_flow():
    """The Jacobian is constant, so T eps has a density proportional to p(x)^(1/T^2)."""
    flow, temperature = small_flow(prior="normal"), 0.7
    x = points(5, 6)
    z, log_abs_det = flow(x)
    annealed = Normal(torch.zeros_like(z), temperature).log_prob(z).sum(-1) + log_abs_det
    difference = annealed - flow.log_prob(x) / temperature**2
    torch.testing.assert_close(difference, difference[:1].expand(5), rtol=1e-10, atol=1e-10)


# --- initialisation -----------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["logistic", "normal"])
@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_initialize_makes_a_batch_look_like_the_prior(prior, coupling):
    flow = small_flow(6, prior=prior, coupling=coupling)
    x = points(500, 6) * torch.tensor([0.001, 1, 5, 0.1, 2, 1]).double() + torch.arange(6)
    before = flow.log_prob(x).mean()
    flow.initialize(x)
    z, _ = flow(x)
    assert z.mean(0).abs().max() < 1e-10
    torch.testing.assert_close(z.std(0, correction=0), flow.prior.stddev)
    likelihood = flow.log_prob(x).mean()
    assert likelihood > before + 1
    if prior == "normal":  # no scaling is likelier
        (slope,) = torch.autograd.grad(likelihood, flow.scaling.log_scale)
        assert slope.abs().max() < 1e-10
    state = copy.deepcopy(flow.state_dict())
    flow.initialize(x)
    for name, value in flow.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-9)
    assert all(p.requires_grad for p in flow.parameters())


def test_initialize_with_few_couplings():
    x = points(50, 6) + 3
    for count in (1, 2):
        flow = small_flow(num_couplings=count)
        flow.initialize(x)
        mean = flow(x)[0].mean(0).abs()
        assert mean[1::2].max() < 1e-10
        assert (mean[0::2].max() < 1e-10) == (count == 2)


def test_initialize_refuses():
    flow = small_flow()
    with pytest.raises(ValueError, match=r"two points or more, .* got \(1, 6\)"):
        flow.initialize(points(1, 6))
    with pytest.raises(ValueError, match=r"got \(6,\)"):
        flow.initialize(points(6))
    with pytest.raises(ValueError, match="6 coordinates of z are constant: dequantize"):
        flow.initialize(torch.ones(5, 6).double())
    bad = torch.tensor([[0.0, 1.0], [math.nan, 2.0]])
    with pytest.raises(ValueError, match="x must be finite, got 1 NaN"):
        NICE(2, hidden=3, validate_args=False).initialize(bad)
    with pytest.raises(TypeError, match="x must be a floating-point tensor, got list"):
        flow.initialize([[0.0] * 6] * 2)


class OutputFirst(nn.Module):
    """A network whose last layer is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(5, 2), nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


class Doubled(nn.Module):
    def forward(self, bias: Tensor) -> Tensor:
        return 2 * bias


def parametrised_bias() -> nn.Module:
    """A layer whose bias is computed anew whenever it is read, so that writing on it is lost."""
    return torch.nn.utils.parametrize.register_parametrization(nn.Linear(2, 2), "bias", Doubled())


def flow_with_last_net(net: nn.Module) -> NICE:
    flow = small_flow(dim=4)
    flow.couplings[-1] = AdditiveCoupling(4, swap=True, net=net.double())
    return flow


@pytest.mark.parametrize(
    "net",
    [
        nn.Tanh(),
        nn.Linear(2, 2, bias=False),
        nn.Linear(2, 3),
        OutputFirst(),
        nn.BatchNorm2d(4),
        parametrised_bias(),
    ],
)
def test_only_a_last_bias_of_the_right_size_is_shifted(net):
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(TypeError, match=r"must end in a layer with a bias \(2,\)"):
        flow_with_last_net(net).initialize(points(9, 4))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.arange(6.0).expand(5, 6), r"\d coordinates of z are constant"),
        (3e38 * torch.tensor([[1.0], [-1.0]]).expand(2, 6), "6 coordinates of z are beyond"),
    ],
)
def test_a_refused_initialisation_changes_nothing(x, match):
    flow = randomise(NICE(6, hidden=5, num_hidden=1, coupling="affine"), 0)
    state = copy.deepcopy(flow.state_dict())
    with pytest.raises(ValueError, match=match):
        flow.initialize(x)
    assert all(torch.equal(value, state[name]) for name, value in flow.state_dict().items())
    flow = flow_with_last_net(nn.Tanh())
    state = copy.deepcopy(flow.state_dict())
    with pytest.raises(TypeError, match="must end in a layer with a bias"):
        flow.initialize(points(9, 4))
    assert all(torch.equal(value, state[name]) for name, value in flow.state_dict().items())


def test_initialize_with_normalised_weights():
    normed = torch.nn.utils.parametrizations.weight_norm
    flow = NICE(6, hidden=8, num_hidden=1, linear=lambda i, o: normed(nn.Linear(i, o))).double()
    x = points(50, 6) + 3
    flow.initialize(x)
    assert flow(x)[0].mean(0).abs().max() < 1e-10


def test_a_deep_network_starts_lively_and_its_shift_small():
    torch.manual_seed(0)
    net = AdditiveCoupling(100, hidden=300, num_hidden=5).net
    x = torch.randn(400, 50)
    inside = net[:-1](x).relu()
    assert 0.3 < inside.square().mean() / x.square().mean() < 3
    assert 0.03 < net(x).std() < 0.3


# --- pixels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 3, 5, 10, 16, 200, 256, 1000, 65536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extreme", [False, True])
def test_dequantize_never_leaves_the_interval(levels, dtype, extreme, monkeypatch):
    x = torch.arange(levels).repeat(3 if levels > 999 else 40)
    if extreme:
        largest = 1 - torch.finfo(dtype).eps / 2
        monkeypatch.setattr(torch, "rand", lambda s, **k: torch.full(s, largest, dtype=dtype))
    y = dequantize(x, levels, dtype=dtype)
    assert y.dtype == dtype
    assert y.min() >= 0
    assert y.max() < 1
    assert torch.equal((y * levels).floor().long(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [23, 49, 200, 256, 1000, 65536])
def test_dequantize_at_the_lower_end(levels, dtype, monkeypatch):
    """(x + 0) / 49 * 49 can round to a little less than x."""
    x = torch.arange(levels)
    for u in (0.0, 1e-12, 1e-6):
        monkeypatch.setattr(torch, "rand", lambda s, u=u, **k: torch.full(s, u, dtype=dtype))
        y = dequantize(x, levels, dtype=dtype)
        assert torch.equal((y * levels).floor().long(), x)


@pytest.mark.parametrize("levels", [256, 65536])
def test_dequantisation_noise_has_no_heap_at_the_end(levels):
    noise = dequantize(torch.full((40_000,), 3), levels, generator=torch.Generator().manual_seed(0))
    u = noise.double() * levels - 3
    assert u.unique().numel() > 30_000
    uniform = (torch.arange(40_000) + 0.5) / 40_000
    assert (u.sort().values - uniform).abs().max() < 1.95 / math.sqrt(40_000)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dequantize_inside_vmap(randomness):
    x = torch.arange(12).view(3, 4)
    y = vmap(dequantize, randomness=randomness)(x)
    assert torch.equal((y * 256).floor().long(), x)
    rows = y * 256 - x
    assert (rows[0] - rows[1]).abs().max().lt(1e-4) == (randomness == "same")


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]
)
def test_dequantize_takes_every_integer_type(dtype):
    x = torch.tensor([[0, 3], [7, 100]]).to(dtype)
    y = dequantize(x, 101, generator=torch.Generator().manual_seed(0))
    assert torch.equal((y * 101).floor().int(), x.int())
    assert torch.equal(
        dequantize(torch.tensor([True, False]), 2) >= 0.5, torch.tensor([True, False])
    )
    assert dequantize(x[:0]).shape == (0, 2)


def test_dequantisation_noise_is_uniform():
    generator = torch.Generator().manual_seed(0)
    u = dequantize(torch.full((40_000,), 7), 16, generator=generator) * 16 - 7
    uniform = (torch.arange(40_000) + 0.5) / 40_000
    assert (u.sort().values - uniform).abs().max() < 1.95 / math.sqrt(40_000)
    again = dequantize(torch.full((40_000,), 7), 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again * 16 - 7, u)


@pytest.mark.parametrize(
    ("x", "levels", "error", "match"),
    [
        (torch.rand(3), 256, TypeError, r"integer tensor of values 0 .. 255, got torch.float32"),
        (torch.zeros(3, dtype=torch.complex64), 256, TypeError, "complex64"),
        ([1, 2], 256, TypeError, "list"),
        (torch.tensor([0, 256]), 256, ValueError, r"0 .. 255, got values 0 .. 256"),
        (torch.tensor([-1, 4]), 256, ValueError, r"got values -1 .. 4"),
        (torch.tensor([200], dtype=torch.uint8), 16, ValueError, r"0 .. 15, got values 200"),
        (torch.tensor([1]), 1, ValueError, "levels must be from 2"),
        (torch.tensor([1]), 0, ValueError, "levels must be at least 1"),
        (torch.tensor([1]), 2.5, TypeError, "levels must be an integer"),
        (torch.tensor([1]), True, TypeError, "levels must be an integer"),
        (torch.tensor([1]), 2**20, ValueError, "65536"),
    ],
)
def test_dequantize_refuses(x, levels, error, match):
    with pytest.raises(error, match=match):
        dequantize(x, levels)


def test_dequantize_refuses_half():
    with pytest.raises(TypeError, match="float32 or float64"):
        dequantize(torch.tensor([1]), dtype=torch.bfloat16)


def test_bits_per_dim_of_known_models():
    assert bits_per_dim(0.0, 784) == 8
    assert bits_per_dim(0.0, 3, levels=32) == 5
    assert bits_per_dim(1980.50, 784) == pytest.approx(4.3556, abs=1e-4)
    log_prob = torch.tensor([0.0, 784 * math.log(2.0)])
    assert bits_per_dim(log_prob, 784).tolist() == [8.0, 7.0]
    assert bits_per_dim(log_prob.bfloat16(), 784).dtype == torch.float32


def test_bits_per_dim_of_a_perfect_model_is_the_entropy():
    """A density that is constant on each level's interval codes at the entropy of the levels."""
    levels, generator = 5, torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(levels, generator=generator, dtype=torch.float64), 0)
    log_density = (p * levels).log()
    expected = -(p * p.log2()).sum()
    bits = (p * bits_per_dim(log_density, 1, levels)).sum()
    torch.testing.assert_close(bits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_the_dequantised_density_bounds_the_probability(coupling):
    """E_u log p((x + u) / L) - D log L <= log P(x), by quadrature over each cell."""
    flow, levels = smooth(small_flow(4, 2, coupling=coupling)), 4
    nodes = (torch.arange(60, dtype=torch.float64) + 0.5) / 60
    u = torch.cartesian_prod(nodes, nodes)
    cells = torch.cartesian_prod(torch.arange(levels), torch.arange(levels))
    with torch.no_grad():
        log_density = flow.log_prob((cells[:, None] + u) / levels)
    bound = log_density.mean(1) - 2 * math.log(levels)
    exact = log_density.exp().mean(1).log() - 2 * math.log(levels)
    assert (bound <= exact).all()
    assert (bound < exact - 1e-3).any()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: bits_per_dim(torch.tensor([3]), 4), TypeError, "log_prob must be a floating"),
        (lambda: bits_per_dim(torch.tensor([1.0, math.nan]), 4), ValueError, "got 1 NaN"),
        (lambda: bits_per_dim(math.nan, 4), ValueError, "log_prob must be numbers, got 1 NaN"),
        (lambda: bits_per_dim(None, 4), TypeError, "log_prob must be a tensor or a number, got No"),
        (lambda: bits_per_dim([1.0], 4), TypeError, "log_prob must be .* got list"),
        (lambda: bits_per_dim(1.0, 0), ValueError, "dim must be at least 1"),
        (lambda: bits_per_dim(1.0, 4.0), TypeError, "dim must be an integer"),
        (lambda: bits_per_dim(1.0, 4, levels=1), ValueError, "levels"),
        (lambda: NICE(7), ValueError, r"dim must be even, got 7: .*halves"),
        (lambda: NICE(1), ValueError, "even, got 1"),
        (lambda: NICE(0), ValueError, "dim must be at least 1, got 0"),
        (lambda: NICE(4.0), TypeError, "dim must be an integer"),
        (lambda: AdditiveCoupling(5), ValueError, "even, got 5"),
        (lambda: AffineCoupling(5), ValueError, "even, got 5"),
        (lambda: AffineCoupling(4, bound=0.0), ValueError, "bound must be positive"),
        (lambda: AffineCoupling(4, bound=math.nan), ValueError, "bound must be positive"),
        (lambda: AffineCoupling(4, bound=math.inf), ValueError, "positive and finite, got inf"),
        (lambda: AffineCoupling(4, bound="2"), ValueError, "positive and finite, got '2'"),
        (lambda: AdditiveCoupling(4, net=torch.sin), TypeError, "net must be a torch.nn.Module"),
        (lambda: AdditiveCoupling(4, net=nn.Tanh), TypeError, "net must be a torch.nn.Module"),
        (lambda: Scaling(0), ValueError, "dim must be at least 1"),
        (lambda: NICE(4, num_couplings=0), ValueError, "num_couplings must be at least 1"),
        (lambda: NICE(4, hidden=0), ValueError, "hidden must be at least 1"),
        (lambda: NICE(4, num_hidden=0), ValueError, "num_hidden must be at least 1"),
        (lambda: NICE(4, prior="gaussian"), ValueError, "prior must be .*'gaussian'"),
        (lambda: NICE(4, coupling="spline"), ValueError, "coupling must be .*'spline'"),
        (lambda: NICE(4, coupling=["affine"]), ValueError, "coupling must be .*'affine'"),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("method", ["forward", "inverse", "log_prob"])
@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.zeros(3, 5), ValueError, r"must have shape \(..., 4\), got \(3, 5\)"),
        (torch.zeros(3, 2, 2), ValueError, r"got \(3, 2, 2\)"),
        (torch.tensor(1.0), ValueError, r"got \(\)"),
        (torch.zeros(3, 4).int(), TypeError, "floating-point tensor, got torch.int32; integer"),
        (torch.zeros(3, 4).numpy(), TypeError, "ndarray"),
        (torch.tensor([[0.0, 1.0, math.nan, 0.0]]), ValueError, "finite, got 1 NaN"),
        (torch.tensor([[0.0, math.inf, -math.inf, 0.0]]), ValueError, "got 2 NaN or infinite"),
    ],
)
def test_bad_points(method, x, error, match):
    with pytest.raises(error, match=match):
        getattr(NICE(4, hidden=3), method)(x)


@pytest.mark.parametrize("method", ["forward", "inverse"])
@pytest.mark.parametrize("layer", [AdditiveCoupling, AffineCoupling, Scaling])
def test_a_layer_alone_refuses_bad_points(layer, method):
    move = getattr(layer(4), method)
    name = "x" if method == "forward" else "z"
    with pytest.raises(ValueError, match=rf"{name} must have shape \(..., 4\), got \(2, 3\)"):
        move(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=rf"{name} must be finite, got 1 NaN .* of 8"):
        move(torch.tensor([[0.0, math.nan, 0.0, 0.0], [0.0] * 4]))
    with pytest.raises(TypeError, match=rf"{name} must be a floating-point tensor, got torch.int"):
        move(torch.zeros(2, 4).long())


def test_a_point_in_the_plane_is_not_written_on():
    """The halves of a single point in two dimensions are contiguous as they are."""
    x = torch.tensor([[-1.0, -2.0]])
    coupling = AdditiveCoupling(2, hidden=5, num_hidden=1, linear=activated_first)
    coupling(x)
    coupling.inverse(x)
    assert x.tolist() == [[-1.0, -2.0]]


def test_validation_can_be_switched_off_and_does_not_cry_wolf():
    bad = torch.tensor([[0.0, 1.0, math.nan, 0.0]])
    assert NICE(4, hidden=3, validate_args=False).log_prob(bad).isnan().all()
    huge = torch.full((1, 4), 3e38)
    assert NICE(4, hidden=3)(huge)[1].item() == 0


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"n": 0}, ValueError, "n must be at least 1, got 0"),
        ({"n": 2.0}, TypeError, "n must be an integer"),
        ({"n": (2,)}, TypeError, "n must be an integer"),
        ({"n": 2, "temperature": -0.1}, ValueError, "temperature must be .* got -0.1"),
        ({"n": 2, "temperature": math.nan}, ValueError, "temperature"),
        ({"n": 2, "temperature": math.inf}, ValueError, "temperature"),
        ({"n": 2, "temperature": "hot"}, ValueError, "temperature"),
    ],
)
def test_bad_sampling_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        NICE(4, hidden=3).sample(**arguments)


def test_a_network_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"net must map \(2, 3\) to \(2, 3\), got \(2, 5\)"):
        AdditiveCoupling(6, net=nn.Linear(3, 5))(torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"net must map \(2, 3\) to \(2, 3\), got tuple"):
        AdditiveCoupling(6, net=nn.LSTM(3, 3))(torch.zeros(2, 6))


def activated_first(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(inputs, outputs))


class Residual(nn.Sequential):
    """A Sequential whose first layer is linear, and that writes on its input before."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu_())


@pytest.mark.parametrize("layer", [AdditiveCoupling, AffineCoupling])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("way", ["net", "linear", "replaced", "nested", "subclass"])
def test_a_network_that_writes_on_its_input_does_not_move_the_kept_half(layer, swap, way):
    outputs = 3 if layer is AdditiveCoupling else 6
    net = activated_first(3, outputs)
    if way == "net":
        coupling = layer(6, net=net, swap=swap)
    else:
        linear = activated_first if way == "linear" else nn.Linear
        coupling = layer(6, swap=swap, hidden=5, num_hidden=1, linear=linear)
    if way == "replaced":
        coupling.net = net
    if way == "nested":
        coupling.net = nn.Sequential(nn.Sequential(), net)
    if way == "subclass":
        coupling.net = Residual(nn.Linear(3, outputs))
    coupling, x = coupling.double(), points(5, 6)
    z, log_abs_det = coupling(x)
    kept = slice(1 if swap else 0, None, 2)
    assert torch.equal(z[:, kept], x[:, kept])
    torch.testing.assert_close(coupling.inverse(z), x, rtol=1e-12, atol=1e-12)
    if way != "linear":  # there the writing is on what ReLU has kept for its gradient
        torch.testing.assert_close(log_abs_det, slogdet(lambda row: coupling(row)[0], x))
