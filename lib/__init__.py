"""The library behind *Why Does It Work? Eight essays on learning, executed*.

Each of the eight modules stands alone on torch::

    from lib.crf import CRF, LinearChainCRF

``lib.vae``, ``lib.crf``, ``lib.nce``, ``lib.ode``, ``lib.margin``, ``lib.mixup``, ``lib.nice``
and ``lib.vae_clustering`` hold the mathematics; ``lib.data`` loads data, ``lib.training`` runs
loops and ``lib.book`` turns a notebook into a chapter.
"""

__version__ = "0.1.0"
