"""Small jobs on runs, checkpoints, name lists and image folders: `python tools.py --keyword WORD[,raw] ...`.

See docs/tools.md. The exit status is 0 when all is well, 1 when a check found something, 2 for a mistake.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from model.deploy import export, predict, verify
from model.mixed import plan, sensitivity
from utils.config import keyword
from utils.config.option import words
from utils.errors import UserError
from utils.processes.interrupt import SIGNALS, Requests
from utils.text import closest
from utils.tools import checkpoints, images, runs, shards
from utils.tools.options import Options, refuse_pipes


@dataclass(frozen=True)
class Word:
    """A word of --keyword: its function, the options it needs and those it may have."""

    run: Callable[[Options], int]
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()


NETWORK = ("ema_weights", "keyword_file", "force")  # options of words that rebuild a network

WORDS: dict[str, Word] = {
    "compare": Word(runs.compare, ("runs",), ("output", "force")),
    "report": Word(runs.report, ("runs",), ("output", "force")),
    "verbose": Word(checkpoints.verbose, ("old",), ("verbose_list",)),
    "load": Word(checkpoints.load, ("old",)),
    "save": Word(checkpoints.save, ("old", "new"), ("raw", "earlier_names", "force")),
    "update": Word(checkpoints.update, ("old", "new", "mf", "mt"), ("raw", "force")),
    "swap": Word(checkpoints.swap, ("old", "new", "mf", "mt"), ("raw", "force")),
    "sort": Word(checkpoints.sort, ("mf", "mt"), ("new_mf", "new_mt", "force")),
    "verify-image": Word(images.verify_image, ("root",), ("workers",)),
    "verify-data": Word(images.verify_data, ("root",), ("workers",)),
    "make-fake-imagenet": Word(
        images.make_fake_imagenet, ("root",), ("num_classes", "fake_size", "image_size")
    ),
    "make-shards": Word(
        shards.make_shards,
        ("source", "to"),
        ("max_side", "quality", "val_split", "shard_size", "workers", "force"),
    ),
    "predict": Word(
        predict.predict,
        ("images", "old"),
        ("reference", "topk", "batch_size", "output", "to", "ema_weights", "keyword_file", "force"),
    ),
    "verify": Word(
        verify.verify, ("files", "old"), ("root", "threads", "output", "ema_weights", "keyword_file", "force")
    ),
    "export": Word(
        export.export, ("old", "new", "to"), (*NETWORK, "uint8_input", "int8_sums", "int8_weights", "root")
    ),
    "sensitivity": Word(
        sensitivity.sensitivity,
        ("old",),
        ("bits", "samples", "root", "output", "ema_weights", "keyword_file", "force"),
    ),
    "plan": Word(plan.plan, ("old", "new"), ("budget_size", "budget_bops", "bits", "engine", "force")),
    "import": Word(export.import_, ("old", "new"), ("keyword_file", "force")),
}


# What stands on the command line without an option.
PLACES = {"runs": "RUN...", "images": "IMAGE|FOLDER...", "files": "FILE..."}
SHOWN = {
    "raw": "raw", "runs": "folders of runs", "images": "images", "files": "exported files", "source": "--from",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one word; returns the exit status, after printing a user's mistake as one line."""
    try:
        with _signals():
            word, options = parse(sys.argv[1:] if arguments is None else arguments)
            if options.keyword_file is not None:
                keyword.load_file(options.keyword_file)
            status = WORDS[word].run(options)
            sys.stdout.flush()
        return status
    except _Signalled as error:
        print(f"tools.py: ended by {error.signal.name}", file=sys.stderr)
        return 128 + error.signal
    except UserError as error:
        print(f"tools.py: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe; the flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class _Signalled(BaseException):
    """SIGINT or SIGTERM asks the program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Raise `_Signalled` on the first SIGINT or SIGTERM; repeats do not disturb the end of the program."""
    requests = Requests()

    def end(number: int, _: FrameType | None) -> None:
        if requests.new():
            raise _Signalled(number)

    # Ignored signals stay ignored: a shell lets its background jobs ignore Ctrl-C.
    former = {number: signal.getsignal(number) for number in SIGNALS}
    former = {number: handler for number, handler in former.items() if handler is not signal.SIG_IGN}
    for number in former:
        signal.signal(number, end)
    try:
        yield
    except _Signalled:
        former = dict.fromkeys(former, signal.SIG_IGN)  # also while the interpreter ends
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` for mistakes."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UserError(f"{message}; see python tools.py --help")


def parse(arguments: Sequence[str]) -> tuple[str, Options]:
    """The word and the options of a command line. Raises UserError for options that do not fit the word."""
    width = max(map(len, WORDS))
    described = "\n".join(
        f"  {name:{width}}  {word.run.__doc__}\n"
        f"  {'':{width}}  {' '.join(PLACES.get(n, SHOWN.get(n, f'--{n}')) for n in word.needs)}"
        f"{''.join(' [,raw]' if n == 'raw' else f' [--{n}]' for n in word.takes)}"
        for name, word in WORDS.items()
    )
    parser = _Parser(
        prog="tools.py",
        description="Small jobs on runs, checkpoints, exported networks, name lists and images.",
        epilog=f"words:\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--keyword", required=True, metavar="WORD[,raw]", help="what to do; see below")
    parser.add_argument(
        "--old",
        type=Path,
        metavar="FILE",
        help="the checkpoint to read; predict: or an exported file or page; plan: the record of sensitivity",
    )
    parser.add_argument("--new", type=Path, metavar="FILE", help="the checkpoint to write")
    parser.add_argument(
        "--earlier_names", action="store_true",
        help="save: MobileNets and VGG-Small with the names that they had in an earlier implementation",
    )  # fmt: skip
    parser.add_argument("--mf", type=Path, metavar="FILE", help="mapping file: names to map from")
    parser.add_argument("--mt", type=Path, metavar="FILE", help="mapping file: names to map to")
    parser.add_argument("--new_mf", type=Path, metavar="FILE", help="default: the --mf name + .sorted")
    parser.add_argument("--new_mt", type=Path, metavar="FILE", help="default: the --mt name + .sorted")
    parser.add_argument("--root", type=Path, metavar="FOLDER", help="the folder of images")
    parser.add_argument(
        "--verbose_list", metavar="LIST", help="details of names with these endings, or of all"
    )
    parser.add_argument("--num_classes", type=_positive, metavar="N", help="classes; default: 10")
    parser.add_argument(
        "--fake_size", type=_positive, metavar="N", help="training images, and a quarter more; default: 400"
    )
    parser.add_argument("--image_size", type=_size, metavar="WxH", help="pixels; default: 500x375")
    parser.add_argument("--workers", "-j", type=_positive, metavar="N", help="default: one process per core")
    parser.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="verify: of the engines when they are timed; default: 1",
    )
    parser.add_argument(
        "--from", dest="source", metavar="SOURCE",
        help="make-shards: folder with train/ and val/, of archives, Parquet files or shards; CSV file; URL of shards",
    )  # fmt: skip
    parser.add_argument(
        "--to", metavar="FORMAT|FOLDER",
        help=f"export: {', '.join(export.FORMATS)}; make-shards: the folder to write; predict: the folder of the files "
        "of an evaluation, of images whose classes are known",
    )  # fmt: skip
    parser.add_argument(
        "--max_side", type=_positive, metavar="PIXELS",
        help="make-shards: reduce images whose longer side is above it, and write them as JPEG",
    )  # fmt: skip
    parser.add_argument(
        "--val_split", type=_share, metavar="SHARE",
        help="make-shards: the share of each class for validation, of a folder or shards without val",
    )  # fmt: skip
    parser.add_argument("--quality", type=_positive, metavar="Q", help="make-shards: of JPEG; default: 90")
    parser.add_argument(
        "--shard_size", type=_positive, metavar="N", help="make-shards: images of a tar file; default: 2000"
    )
    parser.add_argument(
        "--topk", type=_positive, metavar="K", help="predict: classes of each image; default: 5"
    )
    parser.add_argument(
        "--reference", type=Path, metavar="FILE",
        help="predict: another network, such as that in full precision; lists images that change their class",
    )  # fmt: skip
    parser.add_argument(
        "--batch_size", "-b", type=_positive, metavar="N", help="predict: images; default: 64"
    )
    parser.add_argument(
        "--ema_weights", action="store_true", help="take the checkpoint's averaged weights (--ema_decay)"
    )
    parser.add_argument(
        "--uint8_input", action="store_true",
        help="export to litert, onnx, openvino: take images as bytes; the normalisation is inside",
    )  # fmt: skip
    parser.add_argument(
        "--int8_sums", action="store_true",
        help="export to onnx, openvino, web: residual sums in 8 bits, by ranges of a batch; faster, less exact",
    )  # fmt: skip
    parser.add_argument(
        "--int8_weights", action="store_true",
        help="export to litert: 8 bits for each code of a weight; faster, larger, as exact",
    )  # fmt: skip
    parser.add_argument(
        "--bits", type=_bits, metavar="LIST",
        help="sensitivity: bits to try; default: 8,4,3,2; plan: bits to choose from; default: all that were tried",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=_positive, metavar="N", help="sensitivity: images that are run; default: 256"
    )
    parser.add_argument("--budget_size", metavar="SIZE", help="plan: of all weights, such as 96KiB")
    parser.add_argument("--budget_bops", metavar="N", help="plan: bit operations of an image, such as 0.5G")
    parser.add_argument(
        "--engine",
        metavar="NAME",
        help="plan: only bits that it multiplies as integers: onnxruntime, openvino",
    )
    parser.add_argument(
        "--keyword_file", metavar="FILE", help="the Python file of keywords that the training ran with"
    )
    parser.add_argument(
        "places", nargs="*", type=Path, metavar="RUN|IMAGE|FILE",
        help="compare, report: folders of runs, exp/CASE; predict: images, folders, shards or tables of them; "
        "verify: exported files",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="report: default RUN/report.html, of several runs report.html; compare: FILE.csv or FILE.json; "
        "predict: FILE.csv or FILE.jsonl; verify, sensitivity: FILE.json, by default in the folder of the run",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="write over an existing file")
    found, unknown = parser.parse_known_args([_with_underscores(argument) for argument in arguments])
    if unknown:
        options = (name for action in parser._actions for name in action.option_strings)
        suggested = closest(unknown[0].partition("=")[0], options) or "; see python tools.py --help"
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}{suggested}")
    given = vars(found)

    listed = words(given.pop("keyword"))
    given["raw"] = "raw" in listed
    chosen = [name for name in listed if name != "raw"]
    for i, name in enumerate(chosen):
        if name.startswith("export_") and given["to"] is None:
            chosen[i], given["to"] = "export", name.removeprefix("export_")
        elif name not in WORDS:
            known = ", ".join(WORDS)
            raise UserError(f"--keyword {name}: no such word of {known}{closest(name, set(WORDS))}")
    if len(chosen) != 1:
        raise UserError(f"--keyword: {len(chosen)} words are given; write one of {', '.join(WORDS)}")
    name = chosen[0]
    word = WORDS[name]
    places = next((option for option in word.needs if option in PLACES), "runs")
    given[places] = tuple(given.pop("places")) or None
    for option, value in given.items():
        shown = SHOWN.get(option, f"--{option}")
        is_given = value is not None and value is not False
        if isinstance(value, tuple) and option in PLACES and option not in word.needs:
            raise UserError(f"{value[0]}: the word {name} takes no names without an option; leave it out")
        if is_given and option not in word.needs + word.takes:
            raise UserError(f"{shown} means nothing to the word {name}; leave it out")
        if not is_given and option in word.needs:
            raise UserError(f"the word {name} needs {shown}")
    options = Options(**given)
    refuse_pipes(options.old, *(options.files or ()))
    return name, options


def _with_underscores(argument: str) -> str:
    """Turn `--new-mf=a-b` into `--new_mf=a-b`."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument[2:].partition("=")
    return f"--{option.replace('-', '_')}{equals}{value}"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1, like 0.1")
    return share


def _bits(text: str) -> tuple[int, ...]:
    found = [_positive(part) for part in text.split(",")]
    if len({*found}) != len(found) or len(found) < 2 or not all(bits <= 8 for bits in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not two or more numbers from 1 to 8, like 8,4,2")
    return tuple(found)


def _size(text: str) -> tuple[int, int]:
    width, x, height = text.partition("x")
    if not x:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, like 500x375")
    return _positive(width), _positive(height)


if __name__ == "__main__":
    sys.exit(main())
