"""AdversarialTraining: PGD-AT, TRADES or standard training of any classifier."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.scheduler.scheduler import Scheduler as TimmScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import MeanMetric

from lightning_meansparse.attacks import parse_eps
from lightning_meansparse.classifier import Classifier, load_classifier, save_classifier
from lightning_meansparse.tasks.ascent import Norm, Start, ascend, held, seeded
from lightning_meansparse.tasks.batches import images_and_labels
from lightning_meansparse.tasks.files import check_folder

Method = Literal["pgd", "trades", "none"]

# Told apart so that validation draws other noise than training, and the same in every epoch.
_TRAINING, _VALIDATION = 0, 1


class AdversarialTraining(LightningModule):
    """Train a classifier on the adversarial examples of the moment.

    - `"pgd"` (Madry et al. [1]): minimise `CE(f(x'), y)`, where `x'` maximises it in the ball.
    - `"trades"` (Zhang et al. [2]): minimise `CE(f(x), y) + β KL(f(x) ‖ f(x'))`, where `x'`
      maximises the KL term.
    - `"none"`: minimise `CE(f(x), y)`.

    Examples are crafted in eval mode [3], so BatchNorm's running statistics see only what the
    weights are trained on. Logs `train_loss`, `train_adv_acc` and, where it costs nothing,
    `train_clean_acc`; in validation `val_loss`, `val_clean_acc` and `val_adv_acc`. The last one is
    a short PGD to watch training with: report robust accuracies with
    `RobustAccuracy` or `AlphaSweep`.

    [1] arXiv 1706.06083, Sec. 2. [2] arXiv 1901.08573, Eq. 5. [3] Pang et al., arXiv 2010.00467,
    Sec. 3.

    Args:
        model: A classifier of pixels in [0, 1], or whatever `load_classifier` takes: a module, or
            a name such as `"timm/resnet18"`.
        method: See above.
        eps: Radius of the ball in pixel units, a number or text such as `"8/255"`.
        norm: `"Linf"` or `"L2"`.
        steps: Steps of the inner attack.
        step_size: Length of a step, as `eps`; None for `2.5 eps / steps`, which can cross the ball.
        beta: Weight of TRADES' robustness term; unused by the other methods.
        label_smoothing: Of the cross-entropy that is minimised; the attack uses none.
        optimizer: Called with the trainable parameters. In a YAML file a class path, any
            `torch.optim` or `timm.optim` class.
        lr_scheduler: Called with the optimizer. A class path of `torch.optim.lr_scheduler` or
            `timm.scheduler`. If it takes `total_steps` and leaves it open, as `OneCycleLR` does, it
            gets the length of the training in units of `lr_interval`. None keeps the rate.
        lr_interval: Step the scheduler after every `"epoch"` or `"step"`.
        val_steps: Steps of the validation attack; 0 leaves it out.
        channels_last: Keep the weights in that memory format; a third faster for small networks on
            a CPU, and the same numbers.
        save_to: Folder that gets the trained classifier (config.json, model.safetensors) when
            training has ended; `load_classifier` reads it.
        seed: Of the attacks' start points, which never touch the global generators.

    Attributes:
        classifier: The `Classifier` being trained.

    Raises:
        ValueError: If a number is out of range or a choice unknown.

    Examples:
        >>> from lightning_meansparse.demo import ConvNet
        >>> task = AdversarialTraining(ConvNet(width=4), eps="8/255", steps=2)
        >>> images, labels = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
        >>> bool((task.attack(images, labels) - images).abs().max() <= 8 / 255)
        True
    """

    def __init__(
        self,
        model: nn.Module | str,
        *,
        eps: float | str,
        method: Method = "pgd",
        norm: Norm = "Linf",
        steps: int = 10,
        step_size: float | str | None = None,
        beta: float = 6.0,
        label_smoothing: float = 0.0,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = lambda parameters: (
            torch.optim.AdamW(parameters, lr=1e-3)
        ),
        lr_scheduler: Callable[[Optimizer], LRScheduler | TimmScheduler] | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        val_steps: int = 10,
        channels_last: bool = False,
        save_to: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_choice("method", method, get_args(Method))
        _check_choice("norm", norm, get_args(Norm))
        _check_choice("lr_interval", lr_interval, ("epoch", "step"))
        for name, count, least in (("steps", steps, 1), ("val_steps", val_steps, 0)):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {count!r}")
        if not beta >= 0:
            raise ValueError(f"beta must be at least 0, got {beta!r}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}")
        self.eps = parse_eps(eps, norm)
        self.step_size = None if step_size is None else parse_eps(step_size)
        self.save_hyperparameters(ignore=["model", "optimizer", "lr_scheduler", "save_to"])
        self.method = method
        self.norm = norm
        self.steps = steps
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.val_steps = val_steps
        self.save_to = save_to
        self.seed = seed
        self.classifier: Classifier = load_classifier(model)
        if channels_last:
            self.classifier.to(memory_format=torch.channels_last)
        names = ("train_adv_acc", "train_clean_acc", "val_loss", "val_clean_acc", "val_adv_acc")
        # Sums and counts that merge over ranks; a mean of batch means would weigh the last batch
        # like a full one.
        self.means = nn.ModuleDict({name: MeanMetric() for name in names})

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `(N, num_classes)` of images `(N, C, H, W)` in [0, 1]."""
        logits: Tensor = self.classifier(images)
        return logits

    def attack(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return what training sees for these images: adversarial examples of the model as it is.

        Args:
            images: `(N, C, H, W)` in [0, 1].
            labels: `(N,)`; TRADES does not look at them.
            steps: Other than `self.steps`.
            generator: Source of the random start.
        """
        return self._ascend(
            self.method, images, labels, steps or self.steps, self.step_size, generator
        )

    def _ascend(
        self,
        method: Method,
        images: Tensor,
        labels: Tensor,
        steps: int,
        step_size: float | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        start: Start = "uniform"
        with held(self.classifier):
            if method == "trades":
                start = "near"
                with torch.no_grad():
                    clean = self.classifier(images)

                def loss(points: Tensor) -> Tensor:
                    return divergence(clean, self.classifier(points)).sum()

            else:

                def loss(points: Tensor) -> Tensor:
                    return F.cross_entropy(self.classifier(points), labels, reduction="sum")

            return ascend(
                loss,
                images,
                eps=self.eps,
                norm=self.norm,
                steps=steps,
                step_size=2.5 * self.eps / steps if step_size is None else step_size,
                start=start,
                generator=generator,
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Craft, score, and return the loss to minimise."""
        images, labels = images_and_labels(batch)
        smoothing = self.label_smoothing
        if self.method == "none":
            logits = self.classifier(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
            self._mean("train_clean_acc", correct(logits, labels))
        else:
            place = (self.seed, self.global_rank, _TRAINING, self.current_epoch, batch_idx)
            points = self.attack(images, labels, generator=seeded(*place, device=images.device))
            if self.method == "trades":
                logits = self.classifier(images)
                attacked = self.classifier(points)
                loss = trades_loss(logits, attacked, labels, self.beta, label_smoothing=smoothing)
                self._mean("train_clean_acc", correct(logits, labels))
            else:
                attacked = self.classifier(points)
                loss = F.cross_entropy(attacked, labels, label_smoothing=smoothing)
            self._mean("train_adv_acc", correct(attacked, labels))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score the images as they are, and after a short attack."""
        images, labels = images_and_labels(batch)
        logits = self.classifier(images)
        self._mean("val_loss", F.cross_entropy(logits, labels, reduction="none"))
        self._mean("val_clean_acc", correct(logits, labels))
        if self.val_steps:
            generator = seeded(
                self.seed, self.global_rank, _VALIDATION, batch_idx, device=images.device
            )
            # Always the cross-entropy, so that the number means the same for every method.
            points = self._ascend("pgd", images, labels, self.val_steps, None, generator)
            stands = correct(logits, labels) & correct(self.classifier(points), labels)
            self._mean("val_adv_acc", stands)

    def _mean(self, name: str, values: Tensor) -> None:
        metric = self.means[name]
        assert isinstance(metric, MeanMetric)
        metric.update(values.detach().float())
        self.log(name, metric, on_step=False, on_epoch=True, prog_bar=name.endswith("acc"))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and the schedule from the given factories."""
        optimizer = self.optimizer(
            [parameter for parameter in self.classifier.parameters() if parameter.requires_grad]
        )
        if self.lr_scheduler is None:
            return optimizer
        scheduler: Any = self._schedule(self.lr_scheduler, optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self.lr_interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = getattr(scheduler, "monitor", "val_loss")
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[return-value]

    def _schedule(self, factory: Callable[..., Any], optimizer: Optimizer) -> Any:
        if not _wants_total(factory):
            return factory(optimizer)
        total = (
            self.trainer.estimated_stepping_batches
            if self.lr_interval == "step"
            else self.trainer.max_epochs
        )
        if total is None or not 0 < total < float("inf"):
            raise ValueError(
                "lr_scheduler takes total_steps, which is unknown as the training has no end: set "
                "the trainer's max_epochs or max_steps, or total_steps itself"
            )
        return factory(optimizer, total_steps=int(total))

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step torch's schedulers without, timm's with the number of the step or epoch."""
        if not isinstance(scheduler, TimmScheduler):
            super().lr_scheduler_step(scheduler, metric)
        elif self.lr_interval == "step":
            scheduler.step_update(self.global_step)
        else:
            scheduler.step(self.current_epoch + 1, metric)

    def setup(self, stage: str) -> None:
        """Compare what the data gives with what the classifier takes, before anything runs.

        Raises:
            ValueError: If channels or classes differ, or `save_to` cannot be written.
        """
        if self.save_to is not None:
            check_folder(Path(self.save_to), "save_to")
        data = getattr(self.trainer, "datamodule", None)
        classes, channels = getattr(data, "num_classes", None), getattr(data, "in_chans", None)
        if None not in (classes, self.classifier.num_classes) and (
            classes != self.classifier.num_classes
        ):
            raise ValueError(
                f"model gives {self.classifier.num_classes} logits, but the data has {classes} "
                f"classes; build the model with num_classes={classes}"
            )
        takes = self.classifier.in_chans
        if None not in (channels, takes) and channels != takes:
            raise ValueError(
                f"model takes {takes} channels, but the images have {channels}; build the model "
                f"with in_chans={channels}, or the data with channels={takes}"
            )

    def on_fit_start(self) -> None:
        """Put a classifier that is as a whole in eval mode, as one loaded by name is, to training.

        Lightning keeps the mode it finds, and BatchNorm would stay frozen. A classifier in train
        mode may have parts in eval mode on purpose: those are left alone.
        """
        if not self.classifier.training:
            self.classifier.train()

    def on_fit_end(self) -> None:
        """Write the trained classifier, last of all: averaged weights are in place by now."""
        if self.save_to is not None and self.trainer.is_global_zero:
            save_classifier(self.classifier, self.save_to)


def divergence(clean: Tensor, attacked: Tensor) -> Tensor:
    """Return KL(softmax(clean) ‖ softmax(attacked)) per sample, from logits `(N, C)` to `(N,)`."""
    target = clean.log_softmax(dim=1)
    return F.kl_div(attacked.log_softmax(1), target, reduction="none", log_target=True).sum(1)


def trades_loss(
    clean: Tensor, attacked: Tensor, labels: Tensor, beta: float, *, label_smoothing: float = 0.0
) -> Tensor:
    """TRADES' objective `mean(CE(clean, y)) + β mean(KL(clean ‖ attacked))` [2, Eq. 5].

    The gradient flows through both arguments of the KL term, as in the authors' code.

    Args:
        clean: Logits of the images, `(N, C)`.
        attacked: Logits of their adversarial examples, `(N, C)`.
        labels: `(N,)`.
        beta: The paper's 1/λ.
        label_smoothing: Of the cross-entropy.

    Examples:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> trades_loss(logits, logits, torch.tensor([0]), beta=6.0).item() == F.cross_entropy(
        ...     logits, torch.tensor([0])
        ... ).item()
        True
    """
    natural = F.cross_entropy(clean, labels, label_smoothing=label_smoothing)
    return natural + beta * divergence(clean, attacked).mean()


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which samples are classified right, `(N,)` bool."""
    return logits.argmax(dim=1) == labels


def _wants_total(factory: Callable[..., Any]) -> bool:
    """Whether a scheduler factory has an argument `total_steps` that nobody has given."""
    target: Callable[..., Any] = factory
    given: dict[str, Any] = {}
    while isinstance(target, partial):
        given = {**target.keywords, **given}
        # jsonargparse gives partial(instantiate, …, Class, **init_args).
        target = next((arg for arg in target.args if inspect.isclass(arg)), target.func)
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(target).parameters
    return "total_steps" in parameters and all(
        given.get(name) is None for name in ("total_steps", "epochs", "steps_per_epoch")
    )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
