"""Orders of batches beyond two sides: a third stream of general text, forget rows in folds, forget rows that come late.

Each is as pure as those of `unlearn.training.batches`: a function of the seed and the step. The retain side then holds, after
its own rows, the general texts, and after them the forget rows again, to be held while their fold is not yet forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from lm.errors import UserError
from unlearn.training.batches import Batches, StepRows, permutation, refuse_nothing


@dataclass(frozen=True, kw_only=True)
class StreamBatches:
    """So many rows of each of three streams a step, each stream reshuffled whenever it is used up.

    An epoch is as many steps as the forget and the retain rows need to be seen once; general text goes on from epoch to epoch.

    Attributes:
        forget, retain, general: how many rows there are.
        each: how many of them a step has.
    """

    forget: int
    retain: int
    general: int
    each: tuple[int, int, int]
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_nothing(self.forget)

    @classmethod
    def of_shares(
        cls, *, forget: int, retain: int, general: int, batch: int, forget_share: float, general_share: float, seed: int
    ) -> StreamBatches:
        """A batch cut by shares, each stream that is there with at least one row; the retain rows take what is left."""
        counts = [max(round(batch * forget_share), 1), 0, 0]
        if general:
            counts[2] = max(round(batch * general_share), 1) if retain else batch - counts[0]
        if retain:
            counts[1] = batch - counts[0] - counts[2]
        if (retain and counts[1] < 1) or (general and counts[2] < 1) or counts[0] > batch:
            raise UserError(
                f"batch is {batch}, with {counts[0]} forget rows and {counts[2]} general texts no row is left for the others: "
                "give a larger trainer.batch, or smaller shares"
            )
        return cls(forget=forget, retain=retain, general=general, each=(counts[0], counts[1], counts[2]), seed=seed)

    @cached_property
    def _steps_per_epoch(self) -> int:
        sides = zip((self.forget, self.retain), self.each[:2], strict=True)
        return max(-(-size // count) for size, count in sides if count)

    def total(self, epochs: int) -> int:
        """Optimizer steps in so many epochs."""
        return epochs * self._steps_per_epoch

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that `step`, from 0, belongs to."""
        return step // self._steps_per_epoch

    def step(self, step: int) -> StepRows:
        """The rows of `step`, from 0: forget rows, retain rows, general texts."""
        forget = [(True, row) for row in self._draw(0, self.forget, step)]
        retain = [(False, row) for row in self._draw(1, self.retain, step)]
        return StepRows((*forget, *retain, *((False, self.retain + row) for row in self._draw(2, self.general, step))))

    def _draw(self, stream: int, size: int, step: int) -> list[int]:
        count = self.each[stream]
        places = range(step * count, (step + 1) * count)
        return [permutation(self.seed, stream, place // size, size)[place % size] for place in places]


@dataclass(frozen=True, kw_only=True)
class FoldedBatches:
    """Forget rows in folds, in as many equal stages: stage i forgets folds 1 to i, and retains the others with the retain rows.

    Source: layered unlearning, Qian et al. 2025 (arXiv 2505.09500). Badge: **variant**: the steps of a run are cut in stages,
    and what is to come is retained by the run's own retain term.

    Attributes:
        inner: (forget rows, retain rows) to the order within a stage; the retain rows there are first the retain rows
            themselves, then those forget rows that are held, then what else `inner` draws of that side.
        fold: the fold of each forget row, from 0.
        retain: retain rows.
        general: rows of the retain side between the retain rows and the forget rows that are held.
        steps: of the whole run.
    """

    inner: Callable[[int, int], Batches]
    fold: tuple[int, ...]
    retain: int
    general: int
    steps: int

    def total(self, epochs: int) -> int:
        """The steps of the run, however they are made up."""
        return self.steps

    def epoch(self, step: int) -> int:
        """Of the stage's own order, added up over the stages before."""
        stage, within = self._place(step)
        before = sum(self._orders[each].epoch(self._length - 1) + 1 for each in range(stage))
        return before + self._orders[stage].epoch(within)

    def step(self, step: int) -> StepRows:
        """The rows of `step`, from 0."""
        stage, within = self._place(step)
        forget, held = self._stages[stage]

        def placed(is_forget: bool, row: int) -> tuple[bool, int]:
            if is_forget:
                return True, forget[row]
            if row < self.retain:
                return False, row
            beyond = row - self.retain
            if beyond < len(held):
                return False, self.retain + self.general + held[beyond]
            return False, row - len(held)

        return StepRows(tuple(placed(*each) for each in self._orders[stage].step(within).order))

    @property
    def _folds(self) -> int:
        return max(self.fold) + 1

    @property
    def _length(self) -> int:
        return -(-self.steps // self._folds)

    def _place(self, step: int) -> tuple[int, int]:
        stage = min(step // self._length, self._folds - 1)
        return stage, step - stage * self._length

    @cached_property
    def _stages(self) -> list[tuple[list[int], list[int]]]:
        """Of each stage the forget rows that are forgotten, and those that are held."""
        return [
            (
                [row for row, fold in enumerate(self.fold) if fold <= stage],
                [row for row, fold in enumerate(self.fold) if fold > stage],
            )
            for stage in range(self._folds)
        ]

    @cached_property
    def _orders(self) -> list[Batches]:
        return [self.inner(len(forget), self.retain + len(held)) for forget, held in self._stages]


def deal_folds(documents: Sequence[str], tasks: Sequence[str], folds: int, seed: int) -> tuple[int, ...]:
    """The fold of each row, from 0: documents are dealt out task by task, so that a document's rows lie in one fold.

    Raises:
        UserError: fewer documents than folds.
    """
    dealt: dict[str, int] = {}
    for task in sorted(set(tasks)):
        names = sorted({name for name, of in zip(documents, tasks, strict=True) if of == task})
        for place in permutation(seed, 3, 0, len(names)):
            dealt.setdefault(names[place], len(dealt) % folds)
    if len(dealt) < folds:
        raise UserError(f"trainer.folds is {folds} and there are {len(dealt)} forget documents: give at most so many")
    return tuple(dealt[name] for name in documents)


@dataclass(frozen=True, kw_only=True)
class LateBatches:
    """Another order, whose forget rows are left out of the steps where nothing is forgotten yet."""

    inner: Batches
    quiet: Callable[[int], bool]

    def total(self, epochs: int) -> int:
        """As the other's."""
        return self.inner.total(epochs)

    def epoch(self, step: int) -> int:
        """As the other's."""
        return self.inner.epoch(step)

    def step(self, step: int) -> StepRows:
        """The rows of `step`, from 0."""
        rows = self.inner.step(step)
        return StepRows(tuple(each for each in rows.order if not each[0])) if self.quiet(step) else rows
