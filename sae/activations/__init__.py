"""Activations for training and reading autoencoders: harvested from any sites of any model, shuffled, cached on disk.

Text (`sources`) becomes `contexts`; the model runs as far as the deepest site (`early_exit`), unfit tokens are left out
(`harvesting`), and rows are mixed in a buffer (`live`) or on disk (`cache`). Whatever the way, a trainer reads an
`ActivationStream`: the same global batches for any number of processes, and a state that resumes exactly.
"""

from sae.activations.batch import ActivationBatch, ActivationStream, State, parse_site, require_different, site_name
from sae.activations.cache.manifest import ActivationCache, open_cache
from sae.activations.cache.reading import CachedActivations, ReadSpec
from sae.activations.cache.staging import CacheSpec
from sae.activations.cache.writing import write_cache
from sae.activations.contexts import Context, Contexts, ContextSpec
from sae.activations.early_exit import forward
from sae.activations.harvesting import Harvester, HarvestSpec, MaskSpec, harvest
from sae.activations.held_out import held_out_tokens
from sae.activations.in_memory import Activations, ActivationsInMemory, as_source, texts_of
from sae.activations.live import BufferSpec, LiveActivations
from sae.activations.open import check_alike, open_activations
from sae.activations.sources import (
    ActivationFiles,
    Builtin,
    Datasets,
    MadeActivations,
    NoSource,
    Rows,
    Source,
    TextFiles,
    Texts,
    TextSource,
)
from sae.activations.stream_state import merge_states, read_state, save_state

__all__ = [
    "ActivationBatch",
    "ActivationCache",
    "ActivationFiles",
    "ActivationStream",
    "Activations",
    "ActivationsInMemory",
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
    "NoSource",
    "ReadSpec",
    "Rows",
    "Source",
    "State",
    "TextFiles",
    "TextSource",
    "Texts",
    "as_source",
    "check_alike",
    "forward",
    "harvest",
    "held_out_tokens",
    "merge_states",
    "open_activations",
    "open_cache",
    "parse_site",
    "read_state",
    "require_different",
    "save_state",
    "site_name",
    "texts_of",
    "write_cache",
]
