"""Take it out, and prove it: objectives x scope x trainer -> a checkpoint; evaluation -> scores; a report.

`unlearn.scope.scope.Scope` says what may change, `unlearn.objectives` what is minimised, `unlearn.stage.run_unlearning` does it from
files to files, `unlearn.evaluation` scores the result.
"""

from unlearn import objectives
from unlearn.scope.scope import Lora, Scope

__all__ = ["Lora", "Scope", "objectives"]
