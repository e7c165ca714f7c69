"""Surgery: what a model must keep while operators go in, are calibrated, switched and taken out."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_meansparse.layer import MeanSparse
from lightning_meansparse.sites import Site
from lightning_meansparse.surgery import (
    alpha_set,
    alphas,
    backward_rule,
    calibrate_,
    operators,
    restore_,
    set_alpha,
    sparsify_,
)
from tests import reference


class Block(nn.Module):
    """A residual block that returns a tuple, with a PReLU (an activation with parameters)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.PReLU(6)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x + self.act(self.norm(self.conv(x))), "aux"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU())
        self.block = Block()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.block(self.stem(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


SITES = (
    Site("stem.1", "in", (6, 1, 1)),
    Site("block.act", "in", (6, 1, 1)),
    Site("block", "out", (6, 1, 1), index=0),
    Site("head", "out", (4,)),
)
IMAGES = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def calibrated(net: Net) -> Net:
    sparsify_(net, SITES, alpha=0.5)
    calibrate_(net, IMAGES.split(5))
    return net


def test_insertion_keeps_class_keys_and_outputs(net: Net) -> None:
    twin = copy.deepcopy(net)
    sparsify_(net, SITES)
    calibrate_(net, [IMAGES])
    assert list(operators(net)) == [str(site) for site in SITES]
    assert type(net) is Net
    assert type(net.block.act) is nn.PReLU
    assert list(net.state_dict()) == list(twin.state_dict())
    assert torch.equal(net(IMAGES), twin(IMAGES)), "alpha 0 must be the base, bit for bit"
    net.load_state_dict(twin.state_dict(), strict=True)
    Net().load_state_dict(net.state_dict(), strict=True)
    set_alpha(net, 0.5)
    assert not torch.equal(net(IMAGES), twin(IMAGES))


def test_restore_is_exact(net: Net) -> None:
    def anatomy(model: nn.Module) -> list[tuple[str, type, tuple[str, ...], int, int, bool]]:
        return [
            (
                name,
                type(module),
                tuple(module._modules),
                len(module._forward_pre_hooks),
                len(module._forward_hooks),
                module.training,
            )
            for name, module in model.named_modules()
        ]

    seen = []
    net.block.act.register_forward_pre_hook(lambda module, args: seen.append(1))
    before, expected = anatomy(net), net(IMAGES)
    sparsify_(net, SITES, alpha=0.5)
    calibrate_(net, [IMAGES])
    assert anatomy(net) != before
    restore_(net)
    assert anatomy(net) == before
    assert torch.equal(net(IMAGES), expected)
    assert len(seen) == 3, "a hook of somebody else stays"
    restore_(net)
    sparsify_(net, SITES)


def test_calibration_measures_what_reaches_each_site(net: Net) -> None:
    expected: dict[str, list[Tensor]] = {"stem.1@in": [], "block.act@in": [], "block@out[0]": []}
    handles = [
        net.stem[1].register_forward_hook(lambda m, a, o: expected["stem.1@in"].append(a[0])),
        net.block.act.register_forward_hook(lambda m, a, o: expected["block.act@in"].append(a[0])),
        net.block.register_forward_hook(lambda m, a, o: expected["block@out[0]"].append(o[0])),
    ]
    with torch.no_grad():
        net(IMAGES)
    for handle in handles:
        handle.remove()
    net.train()
    net.head.eval()
    sparsify_(net, SITES, alpha=2.0)
    running = net.block.norm.running_mean.clone()
    calibrate_(net, ((images, torch.zeros(len(images))) for images in IMAGES.split(5)))
    assert (net.training, net.head.training, net.block.norm.training) == (True, False, True)
    assert torch.equal(net.block.norm.running_mean, running)
    for name, tensors in expected.items():
        mean, var = reference.pooled([t.numpy() for t in tensors], (0, 2, 3))
        op = operators(net)[name]
        np.testing.assert_allclose(op.mean.flatten().numpy(), mean.astype(float), rtol=1e-5)
        np.testing.assert_allclose(op.var.flatten().numpy(), var.astype(float), rtol=1e-5)
    assert set(alphas(net).values()) == {2.0}


def test_one_pass_serves_every_placement(net: Net) -> None:
    alone: dict[str, MeanSparse] = {}
    for site in SITES:
        twin = copy.deepcopy(net)
        sparsify_(twin, [site], alpha=1.0)
        calibrate_(twin, IMAGES.split(5))
        alone |= operators(twin)
    sparsify_(net, SITES, alpha=1.0)
    calibrate_(net, IMAGES.split(5))
    for name, op in operators(net).items():
        assert torch.equal(op.mean, alone[name].mean)
        assert torch.equal(op.var, alone[name].var)


class Overwriting(nn.Module):
    """What comes after ``norm`` overwrites its output."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.norm(x), x)


@pytest.mark.parametrize("size", [2, 8])  # small maps are worked on as matrices
@pytest.mark.parametrize(
    "how",
    [lambda y, x: y.relu_(), lambda y, x: y.add_(x), lambda y, x: y.mul_(x)],
    ids=["relu", "add", "mul"],
)
def test_what_an_operator_put_out_may_be_overwritten(
    how: Callable[[Tensor, Tensor], Tensor], size: int
) -> None:
    net, x = Overwriting(how).eval(), torch.randn(4, 3, size, size)
    sparsify_(net, [Site("norm", "out", (3, 1, 1))], alpha=0.5)
    calibrate_(net, [x])
    (op,) = operators(net).values()
    width, leaf, twin = op.alpha * op.var.sqrt(), x.clone(), x.clone()
    net(leaf.requires_grad_()).square().sum().backward()
    restore_(net)
    y = net.norm(twin.requires_grad_())
    y = torch.where((y - op.mean).abs() < width, op.mean, y)
    how(y, twin).square().sum().backward()
    assert leaf.grad.any()
    assert torch.equal(leaf.grad, twin.grad)


def test_a_second_calibration_overwrites_and_a_failed_one_changes_nothing(calibrated: Net) -> None:
    first = {name: op.mean.clone() for name, op in operators(calibrated).items()}
    other = IMAGES * 0.3

    def failing() -> object:
        yield other
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_(calibrated, failing())
    with pytest.raises(ValueError, match="not finite"):
        calibrate_(calibrated, [other, other * float("nan")])
    for name, op in operators(calibrated).items():
        assert torch.equal(op.mean, first[name])
        assert op.alpha.item() == 0.5
        assert not op._forward_pre_hooks
    calibrate_(calibrated, [other])
    fresh = Net().eval()
    fresh.load_state_dict(calibrated.state_dict())
    sparsify_(fresh, SITES)
    calibrate_(fresh, [other])
    for name, op in operators(calibrated).items():
        assert torch.equal(op.mean, operators(fresh)[name].mean)
        assert not torch.equal(op.mean, first[name])


def test_batches_of_every_form_and_their_limit(net: Net) -> None:
    sparsify_(net, SITES)
    results = []
    for batches in ([IMAGES[:4]], [(IMAGES[:4], None)], [{"image": IMAGES[:4]}]):
        calibrate_(net, batches)
        results.append(operators(net)["stem.1@in"].mean.clone())
    taken = []
    calibrate_(net, (taken.append(1) or IMAGES[:4] for _ in range(9)), max_batches=1)
    results.append(operators(net)["stem.1@in"].mean.clone())
    assert len(taken) == 1, "no batch beyond the limit may be drawn"
    assert all(torch.equal(result, results[0]) for result in results)
    for bad in (["text"], [{"pixels": IMAGES}], [3]):
        with pytest.raises(ValueError, match="batches must hold"):
            calibrate_(net, bad)
    with pytest.raises(ValueError, match="at least one image"):
        calibrate_(net, [])
    with pytest.raises(ValueError, match="max_batches"):
        calibrate_(net, [IMAGES], max_batches=0)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_carry_their_own_operators(
    calibrated: Net, copier: Callable[[nn.Module], nn.Module]
) -> None:
    twin = copier(calibrated)
    assert torch.equal(twin(IMAGES), calibrated(IMAGES))
    set_alpha(twin, 0.0)
    assert set(alphas(calibrated).values()) == {0.5}
    assert not torch.equal(twin(IMAGES), calibrated(IMAGES))
    restore_(twin)
    assert operators(calibrated)
    assert not operators(twin)


def test_half_double_and_channels_last(calibrated: Net) -> None:
    expected = calibrated(IMAGES)
    last = copy.deepcopy(calibrated).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(IMAGES.to(memory_format=torch.channels_last)), expected)
    double = copy.deepcopy(calibrated).double()
    assert double(IMAGES.double()).dtype == torch.float64
    low = copy.deepcopy(calibrated).bfloat16()
    out = low(IMAGES.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


def test_set_alpha_by_glob(calibrated: Net) -> None:
    set_alpha(calibrated, {"block*": 0.1, "block@out[0]": 0.3})
    assert alphas(calibrated) == {
        "stem.1@in": 0.5,
        "block.act@in": 0.1,
        "block@out[0]": 0.3,
        "head@out": 0.5,
    }
    before = alphas(calibrated)
    with pytest.raises(ValueError, match=r"no site matches 'blok\*'.*block"):
        set_alpha(calibrated, {"*": 0.2, "blok*": 0.1})
    with pytest.raises(ValueError, match="alpha must be"):
        set_alpha(calibrated, {"*": 0.2, "head*": -1})
    assert alphas(calibrated) == before
    with pytest.raises(RuntimeError, match="no MeanSparse operators"):
        set_alpha(Net(), 0.1)


def test_contexts_restore_also_after_an_exception(calibrated: Net) -> None:
    set_alpha(calibrated, {"head*": 0.1})
    before = alphas(calibrated)
    with pytest.raises(KeyboardInterrupt), alpha_set(calibrated, 0.0):  # noqa: PT012
        assert set(alphas(calibrated).values()) == {0.0}
        with backward_rule(calibrated, "smooth", temperature=0.1):
            assert {op.backward for op in operators(calibrated).values()} == {"smooth"}
            raise KeyboardInterrupt
    assert alphas(calibrated) == before
    assert {op.backward for op in operators(calibrated).values()} == {"exact"}
    with pytest.raises(ValueError, match="backward rule"), backward_rule(calibrated, "bpda"):  # type: ignore[arg-type]
        pass


def test_backward_rules_change_the_gradient_of_the_input_only(calibrated: Net) -> None:
    gradients = {}
    for rule in ("exact", "identity", "smooth"):
        x = IMAGES.clone().requires_grad_()
        with backward_rule(calibrated, rule):  # type: ignore[arg-type]
            y = calibrated(x)
            assert torch.equal(y, calibrated(IMAGES))
            (gradients[rule],) = torch.autograd.grad(y.square().sum(), x)
    assert not torch.equal(gradients["exact"], gradients["identity"])
    assert not torch.equal(gradients["smooth"], gradients["identity"])


def test_operators_born_in_inference_mode_take_part_in_a_backward_pass(net: Net) -> None:
    with torch.inference_mode():
        sparsify_(net, SITES, alpha=0.5)
        calibrate_(net, [IMAGES])
        set_alpha(net, 0.4)
    x = IMAGES.clone().requires_grad_()
    net(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site("block.akt", "in", (6, 1, 1)), r"no module 'block.akt', but it has block.act"),
        (Site("stem", "out", (6, 1, 1)), "Name its first or last child"),
        (Site("block", "in", (6, 1, 1), call="relu[0]"), "code of Block has no call of relu"),
    ],
)
def test_all_checks_come_before_the_first_change(net: Net, site: Site, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify_(net, (*SITES, site))
    assert not operators(net)
    with pytest.raises(ValueError, match="repeated"):
        sparsify_(net, (*SITES, SITES[0]))
    with pytest.raises(ValueError, match="sites is empty"):
        sparsify_(net, ())
    for options in ({"alpha": -1.0}, {"center": "median"}):
        with pytest.raises(ValueError, match=r"alpha must be|center must be"):
            sparsify_(net, SITES, **options)  # type: ignore[arg-type]
    assert not operators(net)
    sparsify_(net, SITES)
    with pytest.raises(ValueError, match="already sparsified"):
        sparsify_(net, SITES[:1])


def test_an_operator_that_is_never_reached_is_named(net: Net) -> None:
    net.unused = nn.ReLU()
    sparsify_(net, (*SITES, Site("unused", "in", (6, 1, 1))))
    with pytest.raises(RuntimeError, match="never reached unused@in"):
        calibrate_(net, [IMAGES])
    with pytest.raises(RuntimeError, match="no MeanSparse operators"):
        calibrate_(Net(), [IMAGES])


def test_an_operator_built_in_by_hand_is_found(net: Net) -> None:
    model = nn.Sequential(MeanSparse(torch.zeros(3, 1, 1), torch.zeros(3, 1, 1)), net)
    calibrate_(model, [IMAGES])
    torch.testing.assert_close(operators(model)["0"].mean.flatten(), IMAGES.mean((0, 2, 3)))
    restore_(model)
    assert isinstance(model[0], MeanSparse)


def test_the_whole_model_compiles_to_one_graph(calibrated: Net) -> None:
    compiled = torch.compile(calibrated, fullgraph=True, backend="eager")
    for alpha in (0.0, 0.3):
        set_alpha(calibrated, alpha)
        torch.testing.assert_close(compiled(IMAGES), calibrated(IMAGES))


def test_wrapped_in_another_module_the_sites_carry_the_prefix(calibrated: Net) -> None:
    wrapper = nn.ModuleDict({"model": calibrated})
    assert list(alphas(wrapper)) == [f"model.{site}" for site in SITES]
    assert functools.reduce(lambda n, _: n + 1, operators(wrapper), 0) == len(SITES)
