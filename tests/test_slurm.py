"""The SLURM script, with stand-ins for srun, scontrol and the program: what they are told."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "recipes" / "slurm" / "sweep.sbatch"
# As the real ones: srun hands SIGTERM on to its tasks, and a sweep ends on it with 143.
STAND_INS = {
    "srun": 'shift; exec "$@"',
    "meansparse": 'printf "%s\\n" "$@" > words; {work}',
    "scontrol": 'echo "$@" > requeued',
}
WAITS = "trap 'touch warned; exit 143' TERM; echo started; while :; do read -rt 1 <> pipe; done"


@contextmanager
def started(folder: Path, work: str) -> Iterator[subprocess.Popen[str]]:
    """The job, which does not outlive the test."""
    os.mkfifo(folder / "pipe")
    for name, body in STAND_INS.items():
        program = folder / name
        program.write_text("#!/bin/bash\n" + body.replace("{work}", work) + "\n")
        program.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    job = subprocess.Popen(
        ["bash", str(SCRIPT), "--config", "a file.yaml"],
        cwd=folder,
        env={**os.environ, **slurm, "PATH": f"{folder}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield job
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.communicate()


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_ends_as_its_sweep_does(tmp_path, code):
    with started(tmp_path, f"exit {code}") as job:
        assert job.wait(20) == code
    words = (tmp_path / "words").read_text().splitlines()
    assert words == [
        "sweep",
        *("--trainer.num_nodes", "2"),
        *("--trainer.devices", "4"),
        *("--trainer.strategy", "ddp"),
        *("--config", "a file.yaml"),
    ]
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 143)])
def test_a_warned_job_ends_its_sweep_and_only_the_time_limit_queues_it_again(tmp_path, sent, code):
    with started(tmp_path, WAITS) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "started\n"
        job.send_signal(sent)
        assert job.wait(20) == code
    assert (tmp_path / "warned").exists()
    requeued = tmp_path / "requeued"
    assert requeued.exists() == (sent == signal.SIGUSR1)
    assert not requeued.exists() or requeued.read_text() == "requeue 7\n"
