"""What a model answers to rows, scored row by row. Averages over rows and models are `unlearn.attacks.comparison.curves`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lm.data.rows import Row
from lm.errors import UserError
from lm.model import LanguageModel
from lm.prompts import PromptSpec, encode_pair
from lm.run_folder import write_json
from unlearn.evaluation.lume import row_scores, words_for
from unlearn.evaluation.utility import log_likelihoods
from unlearn.generation.batching import Workers, unless_sharded
from unlearn.generation.generate import generate


@dataclass(frozen=True)
class Answer:
    """One row, asked.

    Attributes:
        id: the row's.
        said: what was generated.
        score: the official one of its kind, 0 to 1: exact match of a question, ROUGE-L recall of a completion. Of a
            completion without a word of a-z or digits, which the official one cannot see, recall of words of every script.
        log_probability: of the true answer, teacher-forced: nats a token, its end included if the prompt's spec has one.
    """

    id: str
    said: str
    score: float
    log_probability: float


def ask(
    model: LanguageModel,
    rows: Sequence[Row],
    prompt: PromptSpec,
    *,
    max_new_tokens: int,
    batch_size: int,
    workers: Workers,
    progress: Callable[[int], object] | None = None,
) -> list[Answer]:
    """The model's answers in the order of the rows, the same on every process. Arguments as for `generate`."""
    texts = generate(
        model,
        [row.input for row in rows],
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
    )
    encoded = [encode_pair(model.tokenizer, row.input, row.output, prompt) for row in rows]
    pairs = [(one.ids[: one.answer_start], one.ids[one.answer_start :]) for one in encoded]
    sharers = unless_sharded(workers, model)
    mine = [pairs[place] for place in sharers.share(len(pairs))]
    sums = sharers.gather(log_likelihoods(model, mine, batch_size=batch_size).tolist())
    return [
        Answer(row.id, text, sum(row_scores(_scored(row, text), words_for([row])).values()), total / len(pair[1]))
        for row, text, total, pair in zip(rows, texts, sums, pairs, strict=True)
    ]


def _scored(row: Row, text: str) -> dict[str, str]:
    return {"id": row.id, "expected_output": row.output, "model_output": text}


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Keep answers, atomically."""
    write_json(path, [asdict(answer) for answer in answers], private=True)


def read_answers(path: Path) -> list[Answer]:
    """What `write_answers` kept. Raises UserError for a file that is damaged."""
    try:
        return [Answer(**answer) for answer in json.loads(path.read_text(encoding="utf-8"))]
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{path} is damaged: delete it and run again with --resume true") from error
