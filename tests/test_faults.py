"""What clusters do to jobs: each fault really happens, in processes where it takes some."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from sweeps import CHEAP, FGSM, data, sweep_of, trained_network, trainer, two_signals
from torch import Tensor, nn

from lightning_meansparse.attacks import BaseExamples, evaluate
from lightning_meansparse.data.images import ImagePart
from lightning_meansparse.surgery import alpha_set

# ---------------------------------------------------------------------------------------- memory


class Small(nn.Module):
    """On a device whose memory holds so many images, fewer with gradients, fewer now and then."""

    def __init__(self, network: nn.Module, fits: int, crowded: int = 10**9) -> None:
        super().__init__()
        self.network = network
        self.fits = fits
        self.crowded = crowded
        self.failed = self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        crowded = (
            self.fits < 99 and self.calls % 8 == 0 and len(images) > 1
        )  # in the middle of an attack
        if crowded or len(images) > self.fits // (1 + images.requires_grad):
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")
        return self.network(images)


def everything(
    model: nn.Module, fits: int, *, crowded: int = 10**9, **options: Any
) -> tuple[list[Any], Small]:
    """Evaluations at two alphas that share base examples, of two attacks that want some."""
    attacks = [*CHEAP, {**CHEAP[-1], "name": "again", "options": {"steps": 1}}]
    images, labels = two_signals(21, 1)
    small, pool, found = Small(model, fits, crowded), BaseExamples(), []
    for alpha in (0.0, 0.6):
        with alpha_set(model, alpha):
            options = {"attacks": attacks, "eps": 0.07, "keep_examples": True, **options}
            found.append(evaluate(small, images, labels, base=pool, **options))
    return found, small


@pytest.mark.parametrize("crowded", [7, 10, 13])
def test_out_of_memory_halves_the_batch_and_changes_nothing(caplog: Any, crowded: int) -> None:
    sweep = sweep_of(attacks=CHEAP)
    trainer().validate(sweep, data(train=64), verbose=False)
    model = sweep.classifier
    roomy, _ = everything(model, 1000)
    with caplog.at_level(logging.WARNING, logger="lightning_meansparse"):
        tight, small = everything(model, 13, crowded=crowded, batch_size=roomy[0].batch_size)
    assert small.failed >= 3
    assert roomy[0].batch_size == 256
    assert tight[1].batch_size <= tight[0].batch_size <= 6
    assert any(
        "out of memory with 21 images at once: going on with 11" in m for m in caplog.messages
    )
    for one, other in zip(roomy, tight, strict=True):
        assert 0 < one.worst.sum() < one.clean.sum()
        for field in dataclasses.fields(one):
            if field.name != "batch_size":
                a, b = getattr(one, field.name), getattr(other, field.name)
                if isinstance(a, Tensor):  # float32 rounds by the size of a batch
                    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * a.is_floating_point())
                else:
                    assert a == b, field.name


def test_what_fits_is_remembered_and_said_once(caplog: Any) -> None:
    failed = []

    class Tight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = trained_network()

        def forward(self, images: Tensor) -> Tensor:
            if len(images) > 4 and images.requires_grad:
                failed.append(len(images))
                raise torch.OutOfMemoryError
            return self.network(images)

    sweep = sweep_of(Tight(), attacks=FGSM, check_images=0, adapter=None)
    trainer().validate(sweep, data(train=64, calibration=4), verbose=False)
    said = [m for m in caplog.messages if "out of memory" in m]
    assert len(failed) == len(said) == 1


def test_a_single_image_that_does_not_fit_is_the_end() -> None:
    with pytest.raises(RuntimeError, match="does not hold an attack on a single image: free"):
        everything(trained_network(), 0)
    with pytest.raises(RuntimeError, match=r"attack 'pgd' .*|does not hold an attack"):
        everything(trained_network(), 1)


# ------------------------------------------------------------------- one process of two has a fault


def here(signal_number: int) -> None:
    os.kill(os.getpid(), signal_number)


def fail() -> None:
    raise OSError("the weather")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> dict[str, bytes]:
    """What an undisturbed sweep of two processes leaves."""
    folder = tmp_path_factory.mktemp("whole")
    ranks.sweep(folder / "one")  # what it imports, those that are forked off have
    assert [each.code for each in ranks.run(folder / "sweep", log=folder / "log")] == [0, 0]
    return ranks.contents(folder / "sweep")


GONE = "another process has ended without a word"
STOPPED = "the sweep has stopped"


@pytest.mark.parametrize(
    ("rank", "act", "codes", "told"),
    [
        (1, partial(here, signal.SIGKILL), (1, -9), (GONE, "")),
        (0, partial(here, signal.SIGKILL), (-9, 1), ("", "has ended without a word")),
        (
            1,
            partial(here, signal.SIGTERM),
            (1, 143),
            ("process 1 of 2 was told to stop", "SIGTERM"),
        ),
        (0, partial(here, signal.SIGTERM), (143, 1), (STOPPED, "process 0 of 2 was told to stop")),
        (0, partial(here, signal.SIGINT), (1, 1), (STOPPED, "process 0 of 2 was told to stop")),
        (1, fail, (1, 1), ("process 1 of 2 has failed: OSError: the weather", "the weather")),
    ],
    ids=["kill 1", "kill 0", "SIGTERM 1", "SIGTERM 0", "SIGINT 0", "exception 1"],
)
def test_what_ends_one_process_ends_all(
    tmp_path: Path, whole: Any, rank: int, act: Any, codes: Any, told: Any
) -> None:
    folder, log = tmp_path / "sweep", tmp_path / "log"
    found = ranks.run(folder, fault=ranks.at_attack(rank, 2, act), log=log)
    assert tuple(each.code for each in found) == codes, found
    for each, text in zip(found, told, strict=True):
        assert text in each.text
    assert len(list((folder / "parts").glob("*.parquet"))) >= 1
    assert [each.code for each in ranks.run(folder, log=log)] == [0, 0]
    assert ranks.contents(folder) == whole


# ------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("part", ["holdout", "train"])
def test_a_worker_that_hangs_is_not_waited_for_forever(monkeypatch: Any, part: Any) -> None:
    module = data(train=64, holdout=0.25, num_workers=1, worker_timeout=0.5)
    module.setup()
    read, stuck = ImagePart.__getitems__, len(module.parts[part])

    def hang(self: ImagePart, places: list[int]) -> Any:
        if torch.utils.data.get_worker_info() is not None and len(self) == stuck:
            signal.pause()  # as storage does that has stopped to answer
        return read(self, places)

    monkeypatch.setattr(ImagePart, "__getitems__", hang)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    told = r"no worker has given a batch for 0.5 s: .*num_workers=0"
    with pytest.raises(TimeoutError, match=told):
        trainer().validate(sweep_of(attacks=FGSM), module, verbose=False)
