"""Where attacks run: the model held still, in float32, and everything put back afterwards."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MAX_CLASSES = 1000
_SLACK = 1e-6  # resizing with antialias overshoots 1 by a few float32 steps


class Watched(nn.Module):
    """A classifier behind a door that counts: forward and backward passes per sample.

    Args:
        model: Pixels to logits.
        device: Where its tensors are.
        listen: Called before every forward pass; may raise.

    Attributes:
        forwards: Samples sent through the model since `reset`.
        backwards: Samples whose gradient came back since then.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        listen: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        # torchattacks asks the first parameter for the device, and a model may have none.
        self.anchor = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.model = model
        self.listen = listen
        self.reset()
        self.eval()

    def reset(self) -> None:
        """Start counting from zero."""
        self.forwards = 0
        self.backwards = 0

    def forward(self, images: Tensor) -> Tensor:
        """Logits of ``images``, ``(N, C, H, W)`` to ``(N, classes)``."""
        if self.listen is not None:
            self.listen()
        count = images.shape[0]
        self.forwards += count
        logits: Tensor = self.model(images.contiguous())
        if logits.requires_grad:

            def came_back(gradient: Tensor) -> None:
                self.backwards += count

            logits.register_hook(came_back)  # type: ignore[no-untyped-call]
        # A fresh tensor: Square writes into the logits, which would reach a model that caches them.
        return logits.float() if logits.dtype != torch.float32 else logits + 0


@contextmanager
def attackable(classifier: nn.Module) -> Iterator[tuple[nn.Module, torch.device]]:
    """Hold a classifier still while it is attacked; put everything back, also after an exception.

    Inside: no inference mode, gradients on, autocast off, eval mode, parameters frozen (an attack
    needs gradients of pixels alone, and ``torchattacks.FAB`` would fill ``.grad``), random number
    generators forked. A model that is not float32 throughout, or was made under inference mode, is
    attacked as a float32 copy: a robust accuracy is a statement about the exact float32 forward.

    Args:
        classifier: Pixels to logits.

    Yields:
        The module to attack and its device.

    Raises:
        TypeError: If ``classifier`` is not a module.
    """
    if not isinstance(classifier, nn.Module):
        raise TypeError(
            "classifier must be a torch.nn.Module from pixels to logits, got "
            f"{type(classifier).__name__}; load_classifier(...) makes one."
        )
    if isinstance(classifier, nn.parallel.DistributedDataParallel):
        # Its forward synchronises buffers over ranks, and ranks need different numbers of forwards.
        classifier = classifier.module
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        model = classifier
        if _needs_copy(classifier):
            model = copy.deepcopy(classifier).float()
        device = _device(model)
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type != "cpu":
            stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(_forked_rng(device))
        stack.enter_context(_held_still(model))
        yield model, device


@contextmanager
def _held_still(model: nn.Module) -> Iterator[None]:
    """Eval mode, frozen parameters; then modes, buffers, ``requires_grad`` as they were."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    was_training = model.training
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        # train() first: a module may do more there than set a flag.
        if was_training:
            model.train()
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, saved in buffers:
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)


@contextmanager
def _forked_rng(device: torch.device) -> Iterator[None]:
    """Leave the generators of torch (all devices), NumPy and Python as they were."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    # torch.manual_seed, which attacks call, seeds every CUDA device, also one that is not in use
    # here.
    cuda_is_up = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    try:
        with ExitStack() as stack:
            devices = list(range(torch.cuda.device_count())) if cuda_is_up else []
            stack.enter_context(torch.random.fork_rng(devices=devices))
            if device.type not in ("cpu", "cuda"):
                stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if not cuda_is_up:
            # Seeds for CUDA wait until it is initialised; the last one queued has to be the user's
            # again.
            torch.cuda.manual_seed_all(torch.initial_seed())


def seed_everything(seed: int) -> None:
    """Seed all generators that an attack may draw from; call it inside `attackable` only."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _needs_copy(model: nn.Module) -> bool:
    tensors = [*model.parameters(), *model.buffers()]
    return any(
        t.is_inference() or (t.is_floating_point() and t.dtype != torch.float32) for t in tensors
    )


def _device(model: nn.Module) -> torch.device:
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def checked_images(images: Any, device: torch.device) -> Tensor:
    """A float32, contiguous copy of ``images`` on ``device``, free of any inference-mode mark.

    Raises:
        TypeError: If ``images`` is not a floating-point tensor.
        ValueError: If its shape is not ``(N, C, H, W)``, or a pixel is outside [0, 1] or not
            finite.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor (N, C, H, W), got {type(images).__name__}.")
    if not images.is_floating_point():
        raise TypeError(
            f"images must be floating point in [0, 1], got {images.dtype}; divide by 255 first."
        )
    if images.dim() != 4:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}.")
    if images.numel() == 0:
        raise ValueError(f"images must not be empty, got shape {tuple(images.shape)}.")
    images = images.detach()
    low, high = images.min().item(), images.max().item()
    if not (low >= -_SLACK and high <= 1 + _SLACK):
        raise ValueError(
            f"images must lie in [0, 1], got [{low:.4g}, {high:.4g}]. This looks normalised: eps "
            "counts in pixels, so give pixels in [0, 1] and let the classifier normalise "
            "(load_classifier(..., mean=..., std=...))."
        )
    copied: Tensor = images.to(device=device, dtype=torch.float32)
    return copied.clone(memory_format=torch.contiguous_format).clamp(0, 1)


def checked_labels(labels: Any, count: int, device: torch.device) -> Tensor:
    """A copy of ``labels`` on ``device``.

    Raises:
        TypeError: If ``labels`` is not an int64 tensor.
        ValueError: If its shape is not ``(count,)`` or a label is negative.
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an int64 tensor of class numbers (N,), got {got}.")
    if labels.shape != (count,):
        raise ValueError(f"labels must have shape ({count},) as images, got {tuple(labels.shape)}.")
    if labels.min().item() < 0:
        raise ValueError(f"labels must be class numbers >= 0, got {labels.min().item()}.")
    return labels.detach().to(device).clone()


def checked_logits(logits: Any, labels: Tensor) -> Tensor:
    """``logits`` if they are what a classifier gives.

    Raises:
        TypeError: If they are not a floating-point tensor, e.g. a Hugging Face output object.
        ValueError: If their shape does not fit, or a label is no class of theirs.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"classifier must return a tensor of logits (N, classes), got {type(logits).__name__}. "
            "Wrap the model: load_classifier(model) unwraps Hugging Face outputs and normalises "
            "pixels."
        )
    if not logits.is_floating_point():
        raise TypeError(f"classifier must return floating-point logits, got {logits.dtype}.")
    count = labels.shape[0]
    if logits.dim() != 2 or logits.shape[0] != count:
        raise ValueError(
            f"classifier must return logits of shape ({count}, classes), got {tuple(logits.shape)}."
        )
    classes = logits.shape[1]
    if not 2 <= classes <= MAX_CLASSES:
        raise ValueError(
            f"classifier must have 2 to {MAX_CLASSES} classes, got logits of shape "
            f"{tuple(logits.shape)}."
        )
    if labels.max().item() >= classes:
        raise ValueError(
            f"labels must be below the number of classes {classes}, got {labels.max().item()}; is "
            "num_classes of the classifier that of the data set?"
        )
    return logits


def stands(logits: Tensor, labels: Tensor) -> Tensor:
    """Which samples are classified right, ``(N,)`` bool; a NaN among the logits counts as wrong."""
    # An overflow says nothing about the class, and hides the gradient.
    broken = (logits.isnan() | (logits == torch.inf)).any(dim=1)
    return (logits.argmax(dim=1) == labels) & ~broken
