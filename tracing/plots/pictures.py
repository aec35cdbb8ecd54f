"""Pictures for a notebook or a file: `tracing.plot` of effects, and of two traces compared.

What is drawn is settled here, how it is drawn in `tracing.plots.heatmaps`, `tracing.plots.comparisons` and
`tracing.plots.localizers`, which are imported where they are needed: a trace without pictures waits for no drawing library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm.anatomy import Kind
from lm.run_folder import write_atomic
from tracing.effects.before_after import Difference
from tracing.effects.effects import Effects
from tracing.effects.layer_scores import LayerScores
from tracing.plan.combined import Agreements
from tracing.plan.layer_plan import LayerPlan


@dataclass(frozen=True)
class Picture:
    """A PNG that a notebook shows."""

    png: bytes

    def _repr_png_(self) -> bytes:
        return self.png

    def save(self, path: str | Path) -> None:
        """Write it, atomically."""
        write_atomic(Path(path), self.png)


def plot(
    effects: Effects,
    fact: int | None = None,
    *,
    kinds: Sequence[Kind] | None = None,
    layers: Sequence[int] = (),
    plan: LayerPlan | None = None,
) -> Picture:
    """Effects as heat maps: means over facts by token role and layer, or one fact token by layer.

    Args:
        effects: what `tracing.trace` found.
        fact: the place of one of its facts; None draws the means over all of them.
        kinds: a panel for each of these; None for all that were traced. Of means only.
        layers: layers to outline. Of means only.
        plan: outline its layers, in the modules that it names, dashed where the evidence does not single them out.

    Returns:
        A `Picture`, which a notebook shows and `save` writes.

    Raises:
        UserError: no such fact, or a kind that was not traced.
    """
    from tracing.plots.heatmaps import fact_figure, figure

    if fact is not None:
        return Picture(fact_figure(effects, fact))
    tables = [effects.table(kind) for kind in kinds or effects.kinds]
    if plan is None:
        return Picture(figure(tables, band=layers))
    planned = ["resid" if module == "all" else module for module in plan.modules]
    return Picture(figure(tables, band=plan.layers, band_kinds=planned, tentative=not plan.singled_out))


def plot_difference(difference: Difference, kind: Kind, *, layers: Sequence[int] = ()) -> Picture:
    """Two traces of the same facts: before and after on one scale, and after minus before on one of its own.

    Args:
        difference: what `tracing.difference` found.
        kind: which activations.
        layers: layers to outline.

    Raises:
        UserError: a kind that was not traced both times.
    """
    from tracing.plots.comparisons import difference_figure

    return Picture(difference_figure(difference, kind, band=layers))


def plot_severed(runs: Mapping[str, Effects], *, kind: Kind = "resid", role: str = "last_subject") -> Picture:
    """The mean effect at one token role by layer, a line a run with its interval: what is left when paths are held.

    Args:
        runs: name -> effects, as of `trace(..., sever=None)`, `sever="mlp"` and `sever="attn"`; at most four.
        kind: which activations.
        role: which tokens of the prompt (`tracing.ROLES`).

    Raises:
        UserError: no run, more than four, or a kind that was not traced.
    """
    from tracing.plots.comparisons import severed_figure

    return Picture(severed_figure(runs, kind=kind, role=role))


def plot_localizers(
    scores: Mapping[str, LayerScores],
    agreements: Agreements,
    plan: LayerPlan,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Picture:
    """Several localizers: the scores of each by layer, and how alike each two rank layers.

    Args:
        scores: name -> scores, of which `agreements` and `plan` were made.
        agreements: what `tracing.compare_all` found.
        plan: what `tracing.combined_plan` gave; its layers are shaded.
        confidence, seed: of the bands, which are bootstrap intervals of the mean over facts.
    """
    from tracing.plots.localizers import overview

    return Picture(overview(scores, agreements, plan, confidence=confidence, seed=seed))
