"""The report's vocabulary: numbers, layers, roles and terms as words. Pure functions from values to text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from unlearn.evaluation.scores.lume import LUME_TERMS, TASK_WORDS
from unlearn.report.records import ReportModel

DASH = "–"
TASKS = TASK_WORDS
TRAINED = "Which layers were trained, counted from 0."
SECONDS = "Wall-clock time of training (if any) and scoring."
KINDS = {"resid": "Residual stream after each block", "mlp": "MLP contributions", "attn": "Attention contributions"}
MODULES = {"mlp": "the MLPs", "attn": "the attention", "all": "the whole blocks", "resid": "the residual stream"}
ROLES = {
    "before": "before the subject",
    "first_subject": "subject, first token",
    "middle_subject": "subject, middle",
    "last_subject": "subject, last token",
    "first_after": "first token after",
    "further": "further tokens",
    "last": "last token",
}


def score(value: float) -> str:
    """A number in [0, 1] as the tables show it."""
    return DASH if math.isnan(value) else f"{value:.3f}"


def signed(value: float) -> str:
    """A difference of scores: `+0.384`."""
    return DASH if math.isnan(value) else f"{value:+.3f}".replace("-", "\u2212")


def nats(value: float) -> str:
    """A log-probability a token, or a score beside it: two decimals."""
    return DASH if math.isnan(value) else f"{value:.2f}".replace("-", "\u2212")


def small(value: float) -> str:
    """An effect or a loss, to three figures, without an exponent from 0.0001 to a million; 0 for what rounding leaves of it."""
    if math.isnan(value):
        return DASH
    if abs(value) < 1e-12:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value)))) if math.isfinite(value) else 0
    text = f"{value:.{decimals}f}" if 1e-4 <= abs(value) < 1e6 else f"{value:.1e}"
    return text.replace("-", "\u2212")


def percent(value: float) -> str:
    """A share with one decimal: 0.9716 is `97.2%`."""
    return f"{100 * value:.1f}%"


def duration(seconds: float) -> str:
    """`0.8 s`, `42 s`, `3 min 20 s`, `2 h 05 min`."""
    if math.isnan(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.1f}\u00a0s" if seconds < 9.95 else f"{seconds:.0f}\u00a0s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60:02d}\u00a0s"
    return f"{whole // 3600}\u00a0h {whole % 3600 // 60:02d}\u00a0min"


def runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Neighboring layers as `(first, last)`."""
    out: list[tuple[int, int]] = []
    for layer in sorted(set(layers)):
        if out and out[-1][1] == layer - 1:
            out[-1] = (out[-1][0], layer)
        else:
            out.append((layer, layer))
    return out


def layer_list(layers: Sequence[int]) -> str:
    """`2–4, 7`."""
    return ", ".join(f"{first}–{last}" if last > first else str(first) for first, last in runs(layers))


def layer_name(layers: Sequence[int]) -> str:
    """`layers 2–4`, `layer 7`."""
    return f"layer{'s' if len(layers) > 1 else ''} {layer_list(layers)}"


def trained(model: ReportModel) -> str:
    """What was trained in a model: its layers, all weights, or nothing."""
    if model.part in ("reference", "retain_model"):
        return DASH
    return "all weights" if model.layers is None else layer_list(model.layers)


def listing(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def term_name(index: int) -> str:
    """`forget Task2 (records) regurgitation`."""
    return LUME_TERMS[index].title


def term_meaning(index: int) -> str:
    """What a term is, for hover texts and the list under the table."""
    return LUME_TERMS[index].meaning
