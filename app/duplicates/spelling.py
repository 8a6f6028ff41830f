"""Two spellings of one name: what tells them apart, and how much of them is the same."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from rapidfuzz.distance import OSA

# Zero width, soft hyphen, marks of direction.
INVISIBLE = "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
APOSTROPHES = re.compile("['`\u00b4\u2018\u2019\u02bc]")
NO_WORD = re.compile(rf"[^\w\s{INVISIBLE}]|_")
GAPS = re.compile(r"[\s,]+")
COMBINING = re.compile(
    r"[\u0300-\u036f]"
)  # of Latin, Greek and Cyrillic; elsewhere they are letters
NO_INVISIBLE = dict.fromkeys(map(ord, INVISIBLE))
# Letters that Unicode does not take apart.
PLAIN = str.maketrans(
    {"ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D", "ð": "d", "Ð": "D"}
    | {"æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "þ": "th", "Þ": "Th", "\u0131": "i"}
)

WORD_ORDER = "word order"
SPELLING = "spelling"


def _unicode_form(text: str) -> str:
    return unicodedata.normalize("NFKC", text).translate(NO_INVISIBLE)


def _accents(text: str) -> str:
    bare = COMBINING.sub("", unicodedata.normalize("NFD", text))
    return unicodedata.normalize("NFC", bare).translate(PLAIN)


def _punctuation(text: str) -> str:
    return NO_WORD.sub(_blank, APOSTROPHES.sub("", text))


def _blank(found: re.Match[str]) -> str:
    """Return a blank; but a mark belongs to its letter, such as the vowel signs of Hindi."""
    return found[0] if unicodedata.category(found[0]).startswith("M") else " "


def _word_order(text: str) -> str:
    return " ".join(sorted(GAPS.split(text)))


def _white_space(text: str) -> str:
    return "".join(text.split())


FOLDS: dict[str, Callable[[str], str]] = {
    "Unicode form": _unicode_form,
    "case": str.casefold,
    "accents": _accents,
    "punctuation": _punctuation,
    WORD_ORDER: _word_order,
    "white space": _white_space,
}


def words(text: str) -> list[str]:
    """Return the words of a text, however they are written; a hyphen parts two, no apostrophe."""
    text = text.casefold() if text.isascii() else _accents(_unicode_form(text).casefold())
    return _punctuation(text).split()


def differences(one: str, other: str) -> tuple[str, ...]:
    """Return in what two texts differ: each fold without which they are further apart."""
    nearest = _distance(one, other)
    formal = [name for name in FOLDS if _distance(one, other, without=name) > nearest]
    return (*formal, SPELLING) if nearest else tuple(formal)


def _distance(one: str, other: str, without: str = "") -> int:
    """Return how many characters to change, in the order of words in which they are fewest."""
    left_out = {(without, WORD_ORDER), (without,)}
    return min(OSA.distance(_folded(one, names), _folded(other, names)) for names in left_out)


def _folded(text: str, without: tuple[str, ...]) -> str:
    for name, fold in FOLDS.items():
        if name not in without:
            text = fold(text)
    return text
