"""Kernels of `torch.compile`: of the whole network (`--compile`), or of its quantizers alone (`--kernels`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.utils._triton
from torch import nn

from utils.config.schema import PrecisionConfig
from utils.errors import TrainingError, UserError

MOST_GRAPHS = 512  # a policy's change of bits, a last batch and evaluation each need one more


def check_compiler(config: PrecisionConfig, device: torch.device) -> None:
    """Raise `UserError` where the options need a compiler that this machine lacks."""
    if config.compile == "none" and config.kernels == "eager":
        return
    option = f"--kernels {config.kernels}" if config.compile == "none" else f"--compile {config.compile}"
    if device.type == "cuda":
        if not torch.utils._triton.has_triton():
            raise UserError(
                f"{option} needs the package triton on a GPU: install it, or leave the option out"
            )
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise UserError(
            f"{option} needs a C++ compiler on a CPU: install g++ (or name one in CXX), or leave the option out"
        ) from error


def compiled(model: nn.Module, mode: str) -> nn.Module:
    """The network compiled in a mode of `torch.compile`; itself for `none`.

    It shares parameters and state with `model`, which stays as it is. Each shape of images has a graph of its own, so
    that a run computes the same bits wherever it was resumed; a part that cannot be in the one graph is an error.
    """
    if mode == "none":
        return model
    allow_many_graphs()
    found = torch.compile(model, fullgraph=True, dynamic=False, mode=mode)
    assert isinstance(found, nn.Module)
    return found


def allow_many_graphs() -> None:
    """Let a policy, or a network of many kinds of layers, have as many graphs as it needs; beyond these is an error."""
    config = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = MOST_GRAPHS
    config.fail_on_recompile_limit_hit = True  # otherwise it would go on uncompiled


@contextlib.contextmanager
def compiling(config: PrecisionConfig) -> Iterator[None]:
    """Turn errors of the compiler into a `TrainingError` of one line."""
    try:
        yield
    except Exception as error:
        place, name = type(error).__module__, type(error).__name__
        if not place.startswith(("torch._dynamo", "torch._inductor")) or name == "TorchRuntimeError":
            raise  # the latter is an error of the network itself
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        one = "the quantizers" if config.compile == "none" else "this network as one graph"
        option = "write --kernels eager" if config.compile == "none" else "leave --compile out"
        raise TrainingError(
            f"torch cannot compile {one} ({lines[0] if lines else error!r}); {option}"
        ) from error
