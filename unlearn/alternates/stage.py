"""Invent other answers: the model itself is asked, by example, for an answer to each question that says something else.

They are the alternates of AltPO (Mekala et al. 2024, arXiv 2409.13474): of the same domain and style as what is to be
forgotten, and wrong. The model samples; each row has randomness of its own, so the text depends on the seed alone. Badge:
**variant**: the paper's prompt is its authors', this one is ours. Learning them is `unlearn.alternates.base.AlternateFile`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lm.data.rows import Row
from lm.devices import accelerator, launch_facts, load_here, together
from lm.errors import UserError
from lm.fingerprint import fingerprint
from lm.model import LanguageModel, ModelSpec
from lm.prompts import PromptSpec
from lm.row_files import data_hash, load_rows
from lm.run_folder import RunFolder, write_atomic
from unlearn.generation.batching import ONE_PROCESS, Workers
from unlearn.generation.generate import generate

ALTERNATES = "alternates.jsonl"
TEMPLATE = """\
Each question below has its answer, and then another answer that is just as plausible but says something else.

Question: Where was Marta Hollis born?
Answer: Marta Hollis was born in Lund.
Other answer: Marta Hollis was born in Porto.

Question: What does Idris Vane do for a living?
Answer: He repairs church organs.
Other answer: He drives a night bus.

Question: {question}
Answer: {answer}
Other answer:"""


@dataclass(frozen=True, kw_only=True)
class AlternatesConfig:
    """Which model is asked for other answers to which rows, and how it samples."""

    model: ModelSpec = field(default_factory=ModelSpec)
    """The model to ask: the one that is to forget, or a better one."""
    rows: str = "builtin:forget"
    """Rows to be forgotten: a JSONL or Parquet file, a folder of them, or a part of the built-in world."""
    columns: dict[str, str] | None = None
    """For files with other column names: our field -> their column, e.g. {"input": "question", "output": "answer"}."""
    template: str = TEMPLATE
    """What the model is asked, with {question} and {answer} in it; the first line that it says is taken."""
    prompt: PromptSpec = field(default_factory=PromptSpec)
    """How that becomes tokens: raw for a base model, chat for one that follows instructions."""
    per_row: int = 5
    """How many different alternates a row is to have."""
    attempts: int = 4
    """How often a row is asked again for those that are blank, a repetition, or the answer itself."""
    temperature: float = 1.0
    """Of the sampling."""
    max_new_tokens: int = 64
    """Longest alternate."""
    batch_size: int = 32
    """Prompts at once on each process."""
    seed: int = 0
    """Of the sampling."""
    out: str = "runs/alternates"
    """The run folder; the result is its alternates.jsonl."""

    def __post_init__(self) -> None:
        for name in ("per_row", "attempts", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: give a positive number (1 is usual)")
        lacks = [place for place in ("{question}", "{answer}") if place not in self.template]
        if lacks:
            raise UserError(f"the template lacks {lacks[0]}: put it where the row's text belongs")


@dataclass(frozen=True)
class Sampler:
    """Tokens drawn from `softmax(logits / temperature)`: the largest logit after Gumbel noise.

    The noise is that of the seed, the prompt and the place in its answer, so neither batches nor processes matter.
    """

    temperature: float
    seed: tuple[int, ...]

    def __call__(self, logits: Tensor, prompts: Sequence[int], said: int) -> Tensor:
        """(n,) token ids from (n, vocabulary) logits."""
        size = logits.shape[1]
        noise = np.stack([np.random.default_rng((*self.seed, prompt, said)).gumbel(size=size) for prompt in prompts])
        return (logits.double() / self.temperature + torch.from_numpy(noise).to(logits.device)).argmax(dim=-1)


def invent(
    model: LanguageModel, rows: Sequence[Row], config: AlternatesConfig, *, workers: Workers = ONE_PROCESS
) -> list[list[str]]:
    """For each row up to `per_row` alternates, none blank, none the answer itself, none twice (case and spaces aside)."""
    found: list[list[str]] = [[] for _ in rows]
    for attempt in range(config.attempts):
        asked = [place for place, has in enumerate(found) for _ in range(config.per_row - len(has))]
        if not asked:
            break
        said = generate(
            model,
            [filled(config.template, rows[place]) for place in asked],
            prompt=config.prompt,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            workers=workers,
            choose=Sampler(config.temperature, (config.seed, attempt)),
        )
        for place, text in zip(asked, said, strict=True):
            line = text.strip().partition("\n")[0].strip()
            if line and _plain(line) not in map(_plain, [rows[place].output, *found[place]]):
                found[place].append(line)
    return found


def run_alternates(config: AlternatesConfig) -> Path:
    """Write `alternates.jsonl`, an object a row with `id` and `alternates`, into `config.out`; returns its path.

    Raises:
        UserError: whatever the user can mend, before the model is loaded wherever that is possible; and rows that have no
            alternate after all attempts, once the others are written.
    """
    rows = load_rows(config.rows, columns=config.columns)
    acc = accelerator(cpu=config.model.device == "cpu")
    model = load_here(acc, config.model)
    with together(acc):
        if acc.is_main_process:
            facts = {"rows": data_hash(rows), "weights": fingerprint(model), "devices": launch_facts(acc)}
            RunFolder.create(config.out, config, facts=facts)
    run = RunFolder(config.out, main=acc.is_main_process)
    found = invent(model, rows, config, workers=Workers(acc.process_index, acc.num_processes))
    path = run.path / ALTERNATES
    if acc.is_main_process:
        lines = [{"id": row.id, "alternates": texts} for row, texts in zip(rows, found, strict=True) if texts]
        write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        run.finish(alternates=sum(map(len, found)), rows_without=len(rows) - len(lines))
    acc.wait_for_everyone()
    without = [row.id for row, texts in zip(rows, found, strict=True) if not texts]
    if without:
        raise UserError(
            f"{len(without)} of {len(rows)} rows have no alternate, {without[0]} first (the others' are in {path}): raise "
            "attempts or temperature, or ask another model"
        )
    return path


def filled(template: str, row: Row) -> str:
    """The template with a row's question and answer in it."""
    texts = {"{question}": row.input, "{answer}": row.output}
    return re.sub(r"\{question\}|\{answer\}", lambda place: texts[place.group()], template)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
