"""A network compiled by `torch.compile`, one graph forwards and one backwards (`--compile`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from utils.errors import TrainingError, UserError

MOST_GRAPHS = 512  # a policy's change of bits, a last batch and evaluation each need one more


def check_compiler(mode: str, device: torch.device) -> None:
    """Raise `UserError` where the mode needs a compiler that this machine lacks."""
    if mode == "none" or device.type != "cpu":  # torch for CUDA brings Triton, which compiles
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise UserError(
            f"--compile {mode} needs a C++ compiler on a CPU: install g++ (or name one in CXX), or leave --compile out"
        ) from error


def compiled(model: nn.Module, mode: str) -> nn.Module:
    """The network compiled in a mode of `torch.compile`; itself for `none`.

    It shares parameters and state with `model`, which stays as it is. Each shape of images has a graph of its own, so
    that a run computes the same bits wherever it was resumed; a part that cannot be in the one graph is an error.
    """
    if mode == "none":
        return model
    config = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = MOST_GRAPHS
    config.fail_on_recompile_limit_hit = True  # otherwise it would go on uncompiled
    found = torch.compile(model, fullgraph=True, dynamic=False, mode=None if mode == "default" else mode)
    assert isinstance(found, nn.Module)
    return found


@contextlib.contextmanager
def compiling(mode: str) -> Iterator[None]:
    """Turn errors of the compiler into a `TrainingError` of one line."""
    try:
        yield
    except Exception as error:
        if mode == "none" or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TrainingError(
            f"--compile {mode}: torch cannot compile this network as one graph ({lines[0] if lines else error!r}); "
            "leave --compile out"
        ) from error
