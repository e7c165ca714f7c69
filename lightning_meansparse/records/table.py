"""The records table: its columns, and how an evaluation becomes one."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from importlib import metadata as distributions
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from lightning_meansparse.attacks import Evaluation

FORMAT_VERSION = 2
"""Version of the file layout; it moves alone, and readers keep every older one."""

HELD_OUT = "held-out"
"""Split name of the samples that choose alpha."""

TEST = "test"
"""Split name of the samples that are reported and never choose anything."""

MAIN = "main"
"""The round that counts; the others only led to a choice (racing, bisection) or are checks."""

SCHEMA = pa.schema(
    [
        pa.field("split", pa.string(), nullable=False),
        pa.field("round", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("alpha", pa.float64(), nullable=False),
        pa.field("attack", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("order", pa.int64(), nullable=False),
        pa.field("standing", pa.bool_(), nullable=False),
        pa.field("attacked", pa.bool_(), nullable=False),
        pa.field("margin", pa.float32(), nullable=False),
        pa.field("noise", pa.float32(), nullable=False),
        pa.field("zero_gradient", pa.float32(), nullable=False),
        pa.field("probabilities", pa.bool_(), nullable=False),
        pa.field("forwards", pa.int64(), nullable=False),
        pa.field("backwards", pa.int64(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
    ]
)
"""Columns of a records table.

``standing`` is cumulative. Four columns tell of the clean image, on every row of it: ``margin`` of
the logits, ``noise`` (largest change of a logit between two forward passes), ``zero_gradient``
(share of the pixels whose gradient is exactly 0), ``probabilities`` (the output looks like some).
``noise`` and ``zero_gradient`` are NaN where they were not measured.
"""

_PACKAGES = ("lightning_meansparse", "torch", "lightning", "timm", "transformers", "torchattacks")


def rows(
    evaluation: Evaluation,
    *,
    alpha: float,
    split: str,
    round: str = MAIN,
    kinds: Sequence[str] | None = None,
) -> pa.Table:
    """Turns one batch's evaluation into a records table.

    The first attack of every sample is ``"clean"`` (order 0, kind ``"clean"``), whose evaluations
    are those on the clean image; of an evaluation without attacks it is the only one.

    Args:
        evaluation: an `Evaluation`: ``attacks``, ``labels``, ``indices``, ``clean``, ``standing``,
            ``attacked``, ``margin``, ``noise``, ``zero_gradient``, ``probabilities``,
            ``forwards``, ``backwards``, ``seed`` for N samples and A attacks, as tensors or arrays.
        alpha: threshold in standard deviations; 0 for the base model.
        split: name of the split, `HELD_OUT` or `TEST`.
        round: name of the comparable measurement inside the split: the same attacks on the same
            samples for every alpha of it.
        kinds: kind of each attack; ``evaluation.kinds`` when None.

    Returns:
        A table of ``N * (A + 1)`` rows with the columns of `SCHEMA`, sample by sample.

    Raises:
        ValueError: shapes, names, alpha or kinds do not fit together.
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be a finite number >= 0 (0 = base model). Got {alpha}.")
    if not split:
        raise ValueError(f"split must be a name such as {HELD_OUT!r} or {TEST!r}. Got ''.")
    if not round:
        raise ValueError(f"round must be a name such as {MAIN!r}. Got ''.")
    attacks = tuple(evaluation.attacks)
    if len({"clean", *attacks}) != len(attacks) + 1:
        raise ValueError(
            f"evaluation.attacks must be distinct names other than 'clean'. Got {attacks}."
        )
    kinds = tuple(evaluation.kinds if kinds is None else kinds)
    if len(kinds) != len(attacks):
        raise ValueError(f"kinds must name one kind for each of {attacks}. Got {kinds}.")
    indices = _array(evaluation, "indices", None)
    n, width = len(indices), len(attacks) + 1

    def per_sample(name: str) -> np.ndarray:
        return np.repeat(_array(evaluation, name, (n,)), width)

    def per_attack(name: str, clean: np.ndarray) -> np.ndarray:
        rest = _array(evaluation, name, (n, width - 1))
        return np.concatenate([clean[:, None], rest], axis=1).reshape(-1)

    # Attacks come after a second look, at noise and gradient.
    looks = np.full(n, bool(attacks), dtype=np.int64)
    columns = {
        "split": [split] * (n * width),
        "round": [round] * (n * width),
        "index": np.repeat(indices, width),
        "label": per_sample("labels"),
        "alpha": np.full(n * width, abs(float(alpha))),
        "attack": ["clean", *attacks] * n,
        "kind": ["clean", *kinds] * n,
        "order": np.tile(np.arange(width), n),
        "standing": per_attack("standing", _array(evaluation, "clean", (n,))),
        "attacked": per_attack("attacked", np.zeros(n, dtype=bool)),
        "margin": per_sample("margin").astype(np.float32),
        "noise": per_sample("noise").astype(np.float32),
        "zero_gradient": per_sample("zero_gradient").astype(np.float32),
        "probabilities": per_sample("probabilities"),
        "forwards": per_attack("forwards", 1 + looks),
        "backwards": per_attack("backwards", looks),
        "seed": np.full(n * width, int(evaluation.seed)),
    }
    return pa.table(columns, schema=SCHEMA)


def _array(evaluation: Evaluation, name: str, shape: tuple[int, ...] | None) -> np.ndarray:
    value = getattr(evaluation, name)
    array = value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
    if array.shape != (shape or (array.size,)):
        raise ValueError(
            f"evaluation.{name} must have the shape {shape or '(N,)'}. Got {array.shape}."
        )
    return array


def environment() -> dict[str, Any]:
    """Versions and hardware, for the metadata of a records file.

    Returns:
        ``{"versions": {package: version}, "hardware": {"machine", "cores", "gpu"}}``; packages that
        are not installed are left out.
    """
    import torch

    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = distributions.version(name)
        except distributions.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "gpu": gpus}
    return {"versions": versions, "hardware": hardware}
