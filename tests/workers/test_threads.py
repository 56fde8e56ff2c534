import os
import subprocess
import sys

SCRIPT = """
from concurrent.futures import ThreadPoolExecutor
import torch
from workers.processes import compute_in_one_thread
compute_in_one_thread()
with ThreadPoolExecutor(1) as pool:
    print(torch.get_num_threads(), pool.submit(torch.get_num_threads).result())
"""


def test_torch_takes_one_thread_whoever_asks() -> None:
    """threadpoolctl alone says 1 in the main thread and 2 in the other."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "1 1\n"
