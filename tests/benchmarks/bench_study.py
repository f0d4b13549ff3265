"""Where the time of a finished study went: seconds of its executed notebooks by stage, the start of their kernels included.

    python tests/benchmarks/bench_study.py digits study.csv      # a preset that has run under RAPTOR_HOME
"""
import sys

import pandas as pd

from raptor.core import code_version, hardware, versions
from raptor.experiments import run_seconds
from raptor.results import Results

STAGES = {"teacher": "notebooks/train_teacher.ipynb", "cache": "notebooks/cache_activations.ipynb", "phases": "notebooks/find_phases.ipynb", "blocks, stage 1": "blocks/*/train_block.ipynb",
          "Raptors, stage 2": "raptors/*/train_raptor.ipynb", "probes": "probes/*/train_probe.ipynb", "controls, with --all": "controls/*/train_control.ipynb",
          "tables": "notebooks/tab_*.ipynb", "figures": "notebooks/fig_*.ipynb", "summary": "notebooks/summary.ipynb"}


def main(preset, table):
    results = Results.open(preset)
    rows = [{"stage": stage, "runs": len(seconds), "seconds, all runs": seconds.sum(), "longest": seconds.max() if len(seconds) else float("nan")}
            for stage, pattern in STAGES.items() for seconds in [run_seconds(results, pattern).seconds.astype(float)]]
    frame = pd.DataFrame(rows)
    frame.assign(hardware=hardware(), versions=versions(), code=code_version()).to_csv(table, index=False)
    print(frame.round(1).to_string(index=False))


if __name__ == "__main__": main(*sys.argv[1:])
