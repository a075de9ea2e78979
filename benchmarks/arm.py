"""The same exported file on x86-64 and on a simulated 64-bit Arm processor: are the codes the same?

    bash benchmarks/arm.sh FOLDER
    python benchmarks/arm.py FOLDER --old CHECKPOINT photos.tflite photos.h

runs each file on validation images of the checkpoint in its engine here, and in the engine's Arm build under
qemu-aarch64 as a Cortex-A72: LiteRT's wheel, and for C gcc's cross compiler. The table has, over all quantizers of
activations, the largest share of codes that differ between the processors, the largest difference of a logit over the
largest logit, and the share of images with the same class. With XNNPACK LiteRT shows logits alone. It says nothing of
speed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.deploy.c.engine import build, read_description
from model.deploy.engines import Engine, engines_of
from model.load import data_of, load_trained

SIMULATOR, COMPILER = "qemu-aarch64", "aarch64-linux-gnu-gcc"

LITERT = """\
import sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType
path, given, made, kernels = sys.argv[1:5]
known, own = np.load(given, allow_pickle=False), kernels == "own"
engine = Interpreter(
    model_path=path, experimental_preserve_all_tensors=own,
    experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if own else OpResolverType.AUTO,
)
engine.allocate_tensors()
details = engine.get_tensor_details() if own else engine.get_output_details()
places = {detail["name"]: detail["index"] for detail in details}
names = [name for name in known["names"] if name in places]
rows = {name: [] for name in names}
for image in known["images"].transpose(0, 2, 3, 1):
    engine.set_tensor(engine.get_input_details()[0]["index"], np.ascontiguousarray(image[None]))
    engine.invoke()
    for name in names:
        value = engine.get_tensor(places[name])
        rows[name].append(value.transpose(0, 3, 1, 2) if value.ndim == 4 else value)
np.savez(made, **{name: np.concatenate(parts) for name, parts in rows.items()})
"""

PLAIN_C = """\
import ctypes, sys
import numpy as np
library, given, made = sys.argv[1:4]
known = np.load(given, allow_pickle=False)
images = np.ascontiguousarray(known["images"], np.float32)
logits = np.zeros((len(images), int(known["classes"])), np.float32)
values = np.zeros((len(images), int(known["width"])), np.float32)
run = ctypes.CDLL(library).run
run.restype = None
pointer = lambda array: array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
run(pointer(images), len(images), pointer(logits), pointer(values))
np.savez(made, logits=logits, values=values)
"""


def on_arm(folder: Path, program: str, *arguments: str) -> dict[str, np.ndarray]:
    """What a program of the Arm Python writes to the path that is its third argument."""
    python = folder / "root/usr/bin/python3.11"
    command = [
        SIMULATOR,
        "-L",
        str(folder / "root"),
        "-E",
        f"PYTHONPATH={folder / 'site'}",
        str(python),
        "-c",
        program,
    ]
    subprocess.run([*command, *arguments], check=True, stderr=subprocess.DEVNULL)
    with np.load(arguments[2], allow_pickle=False) as found:
        return dict(found)


def arm_values(
    file: Path, engine: Engine, names: list[str], images: np.ndarray, arm: Path
) -> dict[str, np.ndarray]:
    """The logits and quantized tensors of a file on Arm."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = str(Path(folder) / "given.npz"), str(Path(folder) / "made.npz")
        if engine.name == "litert":
            np.savez(given, images=images, names=names)
            return on_arm(arm, LITERT, str(file), given, made, "xnnpack" if engine.optimised else "own")
        described = read_description(file)
        width = sum(int(np.prod(size)) for size in described.quantizers.values())
        np.savez(given, images=images, classes=described.classes, width=width)
        library = Path(folder) / "network.so"
        build(file, library, [COMPILER])
        found = on_arm(arm, PLAIN_C, str(library), given, made)
    values, start = found.pop("values"), 0
    for name, size in described.quantizers.items():
        end = start + int(np.prod(size))
        found[name] = values[:, start:end].reshape(-1, *size)
        start = end
    return found


def _other(values: np.ndarray, others: np.ndarray) -> float:
    """The share of levels that are others."""
    return float((np.abs(values - others) > 1e-3 * np.abs(values).max()).mean())


def compared(file: Path, engine: Engine, images: np.ndarray, arm: Path) -> str:
    """A row of the table."""
    runner = engine.open(file, tensors=True)
    here = runner(images)
    there = arm_values(file, engine, list(here), images, arm)
    if "logits" not in there:
        raise SystemExit(f"{file}: {engine} on Arm gives no logits")
    shares = [_other(here[name], there[name]) for name in there if name != "logits"]
    logits, other = here["logits"], there["logits"]
    far = np.abs(logits - other).max() / np.abs(logits).max()
    same = 100 * (logits.argmax(1) == other.argmax(1)).mean()
    codes = f"{100 * max(shares):.3f} % in {len(shares)} quantizers" if shares else "-"
    return f"| {file.name} | {engine} | {codes} | {far:.1e} | {same:.2f} % |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arm", type=Path, help="the folder that benchmarks/arm.sh has made")
    parser.add_argument("files", type=Path, nargs="+", help=".tflite and .h files")
    parser.add_argument("--old", type=Path, required=True, help="the checkpoint that they were exported from")
    parser.add_argument("--images", type=int, default=64)
    options = parser.parse_args()
    loader = data_of(load_trained(options.old), None).val
    assert loader is not None
    images = np.concatenate([batch.numpy() for batch, _ in loader])[: options.images]
    print("| file | engine | other codes | logits | same class |\n|---|---|---|---|---|")
    for file in options.files:
        for engine in engines_of(file):
            print(compared(file, engine, images, options.arm.resolve()), flush=True)


if __name__ == "__main__":
    main()
