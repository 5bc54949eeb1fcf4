from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lib._common import at_least_float32, bool_mask, check_positive, no_autocast, reduce_loss
from lib.training import batches, choose_device, fit, mean_std, progress, seed_everything


def test_every_example_comes_once_an_epoch_and_rows_stay_aligned():
    x = torch.arange(23)
    parts = list(batches(x, -x, batch_size=5, generator=torch.Generator().manual_seed(1)))
    assert [len(a) for a, _ in parts] == [5, 5, 5, 5, 3]
    assert torch.cat([a for a, _ in parts]).sort().values.equal(x)
    assert all(a.equal(-b) for a, b in parts)
    assert not torch.cat([a for a, _ in parts]).equal(x)


def test_shuffling_follows_its_generator():
    def order(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.cat(
            [a for (a,) in batches(torch.arange(50), batch_size=7, generator=generator)]
        )

    assert order(3).equal(order(3))
    assert not order(3).equal(order(4))


def test_misaligned_tensors_are_refused():
    with pytest.raises(ValueError, match=r"same first dimension, got \[3, 4\]"):
        list(batches(torch.zeros(3), torch.zeros(4), batch_size=2))


def test_fit_reaches_least_squares_and_reports_the_mean_per_example():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.1
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def loss(a, b):
        return (a @ weight - b).square().mean()

    seen = []
    history = fit(
        loss,
        torch.optim.Adam([weight], lr=0.1),
        [x, y],
        epochs=300,
        batch_size=37,
        generator=generator,
        after_epoch=seen.append,
    )
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    assert torch.allclose(weight, best, atol=1e-3)
    assert history[0] == pytest.approx(y.square().mean().item(), rel=1e-12)
    assert seen == list(range(300))


def test_mean_per_epoch_weighs_a_short_last_batch_by_its_size():
    weight = torch.zeros(1, requires_grad=True)
    x = torch.tensor([1.0, 2.0, 6.0])
    history = fit(
        lambda a: a.mean() + 0 * weight.sum(),
        torch.optim.SGD([weight], lr=0.0),
        [x],
        epochs=1,
        batch_size=2,
    )
    assert history == pytest.approx([3.0])


def test_a_step_with_a_loss_that_is_not_finite_is_not_taken():
    weight, factors = torch.ones(1, requires_grad=True), iter([0.25, math.inf])
    with pytest.raises(FloatingPointError, match="loss is inf at epoch 0, step 1"):
        fit(
            lambda a: next(factors) * weight.sum(),
            torch.optim.SGD([weight], lr=1.0),
            [torch.ones(2)],
            epochs=1,
            batch_size=1,
        )
    assert weight.item() == 0.75


def test_fit_stops_where_the_loss_is_not_finite():
    weight = torch.ones(1, requires_grad=True)
    with pytest.raises(FloatingPointError, match="loss is nan at epoch 0, step 0"):
        fit(
            lambda a: (a * weight).sum() * math.nan,
            torch.optim.SGD([weight], lr=1.0),
            [torch.ones(4)],
            epochs=1,
            batch_size=2,
        )


SGD = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be an integer, got 1.5"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": -2}, ValueError, "batch_size must be at least 1, got -2"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an integer, got 2.0"),
        ({"data": []}, ValueError, r"same first dimension, got \[\]"),
        ({"data": [torch.ones(0, 3)]}, ValueError, "at least one example, got none"),
        ({"loss": lambda a: a}, ValueError, r"loss must return a scalar, got shape \(2,\)"),
    ],
)
def test_fit_names_what_it_cannot_do(change, error, message):
    options = {"loss": torch.Tensor.mean, "data": [torch.ones(4)], "epochs": 1, "batch_size": 2}
    with pytest.raises(error, match=message):
        fit(optimizer=SGD, **options | change)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_not_all_can_take_changes_none(seed):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"seed must lie in \[0, 2\*\*32\), got {seed}"):
        seed_everything(seed)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeding_reaches_all_three_generators():
    import random

    draws = []
    for _ in range(2):
        seed_everything(11)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
    assert draws[0] == draws[1]


def test_mean_std_needs_two_numbers():
    values = [0.3, -1.2, 4.0, 0.9]
    assert mean_std(values) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    for wrong in ([1.0], [[1.0, 2.0], [3.0, 4.0]]):
        with pytest.raises(ValueError, match="at least two numbers, got shape"):
            mean_std(wrong)


def test_progress_yields_what_it_was_given(capsys):
    assert list(progress(range(4), "counting")) == [0, 1, 2, 3]
    assert capsys.readouterr().out == ""


def test_device_is_usable():
    assert torch.ones(2, device=choose_device()).sum().item() == 2


def test_doors():
    assert at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert at_least_float32(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(
        TypeError, match=r"emissions must be a floating-point tensor, got torch.int64"
    ):
        at_least_float32(torch.ones(1, dtype=torch.long), "emissions")
    assert bool_mask(torch.tensor([[1, 0]]), (1, 2)).tolist() == [[True, False]]
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 1\), got \(1, 2\)"):
        bool_mask(torch.tensor([[1, 0]]), (2, 1))
    with pytest.raises(TypeError, match=r"got torch\.float32"):
        bool_mask(torch.ones(1, 2), (1, 2))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        check_positive(0, "k")
    with pytest.raises(TypeError, match="k must be an integer, got True"):
        check_positive(True, "k")
    with pytest.raises(ValueError, match="got 'average'"):
        reduce_loss(torch.ones(2), "average")
    values = torch.tensor([1.0, 5.0])
    assert [reduce_loss(values, r).tolist() for r in ("mean", "sum", "none")] == [
        3.0,
        6.0,
        [1.0, 5.0],
    ]


def test_no_autocast_keeps_products_in_float32():
    a = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with no_autocast(a):
            assert (a @ a).dtype == torch.float32
