"""The words of tools.py that take a network out of its checkpoint: export, and import back.

torch and engines are imported where they are used, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from model.deploy import formats
from model.deploy.coreml.folder import is_package
from model.deploy.packages import needed
from model.deploy.verify import bytes_of
from model.deploy.web import is_page
from utils.checkpoint.exported import check_checkpoint
from utils.errors import UserError
from utils.text import closest, printable
from utils.tools.options import Options, given_path, refuse_existing

if TYPE_CHECKING:
    from model.deploy.codes import Array
    from model.deploy.graph import DeployGraph
    from model.load import Trained


def _program(trained: Trained, path: Path, options: Options) -> None:
    """A program of `torch.export`."""
    from model.deploy import program

    program.write(trained, path)


def _graph(trained: Trained, options: Options) -> DeployGraph:
    """The network as a graph, with what its file says of classes and images."""
    import json

    from model.deploy.graph import deploy_graph, with_byte_input
    from utils.config.image_size import sides

    graph = deploy_graph(
        trained.network,
        (trained.transform.channels, *sides(trained.transform.size)),
        metadata={
            "classes": json.dumps(trained.labels),
            "images": json.dumps(trained.transform.to_dict()),
        },
    )
    if options.int8_sums:
        from model.deploy.sums import with_integer_sums

        graph = with_integer_sums(graph, _batch(trained, options))
    if options.uint8_input:
        graph = with_byte_input(graph, trained.transform.mean, trained.transform.std)
    return graph


def _batch(trained: Trained, options: Options) -> Array:
    """A batch of training images, normalised, float32 [N, channels, height, width]."""
    from model.load import data_of

    loader = data_of(trained, options.root, train=True).train
    assert loader is not None
    loader.set_epoch(0)
    images, _ = next(iter(loader))
    return images.contiguous().numpy()


def _packed(trained: Trained, path: Path, options: Options) -> None:
    """A safetensors file with the weights' codes as a stream of bits."""
    from model.deploy import packed

    packed.write(trained, path)


def _web(trained: Trained, path: Path, options: Options) -> None:
    """A folder with a page for browsers."""
    from model.deploy import web
    from model.deploy.onnx_qdq import qdq_model
    from model.deploy.web import runtime

    engine = runtime.files()  # before the work: it may have to be fetched
    web.write(trained, qdq_model(_graph(trained, options)), engine, path)


Write = Callable[["Trained", Path, Options], None]
"""Writes a network to a path, which does not exist yet; files beside it with the same stem belong to it."""


def _from_graph(write: formats.Write) -> Write:
    """What writes a network by its graph."""

    def written(trained: Trained, path: Path, options: Options) -> None:
        graph = _graph(trained, options)
        if not (graph.weights or graph.activations):
            print("no layer of this network is quantized: the file computes in float")
        if line := write(graph, path):
            print(printable(line))

    return written


def _litert(trained: Trained, path: Path, options: Options) -> None:
    """A file of LiteRT."""
    _from_graph(partial(formats.write_litert, int8_weights=options.int8_weights))(trained, path, options)


_OTHERS: dict[str, Write] = {"litert": _litert, "packed": _packed, "program": _program, "web": _web}
_WRITERS = {name: _from_graph(write) for name, write in formats.GRAPH_FORMATS.items()} | _OTHERS
FORMATS = {name: _WRITERS[name] for name in sorted(_WRITERS)}
"""What `--to` takes: name -> the function that writes it."""

FOLDERS: dict[str, Callable[[Path], bool]] = {"coreml": is_package, "web": is_page}
"""Formats that are folders, and whether a folder is one of them, which may be replaced."""

PACKAGES = {
    "c": ("onnx", "onnxscript"),
    "coreml": ("onnx", "onnxscript", "coremltools"),
    "executorch": ("onnx", "onnxscript", "executorch"),
    "litert": ("onnx", "onnxscript", "ai_edge_litert"),
    "mnn": ("onnx", "onnxscript", "MNN", "flatbuffers"),
    "onnx": ("onnx", "onnxscript"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "packed": ("safetensors",),
    "qonnx": ("onnx", "onnxscript"),
    "thresholds": ("onnx", "onnxscript"),
    "web": ("onnx", "onnxscript"),
}
"""What writes a format; `--int8_sums` needs onnxruntime besides."""

TAKEN = {
    "uint8_input": ("litert", "onnx", "openvino"),
    "int8_sums": ("onnx", "openvino", "web"),
    "int8_weights": ("litert",),
}
"""Options that change how the network is written, and the formats that they are for."""


def export(options: Options) -> int:
    """Write the network of --old to --new, in the format that --to names."""
    name, new = options.to or "", given_path(options.new)
    if name not in FORMATS:
        raise UserError(f"--to {name}: write one of {', '.join(FORMATS)}{closest(name, FORMATS)}")
    if new.suffix != formats.ENDINGS.get(name, new.suffix):
        raise UserError(f"--new {new}: end the name of this format's files in {formats.ENDINGS[name]}")
    for option, several in TAKEN.items():
        if getattr(options, option) and name not in several:
            raise UserError(
                f"--{option} means nothing to {name}; leave it out or write --to {' or '.join(several)}"
            )
    if options.root is not None and not options.int8_sums:
        raise UserError(
            f"--root {options.root} has no effect without --int8_sums: add --int8_sums, or leave --root out"
        )
    if not (name in FOLDERS and FOLDERS[name](new)):
        refuse_folders(new)
    if name in FOLDERS and new.is_file():
        raise UserError(f"--new {new} is a file; name a folder, which is made")
    refuse_existing(options, new)
    check_folder_of(new)
    check_checkpoint(given_path(options.old))
    needed(*PACKAGES.get(name, ()), *(("onnxruntime",) if options.int8_sums else ()))
    from model.load import load_trained
    from utils.data.sources import refuse_root

    trained = load_trained(given_path(options.old), ema_weights=options.ema_weights)
    refuse_root(options.root, trained.config.data.dataset)
    replace_with(new, lambda path: FORMATS[name](trained, path, options), options)
    size = sum(bytes_of(file) for file in ([new] if new.is_file() else new.rglob("*")) if file.is_file())
    print(printable(f"{new}: {name}, {size:,} bytes"))
    return 0


def import_(options: Options) -> int:
    """Write the packed network of --old to --new, a checkpoint that is evaluated like the one it was exported from."""
    new = given_path(options.new)
    refuse_folders(new)
    refuse_existing(options, new)
    check_folder_of(new)
    needed("safetensors")
    from model.deploy import packed
    from utils.checkpoint import archive

    payload = packed.read_checkpoint(given_path(options.old))
    archive.save(new, payload)
    print(printable(f"{new}: {len(payload['state_dict'])} entries, {new.stat().st_size:,} bytes"))
    return 0


def refuse_folders(*paths: Path) -> None:
    """Refuse to write a file, or another folder, over a folder: --force does not remove what may be the user's."""
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder, which --force does not replace; choose another name")


def check_folder_of(path: Path) -> None:
    """Refuse, before any work, a file in a folder that is not there or takes no files."""
    if not path.parent.is_dir():
        raise UserError(f"--new {path}: name a file in a folder that exists")
    try:
        tempfile.TemporaryDirectory(dir=path.parent).cleanup()
    except OSError as error:
        raise UserError(
            f"--new {path}: its folder takes no files ({error.strerror}); name another one"
        ) from error


def replace_with(new: Path, write: Callable[[Path], None], options: Options) -> None:
    """Let `write` make a file or a folder, with more files beside it if it likes, and move all of it to `new`.

    It writes into a temporary folder, so that a failure leaves everything as it was. A folder is replaced by one of
    the same format alone (`FOLDERS`).

    Raises:
        UserError: one of the other files exists, without --force, or is a folder; or the disk refuses.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{new.name}.", dir=new.parent) as folder:
            write(Path(folder) / new.name)
            made = sorted(
                Path(folder).iterdir(), key=lambda path: path.name == new.name
            )  # the named one last
            refuse_folders(
                *(
                    new.parent / path.name
                    for path in made
                    if not any(same(path) and same(new) for same in FOLDERS.values())
                ),
            )
            refuse_existing(options, *(new.parent / path.name for path in made))
            for path in made:
                _move(path, new.parent / path.name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{new}: cannot be written ({reason}); choose another folder or free some space"
        ) from error


def _move(path: Path, target: Path) -> None:
    """Put a file or a folder in the place of another of its kind, which stays if that fails."""
    if not target.is_dir():
        os.replace(path, target)
        return
    former = path.with_name(f"{path.name}.old")  # removed with the temporary folder
    os.replace(target, former)
    try:
        os.replace(path, target)
    except BaseException:
        os.replace(former, target)
        raise
