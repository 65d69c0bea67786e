"""Lightning: ``Trainer(callbacks=[PEGECallback()])`` moves p, λ and masks on, and a resumed run goes on with them."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pege_fx.errors import ScheduleError
from pege_fx.training.scheduler import PEGEScheduler


class PEGECallback(Callback):
    """Steps a ``PEGEScheduler`` with every step of the optimizer; its state is in Lightning's checkpoints.

    Args:
        total_steps: length of the schedule in optimizer steps; default: that of the training.
        options: further arguments of ``PEGEScheduler``.

    The ``LightningModule`` holds a prepared model as an attribute; ``scheduler`` is there once training has begun.

    Raises:
        ModelError: when training begins, if nothing in the module was prepared.
        ScheduleError: when training begins, if the training has no end and ``total_steps`` was not given.
    """

    scheduler: PEGEScheduler | None = None

    def __init__(self, total_steps: int | None = None, **options: Any) -> None:
        self.total_steps, self.options = total_steps, options
        self._loaded: dict[str, Any] | None = None
        self._seen = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = self.total_steps or trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise ScheduleError("the training has no end: give PEGECallback(total_steps=...), or the Trainer max_steps.")
        prepared: Any = pl_module
        self.scheduler = PEGEScheduler(prepared, int(total), **self.options)
        if self._loaded is not None:
            self.scheduler.load_state_dict(self._loaded)
            self._loaded = None  # a second fit starts anew

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > self._seen:  # not in every batch, where gradients are accumulated
            assert self.scheduler is not None
            self._seen = trainer.global_step
            self.scheduler.step()
            rate, (weight, activation) = self.scheduler.rate, self.scheduler.lambdas
            pl_module.log_dict({"pege/p": rate, "pege/weight_lambda": weight, "pege/activation_lambda": activation})

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state; before training what was loaded, or nothing: validate, test and predict have none."""
        return dict(self._loaded or {}) if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state for the scheduler that training makes."""
        self._loaded = dict(state_dict) or None
