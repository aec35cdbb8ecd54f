"""Trace the same facts again, in a model that was changed since: what is left of the effects?

Everything is taken from the effects of the first trace: the facts (whether or not the changed model still answers them), the
noise in absolute units with the same draws, or the same other names, the metric, the prompt format and the cells. What differs
between the two is then the model alone. Comparing them is `tracing.difference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from lm.anatomy import Kind
from lm.errors import UserError
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from tracing.causal_tracing import trace
from tracing.corruption.noise import Corruption, GaussianNoise, embedding_spread
from tracing.corruption.replacement import TokenReplacement
from tracing.effects.effects import Effects
from tracing.question.encoded_fact import encode_fact
from tracing.question.metrics import MetricName, metric_of
from tracing.settings import TraceSettings, Workers


def retrace(
    model: LanguageModel,
    before: Effects,
    *,
    kinds: Sequence[Kind] | None = None,
    engine: str | None = None,
    memory: float = 2.0,
    cache: str | Path | None = None,
    workers: Workers = Workers(),  # noqa: B008 (frozen)
    progress: bool = True,
) -> Effects:
    """Trace the facts of `before` in `model`, as they were traced before.

    Args:
        model: the changed model: of the same layers, with the same tokenizer.
        before: effects that `trace` gave, of the model before it was changed.
        kinds: only these of the kinds that were traced; None for all.
        engine, memory, cache, workers, progress: see `tracing.trace`; the engine is that of before if None.

    Returns:
        Effects of the same facts in the same order.

    Raises:
        UserError: effects that do not say how they were made, a model that they cannot be compared with, and what `trace` raises.
    """
    if metric_of(before.metric).needs_clean:
        raise UserError(
            f"{before.metric} compares a model with its own clean answers, known or not, so that it cannot tell what was "
            "forgotten: give effects of another metric"
        )
    first = _provenance(before)
    prompt = PromptSpec(**first["prompt"])
    _check_model(model, before, prompt)
    settings = TraceSettings(
        corruption=_repeated(model, before, first["corruption"]),
        kinds=before.kinds if kinds is None else tuple(kinds),
        window=before.window,
        metric=cast(MetricName, before.metric),  # `trace` checks it
        engine=first["engine"] if engine is None else engine,
        prompt=prompt,
        positions=first["positions"],
        sever=first["sever"],
        memory=memory,
        only=before.facts,
        cache=cache,
        workers=workers,
        progress=progress,
    )
    after = trace(model, [*before.facts, *(skipped.fact for skipped in before.skipped)], settings)
    return replace(after, provenance={**after.provenance, "before": first["weights"]})


def _provenance(before: Effects) -> dict[str, Any]:
    needed = ("corruption", "prompt", "engine", "positions", "sever", "weights")
    missing = [name for name in needed if name not in before.provenance]
    if missing:
        raise UserError(
            f"the effects of before do not say their {' and '.join(missing)}: trace the model of before again"
        )
    return {name: before.provenance[name] for name in needed}


def _check_model(model: LanguageModel, before: Effects, prompt: PromptSpec) -> None:
    if model.anatomy.layers != before.layers:
        raise UserError(
            f"{model.name} has {model.anatomy.layers} layers and the effects of before {before.layers}: give a changed version "
            "of the model that was traced"
        )
    for fact, tokens, span in zip(before.facts, before.tokens, before.subject_spans, strict=True):
        encoded = encode_fact(model, fact, prompt, cast(MetricName, before.metric))
        if (encoded.tokens, encoded.span) != (tokens, span):
            raise UserError(
                f"{model.name} cuts fact {fact.label!r} into other tokens than before: give the model the same tokenizer"
            )


def _repeated(model: LanguageModel, before: Effects, described: dict[str, Any]) -> Corruption:
    """The corruption of before, with its noise in absolute units."""
    settings = {name: value for name, value in described.items() if name != "kind"}
    if described["kind"] == TokenReplacement.__name__:
        return TokenReplacement(**settings)
    if described["kind"] != GaussianNoise.__name__:
        raise UserError(
            f"the effects of before were made by {described['kind']}, which cannot be repeated from a file: trace anew"
        )
    noise = GaussianNoise(**settings)
    if noise.covariance == "isotropic":
        return replace(noise, sigma=before.sigma)
    if noise.sigmas * embedding_spread(model) != before.sigma:
        raise UserError(
            f"the noise of before had the covariance of embeddings that {model.name} no longer has: trace with "
            "covariance: isotropic, which can be repeated in absolute units"
        )
    return noise
