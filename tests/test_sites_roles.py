"""Gates and residual sums are told by dataflow, never by name."""

import pytest
import timm
import torch
from nets import IMAGES, Net, Wrapped, found, roles
from torch import nn
from torch.nn import functional as F

from lightning_meansparse.sites import (
    Site,
    UnreachableSitesError,
    find_sites,
)


def squeeze(**parts):
    """Squeeze-excite: the names in the code are neither `se` nor `gate`."""
    return {
        "one": nn.Conv2d(8, 4, 1),
        "mid": nn.ReLU(),
        "two": nn.Conv2d(4, 8, 1),
        "last": nn.Sigmoid(),
    } | parts


GATED = {
    "squeeze-excite": (
        lambda m, x: m.act(x * m.last(m.two(m.mid(m.one(x.mean((2, 3), keepdim=True)))))),
        squeeze(act=nn.GELU()),
        {"mid", "last"},
    ),
    "squeeze-excite after the activation, in place": (
        lambda m, x: (x := m.act(x)).mul_(m.last(m.two(m.mid(m.one(x.mean((2, 3), True)))))),
        squeeze(act=nn.GELU()),
        {"mid", "last"},
    ),
    "squeeze-excite at one pixel": (
        lambda m, x: (
            (x := m.act(F.adaptive_avg_pool2d(x, 1)))
            * m.last(m.two(m.mid(m.one(x.mean((2, 3), True)))))
        ),
        squeeze(act=nn.GELU()),
        {"mid", "last"},
    ),
    "squeeze-excite by linear layers, views and dropout": (
        lambda m, x: m.act(
            m.drop(m.last(m.two(m.mid(m.one(x.mean((2, 3)))))).view(-1, 8, 1, 1)).expand_as(x) * x
        ),
        squeeze(one=nn.Linear(8, 4), two=nn.Linear(4, 8), drop=nn.Dropout(), act=nn.GELU()),
        {"mid", "last"},
    ),
    "two squeezes summed (CBAM)": (
        lambda m, x: m.act(
            x
            * m.last(m.two(m.mid(m.one(x.mean((2, 3), True)))) + m.two(x.amax((2, 3), True)[:, :4]))
        ),
        squeeze(act=nn.GELU()),
        {"mid", "last"},
    ),
    "one map over all channels (spatial attention)": (
        lambda m, x: m.act(x * m.last(m.map(x))),
        {"map": nn.Conv2d(8, 1, 3, padding=1), "last": nn.Sigmoid(), "act": nn.ReLU()},
        {"last"},
    ),
    "a map made at half the size (GhostNet)": (
        lambda m, x: m.act(
            x * F.interpolate(m.last(m.one(F.avg_pool2d(x, 2))), x.shape[2:], mode="bilinear") / 2
        ),
        {"one": nn.Conv2d(8, 8, 1), "last": nn.Sigmoid(), "act": nn.ReLU()},
        {"last"},
    ),
    "GLU by halves": (
        lambda m, x: (lambda a, b: m.act(m.gate(a) * b))(*x.chunk(2, 1)),
        {"gate": nn.SiLU(), "act": nn.ReLU()},
        {"gate"},
    ),
    "GLU by two layers": (
        lambda m, x: m.act(m.gate(m.one(x)) * m.two(x)),
        {"one": nn.Conv2d(8, 8, 1), "two": nn.Conv2d(8, 8, 1), "gate": nn.GELU(), "act": nn.ReLU()},
        {"gate"},
    ),
    "a factor is none if it also goes another way": (
        lambda m, x: (lambda s: m.act(x * s) + s)(m.last(m.one(x.mean((2, 3), True)))),
        {"one": nn.Conv2d(8, 8, 1), "last": nn.Sigmoid(), "act": nn.ReLU()},
        set(),
    ),
    "multiplying by a parameter (LayerScale)": (
        lambda m, x: x + m.act(x) * m.gamma,
        {"act": nn.GELU(), "gamma": nn.Parameter(torch.ones(8, 1, 1))},
        set(),
    ),
    "large-kernel attention: what is multiplied comes from the activation itself": (
        lambda m, x: (x := m.act(x)) * m.two(x),
        {"act": nn.GELU(), "two": nn.Conv2d(8, 8, 3, padding=1)},
        set(),
    ),
    "activations upstream of a gated stream": (
        lambda m, x: m.one(m.act(x)) * torch.softmax(m.two(m.act2(x)).mean((2, 3), True), 1),
        {"one": nn.Conv2d(8, 8, 1), "act": nn.ReLU(), "two": nn.Conv2d(8, 8, 1), "act2": nn.Tanh()},
        {"act2"},
    ),
    "relu(v) times a context vector": (
        lambda m, x: m.act(x) * m.one(x).mean((2, 3), True).expand_as(x),
        {"act": nn.ReLU(), "one": nn.Conv2d(8, 8, 1)},
        set(),
    ),
}


@pytest.mark.parametrize("how", GATED)
def test_gates_are_told_by_what_becomes_of_them(how):
    code, parts, gates = GATED[how]
    net = Net(code, **parts)
    acts = {n for n, p in net.named_children() if type(p).__module__.endswith("modules.activation")}
    everything = roles(net, where="activations+gates")
    assert everything == {f"{n}@in": "gate" if n in gates else "activation" for n in acts}
    if acts - gates:
        assert set(roles(net)) == {f"{n}@in" for n in acts - gates}


def residual(after=False, several=False):
    def code(m, x):
        y = x + (
            m.conv(m.act(m.norm(x))) * m.gamma + m.bias
        )  # adding a parameter is no residual sum
        if after:
            y = m.act2(y)
        return (y, None) if several else y

    return Wrapped(
        code,
        conv=nn.Conv2d(8, 8, 1),
        norm=nn.BatchNorm2d(8),
        act=nn.ReLU(),
        act2=nn.GELU(),
        gamma=nn.Parameter(torch.ones(8, 1, 1)),
        bias=nn.Parameter(torch.ones(8, 1, 1)),
    )


def test_a_residual_sum_is_named_by_the_innermost_module_that_returns_it():
    blocks = nn.Sequential(nn.Sequential(residual(), nn.Identity()), nn.Dropout())
    net = Net(lambda m, x: m.head(m.pool(m.blocks(x))), blocks=blocks, head=nn.Conv2d(8, 2, 1))
    net.pool = nn.AdaptiveAvgPool2d(1)
    assert roles(net, where="activations+residual") == {
        "blocks.0.0.act@in": "activation",
        "blocks.0.0@out": "residual",
    }
    assert list(roles(net)) == ["blocks.0.0.act@in"]


def test_a_residual_sum_seen_through_a_view_is_the_same_sum():
    def code(m, x):
        return (x + m.conv(m.act(x))).flatten(2).mT  # as Swin's blocks reshape theirs

    net = Net(lambda m, x: m.block(x), block=Wrapped(code, conv=nn.Conv2d(8, 8, 1), act=nn.ReLU()))
    sites = find_sites(net, IMAGES, where="activations+residual")
    assert sites[1] == Site("block", "out", (8,), role="residual", kind="Wrapped")


def test_residual_sums_in_tuples_and_before_activations():
    net = Net(lambda m, x: m.b(m.a(x)[0]), a=residual(several=True), b=residual(after=True))
    assert roles(net, where="activations+residual") == {
        "a.act@in": "activation",
        "a@out[0]": "residual",
        "b.act@in": "activation",
        "b.act2@in": "activation",  # its input is b's sum
    }


def test_residual_sums_amid_the_code_cannot_be_reached_yet():
    net = Net(
        lambda m, x: m.block(x),
        block=Wrapped(
            lambda m, x: (lambda y: y + m.conv(m.act(m.norm(y))))(x + m.conv(x)),
            conv=nn.Conv2d(8, 8, 1),
            norm=nn.BatchNorm2d(8),
            act=nn.ReLU(),
        ),
    )
    with pytest.raises(UnreachableSitesError) as error:
        find_sites(net, IMAGES, where="activations+residual")
    assert error.value.names == ("block::add[0]@out",)
    assert "residual sum amid the code of Wrapped" in str(error.value)
    with pytest.warns(UserWarning, match=r"block::add\[0\]@out"):
        left = found(net, where="activations+residual", strict=False)
    assert list(left) == ["block.act@in", "block@out"]


def test_adds_of_one_layer_with_itself_are_no_residual_sums():
    def rotary(m, x):
        x = torch.stack([-x[:, 1::2], x[:, ::2]], 2).flatten(1, 2) * m.sin + x * m.cos
        return m.act(m.conv(x))

    parts = {"sin": nn.Parameter(torch.rand(8, 1, 1)), "cos": nn.Parameter(torch.rand(8, 1, 1))}
    net = Net(rotary, act=nn.ReLU(), conv=nn.Conv2d(8, 8, 1), **parts)
    assert list(found(net, where="activations+residual")) == ["act@in"]


def test_a_shared_block_with_a_residual_sum_cannot_be_reached():
    net = Net(lambda m, x: m.block(m.block(x)), block=residual())
    with pytest.raises(
        UnreachableSitesError, match=r"block::add, residual sum amid the code of Wrapped"
    ):
        find_sites(net, IMAGES, where="activations+residual")


def test_a_gate_of_a_map_with_one_position_alone_is_an_activation():
    """As in mobilevitv2, where small images leave one position, and nothing broadcasts."""

    def attend(m, x):
        x = m.pool(m.conv(x))
        context = (m.scores(x).softmax(-1) * x).sum(-1, keepdim=True)
        return m.conv(m.act(x) * context)

    conv, scores = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 1, 1)
    net = Net(attend, conv=conv, scores=scores, act=nn.ReLU(), pool=nn.AvgPool2d(8))
    assert roles(net, IMAGES) == {"act@in": "activation"}


@pytest.mark.parametrize("gate_first", [True, False])
def test_what_gates_once_and_activates_once_is_an_activation(gate_first):
    block = Wrapped(lambda m, x: m.act(m.conv(x)), act=nn.Sigmoid(), conv=nn.Conv2d(8, 8, 1))

    def code(m, x):
        x = x * m.block(x) if gate_first else m.block(x)
        return m.conv(m.block(x) if gate_first else x * m.block(x))

    net = Net(code, block=block, conv=nn.Conv2d(8, 8, 1))
    assert roles(net) == {"block.act@in": "activation"}


def test_attention_scores_and_their_bias_are_no_residual_sum():
    model = timm.create_model("halonet26t").eval()
    found = roles(model, torch.rand(1, 3, 256, 256), where="activations+residual")
    assert not any("self_attn" in name for name in found)
    assert set(found.values()) == {"activation"}, "every block's sum goes into an activation"
