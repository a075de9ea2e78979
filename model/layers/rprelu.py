"""RPReLU, the activation of ReActNet (arXiv 2003.03488)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.quantizers.autocast import without_autocast


class RPReLU(nn.Module):
    """x - shift + offset where x > shift, else slope * (x - shift) + offset, learned for each channel (equation 2).

    Input and output [N, channels, ...] of any floating dtype, in autocast too. Gradients are those of the formula: to
    `shift`, -1 where x > shift, else -slope; to `offset`, 1; to `slope`, x - shift where x <= shift.

    Args:
        channels: of the input, its second dimension.

    State:
        shift, offset: float32 [channels], at the start 0.
        slope: float32 [channels], at the start 0.25, as that of torch's PReLU.

    Example:
        >>> import torch
        >>> from model.layers.rprelu import RPReLU
        >>> activation = RPReLU(1)
        >>> with torch.no_grad():
        ...     _ = activation.shift.fill_(1), activation.offset.fill_(0.5)
        >>> activation(torch.tensor([[-1.0], [1.0], [3.0]])).flatten()
        tensor([0.0000, 0.5000, 2.5000], grad_fn=<ViewBackward0>)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.offset = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        shape = (-1, *[1] * (x.ndim - 2))
        shift, offset = self.shift.to(x.dtype).view(shape), self.offset.to(x.dtype).view(shape)
        with without_autocast(x):  # which would round in `prelu`
            return functional.prelu(x - shift, self.slope.to(x.dtype)) + offset
