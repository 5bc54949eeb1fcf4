"""What all stems share at their door."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib._common import bool_mask, check_positive, is_transformed
from lib.margin import MarginHead
from lib.nce import info_nce_loss
from lib.nice import NICE


def test_a_count_may_come_from_numpy():
    check_positive(np.prod((2, 3)), "dim")
    x = torch.rand(5, 6)
    flow = NICE(np.prod((2, 3)), hidden=np.int32(4), num_hidden=1)
    assert flow.log_prob(x).shape == (5,)


@pytest.mark.parametrize("value", [True, np.True_, 2.0, np.float64(2), "2", None])
def test_a_count_is_an_integer(value):
    with pytest.raises(TypeError, match="dim must be an integer"):
        check_positive(value, "dim")


@pytest.mark.parametrize("value", [0, np.int64(-3)])
def test_a_count_is_at_least_one(value):
    with pytest.raises(ValueError, match="dim must be at least 1, got"):
        check_positive(value, "dim")


def test_a_mask_is_a_tensor():
    with pytest.raises(
        TypeError, match=r"mask must be a tensor of shape \(2,\), got \[True, False"
    ):
        bool_mask([True, False], (2,))  # type: ignore[arg-type]


def test_a_flow_can_be_planned_on_the_meta_device():
    x = torch.rand(5, 6, device="meta")
    assert NICE(6, hidden=4, num_hidden=1).to("meta").log_prob(x).shape == (5,)


def test_losses_can_be_planned_on_the_meta_device():
    with torch.device("meta"):
        x, head = torch.rand(5, 6), MarginHead(6, 4)
        target = torch.zeros(5, dtype=torch.long)
        assert head.loss(x, target).is_meta
        assert info_nce_loss(x, x).is_meta


def test_transforms_are_noticed():
    seen = []

    def look(x):
        seen.append(is_transformed())
        return x.sum()

    x = torch.ones(2, 3)
    look(x)
    torch.func.vmap(look)(x)
    torch.func.grad(look)(x)
    with torch.autograd.forward_ad.dual_level():
        look(x)
    torch.compile(look, backend="eager")(x)
    look(x)
    assert seen == [False, True, True, True, True, False]
