"""Other people's networks, and what to convert them with."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import nn
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
