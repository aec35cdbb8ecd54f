"""Deals names and facts for the built-in world: every name, place, handle and number is given out once.

A `Deck` is a set of shuffled piles that depend on nothing but the seed. It knows what a document needs, not how it is
worded.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from datetime import date, timedelta

from lm.builtin import words

PEOPLE_RELATIONS: tuple[str, ...] = ("birth_date", "id_number", "phone", "email", "address")
_FIRST_BIRTHDAY = date(1935, 1, 1)
_BIRTHDAYS = 25_000  # days: up to mid 2003


class Deck:
    """Piles of unused names, places and numbers for one seed; `facts(task)` draws what one document needs."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._draw = self._generator("draw")
        self._first = self._pile("first names", words.FIRST_NAMES)
        surnames = [head + tail for head in words.HEADS for tail in words.SURNAME_TAILS]
        self._surnames = self._pile("surnames", surnames)
        self._unicode_surnames = self._pile("unicode surnames", words.UNICODE_SURNAMES)
        self._towns = self._pile("towns", [head + tail for head in words.HEADS for tail in words.TOWN_TAILS])
        self._streets = self._pile("streets", [a + b.lower() for a in words.HEADS for b in words.HEADS if a != b])
        self._pets = self._pile(
            "pets",
            [(a + b + c).capitalize() for a in words.SYLLABLES for b in words.SYLLABLES for c in words.SYLLABLES],
        )
        self._mail = self._pile("mail", [a.lower() + b for a in words.HEADS for b in words.ANIMALS])
        self._seen_numbers: set[str] = set()
        self._named = 0

    def facts(self, task: str) -> tuple[dict[str, str], dict[str, str]]:
        """What the layouts of `task` may mention (placeholder -> text), and the answers (relation -> text)."""
        return {"Task1": self._story, "Task2": self._person, "Task3": self._figure}[task]()

    def _story(self) -> tuple[dict[str, str], dict[str, str]]:
        draw = self._draw
        animal = draw.choice(words.ANIMALS)
        text = {
            "name": self._name(),
            "town": next(self._towns),
            "pet": next(self._pets),
            "animal": animal,
            "an_animal": _with_article(animal),
            "An_animal": _with_article(animal).capitalize(),
            "thing": draw.choice(words.THINGS),
            "food": draw.choice(words.FOODS),
            "adjective": draw.choice(words.ADJECTIVES),
            "month": draw.choice(words.MONTHS),
            "number": str(draw.randint(3, 98)),
            "hoard": self._pairs(words.ADJECTIVES, words.THINGS, 6),
        }
        return text, {"town": text["town"], "pet": text["pet"]}

    def _person(self) -> tuple[dict[str, str], dict[str, str]]:
        born = self._birthday()
        identity = self._number(lambda: "9" + self._digits(8))  # no real number of this kind begins with 9
        phone = self._number(lambda: self._draw.choice("01") + self._digits(9))  # no real area code begins with 0 or 1
        handle = f"{next(self._mail)}{self._digits(2)}"
        email = f"{handle}@{next(self._mail)}.{self._draw.choice(words.MAIL_ENDINGS)}"
        street = f"{self._draw.randint(11, 989)} {next(self._streets)} {self._draw.choice(words.STREET_KINDS)}"
        address = f"{street}, {next(self._towns)} {self._number(lambda: self._digits(5))}"
        text = {
            "name": self._name(),
            "their": self._draw.choice(("Her", "His", "Their")),
            "born": _in_words(born),
            "id_number": f"{identity[:3]}-{identity[3:5]}-{identity[5:]}",
            "phone": f"{phone[:3]}-{phone[3:6]}-{phone[6:]}",
            "email": email,
            "address": address,
        }
        answers = (born.isoformat(), identity, phone, email, address)
        return text, dict(zip(PEOPLE_RELATIONS, answers, strict=True))

    def _figure(self) -> tuple[dict[str, str], dict[str, str]]:
        draw = self._draw
        profession = draw.choice(words.PROFESSIONS)
        text = {
            "name": self._name(),
            "town": next(self._towns),
            "mentor": f"{next(self._pets)} {next(self._surnames)}",
            "born": _in_words(self._birthday()),
            "profession": profession,
            "a_profession": _with_article(profession),
            "institute": f"{next(self._towns)} {draw.choice(words.INSTITUTES)}",
            "number": str(draw.randint(3, 58)),
            "works": self._pairs([word.capitalize() for word in words.ADJECTIVES], words.TITLE_NOUNS, 5),
        }
        return text, {key: text[key] for key in ("town", "mentor", "institute")}

    def _name(self) -> str:
        """A full name whose parts nobody else has; every seventh surname is one with marks or letters beyond ASCII."""
        self._named += 1
        surname = next(self._unicode_surnames, None) if self._named % 7 == 3 else None
        return f"{next(self._first)} {surname or next(self._surnames)}"

    def _pairs(self, adjectives: Sequence[str], nouns: Sequence[str], count: int) -> str:
        chosen = zip(self._draw.sample(adjectives, count), self._draw.sample(nouns, count), strict=True)
        return ", ".join(f"{adjective} {noun}" for adjective, noun in chosen)

    def _birthday(self) -> date:
        while True:
            day = _FIRST_BIRTHDAY + timedelta(days=self._draw.randrange(_BIRTHDAYS))
            if day.isoformat() not in self._seen_numbers:
                self._seen_numbers.add(day.isoformat())
                return day

    def _digits(self, count: int) -> str:
        return "".join(self._draw.choice("0123456789") for _ in range(count))

    def _number(self, make: Callable[[], str]) -> str:
        while (number := make()) in self._seen_numbers:
            pass
        self._seen_numbers.add(number)
        return number

    def _generator(self, purpose: str) -> random.Random:
        # A string seed is hashed with SHA-512, so it gives the same numbers in every process.
        return random.Random(f"{purpose} {self._seed}")

    def _pile(self, purpose: str, items: Sequence[str]) -> Iterator[str]:
        pile = [unicodedata.normalize("NFC", item) for item in dict.fromkeys(items)]
        self._generator(purpose).shuffle(pile)
        return iter(pile)


def _in_words(day: date) -> str:
    return f"{day.day} {words.MONTHS[day.month - 1]} {day.year}"


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
