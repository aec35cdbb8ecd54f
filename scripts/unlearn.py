"""Take it out: train the chosen layers so that the forget rows are gone and the retain rows stay.

python scripts/unlearn.py --config configs/unlearn/builtin.yaml --out runs/mine
accelerate launch --config_file configs/accelerate/cpu2_ddp.yaml scripts/unlearn.py --config configs/unlearn/builtin.yaml
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout: scripts/unlearn.py must not hide the package

from lm.config import script
from lm.devices import is_main
from unlearn.config import UnlearnConfig
from unlearn.stage import run_unlearn


def main(config: UnlearnConfig) -> None:
    result = run_unlearn(config)
    if is_main():
        print(f"wrote {result}")


if __name__ == "__main__":
    script(main, UnlearnConfig, description=__doc__)
