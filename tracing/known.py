"""Which facts a model knows, so that there is something to trace: found before any cell is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lm.errors import UserError
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from lm.run_folder import progress as progress_bar
from tracing.corruption.noise import Corruptor
from tracing.effects.table import Skipped
from tracing.engine.estimate import trunk_row_bytes
from tracing.engine.reference import total_effect
from tracing.question.encoded_fact import EncodedFact, encode_fact, why_too_long, why_unknown, why_unscored
from tracing.question.facts import Fact, in_turn, with_foils
from tracing.question.metrics import MetricName, metric_of
from tracing.question.sweep import Sweep
from tracing.settings import TraceSettings


class NothingToTrace(UserError):
    """No fact is left: the model knows none, or the corruption takes nothing or fits none."""


def prepare(
    model: LanguageModel,
    facts: Sequence[Fact],
    settings: TraceSettings,
) -> tuple[list[EncodedFact], list[Skipped], Corruptor]:
    """The facts that the model knows (or `only` those of the settings), those left out, and the corruption measured on all.

    Raises UserError if none is known.
    """
    metrics, least_total, only = settings.sweep.metrics, settings.least_total, settings.only
    if any(metric_of(name).needs_foil for name in metrics):
        facts = with_foils(facts)
    encoded_facts = [encode_fact(model, fact, settings.prompt, *metrics) for fact in facts]
    corruptor = settings.corruption.bind(model, encoded_facts)
    wanted = None if only is None else Counter(only)

    def why_small(encoded: EncodedFact) -> str | None:
        if least_total is None:
            return None
        each = trunk_row_bytes(model, len(encoded.input_ids), len(encoded.answer_ids), Sweep(metric=settings.metric))
        taken = total_effect(model, encoded, corruptor.batch(encoded), settings.metric, rows=settings.bytes // each)
        return (
            f"the corruption takes only {taken:.3g}, under least_total {least_total:g}" if taken < least_total else None
        )

    def why_not(encoded: EncodedFact) -> str | None:
        without = why_too_long(model, encoded) or corruptor.why_not(encoded) or why_unscored(encoded, metrics)
        return without or (why_unknown(model, encoded) if wanted is None else None) or why_small(encoded)

    kept, skipped = _sort_out(model, encoded_facts, why_not, settings.max_facts, settings.show, wanted, settings.seed)
    return kept, skipped, corruptor


def known_facts(
    model: LanguageModel,
    facts: Sequence[Fact],
    prompt: PromptSpec,
    *,
    metric: MetricName = "log_probability",
    max_facts: int | None = None,
    show: bool = False,
) -> tuple[list[EncodedFact], list[Skipped]]:
    """`prepare` without a corruption: the facts that the model knows, and those left out.

    Raises:
        UserError: no facts, or none that the model knows.
    """
    if not facts:
        raise UserError("there are no facts to locate: give at least one")
    if metric_of(metric).needs_foil:
        facts = with_foils(facts)
    encoded_facts = [encode_fact(model, fact, prompt, metric) for fact in facts]
    return _sort_out(
        model,
        encoded_facts,
        lambda encoded: why_too_long(model, encoded) or why_unscored(encoded, [metric]) or why_unknown(model, encoded),
        max_facts,
        show,
    )


def _sort_out(
    model: LanguageModel,
    encoded_facts: Sequence[EncodedFact],
    why_not: Callable[[EncodedFact], str | None],
    max_facts: int | None,
    show: bool,
    wanted: Counter[Fact] | None = None,
    seed: int | None = None,
) -> tuple[list[EncodedFact], list[Skipped]]:
    """The facts (only those `wanted`, each as often as it is) against which there is nothing to say, up to `max_facts` (the
    first, or drawn in turn by `seed`); all others with reasons. Both in the order given."""
    reasons: dict[int, str | None] = {}
    order: Sequence[int] = range(len(encoded_facts))
    wanted_still = Counter(wanted or ())
    if max_facts is not None and seed is not None:
        order = in_turn([encoded.fact for encoded in encoded_facts], seed)
    known = 0
    with progress_bar(len(encoded_facts), label="known facts", unit="facts", enabled=show) as advance:
        for index in order:
            if max_facts is not None and known >= max_facts:
                reason: str | None = f"not needed: max_facts is {max_facts}"
            elif wanted is not None and not wanted_still[encoded_facts[index].fact]:
                reason = "not one of the facts asked for"
            else:
                reason = why_not(encoded_facts[index])
                wanted_still[encoded_facts[index].fact] -= 1
            reasons[index] = reason
            known += reason is None
            advance(1)
    reasoned = [(encoded, reasons[index]) for index, encoded in enumerate(encoded_facts)]
    skipped = [Skipped(fact=encoded.fact, reason=reason) for encoded, reason in reasoned if reason is not None]
    if not known:
        first = next((skip for skip in skipped if wanted is None or skip.fact in wanted), skipped[0])
        if wanted is not None:
            raise NothingToTrace(
                f"none of the facts asked for can be traced (the first, {first.fact.label!r}: {first.reason})"
            )
        raise NothingToTrace(
            f"none of the {len(encoded_facts)} facts can be traced in {model.name} (the first, {first.fact.label!r}: "
            f"{first.reason}): give facts that it answers word for word, in the prompt format it was trained on, and that the "
            "corruption fits"
        )
    return [encoded for encoded, reason in reasoned if reason is None], skipped


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Eval mode while the context is open, then what it was."""
    training = model.model.training
    model.model.train(False)
    try:
        yield
    finally:
        model.model.train(training)
