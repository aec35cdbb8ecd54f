"""Arrays of numbers: their type, and their file format without pickles."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def pack(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The bytes of an `.npz` file that `numpy.load(..., allow_pickle=False)` reads."""
    buffer = io.BytesIO()
    contents: dict[str, Any] = dict(arrays)
    np.savez(buffer, **contents)
    return buffer.getvalue()
