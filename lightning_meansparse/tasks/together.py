"""A sweep from its beginning to its end, whichever that is, on all processes together."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from lightning_meansparse.meeting import Meeting
from lightning_meansparse.surgery.wrapped import sharded_modules

if TYPE_CHECKING:
    from lightning_meansparse.tasks.sweep import AlphaSweep

_log = logging.getLogger(__name__)

_EMPTY = {
    "validate": "there are no held-out images to choose alpha on: give ImageDataModule a holdout "
    "above 0, and the trainer a limit_val_batches above 0",
    "test": "there are no test images to report: give the trainer a test loader that is not empty, "
    "and a limit_test_batches above 0",
}

_WHOLE = (
    "AlphaSweep needs the whole model in every process, for each attacks at its own pace, and "
    "{cut} the weights among them. Give the trainer strategy='ddp', or ModelParallelStrategy and "
    "leave configure_model as it is."
)

TERMINATED = 128 + signal.SIGTERM
"""Exit code after SIGTERM, as shells have it."""


class Together(Callback):
    """Sees to it that no process waits for one that has failed, and that all end as one.

    Whatever ends a run (an exception anywhere in it, Ctrl-C, SIGTERM, a logger that raises), what
    was taken for the run is given back, and the other processes hear of it: those who wait at once,
    those who work at the next forward pass. One that was killed cannot tell; who waits for it sees
    that, and torchrun, Lightning and `srun --kill-on-bad-exit` end those who work.

    Args:
        sweep: The sweep.

    Attributes:
        ending: What to undo at the end of the run.
        kept_in: Where the run keeps what it measures, once that has begun.
    """

    def __init__(self, sweep: AlphaSweep) -> None:
        self.sweep = sweep
        self.ending = contextlib.ExitStack()
        self.kept_in: Path | None = None
        self._meeting: Meeting | None = None
        self._begun = self._stopped = False
        self._process = 0

    def meet(self) -> None:
        """Wait for the other processes, however long it takes; raise if one has failed."""
        self._stop_if_told()
        if self._meeting is not None:
            self._meeting.meet()

    def listen(self) -> None:
        """Raise if another process has failed; may be called often."""
        self._stop_if_told()
        if self._meeting is not None:
            self._meeting.listen()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the meeting.

        Raises:
            ValueError: If the strategy splits the weights.
        """
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise ValueError(_WHOLE.format(cut=f"{type(trainer.strategy).__name__} splits"))
        self._meeting, self._begun, self._stopped = Meeting(), False, False
        self._process = os.getpid()
        # Lightning sets its handler of SIGTERM next, long before there is a hook to replace it.
        if connector := getattr(trainer, "_signal_connector", None):
            vars(connector)["_sigterm_notifier_fn"] = self._stop
            self.ending.callback(vars(connector).pop, "_sigterm_notifier_fn", None)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at SIGTERM.

        Raises:
            ValueError: If weights are split.
        """
        self._begin()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same."""
        self._begin()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Tell the others, and give back what was taken."""
        if self._meeting is not None and (told := self._meeting.tell(exception)):
            _log.warning("%s", told)
        self._meeting = None  # and not closed: who has left without a word is still awaited there
        self.ending.close()
        if self.kept_in is not None and trainer.is_global_zero:
            _log.warning(
                "the sweep has stopped (%s); what it has measured is in %s, and the same command "
                "goes on from there",
                *(type(exception).__name__, self.kept_in),
            )
        self.kept_in = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave only when all others may leave: a logger may have failed on one of them.

        Raises:
            ValueError: If there was nothing to measure; the trainer has run without a word.
        """
        if not self._begun:
            raise ValueError(_EMPTY[stage])
        self.meet()
        if self._meeting is not None:
            self._meeting.close()
        self._meeting = self.kept_in = None
        self.ending.close()

    def _begin(self) -> None:
        if sharded_modules(self.sweep):
            raise ValueError(_WHOLE.format(cut="fully_shard has split"))
        self._begun = True
        if threading.current_thread() is threading.main_thread():  # Python lets no other
            signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, frame: Any) -> None:
        """End at SIGTERM as after Ctrl-C, at once: files are there whole or not at all.

        Lightning's own handler waits for the end of an epoch, after a broadcast inside the handler
        that hangs unless every process got the signal at the same place.
        """
        if os.getpid() != self._process:  # a worker that was forked off, and is told to end
            os._exit(TERMINATED)
        _log.warning("SIGTERM: the sweep stops")
        self._stopped = True
        self._stop_if_told()

    def _stop_if_told(self) -> None:
        # Once more, for Python forgets what is raised while it takes an object down.
        if self._stopped:
            raise SystemExit(TERMINATED)
