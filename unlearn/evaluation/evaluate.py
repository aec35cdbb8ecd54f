"""Everything the final score needs from one model: generations, membership losses, utility; then the score itself.

`evaluate` asks the model; all arithmetic is in the modules it calls. Where the rows come from, and the command line,
are in `unlearn.evaluation.stage`.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from lm.data.rows import Question, Row
from lm.errors import UserError
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from lm.row_files import check_disjoint
from lm.run_folder import progress, write_atomic, write_json
from unlearn.evaluation import lume, membership
from unlearn.evaluation.lm_eval_harness import run_lm_eval, write_task
from unlearn.evaluation.utility import Style, multiple_choice
from unlearn.generation.batching import ONE_PROCESS, Workers
from unlearn.generation.generate import generate

T = TypeVar("T")
OFFICIAL_PROMPT = PromptSpec()
Generation = Mapping[str, str]
"""A row after generation: `id`, `task`, `input`, `expected_output`, `model_output`."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """What a model is asked. Membership and utility may be left out; then there is no final score.

    Attributes:
        forget, retain: rows to generate on; no id on both sides.
        members, nonmembers: whole documents the model was, and was not, trained on. Both or neither.
        questions: multiple-choice questions for utility.
        style: how they are asked (see `unlearn.evaluation.utility`).
        lm_eval: ask through lm-eval instead: the name of one of its tasks, or, with `questions`, any name at all.
    """

    forget: tuple[Row, ...]
    retain: tuple[Row, ...]
    members: tuple[str, ...] = ()
    nonmembers: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    style: Style = "sentence"
    lm_eval: str | None = None

    def __post_init__(self) -> None:
        check_disjoint(self.forget, self.retain)
        if bool(self.members) != bool(self.nonmembers):
            raise UserError("membership needs both members and non-members; give both, or neither.")
        both = set(self.members) & set(self.nonmembers)
        if both:
            raise UserError(
                f'the document "{min(both)[:40]}..." is both a member and a non-member; take it out of one.'
            )
        if self.lm_eval is not None and self.questions and self.style != "sentence":
            raise UserError("questions go through lm-eval in sentence style only; set the style to sentence.")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result, with what it was computed from.

    Attributes:
        scores: the twelve terms and the aggregates; `final` has `utility` in the place of MMLU.
        utility: accuracy, or None if nothing was asked.
        forget, retain: the generations, in the order of the rows.
        member_losses, nonmember_losses: mean token loss of each document, in nats; empty if there were none.
        seconds: time spent on each part (`forget`, `retain`, `membership`, `utility`).
    """

    scores: lume.LumeScores
    utility: float | None
    forget: tuple[Generation, ...]
    retain: tuple[Generation, ...]
    member_losses: tuple[float, ...]
    nonmember_losses: tuple[float, ...]
    seconds: Mapping[str, float]

    def to_json(self) -> dict[str, object]:
        """The numbers alone: `terms` (null where one does not apply), `task_aggregate`, `mia_auc`, `mia_score`,
        `utility`, `final` (null if not everything was given), `seconds` (of all parts)."""
        return {
            "terms": [None if math.isnan(term) else term for term in self.scores.terms],
            "task_aggregate": self.scores.task_aggregate,
            "mia_auc": self.scores.mia_auc,
            "mia_score": self.scores.mia,
            "utility": self.utility,
            "final": self.scores.final,
            "seconds": round(sum(self.seconds.values()), 3),
        }


def evaluate(
    model: LanguageModel,
    asked: EvaluationSet,
    *,
    prompt: PromptSpec = OFFICIAL_PROMPT,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    store: Path | None = None,
    workers: Workers = ONE_PROCESS,
    show: bool = False,
) -> Evaluation:
    """Ask the model everything in the set and score the answers.

    Args:
        prompt: how prompts are rendered; the default is the official raw text.
        max_new_tokens: the longest answer; officially 256.
        batch_size: prompts generated at once. Documents and questions go through in batches of the same size.
        store: a folder where each part is written as soon as it is done, and from which parts that are already there
            are read instead of computed, so that an interrupted evaluation can go on.
        workers: which process this is; all processes return the same result, and the first writes.
        show: show progress on the first process.
    """
    parts = _Parts(store, workers.index == 0)
    visible = show and workers.index == 0

    def generations(side: str, rows: Sequence[Row]) -> list[dict[str, str]]:
        with progress(len(rows), label=f"{side} rows", unit="rows", enabled=visible) as advance:
            said = generate(
                model,
                [row.input for row in rows],
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                progress=lambda done: advance(done * workers.count),
                workers=workers,
            )
        return [_generation(row, text) for row, text in zip(rows, said, strict=True)]

    def losses() -> list[list[float]]:
        texts = (*asked.members, *asked.nonmembers)
        with progress(len(texts), label="membership", unit="documents", enabled=visible) as advance:
            found = membership.document_losses(
                model,
                texts,
                batch_size=batch_size,
                progress=lambda done: advance(done * workers.count),
                workers=workers,
            ).tolist()
        return [found[: len(asked.members)], found[len(asked.members) :]]

    forget = parts.get("forget", lambda: generations("forget", asked.forget))
    retain = parts.get("retain", lambda: generations("retain", asked.retain))
    members, others = parts.get("membership", losses) if asked.members else ([], [])
    wants_utility = bool(asked.questions) or asked.lm_eval is not None
    accuracy = (
        parts.get("utility", lambda: _utility(model, asked, batch_size, workers, visible)) if wants_utility else None
    )
    for rows, found in ((asked.forget, forget), (asked.retain, retain)):
        if [_generation(row, "") for row in rows] != [{**each, "model_output": ""} for each in found]:
            raise UserError(f"{store} holds the answers to other rows; give another folder.")
    if (len(members), len(others)) != (len(asked.members), len(asked.nonmembers)):
        raise UserError(f"{store} holds the losses of other documents; give another folder.")
    auc = membership.auc(members, others) if members else None
    return Evaluation(
        scores=lume.score(forget, retain, mia_auc=auc, mmlu=accuracy),
        utility=accuracy,
        forget=tuple(forget),
        retain=tuple(retain),
        member_losses=tuple(members),
        nonmember_losses=tuple(others),
        seconds=parts.seconds,
    )


def _utility(model: LanguageModel, asked: EvaluationSet, batch_size: int, workers: Workers, visible: bool) -> float:
    if asked.lm_eval is not None:
        with tempfile.TemporaryDirectory() as folder:
            local = write_task(Path(folder), asked.questions, asked.lm_eval) if asked.questions else None
            metrics = run_lm_eval(model, [asked.lm_eval], task_dir=local, batch_size=batch_size)[asked.lm_eval]
        if "acc" not in metrics:
            raise UserError(
                f'lm-eval\'s "{asked.lm_eval}" has no accuracy (it has {", ".join(metrics)}); choose another.'
            )
        return metrics["acc"]
    answers = sum(len(question.choices) for question in asked.questions)
    with progress(answers, label="utility", unit="answers", enabled=visible) as advance:
        return multiple_choice(
            model,
            asked.questions,
            style=asked.style,
            batch_size=batch_size,
            progress=lambda done: advance(done * workers.count),
            workers=workers,
        ).accuracy


def _generation(row: Row, said: str) -> dict[str, str]:
    return {"id": row.id, "task": row.task, "input": row.input, "expected_output": row.output, "model_output": said}


class _Parts:
    """Parts of an evaluation: computed and timed, or read back from the store."""

    def __init__(self, store: Path | None, writes: bool) -> None:
        self.store, self.writes = store, writes
        self.seconds: dict[str, float] = {}

    def get(self, name: str, compute: Callable[[], T]) -> T:
        """The part called `name`: read if it is there, else computed, and written by the first process."""
        if self.store is not None and self._path(name).exists():
            return cast(T, self._read(name))  # what compute returned, once through JSON
        start = time.perf_counter()
        value = compute()
        self.seconds[name] = time.perf_counter() - start
        if self.store is not None and self.writes:
            if name in lume.SIDES:
                assert isinstance(value, list)
                write_atomic(self._path(name), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in value))
            else:
                write_json(self._path(name), value)
            write_json(self.store / "seconds.json", self.seconds)
        return value

    def _path(self, name: str) -> Path:
        assert self.store is not None
        return self.store / f"{name}.{'jsonl' if name in lume.SIDES else 'json'}"

    def _read(self, name: str) -> object:
        assert self.store is not None
        timing = self.store / "seconds.json"
        if timing.exists():
            self.seconds[name] = float(json.loads(timing.read_text()).get(name, 0.0))
        text = self._path(name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line] if name in lume.SIDES else json.loads(text)
