"""Tensors of chosen layers at chosen iterations, as files and as histograms in TensorBoard (`--probe_list`)."""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from model.convert import full_precision
from model.layers.quantized import QuantLayer, quantized_layers
from model.observe import first_input
from utils.checkpoint import archive
from utils.config.schema import ProbeConfig
from utils.errors import UserError
from utils.report.tensorboard import Board, probe_tag


class Probe:
    """Writes the tensors of chosen layers in the forward and backward pass of some iterations.

    Each iteration has a file `iteration-N.npz`. For every layer it holds `LAYER.input` and `LAYER.output` of the chosen
    images, `LAYER.weight` and, where there are quantizers, `LAYER.quantized_input` and `LAYER.quantized_weight`; for a
    tensor with a gradient also this, with `.gradient` appended to the name. A product of two activations has
    `LAYER.quantized_left` and `LAYER.quantized_right`. The weight of a quantized layer is what is
    quantized, and not the parameter where it is computed from it. All are float32.

    Args:
        model: the network.
        config: which layers, iterations and images.
        folder: where the files go.
        steps: iterations of the whole run: the optimizer's steps.
        images: images of a batch of this process.

    Attributes:
        layers: names of the layers, in the order of definition.
        iterations: from 0.
        board: takes the histograms.

    Raises:
        UserError: a pattern matches no layer, an image or iteration is not there.
    """

    def __init__(
        self, model: nn.Module, config: ProbeConfig, folder: Path, *, steps: int, images: int
    ) -> None:
        _check(config, steps, images)
        self.layers = _select(model, config.layers)
        self.iterations = frozenset(config.iterations or (0, steps // 2, steps - 1))
        self.board = Board(None)
        self._model, self._folder, self._images = model, folder, list(config.images)
        self._step = -1  # the iteration being recorded; -1: none
        self._found: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def begin(self, step: int) -> None:
        """Record the next forward and backward pass if iteration `step` is a chosen one."""
        if step not in self.iterations:
            return
        self._step = step
        for name in self.layers:
            layer = self._model.get_submodule(name)
            hooks = [layer.register_forward_hook(partial(self._passed, name), with_kwargs=True)]
            if isinstance(layer, QuantLayer):
                hooks.append(layer.quant_weight.register_forward_pre_hook(partial(self._weighed, name)))
                for part, quantizer in layer.quantizers():
                    if part != "quant_output":  # its output is the layer's
                        what = part.replace("quant_activation", "quant_input").replace("quant_", "quantized_")
                        hooks.append(
                            quantizer.register_forward_hook(partial(self._quantized, f"{name}.{what}"))
                        )
            elif isinstance(weight := getattr(layer, "weight", None), Tensor):
                self._keep(f"{name}.weight", weight)
            self._hooks += hooks

    def end(self) -> None:
        """Write the tensors recorded since `begin`, if any."""
        if self._step < 0:
            return
        for hook in self._hooks:
            hook.remove()
        packed = io.BytesIO()
        arrays = {name: value.float().cpu().contiguous().numpy() for name, value in self._found.items()}
        np.savez_compressed(packed, allow_pickle=False, **arrays)
        self._folder.mkdir(parents=True, exist_ok=True)
        archive.write_atomic(self._folder / f"iteration-{self._step:06d}.npz", packed.getbuffer())
        for name, value in self._found.items():
            self.board.histogram(probe_tag(name), value, self._step)
        self._step, self._found, self._hooks = -1, {}, []

    def _passed(
        self, name: str, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: object
    ) -> None:
        self._keep(f"{name}.input", first_input(inputs, named), self._images)
        if isinstance(output, Tensor):
            self._keep(f"{name}.output", output, self._images)

    def _weighed(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keep what the quantizer of the weight gets, which is not always the parameter."""
        self._keep(f"{name}.weight", inputs[0])

    def _quantized(self, name: str, quantizer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._keep(name, output, None if name.endswith("quantized_weight") else self._images)

    def _keep(self, name: str, value: Tensor, images: list[int] | None = None) -> None:
        """Copy a tensor, or these images of it, and later its gradient."""

        def copy(key: str, tensor: Tensor) -> None:
            # A layer that runs twice shows its first pass.
            self._found.setdefault(
                key, tensor.detach()[images].clone() if images else tensor.detach().clone()
            )

        copy(name, value)
        if value.requires_grad:
            self._hooks.append(value.register_hook(partial(copy, f"{name}.gradient")))


def _check(config: ProbeConfig, steps: int, images: int) -> None:
    beyond = [step for step in config.iterations if step >= steps]
    if beyond:
        raise UserError(
            f"--probe_iteration {beyond[0]}: the run has {steps} iterations, numbered 0 to {steps - 1}"
        )
    missing = [image for image in config.images if image >= images]
    if missing:
        raise UserError(
            f"--probe_index {missing[0]}: a batch has {images} images, numbered 0 to {images - 1}"
        )


def _select(model: nn.Module, patterns: Iterable[str]) -> tuple[str, ...]:
    """The layers that a pattern matches; without patterns the quantized ones, or all where nothing is quantized."""
    quantized = [name for name, _ in quantized_layers(model)]
    names = [*quantized, *full_precision(model)]
    if not patterns:
        return tuple(quantized or names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
            raise UserError(
                f"--probe_list {pattern}: no layer has such a name; did you mean {' or '.join(close)}?"
            )
    chosen = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
    return tuple(name for name, _ in model.named_modules() if name in chosen)
