"""One invention of alternates as data: which model is asked for other answers to which rows, and how it samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lm.errors import UserError
from lm.model import ModelSpec
from lm.prompts import PromptSpec

HELP = """Invent other answers to the rows to be forgotten, for the objectives that learn one instead (AltPO and its kin).

palimpsest alternates --config builtin --out runs/alternates
palimpsest unlearn --objective DPO --alternates AlternateFile --alternates.path runs/alternates/alternates.jsonl
accelerate launch -m palimpsest alternates --config builtin --out runs/alternates
"""
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
    resume: bool = False
    """Go on with the run in `out`: what was drawn is not drawn again."""

    def __post_init__(self) -> None:
        for name in ("per_row", "attempts", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: give a positive number (1 is usual)")
        lacks = [place for place in ("{question}", "{answer}") if place not in self.template]
        if lacks:
            raise UserError(f"the template lacks {lacks[0]}: put it where the row's text belongs")
