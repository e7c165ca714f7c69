"""Isolation for every test and every doctest: offline, seeded, one thread, no files left behind.

It stands at the root, not in ``tests/``, because the doctests inside the package need it too.
"""

import contextlib
import os
import random
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before any import of torch or of Hugging Face code, which read these once; child processes inherit
# them. One thread, because two ranks or two workers on two cores need no more.
_scratch = Path(tempfile.mkdtemp(prefix="meansparse-tests-"))
os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HOME=str(_scratch / "huggingface"),
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
)

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

# Or --doctest-modules would look for examples in them and trip over their common name.
collect_ignore_glob = ["*conftest.py"]


def pytest_unconfigure() -> None:
    """Remove what data sets and hubs cached during the run."""
    shutil.rmtree(_scratch, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Seed every generator from the test's name: alone or in a suite, it sees the same numbers."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _doctests_write_elsewhere(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run doctests in an empty folder, so that an example may write files."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    folder = tempfile.mkdtemp(dir=_scratch)
    with contextlib.chdir(folder):
        yield


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest) -> Iterator[None]:
    """Refuse every connection that would leave this machine, except in tests marked ``hub``."""
    if request.node.get_closest_marker("hub"):
        yield
        return
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0]
            if host not in {"127.0.0.1", "::1", "localhost"}:
                raise RuntimeError(f"a test tried to reach {host}; tests run offline (marker: hub)")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield
