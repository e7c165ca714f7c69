"""AlphaSweep: calibrate, try every alpha on held-out images, choose one, report it on test ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_meansparse.adapter import load_adapter, save_adapter
from lightning_meansparse.attacks import (
    AttackSpec,
    BaseExamples,
    check_norm,
    evaluate,
    parse_eps,
    resolve_attacks,
)
from lightning_meansparse.classifier import Classifier, load_classifier
from lightning_meansparse.layer import Center, check_alpha, check_center
from lightning_meansparse.moments import Statistics
from lightning_meansparse.records import (
    HELD_OUT,
    TEST,
    AlphaSummary,
    choose_alpha,
    environment,
    rows,
    summarize,
    verdict,
    write_records,
)
from lightning_meansparse.surgery import alpha_set, operators, set_alpha
from lightning_meansparse.tasks import facts
from lightning_meansparse.tasks.ascent import Norm
from lightning_meansparse.tasks.batches import images_and_labels
from lightning_meansparse.tasks.calibration import Where, calibrated
from lightning_meansparse.tasks.occupancy import Occupancy
from lightning_meansparse.tasks.progress import SweepProgress
from lightning_meansparse.tasks.ranks import merged_table, summed
from lightning_meansparse.tasks.samples import batch_indices, first_images

_log = logging.getLogger(__name__)

Attacks = str | Sequence[str | dict[str, Any] | AttackSpec]


class AlphaSweep(LightningModule):
    """Find out whether MeanSparse makes a classifier more robust, and at which alpha.

    `trainer.validate(sweep, datamodule=data)` calibrates the operators on training images without
    augmentation, attacks every held-out image at every alpha, and chooses the alpha with the
    largest worst-case gain over the base model (alpha = 0, always among them); when none gains, the
    choice is 0. `trainer.test(sweep, datamodule=data)` then measures base and choice on the test
    images, which have chosen nothing.

    Each image is attacked at all alphas in a row: adaptive attacks start from the base model's
    adversarial examples, which are made once. Every number is logged to every logger of the
    trainer, per alpha: `clean_acc/alpha_0.2`, `robust_acc/<attack>/alpha_0.2` (after this attack
    and all before it), `robust_acc/worst/alpha_0.2`, `gain/worst/alpha_0.2` (worst case minus that
    of the base on the same images) and `gain/worst_se/alpha_0.2`; then `chosen_alpha`.

    On several devices each image counts once, whatever a distributed sampler repeats.

    Args:
        model: A classifier of pixels in [0, 1], or whatever `load_classifier` takes. One that is
            sparsified and calibrated already keeps its operators and statistics.
        alphas: Thresholds to try, in standard deviations.
        attacks: Suite, name, class path, dictionary, or a list of these; see `resolve_attacks`.
        eps: Radius of the ball in pixel units, a number or text such as `"8/255"`.
        norm: `"Linf"` or `"L2"`.
        where: Sites, see `find_sites`.
        strict: Whether activations that cannot be reached are an error, or a warning.
        adapter: Folder or Hub id of an adapter; its sites and statistics are used, and nothing is
            calibrated.
        statistics: `"pooled"` (exact) or `"official"` (the authors' averaging).
        center: What a replaced value becomes; see `MeanSparse`.
        calibration_batches: Calibrate on at most so many batches; None for all that the data give.
        test_alphas: What `trainer.test` measures beside the base: the `"chosen"` alpha, or `"all"`.
        output: Folder for records.parquet, sites.json and adapter/; None writes nothing.
        seed: Of all noise in the attacks.

    Attributes:
        classifier: The sparsified `Classifier`; after `validate` at the chosen alpha.
        alphas: All alphas, ascending, with 0.
        chosen_alpha: What `validate` chose; None before.
        summaries: Per split (`"held-out"`, `"test"`) one `AlphaSummary` per alpha.
        notes: Anything to keep in the records' metadata, such as the command.

    Raises:
        ValueError: If an alpha is negative, a name unknown, or `eps` out of range.

    Examples:
        >>> from lightning_meansparse.demo import ConvNet
        >>> sweep = AlphaSweep(ConvNet(width=4), alphas=[0.3, 0.1], attacks="pgd", eps="8/255")
        >>> sweep.alphas
        (0.0, 0.1, 0.3)
    """

    def __init__(
        self,
        model: nn.Module | str,
        *,
        alphas: Sequence[float] = (0.1, 0.2, 0.3, 0.4),
        attacks: Attacks = "basic",
        eps: float | str,
        norm: Norm = "Linf",
        where: Where = "activations",
        strict: bool = True,
        adapter: str | Path | None = None,
        statistics: Statistics = "pooled",
        center: Center = "channel",
        calibration_batches: int | None = None,
        test_alphas: Literal["chosen", "all"] = "chosen",
        output: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for alpha in alphas:
            check_alpha(alpha)
        check_norm(norm)
        check_center(center)
        if test_alphas not in ("chosen", "all"):
            raise ValueError(f"test_alphas must be 'chosen' or 'all', got {test_alphas!r}")
        if calibration_batches is not None and calibration_batches < 1:
            raise ValueError(
                f"calibration_batches must be None or at least 1, got {calibration_batches}"
            )
        self.alphas = tuple(sorted({0.0, *(abs(float(alpha)) for alpha in alphas)}))
        self.attacks = resolve_attacks(attacks)
        self.eps = parse_eps(eps, norm)
        self.norm = norm
        self.where = where
        self.strict = strict
        self.statistics = statistics
        self.center = center
        self.calibration_batches = calibration_batches
        self.test_alphas = test_alphas
        self.output = None if output is None else Path(output)
        self.seed = seed
        self.classifier = _classifier(model)
        self._calibration: dict[str, Any] = {}
        if adapter is not None:
            loaded = load_adapter(self.classifier, adapter)
            self.statistics, self.center = loaded.statistics, loaded.center
            self._calibration = dict(loaded.calibration or {})
        self.progress = SweepProgress(self.attacks)
        self.chosen_alpha: float | None = None
        self.summaries: dict[str, list[AlphaSummary]] = {}
        self.notes: dict[str, Any] = {}
        self._records: dict[str, pa.Table] = {}
        self._tables: list[pa.Table] = []
        self._indices: list[Tensor] = []
        self._occupancy: Occupancy | None = None
        self._sites: dict[str, Any] | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `(N, num_classes)` of images `(N, C, H, W)` in [0, 1]."""
        logits: Tensor = self.classifier(images)
        return logits

    @property
    def records(self) -> pa.Table:
        """All rows measured so far, with the columns of `lightning_meansparse.records.SCHEMA`.

        Raises:
            RuntimeError: If there are none.
        """
        if not self._records:
            raise RuntimeError("nothing is measured yet: run trainer.validate(sweep, ...) first")
        return pa.concat_tables(self._records.values())

    @property
    def verdict(self) -> str:
        """One plain sentence about the chosen alpha, from the test images where there are any."""
        split = TEST if TEST in self.summaries else HELD_OUT
        chosen = self.chosen_alpha
        found = [s for s in self.summaries.get(split, []) if s.alpha == chosen]
        if not found:
            raise RuntimeError("nothing is chosen yet: run trainer.validate(sweep, ...) first")
        return verdict(found[0])

    def setup(self, stage: str) -> None:
        """Show a progress bar that knows alphas and attacks, not only batches."""
        if self.output is not None and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            facts.check_folder(self.output, "output")
        self.progress.take_over(self.trainer)

    def teardown(self, stage: str) -> None:
        """Give the trainer its own progress bar back."""
        self.progress.give_back()

    # ------------------------------------------------------------------ held-out images: choose

    def on_validation_start(self) -> None:
        """Insert and calibrate the operators, unless the model came with them."""
        self._begin(HELD_OUT, self.trainer.val_dataloaders, self.trainer.num_val_batches)
        # Tensors made under inference mode could never be differentiated again.
        with torch.inference_mode(False), torch.no_grad(), self._bars_down_on_error():
            self._calibrate()
        self._occupancy = Occupancy(
            self.classifier, self.alphas, rename=lambda name: name.removeprefix("model.")
        )
        self.progress.begin(HELD_OUT, int(self.trainer.num_val_batches[0]), len(self.alphas))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Attack one batch at every alpha."""
        images = self._measure(batch, batch_idx, HELD_OUT, self.alphas)
        if self._occupancy is not None and operators(self.classifier):
            self._occupancy.update(self.classifier, images)

    def on_validation_epoch_end(self) -> None:
        """Choose alpha, log, and write what is known so far."""
        self._finish(HELD_OUT)
        self.chosen_alpha = choose_alpha(self.summaries[HELD_OUT])
        self._log_exactly("chosen_alpha", self.chosen_alpha)
        if operators(self.classifier):
            set_alpha(self.classifier, self.chosen_alpha)
            self._describe_sites()
        self._write()

    # ---------------------------------------------------------------------- test images: report

    def on_test_start(self) -> None:
        """Check that there is something to report.

        Raises:
            RuntimeError: If nothing has been chosen or calibrated.
        """
        if self.chosen_alpha is None and self.test_alphas == "chosen":
            raise RuntimeError(
                "no alpha is chosen yet: run trainer.validate(sweep, ...) before trainer.test, or "
                "set test_alphas='all' to measure every alpha without a choice"
            )
        self._begin(TEST, self.trainer.test_dataloaders, self.trainer.num_test_batches)
        with torch.inference_mode(False), torch.no_grad(), self._bars_down_on_error():
            self._calibrate()
        self.progress.begin(
            TEST, int(self.trainer.num_test_batches[0]), len(self._alphas_to_test())
        )

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Attack one batch at the alphas that are reported."""
        self._measure(batch, batch_idx, TEST, self._alphas_to_test())

    def on_test_epoch_end(self) -> None:
        """Log the test split, and write everything."""
        self._finish(TEST)
        self._write()

    def _alphas_to_test(self) -> tuple[float, ...]:
        if self.test_alphas == "all" or self.chosen_alpha is None:
            return self.alphas
        return tuple(sorted({0.0, self.chosen_alpha}))

    # ----------------------------------------------------------------------------- what both do

    def _begin(self, split: str, loader: Any, batches: Sequence[int | float]) -> None:
        if isinstance(loader, list | tuple) and len(loader) > 1:
            raise ValueError(
                f"a sweep measures one data set, got {len(loader)} loaders for the {split} images"
            )
        self._indices = batch_indices(loader)
        self._tables = []

    def _calibrate(self) -> None:
        if self.alphas == (0.0,) and not operators(self.classifier):
            return  # the base model alone: nothing to sparsify
        measured = calibrated(
            self,
            where=self.where,
            strict=self.strict,
            statistics=self.statistics,
            center=self.center,
            max_batches=self.calibration_batches,
        )
        self._calibration = measured or self._calibration
        self.center = next(iter(operators(self.classifier).values())).center

    def _measure(self, batch: Any, batch_idx: int, split: str, alphas: tuple[float, ...]) -> Tensor:
        images, labels = images_and_labels(batch)
        base = BaseExamples()
        with self._bars_down_on_error():
            for place, alpha in enumerate(alphas):
                self.progress.at(batch_idx, place, alpha)
                with alpha_set(self.classifier, alpha):
                    evaluation = evaluate(
                        self.classifier,
                        images,
                        labels,
                        attacks=self.attacks,
                        eps=self.eps,
                        norm=self.norm,
                        seed=self.seed,
                        indices=self._indices[batch_idx],
                        base=base,
                        progress=self.progress.tell,
                    )
                self._tables.append(rows(evaluation, alpha=alpha, split=split))
        return images

    @contextmanager
    def _bars_down_on_error(self) -> Iterator[None]:
        """Leave the terminal as it was, also after Ctrl-C: Lightning calls no hook of ours then."""
        try:
            yield
        except BaseException:
            self.progress.give_back()
            raise

    def _finish(self, split: str) -> None:
        """Merge the ranks' rows, each sample once, and log what they say."""
        self.progress.end()
        table = merged_table(pa.concat_tables(self._tables), self.device)
        self._records[split] = table
        self.summaries[split] = summarize(table, split=split)
        for summary in self.summaries[split]:
            at = f"alpha_{summary.alpha:g}"
            self._log_exactly(f"clean_acc/{at}", summary.clean.value)
            for attack, share in summary.robust.items():
                self._log_exactly(f"robust_acc/{attack}/{at}", share.value)
            self._log_exactly(f"robust_acc/worst/{at}", summary.worst.value)
            self._log_exactly(f"gain/worst/{at}", summary.gain.value)
            self._log_exactly(f"gain/worst_se/{at}", summary.gain.se)

    def _log_exactly(self, name: str, value: float) -> None:
        # All ranks hold the same merged number; the largest of equals is it, a mean may round.
        self.log(name, value, sync_dist=True, reduce_fx="max")

    def _describe_sites(self) -> None:
        """Shares replaced on all held-out images; one channel's histogram on some of them."""
        if self._occupancy is None:
            return
        self._occupancy.reduce(partial(summed, device=self.device))
        shown = self.chosen_alpha or self.alphas[len(self.alphas) // 2]
        histogram = None
        if shown and self.trainer.is_global_zero:
            histogram = self._occupancy.histogram(
                self.classifier, first_images(self.trainer.val_dataloaders, self.device), shown
            )
        self._sites = self._occupancy.content(histogram)

    def _write(self) -> None:
        if self.output is None or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.trainer.is_global_zero:
            self._write_into(self.output)
        self.trainer.strategy.barrier("alpha_sweep")

    def _write_into(self, folder: Path) -> None:
        write_records(self._records.values(), folder / "records.parquet", self.metadata())
        if self._sites is not None:
            facts.write_json(self._sites, folder / "sites.json")
        if not operators(self.classifier):
            return
        split = TEST if TEST in self.summaries else HELD_OUT
        judged = [s for s in self.summaries[split] if s.alpha == self.chosen_alpha]
        save_adapter(
            self.classifier,
            folder / "adapter",
            statistics=self.statistics,
            calibration=self._calibration or None,
            evaluation={**facts.settings(self), **facts.result(judged[0])} if judged else None,
        )

    def metadata(self) -> dict[str, Any]:
        """Return what the records say about how they were measured."""
        chosen = {} if self.chosen_alpha is None else {"chosen_alpha": self.chosen_alpha}
        return {
            "model": facts.about_model(self.classifier),
            "data": facts.about_data(getattr(self.trainer, "datamodule", None)),
            **facts.settings(self),
            "alphas": list(self.alphas),
            "where": "a function" if callable(self.where) else self.where,
            "statistics": self.statistics,
            "center": self.center,
            "calibration": self._calibration,
            **chosen,
            **environment(),
            **self.notes,
        }


def _classifier(model: nn.Module | str) -> Classifier:
    """The classifier inside one of our own tasks, or a new one."""
    inner = getattr(model, "classifier", None)
    if isinstance(model, LightningModule) and isinstance(inner, Classifier):
        return inner
    return load_classifier(model)
