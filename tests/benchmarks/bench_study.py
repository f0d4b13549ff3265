"""Where the time of a finished study went: seconds of its executed notebooks by stage.

    python tests/benchmarks/bench_study.py digits study.csv      # a preset that has run under RAPTOR_HOME
"""
import sys

import nbformat
import pandas as pd

from raptor.core import code_version, hardware, versions
from raptor.study.experiments import run_seconds
from raptor.study.study import Study

STAGES = {"teacher": "notebooks/train_teacher.ipynb", "cache": "notebooks/cache_activations.ipynb", "phases": "notebooks/find_phases.ipynb", "blocks, stage 1": "blocks/*/train_block.ipynb",
          "Raptors, stage 2": "raptors/*/train_raptor.ipynb", "probes": "probes/*/train_probe.ipynb", "controls, with --all": "controls/*/train_control.ipynb",
          "tables": "notebooks/tab_*.ipynb", "figures": "notebooks/fig_*.ipynb", "summary": "notebooks/summary.ipynb"}


def wall_clock(results):
    "Seconds between the first start and the last end of what the main job trains."
    clocks = [nbformat.read(path, 4).metadata.papermill for pattern in list(STAGES.values())[:6] for path in results.folder.glob(pattern)]
    return (max(pd.Timestamp(c.end_time) for c in clocks) - min(pd.Timestamp(c.start_time) for c in clocks)).total_seconds()


def main(preset, table):
    results = Study.open(preset)
    rows = [{"stage": stage, "runs": len(seconds), "seconds, all runs": seconds.sum(), "longest": seconds.max() if len(seconds) else float("nan")}
            for stage, pattern in STAGES.items() for seconds in [run_seconds(results, pattern).seconds.astype(float)]]
    frame = pd.DataFrame([*rows, {"stage": "teacher to last probe, on the wall", "seconds, all runs": wall_clock(results)}]).astype({"runs": "Int64"})
    frame.assign(hardware=hardware(), versions=versions(), code=code_version()).to_csv(table, index=False)
    print(frame.round(1).to_string(index=False))


if __name__ == "__main__": main(*sys.argv[1:])
