"""Training on mixtures of examples: mixup, SamplePairing, CutMix, and mixing in a DataLoader."""

from lib.mixup._collate import MixupCollate
from lib.mixup._transforms import cutmix, mixup, sample_pairing

__all__ = ["MixupCollate", "cutmix", "mixup", "sample_pairing"]
