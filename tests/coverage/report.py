"""docs/coverage.md, from the record of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]

LIBRARIES = {"timm": "timm", "hf": "transformers", "torchvision": "torchvision"}


def reasons(row: Row) -> list[str]:
    """Why a model failed, nothing if it passed."""
    if "crash" in row:
        return [str(row["crash"]).strip().splitlines()[-1]]
    missed = [f"not reached: {call}" for call in row.get("missed", [])]
    error = [row["error"]] if row.get("error") else []
    return error + missed + row.get("failures", [])


def outcome(row: Row) -> str:
    """One line on one model."""
    if row.get("left_out"):
        return f"left out, {row['left_out']}"
    why = reasons(row)
    if why:
        more = f" ({len(why)} reasons)" if len(why) > 1 else ""
        return f"FAILED{more}: {why[0]}"
    return (
        f"{row['reached']} of {row['calls'] - row['gates']} activation calls reached, "
        f"{row['gates']} gates left out, {row['seconds']:.1f} s"
    )


def page(record: Mapping[str, Any]) -> str:
    """The whole page."""
    rows: dict[str, Row] = record["models"]
    run = {name: row for name, row in rows.items() if not row.get("left_out")}
    failed = {name: row for name, row in run.items() if reasons(row)}
    full = [name for name, row in run.items() if "calls" in row and not _open(row)]
    slowest = sorted(
        ((row.get("seconds", 0) + row.get("build_seconds", 0), n) for n, row in run.items()),
        reverse=True,
    )
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    parts = [
        _HEAD,
        f"Last run: {record['date']}, `make coverage`, {versions}; {len(run)} models in "
        f"{record['minutes']} minutes, {record['jobs']} processes of one thread each.",
        f"**In {len(full)} of {len(run)} models ({len(full) / len(run):.1%}) every "
        f"input-dependent activation call that is no gate is reached; {len(run) - len(failed)} "
        f"of {len(run)} pass every check below.**",
        _totals(run),
        "## What fails\n",
        _failures(failed),
        "## What is left out\n",
        "\n".join(f"* `{n}`: {row['left_out']}." for n, row in rows.items() if row.get("left_out")),
        _untold(run),
        "## Times\n",
        "Building a model and all checks, in seconds; the slowest: "
        + ", ".join(f"`{name}` {seconds:.0f}" for seconds, name in slowest[:5])
        + f". The median is {slowest[len(slowest) // 2][0]:.1f}.",
        _CHECKS,
        _every(run),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _open(row: Row) -> int:
    return int(row["calls"] - row["gates"] - row["reached"])


def _totals(run: Mapping[str, Row]) -> str:
    lines = [
        "| | models | pass | activation calls | of them gates | reached | not reached | operators "
        "| shapes confirmed |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for key, shown in [*LIBRARIES.items(), ("", "**all**")]:
        mine = [row for name, row in run.items() if name.startswith(f"{key}/" if key else "")]
        counted = [row for row in mine if "calls" in row]
        sums = {f: sum(row[f] for row in counted) for f in ("calls", "gates", "reached")}
        put = {f: sum(row[f] for row in counted) for f in ("operators", "told")}
        lines.append(
            f"| {shown} | {len(mine)} | {sum(not reasons(row) for row in mine)} | {sums['calls']} "
            f"| {sums['gates']} | {sums['reached']} | {sum(map(_open, counted))} "
            f"| {put['operators']} | {put['told']} |"
        )
    return "\n".join(lines)


def _failures(failed: Mapping[str, Row]) -> str:
    if not failed:
        return "Nothing."
    lines = []
    for name, row in failed.items():
        why = reasons(row)
        lines.append(f"* `{name}`, {len(why)} reason{'s' * (len(why) > 1)}:")
        lines += [f"    * {_escaped(reason)}" for reason in why[:3]]
    return "\n".join(lines)


def _untold(run: Mapping[str, Row]) -> str:
    short = {
        name: row["operators"] - row["told"]
        for name, row in run.items()
        if "calls" in row and row["told"] < row["operators"]
    }
    again = {name: row["again"] for name, row in run.items() if row.get("again")}
    torn = {name: row["torn"] for name, row in run.items() if row.get("torn")}
    parts = []
    if short:
        parts.append(f"At {_listed(short)} the tracer cannot tell the channels")
    if again:
        parts.append(
            f"At {_listed(again)} one operator serves all calls of a module that the model calls "
            "several times"
        )
    if torn:
        parts.append(
            f"Of the calls that are not reached, {_listed(torn, noun='')} are served in part: the "
            "code writes an activation out amid other things, `x * sigmoid(v * x)`, and the "
            "operator stands at the argument of the sigmoid, while the other `x` goes past it"
        )
    return "\n\n".join(f"{part}." for part in parts)


def _listed(counts: Mapping[str, int], *, noun: str = " operators") -> str:
    shown = ", ".join(f"`{name}` {count}" for name, count in counts.items())
    return f"{sum(counts.values())}{noun} ({shown})"


def _every(run: Mapping[str, Row]) -> str:
    lines = [
        '??? note "Every model"',
        "",
        "    | model | calls | gates | reached | operators | shapes confirmed | seconds |",
        "    |---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in run.items():
        mark = " (fails)" if reasons(row) else ""
        cells = [row.get(f, "") for f in ("calls", "gates", "reached", "operators", "told")]
        seconds = row.get("seconds", 0) + row.get("build_seconds", 0)
        lines.append(
            f"    | {name}{mark} | {' | '.join(str(cell) for cell in cells)} | {seconds:.1f} |"
        )
    return "\n".join(lines)


def _escaped(text: str) -> str:
    line = " ".join(text.split())
    line = line if len(line) < 400 else f"{line[:400]} …"
    return line.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


_HEAD = """
# Coverage

<!-- Written by `make coverage` from docs/records/coverage.json; changes here are lost. -->

Which models `find_sites` and `sparsify_` cover, measured by a tracer that shares no code with them.
The models have random weights and are shrunk: small images, few blocks, the structure of the
original. They are one of each kind of network in every module file of timm, every class that
transformers maps to image classification, and every family of classifiers of torchvision.
"""

_CHECKS = """
## What is checked

The tracer (`tests/coverage`) sits below PyTorch's dispatcher and sees every operation that really
runs, whatever module, function or script it comes from. In each model it checks that

* the input of every activation call that depends on the images comes from an operator: directly,
  or through an elementwise function or a reshape of the operator's output alone. An activation that
  is written by hand (`x * sigmoid(x)`) is one call, and all of it must come from the operator;
* no operator stands where there is no activation, or before a *gate*: an activation that reaches
  the output only as a factor of other tensors (squeeze-excite, GLU). The tracer decides that on its
  own graph of the run;
* each operator's statistics have the shape of the channels. The tracer finds the channels by
  experiment: it disturbs single channels where a convolution or a matrix product made them and
  looks along which axes of the activation's input the disturbances stay apart;
* each operator runs exactly once in a forward pass (where a module is called several times, once in
  each of its calls), and none never runs;
* at α = 0 the outputs are those of the base model bit for bit, before and after `calibrate_`; at
  α = 0.5 they are others;
* after `restore_` the outputs are those of the base model bit for bit, every module has the class,
  the attributes, the children and the hooks that it had, and the model the same `state_dict` keys.

A model in which anything of that does not hold counts as failed. A part of the list is run by
`python -m tests.coverage --only 'timm/res'`.
"""
