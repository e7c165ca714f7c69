"""Sites amid a module's code: which are found, that operators stand just there, and exact undo."""

import ast
import contextlib
import copy
import functools
import linecache
import pickle
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torchvision import models as tv

from lightning_meansparse import (
    backward_rule,
    calibrate_,
    find_sites,
    load_adapter,
    restore_,
    save_adapter,
    set_alpha,
    sparsify_,
)
from lightning_meansparse.sites import Site, UnreachableSitesError
from lightning_meansparse.sites.source import SUM, called, code_of
from lightning_meansparse.surgery import operators

IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Base(nn.Module):
    """A convolution, so that there are channels, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.act = nn.ReLU()
        self.head = nn.Linear(6, 4)

    def classify(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))

    def _mish(self, x: Tensor) -> Tensor:
        return F.mish(x)


class Functional(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x), inplace=True)
        x = torch.sigmoid(self.again(x))
        x = self.again(x).tanh()
        return self.classify(nn.functional.gelu(input=self.again(x)))


class Shared(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.again(self.act(self.conv(x))))
        return self.classify(x)


class Looped(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for conv in (self.again, self.again, self.again):
            x = conv(self.act(x))
        return self.classify(x)


class Comprehension(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        parts = [F.silu(self.again(part)) for part in (x, -x)]
        return self.classify(functools.reduce(torch.add, parts))


def outer_helper(x: Tensor, conv: nn.Module) -> Tensor:
    return F.relu(conv(x))


class Helped(Base):
    """Calls in a method, in one of the base class's, in a private one and in a function."""

    def forward(self, x: Tensor) -> Tensor:
        x = self._first(self.conv(x))
        x = self.__hidden(x)
        x = outer_helper(x, self.again)
        return self.classify(super()._mish(x))

    def _first(self, x: Tensor, *, negative: bool = True) -> Tensor:
        return F.elu(x) if negative else F.relu(x)

    def __hidden(self, x: Tensor) -> Tensor:
        return F.elu(self.again(x))

    def _mish(self, x: Tensor) -> Tensor:
        raise AssertionError("never called")


class Inherited(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class InPlace(Base):
    """Statements whose value nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.act(x)
        x = self.again(x)
        F.elu_(x)
        x = self.again(x)
        x.sigmoid_()
        return self.classify(x)


class Attribute(Base):
    """A function that the module holds, as Hugging Face's ACT2FN gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = F.gelu
        self.table = {"a": nn.functional.hardswish}
        self.partial = functools.partial(F.leaky_relu, negative_slope=0.3)
        self.wrapped = lambda x: F.silu(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act_fn(self.conv(x))
        x = self.table["a"](self.again(x))
        x = self.partial(self.again(x))
        return self.classify(self.wrapped(self.again(x)))


class Residual(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x + self.again(x)
        x += self.again(x)
        x = torch.add(x, self.again(x))
        x = x.add(self.again(x))
        x = x + 1 + torch.ones(6, 1, 1)
        return self.classify(self.act(self.again(x)))


class Nested(Base):
    """Functions inside the forward, one in two lines, each called twice."""

    def forward(self, x: Tensor) -> Tensor:
        def block(y: Tensor) -> Tensor:
            y = self.again(y)
            return F.relu(y)

        fold = lambda y: torch.tanh(self.again(y))  # noqa: E731
        return self.classify(fold(fold(block(block(self.conv(x))))))


class Methods(Base):
    """Static, class and decorated methods, a property, and calls of calls."""

    @staticmethod
    def still(x: Tensor) -> Tensor:
        return F.relu(x)

    @classmethod
    def classy(cls, x: Tensor) -> Tensor:
        return F.gelu(x)

    @torch.enable_grad()
    def decorated(self, x: Tensor) -> Tensor:
        return F.elu(x)

    @property
    def chosen(self) -> nn.Module:
        return self.act

    def forward(self, x: Tensor) -> Tensor:
        x = self.still(self.conv(x))
        x = self.classy(self.again(x))
        x = self.decorated(self.again(x))
        x = self.chosen(self.again(x))
        x = getattr(F, "silu")(self.again(x))  # noqa: B009
        return self.classify(functools.partial(F.leaky_relu, negative_slope=0.3)(self.again(x)))


def act(x: Tensor) -> Tensor:
    raise AssertionError("a local name must hide it")


class Namesakes(Base):
    """A method named like the function that it calls, and a local name like a function's."""

    def relu(self, x: Tensor, __scale: float = 1.0) -> Tensor:
        return F.relu(x * __scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x), 2.0)
        x = (lambda act, y: act(y))(F.gelu, self.again(x))
        return self.classify(self.relu(F.relu(self.again(x))))


class Rectified(Base):
    """Rectifiers by other names, and calls of the same names that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.rand(6, 1, 1) / 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.maximum(self.conv(x), -self.conv(x))
        x = self.again(torch.maximum(x, self.tau))
        return self.classify(x)


class Overwritten(Base):
    """Its activations overwrite what the network uses again under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.again(self.act(x)) + x
        z = self.again(F.elu(y, 0.7, True)) + y
        z.sigmoid_()
        return self.classify(z)


class Repeated(Base):
    """A module with a functional call, called twice: one site for both runs."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Once()

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.block(self.block(self.conv(x))))


class Once(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


def in_sequence() -> nn.Sequential:
    """One activation at two places of a Sequential."""
    act = nn.GELU()
    return nn.Sequential(nn.Conv2d(3, 6, 3), act, nn.Conv2d(6, 8, 3), act, nn.AvgPool2d(4))


def logging(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        wrapper.calls += 1
        return function(*args, **kwargs)

    wrapper.calls = 0
    return wrapper


class Decorated(Base):
    @logging
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.classify(F.relu(self.conv(x)))


NETS: dict[str, tuple[Any, list[str]]] = {
    "functional": (
        Functional,
        ["::relu[0]@in", "::sigmoid[0]@in", "::tanh[0]@in", "::gelu[0]@in"],
    ),
    "shared": (Shared, ["::act[0]@in", "::act[1]@in"]),
    "looped": (Looped, ["::act[0]@in", "::act[1]@in", "::act[2]@in"]),
    "comprehension": (Comprehension, ["::silu[0]@in", "::silu[1]@in"]),
    "helped": (Helped, ["::elu[0]@in", "::elu[1]@in", "::relu[0]@in", "::mish[0]@in"]),
    "inherited": (Inherited, ["::act[0]@in", "::act[1]@in"]),
    "in place": (InPlace, ["::act[0]@in", "::elu[0]@in", "::sigmoid[0]@in"]),
    "attribute": (
        Attribute,
        ["::act_fn[0]@in", "::table[0]@in", "::partial[0]@in", "::wrapped[0]@in"],
    ),
    "nested": (Nested, ["::relu[0]@in", "::relu[1]@in", "::tanh[0]@in", "::tanh[1]@in"]),
    "methods": (
        Methods,
        [
            "::relu[0]@in",
            "::gelu[0]@in",
            "::elu[0]@in",
            "act@in",  # by way of a property, once
            "::getattr_call[0]@in",
            "::partial_call[0]@in",
        ],
    ),
    "namesakes": (
        Namesakes,
        ["::relu[0]@in", "::act[0]@in", "::relu[1]@in", "::relu[2]@in"],
    ),
    # the first maximum counts though it is no activation
    "rectified": (Rectified, ["::maximum[1]@in"]),
    "overwritten": (
        Overwritten,
        ["act@in", "::elu[0]@in", "::sigmoid[0]@in"],
    ),
    "repeated": (Repeated, ["block::relu[0]@in"]),
    "sequence": (in_sequence, ["::module[1]@in", "::module[3]@in"]),
    "decorated": (Decorated, ["::relu[0]@in"]),
}
REAL: dict[str, Any] = {
    "torchvision resnet18": tv.resnet18,
    "torchvision googlenet": lambda: tv.googlenet(aux_logits=False, init_weights=False),
    "timm res2net": lambda: timm.create_model("res2net50_14w_8s", layers=(1, 1, 1, 1)),
    "timm hrnet": lambda: timm.create_model("hrnet_w18_small"),
    "timm efficientvit": lambda: timm.create_model("efficientvit_b0"),
}


@pytest.fixture(params=NETS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, list[str]]:
    build, sites = NETS[request.param]
    return build().eval(), sites


class Reference(TorchFunctionMode):
    """Applies the published formula to the input of every activation, in execution order.

    It knows the functions of torch and nothing of sites, sources or modules.
    """

    RECTIFIERS = frozenset({"maximum"})
    NAMES = frozenset(
        {"relu", "sigmoid", "tanh", "gelu", "silu", "elu", "mish", "hardswish", "leaky_relu"}
    )

    def __init__(self, statistics: list[tuple[Tensor, Tensor, float]]) -> None:
        super().__init__()
        self.statistics = iter(statistics)
        self.inputs: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "").rstrip("_")
        if name in self.NAMES or (name in self.RECTIFIERS and self.rectifies(*args, **kwargs)):
            x = args[0] if args else kwargs["input"]
            self.inputs.append(x.clone())
            mean, var, alpha = next(self.statistics)
            x.copy_(torch.where((x - mean).abs() < alpha * var.sqrt(), mean, x))
        return func(*args, **kwargs)

    @staticmethod
    def rectifies(x: Tensor, bound: Any = None, top: Any = None, *, min: Any = None) -> bool:
        bound = min if bound is None else bound
        return isinstance(bound, nn.Parameter) if isinstance(bound, Tensor) else bound == 0


def statistics_of(model: nn.Module, names: list[str]) -> list[tuple[Tensor, Tensor, float]]:
    """What the operators hold, in the order given."""
    found = operators(model)
    return [(found[name].mean, found[name].var, found[name].alpha.item()) for name in names]


def anatomy(model: nn.Module) -> list[Any]:
    return [
        (name, type(m), tuple(m._modules), len(m._forward_pre_hooks), sorted(vars(m)))
        for name, m in model.named_modules()
    ]


def test_sites_are_named_in_the_order_in_which_the_code_comes_to_them(case):
    model, expected = case
    sites = find_sites(model, IMAGES)
    assert [str(site) for site in sites] == expected
    assert [site.shape[0] for site in sites[:1]] == [6]
    assert all(site.role == "activation" for site in sites)


def test_operators_stand_just_before_every_activation(case):
    model, expected = case
    base = copy.deepcopy(model)
    sparsify_(model, find_sites(model, IMAGES))
    calibrate_(model, [IMAGES])
    with torch.no_grad():
        assert torch.equal(model(IMAGES), base(IMAGES)), "alpha 0 must be the base, bit for bit"
        repeated = expected == ["block::relu[0]@in"]  # one operator for two runs
        order = expected * 2 if repeated else expected
        with Reference(statistics_of(model, order)) as seen:
            base(IMAGES)
        inputs = [torch.cat(seen.inputs)] if repeated else seen.inputs
        for name, x in zip(expected, inputs, strict=True):
            torch.testing.assert_close(operators(model)[name].mean.flatten(), x.mean((0, 2, 3)))
        set_alpha(model, 0.7)
        with Reference(statistics_of(model, order)):
            sparse = base(IMAGES)
        assert torch.equal(model(IMAGES), sparse)
        assert not torch.equal(sparse, base(IMAGES))


def test_insertion_keeps_class_and_keys_and_restore_is_exact(case):
    model, expected = case
    before, keys, kind = anatomy(model), list(model.state_dict()), type(model)
    with torch.no_grad():
        output = model(IMAGES)
    sites = find_sites(model, IMAGES)
    for _ in range(2):
        sparsify_(model, sites, alpha=0.5)
        calibrate_(model, [IMAGES])
        assert isinstance(model, kind)
        assert type(model).__name__ == kind.__name__
        assert list(model.state_dict()) == keys
        assert set(operators(model)) == set(expected)
        assert find_sites(model, IMAGES) == sites, "operators in place must not change the names"
        restore_(model)
        assert anatomy(model) == before
        with torch.no_grad():
            assert torch.equal(model(IMAGES), output)


@pytest.mark.parametrize("name", REAL)
def test_real_architectures_are_reached(name):
    model, images = REAL[name]().eval(), torch.rand(2, 3, 64, 64)
    before, keys = anatomy(model), list(model.state_dict())
    with torch.no_grad():
        output = model(images)
        sites = find_sites(model, images)
        assert any(site.call for site in sites)
        sparsify_(model, sites)
        calibrate_(model, [images])
        assert torch.equal(model(images), output)
        assert list(model.state_dict()) == keys
        set_alpha(model, 0.4)
        assert not torch.equal(model(images), output)
        restore_(model)
        assert torch.equal(model(images), output)
    assert anatomy(model) == before


def test_copies_and_pickles_keep_their_operators(case):
    model, _ = case
    sparsify_(model, find_sites(model, IMAGES), alpha=0.5)
    calibrate_(model, [IMAGES])
    with torch.no_grad():
        expected = model(IMAGES)
        averaged = torch.optim.swa_utils.AveragedModel(model).eval()
        assert torch.equal(averaged(IMAGES), expected)
    for twin in (copy.deepcopy(model), averaged.module):
        assert type(twin) is type(model)
        set_alpha(twin, 0.0)
        restore_(twin)
        with torch.no_grad():
            assert torch.equal(model(IMAGES), expected), "a copy must share nothing"
    if not hasattr(model, "wrapped"):  # a lambda cannot be pickled, with or without operators
        with torch.no_grad():
            assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGES), expected)


def test_an_adapter_finds_them_by_name_alone(case, tmp_path):
    model, _ = case
    twin = copy.deepcopy(model)
    sparsify_(model, find_sites(model, IMAGES), alpha=0.5)
    calibrate_(model, [IMAGES])
    save_adapter(model, tmp_path)
    load_adapter(twin, tmp_path)
    with torch.no_grad():
        assert torch.equal(twin(IMAGES), model(IMAGES))


def test_a_class_that_pickles_itself_is_refused_by_name():
    model = SelfPickling().eval()
    sparsify_(model, find_sites(model, IMAGES))
    with pytest.raises(TypeError, match=r"SelfPickling pickles itself.*restore_"):
        pickle.dumps(model)


class SelfPickling(Functional):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return SelfPickling, ()


def test_two_classes_of_one_model_do_not_mix():
    one, two = Shared().eval(), Shared().eval()
    sites = find_sites(one, IMAGES)
    sparsify_(one, sites)
    sparsify_(two, sites[:1])
    assert type(one) is type(two), "one subclass serves all"
    assert list(operators(two)) == ["::act[0]@in"]
    assert type(Shared()) is Shared


@pytest.mark.parametrize("name", ["functional", "shared", "looped", "helped", "sequence"])
def test_they_compile_to_one_graph_and_export(name):
    torch._dynamo.reset()
    model = NETS[name][0]().eval()
    sparsify_(model, find_sites(model, IMAGES), alpha=0.5)
    calibrate_(model, [IMAGES])
    with torch.no_grad():
        expected = model(IMAGES)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(IMAGES), expected)
        set_alpha(model, 0.1)
        assert torch.equal(compiled(IMAGES), model(IMAGES))
        set_alpha(model, 0.5)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=(batch,))
    for images in (IMAGES, IMAGES[:3]):
        assert torch.equal(program.module()(images), model(images))


def test_activation_checkpointing_of_the_owner_gives_the_same_gradients():
    model = Looped().eval()
    sparsify_(model, find_sites(model, IMAGES), alpha=0.5)
    calibrate_(model, [IMAGES])
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        x = IMAGES.clone().requires_grad_()
        gradients.append(torch.autograd.grad(run(x).square().sum(), x)[0])
    assert torch.equal(*gradients)


class Checkpointed(Base):
    """Parts of its forward are run again in the backward pass, in three ways."""

    def part(self, x: Tensor) -> Tensor:
        return F.relu(self.again(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for _ in range(2):
            x = checkpoint(self.part, x, use_reentrant=self.reentrant)
        x = checkpoint(lambda y: self.part(F.relu(y)), x, use_reentrant=self.reentrant)
        return self.classify(F.relu(x))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_of_parts_of_the_owner_gives_the_same_gradients(reentrant):
    model, gradients = Checkpointed().eval(), []
    model.reentrant = reentrant
    sites = find_sites(model, IMAGES)
    assert [str(site) for site in sites] == [f"::relu[{i}]@in" for i in range(5)]
    sparsify_(model, sites)
    calibrate_(model, [IMAGES])
    for i in range(5):  # an operator at a wrong turn would have another band
        set_alpha(model, {f"::relu[{i}]@in": 0.2 * (i + 1)})
    for context in (contextlib.nullcontext(), unchecked()):
        x = IMAGES.clone().requires_grad_()
        with context:
            model(x).square().sum().backward()
        leaves = [x, *(p for p in model.parameters())]
        gradients.append([leaf.grad for leaf in leaves])
        model.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert all(bool(one.any()) for one in gradients[0])


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Checkpointing replaced by a plain call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "checkpoint", lambda f, x, use_reentrant: f(x))
        yield


@pytest.mark.parametrize("rule", ["exact", "identity", "smooth"])
def test_operators_that_overwrite_their_input_have_the_gradients_of_those_that_do_not(rule):
    model = Overwritten().eval()
    twin = copy.deepcopy(model)
    twin.forward = functools.partial(out_of_place, twin)
    sparsify_(model, find_sites(model, IMAGES), alpha=0.5)
    calibrate_(model, [IMAGES])
    twin.operators = list(operators(model).values())
    gradients = []
    for net in (model, twin):
        x = IMAGES.clone().requires_grad_()
        with backward_rule(model, rule):
            gradients.append(torch.autograd.grad(net(x).square().sum(), x)[0])
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-5)  # sums come in another order


def out_of_place(self: Any, x: Tensor) -> Tensor:
    """`Overwritten`, with operators and without overwriting anything."""
    first, second, third = self.operators
    x = F.relu(first(self.conv(x)))
    y = F.elu(second(self.again(x) + x), 0.7)
    return self.classify(third(self.again(y) + y).sigmoid())


def test_threads_do_not_disturb_each_other():
    model = Looped().eval()
    sparsify_(model, find_sites(model, IMAGES), alpha=0.5)
    calibrate_(model, [IMAGES])
    parts = [torch.rand(2, 3, 8, 8) for _ in range(8)]
    with torch.no_grad():
        expected = [model(part) for part in parts]
    found: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        with torch.no_grad():
            found[number] = [model(parts[number]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, expected[i]) for i in range(len(parts)) for y in found[i])


def test_formats_and_dtypes():
    model = Shared().eval()
    sparsify_(model, find_sites(model, IMAGES), alpha=0.5)
    calibrate_(model, [IMAGES])
    with torch.no_grad():
        expected = model(IMAGES)
        last = model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(IMAGES.to(memory_format=torch.channels_last)), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (model(IMAGES) - expected).abs().max() < 0.1
        assert model.to(torch.bfloat16)(IMAGES.bfloat16()).dtype == torch.bfloat16


class TestResidualSums:
    def test_every_way_to_add_is_reached(self):
        model = Residual().eval()
        base = copy.deepcopy(model)
        sites = find_sites(model, IMAGES, where="activations+residual")
        assert [str(site) for site in sites] == [
            *(f"::add[{i}]@out" for i in range(4)),
            "act@in",
        ]
        sparsify_(model, sites)
        sums = self.sums(base)
        with torch.no_grad():
            assert torch.equal(model(IMAGES), base(IMAGES))
            calibrate_(model, [IMAGES])
        for i, total in enumerate(sums):
            mean = operators(model)[f"::add[{i}]@out"].mean.flatten()
            torch.testing.assert_close(mean, total.mean((0, 2, 3)))
        restore_(model)
        with torch.no_grad():
            assert torch.equal(model(IMAGES), base(IMAGES))

    @staticmethod
    @torch.no_grad()
    def sums(net: Residual) -> list[Tensor]:
        found = [net.conv(IMAGES)]
        for _ in range(4):
            found.append(found[-1] + net.again(found[-1]))
        return found[1:]

    @pytest.mark.parametrize("size", [1, 2, 7])
    def test_a_table_counts_alike_with_every_batch_size(self, size):
        model = Positioned().eval()
        sparsify_(model, find_sites(model, IMAGES, where="*add*"), alpha=0.0)
        assert list(operators(model)) == ["::add[1]@out"]
        calibrate_(model, [torch.rand(size, 3, 8, 8)])  # never reached would be an error
        mean = operators(model)["::add[1]@out"].mean
        assert mean.shape == (6, 1, 1)


class Positioned(Base):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(1, 6, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) + self.table * 1
        x = x + self.again(x)
        return self.classify(self.act(x * 2))


def test_torchs_own_transformer_layer_does_not_pass_its_operators_by():
    """In eval mode it would run a fused kernel that knows no Python code."""
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True).eval()
    model = nn.Sequential(nn.Conv2d(3, 6, 8), nn.Flatten(2), Swapped(), layer)
    sites = find_sites(model, IMAGES)
    assert [str(site) for site in sites] == ["3::activation[0]@in"]
    with torch.no_grad():
        output = model(IMAGES)
        sparsify_(model, sites)
        calibrate_(model, [IMAGES])
        set_alpha(model, 50.0)
        assert (model(IMAGES) - output).abs().max() > 1e-3


class Swapped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class TestRefusals:
    def check(self, model: nn.Module, reason: str) -> None:
        with pytest.raises(UnreachableSitesError, match=reason):
            find_sites(model.eval(), IMAGES)

    def test_a_function_that_the_object_holds(self):
        model = Base()
        model.code = lambda x: F.relu(model.conv(x)).mean((2, 3))
        type(model).forward = lambda self, x: self.code(x)
        try:
            self.check(model, "relu")
        finally:
            del type(model).forward

    def test_code_without_a_source(self):
        names: dict[str, Any] = {"Base": Base, "F": F}
        exec(
            "class Hidden(Base):\n"
            "    def forward(self, x):\n"
            "        return self.classify(F.relu(self.conv(x)))\n",
            names,
        )
        self.check(names["Hidden"](), "Hidden")

    def test_a_forward_of_the_object_itself(self):
        model = Functional()
        model.forward = functools.partial(Functional.forward, model)
        self.check(model, "this Functional has a forward of its own")

    def test_a_traced_module(self):
        """Its copies write their code anew, without operators."""
        traced = torch.fx.symbolic_trace(Shared())
        self.check(traced, "Shared is traced")
        assert [str(site) for site in find_sites(traced, IMAGES, where="conv@out")] == ["conv@out"]

    def test_a_forward_that_does_not_name_its_owner(self):
        self.check(Nameless(), "Nameless.forward has no argument for its owner")

    @pytest.mark.parametrize(
        ("site", "reason"),
        [
            (Site("", "in", (6, 1, 1), call="gelu[0]"), "the code of Shared has no call of gelu"),
            (Site("", "out", (6, 1, 1), call="act[0]"), r"before a call \(relu\[0\]@in\)"),
            (Site("conv", "in", (6, 1, 1), call="act[0]"), "the code of Conv2d has no call of act"),
        ],
    )
    def test_sites_that_the_code_does_not_have(self, site, reason):
        model = Shared()
        with pytest.raises(ValueError, match=reason):
            sparsify_(model, [Site("", "in", (6, 1, 1), call="act[0]"), site])
        assert type(model) is Shared
        assert not operators(model)

    def test_a_call_that_never_comes_is_named_by_the_calibration(self):
        model = Shared().eval()
        sparsify_(model, [Site("", "in", (6, 1, 1), call=f"act[{i}]") for i in (1, 2)])
        with pytest.raises(RuntimeError, match=r"never reached ::act\[2\]@in"):
            calibrate_(model, [IMAGES])


class Nameless(Base):
    def forward(*args: Any) -> Tensor:
        self, x = args
        return self.classify(F.relu(self.conv(x)))


def test_tracebacks_show_the_code_that_runs():
    model = Functional().eval()
    sparsify_(model, find_sites(model, IMAGES))
    linecache.checkcache()
    with pytest.raises(RuntimeError) as error:
        model(torch.rand(1, 5, 8, 8))
    shown = "".join(traceback.format_exception(error.value))
    assert "with operators at gelu, relu, sigmoid, tanh" in shown
    assert "_meansparse_method('relu'" in shown


def test_decorators_are_kept():
    model = Decorated().eval()
    calls = Decorated.forward.calls
    sparsify_(model, find_sites(model, IMAGES))
    assert not model(IMAGES).requires_grad
    assert Decorated.forward.calls == calls + 3  # two probes, and one run of the code written anew


def test_names_of_code():
    assert SUM == "add"
    assert {f.node.name for f in code_of(Helped).values()} == {
        "forward",
        "_first",
        "__hidden",
        "_mish",
        "classify",
        "outer_helper",
    }
    texts = ["x.relu_", "self.acts[0]", "F.relu", "get_act()", "lambda: 0", "a or b"]
    named = [called(ast.parse(text, mode="eval").body) for text in texts]
    assert named == ["relu", "acts", "relu", "get_act_call", None, None]
