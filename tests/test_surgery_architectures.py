"""A sparsified network goes wherever its base goes: twelve architectures, some of them hard."""

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision import models as tv

from lightning_meansparse import calibrate_, find_sites, restore_, set_alpha, sparsify_
from lightning_meansparse.surgery import alpha_set, operators


class Logits(nn.Module):
    """The logits of a Hugging Face classifier."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        config = getattr(transformers, f"{kind}Config")(**options)
        self.model = getattr(transformers, f"{kind}ForImageClassification")(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **options)


# What builds it, the image size, and how many sites and how many calls amid code it has by hand.
DOZEN: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    # the stem, and 2 calls of one ReLU in each of 8 blocks
    "torchvision resnet18": (tv.resnet18, 64, 17, 16),
    # F.relu in every BasicConv2d: 3 of the stem, 6 in each of 9 inceptions
    "torchvision googlenet": (
        lambda: tv.googlenet(aux_logits=False, init_weights=False),
        64,
        57,
        57,
    ),
    # the stem, and 9 calls of one ReLU in each of 4 blocks: 2 and 7 in a loop
    "timm res2net": (timm_model("res2net50_14w_8s", layers=(1, 1, 1, 1)), 64, 37, 36),
    # 9 activations behind sums in a loop over branches
    "timm hrnet": (timm_model("hrnet_w18_small"), 64, 75, 9),
    # 2 calls of one kernel function in each of 4 attentions
    "timm efficientvit_mit": (timm_model("efficientvit_b0"), 64, 32, 8),
    "timm swin": (
        timm_model(
            "swin_tiny_patch4_window7_224",
            img_size=56,
            embed_dim=24,
            depths=(2, 2),
            num_heads=(2, 4),
        ),
        56,
        4,
        0,
    ),
    "timm convnext": (timm_model("convnext_atto"), 64, 12, 0),
    # F.relu in a helper method of 2 + 4 + 3 linear attentions
    "timm mobilevitv2": (timm_model("mobilevitv2_050"), 64, 34, 9),
    # EvoNorm writes its activation out, so its site is the border of a module
    "timm regnetz_evos": (timm_model("regnetz_c16_evos"), 64, 46, 0),
    "hf vit": (
        lambda: Logits(
            "ViT",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=32,
            patch_size=16,
        ),
        32,
        2,
        0,
    ),
    "hf swin": (
        lambda: Logits(
            "Swin",
            image_size=32,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            patch_size=4,
        ),
        32,
        4,
        0,
    ),
    "hf convnext": (
        lambda: Logits("ConvNext", hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1]),
        64,
        4,
        0,
    ),
}


class Case:
    """An architecture, its base, images, and what the sparsified network says of them."""

    def __init__(self, name: str) -> None:
        build, size, self.sites, self.calls = DOZEN[name]
        torch.manual_seed(0)
        self.base = build().eval().requires_grad_(False)
        self.images = torch.rand(3, 3, size, size)
        self.model = copy.deepcopy(self.base)
        self.found = find_sites(self.model, self.images)
        sparsify_(self.model, self.found)
        calibrate_(self.model, [self.images])
        set_alpha(self.model, 0.3)
        with torch.no_grad():
            self.logits = self.model(self.images)

    def compare(self, other: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad():
            assert torch.equal(other(self.images), self.logits)


@pytest.fixture(scope="module", params=DOZEN)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_every_activation_has_its_operator(case):
    assert len(case.found) == case.sites
    assert sum(site.call is not None for site in case.found) == case.calls
    with torch.no_grad():
        base = case.base(case.images)
        assert not torch.equal(case.logits, base)
        with alpha_set(case.model, 0.0):
            assert torch.equal(case.model(case.images), base)


def test_copies_pickles_and_moving_averages(case):
    case.compare(copy.deepcopy(case.model))
    case.compare(pickle.loads(pickle.dumps(case.model)))
    case.compare(torch.optim.swa_utils.AveragedModel(case.model).eval())
    twin = copy.deepcopy(case.model)
    restore_(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in case.base.modules()]
    case.compare(case.model)


def test_one_graph(case):
    torch._dynamo.reset()
    torch.compile(case.base, backend="eager", fullgraph=True)(case.images)  # all twelve do
    torch._dynamo.reset()
    case.compare(torch.compile(case.model, backend="eager", fullgraph=True))


def test_export(case):
    program = torch.export.export(case.model, (case.images,)).module()
    torch.testing.assert_close(program(case.images), case.logits)


def test_activation_checkpointing(case):
    gradients = []
    for run in (case.model, lambda x: checkpoint(case.model, x, use_reentrant=False)):
        x = case.images.clone().requires_grad_()
        gradients.append(torch.autograd.grad(run(x).square().sum(), x)[0])
    assert torch.equal(*gradients)
    assert bool(gradients[0].any())


def test_channels_last_and_autocast(case):
    images = case.images.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(case.model).to(memory_format=torch.channels_last)
    base = copy.deepcopy(case.base).to(memory_format=torch.channels_last)
    with torch.no_grad(), alpha_set(twin, 0.0):
        assert torch.equal(twin(images), base(images))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(twin(images), base(images))
    with torch.no_grad():
        torch.testing.assert_close(twin(images), case.logits, atol=1e-3, rtol=1e-2)


def test_threads(case):
    outputs: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            outputs.append(case.model(case.images))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 4
    assert all(torch.equal(output, case.logits) for output in outputs)


def _rank(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(Path(folder, "store")), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for name in names:
        case = Case(name)
        case.model.requires_grad_(True)
        parallel = nn.parallel.DistributedDataParallel(case.model, find_unused_parameters=True)
        mine = case.images[rank : rank + 1]
        parallel(mine).square().sum().backward()
        got = {n: p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None}
        case.model.zero_grad()
        for i in range(2):
            (case.model(case.images[i : i + 1]).square().sum() / 2).backward()
        for key, parameter in case.model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(got[key], parameter.grad, atol=1e-4, rtol=1e-3)
        assert len(operators(case.model)) == case.sites
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_have_the_gradients_of_one_process(tmp_path):
    names = ["torchvision resnet18", "timm mobilevitv2", "hf swin"]
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path), names), nprocs=2)
