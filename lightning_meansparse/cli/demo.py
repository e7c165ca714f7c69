"""`meansparse demo`: the whole idea on real images, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_meansparse.cli.words import Words

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_meansparse.tasks import AlphaSweep

COMMAND = "meansparse demo"
HERE = Path(__file__).parent.parent / "demo"
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.6)
EPS = 0.1
# Fewer steps and queries than the recipe's, for a minute instead of an hour.
ATTACKS: tuple[str | dict[str, Any], ...] = (
    "pgd",
    {"attack": "square", "options": {"n_queries": 100}},
    {"attack": "adaptive-ce", "options": {"steps": 30}},
)


def run(args: Sequence[str]) -> None:
    """Fine-tune, calibrate, sweep, choose, test, report; and say what happens."""
    words = Words("demo")
    words.add_argument("--output", default="meansparse_demo", help="folder for what is written")
    words.add_argument("--images", type=int, default=200, help="held-out images to choose alpha on")
    words.add_argument("--test-images", type=int, default=400, help="test images to report")
    words.add_argument("--steps", type=int, default=20, help="training steps of the fine-tuning")
    words.add_argument("--seed", type=int, default=0, help="seed of everything random")
    given = words.parse_args(args)
    for name in ("images", "test_images", "steps"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")

    from rich.console import Console

    with Console(stderr=True).status("loading torch and Lightning …"):
        from lightning_meansparse.cli.console import calm, make_console

    console = make_console()
    with calm(console):
        demonstrate(
            console,
            Path(given.output),
            images=given.images,
            test_images=given.test_images,
            steps=given.steps,
            seed=given.seed,
        )


def demonstrate(
    console: Console,
    output: Path,
    *,
    images: int = 200,
    test_images: int = 400,
    steps: int = 20,
    seed: int = 0,
    checkpoint: Path = HERE / "checkpoint",
    alphas: Sequence[float] = ALPHAS,
    attacks: Sequence[str | dict[str, Any]] = ATTACKS,
) -> AlphaSweep:
    """Run the demo and return the finished sweep.

    Args:
        console: Where to tell.
        output: Folder for records, report and adapter; those of an earlier demo are replaced.
        images: Held-out images that choose alpha.
        test_images: Test images that are reported.
        steps: Of fine-tuning.
        seed: Of everything random.
        checkpoint: Folder of the robust classifier to begin with.
        alphas: Thresholds to try.
        attacks: Attacks at each of them.

    Raises:
        FileNotFoundError: If the package came without its demo files.
        ValueError: If the folder holds another sweep.
    """
    if not checkpoint.is_dir():
        raise FileNotFoundError(
            f"the demo's checkpoint is missing: {checkpoint}; install the package again"
        )
    import torch
    from lightning.pytorch import Trainer, seed_everything

    from lightning_meansparse import (
        AdversarialTraining,
        AlphaSweep,
        ImageDataModule,
        MeanSparseCallback,
        load_classifier,
    )
    from lightning_meansparse.cli.sweep import show
    from lightning_meansparse.report import write_report
    from lightning_meansparse.report.drawing import require_matplotlib
    from lightning_meansparse.tasks.journal import clear

    require_matplotlib()
    clear(output, command=COMMAND)  # it trains anew, so there is nothing to go on with
    seed_everything(seed, verbose=False)
    data = ImageDataModule(
        str(HERE / "fashion_mnist"),
        batch_size=100,
        limit_holdout=images,
        limit_test=test_images,
        seed=seed,
    )
    data.setup()
    step = _Steps(console, 4)
    console.print(
        "\n[bold]MeanSparse[/] replaces small deviations from a channel's mean by the mean, at "
        "every activation.\nIt makes networks look more robust. Are they?\n"
    )

    step(
        "Fine-tune",
        f"a small convolutional network, already robust on Fashion-MNIST (L∞, ε = {EPS}), for "
        f"{steps} more steps of PGD adversarial training. One callback calibrates it afterwards: "
        "MeanSparseCallback(alpha=0.2)",
    )
    task = AdversarialTraining(
        load_classifier(checkpoint),
        eps=EPS,
        steps=5,
        # A rate of the end of the original training: a breath, not a change.
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
        val_steps=0,
        seed=seed,
    )
    callback = MeanSparseCallback(alpha=0.2)
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    Trainer(
        max_steps=steps,
        limit_val_batches=0,
        callbacks=[callback],
        enable_progress_bar=console.is_terminal,
        **options,
    ).fit(task, datamodule=data)

    step(
        "Sweep",
        f"attack {images} held-out images at every α, with the exact gradient (pgd), without "
        "gradients (square), and knowing the operator (adaptive)",
    )
    sweep = AlphaSweep(
        task,
        alphas=alphas,
        attacks=attacks,
        eps=EPS,
        output=output,
        seed=seed,
    )
    sweep.notes["command"] = COMMAND
    sweep.progress.console = console
    trainer = Trainer(enable_progress_bar=True, **options)
    trainer.validate(sweep, datamodule=data, verbose=False)

    step("Test", f"measure the choice on {test_images} test images, which have chosen nothing")
    trainer.test(sweep, datamodule=data, verbose=False)
    show(console, sweep)

    step("Report", "the same with pictures, and files to go on with")
    report = write_report(output)
    _tell_files(console, output, report)
    return sweep


class _Steps:
    """Numbers the steps of the demo as it tells them."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.at = console, total, 0

    def __call__(self, name: str, text: str) -> None:
        self.at += 1
        self.console.print(f"[bold cyan]{self.at}/{self.total} {name}[/]  {text}")


def _tell_files(console: Console, output: Path, report: Path) -> None:
    for name, what in (
        (report.name, "what was found, with pictures: open it in a browser"),
        ("report.png", "the same as one picture"),
        ("records.parquet", "one row per image, α and attack"),
        ("adapter/", "the chosen α and the statistics, kilobytes: load_adapter(model, folder)"),
    ):
        console.print(f"  {output / name}  [dim]{what}[/]", soft_wrap=True)
    console.print(
        "\nNext: your own model in one line, [bold]Trainer(callbacks=[MeanSparseCallback(0.2)])[/];"
        "\nthe whole of Fashion-MNIST, [bold]meansparse sweep --config "
        "recipes/fashion_mnist_sweep.yaml[/]."
    )
