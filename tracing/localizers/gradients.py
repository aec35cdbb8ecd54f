"""Gradients of answers with respect to weights: which weights belong to which module, and what a fact's gradient is there.

For localizers that ask the weights instead of the activations (`tracing.localizers.gradient_overlap`,
`tracing.localizers.weight_attribution`). One fact at a time, in one forward and one backward pass; no parameter's `.grad` is
read or written. Nothing is trained here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lm.anatomy import Kind
from lm.errors import UserError
from lm.model import LanguageModel
from tracing.question.encoded_fact import EncodedFact, embed, forward
from tracing.question.target import token_log_probabilities

Place = tuple[Kind, int]
"""A module: (kind, layer)."""


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise UserError unless the kinds are of those that own weights, once each."""
    if not kinds or len(set(kinds)) != len(kinds) or not set(kinds) <= {"mlp", "attn"}:
        raise UserError(f"the kinds {tuple(kinds)} are not usable for weights: choose of mlp and attn, once each")


def module_weights(model: LanguageModel, kinds: Sequence[Kind]) -> dict[Place, dict[str, nn.Parameter]]:
    """The parameters of each kind and layer by name. Norms of the stream belong to neither; those inside attention do.

    Raises:
        UserError: a layer without such parameters (a wrapper renamed them).
    """
    check_kinds(kinds)
    named = dict(model.model.named_parameters())
    found: dict[Place, dict[str, nn.Parameter]] = {}
    for kind in kinds:
        for layer in range(model.anatomy.layers):
            prefix = model.anatomy.weight_prefix(layer, "mlp" if kind == "mlp" else "attn")
            found[kind, layer] = {name: weight for name, weight in named.items() if name.startswith(prefix)}
            if not found[kind, layer]:
                raise UserError(f"{model.name} has no weights under {prefix[0]}: load it with lm.load, unwrapped")
    return found


@contextmanager
def differentiable(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """While open, gradients can be taken with respect to these weights, whether they were frozen or not."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for weight, kept in zip(weights, before, strict=True):
            weight.requires_grad_(kept)


def answer_loss(model: LanguageModel, encoded: EncodedFact) -> Tensor:
    """The mean cross-entropy of the answer's tokens in nats, teacher forced: what training on the fact lowers (without EOS)."""
    logits = forward(model, embed(model, encoded.input_ids)[None], len(encoded.answer_ids))
    return -token_log_probabilities(logits, torch.tensor([encoded.answer_ids])).mean()


def answer_gradient(
    model: LanguageModel, encoded: EncodedFact, weights: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """d `answer_loss` / d weight, by name, in float32 (float64 stays); zero for weights that the answer does not use.

    Call it inside `differentiable`.

    Raises:
        UserError: NaN or infinite numbers.
    """
    found = torch.autograd.grad(answer_loss(model, encoded), list(weights.values()), materialize_grads=True)
    gradients = {name: _wide(gradient) for name, gradient in zip(weights, found, strict=True)}
    if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values()):
        raise UserError(
            f"the gradient of fact {encoded.fact.label!r} has NaN or infinite values: load {model.name} in float32 or bfloat16"
        )
    return gradients


def zeroing_effects(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|w * dL/dw| for every single weight, in float32 (float64 stays): by how much zeroing it changes the loss, to first order,
    without the sign."""
    return {name: (_wide(weights[name].detach()) * gradient).abs() for name, gradient in gradients.items()}


def add_to(total: dict[str, Tensor], values: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """Add `scale` times some tensors to those of the same names in `total`, in place."""
    for name, value in values.items():
        total[name] = total[name].add_(value, alpha=scale) if name in total else value * scale


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
