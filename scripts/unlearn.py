"""Take it out: train the chosen layers so that the forget rows are gone and the retain rows stay.

python scripts/unlearn.py --config configs/unlearn/builtin.yaml --out runs/mine
accelerate launch --config_file configs/accelerate/cpu2_ddp.yaml scripts/unlearn.py --config configs/unlearn/builtin.yaml
"""

from lm.config import script
from unlearn.config import UnlearnConfig
from unlearn.stage import run_unlearning


def main(config: UnlearnConfig) -> None:
    print(f"wrote {run_unlearning(config)}")


if __name__ == "__main__":
    script(main, UnlearnConfig, description=__doc__)
