"""Transformers: ``Trainer(model, args, callbacks=[PEGECallback()])`` moves p, λ and masks on, and resumes with them."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pege_fx.training.scheduler import PEGEScheduler


class PEGECallback(TrainerCallback):
    """Steps a ``PEGEScheduler`` with every step of the optimizer; a resumed training sets it to the step it goes on from.

    Args:
        total_steps: length of the schedule in optimizer steps; default: that of the training.
        options: further arguments of ``PEGEScheduler``.

    The model is prepared, or holds one that is; ``scheduler`` is there once training has begun.

    Raises:
        ModelError: when training begins, if nothing in the model was prepared.
    """

    scheduler: PEGEScheduler

    def __init__(self, total_steps: int | None = None, **options: Any) -> None:
        self.total_steps, self.options = total_steps, options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self.scheduler = PEGEScheduler(model, self.total_steps or state.max_steps, **self.options)
        if state.global_step:
            self.scheduler.go_to(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.scheduler.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is not None:
            logs["pege_p"], (logs["pege_weight_lambda"], logs["pege_activation_lambda"]) = (
                self.scheduler.rate,
                self.scheduler.lambdas,
            )
