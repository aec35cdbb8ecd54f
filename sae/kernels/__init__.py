"""Encode, select, decode as one autograd node that stays sparse: `encode_decode`, its backends and how one is chosen.

Pre-activations are the only dense (tokens, features) tensor ever made; it lives until the selection has been read and
is never kept for the backward pass. Backends give the same numbers up to rounding: "dense" is the plain oracle, "cpu"
and "torch" the sparse ones. Which matches are chosen is not decided here (`sae.allocate`), nor which loss is taken.
"""

from sae.kernels.calibrate import choose_backend, measured_costs
from sae.kernels.encoding import encode_decode
from sae.kernels.node import Encoded
from sae.kernels.operations import Backend
from sae.kernels.preactivations import Choose, Selection, Splits
from sae.kernels.rows import take_parallel_, unit_rows_

__all__ = [
    "Backend",
    "Choose",
    "Encoded",
    "Selection",
    "Splits",
    "choose_backend",
    "encode_decode",
    "measured_costs",
    "take_parallel_",
    "unit_rows_",
]
