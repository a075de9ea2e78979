"""The words of tools.py about checkpoints and name lists: verbose, load, save, update, swap, sort."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config.option import words
from utils.errors import UserError
from utils.text import closest, printable
from utils.tools import name_lists
from utils.tools.options import Options, given_path, refuse_existing

# torch is imported where it is used, so that `--help` and mistakes answer at once.
if TYPE_CHECKING:
    from torch import Tensor

SMALL = 4  # most elements of a tensor whose values are listed


def verbose(options: Options) -> int:
    """List the entries of --old."""
    from utils.checkpoint import weights

    payload, state = _weights(options)
    key = weights.wrapper_of(payload)
    if key is None:
        print("keys: none, a bare state dict")
    else:
        tops = (f"{k}={v}" if isinstance(v, int | float) else str(k) for k, v in payload.items())
        print(f"keys: {', '.join(map(printable, tops))}; weights under {key}")
    if options.verbose_list is None:
        rows = [(printable(name), str(list(value.shape))) for name, value in state.items()]
    else:
        endings = ("",) if options.verbose_list.strip() == "all" else tuple(words(options.verbose_list))
        for ending in endings:
            if not any(name.endswith(ending) for name in state):
                close = closest(ending, {name.rpartition(".")[2] for name in state})
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
    from utils.checkpoint import weights

    payload, state = _weights(options)
    key = weights.wrapper_of(payload)
    elements = sum(value.numel() for value in state.values())
    print(f"{options.old}: loads as a network's weights, {'bare' if key is None else f'under {key}'}")
    print(f"{len(state)} entries, {elements} elements")
    return 0


def save(options: Options) -> int:
    """Write the weights of --old alone to --new."""
    refuse_existing(options, options.new)
    payload, state = _weights(options)
    return _write(options, {}, _earlier(payload, state, options) if options.earlier_names else state)


def _earlier(payload: dict[str, Any], state: dict[str, Tensor], options: Options) -> dict[str, Tensor]:
    """The weights with the names of an earlier implementation."""
    from utils.checkpoint import earlier_names

    config = payload.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    name = model.get("name") if isinstance(model, dict) else None
    layers = earlier_names.earlier_layers(str(name), state)
    if not layers:
        raise UserError(
            f"--earlier_names: {options.old} is of "
            f"{'a network that it does not name' if name is None else printable(str(name))}, and only "
            f"{', '.join(earlier_names.NETWORKS)} had other names: leave it out"
        )
    return earlier_names.with_layers(state, layers)


def update(options: Options) -> int:
    """Write --old to --new with the names of --mf replaced by those of --mt."""
    return _rename(options, given_path(options.mf), given_path(options.mt))


def swap(options: Options) -> int:
    """Write --old to --new with the names of --mt replaced by those of --mf: `update` undone."""
    return _rename(options, given_path(options.mt), given_path(options.mf))


def _rename(options: Options, source: Path, target: Path) -> int:
    from utils.checkpoint import weights

    refuse_existing(options, options.new)
    pairs = name_lists.read_pairs(source, target)
    payload, state = _weights(options)
    renamed = name_lists.rename(state, pairs, str(options.old))
    key = weights.wrapper_of(payload)
    others = {} if key is None else {name: value for name, value in payload.items() if name != key}
    return _write(options, others, renamed)


def _weights(options: Options) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The whole of --old, and the weights in it."""
    from utils.checkpoint import archive, weights

    old = given_path(options.old)
    payload = archive.read(old)
    return payload, weights.state_dict_of(payload, source=str(old))


def _write(options: Options, others: dict[str, Any], state: dict[str, Tensor]) -> int:
    """Write the new file: everything, or with `raw` the bare state dict."""
    from utils.checkpoint import archive

    new = given_path(options.new)
    archive.save(new, state if options.raw else {**others, "state_dict": state})
    print(f"{new}: {len(state)} entries, {'bare' if options.raw else 'under state_dict'}")
    return 0


def sort(options: Options) -> int:
    """Write --mf and --mt, sorted together by the names of --mf, to --new_mf and --new_mt."""
    from utils.checkpoint import archive

    mf, mt = given_path(options.mf), given_path(options.mt)
    new_mf = options.new_mf or mf.with_name(mf.name + ".sorted")
    new_mt = options.new_mt or mt.with_name(mt.name + ".sorted")
    if new_mf == new_mt:
        raise UserError(f"--new_mf and --new_mt are both {new_mf}; name two files")
    refuse_existing(options, new_mf, new_mt)
    pairs = sorted(name_lists.read_pairs(mf, mt), key=lambda pair: name_lists.natural_order(pair[0]))
    for path, column in ((new_mf, [name for name, _ in pairs]), (new_mt, [name for _, name in pairs])):
        archive.write_atomic(path, "".join(f"{name}\n" for name in column).encode())
        print(f"{path}: {len(pairs)} names")
    return 0
