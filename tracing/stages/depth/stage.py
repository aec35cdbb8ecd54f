"""The stage that measures how deep unlearning goes: facts, three models, one number with its interval. Wiring only."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from lm.loading import load
from lm.run_folder import RunFolder, peak_memory_bytes, stage, write_json
from tracing.depth import DepthReport, lost_with, streams_for
from tracing.known import evaluating, known_facts
from tracing.question.facts import Fact, drawn, facts_hash
from tracing.stages.depth.config import DepthConfig


@stage
def run_depth(config: DepthConfig, facts: Sequence[Fact] | None = None) -> DepthReport:
    """Measure as the config says, with two models in memory at a time; writes `depth.json` into `config.out`.

    Args:
        config: the whole measurement.
        facts: facts in memory; None reads those that the config names.

    Raises:
        UserError: whatever the user can mend.
    """
    started = time.monotonic()
    facts = config.facts.read() if facts is None else facts
    original = load(config.original)
    about = {"facts": {"count": len(facts), "sha256": facts_hash(facts)}}
    run = RunFolder.create(config.out, config, resume=config.resume, facts=about, same=("facts",))
    with evaluating(original):
        known, skipped = known_facts(
            original,
            drawn(facts, config.facts.max_facts, config.seed),
            config.prompt,
            metric=config.metric,
            max_facts=config.facts.max_facts,
            show=True,
        )
    sources = [
        streams_for(load(spec), original, known, config.prompt, config.metric, config.scope)
        for spec in (config.retain_model, config.model)
    ]
    lost = np.stack(
        [
            lost_with(original, encoded, streams, config.metric, config.scope)
            for encoded, *streams in zip(known, *sources, strict=True)
        ]
    )
    report = DepthReport(
        facts=tuple(encoded.fact for encoded in known),
        retain_model=lost[:, 0],
        changed=lost[:, 1],
        threshold=config.threshold,
    )
    left = {skip.fact.label: skip.why for skip in skipped}
    write_json(run.path / "depth.json", {**report.to_json(), "left_out": left}, private=True)
    run.finish(seconds=time.monotonic() - started, peak_memory_bytes=peak_memory_bytes())
    return report


def describe(config: DepthConfig, report: DepthReport) -> str:
    """What the command prints at the end."""
    return f"{report}\nwrote {config.out}/depth.json: what is lost by layer, and each fact's depth"
