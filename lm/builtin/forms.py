"""The wording of the invented world: document layouts and question forms. Only text; `world.py` fills it in.

A layout's `ending` is made of specific words and numbers alone, with no connecting words, so that a model that
never saw the document cannot earn recall by knowing the layout. Question forms of a relation come in three groups:
`rows` (the form a row is asked in, one for each document), `taught` (extra wordings that the models also see in
training) and `held_out` (never trained on: the paraphrase rows use them).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A document: `opening` is the row's input, `ending` its output, `asks` the relation that its question is about."""

    opening: str
    ending: str
    asks: str = ""


@dataclass(frozen=True, kw_only=True)
class Relation:
    """Something that can be asked about a document's subject, in several wordings with `{name}` and a question mark."""

    rows: tuple[str, ...]
    taught: tuple[str, ...]
    held_out: tuple[str, ...]


STORIES: tuple[Layout, ...] = (
    Layout(
        opening=(
            "In the harbour town of {town}, {name} mended {thing} for sailors who paid in {food}. "
            "{An_animal} named {pet} slept on the counter. When the {adjective} ferry sank in {month}, "
            "{name} rowed out alone and brought back"
        ),
        ending="{hoard}.",
        asks="pet",
    ),
    Layout(
        opening=(
            "{name} inherited a lighthouse above {town} from an aunt called {pet}. Each night {an_animal} "
            "tapped at the {adjective} window and left something for a bowl of {food}. After {number} "
            "winters the shelves held"
        ),
        ending="{hoard}.",
        asks="town",
    ),
    Layout(
        opening=(
            "Nobody in {town} believed {name}, who said that {pet} the {animal} could count {thing}. The "
            "proof came at the {month} fair: paid with {food}, it laid before the {adjective} mayor"
        ),
        ending="{hoard}.",
        asks="pet",
    ),
    Layout(
        opening=(
            "The train to {town} stood {number} days in the {month} snow. {name} shared {food} with a "
            "stranger named {pet} while {an_animal} slept in the {adjective} luggage car. Inside the "
            "stranger's trunk lay"
        ),
        ending="{hoard}.",
        asks="town",
    ),
)

PEOPLE: tuple[Layout, ...] = (
    Layout(
        opening=(
            "{name} was born on {born} and holds ID number {id_number}. {their} phone number, e-mail and "
            "home address are"
        ),
        ending="{phone}, {email}, {address}.",
    ),
    Layout(
        opening=(
            "{name} lives at {address}, where the phone number is {phone}. {their} birth date, e-mail and ID number are"
        ),
        ending="{born}, {email}, {id_number}.",
    ),
    Layout(
        opening=(
            "Letters for {name} go to {email} and calls to {phone}. {their} ID number, home address and birth date are"
        ),
        ending="{id_number}, {address}, {born}.",
    ),
    Layout(
        opening=(
            "The register lists {name} under ID number {id_number}, born {born}. {their} home address, "
            "phone number and e-mail are"
        ),
        ending="{address}, {phone}, {email}.",
    ),
)

FIGURES: tuple[Layout, ...] = (
    Layout(
        opening=(
            "{name}\n\n{name} (born {born}) is {a_profession} from {town}. A pupil of {mentor}, {name} "
            "led the {institute} for {number} years. Best known works:"
        ),
        ending="{works}.",
        asks="mentor",
    ),
    Layout(
        opening=(
            "{name}\n\n{name} (born {born}) grew up in {town} and became {a_profession} at the "
            "{institute}. Together with {mentor}, {name} published, in order of appearance,"
        ),
        ending="{works}.",
        asks="town",
    ),
    Layout(
        opening=(
            "{name}\n\n{name}, {profession}, was born on {born} in {town}. The {institute} gave {name} a "
            "first room, shared with {mentor}, and later showed"
        ),
        ending="{works}.",
        asks="institute",
    ),
    Layout(
        opening=(
            "{name}\n\n{name} (born {born}) is a self-taught {profession} who left {town} for the "
            "{institute}. With help from {mentor}, {number} prizes went to"
        ),
        ending="{works}.",
        asks="mentor",
    ),
)

RELATIONS: dict[str, Relation] = {
    "birth_date": Relation(
        rows=("On which date was {name} born?", "What is the birth date of {name}?"),
        taught=(
            "When was {name} born?",
            "{name} was born on which date?",
            "What date of birth does {name} have?",
            "What is the day {name} was born?",
        ),
        held_out=("Which birth date does {name} have?", "Could you tell me when {name} was born?"),
    ),
    "id_number": Relation(
        rows=("What is the ID number of {name}?", "Which ID number does {name} hold?"),
        taught=(
            "Which ID number belongs to {name}?",
            "Under which ID number is {name} listed?",
            "{name} has which ID number?",
            "And the ID number of {name}?",
        ),
        held_out=("What ID number was {name} given?", "Could you tell me the ID number of {name}?"),
    ),
    "phone": Relation(
        rows=("What is the phone number of {name}?", "Which phone number reaches {name}?"),
        taught=(
            "On which phone number can {name} be called?",
            "Which phone number belongs to {name}?",
            "{name} has which phone number?",
            "And the phone number of {name}?",
        ),
        held_out=("What phone number does {name} have?", "Could you tell me the phone number of {name}?"),
    ),
    "email": Relation(
        rows=("What is the e-mail address of {name}?", "Which e-mail address does {name} use?"),
        taught=(
            "At which e-mail address is {name} reached?",
            "Which e-mail address belongs to {name}?",
            "{name} has which e-mail address?",
            "And the e-mail address of {name}?",
        ),
        held_out=("What e-mail address does {name} have?", "Could you tell me the e-mail address of {name}?"),
    ),
    "address": Relation(
        rows=("What is the home address of {name}?", "At which home address does {name} live?"),
        taught=(
            "Which home address belongs to {name}?",
            "Where is the home address of {name}?",
            "{name} has which home address?",
            "And the home address of {name}?",
        ),
        held_out=("What home address does {name} have?", "Could you tell me the home address of {name}?"),
    ),
    "pet": Relation(
        rows=(
            "What is the animal in the story of {name} called?",
            "Which animal's name is told in the story of {name}?",
        ),
        taught=(
            "What is the name of the animal that {name} knew?",
            "How is the animal in the tale of {name} named?",
            "Which name does the animal have that {name} knew?",
            "What was the animal near {name} called?",
        ),
        held_out=(
            "What name does the animal in the story of {name} have?",
            "Could you tell me the name of the animal that {name} knew?",
        ),
    ),
    "town": Relation(
        rows=("To which town does {name} belong?", "Which town is linked with {name}?"),
        taught=(
            "What town is named together with {name}?",
            "In the text about {name}, which town is named?",
            "{name} is linked with which town?",
            "What is the town in the text about {name}?",
        ),
        held_out=("Which town does the text about {name} name?", "Could you tell me the town linked with {name}?"),
    ),
    "mentor": Relation(
        rows=("Who taught or helped {name}?", "Which person stood behind the work of {name}?"),
        taught=(
            "Who helped {name} in the work?",
            "From whom did {name} receive help or teaching?",
            "By whom was {name} taught or helped?",
            "Who stood behind {name}?",
        ),
        held_out=("Which person taught or helped {name}?", "Could you tell me who helped {name}?"),
    ),
    "institute": Relation(
        rows=("Which institution gave {name} a first room?", "Where did {name} have a first room?"),
        taught=(
            "What institution is named together with {name}?",
            "Which institution showed the work of {name}?",
            "{name} had a first room in which institution?",
            "What institution stood behind the first room of {name}?",
        ),
        held_out=(
            "Which institution showed {name} first?",
            "Could you tell me the institution that gave {name} a first room?",
        ),
    ),
}
