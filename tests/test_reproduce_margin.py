"""The sentence retrieval experiment of chapter margin against hand counts and brute force."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import pad

from lib.margin import SentenceEncoder, am_softmax_loss
from lib.reproduce.margin import (
    HEADS,
    PaddingReader,
    build,
    indices,
    neighbours,
    open_set,
    quick_fit,
    retrieval,
    short,
    tfidf,
    tfidf_search,
    training_set,
    vectors,
    vocabulary,
)
from lib.reproduce.planes import misranked, trio

GROUPS = [
    {"A": "The cat's bed.", "B": "the bed of a cat", "C": "where cats sleep"},
    {"A": "Rain, rain!", "B": "rain and more rain", "C": "water from above"},
    {"A": "A dog barked.", "B": "the dog barked", "C": "the bed of rain barked"},
]


def test_words_are_counted_cut_and_padded():
    assert short(GROUPS, 4) == [GROUPS[1]]
    known = vocabulary(GROUPS)
    assert list(known) == ["the", "cats", "bed", "of", "a", "rain", "dog", "barked"]
    assert list(known.values()) == list(range(2, 10))
    ids = indices(GROUPS, known, 4)
    assert ids.shape == (3, 3, 4)
    assert ids[0].tolist() == [[2, 3, 4, 0], [2, 4, 5, 6], [1, 3, 1, 0]]


def test_no_words_and_unknown_words():
    assert vocabulary([]) == {}
    ids = indices(GROUPS, {}, 4)
    assert set(ids.flatten().tolist()) == {0, 1}  # every word is unknown, none is an error
    torch.manual_seed(0)
    found = vectors(build("AM", 0, 3, 5), ids)
    assert found.shape == (3, 3, 5)
    torch.testing.assert_close(found.norm(dim=2), torch.ones(3, 3))
    silent = indices([{"A": "1234 - !"}], {}, 4)
    with pytest.raises(ValueError, match="row 0 is all padding"):
        vectors(build("AM", 0, 3, 5), silent)


@pytest.mark.parametrize("name", HEADS)
def test_every_head_learns_three_groups(name):
    torch.manual_seed(0)
    ids = indices(GROUPS, vocabulary(GROUPS, 1), 6)
    model = build(name, 40, 3, 16)
    (tensors, passes, batch_size), versions = training_set(name, ids), ids.shape[1]
    before = model(*tensors).mean().item()
    quick_fit(model, ids, 0, epochs=40)
    assert model(*tensors).mean().item() < before / 2
    assert tensors[0].ndim == (3 if HEADS[name].get("pairs") else 2)
    assert passes == (versions // 2 if HEADS[name].get("pairs") else 1)
    assert batch_size * (2 if HEADS[name].get("pairs") else 1) == 128  # sentences


def test_a_loss_of_ones_own_is_used():
    torch.manual_seed(0)
    ids = indices(GROUPS, vocabulary(GROUPS), 6)
    model = build("AM", 10, 3, 8)
    seen = []

    def loss(sentences, groups):
        seen.append(len(sentences))
        return am_softmax_loss(model.head(model.encoder(sentences)), groups)

    quick_fit(model, ids, 0, epochs=2, loss=loss)
    assert sum(seen) == 2 * 9


def test_only_the_padding_reader_reads_padding():
    ids = torch.tensor([[3, 1, 4, 0, 0], [2, 2, 0, 0, 0]])
    torch.manual_seed(0)
    for encoder, reads in ((SentenceEncoder(6, dim=4, hidden=5), False), (PaddingReader(6), True)):
        shift = (encoder(ids) - encoder(pad(ids, (0, 7)))).abs().max().item()
        assert (shift > 1e-3) == reads


def test_tfidf_gives_every_sentence_a_direction():
    found = tfidf(GROUPS[:2], GROUPS)
    assert found.shape[:2] == (3, 3)
    assert (found.norm(dim=2) > 0).all()
    # of "A dog barked." only "a" is known, as in nothing but "the bed of a cat"
    assert (found[2, 0] @ found.flatten(0, 1).T).argsort(descending=True)[:2].tolist() == [6, 1]


def test_tfidf_search_counts_ties_against_the_query():
    groups = [
        {"A": "one two", "B": "two one", "C": "four"},
        {"A": "one three", "B": "three", "C": "one"},
        {"A": "four", "B": "five", "C": "three"},
    ]
    # B: exact, exact, no known word and so a tie of all. C: none of its own verse, all misled
    assert tfidf_search(groups, 3, k=(1, 3)) == {
        "B": pytest.approx({1: 2 / 3, 3: 1.0}),
        "C": pytest.approx({1: 0.0, 3: 1.0}),
    }
    assert tfidf_search(groups, 2, seed=3) == tfidf_search(groups, 2, seed=3)


def test_the_hard_pair_is_the_last_version_asking_the_first():
    found = torch.randn(12, 3, 4, generator=torch.Generator().manual_seed(5))
    cosines = torch.cosine_similarity(found[:, None, -1], found[None, :, 0], dim=2)
    ranks = [(row >= row[i]).sum().item() for i, row in enumerate(cosines)]
    expected = {k: sum(rank <= k for rank in ranks) / 12 for k in (1, 5, 10)}
    assert 0 < expected[5] < 1
    assert retrieval(found)["hard"] == pytest.approx(expected)


def test_neighbours_and_open_set_by_hand():
    angles = torch.tensor([[0, 10, 50], [90, 100, 120], [180, 200, 95], [270, 280, 14]])
    turn = angles.double().deg2rad()
    found = torch.stack([turn.cos(), turn.sin()], dim=2)
    lines = neighbours(found, [{"A": "a", "B": "b", "C": "c"}] * 4, 3)
    assert [line[:2] for line in lines] == ["  ", "  ", "  "]
    assert lines[0].endswith("B: b")
    assert "1.00" in lines[0]
    with_answer, without = (x.acos().rad2deg() for x in open_set(found))
    assert with_answer.tolist() == pytest.approx([40, 20])
    assert without.tolist() == pytest.approx([5, 4])


def slowly_misranked(points, classes, done):
    """Look at every trio (a, fellow b, stranger c) of finished samples."""
    near = torch.nn.functional.cosine_similarity(points[:, None], points, dim=2)
    finished = done.nonzero().flatten().tolist()
    wronged = torch.zeros_like(done)
    for a in finished:
        fellows = [near[a, b] for b in finished if classes[b] == classes[a]]
        strangers = [near[a, c] for c in finished if classes[c] != classes[a]]
        wronged[a] = max(strangers) > min(fellows)
    return wronged


@pytest.mark.parametrize("seed", range(4))
def test_misranked_against_all_trios(seed):
    g = torch.Generator().manual_seed(seed)
    classes = torch.arange(30) % 3
    points = 1.2 * torch.randn(30, 2, generator=g).double()
    points += torch.tensor([[2.0, 0], [-1, 2], [-1, -2]]).double()[classes]
    done = torch.rand(30, generator=g) < 0.7
    expected = slowly_misranked(points, classes, done)
    assert 0 < expected.sum() < done.sum()
    assert torch.equal(misranked(points, classes, done), expected)
    a, b, c = trio(points, classes, done)
    assert done[[a, b, c]].all()
    assert expected[a]
    assert classes[a] == classes[b] != classes[c]
    near = torch.nn.functional.cosine_similarity(points[a], points[[b, c]], dim=1)
    assert near[1] > near[0]


def test_no_trio_where_none_is_misranked():
    points = torch.tensor([[1.0, 0], [1, 0.1], [-1, 0], [-1, 0.1]])
    with pytest.raises(ValueError, match="no sample is misranked"):
        trio(points, torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool))


def test_the_command_trains_scores_and_writes(tmp_path, monkeypatch):
    pytest.importorskip("lightning_fabric")
    monkeypatch.setenv("LIB_DATA", str(tmp_path / "none"))
    monkeypatch.setenv("LIB_DATA_OFFLINE", "1")
    monkeypatch.setenv("LIB_DATA_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "lib.reproduce", "margin", "--seeds", "1", "--epochs", "1"]
    command += ["--examples", "30", "--accelerator", "cpu"]
    command += ["--checkpoints", str(tmp_path), "--results", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    result = json.loads((tmp_path / "margin.json").read_text())
    assert result["protocol"]["full"] is False
    assert {row["model"] for row in result["rows"]} == {*HEADS, "TF-IDF"}
    for row in result["rows"]:
        assert 0 <= row["hard_top1"] <= row["hard_top10"] <= 1
        assert 0 <= row["all_top1"] <= row["all_top10"] <= 1
        assert 0 <= row["auc"] <= 1
