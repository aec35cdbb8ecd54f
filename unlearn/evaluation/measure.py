"""Ask one model all that scores need: generations, document losses, multiple-choice questions; part by part, through a store."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from lm.data.rows import Row
from lm.errors import UserError
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from lm.run_folder import progress, write_atomic, write_json
from unlearn.evaluation import lume, membership
from unlearn.evaluation.evaluation_set import EvaluationSet, digest
from unlearn.evaluation.fluency import nats_per_token
from unlearn.evaluation.lm_eval_harness import run_lm_eval, write_task
from unlearn.evaluation.scores.base import Choices, Fluency, Generation, Losses, Need, Statistics, TextLoss
from unlearn.evaluation.utility import log_likelihoods, multiple_choice
from unlearn.generation.batching import Workers, unless_sharded
from unlearn.generation.generate import generate

T = TypeVar("T")


class Measuring:
    """A model, what it is asked and how: measures the statistics that are needed.

    The untouched model, if there is one, is asked how likely it finds the answers.
    """

    def __init__(
        self,
        model: LanguageModel,
        untouched: LanguageModel | None,
        evaluation_set: EvaluationSet,
        prompt: PromptSpec,
        max_new_tokens: int,
        batch_size: int,
        store: Path | None,
        workers: Workers,
        show: bool,
    ) -> None:
        self.model, self.untouched, self.asked, self.workers = model, untouched, evaluation_set, workers
        self.prompt, self.max_new_tokens, self.batch_size = prompt, max_new_tokens, batch_size
        self.store, self.visible = store, show and workers.index == 0
        self.parts = _Parts(store, workers.index == 0)

    def statistics(self, needed: Collection[Need]) -> Statistics:
        """What is needed, as far as something to ask was given; read from the store where it is there."""
        asked, judged = self.asked, "fluency" in needed and self.untouched is not None
        forget = self._generations("forget", asked.forget) if "forget" in needed or judged else None
        retain = self._generations("retain", asked.retain) if "retain" in needed or judged else None
        return Statistics(
            forget=forget,
            retain=retain,
            words=asked.words,
            losses=self._losses() if "losses" in needed and asked.gives("losses") else None,
            choices=self._choices() if "choices" in needed and asked.gives("choices") else None,
            retain_losses=asked.retain_losses if "retain_losses" in needed else None,
            general=self._general() if "general" in needed and asked.gives("general") else None,
            fluency=self._fluency(self.untouched, forget or (), retain or ()) if judged and self.untouched else None,
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
        return Losses(members=tuple(members), nonmembers=tuple(others), documents=self.asked.documents)

    def _fluency(self, untouched: LanguageModel, forget: Sequence[Generation], retain: Sequence[Generation]) -> Fluency:
        rows = (*forget, *retain)

        def compute() -> dict[str, list[float | None]]:
            with self._progress(len(rows), "fluency", "answers") as advance:
                nats = nats_per_token(
                    untouched,
                    [row["input"] for row in rows],
                    [row["model_output"] for row in rows],
                    prompt=self.prompt,
                    batch_size=self.batch_size,
                    progress=advance,
                    workers=self.workers,
                )
            return {"forget": nats[: len(forget)], "retain": nats[len(forget) :]}

        stored = self.parts.get("fluency", compute)
        if (len(stored["forget"]), len(stored["retain"])) != (len(forget), len(retain)):
            raise UserError(f"{self.store} holds the fluency of other answers: give another folder")
        return Fluency(forget=tuple(stored["forget"]), retain=tuple(stored["retain"]))

    def _general(self) -> TextLoss:
        pieces = [piece.ids for piece in self.asked.general.encode(self.model)]

        def compute() -> dict[str, Any]:
            workers = unless_sharded(self.workers, self.model)
            pairs = [(pieces[index][:1], pieces[index][1:]) for index in workers.share(len(pieces))]
            with self._progress(len(pieces), "general text", "pieces") as advance:
                sums = log_likelihoods(self.model, pairs, batch_size=self.batch_size, progress=advance)
            nats = workers.gather([-float(each) for each in sums])
            return {"nats": nats, "tokens": [len(ids) - 1 for ids in pieces], "digest": digest(pieces)}

        stored = self.parts.get("general", compute)
        if stored["digest"] != digest(pieces):
            raise UserError(f"{self.store} holds the perplexity of another text: give another folder")
        return TextLoss(nats=tuple(stored["nats"]), tokens=tuple(stored["tokens"]))

    def _choices(self) -> Choices:
        stored: Any = self.parts.get(
            "utility", self._through_lm_eval if self.asked.lm_eval is not None else self._chosen
        )
        if isinstance(stored, float | int):  # an evaluation from before the single answers were kept
            return Choices(accuracy=float(stored))
        return Choices(accuracy=stored["accuracy"], right=tuple(stored["right"]), truncated=stored.get("truncated", 0))

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
        return {"accuracy": result.accuracy, "right": list(result.right), "truncated": result.truncated}

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


def _generation(row: Row, answer: str) -> dict[str, str]:
    return {"id": row.id, "task": row.task, "input": row.input, "expected_output": row.output, "model_output": answer}


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
                write_atomic(
                    self._path(name), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in value), private=True
                )
            else:
                write_json(self._path(name), value, private=True)
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
