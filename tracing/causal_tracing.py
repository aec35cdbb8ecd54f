"""`trace`: ask which activations bring a corrupted answer back, for many facts, and keep what is finished.

This finds the facts that the model knows, measures the noise, and hands facts of one shape to an engine until all are finished.
The published loop over kinds, tokens and layers of one fact is `tracing.engine.reference`; the exact fast engine, which gives the
same numbers, is `tracing.engine.wavefront`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lm.anatomy import Kind
from lm.errors import UserError
from lm.model import LanguageModel, fingerprint
from lm.prompts import PromptSpec
from lm.run_folder import progress as progress_bar
from tracing.corruption.noise import Corruption, Corruptor, GaussianNoise
from tracing.effects.effects import Effects
from tracing.effects.table import Skipped
from tracing.engine.engines import Engine, make_engine
from tracing.engine.estimate import Estimate, alike, estimated
from tracing.engine.fact_cache import FactCache
from tracing.engine.reference import Traced
from tracing.known import evaluating, prepare
from tracing.question.encoded_fact import EncodedFact
from tracing.question.facts import Fact
from tracing.question.metrics import MetricName
from tracing.question.sweep import Positions, Severed, Sweep, count_cells
from tracing.settings import TraceSettings, Workers, settings_or


def trace(
    model: LanguageModel,
    facts: Sequence[Fact],
    settings: TraceSettings | None = None,
    *,
    corruption: Corruption = GaussianNoise(),  # noqa: B008 (frozen)
    kinds: Sequence[Kind] = ("resid", "mlp", "attn"),
    window: int = 1,
    metric: MetricName = "probability",
    engine: str = "wavefront",
    prompt: PromptSpec = PromptSpec(),  # noqa: B008 (frozen)
    positions: Positions = "all",
    also_metrics: Sequence[MetricName] = (),
    sever: Severed | None = None,
    memory: float = 2.0,
    max_facts: int | None = None,
    seed: int | None = 0,
    least_total: float | None = None,
    only: Collection[Fact] | None = None,
    cache: str | Path | None = None,
    workers: Workers = Workers(),  # noqa: B008 (frozen)
    progress: bool = True,
) -> Effects:
    """Causal mediation analysis of facts: which restored activation brings the answer back?

    A fact the model does not answer by greedy decoding (the whole answer, or its first token for
    `first_token_probability`) is left out and listed with its reason in `Effects.skipped`.

    Args:
        model: from `lm.load`; it is put in eval mode meanwhile.
        facts: what is asked. The noise is measured on the subjects of all of them, known or not, as published.
        settings: all of the following as one value; then none of them is given beside it.
        corruption: how the subject is made unreadable.
        kinds: which activations are restored: `resid` (the stream after a block), `mlp`, `attn` (what they add to it).
        window: how many layers of mlp and attn are restored together; see `tracing.question.sweep.Sweep`.
        metric: what is read off; see `tracing.question.metrics`.
        engine: `wavefront`, exact and fast; or `reference`, the published procedure, one forward pass a cell.
        prompt: raw or chat, as in training; `append_eos` is ignored (EOS is not part of the scored answer).
        positions: which prompt tokens are restored: `all`, `subject_and_after`, or `subject_and_last`.
        also_metrics: further metrics, read off the same passes: `Effects.also`. A fact must be known whole as soon as one metric
            reads it whole, and must have a foil if one needs it.
        sever: hold all MLPs, or all attention layers, at the restored token at their corrupted values; see `Sweep`.
        memory: gigabytes (10^9 bytes) that the wavefront may take beside the model, about: half for the ordinary passes that the
            cells leave from, half for the cells. Where a GPU runs out all the same, both are halved until it does not.
        max_facts: trace only so many of the known facts, drawn so that each subject (or group) has its turn before any has a
            second one; the others are listed as left out.
        seed: of that draw; None takes the first ones, of facts that are drawn already.
        least_total: leave out, before any cell is computed, facts of which the corruption takes less than this (the total effect,
            in units of the metric): dividing by it, or averaging over it, tells nothing.
        only: trace exactly these of the facts, whether or not the model still answers them; the others lend the measure of the
            noise and their names, and are listed as left out.
        cache: a folder for finished facts. A trace that was interrupted goes on there and ends in the same numbers, to
            rounding where facts that would have shared a wave are divided.
        workers: other processes that run this same call: every so-manieth fact is traced by each, through `cache`, and
            all return the same effects.
        progress: show cells done, rate and time left.

    Returns:
        `Effects`: `clean` and `corrupted` are (facts,) float64 arrays, `restored[kind]` holds one (prompt tokens, layers) float64
        array a fact, in units of the metric; `summary()` says them in sentences, `tracing.choose_layers` draws a plan from them.

    Raises:
        UserError: nothing to trace, no fact is known, a subject that cannot be found, NaN, a wrong setting.

    Example:
        >>> import lm, tracing
        >>> from lm.row_files import load_rows
        >>> model = lm.load("builtin", device="cpu")
        >>> facts = tracing.facts_from_rows([row for row in load_rows("builtin:forget") if row.task == "Task2"])
        >>> settings = {"kinds": ["mlp"], "positions": "subject_and_last", "max_facts": 2, "progress": False}
        >>> effects = tracing.trace(model, facts, metric="log_probability", **settings)
        >>> effects.clean.shape, effects.kinds
        ((2,), ('mlp',))
        >>> effects.restored["mlp"][0].shape == (len(effects.tokens[0]), effects.layers)
        True
    """
    settings = settings_or(
        settings,
        TraceSettings(
            corruption=corruption,
            kinds=kinds,
            window=window,
            metric=metric,
            engine=engine,
            prompt=prompt,
            positions=positions,
            also_metrics=also_metrics,
            sever=sever,
            memory=memory,
            max_facts=max_facts,
            seed=seed,
            least_total=least_total,
            only=only,
            cache=cache,
            workers=workers,
            progress=progress,
        ),
    )
    sweep = settings.sweep
    with evaluating(model):
        begun = _begin(model, facts, settings)
        if settings.show:
            print(f"trace: {begun.estimate(model)}", file=sys.stderr)
        traced = _trace_all(model, begun, settings.show)

    effects = Effects(
        facts=tuple(encoded.fact for encoded in begun.known),
        **_scores(traced, sweep.kinds),
        tokens=tuple(encoded.tokens for encoded in begun.known),
        subject_spans=tuple(encoded.span for encoded in begun.known),
        sigma=begun.corruptor.sigma,
        metric=settings.metric,
        window=settings.window,
        skipped=begun.skipped,
        provenance={
            "model": model.name,
            "architecture": model.anatomy.architecture,
            "weights": begun.weights,
            "engine": settings.engine,
            "corruption": {"kind": type(settings.corruption).__name__, **asdict(settings.corruption)},
            "prompt": asdict(settings.prompt),
            "positions": settings.positions,
            "sever": settings.sever,
            "facts_given": len(begun.known) + len(begun.skipped),
            "max_facts": settings.max_facts,
            "max_facts_seed": settings.seed if settings.max_facts is not None else None,
            "least_total": settings.least_total,
        },
    )
    also: dict[str, Effects] = {
        other: replace(effects, metric=other, **_scores([fact.also[other] for fact in traced], sweep.kinds))
        for other in sweep.also
    }
    return replace(effects, also=also)


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """All that is settled before the first cell is computed."""

    sweep: Sweep
    known: tuple[EncodedFact, ...]
    skipped: tuple[Skipped, ...]
    corruptor: Corruptor
    weights: str
    cache: FactCache
    engine: Engine
    finished: tuple[Traced | None, ...]
    """Of the known facts, what the cache has."""
    workers: Workers

    def estimate(self, model: LanguageModel) -> Estimate:
        """What the facts that are not finished take."""
        left = [[self.known[index] for index in group if self.finished[index] is None] for group in self.groups()]
        groups = [group for group in left if group]
        return estimated(model, groups, self.corruptor, self.sweep, self.engine, self.workers.count)

    def groups(self) -> list[list[int]]:
        """The known facts, by their places, that are traced together: whatever is finished, and by whatever worker."""
        return list(alike(self.known, [self.corruptor.rows(encoded) for encoded in self.known], self.engine))


def _begin(model: LanguageModel, facts: Sequence[Fact], settings: TraceSettings) -> _Begun:
    """Find the facts that the model knows, and look up what is finished; the model in eval mode."""
    facts = list(facts)
    if not facts:
        raise UserError("there are no facts to trace: give at least one")
    known, skipped, corruptor = prepare(model, facts, settings)
    sweep, weights = settings.sweep, fingerprint(model)
    folder = None if settings.cache is None else Path(settings.cache)
    cache = FactCache(folder, weights, corruptor, sweep, settings.engine)
    return _Begun(
        sweep=sweep,
        known=tuple(known),
        skipped=tuple(skipped),
        corruptor=corruptor,
        weights=weights,
        cache=cache,
        engine=make_engine(settings.engine, model, sweep, settings.bytes),
        finished=tuple(cache.load(encoded) for encoded in known),
        workers=settings.workers,
    )


def estimate(
    model: LanguageModel,
    facts: Sequence[Fact],
    settings: TraceSettings | None = None,
    *,
    corruption: Corruption = GaussianNoise(),  # noqa: B008 (frozen)
    kinds: Sequence[Kind] = ("resid", "mlp", "attn"),
    window: int = 1,
    metric: MetricName = "probability",
    engine: str = "wavefront",
    prompt: PromptSpec = PromptSpec(),  # noqa: B008 (frozen)
    positions: Positions = "all",
    also_metrics: Sequence[MetricName] = (),
    sever: Severed | None = None,
    memory: float = 2.0,
    max_facts: int | None = None,
    seed: int | None = 0,
    least_total: float | None = None,
    only: Collection[Fact] | None = None,
    cache: str | Path | None = None,
    workers: Workers = Workers(),  # noqa: B008 (frozen)
    progress: bool = True,
) -> Estimate:
    """What `trace` with the same arguments takes, without its sweep: cells, passes, rows, bytes, seconds.

    Which facts the model knows is found out, a forward pass or a few each; no cell is computed, nothing is written, and
    facts that are finished in `cache` are left out. Raises what `trace` raises before its sweep.
    """
    settings = settings_or(
        settings,
        TraceSettings(
            corruption=corruption,
            kinds=kinds,
            window=window,
            metric=metric,
            engine=engine,
            prompt=prompt,
            positions=positions,
            also_metrics=also_metrics,
            sever=sever,
            memory=memory,
            max_facts=max_facts,
            seed=seed,
            least_total=least_total,
            only=only,
            cache=cache,
            workers=workers,
            progress=progress,
        ),
    )
    with evaluating(model):
        return _begin(model, facts, settings).estimate(model)


def _scores(traced: Sequence[Traced], kinds: Sequence[Kind]) -> dict[str, Any]:
    """The scores of all facts, as `Effects` has them."""
    return {
        "clean": np.array([fact.clean for fact in traced]),
        "corrupted": np.array([fact.corrupted for fact in traced]),
        "restored": {kind: [fact.restored[kind] for fact in traced] for kind in kinds},
    }


def _trace_all(model: LanguageModel, begun: _Begun, show: bool) -> list[Traced]:
    """Every fact's cells, those that are not finished computed; with several workers each adds its share to the cache.

    Which facts are computed together does not depend on the number of workers, so that the last bits do not either.
    """
    encoded_facts, corruptor, engine, cache, workers = (
        begun.known,
        begun.corruptor,
        begun.engine,
        begun.cache,
        begun.workers,
    )
    results = list(begun.finished)
    mine = begun.groups()[workers.index :: workers.count]
    cells = {
        index: count_cells(encoded_facts[index], model.anatomy.layers, begun.sweep) for group in mine for index in group
    }
    done = sum(count for index, count in cells.items() if results[index] is not None)
    with progress_bar(sum(cells.values()), label="trace", unit="cells", done=done, enabled=show) as advance:
        for group in mine:
            missing = [index for index in group if results[index] is None]
            if not missing:
                continue
            batches = [corruptor.batch(encoded_facts[index]) for index in missing]
            fresh = engine.trace([encoded_facts[index] for index in missing], batches, advance)
            for index, result in zip(missing, fresh, strict=True):
                cache.store(encoded_facts[index], result)
                results[index] = result
    workers.wait()
    traced = [result or cache.load(encoded) for result, encoded in zip(results, encoded_facts, strict=True)]
    lost = [encoded.fact.label for encoded, result in zip(encoded_facts, traced, strict=True) if result is None]
    if lost:
        raise UserError(
            f"another process did not leave fact {lost[0]!r} in {cache.folder}: give a folder that all can see"
        )
    return [result for result in traced if result is not None]
