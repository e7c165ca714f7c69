"""MeanSparse for any vision classifier in a Lightning ``Trainer``, measured honestly.

The names in ``__all__`` are the public interface; everything else may change between two releases.

Each name is imported from its room when it is first used. Lightning and torchmetrics alone import
Transformers, SciPy and Matplotlib wherever those are installed: whoever only puts an adapter onto a
model need not wait for them.
"""

from typing import TYPE_CHECKING

from lightning_meansparse.hugging_face import registration as _registration

__version__ = "0.1.0"

__all__ = [
    "AdversarialTraining",
    "AlphaSweep",
    "ImageDataModule",
    "MeanSparse",
    "MeanSparseCallback",
    "RobustAccuracy",
    "Site",
    "backward_rule",
    "calibrate_",
    "export",
    "find_sites",
    "import_robustbench",
    "load_adapter",
    "load_classifier",
    "mean_sparse",
    "push_adapter",
    "restore_",
    "save_adapter",
    "save_pretrained",
    "set_alpha",
    "sparsify_",
]

if TYPE_CHECKING:
    from lightning_meansparse.adapter import load_adapter, save_adapter
    from lightning_meansparse.callback import MeanSparseCallback
    from lightning_meansparse.classifier import load_classifier
    from lightning_meansparse.data import ImageDataModule
    from lightning_meansparse.deployment import export
    from lightning_meansparse.hub import push_adapter
    from lightning_meansparse.hugging_face import save_pretrained
    from lightning_meansparse.layer import MeanSparse, mean_sparse
    from lightning_meansparse.metrics import RobustAccuracy
    from lightning_meansparse.robustbench import import_robustbench
    from lightning_meansparse.sites import Site, find_sites
    from lightning_meansparse.surgery import (
        backward_rule,
        calibrate_,
        restore_,
        set_alpha,
        sparsify_,
    )
    from lightning_meansparse.tasks import AdversarialTraining, AlphaSweep
else:  # hidden from type checkers, to which a module with __getattr__ would have every name
    from importlib import import_module

    _ROOMS = {
        "adapter": ("load_adapter", "save_adapter"),
        "callback": ("MeanSparseCallback",),
        "classifier": ("load_classifier",),
        "data": ("ImageDataModule",),
        "deployment": ("export",),
        "hub": ("push_adapter",),
        "hugging_face": ("save_pretrained",),
        "layer": ("MeanSparse", "mean_sparse"),
        "metrics": ("RobustAccuracy",),
        "robustbench": ("import_robustbench",),
        "sites": ("Site", "find_sites"),
        "surgery": ("backward_rule", "calibrate_", "restore_", "set_alpha", "sparsify_"),
        "tasks": ("AdversarialTraining", "AlphaSweep"),
    }

    def __getattr__(name: str) -> object:
        """Import a public name from its room and keep it (PEP 562)."""
        for room, names in _ROOMS.items():
            if name in names:
                value = getattr(import_module(f"{__name__}.{room}"), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """Name what has not been imported yet as well, for completion."""
        return sorted({*globals(), *__all__})


_registration.register()
