"""Other people's networks, and what to convert them with."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import timm
import torch
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from utils.config.schema import QuantConfig, QuantizerConfig


def config(bits: int = 2, **switches: Any) -> QuantConfig:
    """LSQ on activations, with symmetric levels, and on weights."""
    return QuantConfig(
        fm=QuantizerConfig(tag="fm", enable=True, method="lsq", levels=2**bits),
        wt=QuantizerConfig(tag="wt", enable=True, method="lsq", levels=2**bits),
        **switches,
    )


def vision_transformer() -> nn.Module:
    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )


def rep_vgg() -> nn.Module:
    """Blocks of two parallel convolutions and a norm, whose sum goes to the next."""
    block = partial(ByoBlockCfg, type="rep", c=16, gs=0)
    blocks = (block(d=1, s=2), block(d=2, s=1))
    return ByobNet(ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=16), num_classes=5)


def swin_transformer(*, v2: bool = False) -> nn.Module:
    parts: dict[str, Any] = (
        {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if v2 else {}
    )
    return SwinTransformer(
        patch_size=[4, 4], embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=[4, 4], num_classes=5, **parts
    )  # fmt: skip


def timm_vit() -> nn.Module:
    return timm.create_model("test_vit", img_size=32, num_classes=5)


class OwnAttention(nn.Module):
    """Heads of 4 features; what it computes is `kind`."""

    def __init__(self, kind: str, heads: int = 1) -> None:
        super().__init__()
        self.qkv, self.kind, self.heads = nn.Linear(4 * heads, 12 * heads), kind, heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        attend: Any = functional.scaled_dot_product_attention
        if self.kind == "both":
            return attend(q, k, v, attn_mask=torch.zeros(len(x[0]), len(x[0])), is_causal=True)
        if self.kind == "flex":
            return cast(Tensor, flex_attention(q, k, v)).squeeze(1)
        if self.kind == "products":
            return ((q @ k.mT).softmax(-1) @ v).squeeze(1)
        if self.kind == "two":
            return attend(attend(q, k, v), k, v).squeeze(1)
        if self.kind in ("blind", "mask of float32"):
            mask = torch.ones(len(x[0]), len(x[0])).tril(-1)  # the first position sees none
            mask = mask.bool() if self.kind == "blind" else mask
            return attend(q, k, v, attn_mask=mask).transpose(1, 2).view(x.shape)
        if self.kind == "three dimensions":
            return attend(q[:, 0], k[:, 0], v[:, 0])
        if self.kind == "boolean mask":
            return attend(q, k, v, attn_mask=torch.ones(len(x[0]), len(x[0])).tril().bool()).squeeze(1)
        y = attend(q, k, v, is_causal=self.kind == "causal", scale=0.3)
        return y.transpose(1, 2).view(x.shape)


class Turned(nn.Module):
    """[N, channels, places] to [N, places, channels]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def product_config(method: str = "lsq", levels: int = 4, **options: Any) -> QuantConfig:
    """First and last layers too, since a small network has no others."""
    activations = QuantizerConfig(
        tag="fm", enable=True, method=method, levels=levels, half_range=True, **options
    )
    return QuantConfig(fm=activations, attention_matmul=True, first_last=True)
