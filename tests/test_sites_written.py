"""Activations that are written out, and rectifiers by other names: reached or named."""

import copy
import math
import pickle

import pytest
import torch
from nets import IMAGES, Net, Wrapped, roles
from torch import nn
from torch.nn import functional as F

from lightning_meansparse import calibrate_, restore_, set_alpha, sparsify_
from lightning_meansparse.sites import UnreachableSitesError, find_sites
from tests.coverage.check import check_model


def masked(x):
    x[x < 0] = 0
    return x


WRITTEN = {
    "swish": lambda x: x * torch.sigmoid(x),
    "swish, learned": lambda x: x * torch.sigmoid(x * torch.linspace(0.5, 2, 8).view(8, 1, 1)),
    "swish in place": lambda x: x.mul_(x.sigmoid()),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "GELU by erf": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "GELU by tanh": lambda x: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))
    ),
    "softsign": lambda x: x / (1 + x.abs()),
    "ReLU by a comparison": lambda x: x * (x > 0),
    "ReLU by a comparison and a cast": lambda x: x * (x > 0).float(),
    "ReLU by where": lambda x: torch.where(x > 0, x, 0),
    "ReLU by a mask": masked,
    "ReLU by masked_fill": lambda x: x.masked_fill(x < 0, 0),
    "leaky ReLU by a maximum": lambda x: torch.maximum(x, 0.1 * x),
    "ELU": lambda x: torch.where(x > 0, x, torch.exp(x) - 1),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_one_that_is_written_out_is_reached_where_its_input_was_made(how):
    net = Net(lambda m, x: m.last(WRITTEN[how](x)), last=nn.Conv2d(8, 4, 1))
    assert roles(net) == {"stem@out": "activation"}
    result = check_model(net, IMAGES)  # the tracer's word, alpha 0, restore_, statistics
    assert result.passed, result
    assert (result.calls, result.reached, result.told) == (1, 1, 1)


@pytest.mark.parametrize("how", WRITTEN)
def test_a_module_that_writes_it_out_is_an_activation_as_a_whole(how):
    act = Wrapped(lambda m, x: WRITTEN[how](x))
    net = Net(lambda m, x: m.last(m.act(x)), act=act, last=nn.Conv2d(8, 4, 1))
    assert set(roles(net).values()) == {"activation"}
    result = check_model(net, IMAGES)
    assert result.passed, result
    assert (result.calls, result.reached, result.operators) == (1, 1, 1)


def test_its_parts_may_be_modules():
    net = Net(lambda m, x: m.last(x * m.act(x)), act=nn.Sigmoid(), last=nn.Conv2d(8, 4, 1))
    assert roles(net) == {"stem@out": "activation"}
    assert check_model(net, IMAGES).passed


class Clamps(nn.Module):
    """Rectifies amid its own code."""

    def __init__(self, how):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.last = nn.Conv2d(8, 4, 1)
        self.how = how

    def forward(self, x):
        x = self.conv(x)
        if self.how == "clamp":
            x = x.clamp(0, 6)
        elif self.how == "clamp_":
            x.clamp_(min=0.0)
        elif self.how == "clamp_min":
            x = torch.clamp_min(x, 0)
        elif self.how == "clip":
            x = torch.clip(x.clamp(max=9), 0)
        elif self.how == "hardtanh":
            x = x.clamp(-1, 1)
        elif self.how == "clamp, the second":
            x = x.clamp(-100, 100).clamp(min=0)
        elif self.how == "maximum":
            x = torch.maximum(x, torch.zeros_like(x))
        elif self.how == "aten":
            x = torch.ops.aten.relu(x)
        return self.last(x)


RECTIFIERS = {
    "clamp": "clamp[0]",
    "clamp_": "clamp[0]",
    "clamp_min": "clamp_min[0]",
    "clip": "clip[0]",
    "hardtanh": "clamp[0]",
    "clamp, the second": "clamp[1]",
    "maximum": "maximum[0]",
    "aten": "relu[0]",
}


@pytest.mark.parametrize("how", RECTIFIERS)
def test_rectifiers_by_other_names_are_reached(how):
    net = Clamps(how)
    assert roles(net) == {f"::{RECTIFIERS[how]}@in": "activation"}
    result = check_model(net, IMAGES)
    assert result.passed, result
    assert (result.calls, result.reached) == (1, 1)


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: m.last(x.clamp(min=1e-6)),  # guards against a division by zero
        lambda m, x: m.last(x.clamp(max=6)),
        lambda m, x: m.last(x.clamp(m.bound - 1, m.bound + 1)),  # learned, as for quantization
        lambda m, x: m.last(x * x),  # a power does not bend
        lambda m, x: m.last(x / x.norm(dim=1, keepdim=True).clamp(min=1e-6)),
        lambda m, x: m.last(x * torch.ones_like(x).gt(0)),
    ],
)
def test_what_is_no_activation(code):
    net = Net(lambda m, x: m.act(code(m, x)), act=nn.ReLU(), last=nn.Conv2d(8, 4, 1))
    net.bound = nn.Parameter(torch.zeros(()))
    assert roles(net) == {"act@in": "activation"}


def test_a_clamp_to_learned_bounds_is_none_to_the_tracer_either():
    def code(m, x):
        return m.act(m.last(x.clamp(m.bounds)))

    parts = {"bounds": nn.Parameter(torch.zeros(8, 1, 1)), "last": nn.Conv2d(8, 4, 1)}
    result = check_model(Net(code, act=nn.ReLU(), **parts), IMAGES)
    assert result.passed, result
    assert result.calls == 1


def test_a_clamp_of_the_images_is_no_activation():
    net = nn.Sequential(Wrapped(lambda m, x: x.clamp(0, 1)), nn.Conv2d(3, 8, 1), nn.ReLU())
    assert roles(net) == {"2@in": "activation"}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (lambda m, x: x + m.last(x * x.sigmoid()), "sigmoid.mul written out .* used elsewhere"),
        (
            lambda m, x: m.last((y := x[:, :, 1:]) * y.sigmoid()),
            "sigmoid.mul written out .* is no module's input or output",
        ),
        (
            lambda m, x: m.last((y := x[:, :, 1:]) * m.act(y)),
            "Sigmoid.mul written out .* is no module's input or output",
        ),
        (
            lambda m, x: m.last(torch.maximum(torch.zeros_like(x), x)),
            "maximum.* its input is not its first argument",
        ),
    ],
)
def test_what_cannot_be_reached_exactly_is_named(code, said):
    net = Net(code, last=nn.Conv2d(8, 8, 1), act=nn.Sigmoid())
    with pytest.raises(UnreachableSitesError, match=said):
        find_sites(net, IMAGES)


def test_a_gate_that_is_written_out_is_a_gate():
    def code(m, x):
        a, b = m.one(x), m.two(x)
        return m.act(a * torch.sigmoid(a) * b)

    net = Net(code, one=nn.Conv2d(8, 8, 1), two=nn.Conv2d(8, 8, 1), act=nn.ReLU())
    assert roles(net, where="activations+gates") == {"one@out": "gate", "act@in": "activation"}


class EvoNorm(nn.Module):
    """Activates and normalises: x sigmoid(v x) / std(x)."""

    def __init__(self, residual=False):
        super().__init__()
        self.v = nn.Parameter(torch.linspace(0.5, 2, 8).view(8, 1, 1))
        self.weight = nn.Parameter(torch.rand(8, 8, 1, 1))
        self.residual = residual

    def forward(self, x):
        y = x * (x * self.v).sigmoid() / x.std((2, 3), keepdim=True)
        return y + F.conv2d(x, self.weight) if self.residual else y


def test_a_norm_that_activates_is_an_activation_as_a_whole():
    net = Net(lambda m, x: m.last(m.norm(x)), norm=EvoNorm(), last=nn.Conv2d(8, 4, 1))
    assert roles(net) == {"norm@in": "activation"}
    assert check_model(net, IMAGES).passed
    net.norm = EvoNorm(residual=True)  # a layer reads the same input: no norm any more
    with pytest.raises(UnreachableSitesError, match="used elsewhere"):
        find_sites(net, IMAGES)


def test_copies_keep_their_operators():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), EvoNorm(), nn.Conv2d(8, 4, 1)).eval()
    base = net(IMAGES)
    sparsify_(net, find_sites(net, IMAGES))
    calibrate_(net, [IMAGES])
    set_alpha(net, 1.0)
    sparse = net(IMAGES)
    assert not torch.equal(sparse, base)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(again(IMAGES), sparse)
        restore_(again)
        assert torch.equal(again(IMAGES), base)
