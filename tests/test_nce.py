"""lib.nce against closed forms, autograd, direct formulas and chi-square, never against itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.nce import (
    NCELoss,
    UnigramNoise,
    Vocabulary,
    Word2Vec,
    info_nce_loss,
    nce_loss,
    negative_sampling_loss,
)
from lib.nce._steps import NOISE_BLOCK, Batch, Table, cbow_step, skipgram_step
from lib.nce._text import Text, group

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores(b: int = 5, k: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> list:
    g = generator(seed)
    shapes = [(b,), (b, k), (b,), (b, k)]
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


# --- nce_loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("log_z", [0.0, -1.3])
def test_nce_loss_is_the_cross_entropy_of_the_posterior(seed: int, log_z: float) -> None:
    data, noise, log_u, noise_log_u = scores(seed=seed)
    k = noise.shape[1]
    p, q = (data - log_z).exp(), (noise - log_z).exp()  # densities, not logits
    u, v = log_u.exp(), noise_log_u.exp()
    expected = -(p / (p + k * u)).log() - (k * v / (q + k * v)).log().sum(1)
    got = nce_loss(data, noise, log_u, noise_log_u, log_partition=log_z, reduction="none")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for reduction, value in (("mean", expected.mean()), ("sum", expected.sum())):
        got = nce_loss(data, noise, log_u, noise_log_u, log_partition=log_z, reduction=reduction)
        torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12)


def expected_nce(theta: Tensor, p: Tensor, u: Tensor, k: int) -> Tensor:
    """The expected loss on a finite space: every outcome as data and as noise, weighted."""
    n = len(p)
    loss = nce_loss(
        theta,
        theta.expand(1, n).T.expand(n, k),
        u.log(),
        u.log().expand(1, n).T.expand(n, k),
        reduction="none",
    )
    both = torch.stack(
        [
            nce_loss(theta[i], theta[j].expand(k), u[i].log(), u[j].log().expand(k))
            for i in range(n)
            for j in range(n)
        ]
    ).view(n, n)
    torch.testing.assert_close(both.diagonal(), loss)
    return (p.unsqueeze(1) * u * both).sum()


@pytest.mark.parametrize("k", [1, 4])
def test_the_expected_loss_is_stationary_exactly_at_the_log_density(k: int) -> None:
    g = generator(3)
    p = torch.rand(6, generator=g, dtype=torch.float64).softmax(0)
    u = torch.rand(6, generator=g, dtype=torch.float64).mul(3).softmax(0)
    at_truth = p.log().requires_grad_()
    (gradient,) = torch.autograd.grad(expected_nce(at_truth, p, u, k), at_truth)
    assert gradient.abs().max() < 1e-15
    away = (p.log() + 0.1 * torch.randn(6, generator=g, dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(expected_nce(away, p, u, k), away)
    assert gradient.abs().max() > 1e-3


def test_the_gradient_tends_to_that_of_maximum_likelihood() -> None:
    g = generator(4)
    p = torch.rand(5, generator=g, dtype=torch.float64).mul(2).softmax(0)
    u = torch.rand(5, generator=g, dtype=torch.float64).softmax(0)
    theta = torch.randn(5, generator=g, dtype=torch.float64).log_softmax(0).requires_grad_()
    likelihood = theta.detach().exp() - p  # of -sum p log(softmax) at a normalised theta
    errors = []
    for k in (100, 1_000, 10_000):
        positive = -(p * F.logsigmoid(theta - u.log() - math.log(k))).sum()
        negative = -k * (u * F.logsigmoid(-(theta - u.log() - math.log(k)))).sum()
        (gradient,) = torch.autograd.grad(positive + negative, theta)
        errors.append((gradient - likelihood).abs().max().item())
    for fine, coarse in zip(errors[1:], errors[:-1], strict=True):
        assert 0.08 < fine / coarse < 0.125  # first order in 1 / K


def test_learned_log_partition_finds_the_bessel_value() -> None:
    special = pytest.importorskip("scipy.special")
    a, b = 1.0, 0.5
    t = a**2 / (8 * b)
    truth = math.log(0.5 * math.sqrt(a / b) * math.exp(t) * special.kv(0.25, t))
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    score = -a * x**2 - b * x**4
    p = score.softmax(0)
    noise = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 0.8)
    u = noise.log_prob(x).softmax(0)
    loss = NCELoss().double()
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=50, tolerance_grad=1e-14)

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_u = noise.log_prob(x)
        terms = F.logsigmoid(score - loss.log_partition - log_u) * p
        value = -(terms + F.logsigmoid(-(score - loss.log_partition - log_u)) * u).sum()
        value.backward()
        return value

    optimizer.step(closure)
    assert loss.log_partition.item() == pytest.approx(truth, abs=1e-6)
    draws = torch.multinomial(p, 4000, replacement=True, generator=generator())
    others = torch.multinomial(u, 4000, replacement=True, generator=generator(1))
    args = score[draws], score[others, None], noise.log_prob(x[draws]), noise.log_prob(x[others])
    assert loss(args[0], args[1], args[2], args[3][:, None]).item() < 2 * math.log(2)


def test_nce_gradients() -> None:
    data, noise, log_u, noise_log_u = scores()
    log_z = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    data.requires_grad_()
    noise.requires_grad_()

    def loss(data: Tensor, noise: Tensor, log_z: Tensor) -> Tensor:
        return nce_loss(data, noise, log_u, noise_log_u, log_partition=log_z)

    assert torch.autograd.gradcheck(loss, (data, noise, log_z))
    assert torch.autograd.gradgradcheck(loss, (data, noise, log_z))


def test_a_log_partition_per_sample() -> None:
    data, noise, log_u, noise_log_u = scores()
    log_z = torch.randn(5, dtype=torch.float64, generator=generator(9))
    got = nce_loss(data, noise, log_u, noise_log_u, log_partition=log_z, reduction="none")
    shifted = nce_loss(data - log_z, noise - log_z[:, None], log_u, noise_log_u, reduction="none")
    torch.testing.assert_close(got, shifted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_device_follow_the_input(device: str, dtype: torch.dtype) -> None:
    args = [x.to(device, dtype) for x in scores()]
    before = [x.clone() for x in args]
    exact = nce_loss(*(x.double() for x in args))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for got in (nce_loss(*args), NCELoss().to(device)(*args)):
        assert got.dtype == wide
        assert got.device.type == device
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)
    assert all(x.equal(y) for x, y in zip(args, before, strict=True))


def test_extreme_logits_are_finite() -> None:
    for dtype in (torch.float32, torch.float64):
        big = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
        noise = torch.tensor([[-1e4], [1e4]], dtype=dtype, requires_grad=True)
        zero = torch.zeros(2, dtype=dtype), torch.zeros(2, 1, dtype=dtype)
        loss = nce_loss(big, noise, *zero, reduction="none")
        assert loss.tolist() == [0.0, 2e4]
        loss.sum().backward()
        assert big.grad.tolist() == [0.0, -1.0]
        assert noise.grad.tolist() == [[0.0], [1.0]]
    tiny = negative_sampling_loss(
        torch.tensor([30.0], dtype=torch.float64), torch.tensor([[-30.0]], dtype=torch.float64)
    )
    assert tiny.item() == pytest.approx(2 * math.log1p(math.exp(-30)), rel=1e-12)


def test_a_model_of_bounded_support() -> None:
    zero = torch.zeros(1), torch.zeros(1, 1)
    outside = torch.full((1, 1), -math.inf)
    assert nce_loss(torch.zeros(1), outside, *zero).item() == pytest.approx(math.log(2))
    assert nce_loss(outside[0], torch.zeros(1, 1), *zero).item() == math.inf


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({1: torch.zeros(5, 0)}, "K = 0"),
        ({1: torch.zeros(4, 3)}, r"noise_scores must have shape \(5, K\).*got \(4, 3\)"),
        ({2: torch.zeros(4)}, r"data_log_noise must have shape \(5,\), got \(4,\)"),
        ({3: torch.zeros(5, 2)}, r"noise_log_noise must have shape \(5, 3\), got \(5, 2\)"),
        ({0: torch.full((5,), math.nan)}, "data_scores must not be NaN.*index 0"),
        ({1: torch.full((5, 3), math.nan)}, r"noise_scores must not be NaN.*index \(0, 0\)"),
        ({2: torch.full((5,), -math.inf)}, "data_log_noise must be finite: the noise must be"),
        ({3: torch.full((5, 3), math.inf)}, "noise_log_noise must be finite"),
    ],
)
def test_nce_bad_values(change: dict[int, Tensor], match: str) -> None:
    args = scores(dtype=torch.float32)
    for place, value in change.items():
        args[place] = value
    with pytest.raises(ValueError, match=match):
        nce_loss(*args)


def test_nce_bad_arguments() -> None:
    args = scores()
    with pytest.raises(TypeError, match=r"data_scores must be a floating-point.*int64"):
        nce_loss(torch.ones(5, dtype=torch.int64), *args[1:])
    with pytest.raises(ValueError, match="reduction"):
        nce_loss(*args, reduction="max")
    with pytest.raises(ValueError, match="reduction"):
        NCELoss(reduction="max")
    with pytest.raises(ValueError, match=r"log_partition must have shape \(\) or \(5,\)"):
        nce_loss(*args, log_partition=torch.zeros(2))
    with pytest.raises(ValueError, match="log_partition must be finite"):
        nce_loss(*args, log_partition=math.inf)
    with pytest.raises(ValueError, match="log_partition must be finite, got nan"):
        NCELoss(math.nan)
    with pytest.raises(ValueError, match="at least one sample"):
        nce_loss(*scores(b=0))


# --- negative_sampling_loss -----------------------------------------------------------------------


def test_negative_sampling_is_two_cross_entropies() -> None:
    positive, negative, *_ = scores()
    both = torch.cat((positive[:, None], negative), 1)
    target = torch.zeros_like(both)
    target[:, 0] = 1
    expected = F.binary_cross_entropy_with_logits(both, target, reduction="none").sum(1)
    torch.testing.assert_close(negative_sampling_loss(positive, negative, "none"), expected)
    torch.testing.assert_close(negative_sampling_loss(positive, negative), expected.mean())
    with pytest.raises(ValueError, match="K = 0"):
        negative_sampling_loss(positive, negative[:, :0])
    with pytest.raises(ValueError, match="negative must not be NaN"):
        negative_sampling_loss(positive, negative * math.nan)


def test_a_full_table_reaches_pmi_less_log_k() -> None:
    g = generator(5)
    joint = torch.rand(4, 6, generator=g, dtype=torch.float64).mul(3).flatten().softmax(0)
    joint = joint.view(4, 6)
    rows, k = joint.sum(1), 3
    noise = joint.sum(0) ** 0.75
    noise = noise / noise.sum()
    table = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [table],
        max_iter=300,
        tolerance_grad=1e-13,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )
    i, j, m = torch.meshgrid(torch.arange(4), torch.arange(6), torch.arange(6), indexing="ij")

    def closure() -> Tensor:
        optimizer.zero_grad()
        negative = table[i, m].flatten()[:, None].expand(-1, k)
        each = negative_sampling_loss(table[i, j].flatten(), negative, "none")
        loss = (each * (joint[i, j] * noise[m]).flatten()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (joint / rows[:, None] / noise).log() - math.log(k)
    torch.testing.assert_close(table.detach(), expected, rtol=0, atol=1e-5)


# --- info_nce_loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_info_nce_by_its_definition(normalize: bool) -> None:
    g = generator(6)
    query, key = (torch.randn(5, 3, generator=g, dtype=torch.float64) for _ in range(2))
    q, k = query.numpy(), key.numpy()
    if normalize:
        q = q / np.sqrt((q**2).sum(1, keepdims=True))
        k = k / np.sqrt((k**2).sum(1, keepdims=True))
    expected = [
        -math.log(math.exp(q[i] @ k[i] / 0.7) / sum(math.exp(q[i] @ k[j] / 0.7) for j in range(5)))
        for i in range(5)
    ]
    got = info_nce_loss(query, key, temperature=0.7, normalize=normalize, reduction="none")
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    mean = info_nce_loss(query, key, temperature=0.7, normalize=normalize)
    torch.testing.assert_close(mean.item(), float(np.mean(expected)))


def test_info_nce_with_given_negatives() -> None:
    g = generator(7)
    query, key, other = (torch.randn(n, 3, generator=g, dtype=torch.float64) for n in (5, 5, 4))
    q, k, n = (F.normalize(x, dim=1) for x in (query, key, other))
    expected = []
    for i in range(5):
        candidates = torch.cat((k[i : i + 1], n)) @ q[i] / 0.2
        expected.append(-candidates.log_softmax(0)[0])
    got = info_nce_loss(query, key, temperature=0.2, negatives=other, reduction="none")
    torch.testing.assert_close(got, torch.stack(expected))
    with pytest.raises(ValueError, match=r"negatives must have shape \(M, 3\)"):
        info_nce_loss(query, key, negatives=other[:0])


def test_info_nce_bounds_and_gradients() -> None:
    g = generator(8)
    query = torch.randn(6, 4, generator=g, dtype=torch.float64, requires_grad=True)
    key = torch.randn(6, 4, generator=g, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, t: info_nce_loss(q, k, temperature=t), (query, key, temperature)
    )
    same = info_nce_loss(torch.ones(6, 4), torch.ones(6, 4))
    assert same.item() == pytest.approx(math.log(6))  # nothing to tell apart
    assert info_nce_loss(torch.ones(1, 4), torch.ones(1, 4)).item() == 0
    orthogonal = torch.eye(4)
    assert info_nce_loss(orthogonal, orthogonal, temperature=0.01).item() < 1e-30


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_info_nce_of_tiny_and_huge_vectors(scale: float) -> None:
    query = torch.randn(4, 3, generator=generator())
    key = torch.randn(4, 3, generator=generator(1))
    expected = info_nce_loss(query, key)
    torch.testing.assert_close(info_nce_loss(query * scale, key), expected)


def test_info_nce_is_float32_under_autocast() -> None:
    query, key = torch.randn(2, 8, 16, generator=generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = info_nce_loss(query, key)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, info_nce_loss(query, key), rtol=1e-6, atol=1e-6)
    assert info_nce_loss(query.half(), key.half()).dtype == torch.float32


def test_info_nce_bad_input() -> None:
    query = torch.randn(4, 3, generator=generator())
    for temperature in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            info_nce_loss(query, query, temperature=temperature)
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            info_nce_loss(query, query, temperature=torch.tensor(temperature))
    with pytest.raises(ValueError, match=r"key must have shape \(4, 3\), got \(4, 2\)"):
        info_nce_loss(query, query[:, :2])
    with pytest.raises(ValueError, match=r"query must have shape \(B, D\)"):
        info_nce_loss(query[:0], query[:0])
    zero = query.clone()
    zero[2] = 0
    with pytest.raises(ValueError, match=r"key must have no zero vector.*index 2"):
        info_nce_loss(query, zero)
    assert info_nce_loss(query, zero, normalize=False).isfinite()
    with pytest.raises(ValueError, match="query must be finite"):
        info_nce_loss(query / 0, query)


# --- transforms -----------------------------------------------------------------------------------


def test_vmap_and_grad() -> None:
    args = scores(b=4)
    single = torch.func.vmap(nce_loss)(*args)
    torch.testing.assert_close(single, nce_loss(*args, reduction="none"))
    slope = torch.func.vmap(torch.func.grad(nce_loss))(*args)
    logit = args[0] - math.log(3) - args[2]
    torch.testing.assert_close(slope, logit.sigmoid() - 1)
    positive, negative = args[:2]
    got = torch.func.vmap(negative_sampling_loss)(positive, negative)
    torch.testing.assert_close(got, negative_sampling_loss(positive, negative, "none"))
    pairs = torch.randn(2, 3, 4, 5, generator=generator())
    got = torch.func.vmap(info_nce_loss)(pairs[0], pairs[1])
    torch.testing.assert_close(
        got, torch.stack([info_nce_loss(*p) for p in zip(*pairs, strict=True)])
    )
    noise = UnigramNoise([2, 1, 3])
    ids = torch.tensor([[0, 2], [1, 1]])
    torch.testing.assert_close(torch.func.vmap(noise.log_prob)(ids), noise.log_prob(ids))


def test_compile_without_graph_breaks() -> None:
    args = scores(b=4, dtype=torch.float32)
    compiled = torch.compile(nce_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), nce_loss(*args))
    pairs = torch.randn(2, 4, 5, generator=generator())
    compiled = torch.compile(info_nce_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*pairs), info_nce_loss(*pairs))
    loss = NCELoss(0.3)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), loss(*args))


def test_state_dicts_keep_their_names() -> None:
    assert list(NCELoss().state_dict()) == ["log_partition"]
    assert list(UnigramNoise([1, 2]).state_dict()) == []
    assert list(Word2Vec(3, 2).state_dict()) == [
        "input_vectors",
        "output_vectors",
        "input_squares",
        "output_squares",
    ]


# --- UnigramNoise ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_samples_pass_a_chi_square_test(device: str, power: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    counts = torch.tensor([0, 40, 7, 0, 1, 300, 90, 0], device=device)
    noise = UnigramNoise(counts, power)
    g = torch.Generator(device).manual_seed(11)
    drawn = noise.sample((200, 500), generator=g)
    assert drawn.device.type == device
    seen = drawn.flatten().bincount(minlength=8).cpu().numpy()
    weights = np.array([0, 40**power, 7**power, 0, 1, 300**power, 90**power, 0])
    kept = weights > 0
    assert seen[~kept].sum() == 0
    expected = weights[kept] / weights.sum() * drawn.numel()
    assert stats.chisquare(seen[kept], expected).pvalue > 1e-3
    log_probs = noise.log_prob(torch.arange(8, device=device)).cpu()
    np.testing.assert_allclose(log_probs.exp().numpy(), weights / weights.sum(), rtol=1e-6)


def test_a_word_of_zero_probability_is_never_drawn() -> None:
    counts = torch.zeros(1000)
    counts[[3, 500]] = torch.tensor([1e-12, 1e12])
    for power in (0.0, 0.5, 1.0, 8.0):
        drawn = UnigramNoise(counts, power).sample(50_000, generator=generator())
        assert set(drawn.tolist()) <= {3, 500}
        assert UnigramNoise(counts, power).probs.sum() == pytest.approx(1, abs=1e-12)
    assert UnigramNoise([0, 5]).sample((3,)).tolist() == [1, 1, 1]


def test_draws_follow_the_generator() -> None:
    noise = UnigramNoise(torch.arange(1, 50))
    first, second, other = (noise.sample((4, 5), generator(s)) for s in (1, 1, 2))
    assert first.equal(second)
    assert not first.equal(other)
    state = torch.get_rng_state()
    noise.sample(10, generator())
    assert torch.get_rng_state().equal(state)
    assert noise.sample().shape == ()
    assert noise.sample((0, 3)).shape == (0, 3)


def test_noise_keeps_its_precision() -> None:
    counts = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    noise = UnigramNoise(counts, 1).half()
    expected = (counts / 8).log()
    torch.testing.assert_close(noise.log_prob(torch.arange(3)), expected, rtol=1e-15, atol=0)
    assert UnigramNoise([1, 2]).log_prob(torch.tensor(0)).dtype == torch.float32


@pytest.mark.parametrize(
    ("counts", "match"),
    [
        ([], r"counts must have shape \(V,\), V >= 1"),
        ([[1, 2]], r"counts must have shape"),
        ([0, 0, 0], "counts must not all be 0.*3 words"),
        ([1, -2], "counts must be finite and not negative, got -2 for word 1"),
        ([1, math.nan], "got nan for word 1"),
        ([1, math.inf], "got inf for word 1"),
    ],
)
def test_noise_bad_counts(counts: list, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        UnigramNoise(counts)


def test_noise_bad_arguments() -> None:
    noise = UnigramNoise([1, 2, 3])
    for power in (-1, math.nan, math.inf, "x"):
        with pytest.raises(ValueError, match="power must be a finite number of at least 0"):
            UnigramNoise([1, 2], power)
    with pytest.raises(TypeError, match="counts must be real numbers"):
        UnigramNoise([True, False])
    with pytest.raises(ValueError, match=r"ids must lie in 0 .. 2, got 3 at index 1$"):
        noise.log_prob(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="ids must lie in"):
        noise.log_prob(torch.tensor([-1]))
    with pytest.raises(TypeError, match=r"ids must be a tensor of integer ids, got torch\.float32"):
        noise.log_prob(torch.tensor([0.0]))
    with pytest.raises(ValueError, match="shape must not hold negative sizes"):
        noise.sample((2, -1))


# --- Vocabulary -----------------------------------------------------------------------------------


def test_vocabulary_counts_and_orders() -> None:
    sentences = [["b", "a", "c"], [], ["a", "b", "d", "a"]]
    vocabulary = Vocabulary.from_sentences(sentences, min_count=2)
    assert vocabulary.words == ["a", "b"]
    assert vocabulary.counts.tolist() == [3, 2]
    assert Vocabulary.from_sentences(sentences, min_count=1, max_size=3).words == ["a", "b", "c"]
    assert vocabulary.encode(["b", "zz", "a"], unknown="skip").tolist() == [1, 0]
    assert vocabulary.encode([]).dtype == torch.int64
    assert vocabulary.decode(vocabulary.encode(["b", "a"])) == ["b", "a"]
    assert "a" in vocabulary
    assert "zz" not in vocabulary
    assert list(vocabulary) == ["a", "b"]


def test_vocabulary_bad_input() -> None:
    with pytest.raises(ValueError, match="counts must hold at least one word"):
        Vocabulary([])
    with pytest.raises(ValueError, match="counts must name each word once, got 'a'"):
        Vocabulary(["a", "b", "a"])
    with pytest.raises(ValueError, match="counts must not be negative, got -1 for 'a'"):
        Vocabulary({"a": -1})
    with pytest.raises(TypeError, match="counts must have words as keys, got 1"):
        Vocabulary({1: 2})
    with pytest.raises(ValueError, match="min_count=5 times, got 2 words, the most frequent 2"):
        Vocabulary.from_sentences([["a", "b", "a"]])
    with pytest.raises(ValueError, match="got 0 words"):
        Vocabulary.from_sentences([])
    with pytest.raises(TypeError, match="split it first"):
        Vocabulary.from_sentences(["a rose is a rose"])
    with pytest.raises(ValueError, match="min_count must be at least 1"):
        Vocabulary.from_sentences([["a"]], min_count=0)
    vocabulary = Vocabulary(["a", "b"])
    with pytest.raises(KeyError, match="'zz' is not among the 2 words"):
        vocabulary.encode(["a", "zz"])
    with pytest.raises(KeyError, match="zz"):
        vocabulary["zz"]
    with pytest.raises(TypeError, match="sequence of words"):
        vocabulary.encode("ab")
    with pytest.raises(ValueError, match="unknown must be"):
        vocabulary.encode(["a"], unknown="drop")
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match=f"ids must lie in 0 .. 1, got {wrong}"):
            vocabulary.decode([wrong])


# --- Word2Vec -------------------------------------------------------------------------------------


def direct_loss(
    architecture: str, inputs: Tensor, outputs: Tensor, text: Text, noise: Tensor, w: int, k: float
) -> tuple[Tensor, int]:
    """The batch's loss word by word and pair by pair, as its definition says."""
    loss, terms = inputs.new_zeros(()), 0
    ids, sentence = text.ids.tolist(), text.sentence.tolist()
    for i, word in enumerate(ids):
        near = [
            j
            for j in range(max(0, i - w), min(len(ids), i + w + 1))
            if j != i and sentence[j] == sentence[i]
        ]
        drawn = noise[i // NOISE_BLOCK]
        pairs = [(word, None)] if architecture == "cbow" and near else []
        if architecture == "skipgram":
            pairs = [(ids[j], None) for j in near]
        hidden = inputs[word]
        if architecture == "cbow" and near:
            hidden = inputs[[ids[j] for j in near]].mean(0)
        for target, _ in pairs:
            loss = loss - F.logsigmoid(hidden @ outputs[target])
            loss = loss - k * F.logsigmoid(-(outputs[drawn] @ hidden)).sum()
        terms += len(pairs)
    return loss, terms


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("architecture", ["cbow", "skipgram"])
@pytest.mark.parametrize("window", [1, 3, 17])
def test_a_step_is_adagrad_on_the_direct_loss(architecture: str, window: int, device: str) -> None:
    g = generator(12)
    size, dim, n, m, weight, rate = 40, 5, 2 * NOISE_BLOCK, 6, 0.7, 0.2
    sentence = torch.randint(0, 2, (n - 9,), generator=g).cumsum(0).int()
    text = Text(torch.randint(0, size - 3, (n - 9,), generator=g), sentence).padded(NOISE_BLOCK)
    noise = torch.randint(0, size, (2, m), generator=g)
    inputs, outputs = (
        torch.randn(size, dim, generator=g, dtype=torch.float64).requires_grad_() for _ in "io"
    )
    past = torch.rand(2, size, generator=g, dtype=torch.float64)
    loss, terms = direct_loss(architecture, inputs, outputs, text, noise, window, weight)
    gradients = torch.autograd.grad(loss, (inputs, outputs))
    tables = [
        Table(x.detach().clone().to(device), p.clone().to(device))
        for x, p in zip((inputs, outputs), past, strict=True)
    ]
    both = torch.cat((text.ids, noise.flatten()))
    batch = Batch(
        text.ids.to(device),
        text.sentence.to(device),
        noise.to(device),
        group(text.ids, size, torch.device(device)),
        group(both, size, torch.device(device)),
        window,
        weight,
    )
    step = {"cbow": cbow_step, "skipgram": skipgram_step}[architecture]
    got = step(*tables, batch, rate)
    assert got.tolist() == pytest.approx([loss.item(), terms], rel=1e-12)
    for table, start, gradient, squares in zip(
        tables, (inputs, outputs), gradients, past, strict=True
    ):
        squares = squares + gradient.square().mean(1)
        expected = start - rate * gradient / squares.sqrt().unsqueeze(1)
        # no further apart than the 1e-10 that keeps 0 / 0 away
        torch.testing.assert_close(table.squares.cpu(), squares, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(table.vectors.cpu(), expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [10, 70_000, 2**17 + 5])
def test_groups_are_a_sort_into_runs(size: int) -> None:
    ids = torch.randint(0, size, (500,), generator=generator())
    ids[::7] = size - 1
    groups = group(ids, size, torch.device("cpu"))
    values, inverse = torch.unique(ids, return_inverse=True)
    assert groups.rows.equal(values)
    assert groups.order.equal(torch.argsort(ids, stable=True))
    assert groups.starts.equal(torch.searchsorted(inverse.sort().values, torch.arange(len(values))))


def topics(n: int = 400, seed: int = 0) -> list[list[int]]:
    """Sentences of 8 words, each from one of three topics of ten words."""
    g = generator(seed)
    first = torch.randint(0, 3, (n, 1), generator=g) * 10
    return (first + torch.randint(0, 10, (n, 8), generator=g)).tolist()


@pytest.mark.parametrize("architecture", ["cbow", "skipgram"])
def test_neighbours_share_their_topic(architecture: str) -> None:
    for seed in range(3):
        model = Word2Vec(30, 16, architecture, generator=generator(seed))
        losses = model.fit(topics(seed=seed), epochs=10, generator=generator(seed))
        assert len(losses) == 10
        assert losses[-1] < losses[0]
        near = torch.stack([model.most_similar(word, 9)[0] for word in range(30)])
        hits = (near // 10 == torch.arange(30)[:, None] // 10).double().mean()
        assert hits > 0.95  # 0.31 by chance


@pytest.mark.parametrize("architecture", ["cbow", "skipgram"])
def test_training_is_reproducible_and_resumable(architecture: str) -> None:
    def trained(*epochs: int) -> Word2Vec:
        g = generator(1)
        model = Word2Vec(30, 8, architecture, generator=g)
        for n in epochs:
            fresh = Word2Vec(30, 8, architecture)
            fresh.load_state_dict(model.state_dict())
            model = fresh
            model.fit(topics(), epochs=n, subsample=0.1, generator=g)
        return model

    once = trained(3)
    state = torch.get_rng_state()
    assert trained(1, 2).input_vectors.equal(once.input_vectors)
    assert not trained(2).input_vectors.equal(once.input_vectors)
    model = Word2Vec(5, 2, architecture, generator=generator())
    state = torch.get_rng_state()
    model.fit([[0, 1, 2]], generator=generator())
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("architecture", ["cbow", "skipgram"])
@pytest.mark.parametrize(
    ("sentences", "settings"),
    [
        ([[0, 0]], {}),
        ([[0] * 5000], {"epochs": 3}),
        ([[0, 1] * 3000], {"negatives": 50, "window": 40}),
        ([[i % 7 for i in range(6000)]], {"window": 100, "negatives": 1}),
        (topics(), {"learning_rate": 10.0, "epochs": 20}),
        (topics(), {"batch_size": 100_000, "epochs": 20}),
        (topics(), {"batch_size": 1}),
    ],
)
def test_training_never_diverges(architecture: str, sentences: list, settings: dict) -> None:
    model = Word2Vec(30, 16, architecture, generator=generator())
    losses = model.fit(sentences, generator=generator(), **settings)
    assert all(map(math.isfinite, losses))
    assert model.vectors.isfinite().all()
    assert model.output_vectors.isfinite().all()


def test_the_first_loss_is_that_of_ignorance() -> None:
    """With outputs of 0 every logit is 0: (1 + K) log 2 a prediction, whatever the sharing."""
    for negatives in (1, 5, 16):
        model = Word2Vec(30, 8, generator=generator())
        (loss,) = model.fit(
            topics(), epochs=1, negatives=negatives, learning_rate=1e-9, generator=generator()
        )
        assert loss == pytest.approx((1 + negatives) * math.log(2), rel=1e-6)


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_sentences_of_any_sequence(kind: type) -> None:
    sentences = [[0, 1, 2], [2, 1], [3]]
    models = [Word2Vec(4, 3, generator=generator()) for _ in range(2)]
    models[0].fit(iter([kind(s) for s in sentences]), epochs=2, generator=generator())
    models[1].fit(sentences, epochs=2, generator=generator())
    assert models[0].vectors.equal(models[1].vectors)


@pytest.mark.parametrize(
    ("sentences", "error", "match"),
    [
        ([], ValueError, "at least one of two words or more, got 0 sentences"),
        ([[], [1]], ValueError, "got 2 sentences, the longest of 1"),
        ([[0, 1], [2, 5]], ValueError, "ids in 0 .. 4, got 5 in sentence 1"),
        ([[0, 1], [], [-1, 2]], ValueError, "got -1 in sentence 2"),
        ([["a", "b"]], TypeError, "integer word ids.*Vocabulary.encode"),
        (["ab"], TypeError, "got 'ab' as sentence 0"),
        ([[0.0, 1.0]], TypeError, "integer word ids, got 0.0; Vocabulary.encode"),
        ([torch.zeros(3)], TypeError, "integer word ids, got torch.float32"),
        ([0, 1], TypeError, "got 0 as sentence 0"),
        ([[0, None]], TypeError, "integer word ids, got None"),
        ([torch.tensor([0, 1]), [1, 1.5]], TypeError, "integer word ids, got 1.5"),
        ([[0, 2**70]], ValueError, f"ids of 64 bits, got {2**70}"),
        ([[0, 2**63]], ValueError, f"ids of 64 bits, got {2**63}"),
    ],
)
def test_word2vec_bad_sentences(sentences: list, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        Word2Vec(5, 2).fit(sentences)


@pytest.mark.parametrize("name", ["epochs", "window", "negatives", "batch_size"])
def test_word2vec_bad_counts(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Word2Vec(5, 2).fit([[0, 1]], **{name: 0})
    with pytest.raises(TypeError, match=f"{name} must be an integer, got 1.5"):
        Word2Vec(5, 2).fit([[0, 1]], **{name: 1.5})


def test_word2vec_bad_settings() -> None:
    for name in ("learning_rate", "subsample"):
        for value in (0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"{name} must be a positive number"):
                Word2Vec(5, 2).fit([[0, 1]], **{name: value})
    with pytest.raises(ValueError, match="subsample=1e-12 left no two neighbours in epoch 0"):
        Word2Vec(5, 2).fit([[0, 1]], subsample=1e-12, generator=generator())
    with pytest.raises(ValueError, match="power must be"):
        Word2Vec(5, 2).fit([[0, 1]], power=-1)
    with pytest.raises(ValueError, match="vocab_size must be at least 1"):
        Word2Vec(0, 2)
    with pytest.raises(ValueError, match='architecture must be "cbow" or "skipgram"'):
        Word2Vec(5, 2, "glove")
    with pytest.raises(TypeError, match="input_vectors must be float32 or float64"):
        Word2Vec(5, 2).half().fit([[0, 1]])


def test_most_similar_by_hand() -> None:
    model = Word2Vec(4, 2, generator=generator())
    model.input_vectors.data = torch.tensor([[1.0, 0], [2, 2], [-1, 0.5], [0, 3]])
    ids, similarities = model.most_similar(0, 3)
    assert ids.tolist() == [1, 3, 2]
    assert similarities.tolist() == pytest.approx([0.5**0.5, 0, -1 / 1.25**0.5], abs=1e-6)
    ids, _ = model.most_similar(torch.tensor([0.0, 1.0]), 2, exclude=[3])
    assert ids.tolist() == [1, 2]
    assert sorted(model.most_similar(torch.tensor(1), 2)[0].tolist()) == [0, 3]
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f"ids must lie in 0 .. 3, got {wrong}"):
            model.most_similar(wrong)
    with pytest.raises(ValueError, match="k must be at most the 3 words that are left, got 4"):
        model.most_similar(0, 4)
    with pytest.raises(ValueError, match="k must be at least 1"):
        model.most_similar(0, 0)
    with pytest.raises(ValueError, match=r"query must have shape \(2,\), got \(3,\)"):
        model.most_similar(torch.zeros(3), 1)
    with pytest.raises(ValueError, match="a zero vector has no direction"):
        model.most_similar(torch.zeros(2), 1)
    with pytest.raises(TypeError, match="query must be a word id or a vector, got 'king'"):
        model.most_similar("king", 1)


def test_forward_scores_every_word() -> None:
    model = Word2Vec(6, 3, generator=generator()).double()
    model.output_vectors.data.normal_(generator=generator())
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = (
        torch.stack([model.vectors[[0, 1]].mean(0), model.vectors[[3, 4, 5]].mean(0)])
        @ model.output_vectors.detach().T
    )
    torch.testing.assert_close(model(ids, mask).detach(), expected)
    with pytest.raises(ValueError, match="mask must keep at least one neighbour"):
        model(ids, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"ids must lie in 0 \.\. 5"):
        model(ids + 1)
    pairs = Word2Vec(6, 3, "skipgram", generator=generator())
    assert pairs(ids).shape == (2, 3, 6)
    with pytest.raises(ValueError, match="mask must be None for skip-gram"):
        pairs(ids, mask)


@pytest.mark.parametrize("architecture", ["cbow", "skipgram"])
def test_training_settles_at_the_shifted_log_ratio(architecture: str) -> None:
    """With a neighbour to each side of two-word sentences both architectures see the same pairs."""
    size, k = 5, 3
    joint = torch.rand(size, size, generator=generator(3), dtype=torch.float64) ** 2 + 0.02
    joint = joint + joint.T
    pairs = torch.multinomial(joint.flatten(), 40_000, True, generator=generator(4))
    sentences = torch.stack((pairs // size, pairs % size), 1)
    counts = (size * sentences[:, 0] + sentences[:, 1]).bincount(minlength=size**2)
    seen = (counts.view(size, size) + counts.view(size, size).T).double()
    law = seen / seen.sum(1, keepdim=True)
    noise = UnigramNoise(sentences.flatten().bincount(), 0.75).probs
    model = Word2Vec(size, 12, architecture, generator=generator())
    model.fit(list(sentences), epochs=20, window=1, negatives=k, generator=generator(5))
    ids = torch.arange(size)
    scores = model(ids.unsqueeze(1) if architecture == "cbow" else ids).detach().double()
    expected = (law / noise).log() - math.log(k)
    assert (scores - expected).abs().max() < 0.15
    assert ((k * noise * scores.exp()).sum(1) - 1).abs().max() < 0.1


@pytest.mark.parametrize("architecture", ["cbow", "skipgram"])
def test_words_that_never_occur_are_left_alone(architecture: str) -> None:
    """They have no neighbours, and the noise never draws them."""
    model = Word2Vec(40, 16, architecture, generator=generator())
    before = model.vectors.clone()
    model.fit(topics(), epochs=3, generator=generator())
    assert model.vectors[30:].equal(before[30:])
    assert not model.output_vectors[30:].any()
    assert not model.vectors[:30].eq(before[:30]).all(1).any()


def test_a_zero_vector_among_the_words_is_similar_to_none() -> None:
    model = Word2Vec(4, 2, generator=generator())
    model.input_vectors.data = torch.tensor([[1.0, 0], [0, 0], [1, 1], [-1, 0]])
    ids, similarities = model.most_similar(0, 3)
    assert ids.tolist() == [2, 1, 3]
    assert similarities.tolist() == pytest.approx([0.5**0.5, 0, -1], abs=1e-6)
    with pytest.raises(ValueError, match="a zero vector has no direction"):
        model.most_similar(1, 1)


def test_more_passes_do_not_spoil_the_neighbours() -> None:
    g = generator(7)
    topic = torch.arange(300) % 12
    subject = torch.randint(12, (1500, 1), generator=g)
    own = subject + 12 * torch.randint(25, (1500, 12), generator=g)
    other = torch.randint(300, (1500, 12), generator=g)
    sentences = own.where(torch.rand(1500, 12, generator=g) < 0.5, other)
    model = Word2Vec(300, 32, "skipgram", generator=g)
    quality = []
    for epochs in (4, 12):
        model.fit(list(sentences), epochs=epochs, generator=g)
        near = torch.stack([model.most_similar(word, 10)[0] for word in range(300)])
        quality.append((topic[near] == topic.unsqueeze(1)).double().mean().item())
    assert 0.9 < quality[0] < quality[1] + 0.01


# --- what a hostile user sends --------------------------------------------------------------------


def test_plus_infinity_is_no_perfect_score() -> None:
    """A score that overflowed would count as a point the model explains for nothing."""
    args = scores()
    for place, name in ((0, "data_scores"), (1, "noise_scores")):
        broken = [x.clone() for x in args]
        broken[place][1] = math.inf
        with pytest.raises(ValueError, match=f"{name} must not be NaN or plus infinity.*index"):
            nce_loss(*broken)
    positive, negative = (torch.tensor([70_000.0]).half(), torch.zeros(1, 1).half())
    with pytest.raises(ValueError, match=r"positive must not be NaN or plus infinity.*index 0"):
        negative_sampling_loss(positive, negative)
    with pytest.raises(ValueError, match=r"negative must not be NaN or plus infinity.*\(0, 0\)"):
        negative_sampling_loss(negative[0], positive[None])
    assert negative_sampling_loss(-positive, negative, validate_args=False).item() == math.inf


@pytest.mark.parametrize("value", [[0.0] * 4, np.zeros((5, 1)), "1", None, 1j])
def test_log_partition_is_a_number_or_a_tensor(value: object) -> None:
    """A list or an array would broadcast where a tensor of that shape is refused."""
    with pytest.raises(TypeError, match="log_partition must be a number or a tensor, got"):
        nce_loss(*scores(), log_partition=value)
    with pytest.raises(TypeError, match="log_partition must be a number or a tensor, got"):
        NCELoss(value)
    args = scores()
    torch.testing.assert_close(
        nce_loss(*args, log_partition=np.float64(0.3)), nce_loss(*args, log_partition=0.3)
    )


def test_info_nce_of_mixed_precision() -> None:
    g = generator(3)
    query, key, other = (torch.randn(n, 3, generator=g) for n in (5, 5, 4))
    expected = info_nce_loss(query.double(), key.double(), negatives=other.double())
    got = info_nce_loss(query, key.double(), negatives=other)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert info_nce_loss(query.half(), key, negatives=other.bfloat16()).dtype == torch.float32


def test_info_nce_with_negatives_of_each_query() -> None:
    g = generator(7)
    query, key = (torch.randn(5, 3, generator=g, dtype=torch.float64) for _ in "qk")
    other = torch.randn(5, 4, 3, generator=g, dtype=torch.float64)
    expected = []
    for q, k, n in zip(query, key, other, strict=True):
        candidates = torch.stack([F.cosine_similarity(q, x, 0) for x in (k, *n)]) / 0.2
        expected.append(-candidates.log_softmax(0)[0])
    got = info_nce_loss(query, key, temperature=0.2, negatives=other, reduction="none")
    torch.testing.assert_close(got, torch.stack(expected))
    same = other[:1].expand(5, 4, 3)
    torch.testing.assert_close(
        info_nce_loss(query, key, negatives=same), info_nce_loss(query, key, negatives=other[0])
    )
    for wrong in (
        other[:4],
        other[:, :0],
        other[..., :2],
        other[0, 0],
        other[None],
        other[0, 0, 0],
    ):
        with pytest.raises(ValueError, match=r"shape \(M, 3\) or \(5, M, 3\), M >= 1, got"):
            info_nce_loss(query, key, negatives=wrong)


def test_info_nce_beyond_the_float_range() -> None:
    query = torch.randn(4, 3, generator=generator())
    with pytest.raises(ValueError, match="query and key must have finite inner products"):
        info_nce_loss(query * 1e30, query * 1e30, normalize=False)
    for small in (1e-45, torch.tensor(1e-45), torch.tensor(0.0).half()):
        with pytest.raises(ValueError, match="temperature must be positive and finite, at least"):
            info_nce_loss(query, query, temperature=small)
    assert info_nce_loss(query.double(), query.double(), temperature=1e-45).item() == 0
    for wrong in ("0.1", None, [0.1]):
        with pytest.raises(TypeError, match="temperature must be a number or a scalar tensor"):
            info_nce_loss(query, query, temperature=wrong)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_ids_of_any_integer_dtype(dtype: torch.dtype) -> None:
    """An index of uint8 would be read as a mask: of the right length, a wrong answer in silence."""
    noise = UnigramNoise([5, 1, 0, 2])
    ids = torch.tensor([0, 1, 1, 0])
    assert noise.log_prob(ids.to(dtype)).equal(noise.log_prob(ids))
    for architecture in ("cbow", "skipgram"):
        model = Word2Vec(4, 3, architecture, generator=generator())
        model.output_vectors.data.normal_(generator=generator())
        assert model(ids.to(dtype)).equal(model(ids))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int16, np.float16])
def test_counts_of_any_dtype(dtype: type) -> None:
    counts = np.array([3, 0, 1], dtype=dtype)
    counts.setflags(write=False)
    expected = torch.tensor([0.75, 0, 0.25], dtype=torch.float64)
    torch.testing.assert_close(UnigramNoise(counts, np.float32(1)).probs, expected)


@pytest.mark.parametrize(
    "counts", [None, "abc", ["a"], [1, None], {"a": 1}, iter([1]), Vocabulary(["a"])]
)
def test_counts_that_are_no_numbers(counts: object) -> None:
    with pytest.raises(TypeError, match=r"counts must be numbers \(V,\), got"):
        UnigramNoise(counts)


@pytest.mark.parametrize("shape", [2.5, (2.5,), None, True, "3", torch.tensor(3)])
def test_sample_shapes_that_are_no_integers(shape: object) -> None:
    with pytest.raises(TypeError, match="shape must be an integer or a tuple of integers, got"):
        UnigramNoise([1, 2]).sample(shape)
    assert UnigramNoise([1, 2]).sample(np.int64(3)).shape == (3,)
    assert UnigramNoise([1, 2]).sample(torch.Size([2, 3])).shape == (2, 3)


def test_vocabulary_bad_types() -> None:
    for count in (1.5, "x", None):
        with pytest.raises(TypeError, match=r"counts must be integers, got .* for 'a'"):
            Vocabulary({"a": count})
    assert Vocabulary({"a": np.int64(3)}).counts.tolist() == [3]
    with pytest.raises(TypeError, match="sentences must hold words, got None"):
        Vocabulary.from_sentences([["a", None]], min_count=1)
    for ids in ([0.5], torch.tensor([0.0]), torch.tensor([[0]])):
        with pytest.raises(TypeError, match=r"ids must be integers \(T,\), got"):
            Vocabulary(["a"]).decode(ids)


@pytest.mark.parametrize("architecture", ["cbow", "skipgram"])
def test_a_window_wider_than_any_sentence_costs_nothing(architecture: str) -> None:
    """The band of a window of 100,000 words would fill gigabytes with zeros."""
    models = [Word2Vec(5, 4, architecture, generator=generator()) for _ in range(2)]
    for model, window in zip(models, (3, 100_000), strict=True):
        model.fit([[0, 1, 2, 3], [4, 0]], window=window, generator=generator())
    assert models[0].vectors.equal(models[1].vectors)


@pytest.mark.parametrize("architecture", ["cbow", "skipgram"])
def test_training_is_not_reached_by_autocast(architecture: str) -> None:
    models = [Word2Vec(30, 4, architecture, generator=generator()) for _ in range(2)]
    losses = models[0].fit(topics(), epochs=2, generator=generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert models[1].fit(topics(), epochs=2, generator=generator()) == losses
    assert models[0].vectors.equal(models[1].vectors)


def test_word2vec_bad_types() -> None:
    model = Word2Vec(5, 2, generator=generator())
    for sentences in (torch.tensor([0, 1]), [torch.tensor(3)], [(i for i in [0, 1])]):
        with pytest.raises(TypeError, match="sentences must be sequences of word ids, got"):
            model.fit(sentences)
    with pytest.raises(TypeError, match="integer word ids, got nested sequences"):
        model.fit([[[0, 1], [2]]])
    with pytest.raises(ValueError, match=r"ids must have shape \(\.\.\., C\), the neighbours"):
        model(torch.tensor(1))
    with pytest.raises(TypeError, match="exclude must hold word ids, got 'a'"):
        model.most_similar(0, 1, exclude=["a"])
    assert model.most_similar(np.int64(0), 1, exclude=torch.tensor([1, 2, 3]))[0].tolist() == [4]
    assert len(model.fit([[0, 1]], learning_rate=np.float32(0.1), epochs=1)) == 1
    one = model.fit([[0, 1, 2]], window=np.int32(2), negatives=np.int8(100), generator=generator())
    model.reset_parameters()
    assert len(one) == 5
    for wrong in (2, None, torch.tensor(2)):
        with pytest.raises(TypeError, match="exclude must be a sequence of word ids, got"):
            model.most_similar(0, 1, exclude=wrong)


def test_errors_show_the_first_bad_value() -> None:
    args = scores(dtype=torch.float32)
    args[1][1, 2] = args[1][3, 0] = math.inf
    with pytest.raises(ValueError, match=r"plus infinity, got inf at index \(1, 2\) and 1 more$"):
        nce_loss(*args)
    query = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"at least 1\.2e-38, got -0\.5$"):
        info_nce_loss(query, query, temperature=torch.tensor(-0.5))
    with pytest.raises(ValueError, match=r"no direction, got one that breaks this at index 2$"):
        info_nce_loss(torch.tensor([[1.0], [1], [0]]), torch.ones(3, 1))


@pytest.mark.parametrize("architecture", ["cbow", "skipgram"])
@pytest.mark.parametrize("batch_size", [None, 64])
def test_fit_is_adagrad_over_batches_of_the_text(architecture: str, batch_size: int | None) -> None:
    """The whole of fit in float64, with the same draws: windows, batches, padding, mean loss."""
    g = generator(6)
    size, dim, window, k, rate = 9, 4, 3, 2, 0.3
    lengths = [0, 1, 2, 50, 7, 90, 2]
    sentences = [torch.randint(size, (n,), generator=g) for n in lengths]
    flat = torch.cat(sentences)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()
    model = Word2Vec(size, dim, architecture, generator=g).double()
    model.output_vectors.data.normal_(generator=g)
    tables = [model.input_vectors.detach().clone(), model.output_vectors.detach().clone()]
    squares = torch.zeros(2, size, dtype=torch.float64)
    losses = model.fit(
        sentences,
        epochs=2,
        window=window,
        negatives=k,
        learning_rate=rate,
        batch_size=batch_size,
        generator=generator(8),
    )
    g, noise, expected = generator(8), UnigramNoise(flat.bincount(minlength=size)), []
    batches = list(zip(flat.split(batch_size or 256), owner.split(batch_size or 256), strict=True))
    for _ in range(2):
        total, terms = 0.0, 0
        for number in torch.randperm(len(batches), generator=g).tolist():
            text = Text(*batches[number])
            drawn = noise.sample((math.ceil(len(text) / NOISE_BLOCK), 32), g)
            leaves = [table.clone().requires_grad_() for table in tables]
            loss, n = direct_loss(architecture, *leaves, text, drawn, window, k / 32)
            total, terms = total + loss.item(), terms + n
            for table, past, gradient in zip(
                tables, squares, torch.autograd.grad(loss, leaves), strict=True
            ):
                past += gradient.square().mean(1)
                table -= rate * gradient / (past.sqrt() + 1e-10).unsqueeze(1)
        expected.append(total / terms)
    assert losses == pytest.approx(expected, rel=1e-12)
    for got, table in zip((model.input_vectors, model.output_vectors), tables, strict=True):
        torch.testing.assert_close(got.detach(), table, rtol=1e-11, atol=1e-12)


def test_subsampling_keeps_the_stated_share() -> None:
    counts = [60_000, 20_000, 4_000, 300]
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    text = Text(ids, torch.zeros(len(ids), dtype=torch.int32))
    kept = text.subsampled(0.01, generator()).ids.bincount(minlength=4).tolist()
    for n, seen in zip(counts, kept, strict=True):
        share = n / sum(counts)
        keep = min(1.0, math.sqrt(0.01 / share) + 0.01 / share)
        assert abs(seen - n * keep) <= 4 * math.sqrt(n * keep * (1 - keep))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e25, 1e37])
def test_directions_do_not_depend_on_length(scale: float) -> None:
    """Squares of such entries leave float32: cosines of 0 would rank by chance."""
    model = Word2Vec(12, 5, generator=generator())
    unscaled, cosines = model.most_similar(3, 4)
    query = model.vectors[3].double() * scale
    model.input_vectors.data *= scale
    for got in (model.most_similar(3, 4), model.most_similar(query, 4, exclude=[3])):
        assert got[0].equal(unscaled)
        torch.testing.assert_close(got[1], cosines, rtol=0.02 if scale < 1e-40 else 1e-5, atol=0)


def test_similarities_are_in_float32_at_least() -> None:
    model = Word2Vec(30, 8, generator=generator())
    ids, cosines = model.most_similar(0, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model.most_similar(0, 5)
    assert got[0].equal(ids)
    assert got[1].equal(cosines)
    half = model.half()
    exact = F.cosine_similarity(half.vectors[ids].double(), half.vectors[:1].double())
    assert half.most_similar(0, 5)[1].dtype == torch.float32
    torch.testing.assert_close(half.most_similar(0, 5)[1].double(), exact, rtol=1e-6, atol=1e-6)


def test_a_vector_that_is_not_finite_is_nobodys_neighbour() -> None:
    """NaN sorts above every cosine."""
    model = Word2Vec(5, 3, generator=generator())
    model.input_vectors.data[3, 1] = math.nan
    with pytest.raises(
        ValueError, match=r"input_vectors must be finite, got nan at index \(3, 1\)"
    ):
        model.most_similar(0, 2)


def test_masked_neighbours_are_not_read() -> None:
    model = Word2Vec(6, 3, generator=generator())
    model.output_vectors.data.normal_(generator=generator())
    ids, mask = torch.tensor([[0, 1, 5]]), torch.tensor([[True, True, False]])
    expected = model(ids[:, :2])
    model.input_vectors.data[5] = math.nan
    got = model(ids, mask)
    assert got.equal(expected)
    got.sum().backward()
    assert model.input_vectors.grad.isfinite().all()


def test_training_is_not_reached_by_the_default_device() -> None:
    text, settings = topics(50), {"epochs": 2, "subsample": 0.1}
    models = [Word2Vec(30, 4, generator=generator()) for _ in range(2)]
    losses = models[0].fit(text, generator=generator(), **settings)
    with torch.device("meta"):
        assert models[1].fit(text, generator=generator(), **settings) == losses
        assert Word2Vec(30, 4, generator=generator()).vectors.is_meta
    assert models[0].vectors.equal(models[1].vectors)


def test_lists_of_counts_keep_their_precision() -> None:
    """In float32 the first would be 0, never drawn, and in int64 the last an error."""
    for counts in ([1e-60, 3e-60], [0.1, 0.3], [1e300, 3e300], [2**70, 3 * 2**70]):
        noise = UnigramNoise(counts, 1.0)
        expected = torch.tensor([0.25, 0.75], dtype=torch.float64)
        torch.testing.assert_close(noise.probs, expected, rtol=1e-13, atol=0)
        assert noise.log_prob(torch.tensor([0])).dtype == torch.float32


def test_noise_of_an_enormous_power() -> None:
    """The law tends to one on the most frequent words, by halves where two are."""
    noise = UnigramNoise([7, 1000, 3, 1000, 0], 1e308)
    assert noise.probs.tolist() == [0, 0.5, 0, 0.5, 0]
    assert set(noise.sample(50, generator()).tolist()) == {1, 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_vectors_have_finite_gradients(dtype: torch.dtype) -> None:
    """Where values cannot be checked a zero vector must not spoil the rest of the batch."""
    query = torch.randn(3, 2, generator=generator(), dtype=dtype)
    query[1] = 0
    query.requires_grad_()
    loss = info_nce_loss(query, torch.eye(2, dtype=dtype)[[0, 1, 1]], validate_args=False)
    (gradient,) = torch.autograd.grad(loss, query)
    assert gradient.isfinite().all()


def test_vocabulary_takes_each_sentence_for_words() -> None:
    for wrong in (None, 3):
        with pytest.raises(TypeError, match="not iterable"):
            Vocabulary.from_sentences([["a"], wrong], min_count=1)
    seen = Vocabulary.from_sentences([{"a": 7, "b": 2}, ["a"]], min_count=1)
    assert seen.counts.tolist() == [2, 1]
    vocabulary = Vocabulary(["a", "b"])
    with pytest.raises(TypeError, match=r"ids must be integers \(T,\), got True"):
        vocabulary.decode(torch.tensor([True, False]))
    for single in (1, torch.tensor(1)):
        with pytest.raises(TypeError, match=r"ids must be integers \(T,\), got the single 1"):
            vocabulary.decode(single)
