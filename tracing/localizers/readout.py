"""How readable an answer is in the residual stream: through the model's own head (logit lens), or by a linear probe.

Pure functions of states; where the states come from and what is made of the curves is `tracing.localizers.fact_lookup`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lm.forward import block_replay
from lm.model import LanguageModel
from tracing.arrays import Array
from tracing.question.encoded_fact import EncodedFact
from tracing.question.metrics import MetricName, read_off
from tracing.question.target import Target

_STATES_AT_ONCE = 16


@torch.inference_mode()
def logit_lens(model: LanguageModel, encoded: EncodedFact, states: Tensor, metric: MetricName) -> Array:
    """(states,): the metric of the answer if the final norm and the head read it straight from each state.

    Args:
        states: (states, n, hidden), n answer tokens, each with the state that it is read from; or n = 1, one for all of them.
    """
    answer = len(encoded.answer_ids)
    found = []
    for part in torch.split(states, _STATES_AT_ONCE):
        logits = block_replay.logits(model, part).expand(-1, answer, -1)
        found.append(read_off(logits, Target.of([encoded], len(part)), metric).cpu().numpy())
    return np.concatenate(found)


def folds_of(labels: Sequence[str], groups: Sequence[str], folds: int, seed: int) -> npt.NDArray[np.int64]:
    """The fold of each fact: whole groups, dealt out class by class in a drawn order, so that a class lies in as many folds as
    it can."""
    order = sorted(np.random.default_rng(seed).permutation(len(labels)).tolist(), key=lambda place: labels[place])
    given: dict[str, int] = {}
    for place in order:
        given.setdefault(groups[place], len(given) % folds)
    return np.array([given[group] for group in groups], dtype=np.int64)


def usable(labels: Sequence[str], groups: Sequence[str]) -> list[int]:
    """The places of facts whose class is met in another group too; none if that is a single class."""
    where: dict[str, set[str]] = defaultdict(set)
    for label, group in zip(labels, groups, strict=True):
        where[label].add(group)
    met = {label for label, found in where.items() if len(found) > 1}
    return [place for place, label in enumerate(labels) if label in met] if len(met) > 1 else []


def linear_probe(
    states: Array, labels: Sequence[str], folds: npt.NDArray[np.int64], ridge: float
) -> tuple[Array, Array]:
    """Read a class from each state by ridge regression on one-hot classes, on facts that took no part in the fit.

    With X the centered states of the facts in the other folds, Y their centered one-hot classes and lambda = `ridge` times the
    mean of |x|², a fact's prediction is y = x X' (X X' + lambda I)^-1 Y, without the classes' own frequencies, which would tell
    against the class that was left out.

    Args:
        states: (facts, hidden).
        labels: (facts,), the class of each.
        folds: (facts,), numbers.

    Returns:
        (facts,) each: the share of the other classes that are predicted below the right one, ties counting half (chance is
        0.5); and whether the right one is first (ties: its share). NaN where the right class is in no other fold.
    """
    classes = sorted(set(labels))
    right = np.array([classes.index(label) for label in labels])
    one_hot = np.eye(len(classes))[right]
    below, first = np.full((2, len(labels)), np.nan)
    for fold in sorted(set(folds.tolist())):
        out, fit = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        seen = np.flatnonzero(one_hot[fit].any(axis=0))
        if len(seen) < 2:
            continue
        center = states[fit].mean(axis=0)
        inside = states[fit] - center
        kernel = inside @ inside.T
        scale = float(kernel.diagonal().mean()) or 1.0
        weights = np.linalg.solve(kernel + ridge * scale * np.eye(len(fit)), one_hot[fit] - one_hot[fit].mean(axis=0))
        predicted = ((states[out] - center) @ inside.T @ weights)[:, seen]
        for place, guess in zip(out, predicted, strict=True):
            if right[place] not in seen:
                continue
            own = guess[np.flatnonzero(seen == right[place])[0]]
            ties = int((guess == own).sum())
            below[place] = ((guess < own).sum() + (ties - 1) / 2) / (len(seen) - 1)
            first[place] = 1 / ties if own == guess.max() else 0.0
    return below, first
