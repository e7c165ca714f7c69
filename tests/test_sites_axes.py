"""Channel axes come from where a tensor came from; undecided ones are asked for."""

import pytest
import torch
from nets import IMAGES, Net, found
from torch import nn
from torch.nn import functional as F

from lightning_meansparse.sites import (
    UndecidedChannelsError,
    find_sites,
)


def windows(m, x):  # Swin: (N, H, W, C) -> windows of 4 x 4 tokens, rolled
    x = x.permute(0, 2, 3, 1).roll((-1, -1), (1, 2))
    n, h, w, c = x.shape
    return m.act(x.view(n, h // 4, 4, w // 4, 4, c).transpose(2, 3).reshape(-1, 16, c))


def heads(m, x):
    n, _c = x.shape[:2]
    q, k, v = m.qkv(x.flatten(2).transpose(1, 2)).view(n, -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(m.act(q), k, v)
    out = m.act2((q @ k.transpose(-2, -1)).softmax(-1) @ v) + out
    return m.act3(out.transpose(1, 2).flatten(2))


AXES = {
    "convolution": (lambda m, x: m.act(x), {}, {"act": (8, 1, 1)}),
    "norms, pools, padding, resizing": (
        lambda m, x: m.act(
            F.interpolate(F.pad(m.norm(F.max_pool2d(x, 2)), (1, 2)), scale_factor=2)
        ),
        {"norm": nn.GroupNorm(2, 8)},
        {"act": (8, 1, 1)},
    ),
    "batch norm, instance norm, local response": (
        lambda m, x: m.act(F.local_response_norm(m.b(m.a(x)), 3)),
        {"a": nn.BatchNorm2d(8), "b": nn.InstanceNorm2d(8)},
        {"act": (8, 1, 1)},
    ),
    "channels last by permute": (lambda m, x: m.act(x.permute(0, 2, 3, 1)), {}, {"act": (8,)}),
    "linear over channels last": (
        lambda m, x: m.act(m.fc(m.norm(x.movedim(1, -1)))),
        {"fc": nn.Linear(8, 6), "norm": nn.LayerNorm(8)},
        {"act": (6,)},
    ),
    "linear over the columns of an image": (
        lambda m, x: m.act(m.fc(F.adaptive_avg_pool2d(x, 8))),
        {"fc": nn.Linear(8, 6)},
        {"act": (6,)},
    ),
    "tokens": (lambda m, x: m.act(x.flatten(2).mT), {}, {"act": (8,)}),
    "tokens with a class token and positions": (
        lambda m, x: m.act(torch.cat([m.cls.expand(len(x), -1, -1), x.flatten(2).mT], 1) + m.cls),
        {"cls": nn.Parameter(torch.rand(1, 1, 8))},
        {"act": (8,)},
    ),
    "concatenation of channels": (
        lambda m, x: m.act(torch.cat([x, m.conv(x), x.new_zeros(len(x), 2, *x.shape[2:])], 1)),
        {"conv": nn.Conv2d(8, 5, 1)},
        {"act": (15, 1, 1)},
    ),
    "split, slice, stack, unbind": (
        lambda m, x: m.act(torch.stack([x[:, 2:6], x.split(4, 1)[1]], 2).unbind(2)[0]),
        {},
        {"act": (4, 1, 1)},
    ),
    "channel shuffle": (
        lambda m, x: m.act(x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)),
        {},
        {"act": (8, 1, 1)},
    ),
    "groups of channels stay apart": (
        lambda m, x: m.act(x.unflatten(1, (2, 4)).movedim(2, -1)),
        {},
        {"act": (2, 1, 1, 4)},
    ),
    "patch merging": (
        lambda m, x: (m.act(F.pixel_unshuffle(x, 2)), m.act2(F.unfold(x, 2, stride=2))),
        {"act2": nn.Tanh()},
        {"act": (32, 1, 1), "act2": (32, 1)},
    ),
    "pixel shuffle": (lambda m, x: m.act(F.pixel_shuffle(x, 2)), {}, {"act": (2, 1, 1)}),
    "flattened images": (
        lambda m, x: m.act(F.adaptive_avg_pool2d(x, 2).flatten(1)),
        {},
        {"act": (32,)},
    ),
    "flattened and back": (
        lambda m, x: m.act(x.flatten(1).view(x.shape)),
        {},
        {"act": (8, 1, 1)},
    ),
    "shifted windows": (windows, {}, {"act": (8,)}),
    "heads": (
        heads,
        {"qkv": nn.Linear(8, 24), "act2": nn.GELU(), "act3": nn.Tanh()},
        {"act": (2, 1, 4), "act2": (2, 1, 4), "act3": (8,)},
    ),
    "attention over channels": (
        lambda m, x: m.act((x.flatten(2) @ x.flatten(2).mT).softmax(-1) @ x.flatten(2)),
        {},
        {"act": (8, 1)},
    ),
    "a matrix from the left": (
        lambda m, x: m.act(m.weight @ x.flatten(2)),
        {"weight": nn.Parameter(torch.rand(1, 6, 8))},
        {"act": (6, 1)},
    ),
    "MLP over tokens, and the stream it is added to": (
        lambda m, x: (lambda t: m.act2(t + m.out(m.act(m.fc(t.mT))).mT))(
            F.adaptive_avg_pool2d(x, (4, 2)).flatten(2).mT
        ),
        {"fc": nn.Linear(8, 5), "out": nn.Linear(5, 8), "act2": nn.Tanh()},
        {"act": (5,), "act2": (8,)},
    ),
    "one-dimensional convolution": (
        lambda m, x: m.act(m.conv(x.flatten(2))),
        {"conv": nn.Conv1d(8, 6, 1)},
        {"act": (6, 1)},
    ),
    "depthwise and grouped convolutions": (
        lambda m, x: m.act2(m.b(m.act(m.a(x)))),
        {"a": nn.Conv2d(8, 16, 1, groups=8), "b": nn.Conv2d(16, 6, 1, groups=2), "act2": nn.Tanh()},
        {"act": (16, 1, 1), "act2": (6, 1, 1)},
    ),
    "one filter bank for each sample (CondConv)": (
        lambda m, x: m.act(
            F.conv2d(
                x.reshape(1, -1, *x.shape[2:]), m.bank.repeat(len(x), 1, 1, 1), groups=len(x)
            ).view(len(x), 6, *x.shape[2:])
        ),
        {"bank": nn.Parameter(torch.rand(6, 8, 1, 1))},
        {"act": (6, 1, 1)},
    ),
    "a single channel": (
        lambda m, x: m.act(m.conv(x)),
        {"conv": nn.Conv2d(8, 1, 1)},
        {"act": (1,)},
    ),
}


@pytest.mark.parametrize("how", AXES)
def test_the_channel_axis_comes_from_where_the_tensor_came_from(how):
    code, parts, shapes = AXES[how]
    net = Net(code, **({"act": nn.ReLU()} | parts))
    assert found(net, torch.rand(2, 3, 8, 8)) == {f"{n}@in": s for n, s in shapes.items()}


def test_images_are_nchw_by_contract_and_other_inputs_are_asked_for():
    assert found(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 1))) == {"0@in": (3, 1, 1)}
    with pytest.raises(UndecidedChannelsError, match="comes straight from the model's input"):
        find_sites(nn.Sequential(nn.ReLU(), nn.Linear(6, 4)), torch.rand(2, 6))


UNDECIDED = {
    "an operation that nobody knows": (
        lambda m, x: m.act(torch.linalg.matrix_exp(x)),
        r"linalg_matrix_exp.default is not known",
    ),
    "operands that disagree": (
        lambda m, x: m.act(x[:, :, :8, :8] + x[:, :, :8, :8].transpose(1, 2)),
        r"add joins tensors with different channel axes",
    ),
    "the batch folded into the channels": (
        lambda m, x: m.act(x.transpose(0, 1).reshape(1, -1, *x.shape[2:])),
        r"shape \(16, 1, 1\) here and \(24, 1, 1\) at another batch or image size",
    ),
    "the image folded into the channels": (
        lambda m, x: m.act(x.flatten(1)),
        r"shape \(512,\) here and \(12800,\) at another",
    ),
    "code that changes with the size": (
        lambda m, x: m.act(x) if x.shape[-1] == 8 else x,
        r"not met at another batch or image size",
    ),
}


@pytest.mark.parametrize("how", UNDECIDED)
def test_undecided_channels_are_asked_for_not_guessed(how):
    code, why = UNDECIDED[how]
    net = Net(lambda m, x: code(m, m.first(x)), first=nn.ReLU(), act=nn.Tanh())
    for strict in (True, False):
        with pytest.raises(UndecidedChannelsError, match=why) as error:
            find_sites(net, IMAGES, strict=strict)
        assert error.value.names == ("act@in",)
        assert "Site.parse('act@in', (C, 1, 1))" in str(error.value)
    assert found(net, where="first@in") == {"first@in": (8, 1, 1)}  # only wanted sites matter


def test_a_model_of_one_image_size_is_checked_with_another_batch_size():
    def code(m, x):
        assert x.shape[-1] == 8
        return m.act(x.transpose(0, 1).reshape(1, -1, 8, 8))

    with pytest.raises(UndecidedChannelsError, match="at another batch"):
        find_sites(Net(code, act=nn.ReLU()), IMAGES)
    fixed = Net(lambda m, x: m.act(m.fc(x.flatten(1))), fc=nn.Linear(512, 5), act=nn.ReLU())
    assert found(fixed) == {"act@in": (5,)}
