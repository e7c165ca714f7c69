"""Sites: their names, what counts as an activation, and which of them can be reached."""

import warnings

import pytest
import timm
import torch
from nets import IMAGES, Net, Wrapped, found
from timm.layers import activations as timm_activations
from timm.layers import activations_me
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from lightning_meansparse.sites import (
    Site,
    UnreachableSitesError,
    find_sites,
)


@pytest.mark.parametrize(
    ("site", "name"),
    [
        (Site("layer1.0.act1", "in", (64, 1, 1)), "layer1.0.act1@in"),
        (Site("layer1.0", "out", (64, 1, 1)), "layer1.0@out"),
        (Site("blocks.2", "out", (384,), index=0), "blocks.2@out[0]"),
        (Site("layer1.0", "in", (64, 1, 1), call="relu[1]"), "layer1.0::relu[1]@in"),
        (Site("blocks.0", "out", (384,), call="add[0]"), "blocks.0::add[0]@out"),
        (Site("", "in", (8, 1, 1), call="relu[0]"), "::relu[0]@in"),
        (Site("features", "in", (8, 1, 1), call="1[0]"), "features::1[0]@in"),
        (Site("trunk.block1-0.f", "in", (8, 1, 1)), "trunk.block1-0.f@in"),
    ],
)
def test_a_site_has_one_name_and_the_name_gives_it_back(site, name):
    assert str(site) == name
    assert Site.parse(name, site.shape) == site


@pytest.mark.parametrize(
    ("shape", "channels", "axis"),
    [((64, 1, 1), 64, (-3,)), ((384,), 384, (-1,)), ((8, 1, 16), 128, (-3, -1)), ((1,), 1, (-1,))],
)
def test_channels_and_axes_follow_from_the_shape(shape, channels, axis):
    site = Site("act", "in", shape)
    assert (site.channels, site.axis) == (channels, axis)
    assert torch.zeros(shape).expand(2, *[max(s, 3) if s == 1 else s for s in shape]).ndim > 1


def test_sites_are_values():
    assert Site("a", "in", [8, 1, 1]) == Site("a", "in", (8, 1, 1))  # as read from JSON
    assert len({Site("a", "in", (8,)), Site("a", "in", (8,)), Site("a", "out", (8,))}) == 2
    with pytest.raises(AttributeError):
        Site("a", "in", (8,)).module = "b"


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"side": "input"}, ValueError, "side must be 'in' or 'out', got 'input'"),
        ({"role": "gates"}, ValueError, "role must be one of"),
        ({"shape": (8.0,)}, TypeError, "shape must be a tuple of integers"),
        ({"shape": "88"}, TypeError, "shape must be a tuple of integers"),
        ({"shape": (0, 1)}, ValueError, "positive"),
        ({"call": "relu"}, ValueError, "'relu\\[1\\]', got 'relu'"),
        ({"index": 0}, ValueError, "index is the place in a tuple output"),
        ({"index": -1, "side": "out"}, ValueError, "index"),
    ],
)
def test_impossible_sites_are_refused(change, error, said):
    with pytest.raises(error, match=said):
        Site(**({"module": "act", "side": "in", "shape": (8,)} | change))


@pytest.mark.parametrize("name", ["act1", "act1@middle", "act1@in[x]", "a::relu@in", "@", ""])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match=r"name must be|call must look"):
        Site.parse(name, (8,))


TORCH_ACTIVATIONS = """
    CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU RReLU
    ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink
"""


@pytest.mark.parametrize("name", TORCH_ACTIVATIONS.split())
def test_activations_of_torch(name):
    net = Net(lambda m, x: m.act(x), act=getattr(nn, name)())
    assert find_sites(net, IMAGES) == (Site("act", "in", (8, 1, 1), kind=name),)


@pytest.mark.parametrize("home", [timm_activations, activations_me])
def test_activations_of_timm(home):
    kinds = [
        v for v in vars(home).values() if isinstance(v, type) and v.__module__ == home.__name__
    ]
    kinds = [kind for kind in kinds if issubclass(kind, nn.Module)]
    assert len(kinds) >= 5
    for kind in kinds:
        net = Net(lambda m, x: m.act(x), act=kind())
        assert find_sites(net, IMAGES) == (Site("act", "in", (8, 1, 1), kind=kind.__name__),)


def test_activations_of_transformers():
    names = sorted(set(ACT2FN) - {"linear", "xielu"})  # xielu wants CUDA-only code or warns
    assert len(names) >= 15
    for name in names:
        assert list(found(Net(lambda m, x: m.act(x), act=ACT2FN[name]))) == ["act@in"], name
    identity = Net(lambda m, x: m.relu(m.act(x)), act=ACT2FN["linear"], relu=nn.ReLU())
    assert list(found(identity)) == ["relu@in"]


def test_subclasses_count_and_softmax_glu_and_norms_do_not():
    class Own(nn.ReLU):
        pass

    net = Net(
        lambda m, x: m.own(m.norm(m.glu(m.softmax(x)))),
        softmax=nn.Softmax(1),
        glu=nn.GLU(1),
        norm=nn.BatchNorm2d(4),
        own=Own(),
    )
    assert find_sites(net, IMAGES) == (Site("own", "in", (4, 1, 1), kind="Own"),)


def test_the_activation_inside_norm_act_layers():
    net = Net(
        lambda m, x: m.b(m.a(x)), a=timm.layers.BatchNormAct2d(8), b=timm.layers.GroupNormAct(8, 2)
    )
    assert list(found(net)) == ["a.act@in", "b.act@in"]


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: x * torch.sigmoid(1.702 * x),
        lambda m, x: m.scale * F.relu(x) ** 2 + 0.5,  # StarReLU
        lambda m, x: F.gelu(x) * 1.7015,  # timm's NFNets
        lambda m, x: x * F.relu6(x + 3) / 6,
        lambda m, x: x * torch.tanh(F.softplus(x)),
    ],
)
def test_a_leaf_that_is_elementwise_around_an_activation_is_one(code):
    act = Wrapped(code, scale=nn.Parameter(torch.ones(8, 1, 1)))
    assert find_sites(Net(lambda m, x: m.act(x), act=act), IMAGES) == (
        Site("act", "in", (8, 1, 1), kind="Wrapped"),
    )


def test_a_leaf_with_a_reduction_is_none():
    norm = Wrapped(lambda m, x: F.relu(x - x.mean((2, 3), keepdim=True)))
    with pytest.raises(UnreachableSitesError, match=r"act::relu, functional call in Wrapped"):
        find_sites(Net(lambda m, x: m.act(x), act=norm), IMAGES)


FUNCTIONS = {
    "F.relu": (F.relu, "relu"),
    "F.relu in place": (lambda x: F.relu(x, inplace=True), "relu"),
    "torch.relu": (torch.relu, "relu"),
    "x.relu()": (lambda x: x.relu(), "relu"),
    "x.relu_()": (lambda x: x.relu_(), "relu"),
    "F.relu6": (F.relu6, "relu6"),
    "F.gelu": (F.gelu, "gelu"),
    "F.silu keyword": (lambda x: F.silu(input=x), "silu"),
    "torch.sigmoid": (torch.sigmoid, "sigmoid"),
    "expit": (torch.special.expit, "expit"),
    "F.leaky_relu": (F.leaky_relu, "leaky_relu"),
    "F.hardswish": (F.hardswish, "hardswish"),
    "F.mish": (F.mish, "mish"),
    "F.softsign": (F.softsign, "softsign"),
    "x.tanh()": (lambda x: x.tanh(), "tanh"),
    "aten": (torch.ops.aten.elu, "elu"),
    "module of no model": (lambda x: nn.Tanh()(x), "Tanh"),
}


@pytest.mark.parametrize("how", FUNCTIONS)
def test_functional_calls_are_seen_and_named(how):
    function, name = FUNCTIONS[how]
    block = Wrapped(lambda m, x: m.conv(function(x)), conv=nn.Conv2d(8, 8, 1))
    net = Net(lambda m, x: m.act(m.block(x)), block=block, act=nn.ReLU())
    with pytest.raises(UnreachableSitesError) as error:
        find_sites(net, IMAGES)
    assert error.value.names == (f"block::{name}[0]@in",)
    assert isinstance(error.value, ValueError)
    for said in (f"block::{name}, functional call in Wrapped", "strict=False", "where="):
        assert said in str(error.value)


def test_scripted_functions_are_seen():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is on its way out
        scripted = torch.jit.script(torch.nn.functional.silu)
    with pytest.raises(UnreachableSitesError, match=r"::silu\[0\]@in"):
        find_sites(Net(lambda m, x: scripted(x)), IMAGES)


def shared() -> Net:
    block = Wrapped(lambda m, x: m.relu(m.conv(m.relu(x))), relu=nn.ReLU(), conv=nn.Conv2d(8, 8, 1))
    return Net(lambda m, x: F.gelu(m.act(m.block(x))), block=block, act=nn.SiLU())


def test_shared_modules_are_named_call_by_call():
    with pytest.raises(UnreachableSitesError) as error:
        find_sites(shared(), IMAGES)
    assert error.value.names == ("block::relu[0]@in", "block::relu[1]@in", "::gelu[0]@in")
    assert "block.relu, ReLU module called several times in Wrapped" in str(error.value)


def test_not_strict_leaves_them_out_with_one_warning():
    with pytest.warns(UserWarning, match="cannot be reached") as caught:
        assert [str(s) for s in find_sites(shared(), IMAGES, strict=False)] == ["act@in"]
    assert len(caught) == 1
    for name in ("block::relu[0]@in", "block::relu[1]@in", "::gelu[0]@in"):
        assert name in str(caught[0].message)
    assert caught[0].filename == __file__  # it points at the caller


class Added(nn.Module):
    """Adds and activates in one function of a library, as torchvision's quantizable ResNets do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.sum = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x):
        x = self.conv(x)
        return self.sum.add_relu(x, x.flip(1))


def test_a_function_that_does_more_before_it_activates_is_named():
    with pytest.raises(UnreachableSitesError, match="is not its first argument") as error:
        find_sites(Added(), IMAGES)
    assert error.value.names == ("::add_relu[0]@in",)


class Namesakes(nn.Module):
    """Calls `relu` in its own code, and before that in code that is not seen."""

    def __init__(self):
        super().__init__()
        self.unseen = lambda x: 2 * F.relu(x)
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return F.relu(self.conv(self.unseen(x)))


def test_what_cannot_be_reached_is_not_hidden_by_a_namesake_that_can():
    net = Net(lambda m, x: m.block(x), block=Namesakes())
    with pytest.raises(UnreachableSitesError, match=r"^1 wanted") as error:
        find_sites(net, IMAGES)
    assert error.value.names == ("block::relu[0]@in",)
    with pytest.warns(UserWarning, match="1 wanted"):
        assert list(found(net, strict=False)) == ["block::relu[0]@in"]


def test_nothing_reachable_is_an_error_even_when_not_strict():
    with pytest.raises(UnreachableSitesError, match=r"::relu\[0\]@in"):
        find_sites(Net(lambda m, x: F.relu(x)), IMAGES, strict=False)


def test_an_activation_called_by_keyword_is_not_passed_over():
    net = Net(lambda m, x: m.b(m.a(input=x)), a=nn.ReLU(), b=nn.Tanh())
    with pytest.raises(UnreachableSitesError, match=r"a, ReLU module called by keyword"):
        find_sites(net, IMAGES)


def test_only_wanted_sites_must_be_reachable():
    def code(m, x):
        x = x * torch.sigmoid(m.fc(x.mean((2, 3), keepdim=True)))  # a gate
        return m.act(x + F.gelu(m.table).view(1, 8, 1, 1))  # a constant

    net = Net(code, fc=nn.Conv2d(8, 8, 1), table=nn.Parameter(torch.rand(8)), act=nn.ReLU())
    assert list(found(net)) == ["act@in"]
    with pytest.raises(UnreachableSitesError, match="sigmoid"):
        find_sites(net, IMAGES, where="activations+gates")
    assert list(found(shared(), where="act@in")) == ["act@in"]
    assert list(found(shared(), where=lambda site: site.kind == "SiLU")) == [
        "act@in",
        "act@out",
    ]


def test_constant_and_uncalled_activations_are_left_out():
    def code(m, x):
        bias = m.mlp(m.coordinates)
        grid = torch.zeros_like(x).add_(1)  # takes the shape, not the values
        return m.act(x + bias.view(1, 8, 1, 1) + m.other(grid))

    net = Net(
        code,
        mlp=nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8)),
        coordinates=nn.Parameter(torch.rand(2)),
        other=nn.Tanh(),
        never=nn.GELU(),
        act=nn.ReLU(),
    )
    assert list(found(net)) == ["act@in"]


def test_writes_into_slices_carry_the_input_along():
    def code(m, x):
        y = torch.zeros(2 + len(x) - 2, 8, 8, 8)
        y[:, :, 1:] = x[:, :, 1:, : y.shape[3]]
        return m.act(y)

    assert found(Net(code, act=nn.ReLU()), torch.rand(2, 3, 8, 8)) == {"act@in": (8, 1, 1)}


def test_execution_order_not_declaration_order():
    net = Net(lambda m, x: m.a(m.c(m.b(x))), a=nn.ReLU(), b=nn.GELU(), c=nn.Tanh())
    assert list(found(net)) == ["b@in", "c@in", "a@in"]
