"""NICE: a network with an exact density, because it is invertible and its Jacobian is triangular.

    log p(x) = log p_Z(f(x)) + log |det df/dx|

    flow = NICE(784)
    x = dequantize(images.flatten(1))           # integers 0..255 -> [0, 1)
    loss = -flow.log_prob(x).mean()             # nats per image
    bits_per_dim(flow.log_prob(x), 784)         # comparable between models
    pictures = flow.sample(64, temperature=0.8)

Every map goes from data to noise. Derived in the chapter `nice`.
"""

from __future__ import annotations

from lib.nice._coupling import AdditiveCoupling, AffineCoupling, Scaling
from lib.nice._flow import NICE, FlowTransform
from lib.nice._linear import OneDNNLinear
from lib.nice._pixels import bits_per_dim, dequantize
from lib.nice._prior import Logistic

__all__ = [
    "NICE",
    "AdditiveCoupling",
    "AffineCoupling",
    "FlowTransform",
    "Logistic",
    "OneDNNLinear",
    "Scaling",
    "bits_per_dim",
    "dequantize",
]
