"""The table of commands: what each does, one example, and where its code is."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

Run = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Command:
    """One command of `meansparse`.

    Args:
        summary: What it does, a sentence.
        example: A line that works as it stands.
        room: Module with the code, imported only when the command runs.
    """

    summary: str
    example: str
    room: str

    def load(self) -> Run:
        """Import the code; its `run` takes the words after the command's name."""
        run: Run = import_module(self.room).run
        return run


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "Show the whole idea in a minute or two, on images that come with the package: fine-tune "
        "with the callback, calibrate, sweep five alphas, choose one, report.",
        "meansparse demo --output my_first_sweep",
        "lightning_meansparse.cli.demo",
    ),
    "fit": Command(
        "Train a classifier: PGD adversarial training, TRADES or standard training.",
        "meansparse fit --config recipes/fashion_mnist_pgd.yaml",
        "lightning_meansparse.cli.fit",
    ),
    "validate": Command(
        "Measure clean and robust accuracy of one classifier, with or without an adapter.",
        "meansparse validate --config recipes/fashion_mnist_sweep.yaml --alpha 0.2",
        "lightning_meansparse.cli.validate",
    ),
    "sites": Command(
        "List the places of a model where operators can stand: name, shape of the statistics, "
        "channel axis, role, the layer that made the channels; and what is left out, and why.",
        "meansparse sites timm/resnet18",
        "lightning_meansparse.cli.sites",
    ),
    "sweep": Command(
        "Calibrate a classifier, choose alpha on held-out images, report on test images.",
        "meansparse sweep --config recipes/fashion_mnist_sweep.yaml",
        "lightning_meansparse.cli.sweep",
    ),
    "export": Command(
        "Write a sparsified classifier as one file that runs without this package: ONNX, or a "
        "program of torch.export. Pixels in [0, 1] go in, logits come out.",
        "meansparse export meansparse/org/name --output model.onnx",
        "lightning_meansparse.cli.export",
    ),
    "report": Command(
        "Make the report anew from the records of a sweep.",
        "meansparse report my_first_sweep",
        "lightning_meansparse.cli.report",
    ),
    "card": Command(
        "Write the model card of an adapter for the Hub, its numbers from the records of a sweep.",
        "meansparse card my_first_sweep",
        "lightning_meansparse.cli.card",
    ),
    "push": Command(
        "Publish an adapter on the Hugging Face Hub, with its model card, in one commit.",
        "meansparse push my_first_sweep org/name --base timm/hf-hub:org/base",
        "lightning_meansparse.cli.push",
    ),
}


def overview() -> str:
    """Return what `meansparse --help` shows."""
    width = min(100, shutil.get_terminal_size().columns)
    lines = [
        "usage: meansparse COMMAND [options]",
        "",
        *textwrap.wrap(
            "MeanSparse for any vision classifier, measured honestly: small deviations from a "
            "channel's mean are replaced by the mean, which makes networks look more robust. "
            "Whether they are is what these commands find out.",
            width,
        ),
        "",
        "commands:",
    ]
    for name, command in COMMANDS.items():
        lines += textwrap.wrap(
            command.summary,
            width,
            initial_indent=f"  {name:<10}",
            subsequent_indent=" " * 12,
        )
        lines += [f"{'':12}$ {command.example}", ""]
    lines += [
        "New here? Begin with `meansparse demo`. Options: `meansparse COMMAND --help`.",
        "Version: `meansparse --version`. After an error, MEANSPARSE_DEBUG=1 shows the traceback.",
    ]
    return "\n".join(lines) + "\n"
