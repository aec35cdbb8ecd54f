"""A run folder: what was asked (config), with what (manifest), what happened (metric log), and what came out."""

from lm.progress import progress
from lm.run_folder.files import damage, is_leftover, move, seal, sweep, writable, write_atomic, write_json
from lm.run_folder.folder import RunFolder
from lm.run_folder.machine import environment, peak_memory_bytes, resident_bytes
from lm.run_folder.stages import LOCK, hold, stage

__all__ = [
    "LOCK",
    "RunFolder",
    "damage",
    "environment",
    "hold",
    "is_leftover",
    "move",
    "peak_memory_bytes",
    "progress",
    "resident_bytes",
    "seal",
    "stage",
    "sweep",
    "writable",
    "write_atomic",
    "write_json",
]
