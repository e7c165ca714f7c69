"""Make transformers know our model type, without importing transformers.

``import lightning_meansparse`` takes milliseconds and transformers seconds, so the type is
registered right after transformers' table of types has been imported, by whomever and whenever.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLE = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register now if transformers' table of types is there, else as soon as it is."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported:
    """A finder that finds nothing, but sees the table being imported and then registers."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TABLE:
            return None
        sys.meta_path.remove(self)  # or it would be asked again
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)  # whoever looks for a module need not import it
        loader = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                _register()

            loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from transformers import AutoConfig

    from lightning_meansparse.hugging_face.configuration import MeanSparseConfig
    from lightning_meansparse.hugging_face.saving import adopt
    from lightning_meansparse.surgery import AFTER_INSERTION

    AutoConfig.register(MeanSparseConfig.model_type, MeanSparseConfig, exist_ok=True)
    AFTER_INSERTION.append(adopt)
