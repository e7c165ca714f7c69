"""Faults that befall a sweep of two processes, as torchrun and Lightning start them.

    python -m tests.benchmarks.faults --output docs/records/faults.json --page docs/faults.md

The command is the real one, on the images and the checkpoint that come with the package. Per fault
it notes how long it takes until every process has ended, from the fault on where it has a moment
and from the start where it has not, what the command said, and whether the
same command ends with the same records afterwards, byte by byte. Disks are small file systems in
memory, which only root can mount.
"""

from __future__ import annotations

import argparse
import importlib
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
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "lightning_meansparse" / "demo"
BEGIN = "faults.md`; changes here are lost. -->\n"
END = "<!-- end -->"
IMPORTED = ("lightning_meansparse.cli.sweep", "matplotlib.pyplot", "pandas", "scipy.stats")
IMPORTED += ("transformers.modeling_utils", "torch.testing", "pyarrow.parquet", "timm")
OPTIONS = {
    "model.model": DEMO / "checkpoint",
    "model.alphas": "[0.4]",
    "model.attacks": "[pgd, adaptive-ce]",
    "model.check_images": "0",
    "model.test_alphas": "all",
    "model.eps": "0.1",
    "model.output": "sweep",
    "data.dataset": DEMO / "fashion_mnist",
    "data.batch_size": "4",
    "data.limit_holdout": "32",
    "data.limit_test": "32",
    "trainer.accelerator": "cpu",
    "trainer.devices": "2",
    "trainer.strategy": "ddp",
}


# ------------------------------------------------------------------- the command, and a fault in it


def out_of_memory() -> None:
    """A device that holds the gradients of two images."""
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


def dead_storage() -> None:
    """Held-out images on storage that has stopped to answer."""
    from lightning_meansparse.data.images import ImagePart

    read = ImagePart.__getitems__

    def hang(self: Any, places: Any) -> Any:
        if torch.utils.data.get_worker_info() is not None and len(self) == 32:
            signal.pause()
        return read(self, places)

    ImagePart.__getitems__ = hang  # type: ignore[method-assign]


def own_disk() -> None:
    """The output of the second process is on a disk of its own."""
    from lightning_meansparse.tasks import sweep

    make = sweep.Journal
    sweep.Journal = lambda folder, rank: make(folder / "own" if rank else folder, rank)  # type: ignore[misc,assignment]


def other_images() -> None:
    """What the second process has under the name of the data is not what the first has."""
    from lightning_meansparse.data import module

    if os.environ.get("LOCAL_RANK", "0") != "0":
        module.fingerprint_of = lambda parts: "another"


INSIDE: dict[str, Callable[[], None]] = {
    "memory": out_of_memory,
    "logger": failing_logger,
    "storage": dead_storage,
    "disk": own_disk,
    "images": other_images,
}


def command(words: list[str]) -> int:
    """What each process runs: `meansparse sweep`, after what `FAULT` names."""
    from lightning_meansparse.cli import main as meansparse

    Path(os.environ["PIDS"], os.environ.get("LOCAL_RANK", "0")).write_text(str(os.getpid()))
    if fault := os.environ.get("FAULT"):
        INSIDE[fault]()
    return meansparse(["sweep", *words])


def worker(words: list[str]) -> None:
    """The same in a process that was forked off, which has no end of a program."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the agent's are inherited
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        sys.exit(command(words))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------- from outside


class Job:
    """One run of the command in a folder, in a session of its own.

    torchrun's agent forks its processes off this one, which has imported everything: half a minute
    of imports per fault would tell nothing. Lightning starts programs anew.
    """

    def __init__(self, folder: Path, launcher: str = "torchrun", **options: object) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._pids = Path(tempfile.mkdtemp())
        fault = str(options.pop("FAULT", ""))
        chosen = {**OPTIONS, "trainer.logger": "true" if fault == "logger" else "false"}
        chosen |= {name.replace("__", "."): value for name, value in options.items()}
        words = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (read until the job is forgotten)
        variables = {"FAULT": fault, "PIDS": str(self._pids), "COLUMNS": "500"}
        variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._pid = os.fork()
        if self._pid == 0:
            os.setsid()
            os.chdir(folder)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it in the background
            os.environ |= variables
            for number in (1, 2):
                os.dup2(self._log.fileno(), number)
            sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
            program = [sys.executable, "-m", "tests.benchmarks.faults", "--command", *words]
            if launcher == "lightning":
                os.execv(sys.executable, program)
            os._exit(_agent(words))
        while os.getsid(self._pid) != self._pid:  # until then nobody would find its processes
            time.sleep(0.001)
        self.code: int | None = None

    def pids(self, rank: int | None = None) -> list[int]:
        """Living processes: all, or that of one rank."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except (OSError, ValueError):
                continue
            if int(session) == self._pid and state != "Z":
                found.append(int(entry.name))
        if rank is None:
            return found
        path = self._pids / str(rank)
        own = int(path.read_text() or 0) if path.exists() else 0
        return [pid for pid in found if pid == own]

    def send(self, number: int, rank: int | None = None) -> None:
        """A signal to one rank, or to every process."""
        for pid in self.pids(rank):
            os.kill(pid, number)

    def wait_for(self, there: Callable[[], bool]) -> None:
        """Until something is there, or the command has ended."""
        while self.pids() and not there():
            time.sleep(0.01)

    def working(self) -> bool:
        """Whether the sweep has begun to write."""
        return (self.folder / "sweep" / "sweep.json").exists()

    def ended(self, patience: float = 300.0) -> float:
        """Wait until no process of the session is left; return the seconds that took."""
        start = time.perf_counter()
        while self.pids():
            if time.perf_counter() - start > patience:
                self.send(signal.SIGKILL)
                self._log.seek(0)
                raise SystemExit(f"still running after {patience} s: {self._log.read()}")
            time.sleep(0.05)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return time.perf_counter() - start

    def told(self) -> list[str]:
        """What the command said of its end."""
        self._log.seek(0)
        wanted = re.compile(
            r"^(?:meansparse sweep: .*|.*(?:the sweep has stopped|out of memory with|SIGTERM: the "
            r"sweep|measuring .* again).*)$",
            re.MULTILINE,
        )
        lines = [line.strip() for line in wanted.findall(self._log.read())]
        return list(dict.fromkeys(line.replace(str(self.folder), "…") for line in lines))


def _agent(words: list[str]) -> int:
    """What `torchrun --standalone --nproc-per-node 2` does, with a function for a program."""
    configuration = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
    )
    try:
        elastic_launch(configuration, worker)(words)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@dataclass
class Bench:
    """What all faults share."""

    folder: Path
    expected: bytes
    duration: float
    draw: random.Random
    rows: list[dict[str, Any]] = field(default_factory=list)

    def content(self) -> dict[str, Any]:
        """What is kept of all."""
        return {"undisturbed seconds": round(self.duration, 1), "faults": self.rows}

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
        Console().print(row)

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
    """What Lightning's own launcher makes of a death, and what clusters send."""
    for name, launcher, number, rank in (
        ("kill -9 of rank 0", "lightning", signal.SIGKILL, 0),
        ("kill -9 of rank 1", "lightning", signal.SIGKILL, 1),
        ("SIGTERM to all, as SLURM sends it", "torchrun", signal.SIGTERM, None),
        ("SIGTERM to rank 0", "torchrun", signal.SIGTERM, 0),
        ("SIGTERM to rank 1", "lightning", signal.SIGTERM, 1),
    ):
        signalled(bench, name, launcher, number, rank)


def interrupts(bench: Bench) -> None:
    """What people send."""
    for launcher in ("torchrun", "lightning"):
        signalled(bench, "Ctrl-C", launcher, signal.SIGINT, None)


def signalled(bench: Bench, name: str, launcher: str, number: int, rank: int | None) -> None:
    """Send a signal in the middle of the work."""
    job = bench.job(launcher)
    job.wait_for(lambda: left_behind(job.folder) >= 2)
    job.send(number, rank)
    bench.note(f"{name} ({launcher})", job, job.ended(), resumed=job.folder)


@contextmanager
def file_system(bench: Bench, options: str) -> Iterator[Path]:
    """A folder whose output is on a file system of its own, in memory."""
    folder = bench.place()
    output = folder / "sweep"
    output.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", output], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", output], check=True)


def remount(folder: Path, options: str) -> None:
    """Change it while it is in use."""
    command = ["mount", "-o", f"remount,{options}", folder / "sweep"]
    while subprocess.run(command, capture_output=True).returncode:
        time.sleep(0.01)  # a file is open for writing


def disks(bench: Bench) -> None:
    """A disk that runs full, one that cannot be written to, and one that suddenly cannot."""
    with file_system(bench, "size=128k") as disk:
        job = Job(disk)
        seconds, used = job.ended(), left_behind(disk)
        remount(disk, "size=64m")
        bench.note("a disk of 128 KiB", job, seconds, resumed=disk, kept=used)
    with file_system(bench, "size=64m") as disk:
        remount(disk, "ro")
        job = Job(disk)
        seconds = job.ended()
        remount(disk, "rw")
        bench.note("read-only folder", job, seconds, resumed=disk)
    with file_system(bench, "size=64m") as disk:
        job = Job(disk)
        job.wait_for(lambda: left_behind(disk) >= 2)
        remount(disk, "ro")
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
    job = bench.job(data__num_workers=1, data__worker_timeout=5, FAULT="storage")
    bench.note("storage that does not answer (5 s allowed)", job, job.ended(), resumed=job.folder)
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
    for name, fault in (
        ("CUDA out of memory", "memory"),
        ("a logger that raises", "logger"),
        ("an output that is not the same folder for both", "disk"),
        ("other images for one of them", "images"),
    ):
        job = bench.job(FAULT=fault)
        seconds = job.ended()
        whole = bench.records(job.folder) == bench.expected
        bench.note(name, job, seconds, resumed=job.folder, whole=whole)


def main() -> None:
    """Provoke every fault, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="moments,signals,interrupts,disks,files,inputs")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--page", type=Path, help="also write the table into this page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for module in IMPORTED:
            importlib.import_module(module)
        whole = Job(Path(name, "whole"))
        whole.wait_for(whole.working)
        begin = time.time()
        whole.ended()
        records = whole.folder / "sweep" / "records.parquet"
        duration, expected = records.stat().st_mtime - begin, records.read_bytes()
        Console().log(f"undisturbed: {duration:.0f} s of work")
        bench = Bench(Path(name), expected, duration, random.Random(args.seed))
        parts = [signals, interrupts, disks, files, inputs, partial(moments, count=args.moments)]
        names = ["signals", "interrupts", "disks", "files", "inputs", "moments"]
        for part in args.only.split(","):
            parts[names.index(part)](bench)
    show(bench)
    content = bench.content()
    if args.output is not None:
        content = keep(content, args.output)
    if args.page is not None:
        write_page(content, args.page)
    if any(row.get("resumed", "same") != "same" for row in bench.rows):
        raise SystemExit("a resumed sweep ended otherwise")


def show(bench: Bench) -> None:
    """Print a table."""
    table = Table("fault", "ends after", "told", "resumed")
    for row in bench.rows:
        told = row["told"][-1] if row["told"] else ""
        table.add_row(row["fault"], f"{row['seconds to the end']} s", told, row.get("resumed", "–"))
    Console().print(table)


def markdown(content: dict[str, Any]) -> str:
    """The table of the page."""
    slowest = max(row["seconds to the end"] for row in content["faults"] if row["exit code"])
    lines = [
        "",
        "Two processes on one core, the demo's network and images, from [faults.json]"
        "(records/faults.json). Undisturbed it takes "
        f"{content['undisturbed seconds']:.0f} s; no fault that ends it takes longer than "
        f"{slowest:.0f} s to do so on all processes.",
        "",
        "| fault | exit code | all ended after | said | the same command then |",
        "|---|---|---|---|---|",
    ]
    for row in content["faults"]:
        ended = [line for line in row["told"] if line.startswith("meansparse sweep: ")]
        said = min(ended or row["told"][:1] or ["–"], key=len).removeprefix("meansparse sweep: ")
        said = said if len(said) <= 170 else f"{said[:167]}…"
        cells = (
            row["fault"],
            str(row["exit code"]),
            f"{row['seconds to the end']} s",
            said.replace("|", "/"),
            f"{row['resumed']} records" if "resumed" in row else "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", ""])


def write_page(content: dict[str, Any], path: Path) -> None:
    """Put the table between its marks."""
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(before + BEGIN + markdown(content) + END + rest.partition(END)[2])


def keep(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write JSON; what was provoked now takes the place of what was before."""
    if path.exists():
        new = {row["fault"]: row for row in content["faults"]}
        before = json.loads(path.read_text())["faults"]
        rows = [new.pop(row["fault"], row) for row in before]
        content = {**content, "faults": [*rows, *new.values()]}
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    return content


if __name__ == "__main__":
    if sys.argv[1:2] == ["--command"]:
        sys.exit(command(sys.argv[2:]))
    main()
