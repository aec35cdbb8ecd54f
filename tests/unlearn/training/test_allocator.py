"""What is freed between tensors that live on goes back to the system."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HOLES = """
import sys
import torch
from unlearn.training.allocator import return_freed_memory
from lm.run_folder import resident_bytes

first = torch.ones(4 << 20)
del first  # glibc now keeps whatever is smaller than its 16 MiB
if sys.argv[1] != "no":
    print(return_freed_memory(int(sys.argv[1])))
before = resident_bytes()
large, small = [], []
for _ in range(100):
    large.append(torch.ones(1 << 19))
    small.append(torch.ones(1 << 12))
large.clear()
print((resident_bytes() - before) >> 20)
"""


def run(asked: str, **environment: str) -> list[str]:
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    words = [sys.executable, "-c", HOLES, asked]
    done = subprocess.run(words, env={**usual, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_blocks_are_not_kept() -> None:
    kept = int(run("no")[0])
    told, mib = run("0")
    if told == "False":
        pytest.skip("this C library is not glibc")
    assert kept > 150, "200 MiB lie free in the heap: without the call this machine has nothing to return"
    assert int(mib) < 20
    assert int(run("1000000000")[1]) > 150, "beside a large model blocks of 2 MiB stay in the heap"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_users_own_setting_stays() -> None:
    assert run("0", MALLOC_MMAP_THRESHOLD_="1000000000")[0] == "False"
    assert run("0", GLIBC_TUNABLES="glibc.malloc.mmap_threshold=1000000000")[0] == "False"
