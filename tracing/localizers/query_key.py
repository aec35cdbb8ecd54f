"""Queries and keys as nodes of attribution: a softmax is not linear where it is saturated, so it is computed anew.

Restoring a clean query at one token changes one row of attention probabilities, a clean key one column. The correction of
AtP* (Kramár et al. 2024, arXiv:2403.00745) computes that change exactly and multiplies it with the gradient with respect to the
probabilities, where plain attribution multiplies the change of the query or key with its own gradient. Badge: *reconstruction*
(the abstract alone was at hand). A node here is a layer's query or key at a token with all its heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from einops import reduce
from torch import Tensor

from lm.errors import UserError
from lm.model import LanguageModel
from tracing.arrays import Array
from tracing.corruption.noise import Corruptor
from tracing.effects.roles import token_roles
from tracing.engine.estimate import attended_row_bytes
from tracing.localizers.attention import Attended, watched
from tracing.question.encoded_fact import EncodedFact, forward
from tracing.question.metrics import MetricName, read_off
from tracing.question.target import Target

Part = Literal["query", "key"]
_NAMES = ("query", "query_corrected", "key", "key_corrected")


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionNodes:
    """Estimated effects of restoring the clean query, or key, of a layer at a token: (prompt tokens, layers) each.

    Attributes:
        query, key: plain attribution.
        query_corrected, key_corrected: with the change of the attention probabilities computed exactly.
    """

    query: Array
    query_corrected: Array
    key: Array
    key_corrected: Array


def attention_nodes(
    model: LanguageModel, encoded: EncodedFact, batch: Tensor, metric: MetricName, *, rows: int = 64
) -> AttentionNodes:
    """Attribute one fact's queries and keys: one clean forward pass, one corrupted forward and backward pass.

    Args:
        model: in eval mode.
        batch: (1 + samples, tokens, hidden) embeddings, row 0 clean (`Corruptor.batch`).
        rows: how many samples run at once.

    Raises:
        UserError: see `watched`; NaN or infinite numbers.
    """
    layers, tokens = range(model.anatomy.layers), len(encoded.prompt_ids)
    keep, samples = len(encoded.answer_ids), len(batch) - 1
    sums = {name: np.zeros((tokens, len(layers))) for name in _NAMES}
    with torch.inference_mode(False), torch.enable_grad():
        with torch.no_grad(), watched(model) as clean:
            forward(model, batch[:1].clone(), keep)
        for part in torch.split(batch[1:], rows):
            with watched(model) as seen:
                given = part.detach().clone().requires_grad_()
                scores = read_off(forward(model, given, keep), Target.of([encoded], len(part)), metric)
            wanted = [
                one for layer in layers for one in (seen[layer].query, seen[layer].key, seen[layer].probabilities)
            ]
            gradients = torch.autograd.grad(scores.sum(), wanted)
            for layer in layers:
                with torch.no_grad():
                    found = _estimates(seen[layer], clean[layer], gradients[3 * layer : 3 * layer + 3])
                for name, value in found.items():
                    sums[name][:, layer] += value.sum(0)[:tokens].cpu().numpy() / samples
    for values in sums.values():
        values[: encoded.span[0]] = 0.0  # by causality
    if not all(np.isfinite(values).all() for values in sums.values()):
        raise UserError(
            f"attributing the queries and keys of fact {encoded.fact.label!r} gave NaN: load {model.name} in float32 or bfloat16"
        )
    return AttentionNodes(**sums)


@torch.no_grad()
def exact_node(
    model: LanguageModel,
    encoded: EncodedFact,
    batch: Tensor,
    metric: MetricName,
    part: Part,
    token: int,
    layer: int,
    *,
    rows: int = 64,
) -> float:
    """What restoring one clean query, or key, brings back: the oracle of the estimates, two forward passes.

    Args:
        batch, rows: see `attention_nodes`.
        token, layer: of the node.
    """
    keep = len(encoded.answer_ids)
    with watched(model) as clean:
        forward(model, batch[:1], keep)
    new = clean[layer].query if part == "query" else clean[layer].key

    def restore(here: int, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        if here == layer:
            query, key = query.clone(), key.clone()
            (query if part == "query" else key)[:, :, token] = new[:, :, token]
        return query, key

    gained = 0.0
    for noisy in torch.split(batch[1:], rows):
        target = Target.of([encoded], len(noisy))
        with watched(model):
            before = read_off(forward(model, noisy, keep), target, metric)
        with watched(model, restore):
            after = read_off(forward(model, noisy, keep), target, metric)
        gained += float((after - before).sum())
    return gained / (len(batch) - 1)


def _estimates(seen: Attended, clean: Attended, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """(rows, tokens) float64 each."""
    of_query, of_key, of_probability = (gradient.double() for gradient in gradients)
    query, key = clean.query.expand_as(seen.query), clean.key.expand_as(seen.key)
    step = seen.scores(seen.query, key).double() - seen.scores(seen.query, seen.key).double()
    return {
        "query": reduce(
            (query.double() - seen.query.double()) * of_query, "rows heads tokens size -> rows tokens", "sum"
        ),
        "key": reduce((key.double() - seen.key.double()) * of_key, "rows heads tokens size -> rows tokens", "sum"),
        "query_corrected": changed_rows(seen, query, of_probability),
        "key_corrected": changed_columns(_log_masked(seen).softmax(-1), step, of_probability),
    }


def changed_rows(seen: Attended, query: Tensor, gradient: Tensor) -> Tensor:
    """(rows, tokens): for each token, gradient times the change of its row of probabilities if its query alone is `query`."""
    scores = seen.scores(query, seen.key).double()
    new = (scores if seen.mask is None else scores + seen.mask.double()).softmax(-1)
    changed = (new - _log_masked(seen).softmax(-1)) * gradient
    return reduce(changed, "rows heads queries keys -> rows queries", "sum")


def changed_columns(probabilities: Tensor, step: Tensor, gradient: Tensor) -> Tensor:
    """(rows, tokens): for each token, gradient times the change of all probabilities if the scores of its key alone, one column,
    rise by `step`.

    With p the probability of the column, q the sum of the others in the row and B theirs weighted by the gradient g, the row
    changes by p (e - 1) (q g - B) / (p e + q), e the exponential of the step. q and B are summed without the column and
    e is never greater than 1 in the computer, so that nothing cancels or overflows where the softmax is saturated; a key whose
    probability is zero even in float64 (700 nats behind) stays without effect.

    Args:
        probabilities, step, gradient: (rows, heads, tokens, tokens) float64; the last axis are keys.
    """
    rest, weighted = _others(probabilities), _others(probabilities * gradient)
    small = torch.exp(-step.abs())
    up = step > 0
    top = probabilities * (1 - small) * (rest * gradient - weighted) * step.sign()
    bottom = torch.where(up, probabilities + rest * small, probabilities * small + rest)
    changed = torch.where(top == 0, 0.0, top / bottom)
    return reduce(changed, "rows heads queries keys -> rows keys", "sum")


def _others(values: Tensor) -> Tensor:
    """For each element of the last axis the sum of all others, with no difference taken."""
    before = values.cumsum(-1).roll(1, -1)
    before[..., 0] = 0
    after = values.flip(-1).cumsum(-1).roll(1, -1)
    after[..., 0] = 0
    return before + after.flip(-1)


def _log_masked(seen: Attended) -> Tensor:
    """The scores of which the softmax was taken, in float64."""
    scores = seen.scores(seen.query, seen.key).double()
    return scores if seen.mask is None else scores + seen.mask.double()


def summary(
    model: LanguageModel,
    encoded_facts: Sequence[EncodedFact],
    corruptor: Corruptor,
    metric: MetricName,
    memory: int = 2 * 10**9,
) -> dict[str, Any]:
    """What there is to say of some facts' queries and keys, as plain data. `memory`: bytes that a pass may take, about.

    Returns:
        `by_role`: for each of `AttentionNodes`'s numbers and each token role that occurs the mean over facts, a layer.
        `checked`: for each fact, for queries and for keys the node with the largest plain and the one with the largest corrected
        estimate, computed exactly: (fact, part, token, layer, plain, corrected, exact). `error`: over these the mean distance
        from the exact effect, plain and corrected.
    """
    by_role: dict[str, dict[str, list[Array]]] = {name: {} for name in _NAMES}
    checked: list[tuple[str, str, int, int, float, float, float]] = []
    for encoded in encoded_facts:
        batch = corruptor.batch(encoded)
        rows = max(1, memory // attended_row_bytes(model, len(encoded.input_ids), len(encoded.answer_ids)))
        nodes = attention_nodes(model, encoded, batch, metric, rows=rows)
        for role, places in token_roles(len(encoded.prompt_ids), encoded.span).items():
            for name in _NAMES if places and role != "before" else ():
                by_role[name].setdefault(role, []).append(getattr(nodes, name)[places].mean(0))
        parts: tuple[tuple[Part, Array, Array], ...] = (
            ("query", nodes.query, nodes.query_corrected),
            ("key", nodes.key, nodes.key_corrected),
        )
        for part, plain, corrected in parts:
            for cell in dict.fromkeys(int(np.abs(values).argmax()) for values in (plain, corrected)):
                token, layer = divmod(cell, model.anatomy.layers)
                exact = exact_node(model, encoded, batch, metric, part, token, layer, rows=rows)
                guesses = float(plain[token, layer]), float(corrected[token, layer])
                checked.append((encoded.fact.label, part, token, layer, *guesses, exact))
    off = np.abs([[plain - exact, corrected - exact] for *_, plain, corrected, exact in checked]).mean(0)
    return {
        "by_role": {
            name: {role: np.mean(told, axis=0).tolist() for role, told in roles.items()}
            for name, roles in by_role.items()
        },
        "checked": checked,
        "error": {"plain": float(off[0]), "corrected": float(off[1])},
    }
