"""The public interface of the quantizers, for other programs and for methods of a user's own.

Importing this module registers every method of the project.
"""

from model.layers.convolution import QuantConv1d, QuantConv2d, QuantConvolution
from model.layers.quantized import (
    QuantLayer,
    QuantLinear,
    full_precision_reason,
    keep_full_precision,
    quantized_layers,
    quantized_weights,
    quantizers,
)
from model.quantizers import (  # noqa: F401  (registers what a configuration can name)
    apot,
    dorefa,
    ewgs,
    fatnn,
    lq,
    lsq,
    lsqplus,
    n2uq,
    pact,
    reactnet,
    stableqat,
    xnor,
)
from model.quantizers.frame import Quantizer
from model.quantizers.grid import ClipSTE, Grid, encode_on_grid
from model.quantizers.integers import QuantizedTensor
from model.quantizers.learned_range import LearnedRange
from model.quantizers.registry import build_quantizer, methods, register
from model.quantizers.site import LayerSite
from utils.config.methods import MethodRecord
from utils.config.schema import QuantConfig, QuantizerConfig

# Their names before version 1.0, for programs that import them.
Integers = QuantizedTensor
TensorSite = LayerSite

__all__ = [
    "ClipSTE",
    "Grid",
    "Integers",
    "LayerSite",
    "LearnedRange",
    "MethodRecord",
    "QuantConfig",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConvolution",
    "QuantLayer",
    "QuantLinear",
    "QuantizedTensor",
    "Quantizer",
    "QuantizerConfig",
    "build_quantizer",
    "encode_on_grid",
    "full_precision_reason",
    "keep_full_precision",
    "methods",
    "quantized_layers",
    "quantized_weights",
    "quantizers",
    "register",
]
