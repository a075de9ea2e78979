"""Statistics of batch norms: those of the present batch, and running ones computed anew (`--bn_batches`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.observe import observing


@contextmanager
def of_the_batch(model: nn.Module) -> Iterator[None]:
    """Let batch norms normalise by their batch, as in training; their running statistics do not change."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    modes = [norm.training for norm in norms]
    kept = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    try:
        for norm in norms:
            norm.train()
        yield
    finally:
        for norm, mode, statistics in zip(norms, modes, kept, strict=True):
            norm.train(mode)
            for name, value in norm.named_buffers():
                value.copy_(statistics[name])


def reestimate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace the running mean and variance of every batch norm by the plain means over `batches`.

    While low-bit weights oscillate between two levels, the exponential means of training describe earlier weights
    and not the present ones (Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", arXiv
    2203.11086, section 3.2). Nothing else of the network changes: quantizers are in evaluation mode, and parameters
    and the counts of batches stay.

    Args:
        model: the network.
        batches: images [N, 3, S, S], as in training.

    Returns:
        How many norms have new statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    kept = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # pyright: ignore[reportOptionalMemberAccess]
    if not norms:
        return 0
    try:
        with observing(model):
            for norm in norms:
                norm.training = True
            for number, images in enumerate(batches, 1):
                for norm in norms:
                    norm.momentum = (
                        1 / number
                    )  # the mean of all batches so far; the first replaces the old one
                model(images)
    finally:
        for norm, momentum, count in kept:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)  # pyright: ignore[reportOptionalMemberAccess]
    return len(norms)
