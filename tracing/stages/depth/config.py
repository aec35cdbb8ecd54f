"""One measurement of depth as data: an unlearned model x the original x a retain model x facts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lm.errors import UserError
from lm.model import ModelSpec
from lm.prompts import PromptSpec
from tracing.depth import DepthMetric, Scope
from tracing.question.fact_source import OLD_KEYS, SHORT_KEYS, FactSource

HELP = """How deep did unlearning go? Put an unlearned model's streams into the original, layer by layer: does it still answer?

palimpsest depth --model.path runs/unlearn/model --out runs/depth
"""


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """An unlearned model, the one it was made from, a retain model, and the facts."""

    short_keys: ClassVar[dict[str, str]] = SHORT_KEYS
    old_keys: ClassVar[dict[str, str]] = {**OLD_KEYS, "never": "retain_model"}

    model: ModelSpec = field(default_factory=ModelSpec)
    """The unlearned model."""
    original: ModelSpec = field(default_factory=ModelSpec)
    """The model that memorized the facts."""
    retain_model: ModelSpec = field(default_factory=lambda: ModelSpec(path="builtin:retain_model"))
    """One of the same shape that never learned them: trained on what is to be kept alone."""
    facts: FactSource = field(default_factory=FactSource)
    """What to ask: where from, and how much of what the original knows."""
    prompt: PromptSpec = field(default_factory=PromptSpec)
    """How questions are rendered: as they are trained."""
    metric: DepthMetric = "distinguishing_log_probability"
    """What is scored: the answer's names and numbers, or all of it."""
    scope: Scope = "answer"
    """Whose stream is put in: that of the tokens that say the answer, or of all."""
    threshold: float = 0.05
    """A layer counts where the stream of the retain model loses more than so many nats a scored token."""
    seed: int = 0
    """Of the drawn facts and the resampling."""
    out: str = "runs/depth"
    """The run folder."""
    resume: bool = False
    """Measure again in `out`, where a run with these settings broke off."""

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise UserError(f"threshold is {self.threshold}: give 0 or more nats (0.05 is usual)")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: give 0 or more")
