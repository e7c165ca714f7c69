"""Fixtures that several test files share. What isolates a test stands in the root's conftest.py."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub import hub, logged_in  # noqa: F401  (fixtures)
from torch import Tensor

ROOT = Path(__file__).parent.parent


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one during the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pixels() -> Callable[..., Tensor]:
    """``pixels(n, channels, size)``: a batch of random images in [0, 1]."""

    def make(n: int = 4, channels: int = 1, size: int = 28) -> Tensor:
        return torch.rand(n, channels, size, size)

    return make
