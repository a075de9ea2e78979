"""Classifiers of other packages, converted in place: `--model torchvision:NAME`, `--model timm:NAME`.

The packages are imported where they are used: other networks need not wait for them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.convert import Report, Selection, called, replace
from model.layers.called import call_layers
from model.layers.fused_attention import add_matmuls
from model.networks.grey import take_grey
from utils.config.image_size import sides, size_text
from utils.config.schema import ModelConfig
from utils.errors import UserError


def torchvision_names() -> list[str]:
    """The networks of torchvision that classify."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def _torchvision(name: str, config: ModelConfig) -> nn.Module:
    """The network without weights; one with a fixed image size gets the configured one."""
    import torchvision

    _check_name("torchvision", name, torchvision_names())
    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        if not isinstance(config.input_size, int):
            raise ValueError("torchvision's are for square ones; timm's take others")
        options["image_size"] = config.input_size
    elif name.startswith("maxvit_"):
        options["input_size"] = sides(config.input_size)
    elif name in ("googlenet", "inception_v3"):
        # Auxiliary classifiers would make the output a tuple in training; `--unresume_scope` skips their weights.
        options |= {"aux_logits": False, "init_weights": True}
    network = torchvision.models.get_model(name, weights=None, num_classes=config.num_classes, **options)
    if config.channels == 1:
        take_grey(network)
    return network


def _timm(name: str, config: ModelConfig) -> nn.Module:
    """The network without weights, `NAME` or `NAME.TAG`; one with a fixed image size gets the configured one."""
    timm = imported_timm(f"--model timm:{name}")
    # Names with a colon or a folder, which fetch files, are not in this list.
    architecture, dot, _ = name.partition(".")
    _check_name("timm", architecture, timm.list_models())
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if dot and name not in tagged:
        close = difflib.get_close_matches(name, tagged, n=3, cutoff=0) or [architecture]
        raise UserError(
            f"--model timm:{name}: no such pretrained tag; did you mean timm:{' or timm:'.join(close)}?"
        )
    options = timm_size(name, config) | ({"in_chans": 1} if config.channels == 1 else {})
    return timm.create_model(name, pretrained=False, num_classes=config.num_classes, **options)


def imported_timm(what: str) -> Any:
    """The package timm; raises `UserError` where it is missing, for `what` needs it."""
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"{what} needs the package timm, which is not there ({error}): pip install timm"
        ) from error
    return timm


def timm_size(name: str, config: ModelConfig) -> dict[str, Any]:
    """What `timm.create_model` takes for the configured image size: nothing where any size fits."""
    known = imported_timm(f"--model timm:{name}").models.get_pretrained_cfg(name)
    return {"img_size": config.input_size} if known is not None and known.fixed_input_size else {}


SOURCES: dict[str, Callable[[str, ModelConfig], nn.Module]] = {"torchvision": _torchvision, "timm": _timm}

# Errors of networks that an image size does not suit, some already when they are built.
_UNSUITABLE = (RuntimeError, ValueError, AssertionError)


def build_library_network(config: ModelConfig) -> nn.Module:
    """The network `SOURCE:NAME`, its convolutions and linear layers quantized if the configuration says so.

    Its parameters keep their names. The layers that run first and last stay in full precision unless they are
    to be quantized too, and so do layers whose weight is used without calling them.

    Raises:
        UserError: for an unknown name (with close ones), a width, an image size that the network does not take,
            or a network that puts out anything but logits or has no layer that can be quantized.
    """
    source, _, name = config.name.partition(":")
    if config.width_alpha != 1.0:
        raise UserError(f"--width_alpha {config.width_alpha}: {config.name} has one width; leave it out")
    try:
        network = SOURCES[source](name, config)
        if config.quant.enabled:
            call_layers(network)
        output, order = called(network, torch.zeros(1, config.channels, *sides(config.input_size)))
    except _UNSUITABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        own = own_size(source, name)
        hint = "choose another network" if own in (None, config.input_size) else f"its own is {own}"
        size = size_text(config.input_size)
        raise UserError(
            f"--input_size {size}: {config.name} cannot take images of this size ({reason}); {hint}"
        ) from error
    if not isinstance(output, Tensor) or output.shape != (1, config.num_classes):
        found = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise UserError(
            f"--model {config.name} puts out {found} for an image, not {config.num_classes} logits; "
            "choose a network that classifies"
        )
    if config.quant.enabled:
        signed = (order[0],) if config.quant.first_last else ()  # images have negative values
        report = replace(network, config.quant, Selection(signed=signed), order)
        _refuse_mixtures(config.name, network, report)
        if config.quant.quantizes_matmuls:
            add_matmuls(network, torch.zeros(1, config.channels, *sides(config.input_size)))
        if not report.replaced:
            why = next((left for left in report.left if left.name not in (order[0], order[-1])), None)
            reason = "" if why is None else f": {why.name} {why.reason}"
            raise UserError(
                f"--model {config.name} has no layer that can be quantized{reason}; choose another network"
            )
    return network


def _refuse_mixtures(name: str, network: nn.Module, report: Report) -> None:
    """Refuse a network most of whose kernels are mixed anew for each image, and would stay in full precision."""
    for left in report.left:
        kind = type(network.get_submodule(left.name)).__name__
        if kind == "CondConv2d":
            raise UserError(
                f"--model {name}: {left.name} is a {kind}, which mixes its kernels anew for each image and has no "
                "quantized form: choose another network"
            )


def own_size(source: str, name: str) -> int | None:
    """The size of the images that the network's published weights were trained for; None: unknown."""
    if source == "timm":
        import timm

        known = timm.models.get_pretrained_cfg(name)
        return None if known is None else known.input_size[-1]
    import torchvision

    return torchvision.models.get_model_weights(name)["DEFAULT"].transforms().crop_size[0]


def _check_name(source: str, name: str, names: list[str]) -> None:
    if name in names:
        return
    import torchvision

    if source == "torchvision" and name in torchvision.models.list_models():
        raise UserError(
            f"--model torchvision:{name} does not classify images; convert it in a program of yours with "
            "model.convert.quantize, see docs/detectron2.md"
        )
    close = [f"{source}:{other}" for other in difflib.get_close_matches(name, names, n=3)]
    hint = f"did you mean {' or '.join(close)}?" if close else f"the documentation of {source} lists them"
    raise UserError(f"--model {source}:{name}: no such network; {hint}")
