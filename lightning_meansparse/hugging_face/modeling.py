"""What ``AutoModelForImageClassification.from_pretrained`` calls for our model type."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

from transformers import AutoModelForImageClassification
from transformers.utils.hub import cached_file

from lightning_meansparse.adapter import Adapter, read_adapter
from lightning_meansparse.adapter.files import CONFIG_NAME, TENSORS_NAME
from lightning_meansparse.adapter.models import insert
from lightning_meansparse.hugging_face.configuration import MeanSparseConfig
from lightning_meansparse.hugging_face.saving import variant_of

# What says where the files of a repository are.
_PLACE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class MeanSparseForImageClassification:
    """Loads whole models. What it gives is the base's own class, with operators inside."""

    config_class = MeanSparseConfig
    main_input_name = "pixel_values"

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *args: Any, config: MeanSparseConfig, **kwargs: Any
    ) -> Any:
        """Load the base as transformers does, then put the adapter beside it onto it.

        Args:
            name: Hub id or folder.
            args: As for the base.
            config: Its configuration.
            kwargs: As for the base: ``dtype``, ``device_map``, ``revision``, …

        Raises:
            OSError: If the adapter's files are missing.
            ValueError: If they are not sound, or made for other weights.
        """
        adapter = _adapter(name, config, kwargs)
        # No pickle is opened in their stead.
        weights = {"variant": variant_of(kwargs.get("variant")), "use_safetensors": True}
        loaded = AutoModelForImageClassification.from_pretrained(
            name, *args, config=config.base_config, **{**kwargs, **weights}
        )
        # With output_loading_info=True it is a pair.
        insert(loaded[0] if isinstance(loaded, tuple) else loaded, adapter)
        return loaded

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "a sparsified model cannot be made from its configuration alone, as its statistics "
            "belong to its weights. Use from_pretrained, or build config.base_config for the base "
            "with random weights."
        )


def _adapter(name: str | os.PathLike[str], config: MeanSparseConfig, place: Any) -> Adapter:
    """The adapter from the same commit as the configuration."""
    where = {key: place[key] for key in _PLACE if place.get(key) is not None}
    if config._commit_hash is not None:
        where["revision"] = config._commit_hash
    paths = [cached_file(str(name), file, **where) for file in (CONFIG_NAME, TENSORS_NAME)]
    return read_adapter(Path(str(paths[0])).parent)
