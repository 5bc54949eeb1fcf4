"""Sentence retrieval as in the essay: a GRU encoder trained as a classifier, judged as a ranker.

A group is one Bible verse in several versions; its sentences are each other's right answers.
Chapter ``margin`` trains these models on some hundred groups; ``python -m lib.reproduce margin``
trains them on all short ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lib.margin import MarginHead, SentenceEncoder, retrieval_accuracy
from lib.nce import info_nce_loss
from lib.reproduce import train
from lib.training import fit

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = [
    "HEADS",
    "PaddingReader",
    "Ranker",
    "build",
    "indices",
    "neighbours",
    "open_set",
    "quick_fit",
    "reproduce",
    "retrieval",
    "short",
    "tfidf",
    "tfidf_search",
    "training_set",
    "vectors",
    "vocabulary",
    "words",
]

Group = Mapping[str, str]  # version -> text

UNKNOWN = 1
SCALE, BATCH, LEARNING_RATE = 30.0, 128, 6e-3
TRIPLET_MARGIN = 0.2

# what trains the encoder: a head over classes, or pairs from the batch
HEADS: dict[str, dict[str, Any]] = {
    "softmax": {"loss": "softmax"},
    "AM": {"loss": "am", "margin": 0.35},
    "simpler A": {"loss": "simple_a", "margin": 4},
    "Arc": {"loss": "arc", "margin": 0.5},
    "triplet": {"pairs": True},
    "InfoNCE": {"pairs": True},
}


def words(text: str) -> list[str]:
    """Lower-case words of letters, without apostrophes."""
    return re.findall("[a-z]+", text.lower().replace("'", "").replace("’", ""))


def short(groups: Sequence[Group], longest: int) -> list[Group]:
    """The groups all of whose sentences have at most ``longest`` words: nothing is cut off."""
    return [g for g in groups if all(len(words(text)) <= longest for text in g.values())]


def vocabulary(groups: Sequence[Group], min_count: int = 2) -> dict[str, int]:
    """Ids from 2 of the words that occur ``min_count`` times; 0 is padding, 1 any other word."""
    count = Counter(word for group in groups for text in group.values() for word in words(text))
    return {word: i for i, word in enumerate((w for w, n in count.items() if n >= min_count), 2)}


def indices(groups: Sequence[Group], known: Mapping[str, int], longest: int) -> Tensor:
    """Word ids (G, V, T) of every sentence, padded on the right with 0."""
    rows = [[words(text)[:longest] for text in group.values()] for group in groups]
    ids = torch.zeros(len(rows), len(rows[0]), longest, dtype=torch.long)
    for i, group in enumerate(rows):
        for j, sentence in enumerate(group):
            ids[i, j, : len(sentence)] = torch.tensor([known.get(w, UNKNOWN) for w in sentence])
    return ids


class PaddingReader(SentenceEncoder):
    """The original's encoder, which has no mask and takes its state after the last padding."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return unit vectors (B, H)."""
        _, state = self.gru(self.embedding(ids))
        return normalize(state[-1], dim=1)


class Ranker(nn.Module):
    """An encoder with what trains it: a margin head over the groups, or pairs from the batch.

    Args:
        encoder: maps ids (B, T) to unit vectors (B, H).
        name: one of :data:`HEADS`.
        num_groups: classes of the head.
    """

    def __init__(self, encoder: SentenceEncoder, name: str, num_groups: int) -> None:
        super().__init__()
        self.encoder, self.name = encoder, name
        settings = HEADS[name]
        if not settings.get("pairs"):
            self.head = MarginHead(encoder.gru.hidden_size, num_groups, scale=SCALE, **settings)

    def forward(self, ids: Tensor, group: Tensor) -> Tensor:
        """The loss of each example (B,): sentences (B, T) for a head, groups (B, V, T) for pairs.

        Of a group two versions are drawn; the triplet's negative is its neighbour's second.
        """
        if ids.ndim == 2:
            return self.head.loss(self.encoder(ids), group, reduction="none")
        two = torch.rand(ids.shape[:2], device=ids.device).argsort(1)[:, :2]
        pair = ids.gather(1, two.unsqueeze(2).expand(-1, -1, ids.shape[2]))
        query, key = self.encoder(pair.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        if self.name == "InfoNCE":
            return info_nce_loss(query, key, temperature=1 / SCALE, reduction="none")
        gain = (query * key).sum(1) - (query * key.roll(1, 0)).sum(1)
        return (TRIPLET_MARGIN - gain).clamp(min=0)


def build(
    name: str, num_words: int, num_groups: int, size: int, encoder: type = SentenceEncoder
) -> Ranker:
    """One of :data:`HEADS` on a newly initialised encoder of width ``size``."""
    return Ranker(encoder(num_words + 2, dim=size, hidden=size), name, num_groups)


def training_set(name: str, ids: Tensor) -> tuple[tuple[Tensor, Tensor], int, int]:
    """The training tensors of a head, and the passes and batch size to read as many sentences.

    A head reads every sentence once a pass; pairs read two sentences a group.
    """
    groups = torch.arange(len(ids))
    if HEADS[name].get("pairs"):
        return (ids, groups), ids.shape[1] // 2 or 1, BATCH // 2
    return (ids.flatten(0, 1), groups.repeat_interleave(ids.shape[1])), 1, BATCH


def quick_fit(
    model: Ranker,
    ids: Tensor,
    seed: int,
    epochs: int = 5,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Ranker:
    """Train ``model`` on the groups ``ids`` (G, V, T) with the chapter's settings, and return it.

    Args:
        model: newly initialised.
        ids: word ids of the training sentences.
        seed: of the order of the sentences.
        epochs: passes over the sentences.
        loss: of a batch, instead of the model's own.
    """
    tensors, passes, batch_size = training_set(model.name, ids)
    fit(
        loss or (lambda *batch: model(*batch).mean()),
        torch.optim.Adam(model.parameters(), lr=LEARNING_RATE),
        tensors,
        epochs=epochs * passes,
        batch_size=batch_size,
        generator=torch.Generator().manual_seed(seed),
        description=model.name,
    )
    return model


@torch.no_grad()
def vectors(model: Ranker, ids: Tensor) -> Tensor:
    """Unit vectors (G, V, H) of sentences (G, V, T)."""
    device = model.encoder.embedding.weight.device
    parts = [model.encoder(part.to(device)).cpu() for part in ids.flatten(0, 1).split(512)]
    return torch.cat(parts).unflatten(0, ids.shape[:2])


def tfidf(known: Sequence[Group], groups: Sequence[Group]) -> Tensor:
    """TF-IDF vectors (G, V, W) of ``groups``, with the document counts of ``known``."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError("the TF-IDF baseline needs: pip install scikit-learn") from error
    counts = TfidfVectorizer(analyzer=words).fit([t for group in known for t in group.values()])
    rows = counts.transform([text for group in groups for text in group.values()]).toarray()
    dense = torch.as_tensor(rows, dtype=torch.float32)
    blank = dense.eq(0).all(1, keepdim=True)  # not one known word: the same direction for all
    return (dense + blank).unflatten(0, (len(groups), -1))


def tfidf_search(
    groups: Sequence[Group], queries: int, k: Sequence[int] = (1, 10), seed: int = 0
) -> dict[str, dict[int, float]]:
    """Top-k accuracy of TF-IDF, from each later version to all sentences of the first.

    Args:
        groups: all of them can answer.
        queries: how many groups, drawn at random, ask.
        k: how many answers are looked at; a tie counts against the query.
        seed: of the draw.

    Returns:
        Accuracy by version and k.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError("the TF-IDF baseline needs: pip install scikit-learn") from error
    first, *others = groups[0]
    counts = TfidfVectorizer(analyzer=words)
    answers = counts.fit_transform([group[first] for group in groups]).T.tocsr()
    rows = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))[:queries]
    shares = {}
    for version in others:
        asked = counts.transform([groups[i][version] for i in rows.tolist()])
        cosines = torch.as_tensor((asked @ answers).toarray())
        ahead = (cosines >= cosines.gather(1, rows.unsqueeze(1))).sum(1) - 1
        shares[version] = {number: (ahead < number).double().mean().item() for number in k}
    return shares


def retrieval(found: Tensor) -> dict[str, dict[int, float]]:
    """Top-k accuracy among all sentences (G, V, D), and from the last version to the first."""
    groups = torch.arange(len(found))
    among_all = retrieval_accuracy(
        found.flatten(0, 1), groups.repeat_interleave(found.shape[1]), k=(1, 5, 10)
    )
    hard = retrieval_accuracy(found[:, -1], groups, k=(1, 5, 10), gallery=(found[:, 0], groups))
    return {"all": among_all, "hard": hard}


def neighbours(found: Tensor, groups: Sequence[Group], query: int, k: int = 3) -> list[str]:
    """The ``k`` sentences nearest to the last version of a group; = marks the same group."""
    versions, flat = list(groups[0]), found.flatten(0, 1)
    own = (query + 1) * len(versions) - 1
    near = (flat @ flat[own]).index_fill(0, torch.tensor([own]), -2).topk(k)
    lines = []
    for cosine, at in zip(near.values.tolist(), near.indices.tolist(), strict=True):
        group, version = divmod(at, len(versions))
        mark = "=" if group == query else " "
        text = groups[group][versions[version]]
        lines.append(f"{mark} {cosine:.2f} {versions[version]}: {text}")
    return lines


def open_set(found: Tensor) -> tuple[Tensor, Tensor]:
    """The best cosine of queries that have an answer, and of queries that have none.

    The last version of every group asks; the other versions of the first half of the groups can
    answer.
    """
    half = len(found) // 2
    unit = normalize(found, dim=-1)
    best = (unit[:, -1] @ unit[:half, :-1].flatten(0, 1).t()).amax(1)
    return best[:half], best[half:]


def reproduce(
    fabric: Fabric, seed: int, *, epochs: int, folder: Path, examples: int | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train every head on all short groups and score it on those of the books held out.

    Returns:
        The protocol, and a row of scores for each head and for the TF-IDF baseline.
    """
    from lib.data import load

    data, longest, size = load("verses"), 24, 128
    known, test = short(data["train"], longest)[:examples], short(data["test"], longest)
    names = vocabulary(known)
    ids, asked = (indices(groups, names, longest) for groups in (known, test))
    rows = []
    for name in HEADS:
        torch.manual_seed(seed)
        model = build(name, len(names), len(known), size)
        tensors, passes, batch_size = training_set(name, ids)
        log = train(
            fabric,
            f"margin-{name.replace(' ', '-').lower()}-{seed}",
            model,
            torch.optim.Adam(model.parameters(), lr=LEARNING_RATE),
            tensors,
            epochs=epochs * passes,
            batch_size=batch_size,
            seed=seed,
            folder=folder,
        )
        extra = {"loss": log["losses"], "seconds": log["seconds"]}
        rows.append(_row(name, seed, vectors(model, asked)) | extra)
    rows.append(_row("TF-IDF", seed, tfidf(known, test)))
    protocol = {
        "data": data.name,
        "full": data.full and examples is None,
        "groups": {"train": len(known), "test": len(test)},
        "versions": list(known[0]),
        "longest": longest,
        "words": len(names),
        "size": size,
        "epochs": epochs,
        "batch_size": BATCH,
        "optimizer": f"Adam, learning rate {LEARNING_RATE}",
        "scale": SCALE,
        "selection": "last epoch",
    }
    return protocol, rows


def _row(name: str, seed: int, found: Tensor) -> dict[str, Any]:
    """Scores of one way of turning sentences into vectors (G, V, D)."""
    with_answer, without = open_set(found)
    scores = {
        f"{where}_top{k}": share
        for where, shares in retrieval(found).items()
        for k, share in shares.items()
    }
    higher = (with_answer.unsqueeze(1) > without).double().mean().item()
    return {"model": name, "seed": seed, **scores, "auc": higher}
