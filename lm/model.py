"""What a language model under study is: the model, its tokenizer and the names of its parts; how a config names one, and how a
fingerprint tells it from others, which its name does not.

Loading one is `lm.loading`; watching and editing it is `lm.forward`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lm.anatomy import Anatomy

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["eager", "sdpa", "flash_attention_2"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHUNK = 1 << 24
"""How many elements of a weight are hashed at once."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which model, and how to hold it. What configs hold."""

    old_values: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "path": {"builtin:retain_only": "builtin:retain_model", "builtin:memorised": "builtin:memorized"}
    }

    path: str = "builtin"
    """`builtin`, `builtin:retain_model`, a folder, or a hub id."""
    dtype: Dtype = "float32"
    """The type the weights are held in: float32, bfloat16 or float16."""
    device: str | None = None
    """Null: cuda if there is one, else cpu."""
    attention: Attention | None = None
    """Null: what transformers chooses."""
    revision: str | None = None
    """A commit, branch or tag of a hub id."""
    adapter: str | None = None
    """A PEFT adapter (folder or hub id), merged into the weights on load."""
    tokenizer: str | None = None
    """Another folder or hub id for the tokenizer, for a model that ships without one."""


@dataclass(frozen=True, repr=False)
class LanguageModel:
    """A model in eval mode, its tokenizer, and the names of its parts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    anatomy: Anatomy
    name: str

    @property
    def device(self) -> torch.device:
        """Where the first parameter is: where input ids go."""
        return next(self.model.parameters()).device

    @property
    def config(self) -> PretrainedConfig:
        """The config of the text model, which in a model that reads pictures, too, is inside another."""
        return self.model.config.get_text_config()

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        dtype = str(self.model.dtype).removeprefix("torch.")
        return (
            f"LanguageModel({self.name!r}: {self.anatomy.architecture}, {parameters:,} parameters, {self.anatomy.layers} layers, "
            f"{dtype} on {self.device})"
        )


@torch.inference_mode()
def fingerprint(model: LanguageModel) -> str:
    """16 hex digits of the architecture and of the names, shapes, types and bytes of all parameters and buffers.

    One to two seconds a gigabyte. The same on every device and with any number of threads.
    """
    digest = hashlib.sha256(model.anatomy.architecture.encode())
    for name, weight in model.model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        for part in weight.detach().reshape(-1).split(_CHUNK):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits of everything a fast tokenizer does."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of all special tokens, rising: those with a name (BOS, EOS and their like), and those that the tokenizer only flags
    as special, as chat tokens often are."""
    flagged = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    return sorted({int(token) for token in (*tokenizer.all_special_ids, *flagged)})
