"""Imported checkpoints against the published classes that wrote them, bit for bit.

    git clone https://github.com/RobustBench/robustbench ../robustbench
    git clone https://github.com/SPIN-UMass/MeanSparse ../MeanSparse
    python -m tests.benchmarks.parity --robustbench ../robustbench --meansparse ../MeanSparse \
        --json docs/records/parity.json

Every published class is built with random weights, measures its statistics on random images by its
own code, gets a random threshold at every operator and is saved as the published files are. The
file is imported into our base network, and both are given the same images: logits and input
gradients must be the same bits. So must the logits of a fresh base with the adapter that the import
left. Small networks are the default; `--full` takes the published depths and widths, which needs
7 GB of memory and a minute for each.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from lightning_meansparse import (
    import_robustbench,
    load_adapter,
    load_classifier,
    restore_,
    save_adapter,
)
from lightning_meansparse.surgery import operators
from tests.benchmarks.published import AUTHORS, ZOO, Published, published


def compare(case: Published, *, full: bool, images: int, seed: int) -> dict[str, Any]:
    """Import one published checkpoint, and count the bits that differ."""
    torch.manual_seed(seed)
    side = case.size.pixels[full]
    theirs = case.build(**(case.size.full if full else case.size.small)).eval()
    randomise(theirs)
    calibrate(theirs, [torch.rand(images, 3, side, side) for _ in range(2)])
    options = {} if full else case.size.ours
    ours = load_classifier(f"timm/{case.base}", pretrained=False, **options)
    pixels = torch.rand(images, 3, side, side)
    weights = torch.randn(images, ours.num_classes)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "published.pt"
        torch.save(theirs.state_dict(), checkpoint)
        import_robustbench(checkpoint, ours)
        expected = outcome(theirs, pixels, weights)
        del theirs
        replaced = watch(ours)
        mine = outcome(ours, pixels, weights)
        adapter = save_adapter(ours, Path(folder) / "adapter", base=case.name)
        base = copy.deepcopy(ours)
        restore_(base)
        untouched = outcome(base, pixels, weights)
        load_adapter(base, adapter)
        again = outcome(base, pixels, weights)
        sizes = (checkpoint, *adapter.iterdir())
        bytes_of_checkpoint, *bytes_of_adapter = (file.stat().st_size for file in sizes)
    return {
        "published": case.name,
        "code": case.code,
        "base": case.base,
        "size": "full" if full else "small",
        "images": images,
        "seed": seed,
        "operators": len(operators(ours)),
        "replaced": replaced(),
        "logits": expected[0].numel(),
        "gradients": expected[1].numel(),
        "gradients_zero": int((expected[1] == 0).sum()),
        "logits_differ": differ(expected[0], mine[0]),
        "gradients_differ": differ(expected[1], mine[1]),
        "logits_unlike_base": differ(expected[0], untouched[0]),
        "adapter_logits_differ": differ(expected[0], again[0]),
        "adapter_gradients_differ": differ(expected[1], again[1]),
        "checkpoint_bytes": bytes_of_checkpoint,
        "adapter_bytes": sum(bytes_of_adapter),
    }


def randomise(model: nn.Module) -> None:
    """Random weights, of a size at which the signal neither dies nor explodes."""
    for name, value in model.named_parameters():
        if value.ndim > 1:
            nn.init.normal_(value, std=value[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(value, std=0.1)
        else:
            nn.init.uniform_(value, 0.5, 1.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def calibrate(model: nn.Module, batches: list[Tensor]) -> None:
    """Let the published operators measure by their own code, then set random thresholds."""
    published = [module for module in model.modules() if hasattr(module, "flag_update_statistics")]
    for operator in published:
        operator.flag_update_statistics.fill_(1)
        operator.batch_num.fill_(len(batches))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for operator in published:
        operator.flag_update_statistics.fill_(0)
        operator.threshold.uniform_(0.05, 0.5)


def outcome(model: nn.Module, pixels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of their weighted sum at the pixels."""
    pixels = pixels.clone().requires_grad_()
    logits = model(pixels)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), pixels)
    return logits.detach(), gradient


def watch(model: nn.Module) -> Callable[[], float]:
    """Count the values that the operators replace; gives their share when called."""
    counts = [0, 0]

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        counts[0] += int((args[0] != output).sum())
        counts[1] += output.numel()

    handles = [operator.register_forward_hook(count) for operator in operators(model).values()]

    def share() -> float:
        for handle in handles:
            handle.remove()
        return round(counts[0] / counts[1], 4)

    return share


def differ(one: Tensor, other: Tensor) -> int:
    """In how many places two tensors are not the same bits."""
    return int((one.view(torch.int32) != other.view(torch.int32)).sum())


# ---------------------------------------------------------------------------------------- record


def table(record: Mapping[str, Any]) -> str:
    """The record as the table in the documentation."""
    head = "class | its code | base network here | size | operators | values replaced"
    head += " | logits that differ | input gradients that differ | checkpoint → adapter"
    lines = [f"| {head} |", "|---" * 9 + "|"]
    for row in record["rows"].values():
        cells = [
            row["published"],
            row["code"].replace("/", "/<wbr>"),
            f"`{row['base']}`",
            row["size"],
            row["operators"],
            f"{100 * row['replaced']:.0f} %",
            f"{row['logits_differ']} of {row['logits']:,}",
            f"{row['gradients_differ']} of {row['gradients']:,}",
            f"{row['checkpoint_bytes'] / 1e6:,.1f} MB → {row['adapter_bytes'] / 1e3:,.0f} kB",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Compare, print the table, keep the record."""
    args = _arguments()
    torch.set_num_threads(1)
    console = Console(log_path=False)
    record: dict[str, Any] = {"commits": {}, "versions": {}, "rows": {}}
    if args.json and args.json.is_file():
        record = json.loads(args.json.read_text())
    record["versions"] = {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "torchvision", "timm")
    }
    record["commits"][ZOO] = _commit(args.robustbench)
    if args.meansparse:
        record["commits"][AUTHORS] = _commit(args.meansparse)
    for case in published(args.robustbench, args.meansparse):
        row = compare(case, full=args.full, images=args.images, seed=args.seed)
        console.log(row)
        record["rows"][f"{row['size']}, {case.name}, {case.code}"] = row
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    console.print(table(record), soft_wrap=True)
    wrong = [
        name
        for name, row in record["rows"].items()
        if any(number for key, number in row.items() if key.endswith("_differ"))
    ]
    if wrong:
        sys.exit(f"these differ: {'; '.join(wrong)}")


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--robustbench", type=Path, required=True, help="a checkout of it")
    parser.add_argument("--meansparse", type=Path, help="a checkout of SPIN-UMass/MeanSparse")
    parser.add_argument("--full", action="store_true", help="published depths and widths")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="keep the record; other rows in it stay")
    return parser.parse_args()


if __name__ == "__main__":
    main()
