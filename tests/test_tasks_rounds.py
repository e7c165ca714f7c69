"""Rounds of a sweep: races and bisections cost less than the grid; checks stand by themselves."""

from datetime import timedelta

import pyarrow.compute as pc
import pytest
from lightning.pytorch.strategies import DDPStrategy
from sweeps import CHEAP, FGSM, data, sweep_of, trainer

from lightning_meansparse.records import (
    HELD_OUT,
    MAIN,
    TEST,
    flags,
    read_records,
    rounds,
    summarize,
)
from lightning_meansparse.tasks.measuring import evaluations

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

ALPHAS = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0]
STRONG = [
    {"attack": "pgd", "options": {"steps": 6}},
    {"attack": "square", "options": {"n_queries": 25}},
    {"attack": "adaptive-ce", "name": "adaptive", "options": {"steps": 6}},
]
SCREEN = {"attack": "adaptive-ce", "name": "screen", "options": {"steps": 2}}


def images(**options):
    return data(**{"train": 200, "holdout": 128, "batch_size": 128, "test": 12, **options})


def validated(**options):
    sweep = sweep_of(**{"alphas": ALPHAS, "attacks": STRONG, **options})
    run = trainer()
    run.validate(sweep, images(), verbose=False)
    return sweep, run


@pytest.fixture(scope="module")
def grid():
    return validated()[0]


def test_a_race_ends_where_the_grid_does_for_little_more_than_its_final(grid, tmp_path):
    race, run = validated(select="racing", screen=[SCREEN], output=tmp_path)
    table, metadata = read_records(tmp_path / "records.parquet")
    names = rounds(table, HELD_OUT)
    assert names == ("race-1", "race-2", "race-3", "race-4", MAIN)
    sizes = [summarize(table, split=HELD_OUT, round=name)[0].n for name in names]
    assert sizes == [32, 32, 64, 128, 128]
    assert race.chosen_alpha == grid.chosen_alpha > 0
    # The final is what the grid measured, sample by sample; before it the screen spent little.
    final = table.filter(pc.field("round") == MAIN)
    wanted = pc.field("alpha").isin([0.0, race.chosen_alpha])
    columns = ["alpha", "index", "attack", "standing"]
    same = [
        t.select(columns).sort_by([(c, "ascending") for c in columns])
        for t in (final, grid.records.filter(wanted))
    ]
    assert same[0].equals(same[1])
    screened = table.filter(pc.field("round").isin(names[:3]))
    assert evaluations(screened) < 0.15 * evaluations(grid.records)

    assert metadata["select"]["method"] == "racing"
    assert metadata["select"]["screen"][0]["options"]["steps"] == 2
    said = metadata["rounds"][HELD_OUT]
    assert sorted(said) == sorted(names)
    assert [spec["name"] for spec in said["race-1"]["attacks"]] == ["screen"]
    assert {
        "race-1/robust_acc/screen/alpha_0.1",
        "race-1/gain/worst/alpha_1",
        "gain/worst/alpha_0",
    } <= run.callback_metrics.keys()
    run.test(race, images(), verbose=False)
    assert "test images (n = 12)" in race.verdict


def test_a_race_without_a_winner_ends_without_a_final():
    race, _ = validated(alphas=[0.1], attacks=FGSM, screen=FGSM, select="racing", eps=0.001)
    assert rounds(race.records, HELD_OUT) == ("race-1", "race-2", "race-3")
    assert race.chosen_alpha == 0
    assert race.verdict == f"Not judged: {race.reason}."
    assert "none that beats the base model" in race.reason


def test_the_clean_budget_is_found_by_looking_at_few(grid, tmp_path):
    sweep, run = validated(select="clean_budget", clean_budget=0.05, output=tmp_path)
    names = rounds(sweep.records, HELD_OUT)
    assert names == tuple(f"clean-{i + 1}" for i in range(len(names)))
    assert 1 <= len(names) <= 4
    assert set(sweep.records.column("attack").to_pylist()) == {"clean"}
    clean = {s.alpha: s.clean.k for s in summarize(grid.records, split=HELD_OUT)}
    assert clean[0.0] - clean[sweep.chosen_alpha] <= 0.05 * 128
    larger = min(alpha for alpha in clean if alpha > sweep.chosen_alpha)
    assert clean[0.0] - clean[larger] > 0.05 * 128
    assert HELD_OUT not in sweep.summaries
    assert not any("robust_acc" in name for name in run.callback_metrics)
    run.test(sweep, images(), verbose=False)
    assert {s.alpha for s in sweep.summaries[TEST]} == {0.0, sweep.chosen_alpha}
    assert sweep.summaries[TEST][0].robust.keys() == {"pgd", "square", "adaptive"}


def test_choosing_by_appearance_warns_in_words(caplog):
    sweep, _ = validated(alphas=[0.3, 2.0], attacks=CHEAP, select="apparent_robustness")
    by_look = {s.alpha: s.apparent.k for s in sweep.summaries[HELD_OUT]}
    assert by_look[sweep.chosen_alpha] == max(by_look.values())
    (warned,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "was chosen by apparent robustness" in warned.getMessage()


def test_checks_run_alone_on_the_first_test_images(tmp_path):
    options = {"alphas": [0.3], "attacks": FGSM, "test_alphas": "all", "output": tmp_path}
    sweep = sweep_of(**options, check_images=5)
    trainer().test(sweep, images(), verbose=False)
    table, metadata = read_records(tmp_path / "records.parquet")
    names = rounds(table, TEST)
    assert names[0] == MAIN
    assert set(names[1:]) == {"check:fewer-steps", "check:more-steps", "check:large-eps"}
    first = table.filter(pc.field("round") == MAIN).column("index").unique().to_pylist()
    part = images()
    part.setup()
    for name in names[1:]:
        rows = table.filter(pc.field("round") == name)
        assert set(rows.column("index").to_pylist()) == set(part.parts["test"].rows[:5].tolist())
        assert set(rows.column("attack").to_pylist()) == {"clean", name.removeprefix("check:")}
        assert set(rows.column("alpha").to_pylist()) == {0.0, 0.3}
    assert len(first) == 12
    assert metadata["rounds"][TEST]["check:large-eps"]["eps"] == 1.0
    assert metadata["rounds"][TEST][MAIN]["eps"] == 0.03
    found = {flag.name: flag.raised for flag in flags(table, metadata)}
    assert found["more steps help the defender"] is False
    assert found["accuracy at a large eps"] is False


def test_two_processes_race_as_one_does(tmp_path):
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
        sweep = sweep_of(
            alphas=[0.1, 2.0],
            attacks=FGSM,
            screen=FGSM,
            select="racing",
            output=tmp_path / name,
        )
        trainer(**options).validate(sweep, images(holdout=71, batch_size=8), verbose=False)
    one, two = (read_records(tmp_path / name / "records.parquet")[0] for name in ("one", "two"))
    assert rounds(one, HELD_OUT)[:2] == ("race-1", "race-2")
    assert abs(one.column("margin").to_numpy() - two.column("margin").to_numpy()).max() < 1e-4
    floats = ["margin", "noise", "zero_gradient"]
    assert one.drop_columns(floats).equals(two.drop_columns(floats))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "best"}, "select must be one of 'grid'"),
        ({"select": "apparent_robustness", "attacks": "square"}, "needs an attack of kind"),
        ({"clean_budget": 1.5}, "clean_budget must be a fraction"),
        ({"check_images": -1}, "check_images must be at least 0"),
        ({"screen": "fgms"}, "'fgms' is not known"),
    ],
)
def test_wrong_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        sweep_of(**options)
