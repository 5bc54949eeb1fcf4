"""The experiments of chapter ``ode``: gradients against finite differences, cells that remember."""

from __future__ import annotations

import pytest
import torch

from lib.reproduce.ode import adam, euler_loss, gradient_norms, memory_error

POINTS = {0: (100.0, 150.0), 10: (165.0, 283.0), 42: (324.0, 264.0)}
START = (0.11, 0.27, 3e-4, 5e-4, 0.0021, 0.0034)


@pytest.mark.parametrize("index", range(6))
def test_the_essays_gradient(index):
    width = 1e-5 * START[index]
    ends = [[p + sign * width * (i == index) for i, p in enumerate(START)] for sign in (1, -1)]
    up, down = (euler_loss(end, POINTS)[0] for end in ends)
    assert euler_loss(START, POINTS)[1][index] == pytest.approx((up - down) / 2 / width, rel=1e-6)


def test_adam_is_torchs():
    def bowl(p):
        return sum(k * x * x for k, x in enumerate(p, 1)), [2 * k * x for k, x in enumerate(p, 1)]

    ours, losses = adam((0.3, -0.7), bowl, 50, 0.01)
    theirs = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theirs], lr=0.01, eps=1e-7)
    for loss in losses:
        value = theirs[0] ** 2 + 2 * theirs[1] ** 2
        assert loss == pytest.approx(value.item(), rel=1e-12)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert ours == pytest.approx(theirs.tolist(), rel=1e-12)


def test_gradient_norms_of_a_linear_cell():
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    norms = gradient_norms(lambda h, u, W: u + 0.9 * h @ W.mT, turn, 7)
    expected = 0.9 ** torch.arange(8, dtype=torch.float64)
    torch.testing.assert_close(norms, expected)


def test_a_cell_that_keeps_its_state_remembers():
    errors = memory_error(lambda h, u, W: h + u, "number", 5, seeds=2, rounds=150)
    assert len(errors) == 2
    assert max(errors) < 0.05
    forgetful = memory_error(lambda h, u, W: u, "bit", 5, seeds=2, rounds=5)
    assert min(forgetful) > 0.3
