"""Attribution patching: every cell of a trace at once, to first order, from one gradient; the largest ones then exactly.

What restoring an activation brings back is estimated by (clean - corrupted) times the gradient of the metric in the corrupted
run (Nanda 2023; AtP* of Kramár et al. 2024, arXiv:2403.00745). A gradient is no effect: it is a prefilter, and
`tracing.localizers.verify` says what it may have missed. Queries and keys are in `tracing.localizers.query_key`, the
localizer in `tracing.localizers.attribution_patching`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from lm.anatomy import Kind, Site
from lm.errors import UserError
from lm.forward.hooks import Captured, capture
from lm.model import LanguageModel, fingerprint
from lm.prompts import PromptSpec
from lm.run_folder import progress as progress_bar
from tracing.arrays import Array
from tracing.corruption.noise import Corruption, Corruptor, GaussianNoise
from tracing.effects.effects import Effects
from tracing.engine.estimate import gradient_row_bytes
from tracing.engine.reference import Traced, refuse_nan
from tracing.known import evaluating, prepare
from tracing.question.encoded_fact import EncodedFact, forward
from tracing.question.facts import Fact
from tracing.question.metrics import Metric, Target, read_off
from tracing.question.sweep import Sweep


def check_differentiable(metric: Metric) -> None:
    """Raise UserError for a metric without a gradient."""
    if metric == "reciprocal_rank":
        raise UserError("reciprocal_rank has no gradient to attribute; use log_probability, or trace it.")
    if metric == "negative_kl":
        raise UserError(
            "negative_kl is flat at the clean prompt, from where it is attributed; use log_probability, or trace it."
        )


def attribute(
    model: LanguageModel,
    facts: Sequence[Fact],
    corruption: Corruption = GaussianNoise(),  # noqa: B008 (frozen)
    kinds: Sequence[Kind] = ("mlp", "attn"),
    metric: Metric = "log_probability",
    *,
    graddrop: bool = False,
    prompt: PromptSpec = PromptSpec(),  # noqa: B008 (frozen)
    memory: float = 2.0,
    progress: bool = True,
) -> Effects:
    """Estimates, in the shape of `trace`'s results, of every cell of the facts that the model knows.

    `Effects.clean` and `.corrupted` are exact; `.restored` is the corrupted score plus the estimated effect, for all prompt
    tokens. Never take its numbers for effects without `tracing.localizers.verify`, least of all those of `resid`: noise of
    three standard deviations is a big step.

    Args:
        graddrop: see `attribute_fact`; what is added to the corrupted score is then the size of an effect, without a sign.
        memory: gigabytes (10^9 bytes) that a forward and backward pass may take beside the model, about.

    Raises:
        UserError: nothing to do, no fact is known, NaN, a metric without a gradient, a wrong setting.
    """
    with evaluating(model):
        return attributed(model, facts, corruption, kinds, metric, graddrop, prompt, memory, progress)[0]


def attribute_fact(
    model: LanguageModel,
    probe: EncodedFact,
    batch: Tensor,
    kinds: Sequence[Kind],
    metric: Metric,
    *,
    graddrop: bool = False,
    rows: int = 64,
) -> Traced:
    """One fact's estimates; the model in eval mode, no parameter's gradient is computed or changed.

    A cell is the mean over noise samples of the sum over hidden of (clean - corrupted activation) * d metric / d activation in
    the corrupted run, 0 before the subject.

    `graddrop` is the remedy of AtP* for effects that cancel along the gradient's paths: for each layer one backward pass in
    which no gradient goes through what its attention and its MLP add, and the score is the mean over layers of the absolute
    attribution. Badge: *reconstruction* (its abstract alone was at hand). Decided here: the absolute value is of the mean
    over noise samples, since that is what a cell's exact effect is; a node's own layer is left out of the mean; in a model of
    one layer nothing can be dropped, and the score is the absolute attribution.

    Args:
        batch: (1 + samples, tokens, hidden) embeddings, row 0 clean (`Corruptor.batch`).
        rows: how many samples run at once.

    Raises:
        UserError: NaN or infinite numbers.
    """
    layers, tokens = model.anatomy.layers, len(probe.prompt_ids)
    sites = [Site(kind, layer) for kind in kinds for layer in range(layers)]
    dropped = range(1, layers) if graddrop else range(0)  # dropping layer 0 changes no gradient at any node
    keep, samples = len(probe.answer_ids), len(batch) - 1
    sums = np.zeros((1 + len(dropped), len(sites), tokens))
    corrupted = 0.0
    with torch.inference_mode(False), torch.enable_grad():
        with torch.no_grad(), capture(model, sites) as clean:
            score = read_off(forward(model, batch[:1].clone(), keep), Target.of([probe], 1), metric)
        for part in torch.split(batch[1:], rows):
            given = part.detach().clone().requires_grad_()
            contributions = [Site(kind, layer) for kind in ("attn", "mlp") for layer in dropped]
            with capture(model, [*sites, *contributions], detach=False) as seen:
                scores = read_off(forward(model, given, keep), Target.of([probe], len(part)), metric)
            corrupted += float(scores.detach().sum()) / samples
            for index, layer in enumerate((None, *dropped)):
                below = [place for place, site in enumerate(sites) if layer is None or site.layer < layer]
                more = index < len(dropped)
                gradients = _gradients(scores, seen, [sites[place] for place in below], layer, more)
                for place, gradient in zip(below, gradients, strict=True):
                    step = clean[sites[place]].double() - seen[sites[place]].detach().double()
                    sums[index, place] += (step * gradient.double()).sum((0, 2))[:tokens].cpu().numpy() / samples
    found = _over_dropped(sums, sites, layers) if graddrop else sums[0]
    found[:, : probe.span[0]] = 0.0  # by causality
    found[~np.isfinite(found)] = np.nan
    cells = {
        kind: corrupted + found[place * layers : (place + 1) * layers].T.copy() for place, kind in enumerate(kinds)
    }
    refuse_nan(model, probe, np.array([float(score), corrupted]), list(cells.values()))
    return Traced(clean=float(score), corrupted=corrupted, restored=cells)


def _gradients(
    scores: Tensor, seen: Captured, sites: Sequence[Site], dropped: int | None, keep_graph: bool
) -> tuple[Tensor, ...]:
    """Of the summed scores at some sites; no gradient passes through what layer `dropped` adds."""
    with ExitStack() as hooks:
        for kind in ("attn", "mlp") if dropped is not None else ():
            assert dropped is not None
            handle = seen[Site(kind, dropped)].register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]
            hooks.callback(handle.remove)
        return torch.autograd.grad(scores.sum(), [seen[site] for site in sites], retain_graph=keep_graph)


def _over_dropped(sums: Array, sites: Sequence[Site], layers: int) -> Array:
    """(sites, tokens): the mean over the other layers of the absolute attribution without each. Row 0 of `sums` is with all;
    below a node nothing that is dropped matters to its gradient."""
    sizes = np.abs(sums)
    if layers == 1:
        return np.asarray(sizes[0])
    found = [
        (site.layer * sizes[0, place] + sizes[site.layer + 1 :, place].sum(0)) / (layers - 1)
        for place, site in enumerate(sites)
    ]
    return np.stack(found)


def attributed(
    model: LanguageModel,
    facts: Sequence[Fact],
    corruption: Corruption,
    kinds: Sequence[Kind],
    metric: Metric,
    graddrop: bool,
    prompt: PromptSpec,
    memory: float,
    show: bool,
    only: Sequence[Fact] | None = None,
) -> tuple[Effects, list[EncodedFact], Corruptor]:
    """What `attribute` gives (for `only` these facts), and the facts and the corruption that it is of; the model in eval mode."""
    check_differentiable(metric)
    Sweep(kinds=tuple(kinds), metric=metric)  # refuses what is not there
    if not facts:
        raise UserError("there are no facts to attribute; give at least one.")
    if not memory > 0:
        raise UserError(f"memory is {memory} GB; give what may be taken beside the model (2 is usual).")
    known, skipped, corruptor = prepare(model, facts, corruption, metric, prompt, only=only, show=show)
    found: list[Traced] = []
    with progress_bar(len(known), label="attribution", unit="facts", enabled=show) as advance:
        for probe in known:
            rows = int(memory * 1e9) // gradient_row_bytes(model, len(probe.input_ids), len(probe.answer_ids))
            batch = corruptor.batch(probe)
            found.append(attribute_fact(model, probe, batch, kinds, metric, graddrop=graddrop, rows=max(1, rows)))
            advance(1)
    effects = Effects(
        facts=tuple(probe.fact for probe in known),
        clean=np.array([one.clean for one in found]),
        corrupted=np.array([one.corrupted for one in found]),
        restored={kind: [one.restored[kind] for one in found] for kind in kinds},
        tokens=tuple(probe.tokens for probe in known),
        subject_spans=tuple(probe.span for probe in known),
        sigma=corruptor.sigma,
        metric=metric,
        window=1,
        skipped=tuple(skipped),
        provenance={
            "model": model.name,
            "architecture": model.anatomy.architecture,
            "weights": fingerprint(model),
            "engine": "attribution",
            "graddrop": graddrop,
            "corruption": {"kind": type(corruption).__name__, **asdict(corruption)},
            "prompt": asdict(prompt),
            "positions": "all",
            "sever": None,
            "facts_given": len(facts),
        },
    )
    return effects, known, corruptor
