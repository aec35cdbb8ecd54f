"""The tokenizer beside a model or in a folder of its own, with the tokens that its `tokenizer.json` says.

transformers 5 builds some classes anew from the vocabulary alone (`GPT2Tokenizer` for one), which loses a pre-tokenizer or a
normalizer that the file has; transformers 4 and the tokenizers library read the file as it stands, and so does this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from lm.errors import UserError, one_line
from lm.hub import TOKENIZER_FILES

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_IN_THE_MODEL = ("type", "vocab", "merges", "byte_fallback", "ignore_merges")


def load_tokenizer(name: str, folder: Path, config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder; `config` is that of the model that it is for, which may lie in another folder.

    Raises UserError, naming `name`, for one that is missing, damaged, slow or without an EOS token.
    """
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise UserError(f"{name} has no tokenizer files: pass the folder or hub id that has them as tokenizer")
    try:
        tokens: Any = AutoTokenizer.from_pretrained(folder, config=config, use_fast=True, trust_remote_code=False)
        if isinstance(tokens, PreTrainedTokenizerFast):
            tokens = _as_written(tokens, folder)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise UserError(
            f"the tokenizer of {name} cannot be loaded, mend it or pass another as tokenizer: {one_line(error)}"
        ) from error
    if not isinstance(tokens, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer of {name} is a slow one, without offsets: pass a fast one as tokenizer")
    if tokens.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {name} has no EOS token, so no answer can end: set eos_token in tokenizer_config.json"
        )
    if tokens.pad_token_id is None:
        tokens.pad_token = tokens.eos_token
    return tokens


def _as_written(tokens: PreTrainedTokenizerFast, folder: Path) -> PreTrainedTokenizerFast:
    """`tokens`, or another if they would not cut text as the folder's tokenizer.json does."""
    file = folder / "tokenizer.json"
    if not file.is_file() or _rules(tokens.backend_tokenizer) == _rules(Tokenizer.from_file(str(file))):
        return tokens
    written: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
        folder
    )  # with what tokenizer_config.json sets, add_prefix_space say
    if _rules(tokens.backend_tokenizer) == _rules(written.backend_tokenizer):
        return tokens
    for special in _SPECIAL:  # what the class has by default
        if getattr(written, special) is None:
            setattr(written, special, getattr(tokens, special))
    return written


def _rules(tokenizer: Tokenizer) -> list[Any]:
    """By what a tokenizer cuts text; what it puts round it may rightly be set elsewhere."""
    rules = json.loads(tokenizer.to_str())
    return [rules["normalizer"], rules["pre_tokenizer"], *(rules["model"].get(key) for key in _IN_THE_MODEL)]
