"""Each objective against numbers worked out by hand and the published tables."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lm.errors import UserError
from unlearn.objectives import (
    NPO,
    Adaptive,
    Fixed,
    GradientAscent,
    GradientDifference,
    Joint,
    KLMinimization,
    Loss,
    RetainMemory,
    TokenStats,
)


def stats(
    logprob: list[list[float]], mask: list[list[int]] | None = None, reference: list[list[float]] | None = None
) -> TokenStats:
    values = torch.tensor(logprob, requires_grad=True)
    chosen = torch.tensor(mask).bool() if mask else torch.ones_like(values, dtype=torch.bool)
    return TokenStats(values, chosen, None if reference is None else torch.tensor(reference))


def gradient(total: Tensor, of: TokenStats) -> list[list[float]]:
    (grad,) = torch.autograd.grad(total, of.logprob)
    result: list[list[float]] = grad.tolist()
    return result


@pytest.mark.parametrize(
    ("d", "value"), [(0.1, 1.2), (math.log(4 / 3) / math.log(6), 1.2), (0.5, 1.5348), (0.898244, 2.3), (3.0, 2.3)]
)
def test_adaptive_weight_follows_the_published_table(d: float, value: float) -> None:
    assert Adaptive().alpha(d) == pytest.approx(value, abs=1e-4)


def test_upper_clip_of_the_summary_is_reached_where_the_reference_says() -> None:
    joint = Adaptive(alpha_max=2.8)
    edge = math.log(20 / 3) / math.log(6)
    assert joint.alpha(edge - 1e-6) < 2.8
    assert joint.alpha(edge + 1e-6) == 2.8
    assert joint.alpha(1e9) == 2.8, "a huge deviation must not overflow"


def test_rounding_happens_before_clipping() -> None:
    assert Adaptive(round_alpha=True).alpha(0.5) == 1.5
    assert Adaptive(round_alpha=True, alpha_min=1.25).alpha(0.0) == 1.25


def test_weight_is_the_minimum_in_epoch_0_and_whenever_retain_is_no_worse() -> None:
    memory = RetainMemory(cross_entropy=10.0, tokens=20.0, batch_means=1.0, rows=12.0)
    assert Adaptive().at(memory, 100.0, 100.0) == 1.2
    memory.epoch = 1
    assert Adaptive().at(memory, 0.5, 0.5) == 1.2
    assert Adaptive().at(memory, 1.0, 1.0) == pytest.approx(0.3 * 6**0.5 + 0.8)


def test_authors_reference_divides_batch_means_by_rows() -> None:
    memory = RetainMemory(epoch=0)
    for mean in (0.6, 0.4):  # two micro-batches of 12 rows, 6 of them retain
        memory.add(cross_entropy=mean * 60, tokens=60, batch_means=mean, rows=6)
    assert Adaptive().reference_value(memory) == pytest.approx(0.5)
    assert Adaptive(reference="authors_sum_over_rows").reference_value(memory) == pytest.approx(1.0 / 12)
    memory.epoch = 1
    memory.add(cross_entropy=99.0, tokens=1, batch_means=99.0, rows=1)
    assert Adaptive().reference_value(memory) == pytest.approx(0.5), "the reference is fixed after epoch 0"


def test_authors_reference_counts_the_evaluation_passes_of_epoch_0() -> None:
    memory = RetainMemory()
    scores = {"retain_batch_means": 3.0, "retain_rows": 30.0}
    Adaptive().observe_validation(memory, scores)
    assert memory.rows == 0
    Adaptive(reference="authors_sum_over_rows").observe_validation(memory, scores)
    assert (memory.batch_means, memory.rows) == (3.0, 30.0)


def test_ascent_is_minus_cross_entropy_on_supervised_tokens_only() -> None:
    one = stats([[-1.0, -2.0, -4.0]], mask=[[0, 1, 1]])
    term = GradientAscent().forget_term(one)
    assert float(term.total) == -6.0
    assert gradient(term.total, one) == [[0.0, 1.0, 1.0]]


def test_cap_stops_each_forgotten_token_and_no_other() -> None:
    one = stats([[-1.0, -9.0]])
    term = Joint(forget_cap=8.0).forget_term(one)
    assert float(term.total) == -9.0, "1 nat of the first token, 8 of the capped one"
    assert gradient(term.total, one) == [[1.0, 0.0]]


def test_gradient_difference_has_a_fixed_weight_and_plain_retain_cross_entropy() -> None:
    loss = Loss.of(GradientDifference(), weight=Fixed(factor=3.0))
    assert loss.weight.at(RetainMemory(epoch=5), 99.0, 99.0) == 3.0
    assert float(loss.retain.term(stats([[-0.5, -0.25]])).total) == 0.75
    assert not Loss.of(GradientAscent()).uses_retain


def test_kl_term_is_the_masked_sum() -> None:
    one = TokenStats(
        torch.zeros(1, 2), torch.tensor([[True, False]]), values={"divergence": torch.tensor([[0.7, 5.0]])}
    )
    assert float(KLMinimization.published_retain.term(one).total) == pytest.approx(0.7)


def test_npo_by_hand() -> None:
    one = stats([[-1.0, -3.0], [-2.0, 0.0]], mask=[[1, 1], [1, 0]], reference=[[-0.5, -1.0], [-2.0, 9.0]])
    beta = 0.5
    change = [-2.5, 0.0]
    expected = sum((2 / beta) * math.log(1 + math.exp(beta * c)) for c in change)
    term = NPO(beta=beta).forget_term(one)
    assert term.unit == "row"
    assert float(term.total.detach()) == pytest.approx(expected, rel=1e-6)


def test_npo_becomes_gradient_ascent_in_the_limit() -> None:
    one = stats([[-1.0, -3.0]], reference=[[-0.5, -1.0]])
    npo = gradient(NPO(beta=1e-5).forget_term(one).total, one)
    ascent = gradient(GradientAscent().forget_term(one).total, one)
    assert npo == [pytest.approx(ascent[0], rel=1e-4)]


def test_npo_stops_pushing_what_is_gone() -> None:
    gone = stats([[-400.0]], reference=[[0.0]])
    assert abs(gradient(NPO(beta=0.1).forget_term(gone).total, gone)[0][0]) < 1e-10


def test_npo_does_not_count_an_empty_row() -> None:
    none = stats([[0.0]], mask=[[0]], reference=[[0.0]])
    assert float(NPO().forget_term(none).total.detach()) == 0.0


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: Adaptive(alpha_min=3.0), "alpha_min"),
        (lambda: Adaptive(b=0.0), "b is 0.0"),
        (lambda: Joint(forget_cap=0.0), "forget_cap"),
        (lambda: GradientAscent(forget_cap=-1.0), "forget_cap"),
        (lambda: NPO(beta=0.0), "beta"),
    ],
)
def test_impossible_settings_are_refused(build, word: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=word):
        build()
