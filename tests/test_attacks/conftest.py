"""A standard-trained, sparsified net and its images, made once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_meansparse.attacks import (
    Evaluation,
    evaluate,
)
from lightning_meansparse.demo.network import ConvNet
from lightning_meansparse.sites import Site
from lightning_meansparse.surgery import calibrate_, set_alpha, sparsify_
from tests.test_attacks.victims import EPS, SHORT, N


def _data(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four smooth patterns under noise: easy to tell apart, and easy to attack."""
    patterns = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    patterns = F.interpolate(patterns, size=(12, 12), mode="bilinear")
    labels = torch.randint(4, (count,), generator=generator)
    noise = torch.randn(count, 1, 12, 12, generator=generator)
    return (0.25 + 0.35 * patterns[labels] + 0.15 * noise).clamp(0, 1), labels


@pytest.fixture(scope="session")
def task() -> tuple[ConvNet, Tensor, Tensor]:
    """A standard-trained, sparsified net (alpha 0) with test images; tests deepcopy the net."""
    generator = torch.Generator().manual_seed(1)
    images, labels = _data(1500, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ConvNet(1, 4, 8)
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for step in range(80):
            rows = slice(step * 64 % 1400, step * 64 % 1400 + 64)
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
    model.eval()
    widths = (8, 16, 16, 32)
    sparsify_(model, [Site(f"stage{i}.act", "in", (w, 1, 1)) for i, w in enumerate(widths, 1)])
    calibrate_(model, images.split(250))
    return model, *_data(N, generator)


@pytest.fixture
def net(task: tuple[ConvNet, Tensor, Tensor]) -> ConvNet:
    return copy.deepcopy(task[0])


@pytest.fixture
def images(task: tuple[ConvNet, Tensor, Tensor]) -> Tensor:
    return task[1].clone()


@pytest.fixture
def labels(task: tuple[ConvNet, Tensor, Tensor]) -> Tensor:
    return task[2].clone()


@pytest.fixture(scope="session")
def short(task: tuple[ConvNet, Tensor, Tensor]) -> Evaluation:
    """The short suite at alpha 0.6, once for all tests that only look at a result."""
    model = copy.deepcopy(task[0])
    set_alpha(model, 0.6)
    return evaluate(model, task[1], task[2], attacks=SHORT, eps=EPS, keep_examples=True)
