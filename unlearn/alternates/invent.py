"""Invent other answers: the model itself is asked, by example, for an answer to each question that says something else.

They are the alternates of AltPO (Mekala et al. 2024, arXiv 2409.13474): of the same domain and style as what is to be
forgotten, and wrong. The model samples; each row has randomness of its own, so the text depends on the seed alone. Badge:
**variant**: the paper's prompt is its authors', this one is ours. Learning them is `unlearn.alternates.base.AlternateFile`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lm.data.rows import Row
from lm.model import LanguageModel
from lm.run_folder import write_json
from unlearn.alternates.config import AlternatesConfig
from unlearn.generation.batching import ONE_PROCESS, Workers
from unlearn.generation.generate import generate

_BATCHES = 16
"""Batches after which what was drawn is kept."""


@dataclass(frozen=True)
class Sampler:
    """Tokens drawn from `softmax(logits / temperature)`: the largest logit after Gumbel noise.

    The noise is that of the seed, the prompt and the place in its answer, so neither batches nor processes matter.
    """

    temperature: float
    seed: tuple[int, ...]
    first: int = 0
    """What the first prompt counts as, where the prompts are a part of more."""

    def __call__(self, logits: Tensor, prompts: Sequence[int], said: int) -> Tensor:
        """(n,) token ids from (n, vocabulary) logits."""
        size = logits.shape[1]
        noise = np.stack(
            [np.random.default_rng((*self.seed, self.first + prompt, said)).gumbel(size=size) for prompt in prompts]
        )
        return (logits.double() / self.temperature + torch.from_numpy(noise).to(logits.device)).argmax(dim=-1)


def invent(
    model: LanguageModel,
    rows: Sequence[Row],
    config: AlternatesConfig,
    *,
    workers: Workers = ONE_PROCESS,
    drafts: Path | None = None,
) -> list[list[str]]:
    """For each row up to `per_row` alternates, none blank, none the answer itself, none twice (case and spaces aside).

    Args:
        drafts: a folder, of the same model, rows and settings, that keeps what was drawn: what is there is not drawn again.
    """
    invented: list[list[str]] = [[] for _ in rows]
    for attempt in range(config.attempts):
        wanting = [row for row, has in enumerate(invented) for _ in range(config.per_row - len(has))]
        if not wanting:
            break
        size, texts = _BATCHES * config.batch_size, list[str]()
        for first in range(0, len(wanting), size):
            part = wanting[first : first + size]
            kept = None if drafts is None else drafts / f"attempt-{attempt}-{first:07d}.json"
            said = _read(kept, len(part))
            if said is None:
                said = generate(
                    model,
                    [filled(config.template, rows[row]) for row in part],
                    prompt=config.prompt,
                    max_new_tokens=config.max_new_tokens,
                    batch_size=config.batch_size,
                    workers=workers,
                    choose=Sampler(config.temperature, (config.seed, attempt), first),
                )
                if kept is not None and workers.index == 0:
                    write_json(kept, said, private=True)
            texts += said
        for row, text in zip(wanting, texts, strict=True):
            line = text.strip().partition("\n")[0].strip()
            if line and _plain(line) not in map(_plain, [rows[row].output, *invented[row]]):
                invented[row].append(line)
    return invented


def _read(path: Path | None, count: int) -> list[str] | None:
    """So many texts that were drawn before; None if they are not there whole."""
    try:
        texts = json.loads(path.read_text(encoding="utf-8")) if path is not None else None
    except (OSError, ValueError):
        return None
    whole = isinstance(texts, list) and len(texts) == count and all(isinstance(text, str) for text in texts)
    return texts if whole else None


def filled(template: str, row: Row) -> str:
    """The template with a row's question and answer in it."""
    texts = {"{question}": row.input, "{answer}": row.output}
    return re.sub(r"\{question\}|\{answer\}", lambda place: texts[place.group()], template)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
