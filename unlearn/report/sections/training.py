"""The section on training: one drawing a method, all on the same scales."""

from __future__ import annotations

from dataclasses import dataclass

from unlearn.report.drawing import curves
from unlearn.report.records import Report
from unlearn.report.sections.figures import Figure


@dataclass(frozen=True, kw_only=True)
class Training:
    """The drawings, whether they stand three in a line, and the labels of the models that have no log."""

    figures: tuple[Figure, ...]
    three: bool
    without: tuple[str, ...]


def training(report: Report) -> Training | None:
    """What the section shows; None if no model has a log with a cross-entropy."""
    logs = [(model, curves.training_lines(model.log)) for model in report.methods]
    drawn = [(model, log) for model, log in logs if log]
    three = len(drawn) not in (1, 2, 4)
    scales = curves.shared_scales([log for _, log in drawn], width=400.0 if three else 440.0)
    if scales is None:
        return None
    return Training(
        figures=tuple(
            Figure(title=model.label, drawing=curves.curves(model.label, log, scales)) for model, log in drawn
        ),
        three=three,
        without=tuple(model.label for model, log in logs if not log),
    )
