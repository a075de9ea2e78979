#!/usr/bin/env bash
# LiteRT (ai-edge-litert 2.3.0), CPU interpreter: a convolution of floats whose weights are constants of INT2, with a
# scale for each output channel.
# Expected: what constants of INT8 and INT4 with the same codes give, or a refusal when the file is loaded.
# Seen: INT8 and INT4 are right; INT2 is accepted and answered wrongly (by numbers that are none), with XNNPACK and
# without. With a DEQUANTIZE between the constant and the convolution INT2 is right, too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  ai-edge-litert==2.3.0 flatbuffers==25.12.19 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as s
from ai_edge_litert.interpreter import Interpreter, OpResolverType

rng = np.random.default_rng(0)
codes = rng.integers(-2, 2, (8, 3, 3, 16)).astype(np.int8)
scale = (rng.random(8) + 0.5).astype(np.float32)
image = rng.integers(0, 4, (1, 6, 6, 16)).astype(np.float32)
weight = codes * scale.reshape(-1, 1, 1, 1)
wanted = sum(image[:, i : i + 4, j : j + 4] @ weight[:, i, j].T for i in range(3) for j in range(3))


def tensor(name, shape, kind, buffer=0):
    made = s.TensorT()
    made.name, made.shape, made.type, made.buffer = name, list(shape), kind, buffer
    return made


def operator(place, inputs, output, kind, options):
    made = s.OperatorT()
    made.opcodeIndex, made.inputs, made.outputs = place, inputs, [output]
    made.builtinOptionsType, made.builtinOptions = kind, options
    return made


def file(bits, dequantize):
    """A convolution without padding: input, weight, bias, output, and the weight in float32."""
    count = 8 // bits
    words = (codes.reshape(-1, count).astype(np.int64) & (2**bits - 1)) << (bits * np.arange(count))
    buffers = [s.BufferT() for _ in range(3)]
    buffers[1].data = words.sum(axis=1).astype(np.uint8)
    buffers[2].data = np.zeros(8, np.float32).view(np.uint8)
    kind, real = getattr(s.TensorType, f"INT{bits}"), s.TensorType.FLOAT32
    tensors = [
        tensor("x", image.shape, real), tensor("w", codes.shape, kind, 1), tensor("b", (8,), real, 2),
        tensor("y", wanted.shape, real), tensor("v", codes.shape, real),
    ]
    tensors[1].quantization = s.QuantizationParametersT()
    tensors[1].quantization.scale, tensors[1].quantization.zeroPoint = scale, np.zeros(8, np.int64)
    convolution = s.Conv2DOptionsT()
    convolution.padding, convolution.strideH, convolution.strideW = s.Padding.VALID, 1, 1
    convolution.dilationHFactor = convolution.dilationWFactor = 1
    options = s.BuiltinOptions
    operators = [operator(0, [0, 4 if dequantize else 1, 2], 3, options.Conv2DOptions, convolution)]
    if dequantize:
        operators.insert(0, operator(1, [1], 4, options.DequantizeOptions, s.DequantizeOptionsT()))
    graph, model = s.SubGraphT(), s.ModelT()
    graph.tensors, graph.operators, graph.inputs, graph.outputs = tensors, operators, [0], [3]
    model.version, model.buffers, model.subgraphs, model.operatorCodes = 3, buffers, [graph], []
    for code, version in ((s.BuiltinOperator.CONV_2D, 1 if dequantize else 5), (s.BuiltinOperator.DEQUANTIZE, 6)):
        entry = s.OperatorCodeT()
        entry.builtinCode = entry.deprecatedBuiltinCode = code
        entry.version = version
        model.operatorCodes.append(entry)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def right(bits, dequantize, kernels):
    interpreter = Interpreter(model_content=file(bits, dequantize), experimental_op_resolver_type=kernels)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image)
    interpreter.invoke()
    found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return bool(np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max())


kernels = (OpResolverType.AUTO, OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)
seen = {
    (bits, dequantize): [right(bits, dequantize, one) for one in kernels]
    for bits in (8, 4, 2)
    for dequantize in (False, True)
}
for (bits, dequantize), answers in seen.items():
    print(f"INT{bits}{', DEQUANTIZE' if dequantize else ''}: right with XNNPACK, without: {answers}")
assert all(answers == ([False] * 2 if case == (2, False) else [True] * 2) for case, answers in seen.items())
PYTHON
