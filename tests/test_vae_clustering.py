"""lib.vae_clustering against enumeration over clusters, quadrature over z and scikit-learn."""

from __future__ import annotations

import copy
import io
import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, Normal

from lib.vae import VAE
from lib.vae_clustering import ClusterVAE, cluster_accuracy, purity


class Halves(nn.Linear):
    def forward(self, x):
        return super().forward(x).chunk(2, -1)


def cluster_vae(latent=3, clusters=4, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    model = ClusterVAE(
        Halves(5, 2 * latent), nn.Linear(latent, 5), latent, num_clusters=clusters, **options
    )
    with torch.no_grad():
        model.means.normal_()
    return model.to(dtype)


def images(n=6, seed=1):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("classifier", ["network", "bayes"])
@pytest.mark.parametrize("seed", range(3))
def test_the_three_terms_are_the_joint_kl_summed_over_clusters(classifier, seed):
    model, x = cluster_vae(seed=seed, classifier=classifier), images(seed=seed)
    bound = model.elbo(x, generator=torch.Generator().manual_seed(9))
    posterior = model.encode(x)
    noise = torch.randn(6, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    z = posterior.mean + posterior.stddev * noise
    p = model.log_classes(z).exp()
    total = torch.zeros(6, dtype=torch.float64)
    for y in range(4):
        log_joint_q = (
            Normal(model.means[y], 1.0).log_prob(z).sum(1)
            - math.log(4)
            + model.decode(z).log_prob(x)
        )
        total += p[:, y] * (log_joint_q - posterior.log_prob(z) - p[:, y].log())
    torch.testing.assert_close(bound.value, total)
    torch.testing.assert_close(bound.value, bound.reconstruction - bound.alignment - bound.balance)


def test_the_bayes_rule_is_the_posterior_of_the_mixture():
    model = cluster_vae(classifier="bayes")
    z = images()[:, :3]
    mixture = torch.stack([Normal(m, 1.0).log_prob(z).sum(1) for m in model.means], 1).exp()
    torch.testing.assert_close(
        model.log_classes(z).exp(), mixture / mixture.sum(1, keepdim=True), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("seed", range(3))
def test_no_classifier_beats_the_bayes_rule_and_there_the_sum_over_clusters_collapses(seed):
    bayes, x = cluster_vae(seed=seed, classifier="bayes"), images()
    draws = torch.Generator()
    best = bayes.elbo(x, generator=draws.manual_seed(2))
    posterior = bayes.encode(x)
    noise = torch.randn(6, 3, generator=draws.manual_seed(2), dtype=torch.float64)
    z = posterior.mean + posterior.stddev * noise
    mixture = MixtureSameFamily(
        Categorical(torch.ones(4, dtype=torch.float64)),
        torch.distributions.Independent(Normal(bayes.means, torch.ones_like(bayes.means)), 1),
    )
    torch.testing.assert_close(
        best.alignment + best.balance,
        posterior.log_prob(z) - mixture.log_prob(z),
        rtol=1e-12,
        atol=1e-12,
    )
    torch.testing.assert_close(bayes.log_prior(z), mixture.log_prob(z))
    for other in range(5):
        network = cluster_vae(seed=other, classifier="network")
        network.load_state_dict({**network.state_dict(), **bayes.state_dict()}, strict=True)
        worse = network.elbo(x, generator=draws.manual_seed(2))
        assert (worse.value < best.value + 1e-12).all()


def test_balance_is_mutual_information_plus_the_divergence_of_the_mean():
    model, x = cluster_vae(), images(50)
    generator = torch.Generator().manual_seed(3)
    balance = model.elbo(x, generator=generator).balance.mean()
    posterior = model.encode(x)
    noise = torch.randn(50, 3, generator=generator.manual_seed(3), dtype=torch.float64)
    p = model.log_classes(posterior.mean + posterior.stddev * noise).exp()
    mean = p.mean(0)
    information = (p * (p / mean).log()).sum(1).mean()
    torch.testing.assert_close(balance, information + (mean * (4 * mean).log()).sum())


def test_the_bound_is_below_the_quadrature_of_p_x():
    model, x = cluster_vae(latent=1, classifier="bayes", variance=0.5), images(3)
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    log_joint = model.decode(z[:, None]).log_prob(x) + model.log_prior(z)[:, None]
    exact = (log_joint.exp() * (z[1] - z[0])).sum(0).log()
    bound = model.elbo(x, num_samples=4000).value
    assert (bound < exact + 0.1).all()
    tight = model.iwae_bound(x, 20_000, generator=torch.Generator().manual_seed(0))
    assert (tight - exact).abs().max() < 0.1
    prior = model.prior_bound(x, 200_000, generator=torch.Generator().manual_seed(0))
    assert (prior - exact).abs().max() < 0.1


def test_confident_classes_do_not_become_nan():
    model = cluster_vae(classifier="bayes")
    with torch.no_grad():
        model.means.mul_(1e3)
    bound = model.elbo(images())
    (-bound.value.mean()).backward()
    assert bound.value.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_predictions_are_the_classifier_at_the_encoder_s_mean():
    model, x = cluster_vae(), images()
    proba = model.predict_proba(x)
    torch.testing.assert_close(proba.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(proba, model.log_classes(model.encode(x).mean).exp())
    assert model.predict(x).equal(proba.argmax(1))
    assert model.predict(x).dtype == torch.long


def test_samples_come_from_the_cluster_that_was_asked_for():
    model = cluster_vae(latent=2, clusters=3)
    with torch.no_grad():
        model.means.copy_(torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, -80.0]]))
    model.decoder = nn.Identity()
    draws = torch.Generator().manual_seed(0)
    for y in range(3):
        z = model.sample(4000, cluster=y, generator=draws)
        torch.testing.assert_close(z.mean(0), model.means[y].detach(), atol=0.08, rtol=0)
        torch.testing.assert_close(z.var(0), torch.ones(2, dtype=torch.float64), atol=0.1, rtol=0)
    z = model.sample(3000, generator=draws)
    nearest = torch.cdist(z, model.means).argmin(1).bincount(minlength=3)
    assert (nearest - 1000).abs().max() < 4 * math.sqrt(3000 * 2 / 9)


def test_state_dict_names():
    names = set(cluster_vae().state_dict()) - {
        f"{net}.{kind}" for net in ("encoder", "decoder") for kind in ("weight", "bias")
    }
    assert names == {"means"} | {f"classifier.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")}
    assert "classifier.0.weight" not in cluster_vae(classifier="bayes").state_dict()
    assert "num_clusters=4" in repr(cluster_vae())


def test_a_module_can_be_the_classifier():
    model = cluster_vae(classifier=nn.Linear(3, 4))
    assert model.elbo(images()).value.shape == (6,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_bound_in_float32(dtype):
    model, x = cluster_vae(dtype=torch.float32), images().float()
    exact = model.elbo(x, generator=torch.Generator().manual_seed(1)).value
    with torch.autocast("cpu", dtype=dtype):
        value = model.elbo(x, generator=torch.Generator().manual_seed(1)).value
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=0.05, atol=0.3)


def _by_enumeration(labels, clusters):
    names, groups = np.unique(labels), np.unique(clusters)
    size = max(len(names), len(groups))
    return max(
        np.mean([perm[np.searchsorted(groups, c)] == np.searchsorted(names, v)
                 for v, c in zip(labels, clusters, strict=True)])
        for perm in permutations(range(size))
    )  # fmt: skip


@pytest.mark.parametrize(("num_labels", "num_clusters"), [(3, 3), (4, 2), (2, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_scores_against_enumeration_and_scikit_learn(num_labels, num_clusters, seed):
    rng = np.random.default_rng(seed)
    labels, clusters = rng.integers(num_labels, size=31), rng.integers(num_clusters, size=31)
    assert cluster_accuracy(labels, clusters) == pytest.approx(_by_enumeration(labels, clusters))
    contingency = pytest.importorskip("sklearn.metrics.cluster").contingency_matrix
    expected = contingency(labels, clusters).max(0).sum() / 31
    assert purity(labels, torch.tensor(clusters)) == pytest.approx(expected)
    assert purity(labels, clusters) >= cluster_accuracy(labels, clusters)


def test_scores_do_not_depend_on_names():
    labels, clusters = [3, 3, 9, 9, 9, 1], [100, 100, -5, -5, 100, 7]
    assert cluster_accuracy(labels, clusters) == pytest.approx(5 / 6)
    assert cluster_accuracy([0, 0, 1, 1, 1, 2], [2, 2, 0, 0, 2, 1]) == pytest.approx(5 / 6)
    assert purity(labels, [0, 1, 2, 3, 4, 5]) == 1.0


@pytest.mark.parametrize("score", [cluster_accuracy, purity])
@pytest.mark.parametrize(
    ("labels", "clusters", "message"),
    [
        ([0, 1], [0], "same length, got 2 and 1"),
        ([], [], r"labels must be integers of shape \(N,\)"),
        ([0.5, 1.0], [0, 1], "labels must be integers"),
        ([0, None], [0, 1], "labels must be integers .* got object"),
        (torch.zeros(2, dtype=torch.bfloat16), [0, 1], "labels must be integers"),
        (1, [0], r"labels must be integers .* of shape \(\)"),
        ([0, 1], [[0], [1]], r"clusters must be integers .* of shape \(2, 1\)"),
    ],
)
def test_bad_scores_are_refused(score, labels, clusters, message):
    with pytest.raises(ValueError, match=message):
        score(labels, clusters)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="num_clusters must be at least 1, got 0"):
        cluster_vae(clusters=0)
    with pytest.raises(ValueError, match="'tree'"):
        cluster_vae(classifier="tree")
    with pytest.raises(ValueError, match=r"cluster must be in \[0, 4\), got 4"):
        cluster_vae().sample(3, cluster=4)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        cluster_vae().sample(0)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        cluster_vae().elbo(images(), num_samples=0)


class Says(nn.Module):
    """A classifier with the same answer to every code."""

    def __init__(self, *logits, dtype):
        super().__init__()
        self.logits = torch.tensor(logits, dtype=dtype)

    def forward(self, z):
        return self.logits.expand(len(z), -1)


@pytest.mark.parametrize(
    "classifier",
    [
        Says(3e38, 0.0, -3e38, 1.0, dtype=torch.float32),  # the difference overflows
        Says(1e39, 0.0, 0.0, 0.0, dtype=torch.float64),  # float32 does not reach there
    ],
)
def test_logits_beyond_the_precision_are_refused_not_nan(classifier):
    model = cluster_vae(classifier=classifier, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"logits .* not finite in torch\.float32"):
        model.elbo(images().float())
    wide = cluster_vae(
        classifier=Says(1e30, 0.0, -1e30, 1.0, dtype=torch.float32), dtype=torch.float32
    )
    assert all(part.isfinite().all() for part in wide.elbo(images().float()))


def _nan_logits(shape):
    return nn.Sequential(nn.Linear(*shape), nn.Threshold(math.inf, math.nan)).double()


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        (nn.Linear(3, 7), r"classifier must return .* \(6, 4\), got \(6, 7\)"),
        (nn.Linear(3, 1), r"classifier must return .* got \(6, 1\)"),
        (nn.Unflatten(1, (1, 3)), r"classifier must return .* got \(6, 1, 3\)"),
        (_nan_logits((3, 4)), "classifier returned logits that are not finite"),
        (nn.Flatten(0), r"classifier must return .* got \(18,\)"),
    ],
)
def test_a_classifier_that_misbehaves_is_refused(classifier, message):
    with pytest.raises(ValueError, match=message):
        cluster_vae(classifier=classifier).elbo(images())


@pytest.mark.parametrize("method", ["log_classes", "log_prior"])
@pytest.mark.parametrize("classifier", ["network", "bayes"])
def test_codes_of_another_width_are_refused_not_broadcast(method, classifier):
    ask = getattr(cluster_vae(classifier=classifier), method)
    for shape in ((6, 1), (6, 2), (6, 4), ()):
        with pytest.raises(ValueError, match=r"z must have shape \(\.\.\., 3\), got"):
            ask(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"z must be a floating-point tensor, got torch\.int64"):
        ask(torch.zeros(6, 3, dtype=torch.long))


@pytest.mark.parametrize("method", ["elbo", "predict", "predict_proba", "reconstruct"])
def test_bad_pictures_are_refused(method):
    x = images()
    ask = getattr(cluster_vae(), method)
    with pytest.raises(ValueError, match="x must be finite, got NaN"):
        ask(x * torch.tensor(math.nan))
    with pytest.raises(ValueError, match=r"x must have shape \(B, \*event\), got \(5,\)"):
        ask(x[0])
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch\.int64"):
        ask(x.long())
    bernoulli = getattr(cluster_vae(likelihood="bernoulli"), method)
    with pytest.raises(ValueError, match=r"x must lie in \[0, 1\] under a Bernoulli"):
        bernoulli(1.01 * x.clamp(0, 1))


@pytest.mark.parametrize("classifier", ["network", "bayes"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_means_that_diverged_are_named(classifier, value):
    model = cluster_vae(classifier=classifier)
    model.means.data[2, 1] = value
    with pytest.raises(
        ValueError, match=r"means must be finite, .* squared .* finite in torch\.fl"
    ):
        model.elbo(images())
    with pytest.raises(ValueError, match="means must be finite"):
        model.log_prior(images()[:, :3])


@pytest.mark.parametrize("kind", [np.int64, np.uint8, int])
def test_a_cluster_may_be_an_integer_of_numpy(kind):
    model = cluster_vae()
    draws = (model.sample(2, k, generator=torch.Generator().manual_seed(1)) for k in (kind(3), 3))
    torch.testing.assert_close(*draws, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"cluster must be in \[0, 4\), got 4"):
        model.sample(2, cluster=kind(4))


@pytest.mark.parametrize("cluster", [1.0, True, np.True_, torch.tensor(1), "1"])
def test_a_cluster_that_is_no_integer_is_refused(cluster):
    with pytest.raises(TypeError, match="cluster must be an integer, got"):
        cluster_vae().sample(2, cluster=cluster)
    with pytest.raises(ValueError, match=r"cluster must be in \[0, 4\), got -1"):
        cluster_vae().sample(2, cluster=-1)


def test_models_trained_side_by_side_are_those_trained_alone():
    from lib.reproduce.clustering import train_together

    x = torch.randn(23, 4, generator=torch.Generator().manual_seed(5))

    def loss(model, batch):
        return (model(batch) - batch.sum(1, keepdim=True)).square().mean()

    def models():
        torch.manual_seed(1)
        return [nn.Linear(4, 1) for _ in range(3)]

    together, alone = models(), models()
    train_together(together, loss, x, steps=8, batch_size=10, learning_rate=0.1, seed=2)
    torch.manual_seed(2)
    orders = torch.stack([torch.randperm(23) for _ in range(3)], 1)
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.1) for model in alone]
    for _ in range(4):  # passes: ceil(8 * 10 / 23)
        for rows in orders[torch.randperm(23)].split(10):
            for model, optimizer, row in zip(alone, optimizers, rows.T, strict=True):
                optimizer.zero_grad()
                loss(model, x[row]).backward()
                optimizer.step()
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)
    assert not together[0].weight.equal(together[1].weight)


def test_the_terms_of_the_bound_against_quadrature_and_enumeration():
    """One latent unit, three clusters: E over z by a Riemann sum, over y by adding up."""
    model = cluster_vae(latent=1, clusters=3, variance=0.7)
    x, draws = images(4), torch.Generator().manual_seed(0)
    parts = torch.stack(
        [torch.stack(model.elbo(x, num_samples=100, generator=draws)) for _ in range(300)]
    ).detach()
    mean, log_var = (t.detach() for t in model.encoder(x))
    t = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    z = mean + (log_var / 2).exp() * t[:, None, None]  # (T, B, 1)
    weight = (-t.square() / 2).exp()[:, None] * (t[1] - t[0]) / math.sqrt(2 * math.pi)
    q_y = model.classifier(z).softmax(-1)
    log_q = Normal(mean, (log_var / 2).exp()).log_prob(z)
    far = log_q - Normal(model.means[:, 0], 1.0).log_prob(z)  # (T, B, K)
    log_x = Normal(model.decoder(z), 0.7**0.5).log_prob(x).sum(-1)
    exact = [log_x, (q_y * far).sum(-1), (q_y * (3 * q_y).log()).sum(-1)]
    exact = torch.stack([(weight * part).sum(0) for part in exact]).detach()
    error = parts[:, 1:].std(0) / len(parts) ** 0.5
    assert ((parts[:, 1:].mean(0) - exact).abs() < 4.5 * error + 1e-9).all()
    assert error.max() < 0.05


@pytest.mark.parametrize("classifier", ["network", "bayes", "module"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_an_empty_batch_has_empty_answers(classifier, likelihood):
    classifier = nn.Linear(3, 4) if classifier == "module" else classifier
    model = cluster_vae(classifier=classifier, likelihood=likelihood)
    x = images(6)[:0]
    assert all(part.shape == (0,) for part in model.elbo(x, num_samples=2))
    assert model.iwae_bound(x, 3, chunk_size=2).shape == model.prior_bound(x, 3).shape == (0,)
    assert model.predict(x).shape == (0,)
    assert model.predict(x).dtype == torch.long
    assert model.predict_proba(x).shape == (0, 4)
    assert model.reconstruct(x).shape == (0, 5)
    model.elbo(x).value.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("classifier", ["network", "bayes"])
def test_compiles_whole_and_maps(classifier):
    model, x = cluster_vae(classifier=classifier), images()
    for ask in (model.predict_proba, model.reconstruct):
        compiled = torch.compile(ask, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), ask(x))
    for ask in (
        lambda x: model(x).value,
        lambda x: model.iwae_bound(x, 3),
        lambda x: model.prior_bound(x, 3),
    ):
        compiled = torch.compile(ask, fullgraph=True, backend="eager")
        for batch in (x[:3], x[:2]):  # from the second size on, sizes are symbols
            assert len(compiled(batch)) == len(ask(batch))
        torch.manual_seed(1)
        expected = ask(x)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(x), expected)
        rows = torch.func.vmap(lambda row, ask=ask: ask(row[None])[0], randomness="different")(x)
        assert rows.shape == (6,)
        assert rows.isfinite().all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classifier", ["network", "bayes"])
def test_half_parameters_cost_precision_of_the_networks_alone(half, classifier):
    model = cluster_vae(dtype=torch.float32, classifier=classifier)
    x = images().to(half)
    small = copy.deepcopy(model).to(half)
    exact = model.elbo(x.float(), generator=torch.Generator().manual_seed(1))
    for given in (x, x.float()):
        bound = small.elbo(given, generator=torch.Generator().manual_seed(1))
        for found, expected in zip(bound, exact, strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=0.03, atol=0.05)
    assert small.sample(2).dtype == small.predict_proba(x).dtype == torch.float32
    assert small.iwae_bound(x, 2).dtype == small.prior_bound(x, 2).dtype == torch.float32


def test_checkpoints_give_the_same_bound():
    model, x = cluster_vae(variance="learned"), images()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = cluster_vae(seed=5, variance="learned")
    loaded.load_state_dict(torch.load(file), strict=True)
    for other in (loaded, copy.deepcopy(model)):
        ours, theirs = (
            m.elbo(x, generator=torch.Generator().manual_seed(1)) for m in (model, other)
        )
        assert ours.value.equal(theirs.value)


@pytest.mark.parametrize("classifier", ["network", "bayes"])
def test_one_cluster_at_the_origin_is_a_vae(classifier):
    """K = 1: balance is nought and alignment the sampled divergence from N(0, I)."""
    model, x = cluster_vae(clusters=1, classifier=classifier), images()
    nn.init.zeros_(model.means)
    bound = model.elbo(x, num_samples=3, generator=torch.Generator().manual_seed(1))
    plain = VAE(model.encoder, model.decoder, 3, likelihood="gaussian")
    expected = plain.elbo(
        x, num_samples=3, analytic_kl=False, generator=torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(bound.alignment, expected.kl)
    torch.testing.assert_close(bound.reconstruction, expected.reconstruction)
    torch.testing.assert_close(bound.value, expected.value)
    assert (bound.balance == 0).all()


@pytest.mark.parametrize("method", ["decode", "log_prior", "log_classes"])
@pytest.mark.parametrize("classifier", ["network", "bayes"])
def test_codes_that_are_not_finite_are_refused(method, classifier):
    z = images()[:, :3]
    z[1, 2] = math.nan
    with pytest.raises(ValueError, match="z must be finite, got NaN or infinite values"):
        getattr(cluster_vae(classifier=classifier), method)(z)


def test_samples_that_are_not_finite_are_refused():
    model = cluster_vae()
    model.decoder.bias.data[1] = math.nan
    for cluster in (None, 2):
        with pytest.raises(ValueError, match="decoder returned values that are NaN or infinite"):
            model.sample(3, cluster=cluster)


def test_a_classifier_that_returns_no_tensor_is_refused():
    class Pair(nn.Module):
        def forward(self, z):
            return z, z

    with pytest.raises(TypeError, match=r"classifier output must be .* got tuple"):
        cluster_vae(classifier=Pair()).elbo(images())
    with pytest.raises(ValueError, match=r'"bayes" or a module, got <function'):
        cluster_vae(classifier=lambda z: z)


def test_a_cluster_without_members_is_never_predicted_and_can_still_be_drawn():
    model, x = cluster_vae(classifier="bayes"), images(50)
    model.means.data[2] = 1e4
    assert 2 not in model.predict(x)
    assert (model.predict_proba(x)[:, 2] == 0).all()
    bound = model.elbo(x)
    (-bound.value.mean()).backward()
    assert (model.means.grad[2] == 0).all()
    assert model.sample(3, cluster=2).shape == (3, 5)


def _best_naming(labels, clusters, one_to_one):
    """The best accuracy over all maps from clusters to labels, or to nothing."""
    names, groups = sorted(set(labels)), sorted(set(clusters))
    best = 0.0
    for naming in product([*names, None], repeat=len(groups)):
        used = [name for name in naming if name is not None]
        if one_to_one and len(used) != len(set(used)):
            continue
        name = dict(zip(groups, naming, strict=True))
        right = [name[c] == v for v, c in zip(labels, clusters, strict=True)]
        best = max(best, sum(right) / len(right))
    return best


@pytest.mark.parametrize(
    ("labels", "clusters"),
    [
        ([5], [-3]),
        ([0, 1, 2, 3], [7, 7, 7, 7]),
        ([2, 2, 2, 2], [0, 1, 2, 3]),
        ([0, 0, 1, 1, 2, 2, 2], [4, 9, 4, 9, 9, 4, 4]),
        ([10**12, -1, -1, 10**12, 3], [0, 0, 5, 5, 5]),
        (["cat", "dog", "cat", "emu"], [1, 0, 1, 0]),
        ([True, False, False, True, True], [3, 1, 1, 1, 3]),
        ([0, 1, 1, 2, 2, 2], ["a", "b", "b", "b", "c", "c"]),
    ],
)
def test_scores_of_names_that_are_not_counted_from_nought(labels, clusters):
    accuracy = _best_naming(labels, clusters, one_to_one=True)
    pure = _best_naming(labels, clusters, one_to_one=False)
    forms = [lambda v: v, np.array, tuple]
    if not isinstance(labels[0], str) and not isinstance(clusters[0], str):
        forms.append(torch.tensor)
    for form in forms:
        assert cluster_accuracy(form(labels), form(clusters)) == pytest.approx(accuracy)
        assert purity(form(labels), form(clusters)) == pytest.approx(pure)
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = np.array(labels)[order], np.array(clusters)[order]
    assert cluster_accuracy(*shuffled) == pytest.approx(accuracy)
    assert cluster_accuracy(clusters, labels) == pytest.approx(accuracy)  # it is symmetric


def test_scores_take_the_objects_that_pandas_keeps():
    words, clusters = np.array(["cat", "a longer word", "cat", "emu"], dtype=object), [4, 7, 4, 4]
    assert cluster_accuracy(words, clusters) == purity(clusters, words) - 0.25 == 0.75
    assert purity(np.array([5, 6, 5, 5], dtype=object), clusters) == 1
    assert cluster_accuracy(words.astype(np.dtypes.StringDType()), words) == 1


@pytest.mark.parametrize("score", [cluster_accuracy, purity])
@pytest.mark.parametrize("mixed", [[1, "1"], ("nan", math.nan), [b"1", 1]])
def test_a_number_is_not_the_word_for_it(score, mixed):
    for labels in (mixed, np.array(mixed, dtype=object)):
        with pytest.raises(ValueError, match="clusters must be all integers or all strings"):
            score([0, 1], labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_scores_take_integers_of_every_width(dtype):
    labels, clusters = torch.tensor([0, 1, 1, 2]), torch.tensor([2, 0, 0, 2])
    assert cluster_accuracy(labels.to(dtype), clusters.to(dtype)) == 0.75
    assert purity(labels.to(dtype), clusters.numpy().astype(np.uint64)) == 0.75


def test_draws_follow_their_generator():
    model, x = cluster_vae(), images()
    for draw in (
        lambda g: model.elbo(x, generator=g).value,
        lambda g: model.iwae_bound(x, 3, generator=g),
        lambda g: model.prior_bound(x, 3, generator=g),
        lambda g: model.sample(3, generator=g),
        lambda g: model.sample(3, cluster=1, generator=g),
    ):
        first, second = (draw(torch.Generator().manual_seed(5)) for _ in range(2))
        assert first.equal(second)
        assert not first.equal(draw(torch.Generator().manual_seed(6)))
