"""The quantized weight of an evaluation, computed once and kept while all that it comes from stays the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.quantizers.groups import Grouped


class _Result(NamedTuple):
    sources: list[Tensor]  # copies
    settings: dict[str, Any]
    quantized: Tensor
    version: int


class KeptWeight:
    """The last weight that a quantizer has quantized in evaluation.

    It is taken again while the values of the weight, and of the quantizer's parameters, buffers and attributes, are
    those that it was computed from. Values are compared, since torch's counters of changes do not see one through
    `.data`, nor one in NumPy; comparing takes about a tenth of the time of quantizing. A copy or a pickle begins empty.
    """

    def __init__(self) -> None:
        self._result: _Result | None = None

    def __reduce__(self) -> tuple[type[KeptWeight], tuple[()]]:
        return KeptWeight, ()

    @staticmethod
    def fits(quantizer: Grouped, x: Tensor) -> bool:
        """Whether the result of `quantizer` for the weight `x` may be kept.

        It may without gradients on a CPU; elsewhere comparing would wait for the device. Nothing is kept where torch
        traces or watches what is computed, or for a class that does not say itself that it is `pure`.
        """
        return (
            vars(type(quantizer)).get("pure", False)
            and quantizer.config.tag == "wt"
            and not (quantizer.training or torch.is_grad_enabled() or torch._C._get_tracing_state())
            and type(x) in (Tensor, nn.Parameter)
            and x.device.type == "cpu"
            and torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
        )

    def of(self, quantizer: Grouped, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """The quantized `x`: the kept one where nothing has changed, else that of `compute`, which is then kept."""
        sources, settings = list(_sources(quantizer, x)), _settings(quantizer)
        found = self._result
        if (
            found is None
            or found.settings != settings
            or found.quantized._version != found.version  # a caller has changed it in place
            or len(found.sources) != len(sources)
            or not all(map(_same, found.sources, sources))
        ):
            with torch.inference_mode(False), torch.no_grad():  # whose tensors have no version
                quantized = compute()
                copies = [source.detach().clone() for source in sources]
            self._result = found = _Result(copies, settings, quantized, quantized._version)
        return found.quantized

    def clear(self) -> None:
        """Keep nothing."""
        self._result = None


def _sources(quantizer: Grouped, x: Tensor) -> Iterator[Tensor]:
    yield x
    yield from (value for value in quantizer._parameters.values() if value is not None)
    yield from (value for value in quantizer._buffers.values() if value is not None)


def _settings(quantizer: Grouped) -> dict[str, Any]:
    """The plain attributes."""
    return {name: value for name, value in vars(quantizer).items() if name[0] != "_" and name != "kept"}


def _same(before: Tensor, now: Tensor) -> bool:
    layout = before.dtype == now.dtype and before.device == now.device and before.stride() == now.stride()
    return layout and torch.equal(before, now)
