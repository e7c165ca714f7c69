"""What a sweep found, as numbers to log and files to keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from lightning_meansparse.adapter import save_adapter
from lightning_meansparse.adapter.base import noted_statistics
from lightning_meansparse.records import HELD_OUT, MAIN, TEST, AlphaSummary, write_records
from lightning_meansparse.surgery import operators
from lightning_meansparse.tasks import facts
from lightning_meansparse.tasks.files import write_json, writing
from lightning_meansparse.tasks.journal import ADAPTER, RECORDS, SITES
from lightning_meansparse.tasks.occupancy import ENOUGH, Occupancy
from lightning_meansparse.tasks.ranks import summed

if TYPE_CHECKING:
    from lightning_meansparse.tasks.measuring import Measurement
    from lightning_meansparse.tasks.sweep import AlphaSweep


def numbers(round: str, summaries: Sequence[AlphaSummary]) -> Iterator[tuple[str, float]]:
    """Yield every number of a round with its name in a log.

    Args:
        round: Name of the round; those of `main` have no prefix.
        summaries: One per alpha.
    """
    # Slashes alone: some loggers know no colon in a name.
    before = "" if round == MAIN else f"{round.replace(':', '/')}/"
    for summary in summaries:
        at = f"alpha_{summary.alpha:g}"
        yield f"{before}clean_acc/{at}", summary.clean.value
        if not summary.robust:
            continue
        for attack, share in summary.robust.items():
            yield f"{before}robust_acc/{attack}/{at}", share.value
        yield f"{before}robust_acc/worst/{at}", summary.worst.value
        yield f"{before}gain/worst/{at}", summary.gain.value
        yield f"{before}gain/worst_se/{at}", summary.gain.se


def judged(sweep: AlphaSweep) -> AlphaSummary | None:
    """Return what is known of the chosen alpha, from the test images where there are any."""
    summaries = sweep.summaries.get(TEST, sweep.summaries.get(HELD_OUT, []))
    return next((s for s in summaries if s.alpha == sweep.chosen_alpha), None)


def about_sites(
    sweep: AlphaSweep, run: Measurement, loader: DataLoader[Any]
) -> dict[str, Any] | None:
    """Return what the operators do to the values of some images, or None for nothing to write.

    Args:
        sweep: The sweep; all its processes call this.
        run: What was measured.
        loader: The trainer's.
    """
    classifier = sweep.classifier
    if run.journal.folder is None or not (run.fresh and operators(classifier)):
        return None
    mine, merge = run.samples.first(ENOUGH), partial(summed, device=sweep.device)
    counted = Occupancy(classifier, sweep.alphas, rename=lambda name: name.removeprefix("model."))
    for _, images, _ in run.batches(loader, mine):
        counted.update(classifier, images)
    counted.reduce(merge)
    shown = sweep.chosen_alpha or sweep.alphas[len(sweep.alphas) // 2]
    if not shown:
        return counted.content(None)
    again = (images for _, images, _ in run.batches(loader, mine))
    return counted.content(counted.histogram(classifier, again, shown, merge))


def write_results(sweep: AlphaSweep, run: Measurement, sites: dict[str, Any] | None) -> None:
    """Write what was measured on a split. The records come last: with them it is finished.

    Args:
        sweep: The sweep.
        run: What was measured.
        sites: What the operators do to the values, for sites.json; None leaves that as it is.
    """
    journal = run.journal
    if journal.folder is None or journal.rank:
        return
    with writing(journal.folder):
        if run.fresh:
            if sites is not None:
                write_json(sites, journal.folder / SITES)
            if operators(sweep.classifier):
                write_adapter(sweep, journal.folder)
            tables = [run.table, journal.elsewhere(run.split)]
            write_records(tables, journal.folder / RECORDS, sweep.metadata())
        journal.close(run.split)


def write_adapter(sweep: AlphaSweep, folder: Path) -> None:
    """Write the statistics, the alpha in place, and what is known about it."""
    known = judged(sweep)
    with writing(folder):
        save_adapter(
            sweep.classifier,
            folder / ADAPTER,
            # Statistics that came with the model or an adapter are not the sweep's own.
            statistics=noted_statistics(sweep.classifier) or sweep.statistics,
            calibration=sweep.calibration or None,
            evaluation={**facts.settings(sweep), **facts.result(known)} if known else None,
        )
