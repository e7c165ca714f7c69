"""The measurements, each a ratio with the target it has to meet."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import timm
import torch
from torch import Tensor, nn

from lightning_meansparse import MeanSparse, calibrate_, find_sites, sparsify_
from lightning_meansparse.moments import ChannelMoments
from tests.benchmarks.speed.published import Published, published_
from tests.benchmarks.speed.timing import gradient, medians, ratios

ALPHA = 0.2
OPTIONS = {"memory": ("device",), "sigma": (), "import": ("repeats",)}
"""What a part takes, where that is not both device and repeats."""

MODELS = {"resnet18": 32, "vit_tiny_patch16_224": 64, "convnext_atto": 64}


@dataclass(frozen=True)
class Row:
    """One number: what was measured, ours and theirs, and what ours should be at most or least."""

    what: str
    unit: str
    ours: float
    published: float | None = None
    target: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.ours >= self.target if self.at_least else self.ours <= self.target

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "met": self.met}


def operator_rows(device: str, repeats: int) -> Iterator[Row]:
    """The operator alone, on tensors of several sizes and layouts."""
    targets = (3.5, 5.5)
    for name, x, shape in (
        ("64 × 64 × 32 × 32", torch.randn(64, 64, 32, 32), (64, 1, 1)),
        ("32 × 64 × 28 × 28", torch.randn(32, 64, 28, 28), (64, 1, 1)),
        ("8 × 64 × 8 × 8", torch.randn(8, 64, 8, 8), (64, 1, 1)),
        ("32 × 197 × 192, channels last", torch.randn(32, 197, 192), (192,)),
    ):
        ours, theirs, x = _pair(x.to(device), shape)
        flow = torch.randn_like(x)
        with torch.no_grad():
            forward = ratios(
                {"ours": partial(ours, x), "published": partial(theirs, x), "clone": x.clone},
                "clone",
                repeats,
            )
        both = ratios(
            {
                "ours": partial(gradient, ours, x, flow),
                "published": partial(gradient, theirs, x, flow),
                "clone": x.clone,
            },
            "clone",
            repeats,
        )
        yield Row(f"operator, forward, {name}", "× clone", *forward.values(), targets[0])
        yield Row(f"operator, forward + backward, {name}", "× clone", *both.values(), targets[1])
        targets = (None, None)


def half_rows(device: str, repeats: int) -> Iterator[Row]:
    """Forward and backward in half precision, against the published operator."""
    for dtype, target in ((torch.bfloat16, 3.5), (torch.float16, None)):
        ours, theirs, x = _pair(torch.randn(64, 64, 32, 32, device=device), (64, 1, 1))
        x = x.to(dtype)
        narrow = theirs.to(dtype)  # as `model.bfloat16()` leaves it
        flow = torch.randn_like(x)
        found = medians(
            {
                "ours": partial(gradient, ours, x, flow),
                "published": partial(gradient, narrow, x, flow),
            },
            repeats,
        )
        yield Row(
            f"operator, forward + backward, {str(dtype).removeprefix('torch.')}",
            "× as fast as published",
            found["published"] / found["ours"],
            1.0,
            target,
            at_least=True,
        )


def model_rows(device: str, repeats: int) -> Iterator[Row]:
    """Whole models over their base, eager, with gradients down to the images."""
    targets = {"resnet18": (8, 6), "vit_tiny_patch16_224": (8, 6), "convnext_atto": (16, 13)}
    for name, (forward, both) in targets.items():
        base, ours, theirs, images = models(name, device)
        yield from _over_base(name, "eager", base, ours, theirs, images, repeats, (forward, both))


def compiled_rows(device: str, repeats: int) -> Iterator[Row]:
    """The same, both of them compiled; the published operator breaks the graph at every site."""
    for name in MODELS:
        base, ours, _, images = models(name, device)
        torch.compiler.reset()
        compiled = [torch.compile(model) for model in (base, ours)]
        yield from _over_base(name, "compiled", *compiled, None, images, repeats, (3, 3))
    torch.compiler.reset()


def memory_rows(device: str) -> Iterator[Row]:
    """What the backward pass keeps beyond what the base keeps, in tensors per operator."""
    for name in MODELS:
        base, ours, theirs, images = models(name, device)
        half = images[: len(images) // 2]  # what does not grow with the batch is no activation
        kept = [
            saved_bytes(model, images) - saved_bytes(model, half) for model in (base, ours, theirs)
        ]
        more = [100 * (size / kept[0] - 1) for size in kept[1:]]
        yield Row(f"{name}, kept for backward", "% over the base", *more, 0.0)


def calibration_rows(device: str, repeats: int) -> Iterator[Row]:
    """One calibration pass over plain forward passes of the base."""
    for name in MODELS:
        base, ours, _, images = models(name, device)
        batches = [images] * 4
        runs = {
            "ours": partial(calibrate_, ours, batches),
            "plain": partial(_forward, base, batches),
        }
        found = ratios(runs, "plain", repeats)
        yield Row(f"calibration, {name}", "× forward", found["ours"], None, 1.10)


def _forward(model: nn.Module, batches: list[Tensor]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(batch)


def sigma_rows() -> Iterator[Row]:
    """The error of σ where the mean is a thousand times as large."""
    for dtype, target in ((torch.float32, 1e-6), (torch.bfloat16, 1e-5)):
        generator = torch.Generator().manual_seed(0)
        batches = [
            (torch.randn(16, 32, 16, 16, generator=generator) + 1000).to(dtype) for _ in range(8)
        ]
        moments = ChannelMoments((32, 1, 1))
        for batch in batches:
            moments.update(batch)
        exact = torch.cat(batches).double().std((0, 2, 3), correction=0)
        running = torch.stack([batch.var((0, 2, 3)).float() for batch in batches]).mean(0).sqrt()
        errors = [
            float((sigma.flatten().double() / exact - 1).abs().max())
            for sigma in (moments.var.float().sqrt(), running)
        ]
        yield Row(f"σ at mean / σ = 1,000, {str(dtype)[6:]}", "relative error", *errors, target)


def import_rows(repeats: int) -> Iterator[Row]:
    """The time it takes to import the package and all its public names."""
    base = "import torch, lightning"

    def start(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    found = medians(
        {
            "base": start(base),
            "package": start(f"{base}; import lightning_meansparse"),
            "names": start(f"{base}; from lightning_meansparse import *"),
        },
        max(3, repeats // 6),
        warmup=1,
        clock=time.perf_counter,
    )
    yield Row("import lightning_meansparse", "s more", found["package"] - found["base"], None, 0.3)
    yield Row("import of every public name", "s more", found["names"] - found["base"])


def models(name: str, device: str) -> tuple[nn.Module, nn.Module, nn.Module, Tensor]:
    """A base model, the same with our operators and with the published ones, and images."""
    torch.manual_seed(0)
    size = MODELS[name]
    options = {"img_size": size} if name.startswith("vit") else {}
    base = timm.create_model(name, num_classes=10, **options).to(device).eval()
    base.requires_grad_(False)
    images = torch.rand(32, 3, size, size, device=device)
    ours = copy.deepcopy(base)
    sparsify_(ours, find_sites(ours, images[:2]), alpha=ALPHA)
    calibrate_(ours, [images])
    return base, ours, published_(copy.deepcopy(ours)), images


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of every distinct memory that waits for the backward pass."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()  # what autograd drops again is not counted

    def pack(tensor: Tensor) -> _Kept:
        kept.add(box := _Kept(tensor))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        logits = model(images.detach().requires_grad_())
    tensors = [box.tensor for box in kept]
    nodes, seen = [logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "left", None) is not None:  # kept without a hook
            tensors.append(node.left)
        nodes += [other for other, _ in node.next_functions]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for place, size in storages.items() if place not in own)


@dataclass(eq=False)
class _Kept:
    tensor: Tensor


def _pair(x: Tensor, shape: tuple[int, ...]) -> tuple[MeanSparse, Published, Tensor]:
    torch.manual_seed(0)
    mean = torch.randn(shape, device=x.device) / 2
    ours = MeanSparse(mean, torch.ones_like(mean), ALPHA)
    return ours, Published(ours), x


def _over_base(
    name: str,
    mode: str,
    base: Callable[[Tensor], Tensor],
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor] | None,
    images: Tensor,
    repeats: int,
    targets: tuple[float, float],
) -> Iterator[Row]:
    every = {"ours": ours, "base": base} | ({"published": theirs} if theirs else {})
    flow = torch.randn(len(images), 10, device=images.device)
    with torch.no_grad():
        forward = ratios(
            {key: partial(model, images) for key, model in every.items()},
            "base",
            repeats,
        )
    both = ratios(
        {key: partial(gradient, model, images, flow) for key, model in every.items()},
        "base",
        repeats,
    )
    for what, found, target in zip(
        ("forward", "forward + backward"), (forward, both), targets, strict=True
    ):
        percents = {key: 100 * (value - 1) for key, value in found.items()}
        yield Row(f"{name}, {mode}, {what}", "% over the base", target=target, **percents)
