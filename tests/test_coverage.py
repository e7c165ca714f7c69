"""Hard models under the oracle, and what the sweep over all (`make coverage`) left behind."""

from __future__ import annotations

import json
import re

import pytest
import timm
import torchvision
from timm.models import _registry
from transformers.models.auto import modeling_auto

from tests.coverage.__main__ import PAGE, RECORD
from tests.coverage.check import check_model
from tests.coverage.models import LEFT_OUT, Model, chosen, models
from tests.coverage.report import outcome, page, reasons
from tests.coverage.sweep import sweep

# What makes them hard stands beside them. Each is asked everything that the sweep asks.
HARD = [
    "torchvision/resnet18",  # one ReLU module for two calls
    "torchvision/googlenet",  # functional calls in one class for all convolutions
    "torchvision/densenet121",  # concatenated features, functional calls
    "timm/res2net50_14w_8s",  # one ReLU in a loop
    "timm/hrnet_w18_small",  # one ReLU for all branches
    "timm/efficientvit_b0",  # one ReLU for queries and keys; channels on two axes
    "timm/mobilevitv2_050",  # functional calls in helper methods
    "timm/bat_resnext26ts",  # bilinear attention
    "timm/regnetz_b16_evos",  # an activation inside a norm
    "timm/coat_tiny",  # one MLP for tokens of three sizes
    "timm/dm_nfnet_f0",  # activation classes of its own
    "timm/swinv2_tiny_window8_256",  # an MLP over constants
    "hf/ViTForImageClassification",
    "hf/SwinForImageClassification",
    "hf/ConvNextForImageClassification",  # channels last amid channels first
]


@pytest.mark.parametrize("name", HARD)
@pytest.mark.filterwarnings("ignore")  # whatever the three libraries have to say
def test_hard_models(name: str) -> None:
    (model,) = (m for m in models() if m.name == name)
    result = check_model(*model.build())
    assert result.passed, "\n".join(reasons(result.as_dict()))
    assert result.calls - result.gates == result.reached > 0
    assert result.told == result.operators


# ---------------------------------------------------------------------------------------- the list


def names(library: str) -> set[str]:
    return {model.short for model in models() if model.library == library}


def test_every_file_of_timm_that_has_models_is_in_the_list() -> None:
    files = {  # timm's own: another test of the process may have registered the project's networks
        file
        for file, registered in _registry._module_to_models.items()
        for name in registered
        if timm.models.model_entrypoint(name).__module__.startswith("timm.")
    }
    listed = {
        timm.models.model_entrypoint(name).__module__.rpartition(".")[2] for name in names("timm")
    }
    assert len(files) > 90
    assert files - listed == set()


def test_every_class_that_transformers_maps_is_in_the_list() -> None:
    mapped = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    classes = {name for each in mapped for name in ([each] if isinstance(each, str) else each)}
    assert len(classes) > 40
    assert classes == names("hf")
    assert len(LEFT_OUT) <= 2


def test_every_family_of_torchvision_is_in_the_list() -> None:
    def family(name: str) -> str:
        return re.match(r"[a-z]+(_v\d|_[xy])?", name)[0]  # type: ignore[index]

    classifiers = torchvision.models.list_models(module=torchvision.models)
    assert len(classifiers) > 70
    assert {family(name) for name in classifiers} == {family(name) for name in names("torchvision")}


def test_names_are_unique_and_can_be_chosen() -> None:
    assert len({model.name for model in models()}) == len(models()) > 290
    assert [model.name for model in chosen("torchvision/vgg")] == [
        "torchvision/vgg11",
        "torchvision/vgg11_bn",
    ]


# ---------------------------------------------------------------------------------------- the sweep


def test_a_process_that_crashes_or_hangs_takes_nothing_along() -> None:
    fake = [Model("timm/no_such_model"), Model("timm/test_vit", 32, {"img_size": 32})]
    (first, crashed), (second, good) = sweep(fake, jobs=1, limit=60, strict=True)
    assert (first.name, second.name) == ("timm/no_such_model", "timm/test_vit")
    assert "Unknown model (no_such_model)" in crashed["crash"]
    assert outcome(good).startswith("6 of 6 activation calls reached, 0 gates left out")
    slow = Model("timm/test_vit", 32, {"img_size": 32, "depth": 5000})
    ((_, late),) = sweep([slow], jobs=1, limit=0.5, strict=True)
    assert outcome(late) == "FAILED: not done after 0.5 seconds"


def good(**changes: object) -> dict[str, object]:
    fine = {"calls": 5, "gates": 1, "reached": 4, "operators": 4, "told": 4, "seconds": 1.0}
    return fine | {"missed": [], "failures": [], "error": "", "build_seconds": 0.5} | changes


def test_the_page_tells_what_fails_and_why() -> None:
    rows = {
        "timm/good": good(again=2),
        "timm/untold": good(told=3),
        "timm/short": good(reached=3, missed=["relu in block_1"]),
        "timm/torn": good(
            reached=3, torn=1, failures=["sigmoid in bn: x serves a part of it only"]
        ),
        "hf/wrong": good(failures=["a_ran twice", "b", "c", "d"]),
        "hf/refused": good(reached=0, error="UnreachableSitesError: <lambda>", missed=["x", "y"]),
        "torchvision/dead": {"crash": "Traceback\n  File\nRuntimeError: no"},
        "torchvision/absent": {"left_out": "needs a key"},
    }
    text = page(
        {
            "date": "2025-01-01",
            "versions": {"torch": "2.15"},
            "minutes": 9.5,
            "jobs": 2,
            "models": rows,
        }
    )
    assert "In 3 of 7 models (42.9%) every input-dependent activation call" in text
    assert "; 2 of 7 pass every check below" in text
    assert "| timm | 4 | 2 | 20 | 4 | 14 | 2 | 16 | 15 |" in text
    assert "| **all** | 7 | 2 | 30 | 6 | 18 | 6 | 24 | 23 |" in text
    for line in (
        "* `timm/short`, 1 reason:\n    * not reached: relu in block\\_1\n",
        "* `hf/wrong`, 4 reasons:\n    * a\\_ran twice\n    * b\n    * c\n* ",
        "* `hf/refused`, 3 reasons:\n    * UnreachableSitesError: &lt;lambda>\n",
        "* `torchvision/dead`, 1 reason:\n    * RuntimeError: no\n",
        "* `torchvision/absent`: needs a key.",
        "At 1 operators (`timm/untold` 1) the tracer cannot tell the channels.",
        "At 2 operators (`timm/good` 2) one operator serves all calls of a module",
        "Of the calls that are not reached, 1 (`timm/torn` 1) are served in part:",
        "| timm/short (fails) | 5 | 1 | 3 | 4 | 4 | 1.5 |",
    ):
        assert line in text
    assert "timm/good`" not in text.partition("## What fails")[2].partition("## What is left")[0]


def test_the_published_page_is_the_record_of_the_whole_list() -> None:
    record = json.loads(RECORD.read_text())
    assert list(record["models"]) == [model.name for model in models()]
    assert PAGE.read_text() == page(record)
    assert record["command"].startswith("python -m tests.coverage")
    assert "--only" not in record["command"]
    assert record["versions"].keys() == {"python", "torch", "torchvision", "timm", "transformers"}
    run = {name: row for name, row in record["models"].items() if not row.get("left_out")}
    assert max(row["seconds"] + row["build_seconds"] for row in run.values()) < 60
    for name, row in run.items():
        assert all("serves a part of it only" in reason for reason in reasons(row)), name


def test_in_99_of_100_models_every_call_is_reached() -> None:
    run = [row for row in json.loads(RECORD.read_text())["models"].values() if "calls" in row]
    assert len(run) > 290
    reached = [row for row in run if row["calls"] - row["gates"] == row["reached"]]
    assert len(reached) >= 0.99 * len(run)
