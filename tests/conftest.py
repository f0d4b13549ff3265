"""Shared by all tests: no progress bars, one thread a process, and a temporary folder that goes with the session."""
import os
import shutil
import tempfile

import psutil

os.environ.setdefault("RAPTOR_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_xdist_auto_num_workers(config):
    "Two test processes, since each holds torch and many tests start processes of their own; none for benchmarks, which want the machine to themselves."
    if any("benchmarks" in argument for argument in config.args): return 0
    return min(2, len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count())


def pytest_configure(config):
    "Whatever a test, or a process that it kills, leaves in the temporary folder is removed with it. `--basetemp` keeps it."
    if hasattr(config, "workerinput") or config.option.basetemp: return
    config.raptor_scratch = os.path.realpath(tempfile.mkdtemp(prefix="raptor-tests-"))
    config.option.basetemp = os.path.join(config.raptor_scratch, "pytest")
    os.environ["TMPDIR"] = config.raptor_scratch # of the workers, and of all processes that tests start
    tempfile.tempdir = None


def pytest_unconfigure(config):
    if scratch := getattr(config, "raptor_scratch", None): shutil.rmtree(scratch, ignore_errors=True)
