"""The network that options and keywords ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from utils.config import keyword
from utils.config.command_line import Given
from utils.config.image_size import sides
from utils.config.resolve.families import family_of
from utils.config.resolve.quantizers import extra
from utils.config.schema import BlockConfig, ModelConfig, QuantConfig, StemConfig
from utils.errors import UserError


def model_config(
    given: Given, fields: Mapping[str, Any], quant: QuantConfig
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The network of options and keyword fields, and warnings."""
    family = family_of(given["model"])
    resnet = family == "resnet"
    orders = [k.name for k in keyword.registry().values() if "block.order" in k.sets]
    if resnet and quant.enabled and "block.order" not in fields:
        raise UserError(
            f"--keyword: a quantized network needs the order of its units, one of {', '.join(orders)}"
        )
    block = _part(BlockConfig, "block", fields)
    stem = _part(StemConfig, "stem", fields)
    _check_variants(given, block, stem)
    if given["order"] is not None and block.downsample_order:
        block = dataclasses.replace(block, downsample_order=given["order"])
    stem = dataclasses.replace(stem, kernel=given["stem_kernel"] or 1)
    size = given["input_size"] or fields.get("model.input_size", 32)
    if "stem.kind" not in fields:  # only `fake` comes without a data set's keyword
        stem = dataclasses.replace(stem, kind="imagenet" if min(sides(size)) >= 128 else "cifar")
    warnings = []
    if resnet and block.order.startswith("b") and not stem.pre_norm:
        warnings.append(
            f"{block.order} without the keyword preBN leaves the last block's output unnormalised"
        )
    activation = fields.get("model.activation", "relu6" if given["model"] == "mobilenetv2" else "relu")
    if resnet and block.zero_init and activation in ("relu", "relu6") and _activates_last_norm(block):
        needed = "fix" if block.skip == "block" else "origin and fix"
        warnings.append(
            f"zir: an activation follows the norm that starts at zero, has no gradient there and leaves it at "
            f"zero: {block.order} needs {needed}"
        )
    if resnet and block.zero_init and fields.get("model.norm") == "reverse":
        warnings.append(
            "zir: a norm of reverse-bn has no gradient where its scale is zero, so that the blocks' last convolutions "
            "never learn: leave one of the two out"
        )
    if family == "pytorch" and fields.get("model.norm") == "reverse":
        warnings.append(
            f"reverse-bn: the published code ignores it for {given['model']}, whose norms there are plain batch norms; "
            "here it changes them: leave it out to repeat what was published"
        )
    if given["base"] > 1 and family not in ("resnet", "own"):
        raise UserError(f"--base {given['base']}: {given['model']} has no branches; use a resnet")
    model = ModelConfig(
        name=given["model"],
        num_classes=given["num_classes"] or fields.get("model.num_classes", 10),
        input_size=size,
        channels=given["channels"],
        width_alpha=given["width_alpha"],
        base=given["base"],
        block=block,
        stem=stem,
        norm=fields.get("model.norm", "batch"),
        activation=activation,
        quant=quant,
        extra=extra(fields),
    )
    return model, tuple(warnings)


def _activates_last_norm(block: BlockConfig) -> bool:
    """Whether an activation stands between the last norm of a branch and the sum with the shortcut."""
    if block.skip == "block" and block.fix and block.order != "cabs":
        return False  # it has moved behind the sum, or a norm follows it
    behind = block.order.partition("b")[2]
    return "a" in (behind if block.skip == "block" else behind.partition("s")[0])


def _check_variants(given: Given, block: BlockConfig, stem: StemConfig) -> None:
    """Refuse combinations of variants that no network has."""
    order, kernel = given["order"], given["stem_kernel"]
    if order is not None and (set(order) - set("cba") or len(set(order)) != len(order) or "c" not in order):
        raise UserError(
            f"--order {order}: write each of the letters c, b and a at most once, with a c, like cb"
        )
    if kernel is not None:
        if not stem.space_to_depth and kernel != 1:
            raise UserError("--stem_kernel belongs to the keywords TResNetStem and TResNetStemMaxPool")
        if kernel not in (1, 3):
            raise UserError(f"--stem_kernel {kernel}: must be 1 or 3")
    if block.prone_norm_inside and not block.order.startswith("cb"):
        raise UserError(
            f"--keyword: bn_before_restore needs an order in which the norm follows the convolution, "
            f"cbas or cbsa, not {block.order}"
        )
    if block.fixup and block.order.startswith("b"):
        raise UserError(
            f"--keyword: fixup has no norms to begin with, so {block.order} cannot be; use cbas or cbsa"
        )


def _part(cls: type[Any], prefix: str, fields: Mapping[str, Any]) -> Any:
    """A dataclass from the fields that begin with `prefix`."""
    names = {item.name for item in dataclasses.fields(cls)}
    return cls(**{name: fields[f"{prefix}.{name}"] for name in names if f"{prefix}.{name}" in fields})
