"""The registry of quantization methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from model.quantizers.frame import Quantizer
from model.quantizers.site import LayerSite
from utils.config.methods import MethodRecord, declare, misfit, unfit_levels
from utils.config.schema import TAGS, QuantizerConfig
from utils.errors import UserError
from utils.text import closest

Method = TypeVar("Method", bound=Quantizer)
_METHODS: dict[tuple[str, str], type[Quantizer]] = {}


def register(
    method: str, *tags: str, record: MethodRecord | None = None
) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: register a subclass of `Quantizer` as the method `method` on each of `tags`.

    Args:
        method: the name, which `QuantizerConfig.method` or the field `quant.TAG.method` of a keyword gives.
        tags: "fm" activations, "wt" weights, "ot" outputs.
        record: the options that the method reads; without it no option is reported as without effect.

    Raises:
        ValueError: a tag is not known, or the method is registered on it already.
        TypeError: the class has no `quantize` of its own.

    Example:
        >>> from model.quant import MethodRecord, Quantizer, register
        >>> @register("rounded", "fm", record=MethodRecord(reads=frozenset()))
        ... class Rounded(Quantizer):
        ...     def quantize(self, x):
        ...         return x + (x.round() - x).detach()
        >>> from model.quant import QuantConfig, QuantizerConfig, QuantLinear
        >>> layer = QuantLinear(2, 2)
        >>> fm = QuantizerConfig(tag="fm", enable=True, method="rounded")
        >>> layer.build_quantizers(QuantConfig(fm=fm), "fc")
        >>> import torch
        >>> layer.quant_activation(torch.tensor([[0.2, 1.7]]))
        tensor([[0., 2.]])
    """
    for tag in tags:
        if tag not in TAGS:
            raise ValueError(f"{method}: a tag is one of {', '.join(TAGS)}, not {tag!r}")
        if (method, tag) in _METHODS:
            raise ValueError(f"{method} is registered twice for {tag}")

    if record is not None and not isinstance(record, MethodRecord):
        raise TypeError(f"{method}: record must be a MethodRecord, not a {type(record).__name__}")

    def add(cls: type[Method]) -> type[Method]:
        if not (isinstance(cls, type) and issubclass(cls, Quantizer)):
            raise TypeError(f"{getattr(cls, '__name__', cls)} must be a class of model.quant.Quantizer's")
        if cls.quantize is Quantizer.quantize:
            raise TypeError(
                f"{cls.__name__} has no quantize(self, x), which every method of quantization needs"
            )
        if record is not None:
            declare(method, tags, record)
        _METHODS.update(dict.fromkeys(((method, tag) for tag in tags), cls))
        return cls

    return add


def methods() -> dict[tuple[str, str], type[Quantizer]]:
    """All registered methods: (method, tag) -> class.

    Example:
        >>> from model.quant import methods
        >>> methods()["lsq", "wt"].__name__
        'LSQ'
    """
    return dict(_METHODS)


def method_class(config: QuantizerConfig) -> type[Quantizer]:
    """The class of the method that `config` names on its tag.

    Raises:
        UserError: there is none, or it does not take a value of the configuration.
    """
    try:
        cls = _METHODS[config.method, config.tag]
    except KeyError:
        known = sorted(method for method, tag in _METHODS if tag == config.tag)
        raise UserError(
            f"{config.method!r} has no quantizer for {config.tag}{closest(config.method, known)}; there are "
            f"{', '.join(known)}"
        ) from None
    if cls.level_limit is not None and config.levels > cls.level_limit:
        raise UserError(
            unfit_levels(config)
            or f"{config.method} takes at most {cls.level_limit} levels, not {config.levels}"
        )
    if fault := misfit(config):
        raise UserError(f"QuantizerConfig: {fault}")
    return cls


def build_quantizer(config: QuantizerConfig, site: LayerSite) -> nn.Module:
    """The quantizer that `config` describes at `site`; the identity when it is not enabled, whatever the method.

    Raises:
        UserError: no method of that name for such tensors, or levels, a range or a type of gradient that it lacks.

    Example:
        >>> import torch
        >>> from model.quant import LayerSite, QuantizerConfig, build_quantizer
        >>> config = QuantizerConfig(tag="fm", enable=True, method="dorefa", levels=4, half_range=True)
        >>> site = LayerSite(name="conv1", channels=3, channel_dim=1, ndim=4, fan=27)
        >>> x = torch.tensor([-1.0, 0.2, 0.5, 0.9, 7.0]).reshape(5, 1, 1, 1).expand(5, 3, 1, 1)
        >>> [round(value, 2) for value in build_quantizer(config, site)(x)[:, 0, 0, 0].tolist()]
        [0.0, 0.33, 0.67, 1.0, 1.0]
    """
    return method_class(config)(config, site) if config.enable else nn.Identity()
