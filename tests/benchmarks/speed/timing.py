"""Times that survive a busy machine, and where they were taken."""

from __future__ import annotations

import datetime
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor


def medians(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 3,
    clock: Callable[[], float] | None = None,
) -> dict[str, float]:
    """Median seconds of each, all of them taking turns, so that a slow moment hits them all.

    On a CPU these are seconds of the process, which what else runs there does not take away.
    """
    if clock is None:
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    for turn in range(-warmup, repeats):
        for name, run in runs.items():
            start = clock()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 0:
                times[name].append(clock() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def ratios(runs: Mapping[str, Callable[[], object]], over: str, repeats: int) -> dict[str, float]:
    """Medians as multiples of one of them.

    Each is measured against that one alone: what a third leaves behind in the memory allocator
    would be paid by whoever comes next.
    """
    found = {}
    for name in runs:
        if name != over:
            pair = medians({name: runs[name], over: runs[over]}, repeats)
            found[name] = pair[name] / pair[over]
    return found


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, flow: Tensor) -> Tensor:
    """One forward and one backward pass, down to ``x``."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(function(x), x, flow)
    return grad


def machine(device: str) -> dict[str, object]:
    """Where and with what a measurement was made, and how busy the machine was."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm", "lightning", "lightning_meansparse")},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
