"""Data: what comes out is what was stored, each image once, and no part sees another's images."""

import gzip
import io
import json
import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

import lightning_meansparse.data.module as data_module
from lightning_meansparse import ImageDataModule
from lightning_meansparse.data.augment import CropFlip
from lightning_meansparse.data.parts import stratified_order
from lightning_meansparse.data.pixels import decoded

DEMO = Path(__file__).parents[1] / "lightning_meansparse" / "demo" / "fashion_mnist"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def images_and_labels(count: int, seed: int, shape=(28, 28), classes=5):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
    labels = generator.integers(0, classes, count)
    labels[:classes] = np.arange(classes)
    return images, labels.astype(np.uint8)


def write_idx(path: Path, array: np.ndarray, *, zipped: bool) -> None:
    head = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    body = head + array.tobytes()
    path.write_bytes(gzip.compress(body) if zipped else body)


@pytest.fixture(params=[True, False], ids=["gz", "plain"])
def idx(tmp_path: Path, request: pytest.FixtureRequest):
    arrays = {"train": images_and_labels(200, 1), "t10k": images_and_labels(60, 2)}
    ending = ".gz" if request.param else ""
    for name, (images, labels) in arrays.items():
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{ending}", images, zipped=request.param)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte{ending}", labels, zipped=request.param)
    return tmp_path, arrays


def pairs(count=100, classes=5, shape=(1, 8, 8)):
    images, labels = images_and_labels(count, 3, shape, classes)
    train = (torch.from_numpy(images), torch.from_numpy(labels))
    return {"train": train, "test": (train[0][:20], train[1][:20])}


def everything(loader) -> tuple[Tensor, Tensor]:
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def png(array: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, coded: list[bytes], labels: list, names: list[str] | None = None):
    table = pa.table({"image": [{"bytes": c, "path": None} for c in coded], "label": labels})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(table, path)


# --- Which images -----------------------------------------------------------------------------


def test_pixels_are_the_stored_bytes_over_255_and_every_image_comes_once(idx) -> None:
    folder, arrays = idx
    data = ImageDataModule(folder, holdout=0.25, batch_size=16)
    data.setup()
    assert (data.num_classes, data.in_chans) == (5, 1)
    assert data.class_names == ["0", "1", "2", "3", "4"]

    for loader, name in ((data.test_dataloader(), "t10k"), (None, "train")):
        stored, labels = arrays[name]
        if loader is None:
            x, y = everything(data.calibration_dataloader())
            held_x, held_y = everything(data.val_dataloader())
            x, y = torch.cat([x, held_x]), torch.cat([y, held_y])
            rows = np.concatenate([data.parts["train"].rows, data.parts["holdout"].rows])
        else:
            x, y = everything(loader)
            rows = data.parts["test"].rows
        assert sorted(rows.tolist()) == list(range(len(stored)))
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        exact = np.float32(stored[rows]) / np.float32(255)
        assert np.array_equal(x.numpy()[:, 0], exact)
        assert np.array_equal(y.numpy(), labels[rows])


def test_training_and_held_out_images_never_overlap_whatever_the_limits(idx) -> None:
    folder, _ = idx
    for options in ({}, {"limit_train": 50, "limit_holdout": 20, "calibration": 30}):
        data = ImageDataModule(folder, holdout=60, **options)
        data.setup()
        train, held = set(data.parts["train"].rows), set(data.parts["holdout"].rows)
        assert not train & held
        assert len(held) == options.get("limit_holdout", 60)
        assert len(train) == options.get("limit_train", 140)
        x, _ = everything(data.calibration_dataloader())
        assert len(x) == options.get("calibration", 140)
        known, _ = everything(data.train_dataloader())
        seen = {row.numpy().tobytes() for row in known}
        assert {row.numpy().tobytes() for row in x} <= seen


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=300),
    st.integers(0, 2**31),
    st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_every_prefix_of_the_order_is_stratified(labels, seed, share) -> None:
    values = np.array(labels)
    order = stratified_order(values, seed)
    assert sorted(order.tolist()) == list(range(len(values)))
    assert np.array_equal(order, stratified_order(values, seed))
    sizes = Counter(labels)
    cut = round(share * len(values))
    taken = Counter(values[order[:cut]].tolist())
    # Each class is within one of its share at one common threshold: any two classes then agree on
    # the threshold up to one row of either.
    low = max((taken[c] - 1) / n for c, n in sizes.items())
    high = min((taken[c] + 1) / n for c, n in sizes.items())
    assert low < high


def test_balanced_classes_stay_balanced_and_smaller_limits_are_nested() -> None:
    labels = np.repeat(np.arange(10), 100)
    order = stratified_order(labels, 0)
    for cut in (10, 100, 500, 990):
        assert set(np.bincount(labels[order[:cut]])) == {cut // 10}
    large = ImageDataModule(pairs(), holdout=20, limit_train=60)
    small = ImageDataModule(pairs(), holdout=20, limit_train=30)
    large.setup()
    small.setup()
    assert np.array_equal(large.parts["train"].rows[:30], small.parts["train"].rows)


def test_the_division_depends_on_the_seed_alone(idx) -> None:
    folder, _ = idx

    def rows(seed: int, **options):
        data = ImageDataModule(folder, seed=seed, **options)
        torch.rand(1)  # a moved global generator must not matter
        data.setup("fit")
        first = data.parts["holdout"].rows
        data.setup("test")
        assert data.parts["holdout"].rows is first
        return first.tolist(), data.fingerprint

    assert rows(0) == rows(0, batch_size=7)
    assert rows(0)[0] != rows(1)[0]
    assert rows(0)[1] != rows(1)[1]


def test_the_division_is_the_same_on_every_machine() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 0, 1, 0, 2])
    assert stratified_order(labels, 0).tolist() == [7, 0, 6, 4, 1, 9, 2, 3, 8, 5]
    data = ImageDataModule(pairs())
    data.setup()
    assert data.fingerprint == "49f65390e767"


def test_local_data_need_no_further_package(idx, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in (idx[0], DEMO, pairs()):
        ImageDataModule(source).setup()
    folder = tmp_path / "images" / "train" / "a"
    folder.mkdir(parents=True)
    Image.new("L", (2, 2)).save(folder / "0.png")
    with pytest.raises(ImportError, match=r"lightning_meansparse\[hf\]"):
        ImageDataModule(tmp_path / "images").setup()


def test_the_fingerprint_sees_one_pixel_and_one_label() -> None:
    def fingerprint(data) -> str:
        module = ImageDataModule(data)
        module.setup()
        return module.fingerprint

    base = pairs()
    images, labels = base["train"]
    pixel, label = images.clone(), labels.clone()
    pixel[50, 0, 3, 3] ^= 1
    label[50] = (label[50] + 1) % 5
    prints = [
        fingerprint(base),
        *(fingerprint(base | {"train": p}) for p in ((pixel, labels), (images, label))),
    ]
    assert len(set(prints)) == 3
    assert fingerprint(pairs()) == prints[0]
    assert len(prints[0]) == 12


def test_without_a_held_out_part_or_test_split() -> None:
    data = ImageDataModule({"train": pairs()["train"]}, holdout=0, test_split=None)
    data.setup()
    assert data.val_dataloader() == []
    with pytest.raises(RuntimeError, match="test_split=None"):
        data.test_dataloader()
    with pytest.raises(RuntimeError, match="call setup"):
        ImageDataModule(pairs()).train_dataloader()


def test_workers_give_the_same_batches() -> None:
    data = ImageDataModule(pairs(), num_workers=0)
    data.setup()
    expected = everything(data.calibration_dataloader())
    data.num_workers = 1
    assert same(everything(data.calibration_dataloader()), expected)


# --- Augmentation -----------------------------------------------------------------------------


def test_only_training_images_are_augmented() -> None:
    plain, varied = ImageDataModule(pairs()), ImageDataModule(pairs(), augment=True)
    plain.setup()
    varied.setup()
    for name in ("val_dataloader", "test_dataloader", "calibration_dataloader"):
        assert same(everything(getattr(plain, name)()), everything(getattr(varied, name)()))
    x, _ = everything(varied.train_dataloader())
    originals = {image.numpy().tobytes() for image in everything(plain.train_dataloader())[0]}
    assert sum(image.numpy().tobytes() in originals for image in x) < len(x) / 2
    assert plain.fingerprint == varied.fingerprint


def test_crop_and_flip_move_each_image_by_its_own_draw() -> None:
    images = torch.rand(200, 2, 16, 24)
    out = CropFlip()(images)
    assert out.shape == images.shape
    padded = torch.nn.functional.pad(images, (3, 3, 2, 2))
    draws = Counter()
    for image, result in zip(padded, out, strict=True):
        matches = [
            (top, left, flip)
            for top in range(5)
            for left in range(7)
            for flip in (False, True)
            if torch.equal(
                image[:, top : top + 16, left : left + 24].flip(-1)
                if flip
                else image[:, top : top + 16, left : left + 24],
                result,
            )
        ]
        assert len(matches) == 1
        draws[matches[0]] += 1
    assert len(draws) > 40  # of 70 possible ones
    assert {top for top, _, _ in draws} == set(range(5))
    assert {left for _, left, _ in draws} == set(range(7))


def test_augment_takes_callables_and_paths_and_refuses_what_leaves_the_range() -> None:
    for augment in (v2.RandomHorizontalFlip(1.0), "torchvision.transforms.v2.RandomVerticalFlip"):
        data = ImageDataModule(pairs(), augment=augment)
        data.setup()
        assert everything(data.train_dataloader())[0].shape == (90, 1, 8, 8)
    wrong = {
        "leave normalisation": v2.Normalize([0.5], [0.1]),
        "as many channels": v2.Grayscale(3),
    }
    for message, augment in wrong.items():
        data = ImageDataModule(pairs(), augment=augment)
        data.setup()
        with pytest.raises(ValueError, match=message):
            next(iter(data.train_dataloader()))
    with pytest.raises(ValueError, match="cannot be imported"):
        ImageDataModule(pairs(), augment="torchvision.transforms.v2.Nothing")
    with pytest.raises(TypeError, match="augment must be"):
        ImageDataModule(pairs(), augment=3)


# --- Every kind of data set gives the same images ------------------------------------------------


@pytest.fixture(scope="module")
def hugging_face():
    datasets = pytest.importorskip("datasets")
    names = ["ankle boot", "bag", "coat"]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    parts = {}
    for split, count, seed in (("train", 40, 5), ("test", 12, 6)):
        images, labels = images_and_labels(count, seed, (10, 8, 3), 3)
        rows = {"image": [Image.fromarray(i) for i in images], "label": labels.tolist()}
        parts[split] = datasets.Dataset.from_dict(rows, features=features)
    return datasets.DatasetDict(parts), names


def test_all_ways_of_storing_give_the_same_images(hugging_face, tmp_path: Path) -> None:
    stored, names = hugging_face
    stored.save_to_disk(tmp_path / "saved")
    for split, data in stored.items():
        data.to_parquet(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet")
        for index, row in enumerate(data):
            folder = tmp_path / "folder" / split / names[row["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{index:03}.png")
    reference = ImageDataModule(stored, batch_size=9)
    reference.setup()
    assert reference.class_names == names
    assert reference.in_chans == 3
    expected = everything(reference.test_dataloader())
    raw = np.stack([np.asarray(row["image"]) for row in stored["test"]])
    exact = np.float32(raw[reference.parts["test"].rows]).transpose(0, 3, 1, 2) / np.float32(255)
    assert np.array_equal(expected[0].numpy(), exact)

    copy = reference.write_parquet(tmp_path / "copy")
    for path in (tmp_path / "saved", tmp_path / "parquet"):
        data = ImageDataModule(path, batch_size=9)
        data.setup()
        assert data.class_names == names, path
        assert data.fingerprint == reference.fingerprint, path
        assert same(everything(data.test_dataloader()), expected), path
    for path in (tmp_path / "folder", copy):  # in another order
        data = ImageDataModule(path)
        data.setup()
        assert data.class_names == names, path
        found = {x.numpy().tobytes() + bytes([y]) for x, y in data.parts["test"]}
        assert found == {x.numpy().tobytes() + bytes([y]) for x, y in reference.parts["test"]}


def test_images_too_large_for_memory_are_decoded_per_batch(hugging_face, monkeypatch) -> None:
    stored, _ = hugging_face
    expected = ImageDataModule(stored)
    expected.setup()
    monkeypatch.setattr(data_module, "MEMORY_LIMIT", 1000)
    lazy = ImageDataModule(stored)
    lazy.setup()
    assert type(lazy.parts["train"].pixels).__name__ == "CodedPixels"
    for name in ("val_dataloader", "test_dataloader", "calibration_dataloader"):
        assert same(everything(getattr(lazy, name)()), everything(getattr(expected, name)()))


def test_the_copy_that_write_parquet_makes_is_exact_and_atomic(idx, tmp_path: Path) -> None:
    folder, _ = idx
    names = ["a", "b", "c", "d", "e"]
    small = ImageDataModule(
        folder, limit_train=30, limit_holdout=10, limit_test=20, class_names=names
    )
    target = small.write_parquet(tmp_path / "new" / "copy")
    assert sorted(file.name for file in target.iterdir()) == ["test.parquet", "train.parquet"]
    copy = ImageDataModule(target)
    copy.setup()
    assert copy.class_names == names
    found, expected = (
        {(image.numpy().tobytes(), label) for image, label in data.parts["test"]}
        for data in (copy, small)
    )
    assert found == expected
    assert len(copy.parts["train"]) + len(copy.parts["holdout"]) == 40


def test_the_demo_data_are_stratified_named_and_small() -> None:
    data = ImageDataModule(DEMO)
    data.setup()
    assert data.class_names[0] == "T-shirt/top"
    assert data.class_names[9] == "Ankle boot"
    counts = np.bincount(np.concatenate([data.parts["train"].labels, data.parts["holdout"].labels]))
    assert set(counts) == {200}
    assert set(np.bincount(data.parts["test"].labels)) == {100}
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 2_000_000
    assert data.parts["train"][0][0].shape == (1, 28, 28)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_demo_data_are_images_of_the_original() -> None:
    demo = ImageDataModule(DEMO, holdout=0)
    demo.setup()
    for part, name, start in (("train", "train", 16), ("test", "t10k", 16)):
        packed = gzip.decompress((DEBIAN / f"{name}-images-idx3-ubyte.gz").read_bytes())[start:]
        labels = gzip.decompress((DEBIAN / f"{name}-labels-idx1-ubyte.gz").read_bytes())[8:]
        original = {packed[i * 784 : (i + 1) * 784]: label for i, label in enumerate(labels)}
        for image, label in demo.parts[part]:
            assert original[(image * 255).round().to(torch.uint8).numpy().tobytes()] == label


# --- Images of many kinds -----------------------------------------------------------------------


def test_channels_and_depths_are_kept() -> None:
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    for mode, channels in (
        ("L", 1),
        ("1", 1),
        ("LA", 2),
        ("RGB", 3),
        ("P", 3),
        ("RGBA", 4),
        ("CMYK", 3),
    ):
        converted = grey.convert(mode)
        array = decoded(converted, None, where="image 0")
        assert array.shape == (channels, 3, 4), mode
        assert array.dtype == np.uint8
    deep = np.array([[0, 1, 65535]], np.uint16)
    assert np.array_equal(decoded(Image.fromarray(deep), None, where="x")[0], deep)
    clear = grey.convert("P")
    clear.info["transparency"] = 0
    assert decoded(clear, None, where="x").shape == (4, 3, 4)
    for image in (Image.new("F", (2, 2)), Image.new("I", (2, 2)), Image.new("LAB", (2, 2))):
        with pytest.raises(ValueError, match=r"image 7 of .* has Pillow's mode"):
            decoded(image, None, where="image 7 of split 'train'")


def test_conversion_refuses_to_invent_colours() -> None:
    assert decoded(Image.new("RGBA", (2, 2), (1, 2, 3, 255)), 3, where="x")[:, 0, 0].tolist() == [
        1,
        2,
        3,
    ]
    with pytest.raises(ValueError, match="transparent pixels"):
        decoded(Image.new("RGBA", (2, 2), (1, 2, 3, 254)), 3, where="x")
    with pytest.raises(ValueError, match="16 bits"):
        decoded(Image.fromarray(np.zeros((2, 2), np.uint16)), 3, where="x")


def test_sixteen_bit_images_keep_their_values(tmp_path: Path) -> None:
    deep = np.arange(40 * 12, dtype=np.uint16).reshape(40, 3, 4) * 136
    write_parquet(tmp_path / "train.parquet", [png(i) for i in deep], [0, 1] * 20)
    data = ImageDataModule(tmp_path, test_split=None, holdout=4)
    data.setup()
    x, _ = everything(data.calibration_dataloader())
    rows = data.parts["train"].rows
    assert np.array_equal(x.numpy()[:, 0], np.float32(deep[rows]) / np.float32(65535))
    again = ImageDataModule(data.write_parquet(tmp_path / "copy"), test_split=None, holdout=4)
    again.setup()
    assert again.parts["train"].pixels.read(np.arange(1)).dtype == np.uint16


def test_different_sizes_and_channels_name_what_there_is(tmp_path: Path) -> None:
    wide = [png(np.full((8, 8, 3), i, np.uint8)) for i in range(19)]
    write_parquet(
        tmp_path / "a" / "train.parquet", [*wide, png(np.zeros((8, 6, 3), np.uint8))], [0, 1] * 10
    )
    data = ImageDataModule(tmp_path / "a", test_split=None)
    with pytest.raises(ValueError, match=r"8x8 in 19 images, 8x6 in 1 images.*give size="):
        data.setup()
    assert not data.parts
    data = ImageDataModule(tmp_path / "a", test_split=None, size=(4, 6))
    data.setup()
    assert everything(data.train_dataloader())[0].shape == (18, 3, 4, 6)

    write_parquet(
        tmp_path / "b" / "train.parquet", [*wide, png(np.zeros((8, 8), np.uint8))], [0, 1] * 10
    )
    with pytest.raises(ValueError, match=r"3 channels in 19 images, 1 channels in 1.*channels="):
        ImageDataModule(tmp_path / "b", test_split=None).setup()
    data = ImageDataModule(tmp_path / "b", test_split=None, channels=3)
    data.setup()
    assert data.in_chans == 3


def test_size_covers_and_cuts_the_centre() -> None:
    images = torch.zeros(20, 1, 8, 16)
    images[..., 4:12] = 1  # the centre square
    pair = (images, torch.arange(20) % 2)
    data = ImageDataModule({"train": pair}, size=8, test_split=None)
    data.setup()
    assert torch.equal(everything(data.train_dataloader())[0], torch.ones(18, 1, 8, 8))
    data = ImageDataModule({"train": pair}, size=32, test_split=None)
    data.setup()
    x, _ = everything(data.train_dataloader())
    assert x.shape == (18, 1, 32, 32)
    assert x.min() >= 0
    assert x.max() <= 1


# --- Errors -------------------------------------------------------------------------------------


def broken(**changes):
    base = pairs()
    images, labels = base["train"]
    return base | {"train": (changes.get("images", images), changes.get("labels", labels))}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train_split": "training"}, ValueError, "train_split='training' .* has: train, test"),
        ({"test_split": "validation"}, ValueError, "test_split='validation' .* has: train, test"),
        ({"holdout": 100}, ValueError, "must leave at least one of the 100 images"),
        ({"holdout": 1.0}, ValueError, "share must be in"),
        ({"holdout": -1}, ValueError, "must leave"),
        ({"holdout": "a"}, TypeError, "holdout must be a share"),
        ({"limit_test": 21}, ValueError, "limit_test=21, but the test split has 20 images"),
        ({"limit_train": 91}, ValueError, "limit_train=91, but the training part has 90"),
        ({"limit_holdout": 0}, ValueError, "limit_holdout=0, but the held-out part has 10"),
        ({"calibration": 91}, ValueError, "calibration=91, but the training part has 90"),
        ({"class_names": ["a", "b"]}, ValueError, "go up to 4, but there are 2 classes"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"channels": 2}, ValueError, "channels must be"),
        ({"size": 0}, ValueError, "size must be"),
        ({"size": (8,)}, ValueError, "size must be"),
        ({"size": (8.0, 8.0)}, ValueError, "size must be"),
        ({"revision": "main"}, ValueError, "revision='main' is for the Hub"),
    ],
)
def test_wrong_arguments(options, error, message) -> None:
    with pytest.raises(error, match=message):
        ImageDataModule(pairs(), **options).setup()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (broken(labels=torch.full((100,), -1)), ValueError, "100 of 100 labels .* negative"),
        (broken(labels=torch.rand(100)), TypeError, "must be class numbers or names"),
        (broken(images=torch.randn(100, 1, 8, 8)), ValueError, r"must be in \[0, 1\]"),
        (broken(images=torch.rand(100, 8, 8)), ValueError, r"images \(N, C, H, W\)"),
        (broken(images=torch.zeros(100, 1, 8, 8).int()), TypeError, "float, uint8 or uint16"),
        (broken(images=torch.zeros(100, 5, 8, 8)), ValueError, "1 to 4 channels"),
        (broken(images=torch.zeros(100, 1, 9, 8)), ValueError, "differ in shape between splits"),
        ({"train": 3}, TypeError, "must be a datasets.Dataset or a pair"),
        (3, TypeError, "dataset must be a Hub id"),
        ("./nothing", FileNotFoundError, "does not exist"),
    ],
)
def test_wrong_data(data, error, message) -> None:
    with pytest.raises(error, match=message):
        ImageDataModule(data).setup()


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds none of"):
        ImageDataModule(tmp_path).setup()
    images = tmp_path / "train-images-idx3-ubyte"
    write_idx(images, np.zeros((3, 2, 2), np.uint8), zipped=False)
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        ImageDataModule(tmp_path, test_split=None).setup()
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3, np.uint8), zipped=False)
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut off"):
        ImageDataModule(tmp_path, test_split=None).setup()
    images.write_bytes(b"\0\0\x0d\x01aaaa")
    with pytest.raises(ValueError, match="no IDX file of bytes"):
        ImageDataModule(tmp_path, test_split=None).setup()


def test_wrong_columns_list_the_right_ones(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [png(np.zeros((2, 2), np.uint8))] * 4, [0, 1] * 2)
    for options, message in (
        ({"image_key": "img"}, "image_key='img' is no column .* has: image, label"),
        ({"label_key": "fine"}, "label_key='fine' is no column .* has: image, label"),
        ({"image_key": "label"}, "must hold coded images"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ImageDataModule(tmp_path, test_split=None, **options).setup()


def test_names_as_labels_become_sorted_classes(tmp_path: Path) -> None:
    coded = [png(np.full((2, 2), i, np.uint8)) for i in range(12)]
    write_parquet(tmp_path / "train.parquet", coded, ["dog", "cat", "owl"] * 4)
    write_parquet(tmp_path / "test.parquet", coded[:2], ["owl", "dog"])
    data = ImageDataModule(tmp_path, holdout=3)
    data.setup()
    assert data.class_names == ["cat", "dog", "owl"]
    assert sorted(data.parts["test"].labels.tolist()) == [1, 2]
    write_parquet(tmp_path / "test.parquet", coded[:2], ["owl", "eel"])
    with pytest.raises(ValueError, match=r"names that training does not: \['eel'\]"):
        ImageDataModule(tmp_path, holdout=3).setup()


def test_unlabelled_test_splits_are_refused_by_name(hugging_face) -> None:
    stored, _ = hugging_face
    import datasets

    hidden = stored["test"].map(lambda row: {"label": -1})
    data = datasets.DatasetDict(train=stored["train"], test=hidden)
    with pytest.raises(ValueError, match="12 of 12 labels of test_split='test' are negative"):
        ImageDataModule(data).setup()


def test_the_hub_out_of_reach_is_one_sentence(monkeypatch) -> None:
    pytest.importorskip("datasets")
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)  # else it tries again for long
    with pytest.raises(RuntimeError, match="no local path and the Hub did not give it") as caught:
        ImageDataModule("nobody/nothing").prepare_data()
    assert "\n" not in str(caught.value)


def test_ids_are_no_class_numbers():
    images = torch.zeros(20, 1, 4, 4)
    ids = torch.arange(20) % 2 * 10**9
    with pytest.raises(ValueError, match="labels must be class numbers, got 1000000000"):
        ImageDataModule({"train": (images, ids)}, test_split=None).setup()
