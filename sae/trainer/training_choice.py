"""What a training step shows to `encode_decode` as its choice: main matches, a wider set for Multi-TopK, and idle ones.

It is wiring between `sae.sharding` and `sae.kernels`; the only thing decided here is when the choice may be made part by
part (which saves memory): where no part needs to know of another and no process waits for another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae import allocate
from sae.auxiliary import idle_choice
from sae.kernels import Selection, Splits
from sae.model_config import Choice
from sae.sharding import Chosen, Mesh, RowCuts, feature_choice, mutual_choice
from sae.sparse_code import SparseCode
from sae.trainer.timing import Phases

WIDER = 4


@dataclass
class TrainingChoice:
    """One step's choice on one process; afterwards it says what was found on the way."""

    mesh: Mesh
    choice: Choice
    k: int
    features: int
    """Of the whole dictionary."""
    batch: int
    """Tokens of the global batch."""
    budgets: Tensor | None = None
    """(own features,) for feature choice."""
    idle: Tensor | None = None
    """(own features,) boolean: those that model the residual; None for no auxiliary matches."""
    k_aux: int = 0
    share: Tensor | None = None
    """(own features,): what the encoder gradient of an idle feature is multiplied with."""
    wider: bool = False
    """Choose four times as many, and say in `inner` which of them are the main ones."""
    guess: float | None = None
    """About the smallest activation that mutual choice will take."""
    demand: bool = False
    """Also count what mutual choice would take."""
    clock: Phases | None = None
    smallest: Tensor | None = None
    """The smallest activation chosen in the global batch (see `Chosen`); not for token choice."""
    counts: Tensor | None = None
    """(own features,) int64: what mutual choice would take of the rows here."""
    _inner: list[Tensor] = field(default_factory=list)

    @property
    def splits(self) -> Splits | None:
        data, shards = self.mesh.sizes["data"], self.mesh.sizes["features"]
        if self.choice == "token" and shards == 1:
            return "tokens"
        alone = data == 1 and self.idle is None and not self.wider and not self.demand
        return "features" if self.choice == "feature" and alone else None

    @property
    def inner(self) -> Tensor | None:
        """(matches,) boolean: the main ones among four times as many; None if there are no others."""
        return torch.cat(self._inner) if self._inner else None

    def __call__(self, affinity: Tensor, start: int = 0) -> Selection:
        if self.clock is not None:
            self.clock.stop("encode")
        selection = self._token(affinity) if self.choice == "token" else self._global(affinity, start)
        if self.clock is not None:
            self.clock.stop("select")
        return selection

    def _token(self, affinity: Tensor) -> Selection:
        shards = self.mesh.sizes["features"]
        take = min(self.k * (WIDER if self.wider else 1), self.features)
        main = allocate.token_choice(affinity, take)
        aux = self._idle(affinity)
        if shards > 1:
            codes, widths = ([main], [take]) if aux is None else ([main, aux], [take, self.k_aux])
            cuts = RowCuts(self.mesh, codes, widths)
            keep = cuts.keep(0, take)
            if self.wider:
                self._inner.append(cuts.keep(0, self.k)[keep])
            return self._selection(main.keep(keep), None if aux is None else cuts.cut(1, self.k_aux))
        if self.wider:
            self._inner.append(RowCuts(self.mesh, [main], [take]).keep(0, self.k))
        return self._selection(main, aux)

    def _global(self, affinity: Tensor, start: int) -> Selection:
        chosen = self._chosen(affinity, start, 1)
        main = chosen.code
        smallest = chosen.smallest
        self.smallest = smallest if self.smallest is None else torch.cat([self.smallest, smallest])
        if self.wider:
            main = self._chosen(affinity, start, WIDER).code
            self._inner.append(_among(main, chosen.code))
        if self.demand:
            taken = main if self.choice == "mutual" and not self.wider else self._mutual(affinity, 1).code
            self.counts = taken.feature_counts()
        aux = self._idle(affinity)
        if aux is not None and self.mesh.sizes["features"] > 1:
            aux = RowCuts(self.mesh, [aux], [self.k_aux], "auxiliary choice").cut(0, self.k_aux)
        return self._selection(main, aux)

    def _chosen(self, affinity: Tensor, start: int, times: int) -> Chosen:
        if self.choice == "mutual":
            return self._mutual(affinity, times)
        assert self.budgets is not None
        budgets = self.budgets[start : start + affinity.shape[1]]
        return feature_choice(self.mesh, affinity, (budgets * times).clamp(max=self.batch), batch=self.batch)

    def _mutual(self, affinity: Tensor, times: int) -> Chosen:
        guess = self.guess if times == 1 else None
        return mutual_choice(self.mesh, affinity, self.k * times * self.batch, batch=self.batch, guess=guess)

    def _idle(self, affinity: Tensor) -> SparseCode | None:
        return None if self.idle is None else idle_choice(affinity, self.idle, k_aux=self.k_aux)

    def _selection(self, main: SparseCode, aux: SparseCode | None) -> Selection:
        share = None if aux is None or self.share is None else self.share[aux.indices]
        return Selection(main, aux, share)


def by_threshold(threshold: Tensor) -> Callable[[Tensor, int], Selection]:
    """The choice of an evaluation with fixed (own features,) thresholds, for `splits="tokens"`."""
    return lambda affinity, start: Selection(allocate.by_threshold(affinity, threshold))


def _among(code: SparseCode, others: SparseCode) -> Tensor:
    """(matches of code,) boolean: which of them `others`, a part of it, has too."""
    return torch.isin(*(each.token_ids() * each.features + each.indices for each in (code, others)), assume_unique=True)
