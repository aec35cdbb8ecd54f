"""Which method is better at the same effort? A search over each one's settings with equal trials and a budget of disruption.

`run_search` drives it; `SearchConfig` says over what. Training and scoring are the public stages, unchanged.
"""

from unlearn.search.config import Method, Range, SearchConfig
from unlearn.search.stage import run_search

__all__ = ["Method", "Range", "SearchConfig", "run_search"]
