"""Unlearn by arithmetic on weights, or join several unlearned checkpoints: task vectors, TIES.

python scripts/merge.py --config configs/merge/negation.yaml --base runs/target/model --models '[runs/reinforced/model]'
python scripts/merge.py --config configs/merge/ties.yaml --base runs/target/model --models '[runs/one/model, runs/two/model]'
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, whether or not the packages are installed

from lm.config import script
from unlearn.merging.config import MergeConfig
from unlearn.merging.stage import run_merge


def main(config: MergeConfig) -> None:
    print(f"wrote {run_merge(config)}")


if __name__ == "__main__":
    script(main, MergeConfig, description=__doc__)
