"""The report: from a folder to page, picture and table; read by a browser where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from reports import ATTACKS, SHARES, Page, make_sweep, table_of

from lightning_meansparse.records import (
    HELD_OUT,
    TEST,
    choose_alpha,
    read_records,
    summarize,
)
from lightning_meansparse.report import find, read_sources, render_markdown, write_report
from lightning_meansparse.report.drawing import COLOURS, inline_svg
from lightning_meansparse.report.figures import histogram_top, replaced_share
from lightning_meansparse.report.sources import SITES_VERSION, Histogram

pytest.importorskip("matplotlib")

HOSTILE = """</td><script>alert(1)</script>"'|`*$x_1$<img src=http://a.b/c onerror=alert(2)>&amp;"""
MANY = {
    round(0.05 * i, 2): (
        84 - 0.1 * i,
        68 + 0.6 * i - 0.08 * i * i,
        66 + 0.5 * i - 0.1 * i * i,
        66 - 0.2 * i * i,
        66 - 0.25 * i * i,
    )
    for i in range(12)
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's folder with its report: alpha 0.1 chosen on held-out images, judged on test."""
    shares = SHARES | {0.1: (84.0, 69.4, 68.6, 68.2, 67.4)}
    folder = make_sweep(tmp_path_factory.mktemp("sweep"), shares=shares, tested=(0.0, 0.1))
    (folder / "adapter").mkdir()
    config = {"format_version": 1, "base": "ConvNet", "sites": ["act1@in"]}
    (folder / "adapter" / "meansparse_config.json").write_text(json.dumps(config))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 alphas in both splits, 150 sites, and names that try to break out of the page."""
    names = tuple(
        f"backbone.encoder.layers.{i // 6}.blocks.{i % 6}.very_long_name.mlp.activation::gelu@in"
        for i in range(149)
    )
    folder = make_sweep(
        tmp_path_factory.mktemp("huge"),
        shares=MANY,
        n=120,
        n_test=150,
        attacks={f"{HOSTILE}{i}": kind for i, kind in enumerate(ATTACKS.values())},
        names=(HOSTILE, *names),
        metadata={
            "model": HOSTILE,
            "data": {"name": "x" * 200},
            HOSTILE: [HOSTILE, {"a": HOSTILE}],
        },
    )
    (folder / "meansparse_config.json").write_text(json.dumps({"base": HOSTILE, "note": HOSTILE}))
    write_report(folder)
    return folder


class TestFiles:
    def test_three_files_where_they_were_asked_for(self, sweep: Path, tmp_path: Path) -> None:
        assert write_report(sweep, output=tmp_path / "new" / "place") == (
            tmp_path / "new" / "place" / "report.html"
        )
        made = sorted(file.name for file in (tmp_path / "new" / "place").iterdir())
        assert made == ["report.html", "report.png", "results.md"]
        for name in made:  # the same records give the same bytes
            assert (sweep / name).read_bytes() == (tmp_path / "new" / "place" / name).read_bytes()

    def test_the_picture_is_one(self, sweep: Path) -> None:
        data = (sweep / "report.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", data[16:24]) == (1800, 1200)
        assert b"tIME" not in data

    def test_a_crash_leaves_the_old_files(
        self, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("records.parquet", "sites.json", "report.html"):
            shutil.copy(sweep / name, tmp_path)
        before = (tmp_path / "report.html").read_bytes()

        def crash(*_: object) -> None:
            raise OSError("killed")

        monkeypatch.setattr("lightning_meansparse.report.render", lambda *_: "half")
        monkeypatch.setattr("lightning_meansparse.report.render_png", lambda *_: b"half")
        monkeypatch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="killed"):
            write_report(tmp_path)
        assert (tmp_path / "report.html").read_bytes() == before
        assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*"))

    def test_without_matplotlib_the_error_names_the_extra(
        self, sweep: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r"lightning_meansparse\[report\]"):
            write_report(sweep)

    def test_importing_needs_neither_matplotlib_nor_torch(self) -> None:
        code = (
            "import sys, lightning_meansparse.report;"
            "assert not {'matplotlib', 'torch', 'lightning'} & set(sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


class TestSources:
    def test_no_folder_and_no_records(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no folder"):
            write_report(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"records\.parquet"):
            write_report(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format_version": SITES_VERSION + 1}, "Upgrade"),
            ({"format_version": "1"}, "format_version"),
            ({"alphas": None}, "'alphas' must be a list"),
            ({"alphas": [0.0, "x"]}, "'alphas' must be a finite number"),
            ({"images": True}, "'images' must be a finite number"),
            ({"sites": [{"site": "a", "channels": 1, "replaced": [0.1]}]}, "a list of 5 numbers"),
            ({"sites": [{"site": "a", "channels": 1, "replaced": [2] * 5}]}, "between 0 and 1"),
            ({"sites": ["a"]}, "'site' must be a str"),
            ({"histogram": {"site": "a", "channel": 0, "edges": [1, 0]}}, "ascending"),
        ],
    )
    def test_a_damaged_sites_file_is_named(
        self, sweep: Path, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        shutil.copy(sweep / "records.parquet", tmp_path)
        content = json.loads((sweep / "sites.json").read_text()) | change
        (tmp_path / "sites.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"sites\.json'.*{message}"):
            read_sources(tmp_path)

    def test_text_that_is_no_json_is_named(self, sweep: Path, tmp_path: Path) -> None:
        shutil.copy(sweep / "records.parquet", tmp_path)
        (tmp_path / "sites.json").write_text("{")
        with pytest.raises(ValueError, match=r"sites\.json' is not readable JSON"):
            read_sources(tmp_path)
        (tmp_path / "sites.json").write_text("[]")
        with pytest.raises(ValueError, match=r"sites\.json' must hold a JSON object"):
            read_sources(tmp_path)


class TestFindings:
    def test_held_out_chooses_and_test_judges(self, sweep: Path) -> None:
        table, metadata = read_records(sweep / "records.parquet")
        found = find(table, metadata)
        assert (found.chooser, found.reporter, found.honest) == (HELD_OUT, TEST, True)
        assert found.chosen == choose_alpha(summarize(table, split=HELD_OUT)) == 0.1
        assert found.judged == summarize(table, split=TEST)[1]
        assert "the very images" not in found.sentence
        assert found.curve == summarize(table, split=HELD_OUT)
        assert found.marked == found.reported == summarize(table, split=TEST)

    def test_one_split_that_chooses_and_judges_is_said(self, tmp_path: Path) -> None:
        table, metadata = read_records(make_sweep(tmp_path, n_test=0) / "records.parquet")
        found = find(table, metadata)
        assert not found.honest
        assert found.marked is None
        assert "on the very images that chose alpha" in found.sentence

    def test_test_images_that_had_to_choose_are_said_too(self, tmp_path: Path) -> None:
        shares = {0.0: (84.0, 68.0, 65.7, 65.7, 60.0), 0.2: (84.0, 69.0, 67.7, 67.3, 66.0)}
        shares[0.4] = (84.0, 60.0, 58.0, 57.0, 50.0)
        table, _ = read_records(make_sweep(tmp_path, shares=shares, n=0) / "records.parquet")
        found = find(table, {})
        assert (found.chooser, found.reporter, found.chosen) == (TEST, TEST, 0.2)
        assert "on the very images that chose alpha, which flatters it" in found.sentence

    def test_when_nothing_beats_the_base_masking_is_told(self, tmp_path: Path) -> None:
        table, _ = read_records(make_sweep(tmp_path, tested=(0.0,), flips=0) / "records.parquet")
        found = find(table, {})
        assert (found.chosen, found.headline) == (0.0, "No gain")
        assert "no alpha made the model more robust" in found.notes[0]
        promised = re.search(r"promised (\+\S+) points at alpha = 0.4", found.notes[1])
        assert promised is not None
        assert float(promised[1]) == pytest.approx(69.7 - 65.7, abs=0.3)

    def test_a_choice_made_otherwise_is_said(self, tmp_path: Path) -> None:
        folder = make_sweep(tmp_path, tested=(0.0, 0.4), metadata={"chosen_alpha": 0.4})
        found = find(*read_records(folder / "records.parquet"))
        assert (found.chosen, found.headline) == (0.4, "Harm")
        assert "would have been alpha = 0." in found.notes[0]

    def test_an_unmeasured_choice(self, tmp_path: Path) -> None:
        table, _ = read_records(make_sweep(tmp_path, tested=(0.0,)) / "records.parquet")
        found = find(table, {"chosen_alpha": 0.4})
        assert found.reporter == HELD_OUT
        assert any("not been measured on the test images" in note for note in found.notes)
        with pytest.raises(ValueError, match="chosen_alpha"):
            find(table, {"chosen_alpha": 0.33})


class TestPage:
    def test_every_number_comes_from_the_records(self, sweep: Path) -> None:
        page = Page(sweep)
        table, _ = read_records(sweep / "records.parquet")
        for place, split in ((0, TEST), (2, HELD_OUT)):
            results, attacks = table_of(page, place), table_of(page, place + 1)
            summaries = summarize(table, split=split)
            assert len(results) == len(attacks) == len(summaries)
            for row, cost, summary in zip(results, attacks, summaries, strict=True):
                assert row["α"].split()[0] == cost["α"].split()[0] == f"{summary.alpha:g}"
                assert row["clean"] == f"{100 * summary.clean.value:.1f}"
                worst = summary.worst
                assert row["worst case [95%]"] == (
                    f"{100 * worst.value:.1f} [{100 * worst.low:.1f}, {100 * worst.high:.1f}]"
                )
                if summary.alpha:
                    gain, se = 100 * summary.gain.value, 100 * summary.gain.se
                    assert row["gain ± SE"] == f"{gain:+.2f} ± {se:.2f}".replace("-", "−")
                assert summary.apparent is not None
                assert row["apparent"] == f"{100 * summary.apparent.value:.1f}"
                assert summary.masking is not None
                assert row["masking"] == f"{100 * summary.masking:.1f}"
                assert row["n"] == f"{summary.n:,}"
                last = list(summary.robust)[-1]
                assert cost[f"+ {last}"] == f"{100 * summary.robust[last].value:.1f}"
                assert cost["forward passes"] == f"{summary.forwards:,}"
                assert cost["backward passes"] == f"{summary.backwards:,}"

    def test_it_says_how_it_was_measured(self, sweep: Path) -> None:
        said = Page(sweep).said()
        for name in ATTACKS:
            assert f"torchattacks.{name.upper()} · options steps 100" in said
        assert "temperature 0.0625" in said
        assert "Perturbation budget ε0.1" in said
        assert "torch 2.15.0" in said
        assert "meansparse sweep --config recipes/fashion_mnist_sweep.yaml" in said
        assert "base ConvNet" in said

    @pytest.mark.parametrize("which", ["sweep", "huge"])
    def test_it_is_sound_and_fetches_nothing(
        self, which: str, request: pytest.FixtureRequest
    ) -> None:
        page = Page(request.getfixturevalue(which))
        names = Counter(name for name, _ in page.tags)
        assert not {"script", "img", "iframe", "object", "foreignobject"} & set(names)
        assert names["table"] == 6
        ids = [a["id"] for _, a in page.tags if "id" in a]
        assert len(ids) == len(set(ids)) > 50
        for _, attributes in page.tags:
            for key, value in attributes.items():
                assert not key.startswith("on")
                if key in ("href", "src", "xlink:href", "action"):
                    assert value is not None
                    assert value == "data:," or value[1:] in ids
                if key == "aria-labelledby":
                    assert set((value or "?").split()) <= set(ids)
                for reference in re.findall(r"url\(#([^)]*)\)", value or ""):
                    assert reference in ids
            assert "style" not in attributes or "url(http" not in (attributes["style"] or "")
        policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
        assert policy is not None
        assert "default-src 'none'" in policy
        assert "DejaVu" not in page.source
        assert all(f"var(--{name})" in page.source for name in ("clean", "apparent", "worst"))
        assert "#fe" not in page.source.lower().split("</style>")[1]

    @pytest.mark.parametrize("which", ["sweep", "huge"])
    def test_it_can_be_read_without_seeing(
        self, which: str, request: pytest.FixtureRequest
    ) -> None:
        page = Page(request.getfixturevalue(which))
        assert ("html", {"lang": "en"}) in page.tags
        assert all(a.get("scope") in ("row", "col") for tag, a in page.tags if tag == "th")
        drawings = [a for _, a in page.tags if a.get("role") == "img"]
        assert len(drawings) == 4
        assert all(len(a["aria-label"] or "") > 80 for a in drawings)
        regions = [a for _, a in page.tags if a.get("role") == "region"]
        assert all(
            a.get("tabindex") == "0" and (a.get("aria-label") or a.get("aria-labelledby"))
            for a in regions
        )
        levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))

    def test_text_has_contrast_in_both_themes(self) -> None:
        def luminance(colour: str) -> float:
            parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        for theme in (0, 1):
            for name, pair in COLOURS.items():
                if name in ("paper", "panel", "grid"):
                    continue
                for ground in ("paper", "panel"):
                    a, b = luminance(pair[theme]), luminance(COLOURS[ground][theme])
                    assert (max(a, b) + 0.05) / (min(a, b) + 0.05) >= 4.5, (name, ground, theme)

    def test_hostile_names_stay_text(self, huge: Path) -> None:
        page = Page(huge)
        assert "<script" not in page.source
        assert "<img" not in page.source
        assert page.said().count(" ".join(HOSTILE.split())) >= 8
        markdown = (huge / "results.md").read_text()
        assert "<" not in re.sub(r"\\<", "", markdown).replace("< 0.0001", "")
        for line in markdown.splitlines():
            if line.startswith("|"):
                assert len(re.findall(r"(?<!\\)\|", line)) == 1 + 8 + 6

    def test_all_sites_are_listed(self, huge: Path) -> None:
        rows_ = table_of(Page(huge), 5)
        assert len(rows_) == 150
        content = json.loads((huge / "sites.json").read_text())
        for row, site in zip(rows_, content["sites"], strict=True):
            assert row["Site"] == " ".join(site["site"].split())
            assert float(row["Values replaced"][:-1]) == pytest.approx(
                100 * site["replaced"][content["alphas"].index(0.5)], abs=0.051
            )

    def test_one_image_and_one_alpha(self, tmp_path: Path) -> None:
        shares = {0.0: (100.0, 100.0, 100.0, 0.0, 0.0)}
        page = Page(write_report(make_sweep(tmp_path, shares=shares, n=1, n_test=0)).parent)
        assert table_of(page, 0)[0]["worst case [95%]"] == "0.0 [0.0, 79.3]"

    def test_exact_gradients_alone_get_no_judgement(self, tmp_path: Path) -> None:
        folder = make_sweep(
            tmp_path,
            shares={0.0: (84.0, 60.0), 0.3: (84.0, 75.0)},
            attacks={"pgd": "gradient"},
            n=300,
            n_test=300,
        )
        page = Page(write_report(folder).parent)
        for said in (page.said(), (folder / "results.md").read_text()):
            assert "Not judged" in said
            assert "no attack that knows the operator was run" in said
            assert "masking was not measured" in said
            assert "withstand every attack" not in said
            assert "Real gain" not in said
        assert "✓" not in page.source
        assert "Hatched" not in page.said()
        assert [row["masking"] for row in table_of(page, 0)] == ["not measured"] * 2

    def test_p_values_are_said_to_be_per_row(self, sweep: Path) -> None:
        for said in (Page(sweep).said(), (sweep / "results.md").read_text()):
            assert "not corrected for looking at several rows" in said

    def test_no_gradient_attack_and_no_sites(self, tmp_path: Path) -> None:
        folder = make_sweep(
            tmp_path,
            shares={0.0: (84.0, 60.0), 0.3: (84.0, 61.0)},
            attacks={"square": "blackbox"},
            n=100,
            n_test=0,
            metadata={"attacks": None},
        )
        (folder / "sites.json").unlink()
        page = Page(write_report(folder).parent)
        assert [row["apparent"] for row in table_of(page, 0)] == ["not measured"] * 2
        assert "masking was not measured" in page.said()
        assert "budget not recorded" in page.said()
        assert "sites.json is missing" in page.said()


def test_one_background_value_does_not_flatten_the_histogram() -> None:
    before = (0.0, 20.0, 30.0, 20.0, 10.0, 900.0) + (10.0,) * 20
    found = Histogram(
        site="act@in",
        channel=0,
        mean=2.0,
        std=3.0,
        alpha=0.5,
        edges=tuple(float(i) for i in range(27)),
        before=before,
        after=(*before[:1], 20.0, 30.0, 20.0, *before[4:]),
    )
    assert 20 < histogram_top(found) < 100
    assert replaced_share(found) == pytest.approx((20 + 30) / sum(before))
    even = replace(found, before=(5.0,) * 26)
    assert histogram_top(even) > 5
    assert replaced_share(replace(found, before=(0.0,) * 26)) == 0


def test_markdown_holds_the_verdict_and_both_tables(sweep: Path) -> None:
    text = (sweep / "results.md").read_text()
    sources = read_sources(sweep)
    assert text == render_markdown(sources, find(sources.table, sources.metadata))
    assert "**Real gain**: at α = 0.1" in text
    assert "## Test images, n = 1,000 (reported)" in text
    assert "## Held-out images, n = 500 (chose α)" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == (2 + 2) + (2 + 5)
    assert len({line.count("|") for line in tables}) == 1
    assert sum("**0.1** (chosen)" in line for line in tables) == 2


def test_markdown_takes_no_markup_from_what_is_said_of_the_records(sweep: Path) -> None:
    sources = read_sources(sweep)
    found = replace(find(sources.table, sources.metadata), sentence=HOSTILE, notes=(HOSTILE,))
    verdict = render_markdown(sources, found).split("\n\n")[1]
    assert verdict.startswith("**Real gain**: ")
    assert verdict.count("script") == 4
    assert not re.search(r"(?<!\\)[<`$|]", verdict)


def test_inlined_drawings_do_not_clash() -> None:
    text = (
        '<?xml version="1.0"?><svg xmlns:xlink="http://www.w3.org/1999/xlink" width="1pt" '
        'viewBox="0 0 1 1" xmlns="http://www.w3.org/2000/svg"><metadata>http://a</metadata>'
        '<defs><style type="text/css">*{fill: red}</style></defs><path id="a"/>'
        '<use xlink:href="#a" clip-path="url(#b)"/></svg>'
    )
    made = inline_svg(text, "n")
    assert made.startswith('<svg viewBox="0 0 1 1">')
    assert 'id="n-a"' in made
    assert 'href="#n-a"' in made
    assert "url(#n-b)" in made
    assert "http" not in made
    assert "style" not in made


# --------------------------------------------------------------------------------- the browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    flags = "--no-sandbox --disable-gpu --disable-background-networking --no-first-run"
    with api.sync_playwright() as driver:
        found = driver.chromium.launch(
            executable_path=CHROMIUM, args=[*flags.split(), "--disable-sync"]
        )
        yield found
        found.close()


OVERFLOWING = """() => [...document.querySelectorAll('main *')].filter(e => {
    if (e.closest('.scroll') || e.closest('.sites')) return false;
    const box = e.getBoundingClientRect();
    return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(e => e.tagName + ' ' + e.textContent.slice(0, 40))"""
TEXT_SIZES = """() => [...document.querySelectorAll('main *')]
    .filter(e => e.checkVisibility() && [...e.childNodes].some(
        n => n.nodeType === 3 && n.textContent.trim()))
    .map(e => {
        const svg = e.closest('svg');
        const zoom = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
        return parseFloat(getComputedStyle(e).fontSize) * zoom;
    })"""


@pytest.mark.parametrize(
    ("which", "width", "scheme"),
    [
        ("sweep", 1000, "light"),
        ("sweep", 360, "dark"),
        ("huge", 360, "light"),
        ("huge", 1000, "dark"),
    ],
)
def test_in_a_browser(
    browser: Any, width: int, scheme: str, which: str, request: pytest.FixtureRequest
) -> None:
    address = (request.getfixturevalue(which) / "report.html").as_uri()
    context = browser.new_context(
        viewport={"width": width, "height": 740}, color_scheme=scheme, java_script_enabled=True
    )
    try:
        page = context.new_page()
        problems: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda message: asked.append(message.url))
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OVERFLOWING) == []
        assert min(page.evaluate(TEXT_SIZES)) >= 9.5
        shown, hidden = ("narrow", "wide") if width < 640 else ("wide", "narrow")
        assert page.locator(f".plot.{shown}").first.is_visible()
        assert not page.locator(f".plot.{hidden}").first.is_visible()
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        colour = COLOURS["paper"][scheme == "dark"]
        assert ground == "rgb({}, {}, {})".format(*(int(colour[i : i + 2], 16) for i in (1, 3, 5)))
        line = page.locator(f".plot.{shown} path[style*='--worst']").first
        stroke = line.evaluate("e => getComputedStyle(e).stroke + getComputedStyle(e).fill")
        worst = COLOURS["worst"][scheme == "dark"]
        assert "rgb({}, {}, {})".format(*(int(worst[i : i + 2], 16) for i in (1, 3, 5))) in stroke
        assert problems == []
        assert asked == [address]
    finally:
        context.close()
