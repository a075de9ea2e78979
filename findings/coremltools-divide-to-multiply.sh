#!/usr/bin/env bash
# coremltools 9.0, a program with a division by a constant, round(x / step), in float32.
# Expected: the saved program divides.
# Seen: by default it multiplies with the constant's reciprocal in float32 (pass common::divide_to_multiply), without a
# word. Of values in the middle between two levels, and next to it, a part is rounded to the other level. An empty
# pipeline of passes keeps the division.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check coremltools==9.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import coremltools
import numpy as np
from coremltools.converters.mil import Builder

TARGET = coremltools.target.iOS16
STEPS = np.random.default_rng(0).uniform(0.01, 1, 1000).astype(np.float32)


def words(**options):
    @Builder.program(input_specs=[Builder.TensorSpec(shape=(1, 4))], opset_version=TARGET)
    def program(x):
        return Builder.round(x=Builder.real_div(x=x, y=np.float32(0.3)))

    model = coremltools.convert(
        program, convert_to="mlprogram", minimum_deployment_target=TARGET, skip_model_load=True,
        compute_precision=coremltools.precision.FLOAT32, **options,
    )
    (block,) = model.get_spec().mlProgram.functions["main"].block_specializations.values()
    return [operation.type for operation in block.operations if operation.type != "const"]


default, empty = words(), words(pass_pipeline=coremltools.PassPipeline.EMPTY)
print("default passes:", default, " no passes:", empty)
assert default == ["mul", "round"] and empty == ["real_div", "round"], (default, empty)

middle = (np.arange(15, dtype=np.float32) + np.float32(0.5)) * STEPS[:, None]
x = np.stack([np.nextafter(middle, np.float32(-np.inf)), middle, np.nextafter(middle, np.float32(np.inf))])
other = np.round(x / STEPS[:, None]) != np.round(x * (np.float32(1) / STEPS)[:, None])
print(f"values at or next to the middle of two levels with another level: {100 * other.mean():.0f} %")
assert 0.02 < other.mean() < 0.5, other.mean()
PYTHON
