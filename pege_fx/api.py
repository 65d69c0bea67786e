"""The front door: a model goes in, a GraphModule that trains quantized comes out, and a deployable one after it."""

import gc
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from pege_fx import passes as graph_passes
from pege_fx._utils.collectives import is_shared
from pege_fx.engines.engine import Engine, answered, engine_of
from pege_fx.errors import ModelError, PegeWarning, PolicyError
from pege_fx.inspection.diff import PassTrace
from pege_fx.inspection.summary import Explanation, other_nodes
from pege_fx.modules.fake_quant import fake_quants
from pege_fx.modules.fixed_attributes import fix
from pege_fx.modules.mode import ordinary_modes, preserve_state
from pege_fx.modules.stages import copied, graph_of, refuse_shards
from pege_fx.passes.capture.examples import fresh
from pege_fx.passes.capture.fixed import fixed_attributes
from pege_fx.passes.capture.graph_modules import stays_python
from pege_fx.passes.capture.validate import validate_conversion
from pege_fx.passes.pipeline import Pass, Pipeline, apply, run
from pege_fx.passes.program import ExampleCall, Program
from pege_fx.policy.rules import QuantPolicy
from pege_fx.training.calibration import observe

BatchNormMode = Literal["train", "freeze", "keep"]

# The calls that models were prepared from, for ``convert`` to check with; those of more bytes are not kept alive for it.
_EXAMPLES: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Mapping[str, Any]]] = WeakKeyDictionary()
_KEPT_BYTES = 2**24


def prepare_passes(policy: QuantPolicy | str, *, batch_norm: BatchNormMode = "train", seed: int = 0) -> Pipeline:
    """Return the passes of ``prepare``, a list to print, extend and reorder.

    Args:
        policy: a ``QuantPolicy``, or a short form as ``"W4A4"``.
        batch_norm: "train", "freeze" or "keep", as for ``prepare``.
        seed: of the replacement masks.

    Raises:
        PolicyError: for a short form that does not read.
        FoldError: for another ``batch_norm``.

    >>> len(prepare_passes("W4A4"))
    9
    """
    return Pipeline(
        [
            graph_passes.name_writes,
            graph_passes.normalize,
            graph_passes.infer_ranks,
            graph_passes.FoldBatchNorm(batch_norm),
            graph_passes.analyse_signs,
            graph_passes.MakePlan(_as_policy(policy)),
            graph_passes.FoldLeadingNorms(batch_norm),
            graph_passes.InsertFakeQuants(seed),
            graph_passes.verify,
        ]
    )


def convert_passes(*, integer_bias: bool = False, packed: bool = False) -> Pipeline:
    """Return the passes of ``convert``.

    Args:
        integer_bias: hold biases as int32, as for ``convert``.
        packed: hold weights packed, as for ``convert``.

    >>> [step.__name__ for step in convert_passes()][:2]
    ['drop_training_branches', 'follow_norms']
    """
    return Pipeline(
        [
            graph_passes.drop_training_branches,
            graph_passes.follow_norms,
            graph_passes.call_originals,
            graph_passes.lower_weights,
            graph_passes.lower_folds,
            graph_passes.lower_activations,
            *([graph_passes.lower_biases] if integer_bias else []),
            *([graph_passes.pack_weights] if packed else []),
            graph_passes.inline_modules,
            graph_passes.drop_unused,
        ]
    )


def steps_of_prepare(
    passes: Iterable[Pass], *, blocks: Iterable[str] = (), share_parameters: bool = False, check: bool = True
) -> list[Pass]:
    """Return all that ``prepare`` does to a program, around the passes that rewrite it."""
    return [
        graph_passes.CaptureModel(blocks, share_parameters),
        *([graph_passes.check_capture] if check else []),
        *passes,
        graph_passes.complete_plan,
    ]


def _as_policy(policy: QuantPolicy | str) -> QuantPolicy:
    if isinstance(policy, str):
        return QuantPolicy.parse(policy)
    if not isinstance(policy, QuantPolicy):
        raise PolicyError(f'{policy!r} is not a policy: give a QuantPolicy, or a short form as "W4A4".')
    return policy


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause Python's garbage collector: a growing graph makes it look at all nodes again and again, a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _example(args: Any, kwargs: Mapping[str, Any] | None) -> ExampleCall | None:
    return None if args is None and kwargs is None else _call(args, kwargs)


def _call(args: Any, kwargs: Mapping[str, Any] | None) -> ExampleCall:
    return (args,) if isinstance(args, Tensor) else tuple(args or ()), kwargs or {}


def prepare(
    model: nn.Module,
    policy: QuantPolicy | str,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    batch_norm: BatchNormMode = "train",
    seed: int = 0,
    blocks: Iterable[str] = (),
    share_parameters: bool = False,
    passes: Iterable[Pass] | None = None,
    check: bool = True,
) -> GraphModule:
    """Return a GraphModule that trains quantized: traced, BatchNorm folded, a fake-quant on every edge of the policy.

    The model itself is not changed. Until a scheduler says otherwise, every element is quantized (p = 1, λ = 0).

    Args:
        model: any ``nn.Module`` in float, in the mode (``train()``, ``eval()``) it will go on in.
        policy: a ``QuantPolicy``, or a short form as ``"W4A4"``.
        example_inputs: positional arguments of ``forward``; they calibrate the activations, and prove more folds.
        example_kwargs: keyword arguments of ``forward``.
        batch_norm: "train": batch statistics live in training, folded in evaluation; "freeze": merged into the weights
            at once; "keep": left alone.
        seed: of the replacement masks.
        blocks: patterns of module paths (as in ``Rule(match=...)``); each module that they name becomes a GraphModule of its
            own inside the whole, which sharding or activation checkpointing can wrap.
        share_parameters: hold the model's own parameters and buffers instead of copies, for models that do not fit twice.
            Training the graph then trains the model; ``prepare`` itself changes nothing of it. Move the model before, not the
            graph after: ``to()`` moves parameters for both and buffers for the graph alone.
        passes: run instead of ``prepare_passes(policy, batch_norm=..., seed=...)``.
        check: with example inputs, run what was captured beside the model, in evaluation and in training, and compare outputs,
            gradients and buffers before anything is quantized. It takes a few forward and backward passes.

    Raises:
        VerifyError: if what was captured is not what the model computes.
        PegeError: a subclass says what, where and the fix.

    >>> import torch
    >>> gm = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), "W4A4")
    >>> [node.name for node in gm.graph.nodes if node.name.endswith("_fq")]
    ['_0_weight_fq', 'input_1_fq', '_2_weight_fq', '_1_fq']
    """
    policy = _as_policy(policy)
    pipeline = prepare_passes(policy, batch_norm=batch_norm, seed=seed) if passes is None else passes
    program = Program(model=model, example=_example(example_inputs, example_kwargs))
    with ordinary_modes(), _collector_paused():
        run(program, steps_of_prepare(pipeline, blocks=blocks, share_parameters=share_parameters, check=check))
    gm, example = program.root, program.example
    # transformers.Trainer asks for this before it looks at the signature: its loss arguments are fixed as all others are.
    vars(gm)["accepts_loss_kwargs"] = example is not None and "num_items_in_batch" in example[1]
    if example is not None:
        held = [value for value in tree_leaves(example) if isinstance(value, Tensor)]
        if sum(value.numel() * value.element_size() for value in held) <= _KEPT_BYTES:
            _EXAMPLES[gm] = example
        with preserve_state(program.modules):
            observe(gm, [fresh(example)])
    fix(gm, fixed_attributes(model, gm))
    return gm


def convert(
    gm: GraphModule,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    integer_bias: bool = False,
    packed: bool = False,
    check: bool = True,
) -> GraphModule:
    """Return the deployable graph: weights as integer codes with scales, BatchNorm gone into them, in evaluation mode.

    Its outputs are those of ``gm.eval()``, bit for bit. The prepared model itself is not changed.

    Args:
        gm: a prepared model.
        example_inputs: positional arguments of ``forward``, to check the result with; default: those of ``prepare``, if it is
            the model that ``prepare`` returned and they take no more than 16 MiB.
        example_kwargs: keyword arguments of ``forward``.
        integer_bias: hold biases as int32 in the units of the accumulators (input scale times weight scale), as integer
            hardware adds them. This rounds them, so outputs move by about one such unit.
        packed: hold weight codes in as many bits as they have (see ``pege_fx.numerics.packing``); the graph unpacks them
            whenever it runs. Files are packed in any case, see ``save_deployed``.
        check: compare the result with ``gm.eval()`` on the example inputs, except with ``integer_bias``.

    Raises:
        VerifyError: if the result is not what ``gm.eval()`` computes.
        ModelError: if ``gm`` was not prepared, or no activation was ever calibrated.
        ConvertError: if a forward method does not say how it is deployed.

    >>> import torch
    >>> x = torch.randn(2, 4)
    >>> gm = prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "W4A4", x)
    >>> torch.equal(convert(gm)(x), gm.eval()(x))
    True
    """
    gm = graph_of(gm, "prepared")
    refuse_shards(gm, "pege_fx.save it, pege_fx.load the file into a model of one process, and convert that")
    sites = fake_quants(gm)
    unseen = [name for name, site in sites.items() if site.site.kind == "activation" and not site.is_calibrated]
    if unseen and len(unseen) == sum(site.site.kind == "activation" for site in sites.values()):
        raise ModelError(f"{unseen[0]} has seen no data: call pege_fx.calibrate(gm, batches), or train, before convert.")
    if unseen:
        warnings.warn(
            f"{', '.join(unseen)} never saw data: nothing that ran reached them, and their scales are arbitrary.",
            PegeWarning,
            stacklevel=2,
        )
    rates = {name: float(site.schedule.rate) for name, site in sites.items()}
    behind = min(rates, key=rates.__getitem__, default="")
    if rates.get(behind, 1.0) < 1.0:
        warnings.warn(
            f"replacement is not complete: {behind} was trained at p = {rates[behind]:.3f}; "
            "the deployed model is fully quantized.",
            PegeWarning,
            stacklevel=2,
        )
    with ordinary_modes():  # or what is made here could not be written to outside of inference mode
        deployed = copied(gm).eval()
        for site in fake_quants(deployed).values():
            if site.is_calibrated:
                site.check_method(site.calibrated.dtype, 2)
        inner = [module for module in deployed.modules() if isinstance(module, GraphModule) and not stays_python(module)]
        run(reversed(inner), convert_passes(integer_bias=integer_bias, packed=packed))
        if deployed not in inner:  # it stays Python, and has what its graphs leave behind
            run([deployed], [graph_passes.drop_unused])
    fix(deployed)
    deployed.meta["replacement"] = rates.get(behind, 1.0)
    given = example_inputs is not None or example_kwargs is not None
    example = _call(example_inputs, example_kwargs) if given else _EXAMPLES.get(gm)
    if check and example is not None and not (integer_bias or unseen or is_shared()):
        validate_conversion(gm, deployed, example)
    return deployed


def explain(
    model: nn.Module,
    policy: QuantPolicy | str,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    batch_norm: BatchNormMode = "train",
    blocks: Iterable[str] = (),
    engine: Engine | str | None = None,
) -> Explanation:
    """Return what ``prepare`` would do, without doing it: each node, the rule that decided, the bits, or why not.

    Args:
        model: any ``nn.Module`` in float.
        policy: a ``QuantPolicy``, or a short form as ``"W4A4"``.
        example_inputs: positional arguments of ``forward``; without them multiply-accumulates are not known.
        example_kwargs: keyword arguments of ``forward``.
        batch_norm: "train", "freeze" or "keep", as for ``prepare``.
        blocks: as for ``prepare``.
        engine: an engine, or its name: of each operation it is said whether that engine runs it in integers, and why not.

    Raises:
        PegeError: as ``prepare`` does.

    >>> print(explain(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "W4A4")["0"].edge("weight").spec)
    8
    """
    policy = _as_policy(policy)
    passes = prepare_passes(policy, batch_norm=batch_norm)
    carried_out = passes.index(next(step for step in passes if isinstance(step, graph_passes.InsertFakeQuants)))
    program = Program(model=model, example=_example(example_inputs, example_kwargs))
    with ordinary_modes(), _collector_paused():
        # Nobody runs these graphs: no need to lint and to compile them.
        for step in steps_of_prepare(passes[:carried_out], blocks=blocks, check=False):
            apply(step, program)
    assert program.plan is not None
    graphs = [(gm.meta.get("prefix", ""), gm) for gm in program.graphs]
    title = f"{type(model).__name__}: dry run"
    plan = program.plan if engine is None else answered(engine_of(engine), program.plan)
    return Explanation(plan, title, tuple(other_nodes(model, graphs, plan)))


def trace_passes(
    model: nn.Module,
    policy: QuantPolicy | str,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    batch_norm: BatchNormMode = "train",
    seed: int = 0,
    passes: Iterable[Pass] | None = None,
    check: bool = True,
) -> PassTrace:
    """Return what each pass of ``prepare`` does to the graph, from the one that torch.fx traced.

    Args:
        model: any ``nn.Module`` in float.
        policy: a ``QuantPolicy``, or a short form as ``"W4A4"``.
        example_inputs: positional arguments of ``forward``.
        example_kwargs: keyword arguments of ``forward``.
        batch_norm: "train", "freeze" or "keep", as for ``prepare``.
        seed: of the replacement masks.
        passes: run instead of ``prepare``'s own.
        check: as for ``prepare``.

    Raises:
        PegeError: as ``prepare`` does.

    >>> import torch
    >>> trace = trace_passes(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "W4A4", torch.randn(2, 4))
    >>> print(trace["FoldBatchNorm"].of_kind("added")[-1])
    + _0_weight_fold = 0.weight_fold(_0_weight): WeightFold()  (between _0_weight and _0)
    """
    pipeline = prepare_passes(policy, batch_norm=batch_norm, seed=seed) if passes is None else passes
    trace = PassTrace()
    prepare(model, policy, example_inputs, example_kwargs, passes=trace.watching(pipeline), check=check)
    return trace
