"""Files with integer weights and thresholds compute torch's codes, as they are and after each step of qonnx's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model.deploy.codes import ActivationCodes
from model.deploy.graph import deploy_graph
from model.deploy.qonnx_quant import qonnx_model
from model.deploy.qonnx_thresholds import ThresholdsModel, thresholds_model
from model.deploy.sum_thresholds import real_thresholds
from model.quant import QuantConfig, QuantConv2d, QuantizerConfig, QuantLinear
from tests.model.deploy.networks import images, torch_values

pytest.importorskip("qonnx")
# Of the input's quantizer, of the second one, and between the two: what moves into thresholds.
CHAINS = {
    "relu": ("lsq", 4, True, nn.ReLU()),
    "ternary": ("lsq", 3, False, nn.LeakyReLU(0.1)),
    "mid-rise": ("lsq", 4, False, nn.PReLU(8)),
    "signs": ("xnor", 2, False, nn.Hardtanh()),
    "n2uq": ("n2uq", 4, True, nn.ReLU6()),
    "plus": ("lsqplus", 8, False, nn.Hardtanh(-2, 2)),
}


def layer(
    kind: type, method: str, levels: int, half_range: bool, *arguments: int, **settings: int
) -> nn.Module:
    made = kind(*arguments, **settings)
    weights = "xnor" if method == "xnor" else "lsq"
    made.build_quantizers(
        QuantConfig(
            fm=QuantizerConfig(tag="fm", enable=True, method=method, levels=levels, half_range=half_range),
            wt=QuantizerConfig(tag="wt", enable=True, method=weights, levels=2 if method == "xnor" else 4),
        ),
        "layer",
    )
    return made


def chain(name: str) -> nn.Sequential:
    """Quantized convolutions in a row, one of them depthwise, a pool in front of a quantizer, and a linear layer."""
    method, levels, half_range, activation = CHAINS[name]
    torch.manual_seed(0)
    form = (method, levels, half_range)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(),
        layer(QuantConv2d, *form, 8, 8, 3, padding=1), nn.BatchNorm2d(8), activation, nn.MaxPool2d(3, 2, 1),
        layer(QuantConv2d, *form, 8, 8, 3, padding=1, groups=8), activation, nn.BatchNorm2d(8),
        layer(QuantConv2d, *form, 8, 8, 3, stride=2), nn.Flatten(),
        layer(QuantLinear, *form, 8, 10),
    )  # fmt: skip
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
        if isinstance(module, QuantConv2d):
            nn.init.normal_(module.weight, std=0.7)
    return network.eval()


def streamlined(network: nn.Module) -> ThresholdsModel:
    return thresholds_model(deploy_graph(network, (3, 6, 6)))


def after_each_step(model: object, *, folded: bool) -> Iterator[tuple[str, object]]:
    """The model as it is and after each of qonnx's transformations, which build on each other."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
    from qonnx.transformation.gemm_to_matmul import GemmToMatMul
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.transformation.infer_shapes import InferShapes
    from qonnx.transformation.lower_convs_to_matmul import LowerConvsToMatMul
    from qonnx.util.cleanup import cleanup_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that it has not inferred
        wrapped = ModelWrapper(model).transform(InferShapes())
        yield "as it is", wrapped
        yield "cleaned", (wrapped := cleanup_model(wrapped, extract_conv_bias=True))
        yield "datatypes", (wrapped := wrapped.transform(InferDataTypes()))
        yield "matrix products", (wrapped := wrapped.transform(GemmToMatMul()))
        if folded:
            yield "lowered", wrapped.transform(LowerConvsToMatMul())
        yield "channels last", wrapped.transform(ConvertToChannelsLastAndClean()).transform(InferDataTypes())


def logits(wrapped: object, x: np.ndarray) -> np.ndarray:
    from qonnx.core.onnx_exec import execute_onnx

    name, output = wrapped.graph.input[0].name, wrapped.graph.output[0].name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.concatenate(
            [execute_onnx(wrapped, {name: x[i : i + 1]})[output].reshape(1, -1) for i in range(len(x))]
        )


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_has_integer_thresholds_that_qonnx_runs(name: str) -> None:
    network = chain(name)
    x = images(6)
    expected = torch_values(network, x)
    made = streamlined(network)
    assert made.integer == ("7.quant_activation", "10.quant_activation")
    assert list(made.real) == [
        "3.quant_activation",
        "12.quant_activation",
    ]  # behind the stem, and behind Flatten
    constants = {tensor.name for tensor in made.model.graph.initializer}
    assert not [name for name in constants if name.endswith(("sum_scale", "sum_bias")) and name[0] in "37"]
    for step, wrapped in after_each_step(made.model, folded=True):
        if (name, step) != ("n2uq", "channels last"):  # qonnx leaves an Expand to a shape of channels first
            found = logits(wrapped, x.numpy())
            np.testing.assert_allclose(found, expected["logits"], rtol=1e-4, atol=1e-4, err_msg=step)


def test_the_form_with_scales_is_the_same_after_each_step() -> None:
    network = chain("relu")
    x = images(4)
    with torch.no_grad():
        expected = network(x).numpy()
    for step, wrapped in after_each_step(qonnx_model(deploy_graph(network, (3, 6, 6))), folded=False):
        np.testing.assert_allclose(logits(wrapped, x.numpy()), expected, rtol=1e-4, atol=1e-4, err_msg=step)


class Skip(nn.Module):
    """A sum of two layers, one that multiplies codes and one that does not, and functions of sums that decrease."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        form = ("lsq", 4, True)
        self.stem = nn.Conv2d(3, 8, 1)
        self.a, self.b, self.c, self.d = (layer(QuantConv2d, *form, 8, 8, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        y = self.b(x + self.a(x))  # of a sum
        z = self.c(-y)  # of what decreases
        return self.d(torch.cos(z)).mean(dim=(2, 3))


def test_what_has_real_thresholds_says_why_and_is_right() -> None:
    network = Skip().eval()
    for convolution in (network.a, network.b, network.c, network.d):
        nn.init.normal_(convolution.weight, std=0.7)
    made = streamlined(network)
    assert made.integer == () and made.unchanged == {}
    assert list(made.real.values()) == [
        "behind Conv in float", "behind a sum of several layers",
        "its codes do not increase with the sum", "behind Cos, which thresholds do not pass",
    ]  # fmt: skip
    assert str(made).startswith(
        "integer thresholds: 0 of 4 quantizers of activations; in float: a.quant_activation"
    )
    _, wrapped = next(iter(after_each_step(made.model, folded=False)))
    x = images(4)
    with torch.no_grad():
        np.testing.assert_allclose(logits(wrapped, x.numpy()), network(x), rtol=1e-4, atol=1e-4)


class Branches(nn.Module):
    """A function between two quantized convolutions."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 1)
        self.a, self.b = (layer(QuantConv2d, "lsq", 4, True, 8, 8, 1) for _ in range(2))
        nn.init.normal_(self.a.weight, std=0.7)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.function(self.a(self.stem(x).relu()))).mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: F.relu(x + F.max_pool2d(x, 3, 1, 1)), "behind MaxPool of one branch"),
        (
            lambda x: F.relu(F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(x, 5, 1, 2)),
            "behind MaxPool of one branch",
        ),
        (lambda x: F.relu(F.max_pool2d(x, 3, 1, 1) - x), "behind MaxPool of one branch"),
        (lambda x: F.relu(F.pad(x[:, :4], (0, 0, 0, 0, 2, 2))), "behind Pad, which thresholds do not pass"),
        (lambda x: F.relu(F.max_pool2d(F.max_pool2d(x * 2, 3, 1, 1) + 0.1, 2)), ""),
    ],
)
def test_branches_with_pools_are_right(function: Callable[[torch.Tensor], torch.Tensor], reason: str) -> None:
    network = Branches(function).eval()
    made = streamlined(network)
    assert made.real.get("b.quant_activation", "") == reason
    _, wrapped = next(iter(after_each_step(made.model, folded=False)))
    x = images(4)
    with torch.no_grad():
        np.testing.assert_allclose(logits(wrapped, x.numpy()), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", [0.1, 1 / 3, 0.7300000190734863])
def test_real_thresholds_are_the_first_numbers_of_each_level(step: float) -> None:
    codes = ActivationCodes(name="x", levels=8, lowest=-4, highest=3, step=step)
    step = np.float32(step)
    for number, place in enumerate(real_thresholds(codes), start=-3):
        below = np.nextafter(place, np.float32(-np.inf))
        assert np.round(place / step) >= number > np.round(below / step)
