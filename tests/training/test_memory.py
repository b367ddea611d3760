"""What a step frees is there for the next one."""

import subprocess
import sys

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
