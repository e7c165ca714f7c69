"""Cards: every number is the records', the Hub's own parser reads them, no name breaks out."""

import re
from dataclasses import replace

import pytest
import torch
from adapters import SITES, Net, sparse
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from markdown_it import MarkdownIt
from reports import ATTACKS, SHARES, make_sweep
from sweeps import data, sweep_of, trainer

from lightning_meansparse import find_sites, load_classifier
from lightning_meansparse.adapter import Adapter, read_adapter
from lightning_meansparse.adapter.files import write_adapter
from lightning_meansparse.adapter.models import describe
from lightning_meansparse.card import model_card
from lightning_meansparse.classifier import save_classifier
from lightning_meansparse.cli import main
from lightning_meansparse.demo import ConvNet
from lightning_meansparse.records import TEST, summarize
from lightning_meansparse.report import find, read_sources
from lightning_meansparse.surgery import calibrate_, set_alpha, sparsify_

HOSTILE = (
    "x\n---\nlicense: evil\n---\n# big `code` | cell <script>a()</script> ![i](http://e.vil/i) "
    "[l](http://e.vil) http://e.vil www.e.vil $x$ ~~no~~ **b** &amp; ```"
)
CHOSEN = SHARES | {0.2: (84.0, 71.0, 70.5, 70.0, 69.5)}


def adapter_of(alpha: float = 0.2, **facts: object) -> Adapter:
    torch.manual_seed(0)
    net = sparse()
    set_alpha(net, alpha)
    return replace(describe(net), **{"source": "timm/hf-hub:org/base", **facts})


def fingerprints(adapter: Adapter) -> dict[str, str]:
    return {
        "weights": adapter.fingerprint.hashes["float32"][:16],
        "statistics": adapter.hash()[:16],
    }


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return adapter_of(revision="c0ffee" * 6 + "abcd", calibration={"dataset": "org/images"})


@pytest.fixture(scope="module")
def records(adapter, tmp_path_factory):
    known = {"fingerprints": fingerprints(adapter), "data": {"name": "org/images"}, "eps": 8 / 255}
    return make_sweep(tmp_path_factory.mktemp("sweep"), shares=CHOSEN, metadata=known)


def front(card: str) -> dict:
    """The front matter, by the Hub's own parser, which also checks the index of results."""
    return ModelCard(card).data.to_dict()


def rows(card: str, head: str) -> list[list[str]]:
    """The cells of the first table whose head begins so."""
    lines = card.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(head))
    body = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        body.append([cell.strip().replace("\\", "") for cell in line.strip("|").split(" | ")])
    return body


# --- Numbers ------------------------------------------------------------------------------------


def test_the_card_and_its_front_matter_say_what_the_records_say(adapter, records):
    card = model_card(adapter, repo_id="org/name", records=records, license="apache-2.0")
    sources = read_sources(records)
    base, *others = summarize(sources.table, split=TEST)
    (own,) = (summary for summary in others if summary.alpha == 0.2)

    meta = front(card)
    assert meta["base_model"] == "org/base"
    assert meta["base_model_relation"] == "adapter"
    assert meta["library_name"] == "lightning_meansparse"
    assert meta["license"] == "apache-2.0"
    assert meta["datasets"] == ["org/images"]
    assert {"meansparse", "image-classification"} <= set(meta["tags"])
    parsed = ModelCard(card).data
    assert meta["model-index"] == eval_results_to_model_index("name", parsed.eval_results)
    found = {result.metric_type: result for result in parsed.eval_results}
    shares = {
        "accuracy": own.clean,
        "apparent_robust_accuracy": own.apparent,
        "robust_accuracy": own.worst,
    }
    assert found.keys() == shares.keys()
    for kind, share in shares.items():
        assert found[kind].metric_value == share.value
        assert found[kind].metric_args["n"] == share.n == 1000
        assert found[kind].metric_args["interval_95"] == [share.low, share.high]
        assert found[kind].dataset_split == TEST
    assert found["robust_accuracy"].metric_args["attacks"] == list(ATTACKS)
    assert found["apparent_robust_accuracy"].metric_args["attacks"] == ["apgd-ce", "apgd-t"]
    assert found["robust_accuracy"].metric_args["eps"] == 8 / 255
    assert found["robust_accuracy"].metric_args["norm"] == "Linf"

    table = rows(card, "|  | clean | apparent | worst case")
    for row, summary in zip(table, (base, own), strict=True):
        assert row[1:4] == [
            f"{100 * summary.clean.value:.1f}",
            f"{100 * summary.apparent.value:.1f}",
            f"**{100 * summary.worst.value:.1f} [{100 * summary.worst.low:.1f}, "
            f"{100 * summary.worst.high:.1f}]**",
        ]
        assert row[-1] == "1,000"
    assert table[1][4].startswith(f"{100 * own.gain.value:+.2f} ± ")
    attacks = rows(card, "| attack |")
    assert [row[:2] for row in attacks] == [[name, kind] for name, kind in ATTACKS.items()]
    assert [row[-1] for row in attacks] == [f"{100 * own.robust[n].value:.1f}" for n in ATTACKS]
    assert "Linf, ε = 8/255" in card
    found = find(sources.table, sources.metadata | {"chosen_alpha": 0.2})
    assert f"**{found.headline}.**" in card
    assert found.raised
    for flag in found.raised:
        assert flag.name.capitalize() in card
    assert "@article{amini2024meansparse" in card
    assert "upper bound" in card


def test_without_records_robustness_was_not_evaluated(adapter):
    card = model_card(adapter, repo_id="org/name")
    assert "**Robustness was not evaluated.**" in card
    assert "model-index" not in front(card)
    assert "metrics" not in front(card)
    told = replace(adapter, evaluation={"n": 1, "eps": 1, "norm": "Linf", "attacks": [], "x": 0.73})
    assert "0.73" not in model_card(told)
    assert "this card does not repeat them" in model_card(told)


def test_clean_records_alone_claim_no_robustness(tmp_path):
    adapter = adapter_of()
    shares = {alpha: shares[:1] for alpha, shares in SHARES.items()}
    folder = make_sweep(
        tmp_path,
        shares=shares,
        attacks={},
        metadata={"fingerprints": fingerprints(adapter), "chosen_alpha": 0.2},
    )
    card = model_card(adapter, records=folder)
    assert "**Nothing measured.**" in card
    assert [r.metric_type for r in ModelCard(card).data.eval_results] == ["accuracy"]
    assert "Worst case" not in card


def test_the_records_file_itself_will_do(adapter, records):
    folder = model_card(adapter, records=records)
    assert model_card(adapter, records=records / "records.parquet") == folder


# --- Records of something else -----------------------------------------------------------------


def test_records_without_the_adapters_alpha_are_refused(records):
    with pytest.raises(ValueError, match=r"another alpha \(0\.3\) than the records .*0\.2, 0\.4"):
        model_card(adapter_of(0.3), records=records)
    several = adapter_of()
    several = replace(several, alphas=(0.1, 0.2))
    with pytest.raises(ValueError, match="one for each site"):
        model_card(several, records=records)


def test_another_alpha_than_the_chosen_one_is_said(tmp_path):
    adapter = adapter_of(0.4)
    known = {
        "fingerprints": fingerprints(adapter),
        "chosen_alpha": 0.2,
        "select": {"method": "apparent_robustness"},
    }
    card = model_card(adapter, records=make_sweep(tmp_path, shares=CHOSEN, metadata=known))
    assert "The sweep chose α = 0.2; this adapter has α = 0.4" in card
    assert "**this model (α = 0.4)**" in card
    assert "chosen by apparent" not in card
    value = {r.metric_type: r.metric_value for r in ModelCard(card).data.eval_results}
    own = {s.alpha: s for s in summarize(read_sources(tmp_path).table, split=TEST)}
    assert value["robust_accuracy"] == own[0.4].worst.value


def test_records_of_other_weights_or_statistics_are_refused(adapter, records, tmp_path):
    torch.manual_seed(1)
    other = sparse(Net())
    set_alpha(other, 0.2)
    with pytest.raises(ValueError, match=r"of another base: .* with weights"):
        model_card(describe(other), records=records)
    tensors = {name: value.clone() for name, value in adapter.tensors.items()}
    tensors[f"{SITES[0]}.mean"][0] += 1e-6
    with pytest.raises(ValueError, match=r"of another calibration: .* with statistics"):
        model_card(replace(adapter, tensors=tensors), records=records)
    # Of older sweeps the adapter beside the records knows the base.
    known = {"chosen_alpha": 0.2}
    folder = make_sweep(tmp_path, shares=CHOSEN, metadata=known)
    card = model_card(adapter, records=folder)
    for what in ("weights", "statistics"):
        assert f"do not say with which {what} they were measured" in card
    write_adapter(describe(other), folder / "adapter")
    with pytest.raises(ValueError, match="of another base"):
        model_card(adapter, records=folder)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_sweeps_own_adapter_and_records_fit_each_other(tmp_path, capsys):
    sweep = sweep_of(output=tmp_path)
    run = trainer()
    run.validate(sweep, data(), verbose=False)
    run.test(sweep, data(), verbose=False)
    card = model_card(read_adapter(tmp_path / "adapter"), records=tmp_path)
    assert "do not say with which" not in card
    assert "model-index" in front(card)
    assert main(["card", str(tmp_path)]) == 0
    assert (tmp_path / "adapter" / "README.md").read_text() == card
    assert main(["card", str(tmp_path), "--repo-id", "org/name"]) == 0
    (tmp_path / "adapter" / "README.md").write_text("mine")
    assert main(["card", str(tmp_path)]) == 2
    assert "--output" in capsys.readouterr().err
    assert (tmp_path / "adapter" / "README.md").read_text() == "mine"


# --- Names that try to break out --------------------------------------------------------------


def test_names_from_files_become_neither_front_matter_nor_markup(tmp_path):
    adapter = adapter_of(
        source=HOSTILE,
        revision=HOSTILE,
        calibration={"dataset": HOSTILE, HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
    )
    folder = make_sweep(
        tmp_path,
        shares=CHOSEN,
        attacks={f"{HOSTILE}{n}": kind for n, kind in enumerate(ATTACKS.values())},
        metadata={
            "fingerprints": fingerprints(adapter),
            "data": {"name": HOSTILE},
            "model": HOSTILE,
            "norm": HOSTILE,
            "command": HOSTILE,
            "versions": {HOSTILE: HOSTILE},
        },
    )
    for card in (model_card(adapter), model_card(adapter, records=folder)):
        harmless = front(card)
        plain = front(model_card(adapter_of(source="a b")))
        assert "license" not in harmless
        assert "base_model" not in harmless
        assert "datasets" not in harmless
        assert harmless["tags"] == plain["tags"]
        tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"])
        parsed = tokens.parse(ModelCard(card).text)
        inline = [child for token in parsed for child in token.children or ()]
        assert not {"html_block", "html_inline", "image", "s_open"} & {
            token.type for token in [*parsed, *inline]
        }
        links = {t.attrs["href"] for t in inline if t.type == "link_open"}
        assert all(link.startswith("https://arxiv.org/") for link in links)
        heads = [t.tag for t in parsed if t.type == "heading_open"]
        assert heads.count("h1") == 1
        fences = [t.content for t in parsed if t.type == "fence"]
        assert len(fences) == 3
        assert "<script>" in "".join(t.content for t in inline)  # it is there to be read
        outside = re.sub(r"`[^`]*`|\\.", "", ModelCard(card).text)
        assert not re.search(r"https?://e\.vil|www\.|\$|~", outside)


def test_names_and_arguments_are_the_hubs(adapter):
    for options, message in (
        ({"repo_id": "../name"}, "repo_id must look like"),
        ({"relation": "copy"}, "relation must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            model_card(adapter, **options)
    whole = model_card(adapter, repo_id="org/n", relation="finetune", library_name="transformers")
    assert front(whole)["base_model_relation"] == "finetune"
    assert front(whole)["library_name"] == "transformers"
    assert 'pipeline("image-classification", "org/n")' in whole
    assert "the whole model" in whole


def test_bases_that_the_hub_has_are_named_by_their_repository():
    pinned = adapter_of(source="timm/resnet18.a1_in1k", revision="0123456789")
    assert front(model_card(pinned))["base_model"] == "timm/resnet18.a1_in1k"
    short = replace(pinned, source="timm/resnet18")
    assert front(model_card(short))["base_model"] == "timm/resnet18.a1_in1k"
    for nowhere in (
        replace(short, revision=None),  # random weights
        replace(pinned, source="torchvision/resnet18"),
        replace(pinned, source="checkpoint"),
        replace(pinned, source="timm/no_such_net"),
    ):
        assert "base_model" not in front(model_card(nowhere))
    assert "is not on the Hub under a name" in model_card(replace(pinned, source="checkpoint"))


# --- The lines on how to load ------------------------------------------------------------------


def test_the_code_in_the_card_runs(hub, tmp_path):
    base = load_classifier(ConvNet(width=4), input_size=(1, 28, 28))
    commit = hub.commit("org/base", save_classifier(base, tmp_path / "base"))
    base.source, base.revision = "meansparse/org/base", commit
    sites = find_sites(base.model, torch.rand(2, 1, 28, 28))
    sparsify_(base.model, sites, alpha=0.3)
    calibrate_(base, [torch.rand(16, 1, 28, 28)])
    adapter = describe(base)
    write_adapter(adapter, tmp_path / "adapter")
    hub.commit("org/name", tmp_path / "adapter")
    card = model_card(adapter, repo_id="org/name")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    place: dict = {}
    exec(code, place)
    assert torch.equal(place["logits"], base.eval()(place["images"]))
