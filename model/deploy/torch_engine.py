"""Running packed networks and programs of `torch.export` in torch, and reading what their quantizers compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from model.deploy import program
from model.deploy.codes import Array
from model.deploy.packages import needed
from model.layers.quantized import BASES, quantizers
from utils.checkpoint.exported import kind_of
from utils.config.layer_bits import PARTS

PRODUCTS = ("conv", "linear", "addmm", "matmul")  # parts of the names of a program's operators
# Endings of the tensors that a quantizer makes.
QUANTIZERS = tuple(f".{part}" for part, tag in PARTS.items() if tag != "wt")


class TorchRunner:
    """A network in torch, in float; see `model.deploy.engines.Runner`."""

    integer: int | None = 0

    def __init__(self, path: Path, network: nn.Module, *, tensors: bool = False) -> None:
        self.path, self._network = path, network
        self.layers = sum(isinstance(module, BASES) for module in network.modules())
        names = [name for name, _ in activations(network)] if tensors else []
        self.tensors = tuple(names)

    def prepared(self, images: Array) -> Array:
        """The images."""
        return images

    def run(self, images: Array) -> dict[str, Array]:
        """See `Runner`."""
        with torch.no_grad(), kept_values(self._network, self.tensors) as values:
            logits = self._network(torch.from_numpy(images)).float().numpy()
        return {"logits": logits, **values}

    def __call__(self, images: Array) -> dict[str, Array]:
        """See `Runner`."""
        return self.run(images)


class ProgramRunner(TorchRunner):
    """A program of `torch.export`, whose graph still names the modules that it was made of."""

    def __init__(self, path: Path, network: fx.GraphModule, *, tensors: bool = False) -> None:
        super().__init__(path, network)
        called = [node for node in network.graph.nodes if node.op == "call_function"]
        self.layers = sum(any(part in str(node.target) for part in PRODUCTS) for node in called)
        self._outputs = outputs_of_quantizers(network.graph) if tensors else {}
        self.tensors = tuple(self._outputs.values())

    def run(self, images: Array) -> dict[str, Array]:
        """See `Runner`."""
        if not self._outputs:
            with torch.no_grad():
                return {"logits": self._network(torch.from_numpy(images)).float().numpy()}
        with torch.no_grad():
            interpreter = _Interpreter(self._network, self._outputs)
            logits = interpreter.run(torch.from_numpy(images)).float().numpy()
        return {"logits": logits, **interpreter.values}


class _Interpreter(fx.Interpreter):
    """Runs a program node by node, and keeps the values of some nodes."""

    def __init__(self, network: nn.Module, names: dict[fx.Node, str]) -> None:
        super().__init__(network)
        self._wanted, self.values = names, dict[str, Array]()

    def run_node(self, n: fx.Node) -> Any:
        """Run a node."""
        value = super().run_node(n)
        if n in self._wanted:
            first = value[0] if isinstance(value, tuple | list) else value
            self.values[self._wanted[n]] = first.float().numpy()
        return value


def outputs_of_quantizers(graph: fx.Graph) -> dict[fx.Node, str]:
    """The nodes that leave a quantizer of activations, with its name: those that its layer, or another one, reads.

    The input of a quantizer may leave it, too, where it was traced as a new tensor; only other layers read it.
    """
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        for name in _modules(node):
            if not name.endswith(QUANTIZERS):
                continue
            readers = [modules for user in node.users if name not in (modules := _modules(user))]
            inside = any(name.rpartition(".")[0] in modules for modules in readers)
            if inside or (readers and name not in found):
                found[name] = node
    return {node: name for name, node in found.items()}


def _modules(node: fx.Node) -> set[str]:
    """The names of the modules that a node was traced in."""
    return {str(entry[0]) for entry in node.meta.get("nn_module_stack", {}).values()}


def open_torch(path: Path, tensors: bool) -> TorchRunner:
    """A packed network or a program.

    Raises:
        UserError: the file is damaged, or none of these.
    """
    if kind_of(path) == "program":
        network, _ = program.read(path)
        assert isinstance(network, fx.GraphModule)
        return ProgramRunner(path, network, tensors=tensors)
    needed("safetensors")
    from model.deploy.packed import read_checkpoint
    from model.load import trained_from

    return TorchRunner(path, trained_from(read_checkpoint(path), path).network, tensors=tensors)


def activations(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The quantizers of inputs and outputs that are switched on, by name, in the order of the modules."""
    return [
        (name, module) for name, module in quantizers(network) if module.config.tag != "wt" and module.enabled
    ]


@contextlib.contextmanager
def kept_values(network: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Array]]:
    """What quantizers put out when the network runs inside, float32, in the order in which they run."""
    values: dict[str, Array] = {}

    def keep(name: str, _module: nn.Module, _input: tuple[Tensor, ...], output: Tensor) -> None:
        values[name] = output.float().numpy()

    hooks = [
        module.register_forward_hook(partial(keep, name))
        for name, module in activations(network)
        if name in names
    ]
    try:
        yield values
    finally:
        for hook in hooks:
            hook.remove()
