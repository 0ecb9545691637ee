"""Freed memory is kept where glibc allows it, and where the user has not said otherwise."""

import os
import subprocess
import sys

import pytest

#: Faults of pages while 16 MB are taken, written and given back a hundred times.
SCRIPT = """
import resource
import numpy as np
from sluiceway.core.memory import keep_freed_memory
print(int(keep_freed_memory()))
def use():
    blocks = [np.ones(1 << 18, dtype=np.float64) for _ in range(8)]
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is on Linux")
def test_memory_is_kept_unless_the_user_has_settings_of_his_own() -> None:
    plain = {n: v for n, v in os.environ.items() if n != "GLIBC_TUNABLES" and "MALLOC_" not in n}
    found = []
    for own in ({}, {"MALLOC_TRIM_THRESHOLD_": "131072"}):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=plain | own, capture_output=True, text=True
        )
        found.append([int(number) for number in done.stdout.split()])
    (kept, faults), (other, default) = found
    if not kept:
        pytest.skip("the C library is not glibc")
    assert not other
    assert faults < 200 < 10_000 < default
