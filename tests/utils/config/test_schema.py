"""Wrong values in configurations that a program builds, and wrong calls: each message says what to write instead."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.audit import audit
from model.calibrate import initialise_ranges
from model.convert import Selection, quantize, register_layer
from model.layers.factory import ACTIVATIONS, activation
from model.layers.norms import NORMS, norm
from model.quant import (
    QuantConfig,
    QuantConv2d,
    QuantizerConfig,
    QuantLinear,
    keep_full_precision,
    quantizers,
)
from utils.config.schema import (
    CUSTOM_SCALES,
    GRAD_SCALES,
    GRAD_TYPES,
    BlockConfig,
    DistillConfig,
    ModelConfig,
    PrecisionConfig,
    StemConfig,
)
from utils.errors import UserError

BROKEN = "(a repr that fails)"


class Broken:
    """A value whose text cannot be had."""

    def __repr__(self) -> str:
        raise RuntimeError(BROKEN)


def wt(**fields: Any) -> QuantizerConfig:
    return QuantizerConfig(**{"tag": "wt", "enable": True, "method": "lsq", "levels": 4} | fields)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 2))


# Configurations ------------------------------------------------------------------------------------

NO_WORD = [3, None, ["fm"], {}, np.array(["fm", "wt"]), torch.zeros(2), Broken()]
NO_FLAG = ["yes", 1, 0.0, None, [], torch.tensor(True)]
NO_NUMBER = [
    "4",
    None,
    True,
    np.True_,
    float("nan"),
    float("inf"),
    1j,
    [1],
    np.ones(2),
    torch.ones(1),
    10**400,
]
NO_WHOLE = [4.0, "4", np.float64(4), *NO_NUMBER]
WORDS = ("tag", "grid", "adaptive", "grad_type", "grad_scale", "custom")
FLAGS = [field.name for field in dataclasses.fields(QuantizerConfig) if field.type == "bool"]
WHOLE = ("levels", "quant_group", "proxquant_step", "stable", "stable_epoch")


@pytest.mark.parametrize(
    ("names", "values", "kind"),
    [
        (WORDS, NO_WORD, "is not a word: use one of '"),
        (FLAGS, NO_FLAG, "must be True or False"),
        (WHOLE, NO_WHOLE, "must be a whole number"),
        (("boundary", "scale", "ratio", "correlate", "grad_delta", "grad_window"), NO_NUMBER, "must be a number, "),
        (("method",), [None, "", 3, ["lsq"]], "must be the name of a method, such as 'lsq'"),
        (("extra",), [None, "a", ["a"], [("a", 1)], 3], "must be a mapping from names to values"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type(names: tuple[str, ...], values: list[Any], kind: str) -> None:
    """Every field, with a message of one line that names the field."""
    for name in names:
        for value in values:
            if name == "quant_group" and value is None:
                continue
            with pytest.raises(UserError) as caught:
                wt(**{name: value})
            message = str(caught.value)
            assert message.startswith(f"QuantizerConfig: {name} ") and kind in message, message
            assert "\n" not in message and len(message) < 320, message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"levels": 4.0}, "levels 4.0 must be a whole number from 2 to 65536: write 4"),
        ({"levels": "4"}, "levels '4' must be a whole number from 2 to 65536: write 4"),
        ({"levels": 1}, "levels 1 must be a whole number from 2 to 65536"),
        ({"levels": 65537}, "levels 65537 must be a whole number from 2 to 65536"),
        ({"stable": -1}, "stable -1 must be a whole number of 0 or more"),
        ({"boundary": 0}, "boundary 0 must be a number, from 1e-06 to 1e+06"),
        ({"quant_group": 0}, "quant_group 0 makes no groups: give their number, -k for groups of k, or None"),
        ({"tag": "weight"}, "tag 'weight' is not known: use one of 'fm', 'wt', 'ot'"),
        ({"tag": "WT"}, "tag 'WT' is not known: did you mean 'wt'?"),
        ({"grid": "mid-tread"}, "grid 'mid-tread' is not known: did you mean 'midtread'?"),
        ({"grid": "MID_RISE"}, "grid 'MID_RISE' is not known: did you mean 'midrise'?"),
        ({"grad_scale": "papr"}, "grad_scale 'papr' is not known: did you mean 'paper'?"),
        ({"grad_scale": "fan_scale"}, "grad_scale 'fan_scale' is not known: did you mean 'fan-scale'?"),
        ({"grad_type": "ste"}, "grad_type 'ste' is not known: did you mean 'STE'?"),
        ({"grad_type": "stescale"}, "grad_type 'stescale' is not known: did you mean 'STE-scale'?"),
        ({"adaptive": "varmean"}, "adaptive 'varmean' is not known: did you mean 'var-mean'?"),
        ({"custom": "channels"}, "custom 'channels' is not known: did you mean 'channel'?"),
        ({"method": "none"}, "method 'none' quantizes nothing: name one, such as 'lsq', or leave enable out"),
        ({"extra": {1: 2}}, "extra {1: 2} must have names as keys, which 1 is not"),
        ({"half_range": "yes"}, "half_range 'yes' must be True or False"),
    ],
)
def test_what_to_write_instead(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        wt(**fields)
    assert str(caught.value) == f"QuantizerConfig: {said}"


def test_numpys_scalars_become_pythons() -> None:
    """A sweep over numpy.arange needs no conversion, and what is saved is plain."""
    made = wt(levels=np.int64(4), half_range=np.True_, boundary=np.float32(0.5), quant_group=np.array(-2))
    assert made == wt(levels=4, half_range=True, boundary=0.5, quant_group=-2)
    assert [type(made.levels), type(made.half_range), type(made.boundary)] == [int, bool, float]
    assert QuantConfig(re_init_percentile=np.float64(99)).re_init_percentile == 99


def test_values_that_are_taken() -> None:
    for name, words in (("grad_type", GRAD_TYPES), ("grad_scale", GRAD_SCALES), ("custom", CUSTOM_SCALES)):
        assert [getattr(wt(**{name: word}), name) for word in words] == list(words)
    assert wt(quant_group=None, extra={"slope": 2}, ratio=-1, correlate=0).method == "lsq"
    assert QuantizerConfig(tag="wt", levels=2**32).method == "none"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"wt": None}, "wt must be a QuantizerConfig(tag='wt', ...), not None"),
        ({"fm": {"levels": 4}}, "fm must be a QuantizerConfig(tag='fm', ...), not {'levels': 4}"),
        ({"fm": wt()}, "fm has a QuantizerConfig of 'wt': build it with tag='fm'"),
        ({"re_init_range": "MSE"}, "re_init_range 'MSE' is not known: did you mean 'mse'?"),
        ({"re_init_percentile": 0}, "re_init_percentile 0 must be above 0 and at most 100"),
        ({"re_init_percentile": 101}, "re_init_percentile 101 must be a number, from 0 to 100"),
        ({"first_last": 1}, "first_last 1 must be True or False"),
        ({"depthwise": "no"}, "depthwise 'no' must be True or False"),
        ({"re_init": None}, "re_init None must be True or False"),
        ({"padding_after_quant": 0}, "padding_after_quant 0 must be True or False"),
    ],
)
def test_parts_and_switches(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        QuantConfig(**fields)
    assert str(caught.value) == f"QuantConfig: {said}"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"include": "backbone.*"}, "include 'backbone.*' must be a tuple: write ('backbone.*',)"),
        ({"exclude": "fc"}, "exclude 'fc' must be a tuple: write ('fc',)"),
        ({"signed": ("fc", 3)}, 'signed (\'fc\', 3) must be a tuple of strings, such as ("layer1.*", "fc")'),
        ({"include": None}, 'include None must be a tuple of strings, such as ("layer1.*", "fc")'),
        ({"linears": "no"}, "linears 'no' must be True or False"),
    ],
)
def test_selections(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        Selection(**fields)
    assert str(caught.value) == f"Selection: {said}"
    assert Selection(include=["a", "b"]).include == ("a", "b")  # pyright: ignore[reportArgumentType]


def test_norms_and_activations() -> None:
    for make, name, close, known in (
        (lambda config: norm(4, config), "norm", ("bach", "batch"), NORMS),
        (lambda config: activation(4, config), "activation", ("prelo", "prelu"), ACTIVATIONS),
    ):
        with pytest.raises(
            UserError, match=f"^ModelConfig: {name} '{close[0]}' is not known; did you mean {close[1]}"
        ):
            make(ModelConfig(**{name: close[0]}))
        for value in (3, ["relu", "x"], "xyz"):
            with pytest.raises(UserError, match=f"is not known; use one of {', '.join(known)}"):
                make(ModelConfig(**{name: value}))


# Calls ---------------------------------------------------------------------------------------------

IMAGES = torch.zeros(2, 3, 1, 1)
CONFIG = QuantConfig(wt=wt())


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda: quantize(network(), wt()), TypeError,
         "quantize: config is a QuantizerConfig, of one tag alone: write QuantConfig(wt=...)"),
        (lambda: quantize(network(), {"levels": 4}), TypeError,
         "quantize: config is {'levels': 4}: write QuantConfig(fm=..., wt=...)"),
        (lambda: quantize(CONFIG, network()), TypeError, "give the network, a torch.nn.Module"),
        (lambda: quantize(network(), QuantConfig()), UserError, "the configuration quantizes nothing"),
        (lambda: quantize(network(), CONFIG, select="1"), TypeError,
         "quantize: select is '1': write Selection(include=(\"layer1.*\",))"),
        (lambda: quantize(network(), CONFIG, example=IMAGES), TypeError,
         "quantize: example is a tensor: write the tuple of all inputs, example=(images,)"),
        (lambda: quantize(network(), CONFIG, example={"x": IMAGES}), TypeError, "write a tuple of inputs"),
        (lambda: audit(CONFIG, [IMAGES]), TypeError, "give the network, a torch.nn.Module"),
        (lambda: audit(network(), IMAGES), TypeError, "audit: batches is one tensor: write a list of batches, ["),
        (lambda: audit(network(), 3), TypeError, "audit: batches is 3: write a list of batches, [images]"),
        (lambda: audit(network(), [(IMAGES, torch.tensor([0, 1]))]), TypeError, "audit: a batch has images and labels"),
        (lambda: audit(network(), [IMAGES], wt()), TypeError, "give the QuantConfig of the network, or leave it out"),
        (lambda: initialise_ranges(CONFIG, IMAGES), TypeError, "give the network, a torch.nn.Module"),
        (lambda: initialise_ranges(network(), [*IMAGES]), TypeError,
         "initialise_ranges: images is a list: write one tensor, torch.stack(images)"),
        (lambda: initialise_ranges(network(), np.zeros((2, 3, 1, 1))), TypeError, "give one batch of images, a tensor"),
        (lambda: initialise_ranges(network(), IMAGES[0]), ValueError,
         "images of shape [3, 1, 1] are no batch: write images.unsqueeze(0) for one image"),
        (lambda: initialise_ranges(network(), IMAGES[0, 0]), ValueError,
         "initialise_ranges: images of shape [1, 1]: give one batch of images [N, 3, S, S]"),
        (lambda: initialise_ranges(network()[3], torch.zeros(4)), ValueError, "give one batch of images [N, ...]"),
        (lambda: initialise_ranges(network(), IMAGES[:0]), ValueError, "are empty: give at least one image"),
        (lambda: initialise_ranges(network(), IMAGES, wt()), TypeError, "give the QuantConfig of the network"),
        (lambda: register_layer(nn.Linear(1, 1), QuantLinear), TypeError,
         "register_layer: kind is Linear(in_features=1, out_features=1, bias=True), not a class"),
        (lambda: register_layer(nn.Bilinear, "QuantLinear"), TypeError,
         "register_layer: quantized is 'QuantLinear', not a class: give the class of the layer"),
        (lambda: register_layer(nn.Bilinear, QuantConv2d), ValueError, "QuantConv2d: not a subclass of Bilinear"),
        (lambda: keep_full_precision("fc", "is the last layer"), TypeError,
         "keep_full_precision: layer is 'fc': give the layer itself, a torch.nn.Module"),
        (lambda: keep_full_precision(nn.Linear(1, 1), ""), ValueError,
         "keep_full_precision: reason is '': write why, as in \"is the last layer\""),
        (lambda: keep_full_precision(nn.Linear(1, 1), True), ValueError, "reason is True: write why"),
    ],
)  # fmt: skip
def test_wrong_calls(call: Callable[[], object], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=re.escape(said)):
        call()


def test_an_unknown_method_leaves_the_network_alone() -> None:
    net = network()
    with pytest.raises(UserError, match="'lsqq' has no quantizer for wt"):
        quantize(net, QuantConfig(wt=wt(method="lsqq")))
    assert [type(layer) for layer in net] == [nn.Conv2d, nn.Conv2d, nn.Flatten, nn.Linear]


def test_right_calls_that_look_like_wrong_ones() -> None:
    """Batches of a generator, a detector's list of two images, rows of numbers without a convolution."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, images: list[Tensor]) -> Tensor:
            return self.body(torch.stack(images))

    net = Detector()
    quantize(net, CONFIG, example=([*IMAGES],))
    assert not audit(net, (list(IMAGES) for _ in range(2))).problems
    rows = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    quantize(rows, QuantConfig(wt=wt(), first_last=True))
    assert initialise_ranges(rows, torch.ones(2, 3)) == len(list(quantizers(rows))) == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"method": "dorefa", "grid": "midtread"},
            "grid 'midtread' belongs to lsq, lsqplus, ewgs or stableqat, not to dorefa",
        ),
        ({"method": "lsq", "grid": "midtread", "half_range": True}, "grid 'midtread' needs half_range=False"),
        ({"method": "lsq", "grad_type": "Triangle"}, "grad_type 'Triangle' does not go with lsq on wt"),
        ({"method": "lq", "grad_type": "STE-scale"}, "grad_type 'STE-scale' does not go with lq on wt"),
        ({"method": "lq", "scale": 1.5}, "scale 1.5: LQ-Nets' thresholds .* at most 1"),
        ({"method": "dorefa", "binary_scale": True}, "binary_scale is for 2 levels, not 4"),
        ({"method": "lsq", "custom": "channel"}, "custom 'channel' belongs to xnor, not to lsq"),
    ],
)
def test_values_that_a_method_cannot_take(fields: dict[str, Any], said: str) -> None:
    """In Python as on the command line: nothing acts as something else."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    config = QuantConfig(
        wt=QuantizerConfig(**{"tag": "wt", "enable": True, "levels": 4, **fields}), first_last=True
    )
    with pytest.raises(UserError, match=f"QuantizerConfig: {said}"):
        quantize(network, config)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BlockConfig(skip="blok"), "skip 'blok' is not known: did you mean 'block'?"),
        (lambda: BlockConfig(order="xyz"), "order 'xyz' must be the letters c, b, a and s, each once"),
        (lambda: BlockConfig(fix="yes"), "fix 'yes' must be True or False"),  # pyright: ignore[reportArgumentType]
        (lambda: StemConfig(kind="cifr"), "kind 'cifr' is not known: did you mean 'cifar'?"),
        (lambda: DistillConfig(kind="kll"), "kind 'kll' is not known: did you mean 'kl'?"),
        (lambda: PrecisionConfig(level="O7"), "level 'O7' is not known"),
        (lambda: PrecisionConfig(dtype="bf16"), "dtype 'bf16' is not known"),
    ],
)
def test_choices_of_other_configurations(make: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        make()
