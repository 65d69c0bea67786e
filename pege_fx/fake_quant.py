"""The module behind every fake-quant node: a forward method, an estimator, and the schedule it shares with others."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pege_fx import functional
from pege_fx.batch_norm import Fold
from pege_fx.errors import ModelError
from pege_fx.plan import Plan
from pege_fx.processes import is_shared
from pege_fx.quantizers import Decoding, ForwardMethod, Statistics
from pege_fx.spec import ESTIMATORS, METHODS, Channels, Kind, QuantSpec


class ScheduleState(nn.Module):
    """Where a group of sites stands: 0-d tensors on the model's device, updated in place by the scheduler.

    ``rate`` p; ``weight_lambda`` and ``activation_lambda`` λ (absolute units), float32; ``refresh_key`` (int32, from the
    refresh count). They start fully quantized with λ = 0 and are not part of a ``state_dict``: the scheduler's is.

    p and λ are kept as bits, since ``half()`` rounds whatever is floating point, and float16 has no 1e-8.
    """

    rate_bits: Tensor
    weight_lambda_bits: Tensor
    activation_lambda_bits: Tensor
    refresh_key: Tensor

    def __init__(self, group: str) -> None:
        super().__init__()
        self.group = group
        self.rank = 0  # which part of a global batch this process sees; no buffer, or DDP would make it the first one's
        for name, value in (("rate", 1.0), ("weight_lambda", 0.0), ("activation_lambda", 0.0)):
            self.register_buffer(f"{name}_bits", torch.tensor(value).view(torch.int32), persistent=False)
        key = torch.tensor(functional.refresh_key(0), dtype=torch.int32)
        self.register_buffer("refresh_key", key, persistent=False)

    @property
    def rate(self) -> Tensor:
        return self.rate_bits.view(torch.float32)

    @property
    def weight_lambda(self) -> Tensor:
        return self.weight_lambda_bits.view(torch.float32)

    @property
    def activation_lambda(self) -> Tensor:
        return self.activation_lambda_bits.view(torch.float32)

    def extra_repr(self) -> str:
        return f"group={self.group!r}"


@dataclass(frozen=True, kw_only=True)
class Site:
    """Which edge a fake-quant stands on, and which rule put it there."""

    name: str
    kind: Kind
    spec: QuantSpec
    rule: str
    group: str = "default"


# The autograd node of each site's last training forward, for discretization_loss: it holds x_c and y. Weak, so that
# nothing lives longer than training needs.
_LAST_FORWARD: "weakref.WeakKeyDictionary[FakeQuant, weakref.ref[Any]]" = weakref.WeakKeyDictionary()


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
    """

    site_key: Tensor
    calibrated: Tensor

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
        self.plan: Plan | None = None  # of the whole model; fx keeps modules through copies and pickles, and little else
        self.estimator = ESTIMATORS[str(spec.estimator)]
        shape = None if weight is None else tuple(weight.shape)
        by_channel = channels if spec.granularity == "channel" else None
        self.method: ForwardMethod = METHODS[str(spec.method)](spec, site.kind, shape, by_channel)
        self.register_buffer(
            "site_key", torch.tensor(functional.site_key(seed, site.name), dtype=torch.int32), persistent=False
        )
        if self.estimator.strength != "lambda":
            self.register_buffer("strength", torch.tensor(float(self.estimator.strength)))
        self.register_buffer("calibrated", torch.tensor(False))
        self.is_calibrated = False
        self.observing = False
        self.statistics: Statistics | None = None
        self.register_load_state_dict_pre_hook(_follow_loaded_state)  # type: ignore[no-untyped-call]

    def initialize(self, statistics: Statistics) -> None:
        """Set the grid from data, by the forward method's own rule."""
        with torch.no_grad():
            self.method.initialize(statistics)
            self.calibrated.fill_(True)
        self.is_calibrated = True

    def initialize_from(self, x: Tensor) -> None:
        """Set the grid from one tensor: a weight, or the first activation. A meta tensor holds nothing and sets nothing.

        Raises:
            ModelError: while the model is being compiled, or if a weight is not finite.
        """
        if torch.compiler.is_compiling():
            raise ModelError(
                f"{self.site.name} is not calibrated, and data may not set a grid while the model is being compiled.\n"
                "  give prepare example_inputs, or call pege_fx.calibrate(gm, batches) before torch.compile."
            )
        if x.is_meta:
            return
        statistics = Statistics.of(self.enter(x), self.method.channels)
        if self.site.kind == "weight" and not statistics.all_finite:
            raise ModelError(
                f"{self.site.name.removesuffix('_fq')} has values that are not finite.\n"
                "  load a good checkpoint, or set them before the first forward."
            )
        if self.site.kind == "activation" and is_shared():
            statistics = statistics.of_all()
        self.initialize(statistics)

    def observe(self, x: Tensor) -> None:
        """Add a batch to the statistics that ``finish_observing`` initialises from."""
        if x.is_meta:
            return
        with torch.no_grad():
            seen = Statistics.of(self.enter(x), self.method.channels)
            self.statistics = seen.reduced() if self.statistics is None else self.statistics + seen

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

    def forward(self, x: Any) -> Any:
        if isinstance(x, PackedSequence):
            return x._replace(data=self(x.data))
        if self.observing and self.site.kind == "activation":
            self.observe(x)
        elif not self.is_calibrated:
            self.initialize_from(x)
        if self.observing:
            return self.leave(x, self.enter(x))
        if not self.training and not torch.is_grad_enabled():
            return self.deployed(x)
        if self.fold is not None and self.fold.live and self.method.channels is not None and self.method.is_plain:
            # A grid of step -s over w is the grid of step s over -w: one pass over the weight instead of three.
            return self._discretize(x, self.fold.broadcast(self.fold.sign(), x))
        result = self.leave(x, self.method.restore(self._discretize(self.enter(x)))).to(x.dtype)
        if self.training:
            return result
        # The gradient of ``result`` with the value of ``deployed``: they differ by rounding, so the sum is exact.
        return result + (self.deployed(x) - result).detach()

    def _discretize(self, x: Tensor, sign: Tensor | None = None) -> Tensor:
        if self.training:
            self.method.observe(x)
        continuous = self.method.transform(x)
        scale, zero_point = self.method.step()
        replaced = functional.fake_quantize(
            continuous,
            scale if sign is None else scale * sign,
            self.site.spec,
            zero_point=zero_point,
            rate=self.schedule.rate if self.training else None,
            key=self._key_of(x) if self.training else None,
            strength=self._strength(),
            scale_gradient=self.method.scale_gradient(x),
        )
        if self.training and not torch.compiler.is_compiling() and replaced.grad_fn is not None:
            _LAST_FORWARD[self] = weakref.ref(replaced.grad_fn)
        return replaced

    def codes(self, x: Tensor) -> Tensor:
        """Return the integer codes of ``x`` (as floating point), as evaluation and ``convert`` use them."""
        if self.site.kind == "activation":
            encoding = self.method.encoding()
            interval = None if encoding.lower is None or encoding.width is None else (encoding.lower, encoding.width)
            return functional.codes_of(x, encoding.scale, self.site.spec.bounds, encoding.zero_point, interval)
        scale, zero_point = self.method.step()
        return functional.codes_of(self.method.transform(self.enter(x)), scale, self.site.spec.bounds, zero_point)

    def decoding(self) -> Decoding:
        """What the codes stand for, with the BatchNorm folded in."""
        scale, zero_point = self.method.decoding()
        if self.fold is not None and not self.fold.live and self.method.channels is not None:
            assert self.method.shape is not None
            factor = self.fold.factor().abs()
            scale = scale * self.fold.channels.broadcast(factor, self.method.shape)
        return Decoding(scale, zero_point)

    def deployed(self, x: Tensor) -> Tensor:
        """Return what a converted model computes for ``x``: the value of its code."""
        scale, zero_point = self.decoding()
        codes = self.codes(x).to(functional.compute_dtype(x))
        value = codes if zero_point is None else codes - zero_point
        return (value * scale.to(value.dtype)).to(x.dtype)

    # A folded weight is quantized with the sign of its BatchNorm's factor k, so that scale * |k| is positive: with one
    # scale per channel that is the grid of the folded weight k * w itself, and +-1 changes no bit. With one scale per
    # tensor the grid is that of k * w, and training divides by k again.

    def enter(self, x: Tensor) -> Tensor:
        """What the forward method sees of ``x``: a folded weight with the sign of k (or times k)."""
        if self.fold is None:
            return x
        factor = self.fold.sign() if self.method.channels is not None else self.fold.factor()
        return x * self.fold.broadcast(factor, x).to(x.dtype)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Undo ``enter`` while the BatchNorm is live; else complete the fold to k * w."""
        if self.fold is None:
            return y
        factor = self.fold.sign() if self.method.channels is not None else self.fold.factor()
        if self.fold.live:
            return y / self.fold.broadcast(factor, x).to(y.dtype)
        return y * self.fold.broadcast(self.fold.factor() / factor, x).to(y.dtype)

    def _strength(self) -> Tensor:
        if self.estimator.strength != "lambda":
            strength: Tensor = self.get_buffer("strength")
            return strength
        return self.lambda_

    @property
    def lambda_(self) -> Tensor:
        """The schedule's λ for this kind of edge, 0-d."""
        return self.schedule.weight_lambda if self.site.kind == "weight" else self.schedule.activation_lambda

    @property
    def key(self) -> Tensor:
        """The key of the masks at the present refresh count, 0-d int32."""
        return self.site_key ^ self.schedule.refresh_key

    def _key_of(self, x: Tensor) -> Tensor:
        """The key for a tensor: on a further rank, an activation's elements are numbered on from those of the ranks before."""
        if self.site.kind == "weight" or self.schedule.rank == 0:
            return self.key
        first = functional.as_int32(self.schedule.rank * x.numel())
        return torch.stack([self.key, torch.full_like(self.key, first)])

    def last_forward(self) -> tuple[Tensor, Tensor] | None:
        """x_c and y of the last training forward, while autograd still keeps them; else None."""
        reference = _LAST_FORWARD.get(self)
        node = reference() if reference is not None else None
        if node is None:
            return None
        try:
            x, y, *_ = node.saved_tensors
        except RuntimeError:  # backward has freed them
            return None
        return x, y

    def extra_repr(self) -> str:
        spec = self.site.spec
        sign = "signed" if spec.signed else "unsigned"
        words = [f"{spec.bits} bits", sign, f"per {spec.granularity}", str(spec.method), str(spec.estimator)]
        if self.site.group != "default":
            words.append(f"schedule {self.site.group!r}")
        return ", ".join(words)


def _follow_loaded_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Calibration is part of the state: a state without it, whole or in part, has the next forward initialise anew.

    (torch shows a module the keys below its own prefix alone, so the site can not tell whether its weight is among them.)
    """
    assert isinstance(module, FakeQuant)
    loaded = state.get(f"{prefix}calibrated")
    module.is_calibrated = bool(loaded) if isinstance(loaded, Tensor) else False
    if not module.is_calibrated:
        module.calibrated.fill_(False)


def fake_quants(module: nn.Module) -> dict[str, FakeQuant]:
    """Return every fake-quant of a module by its path, each once."""
    return {name: child for name, child in module.named_modules() if isinstance(child, FakeQuant)}
