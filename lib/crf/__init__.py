"""Linear-chain conditional random fields: an exact distribution over tag sequences.

Source: chapter ``crf``; Lafferty, McCallum and Pereira (2001), "Conditional random fields".
"""

from __future__ import annotations

from lib.crf.constraints import allowed_transitions
from lib.crf.distribution import LinearChainCRF
from lib.crf.module import CRF

__all__ = ["CRF", "LinearChainCRF", "allowed_transitions"]
