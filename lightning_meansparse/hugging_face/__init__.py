"""Sparsified models at home in the libraries of Hugging Face.

``registration`` makes transformers know our model type, ``configuration`` and ``modeling`` are that
type, ``saving`` writes whole models, ``trainer`` is the callback for transformers' own Trainer.

A whole model is a folder as transformers writes it, with the base's own weights and keys. Its
``config.json`` is of model type ``"meansparse"`` and holds the base's configuration; the two files
of an adapter lie beside it, see `lightning_meansparse.adapter`. Who does not know the type cannot
load it as the base by mistake.

Nothing here imports transformers before it is used.
"""

from typing import TYPE_CHECKING

__all__ = ["MeanSparseTrainerCallback", "save_pretrained"]

if TYPE_CHECKING:
    from lightning_meansparse.hugging_face.saving import save_pretrained
    from lightning_meansparse.hugging_face.trainer import MeanSparseTrainerCallback
else:

    def __getattr__(name: str) -> object:
        """Import a name when it is first used: one needs transformers, both need torch."""
        if name == "save_pretrained":
            from lightning_meansparse.hugging_face.saving import save_pretrained as value
        elif name == "MeanSparseTrainerCallback":
            from lightning_meansparse.hugging_face.trainer import MeanSparseTrainerCallback as value
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value
