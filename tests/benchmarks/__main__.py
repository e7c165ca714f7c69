"""What the operator and the calibration cost, as ratios measured within one run.

    make bench                                  # a table
    make bench ARGS="--json bench.json"         # and a file to keep

Every row interleaves its two sides and compares medians, so that a slow moment of the machine
hits both.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_meansparse import MeanSparse, calibrate_, find_sites, sparsify_
from lightning_meansparse.demo import ConvNet


def ratio(one: Callable[[], object], other: Callable[[], object], repeats: int) -> float:
    """Median time of `one` over the median time of `other`."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 2):
        for run, seconds in zip((one, other), times, strict=True):
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 2:  # the first two warm up
                seconds.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def gradient(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    images = images.detach().requires_grad_()
    (grad,) = torch.autograd.grad(model(images).square().sum(), images)
    return grad


def operator_rows(device: str, repeats: int) -> dict[str, float]:
    x = torch.randn(32, 64, 28, 28, device=device)
    zeros = torch.zeros(64, 1, 1, device=device)
    operator = MeanSparse(zeros, zeros + 1, 0.2)
    with torch.no_grad():
        forward = ratio(lambda: operator(x), lambda: x.clone(), repeats)
    both = ratio(lambda: gradient(operator, x), lambda: gradient(torch.clone, x), repeats)
    return {"operator forward / clone": forward, "operator forward+backward / clone": both}


def model_rows(name: str, base: nn.Module, images: Tensor, repeats: int) -> dict[str, float]:
    base = base.to(images.device).eval().requires_grad_(False)
    plain = base.state_dict()
    sparse = type(base)() if isinstance(base, ConvNet) else timm.create_model(name)
    sparse = sparse.to(images.device).eval().requires_grad_(False)
    sparse.load_state_dict(plain)
    sparsify_(sparse, find_sites(sparse, images[:2]), alpha=0.2)
    calibrate_(sparse, [images])
    with torch.no_grad():
        forward = ratio(lambda: sparse(images), lambda: base(images), repeats)
        passes = ratio(lambda: calibrate_(sparse, [images]), lambda: base(images), repeats)
    both = ratio(lambda: gradient(sparse, images), lambda: gradient(base, images), repeats)
    return {
        f"{name} forward / base": forward,
        f"{name} forward+backward / base": both,
        f"{name} calibration / forward of the base": passes,
    }


def main() -> None:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    gray = torch.rand(128, 1, 28, 28, device=args.device)
    color = torch.rand(32, 3, 64, 64, device=args.device)
    rows = operator_rows(args.device, args.repeats)
    rows |= model_rows("ConvNet", ConvNet(), gray, args.repeats)
    for name in ("resnet18", "convnext_atto"):
        rows |= model_rows(name, timm.create_model(name), color, args.repeats)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    facts = {"device": device or args.device, "threads": torch.get_num_threads()}
    facts |= {"torch": torch.__version__, "python": platform.python_version()}
    table = Table("ratio of medians", "times", title=str(facts))
    for name, value in rows.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({**facts, "ratios": rows}, indent=2))


if __name__ == "__main__":
    main()
