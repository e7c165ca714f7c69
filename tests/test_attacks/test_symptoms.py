"""What an evaluation notices on clean images: noise, gradients that are zero, probabilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_meansparse.attacks import Evaluation, evaluate
from tests.test_attacks.victims import Linear


class _Spoiled(nn.Module):
    """A linear classifier behind something that spoils its output."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner = Linear(3)
        self.how = how

    def forward(self, images: Tensor) -> Tensor:
        if self.how == "rounded":
            # The right half passes through a step function, whose derivative is 0.
            images = torch.cat([images[..., :6], images[..., 6:].round()], dim=-1)
        logits: Tensor = self.inner(images)
        if self.how.startswith("random"):
            logits = logits + 0.1 * torch.rand_like(logits)
        if self.how == "random and small":
            logits = logits / 1000
        if self.how == "infinite":
            logits = torch.cat([logits, torch.full_like(logits[:, :1], -torch.inf)], dim=1)
        if self.how == "detached":
            logits = logits.detach()
        return logits.softmax(dim=1) if self.how == "probabilities" else logits


def _looked_at(how: str, attacks: object = "fgsm") -> Evaluation:
    torch.manual_seed(0)
    images = torch.rand(5, 1, 12, 12)
    model = _Spoiled(how)
    labels = model.inner(images).argmax(1)
    return evaluate(model, images, labels, attacks=attacks, eps=0.1, batch_size=2)  # type: ignore[arg-type]


def test_a_plain_model_has_no_symptom() -> None:
    result = _looked_at("")
    assert bool((result.noise == 0).all())
    assert bool((result.zero_gradient == 0).all())
    assert not bool(result.probabilities.any())


def test_random_outputs_are_noticed() -> None:
    noise = _looked_at("random").noise
    assert bool(((noise > 0.001) & (noise < 1)).all())
    # The scale of the logits says nothing about their noise.
    assert bool(_looked_at("random and small").noise.isclose(noise, rtol=1e-3).all())


def test_infinities_that_come_again_are_no_noise() -> None:
    assert bool((_looked_at("infinite").noise == 0).all())


def test_pixels_without_gradient_are_counted() -> None:
    assert _looked_at("rounded").zero_gradient.tolist() == [0.5] * 5


def test_a_model_without_any_gradient_is_all_zero() -> None:
    square = {"attack": "square", "options": {"n_queries": 2}}
    assert _looked_at("detached", square).zero_gradient.tolist() == [1.0] * 5


def test_probabilities_are_noticed() -> None:
    assert bool(_looked_at("probabilities").probabilities.all())


def test_without_attacks_only_the_clean_accuracy_is_measured() -> None:
    result = _looked_at("", ())
    assert result.attacks == ()
    assert result.standing.shape == (5, 0)
    assert torch.equal(result.worst, result.clean)
    assert bool(result.noise.isnan().all())
    assert bool(result.zero_gradient.isnan().all())
