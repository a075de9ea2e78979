"""The floating types that a network computes in, and the way from its gradients to optimizer steps.

| level | weights | arithmetic | what the optimizer updates |
| --- | --- | --- | --- |
| O0 | float32 | float32 | the weights |
| O1 | float32 | `torch.autocast` | the weights |
| O2 | half in convolutions and linear layers, else float32 | `torch.autocast` | float32 master weights |
| O3 | half, quantizers excepted | half | the weights |

Quantizers compute in float32 at every level and keep their own values in float32 (`model.quantizers.frame`). Gradients
of float16 are scaled at O1 and O2 (`torch.amp.GradScaler`), since small ones would vanish; bfloat16 has the
exponents of float32 and needs no scaling. O3 has no scaling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import utils

from utils.config.schema import PrecisionConfig
from utils.errors import TrainingError, UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SMALLEST_SCALE = 2.0**-10  # 26 halvings below the first one: these gradients are infinite at any scale


def check_precision(config: PrecisionConfig, device: torch.device) -> tuple[str, ...]:
    """Refuse a precision that this machine lacks; returns warnings.

    Raises:
        UserError: bfloat16 on a GPU that emulates it.
    """
    half = config.level != "O0"
    if half and config.dtype == "bfloat16" and device.type == "cuda":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                raise UserError(
                    f"--amp_dtype bfloat16: {torch.cuda.get_device_name(device)} has no such arithmetic; "
                    "write --amp_dtype float16"
                )
    if config.tf32 and device.type != "cuda":
        return ("--tf32 has no effect without a GPU",)
    return ()


def memory_format(model: nn.Module, config: PrecisionConfig, device: torch.device) -> torch.memory_format:
    """The memory format of weights and images: channels last if asked for, and if that is safe.

    torch 2.15 ends the process of some channels-last networks on a CPU; these are trained contiguously there.
    """
    unsafe = device.type == "cpu" and any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels < 16
        for module in model.modules()
    )
    return torch.channels_last if config.channels_last and not unsafe else torch.contiguous_format


def prepare(model: nn.Module, config: PrecisionConfig) -> None:
    """Set how GPUs multiply float32 and, at O3, make all of the network half but its quantizers.

    A module whose class sets `keeps_float32`, as quantizers do, is left as it is. Call this before the optimizer is
    built, which holds the parameters as they are then.
    """
    arithmetic = "tf32" if config.tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = arithmetic
    torch.backends.cudnn.allow_tf32 = (
        config.tf32
    )  # by its newer name alone, torch 2.15 cannot export any more
    if config.level == "O3":
        for module in model.modules():
            if not getattr(module, "keeps_float32", False):
                _convert(module, DTYPES[config.dtype])


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    """Change the floating parameters and buffers that a module holds itself."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    for name, value in module.named_buffers(recurse=False):
        if value.is_floating_point():
            setattr(module, name, value.to(dtype))


class Precision:
    """The arithmetic of a run on `torch.amp`; at O0 it does nothing.

    Build it after the optimizer's state is restored: at O2 the optimizer's parameters become the master weights.

    Attributes:
        image_dtype: of the images that the network takes.
        scaling: whether gradients are scaled, and steps whose gradients overflow are skipped.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: PrecisionConfig,
        device: torch.device,
    ) -> None:
        dtype = DTYPES[config.dtype]
        self._optimizer = optimizer
        self._device, self._dtype = device, dtype
        self._autocasts = config.level in ("O1", "O2")
        self._masters = _halve(model, dtype) if config.level == "O2" else {}
        self.image_dtype = dtype if config.level == "O3" else torch.float32
        self.scaling = self._autocasts and dtype == torch.float16
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.scaling)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that forward passes and the loss are computed in."""
        return torch.autocast(self._device.type, self._dtype, enabled=self._autocasts)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled, to those of the parameters."""
        self._scaler.scale(loss).backward()

    def gradient_norm(self, limit: float | None, *, wanted: bool = True) -> Tensor | None:
        """Unscale the gradients and clip them to `limit`; returns their norm before clipping, float32 [].

        None where it is neither `wanted` nor needed to clip them. The norm is not finite when a gradient is not. Waits
        for the device only with `scaling`.
        """
        for half, master in self._masters.values():
            master.grad = None if half.grad is None else half.grad.float()
            half.grad = None
        self._scaler.unscale_(self._optimizer)
        if limit is None and not wanted:
            return None
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = utils.get_total_norm([gradient.float() for gradient in gradients])
        if limit is not None:
            utils.clip_grads_with_norm_(self._parameters, limit, norm)
        return norm

    def step(self, *, update: bool) -> str:
        """Let the optimizer take its step; returns a log line when gradients overflowed and it was skipped.

        Args:
            update: False, in the warmup, only updates the gradients' scale.

        Raises:
            TrainingError: gradients overflow at any scale.
        """
        before = self._scaler.get_scale()
        if update:
            self._scaler.step(self._optimizer)
        self._scaler.update()
        with torch.no_grad():
            for half, master in self._masters.values():
                half.copy_(master)
        after = self._scaler.get_scale()
        if after >= before:
            return ""
        if after < SMALLEST_SCALE:
            raise TrainingError(
                f"gradients are not finite even when scaled by {after:g}; try a lower --lr, --grad_clip or "
                "--amp_dtype bfloat16"
            )
        return f"step skipped, gradients overflowed when scaled by {before:g}; the scale is {after:g} now"

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self._optimizer.zero_grad()
        for half, _ in self._masters.values():
            half.grad = None

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The network's state with the master weights in place of the half ones."""
        return model.state_dict() | {name: master.detach() for name, (_, master) in self._masters.items()}

    def state_dict(self) -> dict[str, Any]:
        """The scale of the gradients, for a resumed run."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`; an empty one, of a run without scaling, changes nothing.

        Raises:
            KeyError, TypeError, ValueError: it is no such state.
        """
        if not state or not self.scaling:
            return
        for name in self._scaler.state_dict():
            if not 0 <= state[name] < math.inf or (name == "scale" and state[name] == 0):
                raise ValueError(f"{name} is {state[name]}")
        self._scaler.load_state_dict(dict(state))


def _halve(model: nn.Module, dtype: torch.dtype) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Give convolutions and linear layers half parameters; returns (half, former) by name."""
    masters = {}
    halves: dict[nn.Parameter, nn.Parameter] = {}  # modules may share one
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            for name, master in list(module.named_parameters(recurse=False)):
                half = nn.Parameter(master.detach().to(dtype), requires_grad=master.requires_grad)
                half = halves.setdefault(master, half)
                setattr(module, name, half)
                masters[f"{prefix}.{name}" if prefix else name] = half, master
    return masters
