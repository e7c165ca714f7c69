"""How fast the attacks are beside plain torchattacks and the reference AutoAttack.

    git clone https://github.com/fra31/auto-attack reference
    python -m tests.benchmarks.attacks --reference reference --write

Both sides attack the same images of the demo network, which it classifies right, with the same
budgets, on one thread each, by turns; the other side runs on the published operator, as its users
do. Seconds are medians over the turns. Memory is what a process that does nothing else holds at its
peak beyond what it held before, as Linux counts it. Each side has the batch that it has by itself:
of the reference 250 images, of ours 64 on a CPU, for no result of ours depends on it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from lightning_meansparse.attacks import SUITES, AttackSpec, evaluate
from lightning_meansparse.attacks.library import load_torchattacks
from tests.benchmarks.agreement import right, task
from tests.benchmarks.speed import page
from tests.benchmarks.speed.published import published_
from tests.benchmarks.speed.rows import Row
from tests.benchmarks.speed.timing import machine

THEIR_BATCH = 250


class Side:
    """One way of attacking: what it leaves standing, and what that costs."""

    def __init__(self, attack: Callable[[], Tensor]) -> None:
        self.attack = attack
        self.seconds: list[float] = []
        self.megabytes: list[float] = []

    def run(self) -> None:
        # Forked off, so that no turn uses what an earlier one has left to the allocator.
        fork = multiprocessing.get_context("fork")
        here, there = fork.Pipe()
        process = fork.Process(target=self._measure, args=(there,))
        process.start()
        there.close()
        seconds, megabytes, standing = here.recv()
        process.join()
        self.seconds.append(seconds)
        self.megabytes.append(megabytes)
        self.standing = torch.tensor(standing)

    def _measure(self, there: Connection) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, start = _resident("VmRSS"), time.process_time()
        standing = self.attack()
        seconds = time.process_time() - start
        there.send((seconds, _resident("VmHWM") - before, standing.tolist()))


def main() -> None:
    """Measure by turns, print the rows, and write them where that is asked for."""
    args = _arguments()
    torch.set_num_threads(1)
    console = Console()
    model, images, labels, _ = task(args)
    rows = []
    for name, ours, theirs, fast, memory in _pairs(args, model, images, labels):
        for turn in range(args.turns):
            for side in (ours, theirs) if turn % 2 else (theirs, ours):
                side.run()
        ratio = statistics.median(theirs.seconds) / statistics.median(ours.seconds)
        share = max(ours.megabytes) / max(theirs.megabytes)
        same = 100 * float((ours.standing == theirs.standing).float().mean())
        what = f"{name}, {args.n} images"
        found = [
            Row(what, "× as fast", ratio, None, fast, at_least=True),
            Row(what, "of their peak memory", share, None, memory),
            Row(what, "% of samples with the same flag", same),
        ]
        for row in found:
            console.print(page.line(row.as_dict()), markup=False)
        rows += found
    if args.write:
        page.keep("cpu", "attacks", machine("cpu"), args.turns, rows)
        page.write()


def _pairs(
    args: argparse.Namespace, model: nn.Module, images: Tensor, labels: Tensor
) -> Iterator[tuple[str, Side, Side, float | None, float | None]]:
    """A name, our side, the other one, and how fast and how large ours should be."""
    other = published_(copy.deepcopy(model))

    def ours(*attacks: AttackSpec) -> Side:
        return Side(lambda: evaluate(model, images, labels, attacks=attacks, eps=args.eps).worst)

    def torchattacks() -> Tensor:
        attack = load_torchattacks().APGD(other, norm="Linf", eps=args.eps, steps=100, seed=0)
        parts = zip(images.split(THEIR_BATCH), labels.split(THEIR_BATCH), strict=True)
        return right(other, torch.cat([attack(*part) for part in parts]), labels)

    def reference(*names: str) -> Side:
        def attack() -> Tensor:
            from autoattack import AutoAttack

            with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
                suite = AutoAttack(
                    other, norm="Linf", eps=args.eps, seed=0, device="cpu", verbose=False
                )
                suite.attacks_to_run = list(names)
                found = suite.run_standard_evaluation(images, labels, bs=THEIR_BATCH)
            return right(other, found, labels)

        return Side(attack)

    standard = SUITES["standard"]
    yield "APGD-CE beside torchattacks", ours(standard[0]), Side(torchattacks), 1.5, None
    if args.reference:
        sys.path.insert(0, args.reference)
        for spec in standard:
            yield f"{spec.name} beside the reference", ours(spec), reference(spec.name), None, None
        names = [spec.name for spec in standard]
        yield "standard beside the reference", ours(*standard), reference(*names), 1.5, 0.25


def _resident(name: str) -> float:
    """Megabytes that this process holds (``VmRSS``), or has held at most (``VmHWM``)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", help="a checkout of fra31/auto-attack; without it no suite")
    parser.add_argument("--dataset", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--n", type=int, default=100, help="images, all classified right")
    parser.add_argument("--alpha", type=float, default=0.2)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--adapter", help="statistics to load; without it they are measured")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep what was measured")
    return parser.parse_args()


if __name__ == "__main__":
    main()
