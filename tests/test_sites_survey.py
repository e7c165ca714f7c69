"""`survey` tells what `find_sites` chooses among, and who made the channels."""

import pytest
import timm
import torch
from nets import IMAGES, Net, Wrapped
from torch import nn
from torchvision import models

from lightning_meansparse.sites import find_sites
from lightning_meansparse.sites.survey import survey


def producers(model, example=IMAGES) -> dict[str, str]:
    return {str(c.site): c.producer for c in survey(model, example).candidates}


@pytest.mark.parametrize(
    "build",
    [
        lambda: models.resnet18(),
        lambda: models.swin_t(),
        lambda: timm.create_model("test_efficientnet"),
        lambda: timm.create_model("seresnet18"),
        lambda: timm.create_model("convnext_atto"),
        lambda: timm.create_model("test_vit", img_size=64),
    ],
    ids=["resnet18", "swin_t", "test_efficientnet", "seresnet18", "convnext_atto", "test_vit"],
)
def test_the_producer_is_a_layer_that_makes_as_many_channels(build) -> None:
    model = build()
    found = survey(model, torch.rand(2, 3, 64, 64)).candidates
    wanted = [c for c in found if c.site.role in ("activation", "gate")]
    assert len(wanted) > 3
    for candidate in wanted:
        layer = model.get_submodule(candidate.producer)
        assert isinstance(layer, nn.Conv2d | nn.Linear), candidate
        assert layer.weight.shape[0] == candidate.site.channels, candidate


def test_a_gate_that_broadcasts_is_no_producer_and_a_sum_has_the_last() -> None:
    gate = Wrapped(
        lambda m, x: m.conv(x.mean((2, 3), keepdim=True)).sigmoid(), conv=nn.Conv2d(8, 8, 1)
    )
    net = Net(
        lambda m, x: m.act(m.left(x) * m.gate(x) + m.right(x)),
        left=nn.Conv2d(8, 8, 1),
        gate=gate,
        right=nn.Conv2d(8, 8, 1),
        act=nn.ReLU(),
    )
    assert producers(net)["act@in"] == "right"
    net.code = lambda m, x: m.act(m.left(x) * m.gate(x))
    assert producers(net)["act@in"] == "left"
    assert producers(net)["stem@in"] == ""  # the image


def test_a_product_of_two_activations_makes_no_channels() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    net = Net(
        lambda m, x: m.act(m.attention(*[x.flatten(2).mT] * 3)[0]),
        attention=attention,
        act=nn.GELU(),
    )
    assert producers(net)["act@in"] == "attention"
    made = Net(lambda m, x: m.act(x.flatten(2).mT @ x.flatten(2)), act=nn.GELU())
    assert producers(made)["act@in"] == "stem"


def test_what_is_no_place_is_counted() -> None:
    net = Net(
        lambda m, x: m.act(x) * m.table(m.numbers) + torch.sigmoid(m.numbers).sum(),
        act=nn.ReLU(),
        table=nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Unflatten(0, (8, 1, 1))),
        spare=nn.GELU(),
    )
    net.register_buffer("numbers", torch.rand(3))
    found = survey(net, IMAGES)
    assert sorted(found.constants) == ["::sigmoid[0]", "table.1"]
    assert found.idle == ("spare",)
    assert [str(c.site) for c in found.candidates if c.site.role == "activation"] == ["act@in"]


def test_find_sites_chooses_among_the_same_places() -> None:
    model = timm.create_model("efficientnet_b0")
    images = torch.rand(2, 3, 64, 64)
    found = survey(model, images).candidates
    assert find_sites(model, images, where="*") == tuple(c.site for c in found)
    for where, roles in (
        ("activations", {"activation"}),
        ("gates", {"gate"}),
        ("residual+activations", {"activation", "residual"}),
        ("activations+gates+residual", {"activation", "gate", "residual"}),
        (["gates", "residual"], {"gate", "residual"}),
        (lambda site: site.role == "gate", {"gate"}),
    ):
        chosen = find_sites(model, images, where=where)
        assert chosen == tuple(c.site for c in found if c.site.role in roles)
        assert {site.role for site in chosen} == roles
    mixed = find_sites(model, images, where=["gates", "bn1.act@in"])
    assert {site.role for site in mixed} == {"gate", "activation"}
    for where in ("activations+", "activations+gate", "Activations", "activations + gates"):
        with pytest.raises(ValueError, match=r"Close names: .*activations"):
            find_sites(model, images, where=where)
