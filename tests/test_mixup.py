"""lib.mixup against loops over examples, SciPy's Beta law, quadrature and worker processes."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, Dataset

from lib.mixup import MixupCollate, cutmix, mixup, sample_pairing

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PAIRINGS = ["random", "halves"]


def generator(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def examples(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(1000 + seed), dtype=torch.float64).to(dtype)


def classes(n: int, num_classes: int, seed: int = 0) -> Tensor:
    return torch.randint(num_classes, (n,), generator=generator(2000 + seed))


def shares(n: int, *, seed: int = 0, **options) -> Tensor:
    """What of each example i (row) is made of each example j (column): mixup of the identity."""
    eye = torch.eye(n, dtype=torch.float64)
    made, labels = mixup(eye, eye, generator=generator(seed), **options)
    assert torch.equal(made, labels)
    return made


def read(made: Tensor) -> tuple[Tensor, Tensor]:
    """lambda and the partner of each example, from a matrix of shares without fixed points."""
    weight = made.diagonal()
    partner = (made - weight.diag()).argmax(1)
    return weight, partner


# --- who is mixed with whom, and in which proportion ---------------------------------------------


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_row_is_two_examples_in_proportions_that_sum_to_one(n, pairing, per_sample, seed):
    made = shares(n, pairing=pairing, per_sample=per_sample, seed=seed, alpha=0.7)
    assert (made >= 0).all()
    torch.testing.assert_close(made.sum(1), torch.ones(n, dtype=torch.float64))
    assert ((made > 0).sum(1) <= 2).all()


@pytest.mark.parametrize("seed", range(20))
def test_random_partners_are_a_permutation_and_share_one_lambda(seed):
    n = 7
    made = shares(n, seed=seed)
    others = made - made.diagonal().diag()
    fixed = torch.isclose(made.diagonal(), torch.ones(n, dtype=torch.float64))
    moved = ~fixed
    torch.testing.assert_close(made.sum(0), torch.ones(n, dtype=torch.float64))
    assert made.diagonal()[moved].unique().numel() <= 1
    assert ((others > 0).sum(0) == moved).all()
    assert ((others > 0).sum(1) == moved).all()


def test_random_pairing_is_uniform_over_permutations():
    source, eye = generator(3), torch.eye(3)
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(3000):
        others = mixup(eye, eye, alpha=30.0, generator=source)[0]
        others = torch.where(others.diagonal()[:, None] < 1, others * (1 - eye), others)
        partner = tuple(others.argmax(1).tolist())
        seen[partner] = seen.get(partner, 0) + 1
    assert set(seen) == set(itertools.permutations(range(3)))
    # chi square with 5 degrees of freedom: 20.5 is the 0.1% point
    assert sum((count - 500) ** 2 / 500 for count in seen.values()) < 20.5


@pytest.mark.parametrize("n", [2, 3, 8, 11])
def test_halves_pair_i_with_i_plus_half_the_batch(n):
    weight, partner = read(shares(n, pairing="halves", per_sample=True))
    assert partner.tolist() == [(i + n // 2) % n for i in range(n)]
    assert weight.unique().numel() == n


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_a_batch_of_one_stays_what_it_is(pairing):
    x, y = examples(1, 4), torch.tensor([2])
    mixed, soft = mixup(x, y, num_classes=5, pairing=pairing)
    torch.testing.assert_close(mixed, x)
    torch.testing.assert_close(soft, one_hot(y, 5).double())
    torch.testing.assert_close(sample_pairing(x, y, pairing=pairing)[0], x)
    inside = x.clone()
    mixup(inside, y, num_classes=5, pairing=pairing, out=inside)
    torch.testing.assert_close(inside, x)


def test_a_shuffled_batch_makes_halves_as_random_as_a_permutation():
    """Every ordered pair of different examples is equally likely, as among moved points."""
    n, source = 5, generator(4)
    counts = {pairing: torch.zeros(n, n) for pairing in PAIRINGS}
    for _ in range(2000):
        order = torch.randperm(n, generator=source)
        for pairing in PAIRINGS:
            eye = torch.eye(n)[order]
            made, _ = mixup(eye, eye, pairing=pairing, generator=source)
            shown = torch.empty_like(made)
            shown[order] = made
            counts[pairing] += (shown > 0).float().fill_diagonal_(0)
    for pairing, times in counts.items():
        expected = 2000 / (n - 1) if pairing == "halves" else 2000 / n
        away = times[~torch.eye(n, dtype=torch.bool)]
        assert (away - expected).abs().max() < 5 * expected**0.5, pairing


# --- the law of lambda ---------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.02, 0.2, 1.0, 1.7, 30.0, 1e4, 1e9])
def test_lambda_follows_the_beta_law(alpha):
    stats = pytest.importorskip("scipy.stats")
    n, law = 2000, stats.beta(alpha, alpha)
    x = torch.tensor([1.0, 0.0]).double().repeat_interleave(n)[:, None]
    made, _ = mixup(x, x, alpha=alpha, pairing="halves", per_sample=True, generator=generator(5))
    weight = made[:n, 0]
    low = weight[weight < 0.5]  # above, the law lives closer to 1 than floats can say
    assert stats.kstest(low.numpy(), lambda t: 2 * law.cdf(t)).pvalue > 1e-3
    assert stats.binomtest(len(low), n).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_one_lambda_a_batch_follows_the_same_law(alpha):
    stats = pytest.importorskip("scipy.stats")
    x, source = torch.tensor([[0.0], [1.0]]).double(), generator(6)
    draws = [
        mixup(x, x, alpha=alpha, pairing="halves", generator=source)[0][1].item()
        for _ in range(1500)
    ]
    assert stats.kstest(draws, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [1e-320, 1e-300, 1e-9, 1e9, 1e300])
def test_extreme_alpha_gives_zero_one_or_a_half_and_never_nan(alpha):
    x = torch.arange(2.0).repeat_interleave(500)[:, None]
    made, _ = mixup(x, x, alpha=alpha, pairing="halves", per_sample=True, generator=generator(7))
    assert made.isfinite().all()
    expected = ((made == 0) | (made == 1)) if alpha < 1 else (made - 0.5).abs() < 1e-3
    assert expected.all()
    if alpha < 1:
        assert 400 < made.sum() < 600


def test_alpha_zero_leaves_everything_as_it_is():
    x, y = examples(6, 3), classes(6, 4)
    for pairing, per_sample in itertools.product(PAIRINGS, [False, True]):
        options = {"alpha": 0, "num_classes": 4, "pairing": pairing, "per_sample": per_sample}
        mixed, soft = mixup(x, y, **options)
        assert torch.equal(mixed, x)
        assert torch.equal(soft, one_hot(y, 4).double())
    images = examples(6, 2, 5, 5)
    assert torch.equal(cutmix(images, y, alpha=0, num_classes=4)[0], images)


# --- the mixture itself, against a loop ----------------------------------------------------------


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("shape", [(), (3,), (2, 4, 5)])
def test_mixed_x_is_the_shares_times_x(n, pairing, per_sample, shape):
    options = {"pairing": pairing, "per_sample": per_sample, "alpha": 0.6}
    made = shares(n, seed=11, **options)
    x = examples(n, *shape)
    mixed, _ = mixup(x, x, generator=generator(11), **options)
    expected = torch.stack([sum(made[i, j] * x[j] for j in range(n)) for i in range(n)])
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_labels_are_mixed_with_the_lambda_and_the_partner_of_x(n, pairing, per_sample):
    options = {"pairing": pairing, "per_sample": per_sample, "alpha": 0.6}
    made = shares(n, seed=12, **options)
    y, x = classes(n, 4), examples(n, 3)
    targets = {
        "classes": (y, one_hot(y, 4).double()),
        "classes in int32": (y.int(), one_hot(y, 4).double()),
        "classes in uint16": (y.to(torch.uint16), one_hot(y, 4).double()),
        "soft": (examples(n, 4).softmax(1), examples(n, 4).softmax(1)),
        "multi-hot": ((examples(n, 4) > 0).long(), (examples(n, 4) > 0).double()),
        "multi-hot bool": (examples(n, 4) > 0, (examples(n, 4) > 0).double()),
        "regression": (examples(n), examples(n)),
        "fields": (examples(n, 2, 3), examples(n, 2, 3)),
    }
    for name, (target, dense) in targets.items():
        number = 4 if name.startswith("classes") else None
        _, mixed = mixup(x, target, num_classes=number, generator=generator(12), **options)
        expected = torch.tensordot(made, dense, 1)
        torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_soft_labels_in_cross_entropy_are_the_two_losses_in_proportion(pairing):
    n, c = 9, 5
    x, y, logits = examples(n, 3), classes(n, c), examples(n, c, seed=1)
    weight, partner = read(shares(n, pairing=pairing, seed=13))
    _, soft = mixup(x, y, num_classes=c, pairing=pairing, generator=generator(13))
    ours = cross_entropy(logits, soft, reduction="none")
    both = [cross_entropy(logits, target, reduction="none") for target in (y, y[partner])]
    torch.testing.assert_close(ours, weight * both[0] + (1 - weight) * both[1])


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("n", [1, 4, 7])
def test_sample_pairing_is_the_average_with_the_own_label(n, pairing):
    x, y = examples(n, 2, 3), classes(n, 4)
    mixed, labels = sample_pairing(x, y, pairing=pairing, generator=generator(14))
    assert labels is y
    eye = torch.eye(n, dtype=torch.float64)
    made, _ = sample_pairing(eye, y, pairing=pairing, generator=generator(14))
    assert set(made.unique().tolist()) <= {0.0, 0.5, 1.0}
    torch.testing.assert_close(mixed, torch.tensordot(made, x, 1), rtol=1e-13, atol=1e-13)
    if pairing == "halves" and n > 1:
        expected = (x + x.roll(-(n // 2), 0)) / 2
        torch.testing.assert_close(mixed, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixup_is_keeping_the_label_with_another_beta(alpha):
    """Mean over both roles of a pair, against quadrature with Beta(alpha + 1, alpha)."""
    special = pytest.importorskip("scipy.special")
    points, weights = special.roots_jacobi(60, alpha - 1, alpha)  # (1 - t)^(a-1) (1 + t)^a
    keep = torch.tensor((points + 1) / 2)
    weights = torch.tensor(weights / weights.sum())
    x, logit = torch.tensor([-0.4, 1.3]).double(), lambda x: torch.sin(2 * x) + x * x
    y = torch.tensor([0.0, 1.0]).double()

    def loss(at: Tensor, label: Tensor) -> Tensor:
        z = logit(at)
        return torch.nn.functional.softplus(z) - label * z

    kept = sum(
        (weights * loss(keep * x[i] + (1 - keep) * x[1 - i], y[i])).sum() / 2 for i in range(2)
    )
    n = 200_000
    batch, label = x.repeat_interleave(n), y.repeat_interleave(n)
    mixed, soft = mixup(
        batch, label, alpha=alpha, pairing="halves", per_sample=True, generator=generator(15)
    )
    values = loss(mixed, soft)
    error = values.std() / (2 * n) ** 0.5
    assert error < 2e-3
    assert abs(values.mean() - kept) < 4 * error


# --- dtype, layout, memory, gradients, devices ---------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("n", [5, 6])
def test_dtype_and_device_follow_x(device, dtype, pairing, per_sample, in_place, n):
    options = {"pairing": pairing, "per_sample": per_sample, "num_classes": 3}
    x, y = examples(n, 3, 4), classes(n, 3)
    expected, soft = mixup(x, y, generator=generator(20), **options)
    given = x.to(device, dtype)
    before = given.clone()
    mixed, labels = mixup(
        given,
        y.to(device),
        generator=generator(20),
        out=given if in_place else None,
        **options,
    )
    assert mixed.dtype == dtype
    assert mixed.device.type == labels.device.type == device
    assert (mixed is given) == in_place
    assert in_place or torch.equal(given, before)
    assert labels.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 6 * torch.finfo(dtype).eps
    torch.testing.assert_close(mixed.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(labels.cpu().double(), soft, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_a_generator_lives_on_its_own_device(device):
    x, y = examples(6, 3).float(), classes(6, 3)
    same = []
    for place in ("cpu", device):
        options = {"num_classes": 3, "alpha": 0.4, "per_sample": True}
        ours = [
            mixup(x.to(place), y.to(place), generator=generator(21, device), **options)
            for _ in range(2)
        ]
        assert torch.equal(ours[0][0], ours[1][0])
        same.append(ours[0][0].cpu())
    torch.testing.assert_close(*same)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("function", [mixup, sample_pairing, cutmix])
def test_global_state_is_untouched_by_a_generator(function, pairing):
    np = pytest.importorskip("numpy")
    x, y = examples(4, 3, 6, 6), examples(4, 2)
    before, others = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = function(x, y, pairing=pairing, generator=generator(22))[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == others).all()
    assert torch.equal(function(x, y, pairing=pairing, generator=generator(22))[0], first)
    if function is not sample_pairing or pairing == "random":
        assert not torch.equal(function(x, y, pairing=pairing, generator=generator(23))[0], first)


@pytest.mark.parametrize("function", [mixup, sample_pairing, cutmix])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_inputs_are_not_modified(function, pairing):
    x, y, soft = examples(5, 2, 6, 6), classes(5, 3), examples(5, 3).softmax(1)
    kept = copy.deepcopy((x, y, soft))
    options = {} if function is sample_pairing else {"num_classes": 3}
    function(x, y, pairing=pairing, **options)
    function(x, soft, pairing=pairing, **options)
    assert all(torch.equal(a, b) for a, b in zip((x, y, soft), kept, strict=True))


LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other example": lambda x: x.repeat_interleave(2, 0)[::2],
    "a slice": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("n", [5, 6])
def test_layout_of_memory_does_not_matter(layout, pairing, n):
    x = examples(n, 3, 4, 5)
    twin = LAYOUTS[layout](x)
    assert torch.equal(twin, x)
    expected, _ = mixup(x, x, pairing=pairing, per_sample=True, generator=generator(24))
    for out in (None, twin, torch.empty_like(twin), torch.empty(n, 3, 4, 5).double()):
        given = twin.clone() if out is None else twin
        mixed, labels = mixup(
            given, x, pairing=pairing, per_sample=True, out=out, generator=generator(24)
        )
        torch.testing.assert_close(mixed, expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(labels, expected, rtol=1e-13, atol=1e-13)
        twin = LAYOUTS[layout](x)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_channels_last_stays_channels_last(pairing):
    x = examples(4, 3, 5, 6).contiguous(memory_format=torch.channels_last)
    for mixed, _ in (
        mixup(x, x, pairing=pairing),
        sample_pairing(x, x, pairing=pairing),
        cutmix(x, x, pairing=pairing),
    ):
        assert mixed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_an_expanded_batch_can_be_mixed_but_not_in_place(pairing):
    x = examples(1, 4).expand(6, 4)
    torch.testing.assert_close(mixup(x, x, pairing=pairing)[0], x.contiguous())
    with pytest.raises(RuntimeError, match="single memory location"):
        mixup(x, x, pairing=pairing, out=x)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_out_may_overlap_x(pairing):
    n = 6
    square = examples(n, 4, 4)
    expected, _ = mixup(square, square, pairing=pairing, generator=generator(25))
    turned = square.transpose(1, 2)
    given = square.clone()
    result, _ = mixup(
        given, square, pairing=pairing, out=given.transpose(1, 2), generator=generator(25)
    )
    torch.testing.assert_close(result, expected)
    assert turned.shape == result.shape
    buffer = torch.cat([square, square.new_zeros(2, 4, 4)])
    result, _ = mixup(buffer[:n], square, pairing=pairing, out=buffer[2:], generator=generator(25))
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("function", [mixup, sample_pairing])
@pytest.mark.parametrize("start", range(7))
def test_out_may_overlap_x_in_an_array_that_torch_does_not_own(function, pairing, start):
    """Each from_numpy makes a storage of its own, whatever memory it shares with others."""
    pytest.importorskip("numpy")
    array = examples(12, 4).numpy()
    x, out = torch.from_numpy(array[3:9]), torch.from_numpy(array[start : start + 6])
    y = examples(6)
    expected, _ = function(x.clone(), y, pairing=pairing, generator=generator(25))
    result, _ = function(x, y, pairing=pairing, out=out, generator=generator(25))
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_out_may_be_the_memory_of_x_read_with_the_other_sign(pairing):
    numbers = torch.complex(examples(6, 4), examples(6, 4, seed=1))
    x, mirrored = numbers.imag, numbers.conj().imag
    expected, _ = mixup(x.clone(), x.clone(), pairing=pairing, generator=generator(25))
    result, _ = mixup(x, x.clone(), pairing=pairing, out=mirrored, generator=generator(25))
    torch.testing.assert_close(result.resolve_neg(), expected)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("n", [6, 7])
def test_an_autoencoder_may_mix_x_with_itself_in_place(pairing, n):
    x = examples(n, 5)
    expected, _ = mixup(x, x, pairing=pairing, generator=generator(26))
    mixed, target = mixup(x, x, pairing=pairing, out=x, generator=generator(26))
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(target, expected)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("n", [6, 7])
def test_an_autoencoder_keeps_its_targets_when_pairs_are_made_in_place(pairing, n):
    x = examples(n, 5)
    expected, _ = sample_pairing(x, x, pairing=pairing, generator=generator(26))
    for target in (lambda inside: inside, lambda inside: inside.view(n, 5), lambda inside: x[:]):
        inside = x.clone()
        mixed, kept = sample_pairing(
            inside, target(inside), pairing=pairing, out=inside, generator=generator(26)
        )
        torch.testing.assert_close(mixed, expected)
        assert torch.equal(kept, x)


@pytest.mark.parametrize("per_sample", [False, True])
def test_in_place_over_many_chunks(per_sample):
    x = examples(90, 3, 64, 64, dtype=torch.float32)  # 48 kB an example, 4 MB in all
    expected, _ = mixup(x, x, pairing="halves", per_sample=per_sample, generator=generator(27))
    inside = x.clone()
    mixup(inside, x, pairing="halves", per_sample=per_sample, out=inside, generator=generator(27))
    torch.testing.assert_close(inside, expected)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients_reach_hidden_layers_and_soft_labels(pairing, per_sample):
    def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return mixup(x, y, pairing=pairing, per_sample=per_sample, generator=generator(28))

    x, y = examples(5, 3).requires_grad_(), examples(5, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(both, (x, y))
    images = examples(3, 1, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: cutmix(x, x, pairing=pairing, generator=generator(29))[0], (images,)
    )
    assert torch.autograd.gradcheck(
        lambda x: sample_pairing(x, x, pairing=pairing, generator=generator(30))[0], (x,)
    )


@pytest.mark.parametrize("function", [mixup, sample_pairing, cutmix])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_tangents_follow_the_mixture(function, pairing, per_sample):
    """Forward mode without torch.func: all three are linear, so a tangent mixes as x does."""
    options = {"pairing": pairing} | ({"per_sample": per_sample} if function is mixup else {})
    x, soft, tangent = examples(5, 2, 6, 6), examples(5, 3).softmax(1), examples(5, 2, 6, 6, seed=1)
    expected = [function(t, soft, generator=generator(33), **options)[0] for t in (x, tangent)]
    of_labels = function(x, soft.cos(), generator=generator(33), **options)[1]
    with forward_ad.dual_level():
        duals = forward_ad.make_dual(x, tangent), forward_ad.make_dual(soft, soft.cos())
        mixed, labels = function(*duals, generator=generator(33), **options)
        for seen, wanted in zip(forward_ad.unpack_dual(mixed), expected, strict=True):
            torch.testing.assert_close(seen, wanted)
        torch.testing.assert_close(forward_ad.unpack_dual(labels).tangent, of_labels)


def test_without_recording_a_parameter_may_be_mixed_into_a_buffer():
    x = examples(4, 3).requires_grad_()
    buffer = torch.empty(4, 3, dtype=torch.float64)
    with torch.no_grad():
        mixed, _ = mixup(x, x, out=buffer)
    assert mixed is buffer
    assert not mixed.requires_grad


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("per_sample", [False, True])
def test_function_transforms(pairing, alpha, per_sample):
    options = {"alpha": alpha, "num_classes": 3, "pairing": pairing, "per_sample": per_sample}
    x, y = examples(5, 2), classes(5, 3)

    def total(x: Tensor) -> Tensor:
        torch.manual_seed(31)
        return (mixup(x, y, **options)[0] * torch.arange(10.0).reshape(5, 2)).sum()

    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(grad(total)(x), torch.autograd.grad(total(leaf), leaf)[0])
    tangent = examples(5, 2, seed=1)
    expected = (grad(total)(x) * tangent).sum()
    torch.testing.assert_close(jvp(total, (x,), (tangent,))[1], expected)

    many = examples(4, 5, 2)
    run = vmap(lambda x: mixup(x, y, **options), randomness="different")
    mixed, soft = run(many)
    eye = torch.eye(5, dtype=torch.float64).expand(4, 5, 5)
    made = vmap(lambda x: mixup(x, x, **options | {"num_classes": None}), randomness="different")
    shown = made(eye)[0]
    assert mixed.shape == (4, 5, 2)
    torch.testing.assert_close(soft.sum(2), torch.ones(4, 5, dtype=torch.float64))
    assert shown.diagonal(dim1=1, dim2=2).reshape(4, 5).unique(dim=0).shape[0] == 4


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("alpha", [0.4, 1.0])
@pytest.mark.parametrize("per_sample", [False, True])
def test_compiles_without_a_break(pairing, alpha, per_sample):
    options = {"alpha": alpha, "num_classes": 3, "pairing": pairing, "per_sample": per_sample}

    def run(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return mixup(x, y, **options)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for n in (6, 5, 1):  # the last batches of an epoch are smaller
        x, y = examples(n, 4), classes(n, 3)
        torch.manual_seed(32)
        expected = run(x, y)
        torch.manual_seed(32)
        for ours, theirs in zip(compiled(x, y), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    x, y = examples(6, 4), classes(6, 3)
    assert not torch.equal(compiled(x, y)[0], compiled(x, y)[0])


# --- CutMix --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("n", [1, 2, 5, 6])
@pytest.mark.parametrize("seed", range(6))
def test_cutmix_pastes_one_box_and_counts_its_pixels(pairing, n, seed):
    x = torch.arange(float(n))[:, None, None, None].expand(n, 2, 7, 10)
    mixed, soft = cutmix(
        x, torch.arange(n), num_classes=n, pairing=pairing, generator=generator(40 + seed)
    )
    for i in range(n):
        assert torch.equal(mixed[i, 0], mixed[i, 1])
        values, counts = mixed[i, 0].unique(return_counts=True)
        made = torch.zeros(n)
        made[values.long()] = counts / 70
        torch.testing.assert_close(soft[i], made)
        pasted = (mixed[i, 0] != i).nonzero()
        if len(pasted):
            low, high = pasted.min(0).values, pasted.max(0).values
            assert (high - low + 1).prod() == len(pasted)
            if pairing == "halves":
                assert (mixed[i, 0][mixed[i, 0] != i] == (i + n // 2) % n).all()


def test_cutmix_box_follows_lambda_and_a_uniform_centre():
    """Mean area kept, against a sum over all centres and quadrature over lambda."""
    height, width, rounds = 8, 12, 4000
    x = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, height, width)
    source = generator(41)
    kept = torch.tensor(
        [
            cutmix(x, x[:, 0, 0, 0], pairing="halves", generator=source)[1][1].item()
            for _ in range(rounds)
        ]
    )

    def mean_side(size: int, weight: float) -> float:
        half = int(size * (1 - weight) ** 0.5) // 2
        sides = [min(c + half, size) - max(c - half, 0) for c in range(size)]
        return sum(sides) / size

    grid = [(i + 0.5) / 2000 for i in range(2000)]
    covered = sum(mean_side(height, w) * mean_side(width, w) for w in grid) / 2000
    expected = 1 - covered / (height * width)
    assert abs(kept.mean() - expected) < 4 * kept.std() / rounds**0.5
    assert kept.min() == 1 - 6 * 10 / 96  # the largest even sides below 8 and 12
    assert kept.max() == 1


@pytest.mark.parametrize("sides", [(1, 9), (9, 2), (1, 1)])
def test_cutmix_leaves_an_image_without_room_for_a_box_and_its_label(sides):
    x = torch.tensor([0.0, 1.0]).reshape(2, 1, 1).expand(2, *sides)
    for seed in range(20):
        mixed, soft = cutmix(x, torch.arange(2), num_classes=2, generator=generator(43 + seed))
        assert torch.equal(mixed, x)
        assert torch.equal(soft, torch.eye(2))


def test_cutmix_asks_nothing_of_double_precision_on_the_device_of_x():
    """Some devices have none: x without numbers stands for them."""
    x = torch.zeros(4, 3, 8, 8, device="meta")
    soft = torch.zeros(4, 5, device="meta")
    seen: list[torch.dtype] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and made.device.type == "meta":
                seen.append(made.dtype)
            return made

    with Watch():
        mixed, labels = cutmix(x, soft, pairing="halves", generator=generator(44))
    assert (mixed.shape, labels.shape) == (x.shape, soft.shape)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("function", [mixup, cutmix])
def test_classes_without_numbers_have_shapes(function):
    x, y = torch.zeros(4, 3, 8, 8, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    mixed, soft = function(x, y, num_classes=5)
    assert (mixed.shape, soft.shape, soft.device) == (x.shape, (4, 5), x.device)


def test_cutmix_takes_more_axes_and_reaches_the_corners():
    x = torch.tensor([0.0, 1.0]).reshape(2, 1, 1).expand(2, 6, 6)
    source, hit = generator(42), torch.zeros(6, 6)
    for _ in range(300):
        hit += cutmix(x, x[:, 0, 0], pairing="halves", generator=source)[0][0]
    assert (hit > 0).all()
    video = examples(4, 3, 2, 6, 6)
    assert cutmix(video, video)[0].shape == video.shape


# --- DataLoader ----------------------------------------------------------------------------------


class Coins(Dataset):
    """1, 0, 1, 0, ..., each with a draw from torch's generator of the process."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[float, float]:
        return float(i % 2 == 0), torch.rand((), dtype=torch.float64).item()


def epoch(coins: DataLoader) -> list[float]:
    """The lambdas: a batch (1, 0) mixed by halves is (lambda, 1 - lambda)."""
    return [x[0].item() for x, _ in coins]


def toss(seed: int, collate: MixupCollate | None = None, **options) -> DataLoader:
    collate = collate or MixupCollate(pairing="halves")
    options = {"batch_size": 2, "collate_fn": collate, **options}
    return DataLoader(Coins(), generator=generator(seed), **options)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_differently_every_epoch_anew_and_can_be_repeated(persistent):
    options = {"num_workers": 2, "persistent_workers": persistent}
    coins, again, other = toss(0, **options), toss(0, **options), toss(1, **options)
    first = epoch(coins) + epoch(coins)
    assert len(set(first)) == 24
    assert epoch(again) + epoch(again) == first
    assert not set(epoch(other)) & set(first)


def test_a_worker_does_not_repeat_the_draws_of_its_data():
    drawn = torch.cat([y for _, y in toss(3, num_workers=2, collate_fn=None)]).tolist()
    assert len(set(drawn)) == 24
    assert not set(epoch(toss(3, num_workers=2))) & {*drawn, *(1 - value for value in drawn)}


def test_the_main_process_draws_from_the_generator_given():
    def run(seed: int) -> list[float]:
        return epoch(toss(0, MixupCollate(pairing="halves", generator=generator(seed))))

    assert run(5) == run(5) != run(6)
    assert len(set(run(5))) == 12


def test_collate_passes_options_and_other_transforms():
    data = [(examples(1, 4, 4, seed=i).float(), i % 3) for i in range(6)]
    x, y = MixupCollate(3, transform=cutmix, pairing="halves", generator=generator(50))(data)
    assert x.shape == (6, 1, 4, 4)
    assert y.shape == (6, 3)
    x, y = MixupCollate(transform=sample_pairing, pairing="halves")(data)
    expected = (data[0][0] + data[3][0]) / 2
    torch.testing.assert_close(x[0], expected)
    assert y.tolist() == [0, 1, 2, 0, 1, 2]
    x, y = MixupCollate(3, alpha=0.0)(data)
    torch.testing.assert_close(x, torch.stack([image for image, _ in data]))
    stacked = MixupCollate(
        3, alpha=0.0, collate=lambda rows: (torch.stack([r[0] for r in rows]), torch.arange(6) % 3)
    )
    assert stacked(data)[1].argmax(1).tolist() == [0, 1, 2, 0, 1, 2]


def test_collate_survives_pickling_and_spawned_workers():
    collate = pickle.loads(pickle.dumps(MixupCollate(pairing="halves", generator=generator(51))))
    assert len(set(epoch(toss(2, collate, num_workers=1, multiprocessing_context="spawn")))) == 12


def test_a_worker_refuses_a_buffer_that_its_next_batch_would_overwrite():
    shared = MixupCollate(pairing="halves", out=torch.empty(2, dtype=torch.float64))
    assert len(epoch(toss(2, shared))) == 12
    with pytest.raises(ValueError, match="out must be None in a worker"):
        epoch(toss(2, shared, num_workers=1))


def test_collate_needs_pairs():
    with pytest.raises(ValueError, match=r"collate to a pair \(x, y\), got Tensor"):
        MixupCollate(3)([torch.zeros(2), torch.ones(2)])
    with pytest.raises(ValueError, match=r"got dict"):
        MixupCollate(3)([{"x": torch.zeros(2)}])
    with pytest.raises(ValueError, match=r"got list of 3"):
        MixupCollate(3)([(torch.zeros(2), 1, 7)])
    with pytest.raises(TypeError, match="x and y must be tensors, got list and Tensor"):
        MixupCollate(3)([((torch.zeros(2), torch.zeros(2)), 1)])
    with pytest.raises(TypeError, match="x and y must be tensors, got Tensor and dict"):
        MixupCollate(3)([(torch.zeros(2), {"label": 1})])


# --- bad input -----------------------------------------------------------------------------------

X, Y = torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "message"),
    [
        (X.long(), Y, {}, TypeError, "x must be floating point, got torch.int64"),
        (torch.tensor(1.0), Y, {}, ValueError, r"x must hold at least one example.*shape \(\)"),
        (X[:0], Y[:0], {}, ValueError, r"at least one example.*\(0, 2\)"),
        (X, Y[:3], {}, ValueError, r"y must have 4 entries like x, got shape \(3,\)"),
        (X, Y[0], {}, ValueError, r"y must have 4 entries.*shape \(\)"),
        (X, Y, {"num_classes": None}, ValueError, "num_classes must be given"),
        (X, Y, {"num_classes": 2}, ValueError, r"classes in \[0, 2\), got 0 to 2"),
        (X, Y - 1, {}, ValueError, r"classes in \[0, 3\), got -1 to 1"),
        (X, Y, {"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        (X, Y, {"num_classes": 3.0}, TypeError, "num_classes must be an integer, got 3.0"),
        (X, Y > 0, {"num_classes": 1}, ValueError, r"classes in \[0, 1\)"),
        (X, Y[:, None], {}, ValueError, r"labels \(B, 3\).*int64 of shape \(4, 1\)"),
        (X, Y[:, None], {"num_classes": None}, ValueError, "multi-hot, of 0 and 1, got 0 to 2"),
        (X, Y.double(), {}, ValueError, r"y must be classes \(B,\).*float64 of shape \(4,\)"),
        (X, X, {}, ValueError, r"labels \(B, 3\) where num_classes=3, got.*\(4, 2\)"),
        (X, X + 1j, {"num_classes": None}, TypeError, "y must hold classes.*complex64"),
        (X, Y, {"alpha": -0.1}, ValueError, "alpha must be a finite number.*got -0.1"),
        (X, Y, {"alpha": float("nan")}, ValueError, "alpha.*got nan"),
        (X, Y, {"alpha": float("inf")}, ValueError, "alpha.*got inf"),
        (X, Y, {"alpha": None}, TypeError, "alpha must be a number, got None"),
        (X, Y, {"alpha": "0.2"}, TypeError, "alpha must be a number, got '0.2'"),
        (X, Y, {"alpha": (0.2, 0.2)}, TypeError, r"alpha must be a number, got \(0.2, 0.2\)"),
        (X, Y.to(torch.uint32), {"num_classes": 2}, ValueError, r"classes in \[0, 2\), got 0 to 2"),
        (X, Y, {"pairing": "thirds"}, ValueError, 'pairing must be "random" or "halves".*thirds'),
        (X.numpy(), Y, {}, TypeError, "x and y must be tensors, got ndarray and Tensor"),
        (X, [0, 1, 2, 0], {}, TypeError, "x and y must be tensors, got Tensor and list"),
        (X, Y.numpy(), {}, TypeError, "x and y must be tensors, got Tensor and ndarray"),
        (X, Y, {"out": True}, TypeError, "out must be a tensor, got bool"),
        (X, Y, {"out": X[:3]}, ValueError, r"out must be like x.*\(4, 2\).*got.*\(3, 2\)"),
        (X, Y, {"out": X.double()}, ValueError, "out must be like x, torch.float32.*float64"),
        (X + 0, Y, {"out": torch.zeros(4, 2).requires_grad_()}, ValueError, "out must be None"),
        (X.clone().requires_grad_(), Y, {"out": X.clone()}, ValueError, "out must be None where"),
    ],
)
def test_bad_input_is_named(x, y, options, error, message):
    with pytest.raises(error, match=message):
        mixup(x, y, **{"num_classes": 3, **options})


def test_bad_input_of_the_others_is_named():
    with pytest.raises(ValueError, match=r"x must be images.*got shape \(4, 2\)"):
        cutmix(X, Y, num_classes=3)
    for empty in (torch.zeros(4, 3, 0, 5), torch.zeros(4, 3, 5, 0)):
        with pytest.raises(ValueError, match=r"x must be images.*got shape \(4, 3, [05], [05]\)"):
            cutmix(empty, Y, num_classes=3)
    with pytest.raises(ValueError, match="num_classes must be given"):
        cutmix(X[:, :, None], Y)
    with pytest.raises(ValueError, match=r"classes in \[0, 2\), got 0 to 2"):
        cutmix(X[:, :, None], Y, num_classes=2)
    with pytest.raises(ValueError, match="alpha must be"):
        cutmix(X[:, :, None], Y, num_classes=3, alpha=-1)
    with pytest.raises(ValueError, match="y must have 4 entries"):
        sample_pairing(X, Y[:2])
    with pytest.raises(ValueError, match="pairing must be"):
        sample_pairing(X, Y, pairing="reversed")
    with pytest.raises(ValueError, match="out must be like x"):
        sample_pairing(X, Y, out=X[:2])


@pytest.mark.parametrize("bad", [{"alpha": -1.0}, {"num_classes": 2}, {"pairing": "thirds"}])
def test_a_refused_batch_is_left_as_it_was(bad):
    x = examples(4, 3)
    before = x.clone()
    with pytest.raises(ValueError):
        mixup(x, Y, out=x, **{"num_classes": 3, **bad})
    assert torch.equal(x, before)


@pytest.mark.skipif(len(DEVICES) < 2, reason="needs CUDA")
def test_labels_must_be_where_x_is():
    with pytest.raises(ValueError, match="y must be on cuda:0 like x, got cpu"):
        mixup(X.cuda(), Y, num_classes=3)
