"""LiteRT's files: their codes bit by bit, the geometry of layers, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.convert import quantize
from model.deploy.codes import WeightCodes
from model.deploy.engines import Engine, read_metadata
from model.deploy.graph import deploy_graph, with_byte_input
from model.deploy.litert.run import PRODUCTS
from model.deploy.litert.write import litert_file
from model.quant import QuantConfig, QuantConv2d, QuantizerConfig
from tests.model.deploy.networks import Geometry, Single, exported, images, torch_values
from utils.checkpoint.exported import kind_of
from utils.errors import UserError

schema: Any = pytest.importorskip("ai_edge_litert.schema_py_generated")
Interpreter: Any = pytest.importorskip("ai_edge_litert.interpreter").Interpreter
BITS = {schema.TensorType.INT2: 2, schema.TensorType.INT4: 4, schema.TensorType.INT8: 8}
ENGINES = (Engine("litert"), Engine("litert", False))


def graph_of(data: bytes) -> tuple[Any, Any]:
    """A file's model and its graph, read by LiteRT's schema."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    return model, model.subgraphs[0]


def stored_codes(model: Any, tensor: Any) -> np.ndarray:
    """The signed integers of a constant, by its bytes: the first one in the lowest bits."""
    bits, size = BITS[tensor.type], int(np.prod(tensor.shape))
    data = np.array(model.buffers[tensor.buffer].data, np.uint8)
    digits = np.unpackbits(data, bitorder="little")[: size * bits].reshape(size, bits).astype(np.int64)
    weights = 2 ** np.arange(bits)
    weights[-1] *= -1
    return (digits @ weights).reshape(tensor.shape)


def channels_first(codes: np.ndarray, weight: WeightCodes) -> np.ndarray:
    """The codes of a weight, whatever the file adds to it: half codes have one more channel of ones."""
    if codes.shape[-1] != weight.codes.shape[1] and codes.shape[0] != 1:
        assert (codes[..., -1] == 1).all()
        codes = 2 * codes[..., :-1] + 1
    if codes.ndim == 2:
        return codes
    return codes.transpose(3, 0, 1, 2) if codes.shape[0] == 1 else codes.transpose(0, 3, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "int8_weights"), [("methods", False), ("widths", False), ("options", False), ("widths", True)]
)
def test_the_codes_of_weights_are_those_of_the_network(kind: str, int8_weights: bool) -> None:
    _, graph = exported(kind)
    made = litert_file(graph, int8_weights=int8_weights)
    model, content = graph_of(made.data)
    tensors = {tensor.name.decode(): tensor for tensor in content.tensors if tensor.name}
    for name, weight in graph.weights.items():
        if name in made.float_weights:
            assert not weight.scaled or np.abs(weight.codes).max() > 127
            data = np.array(model.buffers[tensors[name].buffer].data, np.uint8).view(np.float32)
            value = data.reshape(tensors[name].shape)
            np.testing.assert_array_equal(value.transpose(0, 3, 1, 2), weight.values())
            continue
        tensor = tensors[f"{name}.codes"]
        codes = channels_first(stored_codes(model, tensor), weight)
        np.testing.assert_array_equal(codes, weight.codes)
        half = codes.shape[1] != (tensor.shape[-1] if tensor.shape[0] != 1 else 1)
        scale = np.asarray(tensor.quantization.scale, np.float32)
        np.testing.assert_array_equal(scale, weight.scale.reshape(-1) * (2 if half else 1))
        if int8_weights:
            assert not half or np.abs(weight.codes).max() > 127
            assert tensor.type == schema.TensorType.INT8
        elif weight.base in (2, 4, 16) and weight.gap == 2:  # even levels without a zero
            assert BITS[tensor.type] == {2: 2, 4: 2, 16: 4}[weight.base]


def test_products_read_floats_alone() -> None:
    """A convolution of codes below 8 bits would be answered wrongly; DEQUANTIZE stands in front of each."""
    _, graph = exported("methods")
    model, content = graph_of(litert_file(graph).data)
    names = {
        getattr(schema.BuiltinOperator, name) for name in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
    }
    products = [one for one in content.operators if model.operatorCodes[one.opcodeIndex].builtinCode in names]
    assert products
    for one in products:
        assert {content.tensors[place].type for place in one.inputs} == {schema.TensorType.FLOAT32}


def test_layers_of_each_geometry_compute_what_torch_does(tmp_path: Path) -> None:
    """Each quantizer has no level of zero, so that padded places have values."""
    network = Geometry().eval()
    parts = {tag: QuantizerConfig(tag=tag, enable=True, method="lsq", levels=4) for tag in ("fm", "wt")}
    quantize(network, QuantConfig(**parts, first_last=True))
    graph = deploy_graph(network, (3, 12, 12), metadata={"classes": "[]"})
    path = tmp_path / "x.tflite"
    x = images(8, size=12)
    expected = torch_values(network, x)
    for engine, int8_weights in itertools.product(ENGINES, (False, True)):
        path.write_bytes(litert_file(graph, int8_weights=int8_weights).data)
        assert (kind_of(path), read_metadata(path)["classes"]) == ("litert", "[]")
        found = engine.open(path, tensors=True, threads=1)(x.numpy())
        assert found.keys() == expected.keys() == {"logits", *graph.activations}
        for name, value in expected.items():
            far = np.abs(found[name] - value) > 1e-3 * np.abs(value).max()
            assert far.mean() <= 0.005, (name, engine, int8_weights)


def test_xnnpack_computes_the_products_of_codes_of_eight_bits() -> None:
    """Its parts of the network are operators DELEGATE; what they read and none of them makes comes from elsewhere."""
    network = Geometry().eval()
    parts = {tag: QuantizerConfig(tag=tag, enable=True, method="lsq", levels=4) for tag in ("fm", "wt")}
    quantize(network, QuantConfig(**parts, first_last=True))
    graph, elsewhere = deploy_graph(network, (3, 12, 12)), []
    for int8_weights in (False, True):
        data = litert_file(graph, int8_weights=int8_weights).data
        interpreter = Interpreter(model_content=data, num_threads=1)
        interpreter.allocate_tensors()
        operators = interpreter._get_ops_details()
        delegates = [one for one in operators if one["op_name"] == "DELEGATE"]
        read, made = ({place for one in delegates for place in one[side]} for side in ("inputs", "outputs"))
        products = [one["outputs"][0] for one in operators if one["op_name"] in PRODUCTS]
        elsewhere.append(sum(place in read - made for place in products))
    assert elsewhere[0] >= 8 and elsewhere[1] == 0


def test_ties_go_to_even_levels_by_division(tmp_path: Path) -> None:
    """A step of 0.3: half of them are other numbers when they are multiplied by 1 / 0.3."""
    network = nn.Sequential(QuantConv2d(1, 1, 1), nn.Flatten()).eval()
    part = QuantizerConfig(tag="fm", enable=True, method="lsq", levels=16, half_range=True)
    network[0].build_quantizers(QuantConfig(fm=part), "0")
    step = np.float32(0.3)
    with torch.no_grad():
        network[0].quant_activation.clip_val.fill_(float(15 * step))
    path = tmp_path / "x.tflite"
    graph = deploy_graph(network, (1, 4, 4))
    path.write_bytes(litert_file(graph).data)
    step = np.float32(graph.activations["0.quant_activation"].step)
    x = ((np.arange(16) - 1 + 0.5).astype(np.float32) * step).reshape(1, 1, 4, 4)
    wanted = np.clip(np.round(x / step), 0, 15)
    for engine in ENGINES:
        found = engine.open(path, tensors=True, threads=1)(x)["0.quant_activation"]
        np.testing.assert_array_equal(np.round(found / step), wanted)


def test_bytes_are_taken_as_images(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    graph = deploy_graph(
        network, (3, 4, 4), metadata={"images": '{"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}'}
    )
    path = tmp_path / "x.tflite"
    path.write_bytes(litert_file(with_byte_input(graph, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])).data)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4))
    mean, std = (np.array(one).reshape(1, 3, 1, 1) for one in ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    x = ((pixels / 255 - mean) / std).astype(np.float32)
    with torch.no_grad():
        wanted = network(torch.from_numpy(x)).numpy()
    runner = ENGINES[0].open(path)
    np.testing.assert_array_equal(runner.prepared(x), pixels)
    np.testing.assert_allclose(runner(x)["logits"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * x.amax(3, keepdim=True)).flatten(1),
        lambda x: (x - x.amin(1, keepdim=True)).flatten(1),
        lambda x: torch.where(x > 0.5, x, -x).flatten(1),
    ],
    ids=["largest of a row", "smallest of channels", "where"],
)
def test_single_operators(function: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    x, path = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), tmp_path / "x.tflite"
    path.write_bytes(litert_file(deploy_graph(Single(function).eval(), (4, 4, 4))).data)
    for engine in ENGINES:
        np.testing.assert_allclose(
            engine.open(path)(x.numpy())["logits"], function(x).numpy(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: (x > 0).int().sum((2, 3)).float(), "this ReduceSum: its numbers are no floats"),
    ],
)
def test_what_would_be_wrong_is_refused(function: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(UserError, match=f"{message}; export --to onnx$"):
        litert_file(deploy_graph(Single(function).eval(), (4, 4, 4)))


def test_an_operator_that_litert_files_do_not_hold_is_refused() -> None:
    class Rolled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cumsum(x, dim=1).flatten(1)

    graph = deploy_graph(nn.Sequential(nn.Conv2d(3, 4, 1), Rolled()), (3, 4, 4))
    with pytest.raises(UserError, match="LiteRT files do not hold the operator CumSum; export --to onnx"):
        litert_file(graph)


@pytest.mark.parametrize("data", [b"none", b"\0\0\0\0TFL3" + b"\xff" * 8])
def test_damaged_files(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.tflite"
    path.write_bytes(data)
    for use in (ENGINES[0].open, read_metadata):
        with pytest.raises(UserError, match=r"x\.tflite: not a valid file of LiteRT"):
            use(path)
