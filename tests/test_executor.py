"""Jobs of the fork server: streams, folder, environment, threads, exit status, signals, and an end with their command."""
import os, signal, subprocess, sys

import psutil
import pytest

pytest.importorskip("snakemake", reason="Snakemake 9 has no release for Python 3.10")

PATIENCE = 600 # seconds: a limit for what hangs, not for what is slow on a busy machine

JOBS = """
import os, sys, time
what, *rest = sys.argv[1:]
if what == "tell":
    import torch
    print(os.getcwd(), os.environ["WHO"], rest, torch.get_num_threads(), sep="|")
    print("aside", file=sys.stderr)
if what == "leave": sys.exit(int(rest[0]))
if what == "complain": sys.exit("it went wrong")
if what == "fail": raise ValueError("not this way")
if what == "wait":
    print(os.getpid(), flush=True)
    time.sleep(3600)
"""

OWNER = """
import multiprocessing, os, sys
from raptor.pipeline import executor
from raptor.pipeline.executor import run_job, start_server
executor.PRELOAD[:] = ["torch"] # the other libraries take seconds, and no part in this
if __name__ == "__main__":
    start_server()
    os.environ["WHO"] = "owner" # after the server has started
    os.chdir(sys.argv[1])
    codes = []
    for command in sys.argv[2:]:
        job = multiprocessing.get_context("forkserver").Process(target=run_job, args=(command, dict(os.environ)))
        job.start(); job.join(); codes.append(job.exitcode)
    print(codes)
"""


def test_what_many_jobs_import_is_loaded_before_they_are_forked():
    "Otherwise each of them loads it anew: 2 s for torchmetrics, as long for timm."
    heavy = ("timm.models.vision_transformer", "torchmetrics", "seaborn", "scipy.stats", "torchvision.transforms.v2", "zarr", "accelerate")
    loading = "import importlib, sys; from raptor.pipeline.executor import PRELOAD; [importlib.import_module(m) for m in PRELOAD]"
    left = subprocess.run([sys.executable, "-c", f"{loading}; print([m for m in {heavy} if m not in sys.modules])"], text=True, capture_output=True, check=True)
    assert left.stdout.strip() == "[]"


@pytest.fixture
def owner(tmp_path):
    "A process that runs jobs one after another; started where a folder is named like the package."
    (tmp_path/"jobs.py").write_text(JOBS)
    (tmp_path/"owner.py").write_text(OWNER)
    (tmp_path/"elsewhere").mkdir()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "2"}
    def start(*commands):
        commands = [f"{sys.executable} -P -m jobs {c}" if not c.startswith("!") else c[1:] for c in commands]
        return subprocess.Popen([sys.executable, tmp_path/"owner.py", tmp_path/"elsewhere", *commands], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return start


def test_a_job_has_the_folder_environment_and_arguments_of_its_command(owner, tmp_path):
    out, err = owner("tell a 'b c'").communicate(timeout=PATIENCE)
    told, codes = out.splitlines()
    assert told == f"{tmp_path/'elsewhere'}|owner|['a', 'b c']|1" and codes == "[0]" and "aside" in err, "the server computes with one thread"


def test_exit_status_is_that_of_the_job(owner):
    out, err = owner("leave 0", "leave 3", "complain", "fail", "!exit 7", "!true").communicate(timeout=PATIENCE)
    assert out.strip() == "[0, 3, 1, 1, 7, 0]" and "it went wrong" in err and "not this way" in err


def test_a_job_of_a_console_script_is_silent(owner, tmp_path):
    "The script imports the module that the job is going to run."
    (tmp_path/"owner.py").write_text(f"import raptor.__main__\n{OWNER}")
    out, err = owner(f"!{sys.executable} -P -m raptor --version").communicate(timeout=PATIENCE)
    assert "raptor" in out and out.splitlines()[-1] == "[0]" and err == ""


def test_a_job_ends_with_its_command_even_by_sigkill(owner):
    process = owner("wait")
    job = psutil.Process(int(process.stdout.readline()))
    process.kill(); process.communicate()
    job.wait(PATIENCE)


def test_a_killed_job_is_a_failure(owner):
    process = owner("wait", "leave 0")
    os.kill(int(process.stdout.readline()), signal.SIGKILL)
    assert process.communicate(timeout=PATIENCE)[0].strip() == f"[{-signal.SIGKILL}, 0]"


def test_threads_are_set_by_the_run(tmp_path):
    code = "import torch; from raptor.pipeline.processes import use_threads; use_threads(2); import os; print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["2", "2"]
