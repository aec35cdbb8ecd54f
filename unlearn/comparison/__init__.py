"""One table from run folders: a row a method, with what it forgot, what it kept, what came back and what it cost."""

from unlearn.comparison.config import CompareConfig
from unlearn.comparison.failures import write_failure
from unlearn.comparison.stage import run_compare
from unlearn.comparison.table import Comparison

__all__ = ["CompareConfig", "Comparison", "run_compare", "write_failure"]
