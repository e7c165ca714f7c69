"""A data set through a classifier's own eval transform: timm's, torchvision's, transformers'."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import png, write_parquet

from lightning_meansparse import ImageDataModule, load_classifier
from lightning_meansparse.classifier import Classifier

SHAPES = [(40, 60, 3), (75, 50, 3), (33, 33, 3), (300, 280, 3), (224, 224, 3)]


@pytest.fixture(scope="module")
def images():
    """Photographs, as far as resizing can tell: smooth, with edges, of many sizes."""
    generator = np.random.default_rng(0)
    made = []
    for height, width, channels in SHAPES:
        small = Image.fromarray(generator.integers(0, 256, (9, 7, channels), dtype=np.uint8))
        made.append(small.resize((width, height), Image.Resampling.BICUBIC))
    return made


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    labels = [number % 3 for number in range(len(images))]
    write_parquet(path / "train.parquet", [png(np.asarray(i)) for i in images], labels)
    return path


def through(folder, classifier):
    """Every image in the order of the file, as the module gives it."""
    data = ImageDataModule(folder, classifier=classifier, test_split=None, holdout=0)
    data.setup()
    part = data.parts["train"]
    pixels = torch.stack([part[place][0] for place in np.argsort(part.rows)])
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() < pixels.max() <= 1
    return pixels


def assert_the_models_own(classifier: Classifier, pixels, expected):
    """The classifier's normalised pixels are those of its library's transform."""
    expected = torch.as_tensor(np.stack([np.asarray(image) for image in expected]))
    ordered = pixels.flip(1) if classifier.bgr else pixels
    normalised = (ordered - classifier.mean) / classifier.std
    torch.testing.assert_close(normalised, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"crop_pct": 0.7, "interpolation": "bilinear"},
        {"crop_mode": "squash", "crop_pct": 1.0},
        {"crop_mode": "border", "crop_pct": 0.9},
        {"input_size": (3, 64, 96), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)},
    ],
    ids=str,
)
def test_timm(config, images, folder):
    import timm
    from timm.data import create_transform, resolve_data_config

    model = timm.create_model("test_resnet", pretrained_cfg_overlay=config).eval()
    known = resolve_data_config(model=model)
    classifier = load_classifier(model, **{k: known[k] for k in ("mean", "std", "input_size")})
    real = create_transform(**known, is_training=False)
    pixels = through(folder, classifier)
    expected = [real(image) for image in images]
    assert_the_models_own(classifier, pixels, expected)
    levels = pixels * 255
    assert torch.equal(pixels, levels.round() / 255)  # 8 bits, bit by bit
    with torch.no_grad():
        logits = model(torch.stack(expected))
    torch.testing.assert_close(classifier(pixels), logits, rtol=1e-5, atol=1e-5)


def test_timm_by_name(images, folder):
    expected = through(folder, load_classifier("timm/test_vit", pretrained=False))
    assert torch.equal(through(folder, "timm/test_vit"), expected)


def test_torchvision(images, folder):
    from torchvision.models import ResNet18_Weights

    classifier = load_classifier("torchvision/resnet18", pretrained=False)
    real = ResNet18_Weights.DEFAULT.transforms()
    pixels = through(folder, classifier)
    assert_the_models_own(classifier, pixels, [real(image) for image in images])
    assert torch.equal(pixels, (pixels * 255).round() / 255)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}),
        ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "resample": 3}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 32}, "crop_pct": 0.875}),
        ("BitImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": 32}),
        ("MobileNetV2ImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": 32}),
    ],
)
def test_transformers(kind, options, images, folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        num_labels=3,
    )
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    real = getattr(transformers, kind)(**options)
    real.save_pretrained(tmp_path)
    classifier = load_classifier(f"hf/{tmp_path}")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    expected = [
        processor(images=[image], return_tensors="np")["pixel_values"][0] for image in images
    ]
    pixels = through(folder, classifier)
    assert_the_models_own(classifier, pixels, expected)
    assert torch.equal(pixels, (pixels * 255).round() / 255)
    with torch.no_grad():
        logits = model(torch.as_tensor(np.stack(expected))).logits
    torch.testing.assert_close(classifier(pixels), logits, rtol=1e-5, atol=1e-5)


def test_grey_images_become_what_the_model_takes(tmp_path):
    grey = [np.full((20, 30), 40 * i, np.uint8) for i in range(6)]
    write_parquet(tmp_path / "train.parquet", [png(image) for image in grey], [0, 1, 2] * 2)
    three = through(tmp_path, load_classifier("timm/test_resnet", pretrained=False))
    assert three.shape[1] == 3
    one = through(tmp_path, load_classifier("timm/test_resnet", pretrained=False, in_chans=1))
    assert one.shape[1] == 1
    for number in range(6):
        assert bool((three[number] == 40 * number / 255).all())
        assert bool((one[number] == 40 * number / 255).all())


def test_arrays_go_through_it_when_they_are_read(monkeypatch):
    images = torch.randint(0, 256, (20, 3, 10, 10), dtype=torch.uint8)
    pairs = {"train": (images, torch.arange(20) % 2)}

    def first(**options):
        data = ImageDataModule(pairs, test_split=None, classifier="timm/test_resnet", **options)
        data.setup()
        return data

    eager = first()
    monkeypatch.setattr("lightning_meansparse.data.module.MEMORY_LIMIT", 1000)
    lazy = first()
    assert lazy.parts["train"].pixels.fit is not None
    assert torch.equal(lazy.parts["train"][3][0], eager.parts["train"][3][0])


def test_what_cannot_be_done_is_refused(folder):
    with pytest.raises(ValueError, match="size and classifier both say"):
        ImageDataModule(folder, size=8, classifier="timm/test_resnet")
    own = load_classifier(torch.nn.Conv2d(3, 2, 3), input_size=(3, 8, 8))
    with pytest.raises(ValueError, match=r"comes with no eval transform .* give size="):
        ImageDataModule(folder, test_split=None, classifier=own).setup()
    with pytest.raises(TypeError, match="classifier must be what load_classifier gives"):
        ImageDataModule(folder, test_split=None, classifier=torch.nn.ReLU()).setup()
    floats = {"train": (torch.rand(8, 3, 9, 9), torch.arange(8) % 2)}
    with pytest.raises(ValueError, match="8 bits per channel, got float32"):
        ImageDataModule(floats, test_split=None, classifier="timm/test_resnet").setup()
