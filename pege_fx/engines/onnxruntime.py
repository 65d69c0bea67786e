"""ONNX Runtime on a CPU: what its integer kernels ask for, a file that reaches them, and what it makes of the file."""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import GraphModule

from pege_fx._utils.files import path_to_read
from pege_fx.engines.engine import Profile, Refusal
from pege_fx.errors import ExportError
from pege_fx.export import export_onnx, need_onnx, verify_export
from pege_fx.passes.operators import operators
from pege_fx.policy.plan import Operation, Plan
from pege_fx.policy.rules import UNSET, QuantPolicy, Rule

if TYPE_CHECKING:
    from pege_fx.export.verify import ExportReport

_JOINS = ("add", "sub", "mul", "cat", "stack")  # between layers in integers; in float they would part them
_TAKEN = {entry.name for entry in operators() if entry.integer is not None and not entry.transposed}
_MULTIPLIES = {"QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger"}
_MULTIPLIES |= {"DynamicQuantizeMatMul", "QAttention"}
_IN_FLOAT = {"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
_CALLS = 5


class OnnxRuntime:
    """ONNX Runtime's kernels for 8 bits: layers whose input, weight and output are codes.

    Sums, products and concatenations between layers are quantized too, so that what a layer gives is codes again; activations
    are uint8, bounds are those of codes. Convert with ``integer_bias=True``: a float bias keeps a layer in float.
    """

    name = "onnxruntime"

    def policy(self, bits: str, **options: Any) -> QuantPolicy:
        """Return the policy of a short form, with sums, products and concatenations quantized as inputs are.

        >>> print(*OnnxRuntime().policy("W8A8").rules[-2:], sep=chr(10))
        Rule(function='cat', input='8', optional=True)
        Rule(function='stack', input='8', optional=True)
        """
        policy = QuantPolicy.parse(bits, **options)
        joined = policy.rules[0].input
        if joined is UNSET:  # weights alone
            return policy
        return QuantPolicy((*policy.rules, *(Rule(function=name, input=joined, optional=True) for name in _JOINS)))

    def refuses(self, plan: Plan) -> list[Refusal]:
        """Return the layers and products that stay in float, and why."""
        found = [(operation, _why_not(operation)) for operation in plan.operations if operation.macs != 0]
        return [Refusal(operation.path, operation.function, reason) for operation, reason in found if reason]

    def export(
        self,
        deployed: GraphModule,
        path: str | os.PathLike[str],
        example_inputs: tuple[Any, ...] | Tensor = (),
        **options: Any,
    ) -> int:
        """Write ONNX with uint8 activations; ``options`` are those of ``export_onnx``."""
        need_onnx()
        from pege_fx.export.styles import CodeStyle

        style = CodeStyle("onnxruntime", packed=True, unsigned=True)
        return export_onnx(deployed, path, example_inputs, **({"style": style} | options))

    def verify(self, deployed: GraphModule, path: str | os.PathLike[str], batches: Iterable[Any]) -> "ExportReport":
        """Return the verdict of ``verify_export``."""
        return verify_export(deployed, path, batches)

    def profile(self, path: str | os.PathLike[str], example_inputs: tuple[Any, ...] | Tensor) -> Profile:
        """Count the operators of the model that ONNX Runtime's optimizer makes, and time a call in one thread."""
        need_onnx()
        import onnx
        import onnxruntime

        from pege_fx.export.calls import tensors_of
        from pege_fx.export.runs import as_array

        given = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            try:
                session = onnxruntime.InferenceSession(
                    path_to_read(path, ExportError).read_bytes(), options, providers=["CPUExecutionProvider"]
                )
                nodes = onnx.load(options.optimized_model_filepath).graph.node
                names = [value.name for value in session.get_inputs()]
                feed = dict(zip(names, map(as_array, tensors_of((given, {}))), strict=True))
                seconds = median(_timed(lambda: session.run(None, feed)) for _ in range(_CALLS))
            except Exception as error:
                raise ExportError(f"ONNX Runtime can not run {path}: {type(error).__name__}: {error}") from error
        kernels = Counter(node.op_type for node in nodes)
        integer, floating = (sum(kernels[kind] for kind in kinds) for kinds in (_MULTIPLIES, _IN_FLOAT))
        return Profile(dict(kernels), integer, floating, seconds)


def _timed(call: Any) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _why_not(operation: Operation) -> str:
    """Why an operation stays in float; "" if it does not."""
    if not operation.edges:
        return operation.reason
    if operation.function not in _TAKEN:
        return f"ONNX Runtime has no integer kernel for {operation.function} on a CPU"
    for edge in (*operation.weights, *operation.inputs):
        if edge.spec is None:
            return f"its {edge.operand} is float: {edge.reason}"
        if edge.spec.bits != 8:
            return f"its {edge.operand} has {edge.spec.bits} bits; ONNX Runtime multiplies codes of 8 bits"
    return ""
