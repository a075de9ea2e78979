"""The parts of a residual network that keywords choose: its blocks, and the layers before and after them."""

from __future__ import annotations

from dataclasses import dataclass

from utils.config.checks import Checks
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The residual block: the order of a unit as data, and its skip connections."""

    order: str = "cbas"  # letters executed left to right: convolution, norm, activation, skip
    skip: str = "layer"  # "layer": around every convolution; "block": around the whole block
    fix: bool = False
    shortcut_pool: bool = True  # average pooling before the shortcut's convolution, not a stride
    shortcut_full_precision: bool = False
    shortcut_repeat: bool = False  # channels grow by concatenating copies, not by a convolution
    identity_norm: bool = False  # a norm on identity shortcuts
    zero_init: bool = False  # the last norm of a block starts at zero
    fixup: bool = False  # no norms, a multiplier per block and Fixup's initialisation
    fixup_bias: bool = False  # Fixup's scalar biases
    prone: bool = False  # 3x3 convolutions through space-to-depth
    prone_strided: bool = True  # the strided ones too
    prone_norm_inside: bool = False  # the norm before depth-to-space
    # Layers (c, b, a) of a lossless downsampling before strided blocks; empty: none.
    downsample_order: str = ""

    def __post_init__(self) -> None:
        """Refuse values that nothing knows."""
        check = Checks(self)
        check.choice("skip", ("layer", "block"))
        check.flags()
        if sorted(self.order) != sorted("cbas"):
            raise UserError(f"BlockConfig: order {self.order!r} must be the letters c, b, a and s, each once")


@dataclass(frozen=True, kw_only=True)
class StemConfig:
    """The layers before the first and after the last block."""

    kind: str = "imagenet"  # "imagenet": 7x7 stride 2 and pooling; "cifar": 3x3 stride 1
    space_to_depth: int = 0  # block of a space-to-depth stem; 4: no pooling, 2: pooling follows; 0: none
    kernel: int = 1  # of the space-to-depth stem's convolution
    norm_before_pool: bool = False
    activation: bool = True
    pre_norm: bool = False  # no norm in the stem, one norm before the final pooling
    # An activation after that norm; with norm_before_pool the stem has its own too.
    pre_norm_activation: bool = False

    def __post_init__(self) -> None:
        """Refuse values that nothing knows."""
        check = Checks(self)
        check.choice("kind", ("imagenet", "cifar"))
        check.flags()
