"""What a model and a tokenizer are, as short hashes: a name alone does not say."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedTokenizerBase

from lm.model import LanguageModel

_CHUNK = 1 << 24  # elements


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
