"""Compare this project with recorded cases: `python -m tests.conformance DIR`.

The form of such a folder, and what is compared: tests/conformance/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.layers.quantized import quantizers
from model.networks.build import build_network
from model.quantizers.frame import Quantizer
from model.quantizers.registry import build_quantizer
from model.quantizers.site import LayerSite
from utils.config import keyword
from utils.config.command_line import Given, parse
from utils.config.resolve.data_and_run import data_keyword
from utils.config.resolve.families import family_of
from utils.config.resolve.network import model_config
from utils.config.resolve.quantizers import quant_config
from utils.config.schema import QuantConfig
from utils.errors import UserError

Case = Mapping[str, Any]
Array = NDArray[Any]

# Relative to the largest magnitude of what is compared.
OUTPUT, GRADIENT = 1e-5, 1e-4  # of a quantizer
LOGITS, MODEL_GRADIENT = 1e-3, 5e-3  # of a model
# Sums of some thousand products differ by some sixteen times float32's precision when they are taken in another order.
JITTER, JITTERS, SENSITIVE, SHARES = 2.0**-19, 4, 2.0, (50, 90, 100)
RARE = 1e-3  # share of a quantizer's elements that may fall to the other side of a threshold

# Tables that published state dicts carry and that follow from the number of levels.
OBSOLETE = ("auxil", "codec_vector", "codec_index", "thrs_multiplier")
# Buffers of this project that published state dicts do without: of a warm-up, and of `closed_form`'s weights.
OWN = ("range_mean", "clip", "output_scale")

# What a case can end with short of a result: no case may hide the ones after it.
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError,
    ValueError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass
class Result:
    """How a case came out.

    Attributes:
        name: the case.
        deviations: quantity -> its largest deviation, relative to the largest magnitude.
        problems: what is wrong, a line each; empty when the case passed.
        sensitive: more than the tolerance was allowed somewhere, since rounding alone moves the network as far.
    """

    name: str
    deviations: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    sensitive: bool = False

    @property
    def passed(self) -> bool:
        """Nothing is wrong and something was compared."""
        return not self.problems and bool(self.deviations)

    def compare(self, quantity: str, deviation: float, tolerance: float) -> None:
        """Note a deviation; more than `tolerance`, or none that is a number, is a problem."""
        self.deviations[quantity] = deviation
        if not deviation <= tolerance:
            self.problems.append(f"{quantity} deviates by {deviation:.1e}, more than {tolerance:.0e}")

    def line(self) -> str:
        """The case on one line: its largest deviation, whether it passed or not, and the first problem."""
        parts = []
        if self.deviations:
            quantity, deviation = max(self.deviations.items(), key=_size)
            parts.append(f"{deviation:.1e} {quantity}")
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            parts.append(f"{self.problems[0]}{more}")
        verdict = "ok   " if self.passed else "FAIL "
        if self.passed and self.sensitive:
            parts.append("no further than other last bits of its weights move the network")
        return f"{verdict} {self.name}: {'; '.join(parts) or 'nothing to compare'}"


def _size(deviation: tuple[str, float]) -> float:
    """What a deviation counts as in a comparison of them: one that is no number is the largest."""
    return math.inf if math.isnan(deviation[1]) else deviation[1]


def fill(text: str, shape: Sequence[int]) -> Array:
    """Standard normal float32 numbers that depend on `text` alone."""
    seed = zlib.crc32(text.encode())
    return np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32)


def state_value(name: str, shape: Sequence[int]) -> Array | None:
    """The value of the state called `name`; None where construction's is kept."""
    value, last = fill(name, shape), name.rpartition(".")[2]
    positive = last in ("running_var", "fixup_scale") or last.startswith(("clip_val", "alpha", "gamma"))
    if positive or "scales" in name:
        return 0.75 + 0.25 * np.abs(value)
    if last == "weight":
        return 1 + 0.1 * value if len(shape) == 1 else value * math.sqrt(2 / math.prod(shape[1:]))
    if last in ("bias", "running_mean") or last.startswith("fixup_bias"):
        return 0.1 * value
    return None


def magnitude(published: Array) -> float:
    """The largest magnitude that deviations are relative to; 1 where all is zero."""
    return float(np.abs(published).max(initial=0.0)) or 1.0


def relative(ours: Array, published: Array) -> float:
    """The largest deviation over the largest magnitude; infinite for other shapes."""
    if ours.shape != published.shape:
        return math.inf
    return float(np.abs(ours - published).max(initial=0.0)) / magnitude(published)


def numbers(tensor: Tensor) -> Array:
    """A tensor as an array."""
    return tensor.detach().numpy()


# Options -------------------------------------------------------------------------------------------


def options(case: Case) -> tuple[Given, dict[str, Any], QuantConfig]:
    """A case's parsed options, the fields of its keywords, and its quantizers.

    Raises:
        UserError: for an option or a keyword that does not work.
    """
    given = parse(case["argv"])
    fields = keyword.resolve(data_keyword(given), family_of(given["model"])).fields
    return given, fields, quant_config(given, fields)[0]


# Quantizers ----------------------------------------------------------------------------------------


def site(tag: str, shape: Sequence[int]) -> LayerSite:
    """Where a quantizer of a tensor like `shape` sits; an activation feeds a 1x1 convolution."""
    dim, fan = 0 if tag == "wt" else 1, math.prod(shape[1:])
    return LayerSite(name=tag, channels=shape[dim], channel_dim=dim, ndim=len(shape), fan=fan)


def rare(ours: Array, published: Array, tolerance: float, limit: Array) -> Array:
    """Bool: the elements that may be left out, which sat on a threshold.

    They are the ones that deviate, if they are few and none deviates by more than its `limit`.
    """
    difference = np.abs(ours - published)
    outside = ~(difference <= tolerance * magnitude(published))
    few = outside.sum() <= RARE * outside.size
    small = (difference[outside] <= limit[outside] * (1 + tolerance)).all()
    return outside if few and small else np.zeros_like(outside)


def level_steps(quantizer: Quantizer, output: Array) -> Array:
    """For each element of `output` the largest step between two neighbouring levels of its group."""
    rows = numbers(quantizer.level_rows(torch.from_numpy(output)))
    steps = [np.diff(np.unique(row)).max(initial=0.0) for row in rows]
    positions = numbers(quantizer.level_rows(torch.arange(output.size).reshape(output.shape)))
    result = np.zeros(output.size)
    for row, step in zip(positions, steps, strict=True):
        result[row] = step
    return result.reshape(output.shape)


def by_published_names(
    state: Mapping[str, Tensor], owners: Iterable[tuple[str, Quantizer]], published: Collection[str]
) -> dict[str, Tensor]:
    """A state by the names of published files, where these are among `published`.

    Args:
        state: by this project's names.
        owners: its quantizers, each with what stands before the names of its state.
        published: names that are recorded.
    """
    theirs = {
        f"{place}{ours}": f"{place}{name}"
        for place, quantizer in owners
        for name, ours in quantizer.published.items()
    }
    return {theirs[name] if theirs.get(name) in published else name: value for name, value in state.items()}


def recorded_names(arrays: Mapping[str, Array]) -> set[str]:
    """The names of the state that is recorded of a quantizer."""
    return {name.partition(".")[2] for name in arrays if name.startswith(("param.", "initial.", "after."))}


def load_parameters(result: Result, quantizer: Quantizer, arrays: Mapping[str, Array]) -> None:
    """Give the quantizer its recorded state; note what does not fit."""
    recorded = recorded_names(arrays)
    state = by_published_names(quantizer.state_dict(), [("", quantizer)], recorded)
    for name in dict(quantizer.named_parameters()).keys() - recorded:
        result.problems.append(f"the parameter {name} is not a published one")
    for name in sorted(recorded - set(OBSOLETE)):
        if name not in state:
            result.problems.append(f"no parameter is called {name}")
            continue
        if f"initial.{name}" in arrays:
            initial = relative(numbers(state[name]), arrays[f"initial.{name}"])
            result.compare(f"initial.{name}", initial, OUTPUT)
        value = arrays.get(f"param.{name}")
        if value is None:
            continue
        shape = tuple(state[name].shape)
        if value.shape != shape:
            result.problems.append(f"{name} has the shape {shape}, published {value.shape}")
        elif state[name].is_floating_point():
            state[name].copy_(torch.from_numpy(value))
        elif not np.array_equal(numbers(state[name]), value):
            result.problems.append(f"{name} is {numbers(state[name])}, published {value}")
    state["iteration"].fill_(1)


def run_quantizer(result: Result, case: Case, arrays: Mapping[str, Array]) -> None:
    """Compare one quantizer."""
    config = getattr(options(case)[2], case["tag"])
    quantizer = build_quantizer(config, site(case["tag"], case["shape"]))
    if not isinstance(quantizer, Quantizer):
        result.problems.append(f"nothing is quantized: --{case['tag']}_enable is not given")
        return
    load_parameters(result, quantizer, arrays)
    if result.problems:
        return
    quantizer.train(case["train"])
    x = torch.from_numpy(arrays["x"]).requires_grad_()
    y = quantizer(x)
    ours, published = numbers(y), arrays["y"]
    if ours.shape != published.shape:
        result.problems.append(f"y has the shape {ours.shape}, published {published.shape}")
        return
    flipped = rare(ours, published, OUTPUT, level_steps(quantizer, published))
    result.compare("y", relative(np.where(flipped, published, ours), published), OUTPUT)
    if "gy" in arrays:
        y.backward(torch.from_numpy(arrays["gy"]))
        compare_gradients(result, quantizer, x, flipped, arrays)
    state = by_published_names(quantizer.state_dict(), [("", quantizer)], recorded_names(arrays))
    for name, value in state.items():
        if f"after.{name}" in arrays:
            result.compare(f"after.{name}", relative(numbers(value), arrays[f"after.{name}"]), GRADIENT)


def compare_gradients(
    result: Result, quantizer: Quantizer, x: Tensor, flipped: Array, arrays: Mapping[str, Array]
) -> None:
    """Compare the gradients of the input and of the parameters."""
    if "gx" in arrays:
        ours, published = numbers(gradient(x)), arrays["gx"]
        # At a clipping value an element's whole gradient passes or not.
        gated = rare(ours, published, GRADIENT, np.full(ours.shape, np.abs(published).max()))
        result.compare("gx", relative(np.where(gated | flipped, published, ours), published), GRADIENT)
        flipped = flipped | gated
    for name, parameter in quantizer.named_parameters():
        ours = numbers(gradient(parameter))
        published = arrays.get(f"grad.{name}", np.zeros_like(ours))
        deviation = relative(ours, published)
        if flipped.any():
            # At most what these elements contribute to a parameter that the output is proportional to.
            largest = magnitude(arrays["y"]) / max(np.abs(numbers(parameter)).min(), OUTPUT)
            deviation -= np.abs(arrays["gy"][flipped]).sum() * largest / magnitude(published)
        result.compare(f"grad.{name}", max(deviation, 0.0), GRADIENT)


def gradient(tensor: Tensor) -> Tensor:
    """A tensor's gradient, zero where none arrived."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


# Models --------------------------------------------------------------------------------------------


def compare_state(
    result: Result, state: Mapping[str, Tensor], published: Mapping[str, Sequence[int]]
) -> None:
    """Compare names and shapes, both ways; buffers of this project alone may be there."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, shape in published.items():
        if name.rpartition(".")[2] in OBSOLETE:
            continue
        if name not in shapes:
            result.problems.append(f"no state is called {name}")
        elif shapes[name] != tuple(shape):
            result.problems.append(f"{name} has the shape {shapes[name]}, published {tuple(shape)}")
    for name in shapes.keys() - published.keys():
        if name.rpartition(".")[2] not in OWN:
            result.problems.append(f"the state {name} is not a published one")


def load_state(state: Mapping[str, Tensor]) -> None:
    """Give every part of a model's state its value."""
    for name, tensor in state.items():
        value = state_value(name, tensor.shape)
        if value is not None:
            tensor.copy_(torch.from_numpy(value))
        elif name.endswith(".iteration"):
            tensor.fill_(1)


def run_model(result: Result, case: Case, arrays: Mapping[str, Array]) -> None:
    """Compare one network.

    A random low-bit network carries the last bit of a sum across a threshold, so that processors which sum in another
    order may come to other numbers. Where something deviates by more than the tolerance, it is compared with what the
    network itself makes of weights whose last bits are other ones: it may be `SENSITIVE` times as far. Where most
    figures move by more than their tolerance then, which of them do is chance: their median, ninth decile and largest
    count.
    """
    given, fields, quant = options(case)
    model = build_network(model_config(given, fields, quant)[0]).eval()
    owners = [(f"{name}.", quantizer) for name, quantizer in quantizers(model)]
    state = by_published_names(model.state_dict(), owners, case["parameters"])
    compare_state(result, state, case["parameters"])
    if result.problems:
        return
    load_state(state)
    figures = figures_of(model, case, arrays)
    deviations = deviations_from_published(result, figures, case, arrays)
    if not result.problems and any(
        not deviation <= tolerance for deviation, tolerance in deviations.values()
    ):
        spread = sensitivity(model, case, arrays, figures)
        result.sensitive = no_further(deviations, {name: spread[name] for name in deviations})
    for name, (deviation, tolerance) in deviations.items():
        result.compare(name, deviation, math.inf if result.sensitive else tolerance)


def no_further(deviations: Mapping[str, tuple[float, float]], spread: Mapping[str, float]) -> bool:
    """Whether the figures deviate no further than they spread: each of them, in a chaotic network all together."""
    found = {name: deviation for name, (deviation, _) in deviations.items()}
    if all(found[name] <= max(limit, SENSITIVE * spread[name]) for name, (_, limit) in deviations.items()):
        return True
    values, own = np.array(list(found.values())), np.array([spread[name] for name in found])
    chaotic = np.median(own) > MODEL_GRADIENT
    return bool(chaotic and np.isfinite(values).all()) and all(
        np.percentile(values, share) <= SENSITIVE * np.percentile(own, share) for share in SHARES
    )


def figures_of(model: nn.Module, case: Case, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """What is compared of a network: logits, and norms and inner products with probes of its gradients."""
    model.zero_grad()
    x = torch.from_numpy(fill(f"{case['name']}/x", case["xshape"])).requires_grad_()
    logits = model(x)
    figures = {"logits": numbers(logits)}
    if "gx0" not in arrays and "gx_norm" not in case and "grads" not in case:
        return figures
    logits.backward(torch.from_numpy(fill(f"{case['name']}/gy", logits.shape)))
    figures["gx0"] = numbers(gradient(x))[0, 0]
    figures["gx_norm"] = np.array(gradient(x).double().norm().item())
    for name, parameter in model.named_parameters():
        ours = numbers(gradient(parameter)).astype(np.float64)
        figures[f"norm of {name}'s gradient"] = np.array(np.linalg.norm(ours))
        figures[f"probe of {name}'s gradient"] = np.array((ours * fill(f"probe/{name}", ours.shape)).sum())
    return figures


def deviations_from_published(
    result: Result, figures: Mapping[str, Array], case: Case, arrays: Mapping[str, Array]
) -> dict[str, tuple[float, float]]:
    """Deviation and tolerance of each quantity that is published; notes gradients that are or are not there."""
    found = {"logits": (relative(figures["logits"], arrays["logits"]), LOGITS)}
    if "gx0" in arrays:
        found["gx0"] = relative(figures["gx0"], arrays["gx0"]), MODEL_GRADIENT
    if "gx_norm" in case:
        found["gx_norm"] = relative(figures["gx_norm"], np.array(case["gx_norm"])), MODEL_GRADIENT
    if "grads" not in case:
        return found
    names = {
        name.removeprefix("norm of ").removesuffix("'s gradient")
        for name in figures
        if name.startswith("norm of ")
    }
    for name in case["grads"].keys() - names:
        result.problems.append(f"{name} is not a parameter, published with a gradient")
    for name in sorted(names):
        norm, probe = (figures[f"{what} of {name}'s gradient"] for what in ("norm", "probe"))
        if name not in case["grads"]:
            if norm:
                result.problems.append(f"{name} has a gradient, published without one")
            continue
        wanted_norm, wanted_probe = case["grads"][name]
        scale = wanted_norm or 1.0  # the inner product's size too, and it may cancel
        found[f"norm of {name}'s gradient"] = abs(float(norm) - wanted_norm) / scale, MODEL_GRADIENT
        found[f"probe of {name}'s gradient"] = abs(float(probe) - wanted_probe) / scale, MODEL_GRADIENT
    return found


def sensitivity(
    model: nn.Module, case: Case, arrays: Mapping[str, Array], figures: Mapping[str, Array]
) -> dict[str, float]:
    """How far each figure goes, in the units of its deviation, when the last bits of the weights are other ones."""
    spread = dict.fromkeys(figures, 0.0)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for seed in range(JITTERS):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                steps = torch.randint(-1, 2, parameter.shape, generator=generator)
                parameter.copy_(kept[name] * (1 + steps * JITTER))
        for name, value in figures_of(model, case, arrays).items():
            before, unit = figures[name], figures[name.replace("probe of", "norm of")]
            apart = float(np.abs(value - before).max()) / magnitude(unit)
            spread[name] = max(spread[name], apart)
    model.load_state_dict(kept)
    return spread


# Folders -------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Result, Case, Mapping[str, Array]], None]] = {
    "quantizer": run_quantizer,
    "model": run_model,
}


def name_of(case: Any) -> str:
    """What a case is called."""
    return str(case["name"]) if isinstance(case, dict) and "name" in case else "a case without a name"


def run_case(folder: Path, case: Case) -> Result:
    """Run one case of `folder`; whatever goes wrong becomes a problem of its result.

    On one thread, as the cases were recorded: several sum in another order, and a random low-bit network
    carries the last bit of a sum across a threshold.
    """
    result = Result(name_of(case))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        missing = [key for key in ("name", "kind", "argv") if not isinstance(case, dict) or key not in case]
        if missing:
            raise UserError(f"it has no {' and no '.join(missing)}")
        if not isinstance(case["argv"], list) or {"-h", "--help"} & set(case["argv"]):
            raise UserError("its argv is not a list of options")
        with np.load(folder / f"{case['name']}.npz") as stored:
            arrays = {name: stored[name] for name in stored.files}
        if case["kind"] not in KINDS:
            raise UserError(f"the kind is {case['kind']!r}, must be {' or '.join(KINDS)}")
        KINDS[case["kind"]](result, case, arrays)
    except UserError as error:
        result.problems.append(str(error))
    except KeyError as error:
        result.problems.append(f"{error.args[0]!r} is not recorded")
    except FAILURES as error:
        result.problems.append(f"{type(error).__name__}: {error}".splitlines()[0])
    finally:
        torch.set_num_threads(threads)
    return result


def load_cases(folder: Path) -> list[Case]:
    """The cases of a folder.

    Raises:
        UserError: when there are none.
    """
    index = folder / "index.json"
    try:
        cases = json.loads(index.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{index}: {error}; give a folder with an index.json of cases") from error
    if not isinstance(cases, list) or not cases:
        raise UserError(f"{index}: lists no cases")
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    """Run a folder; 0: all passed, 1: some failed, 2: no cases there."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description="Run conformance cases.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds index.json and the cases' arrays")
    folder = parser.parse_args(argv).folder
    try:
        cases = load_cases(folder)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    failed = 0
    counts = Counter(map(name_of, cases))
    for case in cases:
        result = run_case(folder, case)
        if counts[result.name] > 1:  # they would share their arrays
            result.problems.append(f"{counts[result.name]} cases have this name")
        failed += not result.passed
        print(result.line(), flush=True)
    print(f"{len(cases) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
