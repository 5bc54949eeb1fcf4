"""Word segmentation as in the essay: three convolutions, four tags, and four ways to end.

Chapter ``crf`` trains these models on a part of the corpus; ``python -m lib.reproduce crf`` trains
them on all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lib.crf import CRF, LinearChainCRF, allowed_transitions
from lib.reproduce import train
from lib.reproduce.segmentation import TAGS, alphabet, encode, pieces, spans, word_scores, words_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = [
    "MODELS",
    "Segmenter",
    "build",
    "confidence",
    "legality",
    "optimizer",
    "reproduce",
    "segment",
]


# what is normalised, whether illegal sequences are removed in training, a rate for the transitions
MODELS: dict[str, dict[str, Any]] = {
    "softmax": {"kind": "softmax"},
    "MEMM": {"kind": "memm"},
    "CRF": {"kind": "crf"},
    "CRF, two rates": {"kind": "crf", "transition_lr": 1e-2},
    "CRF, constrained": {"kind": "crf", "constrained": True, "transition_lr": 1e-2},
}


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

    def emissions(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The scores (B, T, 4) of the tags, read from seven characters around each.

        Unlike the essay's, the convolutions see no padding: it is zero in every layer, so that a
        sentence has the same scores in every batch.
        """
        keep = mask[:, None]  # (B, 1, T)
        x = self.embedding(ids).transpose(1, 2) * keep  # (B, D, T)
        for layer in self.convolutions:
            x = torch.relu(layer(x)) * keep
        return self.scores(x.transpose(1, 2))

    def distribution(
        self, ids: Tensor, mask: Tensor, constrained: bool | None = None
    ) -> LinearChainCRF:
        """The law of the tags; ``constrained`` removes the illegal sequences and renormalises."""
        h, head = self.emissions(ids, mask), self.head
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


def _batches(
    model: Segmenter, sentences: Sequence[Sequence[str]], characters: dict[str, int]
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Sentences of like length together: their numbers, ids and mask."""
    device = model.scores.weight.device
    order = sorted(range(len(sentences)), key=lambda i: sum(map(len, sentences[i])))
    for start in range(0, len(order), 256):
        rows = order[start : start + 256]
        ids, _, mask = encode([sentences[i] for i in rows], characters)
        yield rows, ids.to(device), mask.to(device)


@torch.no_grad()
def segment(
    model: Segmenter,
    sentences: Sequence[Sequence[str]],
    characters: dict[str, int],
    constrained: bool | None = None,
) -> list[list[str]]:
    """Forget the spaces of ``sentences`` and cut them again along the most probable tags."""
    result: list[list[str]] = [[] for _ in sentences]
    for rows, ids, mask in _batches(model, sentences, characters):
        paths = model.distribution(ids, mask, constrained).mode.tolist()
        for i, path in zip(rows, paths, strict=True):
            text = "".join(sentences[i])
            result[i] = words_of(text, path[: len(text)])
    return result


@torch.no_grad()
def legality(
    model: Segmenter, sentences: Sequence[Sequence[str]], characters: dict[str, int]
) -> tuple[float, float]:
    """How much a model knows of the tags' grammar by itself.

    Returns:
        The mean over sentences of P(legal | x) = Z_legal / Z (eq-crf-constrained), and the share
        of sentences whose most probable tags are illegal.
    """
    mass, illegal = 0.0, 0.0
    for _, ids, mask in _batches(model, sentences, characters):
        every, legal = (model.distribution(ids, mask, only) for only in (False, True))
        mass += (legal.log_partition - every.log_partition).exp().sum().item()
        illegal += (legal.score(every.mode) == -torch.inf).sum().item()
    return mass / len(sentences), illegal / len(sentences)


@torch.no_grad()
def confidence(
    model: Segmenter,
    sentences: Sequence[Sequence[str]],
    characters: dict[str, int],
    legal: bool,
) -> tuple[Tensor, Tensor]:
    """The probability (N,) of each word of the best legal segmentation, and whether it is right.

    eq-crf-span, for all words at once: with c the running sum of log P(y_t, y_{t+1}) - log P(y_t),
    log P(y_s .. y_e) = log P(y_s) + c_e - c_s. ``legal`` removes the illegal sequences from the
    distribution too.
    """
    probability, right = [], []
    for rows, ids, mask in _batches(model, sentences, characters):
        chain = model.distribution(ids, mask, legal)
        best = model.distribution(ids, mask, True).mode.clamp(min=0)
        node = chain.marginals.gather(2, best[..., None]).squeeze(2).log()  # (B, T)
        pair = chain.pair_marginals.flatten(2)  # (B, T-1, C C)
        pair = pair.gather(2, (best[:, :-1] * len(TAGS) + best[:, 1:])[..., None]).squeeze(2).log()
        running = pad((pair - node[:, :-1]).nan_to_num(), (1, 0)).cumsum(1)
        for i, path, at, c in zip(rows, best.tolist(), node, running, strict=True):
            text, gold = "".join(sentences[i]), spans(sentences[i])
            for s, stop in sorted(spans(words_of(text, path[: len(text)]))):
                probability.append((at[s] + c[stop - 1] - c[s]).exp())
                right.append((s, stop) in gold)
    return torch.stack(probability), torch.tensor(right)


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
    mass, illegal = legality(model, test, characters)
    shared = {
        "seed": seed,
        "legal_mass": mass,
        "illegal_share": illegal,
        "loss": log["losses"],
        "seconds": log["seconds"],
        "transitions": model.head.transitions.tolist() if model.kind != "softmax" else None,
    }
    result = []
    for legal in (True,) if model.constrained else (False, True):
        found = segment(model, test, characters, legal)
        scores = word_scores(test, found, known)._asdict()
        result.append({"model": name, "legal": legal, **scores, **shared})
    return result
