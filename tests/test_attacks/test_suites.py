"""Names, class paths and dictionaries become attacks with a written budget, or an error."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from lightning_meansparse.attacks import (
    SUITES,
    AttackSpec,
    parse_eps,
    resolve_attacks,
)


@pytest.mark.parametrize(
    ("given", "value"),
    [("8/255", 8 / 255), (0.1, 0.1), ("0.1", 0.1), (1, 1.0), (" 4 / 255 ", 4 / 255), ("1e-1", 0.1)],
)
def test_eps_reads_numbers_and_fractions(given: float | str, value: float) -> None:
    assert parse_eps(given) == pytest.approx(value, abs=0, rel=1e-15)


@pytest.mark.parametrize("given", ["", "eight", "1/0", "1/2/3", 0, -0.1, float("nan"), "inf", "-1"])
def test_eps_refuses_what_is_no_radius(given: float | str) -> None:
    with pytest.raises(ValueError, match=r"eps must be .*got"):
        parse_eps(given)


@pytest.mark.parametrize("given", [None, True, [0.1]])
def test_eps_refuses_other_types(given: Any) -> None:
    with pytest.raises(TypeError, match=r"eps must be a number or text"):
        parse_eps(given)


def test_suites_run_in_order_of_kind() -> None:
    kinds = ["gradient", "blackbox", "transfer", "adaptive"]
    for name in SUITES:
        order = [kinds.index(spec.kind) for spec in resolve_attacks(name)]
        assert order == sorted(order)
    names = [spec.name for spec in resolve_attacks(["adaptive-ce", "square", "pgd"])]
    assert names == ["pgd", "square", "adaptive-ce"]


def test_standard_spells_out_autoattacks_budgets() -> None:
    specs = {spec.name: spec for spec in resolve_attacks("standard")}
    assert list(specs) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert specs["apgd-ce"].options["steps"] == 100
    assert specs["apgd-t"].options["steps"] == 100
    assert specs["apgd-t"].options["n_targets"] == 9
    assert specs["fab-t"].options["steps"] == 100
    assert specs["fab-t"].options["n_targets"] == 9
    assert specs["square"].options["n_queries"] == 5000


def test_full_is_every_other_published_suite() -> None:
    parts = ["standard", "blackbox", "transfer", "adaptive", "quick"]
    assert resolve_attacks("full") == resolve_attacks(parts)
    seen = {(spec.rule, spec.temperature, spec.options["loss"]) for spec in SUITES["adaptive"]}
    assert {rule for rule, _, _ in seen} == {"identity", "smooth"}
    assert len({temperature for _, temperature, _ in seen if temperature}) >= 3
    assert {loss for _, _, loss in seen} == {"ce", "dlr", "dlr-targeted", "margin"}
    assert {spec.start for spec in SUITES["adaptive"]} == {"random", "base"}


def test_all_suites_can_run_together() -> None:
    together = resolve_attacks(list(SUITES))
    assert len({spec.name for spec in together}) == len(together)


def test_every_named_attack_states_its_budget() -> None:
    for suite in SUITES.values():
        for spec in suite:
            assert {"steps", "n_queries"} & set(spec.options), spec.name


def test_specs_survive_json_pickle_and_deepcopy() -> None:
    for suite in SUITES.values():
        for spec in suite:
            assert AttackSpec(**spec.as_dict()) == spec
            assert pickle.loads(pickle.dumps(spec)) == spec
            assert copy.deepcopy(spec) == spec
            with pytest.raises(TypeError):
                spec.options["steps"] = 1  # type: ignore[index]


def test_a_dictionary_changes_a_known_attack() -> None:
    (spec,) = resolve_attacks({"attack": "square", "options": {"n_queries": 7}, "name": "few"})
    known = SUITES["square"][0]
    assert spec.options == {**known.options, "n_queries": 7}
    assert (spec.name, spec.kind, spec.attack) == ("few", "blackbox", known.attack)
    (spec,) = resolve_attacks({"attack": "adaptive-ce", "rule": "identity"})
    assert (spec.rule, spec.temperature) == ("identity", None)


def test_a_class_path_is_an_attack() -> None:
    (spec,) = resolve_attacks("torchattacks.PGDL2")
    assert (spec.name, spec.attack, spec.kind) == ("pgdl2", "torchattacks.PGDL2", "gradient")


def test_a_class_path_of_a_blackbox_attack_has_that_kind() -> None:
    kinds = [spec.kind for spec in resolve_attacks(["torchattacks.SPSA", "torchattacks.Square"])]
    assert kinds == ["blackbox", "blackbox"]
    (told,) = resolve_attacks({"attack": "torchattacks.SPSA", "kind": "gradient"})
    assert told.kind == "gradient"


def test_a_class_path_states_the_budget_that_its_class_would_take() -> None:
    """As its documentation says: PGDL2(model, eps=1.0, alpha=0.2, steps=10, random_start=True)."""
    (plain,) = resolve_attacks("torchattacks.PGDL2")
    (changed,) = resolve_attacks({"attack": "torchattacks.PGDL2", "options": {"steps": 7}})
    known = {"alpha": 0.2, "random_start": True, "eps_for_division": 1e-10}
    assert plain.options == {**known, "steps": 10}
    assert changed.options == {**known, "steps": 7}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("pdg", r"'pdg' is not known; known are fgsm.*standard"),
        ([], "attacks is empty"),
        ({"attack": "pgd", "step": 3}, r"unknown keys 'step'; known are"),
        ({"options": {}}, "needs 'attack'"),
        (["pgd", {"attack": "pgd", "options": {"steps": 9}}], "two different attacks named 'pgd'"),
        ({"attack": "pgd", "name": "worst"}, "reserved"),
        ({"attack": "pgd", "name": "a/b"}, "without spaces or slashes"),
        ({"attack": "pgd", "options": {"eps": 1}}, "must not hold 'eps'"),
        ({"attack": "pgd", "rule": "identity"}, "its kind is 'adaptive'"),
        ({"attack": "pgd", "kind": "white"}, "kind of attack 'pgd' must be one of"),
        ({"attack": "adaptive-ce", "temperature": None}, "belongs to rule='smooth'"),
    ],
)
def test_wrong_suites_are_explained(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_attacks(given)


def test_suites_of_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="names, dictionaries or AttackSpec"):
        resolve_attacks([3])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("attack", "option"),
    [("pgd", "steps"), ("pgd", "step_size"), ("square", "n_queries"), ("apgd-t", "n_targets")],
)
def test_an_attack_that_would_do_nothing_is_refused(attack: str, option: str) -> None:
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"'{option}'.*would do nothing"):
            resolve_attacks({"attack": attack, "options": {option: value}})


def test_more_than_the_range_of_a_pixel_is_no_linf_radius() -> None:
    with pytest.raises(ValueError, match="did you mean '8/255'"):
        parse_eps(8, "Linf")
    assert parse_eps(8, "L2") == 8
