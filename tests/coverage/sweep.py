"""Many models, each in a process of its own: whatever hangs or crashes takes nothing along."""

from __future__ import annotations

import multiprocessing
import time
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from .models import Model

Row = dict[str, Any]


def run(model: Model, strict: bool, sender: Connection) -> None:
    """Build and check one model, in a process of its own."""
    import torch

    from .check import check_model

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        began = time.perf_counter()
        network, example = model.build()
        built = round(time.perf_counter() - began, 2)
        row = check_model(network, example, strict=strict).as_dict() | {"build_seconds": built}
    except Exception:
        row = {"crash": traceback.format_exc(limit=-3)}
    sender.send(row)


def sweep(
    models: list[Model], *, jobs: int, limit: float, strict: bool
) -> Iterator[tuple[Model, Row]]:
    """Check all models, some at a time; yields each with its outcome as it comes."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["timm", "torchvision", "transformers", "tests.coverage.check"]
    )
    waiting, running = list(models), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            model = waiting.pop(0)
            receiver, sender = processes.Pipe(duplex=False)
            process = processes.Process(target=run, args=(model, strict, sender))
            process.start()
            sender.close()
            running[receiver] = model, process, time.monotonic()
        for receiver in wait(list(running), timeout=1):
            model, process, _ = running.pop(receiver)
            try:
                row = receiver.recv()
            except EOFError:
                process.join()
                row = {"crash": f"the process ended with exit code {process.exitcode}"}
            process.join()
            yield model, row
        for receiver, (model, process, began) in list(running.items()):
            if time.monotonic() - began > limit:
                process.kill()
                process.join()
                del running[receiver]
                yield model, {"crash": f"not done after {limit:g} seconds"}
