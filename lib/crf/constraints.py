"""Which tags may start, follow and end a sequence under BMES, BIO and BIOES."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Constraints", "allowed_transitions"]

# prefix -> (continues an open span, leaves a span open)
_SCHEMES: dict[str, dict[str, tuple[bool, bool | None]]] = {
    "BMES": {"B": (False, True), "M": (True, True), "E": (True, False), "S": (False, False)},
    "BIOES": {"B": (False, True), "I": (True, True), "E": (True, False), "S": (False, False)},
    "BIO": {"B": (False, None), "I": (True, None)},
}


class Constraints(NamedTuple):
    """Boolean tables of what is allowed; a plain tuple in the order of the fields."""

    transitions: Tensor  # (C, C), [from, to]
    start: Tensor  # (C,)
    end: Tensor  # (C,)


def allowed_transitions(
    tags: Sequence[str], scheme: Literal["BMES", "BIO", "BIOES"]
) -> Constraints:
    """The transitions, first tags and last tags that a tagging scheme allows.

    A tag is a prefix of the scheme, in either case, alone or with a type (``B-PER``, ``B_PER``);
    ``O`` may stand beside every scheme. A span continues only with its own type. In BMES and BIOES
    an open span must be closed by E; in BIO it may stop anywhere.

    Args:
        tags: the names of the C tags, in the order of their ids.
        scheme: ``"BMES"``, ``"BIO"`` (also called IOB2) or ``"BIOES"``.

    Returns:
        ``(transitions (C, C)[from, to], start (C,), end (C,))``, boolean, True = allowed.

    Raises:
        TypeError: if a tag is not a string.
        ValueError: if the scheme is unknown, a tag does not belong to it or stands there twice.

    Source: chapter ``crf``.

    >>> transitions, start, end = allowed_transitions("smbe", "BMES")
    >>> start.tolist(), end.tolist()
    ([True, False, True, False], [True, False, False, True])
    >>> transitions.sum(1).tolist()
    [2, 2, 2, 2]
    """
    if scheme not in _SCHEMES:
        raise ValueError(f"scheme must be one of {sorted(_SCHEMES)}, got {scheme!r}")
    tags = list(tags)
    if not tags or len(set(tags)) < len(tags):
        raise ValueError(f"tags must be distinct and at least one, got {tags}")
    prefixes, kinds = zip(*(_parse(tag, scheme) for tag in tags), strict=True)
    table = _SCHEMES[scheme] | {"O": (False, False)}
    inside = [table[prefix][0] for prefix in prefixes]
    opens = [table[prefix][1] for prefix in prefixes]

    def follows(i: int, j: int) -> bool:
        if inside[j]:
            return opens[i] is not False and kinds[i] == kinds[j]
        return opens[i] is not True

    size = range(len(tags))
    return Constraints(
        transitions=torch.tensor([[follows(i, j) for j in size] for i in size]),
        start=~torch.tensor(inside),
        end=torch.tensor([still_open is not True for still_open in opens]),
    )


def _parse(tag: str, scheme: str) -> tuple[str, str]:
    """Split a tag into its prefix and its type."""
    if not isinstance(tag, str):
        raise TypeError(f"tags must be strings, got {tag!r}")
    prefix, rest = tag[:1].upper(), tag[1:]
    known = prefix in _SCHEMES[scheme] and (not rest or (rest[0] in "-_" and len(rest) > 1))
    if not known and not (prefix == "O" and not rest):
        prefixes = ", ".join([*_SCHEMES[scheme], "O"])
        raise ValueError(
            f"tag {tag!r} does not belong to {scheme}: expected one of {prefixes}, "
            "alone or followed by a type as in B-PER (O alone)"
        )
    return prefix, rest[1:]
