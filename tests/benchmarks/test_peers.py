"""LSQ as lsq-net computes it, beside ours with the same levels."""

from __future__ import annotations

import subprocess
import sys

from tests import ROOT

# In a process of its own, since the file adds its methods to the registry.
PROGRAM = """
import torch
from benchmarks import peer_methods
from model.quant import LayerSite, QuantizerConfig
from model.quantizers.registry import build_quantizer

torch.manual_seed(0)
for tag, shape, dim, levels in (("wt", (6, 4, 3, 3), 0, 4), ("wt", (6, 4, 3, 3), 0, 16), ("fm", (1, 4, 5, 5), 1, 4)):
    site = LayerSite(name="0", channels=shape[dim], channel_dim=dim, ndim=4, fan=36)
    common = {"tag": tag, "enable": True, "levels": levels, "half_range": tag == "fm"}
    ours = build_quantizer(
        QuantizerConfig(method="lsq", grid="midtread" if tag == "wt" else "midrise", grad_scale="paper", **common), site
    )
    theirs = build_quantizer(QuantizerConfig(method="lsq-net", **common), site)
    x, g = torch.randn(shape), torch.randn(shape)
    found = []
    for quantizer in (ours, theirs):
        quantizer.initialise_from(x)
        given = x.clone().requires_grad_()
        y = quantizer(given)
        y.backward(g)
        (parameter,) = [p for p in quantizer.parameters()]
        # Our clip value moves as many steps as it is long; lsq-net counts the elements of the tensor, ours those of a
        # channel and of one image.
        factor = len(parameter.flatten()) ** 0.5 if quantizer is theirs else 1 / quantizer.grid().top
        learned = parameter.grad.flatten() * factor
        found.append((y.detach(), given.grad, learned))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
print("equal")
"""


def test_lsq_net_has_the_levels_and_gradients_of_lsq() -> None:
    """One learns its step, the other its clip value: the step moves alike."""
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "equal"), done.stderr
