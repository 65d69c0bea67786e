"""Other libraries' models for quantization-aware training in W4A4, where they are installed (extra ``bench``).

All but pege_fx quantize the first and the last layer too, and torch.ao and torchao the sums of residual branches: they do a
little more. BatchNorm stays live in all of them. MQBench needs an older torch; its LSQ calls the operator of torch.ao's
learnable fake-quant.
"""

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Make = Callable[[], nn.Module]


def torch_ao(make: Make, x: Tensor, learnable: bool = False) -> nn.Module:
    """FX graph mode of torch.ao; ``learnable`` is LSQ's step size, the very operator of MQBench's LSQ."""
    from torch.ao.quantization import FakeQuantize, QConfig, QConfigMapping
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
    from torch.ao.quantization.observer import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    unsigned: dict[str, Any] = {"observer": MovingAverageMinMaxObserver, "quant_min": 0, "quant_max": 15, "dtype": torch.quint8}
    signed: dict[str, Any] = {"quant_min": -8, "quant_max": 7, "dtype": torch.qint8}
    if learnable:
        signed |= {"observer": MovingAverageMinMaxObserver, "qscheme": torch.per_tensor_symmetric, "use_grad_scaling": True}
        made = (partial(_LearnableFakeQuantize, **unsigned, use_grad_scaling=True), partial(_LearnableFakeQuantize, **signed))
    else:
        signed |= {"observer": MovingAveragePerChannelMinMaxObserver, "qscheme": torch.per_channel_symmetric}
        made = (FakeQuantize.with_args(**unsigned), FakeQuantize.with_args(**signed))
    mapping = QConfigMapping().set_global(QConfig(activation=made[0], weight=made[1]))
    return prepare_qat_fx(make().train(), mapping, (x[:8],))


def torchao_pt2e(make: Make, x: Tensor) -> nn.Module:
    """PT2E of torchao, with the XNNPACK quantizer."""
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    config = get_symmetric_quantization_config(
        is_qat=True, is_per_channel=True, act_qmin=0, act_qmax=15, weight_qmin=-8, weight_qmax=7
    )
    batch = {0: torch.export.Dim("batch", min=2)}
    exported = torch.export.export(make().train(), (x[:8],), dynamic_shapes=(batch,), strict=True).module()
    model = prepare_qat_pt2e(exported, XNNPACKQuantizer().set_global(config))
    move_exported_model_to_train(model)
    model.train = lambda mode=True: model  # an exported graph refuses the call
    return model


def brevitas(make: Make, x: Tensor) -> nn.Module:
    """Layers of Brevitas in the place of torch's, with learned scales for activations."""
    import brevitas.nn as qnn
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    settings: dict[str, Any] = {
        "weight_quant": Int8WeightPerChannelFloat,
        "weight_bit_width": 4,
        "input_quant": Int8ActPerTensorFloat,
        "input_bit_width": 4,
        "return_quant_tensor": False,
    }
    layers = {nn.Conv2d: (qnn.QuantConv2d, settings), nn.Linear: (qnn.QuantLinear, settings)}
    return layerwise_quantize(make().train(), compute_layer_map=layers)


MAKERS: dict[str, tuple[str, Callable[[Make, Tensor], nn.Module]]] = {
    "torch.ao FX": ("torch.ao.quantization.quantize_fx", torch_ao),
    "torch.ao FX, learnable (LSQ)": ("torch.ao.quantization._learnable_fake_quantize", partial(torch_ao, learnable=True)),
    "torchao PT2E": ("torchao.testing.pt2e", torchao_pt2e),
    "Brevitas": ("brevitas", brevitas),
}


def others(make: Make, x: Tensor) -> dict[str, nn.Module]:
    """Return the model of each library that is there, after one batch, so that all have seen data."""
    found = {}
    for name, (module, prepare) in MAKERS.items():
        try:
            there = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            there = False
        if not there:
            print(f"{name} is not installed: left out.")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each has something to say of the next version of another
            torch.manual_seed(0)
            found[name] = prepare(make, x)
            found[name](x)
    return found
