"""Reports of sweeps that race, bisect, believe gradients, or have not finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from reports import ATTACKS, SHARES, Page, make_sweep, measured, table_of

from lightning_meansparse.records import (
    HELD_OUT,
    MAIN,
    TEST,
    Flag,
    read_records,
    rows,
    summarize,
    write_records,
)
from lightning_meansparse.report import find, read_sources, render_markdown, write_report
from lightning_meansparse.report.page import render

pytest.importorskip("matplotlib")

SCREEN = {"quick": "adaptive"}
CHECK = {"large-eps": "gradient"}


def round_of(
    name: str,
    worst: Mapping[float, float],
    n: int,
    *,
    split: str = HELD_OUT,
    attacks: dict[str, str] = SCREEN,
    start: int = 0,
) -> pa.Table:
    """One round: of n images so many per cent stand at each alpha; the best images are the same."""
    steps = len(attacks)
    return pa.concat_tables(
        [
            rows(
                measured((90.0, *[share] * steps)[: steps + 1], n, attacks=attacks, start=start),
                alpha=alpha,
                split=split,
                round=name,
            )
            for alpha, share in worst.items()
        ]
    )


def race(*, lost: bool = False) -> list[pa.Table]:
    """Four alphas, of which one is left after the second race, or none."""
    made = [
        round_of("race-1", {0.0: 60, 0.1: 61, 0.2: 63, 0.3: 40, 0.4: 10}, 100),
        round_of("race-2", {0.0: 60, 0.1: 59, 0.2: 63}, 100, start=100),
    ]
    if not lost:
        made.append(round_of(MAIN, {0.0: 58, 0.2: 62}, 400, attacks=ATTACKS))
    return made


def on_test(*alphas: float) -> pa.Table:
    return round_of(MAIN, dict.fromkeys(alphas, 60), 500, split=TEST, attacks=ATTACKS)


def folder_of(path: Path, tables: list[pa.Table], **metadata: Any) -> Path:
    write_records(tables, path / "records.parquet", {"eps": 0.1, **metadata})
    sources = read_sources(path)
    found = find(sources.table, sources.metadata)
    (path / "report.html").write_text(render(sources, found))
    (path / "results.md").write_text(render_markdown(sources, found))
    return path


class TestRacing:
    def test_the_story_is_that_of_the_rows(self) -> None:
        table = pa.concat_tables([*race(), on_test(0.0, 0.2)])
        found = find(table, {"chosen_alpha": 0.2, "select": {"method": "racing"}})
        assert (found.chosen, found.reporter, found.judged.n) == (0.2, TEST, 500)
        assert found.notes[0] == (
            "Racing on held-out images: 4 alphas on 100 images under quick, then 2 on 100; the "
            "finalist, alpha = 0.2, met the base model under apgd-ce, apgd-t, square, "
            "apgd-ce-smooth on 400."
        )
        assert not any("was not chosen by" in note for note in found.notes)

    def test_races_under_one_attack_are_one_curve(self) -> None:
        table = pa.concat_tables([*race(), on_test(0.0, 0.2)])
        found = find(table, {"chosen_alpha": 0.2, "select": {"method": "racing"}})
        assert {s.round for s in found.curve} == {"race-1 to race-2"}
        assert [(s.alpha, s.n) for s in found.curve] == [
            (0.0, 200),
            (0.1, 200),
            (0.2, 200),
            (0.3, 100),
            (0.4, 100),
        ]
        # Every alpha is paired with the base on the images that it has met itself.
        assert found.curve[3].gain.value == pytest.approx(-0.20)
        assert found.curve[2].gain.value == pytest.approx(0.03)
        assert found.marked == found.reported == summarize(table, split=TEST)

    def test_races_under_other_attacks_are_apart(self) -> None:
        second = round_of("race-2", {0.0: 60, 0.2: 63}, 100, attacks=ATTACKS)
        found = find(pa.concat_tables([race()[0], second, on_test(0.0)]), {"chosen_alpha": 0.0})
        assert [stage[0].round for stage in found.stages[HELD_OUT]] == ["race-1", "race-2"]

    def test_a_race_that_none_wins_leaves_the_base(self, tmp_path: Path) -> None:
        metadata = {"chosen_alpha": 0.0, "select": {"method": "racing"}}
        folder = folder_of(tmp_path, [*race(lost=True), on_test(0.0)], **metadata)
        found = find(*read_records(folder))
        assert (found.chosen, found.headline, found.reporter) == (0.0, "No gain", TEST)
        assert "none was left for the final" in found.notes[0]
        page = Page(folder)
        assert "Held-out images, race-1 to race-2, n = 100 to 200 (chose α)" in page.said()
        assert [row["n"] for row in table_of(page, 2)] == ["200", "200", "200", "100", "100"]

    def test_races_alone_name_the_round_in_the_verdict(self) -> None:
        metadata = {"chosen_alpha": 0.0, "select": {"method": "racing"}}
        found = find(pa.concat_tables(race(lost=True)), metadata)
        assert found.reporter == HELD_OUT
        assert "withstand every attack of race-1 to race-2" in found.sentence
        assert "on the very images that chose alpha" in found.sentence

    def test_a_final_that_is_lost_is_told(self) -> None:
        final = round_of(MAIN, {0.0: 62, 0.2: 58}, 400, attacks=ATTACKS)
        table = pa.concat_tables([*race(lost=True), final, on_test(0.0)])
        found = find(table, {"chosen_alpha": 0.0, "select": {"method": "racing"}})
        assert "the finalist, alpha = 0.2, met the base model" in found.notes[0]
        assert "alpha = 0.2, changed its worst case by -4.0 points" in found.notes[1]


class TestCleanBudget:
    select: Mapping[str, Any] = {"method": "clean_budget", "clean_budget": 0.01}

    def rounds(self) -> list[pa.Table]:
        made = []
        for number, (alpha, clean) in enumerate([(0.4, 85.0), (0.2, 89.5), (0.3, 88.0)], start=1):
            for each, share in ((0.0, 90.0), (alpha, clean)):
                bare = measured((share,), 200, attacks={})
                unknown = np.full(200, np.nan)
                bare = replace(bare, noise=unknown, zero_gradient=unknown)
                made.append(rows(bare, alpha=each, split=HELD_OUT, round=f"clean-{number}"))
        return made

    def test_the_rule_and_its_blindness_are_told(self, tmp_path: Path) -> None:
        folder = folder_of(
            tmp_path, [*self.rounds(), on_test(0.0, 0.2)], chosen_alpha=0.2, select=self.select
        )
        found = find(*read_records(folder))
        assert found.notes[0] == (
            "Clean budget: of the 3 alphas looked at (0.2, 0.3, 0.4), alpha = 0.2 is the largest "
            "whose clean accuracy stays within the budget of 1.00% (-0.5 points on 200 held-out "
            "images); robustness had no part in the choice."
        )
        assert not any("was not chosen by" in note for note in found.notes)
        page = Page(folder)
        held_out = table_of(page, 2)
        assert [row["α"].split()[0] for row in held_out] == ["0", "0.2", "0.3", "0.4"]
        assert [row["change ± SE"].split()[0] for row in held_out] == [
            "base",
            "−0.50",
            "−2.00",
            "−5.00",
        ]
        assert "worst case [95%]" not in held_out[0]

    def test_no_alpha_within_the_budget(self) -> None:
        table = pa.concat_tables([*self.rounds(), on_test(0.0)])
        found = find(table, {"chosen_alpha": 0.0, "select": self.select})
        assert "no alpha looked at (0.2, 0.3, 0.4) keeps its clean accuracy" in found.notes[0]
        assert len(found.notes) == 1

    def test_without_attacks_nothing_is_said_about_robustness(self) -> None:
        found = find(pa.concat_tables(self.rounds()), {"chosen_alpha": 0.2, "select": self.select})
        assert found.headline == "Nothing measured"


def test_a_choice_by_apparent_robustness_says_so(tmp_path: Path) -> None:
    folder = make_sweep(
        tmp_path,
        tested=(0.0, 0.4),
        metadata={"chosen_alpha": 0.4, "select": {"method": "apparent_robustness"}},
    )
    found = find(*read_records(folder))
    assert "by apparent robustness" in found.notes[0]
    assert "which masking flatters" in found.notes[0]
    assert "it would have been alpha = 0." in found.notes[0]
    assert sum("would have been alpha" in note for note in found.notes) == 1


class TestUnfinished:
    def test_a_half_of_a_sweep(self, tmp_path: Path) -> None:
        whole = make_sweep(tmp_path / "whole", n=100, n_test=0)
        table, metadata = read_records(whole)
        index = table.column("index").to_numpy()
        first = np.sort(np.unique(index))
        for number, (start, stop) in enumerate(((0, 30), (30, 60), (60, 90))):
            here = np.isin(index, first[start:stop])
            part = tmp_path / "parts" / f"held-out-{number}.parquet"
            write_records(table.filter(pa.array(here)), part, metadata)
        write_report(tmp_path)
        page = Page(tmp_path)
        assert "The sweep has not finished; images so far: 90 held-out." in page.said()
        assert "No α is chosen yet" in page.said()
        assert [row["n"] for row in table_of(page, 0)] == ["90"] * len(SHARES)

    def test_a_race_under_way(self) -> None:
        metadata = {"unfinished": 2, "select": {"method": "racing"}}
        found = find(race()[0], metadata)
        assert found.chosen == 0
        assert found.notes[0].endswith("images so far: 100 held-out (race-1).")
        assert "No alpha is chosen yet." in found.notes
        assert not any("left for the final" in note for note in found.notes)


class TestFlags:
    def folder(self, path: Path, masked: float) -> Path:
        """alpha = 0.2 is chosen; of one alpha Square takes what gradients have left standing."""
        sound, broken = (84.0, 70.0, 66.0, 66.0, 60.0), (84.0, 70.0, 66.0, 61.0, 60.0)
        tables = [
            rows(measured(broken if alpha == masked else sound, 400), alpha=alpha, split=split)
            for split in (HELD_OUT, TEST)
            for alpha in (0.0, 0.2, 0.4)
        ]
        return folder_of(path, tables, chosen_alpha=0.2)

    def test_raised_ones_stand_out(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path, masked=0.2)
        page = Page(folder)
        assert [a for tag, a in page.tags if tag == "li" and a.get("class") == "doubt"]
        for said in (page.said(), (folder / "results.md").read_text()):
            assert "Blackbox beats white-box at α = 0.2" in said
            assert "20 of 400" in said
            assert "docs/evaluation.md#blackbox-beats-white-box" in said
            assert "Looked for and not found: zero gradients, random output" in said
            assert "Not measured: transfer beats white-box (run attacks=" in said

    def test_a_doubt_about_an_alpha_that_is_not_reported_is_quieter(self, tmp_path: Path) -> None:
        page = Page(self.folder(tmp_path, masked=0.4))
        assert "Blackbox beats white-box at α = 0.4" in page.said()
        assert not [a for tag, a in page.tags if tag == "li" and a.get("class") == "doubt"]
        # The base is reported, too: a gain is measured against it.
        page = Page(self.folder(tmp_path / "base", masked=0.0))
        assert [a for tag, a in page.tags if tag == "li" and a.get("class") == "doubt"]

    def test_what_concerns_the_reported_number_comes_first(self) -> None:
        found = find(on_test(0.0, 0.2), {"chosen_alpha": 0.2})
        where = {"a": (0.4,), "b": (0.0, 0.4), "c": (), "d": (0.2,)}
        raised = [Flag(name, True, alphas, "") for name, alphas in where.items()]
        quiet = [Flag("e", False, (), ""), Flag("f", None, (), "")]
        mixed = replace(found, flags=(*raised, *quiet))
        assert [flag.name for flag in mixed.raised] == ["b", "c", "d", "a"]


class TestBudgets:
    def test_each_round_tells_its_own(self, tmp_path: Path) -> None:
        check = round_of("check:large-eps", {0.0: 0}, 20, split=TEST, attacks=CHECK)
        spec = {"name": "large-eps", "kind": "gradient", "options": {"steps": 77}}
        other = {"name": "quick", "kind": "adaptive", "options": {"steps": 33}}
        metadata = {
            "attacks": [{"name": name, "options": {"steps": 100}} for name in ATTACKS],
            "rounds": {
                TEST: {"check:large-eps": {"eps": 1.0, "norm": "Linf", "attacks": [spec]}},
                HELD_OUT: {f"race-{i}": {"eps": 0.1, "attacks": [other]} for i in (1, 2)},
            },
            "chosen_alpha": 0.0,
            "select": {"method": "racing", "screen": [other]},
        }
        page = Page(folder_of(tmp_path, [*race(lost=True), on_test(0.0), check], **metadata))
        said = page.said()
        assert "Attacks in other rounds" in said
        assert "test check:large-epslarge-eps: options steps 77; ε 1" in said
        assert "held-out race-1, held-out race-2quick: options steps 33" in said
        assert said.count("steps 33") == 1
        assert said.count("steps 100") == len(ATTACKS)

    def test_the_same_list_is_told_once(self, tmp_path: Path) -> None:
        page = Page(write_report(make_sweep(tmp_path, n=50, n_test=50)).parent)
        assert "Attacks in other rounds" not in page.said()


def test_the_cost_of_every_round(tmp_path: Path) -> None:
    tables = [*race(), on_test(0.0, 0.2), round_of("check:large-eps", {0.0: 5}, 20, attacks=CHECK)]
    page = Page(folder_of(tmp_path, tables, chosen_alpha=0.2, select={"method": "racing"}))
    table = pa.concat_tables(tables)
    (cost,) = (t for t in range(len(page.tables)) if page.tables[t][0][0] == "round")
    found = {row.pop("round"): row for row in table_of(page, cost)}
    assert list(found) == [
        "held-out, race-1",
        "held-out, race-2",
        "held-out, main",
        "held-out, check:large-eps",
        "test, main",
        "all",
    ]
    assert found["held-out, race-1"]["alphas"] == "5"
    assert found["held-out, race-2"]["images"] == "100"
    for name in ("forward", "backward"):
        spent = [int(row[f"{name} passes"].replace(",", "")) for row in found.values()]
        assert spent[-1] == sum(spent[:-1]) == sum(table.column(f"{name}s").to_pylist()) > 0
    markdown = (tmp_path / "results.md").read_text()
    assert "## Model evaluations, round by round" in markdown
    assert f"| all |  |  | {found['all']['forward passes']} |" in markdown
