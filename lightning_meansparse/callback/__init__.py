"""One callback that makes a Lightning ``Trainer`` end with a sparsified, calibrated model."""

from lightning_meansparse.callback.lifecycle import MeanSparseCallback

__all__ = ["MeanSparseCallback"]
