"""How deep does unlearning go? What a changed model still knows inside, layer by layer, read by the model it was made from.

A changed model's stream after a layer is put into the original model, which goes on from there: where it still says the answer,
the changed model's first layers still hold what it takes. A retain model, which never learned the facts, says how
much that is at most.
This measures a model; it chooses no layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lm.anatomy import Site
from lm.errors import UserError
from lm.forward import block_replay
from lm.forward.hooks import capture
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from tracing.arrays import Array
from tracing.bootstrap import bootstrap
from tracing.known import evaluating
from tracing.question.encoded_fact import EncodedFact, embed, encode_fact, forward
from tracing.question.facts import Fact
from tracing.question.metrics import MetricName, read_off
from tracing.question.target import Target

DepthMetric = Literal["distinguishing_log_probability", "log_probability"]
Scope = Literal["answer", "all"]
"""The tokens whose stream is put in: those that say the answer (the prompt's last, and the answer's but its last), or all."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DepthReport:
    """What putting in other models' streams takes from the original, in nats a scored token.

    Attributes:
        facts: in order.
        retain_model: (facts, layers), what is lost with the stream of the retain model, which never learned them.
        changed: (facts, layers), what is lost with that of the changed model.
        threshold: a layer counts for a fact if `retain_model` is above this there.
    """

    facts: tuple[Fact, ...]
    retain_model: Array
    changed: Array
    threshold: float

    @property
    def depth(self) -> Array:
        """(facts,): sum over the layers that count of r * clip(c / r, 0, 1), over the sum of r there; r is `retain_model`, c is
        `changed`.

        0: all that the original needs is still inside; 1: as little as in the retain model. NaN where no layer
        counts.
        """
        counts = self.retain_model > self.threshold
        weight = np.where(counts, self.retain_model, 0.0).sum(axis=1)
        gone = np.where(counts, np.clip(self.changed, 0.0, np.maximum(self.retain_model, 0.0)), 0.0).sum(axis=1)
        return np.asarray(np.divide(gone, weight, out=np.full_like(weight, np.nan), where=weight > 0))

    def mean(self, *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
        """(mean, low, high) of the depth over the facts that have one; facts of a group are drawn together."""
        depth = self.depth
        groups = [fact.group for fact in self.facts]
        low, high = bootstrap(depth, groups, confidence=confidence, seed=seed)
        defined = depth[~np.isnan(depth)]
        return (float(defined.mean()) if len(defined) else float("nan")), float(low), float(high)

    def __str__(self) -> str:
        mean, low, high = self.mean()
        measured = int((~np.isnan(self.depth)).sum())
        if not measured:
            return (
                f"Of {len(self.facts)} facts none is lost by more than {self.threshold:g} nats with the stream of the retain "
                "model: how deep unlearning went cannot be told."
            )
        spread = "" if np.isnan(low) else f" (95% interval {low:.2f} to {high:.2f})"
        return (
            f"Unlearning goes {mean:.2f} deep{spread} on {measured} of {len(self.facts)} facts: 0 is all still inside, 1 as "
            "little as in the retain model, which never learned them."
        )

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data; None for what is not defined."""
        mean, low, high = (None if np.isnan(value) else value for value in self.mean())
        return {
            "sentence": str(self),
            "depth": mean,
            "low": low,
            "high": high,
            "threshold": self.threshold,
            "lost_by_layer": {
                "retain_model": self.retain_model.mean(axis=0).tolist(),
                "changed": self.changed.mean(axis=0).tolist(),
            },
            "facts": [
                {
                    **asdict(fact),
                    "depth": None if np.isnan(depth) else float(depth),
                    "retain_model": a.tolist(),
                    "changed": b.tolist(),
                }
                for fact, depth, a, b in zip(self.facts, self.depth, self.retain_model, self.changed, strict=True)
            ],
        }


def unlearning_depth(
    original: LanguageModel,
    retain_model: LanguageModel,
    changed: LanguageModel,
    facts: Sequence[Fact],
    *,
    prompt: PromptSpec = PromptSpec(),  # noqa: B008 (frozen)
    metric: DepthMetric = "distinguishing_log_probability",
    scope: Scope = "answer",
    threshold: float = 0.05,
) -> DepthReport:
    """The depth of unlearning by activation patching between models (UDS, arXiv:2605.24614).

    Badge: *reconstruction*, of the formula in the authors' notes: for each layer the loss of log-probability with the retain
    model's stream (S1) and with the unlearned model's (S2), layers above the threshold weighed by S1. Decided here: the loss is
    the mean over the scored tokens, which are the answer's names and numbers (`tracing.question.metrics.distinguishing`), and
    the stream after the last block is taken before the final norm; as published it is the last of the hidden states that
    transformers gives, which is after it.

    Args:
        original: the model that memorized the facts; give only facts that it knows.
        retain_model: one of the same shape that never learned them: trained on what is to be kept alone.
        changed: the unlearned model.

    Raises:
        UserError: no facts, models that differ in shape or tokens, NaN.
    """
    if not facts:
        raise UserError("there are no facts to measure: give at least one that the original model knows")
    encoded_facts = [encode_fact(original, fact, prompt, metric) for fact in facts]
    sources = [streams_for(model, original, encoded_facts, prompt, metric, scope) for model in (retain_model, changed)]
    lost = np.stack(
        [
            lost_with(original, encoded, streams, metric, scope)
            for encoded, *streams in zip(encoded_facts, *sources, strict=True)
        ]
    )
    return DepthReport(facts=tuple(facts), retain_model=lost[:, 0], changed=lost[:, 1], threshold=threshold)


@torch.inference_mode()
def streams_for(
    source: LanguageModel,
    original: LanguageModel,
    encoded_facts: Sequence[EncodedFact],
    prompt: PromptSpec,
    metric: MetricName,
    scope: Scope,
) -> list[Tensor]:
    """For each fact (layers, tokens of the scope, hidden) in main memory: the stream of `source` after each block.

    Raises UserError for a model of another shape than the original, or that cuts a fact into other tokens.
    """
    mine, its = (model.anatomy for model in (original, source))
    if (mine.layers, mine.hidden) != (its.layers, its.hidden):
        raise UserError(
            f"{source.name} has {its.layers} layers of width {its.hidden} and {original.name} {mine.layers} of {mine.hidden}: "
            "let model, retain_model and original name models of one shape"
        )
    streams = []
    with evaluating(source):
        for encoded in encoded_facts:
            other = encode_fact(source, encoded.fact, prompt, metric)
            if (other.prompt_ids, other.answer_ids) != (encoded.prompt_ids, encoded.answer_ids):
                raise UserError(
                    f"{source.name} cuts fact {encoded.fact.label!r} into other tokens than {original.name}: give it the same "
                    "tokenizer"
                )
            sites = [Site("resid", layer) for layer in range(its.layers)]
            with capture(source, sites) as seen:
                forward(source, embed(source, encoded.input_ids)[None], 1)
            streams.append(torch.stack([seen[site][0, _start(encoded, scope) :].cpu() for site in sites]))
    return streams


@torch.inference_mode()
def lost_with(
    original: LanguageModel, encoded: EncodedFact, streams: Sequence[Tensor], metric: MetricName, scope: Scope
) -> Array:
    """(sources, layers): what the answer loses, in nats a scored token, with each source's stream put in after each block.

    One growing batch: the rows of a layer join after it, with the original's keys and values for the tokens before the scope.

    Raises UserError for NaN.
    """
    tokens, keep = len(encoded.input_ids), len(encoded.answer_ids)
    start = _start(encoded, scope)
    with evaluating(original):
        embeddings = embed(original, encoded.input_ids)[None]
        logits, past = block_replay.trunk(original, embeddings, keep)
        calls, before = block_replay.calls(original, embeddings[:, start:], past.cut(start)), past.cut(start)
        own = float(read_off(logits, Target.of([encoded], 1), metric)[0])
        state = embeddings.new_zeros(0, tokens - start, original.anatomy.hidden)
        for layer, call in enumerate(calls):
            if len(state):
                state = call.run(state, before, torch.zeros(len(state), dtype=torch.long))
            fresh = torch.stack([stream[layer] for stream in streams])
            state = torch.cat([state.to(embeddings.device), fresh.to(embeddings)])
        scored = read_off(block_replay.logits(original, state[:, -keep:]), Target.of([encoded], len(state)), metric)
    scores = scored.cpu().numpy().reshape(len(calls), len(streams)).T
    if np.isnan(scores).any() or np.isnan(own):
        raise UserError(f"fact {encoded.fact.label!r} gave NaN: load the models in float32 or bfloat16")
    return np.asarray((own - scores) / len(encoded.counted or encoded.answer_ids))


def _start(encoded: EncodedFact, scope: Scope) -> int:
    """The first token of the scope."""
    return len(encoded.prompt_ids) - 1 if scope == "answer" else 0
