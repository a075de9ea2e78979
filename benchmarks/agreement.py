"""Compares exported files with torch for every method and number of bits, on the digits and the glyphs.

    python benchmarks/agreement.py                                    # all, an hour; the table of docs/deploy.md
    python benchmarks/agreement.py --dataset digits --only "LSQ 2/2" PACT --print
    python benchmarks/agreement.py --dataset digits --boards     # the files for phones and boards, in another table

Each network is trained for a few epochs by `benchmarks/digits.py`'s recipe, from a network in full precision, then
exported and run on all images, those of the training included. Finished trainings are not repeated, except with
`--fresh`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import digits
import numpy as np
import recipes
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project is no package

import onnx  # noqa: E402

import main  # noqa: E402
from model.deploy import packed  # noqa: E402
from model.deploy.engines import Engine, engines_of, versions  # noqa: E402
from model.deploy.formats import ENDINGS, GRAPH_FORMATS  # noqa: E402
from model.deploy.graph import deploy_graph  # noqa: E402
from model.deploy.onnx_qdq import qdq_model  # noqa: E402
from model.deploy.openvino_ir import write_openvino  # noqa: E402
from model.deploy.sums import with_integer_sums  # noqa: E402
from model.deploy.verify import bytes_of, compare  # noqa: E402
from model.load import Trained, data_of, load_trained, trained_from  # noqa: E402
from utils.config.image_size import sides  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.report.verified import Comparison  # noqa: E402

PAGE = ROOT / "docs" / "deploy.md"
RAW = ROOT / "docs" / "results"
EPOCHS = {
    "digits": (6, 2),
    "glyphs": (10, 1),
}  # in full precision, and with quantizers; of 1 bit three times as many
BATCH = 256
SUMS = "onnx, 8-bit sums"
SAME, POINTS = 0.999, 0.1  # targets: share of images with the same class, and points of top-1
CLIP = "--fm_boundary 3"

Method = recipes.Method
BOARDS = ("c", "executorch", "litert", "mnn")  # formats for phones and boards that run on computers
Boards = dict[str, list[Comparison] | str]
METHODS = (
    *(m for m in recipes.ALL if "clip 1" not in m.name and m.most is not None),  # the others learn little
    *(Method(name, f"{b}/{b}", name.replace("+", "plus").lower(), recipes.bits(b), None)
      for name in ("LSQ+", "EWGS", "StableQAT", "N2UQ", "APoT") for b in (4, 2) if (name, b) != ("APoT", 2)),
    *(Method("LSQ", f"{b}/{b}", "dorefa,lsq", recipes.bits(b), None) for b in (6, 8)),
    Method("LSQ, mid-tread weights", "8/8", "dorefa,lsq", f"{recipes.bits(8)} --wt_grid midtread", None),
    Method("PACT", "8/8", "pact", recipes.bits(8), None),
    Method("DoReFa-Net, clip 3", "8/8", "dorefa", f"{recipes.bits(8)} {CLIP}", None),
    *(Method("LSQ, first and last layer too", f"{b}/{b}", "dorefa,lsq,first-last",
             f"{recipes.bits(b)} --fm_first_signed", None) for b in (2, 4)),
    Method("LSQ, weights alone", "2/32", "dorefa,lsq", "--wt_enable --wt_bit 2", None),
    Method("LSQ, normalised weights", "2/2", "dorefa,lsq", f"{recipes.bits(2)} --wt_adaptive var-mean", None),
    Method("XNOR-Net, K of each place", "1/1", "xnor", f"{recipes.bits(1)} --fm_grad_type STE --fm_custom channel",
           None, recipes.BINARY_BLOCK),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A file in an engine beside torch.

    Attributes:
        dataset: digits or glyphs.
        method: its name.
        bits: weights/activations.
        file: `onnx`, `onnx, 8-bit sums`, `openvino` or `packed`.
        engine: and its optimisation; torch for `packed`.
        images: how many.
        same: share of images with the same most probable class.
        top1: percent; `reference` is that of torch.
        bytes: of the file.
    """

    dataset: str
    method: str
    bits: str
    file: str
    engine: str
    images: int
    same: float
    top1: float
    reference: float
    bytes: int

    @property
    def reached(self) -> bool:
        """Whether both targets are reached."""
        return self.same >= SAME and abs(self.top1 - self.reference) <= POINTS


def run(case: str, argv: Sequence[str], fresh: bool) -> None:
    """A training in this process, which spares most of its start; none where one of the same command is finished."""
    stamp, text = ROOT / "exp" / case / "command.txt", shlex.join(argv[1:])
    if not fresh and stamp.exists() and stamp.read_text() == text:
        return
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()):
        status = main.main(argv[2:])
    if status != 0:
        raise SystemExit(f"{text}\nfailed with status {status}")
    stamp.write_text(text)


def train(dataset: str, methods: Sequence[Method], seed: int, fresh: bool) -> Iterator[tuple[Method, Path]]:
    """The checkpoint of each method; networks in full precision come first."""
    setup, (whole, low) = f"{dataset}-agreement", EPOCHS[dataset]
    starts = {}
    for block in dict.fromkeys(m.block for m in methods):
        starts[block] = (
            f"agreement-{dataset}-{'binary-block' if block == recipes.BINARY_BLOCK else 'fp'}-{seed}"
        )
        options = f"{recipes.FULL} --epochs {whole}"
        run(starts[block], digits.command(setup, starts[block], seed, block, "", options), fresh)
    for m in methods:
        case = f"agreement-{dataset}-{digits.slug(m.name)}-{digits.slug(m.bits)}-{seed}"
        start = f"--pretrained {starts[m.block]}-checkpoint.pth.tar"
        epochs = 3 * low if m.bits == "1/1" else low
        options = f"{recipes.TUNE} -b 64 --epochs {epochs} {start} {m.options}"
        run(case, digits.command(setup, case, seed, m.block, m.keywords, options), fresh)
        yield m, ROOT / "weights" / "resnet20" / f"{case}-checkpoint.pth.tar"


def agreements(dataset: str, m: Method, trained: Trained) -> Iterator[Agreement]:
    """Each file of a network in each of its engines."""
    shape = (trained.transform.channels, *sides(trained.transform.size))
    loaders = data_of(trained, train=True)
    assert loaders.train is not None and loaders.val is not None
    loaders.train.set_epoch(0)
    batches = [*loaders.val, *loaders.train]
    images = torch.cat([batch for batch, _ in batches]).contiguous()
    target = torch.cat([classes for _, classes in batches]).numpy()
    with torch.no_grad():
        wanted = torch.cat([trained.network(part) for part in images.split(BATCH)]).numpy()

    def agreement(file: str, engine: str, logits: np.ndarray, path: Path) -> Agreement:
        return Agreement(
            dataset=dataset, method=m.name, bits=m.bits, file=file, engine=engine, images=len(target),
            same=float((logits.argmax(1) == wanted.argmax(1)).mean()),
            top1=100 * float((logits.argmax(1) == target).mean()),
            reference=100 * float((wanted.argmax(1) == target).mean()), bytes=bytes_of(path),
        )  # fmt: skip

    graph = deploy_graph(trained.network, shape)
    runtime, openvino = Engine("onnxruntime"), Engine("openvino")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {
            "onnx": (folder / "plain.onnx", [runtime, Engine("onnxruntime", False), openvino]),
            SUMS: (folder / "sums.onnx", [runtime]),
            "openvino": (folder / "own.xml", [openvino]),
        }
        calibration = next(iter(loaders.train))[0].contiguous().numpy()
        onnx.save(qdq_model(graph), files["onnx"][0])
        try:
            onnx.save(qdq_model(with_integer_sums(graph, calibration)), files[SUMS][0])
        except UserError:  # behind uneven weights a norm stays, and no sum is one of convolutions
            del files[SUMS]
        write_openvino(graph, files["openvino"][0])
        for file, (path, engines) in files.items():
            for engine in engines:
                runner = engine.open(path, threads=1)
                parts = [
                    runner(part)["logits"]
                    for part in np.split(images.numpy(), range(BATCH, len(images), BATCH))
                ]
                yield agreement(file, str(engine), np.concatenate(parts), path)
        path = folder / "packed.safetensors"
        packed.write(trained, path)
        restored = trained_from(packed.read_checkpoint(path), path).network
        with torch.no_grad():
            logits = torch.cat([restored(part) for part in images.split(BATCH)]).numpy()
        yield agreement("packed", "torch", logits, path)


def boards(trained: Trained) -> Boards:
    """The files for phones and boards in their engines, on the validation images; or why there is no file."""
    shape = (trained.transform.channels, *sides(trained.transform.size))
    loader = data_of(trained).val
    assert loader is not None
    batches = list(loader)
    graph = deploy_graph(trained.network, shape)
    found: Boards = {}
    with tempfile.TemporaryDirectory() as name:
        paths = {kind: Path(name) / f"network{ENDINGS[kind]}" for kind in BOARDS}
        for kind, path in paths.items():
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    GRAPH_FORMATS[kind](graph, path)
            except UserError as error:
                found[kind] = str(error)
        engines = {path: engines_of(path) for kind, path in paths.items() if kind not in found}
        compared = compare(trained.network, shape, batches, engines)
        found |= {
            kind: [one for one in compared if one.file == str(path)]
            for kind, path in paths.items()
            if kind not in found
        }
    return found


def boards_table(rows: Sequence[tuple[Method, Boards]]) -> list[str]:
    """A row for each network in Markdown: images of the same class, other codes, in percent, and KiB of the file."""
    lines = [
        f"| method | bits w/a | top-1 | {' | '.join(f'`{kind}`: same | codes | KiB' for kind in BOARDS)} |",
        "|" + "---|" * (3 + 3 * len(BOARDS)),
    ]
    for m, found in rows:
        several = [one for one in found.values() if not isinstance(one, str)]
        top1 = f"{several[0][0].reference:.2f}" if several else "-"
        cells = [cell for kind in BOARDS for cell in _board(found[kind])]
        lines.append(f"| {m.name} | {m.bits} | {top1} | {' | '.join(cells)} |")
    return lines


def _board(found: Sequence[Comparison] | str) -> tuple[str, str, str]:
    """The worst of the engines of a file."""
    if isinstance(found, str):
        return "none", "", ""
    codes = [max(one.codes.values(), default=0.0) for one in found if one.codes]
    share = f"{100 * max(codes):.3f}" if codes else "-"
    return f"{100 * min(one.same for one in found):.2f}", share, f"{found[0].bytes / 1024:.0f}"


def table(found: Sequence[Agreement]) -> list[str]:
    """A row for each network in Markdown."""
    lines = [
        "| method | bits w/a | data | top-1 | same | points | reached | 8-bit sums: same | points "
        "| KiB: `onnx` | `openvino` | `packed` |",
        "|" + "---|" * 12,
    ]
    for key in dict.fromkeys((a.method, a.bits, a.dataset) for a in found):
        mine = [a for a in found if (a.method, a.bits, a.dataset) == key]
        plain = [a for a in mine if a.file != SUMS]
        sizes = {a.file: f"{a.bytes / 1024:.0f}" for a in plain}
        reached = "yes" if all(a.reached for a in plain) else "no"
        lines.append(
            f"| {' | '.join(key)} | {plain[0].reference:.2f} | {' | '.join(least(plain))} | {reached} | "
            f"{' | '.join(least([a for a in mine if a.file == SUMS]))} | {' | '.join(sizes.values())} |"
        )
    return lines


def least(several: Sequence[Agreement]) -> tuple[str, str]:
    """The smallest share of images with the same class, and the largest difference of top-1."""
    if not several:
        return "-", "-"
    points = max((a.top1 - a.reference for a in several), key=abs)
    return f"{100 * min(a.same for a in several):.2f}", f"{points:+.2f}"


def measure() -> int:
    """Train, export, compare, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=tuple(EPOCHS), nargs="+", default=list(EPOCHS))
    parser.add_argument(
        "--only", nargs="+", default=[""], help="methods whose name and bits have one of these in them"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="repeat trainings that are finished already")
    parser.add_argument("--boards", action="store_true", help="the files for phones and boards")
    parser.add_argument("--print", action="store_true", help="print the table and write nothing to docs/")
    options = parser.parse_args()

    torch.set_num_threads(1)
    methods = [m for m in METHODS if any(part in f"{m.name} {m.bits}" for part in options.only)]
    if options.boards:
        return measure_boards(options.dataset, methods, options)
    found: list[Agreement] = []
    for dataset in options.dataset:
        for m, path in train(dataset, methods, options.seed, options.fresh):
            found += agreements(dataset, m, load_trained(path))
            print(
                "\n".join(table([a for a in found if (a.method, a.bits) == (m.name, m.bits)])[2:]), flush=True
            )
    missed = [a for a in found if a.file != SUMS and not a.reached]
    print("\n".join(table(found)))
    for a in missed:
        print(f"missed: {a}")
    if not options.print:
        write(found, options.seed)
    return 1 if missed else 0


def measure_boards(datasets: Sequence[str], methods: Sequence[Method], options: argparse.Namespace) -> int:
    """The table of the files for phones and boards; 1: a share of equal classes is below the target."""
    rows, raw = list[tuple[Method, Boards]](), []
    for dataset in datasets:
        for m, path in train(dataset, methods, options.seed, options.fresh):
            rows.append((m, boards(load_trained(path))))
            print(boards_table(rows[-1:])[-1], flush=True)
            for kind, several in rows[-1][1].items():
                figures = (
                    several if isinstance(several, str) else [asdict(one) | {"file": kind} for one in several]
                )
                raw.append(
                    {"dataset": dataset, "method": m.name, "bits": m.bits, "format": kind, "found": figures}
                )
    if not options.print:
        packages = ("ai-edge-litert", "executorch", "MNN")
        write_section("agreement-boards", boards_table(rows), raw, options.seed, packages)
    compared = [
        one
        for _, found in rows
        for several in found.values()
        if not isinstance(several, str)
        for one in several
    ]
    return 1 if any(one.same < SAME for one in compared) else 0


def write(found: Sequence[Agreement], seed: int) -> None:
    """The table into docs/deploy.md, each engine's figures into docs/results/."""
    files = [asdict(one) for one in found]
    write_section("agreement", table(found), files, seed, ("onnxruntime", "openvino"))


def write_section(
    name: str, lines: Sequence[str], files: Sequence[Any], seed: int, packages: Sequence[str]
) -> None:
    """A table of docs/deploy.md, with the command that has made it, and its figures beside it."""
    commit = digits.commit()
    installed = ", ".join(f"{package} {version}" for package, version in versions(packages).items())
    raw = {"commit": commit, "packages": installed, "files": files}
    (RAW / f"{name}.json").write_text(json.dumps(raw, indent=1) + "\n")
    arguments = shlex.join(["python", "benchmarks/agreement.py", *sys.argv[1:]])
    head = [f"`{arguments}`, commit {commit}, seed {seed}; {installed}.", ""]
    PAGE.write_text(digits.section(PAGE.read_text("utf-8"), name, [*head, *lines]), "utf-8")


if __name__ == "__main__":
    sys.exit(measure())
