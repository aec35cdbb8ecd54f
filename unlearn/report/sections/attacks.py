"""The sections on what attacks brought back and on how deep unlearning went, both beside the retain model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from unlearn.report import words
from unlearn.report.drawing.lines import two_lines
from unlearn.report.records import Attacked, AttackTrial, Audited, Depth, Estimate, Report
from unlearn.report.sections.figures import Figure, Numbers, NumberTable


@dataclass(frozen=True, kw_only=True)
class AttackView:
    """One attacked model: the gaps of all trials and the worst of them, a drawing and a name with a sentence for each, and the
    numbers."""

    label: str
    attack: str
    worst: str
    gaps: Gaps
    audit: AuditView | None
    figures: tuple[Figure, ...]
    sentences: tuple[tuple[str, str], ...]
    numbers: Numbers


MEASURES = {
    "log_probability": "The true answer's log-probability, nats a token",
    "score": "Said right, from 0 to 1",
}
"""What the audit measures -> how its table is called."""


@dataclass(frozen=True, kw_only=True)
class GapCell:
    """The gap to the retain model at one level: its text, the interval to hover for, and whether it is the worst of all."""

    text: str
    title: str
    worst: bool


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """The gap of every trial at every level of the attack: the head of each level, and of each trial its name, its cells, and
    the verdict."""

    levels: tuple[str, ...]
    rows: tuple[tuple[str, tuple[GapCell, ...], str], ...]


@dataclass(frozen=True, kw_only=True)
class AuditView:
    """What the models make of three groups of people: the finding, and a table for each measure; hovering has the intervals."""

    finding: str
    tables: tuple[NumberTable, ...]


@dataclass(frozen=True, kw_only=True)
class DepthView:
    """One model: the finding, the drawing, and the numbers."""

    label: str
    finding: str
    figure: Figure
    numbers: Numbers


def attacks(report: Report) -> tuple[AttackView, ...]:
    """What was attacked, in order."""
    return tuple(_attack(attacked) for attacked in report.attacks)


def depths(report: Report) -> tuple[DepthView, ...]:
    """The models whose depth was measured, in order."""
    return tuple(_depth(depth) for depth in report.depths)


def _attack(attacked: Attacked) -> AttackView:
    return AttackView(
        label=attacked.label,
        attack=attacked.attack,
        worst=attacked.worst_sentence,
        gaps=_gaps(attacked),
        audit=None if attacked.audit is None else _audit(attacked.audit),
        figures=tuple(_curves(attacked, trial) for trial in attacked.trials),
        sentences=tuple((_name(trial), trial.sentence.removeprefix(f"{trial.name}: ")) for trial in attacked.trials),
        numbers=Numbers(
            summary="The attacks in numbers",
            tables=tuple(
                _table(
                    _name(trial),
                    (attacked.unit.capitalize(), *(f"{level:g}" for level in trial.levels)),
                    trial.unlearned,
                    trial.retain_model,
                )
                for trial in attacked.trials
            ),
        ),
    )


def _gaps(attacked: Attacked) -> Gaps:
    levels = attacked.trials[0].levels[1:] if attacked.trials else ()
    return Gaps(
        levels=tuple(f"{level:g} {attacked.unit}" for level in levels),
        rows=tuple(
            (
                _name(trial),
                tuple(_gap(trial, level, (place, level) == attacked.worst) for level in range(1, len(trial.levels))),
                trial.verdict,
            )
            for place, trial in enumerate(attacked.trials)
        ),
    )


def _audit(audited: Audited) -> AuditView:
    tables = []
    for measure, caption in MEASURES.items():
        both = [("unlearned", audited.unlearned[measure]), ("retain model", audited.retain_model[measure])]
        known = [(name, groups) for name, groups in both if any(math.isfinite(ends[0][0]) for ends in groups)]
        tables.append(
            NumberTable(
                caption=caption,
                label=caption,
                columns=("People", *(f"{name}, {when}" for name, _ in known for when in ("before", "after"))),
                rows=tuple(
                    (
                        f"{group[:1].upper()}{group[1:]} ({people})",
                        tuple(_estimated(ends) for _, groups in known for ends in groups[place]),
                    )
                    for place, (group, people) in enumerate(audited.groups)
                ),
            )
        )
    return AuditView(finding=audited.sentence, tables=tuple(tables))


def _estimated(estimate: Estimate) -> tuple[str, str]:
    mean, low, high = estimate
    interval = f"interval {words.nats(low)} to {words.nats(high)}" if math.isfinite(low + high) else ""
    return words.nats(mean), interval


def _gap(trial: AttackTrial, level: int, worst: bool) -> GapCell:
    gap, low, high = trial.unlearned[level] - trial.retain_model[level], trial.low[level], trial.high[level]
    interval = f"interval {words.signed(low)} to {words.signed(high)}" if math.isfinite(low + high) else ""
    return GapCell(text=words.signed(gap), title=interval, worst=worst)


def _curves(attacked: Attacked, trial: AttackTrial) -> Figure:
    drawn = two_lines(
        trial.levels,
        trial.unlearned,
        trial.retain_model,
        unit=attacked.unit,
        description=f"{attacked.label}, {_name(trial)}: of the forgotten, said right",
        top=1.0,
        band=(trial.low, trial.high),
    )
    return Figure(title=_name(trial), small=f"beside the retain model: {trial.verdict}", drawing=drawn)


def _depth(depth: Depth) -> DepthView:
    layers = range(len(depth.unlearned))
    what = "nats a token lost with the stream after a layer"
    return DepthView(
        label=depth.label,
        finding=depth.sentence,
        figure=Figure(
            title=depth.label,
            small=what,
            drawing=two_lines(
                layers,
                depth.unlearned,
                depth.retain_model,
                unit="layer",
                description=f"{depth.label}: {what}",
            ),
        ),
        numbers=Numbers(
            summary="The depth in numbers",
            tables=(_table(what.capitalize(), ("Layer", *map(str, layers)), depth.unlearned, depth.retain_model),),
        ),
    )


def _table(
    caption: str, columns: tuple[str, ...], unlearned: Sequence[float], retain_model: Sequence[float]
) -> NumberTable:
    rows = (("unlearned", unlearned), ("retain model", retain_model))
    return NumberTable(
        caption=caption,
        label=caption,
        columns=columns,
        rows=tuple((name, tuple((words.small(value), "") for value in values)) for name, values in rows),
    )


def _name(trial: AttackTrial) -> str:
    name = trial.name.replace("_", " ")
    return name[:1].upper() + name[1:]
