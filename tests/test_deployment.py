"""Exported files give the model's logits, take any batch, and say what they are."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
import torchvision

from lightning_meansparse import (
    calibrate_,
    export,
    find_sites,
    load_classifier,
    save_adapter,
    set_alpha,
    sparsify_,
)
from lightning_meansparse.cli import main
from lightning_meansparse.deployment import METADATA
from lightning_meansparse.surgery import alphas, operators

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

LABELS = {0: "cat", 1: "dog", 2: "owl"}


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        id2label=LABELS,
    )
    return transformers.AutoModelForImageClassification.from_config(config), 16


def convnext():
    model = timm.create_model("test_convnext", num_classes=3)
    for name, weight in model.named_parameters():
        if name.endswith("gamma"):  # or its blocks would do next to nothing
            weight.data.fill_(1.0)
    return model, 32


def resnet():
    return torchvision.models.resnet18(num_classes=3), 32


def sparse(make, alpha=0.5):
    model, side = make()
    classifier = load_classifier(
        model.eval(), mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], input_size=(3, side, side)
    )
    classifier.labels = tuple(LABELS.values())
    images = torch.rand(8, 3, side, side)
    sites = find_sites(classifier, images)
    base = logits_of(classifier, images)
    sparsify_(classifier, sites, alpha=alpha)
    calibrate_(classifier, [images])
    assert (base - logits_of(classifier, images)).abs().max() > 1e-3
    return classifier, images


def logits_of(model, images):
    with torch.no_grad():
        return model(images)


def onnx_logits(file, images):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"pixels": images.numpy()})[0])


def torch_logits(file, images):
    return torch.export.load(file).module()(images)


@pytest.mark.parametrize("make", [vit, convnext, resnet])
def test_the_files_give_the_logits_of_the_model(make, tmp_path):
    classifier, images = sparse(make)
    if make is convnext:
        shapes = [op.mean.shape for op in operators(classifier).values()]
        assert any(len(shape) == 1 for shape in shapes), "an operator with channels last"
    for ending, run in ((".onnx", onnx_logits), (".pt2", torch_logits)):
        file = export(classifier, tmp_path / f"model{ending}")
        for batch in (1, 3, 8):
            wanted = logits_of(classifier, images[:batch])
            torch.testing.assert_close(run(file, images[:batch]), wanted, atol=1e-5, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.pt2"]


def test_alpha_is_fixed_and_the_model_stays_as_it_is(tmp_path):
    classifier, images = sparse(vit, alpha=0.5)
    classifier.train()
    before = alphas(classifier)
    file = export(classifier, tmp_path / "model.onnx", alpha={"*": 0.0, "*layers.0*": 0.8})
    assert alphas(classifier) == before
    assert classifier.training
    classifier.eval()
    found = onnx_logits(file, images)
    assert (found - logits_of(classifier, images)).abs().max() > 1e-3
    set_alpha(classifier, {"*": 0.0, "*layers.0*": 0.8})
    torch.testing.assert_close(found, logits_of(classifier, images), atol=1e-5, rtol=0)


def test_the_files_say_what_they_are(tmp_path):
    classifier, _ = sparse(vit, alpha=0.5)
    session = onnxruntime.InferenceSession(export(classifier, tmp_path / "model.onnx"))
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.shape, taken.type) == (
        "pixels",
        ["batch", 3, 16, 16],
        "tensor(float)",
    )
    assert (given.name, given.shape) == ("logits", ["batch", 3])
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["labels"]) == list(LABELS.values())
    sites = [name.removeprefix("model.") for name in alphas(classifier)]
    assert json.loads(facts["alpha"]) == dict.fromkeys(sites, 0.5)
    extra = {METADATA: ""}
    torch.export.load(export(classifier, tmp_path / "model.pt2"), extra_files=extra)
    whole = json.loads(extra[METADATA])
    assert whole == json.loads(facts["meansparse"])
    assert whole["base"]["pixels"]["std"] == pytest.approx([0.2, 0.3, 0.4])
    assert whole["pixels"] == "float32 (N, C, H, W) in [0, 1]"


def test_images_of_another_size_are_refused(tmp_path):
    classifier, images = sparse(vit)
    wrong = images[:, :, :8]
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="16"):
        onnx_logits(export(classifier, tmp_path / "model.onnx"), wrong)
    with pytest.raises(AssertionError, match="16"):
        torch_logits(export(classifier, tmp_path / "model.pt2"), wrong)


def test_what_cannot_be_exported_is_said_before_anything_is_written(tmp_path, monkeypatch):
    classifier, images = sparse(vit)
    bare = load_classifier(vit()[0], mean=0.5, std=0.5, input_size=(3, 16, 16))
    file = tmp_path / "model.pt2"
    for model, options, error, message in (
        (classifier.model, {}, TypeError, "has 0. Make one, which knows the normalisation"),
        (torch.nn.ModuleList([classifier, bare]), {}, TypeError, "has 2"),
        (classifier, {"input_size": 16}, ValueError, "input_size must be"),
        (bare, {}, ValueError, "no MeanSparse operators"),
        (classifier, {"format": "coreml"}, ValueError, "format must be"),
        (classifier, {"alpha": -1.0}, ValueError, "alpha must be"),
        (classifier, {"input_size": (16, 16)}, ValueError, "input_size must be"),
    ):
        with pytest.raises(error, match=message):
            export(model, file, **options)
    with pytest.raises(ValueError, match=r"ends neither in \.onnx nor in \.pt2"):
        export(classifier, tmp_path / "model.bin")
    with pytest.raises(IsADirectoryError):
        export(classifier, tmp_path, format="torch")
    sparsify_(bare, find_sites(bare, images), alpha=0.1)
    with pytest.raises(ValueError, match="not calibrated"):
        export(bare, file)
    monkeypatch.setattr("lightning_meansparse.deployment.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lightning_meansparse\[export\]"):
        export(classifier, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_with_other_logits_is_not_kept(tmp_path, monkeypatch):
    classifier, _ = sparse(vit)
    file = export(classifier, tmp_path / "model.pt2")
    before = file.read_bytes()
    load = torch.export.load

    def spoiled(*args, **kwargs):
        program = load(*args, **kwargs)
        for weight in program.state_dict.values():
            weight.data.mul_(1.001)
        return program

    monkeypatch.setattr(torch.export, "load", spoiled)
    with pytest.raises(RuntimeError, match="gives other logits"):
        export(classifier, file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(("edges", "kept"), [(5, True), (6, False)])
def test_activations_on_the_edge_of_their_band_are_no_fault_of_the_file(
    edges, kept, tmp_path, monkeypatch
):
    classifier, _ = sparse(vit)
    load = torch.export.load
    shown = 0

    def elsewhere(*args, **kwargs):
        class Rounded:
            def module(self):
                return self

            def __call__(self, pixels):
                nonlocal shown
                logits = load(*args, **kwargs).module()(pixels)
                numbers = torch.arange(shown, shown + len(pixels))
                shown += len(pixels)
                return logits + 0.01 * (numbers < edges)[:, None]

        return Rounded()

    monkeypatch.setattr(torch.export, "load", elsewhere)
    if kept:
        export(classifier, tmp_path / "model.pt2")
    else:
        with pytest.raises(RuntimeError, match="gives other logits"):
            export(classifier, tmp_path / "model.pt2")
    assert shown == 8


def test_in_half_precision_the_file_is_as_exact_as_the_model(tmp_path):
    classifier, images = sparse(resnet)
    set_alpha(classifier, 0.0)  # no band, no edges
    classifier.half()
    found = onnx_logits(export(classifier, tmp_path / "model.onnx"), images)
    exact = logits_of(copy.deepcopy(classifier).double(), images)
    own = (logits_of(classifier, images) - exact).abs().max()
    assert own > 1e-5 * max(1, exact.abs().max())
    assert (found - exact).abs().max() < 4 * own


def test_the_command(in_tmp_path, capsys):
    torch.manual_seed(5)
    model, side = vit()
    model.save_pretrained("base")
    transformers.ViTImageProcessor(size={"height": side, "width": side}).save_pretrained("base")
    classifier = load_classifier("base")
    images = torch.rand(8, 3, side, side)
    sparsify_(classifier, find_sites(classifier, images), alpha=0.2)
    calibrate_(classifier, [images])
    save_adapter(classifier, "adapter")
    words = [
        "export",
        "base",
        "--adapter",
        "adapter",
        "--alpha",
        "0.7",
        "--output",
        "new/model.onnx",
    ]
    assert main(words) == 0
    assert "new/model.onnx (" in capsys.readouterr().out
    set_alpha(classifier, 0.7)
    found = onnx_logits("new/model.onnx", images)
    torch.testing.assert_close(found, logits_of(classifier, images), atol=1e-5, rtol=0)
    assert main(["export", "base", "--output", "new/base.onnx"]) == 2
    assert "no MeanSparse operators" in capsys.readouterr().err
    assert np.array_equal([p.name for p in in_tmp_path.glob("new/*")], ["model.onnx"])
