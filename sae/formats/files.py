"""Reading other people's files safely: JSON whose types are checked, tensors from safetensors, and no pickle, ever.

Every name of a file is fixed here or in a format's module; none is taken from what a file says, so nothing in a file can
make a path. Whatever is wrong with a file ends in one sentence that names it. This module knows no format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lm.errors import UserError
from lm.run_folder import write_atomic, write_json

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_REQUIRED = object()
_LARGEST = 1 << 53


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A table of a JSON file whose entries are asked for by type. A missing or mistyped entry is a `UserError`."""

    where: str
    """The file, and the place in it, for messages."""
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Facts:
        """The table that a JSON file holds."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: give the folder of a saved autoencoder") from None
        except (OSError, ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, a number of thousands of digits
            raise UserError(f"{path} cannot be read as JSON ({error}): get the file again") from None
        if not isinstance(values, dict):
            raise UserError(f"{path} holds a {type(values).__name__} and not a table of settings: it is another file")
        return cls(where=str(path), values=values)

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def whole(self, key: str, default: Any = _REQUIRED) -> int:
        """A whole number."""
        value: int = self._of(key, (int,), "a whole number", default)
        if value is not None and abs(value) > _LARGEST:
            raise UserError(f"{self.where} has a {key} of more than {_LARGEST}: the file is damaged")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A finite number."""
        value = self._of(key, (int, float), "a number", default)
        if not -_LARGEST <= value <= _LARGEST:
            raise UserError(f"{self.where} has a {key} that is not finite, or beyond {_LARGEST}: the file is damaged")
        return float(value)

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        """Text."""
        value: str = self._of(key, (str,), "text", default)
        return value

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        value: bool = self._of(key, (bool,), "true or false", default)
        return value

    def table(self, key: str, default: Any = _REQUIRED) -> Facts:
        """A table in the table; its own entries are then asked for in the same way."""
        return Facts(where=f"{self.where}: {key}", values=self._of(key, (dict,), "a table", default))

    def _of(self, key: str, kinds: tuple[type, ...], name: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self.where} lacks {key}, {name}: it is damaged, or another tool's file")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(
                f"{self.where} has {key} = {value!r:.60} where {name} belongs: it is damaged, or another file"
            )
        return value


class Tensors:
    """The tensors of one safetensors file, in float32, asked for by name and shape; what is left over is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.info: dict[str, str] = file.metadata() or {}
                self._left: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read as safetensors ({error}): get the file again") from None

    def names(self) -> set[str]:
        """The names not asked for yet."""
        return set(self._left)

    def take(self, name: str, *shape: int | None, finite: bool = True) -> Tensor:
        """One tensor in float32; `None` in the shape is any size. Raises UserError if it is not there, or holds NaN."""
        if name not in self._left:
            raise UserError(f"{self.path} lacks the tensor {name}: it is damaged, or another tool's file")
        tensor = self._left.pop(name)
        if tensor.ndim != len(shape) or any(w not in (None, h) for w, h in zip(shape, tensor.shape, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise UserError(
                f"{self.path} has {name} of shape {tuple(tensor.shape)} where ({wanted}) belongs: its settings are of "
                f"another file, or it is damaged"
            )
        tensor = tensor if tensor.is_complex() else tensor.to(torch.float32)
        if tensor.is_complex() or bool(tensor.isnan().any()) or (finite and bool(tensor.isinf().any())):
            raise UserError(
                f"{self.path} has numbers in {name} that are not finite: training diverged, or it is damaged"
            )
        return tensor

    def drop(self, names: Iterable[str]) -> None:
        """Pass over these, if they are there: counters that the forward pass does not use."""
        for name in names:
            self._left.pop(name, None)

    def finish(self, remedy: str) -> None:
        """Refuse whatever was not asked for: a tensor that is not understood may change the output."""
        if self._left:
            names = ", ".join(sorted(self._left)[:5])
            raise UserError(f"{self.path} also holds {names}, which this project does not know: {remedy}")


def write(folder: Path, name: str, tensors: Mapping[str, Tensor], *, info: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all; contiguous, on the CPU, floating point as float32."""
    plain = {
        key: (tensor.detach().float() if tensor.is_floating_point() else tensor.detach()).contiguous().cpu().clone()
        for key, tensor in tensors.items()
    }
    write_atomic(folder / name, save(plain, info))


def write_config(path: Path, config: dict[str, Any]) -> None:
    """A JSON file, whole or not at all; refuses what JSON cannot hold."""
    check_config(config)
    write_json(path, config)


def check_config(config: dict[str, Any]) -> None:
    """Refuse what JSON cannot hold, before any file is touched."""
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"the metadata cannot be written as JSON ({error}): give plain finite values") from None
