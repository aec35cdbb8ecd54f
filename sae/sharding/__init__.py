"""Autoencoders over several processes: a mesh of data and feature shards, and selections of the *global* batch on it.

`mesh` groups processes, carries out collectives and counts them; `selection` makes token, feature and mutual choice on
a block of the affinities give exactly the matches that one process would choose, ties included. With one process
everything here falls back to `sae.allocate` and no collective runs.
"""

from sae.sharding.mesh import Axis, Mesh, copy_to_shards, sum_of_shards
from sae.sharding.selection import Chosen, RowCuts, feature_choice, kth_largest, mutual_choice

__all__ = [
    "Axis",
    "Chosen",
    "Mesh",
    "RowCuts",
    "copy_to_shards",
    "feature_choice",
    "kth_largest",
    "mutual_choice",
    "sum_of_shards",
]
