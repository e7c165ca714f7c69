"""The paper's equations in NumPy, written apart from the package so that the two can disagree."""

from __future__ import annotations

import numpy as np


def mean_sparse(x: np.ndarray, mean: np.ndarray, var: np.ndarray, alpha: float) -> np.ndarray:
    """arXiv 2406.05927, Sec. II-C: x where |x − μ| >= α·σ, else μ; broadcast by NumPy's rules."""
    keep = ~(np.abs(x - mean) < np.asarray(alpha, mean.dtype) * np.sqrt(var))
    return np.where(keep, x, np.broadcast_to(mean, x.shape).astype(x.dtype))


def smooth_gate(
    x: np.ndarray, mean: np.ndarray, var: np.ndarray, alpha: float, temperature: float
) -> np.ndarray:
    """μ + (x − μ) · sigmoid((|x − μ| − c) / T), c = α·σ, T = temperature · c.

    The smooth rule uses its slope.
    """
    d = x - mean
    c = alpha * np.sqrt(var)
    return mean + d / (1 + np.exp(-(np.abs(d) - c) / (temperature * c)))


def pooled(batches: list[np.ndarray], axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population variance of everything at once, in extended precision."""
    everything = np.concatenate(batches).astype(np.longdouble)
    return everything.mean(axes), everything.var(axes)


def official(batches: list[np.ndarray], axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The authors' utils_sparse.py: equal-weight means of batch means and unbiased variances."""
    means = [batch.astype(np.longdouble).mean(axes) for batch in batches]
    variances = [batch.astype(np.longdouble).var(axes, ddof=1) for batch in batches]
    return np.mean(means, axis=0), np.mean(variances, axis=0)
