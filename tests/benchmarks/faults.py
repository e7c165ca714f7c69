"""Faults that befall a sweep of two processes, as torchrun and Lightning start them.

    python -m tests.benchmarks.faults --output docs/records/faults.json

The command is the real one, on the images and the checkpoint that come with the package. Per fault
it notes how long it takes until every process has ended, what the command said, and whether the
same command ends with the same records afterwards, byte by byte. Disks are small file systems in
memory, which only root can mount.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "lightning_meansparse" / "demo"
PROMPT = 60.0
OPTIONS = {
    "model.model": DEMO / "checkpoint",
    "model.alphas": "[0.4]",
    "model.attacks": "[pgd, adaptive-ce]",
    "model.check_images": "0",
    "model.test_alphas": "all",
    "model.eps": "0.1",
    "model.output": "sweep",
    "data.dataset": DEMO / "fashion_mnist",
    "data.batch_size": "6",
    "data.limit_holdout": "48",
    "data.limit_test": "48",
    "trainer.accelerator": "cpu",
    "trainer.devices": "2",
    "trainer.strategy": "ddp",
}


# ------------------------------------------------------------------- the command, and a fault in it


def out_of_memory() -> None:
    """A device that holds the gradients of two images."""
    import torch

    from lightning_meansparse.attacks.guard import Watched

    forward = Watched.forward

    def tight(self: Any, images: Any) -> Any:
        if len(images) > 2 and images.requires_grad:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(self, images)

    Watched.forward = tight  # type: ignore[method-assign]


def failing_logger() -> None:
    """A tracking server that does not answer."""
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.utilities import rank_zero_only

    @rank_zero_only
    def log_metrics(self: Any, metrics: Any, step: Any = None) -> None:
        raise ConnectionError("the tracking server does not answer")

    CSVLogger.log_metrics = log_metrics  # type: ignore[method-assign]


INSIDE: dict[str, Callable[[], None]] = {"memory": out_of_memory, "logger": failing_logger}


def command() -> None:
    """What the processes run: `meansparse`, after what `FAULT` names."""
    from lightning_meansparse.cli import main as meansparse

    if fault := os.environ.get("FAULT"):
        INSIDE[fault]()
    sys.exit(meansparse(sys.argv[2:]))


# ------------------------------------------------------------------------------------- from outside


class Job:
    """One run of the command in a folder, in a session of its own."""

    def __init__(self, folder: Path, launcher: str = "torchrun", **options: object) -> None:
        self.folder = folder
        self._launcher = launcher
        folder.mkdir(exist_ok=True)
        fault = str(options.pop("FAULT", ""))
        chosen = {**OPTIONS, "trainer.logger": "true" if fault == "logger" else "false"}
        chosen |= {name.replace("__", "."): value for name, value in options.items()}
        words = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
        start = [sys.executable]
        if launcher == "torchrun":
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (read until the job is forgotten)
        self._process = subprocess.Popen(
            [*start, "-m", "tests.benchmarks.faults", "--command", "sweep", *words],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "COLUMNS": "500",
                "FAULT": fault,
            },
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,
        )

    def pids(self, rank: int | None = None) -> list[int]:
        """Living processes of the session; of one rank alone, the ones with that environment."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                variables = (entry / "environ").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if int(session) != self._process.pid or state == "Z":
                continue
            own = b"LOCAL_RANK=%d" % (rank or 0) in variables
            if self._launcher == "lightning" and rank == 0:  # the first process starts the others
                own = int(entry.name) == self._process.pid
            if rank is None or own:
                found.append((parent, int(entry.name)))
        inside = {pid for _, pid in found}
        # Of a rank the process itself, not the workers that it has forked off.
        return [pid for parent, pid in found if rank is None or parent not in inside]

    def send(self, number: int, rank: int | None = None) -> None:
        """A signal to one rank, or to every process."""
        for pid in self.pids(rank):
            os.kill(pid, number)

    def wait_for(self, there: Callable[[], bool]) -> None:
        """Until something is there, or the command has ended."""
        while self._process.poll() is None and not there():
            time.sleep(0.01)

    def working(self) -> bool:
        """Whether the sweep has begun to write."""
        return (self.folder / "sweep" / "sweep.json").exists()

    def ended(self, patience: float = 600.0) -> float:
        """Wait until no process of the session is left; return the seconds that took."""
        start = time.perf_counter()
        while self.pids():
            if time.perf_counter() - start > patience:
                self.send(signal.SIGKILL)
                raise SystemExit(f"still running after {patience} s: {self.told()}")
            time.sleep(0.05)
        self.code = self._process.wait()
        return time.perf_counter() - start

    def told(self) -> list[str]:
        """What the command said of its end."""
        self._log.seek(0)
        wanted = re.compile(
            r"^(?:meansparse sweep: .*|.*(?:the sweep has stopped|out of memory with|SIGTERM: the "
            r"sweep|measuring a batch again).*)$",
            re.MULTILINE,
        )
        lines = [line.strip() for line in wanted.findall(self._log.read())]
        return list(dict.fromkeys(line.replace(str(self.folder), "…") for line in lines))


@dataclass
class Bench:
    """What all faults share."""

    folder: Path
    expected: bytes
    duration: float
    draw: random.Random
    rows: list[dict[str, Any]] = field(default_factory=list)

    def records(self, folder: Path) -> bytes | None:
        """The records that a sweep has left."""
        path = folder / "sweep" / "records.parquet"
        return path.read_bytes() if path.exists() else None

    def note(
        self, fault: str, job: Job, seconds: float, *, resumed: Path | None, **more: Any
    ) -> None:
        """Keep how a fault went, after the same command has been run again."""
        row = {
            "fault": fault,
            "seconds to the end": round(seconds, 1),
            "exit code": job.code,
            "told": job.told(),
            **more,
        }
        if resumed is not None:
            again = Job(resumed)
            again.ended()
            row["resumed"] = "same" if self.records(resumed) == self.expected else "DIFFERENT"
            if again.code:
                row["resumed"] = f"FAILED with {again.code}: {again.told()}"
        self.rows.append(row)
        Console().log(row)

    def place(self) -> Path:
        """A new folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def job(self, launcher: str = "torchrun", **options: object) -> Job:
        """The command in a new folder."""
        return Job(self.place(), launcher, **options)


def left_behind(folder: Path) -> int:
    """Batches that are kept."""
    return len(list((folder / "sweep" / "parts").glob("*.parquet")))


def moments(bench: Bench, count: int) -> None:
    """`kill -9` of one rank, and of all, at random moments of the work."""
    for number in range(count):
        rank = (0, 1, None)[number % 3]
        job = bench.job()
        job.wait_for(job.working)
        after = bench.draw.uniform(0, bench.duration)
        start = time.perf_counter()
        job.wait_for(lambda start=start, after=after: time.perf_counter() - start > after)
        kept = left_behind(job.folder)
        job.send(signal.SIGKILL, rank)
        who = "all processes" if rank is None else f"rank {rank}"
        name = f"kill -9 of {who} after {after:.1f} s"
        bench.note(name, job, job.ended(), resumed=job.folder, kept=kept)


def signals(bench: Bench) -> None:
    """What Lightning's own launcher makes of a death, and what clusters and people send."""
    for name, launcher, number, rank in (
        ("kill -9 of rank 0", "lightning", signal.SIGKILL, 0),
        ("kill -9 of rank 1", "lightning", signal.SIGKILL, 1),
        ("SIGTERM to all, as SLURM sends it", "torchrun", signal.SIGTERM, None),
        ("SIGTERM to rank 0", "torchrun", signal.SIGTERM, 0),
        ("SIGTERM to rank 1", "lightning", signal.SIGTERM, 1),
        ("Ctrl-C", "torchrun", signal.SIGINT, None),
        ("Ctrl-C", "lightning", signal.SIGINT, None),
    ):
        job = bench.job(launcher)
        job.wait_for(lambda job=job: left_behind(job.folder) >= 2)
        job.send(number, rank)
        bench.note(f"{name} ({launcher})", job, job.ended(), resumed=job.folder)


@contextmanager
def file_system(bench: Bench, options: str) -> Iterator[Path]:
    """A file system in memory."""
    folder = bench.place()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, options: str) -> None:
    """Change it while it is in use."""
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def disks(bench: Bench) -> None:
    """A disk that is full, one that cannot be written to, and one that suddenly cannot."""
    with file_system(bench, "size=128k") as disk:
        job = Job(disk)
        job.wait_for(lambda: False)
        seconds, used = job.ended(), left_behind(disk)
        remount(disk, "size=64m")
        bench.note("full disk", job, seconds, resumed=disk, kept=used)
    with file_system(bench, "size=64m") as disk:
        remount(disk, "ro")
        job = Job(disk)
        job.wait_for(lambda: False)
        seconds = job.ended()
        remount(disk, "rw")
        bench.note("read-only folder", job, seconds, resumed=disk)
    with file_system(bench, "size=64m") as disk:
        job = Job(disk)
        job.wait_for(lambda: left_behind(disk) >= 2)
        while subprocess.run(["mount", "-o", "remount,ro", disk], capture_output=True).returncode:
            time.sleep(0.01)  # a file is open
        seconds = job.ended()
        remount(disk, "rw")
        bench.note("disk becomes read-only", job, seconds, resumed=disk)


def files(bench: Bench) -> None:
    """Half-written files, and two sweeps in one folder."""
    job = bench.job()
    job.wait_for(lambda: left_behind(job.folder) >= 4)
    job.send(signal.SIGKILL)
    job.ended()
    for part in sorted((job.folder / "sweep" / "parts").glob("*"))[::2]:
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    again = Job(job.folder)
    bench.note("half-written batches", again, again.ended(), resumed=job.folder)
    records = job.folder / "sweep" / "records.parquet"
    records.write_bytes(records.read_bytes()[:-8])
    again = Job(job.folder)
    bench.note("corrupt records", again, again.ended(), resumed=job.folder)
    configuration = job.folder / "sweep" / "sweep.json"
    kept = configuration.read_bytes()
    configuration.write_bytes(kept[:100])
    again = Job(job.folder)
    seconds = again.ended()
    configuration.write_bytes(kept)
    bench.note("corrupt sweep.json (put back afterwards)", again, seconds, resumed=job.folder)
    first = bench.job()
    first.wait_for(lambda: left_behind(first.folder) >= 1)
    second = Job(first.folder)
    seconds = second.ended()
    first.ended()
    same = bench.records(first.folder) == bench.expected
    bench.note("two sweeps in one folder", second, seconds, resumed=first.folder, first_same=same)


def inputs(bench: Bench) -> None:
    """Data and models that nothing can be done with, or hardly anything."""
    job = bench.job(data__num_workers=1, data__worker_timeout=5)
    job.wait_for(job.working)
    stopped: list[int] = []

    def stop_a_worker() -> bool:
        ranks = job.pids(0) + job.pids(1)
        for pid in set(job.pids()) - set(ranks):
            status = Path(f"/proc/{pid}/stat")
            if status.exists() and int(status.read_text().rpartition(")")[2].split()[1]) in ranks:
                os.kill(pid, signal.SIGSTOP)
                stopped.append(pid)
        return bool(stopped)

    job.wait_for(stop_a_worker)
    bench.note("a worker that hangs (5 s allowed)", job, job.ended(), resumed=job.folder)
    for name, value, options in (
        ("NaN activations", float("nan"), {}),
        ("constant activations", 0.0, {}),
        ("no held-out images", None, {"data__holdout": 0, "data__limit_holdout": "null"}),
        ("an empty loader", None, {"trainer__limit_test_batches": 0}),
        ("one test image for two ranks", None, {"data__limit_test": 1, "data__limit_holdout": 1}),
    ):
        folder = bench.place()
        if value is not None:
            shutil.copytree(DEMO / "checkpoint", folder / "checkpoint")
            weights = next((folder / "checkpoint").glob("*.safetensors"))
            tensors = load_file(weights)
            first = next(n for n, t in tensors.items() if t.dim() == 4)
            tensors[first].fill_(value)
            save_file(tensors, weights)
            options = {"model__model": "checkpoint"}
        job = Job(folder, **options)
        bench.note(name, job, job.ended(), resumed=None)
    for name, fault in (("CUDA out of memory", "memory"), ("a logger that raises", "logger")):
        job = bench.job(FAULT=fault)
        seconds = job.ended()
        same = bench.records(job.folder) == bench.expected
        bench.note(name, job, seconds, resumed=job.folder, same_at_once=same)


def main() -> None:
    """Provoke every fault, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="moments,signals,disks,files,inputs")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        whole = Job(Path(name, "whole"))
        whole.wait_for(whole.working)
        begin = time.time()
        whole.ended()
        records = whole.folder / "sweep" / "records.parquet"
        duration, expected = records.stat().st_mtime - begin, records.read_bytes()
        Console().log(f"undisturbed: {duration:.0f} s of work")
        bench = Bench(Path(name), expected, duration, random.Random(args.seed))
        for part in args.only.split(","):
            if part == "moments":
                moments(bench, args.moments)
            else:
                {"signals": signals, "disks": disks, "files": files, "inputs": inputs}[part](bench)
    table = Table("fault", "ends after", "told", "resumed")
    for row in bench.rows:
        told = row["told"][-1] if row["told"] else ""
        table.add_row(row["fault"], f"{row['seconds to the end']} s", told, row.get("resumed", "–"))
    Console().print(table)
    if args.output is not None:
        content = {"undisturbed seconds": round(duration, 1), "faults": bench.rows}
        temporary = args.output.with_name(f".{args.output.name}.tmp")
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        os.replace(temporary, args.output)
    if any(row.get("resumed", "same") != "same" for row in bench.rows):
        raise SystemExit("a resumed sweep ended otherwise")


if __name__ == "__main__":
    command() if sys.argv[1:2] == ["--command"] else main()
