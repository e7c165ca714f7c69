"""The operator against the paper's formula, and what its gradients must and must not do."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from lightning_meansparse.layer import MeanSparse, mean_sparse
from tests import reference

FLOATS = st.floats(-100, 100, width=32)


def operator(alpha: float = 0.5, channels: int = 3) -> tuple[MeanSparse, Tensor]:
    x = torch.randn(4, channels, 5, 5) * 2 + 1
    stats = x.mean((0, 2, 3)).view(-1, 1, 1), x.var((0, 2, 3)).view(-1, 1, 1)
    return MeanSparse(*stats, alpha), x


@given(
    data=st.data(),
    shape=hnp.array_shapes(min_dims=1, max_dims=5, max_side=4),
    alpha=st.floats(0, 3, width=32),
)
def test_equals_the_published_formula_for_any_rank_and_channel_axes(
    data: st.DataObject, shape: tuple[int, ...], alpha: float
) -> None:
    stats_shape = tuple(size if data.draw(st.booleans()) else 1 for size in shape)
    x = data.draw(hnp.arrays(np.float32, shape, elements=FLOATS))
    mean = data.draw(hnp.arrays(np.float32, stats_shape, elements=FLOATS))
    var = data.draw(hnp.arrays(np.float32, stats_shape, elements=st.floats(0, 100, width=32)))
    got = mean_sparse(
        torch.from_numpy(x), torch.from_numpy(mean), torch.from_numpy(var), alpha
    ).numpy()
    np.testing.assert_array_equal(
        got.view(np.int32), reference.mean_sparse(x, mean, var, alpha).view(np.int32)
    )


def test_the_comparison_is_strict() -> None:
    x = torch.tensor([1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()])
    assert mean_sparse(x, torch.zeros(2), torch.ones(2), 1.0).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_alpha_zero_and_zero_variance_are_the_bitwise_identity(dtype: torch.dtype) -> None:
    x = torch.tensor(
        [0.0, -0.0, 1.5, float("nan"), float("inf"), -float("inf"), 1e-40], dtype=dtype
    )
    raw = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    for var, alpha in ((torch.ones(7), 0.0), (torch.zeros(7), 2.0)):
        y = mean_sparse(x, torch.zeros(7), var, alpha)
        assert y.dtype == dtype
        assert torch.equal(y.view(raw), x.view(raw))


def test_nan_and_infinities_pass_through() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.1])
    y = mean_sparse(x, torch.zeros(4), torch.ones(4), 0.5)
    assert y[0].isnan()
    assert y[1:].tolist() == [float("inf"), -float("inf"), 0.0]


def test_idempotent_and_channels_last_is_the_transpose() -> None:
    op, x = operator()
    once = op(x)
    assert not torch.equal(once, x)
    assert torch.equal(op(once), once)
    last = MeanSparse(op.mean.flatten(), op.var.flatten(), 0.5)
    assert torch.equal(last(x.permute(0, 2, 3, 1)), once.permute(0, 2, 3, 1))
    assert torch.equal(op(x.to(memory_format=torch.channels_last)), once)


def test_half_input_is_compared_in_float32() -> None:
    op, x = operator()
    expected = op(x.half().float()).half()
    assert torch.equal(op(x.half()), expected)


def gradient(rule: str, x: Tensor, op: MeanSparse, temperature: float = 1 / 4) -> Tensor:
    x = x.clone().requires_grad_()
    y = mean_sparse(x, op.mean, op.var, 0.5, backward=rule, temperature=temperature)  # type: ignore[arg-type]
    assert torch.equal(y, op(x.detach())), "the forward must not depend on the backward rule"
    (grad,) = torch.autograd.grad(y.sum(), x)
    return grad


def test_exact_gradient_is_the_indicator_outside_the_band() -> None:
    op, x = operator()
    outside = (op(x) == x).float()
    assert 0 < outside.mean() < 1
    assert torch.equal(gradient("exact", x, op), outside)
    assert torch.equal(gradient("identity", x, op), torch.ones_like(x))


def test_smooth_gradient_is_the_slope_of_the_smooth_gate() -> None:
    op, x = operator()
    op, x = op.double(), x.double()
    slope = gradient("smooth", x, op)
    step = 1e-6
    arrays = [t.numpy() for t in (op.mean, op.var)]
    up = reference.smooth_gate(x.numpy() + step, *arrays, 0.5, 0.25)
    down = reference.smooth_gate(x.numpy() - step, *arrays, 0.5, 0.25)
    np.testing.assert_allclose(slope.numpy(), (up - down) / (2 * step), rtol=1e-5, atol=1e-5)


def test_smooth_gradient_is_finite_everywhere() -> None:
    x = torch.tensor([0.0, 1e-30, 1e30, float("inf")], requires_grad=True)
    for var in (torch.zeros(4), torch.full((4,), 1e-30), torch.ones(4)):
        y = mean_sparse(x, torch.zeros(4), var, 0.5, backward="smooth", temperature=1 / 32)
        (grad,) = torch.autograd.grad(y[:3].sum() + y[3].clamp(max=1), x)
        assert grad.isfinite().all()


def test_references_of_the_ablation() -> None:
    x = torch.tensor([[0.9, 3.1]])
    mean, var = torch.tensor([1.0, 3.0]), torch.ones(2)
    for center, expected in (("channel", [1.0, 3.0]), ("global", [0.9, 3.1]), ("zero", [0.9, 3.1])):
        assert MeanSparse(mean, var, 0.5, center=center)(x).tolist()[0] == pytest.approx(expected)  # type: ignore[arg-type]
    assert MeanSparse(mean, var, 2.0, center="global")(x).tolist() == [[2.0, 2.0]]
    assert MeanSparse(mean, var, 2.0, center="zero")(x).tolist()[0] == pytest.approx([0.0, 3.1])


@pytest.mark.parametrize("rule", ["exact", "identity", "smooth"])
def test_compiles_to_one_graph_and_never_again_over_alpha(rule: str) -> None:
    op, x = operator()
    op.backward = rule  # type: ignore[assignment]
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(op, fullgraph=True, backend=counting)
    for alpha in (0.0, 0.2, 1.0):
        op.alpha.fill_(alpha)
        assert torch.equal(compiled(x), op(x))
    assert graphs == 1


def test_statistics_survive_dtype_and_device_moves_outside_the_state_dict() -> None:
    op = MeanSparse(torch.tensor([1 / 3]), torch.tensor([1e6]), 0.2)
    holder = nn.Sequential(op, nn.Linear(1, 1))
    holder.half()
    assert op.mean.dtype == op.var.dtype == op.alpha.dtype == torch.float32
    assert op.var.item() == 1e6
    assert list(holder.state_dict()) == ["1.weight", "1.bias"]
    for twin in (copy.deepcopy(op), pickle.loads(pickle.dumps(op))):
        assert torch.equal(twin.mean, op.mean)
        assert twin.center == op.center
    op.double()
    assert op.mean.dtype == torch.float64
    assert op.to("meta").mean.is_meta


def test_bad_input_is_named() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    with pytest.raises(TypeError, match="floating-point"):
        mean_sparse(torch.zeros(3, dtype=torch.int64), zeros, ones, 0.1)
    with pytest.raises(ValueError, match="mean must broadcast"):
        mean_sparse(torch.zeros(2, 4), zeros, ones, 0.1)
    for alpha in (-0.1, float("nan"), float("inf"), True, "0.2"):
        with pytest.raises(ValueError, match="alpha must be"):
            MeanSparse(zeros, ones, alpha)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="center must be"):
        MeanSparse(zeros, ones, center="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="var must not be negative"):
        MeanSparse(zeros, -ones)
    with pytest.raises(ValueError, match="one shape"):
        MeanSparse(zeros, torch.ones(2))
    with pytest.raises(ValueError, match="backward rule"):
        mean_sparse(zeros, zeros, ones, 0.1, backward="bpda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature"):
        mean_sparse(zeros, zeros, ones, 0.1, backward="smooth", temperature=0)
