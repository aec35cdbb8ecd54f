"""`trace`: ask which activations bring a corrupted answer back, for many facts, and keep what is finished.

This checks which facts the model knows, measures the noise, and hands one fact at a time to an engine. The arithmetic
of a cell is the engine's (`tracing.engines`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lm.anatomy import Kind
from lm.errors import UserError
from lm.identity import fingerprint
from lm.load import LanguageModel
from lm.prompts import PromptSpec
from lm.run import progress as progress_bar
from tracing.cache import FactCache
from tracing.corruption import Corruption, Corruptor, GaussianNoise
from tracing.cost import cost
from tracing.effects import Effects, Skipped
from tracing.engines import Engine, check_engine, make_engine
from tracing.facts import Fact, in_turn, with_foils
from tracing.metrics import Metric
from tracing.probe import Probe, forward, make_probe, why_unknown, why_unscored
from tracing.reference import Traced, total_effect
from tracing.sweep import Positions, Severed, Sweep, count_cells


@dataclass(frozen=True)
class Workers:
    """The processes that share a trace, each with the whole model: this one's number, how many, and how to wait for all."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


class NothingToTrace(UserError):
    """No fact is left: the model knows none, or the corruption takes nothing or fits none."""


def trace(
    model: LanguageModel,
    facts: Sequence[Fact],
    corruption: Corruption = GaussianNoise(),  # noqa: B008 (frozen)
    kinds: Sequence[Kind] = ("resid", "mlp", "attn"),
    window: int = 1,
    metric: Metric = "probability",
    engine: str = "wavefront",
    prompt: PromptSpec = PromptSpec(),  # noqa: B008 (frozen)
    positions: Positions = "all",
    *,
    also_metrics: Sequence[Metric] = (),
    sever: Severed | None = None,
    memory: float = 2.0,
    max_facts: int | None = None,
    seed: int | None = 0,
    least_total: float | None = None,
    only: Collection[Fact] | None = None,
    cache: str | Path | None = None,
    workers: Workers = Workers(),
    progress: bool = True,
) -> Effects:
    """Causal mediation analysis of facts: which restored activation brings the answer back?

    A fact the model does not answer by greedy decoding (the whole answer, or its first token for
    `first_token_probability`) is left out and listed with its reason in `Effects.skipped`.

    Args:
        model: from `lm.load`; it is put in eval mode meanwhile.
        facts: what is asked. The noise is measured on the subjects of all of them, known or not, as published.
        corruption: how the subject is made unreadable.
        kinds: which activations are restored: `resid` (the stream after a block), `mlp`, `attn` (what they add to it).
        window: how many layers of mlp and attn are restored together; see `tracing.sweep.Sweep`.
        metric: what is read off; see `tracing.metrics`.
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
        cache: a folder for finished facts. A trace that was interrupted goes on there and ends in the same numbers.
        workers: other processes that run this same call: every so-manieth fact is traced by each, through `cache`, and
            all return the same effects.
        progress: show cells done, rate and time left.

    Raises:
        UserError: nothing to trace, no fact is known, a subject that cannot be found, NaN, a wrong setting.
    """
    check_engine(engine)
    sweep = Sweep(
        kinds=tuple(kinds), window=window, metric=metric, positions=positions, sever=sever, also=tuple(also_metrics)
    )
    if not memory > 0:
        raise UserError(f"memory is {memory} GB; give what may be taken beside the model (2 is usual).")
    if max_facts is not None and max_facts < 1:
        raise UserError(f"max_facts is {max_facts}; give at least 1, or leave it out for all.")
    if seed is not None and seed < 0:
        raise UserError(f"seed is {seed}; give 0 or more, or None for facts that are drawn already.")
    if least_total is not None and not least_total >= 0:
        raise UserError(f"least_total is {least_total}; give 0 or more in units of the metric, or leave it out.")
    if workers.count > 1 and cache is None:
        raise UserError("several processes trace through a cache folder that all of them see; give cache.")
    facts = list(facts)
    if not facts:
        raise UserError("there are no facts to trace; give at least one.")

    show = progress and workers.index == 0
    with evaluating(model):
        known, skipped, corruptor = prepare(
            model,
            facts,
            corruption,
            metric,
            prompt,
            also_metrics=sweep.also,
            max_facts=max_facts,
            seed=seed,
            least_total=least_total,
            only=only,
            show=show,
        )
        weights = fingerprint(model)
        store = FactCache(None if cache is None else Path(cache), weights, corruptor, sweep, engine)
        worker = make_engine(engine, model, sweep, int(memory * 1e9))
        finished = [store.load(probe) for probe in known]
        if show:
            missing = [probe for probe, one in zip(known, finished, strict=True) if one is None]
            _announce(model, missing, corruptor, sweep, engine, worker, workers.count)
        traced = _trace_all(model, known, finished, corruptor, sweep, worker, store, workers, show)

    effects = Effects(
        facts=tuple(probe.fact for probe in known),
        **_scores(traced, sweep.kinds),
        tokens=tuple(probe.tokens for probe in known),
        subject_spans=tuple(probe.span for probe in known),
        sigma=corruptor.sigma,
        metric=metric,
        window=window,
        skipped=tuple(skipped),
        provenance={
            "model": model.name,
            "architecture": model.anatomy.architecture,
            "weights": weights,
            "engine": engine,
            "corruption": {"kind": type(corruption).__name__, **asdict(corruption)},
            "prompt": asdict(prompt),
            "positions": positions,
            "sever": sever,
            "facts_given": len(facts),
            "max_facts": max_facts,
            "max_facts_seed": seed if max_facts is not None else None,
            "least_total": least_total,
        },
    )
    also: dict[str, Effects] = {
        other: replace(effects, metric=other, **_scores([one.also[other] for one in traced], sweep.kinds))
        for other in sweep.also
    }
    return replace(effects, also=also)


def _scores(traced: Sequence[Traced], kinds: Sequence[Kind]) -> dict[str, Any]:
    """The scores of all facts, as `Effects` has them."""
    return {
        "clean": np.array([one.clean for one in traced]),
        "corrupted": np.array([one.corrupted for one in traced]),
        "restored": {kind: [one.restored[kind] for one in traced] for kind in kinds},
    }


def prepare(
    model: LanguageModel,
    facts: Sequence[Fact],
    corruption: Corruption,
    metric: Metric,
    prompt: PromptSpec,
    *,
    also_metrics: Sequence[Metric] = (),
    max_facts: int | None = None,
    seed: int | None = None,
    least_total: float | None = None,
    only: Collection[Fact] | None = None,
    show: bool = False,
) -> tuple[list[Probe], list[Skipped], Corruptor]:
    """The facts that the model knows (or `only` these), those left out, and the corruption measured on all.

    `max_facts`, `seed`: as in `trace`; by default the first ones.

    Raises UserError if none is known.
    """
    metrics = (metric, *also_metrics)
    if "logit_difference" in metrics:
        facts = with_foils(facts)
    probes = [make_probe(model, fact, prompt, *metrics) for fact in facts]
    corruptor = corruption.bind(model, probes)
    asked = None if only is None else frozenset(only)

    def why_small(probe: Probe) -> str | None:
        if least_total is None:
            return None
        found = total_effect(model, probe, corruptor.batch(probe), metric)
        return (
            f"the corruption takes only {found:.3g}, under least_total {least_total:g}" if found < least_total else None
        )

    def why_not(probe: Probe) -> str | None:
        without = corruptor.why_not(probe) or why_unscored(probe, metrics)
        return without or (why_unknown(model, probe) if asked is None else None) or why_small(probe)

    return *_sort_out(model, probes, why_not, max_facts, show, asked, seed), corruptor


def known_facts(
    model: LanguageModel,
    facts: Sequence[Fact],
    prompt: PromptSpec,
    *,
    metric: Metric = "log_probability",
    max_facts: int | None = None,
    show: bool = False,
) -> tuple[list[Probe], list[Skipped]]:
    """`prepare` without a corruption: the facts that the model knows, and those left out.

    Raises:
        UserError: no facts, or none that the model knows.
    """
    if not facts:
        raise UserError("there are no facts to locate; give at least one.")
    if metric == "logit_difference":
        facts = with_foils(facts)
    probes = [make_probe(model, fact, prompt, metric) for fact in facts]
    return _sort_out(
        model, probes, lambda probe: why_unscored(probe, [metric]) or why_unknown(model, probe), max_facts, show
    )


def _sort_out(
    model: LanguageModel,
    probes: Sequence[Probe],
    why_not: Callable[[Probe], str | None],
    max_facts: int | None,
    show: bool,
    asked: Collection[Fact] | None = None,
    seed: int | None = None,
) -> tuple[list[Probe], list[Skipped]]:
    """The facts (only those `asked` for) against which there is nothing to say, up to `max_facts` (the first, or drawn in turn by
    `seed`); all others with reasons. Both in the order given."""
    reasons: dict[int, str | None] = {}
    order: Sequence[int] = range(len(probes))
    if max_facts is not None and seed is not None:
        order = in_turn([probe.fact for probe in probes], seed)
    known = 0
    with progress_bar(len(probes), label="known facts", unit="facts", enabled=show) as advance:
        for place in order:
            if max_facts is not None and known >= max_facts:
                reason: str | None = f"not needed: max_facts is {max_facts}"
            elif asked is not None and probes[place].fact not in asked:
                reason = "not one of the facts asked for"
            else:
                reason = why_not(probes[place])
            reasons[place] = reason
            known += reason is None
            advance(1)
    told = [(probe, reasons[place]) for place, probe in enumerate(probes)]
    skipped = [Skipped(fact=probe.fact, reason=reason) for probe, reason in told if reason is not None]
    if not known:
        first = next((one for one in skipped if asked is None or one.fact in asked), skipped[0])
        if asked is not None:
            raise NothingToTrace(
                f"none of the facts asked for can be traced (the first, {first.fact.label!r}: {first.reason})."
            )
        raise NothingToTrace(
            f"none of the {len(probes)} facts can be traced in {model.name} (the first, {first.fact.label!r}: {first.reason}); "
            "give facts that it answers word for word, in the prompt format it was trained on, and that the corruption fits."
        )
    return [probe for probe, reason in told if reason is None], skipped


def _announce(
    model: LanguageModel,
    probes: Sequence[Probe],
    corruptor: Corruptor,
    sweep: Sweep,
    engine: str,
    worker: Engine,
    processes: int,
) -> None:
    """Say what the sweep of the facts that are not finished takes, from exact counts and one timed pass."""
    if not probes:
        print("trace: every fact is finished", file=sys.stderr)
        return
    found = cost(probes, [corruptor.rows(probe) for probe in probes], model.anatomy.layers, sweep)
    probe = max(probes, key=lambda one: len(one.input_ids))
    batch = corruptor.batch(probe)[:64]
    started = time.perf_counter()
    with torch.inference_mode():
        float(forward(model, batch, 1)[0, 0, 0])
    rate = batch.shape[0] * batch.shape[1] * model.anatomy.layers / (time.perf_counter() - started)
    wave = engine == "wavefront"
    units = found.wave if wave else found.reference
    few = f", {found.reference / found.wave:.1f} times fewer than the published loop" if wave else ""
    each = max(worker.takes(len(one.input_ids), len(one.answer_ids), corruptor.rows(one)) for one in probes)
    shared = f" in each of {processes} processes" if processes > 1 else ""
    print(
        f"trace: {len(probes)} fact{'s' if len(probes) > 1 else ''}, {found.cells:,} cells, {units:,} token-blocks{few}; about "
        f"{units / rate / processes:,.0f} s and up to {each / 1e9:.2g} GB beside the model{shared}",
        file=sys.stderr,
    )


def _trace_all(
    model: LanguageModel,
    probes: Sequence[Probe],
    finished: Sequence[Traced | None],
    corruptor: Corruptor,
    sweep: Sweep,
    engine: Engine,
    cache: FactCache,
    workers: Workers,
    show: bool,
) -> list[Traced]:
    """Every fact's cells, those that are not `finished` computed; with several workers each adds its share to the cache.

    Which facts are computed together does not depend on the number of workers, so that the last bits do not either.
    """
    found = list(finished)
    mine = list(_alike(probes, engine, corruptor))[workers.index :: workers.count]
    cells = {index: count_cells(probes[index], model.anatomy.layers, sweep) for group in mine for index in group}
    done = sum(count for index, count in cells.items() if found[index] is not None)
    with progress_bar(sum(cells.values()), label="trace", unit="cells", done=done, enabled=show) as advance:
        for group in mine:
            missing = [index for index in group if found[index] is None]
            if not missing:
                continue
            batches = [corruptor.batch(probes[index]) for index in missing]
            fresh = engine.trace([probes[index] for index in missing], batches, advance)
            for index, one in zip(missing, fresh, strict=True):
                cache.store(probes[index], one)
                found[index] = one
    workers.wait()
    traced = [one or cache.load(probe) for one, probe in zip(found, probes, strict=True)]
    lost = [probe.fact.label for probe, one in zip(probes, traced, strict=True) if one is None]
    if lost:
        raise UserError(
            f"another process did not leave fact {lost[0]!r} in {cache.folder}; give a folder that all can see."
        )
    return [one for one in traced if one is not None]


def _alike(probes: Sequence[Probe], engine: Engine, corruptor: Corruptor) -> Iterator[list[int]]:
    """The facts in groups of one shape, as many as the engine takes at once."""
    shapes: dict[tuple[int, int, int], list[int]] = {}
    for index, probe in enumerate(probes):
        shape = len(probe.prompt_ids), len(probe.answer_ids), corruptor.rows(probe)
        shapes.setdefault(shape, []).append(index)
    for (tokens, answer, samples), members in shapes.items():
        size = engine.together(tokens + answer - 1, answer, samples)
        for start in range(0, len(members), size):
            yield members[start : start + size]


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Eval mode while the context is open, then what it was."""
    training = model.model.training
    model.model.train(False)
    try:
        yield
    finally:
        model.model.train(training)
