"""Columns are found, classes come in the model's order, corrupt images are named."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_data import everything, images_and_labels, pairs, png, same, write_parquet
from torch import nn

from lightning_meansparse import ImageDataModule, load_classifier

datasets = pytest.importorskip("datasets")


def classifier(labels):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, len(labels)))
    loaded = load_classifier(model, input_size=(1, 8, 8))
    loaded.labels, loaded.num_classes = tuple(labels), len(labels)
    return loaded


# --- Columns ------------------------------------------------------------------------------------


def renamed(path, **names):
    stored = pq.read_table(path)
    metadata = json.loads((stored.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    for old, new in names.items():
        if old in features:
            features[new] = features.pop(old)
    stored = stored.rename_columns([names.get(name, name) for name in stored.column_names])
    pq.write_table(stored.replace_schema_metadata({"huggingface": json.dumps(metadata)}), path)


def test_columns_are_found_where_there_is_one_and_asked_for_where_there_are_more(tmp_path):
    coded = [png(np.full((4, 4), i, np.uint8)) for i in range(20)]
    path = tmp_path / "train.parquet"
    write_parquet(path, coded, [0, 1] * 10, ["cat", "dog"])
    expected = ImageDataModule(tmp_path, test_split=None)
    expected.setup()
    renamed(path, image="img", label="species")
    found = ImageDataModule(tmp_path, test_split=None)
    found.setup()
    assert found.fingerprint == expected.fingerprint
    assert found.class_names == ["cat", "dog"]
    loaded = datasets.DatasetDict(train=datasets.Dataset.from_parquet(str(path)))
    loaded = loaded.cast_column("img", datasets.Image())
    again = ImageDataModule(loaded, test_split=None)
    again.setup()
    assert again.fingerprint == expected.fingerprint
    with pytest.raises(ValueError, match=r"label_key='img' .* is a column of images"):
        ImageDataModule(tmp_path, test_split=None, label_key="img").setup()
    # A second candidate: then it is asked.
    stored = pq.read_table(path)
    two = stored.append_column("photo", stored.column("img"))
    pq.write_table(two.append_column("breed", stored.column("species")), path)
    with pytest.raises(ValueError, match="perhaps image_key='img' or 'photo'"):
        ImageDataModule(tmp_path, test_split=None).setup()
    # The names in the file make species the only column of classes.
    chosen = ImageDataModule(tmp_path, test_split=None, image_key="photo")
    chosen.setup()
    assert chosen.fingerprint == expected.fingerprint


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_files_need_no_metadata_however_they_are_read(struct, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.0)
    coded = [png(np.full((4, 4), 10 * i, np.uint8)) for i in range(20)]
    column = [{"bytes": each, "path": None} for each in coded] if struct else coded
    table = pa.table({"image": column, "label": ["cat", "dog"] * 10})
    pq.write_table(table, tmp_path / "train.parquet")

    def pixels(**options):
        data = ImageDataModule(tmp_path, test_split=None, holdout=0.25, **options)
        data.setup()
        assert data.class_names == ["cat", "dog"]
        parts = [data.parts[part] for part in ("train", "holdout")]
        return sorted((y, x.numpy().tobytes()) for part in parts for x, y in part)

    small = pixels()
    assert len(small) == 20
    assert pixels(streaming=True, class_names=["cat", "dog"]) == small
    monkeypatch.setattr("lightning_meansparse.data.sources.MEMORY_LIMIT", 0)
    assert pixels() == small


# --- Classes ------------------------------------------------------------------------------------


def named(names, count=20):
    images, labels = images_and_labels(count, 1, (8, 8), len(names))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    rows = {"image": [Image.fromarray(i) for i in images], "label": labels.tolist()}
    return datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features))


def by_image(data):
    """The name of the class of every image."""
    parts = [data.parts[part] for part in ("train", "holdout")]
    return {x.numpy().tobytes(): data.class_names[y] for part in parts for x, y in part}


def test_classes_in_another_order_get_the_models_numbers():
    stored = named(["cat", "dog", "owl"])
    plain = ImageDataModule(stored, test_split=None)
    plain.setup()
    ordered = ImageDataModule(stored, test_split=None, class_names=["owl", "cat", "eel", "dog"])
    ordered.setup()
    assert ordered.num_classes == 4
    assert by_image(ordered) == by_image(plain)
    assert {y for _, y in ordered.parts["train"]} == {0, 1, 3}
    with pytest.raises(ValueError, match="are not those of the data set"):
        ImageDataModule(stored, test_split=None, class_names=["owl", "cat"]).setup()


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        (["Cat", "dog", "barn_owl, Tyto alba"], {"cat": 0, "dog": 1, "barn owl": 2}),
        (["dog", "eel", "barn owl, Tyto alba", "CAT"], {"cat": 3, "dog": 0, "barn owl": 2}),
    ],
)
def test_a_classifiers_labels_decide_the_order(labels, numbers, monkeypatch):
    monkeypatch.setattr("lightning_meansparse.data.module.eval_transform", lambda model: None)
    stored = named(["cat", "dog", "barn owl"])
    plain, ordered = (
        ImageDataModule(stored, test_split=None, classifier=model)
        for model in (None, classifier(labels))
    )
    plain.setup()
    ordered.setup()
    names = by_image(plain)
    for part in ordered.parts.values():
        for image, label in part:
            assert label == numbers[names[image.numpy().tobytes()]]


def test_classes_that_are_not_the_models_are_refused(monkeypatch):
    monkeypatch.setattr("lightning_meansparse.data.module.eval_transform", lambda model: None)
    stored = named(["cat", "dog", "owl"])
    for labels in (["cat", "dog", "eel"], ["cat", "dog, owl"], ["n01", "n02", "n03"]):
        with pytest.raises(ValueError, match="are not the classifier's"):
            ImageDataModule(stored, test_split=None, classifier=classifier(labels)).setup()
    own = ["cat", "dog", "owl"]
    told = ImageDataModule(
        stored, test_split=None, class_names=own, classifier=classifier(["a", "b", "c"])
    )
    told.setup()
    assert told.class_names == own


def test_test_labels_in_another_order_are_numbered_as_training_ones():
    train, test = named(["cat", "dog", "owl"]), named(["owl", "cat", "dog"])
    data = ImageDataModule(datasets.DatasetDict(train=train["train"], test=test["train"]))
    data.setup()
    own = {np.asarray(row["image"]).tobytes(): row["label"] for row in test["train"]}
    for image, label in data.parts["test"]:
        stored = own[(image * 255).round().to(torch.uint8).numpy().tobytes()]
        assert data.class_names[label] == ["owl", "cat", "dog"][stored]


# --- Corrupt images -----------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path):
    generator = np.random.default_rng(0)
    coded = [png(generator.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(30)]
    good = list(coded)
    coded[3] = coded[3][: len(coded[3]) // 2]
    coded[7] = b"no image at all"
    coded[11] = coded[11][:40] + b"\0\0\0\0" + coded[11][44:]
    write_parquet(tmp_path / "train.parquet", coded, [0, 1, 2] * 10)
    return tmp_path, good, [3, 7, 11]


def test_corrupt_images_are_named_and_skipped_only_when_asked(broken, caplog):
    folder, good, bad = broken
    with pytest.raises(
        ValueError, match=r"image (3|7|11) of split 'train' cannot be decoded: "
    ) as e:
        ImageDataModule(folder, test_split=None).setup()
    assert "skip_corrupt=True" in str(e.value)
    data = ImageDataModule(folder, test_split=None, skip_corrupt=True, holdout=9)
    data.setup()
    assert data.skipped["train"].tolist() == bad
    assert "3 images cannot be decoded and are left out, rows [3, 7, 11]" in caplog.text
    rows = np.concatenate([data.parts["train"].rows, data.parts["holdout"].rows])
    assert sorted(rows.tolist()) == [row for row in range(30) if row not in bad]
    assert len(data.parts["holdout"]) == 9
    for part in data.parts.values():
        for row, (image, label) in zip(part.rows, part, strict=True):
            assert png((image * 255).round().to(torch.uint8).numpy()[0]) == good[row]
            assert label == row % 3
    loaded = datasets.DatasetDict(
        train=datasets.Dataset.from_parquet(str(folder / "train.parquet"))
    )
    loaded = loaded.cast_column("image", datasets.Image())
    again = ImageDataModule(loaded, test_split=None, skip_corrupt=True, holdout=9)
    again.setup()
    assert again.fingerprint == data.fingerprint


def test_the_file_of_a_corrupt_image_is_named(tmp_path):
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    for number in range(4):
        Image.new("L", (4, 4), number).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"image 2 of split 'train' \(.*a.2\.png\) cannot be"):
        ImageDataModule(tmp_path, test_split=None, holdout=0).setup()
    data = ImageDataModule(tmp_path, test_split=None, holdout=0, skip_corrupt=True)
    data.setup()
    assert data.skipped["train"].tolist() == [2]
    for file in folder.iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="no image that can be decoded"):
        ImageDataModule(tmp_path, test_split=None, holdout=0, skip_corrupt=True).setup()


def test_sound_data_are_the_same_with_skip_corrupt():
    one, other = ImageDataModule(pairs()), ImageDataModule(pairs(), skip_corrupt=True)
    one.setup()
    other.setup()
    assert one.fingerprint == other.fingerprint
    assert not other.skipped
    assert same(everything(one.test_dataloader()), everything(other.test_dataloader()))
