"""Full-size experiments: segmentation and its scores, the models, resuming after a kill."""

from __future__ import annotations

import copy
import itertools
import json
import random
import subprocess
import sys

import pytest
import torch

from lib.reproduce import full_result, save_result, train
from lib.reproduce.crf import MODELS, Segmenter, build, confidence, legality, optimizer, segment
from lib.reproduce.segmentation import (
    alphabet,
    encode,
    pieces,
    spans,
    tags_of,
    word_scores,
    words_of,
)

LETTERS = "abcdefgh"


def sentences(seed, count=9, longest=6):
    draw = random.Random(seed)

    def word():
        return "".join(draw.choices(LETTERS, k=draw.randint(1, 4)))

    return [[word() for _ in range(draw.randint(1, longest))] for _ in range(count)]


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(3)
    model = build(request.param, len(LETTERS), width=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


CHARACTERS = {letter: i for i, letter in enumerate(LETTERS, start=1)}


# Words and tags


@pytest.mark.parametrize("seed", range(3))
def test_tags_and_words_are_inverse(seed):
    for words in sentences(seed):
        assert words_of("".join(words), tags_of(words)) == words


def test_illegal_tags_are_cut_before_every_s_and_b():
    assert words_of("abcd", [2, 3, 3, 1]) == ["abc", "d"]


@pytest.mark.parametrize("longest", [1, 3, 5, 100])
def test_pieces_keep_the_words_and_the_length(longest):
    for words in sentences(1):
        cut = pieces([words], longest)
        assert list(itertools.chain(*cut)) == words
        assert all(len(piece) == 1 or sum(map(len, piece)) <= longest for piece in cut)


def test_rare_characters_and_padding_are_number_0():
    characters = alphabet([["ab", "a"], ["b", "c"]])
    ids, tags, mask = encode([["ab", "a"], ["c"]], characters)
    assert characters == {"a": 1, "b": 2}
    assert ids.tolist() == [[1, 2, 1], [0, 0, 0]]
    assert tags.tolist() == [[1, 3, 0], [0, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize("seed", range(4))
def test_scores_against_a_count_of_cut_positions(seed):
    draw, gold = random.Random(seed), sentences(seed)
    guess = [words_of("".join(w), draw.choices(range(4), k=sum(map(len, w)))) for w in gold]
    known = {word for words in gold[:4] for word in words}

    def placed(words):
        ends = list(itertools.accumulate(map(len, words)))
        return set(zip([0, *ends], ends, words, strict=False))

    hits = [placed(g) & placed(w) for g, w in zip(guess, gold, strict=True)]
    right = sum(map(len, hits))
    result = word_scores(gold, guess, known)
    assert result.precision == right / sum(map(len, guess))
    assert result.recall == right / sum(map(len, gold))
    assert result.f1 == pytest.approx(2 * right / sum(map(len, guess + gold)))
    unknown = [word for words in gold for word in words if word not in known]
    found = [word for hit in hits for *_, word in hit if word not in known]
    assert result.oov_recall == len(found) / len(unknown)


def test_a_perfect_segmentation_scores_1_throughout():
    gold = sentences(2)
    assert set(word_scores(gold, gold, known=[])) == {1.0}


# The models


def test_a_sentence_has_the_same_loss_in_every_batch(model):
    ids, tags, mask = encode(sentences(5), CHARACTERS)
    together = model(ids, tags, mask)
    for i, length in enumerate(mask.sum(1).tolist()):
        alone = model(ids[i : i + 1, :length], tags[i : i + 1, :length], mask[i : i + 1, :length])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)


def test_probabilities_of_all_sequences_sum_to_one(model):
    every = torch.tensor(list(itertools.product(range(4), repeat=4)))
    ids = torch.tensor([[3, 1, 0, 5]]).expand(len(every), -1)
    chain = model.distribution(ids, torch.ones_like(ids, dtype=torch.bool))
    assert chain.log_prob(every).double().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_an_memm_is_a_softmax_a_step():
    torch.manual_seed(4)
    model = Segmenter(len(LETTERS), "memm", width=6)
    ids, tags, mask = encode(sentences(6), CHARACTERS)
    h, head = model.emissions(ids, mask), model.head
    expected = []
    for i, length in enumerate(mask.sum(1).tolist()):
        loss = -(h[i, 0] + head.start_transitions).log_softmax(0)[tags[i, 0]]
        for t in range(1, length):
            step = (h[i, t] + head.transitions[tags[i, t - 1]]).log_softmax(0)
            loss = loss - step[tags[i, t]]
        expected.append(loss)
    torch.testing.assert_close(model(ids, tags, mask), torch.stack(expected))


def test_constrained_decoding_is_a_segmentation(model):
    gold = sentences(7)
    ids, _, mask = encode(gold, CHARACTERS)
    for words, path in zip(gold, model.distribution(ids, mask, True).mode.tolist(), strict=True):
        path = path[: sum(map(len, words))]
        assert tags_of(words_of("".join(words), path)) == path
    for words, cut in zip(gold, segment(model, gold, CHARACTERS, True), strict=True):
        assert "".join(cut) == "".join(words)


def test_legality_by_enumeration(model):
    gold = [["ab", "c"], ["d", "ef"]]
    mass, illegal = 0.0, 0
    for words in gold:
        every = torch.tensor(list(itertools.product(range(4), repeat=3)))
        ids, _, mask = encode([words], CHARACTERS)
        chain = model.distribution(ids.expand(64, -1), mask.expand(64, -1), False)
        law = chain.log_prob(every).exp()
        good = [tags_of(words_of("xyz", path)) == path for path in every.tolist()]
        mass += law[torch.tensor(good)].sum().item() / 2
        illegal += (not good[law.argmax()]) / 2
    found = legality(model, gold, CHARACTERS)
    assert found[0] == pytest.approx(mass, rel=1e-4)
    assert found[1] == illegal


@pytest.mark.parametrize("legal", [False, True])
def test_confidence_is_the_probability_of_a_span(model, legal):
    gold = [["ab", "cde", "f"]]
    probability, right = confidence(model, gold, CHARACTERS, legal)
    ids, _, mask = encode(gold, CHARACTERS)
    chain, best = model.distribution(ids, mask, legal), segment(model, gold, CHARACTERS, True)[0]
    tags = torch.tensor([tags_of(best)])
    expected = [
        chain.span_log_prob(start, tags[:, start:stop]).exp() for start, stop in sorted(spans(best))
    ]
    torch.testing.assert_close(probability, torch.cat(expected).detach(), rtol=1e-4, atol=1e-6)
    assert right.tolist() == [span in spans(gold[0]) for span in sorted(spans(best))]


def test_the_transitions_can_have_a_rate_of_their_own():
    model = build("CRF", 3, width=4)
    groups = optimizer(model, lr=1e-3, transition_lr=1e-2).param_groups
    head = {id(p) for p in model.head.parameters()}
    rates = {group["lr"]: {id(p) for p in group["params"]} for group in groups}
    assert rates[1e-2] == head
    assert rates[1e-3] == {id(p) for p in model.parameters()} - head


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match='kind must be "softmax", "memm" or "crf", got \'hmm\''):
        Segmenter(3, "hmm")


# Results and checkpoints


def test_a_result_is_replaced_whole(tmp_path):
    result = {"rows": [1], "protocol": {"full": True}}
    save_result("crf", result, tmp_path)
    with pytest.raises(ValueError, match="Out of range float"):
        save_result("crf", {"rows": [float("nan")]}, tmp_path)
    assert full_result("crf", tmp_path) == result
    assert [path.name for path in tmp_path.iterdir()] == ["crf.json"]


def test_a_trial_is_no_full_size_result(tmp_path):
    assert full_result("crf", tmp_path) is None
    save_result("crf", {"rows": [1], "protocol": {"full": False}}, tmp_path)
    assert full_result("crf", tmp_path) is None


class Line(torch.nn.Module):
    """A model with noise of its own, and a kill switch."""

    def __init__(self, patience=10**9):
        super().__init__()
        self.weight, self.patience = torch.nn.Parameter(torch.zeros(2)), patience

    def forward(self, x, y):
        self.patience -= 1
        if self.patience < 0:
            raise KeyboardInterrupt
        noise = 0.1 * torch.randn(len(x))
        return (x @ self.weight + noise - y).square()


def run(folder, line, lr=0.05, examples=23, slope=-2.0, **settings):
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    x = torch.randn(23, 2, generator=torch.Generator().manual_seed(1))[:examples]
    adam = torch.optim.Adam(line.parameters(), lr=lr)
    tensors = (x, x @ torch.tensor([1.0, slope]))
    settings = {"epochs": 4, "batch_size": 5, "seed": 7, "folder": folder} | settings
    return train(fabric, "line", line, adam, tensors, **settings)["losses"]


@pytest.mark.parametrize("lengths", [None, torch.arange(23) % 6])
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path, lengths):
    whole, killed = Line(), Line(patience=12)
    losses = run(tmp_path / "whole", whole, lengths=lengths)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", killed, lengths=lengths)
    again = Line()
    assert run(tmp_path / "killed", again, lengths=lengths) == losses
    assert torch.equal(again.weight, whole.weight)
    assert losses[-1] < losses[0]


class LazyLine(Line):
    """A model with as many parameters and another name."""

    def forward(self, x, y):
        return 0.5 * super().forward(x, y)


@pytest.mark.parametrize(
    "other",
    [
        {"epochs": 2},
        {"epochs": 5},
        {"batch_size": 6},
        {"seed": 8},
        {"lr": 0.1},
        {"examples": 9},
        {"slope": -3.0},
        {"lengths": torch.arange(23) % 6},
        {"line": LazyLine()},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_checkpoint_is_not_taken_for_another_runs(tmp_path, other):
    first = run(tmp_path / "shared", Line())
    line, settings = other.get("line", Line()), {k: v for k, v in other.items() if k != "line"}
    fresh = run(tmp_path / "alone", copy.deepcopy(line), **settings)
    assert run(tmp_path / "shared", line, **settings) == fresh != first
    assert run(tmp_path / "shared", Line()) == first  # and has not been written over


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    line = Line()
    line.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="line: the loss is nan in epoch 1"):
        run(tmp_path, line)
    assert not list(tmp_path.glob("*.pt"))


def test_the_command_trains_scores_and_writes(tmp_path, monkeypatch):
    pytest.importorskip("lightning_fabric")
    monkeypatch.setenv("LIB_DATA", str(tmp_path / "none"))
    monkeypatch.setenv("LIB_DATA_OFFLINE", "1")
    monkeypatch.setenv("LIB_DATA_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "lib.reproduce", "crf", "--seeds", "1", "--epochs", "1"]
    command += ["--examples", "40", "--accelerator", "cpu"]
    command += ["--checkpoints", str(tmp_path), "--results", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    result = json.loads((tmp_path / "crf.json").read_text())
    assert result["protocol"]["full"] is False
    assert {row["model"] for row in result["rows"]} == set(MODELS)
    assert all(0 <= row["f1"] <= 1 and row["seconds"] > 0 for row in result["rows"])
