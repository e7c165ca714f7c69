"""Published checkpoints give the published outputs, or an error that leaves the model as it was."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import published
import pytest
import torch
from torch import Tensor, nn

from lightning_meansparse import (
    ImageDataModule,
    import_robustbench,
    load_adapter,
    load_classifier,
    restore_,
    save_adapter,
    set_alpha,
)
from lightning_meansparse.adapter import read_adapter
from lightning_meansparse.classifier import Classifier, save_classifier
from lightning_meansparse.cli import main
from lightning_meansparse.records import TEST, read_records
from lightning_meansparse.robustbench import FAMILIES
from lightning_meansparse.surgery import alphas, operators
from tests.benchmarks.parity import table

ROOT = Path(__file__).parent.parent
PIXELS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SWIN = {
    "img_size": 32,
    "window_size": 2,
    "embed_dim": 8,
    "depths": (2, 1),
    "num_heads": (1, 2),
    "num_classes": 7,
}
# By family: our base network, and the published network made of it.
KINDS: dict[str, tuple[Callable[[], Classifier], Callable[[nn.Module], nn.Module]]] = {
    name: (partial(load_classifier, f"timm/{base}", pretrained=False, **options), publish)
    for name, base, options, publish in (
        ("wrn", "wide_resnet94_16", {"depth": 10, "width": 1}, published.wide_resnet),
        (
            "ra_wrn",
            "ra_wide_resnet70_16.cifar100",
            {"depths": (1, 2, 1), "widths": (8, 12, 16), "stem_width": 8},
            published.wide_resnet,
        ),
        (
            "wrn_activations",
            "wide_resnet70_16",
            {"depth": 10, "width": 1},
            published.wide_resnet_activations,
        ),
        (
            "ra_wrn_imagenet",
            "ra_wide_resnet101_2",
            {"depths": (1, 2), "widths": (16, 32), "group_widths": (2, 4), "stem_width": 8},
            published.ra_wide_resnet,
        ),
        (
            "convnext",
            "convnext_large",
            {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20), "num_classes": 7},
            published.convnext,
        ),
        ("swin", "swin_large_patch4_window7_224", SWIN, published.swin),
    )
}


def scrambled(model: nn.Module) -> nn.Module:
    """The model with random weights everywhere, also where it began with zeros and ones."""
    for value in model.parameters():
        nn.init.normal_(value, std=0.3 if value.ndim == 1 else value[0].numel() ** -0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def of(kind: str) -> tuple[Classifier, nn.Module]:
    """A base with weights of its own, and a published network of the kind with other weights."""
    make, publish = KINDS[kind]
    made = publish(scrambled(make()).model)
    if not isinstance(made, published.Normalised) and kind != "ra_wrn_imagenet":
        base = make()
        # The published CIFAR classes normalise as well, by numbers that are not in the checkpoint.
        made = Classifier(made, mean=base.mean.flatten().tolist(), std=base.std.flatten().tolist())
    return scrambled(make()), made.eval()


def checkpoint_of(network: nn.Module) -> dict[str, Tensor]:
    inner = network.model if isinstance(network, Classifier) else network
    return {key: value.clone() for key, value in inner.state_dict().items()}


def outcome(model: nn.Module, pixels: Tensor = PIXELS) -> tuple[Tensor, Tensor]:
    pixels = pixels.clone().requires_grad_()
    logits = model(pixels)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((logits * weights).sum(), pixels)
    return logits.detach(), gradient


def same(one: nn.Module, other: nn.Module, pixels: Tensor = PIXELS) -> bool:
    """Bit-equal logits and input gradients."""
    pairs = zip(outcome(one, pixels), outcome(other, pixels), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class Untouched:
    """What a failed import must leave: weights, modules, hooks, operators, outputs."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.before = model, self.look(model)

    @staticmethod
    def look(model: nn.Module) -> dict[str, object]:
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        modules = [(id(module), type(module)) for module in model.modules()]
        return {"weights": weights, "modules": modules, "hooks": hooks}

    def check(self) -> None:
        after = self.look(self.model)
        assert after["modules"] == self.before["modules"]
        assert after["hooks"] == self.before["hooks"]
        assert after["weights"].keys() == self.before["weights"].keys()
        for key, value in after["weights"].items():
            assert torch.equal(value, self.before["weights"][key]), key


# ----------------------------------------------------------------------------------- it is the same


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_input_gradients_are_the_published_ones(kind):
    ours, theirs = of(kind)
    import_robustbench(checkpoint_of(theirs), ours)
    assert same(ours, theirs)
    # The bands matter: without them the logits are others, and so are single sites'.
    restore_(ours)
    assert not torch.equal(ours(PIXELS), theirs(PIXELS))


@pytest.mark.parametrize("kind", KINDS)
def test_every_operator_has_its_own_numbers(kind):
    """Each one's threshold, changed alone, changes the published and our logits alike."""
    ours, theirs = of(kind)
    found = {n: m for n, m in theirs.named_modules() if isinstance(m, published.Operator)}
    import_robustbench(checkpoint_of(theirs), ours)
    assert len(operators(ours)) == len(found) >= 7
    start = ours(PIXELS)
    for operator in found.values():
        operator.threshold.mul_(3)
        assert not torch.equal(theirs(PIXELS), start)
        fresh = KINDS[kind][0]()
        import_robustbench(checkpoint_of(theirs), fresh)
        assert torch.equal(fresh(PIXELS), theirs(PIXELS))
        operator.threshold.div_(3)


def test_sites_are_the_published_places():
    ours, theirs = of("wrn")
    import_robustbench(checkpoint_of(theirs), ours.model)
    blocks = [f"layer.{g}.block.0" for g in range(3)]
    sites = [f"{b}{end}" for b in blocks for end in (".relu_0@in", ".relu_1@in", "@out")]
    assert sorted(operators(ours.model)) == sorted([*sites, "relu@in"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["file", "text", "nested", "parallel", "network"])
def test_any_form_of_the_checkpoint_and_of_the_model(kind, form, tmp_path):
    ours, theirs = of(kind)
    checkpoint = checkpoint_of(theirs)
    if form in ("file", "text"):
        torch.save(checkpoint, tmp_path / "published.pt")
        checkpoint = tmp_path / "published.pt" if form == "file" else str(tmp_path / "published.pt")
    elif form == "nested":
        checkpoint = {"state_dict": checkpoint, "epoch": 3}
    elif form == "parallel":
        checkpoint = {f"module.{key}": value for key, value in checkpoint.items()}
    import_robustbench(checkpoint, ours.model if form == "network" else ours)
    assert same(ours, theirs)


def test_the_wrapper_may_be_left_off_and_may_be_the_model():
    """Files with and without the wrapper's part, and a base that is wrapped as the published."""
    ours, theirs = of("convnext")
    checkpoint = checkpoint_of(theirs)
    bare = {k.removeprefix("model."): v for k, v in checkpoint.items() if k.startswith("model.")}
    import_robustbench(bare, ours)
    assert same(ours, theirs)
    wrapped = published.Normalised(
        scrambled(KINDS["convnext"][0]()).model, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    )
    import_robustbench(checkpoint, wrapped.eval())
    assert same(wrapped, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays(training):
    ours, theirs = of("wrn")
    import_robustbench(checkpoint_of(theirs), ours.train(training))
    assert {module.training for module in ours.modules()} == {training}


def test_without_operators_it_is_the_checkpoints_base():
    ours, theirs = of("wrn")
    checkpoint = checkpoint_of(theirs)
    keys = list(ours.model.state_dict())
    import_robustbench(checkpoint, ours)
    assert list(ours.model.state_dict()) == keys
    restore_(ours)
    fresh = KINDS["wrn"][0]()
    fresh.model.load_state_dict({key: checkpoint[key] for key in keys})
    assert same(ours, fresh)


def test_thresholds_of_zero_are_announced_and_can_be_set(recwarn):
    ours, theirs = of("ra_wrn_imagenet")
    found = [module for module in theirs.modules() if isinstance(module, published.Operator)]
    for operator in found:
        operator.threshold.zero_()
    with pytest.warns(UserWarning, match=r"every threshold is 0.*set_alpha\(model, 0.2\)"):
        import_robustbench(checkpoint_of(theirs), ours)
    assert same(ours, theirs)
    set_alpha(ours, 0.2)
    for operator in found:
        operator.threshold.fill_(0.2)
    assert same(ours, theirs)
    found[0].threshold.zero_()  # one alone is nothing to announce
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_robustbench(checkpoint_of(theirs), KINDS["ra_wrn_imagenet"][0]())


# -------------------------------------------------------------------------------------- the adapter


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_kilobytes_does_the_same_on_the_bare_base(kind, tmp_path):
    ours, theirs = of(kind)
    import_robustbench(checkpoint_of(theirs), ours)
    folder = save_adapter(ours, tmp_path / "adapter", base="robustbench/published")
    base = copy.deepcopy(ours)
    restore_(base)
    fresh = KINDS[kind][0]()
    fresh.model.load_state_dict(base.model.state_dict())
    adapter = load_adapter(fresh, folder)
    assert same(fresh, theirs)
    assert alphas(fresh) == alphas(ours)
    assert adapter.statistics == "official"
    assert adapter.source == "robustbench/published"
    # Written again, it still says how the authors averaged.
    again = save_adapter(fresh, tmp_path / "again")
    assert json.loads((again / "meansparse_config.json").read_text())["statistics"] == "official"
    other = scrambled(KINDS[kind][0]())
    with pytest.raises(ValueError, match="made for another base"):
        load_adapter(other, folder)


# ---------------------------------------------------------------------------------------- refusals

LAST = "layer.2.block.0.meansparse_2"


def _set(key: str, value: float, index: int | None = None) -> Callable[[dict[str, Tensor]], None]:
    def change(checkpoint: dict[str, Tensor]) -> None:
        old = checkpoint[key]
        checkpoint[key] = torch.full_like(old, value) if index is None else old.clone()
        if index is not None:
            checkpoint[key].view(-1)[index] = value

    return change


def _replace(key: str, value: object) -> Callable[[dict[str, object]], None]:
    return lambda checkpoint: checkpoint.update({key: value})


def _drop(*ends: str) -> Callable[[dict[str, Tensor]], None]:
    def change(checkpoint: dict[str, Tensor]) -> None:
        for key in [key for key in checkpoint if key.endswith(ends)]:
            del checkpoint[key]

    return change


def _uncalibrated(checkpoint: dict[str, Tensor]) -> None:
    for field in ("running_mean", "running_var", "batch_num"):
        checkpoint[f"{LAST}.{field}"].zero_()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("init_conv.weight"), "missing keys: init_conv.weight$"),
        (_drop(f"{LAST}.running_mean"), f"missing keys: {LAST}.running_mean$"),
        (_drop(f"{LAST}.threshold"), f"missing keys: {LAST}.threshold$"),
        (_drop(f"{LAST}.batch_num"), f"missing keys: {LAST}.batch_num$"),
        (_replace("head.weight", torch.ones(1)), "extra keys: head.weight$"),
        (_replace("relu.0.threshold", torch.ones(())), "extra keys: relu.0.threshold$"),
        (_replace(f"{LAST}.gain", torch.ones(())), f"extra keys: {LAST}.gain$"),
        (
            _replace("logits.bias", torch.ones(11)),
            r"logits.bias must have shape \(10,\), got \(11,\)",
        ),
        (
            _replace(f"{LAST}.running_var", torch.ones(65)),
            rf"{LAST}.running_var must have shape \(64,\), got \(65,\)",
        ),
        (
            _replace(f"{LAST}.threshold", torch.ones(64)),
            rf"{LAST}.threshold must have shape \(\), got \(64,\)",
        ),
        (_set("logits.bias", float("nan"), 3), "not finite: logits.bias$"),
        (_set(f"{LAST}.running_mean", float("nan"), 5), f"not finite: {LAST}.running_mean$"),
        (_set(f"{LAST}.running_var", float("inf"), 0), f"not finite: {LAST}.running_var$"),
        (_set(f"{LAST}.threshold", float("nan")), f"not finite: {LAST}.threshold$"),
        (_set(f"{LAST}.running_var", -1e-6, 7), f"{LAST}.running_var must not be negative"),
        (_set(f"{LAST}.threshold", -0.1), f"{LAST}.threshold must not be negative"),
        (_set(f"{LAST}.batch_num", -1.0), f"{LAST}.batch_num must not be negative"),
        (_set(f"{LAST}.flag_update_statistics", 1), f"{LAST}.flag_update_statistics is set"),
        (_uncalibrated, f"{LAST} was never calibrated"),
        (_drop(".threshold"), "has no operators"),
        (_replace("epoch", 3), "something else: epoch"),
    ],
)
def test_an_unsound_checkpoint_leaves_the_model_as_it_was(change, message):
    ours, theirs = of("wrn")
    checkpoint = checkpoint_of(theirs)
    change(checkpoint)
    before = Untouched(ours)
    with pytest.raises(ValueError, match=re.compile(message, re.MULTILINE)):
        import_robustbench(checkpoint, ours)
    before.check()


def test_every_missing_and_every_extra_key_is_named():
    ours, theirs = of("wrn")
    checkpoint = checkpoint_of(theirs)
    missing = [key for key in checkpoint if ".block.0.relu" not in key][::2]
    for key in missing:
        checkpoint[f"new.{key}"] = checkpoint.pop(key)
    assert len(missing) > 30
    with pytest.raises(ValueError, match="missing keys") as caught:
        import_robustbench(checkpoint, ours)
    lines = dict(
        line.strip().split(" keys: ") for line in str(caught.value).splitlines() if "keys:" in line
    )
    assert set(lines["missing"].split(", ")) == set(missing)
    assert set(lines["extra"].split(", ")) == {f"new.{key}" for key in missing}


@pytest.mark.parametrize("kind", KINDS)
def test_no_operator_may_be_missing(kind):
    ours, theirs = of(kind)
    whole = checkpoint_of(theirs)
    found = [key.removesuffix("threshold") for key in whole if key.endswith(".threshold")]
    before = Untouched(ours)
    for operator in found:
        checkpoint = {key: value for key, value in whole.items() if not key.startswith(operator)}
        with pytest.raises(ValueError, match="missing keys") as caught:
            import_robustbench(checkpoint, ours)
        assert f"{operator.removeprefix('model.')}threshold" in str(caught.value)
    before.check()


def test_another_architecture_is_refused():
    _, theirs = of("wrn")
    other = load_classifier("timm/test_resnet", pretrained=False)
    before = Untouched(other)
    with pytest.raises(ValueError, match="no such places") as caught:
        import_robustbench(checkpoint_of(theirs), other)
    assert all(family in str(caught.value) for family in FAMILIES)
    deeper = load_classifier("timm/wide_resnet94_16", pretrained=False, depth=16, width=1)
    with pytest.raises(ValueError, match=r"missing keys: layer\.0\.block\.1\."):
        import_robustbench(checkpoint_of(theirs), deeper)
    before.check()


@pytest.mark.parametrize("kind", ["convnext", "ra_wrn_imagenet"])
def test_another_normalisation_is_refused(kind):
    ours, theirs = of(kind)
    other = Classifier(ours.model, mean=0.5, std=0.5)
    before = Untouched(other)
    with pytest.raises(ValueError, match=r"normalises with normali\w+.mean = .*classifier with"):
        import_robustbench(checkpoint_of(theirs), other)
    before.check()


def test_tensors_that_want_gradients_leave_no_graph_behind():
    ours, theirs = of("wrn")
    checkpoint = {
        key: value.requires_grad_() if value.is_floating_point() else value
        for key, value in checkpoint_of(theirs).items()
    }
    import_robustbench(checkpoint, ours)
    assert not any(value.requires_grad for value in ours.buffers())
    assert same(ours, theirs)


def test_models_that_cannot_take_it():
    ours, theirs = of("wrn")
    checkpoint = checkpoint_of(theirs)
    import_robustbench(checkpoint, ours)
    before = Untouched(ours)
    with pytest.raises(ValueError, match=r"already sparsified\. Call restore_"):
        import_robustbench(checkpoint, ours)
    before.check()
    assert same(ours, theirs)
    empty = KINDS["wrn"][0]().model.to("meta")
    with pytest.raises(ValueError, match="meta device"):
        import_robustbench(checkpoint, empty)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_the_midst_of_loading_is_undone(kind):
    ours, theirs = of(kind)

    def fail(module: nn.Module, keys: object) -> None:
        raise KeyboardInterrupt

    last = list(ours.model.modules())[-1]
    handle = last.register_load_state_dict_post_hook(fail)
    before = Untouched(ours)
    logits = ours(PIXELS)
    with pytest.raises(KeyboardInterrupt):
        import_robustbench(checkpoint_of(theirs), ours)
    before.check()
    assert torch.equal(ours(PIXELS), logits)
    handle.remove()
    import_robustbench(checkpoint_of(theirs), ours)
    assert same(ours, theirs)


def test_a_warning_that_is_an_error_comes_before_any_change():
    ours, theirs = of("wrn")
    checkpoint = checkpoint_of(theirs)
    for key in checkpoint:
        if key.endswith(".threshold"):
            checkpoint[key].zero_()
    before = Untouched(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="every threshold is 0"):
            import_robustbench(checkpoint, ours)
    before.check()


# ------------------------------------------------------------------------------------------- files


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("it_ran"),)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (Harmful(), ValueError, "no checkpoint of tensors alone, and anything else might run code"),
        (b"", ValueError, "no checkpoint of tensors alone"),
        (b"something else", ValueError, "no checkpoint of tensors alone"),
        ([1, 2], TypeError, "maps names to tensors, got list"),
        (torch.ones(3), TypeError, "maps names to tensors, got Tensor"),
    ],
    ids=["code", "empty", "text", "list", "tensor"],
)
def test_other_files_are_refused(content, error, message, in_tmp_path):
    ours, _ = of("wrn")
    before = Untouched(ours)
    file = in_tmp_path / "published.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(error, match=message):
        import_robustbench(file, ours)
    assert not Path("it_ran").exists()
    before.check()


def test_a_file_cut_short_is_refused(tmp_path):
    ours, theirs = of("wrn")
    file = tmp_path / "published.pt"
    torch.save(checkpoint_of(theirs), file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="no checkpoint of tensors alone"):
        import_robustbench(file, ours)


@pytest.mark.parametrize("name", ["not_there.pt", "."])
def test_no_file(name, in_tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        import_robustbench(name, nn.Linear(1, 1))
    with pytest.raises(TypeError, match="got int"):
        import_robustbench(3, nn.Linear(1, 1))


# ------------------------------------------------------------------------------ recipe and record


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(
    ("name", "kind", "classes", "size", "keys", "alpha", "test_split"),
    [
        ("cifar10", "wrn", 10, 32, ("img", "label"), 0.15, "test"),
        ("cifar100", "wrn_activations", 10, 32, ("img", "fine_label"), 0.15, "test"),
        ("imagenet", "convnext", 7, 40, ("image", "label"), 0.3, "validation"),
    ],
)
def test_the_recipes_measure_what_the_page_writes(
    in_tmp_path, name, kind, classes, size, keys, alpha, test_split
):
    """With the two folders of the page, of a small network, and data with the columns of theirs."""
    ours, theirs = of(kind)
    import_robustbench(checkpoint_of(theirs), ours)
    save_adapter(ours, "outputs/published/adapter", base="robustbench/published")
    sites = list(alphas(ours.model))
    restore_(ours)
    save_classifier(ours, "outputs/published/base")
    images = torch.randint(0, 256, (60, 3, size, size), dtype=torch.uint8)
    labels = torch.arange(60) % classes
    pairs = {"train": (images, labels), "test": (images, labels)}
    made = ImageDataModule(pairs, image_key=keys[0], label_key=keys[1]).write_parquet("stand_in")
    (made / "test.parquet").rename(made / f"{test_split}.parquet")
    options = {
        "model.attacks": '[{"attack": "pgd", "options": {"steps": 1}}, "adaptive-ce"]',
        "model.check_images": "0",
        "data.dataset": "stand_in",
        "data.limit_test": "4",
        "data.limit_holdout": "4",
        "trainer.accelerator": "cpu",
    }
    if name == "imagenet":
        options["data.holdout"] = "0.3"  # a hundredth of 60 images is none
    recipe = str(ROOT / "recipes" / f"{name}_published.yaml")
    main(["sweep", "--config", recipe, *(f"--{key}={value}" for key, value in options.items())])
    output = Path("outputs") / f"{name}_published"
    records, _ = read_records(output / "records.parquet")
    found = {(row["split"], row["alpha"]) for row in records.to_pylist()}
    assert {each for split, each in found if split == TEST} == {0.0, alpha}
    written = read_adapter(output / "adapter")
    assert list(map(str, written.sites)) == sites
    assert written.statistics == "official"


# ------------------------------------------------------------------------------------------ record


def test_the_page_shows_the_recorded_comparison_with_the_published_classes():
    record = json.loads((ROOT / "docs" / "records" / "parity.json").read_text())
    assert table(record) in (ROOT / "docs" / "robustbench.md").read_text()
    zeros = {
        "logits_differ",
        "gradients_differ",
        "gradients_zero",
        "adapter_logits_differ",
        "adapter_gradients_differ",
    }
    for row in record["rows"].values():
        assert {key: row[key] for key in zeros} == dict.fromkeys(zeros, 0)
        assert row["logits_unlike_base"] > 0.9 * row["logits"]
        assert 0.05 < row["replaced"] < 0.5
    for size in ("small", "full"):
        names = {row["published"] for row in record["rows"].values() if row["size"] == size}
        assert {"WRN-94-16", "RaWRN-70-16", "RaWRN-101-2", "ConvNeXt-L", "Swin-L"} <= names
