"""The stage that measures how deep unlearning goes: facts, three models, one number with its interval. Wiring only.

Where facts are read from is the script's business, as in `tracing.stages.trace.stage`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lm.errors import UserError
from lm.loading import load
from lm.model import ModelSpec
from lm.prompts import PromptSpec
from lm.run_folder import RunFolder, peak_memory_bytes, write_json
from tracing.depth import DepthMetric, DepthReport, Scope, lost_with, streams_for
from tracing.known import evaluating, known_facts
from tracing.question.facts import Fact, facts_hash
from tracing.stages.trace.stage import drawn


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """An unlearned model, the one it was made from, one that never learned the facts, and the facts."""

    model: ModelSpec = field(default_factory=ModelSpec)
    """The unlearned model."""
    original: ModelSpec = field(default_factory=ModelSpec)
    """The model that memorized the facts."""
    never: ModelSpec = field(default_factory=lambda: ModelSpec(path="builtin:retain_model"))
    """One of the same shape that never learned them (trained on what is to be kept alone)."""
    facts: tuple[str, ...] | str = ("builtin:forget",)
    """What to ask; see `TraceConfig`."""
    columns: dict[str, str] | None = None
    """For row files with other column names: our field -> their column, e.g. {"input": "question", "output": "answer"}."""
    tasks: tuple[str, ...] = ("Task2",)
    """Only rows of these tasks. Empty: all."""
    subject: str | None = None
    """A regular expression for the subject of a question; see `TraceConfig`."""
    leave_out_unnamed: bool = False
    """Leave out questions whose subject is not found instead of refusing the file."""
    max_facts: int | None = None
    """So many facts that the original knows, drawn at random with `seed`; null takes all."""
    prompt: PromptSpec = field(default_factory=PromptSpec)
    """How questions are rendered: as they are trained."""
    metric: DepthMetric = "distinguishing_log_probability"
    """What is scored: the answer's names and numbers, or all of it."""
    scope: Scope = "answer"
    """Whose stream is put in: that of the tokens that say the answer, or of all."""
    threshold: float = 0.05
    """A layer counts where the model that never learned loses more than so many nats a scored token."""
    seed: int = 0
    """Of the drawn facts and the resampling."""
    out: str = "runs/depth"
    """The run folder."""
    resume: bool = False
    """Measure again in `out`, where a run with these settings broke off."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("facts is empty; name at least one source, such as builtin:forget")
        if self.max_facts is not None and self.max_facts < 1:
            raise UserError(f"max_facts is {self.max_facts}; give at least 1, or null")
        if not self.threshold >= 0:
            raise UserError(f"threshold is {self.threshold}; give 0 or more nats (0.05 is usual)")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; give 0 or more")

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of facts, always as a tuple."""
        return (self.facts,) if isinstance(self.facts, str) else self.facts


def run_depth(config: DepthConfig, facts: Sequence[Fact]) -> DepthReport:
    """Measure as the config says, with two models in memory at a time; writes `depth.json` into `config.out`.

    Raises UserError for whatever the user can mend.
    """
    started = time.monotonic()
    original = load(config.original)
    about = {"facts": {"count": len(facts), "sha256": facts_hash(facts)}}
    run = RunFolder.create(config.out, config, resume=config.resume, facts=about, same=("facts",))
    with evaluating(original):
        known, skipped = known_facts(
            original,
            drawn(facts, config.max_facts, config.seed),
            config.prompt,
            metric=config.metric,
            max_facts=config.max_facts,
            show=True,
        )
    sources = [
        streams_for(load(spec), original, known, config.prompt, config.metric, config.scope)
        for spec in (config.never, config.model)
    ]
    lost = np.stack(
        [
            lost_with(original, probe, given, config.metric, config.scope)
            for probe, *given in zip(known, *sources, strict=True)
        ]
    )
    report = DepthReport(
        facts=tuple(probe.fact for probe in known), never=lost[:, 0], changed=lost[:, 1], threshold=config.threshold
    )
    left = {one.fact.label: one.reason for one in skipped}
    write_json(run.path / "depth.json", {**report.to_json(), "left_out": left})
    run.finish(seconds=time.monotonic() - started, peak_memory_bytes=peak_memory_bytes())
    return report
