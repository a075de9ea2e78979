"""Small jobs on runs, checkpoints, name lists and image folders: `python tools.py --keyword WORD[,raw] ...`.

See docs/tools.md. The exit status is 0 when all is well, 1 when a check found something, 2 for a mistake.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from utils import names
from utils.errors import UserError, printable
from utils.interrupt import SIGNALS, Requests

# torch, Pillow and tqdm are imported where they are used, so that `--help` and mistakes answer at once.
if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
SMALL = 4  # elements of a tensor whose values are listed


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line; None or False where an option was not given."""

    old: Path | None = None
    new: Path | None = None
    mf: Path | None = None
    mt: Path | None = None
    new_mf: Path | None = None
    new_mt: Path | None = None
    root: Path | None = None
    verbose_list: str | None = None
    workers: int | None = None
    runs: tuple[Path, ...] | None = None
    output: Path | None = None
    num_classes: int | None = None
    fake_size: int | None = None
    image_size: tuple[int, int] | None = None
    force: bool = False
    raw: bool = False


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


def compare(options: Options) -> int:
    """Print a table of finished RUNS, the gaps against the first, and the files to look at."""
    from model.summary import format_table  # imports torch

    folders = options.runs or ()
    runs = [_summary(folder) for folder in folders]
    first = runs[0]["last_top1"]
    rows = []
    for run in runs:
        top1 = run["last_top1"]
        gap = "" if run is runs[0] or None in (top1, first) else f"{top1 - first:+.2f}"
        saved = run["float_weight_bytes"] / run["weight_bytes"]
        rows.append((
            run["case"], run["network"], run["bits"], "-" if top1 is None else f"{top1:.2f}", gap,
            f"{run['weight_bytes'] / 1024:.1f}", f"{run['float_weight_bytes'] / 1024:.1f}", f"{saved:.1f}x",
            run["audit"],
        ))  # fmt: skip
    head = ("run", "network", "bits w/a", "top-1 %", "gap", "weights KiB", "float32 KiB", "smaller", "audit")
    print(format_table(head, rows))
    print("top-1: validation images, after the last epoch; weights: those of convolutions and linear layers")
    print("\nlook at:")
    for folder in folders:
        for name in ("curves.png", "metrics.csv", "audit.txt", "tensorboard"):
            if (folder / name).exists():
                print(f"  {folder / name}")
    if any((folder / "tensorboard").exists() for folder in folders):
        print(f"  tensorboard --logdir {os.path.commonpath([str(folder) for folder in folders])}")
    return 0


def report(options: Options) -> int:
    """Write a page about RUNS, finished or not: curves, quantizers, cost, configuration."""
    from utils import checkpoint  # imports torch
    from utils.html_report import page, runs

    folders = options.runs or ()
    path = options.output or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--output {path}: name a file in a folder that exists")
    _check_new(options, path)
    checkpoint.write_atomic(path, page.render(runs.read(folders)).encode())
    print(
        f"{path}: {len(folders)} run{'' if len(folders) == 1 else 's'}, {path.stat().st_size / 2**20:.1f} MiB"
    )
    return 0


def _summary(folder: Path) -> dict[str, Any]:
    """What a finished run wrote about itself. Raises UserError when it has not."""
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; name the folders of finished runs, such as exp/CASE"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    needed = {"case", "network", "bits", "last_top1", "weight_bytes", "float_weight_bytes", "audit"}
    if not isinstance(summary, dict) or not needed <= summary.keys():
        raise UserError(f"{path} is not the summary of a run")
    return summary


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


def verbose(options: Options) -> int:
    """List the entries of --old."""
    from utils import checkpoint

    payload, state = _weights(options)
    key = checkpoint.wrapper_of(payload)
    if key is None:
        print("keys: none, a bare state dict")
    else:
        tops = (f"{k}={v}" if isinstance(v, int | float) else str(k) for k, v in payload.items())
        print(f"keys: {', '.join(map(printable, tops))}; weights under {key}")
    if options.verbose_list is None:
        rows = [(printable(name), str(list(value.shape))) for name, value in state.items()]
    else:
        endings = ("",) if options.verbose_list.strip() == "all" else tuple(_split(options.verbose_list))
        for ending in endings:
            if not any(name.endswith(ending) for name in state):
                close = names.closest(ending, {name.rpartition(".")[2] for name in state})
                raise UserError(f"--verbose_list {ending}: no name ends so{close}")
        rows = [
            (printable(name), *_details(value)) for name, value in state.items() if name.endswith(endings)
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{len(rows)} of {len(state)} entries")
    return 0


def _details(value: Tensor) -> tuple[str, str, str]:
    """Shape, dtype and, of a small tensor, the values."""
    numbers = value.flatten().tolist() if value.numel() <= SMALL else []
    texts = [f"{number:.7g}" if isinstance(number, float) else str(number) for number in numbers]
    return str(list(value.shape)), str(value.dtype).removeprefix("torch."), " ".join(texts)


def load(options: Options) -> int:
    """Check that --old loads as a network's weights, and count them."""
    from utils import checkpoint

    payload, state = _weights(options)
    key = checkpoint.wrapper_of(payload)
    elements = sum(value.numel() for value in state.values())
    print(f"{options.old}: loads as a network's weights, {'bare' if key is None else f'under {key}'}")
    print(f"{len(state)} entries, {elements} elements")
    return 0


def save(options: Options) -> int:
    """Write the weights of --old alone to --new."""
    _check_new(options, options.new)
    _, state = _weights(options)
    return _write(options, {}, state)


def update(options: Options) -> int:
    """Write --old to --new with the names of --mf replaced by those of --mt."""
    return _rename(options, _given(options.mf), _given(options.mt))


def swap(options: Options) -> int:
    """Write --old to --new with the names of --mt replaced by those of --mf: `update` undone."""
    return _rename(options, _given(options.mt), _given(options.mf))


def _rename(options: Options, source: Path, target: Path) -> int:
    from utils import checkpoint

    _check_new(options, options.new)
    pairs = names.read_pairs(source, target)
    payload, state = _weights(options)
    renamed = names.rename(state, pairs, str(options.old))
    key = checkpoint.wrapper_of(payload)
    others = {} if key is None else {name: value for name, value in payload.items() if name != key}
    return _write(options, others, renamed)


def _weights(options: Options) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The whole of --old, and the weights in it."""
    from utils import checkpoint

    old = _given(options.old)
    payload = checkpoint.read(old)
    return payload, checkpoint.state_dict_of(payload, source=str(old))


def _write(options: Options, others: dict[str, Any], state: dict[str, Tensor]) -> int:
    """Write the new file: everything, or with `raw` the bare state dict."""
    from utils import checkpoint

    new = _given(options.new)
    checkpoint.save(new, state if options.raw else {**others, "state_dict": state})
    print(f"{new}: {len(state)} entries, {'bare' if options.raw else 'under state_dict'}")
    return 0


# ---------------------------------------------------------------------------------------------
# Mapping files
# ---------------------------------------------------------------------------------------------


def sort(options: Options) -> int:
    """Write --mf and --mt, sorted together by the names of --mf, to --new_mf and --new_mt."""
    from utils import checkpoint

    mf, mt = _given(options.mf), _given(options.mt)
    new_mf = options.new_mf or mf.with_name(mf.name + ".sorted")
    new_mt = options.new_mt or mt.with_name(mt.name + ".sorted")
    if new_mf == new_mt:
        raise UserError(f"--new_mf and --new_mt are both {new_mf}; name two files")
    _check_new(options, new_mf, new_mt)
    pairs = sorted(names.read_pairs(mf, mt), key=lambda pair: names.natural_order(pair[0]))
    for path, column in ((new_mf, [name for name, _ in pairs]), (new_mt, [name for _, name in pairs])):
        checkpoint.write_atomic(path, "".join(f"{name}\n" for name in column).encode())
        print(f"{path}: {len(pairs)} names")
    return 0


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def verify_image(options: Options) -> int:
    """Decode every image below --root and list the bad ones."""
    from utils import verify  # imports Pillow

    images, bad = 0, 0
    for path, reason in _each_image(options, verify.image_error):
        images += 1
        if reason is not None:
            bad += 1
            _tell(path, reason)
    print(f"{images} images, {bad} bad")
    return 1 if bad else 0


def verify_data(options: Options) -> int:
    """Decode every image below --root; list bad ones, odd ones and wrong class folders."""
    try:
        import pyvips  # noqa: F401
    except (ImportError, OSError) as error:
        raise UserError(
            f"verify-data needs pyvips ({error}): pip install pyvips pyvips-binary; verify-image does without"
        ) from error
    from utils import verify  # imports Pillow

    counts: Counter[str] = Counter()
    images = 0
    root = _given(options.root)
    for path, findings in _each_image(options, verify.image_findings):
        images += 1
        if path.parent in (root / "train", root / "val"):
            findings.append(("without class", "training passes over images beside the class folders"))
        for kind, reason in findings:
            counts[kind] += 1
            _tell(path, f"{kind}: {reason}")
    for path in sorted(verify.other_files(root)):
        if form := verify.format_of(path):
            counts["mislabelled"] += 1
            _tell(path, f"mislabelled: the file is {form}, training passes over files with this ending")
    if (root / "train").is_dir() or (root / "val").is_dir():
        from utils.folder import check_folders  # imports torch

        try:
            check_folders(root, "imagenet", val=True)
        except UserError as error:
            counts["class folders"] += 1
            _tell(root, f"class folders: {error}")
    print(f"{images} images: {', '.join(f'{n} {kind}' for kind, n in counts.items()) or 'nothing found'}")
    return 1 if counts else 0


def _tell(path: Path, text: str) -> None:
    """Print a line about a path above the progress bar."""
    from tqdm import tqdm

    tqdm.write(printable(f"{path}: {text}"), file=sys.stdout)


def _each_image(options: Options, look: Callable[[Path], T]) -> Iterator[tuple[Path, T]]:
    """What `look` says of every image below --root, in --workers processes, with a progress bar."""
    from concurrent.futures.process import BrokenProcessPool

    from tqdm import tqdm

    from utils import verify, workers

    root = _given(options.root)
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder")
    images = sorted(verify.image_files(root))
    if not images:
        raise UserError(
            f"--root {root}: no image below it (files that end in {' '.join(verify.IMAGE_ENDINGS)})"
        )
    if options.workers is not None:
        workers.check(options.workers)
    count = min(options.workers or os.cpu_count() or 1, len(images))
    try:
        with workers.pool(count, preload="utils.verify") as pool:
            found = pool.map(look, images, chunksize=min(64, -(-len(images) // count)))
            # disable=None: a bar on a terminal only
            progress = tqdm(found, total=len(images), unit="image", disable=None)
            yield from zip(images, progress, strict=True)
    except BrokenProcessPool as error:
        raise UserError("a decoding process died, out of memory perhaps; try fewer --workers") from error


def make_fake_imagenet(options: Options) -> int:
    """Write a folder of computed JPEG files in ImageNet's layout, the same every time."""
    from tqdm import tqdm

    from utils.fake import write_folder  # imports torch

    root, classes, samples = _given(options.root), options.num_classes or 10, options.fake_size or 400
    width, height = options.image_size or (500, 375)
    if samples < classes:
        raise UserError(f"--fake_size {samples}: {classes} classes need at least {classes} training images")
    for part in (root / "train", root / "val"):
        if os.path.lexists(part):
            raise UserError(f"{part} exists; name another --root, or remove it")
    files = write_folder(root, samples, classes, width, height)
    total = samples + max(classes, samples // 4)
    written = sum(1 for _ in tqdm(files, total=total, unit="image", disable=None))
    print(f"{root}: {written} images of {classes} classes, {width}x{height} pixels")
    return 0


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """A word of --keyword: its function, the options it needs and those it may have."""

    run: Callable[[Options], int]
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()


WORDS: dict[str, Word] = {
    "compare": Word(compare, ("runs",)),
    "report": Word(report, ("runs",), ("output", "force")),
    "verbose": Word(verbose, ("old",), ("verbose_list",)),
    "load": Word(load, ("old",)),
    "save": Word(save, ("old", "new"), ("raw", "force")),
    "update": Word(update, ("old", "new", "mf", "mt"), ("raw", "force")),
    "swap": Word(swap, ("old", "new", "mf", "mt"), ("raw", "force")),
    "sort": Word(sort, ("mf", "mt"), ("new_mf", "new_mt", "force")),
    "verify-image": Word(verify_image, ("root",), ("workers",)),
    "verify-data": Word(verify_data, ("root",), ("workers",)),
    "make-fake-imagenet": Word(make_fake_imagenet, ("root",), ("num_classes", "fake_size", "image_size")),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one word; returns the exit status, after printing a user's mistake as one line."""
    try:
        with _signals():
            word, options = parse(sys.argv[1:] if arguments is None else arguments)
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
        # The reader (`head`) has all it wanted; the flush at exit must not fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class _Signalled(BaseException):
    """SIGINT or SIGTERM asks the program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise `_Signalled`, once: repeats do not disturb how the program ends."""
    requests = Requests()

    def end(number: int, _: FrameType | None) -> None:
        if requests.new():
            raise _Signalled(number)

    # What is ignored stays so: a shell has Ctrl-C ignored by what it runs in the background.
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
    """A parser whose mistakes are a UserError, too."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UserError(f"{message}; see python tools.py --help")


def parse(arguments: Sequence[str]) -> tuple[str, Options]:
    """The word and the options of a command line. Raises UserError for what does not fit the word."""
    width = max(map(len, WORDS))
    words = "\n".join(
        f"  {name:{width}}  {word.run.__doc__}\n"
        f"  {'':{width}}  {' '.join('RUN...' if n == 'runs' else f'--{n}' for n in word.needs)}"
        f"{''.join(' [,raw]' if n == 'raw' else f' [--{n}]' for n in word.takes)}"
        for name, word in WORDS.items()
    )
    parser = _Parser(
        prog="tools.py",
        description="Small jobs on runs, checkpoints, name lists and image folders.",
        epilog=f"words:\n{words}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--keyword", required=True, metavar="WORD[,raw]", help="what to do; see below")
    parser.add_argument("--old", type=Path, metavar="FILE", help="the checkpoint to read")
    parser.add_argument("--new", type=Path, metavar="FILE", help="the checkpoint to write")
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
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs, exp/CASE")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: RUN/report.html, of several runs report.html"
    )
    parser.add_argument("--force", action="store_true", help="write over an existing file")
    given = vars(parser.parse_args([_with_underscores(argument) for argument in arguments]))

    listed = _split(given.pop("keyword"))
    given["raw"] = "raw" in listed
    given["runs"] = tuple(given["runs"]) or None
    chosen = [name for name in listed if name != "raw"]
    for name in chosen:
        if name not in WORDS:
            known = ", ".join(WORDS)
            raise UserError(f"--keyword {name}: no such word of {known}{names.closest(name, set(WORDS))}")
    if len(chosen) != 1:
        raise UserError(f"--keyword: {len(chosen)} words are given; write one of {', '.join(WORDS)}")
    name = chosen[0]
    word = WORDS[name]
    for option, value in given.items():
        shown = {"raw": "raw", "runs": "folders of runs"}.get(option, f"--{option}")
        is_given = value is not None and value is not False
        if is_given and option not in word.needs + word.takes:
            raise UserError(f"{shown} means nothing to the word {name}; leave it out")
        if not is_given and option in word.needs:
            raise UserError(f"the word {name} needs {shown}")
    return name, Options(**given)


def _with_underscores(argument: str) -> str:
    """`--new-mf=a-b` as `--new_mf=a-b`."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument[2:].partition("=")
    return f"--{option.replace('-', '_')}{equals}{value}"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    width, x, height = text.partition("x")
    if not x:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, like 500x375")
    return _positive(width), _positive(height)


def _split(text: str) -> list[str]:
    return [word for word in (part.strip() for part in text.split(",")) if word]


def _given(path: Path | None) -> Path:
    """An option that `parse` made sure of."""
    if path is None:
        raise TypeError("an option that the word needs is not declared in WORDS")
    return path


def _check_new(options: Options, *paths: Path | None) -> None:
    """Refuse, before any work, to write over an existing file without --force."""
    for path in paths:
        if path is not None and os.path.lexists(path) and not options.force:
            raise UserError(f"{path} exists; --force writes over it")


if __name__ == "__main__":
    sys.exit(main())
