"""The configuration of a whole sparsified model: model type ``"meansparse"`` around the base's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers import __version__ as transformers_version


class MeanSparseConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """What ``config.json`` of a whole model says: the base's own configuration, and nothing else.

    Sites and statistics are in the adapter beside it. Attributes of the base can be read here too,
    and what ``from_pretrained`` is told to change, it changes in the base.

    Args:
        base_config: The base's configuration.
    """

    model_type = "meansparse"

    def __init__(self, base_config: PreTrainedConfig | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.base_config = base_config or PreTrainedConfig()
        self.architectures = self.base_config.architectures
        self.id2label, self.label2id = self.base_config.id2label, self.base_config.label2id
        _register_model()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build it from what ``config.json`` holds.

        Args:
            config_dict: The decoded JSON.
            kwargs: Values of the base's configuration to replace.

        Raises:
            ValueError: If it holds no base configuration of a type that transformers has.
        """
        unused_too = kwargs.pop("return_unused_kwargs", False)
        raw = config_dict.get("base_config")
        fields = dict(raw) if isinstance(raw, Mapping) else {}
        base_type = str(fields.get("model_type"))
        if base_type not in CONFIG_MAPPING or base_type == cls.model_type:
            raise ValueError(
                "config.json: base_config must be the base's configuration, with a model_type that "
                f"transformers {transformers_version} has; got model_type={base_type!r:.80}. "
                "Upgrade transformers, or save the model again with save_pretrained."
            )
        base: Any
        base, unused = CONFIG_MAPPING[base_type].from_dict(
            fields, return_unused_kwargs=True, **kwargs
        )
        base._commit_hash = config_dict.get("_commit_hash", unused.get("_commit_hash"))
        config = cls(base)
        config._commit_hash = base._commit_hash
        return (config, unused) if unused_too else config

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        base = {**self.base_config.to_diff_dict(), "model_type": self.base_config.model_type}
        base.pop("transformers_version", None)
        timm = {}
        if "pretrained_cfg" in base:  # the image processor of timm's models has no file of its own
            timm = {key: base[key] for key in ("architecture", "pretrained_cfg")}
            timm["image_processor_type"] = "TimmWrapperImageProcessor"
        return {
            **timm,
            "architectures": self.architectures,
            "base_config": base,
            "model_type": self.model_type,
            "transformers_version": transformers_version,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """The same, as there are no defaults to leave out."""
        return self.to_dict()

    def __getattr__(self, name: str) -> Any:
        """What is asked of a model's configuration, the base's has."""
        if name.startswith("_") or name == "base_config":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.base_config, name)


def _register_model() -> None:
    """Not before there is such a configuration: the model's class needs more of transformers."""
    from transformers import AutoModelForImageClassification

    from lightning_meansparse.hugging_face.modeling import MeanSparseForImageClassification

    AutoModelForImageClassification.register(
        MeanSparseConfig, MeanSparseForImageClassification, exist_ok=True
    )
