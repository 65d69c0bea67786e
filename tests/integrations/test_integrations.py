"""Other people's loops, with the real packages: the schedule follows, and an interrupted training ends as a whole one."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader, Dataset

import pege_fx
from pege_fx import Linear, ModelError, ScheduleError, fake_quants

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours


class Points(Dataset[Any]):
    def __init__(self) -> None:
        made = torch.Generator().manual_seed(1)
        self.x, self.labels = torch.randn(24, 6, generator=made), torch.randint(3, (24,), generator=made)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "labels": self.labels[i]}


def prepared() -> GraphModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 3))
    return pege_fx.prepare(net, "W3A3", (Points().x,))


def rate(module: nn.Module) -> float:
    return next(iter(fake_quants(module).values())).schedule.rate.item()


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- Lightning -----------------------------------------------------------------------------------------------------------


def lightning_run(folder: Path, epochs: int, resume: str | None = None, accumulate: int = 1, **options: Any) -> Any:
    lightning = pytest.importorskip("lightning.pytorch")
    from pege_fx.integrations.lightning import PEGECallback

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.gm = prepared()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.gm(batch["x"]), batch["labels"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(pege_fx.parameter_groups(self.gm, 1e-2))

    callback, module = PEGECallback(replacement=Linear(0.0, 1.0, steps=8), **options), Module()
    checkpoint = lightning.callbacks.ModelCheckpoint(dirpath=folder, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback, checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, DataLoader(Points(), batch_size=6), ckpt_path=resume)
    return module, callback, trainer


def test_lightning_steps_the_schedule_and_logs_it(tmp_path: Path) -> None:
    module, callback, trainer = lightning_run(tmp_path, 2)
    assert callback.scheduler.total_steps == callback.scheduler.t == 8
    assert rate(module) == 1.0
    assert trainer.callback_metrics["pege/p"] == 1.0


def test_lightning_steps_once_for_accumulated_gradients(tmp_path: Path) -> None:
    module, callback, _ = lightning_run(tmp_path, 2, accumulate=2)
    assert callback.scheduler.total_steps == callback.scheduler.t == 4
    assert rate(module) == 0.5


def test_lightning_resumes_the_schedule(tmp_path: Path) -> None:
    whole, callback, _ = lightning_run(tmp_path / "whole", 4, total_steps=16)
    lightning_run(tmp_path / "parts", 2, total_steps=16)
    torch.manual_seed(99)
    parts, other, _ = lightning_run(tmp_path / "parts", 4, str(tmp_path / "parts" / "last.ckpt"), total_steps=16)
    assert other.scheduler.state_dict() == callback.scheduler.state_dict()
    assert rate(parts) == rate(whole) == 1.0


def test_lightning_refuses_what_has_no_end_and_what_was_not_prepared(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from pege_fx.integrations.lightning import PEGECallback

    with pytest.raises(ScheduleError, match="the training has no end"):
        lightning_run(tmp_path, -1)
    plain = lightning.LightningModule()
    trainer = lightning.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ModelError, match="was not prepared"):
        PEGECallback(total_steps=4).on_fit_start(trainer, plain)


# --- transformers -----------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """What a Trainer calls: arguments by name, the loss first."""

    def __init__(self) -> None:
        super().__init__()
        self.gm = prepared()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.gm(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def transformers_run(folder: Path, steps: int, resume: bool = False) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from pege_fx.integrations.transformers import PEGECallback

    callback, model = PEGECallback(total_steps=8, replacement=Linear(0.0, 1.0, steps=8)), Classifier()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=4,
        logging_steps=2,
        per_device_train_batch_size=6,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Points(), callbacks=[callback])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=resume)
    return model, callback, trainer


def test_transformers_steps_the_schedule_resumes_it_and_logs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, callback, _ = transformers_run(tmp_path / "whole", 8)
    assert callback.scheduler.t == 8
    assert rate(whole) == 1.0
    assert capsys.readouterr().out.count("pege_p") >= 4
    transformers_run(tmp_path / "parts", 4)
    torch.manual_seed(99)
    parts, other, _ = transformers_run(tmp_path / "parts", 8, resume=True)
    assert other.scheduler.state_dict() == callback.scheduler.state_dict()
    assert_equal(parts, whole)


def trained_stock(folder: Path, make: Any, labels: Tensor, **options: Any) -> Any:
    """A stock class, prepared and trained by a Trainer that knows nothing of it but the callback."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from pege_fx.integrations.transformers import PEGECallback

    torch.manual_seed(0)
    ids = torch.randint(3, 32, (16, 6))
    data = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": label}
        for i, label in zip(ids, labels(ids), strict=True)
    ]
    batch = {name: torch.stack([row[name] for row in data[:4]]) for name in data[0]}
    gm = pege_fx.prepare(make(transformers), "W4A8", example_kwargs=batch)
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 2, "save_steps": 2, "logging_steps": 1}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "output_dir": str(folder)} | options
    trainer = transformers.Trainer(
        gm, transformers.TrainingArguments(**settings), train_dataset=data, eval_dataset=data[:4], callbacks=[PEGECallback()]
    )
    return trainer, data


def bert(transformers: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=32, num_labels=2, **sizes))


def llama(transformers: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {"num_key_value_heads": 2, "tie_word_embeddings": True, "use_cache": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes, **options))


@pytest.mark.parametrize(("make", "labels"), [(bert, lambda ids: ids[:, 0] % 2), (llama, lambda ids: ids)])
@pytest.mark.filterwarnings("ignore")
def test_stock_classes_train_evaluate_predict_and_are_saved(make: Any, labels: Any, tmp_path: Path) -> None:
    trainer, data = trained_stock(tmp_path, make, labels)
    assert "eval_loss" in trainer.evaluate()  # before any training
    trainer.train()
    assert trainer.predict(data[:4]).predictions is not None
    again, _ = trained_stock(tmp_path, make, labels)
    again._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert_equal(again.model, trainer.model)


@pytest.mark.filterwarnings("ignore")
def test_accumulated_losses_are_averaged_and_the_callback_says_so(tmp_path: Path) -> None:
    trainer, _ = trained_stock(tmp_path, llama, lambda ids: ids, gradient_accumulation_steps=2)
    with pytest.warns(pege_fx.PegeWarning, match="takes no num_items_in_batch"):
        trainer.train()


@pytest.mark.filterwarnings("ignore")
def test_activation_checkpointing_by_a_trainer_is_refused(tmp_path: Path) -> None:
    trainer, _ = trained_stock(tmp_path, llama, lambda ids: ids, gradient_checkpointing=True)
    with pytest.raises(ModelError, match=r"leave gradient_checkpointing out.*\n.*recompute=True"):
        trainer.train()


@pytest.mark.filterwarnings("ignore")
def test_every_reporter_and_the_history_have_p(tmp_path: Path) -> None:
    trainer, _ = trained_stock(tmp_path, bert, lambda ids: ids[:, 0] % 2)
    seen: list[dict[str, float]] = []

    class Reporter(type(trainer.callback_handler.callbacks[-1]).__mro__[1]):  # type: ignore[misc]
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            seen.append(dict(logs))

    trainer.callback_handler.callbacks.insert(1, Reporter())  # where reporters stand: before a user's callbacks
    trainer.train()
    assert all("pege_p" in logs and "pege_weight_lambda" in logs for logs in seen)
    assert all("pege_p" in row for row in trainer.state.log_history)


def test_lightning_without_fit_saves_and_goes_on(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from pege_fx.integrations.lightning import PEGECallback

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.gm = prepared()

        def step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.gm(batch["x"]), batch["labels"])

        training_step = validation_step = test_step = predict_step = step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(pege_fx.parameter_groups(self.gm, 1e-2))

    def trainer(**options: Any) -> Any:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        return lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet, **options)

    data, callback, module = DataLoader(Points(), batch_size=6), PEGECallback(), Module()
    for way in ("validate", "test", "predict"):
        run = trainer(callbacks=[callback])
        getattr(run, way)(module, data)
        run.save_checkpoint(tmp_path / way)
        assert callback.state_dict() == {}
    run = trainer(callbacks=[callback])
    run.fit(module, data, ckpt_path=tmp_path / "validate")  # holds no schedule: it starts
    assert callback.scheduler.t == 4
    run.save_checkpoint(tmp_path / "fitted")
    other = PEGECallback()
    run = trainer(callbacks=[other])
    run.validate(Module(), data, ckpt_path=tmp_path / "fitted")
    assert other.state_dict() == callback.state_dict()  # what was loaded is in the next checkpoint too
