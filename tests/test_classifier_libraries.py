"""The door against the real libraries: their own preprocessing, heads, label names, files."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torch import nn
from torchvision import models

from lightning_meansparse import load_classifier
from lightning_meansparse.classifier import Classifier, save_classifier
from lightning_meansparse.demo import ConvNet

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
VIT = {**SMALL, "image_size": 32, "patch_size": 16}
LEVIT = {
    "hidden_sizes": [8, 8, 8],
    "num_attention_heads": [1, 1, 1],
    "depths": [1, 1, 1],
    "key_dim": [4, 4, 4],
    "image_size": 32,
}

# Head, fields of its configuration, image processor, its fields.
FAMILIES = {
    "vit": ("ViTForImageClassification", VIT, "ViTImageProcessor", {"size": 32}),
    "imagenet numbers": (
        "ViTForImageClassification",
        VIT,
        "ViTImageProcessor",
        {"size": 32, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    ),
    "no normalisation": (
        "ViTForImageClassification",
        VIT,
        "ViTImageProcessor",
        {"size": 32, "do_normalize": False},
    ),
    "no rescaling": (
        "ViTForImageClassification",
        VIT,
        "ViTImageProcessor",
        {"size": 32, "do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
    ),
    "another factor": (
        "ViTForImageClassification",
        VIT,
        "ViTImageProcessor",
        {"size": 32, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    ),
    "grey": (
        "ViTForImageClassification",
        {**VIT, "num_channels": 1},
        "ViTImageProcessor",
        {"size": 32, "image_mean": [0.1307], "image_std": [0.3081], "do_convert_rgb": False},
    ),
    "teacher of deit": (
        "DeiTForImageClassificationWithTeacher",
        VIT,
        "DeiTImageProcessor",
        {"size": 36, "crop_size": 32},
    ),
    "teacher of levit": (
        "LevitForImageClassificationWithTeacher",
        LEVIT,
        "LevitImageProcessor",
        {"size": {"shortest_edge": 36}, "crop_size": 32},
    ),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 32, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4},
        "ViTImageProcessor",
        {"size": 32},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8] * 4, "depths": [1] * 4},
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 32}},
    ),
    "divided twice": (
        "EfficientNetForImageClassification",
        {"width_coefficient": 0.2, "depth_coefficient": 0.1, "hidden_dim": 256},
        "EfficientNetImageProcessor",
        {"size": 32, "image_std": [0.5, 0.4, 0.3]},
    ),
    "offset": (
        "EfficientNetForImageClassification",
        {"width_coefficient": 0.2, "depth_coefficient": 0.1, "hidden_dim": 256},
        "EfficientNetImageProcessor",
        {
            "size": 32,
            "rescale_factor": 1 / 127.5,
            "rescale_offset": True,
            "do_normalize": False,
            "include_top": False,
        },
    ),
    "blue first": (
        "MobileViTForImageClassification",
        {
            "image_size": 32,
            "hidden_sizes": [8] * 3,
            "neck_hidden_sizes": [8] * 7,
            "num_attention_heads": 2,
        },
        "MobileViTImageProcessor",
        {"size": {"shortest_edge": 36}, "crop_size": 32},
    ),
    "blue first, normalised": (
        "PPLCNetForImageClassification",
        {"scale": 0.25},
        "PPLCNetImageProcessor",
        {"size": {"height": 36, "width": 36}, "crop_size": {"height": 32, "width": 32}},
    ),
}


def head(name: str, fields: dict, **more):
    """A model of transformers whose logits differ clearly from image to image."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{"num_labels": 4, **fields, **more}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(8, fields.get("num_channels", 3), 32, 32))
    return model.eval()


def own_logits(model, pixels: torch.Tensor) -> torch.Tensor:
    output = model(pixels)
    return output.logits if "logits" in output else output.last_hidden_state  # PP-LCNet


def picture(size, seed=0) -> np.ndarray:
    channels, height, width = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels[:, :, 0] if channels == 1 else pixels


def tensor(image: np.ndarray) -> torch.Tensor:
    image = image[:, :, None] if image.ndim == 2 else image
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


# --- The numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        (family, backend)
        for family, (_, _, kind, _) in FAMILIES.items()
        for backend in ("", "Pil")
        if hasattr(transformers, kind + backend)  # PP-LCNet's has none for PIL
    ],
)
def test_logits_are_those_of_transformers_own_preprocessing(tmp_path, family, backend) -> None:
    name, config, kind, fields = FAMILIES[family]
    model = head(name, config)
    model.save_pretrained(tmp_path)
    processor = getattr(transformers, kind + backend)(**fields)
    processor.save_pretrained(tmp_path)

    classifier = load_classifier(tmp_path)
    assert type(classifier.model) is type(model)
    assert classifier.normalisation.startswith(f"transformers' {kind}")
    channels = config.get("num_channels", 3)
    assert classifier.input_size == (channels, 32, 32)

    image = picture(classifier.input_size)
    options = {"images": [image[:, :, None] if channels == 1 else Image.fromarray(image)]}
    if channels == 1:
        options["input_data_format"] = "channels_last"
    given = processor(**options, do_resize=False, do_center_crop=False, return_tensors="pt")
    seen = []
    classifier.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits = classifier(tensor(image))
    torch.testing.assert_close(seen[0], given["pixel_values"], rtol=1e-5, atol=2e-5)
    expected, raw = own_logits(model, given["pixel_values"]), own_logits(model, tensor(image))
    size = expected.abs().max()
    assert (logits - expected).abs().max() < 1e-4 * size
    assert ((logits - raw).abs().max() < 1e-2 * size) == (family == "no normalisation")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_logits_are_those_of_timms_eval_transform(name) -> None:
    classifier = load_classifier(f"timm/{name}", pretrained=False)
    image = picture(classifier.input_size)
    transform = create_transform(
        **resolve_model_data_config(classifier.model) | {"crop_pct": 1.0}, is_training=False
    )
    expected = classifier.model(transform(Image.fromarray(image))[None])
    torch.testing.assert_close(classifier(tensor(image)), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, classifier.model(tensor(image)))


@pytest.mark.parametrize("name", ["squeezenet1_1", "vit_b_32", "inception_v3"])
def test_logits_are_those_of_torchvisions_transforms(name) -> None:
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "inception_v3" else {}
    classifier = load_classifier(f"torchvision/{name}", pretrained=False, **options)
    size = classifier.input_size
    image = picture(size)
    preset = models.get_model_weights(name).DEFAULT.transforms(
        crop_size=size[1], resize_size=size[1]
    )
    expected = classifier.model(preset(Image.fromarray(image))[None])
    torch.testing.assert_close(classifier(tensor(image)), expected, rtol=1e-5, atol=1e-5)


# --- Which normalisation it was -----------------------------------------------------------------


def test_it_says_which_normalisation_it_took(caplog, tmp_path) -> None:
    def told(*args, **options) -> tuple[str, str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="lightning_meansparse"):
            classifier = load_classifier(*args, **options)
        (line,) = caplog.messages
        assert f"normalisation={classifier.normalisation!r}" in repr(classifier)
        return classifier.normalisation, line

    name, line = told("timm/test_resnet", pretrained=False)
    assert name == "timm's pretrained_cfg of test_resnet.r160_in1k"
    assert line == f"timm/test_resnet: mean 0.5, std 0.5, from: {name}"
    name, line = told("torchvision/squeezenet1_1", pretrained=False)
    assert name == "transforms of torchvision's SqueezeNet1_1_Weights.IMAGENET1K_V1"
    assert "mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225" in line
    assert told("timm/test_resnet", pretrained=False, mean=0, std=1)[0] == "given"
    assert told(ConvNet(), mean=0.5)[0] == "given"
    name, line = told(ConvNet())
    assert name == "none"
    assert line.startswith("ConvNet: pixels go in as they are, not normalised")

    save_for_hf(timm.create_model("test_vit"), tmp_path / "timm", safe_serialization=True)
    assert told(tmp_path / "timm")[0] == f"timm's pretrained_cfg of {tmp_path / 'timm'}"
    save_classifier(load_classifier(tmp_path / "timm"), tmp_path / "own")
    assert told(tmp_path / "own")[0] == f"timm's pretrained_cfg of {tmp_path / 'timm'}"
    made = load_classifier(ConvNet())
    caplog.clear()
    assert load_classifier(made) is made
    assert not caplog.messages


def test_blue_first_is_kept_by_our_own_folder_and_by_copies(tmp_path) -> None:
    name, config, kind, fields = FAMILIES["blue first"]
    head(name, config).save_pretrained(tmp_path / "hf")
    getattr(transformers, kind)(**fields).save_pretrained(tmp_path / "hf")
    first = load_classifier(tmp_path / "hf")
    assert first.bgr
    assert "bgr=True" in repr(first)
    save_classifier(first, tmp_path / "own")
    second = load_classifier(tmp_path / "own")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(second(x), first(x))
    assert not torch.allclose(first(x.flip(1)), first(x))
    # Whoever gives the numbers gives them for red first.
    given = load_classifier(tmp_path / "hf", mean=0, std=1)
    torch.testing.assert_close(given(x.flip(1)), first(x))


def test_a_processor_that_is_no_normalisation_is_refused(tmp_path) -> None:
    head("ViTForImageClassification", VIT).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    clusters = [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    for fields, message in [
        ({"image_processor_type": "ImageGPTImageProcessor", "clusters": clusters}, "input_ids"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, r"pixel_values of shape \(1, 256, 768"),
        ({"image_processor_type": "ViTImageProcessor", "image_std": [-1, -1, -1]}, "not .* more"),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.5]}, "give mean="),
        ({"image_processor_type": 7}, "give mean="),
    ]:
        path.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=message):
            load_classifier(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="give mean="):
        load_classifier(tmp_path)
    path.write_text("{}")  # everything is up to the class, which the configuration tells
    assert load_classifier(tmp_path).mean.flatten().tolist() == [0.5, 0.5, 0.5]


def test_code_that_a_folder_brings_is_not_run(tmp_path, monkeypatch) -> None:
    """Nor does anybody ask on the terminal whether it may be, as transformers would."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    auto = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    config = {"model_type": "evil", "auto_map": auto}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="custom code"):
        load_classifier(tmp_path)

    head("ViTForImageClassification", VIT).save_pretrained(tmp_path)
    evil = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Processor"}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(evil))
    with pytest.raises(ValueError, match=r"give mean= and std= .* custom code"):
        load_classifier(tmp_path)
    assert load_classifier(tmp_path, mean=0, std=1).num_classes == 4
    with pytest.raises(SystemExit):
        exec((tmp_path / "evil.py").read_text())


# --- Sizes --------------------------------------------------------------------------------------


def test_the_size_is_the_one_that_the_model_was_built_for(tmp_path) -> None:
    small = load_classifier("timm/test_vit", pretrained=False, img_size=32)
    assert small.input_size == (3, 32, 32)
    assert load_classifier("timm/test_vit", pretrained=False, img_size=(32, 48)).input_size == (
        3,
        32,
        48,
    )
    head("ViTForImageClassification", VIT).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size=32).save_pretrained(tmp_path)
    larger = load_classifier(tmp_path, pretrained=False, image_size=64)
    assert larger.input_size == (3, 64, 64)
    assert larger(torch.rand(1, 3, 64, 64)).shape == (1, 4)
    transformers.ViTImageProcessor(do_resize=False).save_pretrained(tmp_path)
    assert load_classifier(tmp_path).input_size == (3, 32, 32)
    assert load_classifier(tmp_path, mean=0, std=1).input_size == (3, 32, 32)
    sizes = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    transformers.ResNetForImageClassification(sizes).save_pretrained(tmp_path)
    assert load_classifier(tmp_path).input_size is None  # neither of the two files names one


def test_torchvisions_weights_for_larger_images_build_the_larger_model(tmp_path, monkeypatch):
    """Also when the folder that save_classifier wrote builds it again, without the weights."""
    weights = models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1
    state = models.vit_b_16(image_size=384).state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda url, **options: state
    )
    first = load_classifier("torchvision/vit_b_16", weights="IMAGENET1K_SWAG_E2E_V1")
    second = load_classifier(save_classifier(first, tmp_path))
    for classifier in (first, second):
        assert classifier.input_size == (3, 384, 384)
        assert classifier.model.image_size == 384
        assert classifier.labels == tuple(weights.meta["categories"])
        assert torch.equal(classifier.model.conv_proj.weight, state["conv_proj.weight"])


def test_torchvisions_weights_are_named_in_any_way(monkeypatch) -> None:
    known = models.SqueezeNet1_1_Weights
    state = models.squeezenet1_1().state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda url, **options: state
    )
    for chosen in ("DEFAULT", "IMAGENET1K_V1", f"{known.__name__}.DEFAULT", known.DEFAULT):
        found = load_classifier("torchvision/squeezenet1_1", weights=chosen)
        assert found.normalisation == f"transforms of torchvision's {known.IMAGENET1K_V1}"
    for chosen in ("IMAGENET1K_V9", "ResNet18_Weights.DEFAULT", models.ResNet18_Weights.DEFAULT, 3):
        with pytest.raises(
            ValueError, match=r"none of SqueezeNet1_1_Weights: DEFAULT, IMAGENET1K_"
        ):
            load_classifier("torchvision/squeezenet1_1", weights=chosen)
    with pytest.raises(ValueError, match="pretrained=False loads none"):
        load_classifier("torchvision/squeezenet1_1", pretrained=False, weights="DEFAULT")


# --- Heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torchvision/googlenet", {"num_classes": 5, "init_weights": False}),
        ("torchvision/inception_v3", {"num_classes": 5, "init_weights": False}),
        ("timm/deit_tiny_distilled_patch16_224", {"num_classes": 5, "img_size": 32}),
        ("timm/levit_128s", {"num_classes": 5}),
    ],
)
def test_auxiliary_and_distilled_heads_give_logits_in_both_modes(name, options) -> None:
    torch.manual_seed(0)
    classifier = load_classifier(name, pretrained=False, **options)
    x = torch.rand(2, *classifier.input_size)
    own = classifier.model((x - classifier.mean) / classifier.std)
    assert torch.equal(classifier(x), own)
    assert classifier.train()(x).shape == (2, 5)


def test_without_a_head_there_are_no_logits(tmp_path) -> None:
    for name, options in (
        ("timm/test_resnet", {"num_classes": 0}),
        ("timm/vit_small_patch16_224.dino", {}),
    ):
        with pytest.raises(ValueError, match="num_classes"):
            load_classifier(name, pretrained=False, **options)
    features = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(ValueError, match=r"returned \(2, 96\), but has 10 classes"):
        load_classifier(features, num_classes=10)(torch.rand(2, 3, 32, 32))

    head("ViTForImageClassification", VIT).vit.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack classifier\.bias, classifier\.weight"):
        load_classifier(tmp_path)
    assert load_classifier(tmp_path, num_classes=3)(torch.rand(1, 3, 32, 32)).shape == (1, 3)


def test_what_is_no_image_classifier_is_refused(tmp_path) -> None:
    gpt = transformers.ImageGPTConfig(
        vocab_size=3, n_positions=4, n_embd=4, n_layer=1, n_head=1, num_labels=2
    )
    gpt.save_pretrained(tmp_path / "tokens")
    with pytest.raises(ValueError, match="takes input_ids, not images"):
        load_classifier(tmp_path / "tokens", pretrained=False, mean=0, std=1)
    gemma = {"model_type": "shieldgemma2", "architectures": ["ShieldGemma2ForImageClassification"]}
    (tmp_path / "tokens" / "config.json").write_text(json.dumps(gemma))
    with pytest.raises(ValueError, match="takes input_ids, not images"):  # before it is built
        load_classifier(tmp_path / "tokens", pretrained=False)
    transformers.BertConfig(**SMALL).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="a bert model, of which transformers has no image class"):
        load_classifier(tmp_path / "text", pretrained=False)
    config = {"model_type": "timm_wrapper", "architecture": "test_resnet", "num_classes": 5}
    (tmp_path / "text" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks mean, std or input_size; give mean="):
        load_classifier(tmp_path / "text", pretrained=False)


# --- Names of the classes -----------------------------------------------------------------------


def test_label_names_are_kept(tmp_path) -> None:
    named = {0: "cat", 1: "dog", 2: "cow", 3: "hen"}
    head("ViTForImageClassification", VIT, id2label=named).save_pretrained(tmp_path / "hf")
    transformers.ViTImageProcessor(size=32).save_pretrained(tmp_path / "hf")
    first = load_classifier(tmp_path / "hf")
    assert first.labels == ("cat", "dog", "cow", "hen")
    assert load_classifier(save_classifier(first, tmp_path / "own")).labels == first.labels
    assert load_classifier(tmp_path / "hf", num_classes=3).labels is None
    assert load_classifier(tmp_path / "hf", pretrained=False).labels is None
    head("ViTForImageClassification", VIT).save_pretrained(tmp_path / "hf")
    assert load_classifier(tmp_path / "hf").labels is None  # LABEL_0, LABEL_1, …


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"label_names": ["a", "b", "c"]}, ("a", "b", "c")),
        ({"label_names": {"0": "a", "2": "c", "1": "b"}}, ("a", "b", "c")),
        ({"label_names": ["a", "b", "c"], "label_descriptions": {"b": "bee"}}, ("a", "bee", "c")),
        ({"label_names": ["a", "b"]}, None),
        ({"label_names": {"0": "a", "1": "b", "9": "c"}}, None),
        ({}, None),
    ],
)
def test_label_names_of_timm_folders_are_kept(tmp_path: Path, config, labels) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    save_for_hf(model, tmp_path, model_config=config, safe_serialization=True)
    assert load_classifier(tmp_path).labels == labels


def test_imagenet_names_are_taken_where_the_weights_say_imagenet(tmp_path: Path) -> None:
    known = ImageNetInfo()
    save_for_hf(timm.create_model("test_resnet"), tmp_path, safe_serialization=True)
    labels = load_classifier(tmp_path).labels
    assert labels == tuple(known.label_descriptions())
    assert labels[0] == "tench, Tinca tinca"
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("label_names", "label_descriptions"):
        config.pop(key, None)
    config["pretrained_cfg"]["tag"] = "mine"  # a thousand classes of somebody's own
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_classifier(tmp_path).labels is None


def test_wrong_labels_are_refused() -> None:
    assert Classifier(ConvNet(num_classes=2), labels=["a", "b"]).labels == ("a", "b")
    with pytest.raises(ValueError, match="labels has 1 names for 2 classes"):
        Classifier(ConvNet(num_classes=2), labels=["a"])
    for labels in ("ab", [1, 2]):
        with pytest.raises(TypeError, match="labels must be a list of texts"):
            Classifier(ConvNet(num_classes=2), labels=labels)


# --- Folders of the first version ---------------------------------------------------------------


def test_folders_of_the_first_version_still_load(tmp_path: Path) -> None:
    classifier = load_classifier(ConvNet(width=4), mean=0.5, std=0.25)
    path = save_classifier(classifier, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    assert config["format_version"] == 2
    for key in ("bgr", "normalisation", "labels"):
        del config[key]
    path.write_text(json.dumps(config | {"format_version": 1}))
    old = load_classifier(tmp_path)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(old(x), classifier.eval()(x))
    assert (old.bgr, old.labels, old.normalisation) == (False, None, "config.json")


# --- Damaged folders ----------------------------------------------------------------------------


def timm_folder(folder: Path) -> Path:
    save_for_hf(timm.create_model("test_resnet", num_classes=3), folder, safe_serialization=True)
    return folder


def transformers_folder(folder: Path) -> Path:
    head("ViTForImageClassification", VIT).save_pretrained(folder)
    transformers.ViTImageProcessor(size=32).save_pretrained(folder)
    return folder


def own_folder(folder: Path) -> Path:
    return save_classifier(load_classifier(ConvNet(width=4)), folder)


@pytest.mark.parametrize("write", [timm_folder, transformers_folder, own_folder])
@pytest.mark.parametrize("damage", [lambda old: old[:200], lambda old: b"", lambda old: b"\x80no"])
def test_damaged_weights_are_told_with_the_folder(tmp_path, write, damage) -> None:
    folder = write(tmp_path / "model")
    load_classifier(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(ValueError, match=r"model.* header") as caught:
        load_classifier(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("write", "changes", "message"),
    [
        (timm_folder, {"architecture": "nope"}, "Unknown model"),
        (timm_folder, {"architecture": 3}, "AttributeError"),
        (timm_folder, {"architecture": "test_vit"}, "VisionTransformer"),
        (timm_folder, {"model_args": {"nope": 1}}, "nope"),
        (timm_folder, {"model_args": {"layers": [1, 1, 1, 2]}}, "Missing key"),
        (timm_folder, {"architecture": None}, "names neither"),
        (transformers_folder, {"model_type": "nope"}, "nope"),
        (transformers_folder, {"hidden_size": "x"}, "hidden_size"),
        (transformers_folder, {"hidden_size": 16}, "ignore_mismatched_sizes"),
        (transformers_folder, {"num_hidden_layers": 2}, "would be random"),
        (transformers_folder, {"id2label": ["a", "b"]}, "AttributeError"),
    ],
)
def test_a_configuration_that_does_not_fit_is_told_with_the_folder(
    tmp_path, write, changes, message
) -> None:
    folder = write(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        load_classifier(folder)
    assert str(folder) in str(caught.value)


def test_a_folder_without_weights_gives_the_architecture_alone(tmp_path) -> None:
    for write in (timm_folder, transformers_folder):
        folder = write(tmp_path / write.__name__)
        (folder / "model.safetensors").unlink()
        assert load_classifier(folder, pretrained=False).num_classes in (3, 4)
        with pytest.raises(FileNotFoundError, match=r"has no \*\.safetensors"):
            load_classifier(folder)


def test_a_name_is_no_folder_even_where_there_is_one_of_that_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "resnet18").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"timm/resnet18 could not be fetched"):
        load_classifier("timm/resnet18")


def test_timms_default_normalisation_is_called_so(tmp_path) -> None:
    folder = timm_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = None
    (folder / "config.json").write_text(json.dumps(config))
    assert load_classifier(folder).normalisation == f"timm's default, for want of one of {folder}"
