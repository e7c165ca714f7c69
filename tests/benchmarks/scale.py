"""How long a published number takes on N GPUs: an estimate, written into docs/scale.md.

    python -m tests.benchmarks.scale

Passes per image are measured: what `full` cost at alpha = 0 and 0.2 in the records of the
Fashion-MNIST sweep, where 73 of 100 images stand. The speed of one model is published
(huggingface/pytorch-image-models at aa4b5850, in its folder results/, the file
benchmark-infer-amp-nchw-pt240-cu124-rtx4090.csv); that of the others is taken in proportion to
their floating-point operations, which are counted here. A backward pass to the images is taken for
a forward pass.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import lightning_meansparse.networks  # noqa: F401 - registers the published ones
from lightning_meansparse.records import MAIN, TEST, read_records
from tests.benchmarks.speed.page import ROOT

PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- begin: tests.benchmarks.scale -->\n", "<!-- end: tests.benchmarks.scale -->\n"
RECORDS = Path("docs/records/fashion_mnist_sweep")
KNOWN, PER_SECOND = "convnext_large", 1206.16  # images of 224 pixels, RTX 4090, mixed precision
MODELS = {  # name: (side of its images, images of the whole test set)
    "wide_resnet70_16": ("CIFAR", 32, 10_000),
    "wide_resnet94_16": ("CIFAR", 32, 10_000),
    "convnext_large": ("ImageNet", 224, 50_000),
    "swin_large_patch4_window7_224": ("ImageNet", 224, 50_000),
}


def main() -> None:
    """Write the table into the page anew."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


def table() -> str:
    """Hours for the base and one alpha under `full`, by model, images and GPUs."""
    passes = _passes_per_image()
    known = _operations(KNOWN, 224)
    lines = [
        f"`full` costs {passes:,.0f} passes per image for the base and one α together.",
        "",
        "| model | images | 1 GPU | 8 GPUs | 64 GPUs |",
        "|---|---|---|---|---|",
    ]
    for name, (data, side, whole) in MODELS.items():
        speed = PER_SECOND * known / _operations(name, side)
        for n in (1_000, whole):
            hours = passes * n / speed / 3600
            cells = (_duration(hours / gpus) for gpus in (1, 8, 64))
            lines.append(f"| {name} | {n:,} of {data} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _passes_per_image() -> float:
    frame = read_records(ROOT / RECORDS)[0].to_pandas()
    frame = frame[
        (frame["split"] == TEST) & (frame["round"] == MAIN) & frame.alpha.isin([0.0, 0.2])
    ]
    return float((frame.forwards + frame.backwards).sum() / frame["index"].nunique())


def _operations(name: str, side: int) -> int:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, side, side))
    return counter.get_total_flops()


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


if __name__ == "__main__":
    main()
