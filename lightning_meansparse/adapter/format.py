"""What an adapter says, and the strict reading of it. Nothing here touches a file or a model.

``docs/adapter.md`` promises what stands here: whoever adds a key or a tensor that a reader must not
overlook raises `FORMAT_VERSION`, and adds to `_KEYS`, `_TENSORS` and `_upgraded` how the older
version is read.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_meansparse.adapter.base import DTYPES, Fingerprint, hash_of
from lightning_meansparse.layer import Center
from lightning_meansparse.moments import Statistics
from lightning_meansparse.sites import Site

FORMAT_VERSION = 2

# The keys that each version has: at the top, in `base`, in each of `sites`.
_OLDEST = {"format_version", "center", "statistics", "sites", "base", "calibration", "evaluation"}
_OLDEST |= {"tensors_sha256"}
_KEYS = {
    1: (
        _OLDEST | {"meansparse_version"},
        {"source", "revision", "dtype", "fingerprint"},
        {"site", "shape", "alpha"},
    ),
    2: (
        _OLDEST | {"versions"},
        {"source", "revision", "library", "architecture", "options", "pixels"}
        | {"dtype", "fingerprint"},
        {"site", "shape", "axis", "alpha"},
    ),
}
# The tensors that each version has per site, and their dtypes; a count is one number.
_TENSORS = {
    1: {"mean": torch.float32, "var": torch.float32},
    2: {"mean": torch.float32, "m2": torch.float64, "count": torch.int64},
}
_EVALUATION_KEYS = ("n", "eps", "norm", "attacks")
_MAX_CHANNELS = 2**24
_LARGEST = torch.finfo(torch.float32).max

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Adapter:
    """Statistics and α of every site, and the facts that make them usable by others.

    Args:
        sites: The sites, named relative to the base module.
        alphas: α per site, in standard deviations.
        tensors: On the CPU, ``"<site>.mean"`` (float32, the site's shape), ``"<site>.m2"``
            (float64, the sum of squared deviations, the same shape) and ``"<site>.count"`` (int64,
            one number). Where the count is not known it is 0, and M2 the variance itself.
        fingerprint: The weights of the base that the statistics were measured on.
        center: The operators' reference, one for all.
        statistics: How the variances were averaged.
        source: Name of the base, such as ``"timm/resnet18"``.
        revision: Its commit; of torchvision, the name of the weights.
        library: Where the base comes from: ``"timm"``, ``"torchvision"`` or ``"transformers"``.
        architecture: What the base is, also where its source is a name that nobody else knows.
        options: What `load_classifier` was given besides name and revision; None if not known.
        pixels: Mean, std, bgr and input_size of the classifier; None if there was none.
        calibration: Facts about the data: data set, split, number of images.
        evaluation: Measured robustness, never without ``n``, ``eps``, ``norm`` and ``attacks``.
        versions: Of the packages that took part.
        unknown: What a newer version added, by its path in the JSON. It is written again.
    """

    sites: tuple[Site, ...]
    alphas: tuple[float, ...]
    tensors: Mapping[str, Tensor]
    fingerprint: Fingerprint
    center: Center = "channel"
    statistics: Statistics = "pooled"
    source: str | None = None
    revision: str | None = None
    library: str | None = None
    architecture: str | None = None
    options: Mapping[str, Any] | None = None
    pixels: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    unknown: Mapping[Path, Any] = field(default_factory=dict)

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
        config = {
            "format_version": FORMAT_VERSION,
            "center": self.center,
            "statistics": self.statistics,
            "sites": [
                {
                    "site": str(site),
                    "shape": list(site.shape),
                    "axis": list(site.axis),
                    "alpha": alpha,
                }
                for site, alpha in zip(self.sites, self.alphas, strict=True)
            ],
            "base": {
                "source": self.source,
                "revision": self.revision,
                "library": self.library,
                "architecture": self.architecture,
                "options": _plain(self.options),
                "pixels": _plain(self.pixels),
                "dtype": self.fingerprint.dtype,
                "fingerprint": dict(self.fingerprint.hashes),
            },
            "calibration": _plain(self.calibration),
            "evaluation": _plain(self.evaluation),
            "versions": dict(self.versions),
        }
        for path, value in self.unknown.items():
            place: Any = config
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = value
        return config

    def numbers(self, site: str) -> tuple[Tensor, Tensor, int]:
        """Mean and variance of a site, float32, and what they were measured on (0: not known)."""
        count = int(self.tensors[f"{site}.count"])
        var = self.tensors[f"{site}.m2"] / max(count, 1)
        return self.tensors[f"{site}.mean"], var.float(), count

    def hash(self) -> str:
        """What `statistics_hash` gives of a network that has this adapter."""
        return hash_of((str(site), *self.numbers(str(site))[:2]) for site in self.sites)

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
        version = _version(config, where)
        top_keys, base_keys, site_keys = _KEYS[version]
        unknown: dict[Path, Any] = {}
        config = _known(config, top_keys, (), unknown)
        entries = _get(config, "sites", list, where)
        if not entries:
            raise ValueError(f"{where}: sites is empty. Save the adapter again.")
        pairs = []
        for index, entry in enumerate(entries):
            at = f"{where}: sites[{index}]"
            if not isinstance(entry, dict):
                raise ValueError(f"{at}: expected an object, got {type(entry).__name__}.")
            pairs.append(_site(_known(entry, site_keys, ("sites", index), unknown), at))
        sites = tuple(site for site, _ in pairs)
        repeated = [name for name, n in Counter(map(str, sites)).items() if n > 1]
        if repeated:
            raise ValueError(f"{where}: sites named twice: {_few(repeated)}.")
        base = _known(_get(config, "base", dict, where), base_keys, ("base",), unknown)
        hashes = _get(base, "fingerprint", dict, where)
        versions = _get(config, "versions", dict, where) if version > 1 else {}
        if version == 1 and config.get("meansparse_version"):
            versions = {"lightning_meansparse": str(config["meansparse_version"])}
        for name, texts in (("base.fingerprint", hashes), ("versions", versions)):
            if not all(isinstance(text, str) for text in texts.values()):
                raise ValueError(f"{where}: {name} must map names to texts.")
        facts = {key: _optional(config, key, dict, where) for key in ("calibration", "evaluation")}
        about = {
            key: _optional(base, key, dict if key in ("options", "pixels") else str, where)
            for key in ("source", "revision", "library", "architecture", "options", "pixels")
        }
        if about["pixels"] is not None:
            _check_pixels(about["pixels"], f"{where}: base.pixels")
        _check_tensors(sites, tensors, _TENSORS[version], where)
        if not any(bool(value.any()) for name, value in tensors.items() if _spreads(name)):
            raise ValueError(f"{where}: every variance is 0, so nothing was measured.")
        adapter = Adapter(
            sites=sites,
            alphas=tuple(alpha for _, alpha in pairs),
            tensors=_upgraded(tensors),
            fingerprint=Fingerprint(_choice(base, "dtype", tuple(DTYPES), where), dict(hashes)),
            center=_choice(config, "center", get_args(Center), where),
            statistics=_choice(config, "statistics", get_args(Statistics), where),
            versions=versions,
            unknown=unknown,
            **about,
            **facts,
        )
        if unknown:
            warnings.warn(
                f"{where}: kept what this version does not know: "
                f"{_few([_shown(path) for path in unknown])}. A newer lightning_meansparse wrote "
                "it; upgrade to use it.",
                stacklevel=4,
            )
        return adapter


def _version(config: Any, where: str) -> int:
    if not isinstance(config, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(config).__name__}.")
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise ValueError(
            f"{where}: format_version must be 1 to {FORMAT_VERSION}, got {version!r:.80}. "
            "This is not a MeanSparse adapter."
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{where}: format_version is {version!r:.80}, this version of lightning_meansparse "
            f"reads up to {FORMAT_VERSION}. Upgrade it: pip install -U lightning_meansparse"
        )
    return version


def _site(entry: Mapping[str, Any], where: str) -> tuple[Site, float]:
    shape = _get(entry, "shape", list, where)
    small = all(type(n) is int and 1 <= n <= _MAX_CHANNELS for n in shape)
    if not 1 <= len(shape) <= 8 or not small or math.prod(shape) > _MAX_CHANNELS:
        raise ValueError(f"{where}: shape must be 1 to 8 positive integers, got {shape!r:.80}.")
    alpha: Any = entry.get("alpha")
    if type(alpha) not in (int, float) or not 0 <= alpha <= _LARGEST:
        raise ValueError(f"{where}: alpha must be a finite number >= 0, got {alpha!r:.80}.")
    name = _get(entry, "site", str, where)
    try:
        site = Site.parse(name, tuple(shape))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if entry.get("axis", list(site.axis)) != list(site.axis):
        raise ValueError(
            f"{where}: axis must be {list(site.axis)} with shape {shape}, got {entry['axis']!r:.80}"
        )
    return site, float(alpha)


def _check_tensors(
    sites: Sequence[Site],
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, torch.dtype],
    where: str,
) -> None:
    """Exactly the tensors of these sites, with numbers that an operator can have."""
    expected = {
        f"{site}.{part}": (dtype, () if part == "count" else site.shape)
        for site in sites
        for part, dtype in parts.items()
    }
    missing, extra = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{where}: the tensors are not those of the sites: missing {_few(missing)}, "
            f"too many {_few(extra)}. Take both files from one save_adapter."
        )
    for name, (dtype, shape) in expected.items():
        value = tensors[name]
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: {name} must be a tensor, got {type(value).__name__}.")
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise ValueError(
                f"{where}: {name} must be {dtype} of shape {shape}, "
                f"got {value.dtype} of shape {tuple(value.shape)}."
            )
        part = name.rpartition(".")[2]
        if not bool(value.isfinite().all()) or (part != "mean" and bool((value < 0).any())):
            raise ValueError(
                f"{where}: {name} must be finite"
                + ("." if part == "mean" else " and not negative.")
            )
    if "m2" in parts:
        for site in sites:
            m2, count = tensors[f"{site}.m2"], tensors[f"{site}.count"]
            if bool((m2 / count.clamp(min=1) > _LARGEST).any()):
                raise ValueError(f"{where}: {site}.m2 must be finite in float32 once divided.")


def _spreads(name: str) -> bool:
    return name.endswith((".var", ".m2"))


def _upgraded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Version 1 had variances, and did not say of how many values."""
    new = {}
    for name, value in tensors.items():
        site, _, part = name.rpartition(".")
        if part == "var":
            new[f"{site}.m2"] = value.double()
            new[f"{site}.count"] = torch.zeros((), dtype=torch.int64)
        else:
            new[name] = value
    return new


def _check_pixels(pixels: Mapping[str, Any], where: str) -> None:
    """The values that a Classifier can have; it checks itself how they go together."""
    for key in ("mean", "std"):
        numbers = pixels.get(key)
        if not isinstance(numbers, list) or not 1 <= len(numbers) <= 4:
            raise ValueError(f"{where}: {key} must be 1 to 4 numbers, got {numbers!r:.80}.")
        if not all(type(n) in (int, float) and abs(n) <= _LARGEST for n in numbers):
            raise ValueError(f"{where}: {key} must be finite numbers, got {numbers!r:.80}.")
    if not isinstance(pixels.get("bgr"), bool):
        raise ValueError(f"{where}: bgr must be true or false, got {pixels.get('bgr')!r:.80}.")
    size = pixels.get("input_size")
    if size is not None and not (
        isinstance(size, list)
        and len(size) == 3
        and all(type(n) is int and 1 <= n <= _MAX_CHANNELS for n in size)
    ):
        raise ValueError(f"{where}: input_size must be [C, H, W] or null, got {size!r:.80}.")


def _known(
    raw: Mapping[str, Any], keys: set[str], at: Path, unknown: dict[Path, Any]
) -> dict[str, Any]:
    """The entries of these keys; the others go into ``unknown``."""
    unknown.update({(*at, key): value for key, value in raw.items() if key not in keys})
    return {key: value for key, value in raw.items() if key in keys}


def _shown(path: Path) -> str:
    """``sites[1].gain`` for ``("sites", 1, "gain")``."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return "".join(steps).removeprefix(".")


def _get(raw: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = raw.get(key)
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {key} must be a {kind.__name__}, got {value!r:.80}.")
    return value


def _optional(raw: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    return None if raw.get(key) is None else _get(raw, key, kind, where)


def _choice(raw: Mapping[str, Any], key: str, choices: tuple[Any, ...], where: str) -> Any:
    if raw.get(key) not in choices:
        raise ValueError(f"{where}: {key} must be one of {choices}, got {raw.get(key)!r:.80}.")
    return raw[key]


def _plain(value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if value is None else dict(value)


def _few(names: Sequence[str]) -> str:
    """The first names, with escapes for what a terminal would not show as it is."""
    shown = ", ".join(_printable(name[:80]) for name in names[:4])
    return (shown + (f" … ({len(names)} in all)" if names[4:] else "")) or "none"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
