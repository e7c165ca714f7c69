"""AlphaSweep: calibrate, try every alpha on held-out images, choose one, report it on test ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_meansparse.adapter import load_adapter
from lightning_meansparse.adapter.base import statistics_hash
from lightning_meansparse.attacks import AttackSpec, check_norm, parse_eps, resolve_attacks
from lightning_meansparse.classifier import Classifier, load_classifier
from lightning_meansparse.layer import Center, check_alpha, check_center
from lightning_meansparse.moments import Statistics
from lightning_meansparse.records import (
    HELD_OUT,
    MAIN,
    TEST,
    AlphaSummary,
    summarize,
    verdict,
)
from lightning_meansparse.surgery import operators, set_alpha
from lightning_meansparse.tasks import facts
from lightning_meansparse.tasks.ascent import Norm
from lightning_meansparse.tasks.batches import images_and_labels
from lightning_meansparse.tasks.calibration import Where, calibrated
from lightning_meansparse.tasks.journal import Journal
from lightning_meansparse.tasks.measuring import Measurement, check_rounds
from lightning_meansparse.tasks.progress import SweepProgress
from lightning_meansparse.tasks.results import (
    about_sites,
    judged,
    numbers,
    write_adapter,
    write_results,
)
from lightning_meansparse.tasks.rounds import Fixed, Round, Selection
from lightning_meansparse.tasks.samples import (
    Samples,
    batch_indices,
    dealt,
    first_samples,
    only_loader,
)
from lightning_meansparse.tasks.selection import Select, check_attacks, check_select, strategy
from lightning_meansparse.tasks.together import Together

_log = logging.getLogger(__name__)

Attacks = str | Sequence[str | dict[str, Any] | AttackSpec]


class AlphaSweep(LightningModule):
    """Find out whether MeanSparse makes a classifier more robust, and at which alpha.

    `trainer.validate(sweep, datamodule=data)` calibrates the operators on training images without
    augmentation and chooses an alpha on held-out images; when none beats the base model (alpha = 0,
    always among them), the choice is 0. `trainer.test(sweep, datamodule=data)` then measures base
    and choice on the test images, which have chosen nothing, and checks the evaluation itself.

    How alpha is chosen (`select`):

    - `"grid"`: every attack at every alpha on every image; the largest worst-case gain.
    - `"racing"`: a cheap strong attack first, on few images, then more; what is worse by a paired
      test is dropped. Stronger attacks decide between those that are left, and base and the best
      alpha, if it gains, meet all attacks on all images.
    - `"clean_budget"`: the largest alpha that costs at most `clean_budget` of clean accuracy, by
      bisection; its robustness is not looked at before the test.
    - `"apparent_robustness"`: the largest accuracy under attacks that follow the exact gradient.
      **Unsafe**: the operator blocks that gradient, so this picks what is masked best. For
      comparison with published numbers only.

    Every number is logged to every logger of the trainer, per alpha: `clean_acc/alpha_0.2`,
    `robust_acc/<attack>/alpha_0.2` (after this attack and all before it),
    `robust_acc/worst/alpha_0.2`, `gain/worst/alpha_0.2` (worst case minus that of the base on the
    same images) and `gain/worst_se/alpha_0.2`; those of other rounds than `main` with the name of
    the round before them, `race-1/…`; then `chosen_alpha`.

    With `output` the sweep can be killed at any moment: the same one, started again on as many
    devices as there are then, loses at most the batches in progress and ends with the same records.
    One that differs is refused. Each image counts once; all devices must see the same folder.

    Args:
        model: A classifier of pixels in [0, 1], or whatever `load_classifier` takes. One that is
            sparsified and calibrated already keeps its operators and statistics.
        alphas: Thresholds to try, in standard deviations.
        attacks: Suite, name, class path, dictionary, or a list of these; see `resolve_attacks`.
        eps: Radius of the ball in pixel units, a number or text such as `"8/255"`.
        norm: `"Linf"` or `"L2"`.
        select: How alpha is chosen, see above.
        screen: With `"racing"`: the attacks of the races.
        clean_budget: With `"clean_budget"`: clean accuracy that may be lost, 0.01 is one point.
        where: Sites, see `find_sites`.
        strict: Whether activations that cannot be reached are an error, or a warning.
        adapter: Folder or Hub id of an adapter; its sites and statistics are used, and nothing is
            calibrated.
        statistics: `"pooled"` (exact) or `"official"` (the authors' averaging).
        center: What a replaced value becomes; see `MeanSparse`.
        calibration_batches: Calibrate on at most so many batches; None for all that the data give.
        test_alphas: What `trainer.test` measures beside the base: the `"chosen"` alpha, or `"all"`.
        check_images: Run the checks of the evaluation on the first so many test images, at every
            alpha measured there; 0 for none.
        output: Folder for records.parquet, sites.json and adapter/; None writes nothing.
        save_examples: Keep the adversarial examples, too, in output/examples/.
        seed: Of all noise in the attacks.

    Attributes:
        classifier: The sparsified `Classifier`; after `validate` at the chosen alpha.
        alphas: All alphas, ascending, with 0.
        chosen_alpha: What `validate` chose; None before.
        reason: How it was chosen, in words; None before.
        summaries: Per split (`"held-out"`, `"test"`) one `AlphaSummary` per alpha of the round
            `main`; a split without that round is left out.
        notes: Anything to keep in the records' metadata, such as the command.

    Raises:
        ValueError: If an alpha is negative, a name unknown, or `eps` out of range; by `validate`,
            if the attacks that choose all follow the exact gradient.

    Examples:
        >>> from lightning_meansparse.demo import ConvNet
        >>> sweep = AlphaSweep(ConvNet(width=4), alphas=[0.3, 0.1], eps="8/255")
        >>> sweep.alphas
        (0.0, 0.1, 0.3)
    """

    def __init__(
        self,
        model: nn.Module | str,
        *,
        alphas: Sequence[float] = (0.1, 0.2, 0.3, 0.4),
        attacks: Attacks = "full",
        eps: float | str,
        norm: Norm = "Linf",
        select: Select = "grid",
        screen: Attacks = "quick",
        clean_budget: float = 0.01,
        where: Where = "activations",
        strict: bool = True,
        adapter: str | Path | None = None,
        statistics: Statistics = "pooled",
        center: Center = "channel",
        calibration_batches: int | None = None,
        test_alphas: Literal["chosen", "all"] = "chosen",
        check_images: int = 64,
        output: str | Path | None = None,
        save_examples: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for alpha in alphas:
            check_alpha(alpha)
        check_norm(norm)
        check_center(center)
        if test_alphas not in ("chosen", "all"):
            raise ValueError(f"test_alphas must be 'chosen' or 'all', got {test_alphas!r}")
        for name, count, least in (
            ("calibration_batches", calibration_batches, 1),
            ("check_images", check_images, 0),
        ):
            if count is not None and count < least:
                raise ValueError(f"{name} must be at least {least}, got {count}")
        if save_examples and output is None:
            raise ValueError("save_examples needs a folder to write to: give output, too")
        self.alphas = tuple(sorted({0.0, *(abs(float(alpha)) for alpha in alphas)}))
        self.attacks = resolve_attacks(attacks)
        self.eps = parse_eps(eps, norm)
        self.norm = norm
        check_select(select, attacks=self.attacks, clean_budget=clean_budget)
        self.select = select
        self.screen = resolve_attacks(screen)
        self.clean_budget = clean_budget
        self.where = where
        self.strict = strict
        self.statistics = statistics
        self.calibration_batches = calibration_batches
        self.test_alphas = test_alphas
        self.check_images = check_images
        self.output = None if output is None else Path(output)
        self.save_examples = save_examples
        self.seed = seed
        self.classifier = _classifier(model)
        self.calibration: dict[str, Any] = {}
        if adapter is not None:
            loaded = load_adapter(self.classifier, adapter)
            self.statistics = loaded.statistics
            self.calibration = dict(loaded.calibration or {})
        given = operators(self.classifier)
        self.center = next(iter(given.values())).center if given else center
        self.given_statistics = statistics_hash(self.classifier) if given else None
        self.progress = SweepProgress()
        self.together = Together(self)
        self.chosen_alpha: float | None = None
        self.reason: str | None = None
        self.summaries: dict[str, list[AlphaSummary]] = {}
        self.rounds: dict[str, Any] = {}
        self.notes: dict[str, Any] = {}
        self._records: dict[str, pa.Table] = {}
        self._selection: Selection
        self._measurement: Measurement

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
        if self.chosen_alpha is None:
            raise RuntimeError("nothing is chosen yet: run trainer.validate(sweep, ...) first")
        known = judged(self)
        return f"Not judged: {self.reason}." if known is None else verdict(known)

    def metadata(self) -> dict[str, Any]:
        """Return what the records say about how they were measured."""
        return facts.metadata(self)

    def configure_callbacks(self) -> list[Callback]:
        """What the trainer calls at the end of a run, also at one that no hook here hears of."""
        return [] if self.together in self.trainer.callbacks else [self.together]  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Leave the model whole; `ModelParallelStrategy` does not run without being told."""

    def setup(self, stage: str) -> None:
        """Show a progress bar that knows alphas and attacks, not only batches."""
        self.together.ending.callback(self.progress.give_back)
        self.progress.take_over(self.trainer)

    # ------------------------------------------------------------------ held-out images: choose

    def on_validation_start(self) -> None:
        """Insert and calibrate the operators, unless the model came with them."""
        check_attacks(self.select, alphas=self.alphas, attacks=self.attacks, screen=self.screen)
        samples, journal = self._begin(
            HELD_OUT, self.trainer.val_dataloaders, self.trainer.num_val_batches
        )
        self._selection = strategy(
            self.select,
            alphas=self.alphas,
            attacks=self.attacks,
            screen=self.screen,
            clean_budget=self.clean_budget,
            samples=len(samples),
        )
        self._measurement = Measurement(self, self._selection, HELD_OUT, samples, journal)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Look at one batch: clean margins."""
        self._measurement.look(*images_and_labels(batch))

    def on_validation_epoch_end(self) -> None:
        """Measure round after round, choose alpha, log, and write."""
        loader = only_loader(self.trainer.val_dataloaders)
        table = self._finish(HELD_OUT, loader)
        self.chosen_alpha = self._selection.choice(table)
        self.reason = self._selection.reason(table)
        self._log_exactly("chosen_alpha", self.chosen_alpha)
        unsafe = self.select == "apparent_robustness"
        _log.log(logging.WARNING if unsafe else logging.INFO, "%s", self.reason)
        if operators(self.classifier):
            set_alpha(self.classifier, self.chosen_alpha)
        self._write(about_sites(self, self._measurement, loader))

    # ---------------------------------------------------------------------- test images: report

    def on_test_start(self) -> None:
        """Check that there is something to report.

        Raises:
            RuntimeError: If nothing has been chosen or calibrated.
        """
        samples, journal = self._begin(
            TEST, self.trainer.test_dataloaders, self.trainer.num_test_batches
        )
        alphas = self.alphas
        if self.test_alphas == "chosen" and self.chosen_alpha is not None:
            alphas = tuple(sorted({0.0, self.chosen_alpha}))
        images, _ = first_samples(only_loader(self.trainer.test_dataloaders), 1)
        checks = check_rounds(
            alphas, self.check_images, eps=self.eps, norm=self.norm, shape=images.shape[1:]
        )
        plan = Fixed((Round(MAIN, alphas, self.attacks), *checks))
        self._measurement = Measurement(self, plan, TEST, samples, journal)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Look at one batch: clean margins."""
        self._measurement.look(*images_and_labels(batch))

    def on_test_epoch_end(self) -> None:
        """Attack at the alphas that are reported, check the evaluation, log, and write."""
        self._finish(TEST, only_loader(self.trainer.test_dataloaders))
        self._write()

    # ----------------------------------------------------------------------------- what both do

    def _begin(self, split: str, loader: Any, counts: Sequence[float]) -> tuple[Samples, Journal]:
        """Compare the output with what is asked for, and calibrate, before anything is measured."""
        only = only_loader(loader)
        batches = batch_indices(only)[: int(counts[0])]
        self.together.meet()  # before talk in which a failure of one would not be heard
        samples = dealt(batches, self.device)
        dry = bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]
        journal = Journal(None if dry else self.output, self.trainer.global_rank)
        self.together.ending.callback(journal.release)
        alone = journal.folder is None and self.trainer.world_size == 1  # nothing to compare with
        configuration = {} if alone else facts.configuration(self, split, only, samples)
        self.together.meet()
        journal.agree(configuration, self.device)
        self.together.meet()  # nothing is written before
        if journal.rank == 0:
            journal.open(configuration, split)
            undecided = self.chosen_alpha is None and "chosen_alpha" not in journal.metadata
            if split == TEST and self.test_alphas == "chosen" and undecided:
                raise RuntimeError(
                    "no alpha is chosen yet: run trainer.validate(sweep, ...) before trainer.test, "
                    "or set test_alphas='all' to measure every alpha without a choice"
                )
            journal.hold(configuration, split)
            journal.begin(self.notes)
        self.together.meet()
        journal.share(self.device)
        known = journal.metadata
        self.rounds = {**known.get("rounds", {}), **self.rounds}
        if self.chosen_alpha is None and "chosen_alpha" in known:
            self.chosen_alpha, self.reason = known["chosen_alpha"], known["select"]["reason"]
        self.together.kept_in = journal.folder
        # Tensors made under inference mode could never be differentiated again.
        with torch.inference_mode(False), torch.no_grad():
            found = calibrated(self, journal.adapter)
        if self.chosen_alpha is not None and operators(self.classifier):
            set_alpha(self.classifier, self.chosen_alpha)
        if found is not None:
            self.calibration = found
            if journal.adapter is None and journal.folder is not None and journal.rank == 0:
                write_adapter(self, journal.folder)
        journal.about = self.metadata()
        return samples, journal

    def _finish(self, split: str, loader: DataLoader[Any]) -> pa.Table:
        """Carry out the rounds, and log what all of them say."""
        run = self._measurement
        table = self._records[split] = run.complete(loader)
        self.rounds[split] = facts.about_rounds(self, run.rounds)
        for round in run.rounds:
            summaries = summarize(table, split=split, round=round.name)
            if round.name == MAIN:
                self.summaries[split] = summaries
            for name, value in numbers(round.name, summaries):
                self._log_exactly(name, value)
        return table

    def _log_exactly(self, name: str, value: float) -> None:
        # All ranks hold the same merged number; the largest of equals is it, a mean may round.
        self.log(name, value, sync_dist=True, reduce_fx="max")

    def _write(self, sites: dict[str, Any] | None = None) -> None:
        write_results(self, self._measurement, sites)
        self.together.meet()


def _classifier(model: nn.Module | str) -> Classifier:
    """The classifier inside one of our own tasks, or a new one."""
    inner = getattr(model, "classifier", None)
    if isinstance(model, LightningModule) and isinstance(inner, Classifier):
        return inner
    return load_classifier(model)
