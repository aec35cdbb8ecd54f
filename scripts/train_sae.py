"""Look inside: train sparse autoencoders on the activations of a language model.

python scripts/train_sae.py --config configs/sae/builtin.yaml --out runs/sae
accelerate launch --config_file configs/accelerate/cpu2_ddp.yaml scripts/train_sae.py --config configs/sae/builtin.yaml
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout: scripts/ must not hide other modules

from lm.config import script
from lm.devices import is_main
from sae.trainer.config import TrainSaeConfig
from sae.trainer.stage import describe, run_train_sae


def main(config: TrainSaeConfig) -> None:
    result = run_train_sae(config)
    if is_main():
        print(describe(config, result))


if __name__ == "__main__":
    script(main, TrainSaeConfig, description=__doc__)
