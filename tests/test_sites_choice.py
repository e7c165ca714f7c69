"""What `where=` chooses, what is refused, and that nothing is changed."""

import copy
import warnings

import pytest
import torch
from lightning import LightningModule
from nets import IMAGES, Net, Wrapped, found, roles
from torch import nn

from lightning_meansparse import surgery
from lightning_meansparse.sites import (
    Site,
    find_sites,
)


def places() -> Net:
    pair = Wrapped(lambda m, x: (m.conv(x), x.mean()), conv=nn.Conv2d(8, 4, 1))
    return Net(
        lambda m, x: m.tail(m.pair(x)[0]),
        pair=pair,
        tail=nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 1)),
    )


def test_globs_reach_every_border_of_modules_called_once():
    assert found(places(), where="*") == {
        "stem@in": (3, 1, 1),
        "stem@out": (8, 1, 1),
        "pair@in": (8, 1, 1),
        "pair.conv@in": (8, 1, 1),
        "pair.conv@out": (4, 1, 1),
        "pair@out[0]": (4, 1, 1),
        "pair@out[1]": (1,),
        "tail.0@in": (4, 1, 1),  # of tail itself, a Sequential, nothing is offered
        "tail.0@out": (4, 1, 1),
        "tail.1@in": (4, 1, 1),
        "tail.1@out": (6, 1, 1),
    }
    assert roles(places(), where="tail.*") == {
        "tail.0@in": "activation",
        "tail.0@out": "other",
        "tail.1@in": "other",
        "tail.1@out": "other",
    }


def test_brackets_in_names_are_no_character_class():
    assert list(found(places(), where="pair@out[0]")) == ["pair@out[0]"]
    assert list(found(places(), where=["tail.0@in", "*@out[0]"])) == ["pair@out[0]", "tail.0@in"]


def test_a_function_chooses_among_the_same_places():
    assert list(found(places(), where=lambda site: site.channels == 6)) == ["tail.1@out"]
    seen: list[Site] = []
    with pytest.raises(ValueError, match="the given function selects nothing"):
        find_sites(places(), IMAGES, where=lambda site: seen.append(site) or False)
    assert {str(site) for site in seen} == set(found(places(), where="*"))


@pytest.mark.parametrize(
    ("where", "close"),
    [
        ("pair.con@in", "pair.conv@in"),
        ("tail.0", "tail.0@in"),
        (["*@in", "pair@out"], r"pair@out\[0\]"),
        ("activation", "activations"),
        ("tail@out", r"tail.1@out"),
    ],
)
def test_a_glob_without_a_match_shows_close_names(where, close):
    with pytest.raises(ValueError, match=f"matches none of the 11 places.*{close}"):
        find_sites(places(), IMAGES, where=where)


@pytest.mark.parametrize("where", [None, "", [], [1], 3, [""]])
def test_other_kinds_of_where_are_refused(where):
    with pytest.raises(TypeError, match="where must be one of 'activations'"):
        find_sites(places(), IMAGES, where=where)


def test_no_activation_at_all_is_an_error():
    with pytest.raises(ValueError, match=r"'activations' selects nothing.*0 activation, 0 gate"):
        find_sites(nn.Sequential(nn.Conv2d(3, 8, 1)), IMAGES)
    glu = Net(lambda m, x: m.act(x[:, :4]) * x[:, 4:], act=nn.SiLU())
    with pytest.raises(ValueError, match=r"1 gate.*where='activations\+gates'"):
        find_sites(glu, IMAGES)


def test_names_are_relative_to_the_module_passed_in():
    class Lit(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = places()

        def forward(self, x):
            return self.net(x)

    lit = Lit()
    assert list(found(lit)) == ["net.tail.0@in"]
    assert list(found(lit.net)) == ["tail.0@in"]
    assert {str(s).partition("@")[0] for s in find_sites(lit, IMAGES)} <= dict(
        lit.named_modules()
    ).keys()


class Restless(nn.Module):
    """Changes whatever a forward pass can change."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(3))
        self.calls, self.cache, self.seen = 0, {}, []
        self.fail = False
        self.act.register_forward_hook(lambda *_: None)

    def forward(self, x):
        x.mul_(2)
        self.calls += 1
        self.steps += 1
        self.replaced = torch.ones(3)
        self.cache[x.shape] = x
        self.seen.append(x)
        self.new = x
        torch.rand(1)
        y = self.act(self.norm(self.conv(x)))
        if self.fail:
            raise RuntimeError("no")
        return y


def state(model):
    tensors = {
        n: (id(t), t.clone(), t.requires_grad, t.grad)
        for n, t in model.state_dict(keep_vars=True).items()
    }
    flags = {n: m.training for n, m in model.named_modules()}
    attributes = {
        n: {k: (copy.copy(v) if isinstance(v, (dict, list)) else v) for k, v in vars(m).items()}
        for n, m in model.named_modules()
    }
    return tensors, flags, attributes


def assert_same(before, after):
    for name, (identity, values, *rest) in before[0].items():
        assert after[0][name][0] == identity
        assert torch.equal(after[0][name][1], values)
        assert list(after[0][name][2:]) == rest
    assert before[1] == after[1]
    assert before[2] == after[2]


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_and_the_world_are_as_before(fail):
    model = Restless()
    model.fail = fail
    model.norm.eval()  # mixed flags
    image, before = torch.rand(2, 3, 8, 8), state(model)
    original, rng = image.clone(), torch.get_rng_state()
    hooks = [
        len(d)
        for n, d in vars(nn.modules.module).items()
        if n.startswith("_global_") and hasattr(d, "__len__")
    ]
    if fail:
        with pytest.raises(RuntimeError, match="no") as error:
            find_sites(model, image)
        assert "find_sites called Restless with example (2, 3, 8, 8)" in error.value.__notes__[0]
    else:
        assert found(model, image) == {"act@in": (8, 1, 1)}
    assert_same(before, state(model))
    assert torch.equal(image, original)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled()
    assert hooks == [
        len(d)
        for n, d in vars(nn.modules.module).items()
        if n.startswith("_global_") and hasattr(d, "__len__")
    ]
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_eval_mode_is_what_the_probe_sees():
    net = Net(lambda m, x: m.never(x) if m.training else m.act(x), act=nn.ReLU(), never=nn.Tanh())
    assert list(found(net.train())) == ["act@in"]


def test_inference_mode_makes_no_difference():
    net = places()
    with torch.inference_mode():
        assert found(net, IMAGES.clone(), where="*") == found(places(), where="*")
    assert not any(p.is_inference() for p in net.parameters())
    with torch.inference_mode():
        inner = places()
        assert found(inner, torch.rand(2, 3, 8, 8)) == {"tail.0@in": (4, 1, 1)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    assert found(places().to(dtype), IMAGES.to(dtype), where="*") == found(places(), where="*")


def test_channels_last_memory_makes_no_difference():
    net = places().to(memory_format=torch.channels_last)
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    assert found(net, images, where="*") == found(places(), where="*")


@pytest.mark.parametrize("n", [1, 2, 7])
def test_any_number_of_samples(n):
    assert found(places(), torch.rand(n, 3, 8, 8), where="*") == found(places(), where="*")


def test_examples_and_outputs_of_several_tensors():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(1, 8, 1)
            self.act, self.gate = nn.ReLU(), nn.Sigmoid()

        def forward(self, pixel_values, depth):
            out = self.act(self.a(pixel_values)) * self.gate(self.b(depth))
            return {"logits": [out.mean((2, 3))], "loss": None}

    example = {"pixel_values": torch.rand(2, 3, 8, 8), "depth": torch.rand(2, 1, 8, 8)}
    assert roles(Two(), example, where="activations+gates") == {
        "act@in": "gate",  # both multiply another input-dependent tensor
        "gate@in": "gate",
    }


@pytest.mark.parametrize(
    ("example", "error", "said"),
    [
        (None, TypeError, "example must be a tensor"),
        ([IMAGES], TypeError, "got list"),
        ({"pixel_values": 3}, TypeError, "dict of keyword tensors"),
        ({}, ValueError, "an empty dict"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.long), ValueError, "torch.int64"),
        (torch.zeros(0, 3, 8, 8), ValueError, "non-empty"),
    ],
)
def test_examples_that_cannot_be_used_are_refused(example, error, said):
    with pytest.raises(error, match=said):
        find_sites(places(), example)


def test_models_that_cannot_be_probed_are_refused():
    with pytest.raises(TypeError, match=r"torch.nn.Module, got function"):
        find_sites(lambda x: x, IMAGES)
    with pytest.raises(TypeError, match=r"it is a DataParallel. Pass the module inside"):
        find_sites(nn.DataParallel(places()), IMAGES)
    with pytest.raises(ValueError, match=r"without a shape yet \(1.weight, 1.bias\): call it once"):
        find_sites(nn.Sequential(nn.Flatten(), nn.LazyLinear(3), nn.ReLU()), IMAGES)
    with pytest.raises(TypeError, match="it returned int"):
        find_sites(Net(lambda m, x: 3), IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        scripted = torch.jit.script(nn.ReLU())
    with pytest.raises(TypeError, match="its submodule 'act' is a TorchScript module"):
        find_sites(Net(lambda m, x: m.act(x), act=scripted), IMAGES)


@pytest.mark.slow  # importing the compiler takes seconds
def test_compiled_models_are_refused():
    inside = places()
    inside.tail = torch.compile(inside.tail)
    with pytest.raises(TypeError, match=r"its submodule 'tail' is .*torch.compile afterwards"):
        find_sites(inside, IMAGES)
    in_place = places()
    in_place.pair.compile()
    with pytest.raises(TypeError, match=r"its submodule 'pair'"):
        find_sites(in_place, IMAGES)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_operators_in_place_change_nothing_that_is_found(alpha):
    act = Wrapped(lambda m, x: x * torch.sigmoid(x))
    net = Net(lambda m, x: m.act(m.pair(x)[0]), pair=places().pair, act=act)
    names = ["stem@out", "pair@out[0]", "pair.conv@in", "act@in"]
    everything = find_sites(net, IMAGES, where="*")
    surgery.sparsify_(net, find_sites(net, IMAGES, where=names), alpha=alpha)
    surgery.calibrate_(net, [IMAGES])
    assert find_sites(net, IMAGES, where="*") == everything
    assert list(surgery.operators(net)) != []
