"""The weights in a checkpoint, and loading them by name, strictly and with a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.text import closest, printable, some_names

# Batch norms count batches but do not use the count at the default momentum; files of PyTorch before 0.4.1 lack it, and
# norms whose statistics are fixed have none.
COUNTERS = frozenset({"num_batches_tracked"})


# Keys under which programs keep weights, those of averaged weights last.
_WRAPPERS = (
    "state_dict", "model", "model_state_dict", "net", "network", "params", "weights",
    "ema", "state_dict_ema", "model_ema", "params_ema",
)  # fmt: skip


def wrapper_of(payload: Mapping[str, Any]) -> str | None:
    """The key under which a checkpoint keeps its weights, such as `state_dict` or `model`, or None when bare."""
    found = [key for key in _WRAPPERS if isinstance(payload.get(key), Mapping)]
    held = [key for key in found if _holds_tensors(payload[key])]
    held += [key for key in found if _lone_wrapper(payload[key])]
    return next(iter(held + found), None)


def state_dict_of(
    payload: Mapping[str, Any], *, source: str = "the checkpoint", names: Iterable[str] = ()
) -> dict[str, Tensor]:
    """The weights of a checkpoint: a bare state dict, or the one under `state_dict`, `model` or another usual key.

    Under that key it may lie under one more, as in {"ema": {"module": weights}}.

    Leading `module.` and any `_orig_mod.`, left by parallel and compiled wrappers, are removed from every name. With
    the `names` of the network so is another prefix, such as `model.`, when without it names are the network's
    and with it none is. Text beside the tensors is left out, and so are numbers that are none of `names`; others
    become tensors.

    Args:
        payload: the checkpoint.
        source: names it in messages.
        names: of the network; none: numbers under a key become tensors.

    Raises:
        UserError: there are no weights, an entry is not a dense real tensor, or two names become one.
    """
    key = wrapper_of(payload)
    entries: Mapping[str, Any] = payload if key is None else payload[key]
    inner = key and _lone_wrapper(entries)
    if inner:
        key, entries = f"{key}.{inner}", entries[inner]
    names = frozenset(names)
    plain = key is not None or any(isinstance(value, Tensor) for value in entries.values())
    originals: dict[str, str] = {}
    state: dict[str, Tensor] = {}
    for name, value in entries.items():
        short = _unwrapped(name) if isinstance(name, str) else name
        if plain and isinstance(short, str) and isinstance(value, str | int | float | None):
            if isinstance(value, str | None) or not (short in names if names else key is not None):
                continue
            value = torch.tensor(value)
        if not isinstance(short, str) or not _is_dense(value):
            if key is None:
                keys = some_names(str(key) for key in entries)
                inside = [str(key) for key, value in entries.items() if _holds_tensors(value)]
                if inside and not any(isinstance(value, Tensor) for value in entries.values()):
                    raise UserError(
                        f"{source} has tensors in {some_names(inside)}, which is no usual key of weights; save the "
                        f"network's alone: torch.save({{'state_dict': checkpoint[{inside[0]!r}]}}, FILE)"
                    )
                raise UserError(
                    f"{source} has no state_dict and no model, and is none itself; its keys: {keys}"
                )
            raise UserError(f"{source}: the entry {name!r} under {key} is not a dense real tensor")
        if short in state:
            raise UserError(f"{source} has both {originals[short]!r} and {name!r}; keep one of them")
        # In some published files counters are parameters.
        state[short], originals[short] = value.detach() if value.requires_grad else value, name
    if not state:
        raise UserError(f"{source} holds no weights")
    prefix = _foreign_prefix(state, names)
    short_names = [name.removeprefix(prefix) for name in state]
    if len(set(short_names)) < len(state):
        return state
    return dict(zip(short_names, state.values(), strict=True))


def _holds_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())


def _lone_wrapper(entries: Mapping[str, Any]) -> str | None:
    """The key of weights inside those of another, as in {"ema": {"module": weights}}; None without one."""
    if _holds_tensors(entries):
        return None
    found = [key for key in ("module", *_WRAPPERS) if _holds_tensors(entries.get(key))]
    return found[0] if len(found) == 1 else None


def _unwrapped(name: str) -> str:
    """A name without what `torch.compile` and parallel wrappers add."""
    short = ".".join(part for part in name.split(".") if part != "_orig_mod")
    while short.startswith("module."):
        short = short.removeprefix("module.")
    return short


def _foreign_prefix(state: Mapping[str, Tensor], names: frozenset[str]) -> str:
    """The prefix that most names have before one of the network's, if that is half of them; else empty."""
    if not names.isdisjoint(state):
        return ""
    found: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        rests = (i for i in range(1, len(parts)) if ".".join(parts[i:]) in names)
        found.update(".".join(parts[:i]) + "." for i in rests)
    for prefix, _ in found.most_common(1):
        if 2 * sum(name.startswith(prefix) for name in state) >= len(state):
            return prefix
    return ""


def class_names_of(payload: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes that a checkpoint was trained with; empty when it has none."""
    names = payload.get("classes")
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def check_class_names(before: Sequence[str], now: Sequence[str], source: str) -> None:
    """Raise `UserError` where classes have other names than those that `source` was trained with.

    Lists of different lengths are another mistake, which the shape of the last layer shows; an empty one has no names.
    """
    pairs = enumerate(zip(before, now, strict=False))
    other = [printable(f"class {i} was {a!r} and is {b!r} now") for i, (a, b) in pairs if a != b]
    if len(before) != len(now) or not other:
        return
    more = f" and {len(other) - 3} more" if len(other) > 3 else ""
    raise UserError(
        f"{source} was trained with other classes: {', '.join(other[:3])}{more}; rename the class folders back; for "
        "other classes begin with --pretrained and --unresume_scope LAYER, the last one; where the classes have only "
        f"new names, tools.py --keyword save --old {source} --new FILE writes weights without names, for --pretrained"
    )


def max_value_of(payload: Mapping[str, Any]) -> int | None:
    """The value of 16-bit images that became white in a checkpoint's training; None when it has none."""
    value = payload.get("max_value")
    return value if isinstance(value, int) else None


def check_max_value(before: int | None, now: int | None, source: str) -> None:
    """Raise `UserError` where another value of 16-bit images becomes white than in the training of `source`."""
    if None not in (before, now) and before != now:
        raise UserError(
            f"{source} was trained with 16-bit images whose value {before} became white, and the largest value of "
            f"these images is {now}: write --max_value {before}, or another one for images of another kind"
        )


def _is_dense(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_meta or value.is_complex())
    )


Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]  # name, shape in the file, shape in the model


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """The outcome of loading, for every name of a file and of a model."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()  # in the model only
    unused: tuple[str, ...] = ()  # in the file only
    mismatched: tuple[Mismatch, ...] = ()
    skipped: tuple[str, ...] = ()  # on either side, because the user asked for it
    summed: tuple[str, ...] = ()  # loaded, but summed over the colours since the network takes grey images
    obsolete: tuple[str, ...] = ()  # tables of published files and counters, which are not needed
    source: str = ""  # the file
    classes: tuple[str, ...] = ()  # names of the file's, where the layer that tells them apart was loaded
    max_value: int | None = None  # the file's, of 16-bit images
    warning: str = ""  # what the file does not say and the network needs

    def summary(self) -> str:
        """One line: how many names of each kind, all that were skipped and the first few of the others."""
        kinds = {
            "missing": some_names(self.missing),
            "unused": some_names(self.unused),
            "of another shape": some_names(_both_shapes(self.mismatched)),
            "skipped": ", ".join(map(printable, self.skipped)),
            "summed over the colours": some_names(self.summed),
            "obsolete": some_names(self.obsolete),
        }
        counts = (self.missing, self.unused, self.mismatched, self.skipped, self.summed, self.obsolete)
        parts = [
            f"{len(names)} {kind} ({shown})"
            for (kind, shown), names in zip(kinds.items(), counts, strict=True)
            if names
        ]
        return ", ".join([f"{len(self.loaded)} loaded", *parts])


def in_scope(name: str, scope: Iterable[str]) -> bool:
    """Whether an entry of `--unresume_scope` names this parameter.

    An entry is the whole name of a parameter, that of a module with all its parameters, or a pattern of such names.

    Example:
        >>> from utils.checkpoint.weights import in_scope
        >>> in_scope("fc.weight", ["fc"]), in_scope("layer1.0.se.fc1.weight", ["fc"])
        (True, False)
        >>> in_scope("layer1.0.se.fc1.weight", ["*.se"]), in_scope("layer1.0.se.fc1.weight", ["fc*"])
        (True, False)
    """
    parts = name.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(one, entry) for entry in scope for one in names)


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    allow_missing: Callable[[str], bool],
    scope: tuple[str, ...] | None = None,
    whole: bool = False,
    source: str,
) -> LoadReport:
    """Copy `state` into `model` by name, all of it or nothing.

    Every name must be on both sides with the same shape. Exceptions: names in `scope` (see `in_scope`) are skipped,
    where `whole` only those that the model does not have; None is for files of which nothing can be skipped; names of
    the model for which `allow_missing(name)`, and batch norms' counters, may be
    absent from the file; one-element tensors match in any rank; entries of published files that a
    module lists in `obsolete` are skipped, and so are the counters of batch norms that are norms of fixed statistics
    here. Data types and whether an entry is a parameter or a buffer do not matter.
    `source` names the file in messages. Afterwards `weights_loaded()` of every module that has it is called; its
    `ValueError` means that the file is damaged.

    Raises UserError, before anything is copied, when the names or shapes do not fit, when an entry of `scope`
    matches no name or, where `whole`, one of the model, or when nothing at all would be loaded.
    """
    own: dict[str, Tensor] = model.state_dict()
    obsolete = {name for module in model.modules() for name in getattr(module, "obsolete", ())}

    def is_obsolete(name: str) -> bool:
        norm, _, last = name.rpartition(".")
        if not obsolete.isdisjoint(name.split(".")):
            return True
        return last in COUNTERS and f"{norm}.running_mean".removeprefix(".") in own

    everything = dict.fromkeys((*own, *state))
    for word in scope or ():
        if not any(in_scope(name, [word]) for name in everything):
            raise UserError(
                f"--unresume_scope {word!r}: no name in {source} or the network is this or below it"
                f"{_meant(word, everything)}"
            )
    skipped = {name: None for name in everything if in_scope(name, scope or ())}
    needed = [name for name in skipped if name in own]
    if whole and needed:
        raise UserError(
            f"--unresume_scope {','.join(scope or ())}: an evaluation needs the whole network, and this leaves out "
            f"{some_names(needed)}; write --unresume_scope none and name the checkpoint of a trained network"
        )
    theirs = {name: value for name, value in state.items() if name not in skipped}
    ours = {name: value for name, value in own.items() if name not in skipped}
    extra = tuple(name for name in theirs if name not in ours)
    common = tuple(name for name in ours if name in theirs)
    mismatched = tuple(
        (name, tuple(theirs[name].shape), tuple(ours[name].shape))
        for name in common
        if theirs[name].shape != ours[name].shape and not theirs[name].numel() == ours[name].numel() == 1
    )
    wrong_shape = {name for name, _, _ in mismatched}
    report = LoadReport(
        loaded=tuple(name for name in common if name not in wrong_shape),
        missing=tuple(name for name in ours if name not in theirs),
        unused=tuple(name for name in extra if not is_obsolete(name)),
        mismatched=mismatched,
        skipped=tuple(skipped),
        obsolete=tuple(name for name in extra if is_obsolete(name)),
    )

    absent = tuple(
        name for name in report.missing if name.rpartition(".")[2] not in COUNTERS and not allow_missing(name)
    )
    if absent or report.unused or mismatched:
        problems = [f"{len(absent)} missing ({some_names(_with_shape(absent, own))})"] if absent else []
        if report.unused:
            problems.append(f"{len(report.unused)} unused ({some_names(_with_shape(report.unused, state))})")
        if mismatched:
            problems.append(f"{len(mismatched)} of another shape ({some_names(_both_shapes(mismatched))})")
        hint = "" if scope is None else "; --unresume_scope NAME skips a layer or parameter of that name"
        leave_out = ""
        if scope is not None and not (whole or absent or report.unused):
            layers = ",".join(dict.fromkeys(name.rpartition(".")[0] for name, _, _ in mismatched))
            leave_out = f"--unresume_scope {layers}"
            hint = f"; {leave_out} leaves these out, to train them anew"
        channels = _channels(mismatched)
        if channels and not (absent or report.unused):
            anew = f", or {leave_out} to train that layer anew" if leave_out else ""
            raise UserError(
                f"{source} was trained with --channels {channels[0]} and does not fit a network of --channels "
                f"{channels[1]}: write --channels {channels[0]}{anew}"
            )
        raise UserError(
            f"{source} does not fit the network: {'; '.join(problems)}; a checkpoint of another network? "
            f"check --model, --width_alpha, --keyword{hint}"
        )
    if not report.loaded:
        raise UserError(f"nothing of {source} would be loaded: {report.summary()}")

    with torch.no_grad():
        for name in report.loaded:
            own[name].copy_(state[name].reshape(own[name].shape))
    for module in model.modules():
        take_over: Callable[[], None] | None = getattr(module, "weights_loaded", None)
        if take_over is not None:
            try:
                take_over()
            except ValueError as error:
                raise UserError(f"{source} is damaged: {error}; use another file") from error
    return report


def _meant(word: str, names: Iterable[str]) -> str:
    """What an entry of a scope that matches nothing may have meant, as the end of a message."""
    containing = [name for name in names if word in name]
    if containing:
        return f"; write '*{word}*' for the {len(containing)} that contain it ({some_names(containing)})"
    layers = {part for name in names for part in (name.rpartition(".")[0], name.partition(".")[0])} - {""}
    endings = {f"*.{name.rpartition('.')[2]}" for name in names}
    return closest(word, {*names, *layers, *endings}, cutoff=0.5)


def nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors with a value that is NaN or infinite. Waits for the device."""
    return [name for name, tensor in tensors if not bool(tensor.isfinite().all())]


def check_finite(tensors: Iterable[tuple[str, Tensor]], source: str, what: str = "") -> None:
    """Raise `UserError` where weights of the option and file `source` are not finite; `what` says whose they are."""
    bad = nonfinite(tensors)
    if bad:
        raise UserError(f"{source}: {some_names(bad)}{what} is not finite; give another checkpoint")


def _channels(mismatched: Iterable[Mismatch]) -> tuple[int, int] | None:
    """The channels of the file's images and the network's, if only a layer that reads them differs by that."""
    found = set()
    for _, theirs, ours in mismatched:
        if len(theirs) != 4 or len(ours) != 4 or (theirs[0], theirs[2:]) != (ours[0], ours[2:]):
            return None
        pixels = min(theirs[1], ours[1])
        if pixels not in (1, 4, 16):  # 4, 16: of a block, behind space-to-depth
            return None
        found.add((theirs[1] // pixels, ours[1] // pixels))
    return found.pop() if found in ({(3, 1)}, {(1, 3)}) else None


def _with_shape(names: Iterable[str], tensors: Mapping[str, Tensor]) -> list[str]:
    return [f"{name} {list(tensors[name].shape)}" for name in names]


def _both_shapes(mismatched: Iterable[Mismatch]) -> list[str]:
    return [f"{name}: {list(a)} in the file, {list(b)} in the network" for name, a, b in mismatched]
