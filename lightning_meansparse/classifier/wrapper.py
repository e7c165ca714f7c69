"""Classifier: normalisation in front of a model, its logits behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PerChannel = float | Sequence[float]


class Classifier(nn.Module):
    """A model behind one door: pixels in [0, 1] in, logits out.

    `logits = model((pixels - mean) / std)`, in the model's dtype; half precision results come back
    as float32. Outputs of Hugging Face models, dictionaries and tuples are unwrapped; auxiliary
    heads are left out.

    The values of the pixels are not looked at: that would make a GPU wait in every step.

    Args:
        model: Takes normalised images `(N, C, H, W)`.
        mean: Subtracted from the pixels, one number or one per channel; None for 0.
        std: Divided by after that; None for 1.
        bgr: The model takes blue first; then mean and std are in that order too.
        normalisation: Where mean, std and bgr come from, for people to read.
        num_classes: Number of logits; None takes the model's own `num_classes` if it has one.
        labels: Names of the classes, one for each logit; None if nothing names them.
        input_size: `(C, H, W)` that the model is meant for; only the channels are checked. None
            takes the model's own `in_chans` if it has one.
        source: What `load_classifier` was given: `"timm/resnet18"`, a folder, …
        revision: Commit of a Hub model; of torchvision, the name of the weights.
        options: What `load_classifier` was given besides, such as `num_classes`; None if not known.
        origin: How `save_classifier` can build the model again; None if it cannot.
        metrics: Anything worth keeping beside the weights, such as the accuracy.

    Shapes:
        pixels `(N, C, H, W)` floating point to logits `(N, num_classes)`.

    Attributes:
        mean: Buffer `(C, 1, 1)`, or `(1, 1, 1)` for any C. Not part of the `state_dict`, and
            float32 in a model of half precision as well.
        std: The same.
        in_chans: Channels that `forward` accepts; None accepts any.

    Raises:
        TypeError: If `model` is no module or a label no text.
        ValueError: If mean, std and input_size disagree on the channels, std is not positive, or
            there are not as many labels as classes.

    Examples:
        >>> classifier = Classifier(nn.Flatten(), mean=0.5, std=0.25)
        >>> classifier(torch.full((1, 1, 1, 2), 0.75))
        tensor([[1., 1.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: PerChannel | None = None,
        std: PerChannel | None = None,
        bgr: bool = False,
        normalisation: str | None = None,
        num_classes: int | None = None,
        labels: Sequence[str] | None = None,
        input_size: Sequence[int] | None = None,
        source: str | None = None,
        revision: str | None = None,
        options: Mapping[str, Any] | None = None,
        origin: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.num_classes = _own(model, "num_classes") if num_classes is None else num_classes
        self.labels = None if labels is None else _labels(labels, self.num_classes)
        self.input_size = None if input_size is None else _input_size(input_size)
        self.source = source
        self.revision = revision
        self.options = None if options is None else dict(options)
        self.origin = None if origin is None else dict(origin)
        self.metrics = dict(metrics or {})
        given = "none" if mean is None and std is None else "given"
        self.normalisation = given if normalisation is None else normalisation
        self.bgr = bgr
        center, scale = _per_channel("mean", mean, 0.0), _per_channel("std", std, 1.0)
        channels = self.input_size[0] if self.input_size else _own(model, "in_chans")
        counts = {len(numbers) for numbers in (center, scale)} | {channels or 1}
        self.in_chans = max(counts) if channels or counts != {1} else None
        if len(counts - {1}) > 1 or (channels == 1 and counts != {1}):
            raise ValueError(
                f"mean has {len(center)} channels, std {len(scale)} and the images {channels}; "
                "they must agree, or be single numbers"
            )
        if bgr and self.in_chans != 3:
            raise ValueError(f"bgr=True needs images of 3 channels, these have {self.in_chans}")
        if not bool((scale > 0).all()):
            raise ValueError(f"std must be positive, got {scale.tolist()}")
        for name, numbers in (("mean", center), ("std", scale)):
            buffer = numbers.expand(max(counts))[:, None, None].clone()
            self.register_buffer(name, buffer, persistent=False)
        self.model = model
        # A wrapper's own flag would be True at first, whatever the model's mode is.
        self.training = model.training

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits `(N, num_classes)` of `pixels` `(N, C, H, W)` in [0, 1].

        Raises:
            TypeError: If `pixels` is no floating-point tensor, or the model's output has no logits.
            ValueError: If `pixels` is not `(N, C, H, W)` with the right number of channels, or the
                model's output not `(N, num_classes)`.
        """
        dtype = getattr(pixels, "dtype", None)
        if dtype is None or not dtype.is_floating_point:
            raise TypeError(
                "pixels must be a floating-point tensor in [0, 1], got "
                f"{dtype or type(pixels).__name__}; divide uint8 by 255"
            )
        if pixels.ndim != 4 or self.in_chans not in (None, pixels.shape[1]):
            raise ValueError(
                f"pixels must be (N, {self.in_chans or 'C'}, H, W), got {tuple(pixels.shape)}"
            )
        ordered = pixels.flip(1) if self.bgr else pixels
        normalised = (ordered - self.mean) / self.std
        wanted = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        logits = _logits(self.model(normalised if wanted is None else normalised.to(wanted)))
        if self.num_classes not in (None, logits.shape[1]):
            raise ValueError(
                f"the model returned {tuple(logits.shape)}, but has {self.num_classes} classes: "
                "are these features? Give num_classes= if they are logits"
            )
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Classifier:
        """Move everything, but keep mean and std in float32: half would shift every pixel."""
        kept = {"mean": self.mean, "std": self.std}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        """Show what the child modules do not."""
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        shown = {
            "source": self.source,
            "num_classes": self.num_classes,
            "mean": mean,
            "std": std,
            "normalisation": self.normalisation,
        }
        if self.bgr:
            shown["bgr"] = True
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def _own(model: nn.Module, name: str) -> int | None:
    value = getattr(model, name, None)
    return value if isinstance(value, int) else None


def _per_channel(name: str, value: PerChannel | None, default: float) -> Tensor:
    numbers = default if value is None else value
    try:
        tensor = torch.as_tensor(numbers, dtype=torch.float32).flatten().cpu()
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.empty(0)
    if not 1 <= tensor.numel() <= 4 or not bool(tensor.isfinite().all()):
        raise ValueError(
            f"{name} must be one number or one per channel (1 to 4), got {value!r:.200}"
        )
    return tensor


def _labels(value: Sequence[str], classes: int | None) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(label, str) for label in value):
        raise TypeError(f"labels must be a list of texts, got {value!r:.80}")
    if classes not in (None, len(value)):
        raise ValueError(f"labels has {len(value)} names for {classes} classes")
    return tuple(value)


def _input_size(value: Sequence[int]) -> tuple[int, int, int]:
    if (
        not isinstance(value, Sequence)
        or len(value) != 3
        or not all(type(number) is int and number > 0 for number in value)
    ):
        raise ValueError(f"input_size must be (channels, height, width), got {value!r:.80}")
    channels, height, width = value
    return channels, height, width


def _logits(output: Any) -> Tensor:
    """Take the logits out of whatever a model returns."""
    logits = output
    if isinstance(output, Mapping):
        # PP-LCNet of transformers calls its logits so; a backbone's hidden state is not (N, C).
        logits = output.get("logits", output.get("last_hidden_state"))
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        logits = output.logits  # Hugging Face; GoogLeNet and Inception of torchvision in training
    elif isinstance(output, tuple | list) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise TypeError(
            "the model must return logits (N, classes), got a "
            f"{type(output).__name__} without 'logits'"
            + (f", but with {', '.join(map(repr, output))}" if isinstance(output, Mapping) else "")
        )
    if logits.ndim != 2:
        raise ValueError(
            f"the model must return logits (N, classes), got shape {tuple(logits.shape)}: has it a "
            "classification head?"
        )
    return logits
