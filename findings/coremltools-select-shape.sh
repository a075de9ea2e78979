#!/usr/bin/env bash
# coremltools 9.0, select(cond, a, b) with scalars for a and b, such as the sign of a tensor.
# Expected: the result has the shape of cond. The documentation says that it "is based on broadcast rules from cond, a, b".
# Seen: the shape of cond is left out. The program is saved with a scalar as the type of the result, and a layer behind it
# is built for that, or refused.
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


@Builder.program(input_specs=[Builder.TensorSpec(shape=(2, 4))], opset_version=TARGET)
def program(x):
    above = Builder.greater_equal(x=x, y=np.float32(0))
    return Builder.select(cond=above, a=np.float32(1), b=np.float32(-1))


model = coremltools.convert(
    program, convert_to="mlprogram", minimum_deployment_target=TARGET, skip_model_load=True,
    compute_precision=coremltools.precision.FLOAT32,
)
(block,) = model.get_spec().mlProgram.functions["main"].block_specializations.values()
types = {operation.type: operation.outputs[0].type.tensorType for operation in block.operations}
shapes = {name: [item.constant.size for item in kind.dimensions] for name, kind in types.items() if name != "const"}
print("shapes in the saved program:", shapes)
assert shapes == {"greater_equal": [2, 4], "select": []}, shapes
PYTHON
