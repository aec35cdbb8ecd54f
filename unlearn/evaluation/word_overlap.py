"""ROUGE-L recall: what share of a text's words another says, in order. The official words, or those of every script.

The official scorer (rouge-score, as the SemEval-2025 Task 4 script calls it) reads `a` to `z` and digits and nothing else:
to it a Russian, Chinese, Arabic or Thai text has no word, and a verbatim copy scores 0. `every_script` is a named variant
for such texts. Which of the two is used is the caller's to say; nothing here chooses.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

from lm.errors import UserError

Words = Literal["official", "every_script"]
_LATIN = re.compile(r"[a-z0-9]+")
_UNSPACED = ("CJK ", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""Beginnings of the names of characters in whose scripts no spaces stand between words."""


def rouge_l_recall(expected: str, answer: str, words: Words = "official") -> float:
    """Length of the longest common subsequence of words, over the words of `expected`; 0 if it has none.

    Extra words in `answer` cost nothing: it is recall alone.

    Args:
        words: official: runs of a-z and 0-9, stemmed (badge: **faithful**). every_script: see `words_of` (**variant**).
    """
    return float(_scorer(words).score(expected, answer)["rougeL"].recall)


def has_words(text: str) -> bool:
    """Whether the official scorer finds a word in the text."""
    return _LATIN.search(text.lower()) is not None


def words_of(text: str) -> list[str]:
    """The words of a text in any script: runs of letters with their marks and of digits, without regard to case.

    Of scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) each character with its
    marks is a word, as is usual where nothing segments them. Words of a-z are stemmed as the official scorer's are, so that
    plain English has the very same words.
    """
    words: list[str] = []
    inside = False
    for character in unicodedata.normalize("NFKC", text).casefold():
        kind = unicodedata.category(character)[0]
        if kind not in "LMN":
            inside = False
        elif kind == "M" and words and inside:
            words[-1] += character
        elif kind == "M":
            continue  # a mark on nothing
        elif _unspaced(character) or not inside or _unspaced(words[-1][0]):
            words.append(character)
            inside = True
        else:
            words[-1] += character
    official = _official()
    return [official.tokenize(word)[0] if _LATIN.fullmatch(word) else word for word in words]


@cache
def _unspaced(character: str) -> bool:
    return unicodedata.name(character, "").startswith(_UNSPACED)


class _EveryScript:
    """`words_of` as rouge-score asks a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words_of(text)


@cache
def _official() -> Any:
    with _importing():
        from rouge_score.tokenizers import DefaultTokenizer
    return DefaultTokenizer(use_stemmer=True)


@cache
def _scorer(words: Words) -> Any:
    with _importing():
        from rouge_score.rouge_scorer import RougeScorer  # slow to import, and only scoring needs it
    if words == "every_script":
        return RougeScorer(["rougeL"], tokenizer=_EveryScript())
    return RougeScorer(["rougeL"], use_stemmer=True)


@contextmanager
def _importing() -> Iterator[None]:
    try:
        yield
    except ImportError as problem:
        raise UserError(
            f"rouge-score, which compares words, cannot be imported ({problem}): pip install 'palimpsest-unlearning[eval]'"
        ) from None
