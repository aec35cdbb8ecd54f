"""Membership by loss: the curve's area by hand and against scikit-learn, losses against the model's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from families import byte_level, tiny
from sklearn.metrics import roc_auc_score

from lm.errors import UserError
from lm.model import LanguageModel
from unlearn.evaluation import membership

TEXTS = (
    "Anna Kowalska was born in Gdańsk.",
    "12 Elm",
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Zoë lives at 12 Elm Street.",
    "ZZ",
)


def test_area_by_hand() -> None:
    assert membership.auc([1.0, 2.0], [3.0, 4.0]) == 1.0
    assert membership.auc([3.0, 4.0], [1.0, 2.0]) == 0.0
    assert membership.auc([1.0, 3.0], [2.0]) == 0.5
    assert membership.auc([1.0, 2.0, 4.0], [3.0, 5.0]) == 5 / 6  # only the pair (4, 3) is the wrong way round
    assert membership.auc([2.0], [2.0]) == 0.5
    assert membership.auc([1.0, 2.0], [2.0, 3.0]) == 3.5 / 4  # one pair is a tie
    assert membership.auc([np.inf], [1.0]) == 0.0


@pytest.mark.parametrize("seed", range(6))
def test_area_is_that_of_scikit_learn_with_ties(seed: int) -> None:
    generator = np.random.default_rng(seed)
    members = np.round(generator.normal(2.0, 1.0, 37), 1)  # rounded: many ties
    others = np.round(generator.normal(2.4, 1.0, 52), 1)
    labels = np.r_[np.ones(37), np.zeros(52)]
    expected = roc_auc_score(labels, -np.r_[members, others])
    assert membership.auc(members, others) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("auc", "score"), [(0.5, 1.0), (1.0, 0.0), (0.0, 0.0), (0.75, 0.5), (0.4, 0.8)])
def test_the_score_is_best_in_the_middle(auc: float, score: float) -> None:
    assert membership.score(auc) == pytest.approx(score)


def test_true_positives_at_few_false_ones_by_hand() -> None:
    others = [5.0, 6.0, 7.0, 8.0]
    assert (
        membership.tpr_at([1.0, 5.0, 5.5, 9.0], others) == 0.25
    )  # of four others none may be taken, so 5.0 is a tie too many
    assert membership.tpr_at([1.0, 5.0, 5.5, 9.0], others, fpr=0.25) == 0.75  # one may: all below 6.0
    assert membership.tpr_at([1.0], [2.0] * 19) == 1.0
    twenty = [float(loss) for loss in range(1, 21)]
    assert membership.tpr_at([0.5, 1.5, 2.0, 2.5], twenty) == 0.5  # exactly 1 of 20 may be taken: all below 2.0
    assert membership.tpr_at([0.5, 1.5, 2.0, 2.5], twenty[:19]) == 0.25  # of 19 none may
    tied = [1.0, 1.0, *twenty[2:]]
    assert (
        membership.tpr_at([0.5, 1.0, 1.5], tied) == 1 / 3
    )  # both at 1.0 would be taken together, which is one too many
    hundred = [float(loss) for loss in range(100)]
    assert (
        membership.tpr_at([28.5, 29.0], hundred, fpr=0.29) == 0.5
    )  # 0.29 * 100 is 28.999999999999996 in floating point
    assert membership.tpr_at([np.inf], others) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_true_positives_are_those_of_the_best_threshold(seed: int) -> None:
    generator = np.random.default_rng(seed)
    members = np.round(generator.normal(2.0, 1.0, 37), 1)
    others = np.round(generator.normal(2.4, 1.0, 52), 1)
    found = [(members <= at).mean() for at in np.r_[members, others, -9.0] if (others <= at).mean() <= 0.05]
    assert membership.tpr_at(members, others) == max(found)


def test_two_samples_of_losses_by_hand() -> None:
    # the distance is 1: of the C(6, 3) = 20 ways to deal six losses two tell the samples apart like this
    assert membership.same_distribution([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]) == pytest.approx(2 / 20)
    assert membership.same_distribution([4.0, 5.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx(2 / 20)
    assert membership.same_distribution([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0
    assert membership.same_distribution(np.arange(20.0), np.arange(20.0) + 40) == pytest.approx(2 / math.comb(40, 20))
    with pytest.raises(UserError, match="no retain model's member losses"):
        membership.same_distribution([1.0], [])


def test_losses_that_cannot_be_ranked() -> None:
    with pytest.raises(UserError, match="no member losses"):
        membership.auc([], [1.0])
    with pytest.raises(UserError, match="no non-member losses"):
        membership.auc([1.0], [])
    with pytest.raises(UserError, match="1 of 2 non-member losses are NaN"):
        membership.auc([1.0], [np.nan, 1.0])


@pytest.mark.parametrize("family", ["olmo", "gpt2", "gemma3_text"])
def test_a_batch_gives_the_models_own_loss_of_each_document(family: str) -> None:
    model = tiny(family, seed=1)
    own = []
    for text in TEXTS:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            own.append(model.model(ids, labels=ids).loss.item())
    done: list[int] = []
    losses = membership.document_losses(model, TEXTS, batch_size=2, progress=done.append)
    assert losses == pytest.approx(own, abs=1e-5)
    assert max(own) - min(own) > 0.1  # a mixed-up order would show
    assert sum(done) == len(TEXTS)


def test_a_tokenizer_that_adds_bos_and_eos_is_taken_as_it_is() -> None:
    plain = tiny("olmo", seed=1)
    model = LanguageModel(plain.model, byte_level(bos=True, eos=True), plain.anatomy, "bos")
    ids = torch.tensor([[1, *plain.tokenizer(TEXTS[0])["input_ids"], 2]])
    with torch.no_grad():
        own = plain.model(ids, labels=ids).loss.item()
    assert membership.document_losses(model, TEXTS[:1])[0] == pytest.approx(own, abs=1e-5)


def test_a_document_is_never_cut() -> None:
    model = tiny("olmo")
    long = "Anna Kowalska " * 40
    with pytest.raises(UserError, match=r"document 2 .*more than the 64 that olmo"):
        membership.document_losses(model, [TEXTS[0], long])
    with pytest.raises(UserError, match=r"document 1 .*fewer than two tokens"):
        membership.document_losses(model, ["a"])
