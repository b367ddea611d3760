"""What a step frees is there for the next one, and lies in huge pages."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import resource, torch
from dispersive_kit.training.parallel import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        a, b = torch.ones(2**22), torch.ones(2**23)  # 16 and 32 MiB
        del a, b
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
keep_freed_memory(torch.device("cpu"))
faults()
print(given_back, faults())
"""


def test_a_cpu_keeps_the_memory_it_frees_and_faults_no_page_twice():
    out = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    given_back, kept = map(int, out.stdout.split())
    assert kept < 100 < 1000 < given_back or (sys.platform != "linux" and kept <= given_back)


HUGE_PAGES = """
import torch
from dispersive_kit.training.parallel import keep_freed_memory

def huge():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))

many, few = [torch.ones(2**24) for _ in range(4)], huge()  # 64 MiB each
del many
keep_freed_memory(torch.device("cpu"))
many = [torch.ones(2**24) for _ in range(4)]
print(few, huge())
"""


def test_what_a_cpu_allocates_then_lies_in_huge_pages_where_the_kernel_gives_them():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if setting.exists() and "[madvise]" in setting.read_text():
        out = subprocess.run([sys.executable, "-c", HUGE_PAGES], capture_output=True, text=True, check=True)
        before, after = map(int, out.stdout.split())
        assert before < 2**15 < 2**17 < after  # KiB
