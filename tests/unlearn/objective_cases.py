"""Every objective and every retain term beside the naive formula of its paper, and random batches to compare them on.

The formulas here are written on whole logits in loops over rows and tokens, in float64, and share nothing with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from unlearn.objectives import (
    CEU,
    DPO,
    FLAT,
    NPO,
    PDU,
    RMU,
    UNDIAL,
    WGA,
    AdaptiveRMU,
    Blend,
    CrossEntropy,
    Divergence,
    GeneralizedCrossEntropy,
    GradientAscent,
    GradientDifference,
    HiddenDistance,
    Joint,
    KLMinimization,
    Learn,
    LearnAlternate,
    LookUnseen,
    Needs,
    Objective,
    Retain,
    RowTargets,
    SatImp,
    SimNPO,
    Term,
    TokenStats,
)

VOCABULARY, HIDDEN = 11, 6


@dataclass(frozen=True)
class Batch:
    """What two models gave for some rows.

    Attributes:
        logits, reference: (rows, tokens, vocabulary).
        targets, mask: (rows, tokens).
        hidden, reference_hidden: (rows, places, hidden); hidden_mask (rows, places).
        alternate: the same for alternate answers.
        row_value, row_spread, row_document: (rows,) what calibration rows come to.
    """

    logits: Tensor
    reference: Tensor
    targets: Tensor
    mask: Tensor
    hidden: Tensor
    reference_hidden: Tensor
    hidden_mask: Tensor
    alternate: Batch | None = None
    row_value: Tensor = field(default_factory=lambda: torch.tensor([2.0, 4.5, 1.0, 3.0, 2.6], dtype=torch.float64))
    row_spread: Tensor = field(default_factory=lambda: torch.tensor([0.5, 0.2, 0.9, 0.1, 0.3], dtype=torch.float64))
    row_document: Tensor = field(default_factory=lambda: torch.tensor([True, False, True, False, False]))

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken in."""
        return [self.logits, self.hidden, *(self.alternate.leaves if self.alternate else [])]

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> Batch:
        """Every tensor changed, and leaves again."""
        tensors = {
            f.name: change(f.name, getattr(self, f.name).detach()) for f in fields(self) if f.name != "alternate"
        }
        for name in ("logits", "hidden"):
            tensors[name] = tensors[name].clone().requires_grad_()
        return Batch(**tensors, alternate=self.alternate.mapped(change) if self.alternate else None)

    def rows(self, chosen: list[int]) -> Batch:
        """Some of the rows."""
        return self.mapped(lambda _, values: values[chosen])

    def padded(self, extra: int) -> Batch:
        """The same rows with places after them, which hold large numbers and are not asked for."""

        def pad(name: str, values: Tensor) -> Tensor:
            if values.ndim == 1:
                return values
            more = values.new_full((len(values), extra, *values.shape[2:]), 0 if name == "targets" else 300)
            return torch.cat([values, more.zero_() if name in {"mask", "hidden_mask"} else more], dim=1)

        return self.mapped(pad)


def draw(seed: int = 0, *, dtype: torch.dtype = torch.float64, scale: float = 1.0, alternates: bool = True) -> Batch:
    """Five rows of up to six supervised tokens; places in front (the prompt's) and behind are not supervised."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    rows, tokens = 5, 8
    mask = torch.zeros(rows, tokens, dtype=torch.bool)
    real = torch.zeros(rows, tokens + 1, dtype=torch.bool)
    for row, (first, last) in enumerate([(2, 8), (1, 3), (3, 4), (2, 7), (1, 8)]):
        mask[row, first:last] = True
        real[row, : last + 1] = True
    logits = normal(rows, tokens, VOCABULARY)
    return Batch(
        logits=logits.requires_grad_(),
        reference=logits.detach() + normal(rows, tokens, VOCABULARY) / 3,
        targets=torch.randint(VOCABULARY, (rows, tokens), generator=generator),
        mask=mask,
        hidden=normal(rows, tokens + 1, HIDDEN).requires_grad_(),
        reference_hidden=normal(rows, tokens + 1, HIDDEN),
        hidden_mask=real,
        alternate=draw(seed + 1000, dtype=dtype, scale=scale, alternates=False) if alternates else None,
    )


def statistics(batch: Batch, needs: Needs) -> TokenStats:
    """What the engine would hand over: exactly what was asked for, 0 where not supervised."""

    def placed(values: Tensor) -> Tensor:
        return torch.zeros(batch.mask.shape, dtype=values.dtype).masked_scatter(batch.mask, values)

    def logprob(logits: Tensor) -> Tensor:
        return placed(torch.log_softmax(logits[batch.mask], dim=-1).gather(1, batch.targets[batch.mask][:, None])[:, 0])

    chosen, targets, theirs = batch.logits[batch.mask], batch.targets[batch.mask], batch.reference[batch.mask]
    return TokenStats(
        logprob=logprob(batch.logits) if needs.logprob else torch.zeros(batch.mask.shape, dtype=batch.logits.dtype),
        mask=batch.mask,
        reference_logprob=logprob(batch.reference) if needs.reference_logprob else None,
        values={
            one.name: placed(one.function(chosen, targets, theirs if one.reference else None))
            for one in needs.statistics
        },
        hidden=batch.hidden if needs.hidden else None,
        reference_hidden=batch.reference_hidden if needs.hidden and needs.hidden.reference else None,
        hidden_mask=batch.hidden_mask if needs.hidden else None,
        alternate=statistics(batch.alternate, replace(needs, alternate=False))
        if needs.alternate and batch.alternate
        else None,
        targets=RowTargets(batch.row_value, batch.row_spread, batch.row_document) if needs.targets else None,
    )


def count(batch: Batch, unit: str) -> int:
    """What a term's sum is divided by."""
    if unit == "row":
        return len(batch.mask)
    return int((batch.hidden_mask if unit == "hidden" else batch.mask).sum())


# ------------------------------------------------------------------------------------------------- the naive formulas


def tokens(batch: Batch, row: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Logits, the original's logits and the target of each supervised token of a row."""
    for place in range(batch.mask.shape[1]):
        if batch.mask[row, place]:
            yield batch.logits[row, place], batch.reference[row, place], int(batch.targets[row, place])


def distribution(logits: Tensor) -> Tensor:
    """Probabilities of all tokens."""
    return torch.exp(logits) / torch.exp(logits).sum()


def p(logits: Tensor, target: int) -> Tensor:
    """Probability of the target."""
    return distribution(logits)[target]


def token_mean(one: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[[Batch], Tensor]:
    """The mean of `one` over all supervised tokens."""

    def loss(batch: Batch) -> Tensor:
        return torch.stack([one(*token) for row in range(len(batch.mask)) for token in tokens(batch, row)]).mean()

    return loss


def row_mean(one: Callable[[Batch, int], Tensor]) -> Callable[[Batch], Tensor]:
    """The mean of `one` over rows."""
    return lambda batch: torch.stack([one(batch, row) for row in range(len(batch.mask))]).mean()


def hidden_mean(target: Callable[[Batch, int, int], Tensor]) -> Callable[[Batch], Tensor]:
    """The mean over the tokens asked for, and over dimensions, of the squared distance from `target`."""

    def loss(batch: Batch) -> Tensor:
        places = [(int(row), int(place)) for row, place in batch.hidden_mask.nonzero()]
        return torch.stack([((batch.hidden[r, t] - target(batch, r, t)) ** 2).mean() for r, t in places]).mean()

    return loss


def sequence(batch: Batch, row: int, *, ratio: bool) -> Tensor:
    """`log p` of a row's answer, or of its ratio to the original's."""
    return sum(
        (torch.log(p(z, y)) - (torch.log(p(theirs, y)) if ratio else 0.0) for z, theirs, y in tokens(batch, row)),
        torch.zeros((), dtype=torch.float64),
    )


def other(batch: Batch) -> Batch:
    """The alternates."""
    assert batch.alternate is not None
    return batch.alternate


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def kl(z: Tensor, theirs: Tensor, y: int) -> Tensor:
    return (distribution(theirs) * torch.log(distribution(theirs) / distribution(z))).sum()


def undial(z: Tensor, theirs: Tensor, y: int) -> Tensor:
    lowered = theirs.clone()
    lowered[y] -= 10.0
    return -(distribution(lowered) * torch.log(distribution(z))).sum()


def ceu(z: Tensor, theirs: Tensor, y: int) -> Tensor:
    rest = [v for v in range(len(z)) if v != y]
    others = distribution(z)[rest].detach()
    return -(others / others.sum() * torch.log(distribution(z)[rest])).sum()


def mean_p(batch: Batch, row: int) -> Tensor:
    return torch.stack([p(z, y) for z, _, y in tokens(batch, row)]).mean()


def flat(divergence: str) -> Callable[[Batch], Tensor]:
    """`f*(g(P)) - g(P_alternate)` from the conjugates `f*(u)` themselves."""
    g: dict[str, Callable[[Tensor], Tensor]] = {
        "total_variation": lambda v: torch.tanh(v) / 2,
        "kl": lambda v: v,
        "jensen_shannon": lambda v: torch.log(2 / (1 + torch.exp(-v))),
        "pearson": lambda v: v,
    }
    conjugate: dict[str, Callable[[Tensor], Tensor]] = {
        "total_variation": lambda u: u,
        "kl": lambda u: torch.exp(u - 1),
        "jensen_shannon": lambda u: -torch.log(2 - torch.exp(u)),
        "pearson": lambda u: u**2 / 4 + u,
    }
    return row_mean(
        lambda b, r: conjugate[divergence](g[divergence](mean_p(b, r))) - g[divergence](mean_p(other(b), r))
    )


def steered(batch: Batch, row: int, place: int) -> Tensor:
    u = torch.rand(batch.hidden.shape[-1], generator=torch.Generator().manual_seed(3)).double()
    return 2.0 * u / torch.sqrt((u**2).sum())


def steered_adaptively(batch: Batch, row: int, place: int) -> Tensor:
    places = [int(t) for t in batch.hidden_mask[row].nonzero()]
    norm = sum(float(torch.sqrt((batch.reference_hidden[row, t] ** 2).sum())) for t in places) / len(places)
    return steered(batch, row, place) / 2.0 * 5.0 * norm


def unseen_sharp(batch: Batch, row: int) -> Tensor:
    """With weights 1 and 0.5, cap 16, above 0."""
    losses = [-torch.log(p(z, y)) for z, _, y in tokens(batch, row)]
    return (1.0 if batch.row_document[row] else 0.5) * abs(batch.row_value[row] - sum(losses) / len(losses))


def unseen(batch: Batch, row: int) -> Tensor:
    """With weights 0.7 and 0.3, cap 2.5, above 0.2, within 0.5, smooth 2."""
    losses = [(-torch.log(p(z, y))).clamp(max=2.5) for z, _, y in tokens(batch, row)]
    away = abs(batch.row_value[row] + 0.2 - sum(losses) / len(losses)) - 0.5 * batch.row_spread[row]
    width, weight = 2 * float(batch.row_spread[row]), 0.7 if batch.row_document[row] else 0.3
    if float(away.detach()) >= width:
        return weight * (away - width / 2)
    return weight * (away**2 / (2 * width) if float(away.detach()) > 0 else 0.0 * away)


# ------------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Case:
    """A term of the package and the naive formula of its mean."""

    of: Objective | Retain
    naive: Callable[[Batch], Tensor]

    @property
    def needs(self) -> Needs:
        """What the term reads."""
        return self.of.forget_needs() if isinstance(self.of, Objective) else self.of.needs()

    def term(self, stats: TokenStats) -> Term:
        """The term itself."""
        return self.of.forget_term(stats) if isinstance(self.of, Objective) else self.of.term(stats)

    def total(self, batch: Batch) -> Tensor:
        """Its sum."""
        return self.term(statistics(batch, self.needs)).total

    def mean(self, batch: Batch) -> Tensor:
        """Its mean over the batch, as the trainer takes it."""
        term = self.term(statistics(batch, self.needs))
        return term.total / count(batch, term.unit)


ascent = token_mean(lambda z, _, y: torch.log(p(z, y)))
CASES = [
    Case(GradientAscent(), ascent),
    Case(GradientAscent(forget_cap=2.0), token_mean(lambda z, _, y: torch.log(p(z, y)).clamp(min=-2.0))),
    Case(GradientDifference(), ascent),
    Case(KLMinimization(), ascent),
    Case(Joint(), token_mean(lambda z, _, y: torch.log(p(z, y)).clamp(min=-8.0))),
    Case(Learn(), token_mean(lambda z, _, y: -torch.log(p(z, y)))),
    Case(NPO(beta=0.3), row_mean(lambda b, r: -2 / 0.3 * log_sigmoid(-0.3 * sequence(b, r, ratio=True)))),
    Case(
        DPO(beta=0.3),
        row_mean(
            lambda b, r: -2 / 0.3 * log_sigmoid(0.3 * (sequence(other(b), r, ratio=True) - sequence(b, r, ratio=True)))
        ),
    ),
    Case(
        SimNPO(beta=2.5, gamma=0.4),
        row_mean(lambda b, r: -2 / 2.5 * log_sigmoid(-2.5 / int(b.mask[r].sum()) * sequence(b, r, ratio=False) - 0.4)),
    ),
    Case(WGA(alpha=1.5), token_mean(lambda z, _, y: p(z, y).detach() ** 1.5 * torch.log(p(z, y)))),
    Case(
        SatImp(beta1=2.0, beta2=0.5),
        token_mean(lambda z, _, y: p(z, y).detach() ** 2.0 * (1 - p(z, y).detach()) ** 0.5 * torch.log(p(z, y))),
    ),
    Case(GeneralizedCrossEntropy(q=0.7), token_mean(lambda z, _, y: -(1 - p(z, y) ** 0.7) / 0.7)),
    Case(GeneralizedCrossEntropy(q=1.0), token_mean(lambda z, _, y: p(z, y) - 1)),
    Case(UNDIAL(strength=10.0), token_mean(undial)),
    Case(CEU(), token_mean(ceu)),
    Case(PDU(), token_mean(lambda z, _, y: (z.max() - z.sum() / len(z)) ** 2)),
    Case(
        LearnAlternate(),
        row_mean(lambda b, r: -sequence(other(b), r, ratio=False) / int(other(b).mask[r].sum())),
    ),
    *(Case(FLAT(divergence=d), flat(d)) for d in ("total_variation", "kl", "jensen_shannon", "pearson")),
    Case(LookUnseen(documents=0.7, questions=0.3, cap=2.5, above=0.2, within=0.5, smooth=2.0), row_mean(unseen)),
    Case(LookUnseen(documents=1.0, questions=0.5, above=0.0, smooth=0.0), row_mean(unseen_sharp)),
    Case(RMU(layer=1, scale=2.0, seed=3), hidden_mean(steered)),
    Case(AdaptiveRMU(layer=1, scale=5.0, seed=3), hidden_mean(steered_adaptively)),
    Case(CrossEntropy(), token_mean(lambda z, _, y: -torch.log(p(z, y)))),
    Case(Divergence(), token_mean(kl)),
    Case(
        Blend(cross_entropy=0.4, divergence=0.2),
        token_mean(lambda z, theirs, y: -0.4 * torch.log(p(z, y)) + 0.2 * kl(z, theirs, y)),
    ),
    Case(HiddenDistance(layer=1), hidden_mean(lambda b, r, t: b.reference_hidden[r, t])),
]
