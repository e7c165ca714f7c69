"""How alpha is chosen: strategies against made-up worlds in which the truth is known."""

from itertools import pairwise
from math import ceil, log2
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_meansparse.attacks import ATTACKS, resolve_attacks
from lightning_meansparse.records import HELD_OUT, MAIN, SCHEMA, Paired, rows, summarize
from lightning_meansparse.tasks.racing import FIRST, LEVEL, Racing
from lightning_meansparse.tasks.rounds import Fixed, Round
from lightning_meansparse.tasks.selection import (
    Apparent,
    CleanBudget,
    Grid,
    check_attacks,
    check_select,
    strategy,
)

SCREEN = (ATTACKS["fgsm"],)
FULL = resolve_attacks(["fgsm", "pgd", "square"])
quickly = settings(deadline=None, max_examples=40)
ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def measured(world, round):
    """The rows of one round, as a sweep would give them: `world[alpha][attack]` are flags (N,)."""
    tables = []
    for alpha in round.alphas:
        flags = world[alpha]
        chosen = np.arange(len(flags["clean"]))[round.start : round.stop]
        left = [flags["clean"][chosen]]
        for spec in round.attacks:
            left.append(left[-1] & flags[spec.name][chosen])
        shape = (len(chosen), len(round.attacks))
        evaluation = SimpleNamespace(
            attacks=[spec.name for spec in round.attacks],
            kinds=[spec.kind for spec in round.attacks],
            indices=1000 + chosen,
            labels=chosen % 3,
            clean=left[0],
            standing=np.stack(left, 1)[:, 1:],
            attacked=np.ones(shape, bool),
            margin=np.ones(len(chosen)),
            noise=np.zeros(len(chosen)),
            zero_gradient=np.zeros(len(chosen)),
            probabilities=np.zeros(len(chosen), bool),
            forwards=np.full(shape, 10),
            backwards=np.full(shape, 10),
            seed=0,
        )
        tables.append(rows(evaluation, alpha=alpha, split=HELD_OUT, round=round.name))
    return pa.concat_tables(tables)


def play(plan, world):
    """All rounds of a plan and their rows; at each step the plan sees rows in another order."""
    table, rounds, shuffle = SCHEMA.empty_table(), [], np.random.default_rng(0)
    while (round := plan.next(table)) is not None:
        rounds.append(round)
        table = pa.concat_tables([table, measured(world, round)])
        table = table.take(shuffle.permutation(len(table)))
        assert len(rounds) < 20
    return rounds, table


def world_of(accuracies, *, n=400, seed=0, agreement=0.9):
    """Flags with the given worst-case accuracies, mostly shared between alphas.

    Attacks other than FGSM find little more; nothing is lost without an attack.
    """
    generator = np.random.default_rng(seed)
    shared = generator.random(n)
    world = {}
    for alpha, accuracy in accuracies.items():
        own = np.where(generator.random(n) < agreement, shared, generator.random(n))
        stands = own < accuracy
        world[alpha] = {
            "clean": np.ones(n, bool),
            "fgsm": stands.copy(),
            "pgd": stands & (generator.random(n) < 0.99),
            "square": stands.copy(),
        }
    return world


def spent(rounds, n):
    """Samples times alphas times attacks, the unit of cost in these worlds."""
    return sum(len(r.alphas) * len(r.attacks) * ((r.stop or n) - r.start) for r in rounds)


def final(table, alpha, name):
    """Whether each sample stands in a round, by its index."""
    of = table.filter((pa.compute.field("round") == name) & (pa.compute.field("alpha") == alpha))
    order = of.column("order").to_numpy()
    last = of.filter(pa.array(order == order.max())).sort_by("index")
    return last.column("standing").to_numpy()


accuracies = st.lists(st.floats(0, 1), min_size=1, max_size=8).map(
    lambda found: dict(zip((0.0, *ALPHAS[1:]), [0.6, *found], strict=False))
)


# ---------------------------------------------------------------------------------------- racing


@quickly
@given(truth=accuracies, n=st.integers(3, 600), seed=st.integers(0, 99))
def test_a_race_is_fair_ends_and_chooses_no_harm(truth, n, seed):
    world = world_of(truth, n=n, seed=seed)
    plan = Racing(tuple(truth), FULL, SCREEN, samples=n)
    rounds, table = play(plan, world)
    races = [round for round in rounds if round.name != MAIN]
    assert [round.name for round in races] == [f"race-{i + 1}" for i in range(len(races))]
    assert all(round.alphas[0] == 0.0 for round in rounds)
    # Each sample is raced over once, and nobody comes back who has left.
    assert [r.start for r in races] == [0, *(r.stop for r in races[:-1])]
    assert races[0].stop >= min(FIRST, n)
    for before, after in pairwise(races):
        assert set(after.alphas) <= set(before.alphas)
    chosen = plan.choice(table)
    assert f"{chosen:g}" in plan.reason(table)
    if rounds[-1].name != MAIN:
        assert chosen == 0.0
        return
    assert races[-1].stop == n
    assert rounds[-1].attacks == FULL
    assert (rounds[-1].start, rounds[-1].stop) == (0, None)
    _, finalist = rounds[-1].alphas
    assert chosen in (0.0, finalist)
    gain = summarize(table, split=HELD_OUT)[-1].gain.value
    assert (chosen == finalist) == (gain > 0)


def test_a_race_finds_the_alpha_that_helps_and_stops_the_others_early():
    truth = dict.fromkeys(ALPHAS, 0.3) | {0.0: 0.5, 0.4: 0.65}
    world = world_of(truth, n=1000)
    grid, plan = Grid(ALPHAS, FULL), Racing(ALPHAS, FULL, SCREEN, samples=1000)
    everything, table = play(grid, world)
    assert grid.choice(table) == 0.4
    rounds, table = play(plan, world)
    assert plan.choice(table) == 0.4
    assert rounds[0].alphas == ALPHAS
    assert rounds[1].alphas == (0.0, 0.4)
    assert rounds[-1].alphas == (0.0, 0.4)
    # Here the screen costs a third of the suite; of `full` the quick attack is a hundredth.
    finals = spent(rounds[-1:], 1000)
    assert spent(rounds, 1000) - finals < spent(everything, 1000) / 6
    assert finals == spent(everything, 1000) * 2 / 9


@pytest.mark.parametrize("accuracy", [0.3, 0.6])
def test_without_a_gain_there_is_no_final_and_the_choice_is_the_base(accuracy):
    """Worse than the base, or exactly like it: neither is worth the full suite."""
    world = world_of(dict.fromkeys(ALPHAS, accuracy) | {0.0: 0.6}, agreement=1.0, n=1000)
    plan = Racing(ALPHAS, FULL, SCREEN, samples=1000)
    rounds, table = play(plan, world)
    assert MAIN not in [round.name for round in rounds]
    assert len(rounds) == (1 if accuracy < 0.6 else 4)
    assert plan.choice(table) == 0.0
    assert "none that beats the base model" in plan.reason(table)


def test_a_finalist_that_the_full_suite_breaks_is_not_chosen():
    world = world_of({0.0: 0.5, 0.2: 0.7}, agreement=1.0)
    world[0.2]["square"][:] = False
    plan = Racing((0.0, 0.2), FULL, SCREEN, samples=400)
    rounds, table = play(plan, world)
    assert rounds[-1].alphas == (0.0, 0.2)
    assert plan.choice(table) == 0.0
    assert "so alpha = 0, the base model, is chosen" in plan.reason(table)


def test_the_best_alpha_is_hardly_ever_dropped_by_bad_luck():
    """All nine are equal, so any is the best; uncorrected tests would drop it in 1 run of 5."""
    truth = dict.fromkeys(ALPHAS, 0.6)
    runs, dropped = 60, 0
    for seed in range(runs):
        world = world_of(truth, n=400, seed=seed, agreement=0.7)
        rounds, _ = play(Racing(ALPHAS, FULL, SCREEN, samples=400), world)
        races = [round.alphas for round in rounds if round.name != MAIN]
        dropped += any(0.3 in before and 0.3 not in after for before, after in pairwise(races))
    assert dropped / runs <= 0.05


@quickly
@given(truth=accuracies, seed=st.integers(0, 99))
def test_who_is_dropped_was_worse_than_somebody_or_could_not_win(truth, seed):
    n = 256
    world = world_of(truth, n=n, seed=seed)
    rounds, table = play(Racing(tuple(truth), FULL, SCREEN, samples=n), world)
    races = [round for round in rounds if round.name != MAIN]
    for race, after in pairwise(races):
        names = [r.name for r in races if r.stop <= race.stop]
        flags = {
            alpha: np.concatenate([final(table, alpha, name) for name in names])
            for alpha in race.alphas
        }
        best = max(flags.values(), key=np.sum)
        for alpha in set(race.alphas) - set(after.alphas):
            mine = flags[alpha]
            change = Paired(int((mine & ~best).sum()), int((best & ~mine).sum()), len(mine))
            behind = int(flags[0.0].sum()) - int(mine.sum())
            assert change.value < 0
            assert change.p / 2 < LEVEL or behind >= n - race.stop


# ---------------------------------------------------------------------------------- clean budget


@quickly
@given(
    lost=st.lists(st.integers(0, 30), min_size=1, max_size=12).map(sorted),
    budget=st.integers(0, 30),
)
def test_bisection_finds_what_looking_at_every_alpha_would(lost, budget):
    n = 100
    alphas = tuple(round(0.05 * i, 2) for i in range(len(lost) + 1))
    world = {
        alpha: {"clean": np.arange(n) >= 10 + gone}
        for alpha, gone in zip(alphas, [0, *lost], strict=True)
    }
    plan = CleanBudget(alphas, budget / n)
    rounds, table = play(plan, world)
    allowed = [a for a, gone in zip(alphas, [0, *lost], strict=True) if gone <= budget]
    chosen = plan.choice(table)
    assert chosen == max(allowed)
    assert len(rounds) <= ceil(log2(len(alphas)))
    assert all(round.attacks == () and round.alphas[0] == 0.0 for round in rounds)
    assert (f"alpha = {chosen:g}") in plan.reason(table)


@quickly
@given(lost=st.lists(st.integers(-5, 30), min_size=1, max_size=9), budget=st.integers(0, 30))
def test_the_budget_is_kept_also_where_accuracy_does_not_fall_steadily(lost, budget):
    alphas = ALPHAS[: len(lost) + 1]
    gone = dict(zip(alphas, [0, *lost], strict=False))
    world = {alpha: {"clean": np.arange(100) >= 10 + gone[alpha]} for alpha in alphas}
    plan = CleanBudget(alphas, budget / 100)
    _, table = play(plan, world)
    assert gone[plan.choice(table)] <= budget


# ----------------------------------------------------------------------------------- the others


def test_a_grid_measures_everything_at_once_and_chooses_by_the_worst_case():
    world = world_of({0.0: 0.5, 0.1: 0.6, 0.2: 0.8}, agreement=1.0)
    world[0.2]["square"][:] = False
    plan = Grid((0.0, 0.1, 0.2), FULL)
    (only,), table = play(plan, world)
    assert only == Round(MAIN, (0.0, 0.1, 0.2), FULL)
    assert plan.choice(table) == 0.1
    assert "of 2 alphas, alpha = 0.1 has the largest worst-case gain" in plan.reason(table)
    nothing = Grid((0.0, 0.2), FULL)
    table = play(nothing, world)[1]
    assert nothing.choice(table) == 0.0
    assert "none of 1 alpha beats the base model" in nothing.reason(table)


def test_apparent_robustness_falls_for_the_mask_and_says_so():
    world = world_of({0.0: 0.5, 0.1: 0.6, 0.2: 0.8}, agreement=1.0)
    world[0.2]["square"][:] = False
    plan = Apparent((0.0, 0.1, 0.2), FULL)
    table = play(plan, world)[1]
    assert plan.choice(table) == 0.2
    assert "in the worst case it has 0.0%" in plan.reason(table)


def test_fixed_rounds_come_in_their_order():
    world = world_of({0.0: 0.5})
    given = tuple(Round(name, (0.0,), SCREEN) for name in (MAIN, "check:b", "check:a"))
    assert tuple(play(Fixed(given), world)[0]) == given


@pytest.mark.parametrize("select", ["grid", "racing", "clean_budget", "apparent_robustness"])
def test_the_base_model_alone_is_measured_and_chosen(select):
    plan = strategy(
        select, alphas=(0.0,), attacks=FULL, screen=SCREEN, clean_budget=0.01, samples=50
    )
    rounds, table = play(plan, world_of({0.0: 0.5}, n=50))
    assert [round.name for round in rounds] == [MAIN]
    assert plan.choice(table) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "random"}, "select must be one of 'grid', 'racing'"),
        ({"clean_budget": 2}, "clean_budget must be a fraction"),
        ({"select": "apparent_robustness"}, "needs an attack of kind 'gradient'"),
    ],
)
def test_what_no_strategy_can_work_with_is_refused(options, message):
    blind = resolve_attacks("square")
    with pytest.raises(ValueError, match=message):
        check_select(**{"select": "grid", "attacks": blind, "clean_budget": 0.01, **options})


def test_stronger_attacks_decide_between_those_that_the_screen_has_left():
    """0.3 shines under the screen; attacks that know the operator see through it."""
    attacks = resolve_attacks(["pgd", "adaptive-dlr"])
    world = world_of({0.0: 0.5, 0.2: 0.7, 0.3: 0.705}, agreement=1.0)
    for alpha, flags in world.items():
        flags["adaptive-dlr"] = flags["fgsm"] & (alpha != 0.3)
    plan = Racing((0.0, 0.2, 0.3), attacks, SCREEN, samples=400)
    rounds, table = play(plan, world)
    assert [round.name for round in rounds] == [*(f"race-{i}" for i in range(1, 6)), MAIN]
    assert [spec.name for spec in rounds[-2].attacks] == ["adaptive-dlr"]
    assert (rounds[-2].start, rounds[-2].stop) == (0, None)
    assert rounds[-2].alphas == (0.0, 0.2, 0.3)
    assert rounds[-1].alphas == (0.0, 0.2)
    assert plan.choice(table) == 0.2
    alone = {alpha: world[alpha] for alpha in (0.0, 0.2)}
    rounds, _ = play(Racing((0.0, 0.2), attacks, SCREEN, samples=400), alone)
    assert [round.name for round in rounds[-2:]] == ["race-4", MAIN]


@pytest.mark.parametrize("name", ["attacks", "screen"])
def test_appearance_chooses_under_its_own_name_only(name):
    seeing, blind = resolve_attacks("adaptive-ce"), resolve_attacks(["fgsm", "apgd-t"])
    suites = {"attacks": seeing, "screen": seeing, name: blind}
    with pytest.raises(ValueError, match=rf"^{name} must hold .*'fgsm'.*'apparent_robustness'"):
        check_attacks("racing", alphas=(0.0, 0.1), **suites)
    for select in ("clean_budget", "apparent_robustness"):
        check_attacks(select, alphas=(0.0, 0.1), **suites)
    check_attacks("racing", alphas=(0.0,), **suites)
    check_attacks("grid", alphas=(0.0, 0.1), attacks=seeing, screen=blind)
