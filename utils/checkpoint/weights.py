"""The weights in a checkpoint, and loading them by name, strictly and with a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.text import closest, some_names

# Batch norms count batches but do not use the count at the default momentum; files of PyTorch before 0.4.1 lack it.
COUNTERS = frozenset({"num_batches_tracked"})


def wrapper_of(payload: Mapping[str, Any]) -> str | None:
    """The key under which a checkpoint keeps its weights: `state_dict`, `model`, or None when bare."""
    for key in ("state_dict", "model"):
        if isinstance(payload.get(key), Mapping):
            return key
    return None


def state_dict_of(payload: Mapping[str, Any], *, source: str = "the checkpoint") -> dict[str, Tensor]:
    """The weights of a checkpoint: a bare state dict, or the one under `state_dict` or `model`.

    A leading `module.`, left by a parallel wrapper, is removed from every name. `source` names the checkpoint
    in messages. Raises UserError when there are no weights, when an entry is not a dense real tensor, or
    when two names become one.
    """
    key = wrapper_of(payload)
    entries: Mapping[str, Any] = payload if key is None else payload[key]
    if not entries:
        raise UserError(f"{source} holds no weights")
    state: dict[str, Tensor] = {}
    for name, value in entries.items():
        if not isinstance(name, str) or not _is_dense(value):
            if key is None:
                keys = some_names(str(key) for key in entries)
                raise UserError(
                    f"{source} has no state_dict and no model, and is none itself; its keys: {keys}"
                )
            raise UserError(f"{source}: the entry {name!r} under {key} is not a dense real tensor")
        short = name.removeprefix("module.")
        if short in state:
            raise UserError(f"{source} has both {short!r} and 'module.{short}'; keep one of them")
        # In some published files counters are parameters.
        state[short] = value.detach() if value.requires_grad else value
    return state


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
    obsolete: tuple[str, ...] = ()  # tables of published files that are not needed

    def summary(self) -> str:
        """One line: how many names of each kind, and the first few of those that were not loaded."""
        kinds = {
            "missing": self.missing,
            "unused": self.unused,
            "of another shape": _both_shapes(self.mismatched),
            "skipped": self.skipped,
            "obsolete": self.obsolete,
        }
        parts = [f"{len(names)} {kind} ({some_names(names)})" for kind, names in kinds.items() if names]
        return ", ".join([f"{len(self.loaded)} loaded", *parts])


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    allow_missing: Callable[[str], bool],
    scope: tuple[str, ...] = (),
    source: str,
) -> LoadReport:
    """Copy `state` into `model` by name, all of it or nothing.

    Every name must be on both sides with the same shape. Exceptions: names that contain an entry of
    `scope` are skipped; names of the model for which `allow_missing(name)`, and batch norms' counters, may be
    absent from the file; one-element tensors match in any rank; entries of published files that a
    module lists in `obsolete` are skipped. Data types and whether an entry is a parameter or a buffer do not matter.
    `source` names the file in messages. Afterwards `weights_loaded()` of every module that has it is called; its
    `ValueError` means that the file is damaged.

    Raises UserError, before anything is copied, when the names or shapes do not fit, when an entry of `scope`
    matches no name, or when nothing at all would be loaded.
    """
    own: dict[str, Tensor] = model.state_dict()
    obsolete = {name for module in model.modules() for name in getattr(module, "obsolete", ())}
    everything = dict.fromkeys((*own, *state))
    for word in scope:
        if not any(word in name for name in everything):
            close = closest(word, {part for name in everything for part in name.split(".")}, cutoff=0.5)
            raise UserError(f"--unresume_scope {word!r}: no name in {source} or the network has it{close}")

    skipped = {name: None for name in everything if any(word in name for word in scope)}
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
        unused=tuple(name for name in extra if name.rpartition(".")[2] not in obsolete),
        mismatched=mismatched,
        skipped=tuple(skipped),
        obsolete=tuple(name for name in extra if name.rpartition(".")[2] in obsolete),
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
        raise UserError(
            f"{source} does not fit the network: {'; '.join(problems)}; a checkpoint of another network? "
            "check --model, --width_alpha, --keyword; "
            "--unresume_scope NAME skips parameters whose name contains NAME"
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


def nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors with a value that is NaN or infinite. Waits for the device."""
    return [name for name, tensor in tensors if not bool(tensor.isfinite().all())]


def _with_shape(names: Iterable[str], tensors: Mapping[str, Tensor]) -> list[str]:
    return [f"{name} {list(tensors[name].shape)}" for name in names]


def _both_shapes(mismatched: Iterable[Mismatch]) -> list[str]:
    return [f"{name}: {list(a)} in the file, {list(b)} in the network" for name, a, b in mismatched]
