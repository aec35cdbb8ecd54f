"""The sum of a metric's counts over processes, on whatever device the process group works. Nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from lm.devices import sum_over_processes


def sum_everywhere(values: Tensor) -> Tensor:
    """The elementwise float64 sum over all processes, on the device of `values`, which may be another than the group's."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "nccl":
        return sum_over_processes(values.to(torch.device("cuda", torch.cuda.current_device()))).to(values.device)
    return sum_over_processes(values)
