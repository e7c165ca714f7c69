"""What a `Trainer` runs: adversarial training, and the sweep over α."""

from __future__ import annotations

from lightning_meansparse.tasks.sweep import AlphaSweep
from lightning_meansparse.tasks.training import AdversarialTraining

__all__ = ["AdversarialTraining", "AlphaSweep"]
