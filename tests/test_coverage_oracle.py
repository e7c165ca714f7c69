"""The oracle of the coverage sweep, on nets whose answer is known by hand."""

from __future__ import annotations

import ast
import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_meansparse.layer import MeanSparse
from tests.coverage import check
from tests.coverage.check import check_model
from tests.coverage.oracle import look

IMAGES = torch.rand(2, 3, 8, 8)  # nets below have 8 channels: sizes cannot tell the axis
FOLDER = Path(__file__).parent / "coverage"


class Net(nn.Module):
    """A network from its parts and a function of (network, image features after a convolution)."""

    def __init__(self, code, **parts):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 5, 1)
        for name, part in parts.items():
            setattr(self, name, part)
        self.code = code
        self.eval()

    def forward(self, x):
        return self.code(self, self.stem(x))


class Part(nn.Module):
    """A part with a class of its own."""

    def __init__(self, code, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.code = code

    def forward(self, *args):
        return self.code(self, *args)


def calls(net, example=IMAGES):
    return [(call.op, call.module, call.gate) for call in look(net, example, shapes=False).calls]


def test_the_oracle_imports_nothing_of_what_it_judges():
    seen = 0
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            seen += len(names)
            ours = [name for name in names if name.startswith("lightning_meansparse")]
            assert not ours or path.name == "check.py", path.name
            assert not any(name.startswith("lightning_meansparse.sites") for name in ours)
    assert seen > 20


# --------------------------------------------------------------------------- which calls there are

ONE = {
    "F.relu": (lambda m, x: F.relu(x), "relu"),
    "F.relu in place": (lambda m, x: F.relu(x, inplace=True), "relu"),
    "torch.relu_": (lambda m, x: torch.relu_(x), "relu"),
    "method": (lambda m, x: x.sigmoid(), "sigmoid"),
    "nn.GELU": (lambda m, x: nn.GELU()(x), "gelu"),
    "nn.ReLU6": (lambda m, x: nn.ReLU6()(x), "hardtanh"),
    "nn.Hardswish in place": (lambda m, x: nn.Hardswish(True)(x), "hardswish"),
    "nn.Hardsigmoid": (lambda m, x: nn.Hardsigmoid()(x), "hardsigmoid"),
    "nn.LeakyReLU": (lambda m, x: nn.LeakyReLU()(x), "leaky_relu"),
    "nn.SELU": (lambda m, x: nn.SELU()(x), "elu"),
    "nn.CELU": (lambda m, x: nn.CELU()(x), "celu"),
    "nn.Mish": (lambda m, x: nn.Mish()(x), "mish"),
    "nn.Softplus": (lambda m, x: nn.Softplus()(x), "softplus"),
    "nn.PReLU": (lambda m, x: m.prelu(x), "_prelu_kernel"),
    "nn.LogSigmoid": (lambda m, x: nn.LogSigmoid()(x), "log_sigmoid_forward"),
    "nn.Softshrink": (lambda m, x: nn.Softshrink()(x), "softshrink"),
    "nn.Threshold": (lambda m, x: nn.Threshold(0.1, 0)(x), "threshold"),
    "nn.Tanhshrink": (lambda m, x: nn.Tanhshrink()(x), "tanh"),
    "clamp at zero": (lambda m, x: x.clamp(min=0, max=6), "clamp"),
    "quick GELU by hand": (lambda m, x: x * torch.sigmoid(1.702 * x), "sigmoid"),
    "GELU by hand with tanh": (
        lambda m, x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3))),
        "tanh",
    ),
    "GELU by hand with erf": (lambda m, x: x * 0.5 * (1 + torch.erf(x / 1.4)), "erf"),
    "mish by hand": (lambda m, x: x * F.softplus(x).tanh(), "softplus+tanh"),
    "SiLU by hand": (lambda m, x: x / (1 + torch.exp(-x)), "exp"),
    "softsign": (lambda m, x: F.softsign(x), "abs"),
    "hard-swish by hand": (lambda m, x: x * F.relu6(x + 3) / 6, "hardtanh"),
    "hard-swish by hand, in place": (lambda m, x: F.relu6(x + 3).div_(6).mul_(x), "hardtanh"),
    "hard-swish by hand with clamp": (lambda m, x: x * (x + 3).clamp(0, 6) / 6, "clamp"),
}


@pytest.mark.parametrize("how", ONE)
def test_one_activation_is_one_call(how):
    code, op = ONE[how]
    net = Net(lambda m, x: m.head(m.act(x)), act=Part(code, prelu=nn.PReLU()))
    module = "act.prelu" if "PReLU" in how else "act"
    (call,) = look(net, IMAGES).calls
    assert (call.op, call.module, call.gate) == (op, module, False)
    assert call.shape == (8, 1, 1)


NONE = {
    "softmax": lambda m, x: x.softmax(1),
    "GLU joins channels": lambda m, x: F.glu(torch.cat([x, x], 1), 1),
    "norms": lambda m, x: m.bn(m.gn(x)),
    "squares": lambda m, x: x * x * x,
    "unit length": lambda m, x: F.normalize(x),
    "division by a mean of absolute values": lambda m, x: x / x.abs().mean(1, keepdim=True),
    "division by a clamped norm": lambda m, x: x / x.norm(dim=1, keepdim=True).clamp(min=1e-5),
    "a constant": lambda m, x: x + F.relu(m.table).view(1, 8, 1, 1),
    "a constant of the input's form": lambda m, x: x + torch.zeros_like(x).add_(1).tanh(),
    "a tensor that was overwritten": lambda m, x: x + F.gelu(x.clone().zero_().add_(1)),
    "attention": lambda m, x: F.scaled_dot_product_attention(x, x, x),
    "whole numbers": lambda m, x: x.flatten(1)[:, (x.flatten() * 9).long().clamp(0, 3)][:, :2],
}


@pytest.mark.parametrize("how", NONE)
def test_what_is_no_activation_is_no_call(how):
    def code(m, x):
        NONE[how](m, x)
        return m.head(NONE[how](m, x)) if how != "whole numbers" else NONE[how](m, x)

    parts = {"bn": nn.BatchNorm2d(8), "gn": nn.GroupNorm(2, 8)}
    assert calls(Net(code, table=nn.Parameter(torch.rand(8)), **parts)) == []


def test_every_call_counts_in_the_order_of_execution():
    def code(m, x):
        for conv in m.convs:
            x = m.act(conv(x))  # one module, two calls
        y = F.gelu(x)
        m.act(m.lonely)  # a constant
        return m.head(m.block(y) + x)

    block = Part(lambda m, x: m.inner(x).tanh(), inner=nn.Sequential(nn.SiLU(), nn.Conv2d(8, 8, 1)))
    convs = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)])
    net = Net(code, convs=convs, act=nn.ReLU(), block=block, lonely=nn.Parameter(torch.rand(3)))
    assert calls(net) == [
        ("relu", "act", False),
        ("relu", "act", False),
        ("gelu", "", False),
        ("silu", "block.inner.0", False),
        ("tanh", "block", False),
    ]


def test_what_is_written_through_views_depends_on_the_input():
    def code(m, x):
        y = torch.zeros(2, 8, 8, 8)
        y[:, :4] = x[:, 4:]  # through a view of a constant
        y[:, 4:].add_(1)
        return m.head(y.tanh()) + m.head(torch.zeros(2, 8, 8, 8).relu())

    assert calls(Net(code)) == [("tanh", "", False)]


def test_writes_to_one_half_leave_the_other_alone():
    def code(m, x):
        a, b = x.chunk(2, 1)
        a.relu_()  # b must not come to depend on it: it gates a
        return m.out(a * b.mean((2, 3), keepdim=True).sigmoid())

    assert calls(Net(code, out=nn.Conv2d(4, 4, 1))) == [
        ("relu", "", False),
        ("sigmoid", "", True),
    ]


def test_fused_layers_hide_no_activation():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = Net(lambda m, x: m.layer(x.flatten(2).mT), layer=layer)
    assert [call[0] for call in calls(net)] == ["_transformer_encoder_layer_fwd"]


# ------------------------------------------------------------------------------------------- gates


def excite(m, x):
    return torch.sigmoid(m.two(F.relu(m.one(x.mean((2, 3), keepdim=True)))))


GATED = {
    "squeeze-excite": (lambda m, x: m.head(F.gelu(x * excite(m, x))), "relu sigmoid"),
    "squeeze-excite after the activation": (
        lambda m, x: (lambda y: m.head(y * excite(m, y)))(F.gelu(x)),
        "relu sigmoid",
    ),
    "squeeze-excite in place": (
        lambda m, x: (lambda y: m.head(y.mul_(excite(m, y))))(F.gelu(x)),
        "relu sigmoid",
    ),
    "squeeze-excite at one pixel": (
        lambda m, x: (lambda y: m.head(y * excite(m, y)))(F.gelu(F.adaptive_avg_pool2d(x, 1))),
        "relu sigmoid",
    ),
    "squeeze-excite, expanded": (
        lambda m, x: m.head(F.gelu(x * excite(m, x).expand_as(x))),
        "relu sigmoid",
    ),
    "a gate by hand": (
        lambda m, x: m.head(F.gelu(x) * (F.relu6(m.one(x).mean((2, 3), True) + 3) / 6)),
        "hardtanh",
    ),
    "one map over all channels": (
        lambda m, x: m.head(F.gelu(x) * torch.sigmoid(x.mean(1, keepdim=True))),
        "sigmoid",
    ),
    "a map of half the size": (
        lambda m, x: m.head(x * F.interpolate(m.one(F.avg_pool2d(x, 2)).sigmoid(), scale_factor=2)),
        "sigmoid",
    ),
    "GLU by halves": (
        lambda m, x: (lambda a, b: m.four(F.silu(a) * b))(*x.chunk(2, 1)),
        "silu",
    ),
    "GLU by layers, with a self-gated activation written by hand": (
        lambda m, x: (lambda a: m.head(a * torch.sigmoid(1.7 * a) * m.two(x)))(m.one(x)),
        "sigmoid",
    ),
    "both sides are activations": (
        lambda m, x: m.head(torch.tanh(m.one(x)) * torch.sigmoid(m.two(x))),
        "tanh sigmoid",
    ),
    "a factor that goes another way too": (
        lambda m, x: (lambda s: m.head(F.gelu(x) * s + s))(m.one(x.mean((2, 3), True)).sigmoid()),
        "",
    ),
    "times a parameter": (lambda m, x: m.head(x + F.gelu(x) * m.scale), ""),
    "what is multiplied comes from the activation": (
        lambda m, x: (lambda y: m.head(y * m.one(y)))(F.gelu(x)),
        "",
    ),
    "self-gated": (lambda m, x: m.head(F.relu(x * torch.sigmoid(x))), ""),
    "a layer after the activation, equal shapes": (
        lambda m, x: m.head(m.one(F.gelu(x)) * m.two(x)),
        "",
    ),
    "relu(v) times a context vector": (
        lambda m, x: m.head(F.relu(x) * m.one(x).mean((2, 3), True)),
        "",
    ),
    "through a sum": (lambda m, x: m.head(F.relu(x) + m.one(x)), ""),
    "an attention matrix": (
        lambda m, x: (m.one(F.relu(x)).flatten(2).mT @ x.flatten(2)).softmax(-1) @ x.flatten(2).mT,
        "",
    ),
    "not on the way to the output": (
        lambda m, x: (F.gelu(m.one(x)), m.head(x * m.two(x).mean((2, 3), True).sigmoid()))[1],
        "sigmoid",
    ),
    "of two outputs, one is the gate's": (
        lambda m, x: (lambda s: (m.head(x * s), s))(m.one(x).mean((2, 3), True).sigmoid()),
        "",
    ),
}


@pytest.mark.parametrize("how", GATED)
def test_gates_are_known_by_what_becomes_of_them(how):
    code, expected = GATED[how]
    net = Net(
        code,
        one=nn.Conv2d(8, 8, 1),
        two=nn.Conv2d(8, 8, 1),
        four=nn.Conv2d(4, 4, 1),
        scale=nn.Parameter(torch.ones(8, 1, 1)),
    )
    found = calls(net)
    assert found
    assert " ".join(op for op, _, gate in found if gate) == expected


# ---------------------------------------------------------------------------------------- channels


def windows(m, x):
    x = x.permute(0, 2, 3, 1).roll((-1, -1), (1, 2))
    n, h, w, c = x.shape
    return F.gelu(m.ln(x.view(n, h // 4, 4, w // 4, 4, c).transpose(2, 3).reshape(-1, 16, c)))


def heads(m, x):
    q, k, v = m.qkv(x.flatten(2).mT).view(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
    return F.relu((F.relu(q) @ F.relu(k).mT).softmax(-1) @ v)


SHAPES = {
    "convolution": (lambda m, x: F.relu(x), [(8, 1, 1)]),
    "norms": (lambda m, x: F.relu(m.gn(m.bn(m.inst(x)))), [(8, 1, 1)]),
    "pooling, padding, resizing": (
        lambda m, x: F.relu(F.interpolate(F.pad(F.max_pool2d(x, 2), (1, 2)), scale_factor=2)),
        [(8, 1, 1)],
    ),
    "x minus its own pool": (lambda m, x: F.relu(F.avg_pool2d(x, 3, 1, 1) - x), [(8, 1, 1)]),
    "channels last": (lambda m, x: F.relu(x.permute(0, 2, 3, 1)), [(8,)]),
    "linear, layer norm": (lambda m, x: F.relu(m.ln6(m.fc(x.movedim(1, -1)))), [(6,)]),
    "layer norm over channels first": (
        lambda m, x: F.relu(m.ln(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        [(8, 1, 1)],
    ),
    "layer norm by hand": (
        lambda m, x: F.relu((x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1).sqrt()),
        [(8, 1, 1)],
    ),
    "one layer norm over everything": (
        lambda m, x: F.relu(F.layer_norm(x, (8, 8, 8))),
        [(8, 1, 1)],
    ),
    "linear over the columns": (lambda m, x: F.relu(m.fc(x)), [(6,)]),
    "tokens with a class token": (
        lambda m, x: F.relu(torch.cat([m.cls.expand(len(x), -1, -1), x.flatten(2).mT], 1) + m.cls),
        [(8,)],
    ),
    "concatenation": (
        lambda m, x: F.relu(torch.cat([x, m.conv5(x), x.new_zeros(len(x), 2, 8, 8)], 1)),
        [(15, 1, 1)],
    ),
    "heads from two layers": (
        lambda m, x: F.relu(torch.cat([x, m.conv8(x)], 1).unflatten(1, (4, 4)).flatten(3).mT),
        [(4, 1, 4)],
    ),
    "branches summed and rectified again and again": (
        lambda m, x: (lambda y: F.relu(m.bn(y) + m.conv8(y)))(F.relu(m.bn(x) - 3 + m.conv8(x))),
        [(8, 1, 1), (8, 1, 1)],
    ),
    "a part of the channels": (lambda m, x: F.relu(x[:, 2:6]), [(4, 1, 1)]),
    "channel shuffle": (
        lambda m, x: F.relu(x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)),
        [(8, 1, 1)],
    ),
    "groups apart": (lambda m, x: F.relu(x.unflatten(1, (2, 4)).movedim(2, -1)), [(2, 1, 1, 4)]),
    "patches merged": (lambda m, x: F.relu(F.unfold(x, 2, stride=2)), [(32, 1)]),
    "pixel shuffle": (lambda m, x: F.relu(F.pixel_shuffle(x, 2)), [(2, 1, 1)]),
    "flattened images": (lambda m, x: F.relu(F.adaptive_avg_pool2d(x, 2).flatten(1)), [(32,)]),
    "shifted windows": (windows, [(8,)]),
    "heads": (heads, [(2, 1, 4), (2, 1, 4), (2, 1, 4)]),
    "a matrix from the left": (lambda m, x: F.relu(m.left @ x.flatten(2)), [(6, 1)]),
    "an MLP over tokens": (lambda m, x: F.relu(m.tokens(x.flatten(2))), [(5,)]),
    "one dimension": (lambda m, x: F.relu(m.conv1(x.flatten(2))), [(6, 1)]),
    "depthwise": (lambda m, x: F.relu(m.depthwise(x)), [(16, 1, 1)]),
    "three dimensions": (lambda m, x: F.relu(m.conv3(x[:, :, None])), [(4, 1, 1, 1)]),
    "transposed convolution": (lambda m, x: F.relu(m.up(x)), [(6, 1, 1)]),
    "a single channel": (lambda m, x: F.relu(m.one(x)), [(1,)]),
    "after a mean": (lambda m, x: F.relu(x.mean((2, 3))), [(8,)]),
    "after a mean and an activation": (
        lambda m, x: F.gelu(F.relu(x).mean((2, 3), keepdim=True)),
        [(8, 1, 1), (8, 1, 1)],
    ),
    "after a residual sum and a gate": (
        lambda m, x: F.relu(x * m.conv8(x).mean((2, 3), True).sigmoid() + x),
        [(8, 1, 1), (8, 1, 1)],
    ),
    "one after another": (lambda m, x: F.tanh(F.relu(x)), [(8, 1, 1), (8, 1, 1)]),
    "in place": (lambda m, x: F.relu_(m.conv8(F.relu_(x)).add_(x)), [(8, 1, 1), (8, 1, 1)]),
    "the image itself": (lambda m, x: F.relu(m.raw), [(3, 1, 1)]),
}


@pytest.mark.parametrize("how", SHAPES)
def test_channels_are_found_by_disturbing_them(how):
    code, expected = SHAPES[how]
    parts = {
        "bn": nn.BatchNorm2d(8),
        "gn": nn.GroupNorm(2, 8),
        "inst": nn.InstanceNorm2d(8),
        "ln": nn.LayerNorm(8),
        "ln6": nn.LayerNorm(6),
        "fc": nn.Linear(8, 6),
        "cls": nn.Parameter(torch.rand(1, 1, 8)),
        "conv5": nn.Conv2d(8, 5, 1),
        "conv8": nn.Conv2d(8, 8, 1),
        "qkv": nn.Linear(8, 24),
        "left": nn.Parameter(torch.rand(1, 6, 8)),
        "tokens": nn.Linear(64, 5),
        "conv1": nn.Conv1d(8, 6, 1),
        "conv3": nn.Conv3d(8, 4, 1),
        "depthwise": nn.Conv2d(8, 16, 3, groups=8),
        "up": nn.ConvTranspose2d(8, 6, 2),
        "one": nn.Conv2d(8, 1, 1),
    }
    net = Net(code, **parts)
    net.register_forward_pre_hook(lambda m, args: vars(m).update(raw=args[0]))
    assert [call.shape for call in look(net, IMAGES).calls] == expected


UNTOLD = {
    "channels mixed beyond recognition": (
        lambda m, x: F.relu(x.flatten(2).mT @ x.flatten(2)),
        "mixed",
    ),
    "samples folded into channels": (
        lambda m, x: F.relu(x.flatten(0, 1)),
        "sample to sample",
    ),
    "nothing that makes channels": (
        lambda m, x: F.relu(m.raw.flatten(1).cumsum(1) * 0),
        "no perturbation",
    ),
    "a path that depends on the values": (
        lambda m, x: F.relu(x) if x[0, 0, 0, 0] < 0.9 else F.relu(x + 1),
        "depends on the values",
    ),
    "a path that is never the same": (
        lambda m, x: F.relu(x) if next(m.count) % 2 else F.relu(x + 1),
        "not do the same",
    ),
}


@pytest.mark.parametrize("how", UNTOLD)
def test_what_cannot_be_told_is_not_told(how):
    code, why = UNTOLD[how]
    net = Net(code)
    net.register_forward_pre_hook(lambda m, args: vars(m).update(raw=args[0]))
    net.count = itertools.count()
    net.stem.weight.data.mul_(0.1)
    (call,) = look(net, IMAGES).calls
    assert isinstance(call.shape, str)
    assert why in call.shape


# ------------------------------------------------------------------------ operators in their place


def operator(*shape, alpha=0.0):
    zeros = torch.zeros(shape)
    return MeanSparse(zeros, zeros, alpha)


def sparse(net, example=IMAGES):
    operators = {n: m for n, m in net.named_modules() if isinstance(m, MeanSparse)}
    return look(net, example, operators)


def served(net):
    truth = sparse(net)
    return [call.operator for call in truth.calls], truth.operators


def test_a_call_behind_an_operator_is_known():
    net = Net(lambda m, x: m.head(F.relu(m.ms(x))), ms=operator(8, 1, 1))
    by, (one,) = served(net)
    assert by == ["ms"]
    assert (one.times, one.shape, one.serves, one.gates) == (1, (8, 1, 1), 1, 0)


def test_the_shape_is_the_truth_whatever_the_operator_says():
    net = Net(lambda m, x: m.head(F.relu(m.ms(x))), ms=operator(1, 8))
    by, (one,) = served(net)
    assert by == ["ms"]
    assert one.shape == (8, 1, 1) != tuple(net.ms.mean.shape)


BEHIND = {
    "a constant between": (lambda m, x: F.relu(m.ms(x) * m.scale + 1), "ms"),
    "a view between": (lambda m, x: F.relu(m.ms(x).permute(0, 2, 3, 1).flatten(1, 2)), "ms"),
    "a cast between": (lambda m, x: F.relu(m.ms(x).double()), "ms"),
    "written by hand": (lambda m, x: (lambda y: y * torch.sigmoid(y))(m.ms(x)), "ms"),
    "clamped by hand": (lambda m, x: (lambda y: y * (y + 3).clamp(0, 6))(m.ms(x)), "ms"),
    "in place": (lambda m, x: F.relu_(m.ms(x)), "ms"),
    "a part of it": (lambda m, x: F.relu(m.ms(x)[:, :4]), None),
    "a layer between": (lambda m, x: F.relu(m.head(m.ms(x))), None),
    "a norm between": (lambda m, x: F.relu(F.layer_norm(m.ms(x), (8,))), None),
    "another tensor added": (lambda m, x: F.relu(m.ms(x) + x.mean()), None),
    "another tensor multiplied": (lambda m, x: F.relu(m.ms(x) * x), None),
    "the operator thrown away": (lambda m, x: (m.ms(x), F.relu(x))[1], None),
    "behind the activation": (lambda m, x: m.ms(F.relu(x)), None),
}


@pytest.mark.parametrize("how", BEHIND)
def test_what_may_stand_between_an_operator_and_its_call(how):
    code, by = BEHIND[how]
    net = Net(code, ms=operator(8, 1, 1), scale=nn.Parameter(torch.ones(8, 1, 1)))
    assert served(net)[0] == [by]


def test_a_call_behind_another_call_needs_an_operator_of_its_own():
    net = Net(lambda m, x: F.tanh(F.relu(m.ms(x))), ms=operator(8, 1, 1))
    assert served(net)[0] == ["ms", None]


def test_an_operator_at_a_part_of_an_activation_written_by_hand():
    for code in (
        lambda m, x: x * torch.sigmoid(m.ms(x)),
        lambda m, x: m.ms(x) * torch.sigmoid(m.ms2(x)),
    ):
        net = Net(code, ms=operator(8, 1, 1), ms2=operator(8, 1, 1))
        (call,) = sparse(net).calls
        assert call.torn
        assert not call.gate
    whole = Net(lambda m, x: (lambda y: y * torch.sigmoid(y))(m.ms(x)), ms=operator(8, 1, 1))
    assert not sparse(whole).calls[0].torn


def test_operators_that_stand_wrong_are_counted():
    def code(m, x):
        x = m.twice(m.twice(F.relu(m.right(x))))
        return m.head(x * torch.sigmoid(m.gate(m.fc(x.mean((2, 3), True)))))

    names = ("right", "twice", "gate", "never")
    net = Net(code, fc=nn.Conv2d(8, 8, 1), **{name: operator(8, 1, 1) for name in names})
    found = {one.name: one for one in sparse(net).operators}
    assert {n: found[n].times for n in names} == {"right": 1, "twice": 2, "gate": 1, "never": 0}
    assert {n: (found[n].serves, found[n].gates) for n in names} == {
        "right": (1, 0),
        "twice": (0, 0),
        "gate": (0, 1),
        "never": (0, 0),
    }


def test_an_operator_changes_neither_gates_nor_shapes():
    def code(m, x):
        return m.head(F.gelu(m.a(x)) * m.b(m.fc(x.mean((2, 3), True))).sigmoid().expand_as(x))

    with_them = Net(code, fc=nn.Conv2d(8, 8, 1), a=operator(8, 1, 1), b=operator(8, 1, 1))
    without = Net(code, fc=nn.Conv2d(8, 8, 1), a=nn.Identity(), b=nn.Identity())
    kinds = [
        [(call.op, call.gate, call.shape) for call in truth.calls]
        for truth in (sparse(with_them), look(without, IMAGES))
    ]
    assert kinds[0] == kinds[1] == [("gelu", False, (8, 1, 1)), ("sigmoid", True, (8, 1, 1))]


# ---------------------------------------------------------------------------- the check of a model


def small():
    block = Part(lambda m, x: x + m.conv(m.act(x)), act=nn.ReLU(), conv=nn.Conv2d(8, 8, 1))
    gate = Part(
        lambda m, x: x * m.act(m.fc(x.mean((2, 3), True))), fc=nn.Conv2d(8, 8, 1), act=nn.Sigmoid()
    )
    return Net(
        lambda m, x: m.head(m.act(m.gate(m.block(x)))), block=block, gate=gate, act=nn.GELU()
    )


def test_a_good_model_passes():
    result = check_model(small(), IMAGES)
    assert result.passed, result
    assert (result.calls, result.gates, result.reached, result.operators) == (3, 1, 2, 2)
    assert result.told == 2


def test_a_model_with_gates_only_is_checked_there():
    net = Net(lambda m, x: m.head(x * m.act(m.fc(x))), act=nn.SiLU(), fc=nn.Conv2d(8, 8, 1))
    result = check_model(net, IMAGES)
    assert result.passed, result
    assert (result.calls, result.gates, result.reached, result.operators) == (1, 1, 0, 1)


class Twice(nn.Module):
    """Comes to one activation module twice."""

    def __init__(self, act, conv):
        super().__init__()
        self.act, self.conv = act, conv

    def forward(self, x):
        return self.conv(F.gelu(self.act(self.conv(self.act(x)))))


def test_code_that_runs_twice_passes_its_operators_twice():
    block = Twice(nn.ReLU(), nn.Conv2d(8, 8, 1))
    result = check_model(Net(lambda m, x: m.head(m.block(m.block(x))), block=block), IMAGES)
    assert result.passed, result
    assert (result.calls, result.reached, result.operators, result.again) == (6, 6, 3, 3)


def test_two_calls_of_one_module_in_one_code_need_two_operators(monkeypatch):
    shared = Net(lambda m, x: m.block(x), block=Twice(nn.ReLU(), nn.Conv2d(8, 8, 1)))
    assert check_model(shared, IMAGES).passed
    monkeypatch.setattr(
        check, "find_sites", sites(lambda s: [type(s[0])("block.act", "in", (8, 1, 1))])
    )
    said = "block.act.meansparse_in ran 2 times in one forward pass, its code 1 times"
    assert said in check_model(shared, IMAGES).failures


class SwishAmid(nn.Module):
    """Writes an activation out amid other things."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(x * torch.sigmoid(x))


def test_an_activation_that_is_served_in_part_is_not_reached(monkeypatch):
    site = type(find(small(), IMAGES)[0])
    net = Net(lambda m, x: m.block(x), block=SwishAmid())
    part = site("block", "in", (8, 1, 1), call="sigmoid[0]")
    monkeypatch.setattr(check, "find_sites", lambda *args, **options: (part,))
    result = check_model(net, IMAGES)
    assert (result.calls, result.reached, result.torn, result.missed) == (1, 0, 1, [])
    (failure,) = result.failures
    assert failure.startswith("sigmoid in block: ")
    assert failure.endswith("serves a part of it only")
    whole = site("block", "in", (8, 1, 1))
    monkeypatch.setattr(check, "find_sites", lambda *args, **options: (whole,))
    result = check_model(net, IMAGES)
    assert result.passed, result
    assert (result.reached, result.torn) == (1, 0)


def sites(change):
    """`find_sites`, with its answer changed."""
    return lambda *args, **options: change(list(find(*args, **options)))


find, put, take = check.find_sites, check.sparsify_, check.restore_


def put_and(deed):
    def sparsify(model, where):
        put(model, where)
        deed(model)

    return sparsify


def take_and(deed):
    def restore(model):
        take(model)
        deed(model)

    return restore


class Shifted(nn.Module):
    def forward(self, x):
        return super().forward(x)


def swap_class(model):
    model.block.__class__ = type("Other", (Part,), {})


def double(model):
    for module in model.modules():
        if isinstance(module, MeanSparse):
            module.register_forward_hook(lambda m, args, out: out * (1 + 1e-6))


def run_again(model):
    inner = model.act.meansparse_in
    model.register_forward_hook(lambda m, args, out: (inner(torch.rand(1, 8, 2, 2)), out)[1])


class Frozen(MeanSparse):
    """Does nothing, whatever its statistics: `calibrate_` takes a forward of its own away again."""

    def forward(self, x, **options):
        return x


def freeze(model):
    for module in model.modules():
        if isinstance(module, MeanSparse):
            module.__class__ = Frozen


SABOTAGE = {
    "a site is missing": ("find_sites", sites(lambda s: s[1:]), "missed", "relu in block.act"),
    "a site has the wrong shape": (
        "find_sites",
        sites(lambda s: [type(s[0])("block.act", "in", (8,)), *s[1:]]),
        "failures",
        "block.act.meansparse_in has the shape (8,), the oracle says (8, 1, 1)",
    ),
    "a site at a gate": (
        "find_sites",
        sites(lambda s: [*s, type(s[0])("gate.act", "in", (8, 1, 1))]),
        "failures",
        "gate.act.meansparse_in stands before no activation, or before a gate",
    ),
    "a site where no activation is": (
        "find_sites",
        sites(lambda s: [*s, type(s[0])("head", "in", (8, 1, 1))]),
        "failures",
        "head.meansparse_in stands before no activation, or before a gate",
    ),
    "find_sites refuses": (
        "find_sites",
        sites(lambda s: 1 / 0),
        "error",
        "ZeroDivisionError",
    ),
    "an operator is not the identity": (
        "sparsify_",
        put_and(double),
        "failures",
        "with operators and α = 0 the outputs are others",
    ),
    "an operator does nothing": (
        "sparsify_",
        put_and(freeze),
        "failures",
        "with statistics and α = 0.5 the outputs are still those of the base model",
    ),
    "an operator runs twice": (
        "sparsify_",
        put_and(run_again),
        "failures",
        "act.meansparse_in ran 2 times in one forward pass, its code 1 times",
    ),
    "restore_ leaves another class": (
        "restore_",
        take_and(swap_class),
        "failures",
        "restore_ leaves another class of 'block'",
    ),
    "restore_ leaves an attribute": (
        "restore_",
        take_and(lambda m: vars(m.act).update(rest=1)),
        "failures",
        "restore_ leaves another attribute rest of 'act'",
    ),
    "restore_ leaves a hook": (
        "restore_",
        take_and(lambda m: m.act.register_forward_hook(lambda *a: None)),
        "failures",
        "restore_ leaves another attribute _forward_hooks of 'act'",
    ),
    "restore_ leaves a child": (
        "restore_",
        take_and(lambda m: m.act.add_module("rest", nn.Identity())),
        "failures",
        "restore_ leaves another attribute _modules of 'act'",
    ),
    "restore_ leaves a key": (
        "restore_",
        take_and(lambda m: m.act.register_buffer("rest", torch.zeros(1))),
        "failures",
        "restore_ leaves another keys of the state_dict",
    ),
    "restore_ changes a weight": (
        "restore_",
        take_and(lambda m: m.head.weight.data.mul_(1.001)),
        "failures",
        "after restore_ the outputs are others",
    ),
    "restore_ does nothing": (
        "restore_",
        lambda model: None,
        "failures",
        "restore_ leaves another attribute _modules of 'act'",
    ),
}


@pytest.mark.parametrize("how", SABOTAGE)
def test_whatever_goes_wrong_is_said(how, monkeypatch):
    name, fake, where, said = SABOTAGE[how]
    monkeypatch.setattr(check, name, fake)
    result = check_model(small(), IMAGES)
    assert not result.passed
    found = getattr(result, where)
    assert any(said in line for line in ([found] if isinstance(found, str) else found)), result


def test_a_base_model_that_cannot_be_judged_is_said():
    restless = Net(lambda m, x: m.head(F.relu(x)) + m.next())
    restless.next = partial(next, itertools.count())
    assert any("second time" in line for line in check_model(restless, IMAGES).failures)
    broken = Net(lambda m, x: m.head(F.relu(x)) / 0)
    assert any("not finite" in line for line in check_model(broken, IMAGES).failures)


def test_waking_a_model_leaves_no_constant_scale():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    nn.init.zeros_(net[1].weight)
    drawn = net[0].weight.clone()
    check.wake(net)
    assert net[1].weight.std() > 0
    assert torch.equal(net[0].weight, drawn)
