"""Look inside: sparse autoencoders on the activations of a language model, from the maths to files other tools read.

Which token-feature matches are active (`allocate`, `budgets`, `thresholds`), which losses train them (`auxiliary`,
`gao_recipe`), what is counted on the way (`dead_features`, `moving_average`), the sparse code that all of it speaks
(`sparse_code`), the module and its config (`model`, `model_config`), training on objects in memory (`training`), and what a
feature means (`features`). In rooms of their own: `kernels` (encode-select-decode as one sparse autograd node), `activations`
(harvest, shuffle, cache), `sharding` (a mesh of processes), `trainer` (the loop and the stage), `metrics`, `formats` (SAELens
and four other tools) and `synthetic` (worlds whose features are known).
"""

from sae.allocate import batch_topk, by_threshold, feature_choice, mutual_choice, token_choice
from sae.auxiliary import (
    aux_k_loss,
    aux_zipf_loss,
    expected_densities,
    idle_choice,
    residual_loss,
    residual_variance,
    under_use,
)
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
from sae.dead_features import Firings
from sae.gao_recipe import geometric_median, input_variance, reconstruction_loss, unit_rows, without_parallel
from sae.model import SparseAutoencoder, fold_scale, load_autoencoder, save_autoencoder
from sae.model_config import Choice, InputNorm, Rule, SparseAutoencoderConfig
from sae.moving_average import MovingAverage
from sae.sparse_code import FeatureView, SparseCode, decode
from sae.thresholds import RunningThreshold, calibrate_features, calibrate_mutual, smallest_chosen
from sae.trainer.config import AutoencoderSpec
from sae.training import TrainedAutoencoders, train

__all__ = [
    "AutoencoderSpec",
    "Choice",
    "FeatureView",
    "Firings",
    "InputNorm",
    "MovingAverage",
    "Rule",
    "RunningThreshold",
    "SparseAutoencoder",
    "SparseAutoencoderConfig",
    "SparseCode",
    "TrainedAutoencoders",
    "ZipfFit",
    "ZipfLaw",
    "aux_k_loss",
    "aux_zipf_loss",
    "batch_topk",
    "by_density",
    "by_threshold",
    "calibrate_features",
    "calibrate_mutual",
    "carried_budgets",
    "decode",
    "expected_densities",
    "feature_choice",
    "fit_zipf",
    "fold_scale",
    "geometric_median",
    "idle_choice",
    "input_variance",
    "load_autoencoder",
    "mutual_choice",
    "ranks_of",
    "reconstruction_loss",
    "residual_loss",
    "residual_variance",
    "save_autoencoder",
    "smallest_chosen",
    "token_choice",
    "train",
    "under_use",
    "uniform_budgets",
    "unit_rows",
    "without_parallel",
    "zipf_budgets",
]
