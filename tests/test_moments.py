"""Channel moments against NumPy in extended precision, over any split, order and merge tree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_meansparse.moments import ChannelMoments
from tests import reference

AXES = (0, 2, 3)


def numbers(seed: int, n: int, mean: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.5, 2, size=(1, 3, 1, 1))
    return (rng.normal(size=(n, 3, 4, 5)) * scale + mean).astype(np.float32)


def assert_close(moments: ChannelMoments, mean: np.ndarray, var: np.ndarray) -> None:
    sigma = np.sqrt(var.astype(np.float64))
    np.testing.assert_allclose(moments.var.flatten().numpy(), var.astype(np.float64), rtol=1e-9)
    assert np.max(np.abs(moments.mean.flatten().numpy() - mean.astype(np.float64)) / sigma) < 1e-9


@given(
    seed=st.integers(0, 999),
    cuts=st.lists(st.integers(0, 20), max_size=6),
    scale=st.sampled_from([0.0, 1.0, 1e3]),
)
def test_any_split_order_and_merge_tree_gives_the_pooled_moments(
    seed: int, cuts: list[int], scale: float
) -> None:
    x = numbers(seed, 20, mean=scale)
    parts = np.split(x, sorted(cuts))
    np.random.default_rng(seed).shuffle(parts)
    expected = reference.pooled([x], AXES)

    running = ChannelMoments((3, 1, 1))
    for part in parts:
        running.update(torch.from_numpy(part))
    assert running.count == x.size // 3
    assert_close(running, *expected)

    leaves = [ChannelMoments((3, 1, 1)) for _ in parts]
    for leaf, part in zip(leaves, parts, strict=True):
        leaf.update(torch.from_numpy(part))
    while len(leaves) > 1:  # a balanced tree instead of a chain
        leaves = [leaves[i : i + 2] for i in range(0, len(leaves), 2)]  # type: ignore[misc]
        leaves = [_merged(pair) for pair in leaves]  # type: ignore[arg-type]
    assert_close(leaves[0], *expected)


def _merged(pair: list[ChannelMoments]) -> ChannelMoments:
    for other in pair[1:]:
        pair[0].merge(other)
    return pair[0]


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((3, 1, 1), lambda x: x),
        ((3,), lambda x: x.permute(0, 2, 3, 1)),
        ((3,), lambda x: x.permute(0, 2, 3, 1).flatten(1, 2)),
        ((3, 1), lambda x: x.flatten(2)),
    ],
)
def test_layouts_agree(
    shape: tuple[int, ...], layout: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    x = torch.from_numpy(numbers(0, 6))
    moments = ChannelMoments(shape)
    moments.update(layout(x))
    assert_close(moments, *reference.pooled([x.numpy()], AXES))


def test_channels_on_several_axes() -> None:
    x = torch.randn(6, 3, 5, 4)
    moments = ChannelMoments((3, 1, 4))
    moments.update(x)
    np.testing.assert_allclose(
        moments.var.squeeze().numpy(), x.double().numpy().var((0, 2)), rtol=1e-9
    )


def test_a_mean_far_from_zero_costs_no_digits_and_chunks_do_not_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = numbers(1, 64, mean=1e4)
    monkeypatch.setattr("lightning_meansparse.moments._CHUNK", 500)
    moments = ChannelMoments((3, 1, 1))
    moments.update(torch.from_numpy(x))
    assert_close(moments, *reference.pooled([x], AXES))


def test_official_averages_batches_with_equal_weight() -> None:
    batches = [numbers(2, 8), numbers(3, 8), numbers(4, 2, mean=5)]
    moments = ChannelMoments((3, 1, 1), statistics="official")
    for batch in batches:
        moments.update(torch.from_numpy(batch))
    expected = reference.official(batches, AXES)
    assert_close(moments, *expected)
    assert not np.allclose(
        expected[1].astype(float), reference.pooled(batches, AXES)[1].astype(float), rtol=1e-2
    )

    halves = [ChannelMoments((3, 1, 1), statistics="official") for _ in range(2)]
    for i, batch in enumerate(batches):
        halves[i % 2].update(torch.from_numpy(batch))
    assert_close(_merged(halves), *expected)


def test_official_equals_the_authors_loop() -> None:
    batches = [torch.from_numpy(numbers(seed, 8)) for seed in range(3)]
    mean = sum(b.mean(AXES) / len(batches) for b in batches)
    var = sum(b.var(AXES) / len(batches) for b in batches)
    moments = ChannelMoments((3, 1, 1), statistics="official")
    for batch in batches:
        moments.update(batch)
    torch.testing.assert_close(moments.mean.flatten().float(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.var.flatten().float(), var, rtol=1e-5, atol=1e-6)


def test_half_precision_and_empty_batches() -> None:
    x = torch.randn(8, 3, 2, 2).bfloat16()
    moments = ChannelMoments((3, 1, 1))
    moments.update(x[:0])
    assert moments.count == 0
    moments.update(x)
    assert_close(moments, *reference.pooled([x.float().numpy()], AXES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_overwritten_after_it_was_counted_still_counts(dtype: torch.dtype) -> None:
    x = torch.randn(8, 3, 2, 2, dtype=dtype) + 5
    expected = reference.pooled([x.numpy().copy()], AXES)
    moments = ChannelMoments((3, 1, 1))
    moments.update(x)
    x.zero_()
    assert_close(moments, *expected)


def test_a_batch_that_is_refused_changes_nothing() -> None:
    moments = ChannelMoments((3,), statistics="official")
    with pytest.raises(ValueError, match="at least 2"):
        moments.update(torch.ones(1, 3))
    assert not moments.mean.any()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="shape must be positive"):
        ChannelMoments((0,))
    with pytest.raises(ValueError, match="statistics must be"):
        ChannelMoments((3,), statistics="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got \\(2, 4\\)"):
        ChannelMoments((3,)).update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="at least 2"):
        ChannelMoments((3,), statistics="official").update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="cannot merge"):
        ChannelMoments((3,)).merge(ChannelMoments((2,)))
