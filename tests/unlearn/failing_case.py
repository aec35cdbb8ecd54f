"""A run in which something goes wrong on the second process alone (`test_devices_failing.py`): `bug` or `disk`.

`accelerate launch … failing_case.py KIND --config FILE`
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

from lm.config import script
from unlearn.config import UnlearnConfig
from unlearn.stage import run_unlearn
from unlearn.training import checkpoint
from unlearn.training.step import Stepper

KIND = sys.argv.pop(1)


def after(calls: int, usual: Any, error: Exception) -> Any:
    """`usual`, which on the second process raises after so many calls."""
    done = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if os.environ["RANK"] == "1" and done > calls:
            raise error
        return usual(*args, **kwargs)

    return call


def main(config: UnlearnConfig) -> None:
    if KIND == "bug":
        Stepper.gradient = after(2, Stepper.gradient, RuntimeError("a bug of the second process"))  # type: ignore[method-assign]
    else:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        checkpoint.save_file = after(2, checkpoint.save_file, full)  # weights and moments of the first checkpoint
    run_unlearn(config)


if __name__ == "__main__":
    script(main, UnlearnConfig, description=__doc__ or "")
