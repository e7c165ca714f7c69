"""Runs one more attack on the test images that stand in the records of a sweep, and adds its rows.

    python -m tests.benchmarks.extend docs/records/fashion_mnist_sweep --attack adaptive-narrowing

When a suite gains an attack that comes last in it, or its last attack changes, the records need not
be measured anew: the others meet the same images with the same seeds, and the noise of an image
depends on its number alone. So the rows are those that the whole sweep would have written.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from rich.console import Console
from torch import Tensor, nn

from lightning_meansparse import load_adapter, load_classifier, set_alpha
from lightning_meansparse.attacks import AttackSpec, evaluate, resolve_attacks
from lightning_meansparse.data import ImageDataModule
from lightning_meansparse.records import MAIN, SCHEMA, TEST, read_records, write_records
from tests.benchmarks.networks import DATA

CHECKPOINT = "lightning_meansparse/demo/checkpoint"


def main() -> None:
    """Extend the records in place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, help="folder with records.parquet and adapter/")
    parser.add_argument("--attack", required=True)
    parser.add_argument("--model", default=CHECKPOINT)
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--seed", type=int, default=0, help="seed of the division of the data")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (spec,) = resolve_attacks(args.attack)
    table, metadata = read_records(args.records)
    measured = metadata["rounds"][TEST][MAIN]["attacks"]
    names = [attack["name"] for attack in measured]
    if spec.name in names[:-1]:
        parser.error(f"{args.records} hold {spec.name}, and others that came after it")
    if names[-1:] == [spec.name]:  # measured before it changed
        of_main = (pc.field("split") == TEST) & (pc.field("round") == MAIN)
        table = table.filter(~(of_main & (pc.field("attack") == spec.name)))
        measured = measured[:-1]
    classifier = load_classifier(args.model)
    load_adapter(classifier, args.records / "adapter")
    data = ImageDataModule(args.data, holdout=0.1, seed=args.seed)
    data.setup("test")
    test = data.test_dataloader().dataset
    places = {int(number): place for place, number in enumerate(test.rows)}
    main_round = table.filter((pc.field("split") == TEST) & (pc.field("round") == MAIN))
    tables = [table]
    for alpha in pc.unique(main_round["alpha"]).to_pylist():
        last = main_round.filter(
            (pc.field("alpha") == alpha) & (pc.field("order") == len(measured))
        )
        stand = last.filter(pc.field("standing"))
        numbers = stand["index"].to_pylist()
        images = torch.stack([test[places[number]][0] for number in numbers])
        labels = torch.tensor(stand["label"].to_pylist())
        set_alpha(classifier, alpha)
        tables.append(_attacked(last, classifier, images, labels, numbers, spec, metadata))
        left = int(pc.sum(tables[-1]["standing"]).as_py())
        Console().log(f"alpha = {alpha:g}: {left} of {len(numbers)} stand after {spec.name}")
    # `attacks` and the round's list say the same; both are quoted in reports.
    metadata["attacks"] = metadata["rounds"][TEST][MAIN]["attacks"] = [*measured, spec.as_dict()]
    write_records(tables, args.records / "records.parquet", metadata)


def _attacked(
    last: pa.Table,
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    numbers: list[int],
    spec: AttackSpec,
    metadata: dict[str, Any],
) -> pa.Table:
    """Rows of the new attack for all samples in ``last``, which the attack before it wrote."""
    found = evaluate(
        classifier,
        images,
        labels,
        attacks=spec,
        eps=metadata["eps"],
        norm=metadata["norm"],
        seed=metadata["seed"],
        indices=torch.tensor(numbers),
    )
    if not bool(found.clean.all()):
        raise ValueError("images that stand in the records are not classified right here")
    told = (found.worst.tolist(), found.forwards[:, 0].tolist(), found.backwards[:, 0].tolist())
    new = dict(zip(numbers, zip(*told, strict=True), strict=True))
    rows = []
    for row in last.to_pylist():
        stands, forwards, backwards = new.get(row["index"], (False, 0, 0))
        rows.append(
            row
            | {
                "attack": spec.name,
                "kind": spec.kind,
                "order": row["order"] + 1,
                "attacked": row["standing"],
                "standing": stands,
                "forwards": forwards,
                "backwards": backwards,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


if __name__ == "__main__":
    main()
