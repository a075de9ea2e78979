"""The options of quantizers: by tag, and of single layers."""

from __future__ import annotations

from utils.config.layer_bits import width
from utils.config.option import Option, integer, option
from utils.config.schema import ADAPTIVE, CUSTOM_SCALES, GRAD_SCALES, GRAD_TYPES, GRIDS

LAYERS = (
    option(
        "first_bit",
        width,
        None,
        "bits of weights and input of the first layer, whose input, the images, gets signed levels: a number, "
        "ternary, or 32 for full precision, as without it",
    ),
    option("last_bit", width, None, "the same of the last layer, a linear one"),
    option("first_last_bit", width, None, "the same of both, for first_bit and last_bit together"),
    option(
        "layer_bits",
        str,
        None,
        "YAML or JSON file with bits and quant_group of single layers; see docs/mixed.md",
        unset=("none",),
    ),
)


def quantizer_options(tag: str, what: str) -> tuple[Option, ...]:
    """The options of the quantizers of one tag, which quantize `what`."""
    half = (
        "signed levels in [-c, c] instead of unsigned levels in [0, c]"
        if tag == "fm"
        else "unsigned levels in [0, c] instead of signed levels in [-c, c]"
    )
    group = "per tensor, one for all" if tag != "wt" else "per channel, one for each output"
    options = [
        option(f"{tag}_enable", bool, False, f"quantize every {what}"),
        option(f"{tag}_bit", integer, 8, f"bits of the {what} quantizer, 2^bit levels"),
        option(
            f"{tag}_level", int, None, "number of levels instead, 3 is ternary; default: 2^bit", unset=(-1, 0)
        ),
        option(f"{tag}_half_range", bool, False, half),
        option(
            f"{tag}_quant_group",
            int,
            None,
            f"granularity: groups of channels that share parameters, -k: groups of k; default: {group}",
            unset=(0,),
        ),
        option(f"{tag}_boundary", float, 1.0, "clip value c at the start"),
        option(
            f"{tag}_scale", float, 0.5, "factor of the gradient scales; FATNN's slopes, LQ-Nets' thresholds"
        ),
        option(f"{tag}_ratio", float, 1.0, "share that a method of your own may read; no other does"),
        option(f"{tag}_correlate", float, -1.0, "factor on the calibrated clip value; not used when <= 0"),
        option(
            f"{tag}_adaptive",
            str,
            "none",
            "normalise before quantizing",
            choices=ADAPTIVE,
        ),
        option(f"{tag}_adaptive_restore", bool, False, "undo the normalisation after quantizing"),
        option(
            f"{tag}_grad_type",
            str,
            "none",
            "gradient through the rounding",
            choices=GRAD_TYPES,
        ),
        option(
            f"{tag}_grad_scale",
            str,
            "none",
            "factor on the clip value's gradient",
            choices=GRAD_SCALES,
        ),
        option(
            f"{tag}_grad_delta",
            float,
            1e-3,
            "EWGS's delta: growth of the gradient by the distance to the level",
        ),
        option(
            f"{tag}_grad_window",
            float,
            1.0,
            "signs: distance from the threshold up to which the gradient of STE and Triangle passes",
        ),
        option(
            f"{tag}_grid",
            str,
            "midrise",
            "levels of a full range: midtread has one at zero (lsq and its kin)",
            choices=GRIDS,
        ),
    ]
    if tag == "fm":
        options += [
            option(
                "fm_custom",
                str,
                "none",
                "XNOR-Net's activation scale: mean |x| over ...",
                choices=CUSTOM_SCALES,
            ),
            option(
                "fm_first_signed",
                bool,
                False,
                "keyword first-last: signed levels in the first layer, whose images go below zero",
            ),
        ]
    return tuple(options)
