"""One fact as the model sees it: token ids, where the subject is, and whether the model gives the answer.

The prompt's tokens come from `lm.prompts`, so that what is traced is what is trained. Nothing is corrupted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lm.errors import UserError
from lm.model import LanguageModel
from lm.prompts import PromptSpec, answer_tokens, check_ids, encode_pair, max_positions, subject_span
from tracing.question.facts import Fact
from tracing.question.metrics import MetricName, metric_of, scored_tokens
from tracing.question.target import distinguishing, first_difference

BROKEN = "\ufffd"
"""What a decoder puts for bytes that are no letter."""
LONGEST_LETTER = 4
"""Bytes of a letter in UTF-8."""


@dataclass(frozen=True)
class EncodedFact:
    """A tokenized fact.

    Attributes:
        prompt_ids: what the model is asked; equal to training's ids before the answer.
        answer_ids: the tokens the metrics score (the whole answer without EOS, or its first token).
        span: `[start, end)` of the subject in `prompt_ids`.
        tokens: the text of each prompt token.
        foil: (place, token) where the fact's foil first differs from the scored answer, if it has one.
        counted: the places of the answer tokens that count; None for all.
    """

    fact: Fact
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    span: tuple[int, int]
    tokens: tuple[str, ...]
    foil: tuple[int, int] | None = None
    counted: tuple[int, ...] | None = None

    @property
    def input_ids(self) -> list[int]:
        """The teacher-forced input: the prompt and all scored answer tokens but the last."""
        return [*self.prompt_ids, *self.answer_ids[:-1]]


def encode_fact(model: LanguageModel, fact: Fact, prompt: PromptSpec, *metrics: MetricName) -> EncodedFact:
    """Tokenize a fact for one metric, or several to be read off the same passes.

    Raises UserError if the subject's tokens cannot be found in the rendered prompt, or one has no embedding.
    """
    pair = encode_pair(model.tokenizer, fact.prompt, fact.answer, replace(prompt, append_eos=False))
    check_ids(model, [pair.ids])
    ids = pair.ids[: pair.answer_start]
    answer = scored_tokens(pair.ids[pair.answer_start :], metrics)
    foil = None
    if fact.foil:
        other = encode_pair(model.tokenizer, fact.prompt, fact.foil, replace(prompt, append_eos=False))
        foil = first_difference(answer, other.ids[other.answer_start :])
    counted = None
    if any(metric_of(name).counts_words for name in metrics):
        words = distinguishing(fact.prompt, fact.answer)
        counted = tuple(answer_tokens(model.tokenizer, fact.prompt, fact.answer, prompt, words))
    span = subject_span(model.tokenizer, fact.prompt, fact.subject, prompt, occurrence="first")
    return EncodedFact(
        fact=fact,
        prompt_ids=tuple(ids),
        answer_ids=tuple(answer),
        foil=foil,
        counted=counted,
        span=span,
        tokens=token_texts(model.tokenizer, ids),
    )


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token. Of a letter that is cut into several tokens each has the whole letter with the token's place in
    it, as in `中 (1 of 3)`: of a piece of its bytes alone there is no text."""
    texts = [str(tokenizer.decode([index])) for index in ids]
    first = 0
    while first < len(ids):
        if BROKEN in texts[first]:
            for last in range(first + 1, min(first + LONGEST_LETTER, len(ids)) + 1):
                whole = str(tokenizer.decode(list(ids[first:last])))
                if BROKEN not in whole and last > first + 1:
                    texts[first:last] = [f"{whole} ({place + 1} of {last - first})" for place in range(last - first)]
                    first = last - 1
                    break
        first += 1
    return tuple(texts)


def forward(model: LanguageModel, embeddings: Tensor, keep: int) -> Tensor:
    """Logits (batch, keep, vocabulary) at the last `keep` positions of embedded prompts (batch, tokens, hidden)."""
    logits: Tensor = model.model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=keep).logits
    return logits[:, -keep:]


def embed(model: LanguageModel, ids: list[int]) -> Tensor:
    """The output of the embedding layer, (tokens, hidden)."""
    layer = model.model.get_input_embeddings()
    assert layer is not None
    hidden: Tensor = layer(torch.tensor(ids, device=next(layer.parameters()).device))
    return hidden


@torch.inference_mode()
def why_unknown(model: LanguageModel, encoded: EncodedFact) -> str | None:
    """None if greedy decoding gives exactly the scored answer tokens; else a sentence with what the model said instead.

    Raises:
        UserError: the model's logits are not finite.
    """
    keep = len(encoded.answer_ids)
    logits = forward(model, embed(model, encoded.input_ids)[None], keep)[0]
    if not bool(torch.isfinite(logits).all()):
        raise UserError(
            f"{model.name} gives NaN or infinite logits for fact {encoded.fact.label!r}: load it in float32 or bfloat16"
        )
    if logits.argmax(-1).tolist() == list(encoded.answer_ids):
        return None
    greedy: list[int] = []
    for _ in range(keep):
        greedy.append(int(forward(model, embed(model, [*encoded.prompt_ids, *greedy])[None], 1)[0, -1].argmax()))
    answer = model.tokenizer.decode(list(encoded.answer_ids))
    said = f"the model says {model.tokenizer.decode(greedy)!r} instead of {answer!r}"
    if encoded.fact.prompt != encoded.fact.prompt.rstrip():
        said += "; the prompt ends in a space, and the answer brings its own: leave it out"
    return said


def why_too_long(model: LanguageModel, encoded: EncodedFact) -> str | None:
    """None if the model has a position for every token of this fact, or how many it lacks."""
    most = max_positions(model)
    tokens = len(encoded.input_ids)
    return None if most is None or tokens <= most else f"its {tokens} tokens are more than the model's {most} positions"


def why_unscored(encoded: EncodedFact, metrics: Sequence[MetricName]) -> str | None:
    """None if the metrics can be read off this fact, or what it lacks."""
    if encoded.foil is None and any(metric_of(name).needs_foil for name in metrics):
        return "it has no foil, another answer that differs from its own"
    return None
