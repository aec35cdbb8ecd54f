"""Measures of an autoencoder, each streaming, mask-aware, the same for any split into batches and processes, with an oracle.

`Reconstruction` (pooled FVU, MSE), `Moments` (variance, gamma), `Usage` (L0, densities, dead and under-used share, Zipf fit),
`Recovered` (cross-entropy and KL of the language model), `decoder_cosines`. An accumulator is a value: `update`, `merge` and
`all_reduce` return a new one, `result` reads it. They take `SparseCode`s and (tokens, hidden) tensors, never a dense code.
"""

from sae.metrics.decoder import DecoderCosines, decoder_cosines
from sae.metrics.feature_usage import DensityHistogram, Usage, UsageResult, density_histogram, fitted_densities
from sae.metrics.loss_recovered import Recovered, RecoveredResult, recovered_on, recovered_over
from sae.metrics.reconstruction import Moments, Reconstruction, ReconstructionResult

__all__ = [
    "DecoderCosines",
    "DensityHistogram",
    "Moments",
    "Reconstruction",
    "ReconstructionResult",
    "Recovered",
    "RecoveredResult",
    "Usage",
    "UsageResult",
    "decoder_cosines",
    "density_histogram",
    "fitted_densities",
    "recovered_on",
    "recovered_over",
]
