"""`nn.MultiheadAttention` as one that calls its linear layers, so that these can have quantizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.layers.matmul import TakesMatmuls, additive
from model.layers.quantized import QuantLinear
from model.observe import BorrowsWeight
from utils.errors import UserError

_PARTS = ("q", "k", "v")


class Part(NamedTuple):
    """Some positions of an input, and the rows of a weight that they are multiplied by."""

    tokens: slice
    rows: slice


class Projection(BorrowsWeight, nn.Linear):
    """A linear layer that multiplies by parameters of the attention around it, which keeps them and their names.

    Args:
        attention: has the parameters.
        weight: the name of the weight in it, float32 [out, in].
        part: the bias is this of three equal parts of `in_proj_bias`; None: it is the whole.

    Attributes:
        weight_name: the name of the weight in the attention.
    """

    _around: nn.MultiheadAttention

    def __init__(self, attention: nn.MultiheadAttention, weight: str, part: int | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a weight of its own
        vars(self)["_around"] = attention  # no child: the attention is around
        self.weight_name, self._part = weight, part
        self.out_features, self.in_features = getattr(attention, weight).shape
        self.train(attention.training)

    @property
    def weight(self) -> nn.Parameter:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The attention's parameter, float32 [out, in]."""
        return getattr(self._around, self.weight_name)

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The attention's bias or a part of it, float32 [out]."""
        whole = self._around.in_proj_bias
        return whole if whole is None or self._part is None else whole.chunk(3)[self._part]

    def forward(self, input: Tensor, parts: Sequence[Part] = ()) -> Tensor:
        """Input [..., in], output [..., out]; with `parts` see `multiplied`."""
        return multiplied(input, self.weight, self.bias, parts)


class QuantProjection(QuantLinear, Projection):
    """`Projection` with quantizers on its input, weight and output. All parts share them."""

    def weight_entry(self, name: str) -> str:
        """See `QuantLayer`."""
        return f"{name.rpartition('.')[0]}.{self.weight_name}".lstrip(".")

    def forward(self, input: Tensor, parts: Sequence[Part] = ()) -> Tensor:
        """Input [..., in], output [..., out]; with `parts` see `multiplied`."""
        if not parts or isinstance(self.quant_output, nn.Identity):
            return self.quantized(input, parts=parts)
        y = self.quantized(input)  # the whole: the quantizer may know the channels by their place
        return torch.cat([y[:, tokens, rows] for tokens, rows in parts], 1)

    def multiply(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        quantize: Callable[[Tensor], Tensor],
        parts: Sequence[Part] = (),
    ) -> Tensor:
        """See `QuantLayer` and `multiplied`."""
        return multiplied(quantize(x), weight, bias, parts)


def multiplied(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part]) -> Tensor:
    """A linear layer's output, or that of parts of its input and weight.

    Args:
        x: float32 [..., in]; [N, L, in] with parts.
        weight: float32 [out, in].
        bias: float32 [out].
        parts: each with as many rows; none: all positions are multiplied by all rows.

    Returns:
        float32 [..., out]; with parts [N, sum of the parts' tokens, rows of a part].

    Example:
        >>> import torch
        >>> from model.layers.attention import Part, multiplied
        >>> x, weight = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[10.0], [100.0]])
        >>> multiplied(x, weight, None, [Part(slice(1), slice(1)), Part(slice(1, 3), slice(1, 2))]).tolist()
        [[[10.0], [200.0], [300.0]]]
    """
    if not parts:
        return functional.linear(x, weight, bias)
    return torch.cat(
        [
            functional.linear(x[:, tokens], weight[rows], None if bias is None else bias[rows])
            for tokens, rows in parts
        ],
        1,
    )


class CalledAttention(TakesMatmuls, nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose projections are layers that it calls: `in_proj` and `out_proj`.

    Where the key or the value has another number of features than the query, `q_proj`, `k_proj` and `v_proj` take the
    place of `in_proj`. Parameters keep their names, so that a state dict loads and saves as before. Results differ
    from those of the class before by rounding alone; its fast path of evaluation is not taken. Where the factors of
    its products are quantized too, the weights that it returns are those before that, without dropout.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from model.convert import quantize
        >>> from model.quant import QuantConfig, QuantizerConfig
        >>> network = nn.TransformerEncoderLayer(8, 2, 16)
        >>> wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
        >>> quantize(network, QuantConfig(wt=wt, first_last=True)).replaced
        ('self_attn.in_proj', 'self_attn.out_proj', 'linear1', 'linear2')
        >>> [name for name in network.self_attn.state_dict() if ".quant_" not in name]
        ['in_proj_weight', 'in_proj_bias', 'out_proj.weight', 'out_proj.bias']
        >>> network(torch.rand(3, 1, 8)).shape
        torch.Size([3, 1, 8])
    """

    in_proj: Projection
    q_proj: Projection
    k_proj: Projection
    v_proj: Projection

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`, but for nested tensors, which are a `UserError`."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise UserError(
                "a nested tensor enters an attention whose layers are quantized: give a padded one and its "
                "key_padding_mask"
            )
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says of which kind attn_mask is: give the mask too")
        batched = query.ndim == 3
        if not batched:
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = self._projected(*_once(self._batch_first, query, key, value))
        mask = _sum_of_masks(attn_mask, key_padding_mask, self.num_heads, q)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, bias.expand(len(x), 1, -1)], 1)
                for x, bias in ((k, self.bias_k), (v, self.bias_v))
            )
            mask = None if mask is None else functional.pad(mask, (0, 1))
        if self.add_zero_attn:
            k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
            mask = None if mask is None else functional.pad(mask, (0, 1))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        drop = self.dropout if self.training else 0.0
        weights, matmuls = None, self.own_matmuls()
        if matmuls is not None:
            x, found = matmuls(q, k, v, mask, dropout=drop)
            weights = found if need_weights else None
        elif need_weights:
            scores = (q * self.head_dim**-0.5) @ k.mT
            weights = functional.dropout((scores if mask is None else scores + mask).softmax(-1), drop)
            x = weights @ v
        else:
            x = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return x.squeeze(0), None if weights is None else weights.squeeze(0)
        return x if self.batch_first else x.transpose(0, 1), weights

    def _batch_first(self, x: Tensor) -> Tensor:
        """[N, L, E], since quantizers take the first dimension for that of samples."""
        if x.ndim == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The three factors [N, L, E]; inputs that are one are the same tensor."""
        if self.in_proj_weight is None:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if query is key and key is value:
            return self.in_proj(query).chunk(3, -1)
        # One call, since each is a training pass to the quantizers. Positions follow each other, so that a sample
        # stays one.
        given, different = (query, key, value), [query]
        different += [x for x in ([key] if value is key else [key, value]) if x is not query]
        ends = [0, *accumulate(x.shape[1] for x in different)]
        parts = []
        for place, x in enumerate(given):
            number = next(i for i, other in enumerate(different) if other is x)
            rows = slice(place * self.embed_dim, (place + 1) * self.embed_dim)
            parts.append(Part(slice(ends[number], ends[number + 1]), rows))
        return self.in_proj(torch.cat(different, 1), parts).split([x.shape[1] for x in given], 1)


def call_projections(attention: nn.MultiheadAttention) -> None:
    """Turn an `nn.MultiheadAttention` into a `CalledAttention`, in place; hooks and parameters stay."""
    attention.__class__ = CalledAttention
    if attention.in_proj_weight is not None:
        parts = {"in_proj": Projection(attention, "in_proj_weight")}
    else:
        parts = {
            f"{part}_proj": Projection(attention, f"{part}_proj_weight", place)
            for place, part in enumerate(_PARTS)
        }
    behind = dict(attention._modules)
    attention._modules.clear()
    attention._modules.update(parts | behind)  # in the order of their calls


def _once(change: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`change` each of three tensors; those that are one stay one."""
    first = change(query)
    second = first if key is query else change(key)
    third = first if value is query else second if value is key else change(value)
    return first, second, third


def _sum_of_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int, query: Tensor
) -> Tensor | None:
    """What is added to the scores [N, heads, L, S]: 0 or minus infinity for a boolean mask.

    Args:
        attn_mask: [L, S] or [N * heads, L, S], bool (True: ignore) or floating point.
        key_padding_mask: [N, S], likewise.
        heads: their number.
        query: of the type that the sum shall have, [N, ...].
    """
    total = None
    if attn_mask is not None:
        total = additive(attn_mask, query)
        total = total if total.ndim == 2 else total.unflatten(0, (len(query), heads))
    if key_padding_mask is not None:
        padding = additive(key_padding_mask, query)[:, None, None]
        total = padding if total is None else total + padding
    return total
