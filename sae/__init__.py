"""Look inside: sparse autoencoders on the activations of a language model. So far the maths they rest on.

Which token-feature matches are active (`allocate`, `budgets`), what is lost by it (`auxiliary`, `baselines`) and the
sparse code that all of it speaks (`code`). Pure functions of tensors; nothing here trains or knows of a language model.
"""

from sae.allocate import batch_topk, by_threshold, feature_choice, mutual_choice, token_choice
from sae.auxiliary import aux_k_loss, aux_zipf_loss, expected_densities, residual_variance, under_use
from sae.budgets import (
    ZipfFit,
    ZipfLaw,
    by_density,
    carried_budgets,
    fit_zipf,
    ranks_of,
    uniform_budgets,
    zipf_budgets,
)
from sae.code import FeatureView, SparseCode, decode

__all__ = [
    "FeatureView",
    "SparseCode",
    "ZipfFit",
    "ZipfLaw",
    "aux_k_loss",
    "aux_zipf_loss",
    "batch_topk",
    "by_density",
    "by_threshold",
    "carried_budgets",
    "decode",
    "expected_densities",
    "feature_choice",
    "fit_zipf",
    "mutual_choice",
    "ranks_of",
    "residual_variance",
    "token_choice",
    "under_use",
    "uniform_budgets",
    "zipf_budgets",
]
