"""Draw each quantizer's output and gradients over its input: docs/images/transfer-METHOD.png.

    python benchmarks/transfer.py             # every method
    python benchmarks/transfer.py lsq pact

Every curve is computed by the quantizer that the named options build, one point at a time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project is no package

import model.quant  # noqa: E402, F401
from model.quantizers.frame import Quantizer  # noqa: E402
from model.quantizers.learned_range import LearnedRange  # noqa: E402
from model.quantizers.registry import build_quantizer, methods  # noqa: E402
from model.quantizers.site import LayerSite  # noqa: E402
from utils.config import keyword  # noqa: E402
from utils.config.command_line import parse  # noqa: E402
from utils.config.resolve.quantizers import quant_config  # noqa: E402

IMAGES = ROOT / "docs" / "images"
POINTS = 2001
INPUT, OUTPUT, GRADIENT, CLIP_GRADIENT = "#999999", "#0072b2", "#d55e00", "#009e73"


@dataclass(frozen=True)
class Panel:
    """One quantizer, drawn over an interval of inputs.

    Attributes:
        title: above its axes.
        tag: "fm" or "wt".
        options: of the command line.
        low: first input.
        high: last input.
        state: values of learned parameters that are not the initial ones.
        fitted: initialise from a normal distribution, as `--re_init` does; a half of it for a half range.
    """

    title: str
    tag: str
    options: str
    low: float = -1.6
    high: float = 1.6
    state: Mapping[str, float] = field(default_factory=dict)
    fitted: bool = False


@dataclass(frozen=True)
class Curves:
    """A panel's numbers, float32 [POINTS] each.

    Attributes:
        x: inputs.
        q: the quantizer's output.
        dq_dx: the gradient that reaches each input when 1 arrives at each output.
        dq_dc: the contribution of each point to the gradient of the clip value; None without a learned one.
    """

    x: Tensor
    q: Tensor
    dq_dx: Tensor
    dq_dc: Tensor | None


def _activation(title: str, options: str, *, low: float = -0.6, **rest: Any) -> Panel:
    return Panel(title, "fm", f"--fm_enable {options}", low=low, **rest)


def _weight(title: str, options: str, **rest: Any) -> Panel:
    return Panel(title, "wt", f"--wt_enable {options}", **rest)


def _bits(
    make: Callable[..., Panel], tag: str, what: str, keywords: str, beside: str = "", **rest: Any
) -> list[Panel]:
    """Panels for 1, 2 and 3 bits."""
    return [
        make(f"{what}, {name}", f"--keyword {keywords} --{tag}_bit {name[0]} {beside}", **rest)
        for name in ("1 bit", "2 bits", "3 bits")
    ]


BINARY = "--fm_bit 1 --fm_grad_type"
MIDTREAD = "--keyword dorefa,lsq --wt_grid midtread"
FATNN = "--keyword dorefa,non-uniform"
METHODS: dict[str, list[list[Panel]]] = {  # rows of panels
    "dorefa": [
        _bits(_activation, "fm", "activation", "dorefa"),
        [
            _weight("weight, 1 bit, wt_bin", "--keyword dorefa,wt_bin --wt_bit 1"),
            *_bits(_weight, "wt", "weight", "dorefa")[1:],
        ],
    ],
    "pact": [_bits(_activation, "fm", "activation", "pact")],
    "lsq": [
        _bits(_activation, "fm", "activation", "dorefa,lsq"),
        _bits(_weight, "wt", "weight", "dorefa,lsq"),
    ],
    "lsq-midtread": [
        [
            _weight(f"weight, {name}", f"{MIDTREAD} {levels}", low=-2.4)
            for name, levels in (
                ("3 levels", "--wt_level 3"), ("2 bits", "--wt_bit 2"), ("3 bits", "--wt_bit 3")
            )
        ]
    ],
    "lsqplus": [
        [
            _activation(f"activation, {name}", f"--keyword lsqplus --fm_bit {name[0]}", low=-1.2,
                        state={"offset": -0.6, "clip_val": 1.4})
            for name in ("1 bit", "2 bits", "3 bits")
        ]
    ],
    "ewgs": [
        _bits(_activation, "fm", "activation", "ewgs", beside="--fm_grad_delta 2"),
        _bits(_weight, "wt", "weight", "ewgs", beside="--wt_grad_delta 2"),
    ],
    "stableqat": [
        _bits(_activation, "fm", "activation", "stableqat"),
        _bits(_weight, "wt", "weight", "stableqat"),
    ],
    "apot": [
        [_activation(f"activation, {bits} bits", f"--keyword apot --fm_bit {bits}") for bits in (2, 3, 4)],
        [
            _weight(f"weight, {name}", f"--keyword apot {levels}")
            for name, levels in (
                ("3 levels", "--wt_level 3"), ("3 bits", "--wt_bit 3"), ("4 bits", "--wt_bit 4")
            )
        ],
    ],
    "n2uq": [
        [
            _activation("activation, 2 bits, as it starts", "--keyword n2uq --fm_bit 2"),
            _activation("activation, 2 bits, learned thresholds", "--keyword n2uq --fm_bit 2",
                        state={"start": 0.05, "width0": 0.2, "width1": 0.3, "width2": 0.6}),
            _activation("activation, 3 bits, learned thresholds", "--keyword n2uq --fm_bit 3",
                        state={f"width{i}": 0.06 + 0.03 * i for i in range(7)}),
        ],
        _bits(_weight, "wt", "weight", "n2uq"),
    ],
    "lq": [
        _bits(_activation, "fm", "activation", "lq", high=3, fitted=True),
        _bits(_weight, "wt", "weight", "lq", low=-3, high=3, fitted=True),
    ],
    "fatnn": [
        [
            _activation("activation, 1 bit", f"{FATNN} --fm_bit 1", high=3, state={"alpha0": 1}),
            _activation("activation, 3 levels", f"{FATNN} --fm_level 3", high=3,
                        state={"alpha0": 1.6, "alpha1": 0.9}),
            _activation("activation, 2 bits", f"{FATNN} --fm_bit 2", high=3,
                        state={"alpha0": 1.8, "alpha1": 1.4, "alpha2": 0.8}),
        ],
        [
            _weight("weight, 3 levels, slopes 1 and 1", f"{FATNN} --wt_level 3 --wt_scale 1"),
            _weight("weight, 3 levels, slopes 1.4 and 0.8", f"{FATNN} --wt_level 3",
                    state={"alpha0": 1.4, "alpha1": 0.8}),
        ],
    ],
    "xnor": [
        [
            _activation("activation, no mask", f"--keyword xnor {BINARY} none", low=-1.6),
            _activation("activation, STE", f"--keyword xnor {BINARY} STE", low=-1.6),
            _activation("activation, STE, window 1.5", f"--keyword xnor {BINARY} STE --fm_grad_window 1.5", low=-2,
                        high=2),
            _weight("weight, mean |w| = 0.8", "--keyword xnor --wt_bit 1"),
        ]
    ],
    "xnorpp": [
        [
            _weight("weight, gamma = 1, as it starts", "--keyword xnor,gamma --wt_bit 1"),
            _weight("weight, gamma = 0.5", "--keyword xnor,gamma --wt_bit 1", state={"gamma": 0.5}),
        ]
    ],
    "bireal": [
        [
            _activation("activation, STE", f"--keyword xnor {BINARY} STE", low=-1.6),
            _activation("activation, Triangle", f"--keyword xnor {BINARY} Triangle", low=-1.6),
        ]
    ],
    "reactnet": [
        [
            _activation("activation, threshold 0, as it starts", f"--keyword reactnet {BINARY} Triangle", low=-1.6),
            _activation("activation, threshold 0.5", f"--keyword reactnet {BINARY} Triangle", low=-1.6,
                        state={"threshold": 0.5}),
        ]
    ],
}  # fmt: skip
"""Rows of panels by the picture's name."""


def quantizer(panel: Panel) -> Quantizer:
    """The quantizer of a panel, in evaluation mode.

    A learned clip value gets one group per point, so that its gradient tells the points apart.
    """
    given = parse([*panel.options.split(), f"--{panel.tag}_quant_group", "1"])
    fields = keyword.resolve(given["keyword"], "resnet").fields
    if issubclass(methods()[fields[f"quant.{panel.tag}.method"], panel.tag], LearnedRange):
        given[f"{panel.tag}_quant_group"] = POINTS
    config = getattr(quant_config(given, fields)[0], panel.tag)
    site = LayerSite(name=panel.title, channels=POINTS, channel_dim=int(panel.tag == "fm"), ndim=4, fan=9)
    result = build_quantizer(config, site)
    assert isinstance(result, Quantizer)
    if panel.fitted:
        normal = torch.special.ndtri(torch.linspace(0.001, 0.999, 999))
        result.initialise_from(normal.abs() if config.half_range else normal)
    with torch.no_grad():
        for name, value in panel.state.items():
            result.get_parameter(name).fill_(value)
    return result.eval()


def curves(panel: Panel) -> Curves:
    """Run a panel's quantizer forward and backward."""
    module = quantizer(panel)
    x = torch.linspace(panel.low, panel.high, POINTS)
    shaped = x.view((1, -1, 1, 1) if panel.tag == "fm" else (-1, 1, 1, 1)).clone().requires_grad_()
    q = module(shaped)
    q.sum().backward()
    assert shaped.grad is not None
    clip = dict(module.named_parameters()).get("clip_val")
    per_point = None if clip is None or clip.grad is None else clip.grad.flatten()
    return Curves(x, q.detach().flatten(), shaped.grad.flatten(), per_point)


def plot(axes: Axes, panel: Panel) -> None:
    """Draw one panel."""
    found = curves(panel)
    # The output is broad and pale, so that a gradient on top of it stays visible.
    axes.plot(found.x, found.x, color=INPUT, linewidth=1, linestyle=":", label="x")
    axes.plot(found.x, found.q, color=OUTPUT, linewidth=4.5, alpha=0.5, label="q(x)")
    axes.plot(found.x, found.dq_dx, color=GRADIENT, linewidth=1.5, linestyle="--", label="dq/dx")
    if found.dq_dc is not None:
        axes.plot(found.x, found.dq_dc, color=CLIP_GRADIENT, linewidth=1.5, linestyle="-.", label="dq/dc")
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel("x")
    axes.set_xlim(panel.low, panel.high)
    axes.grid(alpha=0.25)


def draw(method: str, folder: Path) -> Path:
    """Draw the picture of a method, a key of `METHODS`, into `folder`; returns its path."""
    rows = METHODS[method]
    columns = max(map(len, rows))
    figure = Figure(figsize=(3.6 * columns, 3 * len(rows) + 0.4), dpi=100, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        for axes in line[len(row) :]:
            axes.set_axis_off()
        for axes, panel in zip(line, row, strict=False):
            plot(axes, panel)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"transfer-{method}.png"
    figure.savefig(path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the methods named on the command line, or all."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(METHODS))
    names = parser.parse_args(argv).methods or list(METHODS)
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        parser.error(f"{unknown[0]} is no method; choose from {', '.join(METHODS)}")
    for name in names:
        print(draw(name, IMAGES).relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
