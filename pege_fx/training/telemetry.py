"""Where training stands, site by site: p, λ, error, clipping, scale, oscillation, λ's share; to memory and to writers.

Everything is added up on the device. Once per interval it comes to the host, all sites in one tensor.
"""

import csv
import math
import os
from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pege_fx._utils.files import path_of, path_to_read
from pege_fx.errors import OutputError, ScheduleError
from pege_fx.modules.fake_quant import FakeQuant, fake_quants
from pege_fx.modules.measures import distance, is_clipped, relative_error, squares
from pege_fx.modules.stages import check_stage, refuse_shards
from pege_fx.training.lambda_share import KNOWN_OPTIMIZERS, LambdaShares
from pege_fx.training.oscillation import Oscillations
from pege_fx.training.quantized_weights import quantized_weights

Row: TypeAlias = dict[str, Any]

_OF_ALL = ("p", "weight_lambda", "activation_lambda", "error", "clipped", "scale", "distance")
_OF_SOME = ("oscillating", "lambda_of_gradient", "lambda_of_update")  # None where nothing was measured
_FIGURES = (*_OF_ALL, *_OF_SOME)
COLUMNS = ("step", "site", *_FIGURES)
_SEEN = ("squared error", "squares", "clipped", "elements", "distance")


class Writer(Protocol):
    """Where rows go; ``close`` is called once, at the end."""

    def write(self, rows: list[Row]) -> None:
        """Take the rows of one interval: one for each site."""

    def close(self) -> None:
        """Finish."""


class Telemetry:
    """Looks at every site of a prepared model in every ``every``-th training step, the first included.

    A row is a dict: ``step``, ``site`` (path of the fake-quant), ``p``, ``weight_lambda``, ``activation_lambda``, ``error``
    (squared norm of x - x_q over that of x, with x_q fully quantized), ``clipped`` (share of values outside the
    grid), ``scale`` (mean over channels), ``distance`` (mean distance to the nearest code, in steps of the grid), and these,
    which are None where they were not measured:

    - ``oscillating``: share of the weights that since the row before changed their code and came back, the second change
      leading to the code that the first had left.
    - ``lambda_of_gradient``: ``sum |t| / (sum |t| + sum |g|)`` over the site, with t what the estimator's strength (PEGE's λ,
      EWGS' δ) adds to dL/dx_c and g the rest.
    - ``lambda_of_update``: the same of the two parts of the weight's update, after the optimizer's averaging.

    ``history`` keeps all rows; ``pege_fx.report`` shows them.

    Between the looks a site costs one comparison, and with ``oscillations`` or ``optimizer`` some passes over each weight in
    every step. Make it before ``torch.compile``: the compiled model then has two variants, with and without a look; λ's
    shares are measured in eager mode alone.

    Args:
        gm: a prepared model.
        every: interval in training steps.
        writers: ``CSVWriter``, ``TensorBoardWriter``, or anything with ``write(rows)`` and ``close()``.
        oscillations: whether codes of weights are compared in every step.
        optimizer: Adam, AdamW or SGD, whose updates are to be taken apart. Gradients that are clipped between backward
            and step are not known here as what they became.

    Raises:
        ScheduleError: for an interval that is no positive whole number, or an optimizer of another class.

    >>> import pege_fx
    >>> gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "W4A4", torch.randn(2, 4))
    >>> with Telemetry(gm, every=2) as telemetry:
    ...     for step in range(3):
    ...         loss = gm(torch.randn(2, 4)).sum()  # backward and the optimizer's step as ever
    ...         telemetry.step()
    >>> [row["step"] for row in telemetry.history if row["site"] == "0.weight_fq"]
    [0, 2]
    """

    def __init__(
        self,
        gm: GraphModule,
        every: int = 100,
        writers: Iterable[Writer] = (),
        *,
        oscillations: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        check_stage(gm, "prepared")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ScheduleError(f"every={every!r}: give the interval as a positive whole number of training steps.")
        if optimizer is not None and type(optimizer) not in KNOWN_OPTIMIZERS:
            known = ", ".join(cls.__name__ for cls in KNOWN_OPTIMIZERS)
            raise ScheduleError(f"the updates of {type(optimizer).__name__} are not known here: give one of {known}.")
        if oscillations or optimizer is not None:
            refuse_shards(gm, "watch its weights before it is sharded")
        self.every, self.writers = every, tuple(writers)
        self.history: list[Row] = []
        self.steps = 0
        self.looking = True
        self._sites = fake_quants(gm)
        self._seen: dict[str, Tensor] = {}
        self._shares = LambdaShares({} if optimizer is None else quantized_weights(gm), optimizer)
        self._oscillations = Oscillations(quantized_weights(gm)) if oscillations else None
        self._hooks = [site.register_forward_hook(self._look(name)) for name, site in self._sites.items()]

    def _look(self, name: str) -> Any:
        def look(fq: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            if not fq.training:
                return
            assert isinstance(fq, FakeQuant)
            self._shares.watch(name, fq, self.looking)
            if not self.looking:
                return
            with torch.no_grad():
                figures = _figures(fq, inputs[0].detach())
                before = self._seen.get(name)
                self._seen[name] = figures if before is None else before + figures

        return look

    def step(self) -> None:
        """Count one training step; call it after each, behind the optimizer's step."""
        with torch.no_grad():
            self._shares.step()
            if self._oscillations is not None:
                self._oscillations.step()
        if self.looking:
            self._collect()
        self.steps += 1
        self.looking = self.steps % self.every == 0

    def _collect(self) -> None:
        names = list(self._seen)
        if not names:
            return
        with torch.no_grad():
            some = [
                self._oscillations.take() if self._oscillations else {},
                self._shares.of_gradient(),
                self._shares.of_update(),
            ]
            figures = torch.stack([_on_device(self._sites[name], self._seen[name], name, some) for name in names])
        self._seen = {}
        rows: list[Row] = []
        for name, values in zip(names, figures.tolist(), strict=True):  # the one transfer
            row = {"step": self.steps, "site": name} | dict(zip(_FIGURES, values, strict=True))
            rows.append(row | {figure: None for figure, known in zip(_OF_SOME, some, strict=True) if name not in known})
        self.history += rows
        for writer in self.writers:
            writer.write(rows)

    def close(self) -> None:
        """Take the hooks away and close the writers."""
        for hook in self._hooks:
            hook.remove()
        for writer in self.writers:
            writer.close()
        self._hooks, self.writers = [], ()

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _figures(fq: FakeQuant, x: Tensor) -> Tensor:
    """What adds up over the forwards of a step, as ``_SEEN`` names it, float32 on the device."""
    entered = fq.enter(x)
    seen = squares(fq, entered)
    clipped = is_clipped(fq, entered).sum().to(seen.dtype)
    elements = torch.full_like(clipped, float(x.numel()))
    return torch.cat([seen, torch.stack([clipped, elements, distance(fq, entered).to(seen.dtype)])]).float()


def _on_device(fq: FakeQuant, seen: Tensor, name: str, some: list[dict[str, Tensor]]) -> Tensor:
    """A row's figures, in the order of the columns; 0 for those that were not measured."""
    clipped, elements, distances = seen[2:]
    schedule = fq.schedule
    scale, _ = fq.method.decoding()
    parts = [
        schedule.rate,
        schedule.weight_lambda,
        schedule.activation_lambda,
        relative_error(seen[:2]),
        clipped / elements.clamp(min=1),
        scale.mean(),
        distances / elements.clamp(min=1),
        *(known.get(name, torch.zeros_like(clipped)) for known in some),
    ]
    return torch.stack([part.to(seen) for part in parts])


# --- writers -------------------------------------------------------------------------------------------------------


class CSVWriter:
    """Writes rows to a CSV file with the columns of ``Telemetry``, and flushes after each interval.

    Args:
        path: of the file.

    Raises:
        OutputError: if it can not be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     writer = CSVWriter(f"{folder}/run.csv")  # for Telemetry(gm, writers=[writer])
    ...     writer.close()
    ...     read_history(f"{folder}/run.csv")
    []
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self._file = open(path_of(path, OutputError), "w", newline="", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise OutputError(f"can not write {os.fspath(path)}: {error.strerror}.") from error
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()

    def write(self, rows: list[Row]) -> None:
        """Append rows."""
        self._writer.writerows(rows)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_history(path: str | os.PathLike[str]) -> list[Row]:
    """Return the rows that a ``CSVWriter`` has written.

    Args:
        path: of the CSV file.

    Raises:
        OutputError: if the file can not be read, or holds something else.

    >>> import tempfile
    >>> import pege_fx
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/run.csv"
    ...     with pege_fx.Telemetry(gm, every=1, writers=[CSVWriter(path)]) as telemetry:
    ...         loss = gm(torch.randn(2, 4)).sum()
    ...         telemetry.step()
    ...     read_history(path)[0]["site"]
    '0.weight_fq'
    """
    try:
        with path_to_read(path, OutputError).open(newline="", encoding="utf-8") as file:
            found = csv.DictReader(file)
            if tuple(found.fieldnames or ()) != COLUMNS:
                raise OutputError(f"{os.fspath(path)} is no telemetry: its columns are not {', '.join(COLUMNS)}.")
            return [
                {"step": int(row["step"]), "site": row["site"]} | {name: _read(row, name) for name in _FIGURES} for row in found
            ]
    except OSError as error:
        raise OutputError(f"can not read {os.fspath(path)}: {error.strerror}.") from error
    except (ValueError, TypeError) as error:
        raise OutputError(f"{os.fspath(path)} is no telemetry: {error}.") from error


def _read(row: dict[str, str], name: str) -> float | None:
    """A figure of a CSV file; what was not measured is empty there."""
    return None if name in _OF_SOME and row[name] == "" else float(row[name])


class TensorBoardWriter:
    """Writes a scalar ``<figure>/<site>`` for each figure of ``Telemetry``'s rows, for TensorBoard.

    Args:
        folder: that TensorBoard reads.

    Raises:
        OutputError: if tensorboard is not installed, or the folder can not be made.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     writer = TensorBoardWriter(folder)  # for Telemetry(gm, writers=[writer])
    ...     writer.close()
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise OutputError("TensorBoardWriter needs tensorboard: pip install 'pege_fx[tensorboard]'.") from error
        try:
            self._writer = SummaryWriter(str(path_of(folder, OutputError)))
        except OSError as error:
            raise OutputError(f"can not write to the folder {os.fspath(folder)}: {error.strerror}.") from error

    def write(self, rows: list[Row]) -> None:
        """Add scalars; what is not finite, or was not measured, is left out."""
        for row in rows:
            for name in _FIGURES:
                if row[name] is not None and math.isfinite(row[name]):
                    self._writer.add_scalar(f"{name}/{row['site']}", row[name], row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
