"""Which cells a trace computes: kinds, window, metric and prompt positions. No model, no numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lm.anatomy import Kind
from lm.errors import UserError
from tracing.question.encoded_fact import EncodedFact
from tracing.question.metrics import MetricName, check_metric

Severed = Literal["mlp", "attn"]
Positions = Literal["all", "subject_and_after", "subject_and_last"]
"""Which prompt tokens are restored: all; from the subject on (what lies before it cannot matter, by causality, and is
filled in with the corrupted score); or the subject and the last token only."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Which cells are computed and how they are scored.

    `window` layers around each layer are restored together for mlp and attn: from l - window // 2 to
    l + ceil(window / 2) - 1, clipped to the model, as the published script does it (10: from l - 5 to l + 4; its paper
    says l - 4 to l + 5). Windows at the edges therefore hold fewer layers. `resid` is always a single layer.

    `sever` holds what all MLPs, or all attention layers, add at the restored token at its corrupted values, but for the ones
    that the cell itself restores: which part of an effect goes through them (Meng et al. 2022, figure 3).

    `also`: further metrics that are read off the same passes.
    """

    kinds: tuple[Kind, ...] = ("resid", "mlp", "attn")
    window: int = 1
    metric: MetricName = "probability"
    positions: Positions = "all"
    sever: Severed | None = None
    also: tuple[MetricName, ...] = ()

    @property
    def metrics(self) -> tuple[MetricName, ...]:
        """All that is read off each pass: the metric, then those of `also`."""
        return (self.metric, *self.also)

    def __post_init__(self) -> None:
        wrong = [kind for kind in self.kinds if kind not in get_args(Kind)]
        if wrong or not self.kinds or len(set(self.kinds)) != len(self.kinds):
            raise UserError(
                f"the kinds {tuple(self.kinds)} are not usable: choose of {', '.join(get_args(Kind))}, once each"
            )
        for metric in self.metrics:
            check_metric(metric)
        if len(set(self.metrics)) < len(self.metrics):
            raise UserError(f"the metrics {', '.join(self.metrics)} repeat one: read each off once")
        if self.window < 1:
            raise UserError(f"the window is {self.window}: give at least 1 layer")
        if self.sever is not None and self.sever not in get_args(Severed):
            raise UserError(f"sever is {self.sever!r}: use {' or '.join(get_args(Severed))}, or leave it out")
        if self.positions not in get_args(Positions):
            raise UserError(
                f"the positions {self.positions!r} are unknown: use one of {', '.join(get_args(Positions))}"
            )


def window_layers(layer: int, window: int, layers: int, kind: Kind) -> range:
    """The layers that are restored together when the sweep stands at `layer` of `layers`."""
    if kind == "resid":
        return range(layer, layer + 1)
    return range(max(0, layer - window // 2), min(layers, layer + (window + 1) // 2))


def layers_restored(window: int, layers: int, kind: Kind) -> list[int]:
    """For each layer how many are restored together there: fewer than `window` at the ends of the model."""
    return [len(window_layers(layer, window, layers, kind)) for layer in range(layers)]


def cut_windows(window: int, layers: int, kind: Kind) -> list[int]:
    """The layers whose window is cut short by an end of the model, so that fewer are restored there than elsewhere."""
    whole = 1 if kind == "resid" else window
    return [layer for layer, many in enumerate(layers_restored(window, layers, kind)) if many < whole]


def first_block(kind: Kind, layers: range) -> int:
    """The first block that has to be run again when `kind` is restored at `layers`.

    What an MLP adds is the last thing a block does at a token, so the stream after it is a sum: the next block is the first.
    """
    return layers.start if kind == "attn" else layers.start + 1


def swept_positions(tokens: int, span: tuple[int, int], positions: Positions) -> list[int]:
    """The prompt positions whose cells are computed."""
    if positions == "all":
        return list(range(tokens))
    if positions == "subject_and_after":
        return list(range(span[0], tokens))
    return sorted({*range(*span), tokens - 1})


def count_cells(encoded: EncodedFact, layers: int, sweep: Sweep) -> int:
    """How many forward passes a fact takes, but for the first."""
    return len(sweep.kinds) * layers * len(swept_positions(len(encoded.prompt_ids), encoded.span, sweep.positions))
