"""The matrix products of attention as layers, so that their factors can have quantizers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.layers.quantized import QuantLayer
from model.quantizers.registry import build_quantizer
from model.quantizers.site import LayerSite
from utils.config.methods import attention_fault
from utils.config.schema import QuantConfig
from utils.errors import UserError

WORD = "attention-matmul"  # the keyword, for messages


class QuantMatmul(QuantLayer):
    """A matrix product of two activations, each with a quantizer: those of `QuantConfig.fm`.

    Levels are signed, but for the output of a softmax, whose range is [0, 1]: they start at zero. The heads of the
    attention are what `quant_group` calls channels.

    Args:
        of_softmax: the left factor is the output of a softmax.

    Attributes:
        quant_left: quantizes the left factor.
        quant_right: quantizes the right factor.
        heads: dimension 1 of both factors.
        inner: products that one output value sums up.

    Example:
        >>> import torch
        >>> from model.layers.matmul import QuantMatmul
        >>> from model.quant import QuantConfig, QuantizerConfig
        >>> product = QuantMatmul(of_softmax=True)
        >>> product.heads, product.inner = 2, 3
        >>> fm = QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, half_range=True)
        >>> product.build_quantizers(QuantConfig(fm=fm, attention_matmul=True), "matmul")
        >>> product(torch.rand(1, 2, 3, 3).softmax(-1), torch.rand(1, 2, 3, 5)).shape
        torch.Size([1, 2, 3, 5])
        >>> [quantizer.config.half_range for _, quantizer in product.quantizers()]
        [True, False]
    """

    own_signs: ClassVar[bool] = True
    parts: ClassVar[Mapping[str, str]] = MappingProxyType({"quant_left": "fm", "quant_right": "fm"})
    # Those of a layer with a weight.
    quant_activation: nn.Module = nn.Identity()
    quant_weight: nn.Module = nn.Identity()
    quant_output: nn.Module = nn.Identity()

    def __init__(self, *, of_softmax: bool = False) -> None:
        super().__init__()
        self.of_softmax = of_softmax
        self.heads = self.inner = 1
        self.quant_left: nn.Module = nn.Identity()
        self.quant_right: nn.Module = nn.Identity()

    def build_quantizers(self, config: QuantConfig, name: str) -> None:
        """Create the quantizers, which messages call `name`.

        Raises:
            UserError: the method has no such levels, or its groups do not divide the heads.
        """
        if fault := attention_fault(config.fm) if config.fm.enable else "":
            raise UserError(f"{WORD}: {fault}")
        site = LayerSite(name=name, channels=self.heads, channel_dim=1, ndim=4, fan=self.inner)
        for part in self.parts:
            settings = dataclasses.replace(config.fm, half_range=False)
            if self.of_softmax and part == "quant_left":
                settings = dataclasses.replace(config.fm, half_range=True, grid="midrise")
            try:
                setattr(self, part, build_quantizer(settings, site))
            except UserError as error:
                raise UserError(f"{WORD}: {error}") from error

    def forward(self, left: Tensor, right: Tensor, dropout: float = 0.0, scale: float = 1.0) -> Tensor:
        """Left [N, heads, L, inner], right [N, heads, inner, M], output [N, heads, L, M].

        Dropout is that of the quantized left factor, whose range is the same in training and evaluation so. The scale
        multiplies that factor too, since the product without it may be more than float16 holds.
        """
        if left.numel() == 0 or right.numel() == 0:
            self.check_empty()
            return left * scale @ right
        left, right = self.quant_left(left), self.quant_right(right)
        left = left if scale == 1 else left * scale
        return (functional.dropout(left, dropout) if dropout else left) @ right


def check_matmuls(config: QuantConfig, example: object) -> None:
    """Check that products of attention can be quantized as asked for, before anything is changed.

    Args:
        config: the quantizers.
        example: the inputs of a pass; None: there are none.

    Raises:
        UserError: `fm` is not enabled or does not suit, or there are no inputs.
    """
    fault = ""
    if not config.fm.enable:
        fault = "fm quantizes the factors: enable it, or leave attention_matmul out"
    elif example is None:
        fault = "a pass shows the products: give quantize an example=(images,)"
    if fault := fault or attention_fault(config.fm):
        raise UserError(f"{WORD}: {fault}")


class AttentionMatmuls(nn.Module):
    """The two products of an attention, `softmax(scale q k^T + mask) v`.

    Attributes:
        query_key: the product of query and key.
        weights_value: the product of the softmax's output and the value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query_key = QuantMatmul()
        self.weights_value = QuantMatmul(of_softmax=True)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *,
        dropout: float = 0.0, scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The attention's result and the output of its softmax, before that is quantized.

        Args:
            query: float [N, heads, L, d].
            key: float [N, heads, S, d].
            value: float [N, heads, S, e].
            mask: is added to the scores, broadcastable to [N, heads, L, S]; see `masked_softmax`.
            dropout: the share of the softmax's output that is dropped.
            scale: factor of the scores; None: d ** -0.5.

        Returns:
            float [N, heads, L, e] and [N, heads, L, S].
        """
        scores = self.query_key(query, key.mT, scale=query.shape[-1] ** -0.5 if scale is None else scale)
        weights = scores.softmax(-1) if mask is None else masked_softmax(scores, mask)
        return self.weights_value(weights, value, dropout), weights


class TakesMatmuls(nn.Module):
    """The base of attentions whose products are those of a child `matmuls`, where they have one."""

    def own_matmuls(self) -> AttentionMatmuls | None:
        """The child; None where the products are not quantized."""
        found = self._modules.get("matmuls")
        assert found is None or isinstance(found, AttentionMatmuls)
        return found


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """The softmax of scores + mask over the last dimension; 0 where a row of the mask is minus infinity throughout.

    Such a row is a position that sees none. Torch's `scaled_dot_product_attention` gives 0 there, too.

    Args:
        scores: float [N, heads, L, S].
        mask: of the same type, broadcastable to the scores.

    Returns:
        float [N, heads, L, S].

    Example:
        >>> import torch
        >>> from model.layers.matmul import masked_softmax
        >>> inf = float("inf")
        >>> masked_softmax(torch.zeros(1, 1, 2, 2), torch.tensor([[0.0, -inf], [-inf, -inf]]))
        tensor([[[[1., 0.],
                  [0., 0.]]]])
    """
    blind = (mask == float("-inf")).all(-1, keepdim=True)
    # Filled before and behind, so that gradients are finite too.
    return (scores + mask).masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """What is added to scores: 0, or minus infinity where a boolean mask is True; others in the type of `like`.

    Example:
        >>> import torch
        >>> from model.layers.matmul import additive
        >>> additive(torch.tensor([True, False]), torch.ones(1))
        tensor([-inf, 0.])
    """
    if mask.is_floating_point():
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
