"""What a model does on clean images that makes the failure of an attack mean little."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_meansparse.attacks.losses import cross_entropy

_SUM_OF_PROBABILITIES = 1e-3


@dataclass(frozen=True, eq=False)
class Symptoms:
    """Per sample, ``(N,)``; see the fields of the same names in `Evaluation`."""

    noise: Tensor
    zero_gradient: Tensor
    probabilities: Tensor

    @classmethod
    def of_all(cls, parts: Sequence[Symptoms]) -> Symptoms:
        """Those of several batches, one after the other."""
        return cls(
            *(
                torch.cat([getattr(part, each.name) for part in parts])
                for each in dataclasses.fields(cls)
            )
        )


def symptoms(
    model: nn.Module, images: Tensor, labels: Tensor, logits: Tensor, *, batch_size: int
) -> Symptoms:
    """Look at clean images once more: another forward pass, and the gradient of the loss.

    Args:
        model: Pixels to logits, held still.
        images: Clean images, ``(N, C, H, W)``.
        labels: True classes, ``(N,)``.
        logits: What the model said about them a moment ago, ``(N, classes)``.
        batch_size: Samples per pass; with 0 only ``logits`` are looked at.
    """
    noise = torch.full((len(images),), torch.nan, device=images.device)
    zero = noise.clone()
    for rows in torch.split(torch.arange(len(images)), batch_size) if batch_size else ():
        pixels = images[rows].clone().requires_grad_()
        with torch.enable_grad():
            again = model(pixels).float()
        # As a share, for any scale of the logits; what comes again, NaN too, is no noise.
        same = torch.isclose(again.detach(), logits[rows], rtol=0, atol=0, equal_nan=True)
        change = torch.where(same, 0, (again.detach() - logits[rows]).abs())
        spread = (logits[rows].amax(dim=1) - logits[rows].amin(dim=1)).clamp_min(1e-12)
        noise[rows] = torch.nan_to_num(change.amax(dim=1) / spread, nan=torch.inf)
        zero[rows] = 1.0
        if again.requires_grad:
            loss = cross_entropy(labels[rows])(again).sum()
            (slope,) = torch.autograd.grad(loss, pixels)
            zero[rows] = (slope == 0).flatten(1).float().mean(dim=1)
    sums_to_one = (logits.sum(dim=1) - 1).abs() < _SUM_OF_PROBABILITIES
    return Symptoms(noise, zero, sums_to_one & (logits >= 0).all(dim=1))
