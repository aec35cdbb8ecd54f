"""Harvest activations into a cache on disk, from which many autoencoders can be trained (`source: ActivationFiles`).

python scripts/harvest.py --config configs/harvest/builtin.yaml --out runs/activations
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from lm.config import script
from sae.activations.config import HarvestConfig
from sae.activations.stage import describe, run_harvest


def main(config: HarvestConfig) -> None:
    print(describe(config, run_harvest(config)))


if __name__ == "__main__":
    script(main, HarvestConfig, description=__doc__)
