"""Finding the products of attention in a network, and those of `scaled_dot_product_attention` as layers."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from model.layers.matmul import WORD, AttentionMatmuls, QuantMatmul, TakesMatmuls, additive
from model.layers.quantized import keep_full_precision
from model.observe import ParameterProducts, observing
from model.quantizers.frame import Quantizer
from model.selection import Selection, matches
from utils.errors import UserError
from utils.text import some_names

_FUSED = functional.scaled_dot_product_attention
_SWITCH = "fused_attn"  # timm's: whether an attention calls that function
_DIMS = 4  # [N, heads, L, d]


def add_matmuls(network: nn.Module, *inputs: Any, select: Selection | None = None) -> tuple[str, ...]:
    """Give every attention of a network the layers of its two products, whose quantizers are not built yet.

    One pass shows the products of two activations. Those of `nn.MultiheadAttention` and torchvision's Swin, once they
    call their layers (`model.layers.called.call_layers`), and those of `scaled_dot_product_attention` in whatever
    module can be quantized. timm's attentions are switched to this function first.

    Args:
        network: changed in place.
        inputs: its positional inputs, for one pass in evaluation mode and without gradients.
        select: attentions whose own names it does not include, or excludes, stay as they are; default: all.

    Returns:
        The names of these layers, without those that were there before.

    Raises:
        UserError: there is no attention or none is selected, or another product of two activations.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.nn.functional import scaled_dot_product_attention
        >>> from model.layers.fused_attention import add_matmuls
        >>> class Attention(nn.Module):
        ...     def forward(self, x):
        ...         return scaled_dot_product_attention(x, x, x)
        >>> network, x = nn.Sequential(Attention()), torch.rand(1, 2, 3, 4)
        >>> before = network(x)
        >>> add_matmuls(network, x)
        ('0.matmuls.query_key', '0.matmuls.weights_value')
        >>> torch.allclose(network(x), before)
        True
    """
    before = {module for module in network.modules() if isinstance(module, QuantMatmul)}
    chosen = _chosen(network, select or Selection())
    fresh = [module for module in chosen if isinstance(module, TakesMatmuls) and module.own_matmuls() is None]
    for module in fresh:
        module.add_module("matmuls", AttentionMatmuls().train(module.training))
    for module in chosen:
        if type(module).__module__.startswith("timm.") and vars(module).get(_SWITCH) is False:
            vars(module)[_SWITCH] = True
    seen = _Seen(network)
    with observing(network) as hooks, seen, _Noted(seen):
        hooks += seen.watch()
        network(*inputs)
    others = {name: each for name in seen.others if (each := network.get_submodule(name)) in chosen}
    if others:
        kinds = sorted({type(each).__name__ for each in others.values()})
        raise UserError(
            f"{WORD}: {some_names(others)} ({', '.join(kinds)}): multiplies activations in a way of its own, "
            "where no quantizer can reach: choose another network, or leave the word out"
        )
    fused = {name: sizes for name, sizes in seen.fused.items() if network.get_submodule(name) in chosen}
    for name, (heads, inner, keys) in fused.items():
        _call_matmuls(network.get_submodule(name), heads, inner, keys)
    for module in fresh:
        if module not in seen.reached:  # the network does not call it
            del module._modules["matmuls"]
    if not (fused or seen.reached):
        if left := [*seen.fused, *seen.others]:
            raise UserError(f"{WORD}: the selection leaves out every attention: {some_names(left)}")
        raise UserError(f"{WORD}: the network has no attention: leave the word out")
    for name in (*seen.fused, *seen.others):
        if (module := network.get_submodule(name)) not in chosen:
            keep_full_precision(module, "is not selected")
    layers = network.named_modules()
    return tuple(name for name, layer in layers if isinstance(layer, QuantMatmul) and layer not in before)


def _chosen(network: nn.Module, select: Selection) -> dict[nn.Module, None]:
    """The modules that a selection includes and does not exclude, in the network's order."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return {
        module: None
        for module, own in names.items()
        if any(matches(pattern, own) for pattern in select.include)
        and not any(matches(pattern, own) for pattern in select.exclude)
    }


class ActivationProducts(ParameterProducts):
    """Sees the products of two activations too, while it is entered and `watch` has added its hooks.

    Attributes:
        others: the names of modules that multiply two activations outside of a `QuantMatmul`.
        inside: a function that is known runs; its products do not count.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.others: dict[str, None] = {}
        self.inside = False
        self._network = network
        self._names: list[str] = []  # of the modules that are being called

    def watch(self) -> list[RemovableHandle]:
        """Add the hooks by which it knows the module that is being called; the caller removes them."""
        hooks: list[RemovableHandle] = []
        for name, module in self._network.named_modules():
            hooks.append(module.register_forward_pre_hook(functools.partial(self.enter, name)))
            hooks.append(module.register_forward_hook(self.leave, always_call=True))
        return hooks

    def enter(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A hook before each module."""
        self._names.append(name)

    def leave(self, *_: Any) -> None:
        """A hook after each module, also where it fails."""
        self._names.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `ParameterProducts`."""
        if not self.inside and "scaled_dot_product" in func.name():  # called inside another function of torch
            self.others.setdefault(self._names[-1])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _multiplied(self, func: Any, args: Any, kwargs: Any, result: Any, factors: list[Tensor]) -> None:
        super()._multiplied(func, args, kwargs, result, factors)
        between = all(self._fixed.get(factor) is None for factor in factors)
        own = isinstance(self._network.get_submodule(self._names[-1]), QuantMatmul | Quantizer)
        if between and not self.inside and not own:
            self.others.setdefault(self._names[-1])


class _Seen(ActivationProducts):
    """Sees which attentions call `scaled_dot_product_attention`, or take layers of their own.

    Attributes:
        fused: name of a module -> the heads of its `scaled_dot_product_attention`, their features and the keys.
        reached: the attentions that took their own `matmuls`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.fused: dict[str, tuple[int, int, int]] = {}
        self.reached: set[nn.Module] = set()
        self._calls: list[int] = []  # how often each module has called the function

    def enter(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A hook before each module."""
        super().enter(name, module, inputs)
        self._calls.append(0)
        if isinstance(module, QuantMatmul):
            module.heads, module.inner = inputs[0].shape[1], inputs[0].shape[-1]
            self.reached.add(self._network.get_submodule(name.rpartition(".matmuls")[0]))

    def leave(self, *_: Any) -> None:
        """A hook after each module, also where it fails."""
        super().leave()
        self._calls.pop()

    def attended(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> None:
        """Note a call of the function."""
        name = self._names[-1]
        module = self._network.get_submodule(name)
        self._calls[-1] += 1
        fits = all(x.ndim == _DIMS and x.shape[1] == query.shape[1] for x in (query, key, value))
        replaced = "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule)
        if not fits or replaced or self._calls[-1] > 1 or hasattr(module, "matmuls"):
            self.others.setdefault(name)
        else:
            self.fused[name] = (query.shape[1], query.shape[-1], key.shape[-2])


class _Noted(TorchFunctionMode):
    """Notes the calls of `scaled_dot_product_attention`."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the class."""
        kwargs = kwargs or {}
        if func is not _FUSED:
            return func(*args, **kwargs)
        self._seen.attended(*args, **kwargs)
        self._seen.inside = True
        try:
            return func(*args, **kwargs)
        finally:
            self._seen.inside = False


class _Replaced(TorchFunctionMode):
    """Computes `scaled_dot_product_attention` by the layers of an attention."""

    def __init__(self, matmuls: AttentionMatmuls) -> None:
        super().__init__()
        self._matmuls = matmuls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the class."""
        kwargs = kwargs or {}
        return self._attend(*args, **kwargs) if func is _FUSED else func(*args, **kwargs)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """The function, with its arguments; a boolean mask has True where positions take part."""
        if is_causal and attn_mask is not None:
            raise RuntimeError("scaled_dot_product_attention: give attn_mask or is_causal=True, not both")
        mask = attn_mask
        if mask is not None:
            mask = additive(~mask if mask.dtype == torch.bool else mask, query)
        if is_causal:
            mask = additive(query.new_ones(query.shape[-2], key.shape[-2]).triu(1).bool(), query)
        y = self._matmuls(query, key, value, mask, dropout=dropout_p, scale=scale)[0]
        return y.transpose(1, 2).contiguous().transpose(1, 2)  # the function's layout: callers may view it


class FusedAttention(TakesMatmuls):
    """The base of attentions whose `scaled_dot_product_attention` is computed by the layers `matmuls`.

    Attributes:
        attention_class: the class of the attention.
    """

    attention_class: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class of the attention."""
        matmuls = self.own_matmuls()
        assert matmuls is not None
        with _Replaced(matmuls):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy and a pickle find the class by that of the attention."""
        return (
            _blank,
            (type(self).attention_class,),
            self.__dict__,
        )  # not of the object, which may have its own


@functools.cache
def _fused(kind: type[nn.Module]) -> type[FusedAttention]:
    """The class of an attention of the class `kind` whose products are layers."""
    return type(
        f"Quant{kind.__name__}", (FusedAttention, kind), {"__doc__": kind.__doc__, "attention_class": kind}
    )


def _blank(kind: type[nn.Module]) -> nn.Module:
    """Such an attention without its state."""
    made = _fused(kind)
    return made.__new__(made)


def _call_matmuls(attention: nn.Module, heads: int, inner: int, keys: int) -> None:
    matmuls = AttentionMatmuls().train(attention.training)
    matmuls.query_key.heads = matmuls.weights_value.heads = heads
    matmuls.query_key.inner, matmuls.weights_value.inner = inner, keys
    attention.__class__ = _fused(type(attention))
    attention.add_module("matmuls", matmuls)
