"""Margin losses: a classifier spoilt on purpose, so that its features rank well.

The functional losses take cosines; `MarginHead` holds the class centres and fuses normalising,
margin and loss; `SentenceEncoder` makes the features, `retrieval_accuracy` judges them.
"""

from lib.margin.encoder import SentenceEncoder
from lib.margin.head import MarginHead
from lib.margin.losses import am_softmax_loss, arc_softmax_loss, simple_a_softmax_loss
from lib.margin.retrieval import retrieval_accuracy

__all__ = [
    "MarginHead",
    "SentenceEncoder",
    "am_softmax_loss",
    "arc_softmax_loss",
    "retrieval_accuracy",
    "simple_a_softmax_loss",
]
