"""Densities without normalisers: noise contrastive estimation and what came of it.

Losses: `nce_loss`, `NCELoss`, `negative_sampling_loss`, `info_nce_loss`. Words: `UnigramNoise`,
`Vocabulary` and `Word2Vec`.
"""

from __future__ import annotations

from lib.nce.info_nce import info_nce_loss
from lib.nce.losses import NCELoss, nce_loss, negative_sampling_loss
from lib.nce.noise import UnigramNoise
from lib.nce.vocabulary import Vocabulary
from lib.nce.word2vec import Word2Vec

__all__ = [
    "NCELoss",
    "UnigramNoise",
    "Vocabulary",
    "Word2Vec",
    "info_nce_loss",
    "nce_loss",
    "negative_sampling_loss",
]
