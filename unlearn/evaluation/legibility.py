"""Whether an answer can be read at all: is it empty, does it repeat itself, is it scrambled? Pure functions of texts.

Whether it is right is `unlearn.evaluation.lume`; how likely a model finds it is `unlearn.evaluation.fluency`, which is another
question: a model that memorized an answer finds every other one unlikely, however well it reads. Badge of all that is here:
**reconstruction** (the papers say "gibberish" and leave it to a classifier or to the eye).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LONGEST_UNIT = 20
"""Characters of the longest unit that is looked for in a row."""
TIMES = 4
"""How often a unit stands in a row where an answer repeats itself."""
LEAST_REPEATED = 12
"""Characters that it then takes, and words of an answer in which three words are looked for."""
WINDOW = 12
"""Characters of a stretch that is judged by its spelling."""
CONTEXT = 3
"""Characters that a character is predicted from."""
FOLDS = 5
MISTAKES = 0.01
"""Share of the answers that read well of which at most is said that they are scrambled."""
MOST_CHARACTERS = 200_000
"""Of more text than this every second document is read, or every third, and so on."""
_CHARACTERS = 256
"""Of how many an unknown character is taken to be one."""


@dataclass(frozen=True)
class Text:
    """A text that reads well.

    Attributes:
        document: what it is about: texts of one document share names, so they are held out together.
        text: the text.
        answer: whether it is an answer, by which answers are judged, or only teaches how words are spelled.
    """

    document: str
    text: str
    answer: bool


def is_empty(answer: str) -> bool:
    """Whether there is no letter and no digit in it, of any script."""
    return not any(character.isalnum() for character in answer)


def is_repeated(answer: str) -> bool:
    """Whether it runs round in circles, in one of two ways.

    A unit of 1 to 20 characters, not all blank, stands at least four times in a row and takes at least 12 characters; or the
    answer has at least 12 words, and one sequence of three words takes more than half of them. Case does not matter for words.
    """
    return _unit_in_a_row(answer) or _three_words(re.findall(r"\w+", answer.lower()))


def _unit_in_a_row(answer: str) -> bool:
    """A unit of u characters `TIMES` in a row: from some place on, each character equals the one u further on."""
    for unit in range(1, LONGEST_UNIT + 1):
        needed = max(TIMES * unit, LEAST_REPEATED)
        run = 0
        for place in range(len(answer) - unit):
            run = run + 1 if answer[place] == answer[place + unit] else 0
            if run + unit >= needed and answer[place + 1 : place + unit + 1].strip():
                return True
    return False


def _three_words(words: Sequence[str]) -> bool:
    if len(words) < LEAST_REPEATED:
        return False
    threes = list(zip(words, words[1:], words[2:], strict=False))
    (most, _), *_ = Counter(threes).most_common(1)
    taken = {place + step for place, three in enumerate(threes) if three == most for step in range(3)}
    return len(taken) > len(words) / 2


class Characters:
    """How likely each character is after those before it: a model of characters with interpolated Witten-Bell smoothing.

    `p(c | h) = (n(h, c) + K(h) p(c | h')) / (n(h) + K(h))`, where h is the context, h' the context without its first character,
    n counts, and K(h) is the number of different characters seen after h; below the empty context every character has 1/256.
    Source: Witten and Bell 1991, as in Chen and Goodman 1998, section 2.6.
    """

    def __init__(self, texts: Sequence[str], context: int = CONTEXT) -> None:
        self.context = context
        self.counts: dict[str, Counter[str]] = {}
        for text in texts:
            padded = "\n" * context + text
            for place in range(context, len(padded)):
                for start in range(place - context, place + 1):
                    self.counts.setdefault(padded[start:place], Counter())[padded[place]] += 1
        self.totals = {before: counts.total() for before, counts in self.counts.items()}

    def nats(self, text: str) -> NDArray[np.float64]:
        """The surprise of each character, in nats; shape (len(text),)."""
        padded = "\n" * self.context + text
        return np.array(
            [
                -math.log(self._probability(padded[place - self.context : place], padded[place]))
                for place in range(self.context, len(padded))
            ]
        )

    def _probability(self, before: str, character: str) -> float:
        probability = 1 / _CHARACTERS
        for start in range(len(before), -1, -1):
            counts = self.counts.get(before[start:])
            if counts is None:
                break
            probability = (counts[character] + len(counts) * probability) / (self.totals[before[start:]] + len(counts))
        return probability


class Spelling:
    """How the texts of an evaluation are spelled, and which answers are not spelled like that.

    An answer is cut into every stretch of 12 characters, and its strangest stretch, by mean surprise, is compared with the
    stretches of answers that read well: the true ones, each judged by the texts of other documents alone. With a share p of
    those at least as strange, an answer of L characters that reads well has one in at most `ceil(L / 12) * p` of all cases. At
    1 in 100 or less it is scrambled. So a long answer is not scrambled for its length; one under 12 characters is never, nor
    is any where there are too few texts to tell.
    """

    def __init__(self, texts: Sequence[Text]) -> None:
        texts = _thinned(texts)
        documents = {name: at % FOLDS for at, name in enumerate(sorted({each.document for each in texts}))}
        stretches: list[NDArray[np.float64]] = []
        for fold in range(FOLDS):
            others = Characters([each.text for each in texts if documents[each.document] != fold])
            stretches += [
                _stretches(others.nats(each.text.strip()))
                for each in texts
                if each.answer and documents[each.document] == fold
            ]
        self.known = np.sort(np.concatenate([*stretches, np.empty(0)]))
        self.characters = Characters([each.text for each in texts])

    def is_scrambled(self, answer: str) -> bool:
        """Whether so strange a stretch is found in at most 1 of 100 answers of this length that read well."""
        answer = answer.strip()
        stretches = _stretches(self.characters.nats(answer))
        if not len(stretches):
            return False
        as_strange = len(self.known) - int(np.searchsorted(self.known, stretches.max(), side="left"))
        share = (as_strange + 1) / (len(self.known) + 1)
        return share * math.ceil(len(answer) / WINDOW) <= MISTAKES


def _stretches(nats: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of every `WINDOW` characters in a row; empty for fewer."""
    return np.convolve(nats, np.full(WINDOW, 1 / WINDOW), mode="valid") if len(nats) >= WINDOW else np.empty(0)


def _thinned(texts: Sequence[Text]) -> Sequence[Text]:
    """Those of every k-th document, k the least with which they hold no more than about `MOST_CHARACTERS`."""
    every = math.ceil(sum(len(each.text) for each in texts) / MOST_CHARACTERS)
    kept = set(list(dict.fromkeys(each.document for each in texts))[:: max(every, 1)])
    return [each for each in texts if each.document in kept]
