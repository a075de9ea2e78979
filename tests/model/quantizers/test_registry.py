"""Methods by name."""

from __future__ import annotations

import pytest
from torch import nn

from model.quantizers.registry import build_quantizer, methods, register
from tests.model.quantizers.cases import Case
from utils.config.schema import QuantizerConfig
from utils.errors import UserError


def test_registering_a_method_twice_is_an_error() -> None:
    before = methods()
    with pytest.raises(ValueError, match="lsq is registered twice for fm"):
        register("lsq", "fm")(methods()["lsq", "fm"])
    assert methods() == before


@pytest.mark.parametrize("tag", ["fm", "wt", "ot"])
def test_an_unknown_method_lists_the_known_ones(tag: str) -> None:
    with pytest.raises(
        UserError, match=f"'lsqq' has no quantizer for {tag}; did you mean lsq.*dorefa.*lsq.*pact"
    ):
        build_quantizer(
            QuantizerConfig(tag=tag, enable=True, method="lsqq"), Case("lsq", tag, 4, half_range=False).site
        )


def test_a_quantizer_that_is_not_enabled_is_the_identity() -> None:
    quantizer = build_quantizer(
        QuantizerConfig(tag="fm", method="lsq"), Case("lsq", "fm", 4, half_range=True).site
    )
    assert type(quantizer) is nn.Identity
