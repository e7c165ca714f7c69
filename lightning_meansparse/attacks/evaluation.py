"""Run a suite against a classifier and keep, per sample, what is left standing."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_meansparse.attacks.ball import Ball, sample_seed
from lightning_meansparse.attacks.guard import (
    Watched,
    attackable,
    checked_images,
    checked_labels,
    checked_logits,
    seed_everything,
    stands,
)
from lightning_meansparse.attacks.library import build_attack, check_attack
from lightning_meansparse.attacks.memory import Batches
from lightning_meansparse.attacks.spec import AttackSpec, check_norm, parse_eps
from lightning_meansparse.attacks.suites import resolve_attacks
from lightning_meansparse.attacks.symptoms import Symptoms, symptoms
from lightning_meansparse.surgery import alpha_set, backward_rule


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One batch under a suite; all tensors are on the CPU, N samples, A attacks.

    Attributes:
        attacks: Names of the attacks in the order in which they ran.
        kinds: Their kinds.
        labels: True classes, ``(N,)`` int64.
        indices: Sample numbers, ``(N,)`` int64.
        clean: Classified right without an attack, ``(N,)`` bool.
        standing: Classified right without an attack and after attacks 1 … a, ``(N, A)`` bool
            (cumulative).
        attacked: Whether attack a was tried on the sample: only what still stands is attacked,
            ``(N, A)`` bool.
        margin: True logit minus the best other one on the clean image, ``(N,)`` float32.
        predictions: Predicted classes of the clean images, ``(N,)`` int64.
        noise: Largest difference of a logit between two forward passes of the same clean image,
            as a share of the spread of its logits, ``(N,)`` float32; 0 for a model whose output is
            not random. NaN without attacks.
        zero_gradient: Share of the pixels of the clean image at which the exact gradient of the
            loss is 0, ``(N,)`` float32. NaN without attacks.
        probabilities: Whether the output looks like probabilities: no attack can use more than
            their logarithms, which saturate. ``(N,)`` bool.
        forwards: Forward passes spent per sample and attack, ``(N, A)`` int64, with the one that
            scores the example. For classes of other libraries the total is exact and its split over
            samples even.
        backwards: Backward passes, likewise.
        seed: Seed of the evaluation.
        batch_size: Samples per forward pass: fewer than asked for where the memory ran out.
        examples: Per sample the adversarial example that broke it, else the last one tried, else
            the clean image, ``(N, C, H, W)``; None unless asked for.
    """

    attacks: tuple[str, ...]
    kinds: tuple[str, ...]
    labels: Tensor
    indices: Tensor
    clean: Tensor
    standing: Tensor
    attacked: Tensor
    margin: Tensor
    predictions: Tensor
    noise: Tensor
    zero_gradient: Tensor
    probabilities: Tensor
    forwards: Tensor
    backwards: Tensor
    seed: int
    batch_size: int
    examples: Tensor | None = None

    @property
    def apparent(self) -> Tensor | None:
        """Standing after the last attack with the exact gradient, ``(N,)``; None if none ran."""
        exact = [a for a, kind in enumerate(self.kinds) if kind == "gradient"]
        return self.standing[:, exact[-1]] if exact else None

    @property
    def worst(self) -> Tensor:
        """Standing after every attack, ``(N,)`` bool: the per-sample worst case."""
        return self.standing[:, -1] if self.attacks else self.clean


@dataclass
class BaseExamples:
    """Adversarial examples of the base model for one batch, shared between alphas.

    Give the same object to `evaluate` for every alpha of one batch; a batch of its own needs
    one of its own. Only attacks with ``start="base"`` ask for it. An example is made
    when it is first needed, and counts for the alpha that needed it.
    """

    _batch: tuple[Any, ...] | None = field(default=None, repr=False)
    _found: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def bind(self, images: Tensor, labels: Tensor, *key: Any) -> None:
        """Refuse to be used for another batch, radius, norm or seed than the first.

        Raises:
            ValueError: If it is.
        """
        if self._batch is None:
            self._batch = (images, labels, key)
            return
        old_images, old_labels, old_key = self._batch
        if (
            old_key != key
            or old_images.shape != images.shape
            or not torch.equal(old_images, images)
            or not torch.equal(old_labels, labels)
        ):
            raise ValueError(
                "base holds adversarial examples of other images, labels, eps, norm, seed or "
                "indices; make a new BaseExamples() per batch and share it between alphas only."
            )

    def starts(self, attack: str, images: Tensor) -> tuple[Tensor, Tensor]:
        """Examples of one attack so far, and which samples have one; to be filled in place."""
        if attack not in self._found:
            known = torch.zeros(len(images), dtype=torch.bool, device=images.device)
            self._found[attack] = (images.clone(), known)
        return self._found[attack]


def evaluate(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attacks: str | AttackSpec | Mapping[str, Any] | Sequence[str | AttackSpec | Mapping[str, Any]],
    eps: float | str,
    norm: str = "Linf",
    seed: int = 0,
    indices: Tensor | None = None,
    base: BaseExamples | None = None,
    progress: Callable[[str], None] | None = None,
    listen: Callable[[], None] | None = None,
    batch_size: int | None = None,
    keep_examples: bool = False,
) -> Evaluation:
    """Attack a classifier and say, per sample, what is left standing.

    No attack is believed: every example is clipped to the ball and to [0, 1] and scored again by
    the exact float32 forward. A sample is robust if it is classified right without an attack and on
    every example. Only what still stands is attacked. The classifier comes back as it was: modes,
    buffers, ``requires_grad``, no gradients, random number generators untouched; also after an
    exception. Models that are not float32 are attacked as a float32 copy.

    Args:
        classifier: Float pixels in [0, 1], ``(N, C, H, W)``, to logits ``(N, classes)``.
        images: Clean images.
        labels: True classes, ``(N,)`` int64.
        attacks: As `resolve_attacks` takes them; none of them for the clean accuracy alone.
        eps: Radius in pixel units, e.g. ``"8/255"``.
        norm: ``"Linf"`` or ``"L2"``.
        seed: All noise of a sample depends on this and on its index alone (attacks of other
            libraries draw per batch).
        indices: Numbers of the samples in their data set, ``(N,)`` int64; None counts from 0.
        base: Cache of base-model examples, shared between alphas of one batch.
        progress: Called with a line of text before each attack.
        listen: Called before every forward pass of an attack; may raise to end it.
        batch_size: Samples per forward pass; None for 64 on a CPU and 256 elsewhere. Halved when a
            CUDA device runs out of memory.
        keep_examples: Keep the adversarial examples in the result.

    Returns:
        Flags and counts per sample and attack.

    Raises:
        ImportError: If torchattacks is missing.
        TypeError: If an argument has the wrong type, or the classifier returns no tensor.
        ValueError: If images are not in [0, 1] (normalised ones), labels do not fit, or an attack
            does not fit the norm.
        RuntimeError: If an attack fails; the message names it.
    """
    radius = parse_eps(eps, norm)
    check_norm(norm)
    specs = () if isinstance(attacks, Sequence) and not attacks else resolve_attacks(attacks)
    for spec in specs:
        check_attack(spec, norm)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    say = progress or (lambda text: None)
    with attackable(classifier) as (model, device):
        x = checked_images(images, device)
        y = checked_labels(labels, len(x), device)
        numbers = _checked_indices(indices, len(x))
        if base is None:
            base = BaseExamples()
        base.bind(x, y, radius, norm, seed, tuple(numbers.tolist()))
        watched = Watched(model, device, listen)
        batches = Batches(batch_size, device)
        say(f"clean accuracy of {len(x)} images")

        def look(rows: Tensor) -> tuple[Tensor, Symptoms]:
            with torch.no_grad():
                found = checked_logits(model(x[rows]), y[rows]).float()
            at_once = len(rows) if specs else 0
            return found, symptoms(model, x[rows], y[rows], found, batch_size=at_once)

        everything = torch.arange(len(x), device=device)
        looked = [found for _, found in batches.of(everything, look)]
        logits = torch.cat([found for found, _ in looked])
        seen = Symptoms.of_all([symptom for _, symptom in looked])
        clean = stands(logits, y)
        others = logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)
        run = _Run(model, watched, x, y, numbers, radius, norm, seed, logits.shape[1], base)
        standing, examples = clean.clone(), x.clone()
        flags, tried = torch.zeros(2, len(x), len(specs), dtype=torch.bool, device=device)
        spent = torch.zeros(2, len(x), len(specs), dtype=torch.int64, device=device)
        for a, spec in enumerate(specs):
            say(f"{spec.name}: {int(standing.sum())} of {len(x)} images standing")
            tried[:, a] = standing
            for rows, found in batches.of(standing.nonzero().squeeze(1), partial(run.attack, spec)):
                examples[rows], standing[rows], spent[:, rows, a] = found
            flags[:, a] = standing
        return Evaluation(
            attacks=tuple(spec.name for spec in specs),
            kinds=tuple(spec.kind for spec in specs),
            labels=y.cpu(),
            indices=numbers,
            clean=clean.cpu(),
            standing=flags.cpu(),
            attacked=tried.cpu(),
            margin=(logits.gather(1, y[:, None]).squeeze(1) - others).cpu(),
            predictions=logits.argmax(dim=1).cpu(),
            noise=seen.noise.cpu(),
            zero_gradient=seen.zero_gradient.cpu(),
            probabilities=seen.probabilities.cpu(),
            forwards=spent[0].cpu(),
            backwards=spent[1].cpu(),
            seed=seed,
            batch_size=batches.size,
            examples=examples.cpu() if keep_examples else None,
        )


@dataclass
class _Run:
    """What every attack on one batch shares."""

    model: nn.Module
    watched: Watched
    images: Tensor
    labels: Tensor
    indices: Tensor
    eps: float
    norm: str
    seed: int
    num_classes: int
    base: BaseExamples

    def __post_init__(self) -> None:
        # What base examples have cost for which the attack that asked for them is not done yet: it
        # may run out of memory after they are made, and they are not made twice.
        self._owed = torch.zeros(2, len(self.images), dtype=torch.int64, device=self.images.device)

    def attack(self, spec: AttackSpec, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attack the samples in ``rows``.

        Returns:
            Legal examples, which of them the exact forward classifies right, and the cost,
            ``(2, len(rows))``.
        """
        with _naming(spec, "on the base model"):
            starts = self._base_starts(spec, rows) if spec.start == "base" else None
        with _naming(spec), backward_rule(self.model, spec.rule, **_temperature(spec)):
            found, cost = self._perturb(spec, rows, starts)
        examples = Ball(self.images[rows], self.eps, self.norm).clip(found)
        with torch.no_grad():
            standing = stands(self.model(examples), self.labels[rows])
        cost = cost + self._owed[:, rows]
        cost[0] += 1  # the forward that judged
        self._owed[:, rows] = 0
        return examples, standing, cost

    def _base_starts(self, spec: AttackSpec, rows: Tensor) -> Tensor:
        """The same attack on the same model at alpha 0, with its exact gradient."""
        examples, known = self.base.starts(_identity(spec), self.images)
        missing = rows[~known[rows]]
        if len(missing):
            with alpha_set(self.model, 0.0), backward_rule(self.model, "exact"):
                found, spent = self._perturb(spec, missing, None)
            examples[missing] = found
            known[missing] = True
            self._owed[:, missing] += spent
        return examples[rows]

    def _perturb(
        self, spec: AttackSpec, rows: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        images, labels, indices = self.images[rows], self.labels[rows], self.indices[rows.cpu()]
        # Attacks that differ in anything draw different noise, so that each is a restart of the
        # other, also at alpha 0, where all backward rules are one.
        seed = sample_seed(self.seed, zlib.crc32(_identity(spec).encode())) % 2**31
        seed_everything(seed)
        attack = build_attack(
            spec,
            self.watched,
            eps=self.eps,
            norm=self.norm,
            seed=seed,
            num_classes=self.num_classes,
        )
        attack.set_device(images.device)
        self.watched.reset()
        if hasattr(attack, "perturb_from"):
            outcome = attack.perturb_from(images, labels, starts=starts, indices=indices)
            return outcome.examples, torch.stack([outcome.forwards, outcome.backwards])
        found = attack(images.clone(), labels.clone())
        if not isinstance(found, Tensor) or found.shape != images.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"it returned {got} for images of shape {tuple(images.shape)}.")
        spent = torch.stack(
            [
                _split_evenly(total, len(rows), rows.device)
                for total in (self.watched.forwards, self.watched.backwards)
            ]
        )
        return found.detach().to(images), spent


def _identity(spec: AttackSpec) -> str:
    seen_through = "" if spec.rule == "exact" else f" {spec.rule} {spec.temperature}"
    return f"{spec.attack} {sorted(spec.options.items())}{seen_through}"


def _split_evenly(total: int, count: int, device: torch.device) -> Tensor:
    each = torch.full((count,), total // count, dtype=torch.int64, device=device)
    each[: total % count] += 1
    return each


def _temperature(spec: AttackSpec) -> dict[str, float]:
    return {} if spec.temperature is None else {"temperature": spec.temperature}


def _checked_indices(indices: Any, count: int) -> Tensor:
    if indices is None:
        return torch.arange(count)
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices must be an int64 tensor of sample numbers (N,), got {got}.")
    if indices.shape != (count,):
        raise ValueError(
            f"indices must have shape ({count},) as labels, got {tuple(indices.shape)}."
        )
    return indices.detach().cpu().clone()


@contextmanager
def _naming(spec: AttackSpec, where: str = "") -> Iterator[None]:
    """Say which attack failed, keeping the cause."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # with fewer samples it may go
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        at = f" {where}" if where else ""
        raise RuntimeError(f"attack {spec.name!r} ({spec.attack}) failed{at}: {error}") from error
