"""Streams: every image once, on one side of the division, whatever the shards and processes."""

import io

import numpy as np
import pytest
import torch
from hub import TOKEN
from PIL import Image
from sweeps import sweep_of, trainer
from test_data import everything, png, write_parquet
from torch import nn

from lightning_meansparse import ImageDataModule, find_sites
from lightning_meansparse.callback.batches import given_data
from lightning_meansparse.data.stream import StreamPart
from lightning_meansparse.moments import ChannelMoments
from lightning_meansparse.surgery import calibrate_, operators, sparsify_

datasets = pytest.importorskip("datasets")

COUNT = 157
SHARDS = (3, 70, 1, 0, 60, 23)  # uneven, one of them empty


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """The library waits for its threads at the end of every shuffled pass."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.0)


def image(number):
    return np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    start = 0
    for place, count in enumerate(SHARDS):
        numbers = range(start, start + count)
        write_shard(path / f"train-{place:05}-of-{len(SHARDS):05}.parquet", numbers)
        start += count
    assert start == COUNT
    write_shard(path / "test.parquet", range(1000, 1040))
    return path


def write_shard(path, numbers):
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list("abc"))
    )
    rows = {
        "image": [{"bytes": png(image(n)), "path": None} for n in numbers],
        "label": [n % 3 for n in numbers],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def streamed(folder, **options):
    defaults = {"streaming": True, "holdout": 0.25, "batch_size": 16}
    data = ImageDataModule(folder, **{**defaults, **options})
    data.setup()
    return data


def numbers_of(images):
    """Which images these are."""
    known = {(image(n) / np.float32(255)).tobytes(): n for n in [*range(COUNT), *range(1000, 1040)]}
    return [known[pixels.numpy()[0].tobytes()] for pixels in images]


def test_parts_hold_every_image_once_and_share_none(folder):
    data = streamed(folder)
    assert data.class_names == ["a", "b", "c"]
    assert (data.num_classes, data.in_chans) == (3, 1)
    found = {}
    for name in ("train", "val", "test"):
        images, labels = everything(getattr(data, f"{name}_dataloader")())
        found[name] = numbers_of(images)
        assert labels.tolist() == [n % 3 for n in found[name]]
        assert len(set(found[name])) == len(found[name])
    assert sorted(found["train"] + found["val"]) == list(range(COUNT))
    assert sorted(found["test"]) == list(range(1000, 1040))
    assert 20 < len(found["val"]) < 60  # a quarter, by the hash
    calibration, _ = everything(data.calibration_dataloader())
    assert sorted(numbers_of(calibration)) == sorted(found["train"])


def test_who_is_held_out_depends_on_the_image_and_the_seed_alone(folder, tmp_path):
    def held(data):
        return sorted(numbers_of(everything(data.val_dataloader())[0]))

    first = held(streamed(folder))
    assert held(streamed(folder)) == first
    assert held(streamed(folder, seed=1)) != first
    write_shard(tmp_path / "train.parquet", range(COUNT - 1, -1, -1))  # one shard, backwards
    write_shard(tmp_path / "test.parquet", range(1000, 1040))
    assert held(streamed(tmp_path)) == first
    fewer = streamed(folder, limit_holdout=7, limit_test=9)
    assert set(held(fewer)) < set(first)
    assert len(held(fewer)) == 7
    assert len(fewer.parts["test"]) == 9
    # Held-out images that are not kept are not trained on either.
    train = numbers_of(everything(fewer.train_dataloader())[0])
    assert not set(train) & set(first)
    assert len(train) == COUNT - len(first)


def test_copies_of_one_image_are_on_one_side(tmp_path):
    write_shard(tmp_path / "train.parquet", [n // 5 for n in range(150)])
    data = streamed(tmp_path, test_split=None)
    train, held = (
        set(numbers_of(everything(loader)[0]))
        for loader in (data.train_dataloader(), data.val_dataloader())
    )
    assert train
    assert held
    assert not train & held


def test_epochs_differ_and_can_be_had_again(folder):
    def epochs(**options):
        loader = streamed(folder, **options).train_dataloader()
        return [numbers_of(everything(loader)[0]) for _ in range(3)]

    one, two, three = epochs()
    assert sorted(one) == sorted(two) == sorted(three)
    assert one != two != three
    assert epochs() == [one, two, three]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_share_an_epoch(folder):
    data = streamed(folder, num_workers=2)
    alone = streamed(folder)
    loader = data.train_dataloader()
    first, second = (numbers_of(everything(loader)[0]) for _ in range(2))
    everyone = sorted(numbers_of(everything(alone.train_dataloader())[0]))
    # With `even`, an odd last one is left out; each epoch another.
    assert set(first) <= set(everyone)
    assert len(first) == len(set(first)) == len(everyone) // 2 * 2
    assert first != second
    assert sorted(numbers_of(everything(data.calibration_dataloader())[0])) == everyone


@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_share_a_stream(folder, world):
    part = streamed(folder).parts["train"]
    assert isinstance(part, StreamPart)
    everyone = sorted(numbers_of(x for x, _ in part))
    shares = [numbers_of(x for x, _ in part.for_rank(rank, world)) for rank in range(world)]
    assert sorted(n for share in shares for n in share) == everyone
    part.even = part.shuffle = True
    shares = [numbers_of(x for x, _ in part.for_rank(rank, world)) for rank in range(world)]
    assert {len(share) for share in shares} == {len(everyone) // world}
    flat = [n for share in shares for n in share]
    assert len(flat) == len(set(flat))
    part.limit = 10
    assert (
        sum(len(list(part.for_rank(rank, world))) for rank in range(world)) == 10 // world * world
    )


class Rank:
    def __init__(self, rank, world):
        self.global_rank, self.world_size = rank, world


@pytest.mark.parametrize("world", [1, 2, 5])
def test_statistics_are_weighted_by_count(folder, world):
    """The moments that ranks with different numbers of images merge are those of all images."""
    data = streamed(folder, holdout=0.0, test_split=None)
    loader = data.calibration_dataloader()
    merged, counts = ChannelMoments((1, 8, 8)), []
    for rank in range(world):
        share = given_data(lambda: loader, "dataloader=", Rank(rank, world), None)
        own = ChannelMoments((1, 8, 8))
        for images, _ in share.batches():
            own.update(images)
        counts.append(own.count)
        merged.merge(own)
        assert torch.equal(share.example()[0][:1], next(iter(loader))[0][:1])
    assert sum(counts) == COUNT
    assert world == 1 or len(set(counts)) == 2
    every = torch.stack([torch.from_numpy(image(n))[None] for n in range(COUNT)]).double() / 255
    torch.testing.assert_close(merged.mean, every.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(merged.var, every.var(0, correction=0), rtol=0, atol=1e-6)
    some = [given_data(lambda: loader, "dataloader=", Rank(r, world), 2) for r in range(world)]
    assert sum(len(images) for share in some for images, _ in share.batches()) == 32


def test_a_network_is_calibrated_on_the_whole_stream(folder):
    data = streamed(folder, holdout=0.0, test_split=None)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU()).eval()
    sparsify_(net, find_sites(net, torch.rand(2, 1, 8, 8)), alpha=0.2)
    calibrate_(net, data.calibration_dataloader())
    (op,) = operators(net).values()
    every = torch.stack([torch.from_numpy(image(n) / np.float32(255))[None] for n in range(COUNT)])
    seen = net[0](every).double()
    torch.testing.assert_close(
        op.mean.flatten().double(), seen.mean((0, 2, 3)), rtol=1e-5, atol=1e-6
    )
    var = seen.var((0, 2, 3), correction=0)
    torch.testing.assert_close(op.var.flatten().double(), var, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_sweep_calibrates_on_a_stream_and_measures_numbered_images(folder, tmp_path):
    data = streamed(folder, limit_holdout=12, limit_test=10, calibration=50)
    sweep = sweep_of(alphas=[0.3], output=tmp_path)
    run = trainer()
    run.validate(sweep, data, verbose=False)
    run.test(sweep, data, verbose=False)
    assert sweep.calibration["images"] == 50
    assert {s.n for s in sweep.summaries["held-out"]} == {12}
    assert {s.n for s in sweep.summaries["test"]} == {10}


def test_corrupt_images_of_a_stream(tmp_path):
    coded = [png(image(n)) for n in range(30)]
    coded[5] = coded[5][:60]
    write_parquet(tmp_path / "train.parquet", coded, [0, 1, 2] * 10)
    options = {"test_split": None, "class_names": ["a", "b", "c"], "holdout": 0.0}
    loaded = datasets.load_dataset(
        "parquet",
        data_files={"train": str(tmp_path / "train.parquet")},
        features=datasets.Features(image=datasets.Image(), label=datasets.Value("int64")),
        streaming=True,
    )
    with pytest.raises(ValueError, match="training image 5 of the stream of split 'train' cannot"):
        everything(streamed(loaded, **options).calibration_dataloader())
    some = streamed(loaded, skip_corrupt=True, **options)
    found = numbers_of(everything(some.calibration_dataloader())[0])
    assert found == [n for n in range(30) if n != 5]
    part = some.parts["train"]
    part.even = True
    with pytest.raises(ValueError, match="different numbers of training images"):
        list(part.for_rank(0, 2))


def test_other_kinds_of_streams(folder, tmp_path):
    expected = streamed(folder)
    files = {name: [str(f) for f in sorted(folder.glob(f"{name}*"))] for name in ("train", "test")}
    plain = datasets.load_dataset("parquet", data_files=files)
    plain.save_to_disk(tmp_path / "saved")
    for source in (plain, tmp_path / "saved", plain["train"].to_iterable_dataset(num_shards=4)):
        mapping = {"train": source, "test": plain["test"]}
        data = streamed(mapping if isinstance(source, datasets.IterableDataset) else source)
        found = sorted(numbers_of(everything(data.train_dataloader())[0]))
        assert found == sorted(numbers_of(everything(expected.train_dataloader())[0]))
    for number in range(12):
        file = tmp_path / "folder" / "train" / "abc"[number % 3] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(png(image(number)))).save(file)
    data = streamed(tmp_path / "folder", test_split=None, holdout=0.5)
    train, held = (
        numbers_of(everything(loader)[0])
        for loader in (data.train_dataloader(), data.val_dataloader())
    )
    assert sorted(train + held) == list(range(12))
    assert data.class_names == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"holdout": 10}, ValueError, "of a stream a share is held out"),
        ({"holdout": 1.0}, ValueError, "share must be in"),
        ({"train_split": "training"}, ValueError, "has: test, train"),
        ({"holdout": 1e-9}, ValueError, "has no images to hold out"),
    ],
)
def test_wrong_arguments(folder, options, error, message):
    with pytest.raises(error, match=message):
        streamed(folder, **options)


def test_wrong_streams(folder, tmp_path):
    with pytest.raises(TypeError, match="must be of Hugging Face datasets to be streamed"):
        streamed({"train": (torch.rand(4, 1, 8, 8), torch.arange(4))}, test_split=None)
    with pytest.raises(ValueError, match="streaming=False"):
        streamed(folder).write_parquet(tmp_path)
    files = {name: str(folder / "test.parquet") for name in ("train", "test")}
    unnamed = datasets.load_dataset("parquet", data_files=files, streaming=True)
    unnamed = unnamed.cast_column("label", datasets.Value("int64"))
    with pytest.raises(ValueError, match="give class_names="):
        streamed(unnamed)


# --- From the Hub -------------------------------------------------------------------------------


def test_a_data_set_on_the_hub(hub, folder, tmp_path):
    test = "data/test-00000-of-00001.parquet"
    files = {f"data/{file.name}": file.read_bytes() for file in folder.iterdir()}
    files[test] = files.pop("data/test.parquet")
    first = hub.commit("org/images", files, kind="dataset")
    write_shard(tmp_path / "test.parquet", range(1000, 1005))
    hub.commit("org/images", {test: (tmp_path / "test.parquet").read_bytes()}, kind="dataset")
    newest = ImageDataModule("org/images")
    newest.prepare_data()
    newest.setup()
    assert len(newest.parts["test"]) == 5
    pinned = ImageDataModule("org/images", revision=first)
    pinned.setup()
    assert len(pinned.parts["test"]) == 40
    assert pinned.class_names == ["a", "b", "c"]
    local = ImageDataModule(folder)
    local.setup()
    assert local.fingerprint == pinned.fingerprint
    stream = streamed("org/images", revision=first)
    assert sorted(numbers_of(everything(stream.train_dataloader())[0])) == sorted(
        numbers_of(everything(streamed(folder).train_dataloader())[0])
    )
    with hub.offline():
        again = ImageDataModule("org/images", revision=first)
        again.setup()
    assert again.fingerprint == pinned.fingerprint


def test_a_configuration_of_a_data_set_on_the_hub(hub, folder, monkeypatch):
    test = (folder / "test.parquet").read_bytes()
    card = """---
configs:
- config_name: small
  data_files: [{split: train, path: small/train.parquet}]
- config_name: large
  data_files: [{split: train, path: large/train.parquet}]
---
"""
    large = (folder / "train-00001-of-00006.parquet").read_bytes()
    files = {"README.md": card.encode(), "small/train.parquet": test, "large/train.parquet": large}
    hub.commit("org/two", files, kind="dataset", private=True)
    with pytest.raises(RuntimeError, match="the Hub did not give it"):
        ImageDataModule("org/two", config_name="small", test_split=None).setup()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, count in (("small", 40), ("large", 70)):
        data = ImageDataModule("org/two", config_name=name, test_split=None, holdout=0)
        data.setup()
        assert len(data.parts["train"]) == count
    with pytest.raises(ValueError, match="small"):
        ImageDataModule("org/two", test_split=None).setup()
