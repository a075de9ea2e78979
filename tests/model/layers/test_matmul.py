"""The factors of attention's two products, quantized: against NumPy, in networks, and refused by name."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from model.audit import audit
from model.calibrate import initialise_ranges
from model.convert import quantize
from model.deploy.graph import deploy_graph
from model.deploy.onnx_qdq import qdq_model
from model.deploy.openvino_ir import openvino_model
from model.layers.matmul import AttentionMatmuls, QuantMatmul
from model.quant import QuantConfig, QuantizerConfig, quantizers
from model.selection import Selection
from model.training.policy import initialise
from tests import oracle
from tests.model.foreign import (
    OwnAttention,
    config,
    product_config,
    swin_transformer,
    timm_vit,
    vision_transformer,
)
from utils.config.schema import Rule
from utils.errors import UserError

N, H, L, S, D = 2, 3, 5, 7, 4
CLIPS = {"query_key.quant_left": 1.7, "query_key.quant_right": 1.3, "weights_value.quant_left": 0.6,
         "weights_value.quant_right": 2.1}  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision's ViT": vision_transformer,
    "torchvision's Swin": swin_transformer,
    "torchvision's Swin V2": lambda: swin_transformer(v2=True),
    "timm's ViT": timm_vit,
    "timm's Swin, not fused by default": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, embed_dim=16, depths=(1, 2), num_heads=(2, 2), window_size=4,
        num_classes=5,
    ),
}  # fmt: skip


def softmax(x: np.ndarray) -> np.ndarray:
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@pytest.mark.parametrize("levels", [2, 3, 4, 16])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients(levels: int, masked: bool) -> None:
    """Against NumPy in float64, through both products, the softmax and its mask, to factors and clip values."""
    torch.manual_seed(levels)
    fm = QuantizerConfig(tag="fm", enable=True, method="lsq", levels=levels, half_range=True)
    matmuls = AttentionMatmuls()
    for name, layer in matmuls.named_children():
        layer.build_quantizers(QuantConfig(fm=fm, attention_matmul=True), name)  # pyright: ignore[reportCallIssue]
    for name, clip in CLIPS.items():
        nn.init.constant_(matmuls.get_parameter(f"{name}.clip_val"), clip)
    given = [torch.randn(N, H, length, D, requires_grad=True) for length in (L, S, S)]
    mask = torch.randn(H, L, S) if masked else None
    gy = torch.randn(N, H, L, D)
    y, weights = matmuls(*given, mask, scale=0.7)
    (y * gy).sum().backward()

    q, k, v = (x.detach().double().numpy() for x in given)
    zero = np.zeros(1)

    def quantized(name: str, x: np.ndarray, g: np.ndarray = zero) -> oracle.Result:
        clip = np.array([np.float32(CLIPS[name])], np.float64)
        half_range = name == "weights_value.quant_left"
        return oracle.lsq(x, g, clip_val=clip, levels=levels, half_range=half_range)

    def swapped(x: np.ndarray) -> np.ndarray:
        return x.swapaxes(-1, -2)

    ql, kr = quantized("query_key.quant_left", q).y, quantized("query_key.quant_right", k).y
    full = softmax(0.7 * (ql @ swapped(kr)) + (0.0 if mask is None else mask.double().numpy()))
    wl, vr = quantized("weights_value.quant_left", full), quantized("weights_value.quant_right", v).y
    np.testing.assert_allclose(weights.detach().numpy(), full, atol=1e-6)
    np.testing.assert_allclose(y.detach().numpy(), wl.y @ vr, atol=1e-5)
    assert wl.y.min() >= 0 and len(np.unique(wl.y)) <= levels

    g = gy.double().numpy()
    of_weights = quantized("weights_value.quant_left", full, g @ swapped(vr))
    of_value = quantized("weights_value.quant_right", v, swapped(wl.y) @ g)
    of_scores = 0.7 * full * (of_weights.gx - (of_weights.gx * full).sum(-1, keepdims=True))
    of_query = quantized("query_key.quant_left", q, of_scores @ kr)
    of_key = quantized("query_key.quant_right", k, swapped(of_scores) @ ql)
    for x, expected in zip(given, (of_query, of_key, of_value), strict=True):
        assert x.grad is not None
        np.testing.assert_allclose(x.grad.numpy(), expected.gx, atol=2e-5)
    for name, expected in zip(CLIPS, (of_query, of_key, of_weights, of_value), strict=True):
        found = matmuls.get_parameter(f"{name}.clip_val").grad
        assert found is not None
        np.testing.assert_allclose(found.numpy(), expected.grads["clip_val"], rtol=1e-4, atol=1e-4)


def test_dropout_and_heads() -> None:
    """Dropped are quantized values, so that no range grows in training; a group is one head or several."""
    fm = QuantizerConfig(tag="fm", enable=True, method="lsq", levels=3, half_range=True, quant_group=H)
    product = QuantMatmul(of_softmax=True)
    product.heads = H
    product.build_quantizers(QuantConfig(fm=fm, attention_matmul=True), "matmul")
    assert product.get_parameter("quant_left.clip_val").shape == (1, H, 1, 1)
    weights = torch.eye(L).expand(N, H, L, L) * 0.8 + 0.3 * torch.eye(L).roll(1, 0)  # become 1, 0.5 and 0
    y = product(weights, torch.eye(L).expand(N, H, L, L), 0.5)
    assert set(y.unique().tolist()) == {0, 1, 2}
    fm = QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, quant_group=2)
    with pytest.raises(UserError, match=r"^attention-matmul: matmul: .* does not divide its 3 channels"):
        product.build_quantizers(QuantConfig(fm=fm, attention_matmul=True), "matmul")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network(name: str) -> None:
    """Two steps of training; the audit names each quantizer; copies, pickles and states carry them."""
    torch.manual_seed(0)
    net, x = NETWORKS[name](), torch.randn(4, 3, 32, 32)
    for parameter in net.parameters():  # some heads start at zero
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    trained, full = net.state_dict(), net.eval()(x)
    wanted = config(4, attention_matmul=True)
    report = quantize(net, wanted, example=(x,))
    own = {key: one for key, one in quantizers(net) if ".matmuls." in key}
    products = [layer for layer in net.modules() if isinstance(layer, QuantMatmul)]
    assert len(own) == 2 * len(products) > 0 and report.replaced
    for key, one in own.items():
        assert one.config.half_range == key.endswith("weights_value.quant_left")
    for _, one in quantizers(net):
        one.enabled = False
    torch.testing.assert_close(net(x), full, rtol=1e-4, atol=1e-5)  # the same network but for the quantizers
    for _, one in quantizers(net):
        one.enabled = True
    initialise_ranges(net, x, wanted)
    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(net(x), torch.arange(4)).backward()
        optimizer.step()
    assert all(
        parameter.grad is not None and parameter.grad.any()
        for one in own.values()
        for parameter in one.parameters()
    )
    assert all(int(one.iteration) == 2 for one in own.values())
    found = audit(net.eval(), [x], wanted)
    assert not found.problems and {row.name for row in found.rows} >= set(own)
    y = net(x)
    assert not torch.allclose(y, full)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(again(x), y)
    state = net.state_dict()
    assert [entry for entry in state if ".quant_" not in entry] == list(trained)
    other = NETWORKS[name]()
    quantize(other, wanted, example=(x,))
    assert other.load_state_dict(trained, strict=False).unexpected_keys == []
    other.load_state_dict(state)
    assert torch.equal(other.eval()(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert not audit(net, [x], wanted).problems and net(x).isfinite().all()


def test_an_attention_of_ones_own() -> None:
    """Of whatever class, where torch's function computes it, with its masks and its scale; one graph, compiled."""
    x = torch.randn(2, 6, 4)
    for kind in ("boolean mask", "causal", "plain"):
        net = nn.Sequential(OwnAttention(kind)).eval()
        before = net(x)
        quantize(net, config(attention_matmul=True, first_last=True), example=(x,))
        y = torch.compile(net, backend="aot_eager", fullgraph=True)(x) if kind == "causal" else net(x)
        assert torch.equal(y, net(x))
        for _, one in quantizers(net):
            one.enabled = False
        torch.testing.assert_close(net(x), before)


SOFTMAX_LEVELS = {"dorefa": 4, "pact": 4, "lsq": 4, "ewgs": 4, "lq": 4, "apot": 4, "fatnn": 3}


@pytest.mark.parametrize("method", SOFTMAX_LEVELS)
def test_masked_positions_stay_unseen(method: str) -> None:
    """Of a causal attention, after training too: the last token changes no output before it."""
    torch.manual_seed(0)
    x, wanted = torch.randn(8, 6, 4), product_config(method, SOFTMAX_LEVELS[method])
    net = nn.Sequential(OwnAttention("causal"), nn.Flatten(), nn.Linear(24, 4))
    quantize(net, wanted, example=(x,), select=Selection(include=("0*",)))
    initialise_ranges(net, x, wanted)
    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        functional.cross_entropy(net(x), torch.arange(8) % 4).backward()
        optimizer.step()
    attention, other = net.eval()[0], x.clone()
    other[:, -1] += 5
    before, after = attention(x), attention(other)
    assert torch.equal(before[:, :-1], after[:, :-1]) and not torch.equal(before, after)
    weights_value = attention.matmuls.weights_value
    assert weights_value.quant_left(torch.zeros(1, 1, 2, 2)).eq(0).all()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (product_config("lsqplus"), "lsqplus may turn the zeros of a mask"),
        (product_config("n2uq"), "N2UQ may turn the zeros of a mask"),
        (
            product_config(adaptive="var-mean", adaptive_restore=True),
            "adaptive var-mean, undone behind lsq, turns the zeros",
        ),
        (product_config("lq", adaptive="mean-var"), "adaptive mean-var, undone behind lq, turns the zeros"),
    ],
)
def test_masks_whose_zeros_would_move(wanted: QuantConfig, message: str) -> None:
    net = nn.Sequential(OwnAttention("causal"))
    with pytest.raises(UserError, match=f"^attention-matmul: {message}"):
        quantize(net, wanted, example=(torch.randn(2, 6, 4),))
    assert not any(True for _ in quantizers(net))


@pytest.mark.parametrize("method", ["lsq", "ewgs"])
def test_a_compiled_step_has_the_same_gradients(method: str) -> None:
    """The key's gradient has another layout than the key, which its graph must know."""
    torch.manual_seed(0)
    x = torch.randn(3, 6, 8)
    net = nn.Sequential(OwnAttention("plain", heads=2)).train()
    quantize(net, product_config(method), example=(x,))
    other = copy.deepcopy(net)
    compiled: Any = torch.compile(other, backend="aot_eager")
    for each in (net, compiled):
        each(x).square().sum().backward()
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_a_row_that_sees_nothing() -> None:
    """Is 0, as torch's function has it, and so are its gradients; nothing else is."""
    x = torch.randn(2, 6, 8, requires_grad=True)
    net = nn.Sequential(OwnAttention("blind", heads=2))
    before = net(x)
    quantize(net, product_config(), example=(x,))
    for _, one in quantizers(net):
        one.enabled = False
    torch.testing.assert_close(net(x), before)
    assert before[:, 0].eq(0).all()
    for _, one in quantizers(net):
        one.enabled = True
    net(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_half_precision() -> None:
    """A mask of another type is cast; scores that float16 does not hold are finite once they are scaled."""
    x = torch.randn(2, 6, 4, dtype=torch.bfloat16)
    net = nn.Sequential(OwnAttention("mask of float32")).bfloat16()
    quantize(net, product_config(), example=(x,))
    assert net(x).dtype == torch.bfloat16 and net(x).isfinite().all()
    query, value = torch.full((1, 1, 2, 64), 40.0).half(), torch.randn(1, 1, 2, 64).half()
    expected = value.double().numpy().mean(2, keepdims=True).repeat(2, 2)  # of scores that are equal
    y = AttentionMatmuls()(query, query, value)[0]
    np.testing.assert_allclose(y.double().numpy(), expected, atol=2e-3)


def test_a_mask_beside_is_causal() -> None:
    """Torch refuses both together; so do the layers."""
    x = torch.randn(2, 6, 4)
    net = nn.Sequential(OwnAttention("plain"))
    quantize(net, product_config(), example=(x,))
    net[0].kind = "both"
    with pytest.raises(RuntimeError, match="attn_mask or is_causal=True, not both"):
        net(x)


def test_a_selection() -> None:
    """Decides by the names of the attentions; the report names the products."""
    x = torch.randn(2, 6, 4)
    products = ("1.matmuls.query_key", "1.matmuls.weights_value")
    for chosen in (Selection(exclude=("0*",)), Selection(include=("1*",))):
        net = nn.Sequential(OwnAttention("products"), OwnAttention("plain"))
        assert quantize(net, product_config(), example=(x,), select=chosen).replaced == ("1.qkv", *products)
        assert type(net[0]) is OwnAttention
    net = nn.Sequential(OwnAttention("plain"), nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"^attention-matmul: the selection leaves out every attention: 0$"):
        quantize(net, product_config(), example=(x,), select=Selection(include=("1",)))
    swin, images = swin_transformer(), torch.randn(1, 3, 32, 32)
    names = [name for name, _ in swin.named_modules() if name.endswith(".attn")]
    exclude = tuple(f"{name}*" for name in names[1:])
    quantize(swin, product_config(), example=(images,), select=Selection(exclude=exclude))
    found = [name for name, each in swin.named_modules() if isinstance(each, QuantMatmul)]
    assert found == [f"{names[0]}.matmuls.query_key", f"{names[0]}.matmuls.weights_value"]


def test_the_device_is_that_of_the_attention() -> None:
    x = torch.randn(2, 6, 4)
    net = nn.Sequential(OwnAttention("plain"))
    net.register_parameter("elsewhere", nn.Parameter(torch.zeros(1, device="meta")))
    quantize(net, product_config(), example=(x,))
    assert {value.device.type for _, one in quantizers(net) for value in one.parameters()} == {"cpu"}
    assert net(x).isfinite().all()


def test_a_policy_keeps_the_signs() -> None:
    """`half_range` passes over the products, whose levels are signed or not whatever the options say."""
    x = torch.randn(2, 6, 4)
    net = nn.Sequential(OwnAttention("plain"))
    wanted = product_config()
    quantize(
        net, dataclasses.replace(wanted, fm=dataclasses.replace(wanted.fm, half_range=False)), example=(x,)
    )
    rule = Rule(section="init", number=1, name="*", tag="fm", values={"half_range": True})
    assert [change.target for change in initialise(net, [rule])] == ["0.qkv.quant_activation"]
    signs = {name: one.config.half_range for name, one in quantizers(net) if ".matmuls." in name}
    assert [name for name, half in signs.items() if half] == ["0.matmuls.weights_value.quant_left"]
    with pytest.raises(UserError, match=r"half_range of 0\.matmuls\.query_key, .* stays"):
        initialise(net, [dataclasses.replace(rule, name="0.matmuls.*")])


def test_engines_compute_the_same_codes() -> None:
    """The products in float, of the same levels: in an ONNX file in both engines, and in OpenVINO's own."""
    import onnxruntime
    import openvino

    net, x = vision_transformer(), torch.randn(2, 3, 32, 32)
    for parameter in net.parameters():  # biases too: sums that are 0 lie between two levels
        nn.init.normal_(parameter, std=0.1)
    wanted = config(4, attention_matmul=True)
    quantize(net, wanted, example=(x,))
    initialise_ranges(net, x, wanted)
    graph = deploy_graph(net, (3, 32, 32))
    assert sum(".matmuls." in name for name in graph.activations) == 8
    expected = net.eval()(x).detach().numpy()
    file = qdq_model(graph).SerializeToString()
    found = [onnxruntime.InferenceSession(file).run(None, {"input": x.numpy()})[0]]
    core = openvino.Core()
    for model in (core.read_model(file), openvino_model(graph)):
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found.append(next(iter(compiled({"input": x.numpy()}).values())))
    for each in found:
        np.testing.assert_allclose(each, expected, atol=1e-5)
