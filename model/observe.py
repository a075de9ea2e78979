"""Observing a network without changing it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from utils.errors import UserError

# Operators -> positions of the two factors of a convolution or a matrix product among their arguments.
_aten = torch.ops.aten
PRODUCTS: dict[Any, tuple[int, int]] = {
    **dict.fromkeys((_aten.convolution, _aten.conv1d, _aten.conv2d, _aten.conv3d), (0, 1)),
    **dict.fromkeys((_aten.linear, _aten.matmul, _aten.mm, _aten.bmm, _aten.mv, _aten.dot), (0, 1)),
    **dict.fromkeys((_aten.addmm, _aten.addmv, _aten.addbmm, _aten.baddbmm), (1, 2)),
}
# Operators that multiply by some of their arguments; those with two dimensions and more count.
_INSIDE = {
    "aten::_trilinear", "aten::mkldnn_rnn_layer", "aten::_cudnn_rnn", "aten::_thnn_fused_lstm_cell",
    "aten::_native_multi_head_attention", "aten::_transformer_encoder_layer_fwd", "torchvision::deform_conv2d",
}  # fmt: skip


@contextmanager
def observing(model: nn.Module) -> Iterator[list[RemovableHandle]]:
    """Put `model` into evaluation mode without gradients; hooks added to the yielded list are removed.

    Afterwards every module is in its earlier mode, also where the modes differed.
    """
    modes = [(module, module.training) for module in model.modules()]
    hooks: list[RemovableHandle] = []
    model.eval()
    try:
        with torch.no_grad():
            yield hooks
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training


def first_input(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """The first argument of a layer, by position or by name, from the arguments of a hook `with_kwargs`."""
    return next(iter((*inputs, *named.values())))


class BorrowsWeight(nn.Module):
    """The base of layers whose `weight` is a parameter of the module around them; its products count as theirs."""

    weight: nn.Parameter


@dataclass
class Product:
    """What a module multiplies by its own parameters in one pass.

    Attributes:
        parameters: their names and shapes.
        macs: multiply-accumulate operations.
        output: shape of the last result.
    """

    parameters: dict[str, tuple[int, ...]]
    macs: int
    output: tuple[int, ...]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the parameters."""
        return tuple(self.parameters.values())

    @property
    def weights(self) -> int:
        """The number of elements of the parameters."""
        return sum(map(math.prod, self.shapes))


def within(name: str) -> Iterator[str]:
    """The name of a module and those of the modules around it, from inside to outside; the network's own is empty.

    Example:
        >>> from model.observe import within
        >>> list(within("layer1.0.conv1"))
        ['layer1.0.conv1', 'layer1.0', 'layer1', '']
    """
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


class ParameterProducts(TorchDispatchMode):
    """Sees every convolution and matrix product by a parameter, in whatever module, while it is entered.

    It looks at the operators that run. A factor counts as a parameter when it is computed from parameters, buffers
    and constants alone, such as a weight that is normalised before; products of two such factors do not count. Make the
    input before entering: a tensor that is made inside, from no other one, is a constant.

    Args:
        model: its parameters and buffers are looked for.

    Attributes:
        found: the name of the module that owns the parameters, or of the layer that multiplies by those of the module
            around it -> what it multiplies, in the order of the first products.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from model.observe import ParameterProducts
        >>> class Mixed(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = nn.Parameter(torch.ones(2, 12))
        ...     def forward(self, x):
        ...         return x @ self.table.reshape(4, 6)
        >>> with ParameterProducts(network := nn.Sequential(Mixed())) as products, torch.no_grad():
        ...     _ = network(torch.ones(5, 4))
        >>> products.found
        {'0': Product(parameters={'0.table': (2, 12)}, macs=120, output=(5, 6))}
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's own switch: otherwise it imports its compiler here, which takes a second at every start."""
        return False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, Product] = {}
        users = {
            id(part.weight): name for name, part in model.named_modules() if isinstance(part, BorrowsWeight)
        }
        self._owners = {
            name: users.get(id(value), name.rpartition(".")[0]) for name, value in model.named_parameters()
        }
        self._shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
        # Tensors that do not depend on the input, with the names of the parameters that they are computed from.
        self._fixed = WeakTensorKeyDictionary()
        for _, value in model.named_buffers():
            self._fixed[value] = frozenset[str]()
        for name, value in model.named_parameters():
            self._fixed[value] = frozenset({name})

    def __enter__(self) -> ParameterProducts:
        """Begin to look; autocast must cast parameters again, since it would hand out unknown copies."""
        torch.clear_autocast_cache()
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """End; an operator that torch compiles itself, such as flex_attention, is refused: nobody sees inside it."""
        super().__exit__(kind, error, trace)
        if isinstance(error, NotImplementedError) and "HigherOrderOperator" in str(error):
            name = str(error).partition("HigherOrderOperator ")[2].partition(" ")[0] or "an operator"
            raise UserError(
                f"the network calls {name}, inside of which nothing can be observed or quantized: call "
                "torch.nn.functional.scaled_dot_product_attention, or other plain operators"
            ) from error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the class."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        names = [self._fixed.get(value) for value in tensors]
        places = PRODUCTS.get(func.overloadpacket)
        if places is not None:
            self._multiplied(func, args, kwargs, result, [args[place] for place in places])
        elif func.name().partition(".")[0] in _INSIDE:
            self._multiplied(func, args, kwargs, result, [each for each in tensors if each.ndim > 1])
        for value in tree_leaves(result):
            if not isinstance(value, Tensor):
                continue
            if None in names:
                self._fixed.pop(value, None)
            else:
                self._fixed[value] = frozenset[str]().union(*names)  # pyright: ignore[reportArgumentType]
        return result

    def forget(self, value: Tensor) -> None:
        """Take a tensor that is computed from parameters for a constant from now on, as a quantized weight is one."""
        if value in self._fixed:
            self._fixed[value] = frozenset[str]()

    def _multiplied(self, func: Any, args: Any, kwargs: Any, result: Any, factors: list[Tensor]) -> None:
        named = [self._fixed.get(factor) or frozenset() for factor in factors]
        if all(named):
            return
        output = next(value for value in tree_leaves(result) if isinstance(value, Tensor))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            macs = count(*args, **kwargs, out_val=result) // 2
        else:
            macs = sum(
                output.numel() * factor[0].numel()
                for factor, names in zip(factors, named, strict=True)
                if names
            )
        owners: dict[str, dict[str, tuple[int, ...]]] = {}
        names = frozenset[str]().union(*named)
        # A vector is a bias or a factor of a weight, unless it is all that there is.
        for name in sorted({name for name in names if len(self._shapes[name]) > 1} or names):
            owners.setdefault(self._owners[name], {})[name] = self._shapes[name]
        for owner, parameters in owners.items():
            before = self.found.setdefault(owner, Product({}, 0, ()))
            before.parameters |= parameters
            before.macs += macs
            before.output = tuple(output.shape)
