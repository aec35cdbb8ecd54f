"""Ask one model all that its scores need (generations, document losses, multiple-choice questions), then compute the scores.

`evaluate` works on objects in memory; all arithmetic is in `unlearn.evaluation.scores` and the modules behind it. The stage
that goes from files to files through it is `unlearn.evaluation.stage`.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from lm.data.rows import Question, Row
from lm.errors import UserError
from lm.loading import load
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from lm.row_files import check_disjoint, load_documents, load_questions, load_rows
from lm.run_folder import progress, write_atomic, write_json
from unlearn.evaluation import lume, membership
from unlearn.evaluation.lm_eval_harness import run_lm_eval, write_task
from unlearn.evaluation.scores import chosen_scores
from unlearn.evaluation.scores.base import Choices, Generation, Losses, Need, Score, Statistics, needs_of
from unlearn.evaluation.utility import Style, multiple_choice
from unlearn.generation.batching import ONE_PROCESS, Workers
from unlearn.generation.generate import generate

T = TypeVar("T")
OFFICIAL_PROMPT = PromptSpec()
MEASURES = ("task_aggregate", "mia_auc", "mia_score", "utility", "final")
"""The keys beside `terms` that scores.json always has."""
_GIVE = {
    "forget": "forget rows",
    "retain": "retain rows",
    "losses": "documents of members and non-members",
    "choices": "questions",
}


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
            raise UserError("membership needs both members and non-members: give both, or neither")
        both = set(self.members) & set(self.nonmembers)
        if both:
            raise UserError(f'the document "{min(both)[:40]}..." is both a member and a non-member: take it out of one')
        if self.lm_eval is not None and self.questions and self.style != "sentence":
            raise UserError("questions go through lm-eval in sentence style only: set the style to sentence")

    def gives(self, need: Need) -> bool:
        """Whether there is something to ask for this statistic."""
        if need == "losses":
            return bool(self.members)
        if need == "choices":
            return bool(self.questions) or self.lm_eval is not None
        return True

    def askable(self, scores: Sequence[str | Score] | None) -> tuple[Score, ...]:
        """These scores with their parts, once it is clear that this set gives what they need and holds rows they can read.

        Raises:
            UserError: an unknown score, one that was asked for and needs what is not given, or rows that one cannot read.
        """
        wanted = chosen_scores(scores)
        for score in wanted if scores is not None else ():
            if missing := [_GIVE[need] for need in score.needs if not self.gives(need)]:
                raise UserError(
                    f"the score {score.name} needs {missing[0]} and there are none: give some, or leave it out"
                )
        for check in {type(score): score for score in wanted}.values():
            check.check_rows((*self.forget, *self.retain))
        return wanted


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation:
    """The result, with what it was computed from.

    Attributes:
        values: the name of a score -> its value; None where it does not apply or something it needs was not asked.
        examples: the name of a score -> id of a row, document or question -> its number; only scores that have such numbers.
        statistics: the generations, losses and choices behind them.
        seconds: time spent on each part (`forget`, `retain`, `membership`, `utility`).
    """

    values: Mapping[str, float | None]
    examples: Mapping[str, Mapping[str, float]]
    statistics: Statistics
    seconds: Mapping[str, float]

    @property
    def scores(self) -> lume.LumeScores:
        """The official scores; `final` has `utility` in the place of MMLU. NaN for those that were not computed."""
        terms = [self.values.get(name) for name in lume.TERMS]
        aggregate = self.values.get("task_aggregate")
        return lume.LumeScores(
            terms=tuple(math.nan if term is None else term for term in terms),
            applies=tuple(term is not None for term in terms),
            task_aggregate=math.nan if aggregate is None else aggregate,
            mia_auc=self.values.get("mia_auc"),
            mia=self.values.get("mia_score"),
            mmlu=self.utility,
            final=self.values.get("final"),
        )

    @property
    def utility(self) -> float | None:
        """Accuracy, or None if no question was asked."""
        return self.values.get("utility")

    @property
    def forget(self) -> tuple[Generation, ...]:
        """The generations of the forget rows, in their order; empty if no score needed them."""
        return self.statistics.forget or ()

    @property
    def retain(self) -> tuple[Generation, ...]:
        """The generations of the retain rows."""
        return self.statistics.retain or ()

    @property
    def member_losses(self) -> tuple[float, ...]:
        """Mean token loss of each member document, in nats; empty if there were none."""
        return self.statistics.losses.members if self.statistics.losses is not None else ()

    @property
    def nonmember_losses(self) -> tuple[float, ...]:
        """Likewise of each document that the model was not trained on."""
        return self.statistics.losses.nonmembers if self.statistics.losses is not None else ()

    def to_json(self) -> dict[str, object]:
        """The numbers alone: `terms` (the twelve, null where one does not apply), `task_aggregate`, `mia_auc`, `mia_score`,
        `utility`, `final` (null if not everything was given), any other score under its name, `seconds` (of all parts)."""
        others = {name: value for name, value in self.values.items() if name not in (*lume.TERMS, *MEASURES)}
        return {
            "terms": [self.values.get(name) for name in lume.TERMS],
            **{name: self.values.get(name) for name in MEASURES},
            **others,
            "seconds": round(sum(self.seconds.values()), 3),
        }

    def __repr__(self) -> str:
        named = [name for name in (*MEASURES, *self.values) if name in self.values and name not in lume.TERMS]
        known = [f"{name} {value:.4f}" for name in dict.fromkeys(named) if (value := self.values[name]) is not None]
        return f"Evaluation({', '.join([*known, f'{len(self.forget)} forget and {len(self.retain)} retain rows'])})"


def evaluate(
    model: LanguageModel | str,
    forget: Sequence[Row] | str,
    retain: Sequence[Row] | str,
    *,
    members: Sequence[str] | str = (),
    nonmembers: Sequence[str] | str = (),
    questions: Sequence[Question] | str = (),
    scores: Sequence[str | Score] | None = None,
    prompt: PromptSpec = OFFICIAL_PROMPT,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    style: Style = "sentence",
    lm_eval: str | None = None,
    store: Path | str | None = None,
    workers: Workers = ONE_PROCESS,
    show: bool = False,
) -> Evaluation:
    """Ask a model what some scores need, and compute them. The model is left as it was.

    Args:
        model: a loaded model, or what `lm.load` takes: `builtin`, a folder, a hub id.
        forget, retain: rows to generate on (no id on both sides), or a source of them: a file, a folder, `builtin:forget`.
        members, nonmembers: whole documents that the model was, and was not, trained on, or sources of them. Both or neither;
            without them membership is not scored.
        questions: multiple-choice questions, or a source of them such as `builtin:utility`; without them utility is not scored.
        scores: the names of scores, or objects of your own class; parts of a score come with it (`["final"]` gives all that is
            official). None: every score of `unlearn.evaluation.scores` that can be had from what is given.
        prompt: how prompts are rendered; the default is the official raw text.
        max_new_tokens: the longest answer; officially 256.
        batch_size: prompts generated at once. Documents and questions go through in batches of the same size.
        style: how questions are asked (see `unlearn.evaluation.utility`).
        lm_eval: ask through lm-eval instead: the name of one of its tasks, or, with `questions`, any name at all.
        store: a folder where each part is written as soon as it is done, and from which parts that are already there
            are read instead of computed, so that an interrupted evaluation can go on.
        workers: which process this is; all processes return the same result, and the first writes.
        show: show progress on the first process.

    Returns:
        the values by name, the same example by example, and every generation, loss and choice behind them: as many
        generations as rows, as many losses as documents.

    Raises:
        UserError: rows that a score cannot read, a score whose needs are not given, a file that is missing, a store of
            another evaluation.

    Example:
        >>> import unlearn
        >>> from lm.row_files import load_rows
        >>> forget, retain = load_rows("builtin:forget")[:4], load_rows("builtin:retain")[:4]
        >>> result = unlearn.evaluate("builtin", forget, retain, max_new_tokens=8)
        >>> len(result.forget), result.values["mia_auc"]
        (4, None)
    """
    asked = EvaluationSet(
        forget=load_rows(forget) if isinstance(forget, str) else tuple(forget),
        retain=load_rows(retain) if isinstance(retain, str) else tuple(retain),
        members=load_documents(members) if isinstance(members, str) else tuple(members),
        nonmembers=load_documents(nonmembers) if isinstance(nonmembers, str) else tuple(nonmembers),
        questions=load_questions(questions) if isinstance(questions, str) else tuple(questions),
        style=style,
        lm_eval=lm_eval,
    )
    wanted = asked.askable(scores)
    loaded = load(model) if isinstance(model, str) else model
    asking = _Asking(
        loaded, asked, prompt, max_new_tokens, batch_size, None if store is None else Path(store), workers, show
    )
    statistics = asking.statistics({need for score in wanted for need in needs_of(score)})
    return Evaluation(
        values={score.name: statistics.of(score) for score in wanted},
        examples={score.name: found for score in wanted if (found := statistics.examples_of(score))},
        statistics=statistics,
        seconds=asking.parts.seconds,
    )


class _Asking:
    """A model, what it is asked and how: measures the statistics that are needed."""

    def __init__(
        self,
        model: LanguageModel,
        asked: EvaluationSet,
        prompt: PromptSpec,
        max_new_tokens: int,
        batch_size: int,
        store: Path | None,
        workers: Workers,
        show: bool,
    ) -> None:
        self.model, self.asked, self.workers = model, asked, workers
        self.prompt, self.max_new_tokens, self.batch_size = prompt, max_new_tokens, batch_size
        self.store, self.visible = store, show and workers.index == 0
        self.parts = _Parts(store, workers.index == 0)

    def statistics(self, needed: Collection[Need]) -> Statistics:
        """What is needed, as far as something to ask was given; read from the store where it is there."""
        asked = self.asked
        return Statistics(
            forget=self._generations("forget", asked.forget) if "forget" in needed else None,
            retain=self._generations("retain", asked.retain) if "retain" in needed else None,
            losses=self._losses() if "losses" in needed and asked.gives("losses") else None,
            choices=self._choices() if "choices" in needed and asked.gives("choices") else None,
        )

    def _generations(self, side: str, rows: Sequence[Row]) -> tuple[Generation, ...]:
        def compute() -> list[dict[str, str]]:
            with self._progress(len(rows), f"{side} rows", "rows") as advance:
                texts = generate(
                    self.model,
                    [row.input for row in rows],
                    prompt=self.prompt,
                    max_new_tokens=self.max_new_tokens,
                    batch_size=self.batch_size,
                    progress=advance,
                    workers=self.workers,
                )
            return [_generation(row, text) for row, text in zip(rows, texts, strict=True)]

        answered = self.parts.get(side, compute)
        if [_generation(row, "") for row in rows] != [{**each, "model_output": ""} for each in answered]:
            raise UserError(f"{self.store} holds the answers to other rows: give another folder")
        return tuple(answered)

    def _losses(self) -> Losses:
        texts, count = (*self.asked.members, *self.asked.nonmembers), len(self.asked.members)

        def compute() -> list[list[float]]:
            with self._progress(len(texts), "membership", "documents") as advance:
                losses = membership.document_losses(
                    self.model, texts, batch_size=self.batch_size, progress=advance, workers=self.workers
                ).tolist()
            return [losses[:count], losses[count:]]

        members, others = self.parts.get("membership", compute)
        if (len(members), len(others)) != (count, len(self.asked.nonmembers)):
            raise UserError(f"{self.store} holds the losses of other documents: give another folder")
        return Losses(members=tuple(members), nonmembers=tuple(others))

    def _choices(self) -> Choices:
        stored: Any = self.parts.get(
            "utility", self._through_lm_eval if self.asked.lm_eval is not None else self._chosen
        )
        if isinstance(stored, float | int):  # an evaluation from before the single answers were kept
            return Choices(accuracy=float(stored))
        return Choices(accuracy=stored["accuracy"], right=tuple(stored["right"]))

    def _chosen(self) -> dict[str, Any]:
        questions = self.asked.questions
        with self._progress(sum(len(question.choices) for question in questions), "utility", "answers") as advance:
            result = multiple_choice(
                self.model,
                questions,
                style=self.asked.style,
                batch_size=self.batch_size,
                progress=advance,
                workers=self.workers,
            )
        return {"accuracy": result.accuracy, "right": list(result.right)}

    def _through_lm_eval(self) -> dict[str, Any]:
        task, questions = self.asked.lm_eval, self.asked.questions
        assert task is not None
        with tempfile.TemporaryDirectory() as folder:
            local = write_task(Path(folder), questions, task) if questions else None
            metrics = run_lm_eval(self.model, [task], task_dir=local, batch_size=self.batch_size)[task]
        if "acc" not in metrics:
            raise UserError(f"lm-eval's {task!r} has no accuracy (it has {', '.join(metrics)}): choose another task")
        return {"accuracy": metrics["acc"], "right": []}

    @contextmanager
    def _progress(self, total: int, label: str, unit: str) -> Iterator[Callable[[int], None]]:
        with progress(total, label=label, unit=unit, enabled=self.visible) as advance:
            yield lambda done: advance(done * self.workers.count)


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
