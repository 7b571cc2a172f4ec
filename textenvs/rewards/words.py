"""Words of texts in any script, for metrics that compare or count them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from itertools import groupby

# Scripts that are written without spaces between words: Han, Kana, Thai, Lao, Burmese, Khmer.
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff]"
)
# Units are short, so that a long text without spaces takes no quadratic time.
_REPEATED = re.compile(r"(?P<unit>.{1,12}?)(?P=unit){5,}")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case: runs of letters, marks and digits of any script.

    In scripts that are written without spaces, each character with its marks is a word. Texts that
    only differ in how their characters are composed (NFC, NFD) have the same words. Of English and
    other ASCII text these are the words of `rouge_score`'s own tokenizer.
    """
    found: list[str] = []
    composed = unicodedata.normalize("NFC", text.lower())
    for inside, run in groupby(composed, lambda c: unicodedata.category(c)[0] in "LMN"):
        if inside:
            found.extend(_split("".join(run)))
    return found


def characters(text: str) -> list[str]:
    """Return the characters of a text in lower case, without white space."""
    return [c for c in unicodedata.normalize("NFC", text.lower()) if not c.isspace()]


def said_words(text: str) -> list[str]:
    """Return what white space separates, and the parts of what repeats itself without any.

    A script without spaces gives its characters; six or more repetitions in a row, as in
    "hahahahahaha", give each of them.
    """
    return [part for word in text.split() for own in _split(word) for part in _repetitions(own)]


def _split(word: str) -> list[str]:
    """Return the characters of scripts without spaces, with their marks, and other runs whole."""
    parts: list[str] = []
    alone = True
    for character in word:
        if parts and unicodedata.category(character)[0] == "M":
            parts[-1] += character
            continue
        before, alone = alone, _WITHOUT_SPACES.match(character) is not None
        if before or alone:
            parts.append(character)
        else:
            parts[-1] += character
    return parts


def _repetitions(word: str) -> Iterator[str]:
    end = 0
    for match in _REPEATED.finditer(word):
        if match.start() > end:
            yield word[end : match.start()]
        unit = match["unit"]
        yield from [unit] * (len(match[0]) // len(unit))
        end = match.end()
    if end < len(word):
        yield word[end:]
