"""Records: the table, the intervals against independent values, the summaries and the words."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from evaluations import KINDS, evaluation, table
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_meansparse.records import (
    FORMAT_VERSION,
    HELD_OUT,
    MAIN,
    SCHEMA,
    TEST,
    AlphaSummary,
    Paired,
    Proportion,
    choose_alpha,
    environment,
    read_records,
    rounds,
    rows,
    splits,
    summarize,
    verdict,
    write_records,
)


def summary(
    *,
    gained: int,
    lost: int,
    n: int,
    alpha: float = 0.2,
    split: str = TEST,
    attacks: tuple[str, ...] = tuple(KINDS),
) -> AlphaSummary:
    """A summary whose worst case comes from the paired counts alone."""
    base = np.zeros(n, dtype=int)
    mine = np.zeros(n, dtype=int)
    base[: n // 2] = mine[: n // 2] = len(attacks) + 1
    mine[n // 2 : n // 2 + gained] = len(attacks) + 1
    mine[:lost] = 1
    records = table({0.0: base, alpha: mine}, split=split, attacks=attacks)
    return summarize(records, split=split)[1]


class TestProportion:
    # Newcombe, Two-sided confidence intervals for the single proportion, Statistics in Medicine 17
    # (1998), Table I, method 3 (score, no continuity correction).
    @pytest.mark.parametrize(
        ("k", "n", "low", "high"),
        [
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0000, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ],
    )
    def test_published_wilson_intervals(self, k: int, n: int, low: float, high: float) -> None:
        share = Proportion(k, n)
        assert share.low == pytest.approx(low, abs=5e-5)
        assert share.high == pytest.approx(high, abs=5e-5)

    @settings(deadline=None, max_examples=50)
    @given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
    def test_agrees_with_scipy_and_stays_inside(self, counts: tuple[int, int]) -> None:
        stats = pytest.importorskip("scipy.stats")
        k, n = counts
        theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
        share = Proportion(k, n)
        assert share.low == pytest.approx(theirs.low, abs=1e-12)
        assert share.high == pytest.approx(theirs.high, abs=1e-12)
        assert 0 <= share.low <= share.value <= share.high <= 1

    def test_nothing_measured_is_not_a_number(self) -> None:
        share = Proportion(0, 0)
        assert math.isnan(share.value)
        assert (share.low, share.high) == (0.0, 1.0)

    @pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, -1)])
    def test_impossible_counts_are_refused(self, k: int, n: int) -> None:
        with pytest.raises(ValueError, match="0 <= k <= n"):
            Proportion(k, n)


class TestPaired:
    @settings(deadline=None, max_examples=60)
    @given(st.integers(0, 400), st.integers(0, 400))
    def test_p_agrees_with_scipy(self, gained: int, lost: int) -> None:
        stats = pytest.importorskip("scipy.stats")
        ours = Paired(gained, lost, 1000).p
        theirs = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-300)

    def test_p_of_many_samples_agrees_with_scipy(self) -> None:
        stats = pytest.importorskip("scipy.stats")
        assert Paired(50_200, 49_800, 10**6).p == pytest.approx(
            stats.binomtest(50_200, 100_000).pvalue, rel=1e-8
        )
        assert Paired(5_000, 0, 10**6).p == 0.0

    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 60))
    def test_se_is_that_of_the_mean_difference(self, gained: int, lost: int, same: int) -> None:
        differences = np.repeat([1.0, -1.0, 0.0], [gained, lost, same])
        n = len(differences)
        change = Paired(gained, lost, n)
        if n < 2:
            assert math.isnan(change.se)
        else:
            assert change.se == pytest.approx(differences.std(ddof=1) / math.sqrt(n), abs=1e-12)
            assert change.value == pytest.approx(differences.mean())

    def test_se_agrees_with_a_bootstrap(self) -> None:
        rng = np.random.default_rng(0)
        differences = np.repeat([1.0, -1.0, 0.0], [12, 40, 448])
        means = rng.choice(differences, (4000, 500)).mean(axis=1)
        assert Paired(12, 40, 500).se == pytest.approx(means.std(), rel=0.05)

    def test_interval_covers_the_truth(self) -> None:
        rng = np.random.default_rng(1)
        n, gain_rate, loss_rate = 200, 0.02, 0.05
        draws = rng.multinomial(n, [gain_rate, loss_rate, 1 - gain_rate - loss_rate], size=2000)
        changes = [Paired(int(gained), int(lost), n) for gained, lost, _ in draws]
        covered = np.mean([c.low <= gain_rate - loss_rate <= c.high for c in changes])
        assert 0.93 <= covered <= 0.98

    def test_no_disagreement_still_has_an_interval(self) -> None:
        change = Paired(0, 0, 100)
        assert (change.value, change.se, change.p) == (0.0, 0.0, 1.0)
        assert change.low < 0 < change.high

    def test_one_sample(self) -> None:
        change = Paired(1, 0, 1)
        assert change.value == 1.0
        assert math.isnan(change.se)
        assert -1 <= change.low < 0 < change.high == 1.0

    def test_needed_samples_have_the_power_they_promise(self) -> None:
        rng = np.random.default_rng(2)
        seen = Paired(gained=24, lost=12, n=1000)
        n = seen.needed()
        assert n is not None
        draws = rng.multinomial(n, [0.024, 0.012, 0.964], size=600)
        found = np.mean([Paired(int(g), int(b), n).p < 0.05 for g, b, _ in draws])
        assert 0.74 <= found <= 0.86
        more = seen.needed(power=0.95)
        assert more is not None
        assert more > n

    def test_zero_difference_needs_no_finite_n(self) -> None:
        assert Paired(3, 3, 100).needed() is None

    def test_impossible_counts_and_power_are_refused(self) -> None:
        with pytest.raises(ValueError, match="gained"):
            Paired(2, 2, 3)
        with pytest.raises(ValueError, match="power"):
            Paired(1, 0, 3).needed(power=1.0)


def with_a_bit_flipped(path: Path, places: Iterable[int]) -> Iterator[tuple[int, pa.Table | None]]:
    """What is read where a bit of this byte has flipped; None if that is an error."""
    whole = path.read_bytes()
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = read_records(path)[0]
        except ValueError:
            found = None
        yield place, found


class TestTable:
    def test_rows_say_what_the_evaluation_says(self) -> None:
        source = evaluation(np.array([0, 2, 4]), start=7)
        made = rows(source, alpha=0.2, split=TEST)
        assert made.schema.equals(SCHEMA)
        assert made.num_rows == 3 * 4
        middle = [row for row in made.to_pylist() if row["index"] == 8]
        assert [row["attack"] for row in middle] == ["clean", *KINDS]
        assert [row["kind"] for row in middle] == ["clean", *KINDS.values()]
        assert [row["order"] for row in middle] == [0, 1, 2, 3]
        assert [row["standing"] for row in middle] == [True, True, False, False]
        assert [row["attacked"] for row in middle] == [False, True, True, False]
        assert [row["forwards"] for row in middle] == [2, 100, 100, 0]
        assert {row["margin"] for row in middle} == {np.float32(math.sin(8))}
        assert {row["label"] for row in middle} == {8}
        assert {row["round"] for row in middle} == {MAIN}
        assert {row["noise"] for row in middle} == {0.0}
        assert {row["zero_gradient"] for row in middle} == {0.25}
        assert {row["probabilities"] for row in middle} == {False}

    def test_an_evaluation_without_attacks_has_clean_rows_only(self) -> None:
        made = table({0.0: np.array([0, 1, 1]), 0.2: np.array([1, 1, 1])}, attacks=())
        assert set(made.column("attack").to_pylist()) == {"clean"}
        base, found = summarize(made, split=TEST)
        assert (base.robust, base.apparent, base.masking) == ({}, None, None)
        assert base.worst == base.clean == Proportion(2, 3)
        assert found.gain == Paired(1, 0, 3)

    @pytest.mark.parametrize("alpha", [-0.1, math.nan, math.inf])
    def test_alpha_must_be_a_threshold(self, alpha: float) -> None:
        with pytest.raises(ValueError, match="alpha must be"):
            rows(evaluation(np.array([1])), alpha=alpha, split=TEST)

    def test_misfits_name_the_attribute(self) -> None:
        good = evaluation(np.array([1, 2]))
        with pytest.raises(ValueError, match=r"evaluation\.standing .* \(2, 3\)"):
            rows(replace(good, standing=torch.ones(2, 2)), alpha=0, split=TEST)
        with pytest.raises(ValueError, match=r"evaluation\.labels"):
            rows(replace(good, labels=torch.ones(3)), alpha=0, split=TEST)
        with pytest.raises(ValueError, match="distinct names"):
            rows(replace(good, attacks=("clean", "a", "b")), alpha=0, split=TEST)
        with pytest.raises(ValueError, match="kinds must name"):
            rows(good, alpha=0, split=TEST, kinds=["gradient"])
        with pytest.raises(ValueError, match="split must be"):
            rows(good, alpha=0, split="")
        with pytest.raises(ValueError, match="round must be"):
            rows(good, alpha=0, split=TEST, round="")
        with pytest.raises(ValueError, match=r"evaluation\.noise"):
            rows(replace(good, noise=torch.zeros(3)), alpha=0, split=TEST)

    def test_round_trip(self, tmp_path: Path) -> None:
        records = table({0.0: np.array([4, 2]), 0.2: np.array([4, 0])})
        metadata = {"eps": 0.1, "attacks": [{"name": "apgd-ce"}], "note": "ε < 1"}
        path = write_records(records, tmp_path / "deep" / "records.parquet", metadata)
        back, kept = read_records(path)
        assert back.equals(records)
        assert kept == metadata
        assert summarize(back, split=TEST) == summarize(records, split=TEST)
        assert write_records(back, path, kept) == path

    def test_what_was_not_measured_comes_back_so(self, tmp_path: Path) -> None:
        nothing = replace(
            evaluation(np.array([1]), attacks=()), noise=[math.nan], zero_gradient=[math.nan]
        )
        path = write_records(rows(nothing, alpha=0, split=TEST), tmp_path / "r.parquet", {})
        (row,) = read_records(path)[0].to_pylist()
        assert math.isnan(row["noise"])
        assert math.isnan(row["zero_gradient"])

    def test_version_1_is_still_read(self, tmp_path: Path) -> None:
        new = table({0.0: np.array([4, 2]), 0.2: np.array([4, 0])})
        columns = ["round", "noise", "zero_gradient", "probabilities"]
        text = json.dumps({"format_version": 1, "eps": 0.1})
        old = new.drop_columns(columns).replace_schema_metadata({"meansparse": text})
        pq.write_table(old, tmp_path / "old.parquet")
        back, metadata = read_records(tmp_path / "old.parquet")
        assert metadata == {"eps": 0.1}
        assert back.schema.equals(SCHEMA)
        assert back.drop_columns(columns).equals(new.drop_columns(columns))
        assert set(back.column("round").to_pylist()) == {MAIN}
        assert all(map(math.isnan, back.column("noise").to_pylist()))
        assert all(map(math.isnan, back.column("zero_gradient").to_pylist()))
        assert set(back.column("probabilities").to_pylist()) == {False}
        assert summarize(back, split=TEST) == summarize(new, split=TEST)

    def test_the_file_does_not_depend_on_the_order_of_batches(self, tmp_path: Path) -> None:
        parts = [
            rows(evaluation(np.array([1, 4]), start=start), alpha=alpha, split=TEST)
            for start in (0, 2, 4)
            for alpha in (0.0, 0.2)
        ]
        one = write_records(parts, tmp_path / "one.parquet", {})
        two = write_records(reversed(parts), tmp_path / "two.parquet", {})
        assert one.read_bytes() == two.read_bytes()

    @pytest.mark.parametrize("broken", ["write", "replace"])
    def test_a_crash_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
    ) -> None:
        path = write_records(table({0.0: np.array([4])}), tmp_path / "records.parquet", {"run": 1})
        before = path.read_bytes()

        def crash_write(_: pa.Table, where: Path, **options: object) -> None:
            where.write_bytes(b"PAR1 half a file")
            raise OSError("no space left")

        def crash_replace(*_: object) -> None:
            raise OSError("killed")

        if broken == "write":
            monkeypatch.setattr(pq, "write_table", crash_write)
        else:
            monkeypatch.setattr(os, "replace", crash_replace)
        with pytest.raises(OSError, match=r"no space|killed"):
            write_records(table({0.0: np.array([1])}), path, {"run": 2})
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["records.parquet"]

    def test_bad_metadata_and_tables_are_refused_before_writing(self, tmp_path: Path) -> None:
        path, records = tmp_path / "records.parquet", table({0.0: np.array([4])})
        with pytest.raises(TypeError, match="JSON"):
            write_records(records, path, {"folder": tmp_path})
        with pytest.raises(ValueError, match="JSON"):
            write_records(records, path, {"eps": math.nan})
        with pytest.raises(ValueError, match="format_version"):
            write_records(records, path, {"format_version": 99})
        with pytest.raises(ValueError, match="wrong or missing: margin"):
            write_records(records.drop_columns(["margin"]), path, {})
        twice = records.append_column("margin", records["margin"])
        with pytest.raises(ValueError, match="wrong or missing: margin"):
            write_records(twice, path, {})
        with pytest.raises(ValueError, match="at least one"):
            write_records([], path, {})
        assert not path.exists()

    def test_reading_tells_what_is_wrong(self, tmp_path: Path) -> None:
        path = tmp_path / "records.parquet"
        with pytest.raises(FileNotFoundError, match="meansparse sweep"):
            read_records(path)
        path.write_bytes(b"not parquet at all")
        with pytest.raises(ValueError, match="not a readable Parquet file"):
            read_records(path)
        pq.write_table(pa.table({"a": [1]}), path)
        with pytest.raises(ValueError, match="not a records file"):
            read_records(path)

        records = table({0.0: np.array([4])})
        for text, message in [
            ("{", "damaged metadata"),
            ("[]", "JSON object"),
            ("{}", "format_version"),
            (json.dumps({"format_version": FORMAT_VERSION + 1}), "Upgrade"),
        ]:
            pq.write_table(records.replace_schema_metadata({"meansparse": text}), path)
            with pytest.raises(ValueError, match=message):
                read_records(path)

        ours = {"meansparse": json.dumps({"format_version": FORMAT_VERSION})}
        pq.write_table(records.drop_columns(["seed"]).replace_schema_metadata(ours), path)
        with pytest.raises(ValueError, match="seed"):
            read_records(path)

    def test_a_truncated_file_is_damaged(self, tmp_path: Path) -> None:
        path = write_records(table({0.0: np.array([4])}), tmp_path / "records.parquet", {})
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match="not a readable Parquet file"):
            read_records(path)

    def test_a_bit_that_flips_in_the_description_is_told_as_damage(self, tmp_path: Path) -> None:
        path = write_records(table({0.0: np.array([4])}), tmp_path / "records.parquet", {})
        whole = path.read_bytes()
        places = range(whole.index(b"ARROW:schema"), len(whole), 3)
        damaged = sum(found is None for _, found in with_a_bit_flipped(path, places))
        assert damaged > len(places) / 4

    def test_a_bit_that_flips_in_the_rows_is_told_as_damage(self, tmp_path: Path) -> None:
        path = write_records(table({0.0: np.arange(50) % 3}), tmp_path / "records.parquet", {})
        whole, rows = path.read_bytes(), read_records(path)[0].to_pylist()
        rest = int.from_bytes(whole[-8:-4], "little") + 8
        for place, found in with_a_bit_flipped(path, range(4, len(whole) - rest, 7)):
            # As text, for NaN is not equal to itself.
            assert found is None or str(found.to_pylist()) == str(rows), place

    def test_a_folder_is_read_as_its_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="meansparse sweep"):
            read_records(tmp_path)
        path = write_records(table({0.0: np.array([4])}), tmp_path / "records.parquet", {"a": 1})
        assert read_records(tmp_path) == read_records(path)

    def test_parts_of_a_sweep_that_goes_on(self, tmp_path: Path) -> None:
        def part(split: str, number: int, alphas: tuple[float, ...], **told: Any) -> pa.Table:
            made = [
                rows(evaluation(np.array([4, 1]), start=2 * number), alpha=alpha, split=split)
                for alpha in alphas
            ]
            path = tmp_path / "parts" / f"{split}-{number}.parquet"
            write_records(made, path, {"eps": 0.1, "part": path.name, **told})
            return pa.concat_tables(made)

        rounds_of = {"rounds": {HELD_OUT: {"main": {"eps": 0.1}}}}
        done = [part(HELD_OUT, number, (0.0, 0.2)) for number in (0, 1)]
        done.append(part(HELD_OUT, 2, (0.0, 0.2), **rounds_of))
        back, metadata = read_records(tmp_path)
        assert metadata == {"eps": 0.1, **rounds_of, "unfinished": 3}
        assert summarize(back, split=HELD_OUT) == summarize(pa.concat_tables(done), split=HELD_OUT)

        # The held-out images are done, whatever a kill has left of their parts.
        finished = {"eps": 0.1, "chosen_alpha": 0.2, **rounds_of}
        path = write_records(done, tmp_path / "records.parquet", finished)
        assert read_records(tmp_path)[1] == finished
        assert read_records(tmp_path)[0].equals(read_records(path)[0])

        more = part(TEST, 0, (0.0, 0.2), rounds={TEST: {"main": {"eps": 0.2}}})
        back, metadata = read_records(tmp_path)
        assert summarize(back, split=HELD_OUT) == summarize(pa.concat_tables(done), split=HELD_OUT)
        assert summarize(back, split=TEST) == summarize(more, split=TEST)
        assert metadata.pop("unfinished") == 1
        assert metadata.pop("rounds") == {
            HELD_OUT: {"main": {"eps": 0.1}},
            TEST: {"main": {"eps": 0.2}},
        }
        assert metadata == {"eps": 0.1, "chosen_alpha": 0.2}

    def test_parts_of_two_sweeps_are_no_sweep(self, tmp_path: Path) -> None:
        for number, sweep in enumerate("ab"):
            part = table({0.0: np.array([4])})
            write_records(part, tmp_path / "parts" / f"{number}.parquet", {"sweep": sweep})
        with pytest.raises(ValueError, match="batches of several sweeps"):
            read_records(tmp_path)

    def test_a_part_without_rows_is_nothing(self, tmp_path: Path) -> None:
        part = table({0.0: np.array([4])})
        write_records(part, tmp_path / "parts" / "0.parquet", {"sweep": "a"})
        write_records(part.slice(0, 0), tmp_path / "parts" / "1.parquet", {"sweep": "a"})
        rows, metadata = read_records(tmp_path)
        assert (len(rows), metadata["unfinished"]) == (len(part), 1)

    def test_every_column_is_explained(self) -> None:
        page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
        section = page.partition("\n## Records\n")[2].partition("A *round* is")[0]
        found: dict[str, str] = {}
        for names, types in re.findall(r"^\| (`.*?`) \| ([a-z0-9, ]+) \|", section, flags=re.M):
            columns, kinds = re.findall(r"`(\w+)`", names), types.split(", ")
            found |= dict(
                zip(columns, kinds if len(kinds) > 1 else kinds * len(columns), strict=True)
            )
        numpy_names = {"float": "float32", "double": "float64"}
        known = {field.name: str(field.type) for field in SCHEMA}
        assert found == {name: numpy_names.get(kind, kind) for name, kind in known.items()}

    def test_environment_is_json(self) -> None:
        found = environment()
        assert json.loads(json.dumps(found)) == found
        assert "torch" in found["versions"]
        assert found["hardware"]["cores"] >= 1


class TestSummaries:
    def test_numbers_by_hand(self) -> None:
        base = np.array([0, 1, 2, 3, 4, 4, 4, 4])
        mine = np.array([0, 2, 3, 4, 4, 4, 1, 2])
        first, second = summarize(table({0.2: mine, 0.0: base}), split=TEST)
        assert (first.alpha, second.alpha) == (0.0, 0.2)
        assert first.gain == Paired(0, 0, 8)
        assert first.base == first.worst == Proportion(4, 8)
        assert second.clean == Proportion(7, 8)
        assert second.robust == {
            "apgd-ce": Proportion(6, 8),
            "square": Proportion(4, 8),
            "smooth": Proportion(3, 8),
        }
        assert second.kinds == KINDS
        assert second.apparent == Proportion(6, 8)
        assert second.worst == Proportion(3, 8)
        assert second.masking == pytest.approx(3 / 8)
        assert second.gain == Paired(gained=1, lost=2, n=8)
        assert second.base == Proportion(4, 8)
        attacked = sum(int(np.minimum(value, 3)) for value in mine)
        assert (second.forwards, second.backwards) == (100 * attacked + 2 * 8, 99 * attacked + 8)

    def test_apparent_is_not_measured_without_a_gradient_attack(self) -> None:
        records = table({0.0: np.array([3, 1]), 0.2: np.array([3, 1])}, attacks=("square",))
        assert all(s.apparent is None and s.masking is None for s in summarize(records, split=TEST))

    @pytest.mark.parametrize(
        ("attacks", "masking"),
        [
            (("apgd-ce",), None),
            (("square", "apgd-ce"), None),
            (("apgd-ce", "square"), 0.5),
            (("apgd-ce", "smooth"), 0.5),
        ],
    )
    def test_masking_needs_another_kind_of_attack_after_the_gradient_ones(
        self, attacks: tuple[str, ...], masking: float | None
    ) -> None:
        records = table({0.0: np.array([3, 2]), 0.2: np.array([3, 2])}, attacks=attacks)
        for found in summarize(records, split=TEST):
            assert found.masking == masking
            assert found.apparent is not None

    def test_padding_counts_once_whatever_the_order(self) -> None:
        survived = {0.0: np.array([4, 2, 1]), 0.2: np.array([4, 3, 0])}
        records = table(survived)
        padded = pa.concat_tables([records, records.slice(0, 4), records.slice(12, 4)])
        assert summarize(padded, split=TEST) == summarize(records, split=TEST)

    def test_a_copy_that_falls_decides(self) -> None:
        records = table({0.0: np.array([4, 4]), 0.2: np.array([4, 4])})
        fallen = table({0.2: np.array([2])})
        for parts in ([records, fallen], [fallen, records]):
            result = summarize(pa.concat_tables(parts), split=TEST)[1]
            assert result.worst == Proportion(1, 2)
            assert result.apparent == Proportion(2, 2)

    def test_indices_restarted_per_batch_are_noticed(self) -> None:
        first = evaluation(np.array([4, 2]))
        second = replace(first, labels=first.labels + 1)
        third = replace(first, margin=first.margin + 0.5)
        for other, what in ((second, "label"), (third, "margin")):
            parts = [rows(e, alpha=0.0, split=TEST) for e in (first, other)]
            with pytest.raises(ValueError, match=f"index 0 has two values of '{what}'"):
                summarize(pa.concat_tables(parts), split=TEST)

    def test_float_noise_between_copies_is_no_conflict(self) -> None:
        first = evaluation(np.array([4, 2]))
        noisy = replace(first, margin=first.margin * (1 + 1e-5))
        parts = [rows(e, alpha=0.0, split=TEST) for e in (first, noisy)]
        assert summarize(pa.concat_tables(parts), split=TEST)[0].n == 2

    def test_base_rows_are_needed(self) -> None:
        with pytest.raises(ValueError, match=r"base model's rows .* add 0"):
            summarize(table({0.2: np.array([4])}), split=TEST)
        records = pa.concat_tables(
            [table({0.0: np.array([4, 1])}), table({0.2: np.array([4, 1, 2])})]
        )
        with pytest.raises(ValueError, match="1 are missing, the first is index 2"):
            summarize(records, split=TEST)

    def test_a_part_of_the_base_samples_is_paired_with_that_part(self) -> None:
        records = pa.concat_tables(
            [table({0.0: np.array([4, 4, 1, 1])}), table({0.2: np.array([4, 1])})]
        )
        result = summarize(records, split=TEST)[1]
        assert result.gain == Paired(0, 1, 2)
        assert result.base == Proportion(2, 2)

    def test_the_base_must_face_the_same_attacks(self) -> None:
        records = pa.concat_tables(
            [
                table({0.0: np.array([3])}, attacks=("apgd-ce", "square")),
                table({0.2: np.array([4])}),
            ]
        )
        with pytest.raises(ValueError, match="attacked as the base model was"):
            summarize(records, split=TEST)

    def test_a_missing_attack_is_noticed(self) -> None:
        records = table({0.0: np.array([4, 4])})
        with pytest.raises(ValueError, match="Sample 1 lacks 'smooth'"):
            summarize(records.slice(0, 7), split=TEST)

    def test_two_orders_of_attacks_are_noticed(self) -> None:
        first = rows(evaluation(np.array([4])), alpha=0.0, split=TEST)
        other = evaluation(np.array([4]), start=1, attacks=("square", "apgd-ce", "smooth"))
        with pytest.raises(ValueError, match="one order of attacks"):
            summarize(pa.concat_tables([first, rows(other, alpha=0.0, split=TEST)]), split=TEST)

    def test_a_sample_does_not_stand_up_again(self) -> None:
        risen = evaluation(np.array([4, 2]))
        risen.standing[1, 2] = True
        with pytest.raises(ValueError, match="sample 1 fell before 'smooth'"):
            summarize(rows(risen, alpha=0.0, split=TEST), split=TEST)

    def test_splits_are_apart(self) -> None:
        records = pa.concat_tables(
            [
                table({0.0: np.array([4, 4])}, split=TEST),
                table({0.0: np.array([1, 1, 1])}, split=HELD_OUT),
            ]
        )
        assert splits(records) == (HELD_OUT, TEST)
        assert summarize(records, split=HELD_OUT)[0].worst == Proportion(0, 3)
        with pytest.raises(ValueError, match="split must be one of"):
            summarize(records, split="validation")

    def test_rounds_are_apart(self) -> None:
        few, many = np.array([4, 1]), np.array([4, 4, 1, 1])
        names = ("check:more-steps", "race-10", "race-2", "check:fewer-steps")
        records = pa.concat_tables(
            [
                *(table({0.0: few, 0.4: few}, round=name, attacks=("smooth",)) for name in names),
                table({0.0: many, 0.2: many}),
                table({0.0: many}, split=HELD_OUT, round="clean-1", attacks=()),
            ]
        )
        assert rounds(records, TEST) == (
            "race-2",
            "race-10",
            MAIN,
            "check:fewer-steps",
            "check:more-steps",
        )
        assert rounds(records, HELD_OUT) == ("clean-1",)
        assert [s.alpha for s in summarize(records, split=TEST)] == [0.0, 0.2]
        raced = summarize(records, split=TEST, round="race-2")
        assert [(s.alpha, s.round, s.n) for s in raced] == [(0.0, "race-2", 2), (0.4, "race-2", 2)]
        with pytest.raises(ValueError, match=r"round must be one of \['clean-1'\]"):
            summarize(records, split=HELD_OUT)

    def test_a_round_pairs_with_its_own_base(self) -> None:
        # The base of another round, or of another split, is no base here.
        records = pa.concat_tables(
            [table({0.0: np.array([4])}), table({0.2: np.array([4])}, round="race-1")]
        )
        with pytest.raises(ValueError, match=r"base model's rows .* round 'race-1'"):
            summarize(records, split=TEST, round="race-1")

    @settings(deadline=None, max_examples=25)
    @given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=20))
    def test_worst_is_never_above_what_came_before(self, pairs: list[tuple[int, int]]) -> None:
        survived = np.array(pairs)
        for result in summarize(table({0.0: survived[:, 0], 0.4: survived[:, 1]}), split=TEST):
            chain = [result.clean.k, *(share.k for share in result.robust.values())]
            assert chain == sorted(chain, reverse=True)
            assert result.worst.k == chain[-1]
            assert result.masking is not None
            assert result.masking >= 0


class TestChoice:
    def choose(self, **worst: int) -> float:
        made = {}
        for name, k in worst.items():
            made[float(name[1:]) / 10] = np.where(np.arange(100) < k, 4, 1)
        return choose_alpha(summarize(table(made, split=HELD_OUT), split=HELD_OUT))

    def test_the_largest_worst_case_wins(self) -> None:
        assert self.choose(a0=60, a2=62, a4=65, a6=10) == 0.4

    def test_ties_go_to_the_smaller_alpha(self) -> None:
        assert self.choose(a0=60, a2=65, a4=65) == 0.2

    def test_nothing_beats_the_base(self) -> None:
        assert self.choose(a0=60, a2=60, a4=59) == 0.0
        assert self.choose(a0=60) == 0.0

    def test_nothing_to_choose_from(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            choose_alpha([])

    def test_splits_and_rounds_are_not_mixed(self) -> None:
        one = summary(gained=1, lost=0, n=10)
        for other in (replace(one, split=HELD_OUT), replace(one, round="race-1")):
            with pytest.raises(ValueError, match="one round of one split"):
                choose_alpha([one, other])


class TestVerdict:
    def test_real_gain(self) -> None:
        text = verdict(summary(gained=40, lost=10, n=1000))
        assert text.startswith("Real gain: at alpha = 0.2, 53.0% of the test images (n = 1,000)")
        assert "against 50.0% for the base model under the same attacks" in text
        assert "+3.0 points, 95% interval +1.6 to +4.4" in text
        assert "need" not in text

    def test_harm(self) -> None:
        text = verdict(summary(gained=0, lost=12, n=300))
        assert text.startswith("Harm:")
        assert "-4.0 points" in text
        assert "p = 0.00049" in text

    def test_no_measurable_gain_names_the_n_it_would_take(self) -> None:
        result = summary(gained=12, lost=9, n=300)
        text = verdict(result)
        assert text.startswith("No measurable gain:")
        needed = result.gain.needed()
        assert needed is not None
        assert needed > 300
        named = int(text.split("about ")[1].split(" images")[0].replace(",", ""))
        assert needed <= named <= 1.1 * needed
        assert "80% power, two-sided 5%" in text

    def test_no_difference_at_all(self) -> None:
        text = verdict(summary(gained=5, lost=5, n=300))
        assert text.startswith("No measurable gain:")
        assert "+0.0 points" in text
        assert "about" not in text

    @pytest.mark.parametrize("attacks", [("apgd-ce",), ("square",), ("apgd-ce", "square")])
    @pytest.mark.parametrize(("gained", "lost"), [(40, 0), (5, 5), (0, 3)])
    def test_no_attack_that_knows_the_operator_no_judgement(
        self, attacks: tuple[str, ...], gained: int, lost: int
    ) -> None:
        text = verdict(summary(gained=gained, lost=lost, n=300, attacks=attacks))
        assert text.startswith("Not judged: at alpha = 0.2, ")
        assert "no attack that knows the operator was run" in text
        assert 'attacks="basic"' in text
        assert "every attack" not in text
        assert " gain" not in text

    def test_harm_needs_no_attack_that_knows_the_operator(self) -> None:
        text = verdict(summary(gained=0, lost=12, n=300, attacks=("apgd-ce",)))
        assert text.startswith("Harm:")

    @pytest.mark.parametrize(
        ("gained", "attacks"), [(40, tuple(KINDS)), (1, tuple(KINDS)), (40, ("apgd-ce",))]
    )
    def test_images_that_chose_alpha_are_named_in_the_sentence(
        self, gained: int, attacks: tuple[str, ...]
    ) -> None:
        said = "on the very images that chose alpha, which flatters it"
        held_out, test = (
            summary(gained=gained, lost=0, n=300, split=split, attacks=attacks)
            for split in (HELD_OUT, TEST)
        )
        assert said in verdict(held_out)
        assert said not in verdict(held_out, chose=False)
        assert said not in verdict(test)
        assert said in verdict(test, chose=True)
        base = summarize(table({0.0: np.array([4])}, split=HELD_OUT), split=HELD_OUT)[0]
        assert "on the very images that chose alpha." in verdict(base)

    def test_base_and_no_attack(self) -> None:
        base = summarize(table({0.0: np.array([4, 1])}), split=TEST)[0]
        assert verdict(base).startswith("No gain: alpha = 0 leaves the base model as it is")
        bare = summarize(table({0.0: np.array([1])}, attacks=()), split=TEST)[0]
        assert verdict(bare).startswith("Nothing measured")

    @pytest.mark.parametrize(("gained", "lost", "n"), [(0, 0, 1), (1, 0, 1), (0, 1, 1)])
    def test_one_image_proves_nothing(self, gained: int, lost: int, n: int) -> None:
        base = np.array([1 if gained else 4])
        mine = np.array([1 if lost else 4])
        result = summarize(table({0.0: base, 0.2: mine}), split=TEST)[1]
        assert verdict(result).startswith("No measurable gain:")
        assert f"n = {n}" in verdict(result)

    def test_the_verdict_and_the_interval_agree(self) -> None:
        rng = np.random.default_rng(3)
        clashes = 0
        for _ in range(300):
            n = int(rng.integers(50, 2000))
            gained, lost = (int(x) for x in rng.integers(0, n // 8, 2))
            change = Paired(gained, lost, n)
            clashes += (change.p < 0.05) != (change.low > 0 or change.high < 0)
        assert clashes <= 6
