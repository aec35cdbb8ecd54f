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
from einops import reduce
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
from tracing.question.metrics import MetricName, metric_of, read_off
from tracing.question.target import Target
from tracing.settings import TraceSettings


def check_differentiable(metric: MetricName) -> None:
    """Raise UserError for a metric without a gradient."""
    if reason := metric_of(metric).without_gradient:
        raise UserError(f"{metric} {reason}: use log_probability, or trace it")


def attribute(
    model: LanguageModel,
    facts: Sequence[Fact],
    corruption: Corruption = GaussianNoise(),  # noqa: B008 (frozen)
    kinds: Sequence[Kind] = ("mlp", "attn"),
    metric: MetricName = "log_probability",
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
    settings = TraceSettings(
        corruption=corruption, kinds=kinds, metric=metric, prompt=prompt, memory=memory, progress=progress
    )
    with evaluating(model):
        return attributed(model, facts, settings, graddrop=graddrop)[0]


def attribute_fact(
    model: LanguageModel,
    encoded: EncodedFact,
    batch: Tensor,
    kinds: Sequence[Kind],
    metric: MetricName,
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
    layers, tokens = model.anatomy.layers, len(encoded.prompt_ids)
    sites = [Site(kind, layer) for kind in kinds for layer in range(layers)]
    dropped = range(1, layers) if graddrop else range(0)  # dropping layer 0 changes no gradient at any node
    keep, samples = len(encoded.answer_ids), len(batch) - 1
    sums = np.zeros((1 + len(dropped), len(sites), tokens))
    corrupted = 0.0
    with torch.inference_mode(False), torch.enable_grad():
        with torch.no_grad(), capture(model, sites) as clean:
            score = read_off(forward(model, batch[:1].clone(), keep), Target.of([encoded], 1), metric)
        for part in torch.split(batch[1:], rows):
            embeddings = part.detach().clone().requires_grad_()
            contributions = [Site(kind, layer) for kind in ("attn", "mlp") for layer in dropped]
            with capture(model, [*sites, *contributions], detach=False) as seen:
                scores = read_off(forward(model, embeddings, keep), Target.of([encoded], len(part)), metric)
            corrupted += float(scores.detach().sum()) / samples
            for index, layer in enumerate((None, *dropped)):
                below = [node for node, site in enumerate(sites) if layer is None or site.layer < layer]
                more = index < len(dropped)
                gradients = _gradients(scores, seen, [sites[node] for node in below], layer, more)
                for node, gradient in zip(below, gradients, strict=True):
                    step = clean[sites[node]].double() - seen[sites[node]].detach().double()
                    by_token = reduce(step * gradient.double(), "samples tokens hidden -> tokens", "sum")[:tokens]
                    sums[index, node] += by_token.cpu().numpy() / samples
    attributed_to = _over_dropped(sums, sites, layers) if graddrop else sums[0]
    attributed_to[:, : encoded.span[0]] = 0.0  # by causality
    attributed_to[~np.isfinite(attributed_to)] = np.nan
    cells = {
        kind: corrupted + attributed_to[node * layers : (node + 1) * layers].T.copy() for node, kind in enumerate(kinds)
    }
    refuse_nan(model, encoded, np.array([float(score), corrupted]), list(cells.values()))
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
    means = [
        (site.layer * sizes[0, node] + sizes[site.layer + 1 :, node].sum(0)) / (layers - 1)
        for node, site in enumerate(sites)
    ]
    return np.stack(means)


def attributed(
    model: LanguageModel,
    facts: Sequence[Fact],
    settings: TraceSettings,
    *,
    graddrop: bool = False,
) -> tuple[Effects, list[EncodedFact], Corruptor]:
    """What `attribute` gives, and the facts and the corruption that it is of; the model in eval mode.

    Of the settings windows, positions, engine and cache are not read: every cell of single layers is estimated.
    """
    check_differentiable(settings.metric)
    if not facts:
        raise UserError("there are no facts to attribute: give at least one")
    kinds, metric = settings.sweep.kinds, settings.metric
    known, skipped, corruptor = prepare(model, facts, settings)
    traced: list[Traced] = []
    with progress_bar(len(known), label="attribution", unit="facts", enabled=settings.show) as advance:
        for encoded in known:
            rows = settings.bytes // gradient_row_bytes(model, len(encoded.input_ids), len(encoded.answer_ids))
            batch = corruptor.batch(encoded)
            traced.append(attribute_fact(model, encoded, batch, kinds, metric, graddrop=graddrop, rows=max(1, rows)))
            advance(1)
    effects = Effects(
        facts=tuple(encoded.fact for encoded in known),
        clean=np.array([fact.clean for fact in traced]),
        corrupted=np.array([fact.corrupted for fact in traced]),
        restored={kind: [fact.restored[kind] for fact in traced] for kind in kinds},
        tokens=tuple(encoded.tokens for encoded in known),
        subject_spans=tuple(encoded.span for encoded in known),
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
            "corruption": {"kind": type(settings.corruption).__name__, **asdict(settings.corruption)},
            "prompt": asdict(settings.prompt),
            "positions": "all",
            "sever": None,
            "facts_given": len(facts),
        },
    )
    return effects, known, corruptor
