"""Batch normalisation over the images of all processes (`--sync_bn`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.layers.norms import ReverseBatchNorm2d, affine
from utils.errors import UserError


class _Sum(torch.autograd.Function):
    """The sum over all processes. Its gradient is a sum over them too, since the loss of each depends on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        distributed.all_reduce(total)
        return total


def normalise(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """(x - mean) / sqrt(var + eps) with the statistics of all processes; updates the running statistics.

    Mean and biased variance are those of `nn.BatchNorm2d` on the images of all processes together, computed
    in float32 and in two passes, so that a large mean costs no digits; the running variance is the unbiased
    one. Processes may hold different numbers of images. In: float [N, C, H, W]; out: float32.
    """
    x = x.float()
    own = x.new_tensor([x.numel() / x.shape[1]])
    total = _Sum.apply(torch.cat([x.sum((0, 2, 3)), own]))
    count = total[-1].detach()
    mean = total[:-1] / count
    centred = x - mean.view(1, -1, 1, 1)
    var = _Sum.apply(centred.square().sum((0, 2, 3))) / count
    if norm.track_running_stats and norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
            share = norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
            norm.running_var.lerp_((var * count / (count - 1)).to(norm.running_var.dtype), share)
    return centred * torch.rsqrt(var + norm.eps).view(1, -1, 1, 1)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over all processes, on any device (torch's own needs a GPU)."""

    def forward(self, input: Tensor) -> Tensor:
        """Input and output [N, C, H, W], of the same dtype."""
        if not self.training:
            return super().forward(input)
        result = normalise(input, self)
        return (result if self.weight is None else affine(result, self)).to(input.dtype)


class SyncReverseBatchNorm2d(ReverseBatchNorm2d):
    """`ReverseBatchNorm2d` over all processes."""

    def forward(self, input: Tensor) -> Tensor:
        """Input and output [N, C, H, W], of the same dtype."""
        if not self.training:
            return super().forward(input)
        return affine(normalise(affine(input.float(), self), self), self).to(input.dtype)


def synchronise(model: nn.Module, device: torch.device) -> int:
    """Let all batch norms of a network compute their statistics over all processes; returns how many there are.

    Names, parameters and statistics stay. On GPUs torch's own class is used, which is faster.

    Raises:
        UserError: the network has a batch norm of another kind, or none at all.
    """
    count = 0
    kinds: dict[type[nn.Module], type[nn.Module]] = {
        nn.BatchNorm2d: SyncBatchNorm2d,
        ReverseBatchNorm2d: SyncReverseBatchNorm2d,
    }
    for name, module in list(model.named_modules()):
        if not isinstance(module, _BatchNorm):
            continue
        if type(module) not in kinds:
            raise UserError(
                f"--sync_bn: {name} is a {type(module).__name__}, which has no synchronised form; leave it out"
            )
        count += 1
        if device.type == "cuda" and type(module) is nn.BatchNorm2d:
            model.set_submodule(name, nn.SyncBatchNorm.convert_sync_batchnorm(module))
        else:
            module.__class__ = kinds[type(module)]  # pyright: ignore[reportAttributeAccessIssue]
    if count == 0:
        raise UserError("--sync_bn: the network has no batch norm; leave it out")
    return count
