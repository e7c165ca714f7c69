"""The code in README.md and docs/ is run, the commands in it exist, and its links lead somewhere.

A ``python`` block is executed in an empty folder, offline, after the blocks above it in the same
file. One that needs a network or a long time has ``<!-- no-run: the reason -->`` on the line before
its fence and is only compiled. Of a ``bash`` block every ``make`` target and every ``meansparse``
subcommand with its options must exist.
"""

from __future__ import annotations

import json
import linecache
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from lightning_meansparse.cli.commands import COMMANDS
from lightning_meansparse.report import write_report

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.md")]
)
FENCE = re.compile(
    r"^(?: *<!-- no-run: (?P<reason>[^\n]+?) -->\n)?"
    r"(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)\n(?P=indent)```$",
    flags=re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, language: str) -> list[Block]:
    # A fence of four ticks shows how something is written; what is in it is not a block.
    shown = re.compile(r"^ *````.*?^ *````$", flags=re.MULTILINE | re.DOTALL)
    text = shown.sub(lambda found: "\n" * found[0].count("\n"), page.read_text())
    return [
        Block(page, text[: found.start("code")].count("\n") + 1, found["language"], code, reason)
        for found in FENCE.finditer(text)
        for code, reason in [
            (re.sub(f"^{found['indent']}", "", found["code"], flags=re.M), found["reason"])
        ]
        if found["language"] == language
    ]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
BASH = [block for page in PAGES for block in blocks(page, "bash")]


def test_the_walk_finds_pages_and_blocks() -> None:
    assert len(PAGES) >= 10
    assert ROOT / "README.md" in WITH_PYTHON
    assert len(WITH_PYTHON) >= 3
    assert len(BASH) >= 3


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, in_tmp_path: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__docs__"}
    source = ""
    for block in blocks(page, "python"):
        # Compiled with the page's own file and line, so that a traceback points into the page; and
        # with a source, as a script or a notebook has one.
        text = "\n" * (block.line - 1) + block.code
        source += text[source.count("\n") :] + "\n"
        linecache.cache[str(page)] = (len(source), None, source.splitlines(True), str(page))
        code = compile(text, str(page), "exec")
        if block.reason is None:
            exec(code, namespace)


@pytest.mark.parametrize("block", BASH, ids=lambda block: block.where)
def test_commands_exist(block: Block) -> None:
    lines = block.code.replace("\\\n", " ").splitlines()
    for line in lines:
        command = line.split("#")[0].split()
        if command[:1] == ["make"]:
            targets = [word for word in command[1:] if "=" not in word and not word.startswith("-")]
            assert set(targets) <= make_targets(), f"{block.where}: {line}"
        elif command[:1] == ["meansparse"]:
            words = command[1:] or ["--help"]
            assert words[0] in {*COMMANDS, "--help", "--version"}, f"{block.where}: {line}"


@cache
def make_targets() -> set[str]:
    found = set(
        re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    )
    assert len(found) > 5
    return found


def test_every_make_target_that_is_documented_for_contributors_exists() -> None:
    mentioned = set(re.findall(r"`make ([a-z-]+)", (ROOT / "docs" / "contributing.md").read_text()))
    assert mentioned
    assert mentioned <= make_targets()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_every_attack_and_suite_is_explained() -> None:
    from lightning_meansparse.attacks import ATTACKS, SUITES

    page = (ROOT / "docs" / "evaluation.md").read_text()
    rows = {tuple(row.split("|")[1:-1]) for row in page.splitlines() if row.startswith("| `")}
    for name, specs in SUITES.items():
        (row,) = [cells for cells in rows if f"`{name}`" in cells[0]]
        if name in ATTACKS:
            assert specs[0].kind == row[1].strip()
        elif name == "full":
            parts = re.findall(r"`([a-z]+)`", row[1])
            assert [*specs] == [spec for part in parts for spec in SUITES[part]]
        else:
            assert all(f"`{spec.name}`" in row[1] for spec in specs), name


@pytest.mark.parametrize(
    "folder",
    sorted(filter(Path.is_dir, (ROOT / "docs" / "records").iterdir())),
    ids=lambda f: f.name,
)
def test_the_results_page_says_what_the_records_say(folder, tmp_path):
    write_report(folder, output=tmp_path)
    made = re.sub(r"^#", "##", (tmp_path / "results.md").read_text(), flags=re.MULTILINE)
    assert made.strip() in (ROOT / "docs" / "results.md").read_text(), "make docs/results.md anew"


def test_the_pages_say_what_the_smaller_records_say() -> None:
    records = ROOT / "docs" / "records"
    results = (ROOT / "docs" / "results.md").read_text()
    kills = json.loads((records / "kill.json").read_text())["moments"]
    assert len(kills) == 10
    for kill in kills:
        finished = ", ".join(kill["finished"]) or "none"
        row = f"| {kill['seconds']:.1f} s | {finished} | {kill['batches']} | yes |"
        assert kill["equal"]
        assert row in results
    for suite, cost in json.loads((records / "cost.json").read_text())["per 100 images"].items():
        passes = f"{cost['forwards']:,.0f} | {cost['backwards']:,.0f}"
        assert f"| {suite} | {passes} | {cost['seconds']:.0f} |" in results
    evaluation = (ROOT / "docs" / "evaluation.md").read_text()
    for alpha, fell in json.loads((records / "hostile.json").read_text())["alphas"].items():
        points = 100 * fell["any of these"] / fell["n"]
        row = f"| {alpha} | {fell['standing']} | {fell['any of these']} | {points:.1f} points |"
        assert row in evaluation
    before = json.loads((records / "before_narrowing.json").read_text())["alphas"].values()
    left, fell = ([entry[key] for entry in before] for key in ("left by full", "fell to any"))
    flat = " ".join(evaluation.split())
    assert f"it left {left[0]} at α = 0.4 and {left[1]} at α = 0.2" in flat
    assert f"of the 60 closest of these {fell[0]} and {fell[1]} fell to an idea" in flat
    measured = sorted(records.glob("hostile_*.json"))
    assert measured
    for path in measured:
        record = json.loads(path.read_text())
        about, n = record["settings"], record["settings"]["n"]
        for alpha, entry in record["alphas"].items():
            known = set(entry.get("fell to full", ()))
            fell = set().union(*(idea["fell"] for idea in entry["ideas"].values())) - known
            assert len(fell) == entry["fell to any"]
            where = f"| {about['network']} | {about['norm']} {about['eps']:g} | {alpha} "
            left = sum(len(part["rows"]) for part in entry["batches"].values())
            others = sum(p["after"]["adaptive-dlr-identity"] for p in entry["batches"].values())
            numbers = (
                f"| {n} | {left} | {len(fell)} | {100 * len(fell) / n:.1f} points | {others} |"
            )
            assert where + numbers in evaluation, path.name
    compared = json.loads((records / "agreement_l2.json").read_text())["summary"]
    for attack in ("apgd-ce", "apgd-t", "fab-t"):
        agreement = 100 * compared[attack]["ours / reference"]["agreement"]
        assert f"{agreement:.1f} %" in evaluation
    worst = compared["worst case"]["ours / reference"]
    assert worst["accuracy of the first"] <= worst["accuracy of the second"] + 0.005
