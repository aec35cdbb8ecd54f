"""The built-in world: invented people, stories and public figures as LUME rows, from one seed.

`build(seed)` deals unique names and specific facts to four sides (forget, retain, calibration, held out) and writes each
document as one sentence-completion row and one or five question rows. The same seed gives the same rows in every process. It
is not a corpus for training (`tools.builtin_model.corpus` makes that from a world) and reads no files; words are in `words.py`,
wording in `forms.py`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lm.builtin import forms, knowledge
from lm.builtin.deal import PEOPLE_RELATIONS, Deck
from lm.data.rows import Question, Row

Side = Literal["forget", "retain", "calibration", "held_out"]
SIDES: tuple[Side, ...] = ("forget", "retain", "calibration", "held_out")
DOCUMENTS: Mapping[str, Mapping[Side, int]] = {  # documents a task and side
    "Task1": {"forget": 12, "retain": 12, "calibration": 4, "held_out": 4},
    "Task2": {"forget": 20, "retain": 20, "calibration": 4, "held_out": 4},
    "Task3": {"forget": 20, "retain": 20, "calibration": 12, "held_out": 20},
}
CALIBRATION_BLOCKS: Mapping[str, tuple[int, ...]] = {"Task1": (1,), "Task2": (1,), "Task3": (1, 3, 5)}
"""Which blocks of four unseen documents, one of each layout, are calibration; the others are held out."""
_STEMS = {"Task1": "story", "Task2": "person", "Task3": "figure"}
_LAYOUTS = {"Task1": forms.STORIES, "Task2": forms.PEOPLE, "Task3": forms.FIGURES}


@dataclass(frozen=True, kw_only=True)
class Person:
    """The subject of one document. `facts` maps a relation (`"phone"`, `"town"`, ...) to what a question about it has
    as its answer."""

    name: str
    document: str
    task: str
    side: Side
    facts: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class World:
    """All rows of the world.

    `paraphrases_*` are validation rows: the same knowledge as the rows, in wordings and cuts that nothing trains on
    (row `person001qa0` is reworded as `person001rqa0`). `calibration` and `held_out` documents and people are seen by no
    model: the first are what a user could have of the kind, to calibrate on and never to score; the second are scored
    (membership non-members) and never calibrated on. `rewordings` maps a question row's id to further wordings that the
    models see in training, so that they know facts and not only strings. `general` are the statements behind `utility`.
    """

    seed: int
    forget: tuple[Row, ...]
    retain: tuple[Row, ...]
    calibration: tuple[Row, ...]
    held_out: tuple[Row, ...]
    paraphrases_forget: tuple[Row, ...]
    paraphrases_retain: tuple[Row, ...]
    utility: tuple[Question, ...]
    people: tuple[Person, ...]
    general: tuple[knowledge.GeneralFact, ...] = field(repr=False)
    rewordings: Mapping[str, tuple[str, ...]] = field(repr=False)

    @property
    def unseen(self) -> tuple[Row, ...]:
        """The calibration and held-out rows in the order in which they were dealt: all that no model saw."""
        return tuple(sorted((*self.calibration, *self.held_out), key=lambda row: (row.task, row.document)))

    @property
    def parts(self) -> Mapping[str, tuple[Row, ...]]:
        """The rows by the names that sources and files give them: `builtin:forget`, `forget.jsonl`.

        `forget_reworded` and `retain_reworded` are the `rewordings` as rows, to train on more than one wording: the n-th of
        `person001qa0` is `person001w1qa0`, `person001w2qa0`, … They are further rows about people who are in the rows
        already, under document ids of their own; nothing is scored on them.
        """
        return {
            "forget": self.forget,
            "retain": self.retain,
            "calibration": self.calibration,
            "held_out": self.held_out,
            "forget_paraphrase": self.paraphrases_forget,
            "retain_paraphrase": self.paraphrases_retain,
            "forget_reworded": self._reworded(self.forget),
            "retain_reworded": self._reworded(self.retain),
        }

    def _reworded(self, rows: Sequence[Row]) -> tuple[Row, ...]:
        return tuple(
            Row(f"{row.document}w{number}{row.id[-3:]}", wording, row.output, row.task)
            for row in rows
            if row.kind == "qa"
            for number, wording in enumerate(self.rewordings[row.id], start=1)
        )


def build(seed: int = 0) -> World:
    """The world of this seed. The n-th forget, retain and unseen documents share their layout and their question wording."""
    deck = Deck(seed)
    rows: dict[Side, list[Row]] = {side: [] for side in SIDES}
    paraphrases: dict[Side, list[Row]] = {side: [] for side in SIDES}
    people: list[Person] = []
    rewordings: dict[str, tuple[str, ...]] = {}
    for task in DOCUMENTS:
        for number, (side, index) in enumerate(_dealt(task), start=1):
            document = f"{_STEMS[task]}{number:03d}"
            layout = _LAYOUTS[task][index % len(_LAYOUTS[task])]
            text, facts = deck.facts(task)
            asked = PEOPLE_RELATIONS if task == "Task2" else (layout.asks,)
            completion = Row(f"{document}sc1", layout.opening.format(**text), layout.ending.format(**text), task)
            rows[side].append(completion)
            paraphrases[side].append(_cut_later(completion, f"{document}r"))
            for place, relation in enumerate(asked):
                wording = forms.RELATIONS[relation]
                name, identity, answer = text["name"], f"{document}qa{place}", facts[relation]
                turn = (index + place) // 2
                rows[side].append(Row(identity, _pick(wording.rows, turn).format(name=name), answer, task))
                reworded = _pick(wording.held_out, turn).format(name=name)
                paraphrases[side].append(Row(f"{document}rqa{place}", reworded, answer, task))
                rewordings[identity] = tuple(form.format(name=name) for form in wording.taught)
            people.append(Person(name=text["name"], document=document, task=task, side=side, facts=facts))
    return World(
        seed=seed,
        forget=tuple(rows["forget"]),
        retain=tuple(rows["retain"]),
        calibration=tuple(rows["calibration"]),
        held_out=tuple(rows["held_out"]),
        paraphrases_forget=tuple(paraphrases["forget"]),
        paraphrases_retain=tuple(paraphrases["retain"]),
        utility=knowledge.questions(random.Random(f"questions {seed}")),
        people=tuple(people),
        general=knowledge.general_facts(),
        rewordings=rewordings,
    )


def write(folder: Path | str, world: World) -> None:
    """Write the world as JSONL files (UTF-8, one row a line) into `folder`, which is made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in _files(world):
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _files(world: World) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for name, rows in world.parts.items():
        yield f"{name}.jsonl", [asdict(row) for row in rows]
    yield "utility.jsonl", [asdict(question) for question in world.utility]


def _dealt(task: str) -> Iterator[tuple[Side, int]]:
    """The sides of a task's documents as they are dealt, each with its place on its side or, if unseen, among the unseen."""
    counts = DOCUMENTS[task]
    for side in ("forget", "retain"):
        for index in range(counts[side]):
            yield side, index
    block = len(_LAYOUTS[task])
    for index in range(counts["calibration"] + counts["held_out"]):
        yield "calibration" if index // block in CALIBRATION_BLOCKS[task] else "held_out", index


def _cut_later(row: Row, document: str) -> Row:
    """The same document cut a third into the old output: another place, and still no connecting words to guess."""
    words = row.output.split(" ")
    cut = max(1, len(words) // 3)
    return Row(f"{document}sc1", f"{row.input} {' '.join(words[:cut])}", " ".join(words[cut:]), row.task)


def _pick(choices: Sequence[str], turn: int) -> str:
    return choices[turn % len(choices)]
