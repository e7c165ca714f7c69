"""Evaluation flags: each is raised by what it is about, by nothing else, and never by silence."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from evaluations import evaluation, table

from lightning_meansparse.records import HELD_OUT, TEST, Flag, flags, rows

NAMES = (
    "blackbox beats white-box",
    "transfer beats white-box",
    "zero gradients",
    "random output",
    "probabilities",
    "more steps help the defender",
    "accuracy at a large eps",
    "selection on the test split",
)
SUITE = ("apgd-ce", "square", "transfer-base", "smooth")


def found(*tables: pa.Table, **metadata: Any) -> dict[str, Flag]:
    return {flag.name: flag for flag in flags(pa.concat_tables(tables), metadata)}


def falling(n: int, *, to: dict[str, int], attacks: tuple[str, ...] = SUITE) -> np.ndarray:
    """Of n images so many fall to each attack, all others stand."""
    steps = {"clean": 0} | {name: place + 1 for place, name in enumerate(attacks)}
    fallen = [steps[name] for name, count in to.items() for _ in range(count)]
    return np.array(fallen + [len(attacks) + 1] * (n - len(fallen)))


def symptomatic(n: int, **facts: Any) -> pa.Table:
    """A base model and alpha = 0.2, of which one has these facts of its clean images."""
    base, mine = (evaluation(np.full(n, 4)) for _ in range(2))
    mine = replace(mine, **facts)
    return pa.concat_tables([rows(base, alpha=0.0, split=TEST), rows(mine, alpha=0.2, split=TEST)])


def test_a_sound_evaluation_raises_nothing() -> None:
    good = falling(1000, to={"clean": 100, "apgd-ce": 300, "square": 3, "smooth": 40})
    check = {
        name: table(
            {0.0: falling(100, to={name: k}, attacks=(name,))},
            round=f"check:{name}",
            attacks=(name,),
        )
        for name, k in (("fewer-steps", 50), ("more-steps", 55), ("large-eps", 100))
    }
    seen = found(
        table({0.0: good, 0.2: good}, split=HELD_OUT, attacks=SUITE),
        table({0.0: good, 0.2: good}, attacks=SUITE),
        *check.values(),
        chosen_alpha=0.2,
    )
    assert tuple(seen) == NAMES
    assert {flag.raised for flag in seen.values()} == {False}, seen
    assert {flag.alphas for flag in seen.values()} == {()}


def test_what_nobody_measured_is_neither_raised_nor_cleared() -> None:
    seen = found(table({0.0: np.array([1, 0])}, attacks=()))
    unknown = [flag for flag in seen.values() if flag.raised is None]
    assert [flag.name for flag in unknown] == [
        "blackbox beats white-box",
        "transfer beats white-box",
        *NAMES[5:7],
    ]
    assert all("run" in flag.seen for flag in unknown)


@pytest.mark.parametrize(
    ("attack", "kind"), [("square", "blackbox"), ("transfer-base", "transfer")]
)
class TestBeaten:
    def flag(self, attack: str, kind: str, n: int, k: int) -> Flag:
        good = falling(n, to={})
        mine = falling(n, to={"clean": n // 10, "apgd-ce": n // 10, attack: k, "smooth": n // 10})
        seen = found(table({0.0: good, 0.1: good, 0.4: mine}, attacks=SUITE))
        other = {"blackbox": "transfer", "transfer": "blackbox"}[kind]
        assert not seen[f"{other} beats white-box"].raised
        return seen[f"{kind} beats white-box"]

    def test_raised_above_attack_noise(self, attack: str, kind: str) -> None:
        flag = self.flag(attack, kind, 1000, 17)
        assert flag.raised
        assert flag.alphas == (0.4,)
        assert f"at alpha = 0.4, 17 of 1,000 test images fall to {attack}" in flag.seen

    @pytest.mark.parametrize(
        ("n", "k", "raised"),
        [
            (1000, 5, False),
            (1000, 6, True),
            (20, 1, False),
            (20, 2, True),
            (1, 1, False),
        ],
    )
    def test_the_edge(self, attack: str, kind: str, n: int, k: int, raised: bool) -> None:
        flag = self.flag(attack, kind, n, k)
        assert flag.raised is raised
        assert f"{k} of {n:,}" in flag.seen

    def test_without_an_exact_gradient_before_it_there_is_nothing_to_beat(
        self, attack: str, kind: str
    ) -> None:
        for attacks in ((attack,), (attack, "apgd-ce"), (attack, "smooth")):
            mine = falling(100, to={attack: 50}, attacks=attacks)
            seen = found(table({0.0: mine}, attacks=attacks))
            assert seen[f"{kind} beats white-box"].raised is None

    def test_a_short_race_proves_nothing(self, attack: str, kind: str) -> None:
        mine = falling(32, to={attack: 2})
        race = table({0.0: mine, 0.2: mine}, round="race-1", attacks=SUITE)
        assert found(race)[f"{kind} beats white-box"].raised is None


class TestSymptoms:
    def test_zero_gradients(self) -> None:
        zeros = np.repeat([1.0, 0.99, 0.98, 0.0], [1, 1, 50, 48])
        flag = found(symptomatic(100, zero_gradient=zeros))["zero gradients"]
        assert (flag.raised, flag.alphas) == (True, (0.2,))
        assert "2 of 100 test images that are classified right" in flag.seen
        assert f"{zeros.mean():.1%} of the pixels" in flag.seen
        zeros[0] = 0.5
        assert found(symptomatic(100, zero_gradient=zeros))["zero gradients"].raised is False

    def test_images_that_are_wrong_anyway_need_no_gradient(self) -> None:
        wrong = replace(
            evaluation(np.repeat([0, 4], [50, 50])), zero_gradient=np.repeat([1.0, 0.0], [50, 50])
        )
        assert found(rows(wrong, alpha=0.0, split=TEST))["zero gradients"].raised is False

    @pytest.mark.parametrize(("noise", "raised"), [(1e-4, False), (0.01, True), (np.inf, True)])
    def test_random_output(self, noise: float, raised: bool) -> None:
        flag = found(symptomatic(50, noise=np.full(50, noise)))["random output"]
        assert flag.raised is raised
        assert flag.alphas == ((0.2,) if raised else ())
        if raised:
            assert "50 of 50 test images get other logits" in flag.seen
            assert flag.seen.endswith(f"by up to {noise:g} of their spread.")

    def test_probabilities_are_those_of_all_images(self) -> None:
        alike = np.ones(50, dtype=bool)
        flag = found(symptomatic(50, probabilities=alike))["probabilities"]
        assert (flag.raised, flag.alphas) == (True, (0.2,))
        alike[7] = False
        assert found(symptomatic(50, probabilities=alike))["probabilities"].raised is False

    def test_what_format_1_did_not_look_at_is_not_measured(self) -> None:
        n = 10
        unknown = {"noise": np.full(n, np.nan), "zero_gradient": np.full(n, np.nan)}
        old = replace(evaluation(np.full(n, 4)), **unknown)
        seen = found(rows(old, alpha=0.0, split=TEST))
        assert [seen[name].raised for name in NAMES[2:5]] == [None] * 3


class TestChecks:
    def steps(self, short: np.ndarray, long: np.ndarray) -> Flag:
        none = np.ones(len(short), dtype=int)
        made = [
            table({0.0: none, 0.3: fallen}, split=HELD_OUT, round=f"check:{name}", attacks=(name,))
            for name, fallen in (("fewer-steps", short), ("more-steps", long))
        ]
        return found(*made)["more steps help the defender"]

    def test_more_steps_that_leave_more_standing(self) -> None:
        short, long = np.repeat([1, 2], [60, 40]), np.repeat([1, 2], [50, 50])
        flag = self.steps(short, long)
        assert (flag.raised, flag.alphas) == (True, (0.3,))
        assert "50.0% of 100 held-out images stand after more steps, 40.0% after fewer" in flag.seen
        assert self.steps(long, short).raised is False

    def test_the_comparison_is_paired_and_needs_proof(self) -> None:
        # The same shares as above, but what is gained here is lost there.
        short, long = np.repeat([1, 2], [60, 40]), np.repeat([2, 1], [50, 50])
        assert self.steps(short, long).raised is False
        assert (
            self.steps(np.repeat([1, 2], [5, 5]), np.repeat([2, 1, 2], [3, 2, 5])).raised is False
        )

    def test_only_one_of_the_two_is_no_comparison(self) -> None:
        alone = table({0.0: np.array([1, 2])}, round="check:more-steps", attacks=("more-steps",))
        flag = found(alone)["more steps help the defender"]
        assert flag.raised is None
        assert "check_images" in flag.seen

    @pytest.mark.parametrize(("standing", "raised"), [(0, False), (1, True), (2, True)])
    def test_nothing_stands_where_everything_is_allowed(self, standing: int, raised: bool) -> None:
        mine = np.repeat([2, 1, 0], [standing, 60 - standing, 40])
        none = np.ones(100, dtype=int)
        made = table({0.0: none, 0.4: mine}, round="check:large-eps", attacks=("large-eps",))
        flag = found(made)["accuracy at a large eps"]
        assert (flag.raised, flag.alphas) == (raised, (0.4,) if raised else ())
        if raised:
            assert f"at alpha = 0.4, {standing} of 100 test images" in flag.seen


SOME = {0.0: np.array([4, 1]), 0.2: np.array([4, 4])}
BASE = {0.0: np.array([4, 1])}


class TestSelection:
    def flag(self, *tables: pa.Table, **metadata: Any) -> Flag:
        return found(*tables, **metadata)["selection on the test split"]

    def test_several_alphas_on_the_only_split(self) -> None:
        several = {**SOME, 0.4: np.array([4, 1])}
        assert self.flag(table(several)).raised is True
        assert self.flag(table(SOME)).raised is False  # one alpha, given beforehand
        assert self.flag(table(SOME, split=HELD_OUT), chosen_alpha=0.2).raised is True

    def test_a_choice_on_other_images(self) -> None:
        for choosing in (
            table(SOME, split=HELD_OUT),
            table(SOME, split=HELD_OUT, round="race-1"),
            table(SOME, split=HELD_OUT, round="clean-1", attacks=()),
        ):
            assert self.flag(choosing, table(SOME), chosen_alpha=0.2).raised is False
            assert self.flag(choosing, table(BASE), chosen_alpha=0.0).raised is False

    def test_a_choice_that_the_test_images_have_not_met(self) -> None:
        flag = self.flag(table(SOME, split=HELD_OUT), table(BASE), chosen_alpha=0.2)
        assert (flag.raised, flag.alphas) == (True, (0.2,))

    def test_without_a_choice(self) -> None:
        assert self.flag(table(BASE)).raised is False


def test_every_flag_is_explained() -> None:
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    sections = {
        section.partition("\n")[0]: section for section in re.split(r"^#{2,3} ", page, flags=re.M)
    }
    for flag in flags(table({0.0: np.array([1])})):
        section = sections[flag.name[0].upper() + flag.name[1:]]
        for part in ("*Raised if*", "*It means*", "*What to do:*"):
            assert section.count(part) == 1, f"{flag.name}: {part}"
        # The anchor that the heading gets.
        slug = re.sub(r"[^a-z -]", "", section.partition("\n")[0].lower()).replace(" ", "-")
        assert flag.read_on == f"docs/evaluation.md#{slug}"
