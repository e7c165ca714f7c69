"""Classifier: what comes out is what the model's own library would have given, bit for bit."""

import copy
import json
import os
import pickle
from collections import namedtuple
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn
from torchvision import models

from lightning_meansparse import load_classifier
from lightning_meansparse.classifier import Classifier, libraries, save_classifier
from lightning_meansparse.demo import ConvNet


class Returns(nn.Module):
    """A model whose output has any shape we like."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.head = nn.Linear(3, 5)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.head(x.mean((2, 3))))


def normalised(x, mean, std):
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.fixture
def transformers_folder(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4
    )
    model = transformers.ResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", model


def write_processor(folder: Path, **fields) -> None:
    base = {
        "do_normalize": True,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 48},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(base | fields))


# --- Every library ------------------------------------------------------------------------------


def test_timm_models_get_their_own_normalisation() -> None:
    classifier = load_classifier("timm/test_vit", pretrained=False, num_classes=7)
    config = timm.data.resolve_model_data_config(classifier.model)
    x = torch.rand(2, 3, 160, 160)
    own = classifier.model(normalised(x, config["mean"], config["std"]))
    assert torch.equal(classifier(x), own)
    assert (classifier.num_classes, classifier.in_chans) == (7, 3)
    assert classifier.input_size == config["input_size"]
    assert classifier.source == "timm/test_vit"
    assert not classifier.training
    assert not classifier.model.training
    assert set(classifier.state_dict()) == {f"model.{k}" for k in classifier.model.state_dict()}


def test_timm_takes_other_channels_and_its_own_options() -> None:
    classifier = load_classifier("timm/test_vit", pretrained=False, in_chans=1, img_size=32)
    assert classifier(torch.rand(2, 1, 32, 32)).shape == (2, 1000)
    assert classifier.mean.shape == (1, 1, 1)
    assert libraries.for_channels([0.1, 0.2, 0.3], 1) == pytest.approx([0.2])
    assert libraries.for_channels([0.1, 0.2, 0.3], 3) == [0.1, 0.2, 0.3]


def test_timm_folders_load_from_safetensors_alone(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=5, in_chans=1).eval()
    save_for_hf(model, tmp_path / "safe", model_config={"num_classes": 5}, safe_serialization=True)
    save_for_hf(model, tmp_path / "bin", model_config={"num_classes": 5}, safe_serialization=False)
    x = torch.rand(2, 1, 32, 32)
    classifier = load_classifier(tmp_path / "safe")
    assert torch.equal(classifier(x), model((x - classifier.mean) / classifier.std))
    for folder in (tmp_path / "bin", f"timm/local-dir:{tmp_path / 'bin'}"):
        with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin may run code"):
            load_classifier(folder)


def test_torchvision_models_get_the_normalisation_of_their_weights() -> None:
    classifier = load_classifier("torchvision/squeezenet1_1", pretrained=False, num_classes=6)
    preset = models.SqueezeNet1_1_Weights.DEFAULT.transforms()
    x = torch.rand(2, 3, 40, 40)
    assert torch.equal(classifier(x), classifier.model(normalised(x, preset.mean, preset.std)))
    assert (classifier.num_classes, classifier.input_size) == (6, (3, 224, 224))


def test_torchvision_weights_are_first_read_without_unpickling(monkeypatch) -> None:
    weights = models.SqueezeNet1_1_Weights.DEFAULT
    reference = models.squeezenet1_1()
    asked = []

    def download(url, **options):
        asked.append((url, options.get("weights_only"), options.get("check_hash")))
        return reference.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    classifier = load_classifier("torchvision/squeezenet1_1")
    assert asked[0] == (weights.url, True, True)
    x = torch.rand(1, 3, 40, 40)
    preset = weights.transforms()
    assert torch.equal(classifier(x), reference.eval()(normalised(x, preset.mean, preset.std)))
    with pytest.raises(ValueError, match="have 1000 classes; for num_classes=10 give"):
        load_classifier("torchvision/squeezenet1_1", num_classes=10)


def test_transformers_models_get_the_normalisation_of_their_processor(transformers_folder) -> None:
    folder, model = transformers_folder
    write_processor(folder)
    x = torch.rand(2, 3, 32, 48)
    expected = model(normalised(x, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])).logits
    for name in (folder, str(folder), f"hf/{folder}"):
        classifier = load_classifier(name)
        assert torch.equal(classifier(x), expected)
        assert classifier.input_size == (3, 32, 48)
        assert classifier.num_classes == 4
        assert classifier.source == str(name)
    assert load_classifier(folder, num_classes=9)(x).shape == (2, 9)
    grey = load_classifier(folder, pretrained=False, in_chans=1)
    assert grey(torch.rand(2, 1, 32, 48)).shape == (2, 4)
    assert grey.mean.flatten().tolist() == pytest.approx([0.2])
    with pytest.raises(ValueError, match="take 3 channels; give"):
        load_classifier(folder, in_chans=1)
    with pytest.raises(ValueError, match="no field of ResNetConfig"):
        load_classifier(folder, pretrained=False, img_size=32)


@pytest.mark.parametrize(
    "fields",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {
            "rescale_factor": 1 / 127.5,
            "rescale_offset": True,
            "do_normalize": False,
            "include_top": False,
            "image_processor_type": "EfficientNetImageProcessor",
        },
        {"rescale_factor": 1 / 127.5},
    ],
)
def test_rescaling_of_the_processor_is_folded_into_mean_and_std(transformers_folder, fields):
    folder, _ = transformers_folder
    write_processor(folder, **fields)
    classifier = load_classifier(folder)
    pixel = torch.rand(1, 3, 2, 2)
    x = pixel * 255
    if fields.get("do_rescale", True):
        x = x * fields.get("rescale_factor", 1 / 255)
        x = x - 1 if fields.get("rescale_offset") else x
    if fields.get("do_normalize", True):
        x = normalised(x, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    torch.testing.assert_close((pixel - classifier.mean) / classifier.std, x)


def test_transformers_without_a_known_normalisation_asks_for_it(transformers_folder) -> None:
    folder, _ = transformers_folder
    with pytest.raises(ValueError, match="give mean= and std="):
        load_classifier(folder)
    assert load_classifier(folder, mean=0, std=1).mean.shape == (1, 1, 1)
    write_processor(folder)
    assert load_classifier(folder).mean.shape == (3, 1, 1)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="may run code and is not opened"):
        load_classifier(folder)


def test_timm_models_load_through_transformers_too(tmp_path: Path) -> None:
    """timm writes num_classes into model_args, which transformers would then pass twice."""
    pytest.importorskip("transformers")
    model = timm.create_model("test_resnet", num_classes=5).eval()
    save_for_hf(model, tmp_path, model_config={"num_classes": 5}, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["num_classes"] == 5
    x = torch.rand(2, 3, 32, 32)
    # Not bit for bit: transformers maps weights from the file, at other addresses, and the last bit
    # of a convolution depends on the alignment.
    torch.testing.assert_close(load_classifier(f"hf/{tmp_path}")(x), load_classifier(tmp_path)(x))


# --- Modules ------------------------------------------------------------------------------------


def test_a_module_keeps_its_mode_and_takes_the_given_normalisation() -> None:
    model = ConvNet(in_chans=3)
    model.stage2.eval()
    classifier = load_classifier(model, mean=[0.1, 0.2, 0.3], std=0.5)
    assert classifier.training
    assert not model.stage2.training
    assert classifier.model is model
    assert (classifier.num_classes, classifier.in_chans) == (10, 3)
    assert classifier.source is None
    model.eval()
    x = torch.rand(2, 3, 28, 28)
    assert torch.equal(classifier(x), model(normalised(x, [0.1, 0.2, 0.3], [0.5] * 3)))
    assert torch.equal(load_classifier(model)(x), model(x))


def test_a_classifier_comes_back_as_it_is_and_refuses_options() -> None:
    classifier = load_classifier(ConvNet())
    assert load_classifier(classifier) is classifier
    for options in ({"mean": 0.5}, {"num_classes": 3}, {"revision": "v1"}, {"drop": 0.1}):
        with pytest.raises(ValueError, match="would have no effect"):
            load_classifier(classifier, **options)
    with pytest.raises(ValueError, match="in_chans=3 would have no effect"):
        load_classifier(ConvNet(), in_chans=3)


Named = namedtuple("Named", ["logits", "aux"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: {"logits": y, "loss": None},
        lambda y: (y, [1]),
        lambda y: Named(y, y),
    ],
)
def test_outputs_of_any_form_are_unwrapped(wrap) -> None:
    classifier = load_classifier(Returns(wrap))
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(classifier(x), classifier.model.head(x.mean((2, 3))))


@pytest.mark.parametrize(
    ("wrap", "error", "message"),
    [
        (lambda y: {"scores": y}, TypeError, "got a dict without 'logits'"),
        (lambda y: None, TypeError, "got a NoneType"),
        (lambda y: y[:, :, None], ValueError, r"got shape \(2, 5, 1\): has it a classification"),
    ],
)
def test_outputs_without_logits_are_refused(wrap, error, message) -> None:
    with pytest.raises(error, match=message):
        load_classifier(Returns(wrap))(torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError, "divide uint8 by 255"),
        ([1.0], TypeError, "got list"),
        (torch.zeros(3, 4, 4), ValueError, r"must be \(N, 3, H, W\), got \(3, 4, 4\)"),
        (torch.zeros(1, 1, 4, 4), ValueError, r"must be \(N, 3, H, W\), got \(1, 1, 4, 4\)"),
    ],
)
def test_wrong_pixels_stop_at_the_door(pixels, error, message) -> None:
    with pytest.raises(error, match=message):
        load_classifier(ConvNet(in_chans=3))(pixels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_model_runs_in_its_dtype_and_the_normalisation_in_float32(dtype) -> None:
    classifier = load_classifier(ConvNet(), mean=0.1307, std=0.3081).eval()
    exact = classifier.mean.clone()
    x = torch.rand(2, 1, 8, 8)
    classifier.to(dtype)
    own = classifier.model(((x - exact) / 0.3081).to(dtype))
    logits = classifier(x)
    assert torch.equal(classifier.mean, exact)
    assert classifier.mean.dtype == torch.float32
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(logits, own.to(logits.dtype))


def test_gradients_pass_the_door_and_copies_are_the_same() -> None:
    classifier = load_classifier(ConvNet(width=4), mean=0.5, std=0.25).eval()
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(classifier(x).sum(), x)
    z = ((x - 0.5) / 0.25).detach().requires_grad_()
    (inner,) = torch.autograd.grad(classifier.model(z).sum(), z)
    assert torch.equal(gradient, inner / 0.25)
    for twin in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
        assert torch.equal(twin(x), classifier(x))


# --- Our own folder -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm/test_resnet", {"num_classes": 10, "in_chans": 1}),
        ("timm/test_vit", {"num_classes": 3, "img_size": 32}),
        ("torchvision/squeezenet1_1", {"num_classes": 4}),
    ],
)
def test_a_saved_classifier_is_the_same_again(tmp_path: Path, name, options) -> None:
    torch.manual_seed(1)
    first = load_classifier(name, pretrained=False, **options)
    save_classifier(first, tmp_path / "one", metrics={"clean": 0.5})
    second = load_classifier(tmp_path / "one")
    save_classifier(second, tmp_path / "two")
    third = load_classifier(str(tmp_path / "two"))
    x = torch.rand(2, first.in_chans, 32, 32)
    for again in (second, third):
        assert torch.equal(again(x), first(x))
        assert again.metrics == {"clean": 0.5}
        assert (again.num_classes, again.input_size) == (first.num_classes, first.input_size)
        assert not again.training
    one, two = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("one", "two"))
    assert one == two
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_saved_transformers_model_is_the_same_again(transformers_folder, tmp_path) -> None:
    folder, _ = transformers_folder
    write_processor(folder)
    first = load_classifier(folder)
    save_classifier(first, tmp_path / "own")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_classifier(tmp_path / "own")(x), first(x))


def test_a_saved_demo_network_is_the_same_again(tmp_path: Path) -> None:
    model = ConvNet(in_chans=3, num_classes=4, width=8)
    model(torch.rand(4, 3, 8, 8))  # moves the running statistics
    save_classifier(load_classifier(model, mean=0.5, std=0.5), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["class"] == "lightning_meansparse.demo.ConvNet"
    assert config["options"] == {"in_chans": 3, "num_classes": 4, "width": 8}
    x = torch.rand(2, 3, 28, 28)
    loaded = load_classifier(tmp_path)
    assert torch.equal(loaded(x), model.eval()((x - 0.5) / 0.5))
    assert load_classifier(tmp_path, mean=0, std=1).mean.flatten().tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="num_classes=3 would have no effect"):
        load_classifier(tmp_path, num_classes=3)


@pytest.mark.skipif(os.name != "posix", reason="file modes")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_are_readable_for_whom_the_umask_lets(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = save_classifier(load_classifier(ConvNet(width=4)), tmp_path / "own")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert modes == dict.fromkeys(["config.json", "model.safetensors"], 0o666 & ~umask)


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = save_classifier(load_classifier(ConvNet(width=4)), tmp_path)
    config = json.loads((folder / "config.json").read_text())

    def attempt(**changes) -> None:
        (folder / "config.json").write_text(json.dumps(config | changes))
        load_classifier(folder)

    with pytest.raises(ValueError, match=r"names the class 'os\.system'; allowed are"):
        attempt(**{"class": "os.system"})
    for version in (3, "1", True, None):
        with pytest.raises(ValueError, match=f"version {version!r}, this version reads 1 and 2;"):
            attempt(format_version=version)
    with pytest.raises(ValueError, match=r"does not fit its config\.json"):
        attempt(options={"width": 8})
    weights = load_file(folder / "model.safetensors")
    weights.pop("head.bias")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"head\.bias"):
        attempt()
    (folder / "model.safetensors").rename(folder / "model.pt")
    with pytest.raises(FileNotFoundError, match=r"model\.pt may run code"):
        attempt()


@pytest.mark.parametrize(
    "key",
    [
        "class",
        "options",
        "mean",
        "std",
        "bgr",
        "normalisation",
        "labels",
        "num_classes",
        "input_size",
    ],
)
def test_a_config_that_lacks_a_key_names_file_and_key(tmp_path: Path, key: str) -> None:
    path = save_classifier(load_classifier(ConvNet(width=4)), tmp_path) / "config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    key = "source" if key == "class" else key
    with pytest.raises(ValueError, match=rf"config\.json lacks '{key}'"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class", ["timm"]),
        ("options", None),
        ("options", {"width": "4"}),
        ("options", {"width": True}),
        ("options", {"weights": 4}),
        ("mean", 0.5),
        ("mean", [float("nan")]),
        ("mean", [0.5] * 5),
        ("mean", ["0.5"]),
        ("mean", [10**400]),
        ("std", [0.0]),
        ("std", [None]),
        ("num_classes", 0),
        ("num_classes", True),
        ("num_classes", "10"),
        ("input_size", [28, 28]),
        ("input_size", [1, 28, 0]),
        ("input_size", [3, 28, 28, 1]),
        ("metrics", []),
        ("bgr", 1),
        ("bgr", True),  # of grey images
        ("normalisation", None),
        ("labels", "abc"),
        ("labels", ["a", 1]),
        ("labels", ["a"]),  # for ten classes
    ],
)
def test_a_config_with_a_wrong_value_names_file_and_key(tmp_path: Path, key, value) -> None:
    path = save_classifier(load_classifier(ConvNet(width=4)), tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"config\.json: .*{key}"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("timm/test_resnet", {"checkpoint_path": "evil.pth"}, "checkpoint_path would"),
        ("timm/test_resnet", {"pretrained": True}, "pretrained would"),
        ("timm/test_resnet", {"pretrained_cfg": {"file": "evil.pth"}}, "pretrained_cfg would"),
        ("timm/test_resnet", {"pretrained_cfg_overlay": {}}, "pretrained_cfg_overlay would"),
        ("torchvision/squeezenet1_1", {"weights": "DEFAULT"}, "weights would"),
        ("torchvision/squeezenet1_1", {"weights_backbone": "DEFAULT"}, "weights_backbone would"),
        ("timm/hf-hub:org/name", {}, "no architecture"),
        ("timm/hf_hub:org/name", {}, "no architecture"),
        ("timm/local-dir:/tmp/evil", {}, "no architecture"),
        ("timm/test_resnet", {"nonsense": 1}, "nonsense"),
        ("hf/nonsense", {"config": {"model_type": "nonsense"}}, "nonsense"),
        ("hf/resnet", {}, "config"),
        ("elsewhere/resnet18", {}, "must begin with timm/"),
        ("hf/timm_wrapper", {"model_args": {"checkpoint_path": "x"}}, "checkpoint_path would"),
        ("hf/timm_wrapper", {"architecture": "hf-hub:org/name"}, "no architecture"),
    ],
)
def test_a_config_cannot_ask_for_other_weights(
    tmp_path: Path, monkeypatch, source: str, options: dict, message: str
) -> None:
    if source.startswith("hf/"):
        pytest.importorskip("transformers")
    if source == "hf/timm_wrapper":
        fields = {"model_type": "timm_wrapper", "architecture": "test_resnet", "num_classes": 5}
        options = {"config": fields | options}
    if "would" in message or "no architecture" in message:
        monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("built"))
    path = save_classifier(load_classifier(ConvNet(width=4)), tmp_path) / "config.json"
    config = json.loads(path.read_text()) | {"source": source, "options": options}
    del config["class"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json: source and options .*{message}"):
        load_classifier(tmp_path)


def test_options_that_chose_weights_are_not_written(tmp_path: Path) -> None:
    cfg = timm.get_pretrained_cfg("test_resnet").to_dict()
    first = load_classifier("timm/test_resnet", pretrained=False, pretrained_cfg=cfg)
    second = load_classifier(save_classifier(first, tmp_path))
    assert second.origin == {"source": "timm/test_resnet", "options": {"num_classes": 1000}}


def test_what_cannot_be_saved_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing says how to build this Returns again"):
        save_classifier(Classifier(Returns(lambda y: y)), tmp_path / "a")
    with pytest.raises(ValueError, match="plain JSON"):
        save_classifier(Classifier(ConvNet()), tmp_path / "a", metrics={"x": torch.zeros(1)})
    with pytest.raises(TypeError, match="must be a Classifier"):
        save_classifier(ConvNet(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


# --- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("resnet18", {}, ValueError, "Did you mean: timm/resnet18"),
        ("./nothing", {}, ValueError, "no folder and no name: give 'timm/resnet18'"),
        ("timm/resnet81", {}, ValueError, "timm has no classifier 'resnet81'.*close: resnet18"),
        ("torchvision/resnet17", {}, ValueError, "torchvision has no classifier.*resnet18"),
        ("torchvision/fcn_resnet50", {}, ValueError, "torchvision has no classifier"),
        ("timm/test_resnet.nothing", {}, ValueError, r"no weights for .* but for: test_resnet\.r"),
        ("timm/ftp:x", {}, ValueError, "knows the sources hf-hub: and local-dir:"),
        ("timm/resnet18", {"mean": 0.5}, ValueError, "mean= and std= together"),
        ("timm/resnet18", {"pretrained": False, "revision": "a"}, ValueError, "loads none"),
        ("torchvision/resnet18", {"revision": "a"}, ValueError, "give weights="),
        ("torchvision/resnet18", {"in_chans": 1}, ValueError, "take a timm/ model"),
        (3, {}, TypeError, "got int"),
        ("", {}, ValueError, "no folder and no name"),
        ("timm/local-dir:/nowhere", {}, FileNotFoundError, "there is no folder /nowhere"),
        ("timm/resnet18", {"num_classes": "10"}, ValueError, "num_classes must be a positive int"),
        ("timm/resnet18", {"num_classes": 0}, ValueError, "num_classes must be a positive integer"),
        ("timm/resnet18", {"num_classes": True}, ValueError, "num_classes must be a positive int"),
        ("timm/resnet18", {"in_chans": 5}, ValueError, "in_chans must be 1 to 4, got 5"),
        ("timm/resnet18", {"in_chans": "3"}, ValueError, "in_chans must be 1 to 4, got '3'"),
    ],
)
def test_wrong_names_and_options_say_what_there_is(name, options, error, message) -> None:
    with pytest.raises(error, match=message):
        load_classifier(name, **options)


@pytest.mark.parametrize(
    "name", ["timm/resnet18", "timm/hf_hub:nobody/nothing", "hf/nobody/nothing"]
)
def test_the_hub_out_of_reach_is_one_sentence(name, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries again
    with pytest.raises(RuntimeError, match="could not be fetched") as caught:
        load_classifier(name)
    assert "\n" not in str(caught.value)


def test_checkpoints_and_empty_folders_are_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"is a file; give the folder .* are not opened"):
        load_classifier(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_classifier(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [0.1, 0.2], "std": [1.0, 1.0, 1.0]}, "must agree"),
        ({"mean": [0.1, 0.2], "input_size": (3, 8, 8)}, "must agree"),
        ({"std": 0.0}, "std must be positive"),
        ({"mean": float("nan")}, "mean must be one number or one per channel"),
        ({"mean": "abc"}, "mean must be one number or one per channel"),
        ({"mean": [[0.1, 0.2], [0.3]]}, "mean must be one number or one per channel"),
        ({"input_size": (8, 8)}, "input_size must be"),
        ({"input_size": 64}, "input_size must be"),
        ({"input_size": "abc"}, "input_size must be"),
        ({"input_size": (3, 8.0, 8)}, "input_size must be"),
    ],
)
def test_wrong_normalisation(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_classifier(Returns(lambda y: y), **options)


def test_the_demo_network_takes_any_size_and_checks_its_own() -> None:
    assert ConvNet(in_chans=3, num_classes=4)(torch.rand(2, 3, 17, 40)).shape == (2, 4)
    activations = [m for m in ConvNet().modules() if isinstance(m, nn.GELU)]
    assert len(activations) == 4
    with pytest.raises(ValueError, match="width must be at least 1"):
        ConvNet(width=0)
