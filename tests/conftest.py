"""Shared by all tests: quiet bars, one thread a process, and trajectory sources that live in memory."""
import os

import psutil

os.environ.setdefault("RAPTOR_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_xdist_auto_num_workers(config):
    "Two test processes, since each holds torch and many tests start processes of their own; none for benchmarks, which want the machine to themselves."
    if any("benchmarks" in argument for argument in config.args): return 0
    return min(2, len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count())
