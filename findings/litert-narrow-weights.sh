#!/usr/bin/env bash
# LiteRT (ai-edge-litert 2.3.0), CPU interpreter with XNNPACK: a convolution of floats behind DEQUANTIZE of constant codes,
# with a scale for each output channel.
# Expected: XNNPACK computes it whatever the bits of the codes, since DEQUANTIZE of a constant is done once.
# Seen: of INT8 it does; of INT4 and INT2 the convolution stays with LiteRT's own kernels. All are right.
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
from ai_edge_litert.interpreter import Interpreter

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


def file(bits):
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
    operators = [operator(0, [0, 4, 2], 3, options.Conv2DOptions, convolution)]
    operators.insert(0, operator(1, [1], 4, options.DequantizeOptions, s.DequantizeOptionsT()))
    graph, model = s.SubGraphT(), s.ModelT()
    graph.tensors, graph.operators, graph.inputs, graph.outputs = tensors, operators, [0], [3]
    model.version, model.buffers, model.subgraphs, model.operatorCodes = 3, buffers, [graph], []
    for code, version in ((s.BuiltinOperator.CONV_2D, 1), (s.BuiltinOperator.DEQUANTIZE, 6)):
        entry = s.OperatorCodeT()
        entry.builtinCode = entry.deprecatedBuiltinCode = code
        entry.version = version
        model.operatorCodes.append(entry)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def seen(bits):
    """Whether the numbers are right, and whether a DELEGATE, which is XNNPACK, makes the output."""
    interpreter = Interpreter(model_content=file(bits))
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image)
    interpreter.invoke()
    place = interpreter.get_output_details()[0]["index"]
    right = bool(np.abs(interpreter.get_tensor(place) - wanted).max() <= 1e-5 * np.abs(wanted).max())
    operators = interpreter._get_ops_details()
    return right, any(one["op_name"] == "DELEGATE" and place in one["outputs"] for one in operators)


found = {bits: seen(bits) for bits in (8, 4, 2)}
for bits, (right, delegated) in found.items():
    print(f"INT{bits}: right: {right}, computed by XNNPACK: {delegated}")
assert found == {8: (True, True), 4: (True, False), 2: (True, False)}
PYTHON
