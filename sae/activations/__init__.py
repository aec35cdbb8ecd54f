"""Activations for training and reading autoencoders: harvested from any sites of any model, shuffled, cached on disk.

Text (`sources`) becomes `contexts`; the model runs as far as the deepest site (`cut`), unfit tokens are left out
(`harvest`), and rows are mixed in a buffer (`live`) or on disk (`writer`, `cache`, `reading`). Whatever the way, a
trainer reads an `ActivationStream`: the same global batches for any number of processes, and a state that resumes
exactly.
"""

from sae.activations.batch import ActivationBatch, ActivationStream, State, parse_site, site_name
from sae.activations.cache import ActivationCache, open_cache
from sae.activations.contexts import Context, Contexts, ContextSpec
from sae.activations.cut import forward
from sae.activations.harvest import Harvester, HarvestSpec, MaskSpec, harvest
from sae.activations.live import BufferSpec, LiveActivations
from sae.activations.opening import open_activations
from sae.activations.reading import CachedActivations, ReadSpec
from sae.activations.sources import (
    ActivationFiles,
    Builtin,
    Datasets,
    MadeActivations,
    Rows,
    Source,
    TextFiles,
    Texts,
    TextSource,
)
from sae.activations.staging import CacheSpec
from sae.activations.state import merge_states, read_state, save_state
from sae.activations.writer import write_cache

__all__ = [
    "ActivationBatch",
    "ActivationCache",
    "ActivationFiles",
    "ActivationStream",
    "BufferSpec",
    "Builtin",
    "CacheSpec",
    "CachedActivations",
    "Context",
    "ContextSpec",
    "Contexts",
    "Datasets",
    "HarvestSpec",
    "Harvester",
    "LiveActivations",
    "MadeActivations",
    "MaskSpec",
    "ReadSpec",
    "Rows",
    "Source",
    "State",
    "TextFiles",
    "TextSource",
    "Texts",
    "forward",
    "harvest",
    "merge_states",
    "open_activations",
    "open_cache",
    "parse_site",
    "read_state",
    "save_state",
    "site_name",
    "write_cache",
]
