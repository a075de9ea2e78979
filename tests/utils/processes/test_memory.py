import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import resource, torch
from utils.processes.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(12 << 20)  # 48 MB, which by default are given back at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults(), print(faults())
keep_freed_memory()
faults(), print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of the GNU C library")
def test_freed_memory_is_not_asked_of_the_system_again() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    before, after = map(int, result.stdout.split())
    assert before > 3 * after
