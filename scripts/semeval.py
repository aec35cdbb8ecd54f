"""The SemEval-2025 Task 4 contract as a command: a model and two data folders in, an unlearned checkpoint out.

python scripts/semeval.py --input_model_path MODEL --output_path OUT --forget_dir FORGET --retain_dir RETAIN
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout: scripts/unlearn.py must not hide the package

from lm.config import script
from lm.devices import is_main
from unlearn.semeval.stage import unlearn


@dataclass(frozen=True, kw_only=True)
class Contract:
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


def main(paths: Contract) -> None:
    output = unlearn(
        paths.input_model_path, paths.output_path, paths.forget_dir, paths.retain_dir, tokenizer=paths.tokenizer
    )
    if is_main():
        print(f"wrote {output}")


if __name__ == "__main__":
    script(main, Contract, description=__doc__)
