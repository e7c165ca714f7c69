"""Sweeps in several processes, as torchrun starts them, and faults that befall one of them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from sweeps import FGSM, data, sweep_of, trainer

from lightning_meansparse.tasks.measuring import Measurement

PROMPT = 60.0
"""Seconds within which all processes must have ended."""

OPTIONS = {"alphas": [0.3, 0.6, 1.0], "attacks": FGSM, "screen": FGSM}

Fault = Callable[[int], None]
"""What is done in a process, which has this rank, before the sweep begins."""


@dataclass(frozen=True)
class Ended:
    """How a process has ended: its exit code, negative for a signal, and what it said."""

    code: int
    text: str


def sweep(
    folder: Path, *, images: Any = None, options: Any = (), trainer_options: Any = ()
) -> None:
    """Choose an alpha and report it, in this process, of which the environment knows the rank."""
    module = images or data(train=120, holdout=70, batch_size=16, test=20)
    task = sweep_of(**{**OPTIONS, "output": folder, **dict(options)})
    once = trainer(**dict(trainer_options))
    once.validate(task, module, verbose=False)
    once.test(task, module, verbose=False)


def run(
    folder: Path, world: int = 2, fault: Fault | None = None, *, log: Path, **options: Any
) -> list[Ended]:
    """Run a sweep on so many processes; nothing but the sweep itself ends those that are left."""
    with started(folder, world, fault, log=log, **options) as processes:
        return ended(processes, log)


@contextmanager
def started(
    folder: Path, world: int = 2, fault: Fault | None = None, *, log: Path, **options: Any
) -> Iterator[Sequence[Any]]:
    """The processes of `run`, running; killed at the end if they still do."""
    log.mkdir(exist_ok=True)
    port, context = find_free_network_port(), multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_process, args=(rank, world, port, folder, fault, log, options))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def ended(processes: Sequence[Any], log: Path) -> list[Ended]:
    """Wait for all processes, not for ever."""
    deadline = time.monotonic() + PROMPT
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    texts = [(log / f"{rank}.txt").read_text() for rank in range(len(processes))]
    assert not late, f"still running after {PROMPT} s: {late}; they said {texts}"
    return [Ended(p.exitcode, text) for p, text in zip(processes, texts, strict=True)]


def _process(
    rank: int, world: int, port: int, folder: Path, fault: Fault | None, log: Path, options: Any
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    sys.stderr = sys.stdout = (log / f"{rank}.txt").open("w", buffering=1)
    warnings.filterwarnings("ignore", "Using `DistributedSampler` with the dataloaders")
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("lightning_meansparse").addHandler(handler)
    if world > 1:
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "1",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
        }
        several = {"strategy": "ddp", "devices": world, **options.pop("trainer_options", {})}
        options["trainer_options"] = several
    code = 0
    try:
        if fault is not None:
            fault(rank)
        sweep(folder, **options)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # as at the end of a program
    os._exit(code)


def at_attack(rank: int, number: int, act: Callable[[], Any]) -> Fault:
    """Do something on one rank, or on all with -1, just before its n-th batch is attacked."""

    def fault(here: int) -> None:
        attack, seen = Measurement._attack, []

        def noted(self: Measurement, *args: Any) -> Any:
            seen.append(args)
            if (here == rank or rank < 0) and len(seen) == number:
                act()
            return attack(self, *args)

        Measurement._attack = noted

    return fault


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, but the lock of a sweep that was killed."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
