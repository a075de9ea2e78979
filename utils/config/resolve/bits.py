"""Options that stand for several others: `--bits` for those of `wt` and `fm`, `--first_last_bit` for both ends'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from utils.config.command_line import Given
from utils.errors import UserError

FULL, TERNARY = "32", "ternary"
MOST_BITS = 16


def spread_bits(given: Given) -> Given:
    """The options with `--bits` spelt out as those of the weights' and the activations' quantizers.

    So is `--first_last_bit`. Each replaces those that stand before it on the command line, mostly a config's; those
    behind it replace what it says.

    Raises:
        UserError: it is no number of bits.
    """
    given = _spread_ends(given)
    text = given["bits"]
    if text is None:
        return given
    parts = _parts(text)
    if len(parts) > 2 or not all(map(_is_width, parts)):
        raise UserError(
            f"--bits {text}: write a number from 1 to {MOST_BITS} or {TERNARY}, or weights/activations like 2/4, where "
            f"{FULL} is full precision"
        )
    order = list(given.explicit)
    later = set(order[order.index("bits") :])
    values: dict[str, Any] = {}
    for tag, word in (("wt", parts[0]), ("fm", parts[-1])):
        if word == FULL:
            continue
        values[f"{tag}_enable"] = True
        if later.isdisjoint({f"{tag}_bit", f"{tag}_level"}):
            values[f"{tag}_bit"] = 2 if word == TERNARY else int(word)
            values |= {f"{tag}_level": 3} if word == TERNARY else {}
    replaced = {f"{tag}_{name}" for tag in ("wt", "fm") for name in ("enable", "bit", "level")} - later
    written = {name: given[name] for name in order if name not in replaced}
    through = {name: "--bits" for name in values.keys() - written.keys()}
    return Given(values | written, given.replaced, given.through | through)


def _spread_ends(given: Given) -> Given:
    """The options with `--first_last_bit` spelt out; what stands behind it replaces what it says."""
    order = list(given.explicit)
    if "first_last_bit" not in order:
        return given
    values = {
        f"{end}_bit": given["first_last_bit"]
        for end in ("first", "last")
        if f"{end}_bit" not in order[order.index("first_last_bit") :]
    }
    written: dict[str, Any] = {}
    for name in order:  # where it stands says whether a later --bits is meant for it, too
        written |= values if name == "first_last_bit" else {} if name in values else {name: given[name]}
    through = dict.fromkeys(values, "--first_last_bit")
    return Given(written, given.replaced, given.through | through)


def fitting_bits(given: Given, fitting: Callable[[str, int], int]) -> str:
    """The value for `--bits` in place of the one that was given, with numbers of levels that are taken.

    Args:
        given: the options, `--bits` among them.
        fitting: the number of levels that a tag takes, closest to a number; 3 or a power of two.
    """
    parts = _parts(given["bits"])
    words: list[str] = []
    for tag, word in (("wt", parts[0]), ("fm", parts[-1])):
        if word != FULL and f"{tag}_bit" in given.through:
            levels = fitting(tag, 3 if word == TERNARY else 2 ** int(word))
            word = TERNARY if levels == 3 else str(levels.bit_length() - 1)
        words.append(word)
    return "/".join(dict.fromkeys(words))


def is_full_precision(given: Given) -> bool:
    """Whether `--bits` asks for full precision."""
    return given["bits"] is not None and set(_parts(given["bits"])) == {FULL}


def behind_bits(option: str, given: Given) -> bool:
    """Whether an option stands behind `--bits` on the command line, not in a config before it."""
    order = list(given.explicit)
    return option in order and "bits" in order and order.index(option) > order.index("bits")


def _parts(text: str) -> list[str]:
    return [part.strip().lower() for part in text.split("/")]


def _is_width(word: str) -> bool:
    return word in (FULL, TERNARY) or (word.isdecimal() and word.isascii() and 1 <= int(word) <= MOST_BITS)
