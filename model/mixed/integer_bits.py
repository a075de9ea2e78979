"""Which numbers of bits engines multiply as integers, by what an export would write."""

from __future__ import annotations

from collections.abc import Sequence

from utils.config.methods import EVEN

ENGINES = ("onnxruntime", "openvino")


def integer_bits(widths: Sequence[int]) -> tuple[int, ...]:
    """Those of some numbers of bits, the same for weight and input, at which an exported layer multiplies integers.

    A layer is asked whose weight and input reach all levels, from zero up for the input, as behind a ReLU. The files
    for onnxruntime and OpenVINO have the same integers.

    Example:
        >>> from model.mixed.integer_bits import integer_bits
        >>> integer_bits((8, 4, 2))
        (4, 2)
    """
    return tuple(width for width in widths if _multiplied(width))


def _multiplied(width: int) -> bool:
    import torch
    from torch import nn

    from model.convert import quantize
    from model.deploy.codes import activation_codes, weight_codes
    from model.deploy.onnx_qdq import integer_weight
    from model.layers.quantized import QuantLinear
    from model.quant import QuantConfig, QuantizerConfig

    network = nn.Sequential(nn.Linear(2 ** (width + 1), 1))
    values = torch.linspace(-1, 1, 2 ** (width + 1))[None]
    config = QuantConfig(
        fm=QuantizerConfig(tag="fm", enable=True, method=EVEN, levels=2**width, half_range=True),
        wt=QuantizerConfig(tag="wt", enable=True, method=EVEN, levels=2**width), first_last=True,
    )  # fmt: skip
    quantize(network, config, layer_bits=[{"name": "0", "bit": width}])
    layer = network[0].eval()
    assert isinstance(layer, QuantLinear)
    with torch.no_grad():
        layer.weight.copy_(values)
        for _, quantizer in layer.quantizers():
            quantizer.set_range(torch.ones_like(quantizer.current_range()))
        entering = activation_codes("input", layer.quant_activation, values)  # pyright: ignore[reportArgumentType]
        weight = weight_codes("weight", layer.quant_weight, layer.weight)  # pyright: ignore[reportArgumentType]
    return entering.integer and integer_weight(weight, entering.highest + entering.zero_point)
