"""What stays the same during a run, computed once before it: the original's log-probabilities, the stream below the scope.

Only rows that will be drawn are computed. What must be asked of the original model step by step is
`unlearn.forward.reference_model`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from lm.errors import UserError
from lm.model import LanguageModel
from lm.run_folder import RunFolder
from unlearn.forward.passes import Passes
from unlearn.forward.reference_model import untrained
from unlearn.objectives import Loss, Needs
from unlearn.scope.scope import readable_size
from unlearn.training.batches import Batches
from unlearn.training.config import TrainerConfig
from unlearn.training.side import Side
from unlearn.training.tensor_store import RowStore, stored


def asks_original(needs: Needs, config: TrainerConfig) -> bool:
    """Whether the original model must be asked at every step."""
    if config.reference == "cached":
        needs = replace(needs, reference_logprob=False)
    if config.cached_logits is not None:
        needs = replace(needs, statistics=())
    return needs.reference


@dataclass(frozen=True, kw_only=True)
class ReferenceCache:
    """Computes, before the first step, what the steps will ask for again and again. The model must be as it was loaded.

    Attributes:
        run: in whose folder it is kept.
        made_from: the model's fingerprint.
    """

    passes: Passes
    config: TrainerConfig
    batches: Batches
    steps: int
    run: RunFolder
    made_from: str

    def fill(self, forget: Side, retain: Side, loss: Loss) -> tuple[Side, Side]:
        """Both sides, with what is known of them now. Every process must call it."""
        drawn_forget = used_texts(forget, self.batches, self.steps, loss.forget_needs, forget=True)
        drawn_retain = used_texts(retain, self.batches, self.steps, loss.retain_needs, forget=False)
        if self.config.cache_below:
            sizes = [(forget, drawn_forget), (retain, drawn_retain)]
            self.passes.acc.print(size_below(self.passes.model, sizes, self.passes.start))
        return (
            self._filled(forget, loss.forget_needs, drawn_forget, "forget"),
            self._filled(retain, loss.retain_needs, drawn_retain, "retain"),
        )

    def _filled(self, side: Side, needs: Needs, drawn: set[int], name: str) -> Side:
        passes, config = self.passes, self.config

        def store(what: str, compute: Callable[[list[int]], list[Tensor]]) -> RowStore:
            return stored(
                passes.acc,
                self.run,
                f"{name}-{what}",
                side.texts,
                sorted(drawn),
                compute,
                made_from=f"{self.made_from} {config.autocast}",
                size=config.micro_batch,
            )

        def streams(places: list[int]) -> list[Tensor]:
            return passes.streams([side.texts[place] for place in places], passes.start - 1)

        def logprobs(places: list[int]) -> list[Tensor]:
            return passes.logprobs([side.texts[place] for place in places], below=side.streams(places))

        def likeliest(places: list[int], most: int) -> list[Tensor]:
            return passes.likeliest([side.texts[place] for place in places], most, below=side.streams(places))

        with untrained(passes.model.model):
            if config.cache_below:
                side = replace(side, below=store(f"stream-{passes.start - 1}", streams))
            if needs.reference_logprob and config.reference == "cached":
                side = replace(side, original=store("original", logprobs))
            most = config.cached_logits
            if most is not None and any(statistic.reference for statistic in needs.statistics):
                side = replace(side, known=store(f"logits-{most}", lambda places: likeliest(places, most)))
        return side


def used_texts(side: Side, batches: Batches, steps: int, needs: Needs, *, forget: bool) -> set[int]:
    """The places in `side.texts` of everything that the steps will draw."""
    used: set[int] = set()
    for step in range(steps):
        rows = batches.step(step).forget if forget else batches.step(step).retain
        used.update(rows)
        if needs.alternate:
            used.update(side.alternate(row, batches.epoch(step)) for row in rows)
    return used


def size_below(model: LanguageModel, sides: list[tuple[Side, set[int]]], first: int) -> str:
    """What keeping the stream below the scope takes, in a sentence.

    Raises:
        UserError: the scope begins at the first block, or before.
    """
    if first == 0:
        raise UserError(
            "trainer.cache_below is true, but layer 0 or the embedding may change, so nothing below the scope stays the same: "
            "set it to false, or leave layer 0 out of the scope"
        )
    tokens = sum(len(side.texts[text].ids) for side, used in sides for text in used)
    width = next(model.model.parameters()).element_size() * model.anatomy.hidden
    return f"the stream that layer {first} reads is kept: {tokens:,} tokens, {readable_size(tokens * width)} on disk"
