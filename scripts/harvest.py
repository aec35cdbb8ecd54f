"""Harvest activations into a cache on disk, from which many autoencoders can be trained (`source: ActivationFiles`).

python scripts/harvest.py --config configs/harvest/builtin.yaml --out runs/activations
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from lm.config import script
from sae.activations.stage import HarvestConfig, run_harvest

if __name__ == "__main__":
    script(run_harvest, HarvestConfig, description=__doc__)
