"""A sweep's records, logged numbers and files say the same."""

import copy
import io
import math
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from sweeps import EPS, FGSM, data, sweep_of, trained_network, trainer, two_signals
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)

from lightning_meansparse.adapter import load_adapter, read_adapter
from lightning_meansparse.records import HELD_OUT, TEST, choose_alpha, read_records, summarize
from lightning_meansparse.report import read_sources
from lightning_meansparse.surgery import alphas, operators, restore_
from lightning_meansparse.tasks import AdversarialTraining, AlphaSweep

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    # The recommendation is not to measure on several devices; that a sweep can is tested here.
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def trained():
    return trained_network()


# ------------------------------------------------------------------------------------- the sweep


def test_records_logs_and_files_say_the_same(trained, tmp_path):
    images = torch.rand(5, 1, 8, 8)
    before = trained(images)
    sweep = sweep_of(trained, output=tmp_path / "sweep")
    run = trainer(logger=CSVLogger(tmp_path))
    (logged,) = run.validate(sweep, data(), verbose=False)
    assert sweep.alphas == (0.0, 0.3, 1.0)
    table, metadata = read_records(tmp_path / "sweep" / "records.parquet")
    assert table.num_rows == 16 * 3 * 4
    summaries = summarize(table, split=HELD_OUT)
    assert choose_alpha(summaries) == sweep.chosen_alpha == metadata["chosen_alpha"]
    for summary in summaries:
        at = f"alpha_{summary.alpha:g}"
        expected = {
            f"clean_acc/{at}": summary.clean.value,
            f"robust_acc/worst/{at}": summary.worst.value,
            f"gain/worst/{at}": summary.gain.value,
            f"gain/worst_se/{at}": summary.gain.se,
            **{f"robust_acc/{name}/{at}": p.value for name, p in summary.robust.items()},
        }
        assert len(expected) == 7
        for name, value in expected.items():
            assert math.isclose(logged[name], value, abs_tol=1e-6), name
    assert logged["gain/worst/alpha_0"] == logged["gain/worst_se/alpha_0"] == 0
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().split("\n")[0]
    assert {"gain/worst/alpha_0.3", "robust_acc/adaptive/alpha_1"} <= set(header.split(","))
    assert metadata["eps"] == 0.03
    assert metadata["calibration"]["images"] == 48
    assert [spec["name"] for spec in metadata["attacks"]] == ["pgd", "square", "adaptive"]

    (reported,) = run.test(sweep, data(), verbose=False)
    table, _ = read_records(tmp_path / "sweep" / "records.parquet")
    tested = summarize(table, split=TEST)
    assert {s.alpha for s in tested} == {0.0, sweep.chosen_alpha}
    assert all(s.n == 21 for s in tested)
    assert math.isclose(reported["clean_acc/alpha_0"], tested[0].clean.value, abs_tol=1e-6)
    assert "test images (n = 21)" in sweep.verdict

    sources = read_sources(tmp_path / "sweep")
    assert [site.site for site in sources.sites] == ["2@in", "4@in"]
    assert sources.images == 16
    assert all(
        site.replaced[0] == 0 < site.replaced[1] < site.replaced[2] for site in sources.sites
    )
    assert sources.histogram is not None
    fresh = copy.deepcopy(trained)
    adapter = load_adapter(fresh, tmp_path / "sweep" / "adapter")
    assert set(adapter.alphas) == {sweep.chosen_alpha}
    assert adapter.evaluation["n"] == 21
    assert torch.equal(fresh(images), sweep.classifier.model(images))
    restore_(sweep.classifier.model)
    assert torch.equal(sweep.classifier.model(images), before)


def test_every_alpha_can_be_tested_without_a_choice(trained):
    sweep = sweep_of(trained, attacks=FGSM, test_alphas="all")
    trainer().test(sweep, data(), verbose=False)
    assert [s.alpha for s in sweep.summaries[TEST]] == [0.0, 0.3, 1.0]
    assert sweep.chosen_alpha is None
    with pytest.raises(RuntimeError, match="nothing is chosen"):
        _ = sweep.verdict


def test_the_base_alone_needs_no_operators(trained, tmp_path):
    sweep = sweep_of(trained, attacks=FGSM, alphas=[], output=tmp_path)
    trainer().validate(sweep, data(), verbose=False)
    assert sweep.chosen_alpha == 0
    assert operators(sweep.classifier) == {}
    assert not (tmp_path / "adapter").exists()


def test_statistics_that_are_there_are_kept_and_stale_ones_are_not(trained, tmp_path):
    first = sweep_of(trained, attacks=FGSM, output=tmp_path)
    trainer().validate(first, data(), verbose=False)
    means = {name: op.mean.clone() for name, op in operators(first.classifier).items()}
    given = sweep_of(trained, attacks=FGSM, adapter=tmp_path / "adapter")
    trainer().validate(given, data(seed=5), verbose=False)
    assert all(torch.equal(op.mean, means[n]) for n, op in operators(given.classifier).items())
    with torch.no_grad():
        given.classifier.model[0].weight.mul_(2)
    trainer().validate(given, data(), verbose=False)
    found = operators(given.classifier)
    assert not torch.equal(found["model.2@in"].mean, means["model.2@in"]) or not torch.equal(
        found["model.4@in"].mean, means["model.4@in"]
    )


def test_a_task_hands_over_its_classifier(trained):
    task = AdversarialTraining(trained, eps=EPS)
    assert AlphaSweep(task, attacks="fgsm", eps=EPS).classifier is task.classifier


def test_two_processes_measure_what_one_does(trained, tmp_path):
    for name, options in (
        ("one", {}),
        (
            "two",
            {
                "devices": 2,
                "strategy": DDPStrategy(start_method="fork", timeout=timedelta(seconds=60)),
            },
        ),
    ):
        sweep = sweep_of(trained, attacks=FGSM, output=tmp_path / name)
        trainer(**options).validate(sweep, data(holdout=15, batch_size=4), verbose=False)
    one, two = (read_records(tmp_path / name / "records.parquet")[0] for name in ("one", "two"))
    assert one.num_rows == 15 * 3 * 2
    margins = [t.column("margin").to_numpy() for t in (one, two)]
    assert abs(margins[0] - margins[1]).max() < 1e-4
    assert one.drop_columns(["margin"]).equals(two.drop_columns(["margin"]))
    adapters = [read_adapter(tmp_path / name / "adapter") for name in ("one", "two")]
    assert all(a.calibration["images"] == 49 for a in adapters)
    for name, tensor in adapters[0].tensors.items():
        assert torch.allclose(tensor, adapters[1].tensors[name], atol=1e-6)


class OnlyTest(LightningDataModule):
    def val_dataloader(self):
        return DataLoader(TensorDataset(*two_signals(4, 0)), batch_size=2)

    test_dataloader = val_dataloader


def test_what_cannot_run_says_what_to_do(trained):
    with pytest.raises(RuntimeError, match=r"run trainer.validate"):
        trainer().test(sweep_of(trained), data(), verbose=False)
    with pytest.raises(RuntimeError, match="no training images to calibrate on"):
        trainer().validate(sweep_of(trained), OnlyTest(), verbose=False)
    with pytest.raises(ValueError, match="alpha must be"):
        sweep_of(trained, alphas=[-0.1])
    with pytest.raises(ValueError, match="test_alphas must be"):
        sweep_of(trained, test_alphas="best")


def test_an_interrupted_sweep_leaves_model_and_terminal_alone(trained, monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True)
    sweep = sweep_of(trained)
    sweep.progress.console = screen
    tell, calls = sweep.progress.tell, []

    def stop(text):
        tell(text)
        calls.append(text)
        if len(calls) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(sweep.progress, "tell", stop)
    monkeypatch.setattr("signal.signal", lambda *args: None)
    own = RichProgressBar()
    with pytest.raises(SystemExit):
        trainer(callbacks=[own], enable_progress_bar=True).validate(sweep, data(), verbose=False)
    assert set(alphas(sweep.classifier).values()) == {0.0}
    assert sweep.progress._bar is None
    assert own.is_enabled
    shown = screen.file.getvalue()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is shown again
