"""The front matter of a card: what the Hub reads of it."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lightning_meansparse.adapter import Adapter, base_repository
from lightning_meansparse.adapter.files import HUB_ID
from lightning_meansparse.card.evidence import Evidence
from lightning_meansparse.records import Proportion

TAGS = ["meansparse", "adversarial-robustness", "robustness", "image-classification"]


def card_data(
    adapter: Adapter,
    evidence: Evidence | None,
    *,
    name: str,
    relation: str,
    library_name: str,
    license: str | None,
) -> ModelCardData:
    """Return the front matter; only names that the Hub can resolve are put where it follows them.

    Args:
        adapter: What the card is about.
        evidence: What was measured of it; None for nothing.
        name: Of the model, in the index of results.
        relation: Of the model to its base, as the Hub names it.
        library_name: The library that loads it.
        license: As the Hub names it; None leaves it out.
    """
    base = base_on_hub(adapter)
    data = [n for n in (_calibrated_on(adapter), _measured_on(evidence)) if HUB_ID.fullmatch(n)]
    known: dict[str, Any] = {"base_model": base, "base_model_relation": relation} if base else {}
    results = [] if evidence is None else _results(evidence)
    return ModelCardData(
        **known,
        library_name=library_name,
        license=license,
        pipeline_tag="image-classification",
        tags=TAGS,
        datasets=list(dict.fromkeys(data)) or None,
        metrics=["accuracy"] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def base_on_hub(adapter: Adapter) -> str | None:
    """The base's repository on the Hub, also where timm's short name stands for one."""
    source = adapter.source or ""
    library, _, name = source.partition("/")
    if library != "timm" or ":" in name:
        return base_repository(source)
    if adapter.revision is None:
        return None  # random weights, or some that did not come from the Hub
    import timm

    if not timm.is_model(name.partition(".")[0]):
        return None
    config: Any = timm.get_pretrained_cfg(name)
    place = str(getattr(config, "hf_hub_id", None) or "").partition("@")[0]
    if place.endswith("/"):  # timm's own, called as the weights are
        place += f"{config.architecture}.{config.tag}"
    return place if HUB_ID.fullmatch(place) else None


def _calibrated_on(adapter: Adapter) -> str:
    return str((adapter.calibration or {}).get("dataset", ""))


def _measured_on(evidence: Evidence | None) -> str:
    return "" if evidence is None else evidence.data


def _results(evidence: Evidence) -> list[EvalResult]:
    """One per number of the table's row, with what it means nothing without."""
    judged = evidence.judged
    attacked = {"norm": evidence.norm, "eps": evidence.eps, "attacks": list(judged.robust)}

    def result(kind: str, name: str, share: Proportion, **more: Any) -> EvalResult:
        return EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=re.sub(r"[^\w./-]+", "-", evidence.data.lower()) or "unknown",
            dataset_name=evidence.data or "unknown",
            dataset_split=judged.split,
            metric_type=kind,
            metric_name=name,
            metric_value=share.value,
            metric_args={"n": share.n, "interval_95": [share.low, share.high], **more},
        )

    found = [result("accuracy", "Accuracy without attack", judged.clean)]
    if judged.apparent is not None:
        own = [name for name, kind in judged.kinds.items() if kind == "gradient"]
        found.append(
            result(
                "apparent_robust_accuracy",
                "Accuracy under attacks that the operator may have blinded: no robustness",
                judged.apparent,
                **{**attacked, "attacks": own},
            )
        )
    if judged.robust:
        name = f"Worst-case accuracy under all attacks ({evidence.ball})"
        found.append(result("robust_accuracy", name, judged.worst, **attacked))
    return found
