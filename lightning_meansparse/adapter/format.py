"""What an adapter says, and the strict reading of it. Nothing here touches a file or a model.

``meansparse_config.json`` (format version 1)::

    {
      "format_version": 1,
      "meansparse_version": "0.1.0",
      "center": "channel",
      "statistics": "pooled",
      "sites": [{"site": "layer1.0.act1@in", "shape": [64, 1, 1], "alpha": 0.2}, ...],
      "base": {"source": "timm/resnet18", "revision": null, "dtype": "float32",
               "fingerprint": {"float32": "<sha256>", "float16": "...", "bfloat16": "..."}},
      "calibration": {...} or null,
      "evaluation": {"n": ..., "eps": ..., "norm": ..., "attacks": [...], ...} or null,
      "tensors_sha256": "<of meansparse.safetensors>"
    }

``meansparse.safetensors`` holds ``<site>.mean`` and ``<site>.var``, float32, in each site's shape.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_meansparse.adapter.base import Fingerprint
from lightning_meansparse.layer import Center
from lightning_meansparse.moments import Statistics
from lightning_meansparse.sites import Site

FORMAT_VERSION = 1

_KEYS = {
    "format_version",
    "meansparse_version",
    "center",
    "statistics",
    "sites",
    "base",
    "calibration",
    "evaluation",
    "tensors_sha256",
}
_SITE_KEYS = {"site", "shape", "alpha"}
_BASE_KEYS = {"source", "revision", "dtype", "fingerprint"}
_EVALUATION_KEYS = ("n", "eps", "norm", "attacks")
_MAX_CHANNELS = 2**24


@dataclass(frozen=True)
class Adapter:
    """Statistics and α of every site, and the facts that make them usable by others.

    Args:
        sites: The sites, named relative to the base module.
        alphas: α per site, in standard deviations.
        tensors: ``"<site>.mean"`` and ``"<site>.var"``, float32 on the CPU, in the site's shape.
        fingerprint: The weights of the base that the statistics were measured on.
        center: The operators' reference, one for all.
        statistics: How the variances were averaged.
        source: Name of the base, such as ``"timm/resnet18"``.
        revision: Its revision.
        calibration: Facts about the data: data set, split, number of images.
        evaluation: Measured robustness, never without ``n``, ``eps``, ``norm`` and ``attacks``.
        meansparse_version: Version of this package that wrote it.
    """

    sites: tuple[Site, ...]
    alphas: tuple[float, ...]
    tensors: Mapping[str, Tensor]
    fingerprint: Fingerprint
    center: Center = "channel"
    statistics: Statistics = "pooled"
    source: str | None = None
    revision: str | None = None
    calibration: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    meansparse_version: str = ""

    def __post_init__(self) -> None:
        if self.evaluation is not None:
            missing = [key for key in _EVALUATION_KEYS if key not in self.evaluation]
            if missing:
                raise ValueError(
                    f"evaluation lacks {', '.join(missing)}: a robust accuracy means nothing "
                    f"without them. Give at least {', '.join(_EVALUATION_KEYS)}."
                )

    def config(self) -> dict[str, Any]:
        """Everything but the tensors, as plain JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "meansparse_version": self.meansparse_version,
            "center": self.center,
            "statistics": self.statistics,
            "sites": [
                {"site": str(site), "shape": list(site.shape), "alpha": alpha}
                for site, alpha in zip(self.sites, self.alphas, strict=True)
            ],
            "base": {
                "source": self.source,
                "revision": self.revision,
                "dtype": self.fingerprint.dtype,
                "fingerprint": dict(self.fingerprint.hashes),
            },
            "calibration": None if self.calibration is None else dict(self.calibration),
            "evaluation": None if self.evaluation is None else dict(self.evaluation),
        }

    @staticmethod
    def parse(config: Any, tensors: Mapping[str, Tensor], *, where: str) -> Adapter:
        """Check a config and its tensors and put them together.

        Args:
            config: The decoded JSON.
            tensors: The tensors that came with it.
            where: What is being read, for messages.

        Raises:
            ValueError: If the format version is unknown, anything required is missing or out of
                range, or the tensors are not exactly those of the sites.
        """
        _version(config, where)
        unknown: list[str] = []
        config = _known(config, _KEYS, "", unknown)
        entries = _get(config, "sites", list, where)
        if not entries:
            raise ValueError(f"{where}: sites is empty. Save the adapter again.")
        pairs = [_site(entry, i, where, unknown) for i, entry in enumerate(entries)]
        sites = tuple(site for site, _ in pairs)
        names = [str(site) for site in sites]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"{where}: sites named twice: {', '.join(repeated)}.")
        base = _known(_get(config, "base", dict, where), _BASE_KEYS, "base.", unknown)
        hashes = _get(base, "fingerprint", dict, where)
        if not all(isinstance(v, str) for v in hashes.values()):
            raise ValueError(f"{where}: base.fingerprint must map dtypes to SHA-256 hex digits.")
        facts = {key: config.get(key) for key in ("calibration", "evaluation")}
        for key, value in facts.items():
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{where}: {key} must be an object or null, got {value!r:.80}.")
        if unknown:
            warnings.warn(
                f"{where}: ignored what this version does not know: {', '.join(unknown)}. "
                "A newer lightning_meansparse wrote it; upgrade to use these.",
                stacklevel=4,
            )
        _check_tensors(sites, tensors, where)
        return Adapter(
            sites=sites,
            alphas=tuple(alpha for _, alpha in pairs),
            tensors=dict(tensors),
            fingerprint=Fingerprint(_get(base, "dtype", str, where), dict(hashes)),
            center=_choice(config, "center", get_args(Center), where),
            statistics=_choice(config, "statistics", get_args(Statistics), where),
            source=_optional_text(base, "source", where),
            revision=_optional_text(base, "revision", where),
            calibration=facts["calibration"],
            evaluation=facts["evaluation"],
            meansparse_version=str(config.get("meansparse_version", "")),
        )


def _version(config: Any, where: str) -> None:
    if not isinstance(config, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(config).__name__}.")
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise ValueError(
            f"{where}: format_version must be {FORMAT_VERSION}, got {version!r:.80}. "
            "This is not a MeanSparse adapter."
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{where}: format_version is {version}, this version of lightning_meansparse reads up "
            f"to {FORMAT_VERSION}. Upgrade it: pip install -U lightning_meansparse"
        )


def _site(entry: Any, index: int, where: str, unknown: list[str]) -> tuple[Site, float]:
    where = f"{where}: sites[{index}]"
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, got {type(entry).__name__}.")
    entry = _known(entry, _SITE_KEYS, f"sites[{index}].", unknown)
    shape = _get(entry, "shape", list, where)
    small = all(type(n) is int and 1 <= n <= _MAX_CHANNELS for n in shape)
    if not 1 <= len(shape) <= 8 or not small or math.prod(shape) > _MAX_CHANNELS:
        raise ValueError(f"{where}: shape must be 1 to 8 positive integers, got {shape!r:.80}.")
    alpha = entry.get("alpha")
    if type(alpha) not in (int, float) or not math.isfinite(alpha) or alpha < 0:
        raise ValueError(f"{where}: alpha must be a finite number >= 0, got {alpha!r:.80}.")
    name = _get(entry, "site", str, where)
    try:
        site = Site.parse(name, tuple(shape))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return site, float(alpha)


def _check_tensors(sites: tuple[Site, ...], tensors: Mapping[str, Tensor], where: str) -> None:
    expected = {f"{site}.{part}": site.shape for site in sites for part in ("mean", "var")}
    missing, extra = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    if missing or extra:
        raise ValueError(
            f"{where}: the tensors are not those of the sites: missing {_few(missing)}, "
            f"too many {_few(extra)}. Take both files from one save_adapter."
        )
    for name, shape in expected.items():
        value = tensors[name]
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: {name} must be a tensor, got {type(value).__name__}.")
        if tuple(value.shape) != tuple(shape) or value.dtype != torch.float32:
            raise ValueError(
                f"{where}: {name} must be float32 of shape {tuple(shape)}, "
                f"got {value.dtype} of shape {tuple(value.shape)}."
            )
        if not bool(value.isfinite().all()) or (name.endswith(".var") and bool((value < 0).any())):
            raise ValueError(f"{where}: {name} must be finite, and a variance not negative.")


def _known(raw: dict[str, Any], keys: set[str], prefix: str, unknown: list[str]) -> dict[str, Any]:
    unknown.extend(f"{prefix}{key}"[:80] for key in raw if key not in keys)
    return {key: value for key, value in raw.items() if key in keys}


def _get(raw: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = raw.get(key)
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {key} must be a {kind.__name__}, got {value!r:.80}.")
    return value


def _choice(raw: Mapping[str, Any], key: str, choices: tuple[Any, ...], where: str) -> Any:
    if raw.get(key) not in choices:
        raise ValueError(f"{where}: {key} must be one of {choices}, got {raw.get(key)!r:.80}.")
    return raw[key]


def _optional_text(raw: Mapping[str, Any], key: str, where: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: base.{key} must be text or null, got {value!r:.80}.")
    return value


def _few(names: list[str]) -> str:
    return (", ".join(names[:4]) + (f" … ({len(names)} in all)" if names[4:] else "")) or "none"
