"""`meansparse sites`: where operators would stand in a model, and what is left out and why."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_meansparse.cli.words import Words

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from lightning_meansparse.classifier import Classifier
    from lightning_meansparse.sites.candidates import Candidate
    from lightning_meansparse.sites.survey import Survey

HEADS = ("name", "call", "shape", "axis", "role", "producer")
FALLBACK_SIDE = 224  # for models that say no size: they take many


def run(args: Sequence[str]) -> None:
    """Build the model, look at one forward pass, print the table."""
    words = Words("sites")
    words.add_argument(
        "model", help="timm/NAME, torchvision/NAME, hf/ORGANISATION/NAME or a folder"
    )
    words.add_argument(
        "--where",
        action="append",
        metavar="PLACES",
        help="activations, activations+gates, activations+residual, or a glob over the names of "
        "all places; several: once for each (default: activations)",
    )
    words.add_argument(
        "--image-size", type=int, metavar="N", help="look at N×N images (default: the model's own)"
    )
    words.add_argument(
        "--pretrained", action="store_true", help="load weights; the places do not depend on them"
    )
    words.add_argument("--json", action="store_true", help="print JSON, with every name")
    given = words.parse_args(args)
    if given.image_size is not None and given.image_size < 1:
        raise ValueError("--image-size must be at least 1")

    from rich.console import Console

    with Console(stderr=True).status(f"looking at {given.model} …"):
        from lightning_meansparse.sites.choice import check_where, select, selects_nothing

        where = given.where or ["activations"]
        chosen = where[0] if len(where) == 1 else where
        check_where(chosen)
        classifier = _load(given.model, given.pretrained)
        images, found = _look(classifier, given.model, given.image_size)
    wanted = select(list(found.candidates), chosen)
    if not wanted:
        raise ValueError(selects_nothing(list(found.candidates), chosen))
    if given.json:
        sys.stdout.write(json.dumps(_facts(given.model, images, found, wanted), indent=2) + "\n")
        return
    _tell(Console(highlight=False), classifier, images, found, wanted)


def _load(name: str, pretrained: bool) -> Classifier:
    from lightning_meansparse.classifier import UnknownNormalisationError, load_classifier
    from lightning_meansparse.classifier.folder import is_own

    pretrained = pretrained or is_own(Path(name))
    try:
        return load_classifier(name, pretrained=pretrained)
    except UnknownNormalisationError:
        return load_classifier(name, pretrained=pretrained, mean=0, std=1)  # places need none


def _look(classifier: Classifier, name: str, side: int | None) -> tuple[Tensor, Survey]:
    """One batch of noise, and what becomes of it."""
    import torch

    from lightning_meansparse.sites.survey import survey

    own = classifier.input_size or (classifier.in_chans or 3, FALLBACK_SIDE, FALLBACK_SIDE)
    size = own if side is None else (own[0], side, side)
    parameters = classifier.model.parameters()
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        return images, survey(classifier.model, images)
    except Exception as error:  # whatever a model raises at a size that it does not take
        hint = f"; its own size is {_times(own)}" if size != own else ""
        raise ValueError(
            f"{name} does not run on images of {_times(size)}{hint}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _tell(
    console: Console,
    classifier: Classifier,
    images: Tensor,
    found: Survey,
    wanted: Sequence[Candidate],
) -> None:
    from rich.table import Table
    from rich.text import Text

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    kind, size = type(classifier.model).__name__, _times(images.shape[1:])
    line(f"{classifier.source}: {kind}, images {size}", "bold")
    line(f"normalisation: {classifier.normalisation}")
    reached = [candidate for candidate in wanted if _stands(candidate)]
    rows = [[_shown(value) for value in _row(candidate).values()] for candidate in reached]
    width = sum(max(map(len, column)) + 2 for column in zip(HEADS, *rows, strict=True))
    if not console.is_terminal:
        console.width = max(console.width, width)  # a file or a program gets one line per site
    if width <= console.width:
        table = Table(*HEADS, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="cyan")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    else:
        for name, *rest in rows:  # names stay whole, whatever the width
            line(name)
            line("    " + "  ".join(rest), "dim")
    counts = Counter(candidate.site.role for candidate in reached)
    shown = ", ".join(f"{count} {role}" for role, count in counts.items())
    line(f"{_count(len(reached), 'site')}{shown and f' ({shown})'}", "bold")
    for (reason, hint), names in _left_out(found, wanted).items():
        line(f"left out: {_count(len(names), reason)}{hint}: {_patterns(names)}")


def _left_out(found: Survey, wanted: Sequence[Candidate]) -> dict[tuple[str, str], list[str]]:
    """Names by reason; the reason's second part tells what to do."""
    chosen = {str(candidate.site) for candidate in wanted}
    spare = [c for c in found.candidates if str(c.site) not in chosen]
    result = {
        (reason, hint): [str(c.site) for c in spare if c.site.role == role]
        for role, reason, hint in (
            ("activation", "activation that --where does not name", ""),
            ("gate", "gate", " (--where activations+gates)"),
            ("residual", "residual sum", " (--where activations+residual)"),
        )
    }
    result["call whose value does not depend on the image", ""] = list(found.constants)
    result["activation module that is never called", ""] = list(found.idle)
    for candidate in wanted:
        if candidate.obstacle is not None:
            key = "place that cannot be reached", f" ({_pattern(candidate.obstacle)})"
        elif candidate.undecided is not None:
            key = "place whose channels are undecided", f" ({candidate.undecided})"
        else:
            continue
        result.setdefault(key, []).append(str(candidate.site))
    return {key: names for key, names in result.items() if names}


def _facts(name: str, images: Tensor, found: Survey, wanted: Sequence[Candidate]) -> dict[str, Any]:
    return {
        "model": name,
        "images": list(images.shape[1:]),
        "sites": [_row(candidate) for candidate in wanted if _stands(candidate)],
        "left_out": [
            {"why": reason + hint, "names": names}
            for (reason, hint), names in _left_out(found, wanted).items()
        ],
    }


def _stands(candidate: Candidate) -> bool:
    return candidate.obstacle is None and candidate.undecided is None


def _row(candidate: Candidate) -> dict[str, Any]:
    site = candidate.site
    values = (str(site), site.kind, site.shape, site.axis, site.role, candidate.producer)
    return dict(zip(HEADS, values, strict=True))


def _shown(value: Any) -> str:
    """The cell of a value: an axis alone as a number, the image where no layer made channels."""
    alone = isinstance(value, tuple) and len(value) == 1 and value[0] < 0
    return str(value[0] if alone else value) or "the image"


def _pattern(name: str, *, loose: bool = False) -> str:
    """The name with `*` for its numbers, `blocks.*.act@in`; if loose also for `1` in `conv1`."""
    before = "" if loose else r"(?<![\w\[])"
    return re.sub(before + r"\d+(?=[.:@\s,]|$)", "*", name)


def _patterns(names: Sequence[str]) -> str:
    """Names that differ by numbers alone as one pattern, with how many they are."""
    loose = len({_pattern(name) for name in names}) > 6
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_pattern(name, loose=loose), []).append(name)
    return ", ".join(
        alike[0] if len(alike) == 1 else f"{len(alike)} × {pattern}"
        for pattern, alike in groups.items()
    )


def _count(number: int, noun: str) -> str:
    """Return `1 gate`, `2 gates`; the plural is of the first noun."""
    head, space, rest = noun.partition(" whose ")
    if not space:
        head, space, rest = noun.partition(" that ")
    return f"{number} {head}{'' if number == 1 else 's'}{space}{rest}"


def _times(size: Iterable[int]) -> str:
    return "×".join(map(str, size))
