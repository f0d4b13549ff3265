"""What the benchmarks share: `work` times ours and its rivals in turns; a table on disk grows row by row, and all is printed at the end.

    pytest tests/benchmarks/bench_step.py --benchmark-enable [--table FILE.csv]
"""
import statistics, sys, time
from pathlib import Path

import pytest, torch

sys.dont_write_bytecode = True
ROWS = pytest.StashKey()
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def pytest_addoption(parser): parser.addoption("--table", help="write the table of the benchmarks to this CSV file, with hardware and versions")
def pytest_configure(config): config.stash[ROWS] = []


def seconds(call):
    "Wall-clock seconds of one call, the accelerator's queue emptied before and after."
    if ON_GPU: torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    if ON_GPU: torch.cuda.synchronize()
    return time.perf_counter() - begun


@pytest.fixture(scope="session")
def matmul_rate():
    "FLOP/s of a square matrix product in a precision, measured once: the machine's limit."
    known = {}
    def rate(dtype):
        if dtype not in known:
            n = 8192 if ON_GPU else 1024
            a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
            for _ in range(3): a @ b
            known[dtype] = 2*n**3/min(seconds(lambda: a @ b) for _ in range(20))
        return known[dtype]
    return rate


@pytest.fixture
def work(benchmark, request):
    "work(name, ours, rounds=, flops=, limit=, **others): time ours and the others in turns; a row of the table, each ratio the median over rounds."
    def run(name, ours, *, rounds=5, flops=None, limit=None, note="", **others):
        times = {k: [] for k in others}
        for call in (ours, *others.values()): call(); call() # what is loaded or compiled once is not timed
        if benchmark.disabled: return {}
        def others_first():
            for k, call in others.items(): times[k].append(seconds(call))
        def synchronised():
            ours()
            if ON_GPU: torch.cuda.synchronize()
        benchmark.pedantic(synchronised, setup=others_first, rounds=rounds)
        row = {"work": name, "ours, ms": 1e3*statistics.median(benchmark.stats.stats.data), **{f"{k}, ms": 1e3*statistics.median(v) for k, v in times.items()}}
        for k in others:
            low, middle, high = statistics.quantiles([theirs/own for theirs, own in zip(times[k], benchmark.stats.stats.data)], n=4)
            row |= {f"{k} / ours": middle, f"{k} / ours, quartiles": f"{low:.3f} to {high:.3f}"}
        if flops: row |= {"TFLOP/s": flops/row["ours, ms"]/1e9}
        if flops and limit: row |= {"limit, TFLOP/s": limit/1e12, "share of limit": row["TFLOP/s"]*1e12/limit}
        if note: row["note"] = note
        request.config.stash[ROWS].append(row)
        write_table(request.config)
        return row
    return run


def about():
    from raptor.core import code_version, hardware, versions
    return {"hardware": hardware(), "versions": versions(), "threads": torch.get_num_threads(), "code": code_version()}


def write_table(config):
    "The rows so far: a run that is cut short keeps what it has measured."
    import pandas as pd
    if config.getoption("--table"): pd.DataFrame(config.stash[ROWS]).assign(**about()).to_csv(Path(config.getoption("--table")), index=False)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows: return
    write_table(config) # a benchmark may have added to its row
    terminalreporter.section("medians of rounds that take turns")
    for row in rows: terminalreporter.line(f"{row['work']}: " + "; ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in row.items() if k != "work"))
    terminalreporter.line("; ".join(f"{k} {v}" for k, v in about().items()))
