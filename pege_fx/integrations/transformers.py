"""Transformers: ``Trainer(model, args, callbacks=[PEGECallback()])`` moves p, λ and masks on, and resumes with them."""

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from pege_fx.errors import ModelError, PegeWarning
from pege_fx.training.scheduler import PEGEScheduler


class PEGECallback(TrainerCallback):
    """Steps a ``PEGEScheduler`` with every step of the optimizer; a resumed training sets it to the step it goes on from.

    p and both λ are in every log: the history, the console, TensorBoard, W&B and whatever else reports.

    Args:
        total_steps: length of the schedule in optimizer steps; default: that of the training.
        options: further arguments of ``PEGEScheduler``.

    The model is prepared, or holds one that is; ``scheduler`` is there once training has begun.

    Raises:
        ModelError: when training begins, if nothing in the model was prepared.
    """

    scheduler: PEGEScheduler | None = None
    _seen: Any = None

    def __init__(self, total_steps: int | None = None, **options: Any) -> None:
        self.total_steps, self.options = total_steps, options

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        _move_to_the_front(self)
        self._fit_for_a_trainer(model)

    def _fit_for_a_trainer(self, model: Any) -> None:
        """Give a model that is none of transformers' what a Trainer expects of those; once for each."""
        if isinstance(model, PreTrainedModel) or model is self._seen:
            return
        self._seen = model
        model.register_state_dict_post_hook(_give_each_name_its_memory)
        if not hasattr(model, "activation_checkpointing_enable"):
            vars(model)["activation_checkpointing_enable"] = _refuse_activation_checkpointing

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        _move_to_the_front(self)  # one that was added later saw no on_init_end
        self._fit_for_a_trainer(model)
        self.scheduler = PEGEScheduler(model, self.total_steps or state.max_steps, **self.options)
        if state.global_step:
            self.scheduler.go_to(state.global_step)
        if args.gradient_accumulation_steps > 1 and getattr(model, "accepts_loss_kwargs", None) is False:
            warnings.warn(
                "the prepared model takes no num_items_in_batch: losses of accumulated batches are averaged evenly,\n"
                "  however many tokens each has. Give batches of the same number of tokens, or compute_loss_func.",
                PegeWarning,
                stacklevel=2,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.scheduler is not None
        self.scheduler.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or self.scheduler is None:  # evaluate() and predict() log before any training
            return
        weight, activation = self.scheduler.lambdas
        figures = {"pege_p": self.scheduler.rate, "pege_weight_lambda": weight, "pege_activation_lambda": activation}
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)  # a copy of ``logs`` that was made before


def _give_each_name_its_memory(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Copy what has a second name in a state: Trainer writes it with safetensors, which refuses tied weights."""
    known: set[tuple[int, torch.Size]] = set()
    for name, value in state.items():
        if isinstance(value, Tensor):
            place = (value.data_ptr(), value.shape)
            state[name] = value.clone() if value.numel() and place in known else value
            known.add(place)


def _refuse_activation_checkpointing(**_: Any) -> None:
    raise ModelError(
        "the Trainer can not checkpoint the activations of a graph: leave gradient_checkpointing out.\n"
        "  Rule(recompute=True) keeps no more for backward than float training; prepare(..., blocks=...) makes modules that\n"
        "  torch.utils.checkpoint can wrap."
    )


def _move_to_the_front(callback: TrainerCallback) -> None:
    """Make a callback the first of its handler, so that those who report see what it adds to the logs.

    A Trainer puts users' callbacks behind its own, and hands none of them its handler: the handler is what called.
    """
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is not None:
        callbacks = frame.f_locals["self"].callbacks
        if callback in callbacks:  # the handler is iterating: behind this one, nothing moves
            callbacks.remove(callback)
            callbacks.insert(0, callback)
