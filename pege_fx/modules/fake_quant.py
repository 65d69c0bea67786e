"""The module behind every fake-quant node: a forward method, an estimator, and the schedule it shares with others."""

import itertools
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

from pege_fx._utils.collectives import is_shared
from pege_fx.errors import CheckpointError, ModelError
from pege_fx.kernels.inductor import has_memory, is_traced
from pege_fx.modules import dynamic_methods, methods  # noqa: F401 (what they define registers itself)
from pege_fx.modules.batch_norm import Fold
from pege_fx.modules.deployed_weights import deployed_once, forget
from pege_fx.modules.forward_method import Decoding, ForwardMethod, Statistics
from pege_fx.modules.method_check import check_method, is_own
from pege_fx.modules.schedule_state import ScheduleState, version_of
from pege_fx.numerics import discretizer, functional
from pege_fx.numerics.discretizer import value_of
from pege_fx.numerics.functional import codes_of
from pege_fx.numerics.layouts import Channels, Kind
from pege_fx.numerics.spec import ESTIMATORS, METHODS, QuantSpec
from pege_fx.policy.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Site:
    """Which edge a fake-quant stands on, and which rule put it there.

    ``inputs``: for one scale shared by several inputs of an operation, the nodes that these read.
    """

    name: str
    kind: Kind
    spec: QuantSpec
    rule: str
    group: str = "default"
    inputs: tuple[str, ...] = ()


# The autograd nodes of each site's last training forward (one for each of its inputs), for discretization_loss: they hold
# x_c and y. Weak, so that nothing lives longer than training needs.
_LAST_FORWARD: "weakref.WeakKeyDictionary[FakeQuant, list[weakref.ref[Any]]]" = weakref.WeakKeyDictionary()


class FakeQuant(nn.Module):
    """Fake quantization of one edge.

    Args:
        site: name, kind and resolved spec.
        schedule: shared by all sites of a schedule group.
        seed: of the run; with the site's name it keys the masks.
        weight: the weight it will see (activations: None); gives shape, device and the method's first state.
        channels: where the weight keeps its output channels.
        fold: the BatchNorm folded into the weight.

    In training, elements are replaced at the schedule's rate. In evaluation all are (p = 1), and a weight comes out
    with its BatchNorm folded in: the values that ``convert`` deploys, bit for bit.

    One scale for several inputs of an operation is one fake-quant, called once for each: ``fq(x, 0, y)``, then ``fq(y, 1)``.
    The first call sees them all, so that the grid is set from all of them together; each input has masks of its own.

    >>> import pege_fx
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> pege_fx.fake_quants(gm)["0.weight_fq"].site.kind
    'weight'
    """

    site_key: Tensor
    calibrated: Tensor
    observing = False
    statistics: Statistics | None = None
    recompute = False  # y is not kept for backward, but made again there
    merged: tuple[str, ...] = ()  # statistics of BatchNorms that are merged: keys that a state of this model does not have
    is_computed = False  # the weight is a tensor of its own in every call: there is nothing to keep for the next one
    plan: Plan | None = None  # of the whole model; fx keeps modules through copies and pickles, and little else

    def __init__(
        self,
        site: Site,
        schedule: ScheduleState,
        *,
        seed: int,
        weight: Tensor | None = None,
        channels: Channels | None = None,
        fold: Fold | None = None,
    ) -> None:
        super().__init__()
        spec = site.spec
        self.site, self.schedule, self.fold = site, schedule, fold
        self.estimator = ESTIMATORS[str(spec.estimator)]
        shape = None if weight is None else tuple(weight.shape)
        self.method: ForwardMethod = METHODS[str(spec.method)](spec, site.kind, shape, channels)
        self.register_buffer(
            "site_key", torch.tensor(functional.site_key(seed, site.name), dtype=torch.int32), persistent=False
        )
        if self.estimator.strength != "lambda":
            self.register_buffer("strength", torch.tensor(float(self.estimator.strength)))
        # A number, not a bool, which no average can subtract: above 0 if the grid, or one that it is an average of, was set.
        self.register_buffer("calibrated", torch.tensor(1.0 if self.method.is_dynamic else 0.0))
        # What the method was found to deploy as it trains; None: nothing to find out.
        self._checked: set[tuple[torch.dtype, int | None]] | None = None if is_own(self.method) else set()
        self._calibrated, self._read = self.method.is_dynamic, (self.calibrated, version_of(self.calibrated))
        self.register_load_state_dict_pre_hook(_follow_loaded_state)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_has_loaded_state)  # type: ignore[no-untyped-call]

    @property
    def is_calibrated(self) -> bool:
        """Whether the grid was set from data: the buffer ``calibrated``, which is asked when somebody wrote it since.

        A tensor in its place that nobody wrote (moved, or empty after ``to_empty``) says nothing new.
        """
        if not is_traced():
            tensor, version = self.calibrated, version_of(self.calibrated)
            known, before = self._read
            if version is not None and (version != before if tensor is known else version > 0) and not tensor.is_meta:
                self._calibrated = bool(tensor > 0)
                self.schedule.notice_writes()
            self._read = tensor, version
        return bool(self._calibrated)

    @is_calibrated.setter
    def is_calibrated(self, value: bool) -> None:
        self._calibrated, self._read = value, (self.calibrated, version_of(self.calibrated))

    def initialize(self, statistics: Statistics) -> None:
        """Set the grid from data, by the forward method's own rule."""
        with torch.no_grad():
            self.method.initialize(statistics)
            self.calibrated.fill_(1.0)
        self.is_calibrated = True
        self.check_method(self.calibrated.dtype, None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = state.get("is_calibrated")
        super().__setstate__({name: value for name, value in state.items() if name != "is_calibrated"})  # type: ignore[no-untyped-call]
        if before is not None:  # pickled when the flag was an attribute, and its buffer a bool
            self.calibrated = self.calibrated.to(torch.float32)
            self.is_calibrated, self._checked = before, set()

    def check_method(self, dtype: torch.dtype, rank: int | None) -> None:
        """Compare what the method trains with what would be deployed, once for each dtype, mode and number of dimensions.

        Raises:
            ConvertError: if they are two functions.
        """
        if self._checked is None or (dtype, rank) in self._checked or is_traced() or self.calibrated.is_meta:
            return
        check_method(self.method, self.site.name, dtype, rank)
        self._checked.add((dtype, rank))

    def initialize_from(self, *inputs: Tensor) -> None:
        """Set the grid from a weight, or from the first activation of each input. Meta tensors hold nothing and set nothing.

        Raises:
            ModelError: while the model is being compiled, if a weight is not finite, or for an input of whole numbers.
        """
        if is_traced():
            raise ModelError(
                f"{self.site.name} is not calibrated, and data may not set a grid while the model is being compiled.\n"
                "  give prepare example_inputs, or call pege_fx.calibrate(gm, batches) before torch.compile."
            )
        if any(x.is_meta for x in inputs):
            return
        statistics = self._statistics(*map(below_transforms, inputs))
        if self.site.kind == "weight" and not statistics.all_finite:
            raise ModelError(
                f"{self.site.name.removesuffix('_fq')} has values that are not finite.\n"
                "  load a good checkpoint, or set them before the first forward."
            )
        if self.site.kind == "activation" and is_shared():
            statistics = statistics.of_all()
        self.initialize(statistics)

    def observe(self, *inputs: Tensor) -> None:
        """Add a batch to the statistics that ``finish_observing`` initialises from."""
        if any(x.is_meta for x in inputs):
            return
        with torch.no_grad():
            seen = self._statistics(*map(below_transforms, inputs))
            self.statistics = seen.reduced() if self.statistics is None else self.statistics + seen

    def _statistics(self, x: Tensor, *others: Tensor) -> Statistics:
        for value in (x, *others):
            if not value.is_floating_point():
                raise ModelError(
                    f"{self.site.name} got a {value.dtype} tensor, and quantizes floating-point ones.\n"
                    "  give prepare example_inputs, which tell where whole numbers are; or leave that operation out by a rule."
                )
        return sum(map(Statistics.of, others), start=Statistics.of(self.enter(x), self.method.tiling))

    def share_observations(self) -> None:
        """Add what other processes observed; all of them take part, those too that saw nothing."""
        if self.site.kind == "activation" and is_shared():
            nothing = Statistics.of(torch.empty(0, device=self.site_key.device))
            seen = (self.statistics or nothing).of_all()
            self.statistics = seen if bool(seen.count > 0) else None

    def finish_observing(self) -> None:
        """Initialise from what was observed since, if anything was."""
        self.observing = False
        if self.statistics is not None:
            self.initialize(self.statistics)
        self.statistics = None

    def forward(self, x: Any, number: int = 0, *others: Tensor) -> Any:
        """Return ``x`` fake-quantized.

        Args:
            x: of any shape, or a packed sequence.
            number: which of several inputs on one scale it is.
            others: with the first of them, the rest: what the grid is to fit, too.
        """
        if isinstance(x, PackedSequence):
            return x._replace(data=self(x.data))
        if number == 0:
            self._see(x, *others)
        if self.observing:
            return self.leave(x, self.enter(x))
        self.check_method(x.dtype, x.ndim)
        if not self.training and not torch.is_grad_enabled():
            return self._deployed_weight(x) if self.site.kind == "weight" else self.deployed(x)
        if self.fold is not None and self.fold.live and self._takes_sign and self.method.is_plain:
            # A grid of step -s over w is the grid of step s over -w: one pass over the weight instead of three.
            return self._discretize(x, sign=self.fold.broadcast(self.fold.sign(), x))
        result = self.leave(x, self.method.restore(self._discretize(self.enter(x), number, others))).to(x.dtype)
        if self.training:
            return result
        # The gradient of ``result`` with the value of ``deployed``: they differ by rounding, so the sum is exact.
        return result + (self.deployed(x) - result).detach()

    def _see(self, *inputs: Tensor) -> None:
        """Look at what comes, where the grid is to be set by it."""
        if self.observing and self.site.kind == "activation":
            self.observe(*inputs)
        elif not self.is_calibrated:
            self.initialize_from(*inputs)

    def _discretize(self, x: Tensor, number: int = 0, others: tuple[Tensor, ...] = (), sign: Tensor | None = None) -> Tensor:
        if self.training and number == 0:
            self._show_method(torch.cat([value.flatten() for value in (x, *others)]) if others else x, sign)
        continuous, tiling = self.method.transform(x), self.method.tiling
        scale, zero_point, inverse = self.method.grid_of(continuous)
        # Compiled code and captured graphs outlive p = 1, and do not ask. Eager mode saves itself the hash.
        masked = self.training and (_is_recorded(x) or not self.schedule.is_complete)
        recompute, quantized = self.recompute and self.training, functional.fake_quantize
        if recompute and torch.compiler.is_compiling():  # this is how a compiler is told, and it tells the operations behind
            quantized = partial(checkpoint, functional.fake_quantize, use_reentrant=False, preserve_rng_state=False)
            recompute = False
        replaced = quantized(
            tiling.tiles(continuous),
            scale if sign is None else scale * sign,
            self.site.spec,
            zero_point=zero_point,
            inverse=inverse,
            rate=self.schedule.rate if masked else None,
            key=self._key_of(x, number) if masked else None,
            strength=self._strength(),
            scale_gradient=self.method.scale_gradient(x),
            recompute=recompute,
        )
        if self.training and not torch.compiler.is_compiling() and hasattr(replaced.grad_fn, "recompute"):
            before = _LAST_FORWARD.get(self, []) if number else []
            _LAST_FORWARD[self] = [*before, weakref.ref(replaced.grad_fn)]
        return tiling.untiled(replaced, continuous)

    def _show_method(self, x: Tensor, sign: Tensor | None) -> None:
        """Let the method see a training batch, as evaluation will quantize it: a weight with the sign of its fold."""
        if sign is not None and type(self.method).observe is not ForwardMethod.observe:
            x = x * sign.to(x.dtype)
        self.method.observe(x)

    def evaluated(self, x: Tensor) -> tuple[Tensor, Decoding]:
        """Return the levels of ``x`` in units of the scale and what they stand for, as evaluation and ``convert`` use them.

        Both are laid out as the tiles of the site's layout; of whole numbers the levels are the codes, as floating point.
        """
        method, number_format = self.method, self.site.spec.number_format
        if method.is_dynamic or self.site.kind == "weight":
            continuous = method.transform(self.enter(x))
            scale, zero_point, inverse = method.grid_of(continuous)
            levels = codes_of(method.tiling.tiles(continuous), scale, number_format, zero_point, inverse=inverse)
            return levels, Decoding(scale, zero_point) if method.is_dynamic else self.decoding()
        encoding = method.encoding()
        interval = None if encoding.lower is None or encoding.width is None else (encoding.lower, encoding.width)
        return codes_of(x, encoding.scale, number_format, encoding.zero_point, interval), self.decoding()

    def codes(self, x: Tensor) -> Tensor:
        """Return the level of each element in units of the scale, as floating point; of whole numbers these are the codes."""
        return self.method.tiling.untiled(self.evaluated(x)[0], x)

    def decoding(self) -> Decoding:
        """What the codes of a method that is not dynamic stand for, with the BatchNorm folded in."""
        scale, zero_point = self.method.decoding()
        if self.fold is not None and not self.fold.live and self._takes_sign:
            tiling, factor = self.method.tiling, self.fold.factor().abs()
            assert self.method.shape is not None
            if tiling.layout.of_matrix:
                scale = tiling.broadcast(scale.reshape(tiling.scale_shape) * factor[:, None])
            else:
                scale = scale * self.fold.channels.broadcast(factor, self.method.shape)
        return Decoding(scale, zero_point)

    @property
    def _takes_sign(self) -> bool:
        """Whether a folded weight is quantized with the sign of its BatchNorm's factor alone.

        Its size then multiplies the scale: no two output channels share one, and a scale may be any number.
        """
        return self.method.tiling.by_channel and not self.method.is_dynamic and self.site.spec.scale == "float32"

    def span(self, x: Tensor) -> Tensor:
        """The width of the grid in units of what comes out in training; broadcasts to ``x``."""
        tiling, limits = self.method.tiling, self.site.spec.number_format.limits
        step = self.evaluated(x.detach())[1].scale
        width = step.detach().abs() * (limits[1] - limits[0])
        if tiling.layout.of_matrix:
            width = tiling.untiled(width.expand_as(tiling.tiles(x)), x)
        if self.fold is not None and self.fold.live and not self._takes_sign:
            width = width / self.fold.broadcast(self.fold.factor().abs(), x)  # the grid is that of k * w
        return width

    def deployed(self, x: Tensor) -> Tensor:
        """Return what a converted model computes for ``x``: the value of its code, without a BatchNorm that is live."""
        levels, (scale, zero_point) = self.evaluated(x)
        levels = levels.to(functional.compute_dtype(x))
        value = self.method.tiling.untiled(value_of(levels, scale.to(levels.dtype), zero_point), x)
        if self.fold is not None and self.fold.live:  # a BatchNorm that normalises while its layer is in evaluation
            value = self.leave(x, value)
        return value.to(x.dtype)

    def _deployed_weight(self, x: Tensor) -> Tensor:
        if self.is_computed or _is_recorded(x):
            return self.deployed(x)
        return deployed_once(self, x, self.method, self.fold, self.deployed)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; what was kept for evaluation goes, and ``is_calibrated`` is asked before a compiler may."""
        forget(self)
        self._calibrated = self.is_calibrated
        self._checked = None if is_own(self.method) else set()
        return super().train(mode)

    # A folded weight is quantized with the sign of its BatchNorm's factor k, so that scale * |k| is positive: with one
    # scale per channel that is the grid of the folded weight k * w itself, and +-1 changes no bit. With one scale per
    # tensor the grid is that of k * w, and training divides by k again.

    def enter(self, x: Tensor) -> Tensor:
        """What the forward method sees of ``x``: a folded weight with the sign of k (or times k)."""
        if self.fold is None:
            return x
        factor = self.fold.sign() if self._takes_sign else self.fold.factor()
        return x * self.fold.broadcast(factor, x).to(x.dtype)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Undo ``enter`` while the BatchNorm is live; else complete the fold to k * w."""
        if self.fold is None:
            return y
        factor = self.fold.sign() if self._takes_sign else self.fold.factor()
        if self.fold.live:
            return y / self.fold.broadcast(factor, x).to(y.dtype)
        return y * self.fold.broadcast(self.fold.factor() / factor, x).to(y.dtype)

    def _strength(self) -> Tensor:
        if self.estimator.strength != "lambda":
            strength: Tensor = self.get_buffer("strength")
            return strength
        if self.schedule.is_scaled and not self.estimator.is_relative:
            return self.lambda_ * self.schedule.loss_scale
        return self.lambda_

    @property
    def lambda_(self) -> Tensor:
        """The schedule's λ for this kind of edge, 0-d."""
        return self.schedule.weight_lambda if self.site.kind == "weight" else self.schedule.activation_lambda

    @property
    def key(self) -> Tensor:
        """The key of the masks at the present refresh count, 0-d int32."""
        return self.site_key ^ self.schedule.refresh_key

    def _key_of(self, x: Tensor, number: int) -> Tensor:
        """The key for a tensor: each input of several has its own.

        On a further rank, an activation's elements are numbered on from those of the ranks before.
        """
        key = self.key ^ functional.as_int32(functional.mix32(functional.mix32(number))) if number else self.key
        if self.site.kind == "weight" or self.schedule.rank == 0:
            return key
        first = functional.as_int32(self.schedule.rank * x.numel())
        return torch.stack([key, torch.full_like(key, first)])

    def last_nodes(self) -> list[Any]:
        """The autograd nodes of the last training forward, one for each input, while they live."""
        return [node for reference in _LAST_FORWARD.get(self, []) if (node := reference()) is not None]

    def last_forward(self) -> tuple[Tensor, Tensor] | None:
        """x_c and y of the last training forward, while autograd still keeps them; else None. Several inputs come flat."""
        try:
            seen = [discretizer.continuous_and_replaced(node) for node in self.last_nodes()]
        except RuntimeError:  # backward has freed them
            return None
        if len(seen) < 2:
            return seen[0] if seen else None
        x, y = (torch.cat([value.flatten() for value in values]) for values in zip(*seen, strict=True))
        return x, y

    def extra_repr(self) -> str:
        spec = self.site.spec
        sign = [] if spec.format is not None else ["signed" if spec.signed else "unsigned"]
        words = [f"{spec.bits} bits" if spec.format is None else str(spec.format), *sign, f"per {spec.granularity}"]
        words += [str(spec.method), str(spec.estimator)]
        if self.site.inputs:
            words.append(f"one scale for {', '.join(self.site.inputs)}")
        if self.recompute:
            words.append("made again in backward")
        if self.site.group != "default":
            words.append(f"schedule {self.site.group!r}")
        return ", ".join(words)


def below_transforms(x: Tensor) -> Tensor:
    """Return the tensor that ``torch.func``'s vmap and grad have wrapped: all samples of a batch."""
    return x if has_memory(x) else torch.func.debug_unwrap(x)


def _is_recorded(x: Tensor) -> bool:
    """Tell whether what runs now is compiled, or captured as a CUDA graph: it runs again without this Python."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _follow_loaded_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Calibration is part of the state: a state without it, whole or in part, has the next forward initialise anew.

    (torch shows a module the keys below its own prefix alone, so the site can not tell whether its weight is among them.)
    """
    assert isinstance(module, FakeQuant)
    loaded = state.get(f"{prefix}calibrated")
    is_calibrated = bool(loaded) if isinstance(loaded, Tensor) else False
    if isinstance(loaded, Tensor) and loaded.dtype is torch.bool:  # as it was stored before
        state[f"{prefix}calibrated"] = loaded.to(torch.float32)
    if not is_calibrated:
        module.calibrated.fill_(0.0)
    module.is_calibrated = is_calibrated
    for name, parameter in module.method.named_parameters():
        key = f"{prefix}method.{name}"
        if isinstance(value := state.get(key), Tensor) and value.ndim == 0 and parameter.shape == (1,):
            state[key] = value.reshape(1)  # a state of when one value per tensor was 0-d


def _has_loaded_state(module: nn.Module, keys: Any) -> None:
    """What was loaded was read before; a BatchNorm that nobody merged is refused: pickles of before have no ``MergedNorm``."""
    assert isinstance(module, FakeQuant)
    module.is_calibrated = module._calibrated
    for found, merged in itertools.product(keys.unexpected_keys, module.merged):
        if f".{found}".endswith(f".{merged}"):
            raise CheckpointError(
                f"the state has {found}, of a BatchNorm that is merged here: its weights are not those of this model.\n"
                "  load it before the model is pickled, or prepare the model anew and load it then."
            )


def fake_quants(module: nn.Module) -> dict[str, FakeQuant]:
    """Return every fake-quant of a module by its path, each once.

    Args:
        module: any module; one that was not prepared has none.

    >>> import pege_fx
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> gm = pege_fx.prepare(model, "W4A4", torch.randn(2, 4))
    >>> list(pege_fx.fake_quants(gm))
    ['0.weight_fq', '2.weight_fq', 'input_1_fq', '_1_fq']
    """
    return {name: child for name, child in module.named_modules() if isinstance(child, FakeQuant)}
