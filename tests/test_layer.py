"""The operator against the paper's formula, and what its gradients must and must not do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from lightning_meansparse import kernels
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


SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, np.inf, -np.inf, np.nan]


@st.composite
def at_the_edge(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Means, widths, and values that are special or within a few steps of a band's edge."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    channels = draw(st.integers(1, 4))
    numbers = st.lists(st.sampled_from(SPECIAL[:-3]) | FLOATS, min_size=channels, max_size=channels)
    # A mean beyond the largest number of half precision makes infinities, which have no gradient.
    largest = min(torch.finfo(dtype).max, 3e38)
    mean = torch.tensor(draw(numbers)).clamp(-largest, largest).view(-1, 1, 1)
    width = torch.tensor(draw(numbers)).abs().view(-1, 1, 1)
    if draw(st.booleans()):  # a variance in float64, beside a mean in float32
        width = width.double() * (1 + draw(st.floats(-1e-8, 1e-8)))
    values = [torch.tensor(SPECIAL).to(dtype).expand(channels, -1)]
    for edge in (mean - width, mean + width, mean):
        step = edge.to(dtype).view(channels, 1)
        for _ in range(4):
            values.append(step)
            step = torch.nextafter(step, torch.tensor(torch.inf, dtype=dtype))
    x = torch.cat(values, dim=1).view(channels, 1, -1).expand(3, -1, 2, -1)
    return x, mean, width


def published(x: Tensor, mean: Tensor, width: Tensor) -> Tensor:
    return torch.where((x - mean).abs() < width, mean.to(x.dtype), x)


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(raw), b.contiguous().view(raw))


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "every second": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "expanded": lambda x: x,
    "windows": lambda x: x.clone(memory_format=torch.contiguous_format).as_strided(
        x.shape, (x[0].numel(), 1, 1, 1)
    ),
}
SHARED = ("expanded", "windows")  # values share memory


@given(
    case=at_the_edge(), layout=st.sampled_from(list(LAYOUTS)), chunk=st.sampled_from([20, 2**17])
)
def test_values_gradients_and_memory_are_the_formulas(
    case: tuple[Tensor, Tensor, Tensor], layout: str, chunk: int
) -> None:
    x, mean, width = case
    x = LAYOUTS[layout](x)
    flow = torch.randn(x.shape).to(x.dtype)
    flow[0, 0, 0, :2] = torch.tensor([torch.inf, torch.nan])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_CHUNK", chunk)
        patch.setattr(kernels, "_LARGE", chunk)
        expected = published(x, mean, width)
        assert same_bits(kernels.forward(x, kernels.Band(mean, width, eager=True)), expected)
        one, other = x.detach().requires_grad_(), x.detach().requires_grad_()
        y = kernels.replace(one, kernels.Band(mean, width, eager=True))
        assert same_bits(y.detach(), expected)
        assert layout in SHARED or y.stride() == x.stride()
        (got,) = torch.autograd.grad(y, one, flow)
        (wanted,) = torch.autograd.grad(published(other, mean, width), other, flow)
        assert same_bits(got, wanted)
        if layout not in SHARED:
            copied = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)
            assert kernels.replace_(copied, kernels.Band(mean, width, eager=True)) is copied
            assert same_bits(copied, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_without_an_axis_count_in_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3).to(dtype)
    mean, var = torch.tensor(0.3), torch.tensor(2.0)
    assert same_bits(mean_sparse(x, mean, var, 0.5), published(x, mean, 0.5 * var.sqrt()))


def test_images_and_batches_of_other_layouts_are_cut_where_they_can_be() -> None:
    op, x = operator()
    batch, image = x.to(memory_format=torch.channels_last), x[0].transpose(1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_LARGE", 12)
        patch.setattr(kernels, "_CHUNK", 24)
        for part in (batch, image, batch):
            assert torch.equal(op(part), published(part, op.mean, op.alpha * op.var.sqrt()))


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU])
def test_in_place_gradients_are_those_out_of_place(act: type[nn.Module]) -> None:
    op, x = operator()
    grads = []
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        clamped = inplace and act in (nn.ReLU, nn.ReLU6)
        y = act(inplace=inplace)(op(leaf * 3, inplace=inplace, clamped=clamped))
        grads.append(torch.autograd.grad(y.square().sum(), leaf)[0])
    assert grads[0].any()
    assert torch.equal(*grads)


def test_a_result_that_is_overwritten_later_is_noticed() -> None:
    op, x = operator()
    leaf = x.clone().requires_grad_()
    y = op(leaf * 3, inplace=True, clamped=True)
    loss = y.sum()
    y.detach().add_(1).mul_(2)
    with pytest.raises(RuntimeError, match="overwritten before the backward pass"):
        loss.backward()


def test_what_overwrites_a_result_that_the_backward_pass_needs_is_told_so() -> None:
    op, x = operator()
    y = op(x.requires_grad_()).relu_()
    with pytest.raises(RuntimeError, match="Let what comes after the operator work out of place"):
        y.sum().backward()


# Torch's own rules for tangents are scripted.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:FutureWarning")
def test_double_backward_transforms_and_tangents_are_the_formulas() -> None:
    op, x = operator()
    op, x = op.double(), x.double()
    width = op.alpha * op.var.sqrt()
    assert torch.autograd.gradgradcheck(lambda v: op(v).square(), x[:1, :, :2, :2].requires_grad_())
    x = x.detach()
    assert torch.equal(torch.func.vmap(op)(x), op(x))
    tangent = torch.randn_like(x)
    _, got = torch.func.jvp(op, (x,), (tangent,))
    _, expected = torch.func.jvp(lambda v: published(v, op.mean, width), (x,), (tangent,))
    assert torch.equal(got, expected)
    assert torch.equal(torch.func.grad(lambda v: op(v).square().sum())(x), 2 * op(x) * (op(x) == x))
    with torch.autograd.forward_ad.dual_level():
        dual = op(torch.autograd.forward_ad.make_dual(x, tangent))
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected)


def test_numbers_and_gradients_may_be_batched() -> None:
    op, x = operator()
    alphas = torch.tensor([0.0, 0.5, 2.0])
    for known in (False, True):
        got = torch.func.vmap(lambda a: torch.func.functional_call(op, {"alpha": a}, (x,)))(alphas)
        for y, alpha in zip(got, alphas, strict=True):
            assert torch.equal(y, published(x, op.mean, alpha * op.var.sqrt()))
        assert torch.equal(op(x), published(x, op.mean, op.alpha * op.var.sqrt())), known
    means = torch.stack([op.mean, -op.mean])
    got = torch.func.vmap(lambda mean: mean_sparse(x, mean, op.var, 0.5))(means)
    assert torch.equal(got[1], published(x, -op.mean, 0.5 * op.var.sqrt()))
    leaf, flows = x.requires_grad_(), torch.randn(2, *x.shape)
    y = op(leaf)
    (got,) = torch.autograd.grad(y, leaf, flows, is_grads_batched=True)
    assert torch.equal(got, flows * (y == leaf))


def test_the_backward_pass_keeps_the_output_alone() -> None:
    op, x = operator()
    kept: list[int] = []
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        y = op(x)
    large = [p for p in kept if p in (x.data_ptr(), y.data_ptr())]
    assert large == [y.data_ptr()]
    assert len(kept) == 1


def test_small_maps_in_chunks_and_a_zero_that_changes_its_sign() -> None:
    x = torch.randn(9, 3, 2, 2)
    op = MeanSparse(torch.full((3, 1, 1), -0.0), torch.ones(3, 1, 1), 0.5)
    for chunks in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if chunks:
                patch.setattr(kernels, "_LARGE", 12)
                patch.setattr(kernels, "_CHUNK", 24)
            for zero in (-0.0, 0.0, torch.nan):
                op.mean.data.fill_(zero)
                expected = published(x, op.mean, op.alpha * op.var.sqrt())
                assert same_bits(op(x), expected)
                assert same_bits(op(x.clone(), inplace=True), expected)
                leaf = x.clone().requires_grad_()
                op(leaf).sum().backward()
                kept = ~((x - op.mean).abs() < 0.5)
                assert torch.equal(leaf.grad, kept.float())


CHANGES = {
    "in place": lambda op: op.mean.add_(1),
    "behind the version counter": lambda op: op.var.data.mul_(9),
    "through numpy": lambda op: np.multiply(op.var.numpy(), 9, out=op.var.numpy()),
    "another tensor": lambda op: setattr(op, "alpha", torch.tensor(2.0)),
    "another dtype": lambda op: op.double().var.mul_(9),
    "another centre": lambda op: setattr(op, "center", "zero"),
    "not a number": lambda op: op.var.fill_(torch.nan),
    "under inference mode": lambda op: torch.inference_mode()(op.mean.mul_)(3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_the_numbers_counts_at_once(
    change: Callable[[MeanSparse], object],
) -> None:
    op, x = operator()
    op(x)  # keeps a band
    before = op(x)
    change(op)
    expected = published(x, op.reference, op.alpha * op.var.sqrt())
    assert torch.equal(op(x), expected)
    assert not torch.equal(expected, before)
    with torch.inference_mode():
        op(x)
    leaf = x.clone().requires_grad_()
    op(leaf).sum().backward()
    twin = copy.deepcopy(op)
    assert twin._held is None
    assert torch.equal(twin(x), expected)


def test_a_mean_that_begins_to_want_gradients_gets_them() -> None:
    op, x = operator()
    op(x)
    op.mean.requires_grad_()
    op(x).sum().backward()
    assert op.mean.grad is not None


def test_a_mean_that_is_no_buffer_any_more_counts() -> None:
    op, x = operator()
    op(x)
    nn.utils.parametrize.register_parametrization(op, "mean", nn.Tanh())
    for _ in range(2):
        assert torch.equal(op(x), published(x, op.mean, op.alpha * op.var.sqrt()))


def test_a_band_is_made_of_the_numbers_it_is_kept_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may write into a buffer at any moment."""
    op, x = operator()
    raw = kernels.bits

    def meanwhile(t: Tensor) -> Tensor:
        found = raw(t).clone()
        op.alpha.add_(0.25)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "bits", meanwhile)
        op._band(x)
    held = op._held
    for alpha in (0.5, 0.75, 1.0, 1.25):
        op.alpha.fill_(alpha)
        op._held = held
        assert torch.equal(op(x), published(x, op.mean, op.alpha * op.var.sqrt()))


def test_a_variance_that_is_no_number_lets_everything_through() -> None:
    x = torch.tensor([0.0, -1.0, torch.inf])
    assert torch.equal(mean_sparse(x, torch.zeros(3), torch.full((3,), torch.nan), 0.5), x)


def test_gradients_reach_a_mean_that_wants_them() -> None:
    mean = torch.zeros(3, requires_grad=True)
    mean_sparse(torch.tensor([0.1, 5.0, 0.2]), mean, torch.ones(3), 0.5).sum().backward()
    assert mean.grad is not None
    assert mean.grad.tolist() == [1, 0, 1]


@pytest.mark.filterwarnings("ignore:the operator could not be compiled")
def test_the_kernel_for_gpus_falls_back_to_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    op, x = operator()
    expected = op(x)
    monkeypatch.setattr(kernels, "_is_cpu", lambda _: False)
    kernels._fused.cache_clear()

    def broken(*_: object, **__: object) -> object:
        def run(*_: object) -> object:
            raise RuntimeError("no compiler here")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="no compiler here"):
        assert torch.equal(op(x), expected)
    leaf = x.clone().requires_grad_()
    with pytest.warns(UserWarning, match="no compiler here"):
        op(leaf).sum().backward()
    assert torch.equal(leaf.grad, (expected == x).float())
    kernels._fused.cache_clear()


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_graphs_capture() -> None:
    op, x = operator()
    op, x = op.cuda(), x.cuda()
    expected = op(x.clone())  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert op(x) is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(x)
    graph.replay()
    assert torch.equal(y, expected)
    assert torch.equal(y.cpu(), op.cpu()(x.cpu()))


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
