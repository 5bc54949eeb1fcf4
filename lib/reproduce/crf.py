"""Word segmentation as in the essay: three convolutions, four tags, and four ways to end.

Chapter ``crf`` trains these models on a part of the corpus; ``python -m lib.reproduce crf`` trains
them on all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lib.crf import CRF, LinearChainCRF, allowed_transitions
from lib.reproduce import train

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = [
    "MODELS",
    "TAGS",
    "Scores",
    "Segmenter",
    "alphabet",
    "build",
    "encode",
    "optimizer",
    "pieces",
    "reproduce",
    "score",
    "segment",
    "tags_of",
    "words_of",
]

TAGS = "sbme"

# name: how the scores are normalised, whether in training too only legal tags exist, and the
# learning rate of the transitions
MODELS: dict[str, dict[str, Any]] = {
    "softmax": {"kind": "softmax"},
    "MEMM": {"kind": "memm"},
    "CRF": {"kind": "crf"},
    "CRF, two rates": {"kind": "crf", "transition_lr": 1e-2},
    "CRF, constrained": {"kind": "crf", "constrained": True, "transition_lr": 1e-2},
}


def tags_of(words: Iterable[str]) -> list[int]:
    """The tag of each character: s alone, or b, m, ..., m, e.

    >>> tags_of(["今天", "天气", "不", "错"])
    [1, 3, 1, 3, 0, 0]
    """
    tags: list[int] = []
    for word in words:
        tags += [0] if len(word) == 1 else [1, *[2] * (len(word) - 2), 3]
    return tags


def words_of(text: str, tags: Sequence[int]) -> list[str]:
    """Cut before every s and b, as the essay does: this reads illegal sequences too.

    >>> words_of("今天天气不错", [1, 3, 1, 3, 0, 0])
    ['今天', '天气', '不', '错']
    """
    words: list[str] = []
    for character, tag in zip(text, tags, strict=True):
        if tag < 2 or not words:
            words.append(character)
        else:
            words[-1] += character
    return words


def pieces(sentences: Iterable[Sequence[str]], longest: int) -> list[list[str]]:
    """Cut sentences of more than ``longest`` characters before the word that would not fit.

    >>> pieces([["今天", "天气", "不", "错"], ["好"]], longest=4)
    [['今天', '天气'], ['不', '错'], ['好']]
    """
    result = []
    for sentence in sentences:
        piece: list[str] = []
        for word in sentence:
            if piece and sum(map(len, piece)) + len(word) > longest:
                result.append(piece)
                piece = []
            piece.append(word)
        if piece:
            result.append(piece)
    return result


def alphabet(sentences: Iterable[Sequence[str]], at_least: int = 2) -> dict[str, int]:
    """Number the characters seen ``at_least`` times from 1; 0 is any other one, and padding."""
    counts = Counter(character for words in sentences for word in words for character in word)
    return {c: i for i, c in enumerate((c for c, n in counts.items() if n >= at_least), start=1)}


def encode(
    sentences: Sequence[Sequence[str]], characters: dict[str, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, tags and mask, each (N, T), padded on the right with 0, 0 and False."""
    lengths = torch.tensor([sum(map(len, words)) for words in sentences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids, tags = torch.zeros(mask.shape, dtype=torch.long), torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([characters.get(c, 0) for words in sentences for c in "".join(words)])
    tags[mask] = torch.tensor([tag for words in sentences for tag in tags_of(words)])
    return ids, tags, mask


class Segmenter(nn.Module):
    """Embedding, width-3 convolutions, scores of the four tags, and one of three normalisers.

    All three are linear chains; they differ in what sums to one. ``softmax``: the tags of each
    character, no transitions. ``memm``: the tags of each character given the one before.
    ``crf``: the whole sequences. Initial values are those of Keras, as in the essay.
    """

    forbidden: Tensor
    forbidden_first: Tensor
    forbidden_last: Tensor

    def __init__(
        self,
        num_characters: int,
        kind: str = "crf",
        *,
        width: int = 128,
        layers: int = 3,
        constrained: bool = False,
    ) -> None:
        super().__init__()
        if kind not in ("softmax", "memm", "crf"):
            raise ValueError(f'kind must be "softmax", "memm" or "crf", got {kind!r}')
        self.kind, self.constrained = kind, constrained
        self.embedding = nn.Embedding(num_characters + 1, width)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=1) for _ in range(layers)
        )
        self.scores = nn.Linear(width, len(TAGS))
        self.head = CRF(len(TAGS))
        nn.init.uniform_(self.embedding.weight, -0.05, 0.05)
        for layer in (*self.convolutions, self.scores):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.head.transitions)
        self.head.start_transitions.requires_grad_(kind != "softmax")
        self.head.transitions.requires_grad_(kind != "softmax")
        self.head.end_transitions.requires_grad_(kind == "crf")
        for name, allowed in zip(
            ("forbidden", "forbidden_first", "forbidden_last"),
            allowed_transitions(TAGS, "BMES"),
            strict=True,
        ):
            penalty = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
            self.register_buffer(name, penalty, persistent=False)

    def emissions(self, ids: Tensor) -> Tensor:
        """The scores (B, T, 4) of the tags, read from seven characters around each."""
        x = self.embedding(ids).transpose(1, 2)  # (B, D, T)
        for layer in self.convolutions:
            x = torch.relu(layer(x))
        return self.scores(x.transpose(1, 2))

    def distribution(
        self, ids: Tensor, mask: Tensor, constrained: bool | None = None
    ) -> LinearChainCRF:
        """The law of the tags; ``constrained`` removes the illegal sequences and renormalises."""
        h, head = self.emissions(ids), self.head
        chain = (head.transitions, head.start_transitions, head.end_transitions)
        a, first, last = (x * (self.kind != "softmax") for x in chain)
        if self.kind == "memm":
            # charge each tag with the normaliser of its successors: then the sum over paths is 1
            follow = (h[:, 1:, None] + a).logsumexp(-1) * mask[:, 1:, None]  # (B, T-1, C)
            begin = (h[:, :1] + first).logsumexp(-1, keepdim=True).expand_as(h[:, :1])
            h = h - pad(follow, (0, 0, 0, 1)) - pad(begin, (0, 0, 0, follow.shape[1]))
            last = last * 0
        if self.constrained if constrained is None else constrained:
            a, first = a + self.forbidden, first + self.forbidden_first
            last = last + self.forbidden_last
        return LinearChainCRF(h, a, first, last, mask, validate_args=False)

    def forward(self, ids: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        """The negative log-likelihood of each sentence (B,), in nats."""
        longest = int(mask.sum(1).max())
        ids, tags, mask = ids[:, :longest], tags[:, :longest], mask[:, :longest]
        return -self.distribution(ids, mask).log_prob(tags)


def build(name: str, num_characters: int, width: int = 128) -> Segmenter:
    """One of :data:`MODELS`, newly initialised."""
    options = {key: value for key, value in MODELS[name].items() if key != "transition_lr"}
    return Segmenter(num_characters, width=width, **options)


def optimizer(
    model: Segmenter, lr: float = 1e-3, transition_lr: float | None = None
) -> torch.optim.Adam:
    """Adam; the transitions of the head can have a learning rate of their own."""
    head = {id(p) for p in model.head.parameters()}
    body = [p for p in model.parameters() if id(p) not in head]
    chain = [p for p in model.head.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": body}]
    if chain:
        groups.append({"params": chain, "lr": transition_lr or lr})
    return torch.optim.Adam(groups, lr=lr, eps=1e-7)


@torch.no_grad()
def segment(
    model: Segmenter,
    sentences: Sequence[Sequence[str]],
    characters: dict[str, int],
    constrained: bool | None = None,
) -> list[list[str]]:
    """Forget the spaces of ``sentences`` and cut them again along the most probable tags."""
    device = model.scores.weight.device
    order = sorted(range(len(sentences)), key=lambda i: sum(map(len, sentences[i])))
    result: list[list[str]] = [[] for _ in sentences]
    for start in range(0, len(order), 256):
        rows = order[start : start + 256]
        ids, _, mask = (x.to(device) for x in encode([sentences[i] for i in rows], characters))
        paths = model.distribution(ids, mask, constrained).mode.cpu()
        for i, path in zip(rows, paths.tolist(), strict=True):
            text = "".join(sentences[i])
            result[i] = words_of(text, path[: len(text)])
    return result


class Scores(NamedTuple):
    """Word scores by the bakeoff's definition, and the essay's own."""

    precision: float
    recall: float
    f1: float
    oov_recall: float
    set_recall: float


def spans(words: Iterable[str]) -> set[tuple[int, int]]:
    """First and last-plus-one position of each word."""
    result, start = set(), 0
    for word in words:
        result.add((start, start + len(word)))
        start += len(word)
    return result


def score(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], known: Iterable[str]
) -> Scores:
    """Compare two segmentations of the same texts.

    A word is right if it begins and ends where a gold word does. ``oov_recall`` counts only gold
    words that are not ``known`` from training; ``set_recall`` compares the sets of words of each
    sentence and forgets where and how often they stand.

    >>> s = score([["no", "no", "man"]], [["no", "n", "o", "man"]], known=["no"])
    >>> s.precision, round(s.recall, 3), s.oov_recall, s.set_recall
    (0.5, 0.667, 1.0, 1.0)
    """
    known = set(known)
    counts: Counter[str] = Counter()
    for right, guess in zip(gold, predicted, strict=True):
        truth, found = spans(right), spans(guess)
        start = 0
        for word in right:
            hit = (start, start + len(word)) in found
            start += len(word)
            counts["unknown"] += word not in known
            counts["unknown hit"] += hit and word not in known
        counts["gold"] += len(truth)
        counts["guess"] += len(found)
        counts["hit"] += len(truth & found)
        counts["types"] += len(set(right))
        counts["types hit"] += len(set(right) & set(guess))
    precision, recall = counts["hit"] / counts["guess"], counts["hit"] / counts["gold"]
    return Scores(
        precision,
        recall,
        2 * precision * recall / max(precision + recall, 1e-12),
        counts["unknown hit"] / max(counts["unknown"], 1),
        counts["types hit"] / counts["types"],
    )


def reproduce(
    fabric: Fabric, seed: int, *, epochs: int, folder: Path, examples: int | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train the chapter's models on the whole corpus and score them on its test part.

    Returns:
        The protocol, and a row of scores for each model and way of decoding.
    """
    from lib.data import load

    data = load("peoples_daily")
    parts = {name: pieces(data[name], longest=256) for name in ("train", "test")}
    parts["train"] = parts["train"][:examples]
    characters = alphabet(parts["train"])
    known = {word for words in parts["train"] for word in words}
    tensors = encode(parts["train"], characters)
    rows = []
    for name, options in MODELS.items():
        torch.manual_seed(seed)
        model = build(name, len(characters))
        log = train(
            fabric,
            f"crf-{name.replace(', ', '-').replace(' ', '-').lower()}-{seed}",
            model,
            optimizer(model, transition_lr=options.get("transition_lr")),
            tensors,
            epochs=epochs,
            batch_size=128,
            seed=seed,
            folder=folder,
            lengths=tensors[2].sum(1),
        )
        rows += _rows(name, seed, model, parts["test"], characters, known, log)
    unknown = sum(word not in known for words in parts["test"] for word in words)
    words = {name: sum(map(len, part)) for name, part in parts.items()}
    protocol = {
        "data": data.name,
        "full": data.full and examples is None,
        "sentences": {name: len(part) for name, part in parts.items()},
        "words": words,
        "oov_rate": unknown / words["test"],
        "characters": len(characters),
        "epochs": epochs,
        "batch_size": 128,
        "optimizer": "Adam, learning rate 1e-3, epsilon 1e-7",
        "selection": "last epoch",
    }
    return protocol, rows


def _rows(
    name: str,
    seed: int,
    model: Segmenter,
    test: list[list[str]],
    characters: dict[str, int],
    known: set[str],
    log: dict[str, Any],
) -> list[dict[str, Any]]:
    """The scores of one model, decoded freely and along legal sequences only."""
    model.eval()
    shared = {
        "seed": seed,
        "loss": log["losses"],
        "seconds": log["seconds"],
        "transitions": model.head.transitions.tolist() if model.kind != "softmax" else None,
    }
    result = []
    for legal in (True,) if model.constrained else (False, True):
        found = segment(model, test, characters, legal)
        scores = score(test, found, known)._asdict()
        result.append({"model": name, "legal": legal, **scores, **shared})
    return result
