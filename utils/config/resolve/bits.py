"""`--bits`, which says in one word what `--wt_enable`, `--wt_bit`, `--wt_level` and those of `fm` say one by one."""

from __future__ import annotations

from typing import Any

from utils.config.command_line import Given
from utils.errors import UserError

FULL, TERNARY = "32", "ternary"
MOST_BITS = 16


def spread_bits(given: Given) -> Given:
    """The options with `--bits` spelt out as those of the weights' and the activations' quantizers.

    Raises:
        UserError: it is no number of bits, or an option of a quantizer says something else.
    """
    text = given["bits"]
    if text is None:
        return given
    parts = [part.strip() for part in text.split("/")]
    if len(parts) > 2 or not all(map(_is_width, parts)):
        raise UserError(
            f"--bits {text}: write a number from 1 to {MOST_BITS} or {TERNARY}, or weights/activations like 2/4, where "
            f"{FULL} is full precision"
        )
    if set(parts) == {FULL}:
        raise UserError(f"--bits {text}: that is full precision: leave it out")
    words = {"wt": parts[0], "fm": parts[-1]}
    values: dict[str, Any] = {}
    for tag, word in words.items():
        other = _contradiction(given, tag, word)
        if other is not None:
            name, instead = other
            both = {**words, tag: instead}
            proposal = f"write --bits {both['wt']}/{both['fm']}, or " if instead else ""
            value = "" if given[name] is True else f" {given[name]}"
            raise UserError(f"--{name}{value} contradicts --bits {text}: {proposal}leave one of them out")
        if word == FULL:
            continue
        values |= {f"{tag}_enable": True, f"{tag}_bit": 2 if word == TERNARY else int(word)}
        values |= {f"{tag}_level": 3} if word == TERNARY else {}
    written = {name: given[name] for name in given.explicit}
    through = {name: "--bits" for name in values.keys() - given.explicit}
    return Given(written | values, given.replaced, through)


def _is_width(word: str) -> bool:
    return word in (FULL, TERNARY) or (word.isdecimal() and word.isascii() and 1 <= int(word) <= MOST_BITS)


def _contradiction(given: Given, tag: str, word: str) -> tuple[str, str] | None:
    """An option of a tag that says something else than its word of `--bits`.

    Returns:
        The option's name, and the word that says what it says, empty without one; None where all agree.
    """
    enable, bit, level = f"{tag}_enable", f"{tag}_bit", f"{tag}_level"
    if word == FULL:
        return (enable, "") if enable in given.explicit else None
    wanted = 3 if word == TERNARY else 2 ** int(word)
    if level in given.explicit and given[level] != wanted:
        exact = given[level] > 0 and given[level] & (given[level] - 1) == 0
        instead = TERNARY if given[level] == 3 else str(given[level].bit_length() - 1) if exact else ""
        return level, instead
    # A ternary quantizer is written as two bits and three levels.
    if bit in given.explicit and given[bit] != (2 if word == TERNARY else int(word)):
        return bit, str(given[bit]) if _is_width(str(given[bit])) else ""
    return None
