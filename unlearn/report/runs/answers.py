"""Which answers a report shows: by a rule fixed beforehand, the first documents of each task, never by how they came out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from unlearn.report.records import Answer
from unlearn.report.runs.folders import Run

SHOWN = {"Task1": 1, "Task2": 3, "Task3": 1}
"""So many documents of a task on each side; of any other task, `OTHERS`."""
OTHERS = 2
SIDES: tuple[Literal["forget", "retain"], ...] = ("forget", "retain")


def shown_answers(evaluations: Mapping[str, Run]) -> tuple[Answer, ...]:
    """The first row of the first documents of each task and side, and some further questions of records.

    Args:
        evaluations: the key of a model -> the evaluation that asked it.
    """
    answers: list[Answer] = []
    for side in SIDES:
        said = {key: {row["id"]: row for row in run.rows(f"{side}.jsonl")} for key, run in evaluations.items()}
        asked = {row["id"]: row for rows in said.values() for row in rows.values()}
        for row in _chosen(list(asked.values())):
            spoken = {key: rows[row["id"]]["model_output"] for key, rows in said.items() if row["id"] in rows}
            answers.append(
                Answer(prompt=row["input"], truth=row["expected_output"], task=row["task"], side=side, said=spoken)
            )
    return tuple(answers)


def _chosen(rows: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    chosen = []
    taken: dict[str, set[str]] = {}
    for row in rows:
        documents = taken.setdefault(row["task"], set())
        document = re.sub(r"(?:sc|qa)\d$", "", row["id"])
        if document not in documents and len(documents) < SHOWN.get(row["task"], OTHERS):
            documents.add(document)
        elif document not in documents or row["task"] != "Task2" or row["id"][-1] not in "12":
            continue
        chosen.append(row)
    return chosen
