"""Invent other answers to the rows to be forgotten, for the objectives that learn one instead (AltPO and its kin).

python scripts/alternates.py --config configs/alternates/builtin.yaml --out runs/alternates
python scripts/unlearn.py --objective DPO --alternates AlternateFile --alternates.path runs/alternates/alternates.jsonl
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, whether or not the packages are installed

from lm.config import script
from lm.devices import is_main
from unlearn.alternates.config import AlternatesConfig
from unlearn.alternates.stage import run_alternates


def main(config: AlternatesConfig) -> None:
    result = run_alternates(config)
    if is_main():
        print(f"wrote {result}")


if __name__ == "__main__":
    script(main, AlternatesConfig, description=__doc__)
