"""How cost grows: processor time over the number of everything, and a picture of it.

    python -m tests.benchmarks.growth --write

Along each axis all other sizes are held. What is linear lies on the dotted line, which has slope 1
and passes through the largest measurement; below it a fixed cost shows. The exponent that is
printed is the slope between the largest measurement and the one at a quarter of its size.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch
from rich.console import Console
from torch import Tensor, nn

from lightning_meansparse import MeanSparse, calibrate_, find_sites, sparsify_
from lightning_meansparse.attacks import SUITES, evaluate
from lightning_meansparse.surgery import set_alpha
from tests.benchmarks.speed.page import RESULTS, ROOT
from tests.benchmarks.speed.timing import gradient, machine, medians

PICTURE = ROOT / "docs" / "growth.svg"
ALPHA = 0.2


def main() -> None:
    """Measure, print, and write JSON and the picture where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="keep what was measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console()
    curves = {}
    for name, runs in _axes():
        # One size after the other: in turns, each would pay for the memory that the last gave back.
        sizes = list(runs)
        seconds = [medians({"it": run}, args.repeats)["it"] for run in runs.values()]
        slope = exponent(sizes, seconds)
        curves[name] = {"sizes": sizes, "seconds": seconds, "exponent": slope}
        console.print(name, sizes, [f"{1e3 * s:.3g} ms" for s in seconds], f"exponent {slope:.2f}")
    if args.write:
        record = {"machine": machine("cpu"), "repeats": args.repeats, "curves": curves}
        (RESULTS / "growth.json").write_text(json.dumps(record, indent=2) + "\n")
        draw(curves)


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The power of size that seconds grow with between a quarter of the largest size and it."""
    low = max(place for place, size in enumerate(sizes) if 4 * size <= sizes[-1])
    return math.log(seconds[-1] / seconds[low]) / math.log(sizes[-1] / sizes[low])


def _axes() -> Iterator[tuple[str, dict[int, Callable[[], object]]]]:
    """What is counted, and what runs at each count."""
    yield "channels", {n: _operator(32, n, 16) for n in (16, 32, 64, 128, 256)}
    yield "batch", {n: _operator(n, 64, 16) for n in (4, 8, 16, 32, 64, 128, 256)}
    yield "image side, squared", {n * n: _operator(32, 64, n) for n in (4, 8, 16, 32, 64)}
    yield "sites", {n: _network(n) for n in (2, 4, 8, 16, 32)}
    yield "calibration images", {n: _calibration(n) for n in (32, 64, 128, 256, 512)}
    yield "samples attacked", {n: partial(_attack, n, 1) for n in (16, 32, 64, 128)}
    yield "alphas attacked", {n: partial(_attack, 16, n) for n in (1, 2, 4, 8)}


def _operator(batch: int, channels: int, side: int) -> Callable[[], object]:
    """Forward and backward of one operator."""
    mean = torch.randn(channels, 1, 1)
    operator = MeanSparse(mean, torch.ones_like(mean), ALPHA)
    x = torch.randn(batch, channels, side, side)
    return partial(gradient, operator, x, torch.randn_like(x))


def _sparsified(sites: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1)]
    for _ in range(sites):
        layers += [nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()
    sparsify_(model, find_sites(model, torch.rand(2, 3, 16, 16)), alpha=ALPHA)
    calibrate_(model, [torch.rand(32, 3, 16, 16)])
    return model


def _network(sites: int) -> Callable[[], object]:
    model, images = _sparsified(sites), torch.rand(32, 3, 16, 16)
    return partial(gradient, model, images, torch.ones(32, 10))


def _calibration(images: int) -> Callable[[], object]:
    model = _sparsified(4)
    return partial(calibrate_, model, [torch.rand(32, 3, 16, 16)] * (images // 32))


@cache
def _victim() -> tuple[nn.Module, Tensor]:
    return _sparsified(4), torch.rand(128, 3, 16, 16)


def _attack(samples: int, alphas: int) -> None:
    """The `quick` suite on a network that gets every sample right, at several alphas."""
    model, images = _victim()
    images = images[:samples]
    for number in range(alphas):
        set_alpha(model, 0.1 * number)
        with torch.no_grad():
            labels = model(images).argmax(1)
        evaluate(model, images, labels, attacks=SUITES["quick"], eps="1/255", batch_size=16)


def draw(curves: dict[str, dict[str, Sequence[float]]]) -> None:
    """One panel per axis, with the line that a linear cost lies on."""
    from matplotlib.figure import Figure

    from lightning_meansparse.report.drawing import LIGHT

    figure = Figure(figsize=(10, 5.2), layout="constrained", facecolor=LIGHT["paper"])
    panels = iter(figure.subplots(2, 4).flat)
    for (name, curve), panel in zip(curves.items(), panels, strict=False):
        sizes, milliseconds = curve["sizes"], [1e3 * s for s in curve["seconds"]]
        line = [milliseconds[-1] * size / sizes[-1] for size in sizes]
        panel.loglog(sizes, line, ":", color=LIGHT["muted"])
        panel.loglog(sizes, milliseconds, "o-", color=LIGHT["worst"], markersize=4)
        panel.set_title(f"{name}\nexponent {curve['exponent']:.2f}", fontsize=10)
        panel.minorticks_off()
        panel.set_xticks(sizes, [f"{size}" for size in sizes], rotation=45, fontsize=8)
        ends = [milliseconds[0], milliseconds[-1]]
        panel.set_yticks(
            ends, [f"{end:,.0f}" if end > 99 else f"{end:.2g}" for end in ends], fontsize=8
        )
    for panel in panels:
        panel.set_axis_off()
    figure.supylabel("milliseconds", fontsize=10)
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
