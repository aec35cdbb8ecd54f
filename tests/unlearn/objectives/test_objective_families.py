"""The families by hand, and what each becomes in its limits. What holds for all of them is `test_objective_table`."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lm.errors import UserError
from tests.unlearn.objective_cases import Batch, Case, draw, statistics
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
    Dual,
    GeneralizedCrossEntropy,
    GradientAscent,
    HiddenDistance,
    LearnAlternate,
    Loss,
    Objective,
    Retain,
    RetainMemory,
    SatImp,
    SimNPO,
    Term,
    TokenStats,
)
from unlearn.objectives.rmu import direction


def said(*rows: list[float], reference: list[list[float]] | None = None) -> TokenStats:
    """Statistics of rows of probabilities; a missing token is not supervised."""
    width = max(len(row) for row in rows)
    logprob = torch.zeros(len(rows), width, dtype=torch.float64)
    theirs, mask = torch.zeros_like(logprob), torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        logprob[index, : len(row)] = torch.tensor(row, dtype=torch.float64).log()
        mask[index, : len(row)] = True
        if reference is not None:
            theirs[index, : len(row)] = torch.tensor(reference[index], dtype=torch.float64).log()
    return TokenStats(logprob.requires_grad_(), mask, theirs if reference is not None else None)


def value(term: Term, unit: str = "token") -> float:
    assert term.unit == unit
    return float(term.total.detach())


def slope(objective: Objective, stats: TokenStats) -> Tensor:
    (found,) = torch.autograd.grad(objective.forget_term(stats).total, stats.logprob)
    return found


def logit_slope(of: Objective | Retain, batch: Batch) -> Tensor:
    case = Case(of, lambda _: torch.zeros(()))
    (found,) = torch.autograd.grad(case.total(batch), batch.logits)
    return found


# --------------------------------------------------------------------------------------------------------- preference


def test_simnpo_by_hand() -> None:
    two = said([0.5, 0.25], [0.125])
    expected = sum(
        2 / 2.0 * math.log(1 + math.exp(2.0 * mean + 0.3)) for mean in (math.log(0.125) / 2, math.log(0.125))
    )
    assert value(SimNPO(beta=2.0, gamma=0.3).forget_term(two), "row") == pytest.approx(expected)


def test_simnpo_without_temperature_is_gradient_ascent_with_rows_alike() -> None:
    torch.testing.assert_close(
        slope(SimNPO(beta=1e-6), said([0.5, 0.25], [0.125])),
        torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64),
        rtol=1e-5,
        atol=0,
    )


def test_simnpo_is_npo_against_certainty_with_the_mean_for_the_sum() -> None:
    row = [0.5, 0.25, 0.8]
    npo = NPO(beta=1.5 / 3).forget_term(said(row, reference=[[1.0, 1.0, 1.0]]))
    assert value(SimNPO(beta=1.5).forget_term(said(row)), "row") == pytest.approx(value(npo, "row") / 3)


def test_dpo_by_hand() -> None:
    answer = said([0.5, 0.25], [0.1], reference=[[0.25, 0.25], [0.1]])
    alternate = said([0.2], [0.3, 0.4], reference=[[0.1], [0.6, 0.8]])
    gained = [math.log(2) - math.log(2), math.log(0.25) - 0.0]
    expected = sum(2 / 0.4 * math.log(1 + math.exp(-0.4 * one)) for one in gained)
    term = DPO(beta=0.4).forget_term(replace(answer, alternate=alternate))
    assert value(term, "row") == pytest.approx(expected)


def test_npo_is_dpo_with_an_alternate_that_is_as_likely_as_it_was() -> None:
    answer = said([0.5, 0.25], [0.1], reference=[[0.3, 0.2], [0.7]])
    alternate = said([0.2], [0.3], reference=[[0.2], [0.3]])
    dpo = DPO(beta=0.4).forget_term(replace(answer, alternate=alternate))
    assert value(dpo, "row") == pytest.approx(value(NPO(beta=0.4).forget_term(answer), "row"))


def test_dpo_without_temperature_unlearns_the_answer_and_learns_the_alternate() -> None:
    answer, alternate = said([0.5, 0.25], reference=[[0.3, 0.2]]), said([0.2], reference=[[0.7]])
    term = DPO(beta=1e-6).forget_term(replace(answer, alternate=alternate))
    found = torch.autograd.grad(term.total, [answer.logprob, alternate.logprob])
    torch.testing.assert_close(found[0], torch.ones(1, 2, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1], -torch.ones(1, 1, dtype=torch.float64), rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------------------------------- reweighted


def test_weighted_ascent_by_hand() -> None:
    one = said([0.5, 0.1])
    expected = 0.25 * math.log(0.5) + 0.01 * math.log(0.1)
    assert value(WGA(alpha=2.0).forget_term(one)) == pytest.approx(expected)
    torch.testing.assert_close(slope(WGA(alpha=2.0), one), torch.tensor([[0.25, 0.01]], dtype=torch.float64))
    expected = 0.25 * 0.5 * math.log(0.5) + 0.01 * 0.9 * math.log(0.1)
    assert value(SatImp(beta1=2.0, beta2=1.0).forget_term(one)) == pytest.approx(expected)


def test_weights_of_exponent_0_are_gradient_ascent() -> None:
    one = said([0.5, 0.1], [1.0])
    ascent = slope(GradientAscent(), one)
    torch.testing.assert_close(slope(WGA(alpha=0.0), one), ascent)
    torch.testing.assert_close(slope(SatImp(beta1=0.0, beta2=0.0), one), ascent)
    torch.testing.assert_close(slope(SatImp(beta1=1.5, beta2=0.0), one), slope(WGA(alpha=1.5), one))


def test_generalized_cross_entropy_at_1_is_the_mean_absolute_error_and_near_0_gradient_ascent() -> None:
    one = said([0.5, 0.1, 0.99])
    assert value(GeneralizedCrossEntropy(q=1.0).forget_term(one)) == pytest.approx(-(0.5 + 0.9 + 0.01))
    near = GeneralizedCrossEntropy(q=1e-7)
    assert value(near.forget_term(one)) == pytest.approx(value(GradientAscent().forget_term(one)), rel=1e-5)
    torch.testing.assert_close(slope(near, one), slope(GradientAscent(), one), rtol=1e-5, atol=0)


def test_generalized_cross_entropy_has_a_floor_that_gradient_ascent_lacks() -> None:
    gone = said([1e-300, 0.5])
    assert value(GeneralizedCrossEntropy(q=0.5).forget_term(gone)) > -2 / 0.5
    assert value(GradientAscent().forget_term(gone)) < -600
    assert float(slope(GeneralizedCrossEntropy(q=0.5), gone)[0, 0]) < 1e-100, "what is gone is not pushed further"


def test_generalized_cross_entropy_has_the_gradient_of_weighted_ascent() -> None:
    one = said([0.5, 0.1], [0.03])
    torch.testing.assert_close(slope(GeneralizedCrossEntropy(q=0.7), one), slope(WGA(alpha=0.7), one))


# ------------------------------------------------------------------------------------------------------------- target


def logits(*rows: list[float], target: int = 0) -> Batch:
    """One row of tokens with these logits, the original's the same, all with one target."""
    whole = torch.tensor([rows], dtype=torch.float64)
    nothing = torch.zeros(1, 1, 2, dtype=torch.float64)
    return Batch(
        logits=whole.clone().requires_grad_(),
        reference=whole,
        targets=torch.full(whole.shape[:2], target),
        mask=torch.ones(whole.shape[:2], dtype=torch.bool),
        hidden=nothing.clone().requires_grad_(),
        reference_hidden=nothing,
        hidden_mask=torch.ones(1, 1, dtype=torch.bool),
    )


def total(objective: Objective, batch: Batch) -> float:
    return value(objective.forget_term(statistics(batch, objective.forget_needs())))


def test_undial_by_hand() -> None:
    batch = logits([math.log(6.0), math.log(2.0), math.log(2.0)])  # 0.6, 0.2, 0.2
    adjusted = (0.2, 0.4, 0.4)  # 6 lowered by log 6 is 1: 1, 2, 2 of 5
    expected = -sum(q * math.log(p) for q, p in zip(adjusted, (0.6, 0.2, 0.2), strict=True))
    assert total(UNDIAL(strength=math.log(6.0)), batch) == pytest.approx(expected)


def test_undial_of_strength_0_keeps_the_model_where_it_was() -> None:
    batch = draw()
    same = replace(batch, reference=batch.logits.detach().clone())
    assert logit_slope(UNDIAL(strength=0.0), same).abs().max() < 1e-15
    assert logit_slope(UNDIAL(strength=1.0), same).abs().max() > 1e-3


def test_undial_of_great_strength_starts_as_the_models_own_distribution_without_the_token() -> None:
    batch = draw()
    same = replace(batch, reference=batch.logits.detach().clone())
    torch.testing.assert_close(logit_slope(UNDIAL(strength=1e4), same), logit_slope(CEU(), same))


def test_cross_entropy_without_the_token_by_hand() -> None:
    batch = logits([math.log(6.0), math.log(3.0), math.log(1.0)])  # 0.6, 0.3, 0.1; without the first 0.75, 0.25
    assert total(CEU(), batch) == pytest.approx(-0.75 * math.log(0.3) - 0.25 * math.log(0.1))


def test_cross_entropy_without_the_token_has_the_gradient_of_unlikelihood() -> None:
    batch = draw()
    chance = torch.softmax(batch.logits, dim=-1).gather(2, batch.targets[..., None])[..., 0]
    (wanted,) = torch.autograd.grad(-torch.log(1 - chance)[batch.mask].sum(), batch.logits)
    torch.testing.assert_close(logit_slope(CEU(), batch), wanted)


def test_margin_by_hand_and_flat_logits_are_its_floor() -> None:
    assert total(PDU(), logits([3.0, 1.0, -1.0], [0.0, 0.0, 6.0])) == pytest.approx(2.0**2 + 4.0**2)
    flat = logits([5.0, 5.0, 5.0])
    assert total(PDU(), flat) == 0.0
    assert not logit_slope(PDU(), flat).any()


# ------------------------------------------------------------------------------------------------------------ instead


def test_learning_an_alternate_by_hand() -> None:
    alternate = said([0.5, 0.125], [0.5])
    term = LearnAlternate().forget_term(replace(said([0.9], [0.9]), alternate=alternate))
    assert value(term, "row") == pytest.approx(2 * math.log(2) + math.log(2)), "(1 + 3) / 2 bits, and 1"


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        ("total_variation", math.tanh(0.4) / 2 - math.tanh(0.3) / 2),
        ("kl", math.exp(0.4 - 1) - 0.3),
        ("jensen_shannon", 0.4 + math.log(1 + math.exp(-0.4)) - math.log(2) - math.log(2 / (1 + math.exp(-0.3)))),
        ("pearson", 0.4**2 / 4 + 0.4 - 0.3),
    ],
)
def test_flat_by_hand(divergence: str, expected: float) -> None:
    row = replace(said([0.6, 0.2]), alternate=said([0.2, 0.3, 0.4]))  # means 0.4 and 0.3
    assert value(FLAT(divergence=divergence).forget_term(row), "row") == pytest.approx(expected)  # type: ignore[arg-type]


def test_flat_of_tiny_probabilities_is_their_difference() -> None:
    row = replace(said([2e-6]), alternate=said([5e-6]))
    assert value(FLAT(divergence="pearson").forget_term(row), "row") == pytest.approx(-3e-6, rel=1e-5)
    assert value(FLAT(divergence="total_variation").forget_term(row), "row") == pytest.approx(-1.5e-6, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- steering


def steering(hidden: list[list[float]], original: list[list[float]]) -> TokenStats:
    """One row of states; no logits were computed."""
    return TokenStats(
        logprob=torch.zeros(1, 1),
        mask=torch.zeros(1, 1, dtype=torch.bool),
        hidden=torch.tensor([hidden], dtype=torch.float64),
        reference_hidden=torch.tensor([original], dtype=torch.float64),
        hidden_mask=torch.ones(1, len(hidden), dtype=torch.bool),
    )


def test_the_direction_is_a_unit_vector_with_positive_entries_that_only_the_seed_decides() -> None:
    one = direction(64, 5)
    assert float(one.norm()) == pytest.approx(1.0, rel=1e-6)
    assert bool((one >= 0).all())
    assert torch.equal(one, direction(64, 5))
    assert not torch.equal(one, direction(64, 6))


def test_misdirection_by_hand() -> None:
    u = direction(2, 0).tolist()
    stats = steering([[1.0, -1.0], [3 * u[0], 3 * u[1]]], [[0.0, 0.0], [0.0, 0.0]])
    expected = ((1 - 3 * u[0]) ** 2 + (-1 - 3 * u[1]) ** 2) / 2
    assert value(RMU(layer=0, scale=3.0).forget_term(stats), "hidden") == pytest.approx(expected, rel=1e-6)


def test_adaptive_misdirection_steers_to_a_length_in_norms_of_the_rows_original_states() -> None:
    u = direction(2, 0).tolist()
    stats = steering([[0.0, 0.0], [20 * u[0], 20 * u[1]]], [[3.0, 4.0], [0.0, 3.0]])  # norms 5 and 3, mean 4
    adaptive = AdaptiveRMU(layer=0, scale=5.0).forget_term(stats)
    assert value(adaptive, "hidden") == pytest.approx(20.0**2 / 2, rel=1e-6), "the second state is there already"
    doubled = replace(stats, reference_hidden=2 * stats.reference_hidden)  # type: ignore[operator]
    assert value(AdaptiveRMU(layer=0, scale=2.5).forget_term(doubled), "hidden") == pytest.approx(200.0, rel=1e-6)


def test_adaptive_misdirection_of_states_of_one_length_is_misdirection() -> None:
    stats = steering([[1.0, -1.0], [0.5, 2.0]], [[3.0, 4.0], [0.0, 5.0]])
    adaptive, plain = AdaptiveRMU(layer=0, scale=2.0).forget_term(stats), RMU(layer=0, scale=10.0).forget_term(stats)
    assert value(adaptive, "hidden") == pytest.approx(value(plain, "hidden"))


def test_misdirection_holds_the_retain_rows_at_its_own_layer() -> None:
    loss = Loss.of(AdaptiveRMU(layer=4, tokens="answer"))
    assert loss.retain == HiddenDistance(layer=4, tokens="answer")
    assert loss.weight.at(RetainMemory(), 0.0, 0.0) == 1200.0


# ------------------------------------------------------------------------------------------------- retain and weight


def test_divergence_and_blend_by_hand() -> None:
    batch = logits([math.log(6.0), math.log(2.0), math.log(2.0)])  # 0.6, 0.2, 0.2; the original's 0.2, 0.4, 0.4
    batch = replace(batch, reference=torch.tensor([[[0.0, math.log(2.0), math.log(2.0)]]], dtype=torch.float64))
    divergence = 0.2 * math.log(0.2 / 0.6) + 0.8 * math.log(0.4 / 0.2)
    for term, expected in (
        (Divergence(), divergence),
        (Blend(cross_entropy=0.5, divergence=2.0), 2.0 * divergence - 0.5 * math.log(0.6)),
    ):
        assert value(term.term(statistics(batch, term.needs()))) == pytest.approx(expected)


def test_a_blend_of_one_kind_is_that_kind() -> None:
    batch = draw()
    torch.testing.assert_close(
        logit_slope(Blend(cross_entropy=1.0, divergence=0.0), batch), logit_slope(CrossEntropy(), batch)
    )
    torch.testing.assert_close(
        logit_slope(Blend(cross_entropy=0.0, divergence=1.0), batch), logit_slope(Divergence(), batch)
    )


def test_states_that_did_not_move_cost_nothing() -> None:
    assert value(HiddenDistance(layer=0).term(steering([[1.0, 2.0]], [[1.0, 2.0]])), "hidden") == 0.0
    assert value(HiddenDistance(layer=0).term(steering([[1.0, 2.0]], [[2.0, 0.0]])), "hidden") == 2.5


def test_the_dual_variable_is_used_as_it_stands_and_moved_afterwards() -> None:
    dual, memory = Dual(tolerance=0.5, rate=2.0, start=1.0), RetainMemory()
    assert [dual.at(memory, 9.0, loss) for loss in (1.0, 0.25, 0.0, 0.5)] == [1.0, 2.0, 1.5, 0.5]
    assert memory.dual == 0.5
    assert dual.at(memory, 9.0, -10.0) == 0.5
    assert dual.at(memory, 9.0, 0.5) == 0.0, "it is never negative"


def test_the_dual_variable_stands_still_in_the_warm_up_and_stops_at_its_bound() -> None:
    dual, memory = Dual(tolerance=0.0, rate=1.0, start=1.0, warmup_epochs=2, largest=3.0), RetainMemory()
    for epoch, expected in enumerate([1.0, 1.0, 1.0, 2.5, 3.0, 3.0]):
        memory.epoch = epoch
        assert dual.at(memory, 0.0, 1.5) == expected


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: SimNPO(beta=-1.0), "beta is -1.0"),
        (lambda: SimNPO(gamma=math.nan), "gamma"),
        (lambda: DPO(beta=math.inf), "beta"),
        (lambda: WGA(alpha=-0.5), "alpha"),
        (lambda: SatImp(beta2=-1.0), "beta2"),
        (lambda: GeneralizedCrossEntropy(q=0.0), "q is 0.0"),
        (lambda: GeneralizedCrossEntropy(q=1.5), "q is 1.5"),
        (lambda: UNDIAL(strength=-1.0), "strength"),
        (lambda: RMU(layer=-1), "layer"),
        (lambda: RMU(layer=1, scale=0.0), "scale"),
        (lambda: HiddenDistance(layer=-2), "retain_loss.layer"),
        (lambda: Blend(divergence=-1.0), "divergence"),
        (lambda: Dual(start=2.0, largest=1.0), "largest"),
        (lambda: Dual(warmup_epochs=-1), "warmup_epochs"),
        (lambda: Dual(rate=0.0), "rate"),
    ],
)
def test_impossible_settings_are_refused(build, word: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=word):
        build()
