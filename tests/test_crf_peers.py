"""lib.crf beside the libraries people use: same numbers where they are right, right where not."""

from __future__ import annotations

import math

import pytest
import torch

from lib.crf import CRF, LinearChainCRF, allowed_transitions

torchcrf = pytest.importorskip("torchcrf")
torch_struct = pytest.importorskip("torch_struct")


def ragged(seed, batch=6, length=9, tags=5, dtype=torch.float64):
    """Random emissions, legal tags and a mask whose first row is full."""
    generator = torch.Generator().manual_seed(seed)
    emissions = 2 * torch.randn(batch, length, tags, generator=generator, dtype=dtype)
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    labels = torch.randint(tags, (batch, length), generator=generator)
    return emissions, labels, mask


def pair(seed, tags=5, dtype=torch.float64):
    """pytorch-crf and ours with the same parameters, through its checkpoint."""
    torch.manual_seed(seed)
    theirs = torchcrf.CRF(tags, batch_first=True).to(dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours = CRF(tags).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradients_are_pytorch_crf_s(seed, reduction):
    theirs, ours = pair(seed)
    emissions, labels, mask = ragged(seed)
    first, second = (emissions.clone().requires_grad_() for _ in range(2))
    expected = -theirs(first, labels, mask, reduction=reduction)
    value = ours.loss(second, labels, mask, reduction=reduction)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    weight = torch.linspace(0.3, 1.7, value.numel(), dtype=torch.float64).reshape(value.shape)
    (expected * weight).sum().backward()
    (value * weight).sum().backward()
    torch.testing.assert_close(second.grad, first.grad, rtol=1e-8, atol=1e-10)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(
            dict(ours.named_parameters())[name].grad, parameter.grad, rtol=1e-8, atol=1e-10
        )


@pytest.mark.parametrize("seed", range(8))
def test_decoding_is_pytorch_crf_s(seed):
    theirs, ours = pair(seed)
    emissions, _, mask = ragged(seed)
    decoded = ours.decode(emissions, mask)
    assert [row[row >= 0].tolist() for row in decoded] == theirs.decode(emissions, mask)
    assert (decoded[~mask] == -1).all()
    assert decoded.dtype == torch.long


def test_checkpoints_load_into_a_constrained_crf_and_back():
    theirs, _ = pair(0, tags=4)
    constrained = CRF(4, constraints=allowed_transitions("sbme", "BMES"))
    constrained.load_state_dict(theirs.state_dict(), strict=True)
    assert set(constrained.state_dict()) == {"start_transitions", "end_transitions", "transitions"}
    theirs.load_state_dict(constrained.double().state_dict(), strict=True)


@pytest.mark.parametrize("seed", range(3))
def test_structured_quantities_are_torch_struct_s(seed):
    emissions, _, _ = ragged(seed, tags=4)
    transitions = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).double()
    ours = LinearChainCRF(emissions, transitions)
    edges = transitions.T + emissions[:, 1:, :, None].expand(-1, -1, -1, 4)  # [to, from]
    edges = edges.clone()
    edges[:, 0] += emissions[:, 0, None, :]
    theirs = torch_struct.LinearChainCRF(edges, torch.full((6,), 9))
    torch.testing.assert_close(ours.log_partition, theirs.partition)
    torch.testing.assert_close(ours.pair_marginals, theirs.marginals.mT)
    torch.testing.assert_close(ours.entropy(), theirs.entropy)
    best = theirs.argmax
    assert ours.mode[:, 1:].equal(best.sum(3).argmax(2))
    assert ours.mode[:, 0].equal(best[:, 0].sum(1).argmax(1))
    scores, _ = ours.topk(3)
    torch.testing.assert_close(scores.T, theirs.kmax(3))
    shifted = LinearChainCRF(0.5 * emissions, transitions.T)
    other_edges = transitions + 0.5 * emissions[:, 1:, :, None].expand(-1, -1, -1, 4)
    other_edges = other_edges.clone()
    other_edges[:, 0] += 0.5 * emissions[:, 0, None, :]
    other = torch_struct.LinearChainCRF(other_edges, torch.full((6,), 9))
    torch.testing.assert_close(torch.distributions.kl_divergence(ours, shifted), theirs.kl(other))


# What pytorch-crf's users stumble over


def test_an_integer_mask_is_a_mask():
    _, ours = pair(1)
    emissions, labels, mask = ragged(1)
    expected = ours.loss(emissions, labels, mask)
    for dtype in (torch.uint8, torch.long):
        assert ours.loss(emissions, labels, mask.to(dtype)).item() == expected.item()


@pytest.mark.parametrize("padding", [-100, -1, 5, 10**9])
def test_padded_tags_may_hold_anything(padding):
    _, ours = pair(2)
    emissions, labels, mask = ragged(2)
    expected = ours.loss(emissions, labels, mask)
    torch.testing.assert_close(
        ours.loss(emissions, labels.masked_fill(~mask, padding), mask), expected, rtol=0, atol=0
    )


@pytest.mark.parametrize("padding", [math.nan, math.inf, -math.inf, 1e30])
def test_padded_emissions_are_never_read(padding):
    _, ours = pair(3)
    emissions, labels, mask = ragged(3)
    expected = ours.loss(emissions, labels, mask, reduction="none")
    soiled = emissions.masked_fill(~mask[..., None], padding).requires_grad_()
    value = ours.loss(soiled, labels, mask, reduction="none")
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    value.sum().backward()
    assert soiled.grad[~mask].eq(0).all()
    assert soiled.grad.isfinite().all()
    dirty, clean = ours(soiled.detach(), mask), ours(emissions, mask)
    for quantity in ("marginals", "pair_marginals", "mode"):
        torch.testing.assert_close(getattr(dirty, quantity), getattr(clean, quantity))
    torch.testing.assert_close(dirty.entropy(), clean.entropy())
    torch.testing.assert_close(dirty.topk(4), clean.topk(4))


@pytest.mark.parametrize(
    "rows",
    [[[0, 1, 1]], [[1, 0, 1]], [[0, 0, 0]], [[1, 1, 1], [0, 1, 1]]],
    ids=["left padding", "a hole", "empty", "one bad row"],
)
def test_masks_that_are_no_right_padding_are_refused(rows):
    mask = torch.tensor(rows, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask"):
        LinearChainCRF(torch.zeros(*mask.shape, 2), torch.zeros(2, 2), mask=mask)


def test_a_padded_batch_is_the_sequences_one_by_one():
    _, ours = pair(4)
    emissions, labels, mask = ragged(4)
    together = ours(emissions, mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = ours(emissions[row : row + 1, :length])
        torch.testing.assert_close(together.log_partition[row], alone.log_partition[0])
        torch.testing.assert_close(together.marginals[row, :length], alone.marginals[0])
        torch.testing.assert_close(together.entropy()[row], alone.entropy()[0])
        assert together.mode[row, :length].equal(alone.mode[0])
        torch.testing.assert_close(
            together.log_prob(labels)[row], alone.log_prob(labels[row : row + 1, :length])[0]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_out_as_float32(dtype):
    _, ours = pair(5, dtype=torch.float32)
    emissions, labels, mask = ragged(5, dtype=torch.float32)
    rounded = emissions.to(dtype)
    expected = ours.loss(rounded.float(), labels, mask)
    value = ours.loss(rounded, labels, mask)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ours.loss(rounded, labels, mask), expected)


# Lengths and scores beyond what float32 in log space can do


def log_space(emissions, transitions, mask=None):
    """log Z and its gradients by the plain recursion in float64."""
    h = emissions.double().clone().requires_grad_()
    a = transitions.double().clone().requires_grad_()
    alpha = h[:, 0]
    for t in range(1, h.shape[1]):
        alpha = torch.logsumexp(alpha[:, :, None] + a, 1) + h[:, t]
    log_z = torch.logsumexp(alpha, 1)
    gradients = torch.autograd.grad(log_z.sum(), (h, a), materialize_grads=True)
    return log_z.detach(), *gradients


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_two_thousand_steps_in_float32(scale):
    generator = torch.Generator().manual_seed(7)
    emissions = scale * torch.randn(3, 2000, 7, generator=generator)
    transitions = torch.randn(7, 7, generator=generator)
    log_z, node, pairs = log_space(emissions, transitions)
    free, table = emissions.clone().requires_grad_(), transitions.clone().requires_grad_()
    ours = LinearChainCRF(free, table)
    ours.log_partition.sum().backward()
    torch.testing.assert_close(ours.log_partition.double(), log_z, rtol=1e-6, atol=0)
    assert (ours.marginals.double() - node).abs().max() < 1e-5
    assert (free.grad.double() - node).abs().max() < 1e-6
    assert ((table.grad.double() - pairs).abs() / pairs.abs().clamp(min=1)).max() < 1e-6


@pytest.mark.parametrize("gap", [90.0, 800.0, 1e4])
def test_gaps_between_emissions(gap):
    generator = torch.Generator().manual_seed(8)
    emissions = torch.randn(4, 12, 3, generator=generator)
    emissions += gap * torch.randint(-1, 2, emissions.shape, generator=generator)
    transitions = torch.randn(3, 3, generator=generator)
    log_z, node, _ = log_space(emissions, transitions)
    ours = LinearChainCRF(emissions, transitions)
    torch.testing.assert_close(ours.log_partition.double(), log_z, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(ours.marginals.double(), node, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gap", [1.0, 15.0, 30.0, 60.0, 90.0, 120.0])
def test_log_partition_with_and_without_gradient_at_every_length(gap):
    """Rescaling must be counted however its steps fall on the end of a sequence."""
    for length in range(1, 25):
        generator = torch.Generator().manual_seed(length)
        emissions = torch.randn(4, length, 3, generator=generator, dtype=torch.float64)
        emissions += gap * torch.randint(-1, 2, emissions.shape, generator=generator)
        transitions = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        log_z, _, _ = log_space(emissions, transitions)
        for needs_grad in (False, True):
            ours = LinearChainCRF(emissions.requires_grad_(needs_grad), transitions)
            torch.testing.assert_close(ours.log_partition, log_z, rtol=1e-12, atol=1e-10)


def test_groups_of_tags_that_do_not_communicate():
    """One group leads until the last step, where the other overtakes it by far."""
    emissions = torch.zeros(1, 40, 4)
    emissions[:, :-1, :2], emissions[:, -1, 2:] = 30.0, 2000.0
    transitions = torch.full((4, 4), -math.inf)
    transitions[:2, :2] = transitions[2:, 2:] = 0.0
    ours = LinearChainCRF(emissions, transitions)
    behind = 2000 + 40 * math.log(2)
    ahead = 39 * 30 + 40 * math.log(2)
    assert ours.log_partition.item() == pytest.approx(max(behind, ahead), rel=1e-6)
    torch.testing.assert_close(ours.marginals[0, :, 2], torch.full((40,), 0.5))
    assert ours.mode[0].ge(2).all()


def test_forbidden_moves_cost_all_probability_and_leave_gradients_whole():
    allowed = allowed_transitions("sbme", "BMES")
    crf = CRF(4, constraints=allowed)
    emissions, _, mask = ragged(9, tags=4, dtype=torch.float32)
    emissions.requires_grad_()
    law = crf(emissions, mask)
    pairs = law.pair_marginals
    assert pairs[..., ~allowed.transitions].eq(0).all()
    assert law.marginals[:, 0][:, ~allowed.start].eq(0).all()
    (law.log_partition.sum() + law.entropy().sum()).backward()
    assert emissions.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in crf.parameters())
    assert crf.transitions.grad[~allowed.transitions].eq(0).all()


def test_a_forbidden_gold_path_is_an_error_or_minus_infinity():
    crf = CRF(4, constraints=allowed_transitions("sbme", "BMES"))
    emissions, bad = torch.zeros(1, 3, 4), torch.tensor([[0, 2, 3]])  # s m e
    with pytest.raises(ValueError, match="forbidden"):
        crf.loss(emissions, bad)
    law = crf(emissions)
    unchecked = LinearChainCRF(emissions, law.transitions, law.start, law.end, validate_args=False)
    assert unchecked.log_prob(bad).item() == -math.inf


def test_more_paths_than_there_are():
    crf = CRF(4, constraints=allowed_transitions("sbme", "BMES")).double()
    emissions, _, _ = ragged(10, batch=2, length=3, tags=4)
    scores, tags = crf(emissions).topk(7)
    assert scores.isfinite().sum(1).tolist() == [4, 4]  # 2^(3-1) legal sequences
    assert (tags[scores.isinf()] == -1).all()
    total = scores.logsumexp(1)
    torch.testing.assert_close(total, crf(emissions).log_partition)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 3), (3, 3)], r"emissions must have shape \(B, T, C\).*got \(2, 3\)"),
        ([(2, 0, 3), (3, 3)], r"emissions .* got \(2, 0, 3\)"),
        ([(2, 4, 3), (3, 2)], r"transitions must have shape \(3, 3\).*\(3, 2\)"),
        ([(2, 4, 3), (3, 3), (2,)], r"start must have shape \(3,\)"),
        ([(2, 4, 3), (3, 3), (3,), (3, 1)], r"end must have shape \(3,\).*\(3, 1\)"),
    ],
)
def test_wrong_shapes_are_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        LinearChainCRF(*map(torch.zeros, shapes))


def test_a_mask_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 4\), got \(2, 3\)"):
        LinearChainCRF(torch.zeros(2, 4, 3), torch.zeros(3, 3), mask=torch.ones(2, 3).bool())


def test_tags_out_of_range_are_named():
    crf = CRF(3)
    for tags, seen in ((torch.tensor([[0, 3]]), "3"), (torch.tensor([[0, -1]]), "-1")):
        with pytest.raises(ValueError, match=f"tags.*{seen}"):
            crf.loss(torch.zeros(1, 2, 3), tags)
    with pytest.raises(ValueError, match="tags must have shape"):
        crf.loss(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long))
