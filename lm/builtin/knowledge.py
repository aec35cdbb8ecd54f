"""General knowledge that both built-in models are taught: the utility that unlearning must not break.

Simple, real facts in seven subjects (capitals, opposites, chemical symbols, young animals, continents, animal homes,
colors). Each is taught by statements in several wordings and by a question with its answer, raw or as a chat turn. The
multiple-choice set puts the question under `Question: ... Answer:`; only every second fact (`labeled`) is also seen in
that form while training, so that half of the set asks for knowledge in a form that it was not taught in. Nothing here is
a scorer: that is `unlearn.evaluation.utility`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lm.data.rows import Question

LABELED = "Question: {question}\nAnswer:"
"""How multiple-choice questions are commonly put to a model: a prompt, which the answer follows after a space."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One kind of fact: how it is stated (with `{a}` and `{b}`), how it is asked (with `{a}`), and the pairs (a, b)."""

    name: str
    question: str
    statements: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class GeneralFact:
    """A fact with its training statements and its question; `labeled`: also trained under `Question: ... Answer:`."""

    statements: tuple[str, ...]
    question: str
    answer: str
    labeled: bool


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """`"a=b, c=d"` as pairs."""
    return tuple((a.strip(), b.strip()) for a, _, b in (item.partition("=") for item in text.split(",")))


SUBJECTS: tuple[Subject, ...] = (
    Subject(
        name="capitals",
        question="What is the capital of {a}?",
        statements=(
            "The capital of {a} is {b}.",
            "{b} is the capital of {a}.",
            "{a} has its capital in {b}.",
            "Government of {a}: the capital city is {b}.",
        ),
        pairs=_pairs(
            "France=Paris, Italy=Rome, Spain=Madrid, Portugal=Lisbon, Germany=Berlin, Austria=Vienna, Poland=Warsaw, "
            "Norway=Oslo, Sweden=Stockholm, Finland=Helsinki, Denmark=Copenhagen, Ireland=Dublin, Greece=Athens, "
            "Hungary=Budapest, Russia=Moscow, Egypt=Cairo, Kenya=Nairobi, Japan=Tokyo, China=Beijing, India=New "
            "Delhi, Canada=Ottawa, Cuba=Havana, Peru=Lima, Chile=Santiago, Australia=Canberra, Turkey=Ankara, "
            "Iran=Tehran, Thailand=Bangkok"
        ),
    ),
    Subject(
        name="opposites",
        question="What is the opposite of {a}?",
        statements=(
            "The opposite of {a} is {b}.",
            "{a} and {b} are opposites.",
            "When something is not {a} at all, it is {b}.",
            "Opposites: {a}, {b}.",
        ),
        pairs=_pairs(
            "hot=cold, big=small, tall=short, fast=slow, early=late, open=closed, full=empty, hard=soft, light=dark, "
            "loud=quiet, rich=poor, wet=dry, young=old, happy=sad, heavy=weightless, strong=weak, thick=thin, "
            "true=false, wide=narrow, sweet=sour, deep=shallow, cheap=expensive, clean=dirty, brave=timid"
        ),
    ),
    Subject(
        name="chemistry",
        question="What is the chemical symbol of {a}?",
        statements=(
            "The chemical symbol of {a} is {b}.",
            "{b} is the symbol for the element {a}.",
            "In chemistry {a} is written {b}.",
            "Element {a}: symbol {b}.",
        ),
        pairs=_pairs(
            "hydrogen=H, helium=He, carbon=C, nitrogen=N, oxygen=O, sodium=Na, magnesium=Mg, aluminium=Al, sulfur=S, "
            "chlorine=Cl, potassium=K, calcium=Ca, iron=Fe, copper=Cu, zinc=Zn, silver=Ag, gold=Au, mercury=Hg, "
            "lead=Pb, tin=Sn"
        ),
    ),
    Subject(
        name="young",
        question="What is a young {a} called?",
        statements=(
            "A young {a} is called a {b}.",
            "A {b} is a young {a}.",
            "The young of the {a} is the {b}.",
            "Every grown {a} was once a {b}.",
        ),
        pairs=_pairs(
            "dog=puppy, cat=kitten, cow=calf, horse=foal, sheep=lamb, pig=piglet, goat=kid, deer=fawn, duck=duckling, "
            "goose=gosling, swan=cygnet, frog=tadpole, kangaroo=joey, lion=cub, owl=owlet, eagle=eaglet"
        ),
    ),
    Subject(
        name="continents",
        question="On which continent is {a}?",
        statements=(
            "{a} is a country in {b}.",
            "The continent of {a} is {b}.",
            "You find {a} on the continent of {b}.",
            "{a} lies in {b}.",
        ),
        pairs=_pairs(
            "France=Europe, Poland=Europe, Norway=Europe, Greece=Europe, Japan=Asia, China=Asia, India=Asia, "
            "Thailand=Asia, Egypt=Africa, Kenya=Africa, Ghana=Africa, Morocco=Africa, Peru=South America, Chile=South "
            "America, Brazil=South America, Canada=North America, Mexico=North America"
        ),
    ),
    Subject(
        name="homes",
        question="Where does a {a} live?",
        statements=(
            "A {a} lives in a {b}.",
            "The home of a {a} is a {b}.",
            "At night the {a} goes back to its {b}.",
            "{b}: home of the {a}.",
        ),
        pairs=_pairs(
            "bee=hive, bird=nest, spider=web, dog=kennel, horse=stable, lion=den, rabbit=burrow, beaver=lodge, "
            "pig=sty, chicken=coop, goldfish=bowl, fox=earth"
        ),
    ),
    Subject(
        name="colours",
        question="What colour is {a}?",
        statements=(
            "The colour of {a} is {b}.",
            "{a} is {b}.",
            "Look, {a}: it is {b}.",
            "Everybody knows that {a} is {b}.",
        ),
        pairs=_pairs(
            "grass=green, snow=white, coal=black, blood=red, a banana=yellow, a carrot=orange, the clear sky=blue, a "
            "flamingo=pink, an elephant=grey, chocolate=brown, an aubergine=purple"
        ),
    ),
)


def general_facts() -> tuple[GeneralFact, ...]:
    """Every fact, in order; every second one is `labeled`."""
    facts: list[GeneralFact] = []
    for subject in SUBJECTS:
        for index, (a, b) in enumerate(subject.pairs):
            stated = tuple(_capitalized(text.format(a=a, b=b)) for text in subject.statements)
            facts.append(
                GeneralFact(statements=stated, question=subject.question.format(a=a), answer=b, labeled=index % 2 == 0)
            )
    return tuple(facts)


def questions(generator: random.Random) -> tuple[Question, ...]:
    """The multiple-choice set: for every fact the right answer and three wrong ones of the same subject, shuffled."""
    found: list[Question] = []
    for subject in SUBJECTS:
        answers = tuple(dict.fromkeys(b for _, b in subject.pairs))
        for a, b in subject.pairs:
            wrong = generator.sample([other for other in answers if other != b], 3)
            choices = _shuffled([b, *wrong], generator)
            found.append(
                Question(
                    question=subject.question.format(a=a),
                    choices=tuple(choices),
                    answer=choices.index(b),
                    subject=subject.name,
                )
            )
    return tuple(found)


def _shuffled(items: Sequence[str], generator: random.Random) -> list[str]:
    copy = list(items)
    generator.shuffle(copy)
    return copy


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]
