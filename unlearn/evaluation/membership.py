"""Membership inference by loss: can the model's losses tell documents it was trained on from documents it never saw?

`document_losses` asks the model; `auc` and `score` are the arithmetic of SemEval-2025 Task 4. Badge: faithful
(mean token loss over the whole document, no truncation). `tpr_at` and `same_distribution` judge the same losses in two
further ways. No other attack is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import ks_2samp, rankdata
from torch.nn.utils.rnn import pad_sequence

from lm.errors import UserError
from lm.model import LanguageModel
from lm.prompts import check_ids, max_positions
from unlearn.generation.batching import ONE_PROCESS, Workers, evaluating, sorted_batches, unless_sharded


def auc(member_losses: ArrayLike, nonmember_losses: ArrayLike) -> float:
    """Area under the ROC curve of `-loss` with members positive: the chance that a member has the lower loss.

    Computed from ranks: `(R - m(m+1)/2) / (m n)`, R the sum of the members' ranks among all `-loss` values. A tie
    counts one half. 0.5: losses tell nothing. Near 1: members are still recognized. Near 0: they are conspicuous
    for their *high* loss, which also betrays them.

    Args:
        member_losses, nonmember_losses: shapes (m,), (n,), in nats; at least one each, none NaN.
    """
    members, others = _losses(member_losses, "member"), _losses(nonmember_losses, "non-member")
    ranks = rankdata(-np.concatenate([members, others]), method="average")
    m, n = len(members), len(others)
    return float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))


def score(auc: float) -> float:
    """The official membership score `1 - 2 |auc - 0.5|`: 1 is best, 0 under-unlearned or over-unlearned."""
    return 1 - abs(auc - 0.5) * 2


def tpr_at(member_losses: ArrayLike, nonmember_losses: ArrayLike, fpr: float = 0.05) -> float:
    """Share of the members that the loss gives away where at most a share `fpr` of the others is taken for members.

    A document is taken for a member if its loss is strictly below the `(k + 1)`-th lowest non-member loss, with
    `k = floor(fpr * n)`: no threshold that takes at most `k` of the `n` non-members finds more. Nothing is interpolated: with
    fewer than `1 / fpr` non-members not one of them may be taken. Documents of equal loss are taken together or not at all,
    so a member at the loss of that non-member is not found. Source: Carlini et al. 2022 (arXiv 2112.03570), section III.
    Badge: **variant** (the attack is a threshold on the plain loss).

    Args:
        member_losses, nonmember_losses: shapes (m,), (n,), in nats; at least one each, none NaN.
        fpr: from 0 up to, not including, 1.
    """
    members, others = _losses(member_losses, "member"), _losses(nonmember_losses, "non-member")
    allowed = int(np.floor(fpr * len(others) + 1e-9))  # 0.07 * 100 is a little above 7, 0.29 * 100 a little below 29
    return float((members < np.sort(others)[allowed]).mean())


def same_distribution(losses: ArrayLike, retain_losses: ArrayLike) -> float:
    """The p-value of the two-sample Kolmogorov-Smirnov test: could both samples come from one distribution of losses?

    Two-sided; exact up to 10,000 losses a side, asymptotic above (`scipy.stats.ks_2samp`). The test takes the samples to be
    independent. Losses of the same documents under two models are not: documents that are hard for one are hard for the
    other, which makes the p-value larger than it should be. So a small one is evidence of a difference, and a large one
    is none of its absence.

    Args:
        losses, retain_losses: shapes (m,), (n,), in nats; at least one each, none NaN.
    """
    mine, theirs = _losses(losses, "member"), _losses(retain_losses, "retain model's member")
    return float(ks_2samp(mine, theirs, method="auto").pvalue)


def document_losses(
    model: LanguageModel,
    texts: Sequence[str],
    *,
    batch_size: int = 8,
    progress: Callable[[int], object] | None = None,
    workers: Workers = ONE_PROCESS,
) -> NDArray[np.float64]:
    """Mean token loss of each whole document, in nats: what `model(ids, labels=ids).loss` is for one document alone.

    The text is tokenized as the tokenizer does by default (with a BOS if it adds one), and never cut. Documents are
    batched by length and padded on the right, which under causal attention changes no earlier position.

    Args:
        texts: documents of at least two tokens.
        batch_size: documents a forward pass.
        progress: called with the number of documents done since the last call.
        workers: which process this is; each takes a share of the documents and all return all losses.

    Returns:
        shape (len(texts),), in the order of `texts`.

    Raises:
        UserError: a document of fewer than two tokens, or longer than the model's context.
    """
    ids = [list(model.tokenizer(text)["input_ids"]) for text in texts]
    check_ids(model, ids)
    limit = max_positions(model)
    for number, (text, tokens) in enumerate(zip(texts, ids, strict=True), start=1):
        if len(tokens) < 2:
            raise UserError(f'document {number} ("{text[:40]}") has fewer than two tokens: leave it out')
        if limit is not None and len(tokens) > limit:
            raise UserError(
                f'document {number} ("{text[:40]}...") has {len(tokens)} tokens, more than the {limit} that '
                f"{model.name} can read: leave it out, or shorten it yourself (cutting it would change its loss)"
            )
    workers = unless_sharded(workers, model)
    mine = workers.share(len(ids))
    ids = [ids[index] for index in mine]
    losses = [0.0] * len(ids)
    with evaluating(model):
        for batch in sorted_batches([len(tokens) for tokens in ids], batch_size):
            padded = pad_sequence([torch.tensor(ids[row]) for row in batch], batch_first=True).to(model.device)
            logits = model.model(input_ids=padded, use_cache=False).logits
            for index, row in enumerate(batch):  # one row at a time: the float32 copy is the largest tensor here
                count = len(ids[row])
                losses[row] = torch.nn.functional.cross_entropy(
                    logits[index, : count - 1].float(), padded[index, 1:count]
                ).item()
            if progress is not None:
                progress(len(batch))
    return np.array(workers.gather(losses), dtype=np.float64)


def _losses(values: ArrayLike, name: str) -> NDArray[np.float64]:
    losses = np.asarray(values, dtype=np.float64)
    if losses.ndim != 1 or not len(losses):
        raise UserError(f"there are no {name} losses: membership needs at least one document on each side")
    if np.isnan(losses).any():
        raise UserError(
            f"{int(np.isnan(losses).sum())} of {len(losses)} {name} losses are NaN: the model is broken; score another"
        )
    return losses
