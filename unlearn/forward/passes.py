"""One micro-batch through the model, and out of it what a term reads and nothing more.

A pass goes as deep as `Needs` says; the head sees supervised positions only, a chunk at a time. All of it happens inside
the prepared model's own forward call, so that DDP, FSDP2, autocast and gradient checkpointing find what they expect. How
numbers become losses is `unlearn.training.step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from lm.anatomy import Anatomy, Site
from lm.forward.hooks import capture
from lm.forward.partial import backbone, forward_replaced, head_logits, starting_with, up_to
from lm.model import LanguageModel
from lm.prompts import Encoded
from lm.shards import is_sharded
from unlearn.forward.chunked_head import Measure, chunk_tokens, in_chunks
from unlearn.forward.known_logits import KnownLogits, joined, likeliest
from unlearn.forward.reference_model import Reference
from unlearn.objectives import HiddenNeed, Needs, TokenStats


@dataclass(frozen=True)
class Inputs:
    """A right-padded micro-batch.

    Attributes:
        ids, attention: (rows, tokens) token ids, and 1 on real tokens.
        targets: (rows, tokens - 1) the next token at each position.
        mask: (rows, tokens - 1) True where that target is supervised.
        supervised: whether any target is.
    """

    ids: Tensor
    attention: Tensor
    targets: Tensor
    mask: Tensor
    supervised: bool


def collate(rows: Sequence[Encoded], pad: int, device: torch.device) -> Inputs:
    """Pad rows to one length. No rows at all gives one row of padding with nothing supervised, so that every process works."""
    if not rows:
        ids = torch.full((1, 2), pad, dtype=torch.long, device=device)
        return Inputs(
            ids, torch.ones_like(ids), ids[:, 1:], torch.zeros((1, 1), dtype=torch.bool, device=device), False
        )
    ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True, padding_value=pad)
    positions, lengths = torch.arange(ids.shape[1]), torch.tensor([[len(row.ids)] for row in rows])
    attention = (positions < lengths).long()
    mask = (positions >= torch.tensor([[row.answer_start] for row in rows])) & (positions < lengths)
    any_target = bool(mask.any())
    return Inputs(ids.to(device), attention.to(device), ids[:, 1:].to(device), mask[:, 1:].to(device), any_target)


Read = dict[str, Tensor]
"""What a pass gave: `logprob` and `values.<name>`, each (supervised tokens,); `state`, (supervised tokens, hidden), what the
head read there; `stream`, (rows, positions, hidden). With nothing supervised the first three hold one token's."""


class Passes:
    """Forward passes of a prepared model.

    Args:
        wrapped: what `Accelerator.prepare` made of `model.model`, or that itself.
        reference: the way back to the original model; None if nothing asks for it.
    """

    def __init__(
        self, acc: Accelerator, wrapped: nn.Module, model: LanguageModel, *, reference: Reference | None = None
    ) -> None:
        self.acc, self.wrapped, self.model, self.reference = acc, wrapped, model, reference
        self.start, self._sharded = first_block(model), is_sharded(wrapped)
        self.pad, self._brief = int(model.tokenizer.pad_token_id), False
        self._head: nn.Module = model.model.get_submodule(model.anatomy.head)
        self._head_learns = any(p.requires_grad for p in self._head.parameters())
        self.chunk = chunk_tokens(model.anatomy.vocabulary, acc.device, head_learns=self._head_learns)

    def stats(
        self,
        texts: Sequence[Encoded],
        needs: Needs,
        *,
        alternates: int = 0,
        originals: Sequence[Tensor] | None = None,
        known: Sequence[Tensor] | None = None,
        below: Sequence[Tensor] | None = None,
    ) -> TokenStats:
        """The statistics of some rows.

        Args:
            texts: the rows, and after them their alternates, which go through the model together with them.
            alternates: how many of the texts are alternates: none, or half.
            originals: (supervised tokens,) of each text, the original's log-probabilities where they are known already.
            known: what `likeliest` kept of the original's logits at each text's supervised tokens, likewise.
            below: (tokens, hidden) of each text, what the block `self.start` reads, likewise.
        """
        if self._brief:
            texts = [Encoded(text.ids, max(text.answer_start, len(text.ids) - 2)) for text in texts]
            originals = None if originals is None else [each[-2:] for each in originals]
            known = None if known is None else [each[-2:] for each in known]
        inputs = collate(texts, self.pad, self.acc.device)
        not_yet_known = needs if originals is None else replace(needs, reference_logprob=False)
        if known is not None:
            not_yet_known = replace(not_yet_known, statistics=())
        reference = self._original(not_yet_known, inputs, below) if not_yet_known.reference else {}
        if originals:
            reference["logprob"] = torch.cat(list(originals)).to(self.acc.device)
        current = self._pass(
            inputs, needs, reference, below, known=None if not known else joined(known, self.acc.device)
        )
        stats = TokenStats(
            logprob=_on_targets(current.get("logprob"), inputs),
            mask=inputs.mask,
            reference_logprob=_on_targets(reference.get("logprob"), inputs) if needs.reference_logprob else None,
            values={
                statistic.name: _on_targets(current[f"values.{statistic.name}"], inputs)
                for statistic in needs.statistics
            },
            hidden=current.get("stream"),
            reference_hidden=reference.get("stream"),
            hidden_mask=_wanted_tokens(needs.hidden, inputs) if needs.hidden is not None else None,
        )
        if not needs.alternate:
            return stats
        if not texts:
            return replace(stats, alternate=stats)
        rows = len(texts) - alternates
        return replace(_of_rows(stats, slice(rows)), alternate=_of_rows(stats, slice(rows, None)))

    @contextmanager
    def two_targets_a_row(self) -> Iterator[None]:
        """While open, only the last two tokens of each answer are supervised, one at a time: as few logits exist as can be, and
        little time is spent on them. Two, so that a head's gradients are added up as they will be."""
        usual, self.chunk, self._brief = self.chunk, 1, True
        try:
            yield
        finally:
            self.chunk, self._brief = usual, False

    @contextmanager
    def same_weights(self) -> Iterator[None]:
        """While open, no weight changes: what autocast makes of them is made once and not at every pass. Shards come anew at
        every pass."""
        if self._sharded:
            yield
            return
        with torch.autocast(
            self.acc.device.type, enabled=False
        ):  # what is cached lives as long as the outermost of these
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While open, passes go round the wrapper: DDP sends the buffers to all processes in a forward, and would wait for those
        that have none."""
        usual, self.wrapped = self.wrapped, self.model.model
        try:
            yield
        finally:
            self.wrapped = usual

    def unread(self, needs: Needs) -> list[nn.Parameter]:
        """The trainable parameters on which nothing that `needs` asks for depends."""
        named = self.model.model.named_parameters()
        return [p for name, p in named if p.requires_grad and not reads(self.model.anatomy, needs, name)]

    def logprobs(self, texts: Sequence[Encoded], *, below: Sequence[Tensor] | None = None) -> list[Tensor]:
        """For each text, (supervised tokens,) the targets' log-probabilities, without a graph."""
        inputs = collate(texts, self.pad, self.acc.device)
        with torch.no_grad():
            logprob = self._pass(inputs, Needs(), {}, below)["logprob"]
        sizes = inputs.mask.sum(dim=1).tolist()
        return list(torch.split(logprob[: sum(sizes)], sizes)) if texts else []

    def likeliest(self, texts: Sequence[Encoded], most: int, *, below: Sequence[Tensor] | None = None) -> list[Tensor]:
        """For each text what is kept of the logits at its supervised tokens (`unlearn.forward.known_logits`)."""
        inputs = collate(texts, self.pad, self.acc.device)

        def read(output: BaseModelOutput, stream: Tensor | None) -> Read:
            assert output.last_hidden_state is not None
            supervised = _supervised(output.last_hidden_state, inputs)

            def measure(hidden: Tensor, span: slice) -> tuple[Tensor, ...]:
                return (likeliest(head_logits(self.model, output, hidden, {}), most),)

            return {"kept": in_chunks(measure, supervised, size=self.chunk, head_learns=False)[0]}

        with torch.no_grad():
            kept = self._run(inputs, read, below, whole=True, hidden=None)["kept"]
        sizes = inputs.mask.sum(dim=1).tolist()
        return list(torch.split(kept[: sum(sizes)], sizes)) if texts else []

    def streams(self, texts: Sequence[Encoded], layer: int) -> list[Tensor]:
        """For each text, (tokens, hidden) the stream after block `layer`, without a graph."""
        inputs = collate(texts, self.pad, self.acc.device)
        with torch.no_grad():
            streams = self._pass(inputs, Needs(logprob=False, hidden=HiddenNeed(layer)), {}, None)["stream"]
        return [stream[: len(text.ids)].clone() for stream, text in zip(streams, texts, strict=False)]

    def _original(self, needs: Needs, inputs: Inputs, below: Sequence[Tensor] | None) -> Read:
        """What the original model gives for the same rows, without a graph."""
        assert self.reference is not None  # made for every loss that says it needs one
        hidden = needs.hidden if needs.hidden is not None and needs.hidden.reference else None
        of_original = Needs(logprob=needs.reference_logprob, hidden=hidden)
        with self.reference.restored():
            return self._pass(inputs, of_original, {}, below, state=any(each.reference for each in needs.statistics))

    def _pass(
        self,
        inputs: Inputs,
        needs: Needs,
        reference: Read,
        below: Sequence[Tensor] | None,
        *,
        state: bool = False,
        known: KnownLogits | None = None,
    ) -> Read:
        """One pass of the model as it is.

        Args:
            reference: what the original gave, for statistics that compare.
            below: what the block `self.start` reads, if the blocks before it need not run.
            state: also give what the head read, and keep the head.
            known: the original's logits, for statistics that compare.
        """
        names = [*(["logprob"] if needs.logprob else []), *(f"values.{each.name}" for each in needs.statistics)]

        def read(output: BaseModelOutput, stream: Tensor | None) -> Read:
            result = {} if stream is None else {"stream": stream}
            if state or names:
                assert output.last_hidden_state is not None
                supervised = _supervised(output.last_hidden_state, inputs)
                if state and self.reference is not None:
                    self.reference.keep_head(self._head)
                    result["state"] = supervised
                if names:
                    measure = self._measure(needs, output, inputs, reference, known)
                    values = in_chunks(measure, supervised, size=self.chunk, head_learns=self._head_learns)
                    result |= dict(zip(names, values, strict=True))
            return result

        return self._run(inputs, read, below, whole=state or bool(names), hidden=needs.hidden)

    def _run(
        self,
        inputs: Inputs,
        read: Callable[[BaseModelOutput, Tensor | None], Read],
        below: Sequence[Tensor] | None,
        *,
        whole: bool,
        hidden: HiddenNeed | None,
    ) -> Read:
        """`read(what the backbone gave, the stream asked for)`, inside the model's forward call and as deep as needed."""
        site = None if hidden is None else Site("resid", hidden.layer)

        def forward(input_ids: Tensor, attention_mask: Tensor) -> Read:
            cached = AutocastKwargs(
                cache_enabled=torch.is_grad_enabled()
            )  # the original's weights, or no graph: not for others
            with self.acc.autocast(cached), ExitStack() as parts:
                if hidden is not None and not whole:
                    parts.enter_context(up_to(self.model, hidden.layer))
                if below is not None and (hidden is None or hidden.layer >= self.start):
                    parts.enter_context(starting_with(self.model, self.start, self._padded(below, inputs)))
                captured = None
                if site is not None and whole:
                    captured = parts.enter_context(capture(self.model, [site], detach=False))
                output = backbone(self.model, input_ids=input_ids, attention_mask=attention_mask)
                if site is None:
                    return read(output, None)
                return read(output, output.last_hidden_state if captured is None else captured[site])

        with forward_replaced(self.model.model, forward):
            result: Read = self.wrapped(input_ids=inputs.ids, attention_mask=inputs.attention)
        return result

    def _padded(self, below: Sequence[Tensor], inputs: Inputs) -> Tensor:
        """(rows, tokens, hidden) the streams of the texts; without texts as many zeros, so that every process does the same."""
        if not below:
            width = self.model.anatomy.hidden
            return torch.zeros((*inputs.ids.shape, width), dtype=self.model.model.dtype, device=self.acc.device)
        return pad_sequence(list(below), batch_first=True).to(self.acc.device)

    def _measure(
        self, needs: Needs, output: BaseModelOutput, inputs: Inputs, reference: Read, known: KnownLogits | None
    ) -> Measure:
        """What is computed of a chunk's logits."""
        targets = inputs.targets[inputs.mask] if inputs.supervised else inputs.targets.new_zeros(1)
        compared = any(each.reference for each in needs.statistics)
        cast = {} if self._head_learns and torch.is_grad_enabled() else _autocast_weights(self._head)

        def measure(hidden: Tensor, span: slice) -> tuple[Tensor, ...]:
            logits, original = head_logits(self.model, output, hidden, cast), None
            if compared and "state" in reference and self.reference is not None:
                original_head = {**cast, **self.reference.head_weights}
                with torch.no_grad(), self.reference.at_head():
                    original = head_logits(self.model, output, reference["state"][span], original_head)
            with torch.autocast(logits.device.type, enabled=False):
                logits, original = logits.float(), original.float() if original is not None else None
                if compared and original is None:
                    original = logits.detach() if known is None else known[span].whole(logits)
                logprob = [-cross_entropy(logits, targets[span], reduction="none")] if needs.logprob else []
                statistics = [
                    each.function(logits, targets[span], original if each.reference else None)
                    for each in needs.statistics
                ]
            return (*logprob, *statistics)

        return measure


def reads(anatomy: Anatomy, needs: Needs, name: str) -> bool:
    """Whether anything that `needs` asks for depends on the parameter `name`: a pass may end before it."""
    if needs.vocabulary or needs.hidden is None:
        return needs.vocabulary
    above = [f"{anatomy.block_path(layer)}." for layer in range(needs.hidden.layer + 1, anatomy.layers)]
    return not name.startswith((*above, f"{anatomy.norm}.", f"{anatomy.head}."))


def first_block(model: LanguageModel) -> int:
    """The first block that something trainable changes; 0 if that is before the blocks, and their number if none is."""
    anatomy, first = model.anatomy, model.anatomy.layers
    for name, parameter in model.model.named_parameters():
        if not parameter.requires_grad or name.startswith((f"{anatomy.norm}.", f"{anatomy.head}.")):
            continue
        inside = [layer for layer in range(first) if name.startswith(f"{anatomy.block_path(layer)}.")]
        first = inside[0] if inside else first if name.startswith(f"{anatomy.blocks}.") else 0
    return first


def _autocast_weights(head: nn.Module) -> dict[str, Tensor]:
    """A linear head's parameters, as constants, in the type that autocast would give them; nothing where it is off."""
    kind = next(head.parameters()).device.type
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point() or not torch.is_autocast_enabled(kind):
        return {}
    dtype = torch.get_autocast_dtype(kind)
    return {name: value.detach().to(dtype) for name, value in head.named_parameters(recurse=False)}


def _supervised(hidden: Tensor, inputs: Inputs) -> Tensor:
    """(n, hidden) the states that supervised targets are predicted from; any one if there are none, so that a graph (and,
    on several processes, the gradient of every part) is there."""
    return hidden[:, :-1][inputs.mask] if inputs.supervised else hidden.flatten(0, 1)[:1]


def _on_targets(values: Tensor | None, inputs: Inputs) -> Tensor:
    """(rows, tokens - 1) the values on supervised targets, 0 elsewhere."""
    result = torch.zeros(inputs.mask.shape, dtype=torch.float32, device=inputs.mask.device)
    if values is None:
        return result
    return result.masked_scatter(inputs.mask, values) if inputs.supervised else result + 0.0 * values.sum()


def _wanted_tokens(hidden: HiddenNeed, inputs: Inputs) -> Tensor:
    """(rows, tokens) True on the tokens whose stream is asked for."""
    real = inputs.attention.bool() & inputs.supervised
    if hidden.tokens == "all":
        return real
    return torch.cat([torch.zeros_like(inputs.mask[:, :1]), inputs.mask], dim=1)


def _of_rows(stats: TokenStats, rows: slice) -> TokenStats:
    """The statistics of some of the rows."""

    def cut(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows]

    return TokenStats(
        logprob=stats.logprob[rows],
        mask=stats.mask[rows],
        reference_logprob=cut(stats.reference_logprob),
        values={name: value[rows] for name, value in stats.values.items()},
        hidden=cut(stats.hidden),
        reference_hidden=cut(stats.reference_hidden),
        hidden_mask=cut(stats.hidden_mask),
    )
