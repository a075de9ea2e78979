"""`nn.MultiheadAttention` with layers that it calls: the same as torch's in full precision, and quantized."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.audit import audit
from model.calibrate import initialise_ranges
from model.convert import Selection, below_zero, called, full_precision, quantize
from model.deploy import packed
from model.layers.attention import CalledAttention
from model.layers.called import call_layers
from model.load import Trained
from model.quant import QuantConfig, QuantizerConfig, quantized_layers, quantizers
from model.training.oscillation import Freezing
from tests import oracle
from tests.model.foreign import config, vision_transformer
from utils.config.schema import Config
from utils.data.transform import ImageTransform
from utils.errors import UserError

N, L, S, E, H = 2, 5, 7, 8, 2


def attention(**options: Any) -> nn.MultiheadAttention:
    """With random biases, which start at zero."""
    torch.manual_seed(0)
    made = nn.MultiheadAttention(E, H, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def inputs(
    kind: str, options: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, of which some are one tensor."""
    first = options.get("batch_first", False)

    def made(length: int, features: int) -> Tensor:
        return torch.randn(*((N, length) if first else (length, N)), features, dtype=dtype)

    query = made(L, E)
    if kind == "self":
        return query, query, query
    if kind == "query is key":
        return query, query, made(L, options.get("vdim", E))
    key = made(S, options.get("kdim", E))
    return query, key, key if kind == "key is value" else made(S, options.get("vdim", E))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"batch_first": True}, "self"),
        ({}, "self"),
        ({"bias": False}, "query is key"),
        ({"batch_first": True, "add_bias_kv": True}, "key is value"),
        ({"add_zero_attn": True, "add_bias_kv": True}, "other"),
        ({"kdim": 6, "vdim": 4, "batch_first": True}, "other"),
        ({"kdim": 6, "vdim": 4, "bias": False, "add_zero_attn": True}, "other"),
        ({"dropout": 0.5, "batch_first": True}, "self"),
        ({"dropout": 0.5}, "key is value"),
    ],
)
def test_it_computes_what_torch_does(options: dict[str, Any], kind: str, need_weights: bool) -> None:
    """In training and evaluation, with every kind of mask, gradients too; names of the state are the same."""
    theirs = attention(**options).double()
    ours = copy.deepcopy(theirs)
    call_layers(ours)
    assert type(ours) is CalledAttention
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    query, key, value = inputs(kind, options, torch.float64)
    length = S if "key" in kind.split(" ")[:1] or kind == "other" else L
    causal = torch.ones(L, length).triu(1).bool()
    padding = torch.tensor([[False] * (length - 2) + [True] * 2, [False] * length])
    masks: list[dict[str, Any]] = [
        {},
        {"attn_mask": causal},
        {"key_padding_mask": padding},
        {"attn_mask": torch.randn(N * H, L, length).double(), "key_padding_mask": padding.double() * -2},
        {"attn_mask": causal, "key_padding_mask": padding, "average_attn_weights": False},
    ]
    if not {"add_bias_kv", "add_zero_attn"} & {
        *options
    }:  # torch hides what is added there, without need_weights alone
        masks.append({"attn_mask": causal, "is_causal": True})
    for training in (True, False):
        for mask in masks:
            results = []
            for module in (theirs, ours):
                torch.manual_seed(1)  # the same elements are dropped
                module.zero_grad()
                y, weights = module.train(training)(query, key, value, need_weights=need_weights, **mask)
                (y.square().sum() + (0 if weights is None else weights.square().sum())).backward()
                results.append([y, weights, *(parameter.grad for parameter in module.parameters())])
            for expected, found in zip(*results, strict=True):
                assert (expected is None) == (found is None)
                if expected is not None:
                    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_one_sequence_without_a_batch() -> None:
    theirs = attention().eval()
    ours = copy.deepcopy(theirs)
    call_layers(ours)
    x, mask = torch.randn(L, E), torch.tensor([False] * (L - 1) + [True])
    for average in (True, False):
        found = ours(x, x, x, key_padding_mask=mask, average_attn_weights=average)
        for one, expected in zip(
            found, theirs(x, x, x, key_padding_mask=mask, average_attn_weights=average), strict=True
        ):
            torch.testing.assert_close(one, expected)


def softmax(x: np.ndarray) -> np.ndarray:
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def test_quantized_projections() -> None:
    """Against NumPy in float64: quantized inputs times quantized weights, and everything between in float."""
    net = attention(batch_first=True).eval()
    quantize(net, config(first_last=True))
    x = torch.randn(N, L, E)
    with torch.no_grad():
        found = net(x, x, x, need_weights=False)[0].numpy()

        def projected(layer: Any, value: Tensor) -> np.ndarray:
            a, w = (
                layer.quant_activation(value).double().numpy(),
                layer.quant_weight(layer.weight).double().numpy(),
            )
            return a @ w.T + layer.bias.double().numpy()

        q, k, v = (
            part.reshape(N, L, H, E // H).transpose(0, 2, 1, 3)
            for part in np.split(projected(net.in_proj, x), 3, axis=-1)
        )
        mixed = softmax(q @ k.transpose(0, 1, 3, 2) / np.sqrt(E // H)) @ v
        merged = torch.from_numpy(mixed.transpose(0, 2, 1, 3).reshape(N, L, E)).float()
        expected = projected(net.out_proj, merged)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["self", "query is key", "key is value", "other"])
@pytest.mark.parametrize("output", [False, True])
def test_parts_of_a_projection(kind: str, output: bool) -> None:
    """Where query, key and value differ each is multiplied by its own rows alone."""
    parts = {tag: QuantizerConfig(tag=tag, enable=True, method="lsq", levels=16) for tag in ("fm", "wt")}
    if output:
        parts["ot"] = QuantizerConfig(tag="ot", enable=True, method="lsq", levels=256)
    net = attention(batch_first=True)
    quantize(net, QuantConfig(**parts, first_last=True))
    given = inputs(kind, {"batch_first": True})
    y, _ = net(*given, need_weights=False)
    y.square().sum().backward()
    assert net.in_proj_weight.grad is not None and (net.in_proj_weight.grad != 0).any(1).all()
    layer = net.in_proj
    wide = [
        layer.quant_output(
            functional.linear(layer.quant_activation(x), layer.quant_weight(layer.weight), layer.bias)
        )
        for x in given
    ]
    q, k, v = (x[..., i * E : (i + 1) * E].unflatten(-1, (H, -1)).transpose(1, 2) for i, x in enumerate(wide))
    expected = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y, net.out_proj(expected))
    kept = [parameter.grad for parameter in net.parameters()]
    net.zero_grad()
    net.in_proj.recompute = True
    again, _ = net(*given, need_weights=False)
    again.square().sum().backward()
    assert torch.equal(again, y)
    for parameter, before in zip(net.parameters(), kept, strict=True):
        torch.testing.assert_close(parameter.grad, before)


@pytest.mark.parametrize("kind", ["self", "query is key", "key is value", "other"])
def test_a_pass_of_the_attention_is_one_of_each_quantizer(kind: str) -> None:
    """However many inputs it has; a calibration sees them all."""
    tags = ("fm", "wt", "ot")
    parts = {tag: QuantizerConfig(tag=tag, enable=True, method="lsq", levels=4, stable=6) for tag in tags}
    net = attention(batch_first=True)
    quantize(net, QuantConfig(**parts, first_last=True))
    largest = []
    for step in range(2):
        given = inputs(kind, {"batch_first": True})
        given[2].mul_(step + 2)
        net(*given)
        largest.append(max(np.abs(x.double().numpy()).max() for x in given))
    assert [int(quantizer.iteration) for _, quantizer in quantizers(net)] == [2] * 6
    np.testing.assert_allclose(net.in_proj.quant_activation.range_mean.numpy(), [np.mean(largest)], rtol=1e-6)


def test_statistics_of_a_sample_are_those_of_all_its_inputs() -> None:
    """`adaptive` normalises each sample by what the projection reads of it: query, key and value."""
    fm = QuantizerConfig(tag="fm", enable=True, method="lsq", levels=16, adaptive="var-mean")
    net = attention(batch_first=True).eval()
    quantize(net, QuantConfig(fm=fm, first_last=True))
    given = [x * 3 + 1 for x in inputs("other", {"batch_first": True})]
    found = []
    net.in_proj.register_forward_hook(lambda *hooked: found.append(hooked[2].detach().numpy()))
    net(*given)
    state = {name: value.double().numpy() for name, value in net.state_dict().items()}
    x = [each.double().numpy() for each in given]
    mean, deviation = oracle.statistics(np.concatenate(x, 1), "var-mean", weight=False)
    clip = state["in_proj.quant_activation.clip_val"]
    expected = [
        oracle.uniform_round((each - mean) / deviation, clip, 16, False) @ weight.T + bias
        for each, weight, bias in zip(
            x, np.split(state["in_proj_weight"], 3), np.split(state["in_proj_bias"], 3), strict=True
        )
    ]
    np.testing.assert_allclose(found[0], np.concatenate(expected, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["self", "query is key", "key is value", "other"])
@pytest.mark.parametrize("output", [False, True])
def test_an_empty_batch(kind: str, output: bool) -> None:
    """It passes as in full precision; its gradients are zero."""
    tags = ("fm", "wt", "ot") if output else ("fm", "wt")
    net = attention(batch_first=True)
    parts = {tag: QuantizerConfig(tag=tag, enable=True, method="lsq", levels=4) for tag in tags}
    quantize(net, QuantConfig(**parts, first_last=True))
    given = inputs(kind, {"batch_first": True})
    empty = {id(x): x[:0] for x in given}  # what is one tensor stays one
    y, weights = net(*(empty[id(x)] for x in given))
    assert y.shape == (0, L, E) and weights.shape == (0, L, given[1].shape[1])
    y.sum().backward()
    assert not net.in_proj_weight.grad.any()


class Classifier(nn.Module):
    """An encoder of torch and its decoder, whose attention reads two sequences."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        size: dict[str, Any] = {"d_model": E, "nhead": H, "dim_feedforward": 16, "dropout": 0.0}
        self.stem = nn.Linear(4, E)
        layer = nn.TransformerEncoderLayer(**size, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.decoder = nn.TransformerDecoderLayer(**size, batch_first=True)
        self.head = nn.Linear(E, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -1] = True  # what sends torch's encoder on its fast path of nested tensors
        x = self.encoder(self.stem(x), src_key_padding_mask=padding)
        return self.head(self.decoder(x[:, :1], x, memory_key_padding_mask=padding)[:, 0])


@pytest.mark.parametrize("example", [True, False])
def test_transformers_of_torch(example: bool) -> None:
    """Every layer but the ends is quantized, and evaluation takes no path around the quantizers."""
    torch.manual_seed(0)
    net, x = Classifier(), torch.randn(3, L, 4)
    with torch.no_grad():
        full = net(x)
    report = quantize(net, config(), example=(x,) if example else None)
    assert [left.name for left in report.left] == ["stem", "head"]
    assert {"encoder.layers.1.linear2", "decoder.multihead_attn.in_proj"} <= {*report.replaced}
    initialise_ranges(net, x)
    with torch.no_grad():
        plain = net.eval()(x)
    torch.testing.assert_close(plain, net.train()(x))  # there is no dropout
    assert not torch.allclose(plain, full, atol=1e-3)
    assert not audit(net, [x], config()).problems
    for _, quantizer in quantizers(net):
        quantizer.enabled = False
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), full, rtol=1e-4, atol=1e-5)


def test_a_nested_tensor_is_refused() -> None:
    net = attention(batch_first=True).eval()
    call_layers(net)
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(4, E)], layout=torch.jagged)
    with pytest.raises(UserError, match="nested tensor"):
        net(x, x, x)


def test_a_mask_that_is_announced_and_missing() -> None:
    net, x = attention(), torch.randn(L, N, E)
    call_layers(net)
    with pytest.raises(ValueError, match="give the mask too"):
        net(x, x, x, is_causal=True)


def test_a_full_precision_state_loads_and_a_quantized_one_has_its_names() -> None:
    """Before the conversion and after it; a deep copy has parameters of its own."""
    torch.manual_seed(0)
    trained = vision_transformer().state_dict()
    net = vision_transformer()
    parameters = dict(net.named_parameters())
    quantize(net, config())
    assert net.load_state_dict(trained, strict=False).unexpected_keys == []
    now = net.state_dict()
    assert [name for name in now if ".quant_" not in name] == list(trained)
    assert all(torch.equal(now[name], value) for name, value in trained.items())
    assert all(dict(net.named_parameters())[name] is one for name, one in parameters.items())
    added = {name.rpartition(".quant_")[0].rpartition(".")[2] for name in now if ".quant_" in name}
    assert {"in_proj", "out_proj"} <= added
    again = copy.deepcopy(net)
    layer = next(layer for name, layer in quantized_layers(again) if name.endswith("in_proj"))
    with torch.no_grad():
        layer.weight.zero_()
    first = next(name for name in now if name.endswith("in_proj_weight"))
    assert not again.state_dict()[first].any() and torch.equal(net.state_dict()[first], trained[first])


def test_what_is_looked_for_leaves_the_network_as_it_was() -> None:
    net, x = vision_transformer(), torch.randn(2, 3, 32, 32)
    seen = below_zero(net, x)
    place = "encoder.layers.encoder_layer_0.self_attention"
    assert seen[f"{place}.in_proj"] > 0.5 and f"{place}.out_proj" in seen
    assert type(net.get_submodule(place)) is nn.MultiheadAttention
    assert [name for name, _ in net.get_submodule(place).named_children()] == ["out_proj"]
    with pytest.raises(UserError, match="no layer"):
        quantize(net, config(), select=Selection(include=("nothing",)))
    assert type(net.get_submodule(place)) is nn.MultiheadAttention
    quantize(net, config())
    order = called(net, x)[1]
    assert order.index(f"{place}.in_proj") + 1 == order.index(f"{place}.out_proj")
    assert full_precision(net) == ("conv_proj", "heads.head")


def test_frozen_weights_of_a_projection() -> None:
    """Freezing finds the parameter under its name in the attention."""
    net = attention()
    quantize(net, config(first_last=True))
    freezing = Freezing(net, [0.01], 0.9, 10)
    for step in range(4):  # every weight goes to and fro between two levels
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.ndim == 2:
                    parameter.copy_(torch.full_like(parameter, 0.1 * (-1) ** step))
        freezing.after_step(step, dict(net.named_parameters()))
    assert freezing.share() == 1
    state = freezing.state_dict()
    assert set(state) == {"in_proj", "out_proj"} and state["in_proj"]["numbers"].shape == (3 * E, E)
    freezing.load_state_dict(state)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 4}])
def test_packed_weights_of_a_projection(options: dict[str, Any], tmp_path: Path) -> None:
    """They come back as the quantized values, under the name of the parameter."""
    net = nn.ModuleDict({"attention": attention(**options)})
    quantize(net, config(first_last=True))
    images = ImageTransform(size=8, mean=(0.5,), std=(0.25,))
    trained = Trained(network=net, transform=images, classes=(), config=Config(), source=Path("x"))
    packed.write(trained, tmp_path / "x.safetensors")
    found = packed.read_checkpoint(tmp_path / "x.safetensors")
    assert set(net.state_dict()) - set(found["state_dict"]) == {
        name for name in net.state_dict() if ".quant_weight." in name and "clip_val" in name
    }
    layers = dict(quantized_layers(net))
    assert set(found["quantized_weights"]) == set(layers)
    for name, layer in layers.items():
        state = found["state_dict"][layer.weight_entry(name)]
        assert torch.equal(state, layer.quant_weight(layer.weight))
        assert state.unique().numel() <= 4 * len(state)
