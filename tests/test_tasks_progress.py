"""What a sweep shows while it runs, and what it finds about the sites."""

import copy
import io
import json
import logging
import math

import pytest
import torch
from rich.console import Console
from sweeps import EPS, FGSM, data, linear, sweep_of, trained_network, trainer, two_signals

from lightning_meansparse.classifier import load_classifier
from lightning_meansparse.sites import find_sites
from lightning_meansparse.surgery import calibrate_, operators, sparsify_
from lightning_meansparse.tasks import AlphaSweep
from lightning_meansparse.tasks.occupancy import Occupancy
from lightning_meansparse.tasks.progress import work

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


@pytest.fixture(scope="module")
def trained():
    return trained_network()


# -------------------------------------------------------------------------------------- progress


def test_a_terminal_sees_what_is_done_and_for_how_long(trained):
    screen = Console(file=io.StringIO(), force_terminal=True, width=200)
    sweep = sweep_of(trained, test_alphas="all")
    sweep.progress.console = screen
    trainer(enable_progress_bar=True).validate(sweep, data(), verbose=False)
    text = screen.file.getvalue()
    assert "held-out · clean images" in text
    assert "8/16 images · α = 1 · adaptive" in text


def test_a_log_gets_a_line_now_and_then(trained, caplog, monkeypatch):
    clock = iter(range(0, 100_000, 20))
    monkeypatch.setattr("lightning_meansparse.tasks.progress.time.monotonic", lambda: next(clock))
    sweep = sweep_of(trained)
    sweep.progress.console = Console(file=io.StringIO())
    with caplog.at_level(logging.INFO, logger="lightning_meansparse.tasks.progress"):
        trainer(enable_progress_bar=True).validate(sweep, data(), verbose=False)
    lines = [r.getMessage() for r in caplog.records if r.name.endswith("progress")]
    assert 2 <= len(lines) <= 2 * 3 * 4
    assert "left (0/16 images" in lines[0]
    shares = [int(line.split(": ")[1].split(" %")[0]) for line in lines]
    assert shares == sorted(shares)
    assert sweep.progress.console.file.getvalue() == ""


def test_no_progress_bar_means_silence(trained, caplog):
    sweep = sweep_of(trained, attacks=FGSM)
    sweep.progress.console = Console(file=io.StringIO(), force_terminal=True)
    with caplog.at_level(logging.INFO, logger="lightning_meansparse.tasks.progress"):
        trainer().validate(sweep, data(), verbose=False)
    assert sweep.progress.console.file.getvalue() == ""
    assert not [r for r in caplog.records if r.name.endswith("progress")]


def test_time_left_weighs_attacks_by_their_budgets():
    sweep = AlphaSweep(linear(), attacks=["fgsm", "pgd", "apgd-t", "square"], eps=EPS)
    assert [work(spec) for spec in sweep.attacks] == [3, 60, 2700, 5000]


# ------------------------------------------------------------------------------------- occupancy


@pytest.fixture(scope="module")
def sparsified(trained):
    classifier = load_classifier(copy.deepcopy(trained))
    images = two_signals(32, 0)[0]
    sparsify_(classifier, find_sites(classifier, images[:2]))
    calibrate_(classifier, [images])
    return classifier


def test_shares_are_those_of_a_direct_count(sparsified):
    counted = Occupancy(sparsified, (0.0, 0.5))
    images = two_signals(12, 3)[0]
    for part in images.split(5):
        counted.update(sparsified, part)
    content = json.loads(json.dumps(counted.content(None)))
    assert content["images"] == 12
    first = operators(sparsified)["model.2@in"]
    with torch.no_grad():
        x = sparsified.model[1](sparsified.model[0](images))
    expected = ((x - first.mean).abs() < 0.5 * first.var.sqrt()).double().mean()
    site = content["sites"][0]
    assert site["channels"] == 4
    assert site["replaced"][0] == 0
    assert math.isclose(site["replaced"][1], expected.item(), abs_tol=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.55])
def test_the_histogram_shows_an_empty_band_and_a_pile(sparsified, alpha):
    counted = Occupancy(sparsified, (0.0, alpha))
    images = two_signals(12, 3)[0]
    counted.update(sparsified, images)
    shown = counted.histogram(sparsified, [images], alpha, lambda counts: counts)
    before, after = torch.tensor(shown["before"]), torch.tensor(shown["after"])
    assert before.sum() == after.sum() > 0
    middle = torch.tensor(shown["edges"]).unfold(0, 2, 1).mean(1)
    distance = (middle - shown["mean"]).abs() / shown["std"]
    centre = distance.argmin()
    band = (distance < alpha) & (torch.arange(len(middle)) != centre)
    assert (after[band] == 0).all()
    assert after[centre] == before[distance < alpha].sum()
    assert torch.equal(after[distance > alpha], before[distance > alpha])
    assert 3.5 < distance.max() < 4.001


def test_the_shown_channel_is_the_one_nearest_the_median(sparsified):
    counted = Occupancy(sparsified, (0.0, 0.5))
    counted.update(sparsified, two_signals(12, 3)[0])
    site, channel = counted.typical(0.5)
    assert site == "model.2@in"  # 4 x 64 values, the other site has 6 x 9
    shares = counted.replaced[site][1]
    nearest = (shares - shares.median()).abs()
    assert nearest[channel] == nearest.min()
    assert channel == int(nearest.argmin())


def test_nothing_is_counted_that_nobody_keeps(trained, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(Occupancy, "update", lambda self, *args: counted.append(args))
    trainer().validate(sweep_of(trained, attacks=FGSM), data(), verbose=False)
    assert not counted
    monkeypatch.undo()
    kept = sweep_of(trained, attacks=FGSM, output=tmp_path / "sweep")
    trainer().validate(kept, data(), verbose=False)
    assert json.loads((tmp_path / "sweep" / "sites.json").read_text())["images"] > 0
