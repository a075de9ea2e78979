"""Core ML packages: weights as indices into tables of the trained levels, quantizers as plain operators."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.deploy.bits import bit_stream
from model.deploy.codes import ActivationCodes, Array, WeightCodes
from model.deploy.coreml.operators import OPERATORS, Emitter, Scaled, builder
from model.deploy.graph import INPUT, OUTPUT, DeployGraph
from model.deploy.packages import needed
from model.deploy.steps import ACTIVATION, WEIGHT, Step, Steps, steps_of
from utils.errors import UserError

if TYPE_CHECKING:
    from coremltools.models import MLModel

NAMES = "quantizers"  # in the metadata: the tensors that quantizers make, as JSON, by the quantizers' names
WIDTHS = (1, 2, 3, 4, 6, 8)  # bits of an index
OLDER_WIDTHS = (1, 2, 4, 6, 8)  # of iOS 16
LARGEST = 2**24  # integers up to it are float32 numbers


@dataclass(frozen=True, kw_only=True)
class Palette:
    """A quantized weight as Core ML holds it: `table[row of the output channel, index] * factor`.

    Attributes:
        indices: int64, the shape of the weight.
        table: float32 [rows, entries], one row or one for each output channel.
        factor: float32 [out], of each output channel; None: there is none.
    """

    indices: Array
    table: Array
    factor: Array | None = None

    @property
    def bits(self) -> int:
        """Of an index, as few as iOS 18 has."""
        return next((bits for bits in WIDTHS if 2**bits >= self.table.shape[1]), 32)

    @property
    def newer(self) -> bool:
        """Whether it needs iOS 18: 3 bits, or a table for each output channel."""
        return self.bits == 3 or len(self.table) > 1

    def values(self) -> Array:
        """The float32 weight."""
        rows, shape = np.arange(len(self.table)), (-1,) + (1,) * (self.indices.ndim - 1)
        value = self.table[rows.reshape(shape), self.indices]
        return value if self.factor is None else value * self.factor.reshape(shape)


def palette_of(weight: WeightCodes) -> Palette:
    """The levels that occur in a weight, in increasing order of their codes, and the index of each element.

    A scale for each output channel stays apart from one table of integers: it is multiplied behind the layer's sums, so
    that a channel costs four bytes, no table of its own. A table for each channel is left for levels that are no
    multiples of a scale.

    Example:
        >>> import numpy as np
        >>> from model.deploy.codes import WeightCodes
        >>> from model.deploy.coreml.package import palette_of
        >>> codes, scale = np.array([[-1, 1], [1, -1]]), np.array([[0.5], [2]], np.float32)
        >>> found = palette_of(WeightCodes(name="x", levels=2, codes=codes, scale=scale))
        >>> found.indices.tolist(), found.table.tolist(), found.factor.tolist()
        ([[0, 1], [1, 0]], [[-1.0, 1.0]], [0.5, 2.0])
    """
    codes, places = np.unique(weight.codes, return_inverse=True)
    indices = places.reshape(weight.codes.shape)
    if weight.table is not None:
        table = weight.table[:, codes]
        if weight.offset is not None:  # else a zero would lose its sign
            table = (table + weight.offset.reshape(-1, 1)).astype(np.float32)
        return Palette(indices=indices, table=table)
    if weight.offset is None and weight.scale.size > 1 and np.abs(codes).max() <= LARGEST:
        table = codes.astype(np.float32).reshape(1, -1)
        return Palette(indices=indices, table=table, factor=weight.scale.reshape(-1))
    table = codes.astype(np.float32) * weight.scale.reshape(-1, 1)
    return Palette(
        indices=indices, table=table if weight.offset is None else table + weight.offset.reshape(-1, 1)
    )


def tensor_names(steps: Steps) -> dict[str, str]:
    """The names that the tensors of quantizers have in a package, which takes letters, digits and underscores alone.

    Example:
        >>> from model.deploy.coreml.package import tensor_names
        >>> from model.deploy.steps import Step, Steps
        >>> from model.deploy.codes import ActivationCodes
        >>> codes = ActivationCodes(name="0.quant_activation", levels=2)
        >>> step = Step(operator="Activation", layer="0", inputs=("x",), outputs=("y",), activation=codes)
        >>> tensor_names(Steps(steps=(step,), constants={}, shapes={}, metadata={}))
        {'0.quant_activation': 'quantizer_0_quant_activation'}
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for step in steps.steps:
        codes = step.activation or step.weight
        if codes is not None:
            plain = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in codes.name)
            name = plain = f"quantizer_{plain}"
            while name in taken:
                name = f"{plain}_{len(taken)}"
            taken.add(name)
            found[codes.name] = name
    return found


def write_coreml(graph: DeployGraph, path: Path) -> None:
    """Write the package, a folder, to `path`, which ends in .mlpackage.

    Raises:
        UserError: coremltools is not installed, or the network has an operator that is not written.
    """
    coreml_model(graph).save(str(path))


def coreml_model(graph: DeployGraph) -> MLModel:
    """The network as a model of Core ML, in float32, for iOS 16 and macOS 13 where these have its weights' form.

    The input is `input`, one image, the output `logits`.

    Raises:
        UserError: as `write_coreml`.
    """
    needed("coremltools")
    import coremltools
    from coremltools.converters.mil import mil

    tools: Any = coremltools
    steps = steps_of(graph, OPERATORS, "Core ML")
    palettes = {step.weight.name: palette_of(step.weight) for step in steps.steps if step.weight is not None}
    newer = any(palette.newer for palette in palettes.values())
    target = tools.target.iOS18 if newer else tools.target.iOS16
    names = tensor_names(steps)
    image = builder().placeholder(shape=steps.shapes[INPUT])
    with _quiet():
        with mil.Function({INPUT: image}, opset_version=target) as function:
            emitter = Emitter(steps, {INPUT: function.inputs[INPUT]})
            for step in steps.steps:
                if step.operator == WEIGHT:
                    assert step.weight is not None
                    name = step.weight.name
                    emitter.tensors[step.outputs[0]] = _weight(palettes[name], names[name], newer)
                elif step.operator == ACTIVATION:
                    assert step.activation is not None
                    _activation(emitter, step, step.activation, names[step.activation.name])
                else:
                    _operator(emitter, step)
            function.set_outputs([emitter.tensor(OUTPUT)])
        program = mil.Program()
        program.add_function("main", function)
        # Its passes would turn the division by a step into a product, which rounds other values to other levels.
        model = tools.convert(
            program, convert_to="mlprogram", minimum_deployment_target=target, skip_model_load=True,
            compute_precision=tools.precision.FLOAT32, pass_pipeline=tools.PassPipeline.EMPTY,
        )  # fmt: skip
    for name, value in (graph.metadata | {NAMES: json.dumps(names)}).items():
        model.user_defined_metadata[name] = value
    return model


@contextlib.contextmanager
def _quiet() -> Any:
    """Without progress bars on standard error, and warnings of temporary folders that the converter leaves."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


def _weight(palette: Palette, name: str, newer: bool) -> Any:
    """A constant that Core ML unpacks; without indices where there are more levels than these can have."""
    from coremltools.converters.mil.mil import types

    kinds: Any = types

    shape, widths = palette.indices.shape, WIDTHS if newer else OLDER_WIDTHS
    bits = next((bits for bits in widths if 2**bits >= palette.table.shape[1]), None)
    if bits is None:
        return builder().const(val=palette.values(), name=name)
    missing = 2**bits - palette.table.shape[1]
    table = np.pad(palette.table, ((0, 0), (0, missing)), mode="edge")
    if newer:
        kind = kinds.nptype_from_builtin(kinds.string_to_builtin(f"uint{bits}"))
        rows = table.reshape(len(table), *(1,) * (len(shape) - 1), 2**bits, 1)
        value = builder().constexpr_lut_to_dense(indices=palette.indices.astype(kind), lut=rows, name=name)
    else:
        value = builder().constexpr_lut_to_dense(
            indices=bit_stream(palette.indices, bits), lut=table[0],
            shape=np.array(shape, np.uint32), name=name,
        )  # fmt: skip
    return value if palette.factor is None else Scaled(value, palette.factor)


def _activation(emitter: Emitter, step: Step, codes: ActivationCodes, name: str) -> None:
    """Scale, round, clip, scale: the code of x is round(x / step), by a division, since ties would move otherwise."""
    make = builder()
    x, scale = emitter.tensor(step.inputs[0]), np.float32(codes.scale)
    if not codes.integer:
        value = make.identity(x=x, name=name)
    elif codes.signs:
        above = make.cast(x=make.greater_equal(x=x, y=np.float32(0)), dtype="fp32")
        value = make.sub(x=make.mul(x=above, y=2 * scale), y=scale, name=name)
    else:
        if codes.step is not None:
            ends = {"alpha": codes.lowest, "beta": codes.highest}
            ends = {name: emitter.shared(np.float32(end)) for name, end in ends.items()}
            rounded = make.round(x=make.real_div(x=x, y=np.float32(codes.step)))
            x = make.clip(x=rounded, **ends)
        value = make.mul(x=x, y=scale, name=name)
    emitter.tensors[step.outputs[0]] = value


def _operator(emitter: Emitter, step: Step) -> None:
    """Add an operator of ONNX; the one that makes the logits has their name."""
    name = {"name": OUTPUT} if OUTPUT in step.outputs else {}
    try:
        found = OPERATORS[step.operator](emitter, step, **name)
    except UserError:
        raise
    except Exception as error:  # the builder checks values, with exceptions of its own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise step.refused(f"Core ML does not take this {step.operator} ({first})") from error
    several = found if isinstance(found, list | tuple) else [found]
    shape = getattr(several[0], "shape", None) if len(several) == 1 else None
    if shape is not None and tuple(shape) != emitter.shape(step):
        made, wanted = ("x".join(map(str, each)) for each in (shape, emitter.shape(step)))
        raise step.refused(f"Core ML makes {made} of this {step.operator}, not {wanted}")
    emitter.tensors.update(zip(step.outputs, several, strict=False))
