"""From a training to the Hub and back in a fresh process, and what is said of bad adapters.

    python -m tests.benchmarks.hub

The clients of huggingface_hub, timm and transformers are real; the Hub is the stand-in of the
tests. Three small classifiers are trained and sparsified with Lightning, their bases published by
their own libraries, and their adapters pushed from the Lightning checkpoints. A fresh process then
has nothing but ``load_classifier("meansparse/org/...")``, once with the Hub and once without.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

# Before any import of Hugging Face code, which reads them once.
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1")
sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests' helpers

import torch
from adapters import Net, base_of, sparse
from bad_adapters import BAD
from hub import TOKEN, Hub, running_hub
from journeys import BASES, IMAGES, LOAD, publish_base, train
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_meansparse import load_adapter, push_adapter, save_adapter
from lightning_meansparse.surgery import operators

CARD = "README.md"


def loaded(hub: Hub, folder: Path, *, offline: bool) -> dict[str, torch.Tensor]:
    """The logits of a fresh process that knows the names of the repositories alone."""
    arguments = [str(folder / "images.pt"), str(folder / "logits.pt"), *BASES]
    environment = hub.environment(offline=offline)
    subprocess.run([sys.executable, "-c", LOAD, *arguments], env=environment, check=True)
    found: dict[str, torch.Tensor] = torch.load(folder / "logits.pt")
    return found


def journeys(console: Console) -> None:
    """Line 1 and 2: sizes, and whether the logits are the same bits."""
    table = Table("base", "repository", "sites", "config", "tensors", "card", "fresh", "offline")
    with (
        tempfile.TemporaryDirectory() as scratch,
        running_hub(Path(scratch) / "huggingface") as hub,
    ):
        folder = Path(scratch)
        os.environ["HF_TOKEN"] = TOKEN
        torch.save(IMAGES, folder / "images.pt")
        expected, rows = {}, {}
        for kind, place in BASES.items():
            classifier, checkpoint = train(kind, folder)
            publish_base(kind, classifier, folder)
            push_adapter(checkpoint, f"org/{kind}-sparse")
            with torch.no_grad():
                expected[kind] = classifier(IMAGES)
            files = hub.files(f"org/{kind}-sparse")
            names = ("meansparse_config.json", "meansparse.safetensors", CARD)
            sizes = [f"{len(files[name]):,} B" for name in names]
            rows[kind] = [place, f"org/{kind}-sparse", str(len(operators(classifier))), *sizes]
        for offline in (False, True):
            start = time.perf_counter()
            found = loaded(hub, folder, offline=offline)
            seconds = time.perf_counter() - start
            console.print(f"fresh process, offline={offline}: {seconds:.1f} s for all")
            for kind, row in rows.items():
                row.append("bit-equal" if torch.equal(found[kind], expected[kind]) else "DIFFERS")
        del os.environ["HF_TOKEN"]
        for row in rows.values():
            table.add_row(*row)
        console.print(table)
        vit = hub.files("org/vit-sparse")[CARD].decode()
        console.print(f"\nthe card of org/vit-sparse\n\n{vit}", markup=False, highlight=False)


def refusals(console: Console) -> None:
    """Line 4: what is wrong, and what is said; the model must stay as it was."""
    table = Table("what is wrong", "error", "model")
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, (damage, _)) in enumerate(BAD.items()):
            model = sparse()
            folder = save_adapter(model, Path(scratch) / str(number))
            damage(folder)
            table.add_row(name, *refused(base_of(model), folder))
        model = sparse()
        folder = save_adapter(model, Path(scratch) / "sound", base="org/net")
        other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
        table.add_row("another architecture", *refused(other, folder))
        table.add_row("the same architecture, other weights", *refused(Net(), folder))
        table.add_row("a model that is sparsified", *refused(model, folder))
    console.print(table)


def refused(model: nn.Module, folder: Path) -> tuple[str, str]:
    """Kind and beginning of the error, and whether the model is the same as before."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sites = [*operators(model)]
    try:
        load_adapter(model, folder)
        said = "ACCEPTED"
    except (ValueError, OSError) as error:
        words = str(error).replace(f"{folder}/", "").replace(str(folder), "the folder")
        said = f"{type(error).__name__}: {words:.150}"
    same = [*operators(model)] == sites and all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )
    return said, "untouched" if same else "CHANGED"


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    output = Console(width=200, soft_wrap=False)
    journeys(output)
    refusals(output)
