"""What clusters do to jobs: each fault really happens, in processes where it takes some."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import logging
import multiprocessing
import os
import resource
import signal
import socket
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import ranks
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from sweeps import CHEAP, FGSM, data, sweep_of, trained_network, trainer, two_signals
from torch import Tensor, nn

from lightning_meansparse import meeting
from lightning_meansparse.attacks import BaseExamples, evaluate
from lightning_meansparse.data import ImageDataModule
from lightning_meansparse.data.images import ImagePart
from lightning_meansparse.records import read_records
from lightning_meansparse.sites import find_sites
from lightning_meansparse.surgery import alpha_set, calibrate_, operators, restore_, sparsify_
from lightning_meansparse.tasks import calibration, facts, files, journal, measuring, together
from lightning_meansparse.tasks import sweep as room
from lightning_meansparse.tasks.measuring import Measurement
from lightning_meansparse.tasks.occupancy import Occupancy

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
    assert roomy[0].batch_size == 64
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


def test_a_full_device_is_not_taken_for_a_process_that_is_gone() -> None:
    with pytest.raises(torch.OutOfMemoryError), meeting.collective():
        raise torch.OutOfMemoryError


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


NOT_THERE = "PeerError: another process has ended, or has not begun within"


@pytest.mark.parametrize(("act", "code"), [(partial(here, signal.SIGKILL), -9), (fail, 1)])
def test_a_process_that_ends_before_the_meeting_is_not_waited_for(
    tmp_path: Path, whole: Any, act: Any, code: int
) -> None:
    def early(rank: int) -> None:
        if rank == 1:
            ImageDataModule.setup = lambda self, stage: act()

    zero, one = ranks.run(tmp_path / "sweep", fault=early, log=tmp_path / "log")
    assert (zero.code, one.code) == (1, code)
    assert NOT_THERE in zero.text


def test_a_process_that_does_not_come_to_the_meeting_is_not_waited_for_for_ever(
    tmp_path: Path, whole: Any
) -> None:
    given_up = multiprocessing.get_context("fork").Event()

    def late(rank: int) -> None:
        meeting._START = timedelta(seconds=1)
        if rank == 1:
            ImageDataModule.setup = lambda self, stage: given_up.wait()
            return
        opened = together.Meeting

        def tried() -> meeting.Meeting:
            try:
                return opened()
            finally:
                given_up.set()

        together.Meeting = tried

    zero, one = ranks.run(tmp_path / "sweep", fault=late, log=tmp_path / "log")
    assert (zero.code, one.code) == (1, 1)
    assert f"{NOT_THERE} 1 s" in zero.text


class Leaving:
    """Gets a signal while it is taken down, as the workers of a loader may."""

    def __del__(self) -> None:
        here(signal.SIGTERM)


def test_sigterm_is_not_forgotten_where_python_ignores_exceptions(
    tmp_path: Path, whole: Any
) -> None:
    folder, log = tmp_path / "sweep", tmp_path / "log"
    zero, one = ranks.run(folder, fault=ranks.at_attack(1, 2, Leaving), log=log)
    assert (zero.code, one.code) == (1, 143)
    assert "process 1 of 2 was told to stop" in zero.text
    assert [each.code for each in ranks.run(folder, log=log)] == [0, 0]
    assert ranks.contents(folder) == whole


def test_sigterm_before_the_first_hook_ends_all(tmp_path: Path, whole: Any) -> None:
    def early(rank: int) -> None:
        load = ImageDataModule.val_dataloader
        if rank == 0:
            ImageDataModule.val_dataloader = lambda self: here(signal.SIGTERM) or load(self)

    folder, log = tmp_path / "sweep", tmp_path / "log"
    zero, one = ranks.run(folder, fault=early, log=log)
    assert (zero.code, one.code) == (143, 1)
    assert "SIGTERM: the sweep stops" in zero.text
    assert [each.code for each in ranks.run(folder, log=log)] == [0, 0]
    assert ranks.contents(folder) == whole


@pytest.mark.parametrize(
    ("act", "code", "told"),
    [
        (fail, 1, "process 1 of 2 has failed: OSError: the weather"),
        (partial(here, signal.SIGKILL), -9, "another process has ended or failed; its own output"),
    ],
    ids=["exception", "kill"],
)
def test_talk_that_breaks_off_says_why(
    tmp_path: Path, whole: Any, act: Any, code: int, told: str
) -> None:
    def fault(rank: int) -> None:
        meeting._SPEAK_FOR = 0.2
        if rank == 1:
            measuring.merged_table = lambda table, device: act()

    folder, log = tmp_path / "sweep", tmp_path / "log"
    zero, one = ranks.run(folder, fault=fault, log=log)
    assert (zero.code, one.code) == (1, code)
    assert "meansparse.meeting.PeerError: another process has ended or failed" in zero.text
    assert told in zero.text
    assert [each.code for each in ranks.run(folder, log=log)] == [0, 0]
    assert ranks.contents(folder) == whole


def busy(rank: int) -> None:
    """One process fails in its pass over clean images; those of the other do not end."""
    look = Measurement.look

    def endless(self: Measurement, *batch: Tensor) -> None:
        if rank == 1:
            fail()
        for self._margins[:] in itertools.repeat(()):
            look(self, *batch)

    Measurement.look = endless


def breaking(where: Any, name: str, number: int) -> ranks.Fault:
    """One process fails where it is on the way to talk with the others."""

    def fault(rank: int) -> None:
        if rank == number:
            setattr(where, name, lambda *args, **options: fail())

    return fault


def calibrating(rank: int) -> None:
    """One process fails in its pass over training images; those of the other do not end."""
    counted = calibration.Counted
    calibration.Counted = lambda batches: (
        fail() if rank == 1 else counted(itertools.cycle([*batches]))
    )


def elsewhere(rank: int) -> None:
    if rank == 1:
        sweep_in = ranks.sweep
        ranks.sweep = lambda folder, **options: sweep_in(folder / "own disk", **options)


def forbidden(rank: int) -> None:
    stat = os.stat

    def refusing(path: Any, **options: Any) -> os.stat_result:
        if ".seen." in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    if rank == 1:
        os.stat = refusing


def nowhere(rank: int) -> None:
    if rank == 1:
        sweep_in = ranks.sweep
        kept = {"options": {"output": None}}
        ranks.sweep = lambda folder, **options: sweep_in(folder, **options, **kept)


def other_images(rank: int) -> None:
    if rank == 1:
        ranks.data = lambda **options: data(**{**options, "train": 121})


@pytest.mark.parametrize(
    ("fault", "told", "written"),
    [
        (busy, "OSError: the weather", True),
        (calibrating, "OSError: the weather", True),
        (breaking(room, "batch_indices", 1), "OSError: the weather", False),
        (breaking(facts, "configuration", 1), "OSError: the weather", False),
        (breaking(journal.Journal, "hold", 0), "OSError: the weather", False),
        (breaking(journal.Journal, "measured", 0), "OSError: the weather", True),
        (breaking(Measurement, "look", 1), "OSError: the weather", True),
        (breaking(room, "write_results", 0), "OSError: the weather", True),
        (elsewhere, "what process 0 writes there cannot be seen by 1. Name one on", True),
        (forbidden, "what process 0 writes there cannot be seen by 1. Name one on", True),
        (nowhere, 'something else than process 0: output was "a folder", is "none"', False),
        (other_images, "something else than process 0: data.held-out.fingerprint was", False),
    ],
)
def test_what_is_wrong_with_one_process_is_told_before_all_talk(
    tmp_path: Path, whole: Any, fault: Any, told: str, written: bool
) -> None:
    folder, log = tmp_path / "sweep", tmp_path / "log"
    found = ranks.run(folder, fault=fault, log=log)
    assert [each.code for each in found] == [1, 1], found
    assert all(told in each.text for each in found)
    # What Gloo raises in talk: other backends do not even notice there that somebody is missing.
    assert not any("RuntimeError" in each.text for each in found)
    assert not list(folder.rglob("*.tmp"))
    assert folder.exists() == written
    assert [each.code for each in ranks.run(folder, log=log)] == [0, 0]
    assert ranks.contents(folder) == whole


def test_other_images_on_one_process_are_seen_without_an_output_too(tmp_path: Path) -> None:
    nowhere = {"options": {"output": None}}
    found = ranks.run(tmp_path, fault=other_images, log=tmp_path / "log", **nowhere)
    assert [each.code for each in found] == [1, 1], found
    told = "something else than process 0: data.held-out.fingerprint was"
    assert all(told in each.text for each in found)


def test_one_process_without_an_output_has_nothing_to_compare_with(monkeypatch: Any) -> None:
    monkeypatch.setattr(facts, "configuration", lambda *args: fail())
    trainer().validate(sweep_of(attacks=FGSM), data(), verbose=False)


def test_every_batch_hears_of_the_others_also_one_that_is_not_attacked(
    tmp_path: Path, monkeypatch: Any
) -> None:
    told = []
    monkeypatch.setattr(together.Together, "listen", lambda self: told.append("listened"))
    evaluated = measuring.evaluate

    def deaf(*args: Any, listen: Any, **options: Any) -> Any:
        told.append("evaluated")
        return evaluated(*args, **options)

    monkeypatch.setattr(measuring, "evaluate", deaf)
    monkeypatch.setattr(Occupancy, "update", lambda self, *batch: told.append("evaluated"))
    monkeypatch.setattr(Occupancy, "content", lambda self, histogram: {})
    monkeypatch.setattr(Occupancy, "histogram", lambda *args: None)
    sweep = sweep_of(alphas=[0.3], select="clean_budget", output=tmp_path)
    trainer().validate(sweep, data(holdout=40, batch_size=8), verbose=False)
    assert told.count("evaluated") == 5 * (1 + 2 + 1), "looked at, at two alphas, and counted"
    before = [told[place - 1] for place, what in enumerate(told) if what == "evaluated"]
    assert set(before) == {"listened"}


def deadly(moment: int, rank: int) -> None:
    """The first process dies before or after its n-th file is put in place."""
    replace, events = os.replace, itertools.count()

    def replaced(source: Any, target: Any) -> None:
        for act in (lambda: None, lambda: replace(source, target)):
            act()
            if rank == 0 and next(events) == moment:
                here(signal.SIGKILL)

    os.replace = replaced


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(36))
def test_no_moment_is_too_bad_for_the_first_process(
    tmp_path: Path, whole: Any, moment: int
) -> None:
    folder, log = tmp_path / "sweep", tmp_path / "log"
    ranks.run(folder, fault=partial(deadly, moment), log=log)
    assert [each.code for each in ranks.run(folder, log=log)] == [0, 0]
    assert ranks.contents(folder) == whole


# ----------------------------------------------------------------------------------------- the disk


def full(rank: int) -> None:
    """The kernel refuses the second process what is longer than this, as a full disk would."""
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def test_a_full_disk_ends_all_and_spoils_nothing(tmp_path: Path, whole: Any) -> None:
    folder, log = tmp_path / "sweep", tmp_path / "log"
    zero, one = ranks.run(folder, fault=full, log=log)
    assert (zero.code, one.code) == (1, 1)
    assert "process 1 of 2 has failed: WriteError: output" in zero.text
    assert "cannot be written to any more: File too large. All that was written before" in zero.text
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    assert [each.code for each in ranks.run(folder, log=log)] == [0, 0]
    assert ranks.contents(folder) == whole


def test_what_could_not_be_written_is_said_once(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="No space left on device") as raised,
        files.writing(tmp_path),
        files.writing(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "full")
    assert str(raised.value).count("cannot be written to") == 1


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    part = tmp_path / "parts" / "held-out-main-00000007.parquet"
    part.mkdir(parents=True)
    told = rf"cannot be written to any more: Is a directory: '{part}'\. All"
    with pytest.raises(OSError, match=told), files.writing(tmp_path):
        files.write_file(b"rows", part)


def read_only(rank: int) -> None:
    if rank == 1:
        files.check_folder = journal.check_folder = partial(refused, files.check_folder)


def refused(check: Any, folder: Path, name: str) -> None:
    """As on a node where it is mounted read-only; root may write wherever there are folders."""
    check(folder / "sweep.json" / "below a file", name)


def test_a_folder_that_one_process_cannot_write_to_ends_all(tmp_path: Path, whole: Any) -> None:
    folder, log = tmp_path / "sweep", tmp_path / "log"
    folder.mkdir()
    (folder / "sweep.json").write_bytes(whole["sweep.json"])
    before = ranks.contents(folder)
    zero, one = ranks.run(folder, fault=read_only, log=log)
    assert (zero.code, one.code) == (1, 1)
    assert "process 1 of 2 has failed: ValueError: output must be a folder" in zero.text
    assert "Not a directory. Name another." in one.text
    assert ranks.contents(folder) == before
    assert [each.code for each in ranks.run(folder, log=log)] == [0, 0]


def test_damaged_files_are_measured_again_or_refused_by_all(tmp_path: Path, whole: Any) -> None:
    folder, log = tmp_path / "sweep", tmp_path / "log"
    ranks.run(folder, fault=ranks.at_attack(-1, 3, partial(here, signal.SIGKILL)), log=log)
    part = next((folder / "parts").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-100])
    tensors = folder / "adapter" / "meansparse.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    zero, one = ranks.run(folder, log=log)
    assert (zero.code, one.code) == (0, 0)
    assert "measuring the statistics again: " in zero.text
    assert "measuring a batch again: " in zero.text
    assert "measuring a batch again: " not in one.text, "once is enough"
    assert ranks.contents(folder) == whole
    (folder / "sweep.json").write_bytes(b"{")
    zero, one = ranks.run(folder, log=log)
    assert (zero.code, one.code) == (1, 1)
    assert "is damaged or of another version" in zero.text
    assert "process 0 of 2 has failed: ValueError: " in one.text


# ----------------------------------------------------------------------- two sweeps, one folder


@pytest.mark.parametrize("end", ["waits", "is killed"])
def test_of_two_sweeps_in_one_folder_the_second_is_refused(
    tmp_path: Path, whole: Any, end: str
) -> None:
    folder, log = tmp_path / "sweep", tmp_path / "log"
    here, there = multiprocessing.get_context("fork").Pipe()

    def pause() -> None:
        there.send(os.getpid())
        there.recv()

    with ranks.started(folder, fault=ranks.at_attack(0, 2, pause), log=log) as first:
        holder = here.recv()
        before = ranks.contents(folder)
        before = {name: held for name, held in before.items() if not name.endswith(".tmp")}
        zero, one = ranks.run(folder, log=tmp_path / "second")
        assert (zero.code, one.code) == (1, 1)
        told = f"is in use by a sweep that runs now (process {holder} on {socket.gethostname()})"
        assert told in zero.text
        assert (
            f"process 0 of 2 has failed: BlockingIOError: output {str(folder)!r} {told}" in one.text
        )
        assert before.items() <= ranks.contents(folder).items()
        if end == "waits":
            here.send("go on")
            assert [each.code for each in ranks.ended(first, log)] == [0, 0]
    if end == "is killed":
        assert (folder / ".lock").exists()
        assert [each.code for each in ranks.run(folder, log=log)] == [0, 0]
    assert not (folder / ".lock").exists()
    assert ranks.contents(folder) == whole


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    def never(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", never)
    files.FolderLock(tmp_path).release()
    assert "cannot be locked (No locks available): see to it that no two sweeps" in caplog.text


# ----------------------------------------------------------------------------- a slow one, a logger


def test_a_slow_process_is_waited_for_longer_than_collectives_would(
    tmp_path: Path, whole: Any
) -> None:
    folder, log = tmp_path / "sweep", tmp_path / "log"
    impatient = {"strategy": DDPStrategy(timeout=timedelta(seconds=1))}
    slow = ranks.at_attack(1, 2, partial(time.sleep, 2))
    found = ranks.run(folder, fault=slow, log=log, trainer_options=impatient)
    assert [each.code for each in found] == [0, 0], found
    assert ranks.contents(folder) == whole


class Refusing(CSVLogger):
    """Its server is down by the time there is something to say."""

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        raise ConnectionError("the tracking server does not answer")


def test_a_logger_that_raises_ends_all_with_the_records_written(tmp_path: Path, whole: Any) -> None:
    folder, log = tmp_path / "sweep", tmp_path / "log"
    logger = {"logger": Refusing(tmp_path)}
    zero, one = ranks.run(folder, log=log, trainer_options=logger)
    assert (zero.code, one.code) == (1, 1)
    assert "the tracking server does not answer" in zero.text
    assert "process 0 of 2 has failed: ConnectionError: the tracking server does not" in one.text
    assert (folder / "records.parquet").exists()
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


@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")
def test_an_empty_loader_is_an_error() -> None:
    sweep, images = sweep_of(attacks=FGSM), data(train=40, holdout=0)
    with pytest.raises(ValueError, match="no held-out images to choose alpha on: give"):
        trainer().validate(sweep, images, verbose=False)
    with pytest.raises(ValueError, match="no held-out images to choose alpha on: give"):
        trainer(limit_val_batches=0).validate(sweep, data(train=40), verbose=False)


def test_no_training_images_are_an_error() -> None:
    sweep, module = sweep_of(attacks=FGSM), data(train=40)
    module.calibration_dataloader = lambda: []
    with pytest.raises(ValueError, match="there is no batch in it"):
        trainer().validate(sweep, module, verbose=False)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_fewer_samples_than_processes(tmp_path: Path, world: int) -> None:
    folder, log = tmp_path / "sweep", tmp_path / "log"
    images = data(train=6, holdout=2, batch_size=16, test=1)
    images.setup()
    found = ranks.run(folder, world, log=log, images=images)
    assert [each.code for each in found] == [0] * world, found
    table, _ = read_records(folder)
    rows = table.filter((pc.field("alpha") == 0.0) & (pc.field("order") == 0)).to_pydict()
    seen = sorted(zip(rows["split"], rows["index"], strict=True))
    held, tested = (images.parts[part].rows.tolist() for part in ("holdout", "test"))
    assert seen == [*(("held-out", i) for i in sorted(held)), *(("test", i) for i in tested)]


# ------------------------------------------------------------------------------------ calibration


def overflow(rank: int) -> None:
    """Training images of the second process come out as something else."""
    read = ImagePart.__getitems__

    def broken(self: ImagePart, places: list[int]) -> Any:
        pairs = read(self, places)
        spoilt = rank == 1 and len(self) == 50
        return [(image * torch.nan, label) for image, label in pairs] if spoilt else pairs

    ImagePart.__getitems__ = broken


def test_activations_that_are_not_finite_are_named_by_all(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    found = ranks.run(folder, fault=overflow, log=tmp_path / "log")
    for each in found:
        assert each.code == 1
        assert (
            "values at model.2@in, model.4@in are not finite. Check the images and the model"
            in each.text
        )
    assert list(ranks.contents(folder)) == ["sweep.json"]


@pytest.mark.parametrize(
    ("act", "code", "told"),
    [
        (partial(here, signal.SIGKILL), -9, "PeerError: another process has ended without a word"),
        (partial(here, signal.SIGINT), 1, "PeerError: process 1 of 2 was told to stop"),
    ],
    ids=["kill", "SIGINT"],
)
def test_what_ends_one_process_at_the_door_of_calibration_ends_all(
    tmp_path: Path, whole: Any, act: Any, code: int, told: str
) -> None:
    def fault(rank: int) -> None:
        counted = calibration.Counted
        if rank == 1:
            calibration.Counted = lambda batches: act() or counted(batches)

    folder, log = tmp_path / "sweep", tmp_path / "log"
    zero, one = ranks.run(folder, fault=fault, log=log)
    assert (zero.code, one.code) == (1, code)
    assert told in zero.text
    assert [each.code for each in ranks.run(folder, log=log)] == [0, 0]
    assert ranks.contents(folder) == whole


def test_constant_activations_have_an_empty_band() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2))
    with torch.no_grad():
        model[0].weight[0] = 0
    images = torch.rand(9, 1, 8, 8)
    plain = model(images)
    sparsify_(model, find_sites(model, images[:2]), alpha=0.5)
    calibrate_(model, images.split(4))
    (op,) = operators(model).values()
    assert op.var.flatten().tolist()[0] == 0
    assert (op.var.flatten()[1:] > 0).all()
    assert not torch.equal(model(images), plain)
    with torch.no_grad():
        model[0].weight.zero_()
    calibrate_(model, images.split(4))
    assert not op.var.any()
    sparse = model(images)
    restore_(model)
    assert torch.equal(model(images), sparse)
