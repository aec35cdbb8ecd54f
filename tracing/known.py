"""Which facts a model knows, so that there is something to trace: found before any cell is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from lm.errors import UserError
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from lm.run_folder import progress as progress_bar
from tracing.corruption.noise import Corruption, Corruptor
from tracing.effects.table import Skipped
from tracing.engine.estimate import trunk_row_bytes
from tracing.engine.reference import total_effect
from tracing.question.encoded_fact import EncodedFact, make_probe, why_too_long, why_unknown, why_unscored
from tracing.question.facts import Fact, in_turn, with_foils
from tracing.question.metrics import Metric
from tracing.question.sweep import Sweep


class NothingToTrace(UserError):
    """No fact is left: the model knows none, or the corruption takes nothing or fits none."""


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
    memory: float = 2.0,
    show: bool = False,
) -> tuple[list[EncodedFact], list[Skipped], Corruptor]:
    """The facts that the model knows (or `only` these), those left out, and the corruption measured on all.

    `memory`, `max_facts`, `seed`: see `tracing.trace`; by default the first ones. Raises UserError if none is known.
    """
    metrics = (metric, *also_metrics)
    if "logit_difference" in metrics:
        facts = with_foils(facts)
    probes = [make_probe(model, fact, prompt, *metrics) for fact in facts]
    corruptor = corruption.bind(model, probes)
    asked = None if only is None else Counter(only)

    def why_small(probe: EncodedFact) -> str | None:
        if least_total is None:
            return None
        each = trunk_row_bytes(model, len(probe.input_ids), len(probe.answer_ids), Sweep(metric=metric))
        found = total_effect(model, probe, corruptor.batch(probe), metric, rows=int(memory * 1e9) // each)
        return (
            f"the corruption takes only {found:.3g}, under least_total {least_total:g}" if found < least_total else None
        )

    def why_not(probe: EncodedFact) -> str | None:
        without = why_too_long(model, probe) or corruptor.why_not(probe) or why_unscored(probe, metrics)
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
) -> tuple[list[EncodedFact], list[Skipped]]:
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
        model,
        probes,
        lambda probe: why_too_long(model, probe) or why_unscored(probe, [metric]) or why_unknown(model, probe),
        max_facts,
        show,
    )


def _sort_out(
    model: LanguageModel,
    probes: Sequence[EncodedFact],
    why_not: Callable[[EncodedFact], str | None],
    max_facts: int | None,
    show: bool,
    asked: Counter[Fact] | None = None,
    seed: int | None = None,
) -> tuple[list[EncodedFact], list[Skipped]]:
    """The facts (only those `asked` for, each as often as it is) against which there is nothing to say, up to `max_facts` (the
    first, or drawn in turn by `seed`); all others with reasons. Both in the order given."""
    reasons: dict[int, str | None] = {}
    order: Sequence[int] = range(len(probes))
    still = Counter(asked or ())
    if max_facts is not None and seed is not None:
        order = in_turn([probe.fact for probe in probes], seed)
    known = 0
    with progress_bar(len(probes), label="known facts", unit="facts", enabled=show) as advance:
        for place in order:
            if max_facts is not None and known >= max_facts:
                reason: str | None = f"not needed: max_facts is {max_facts}"
            elif asked is not None and not still[probes[place].fact]:
                reason = "not one of the facts asked for"
            else:
                reason = why_not(probes[place])
                still[probes[place].fact] -= 1
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


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Eval mode while the context is open, then what it was."""
    training = model.model.training
    model.model.train(False)
    try:
        yield
    finally:
        model.model.train(training)
