"""Which method is better at the same effort? Equal trials, a budget of utility, seeds; a table, a picture, every run kept.

python scripts/search.py --config configs/search/builtin.yaml --out runs/search
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout: scripts/unlearn.py must not hide the package

from lm.config import script
from unlearn.search import SearchConfig, run_search
from unlearn.search.table import table, terms


def main(config: SearchConfig) -> None:
    result = run_search(config)
    print(f"{terms(result)}\n\n{table(result)}")
    print(f"wrote {config.out}/table.md, pareto.png and search.json")


if __name__ == "__main__":
    script(main, SearchConfig, description=__doc__)
