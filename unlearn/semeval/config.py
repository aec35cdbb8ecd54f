"""The competition's contract as data: four paths."""

from __future__ import annotations

from dataclasses import dataclass

HELP = """The contract of SemEval-2025 Task 4: a model and two data folders in, an unlearned checkpoint out.

palimpsest semeval --input_model_path MODEL --output_path OUT --forget_dir FORGET --retain_dir RETAIN
accelerate launch -m palimpsest semeval --input_model_path MODEL --output_path OUT --forget_dir FORGET --retain_dir RETAIN
"""


@dataclass(frozen=True, kw_only=True)
class SemevalConfig:
    """The four paths of the contract."""

    input_model_path: str
    """The model to unlearn: a folder or hub id."""
    output_path: str
    """A new folder for the resulting checkpoint."""
    forget_dir: str
    """Folder with the rows to forget (JSONL or Parquet)."""
    retain_dir: str
    """Folder with the rows to retain."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, for a model that ships without one."""
