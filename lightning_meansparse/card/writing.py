"""The page of a card."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from huggingface_hub import ModelCard, constants

from lightning_meansparse.adapter import Adapter, is_public
from lightning_meansparse.adapter.files import HUB_ID
from lightning_meansparse.card.evidence import Evidence, one_alpha, read_evidence
from lightning_meansparse.card.metadata import base_on_hub, card_data
from lightning_meansparse.report.cells import (
    P_NOTE,
    Column,
    attack_columns,
    capital,
    flag_head,
    quiet_flags,
    result_columns,
    signs,
)
from lightning_meansparse.report.results import plain, table

Relation = Literal["adapter", "finetune", "quantized", "merge"]

_PAPER = "https://arxiv.org/abs/2406.05927"
_HERE = "path/to/this/folder"
_CITATION = """```bibtex
@article{amini2024meansparse,
  title   = {{MeanSparse}: Post-Training Robustness Enhancement Through Mean-Centered Feature
             Sparsification},
  author  = {Amini, Sajjad and Teymoorianfard, Mohammadreza and Ma, Shiqing and
             Houmansadr, Amir},
  journal = {arXiv preprint arXiv:2406.05927},
  year    = {2024},
  url     = {https://arxiv.org/abs/2406.05927}
}
```"""


def model_card(
    adapter: Adapter,
    *,
    repo_id: str | None = None,
    records: str | os.PathLike[str] | None = None,
    relation: Relation = "adapter",
    library_name: str = "lightning_meansparse",
    license: str | None = None,
) -> str:
    """Write the model card of an adapter: front matter for the Hub, Markdown for people.

    Every number comes from the records, every fact from the adapter. Names from either are escaped:
    they cannot become front matter, markup, links or code.

    Args:
        adapter: What `read_adapter` or `load_adapter` gives.
        repo_id: ``"org/name"`` that the card is for; None for a folder.
        records: Output folder of a sweep, or its ``records.parquet``; None says that robustness was
            not evaluated.
        relation: Of what is published to the base, as the Hub names it: ``"finetune"`` where the
            repository holds a whole model.
        library_name: What loads it: ``"transformers"`` and ``"timm"`` hold whole models.
        license: As the Hub names it, such as ``"apache-2.0"``.

    Returns:
        The text of ``README.md``.

    Raises:
        FileNotFoundError: If there are no records.
        ValueError: If the records are of another base, of other statistics or without the adapter's
            α, or an argument is not one of the Hub's names.

    Examples:
        >>> import torch
        >>> from lightning_meansparse import calibrate_, find_sites, load_adapter, sparsify_
        >>> from lightning_meansparse import save_adapter
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> fresh = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> _ = fresh.load_state_dict(net.state_dict())
        >>> sparsify_(net, find_sites(net, torch.rand(1, 3, 8, 8)), alpha=0.2)
        >>> calibrate_(net, [torch.rand(16, 3, 8, 8)])
        >>> card = model_card(load_adapter(fresh, save_adapter(net, "adapter")))
        >>> "**Robustness was not evaluated.**" in card
        True
    """
    if repo_id is not None and not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id must look like 'org/name', got {repo_id!r:.80}.")
    known = ("adapter", "finetune", "quantized", "merge")
    if relation not in known:
        raise ValueError(f"relation must be one of {', '.join(known)}, got {relation!r:.80}.")
    evidence = None if records is None else read_evidence(adapter, records)
    base = _one_line(adapter.source or adapter.architecture or "a network")
    name = repo_id.partition("/")[2] if repo_id else f"MeanSparse on {base}"
    data = card_data(
        adapter, evidence, name=name, relation=relation, library_name=library_name, license=license
    )
    parts = [
        f"# {plain(name)}",
        _what(adapter, base, whole=relation != "adapter"),
        "## Robustness",
        *(_not_evaluated(adapter) if evidence is None else _evaluated(evidence)),
        "## How to load",
        *_how_to_load(adapter, repo_id, library_name),
        "## Limits",
        _list(_limits(adapter, evidence)),
        "## How it was made",
        _list(_made(adapter, evidence)),
        "## Citation",
        f"The method is that of [Amini et al.]({_PAPER}):",
        _CITATION,
    ]
    text = "\n\n".join(parts)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _what(adapter: Adapter, base: str, *, whole: bool) -> str:
    alpha, places = one_alpha(adapter), len(adapter.sites)
    where = f"{places} place{'s' * (places != 1)}"
    threshold = "a number of standard deviations of its own for each place"
    if alpha is not None:
        threshold = f"α = {alpha:g} standard deviations"
    at = f" at `{_code(adapter.revision)}`" if adapter.revision else ""
    hub = base_on_hub(adapter)
    named = f"[`{_code(base)}`]({constants.ENDPOINT}/{hub})" if hub else f"`{_code(base)}`"
    holds = (
        "This repository holds the whole model, base and statistics."
        if whole
        else "This repository holds the statistics alone, a few kilobytes; the base stays as it is."
    )
    replaced = {"channel": "its channel's mean", "global": "the mean over all channels"}
    effect = (
        f"at {where} of the network, values closer than {threshold} to "
        f"{replaced.get(adapter.center, 'zero')} are replaced by it"
    )
    if alpha == 0:
        effect = f"with α = 0 at {where} of the network nothing is replaced: it is the base model"
    return f"[MeanSparse]({_PAPER}) on the image classifier {named}{at}: {effect}. {holds}"


# --- Robustness ----------------------------------------------------------------------------------


def _not_evaluated(adapter: Adapter) -> Iterable[str]:
    yield (
        "**Robustness was not evaluated.** No records of a sweep came with this card. Do not take "
        "it for a robust model: the operator makes networks *look* more robust to the usual "
        "attacks whether they are or not."
    )
    if adapter.evaluation:
        yield (
            "The adapter's own file has numbers under `evaluation`. Without the records nobody can "
            "check them, so this card does not repeat them."
        )


def _evaluated(evidence: Evidence) -> Iterable[str]:
    findings, judged = evidence.findings, evidence.judged
    notes = [findings.sentence, *evidence.doubts, *findings.notes]
    yield f"**{findings.headline}.** {' '.join(plain(capital(signs(note))) for note in notes)}"
    rows = list({summary.alpha: summary for summary in (evidence.base, judged)}.values())
    who = ["base model (α = 0)", *([f"**this model (α = {judged.alpha:g})**"] * (len(rows) - 1))]
    if judged.alpha == 0:
        who = ["**this model = base model (α = 0)**"]
    first = Column("", tuple(who), "text")
    data = plain(evidence.data) or "data without a name"
    yield table(first, *result_columns(rows))
    if not judged.robust:
        yield f"Accuracies without attack, in percent, on {plain(judged.split)} images of {data}."
        return
    yield (
        f"Accuracies in percent on {judged.n:,} {plain(judged.split)} images of {data}; attacks "
        f"within {plain(evidence.ball)}. *Clean*: without attack. *Apparent*: after attacks on the "
        "model's own gradient alone, which the operator blinds. *Worst case*: an image counts only "
        "if it withstands every attack below, with Wilson's 95% interval. *Gain*: worst case "
        f"minus that of the base model on the same images under the same attacks. {P_NOTE}"
    )
    steps = attack_columns(rows)
    yield "Left after each attack and all before it:"
    yield _attacks(evidence, first.texts, steps[: len(judged.robust)])
    yield "### Flags"
    yield from _flags(evidence)


def _flags(evidence: Evidence) -> Iterable[str]:
    """What was looked for that would make the numbers hard to believe."""
    findings = evidence.findings
    about: dict[bool, list[str]] = {True: [], False: []}
    for flag in findings.raised:
        about[findings.concerns(flag)].append(
            f"**{plain(signs(flag_head(flag)))}**: {plain(signs(flag.seen))}"
        )
    yield "Reasons to doubt these numbers:" if about[True] else "No reason to doubt these numbers."
    if about[True]:
        yield _list(about[True])
    if about[False]:
        yield "Raised at other α of the same sweep:"
        yield _list(about[False])
    yield from (plain(capital(line)) for line in quiet_flags(findings))


def _attacks(evidence: Evidence, who: tuple[str, ...], steps: list[Column]) -> str:
    """One row per attack: its kind, its budget, and what it leaves of each model."""
    judged = evidence.judged
    names = tuple(judged.robust)
    columns = [
        Column("kind", tuple(judged.kinds[name] for name in names), "text"),
        Column("budget", tuple(_budget(evidence.attacks.get(name, {})) for name in names), "text"),
    ]
    left = [
        Column(model.replace("*", ""), tuple(step.texts[place] for step in steps))
        for place, model in enumerate(who)
    ]
    return table(Column("attack", tuple(map(plain, names)), "text"), *columns, *left)


def _budget(spec: Mapping[str, Any]) -> str:
    """What an attack may spend, from what the sweep recorded of it."""
    options = spec.get("options")
    known = dict(options) if isinstance(options, Mapping) else {}
    if spec.get("rule") not in (None, "exact"):
        known["gradient"] = spec["rule"]
    if spec.get("start") not in (None, "random"):
        known["start"] = spec["start"]
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in known.items()) or "–"


# --- Use, limits, origin -------------------------------------------------------------------------


def _how_to_load(adapter: Adapter, repo_id: str | None, library_name: str) -> Iterable[str]:
    yield "```bash\npip install lightning_meansparse\n```"
    whole = library_name in ("transformers", "timm")
    if not whole and not is_public(adapter.source):
        yield (
            "The base is not on the Hub under a name that everybody can fetch: ask whoever "
            "published this for it, load it as `model`, then"
        )
        yield _python(
            "from lightning_meansparse import load_adapter",
            "",
            f"load_adapter(model, {_quoted(repo_id or _HERE)})",
        )
        return
    size = "*classifier.input_size"
    if adapter.pixels is not None:
        size = ", ".join(map(str, adapter.pixels.get("input_size") or (3, 224, 224)))
    yield _python(
        "import torch",
        "from lightning_meansparse import load_classifier",
        "",
        f"classifier = load_classifier({_quoted(f'meansparse/{repo_id}' if repo_id else _HERE)})",
        f"images = torch.rand(1, {size})  # pixels in [0, 1], not normalised",
        "with torch.no_grad():",
        "    logits = classifier(images)",
    )
    if library_name == "transformers":
        yield "Or with transformers alone; the first line lets it know this kind of model:"
        yield _python(
            "import lightning_meansparse",
            "from transformers import pipeline",
            "",
            f'classify = pipeline("image-classification", {_quoted(repo_id or _HERE)})',
        )


def _limits(adapter: Adapter, evidence: Evidence | None) -> Iterable[str]:
    yield (
        "The operator's gradient is zero inside its band, so attacks that follow the gradient get "
        "weaker without the model getting more robust. Accuracies under PGD or AutoAttack alone "
        "say nothing about this model."
    )
    if evidence is not None and evidence.judged.robust:
        judged = evidence.judged
        yield (
            f"What is left under these attacks is an upper bound: a stronger attack may leave "
            f"less. It holds for {plain(evidence.ball)} and for images like the {judged.n:,} "
            "measured, and says nothing about other norms, radii or changes of another kind."
        )
        if not evidence.findings.honest:
            yield "The images that are reported have chosen α as well, which flatters the numbers."
    yield (
        f"The statistics belong to one base, with weights `{_code(adapter.fingerprint.short())}`; "
        "loading refuses any other, a fine-tuned copy included."
    )
    yield (
        "The model takes pixels in [0, 1] and normalises them itself; perturbations are measured "
        "in these units."
    )


def _made(adapter: Adapter, evidence: Evidence | None) -> Iterable[str]:
    facts = adapter.calibration or {}
    told = ", ".join(f"{plain(str(k))} {plain(str(v))}" for k, v in facts.items() if v is not None)
    yield f"Statistics ({adapter.statistics}) measured on: {told or 'not recorded'}."
    yield f"Places: {', '.join(f'`{_code(str(site))}`' for site in _few(adapter.sites))}."
    versions = dict(adapter.versions)
    if evidence is not None:
        metadata = evidence.sources.metadata
        for key, head in (("command", "Measured by"), ("seed", "Seed of the attacks")):
            if metadata.get(key) is not None:
                yield f"{head}: `{_code(str(metadata[key]))}`."
        recorded = metadata.get("versions")
        versions |= recorded if isinstance(recorded, Mapping) else {}
    if versions:
        yield f"Versions: {', '.join(f'{plain(k)} {plain(str(v))}' for k, v in versions.items())}."
    yield (
        "This card was written by `lightning_meansparse` from the adapter"
        + (" alone." if evidence is None else " and the records of the sweep.")
    )


def _few(sites: tuple[Any, ...]) -> list[Any]:
    return [*sites[:3], "…", *sites[-2:]] if len(sites) > 6 else list(sites)


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _quoted(name: str) -> str:
    """A name from `HUB_ID` as a string of Python's."""
    return f'"{name}"'


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def _code(text: str | None) -> str:
    """Text that may stand between two backticks, whatever it is."""
    return _one_line(str(text)).replace("`", "'")
