"""How far a study is: what a run says of itself, what is said of it, and a history that grows and is always whole."""
import json, os, pty, re, signal, socket, subprocess, sys, textwrap, threading, time

import pandas as pd
import pytest
import yaml

import raptor.pipeline.cli as cli
from raptor.core import RaptorError, progress
from raptor.pipeline import progress as module
from raptor.pipeline.display import draw_curve
from raptor.pipeline.processes import sweep
from raptor.pipeline.progress import Status, StatusFile, Watch, describe_whole, read_status, reported, sign_of_life, speed, status_path, time_left
from raptor.study.presets import load_preset
from raptor.study.steps import step, written
from raptor.study.study import Study
from raptor.train.fit import growing_history
from test_pipeline import PATIENCE, need_study, raptor, start, tiny, until


def status(**changes):
    usual = dict(notebook="train_block", run="blocks/0-5-r0", pid=os.getpid(), host=socket.gethostname(), started=1e9, updated=1e9 + 60, stage="states 0-5", step=300, of=500)
    return Status(**usual | changes)


# known values ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("done,first,total,elapsed,expected", [
    (300, 200, 500, 50.0, (0.5, 100.0)), # resumed at step 200: the 200 cost this process no time
    (500, 0, 500, 25.0, (0.05, 0.0)), (200, 200, 500, 9.0, (None, None)), (60, 0, 50, 6.0, (0.1, 0.0))])
def test_the_time_left_of_a_loop_is_that_of_its_steps(done, first, total, elapsed, expected): assert speed(done, first, total, elapsed) == pytest.approx(expected) if done > first else speed(done, first, total, elapsed) == expected


@pytest.mark.parametrize("waiting,running,known,left", [
    ([], [("train_block", 20.0, 40.0)], {}, 40.0), # what its loop says
    (["train_block"], [("train_block", 20.0, 40.0)], {}, 40 + 60), # the other takes as long as this one will have taken
    (["train_probe"]*4, [("train_probe", 0.0, None)]*2, {"train_probe": [10.0, 30.0]}, (2*20 + 4*20)/2), # two at a time
    (["fig_speed"], [("train_block", 50.0, 10.0)], {"train_block": [60.0], "train_raptor": [120.0]}, 10 + (60 + 60 + 120)/3), # nothing is known of figures
    ([], [("train_block", 500.0, None)], {"train_block": [60.0]}, 0.0), # it takes longer than usual
    ([], [("train_raptor", 0.0, 1000.0), ("train_block", 0.0, 10.0)], {}, 1000.0), # no faster than the longest
    (["train_block"], [("find_phases", 5.0, None)], {}, None), ([], [], {}, None)])
def test_the_time_left_of_a_study(waiting, running, known, left): assert time_left(waiting, running, known) == pytest.approx(left)


def test_a_run_says_how_far_it_is_about_once_a_second(tmp_path, monkeypatch):
    now, writes = [0.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(StatusFile, "write", lambda self, usual=StatusFile.write: (writes.append(now[0]), usual(self)))
    with reported(tmp_path, "raptors/k3-r0/train_raptor.ipynb") as path:
        with progress(total=1000, initial=500, desc="states 0-6", disable=True) as bar:
            for i in range(250):
                now[0] += 0.02
                bar.set_postfix({"loss": 1/(i + 1)})
                bar.update()
            said = read_status(path)
        assert (said.notebook, said.run, said.pid, said.host) == ("train_raptor", "raptors/k3-r0", os.getpid(), socket.gethostname())
        assert said.of == 1000 and said.seconds == pytest.approx(0.02) and said.left == pytest.approx(0.02*(1000 - said.step)) and said.loss == pytest.approx(1/(said.step - 500))
        assert len(writes) <= 8 and read_status(path).step == 750, "five seconds, the start and the end"
    assert not list((tmp_path/"raptors"/"k3-r0").iterdir()) and progress.listener is None


def test_slow_disks_are_written_to_rarely(tmp_path, monkeypatch):
    file = StatusFile(tmp_path, "notebooks/find_phases.ipynb")
    times = iter([100.0, 100.3]) # a write takes 0.3 s
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    file.write()
    assert file.due == pytest.approx(100.3 + 60)


def test_a_run_that_fails_leaves_what_it_said_and_the_sweep_takes_it(tmp_path):
    with pytest.raises(RaptorError), reported(tmp_path, "blocks/0-5-r0/train_block.ipynb") as path:
        with progress(total=9, disable=True) as bar: bar.update(4)
        raise RaptorError("asked to stop")
    assert read_status(path).step == 4 and progress.listener is None
    path.with_name(".status-0000abcd.json").write_text("{") # of a process that was killed while it wrote
    assert len(sweep(tmp_path)) == 2 and not list(path.parent.iterdir())


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path):
    status_path(tmp_path/"notebooks"/"find_phases.ipynb").mkdir(parents=True)
    with pytest.raises(OSError), reported(tmp_path, "notebooks/find_phases.ipynb"): # the folder cannot be unlinked
        with progress(total=2, disable=True) as bar: bar.update(2)
    assert not list((tmp_path/"notebooks").glob(".status-*"))


# signs of life --------------------------------------------------------------------------------------------------------
def ended():
    process = subprocess.Popen(["true"]); process.wait()
    return process.pid


@pytest.mark.parametrize("changes,age,said", [
    ({}, 5, ""), ({}, 301, "no sign of life since"), ({"seconds": 60.0}, 1000, ""), # its steps are long
    ({"step": 0, "of": 0}, 9000, ""), ({"step": 500}, 9000, ""), # it is at work outside a loop: its process is there
    ({"pid": ended}, 5, "stopped, last heard at"), ({"pid": ended, "host": "node7"}, 5, ""), ({"pid": ended, "host": "node7", "of": 0}, 301, "no sign of life since"), ({}, -900, "")]) # a clock that is ahead
def test_a_run_is_at_work_as_far_as_can_be_told(changes, age, said):
    one = status(**{k: v() if callable(v) else v for k, v in changes.items()})
    assert sign_of_life(one, one.updated + age).startswith(said) and bool(said) == bool(sign_of_life(one, one.updated + age))


GOOD = json.dumps({"notebook": "train_block", "run": "blocks/0-5-r0", "pid": 1, "host": "node7", "started": 1.0, "updated": 2.0})
BAD = {"empty": "", "half-written": GOOD[:40], "list": "[]", "number": "3", "other version": GOOD[:-1] + ', "version": 2}', "missing": '{"pid": 3}', "unknown": GOOD[:-1] + ', "x": 1}',
       "escape": GOOD.replace("train_block", "\\u001b[2J"), "long": GOOD.replace("node7", "n"*300), "not a number": GOOD.replace("2.0", "NaN"), "endless": GOOD.replace("2.0", "1e999"),
       "late": GOOD.replace("2.0", "1e300"), "digits": GOOD.replace("2.0", "9"*5000), "negative": GOOD.replace('"pid": 1', '"pid": -1'), "bool": GOOD.replace('"pid": 1', '"pid": true'),
       "deep": "["*10_000, "binary": b"\xff\xfe\0".decode("latin-1"), "large": " "*(1 << 15)}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_file_that_is_no_status_is_one_sentence(tmp_path, capsys, text):
    folder = tmp_path/"smoke"/"blocks"/"0-5-r0"
    folder.mkdir(parents=True); (folder/".train_block.status.json").write_text(text)
    (folder.parent/"5-6-r0").mkdir(); (folder.parent/"5-6-r0"/".train_block.status.json").write_text(GOOD.replace("0-5", "5-6"))
    with pytest.raises(SystemExit) as stop: cli.main(["status", "--preset", "smoke", "--home", str(tmp_path)])
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and len(err.splitlines()) == 1 and err.startswith(f"raptor: {folder/'.train_block.status.json'} ") and err.endswith(".\n") and len(err) < 500
    assert "train_block 5-6-r0, no sign of life since" in out and "\x1b" not in out + err, "the others are shown"


@pytest.mark.parametrize("text", ["items: 3\n", "[1]\n", "items: [tab_prbes]\nonly: []\nreplicas: 1\n", "a: [", "items: []\nonly: []\nreplicas: no\n", "{}\n", ""])
def test_a_study_file_that_says_nothing_is_one_sentence(tmp_path, capsys, text):
    (tmp_path/"smoke").mkdir(); (tmp_path/"smoke"/"study.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop: cli.main(["status", "--preset", "smoke", "--home", str(tmp_path)])
    assert stop.value.code == 1 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("more,words", [([], ""), (["--curve"], "there is no loss of any run at work in"), (["--run", "blocks/9-9-r0"], "there is no loss of blocks/9-9-r0"), (["--run", "raptors/k2-r0", "--out", "curve.xyz"], "let it end in .png")])
def test_what_cannot_be_drawn_is_said(tmp_path, capsys, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"smoke"/"raptors"/"k2-r0").mkdir(parents=True); (tmp_path/"smoke"/"raptors"/"k2-r0"/"history.csv").write_text("step,loss\n5,0.5\n10,0.25\n")
    try: cli.main(["status", "--preset", "smoke", "--home", str(tmp_path), *more])
    except SystemExit as e: assert bool(e.code) == bool(words)
    assert words in capsys.readouterr().err and sorted(p.name for p in tmp_path.iterdir()) == ["smoke"]


def test_a_curve_as_text_falls_as_the_loss_does():
    assert draw_curve([1, 0.1, 0.01], height=2).split("\n") == ["         1 █", "      0.01 ██▁"]
    assert draw_curve([3.0], height=1) == "         3 ▁" and draw_curve([1, -1, 1], height=2).count("█") == 4


# the study as a whole -------------------------------------------------------------------------------------------------
def test_steps_are_counted_as_snakemake_does(tmp_path):
    study, config = Study(load_preset("smoke"), tmp_path, "smoke"), {"items": ["tab_probes", "fig_similarity"], "only": []}
    seen = Watch(study, config).look()
    assert (seen.done, seen.total) == (0, None) and describe_whole(seen) == "smoke: 0 done; the phases will tell how many there are"
    (tmp_path/"smoke"/"phases").mkdir(parents=True); (tmp_path/"smoke"/"phases"/"phases.json").write_text('{"ends": {"2": [2, 6]}}')
    for flag in ("notebooks/train_teacher", "notebooks/find_phases", "blocks/0-2-r0/train_block", "notebooks/fig_speed"):
        (tmp_path/"smoke"/".done"/flag).parent.mkdir(parents=True, exist_ok=True); (tmp_path/"smoke"/".done"/flag).touch()
    seen = Watch(study, config).look()
    runs = len(study.runs) # blocks, Raptors, probes
    assert (seen.done, seen.total) == (3, 3 + runs + 2 + 1), "teacher, cache, phases, runs, two items and the summary; a figure that nobody asked for does not count"
    assert Watch(study, {**config, "only": ["find_phases"]}).look().total == 3 and Watch(study, {**config, "only": ["train_block"]}).look().total == 5


def test_what_a_run_says_is_none_of_its_results(tmp_path):
    study = Study(load_preset("smoke"), tmp_path, "smoke")
    this = step(study, "train_block", {"end": 2})
    folder = (study.folder/this.copy).parent
    folder.mkdir(parents=True)
    for name in ("block.safetensors", "history.csv", "result.csv"): (folder/name).write_bytes(b"code\n" + name.encode())
    before = written(study, this)
    assert growing_history(folder) == folder/".history.csv", "the history of a finished run stays until another is finished"
    for name in (".history.csv", ".train_block.status.json", ".status-0000abcd.json"): (folder/name).touch()
    assert written(study, this) == before and len(before) == 3


# a history that grows -------------------------------------------------------------------------------------------------
WORKER = textwrap.dedent("""
    import sys, time, torch
    from raptor.core import seed_for
    from raptor.train.fit import FitConfig, fit
    folder, pause = sys.argv[1], float(sys.argv[2])
    def batches(first, rank, world):
        for step in range(first, 300):
            time.sleep(pause)
            yield torch.randn(8, generator=torch.Generator().manual_seed(seed_for(step)))
    class Line(torch.nn.Module):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.zeros(()))
        def forward(self, x, step): return {"loss": (self.w*x - 2*x).pow(2).mean(), "w": self.w}
    config = FitConfig(steps=300, batch_size=8, lr=0.1, warmup=5, log_every=3, eval_every=30, checkpoint_every=25)
    fit(Line(), batches, config, folder, evaluate=lambda step: {"score": step/300})
""")


def work(folder, pause): return subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(pause)])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_has_a_whole_history_and_ends_with_that_of_an_unkilled_one(tmp_path, how):
    assert work(tmp_path/"one", 0).wait(PATIENCE) == 0
    path, seen = tmp_path/"two"/"history.csv", []
    cut = work(tmp_path/"two", 0.1)
    def grown():
        if path.exists() and (size := len(pd.read_csv(path))) not in seen: seen.append(size)
        return len(seen) > 2 and (tmp_path/"two"/"checkpoint.safetensors").exists() or cut.poll() is not None
    until(grown)
    assert cut.poll() is None and seen == sorted(seen), "it grows"
    cut.send_signal(how); cut.wait(PATIENCE)
    left = pd.read_csv(path)
    assert list(left.step) == list(range(3, int(left.step.iloc[-1]) + 1, 3)) and path.read_text().endswith("\n")
    assert work(tmp_path/"two", 0).wait(PATIENCE) == 0
    assert path.read_bytes() == (tmp_path/"one"/"history.csv").read_bytes() and len(pd.read_csv(path)) == 100


def test_the_history_of_other_settings_does_not_stay(tmp_path):
    path = tmp_path/"history.csv"
    tmp_path.joinpath("history.csv").write_text("step,loss\n900,0.1\n")
    worker = work(tmp_path, 0.05)
    until(lambda: not path.exists() or pd.read_csv(path).step.max() < 900 or worker.poll() is not None)
    worker.kill(); worker.wait()
    assert not path.exists() or pd.read_csv(path).step.max() < 300


# whole studies --------------------------------------------------------------------------------------------------------
def long_teacher(tmp_path, steps):
    preset = tiny(tmp_path)
    values = yaml.safe_load(preset.read_text()); values["teacher"]["train"].update(steps=steps, checkpoint_every=20, log_every=5); preset.write_text(yaml.safe_dump(values))
    return preset


def in_a_terminal(*argv, home):
    "What a command shows in a pseudo-terminal of 100 columns, and its exit status."
    master, slave = pty.openpty()
    env = {**os.environ, "RAPTOR_HOME": str(home), "OMP_NUM_THREADS": "1", "RAPTOR_PROGRESS": "1", "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen([sys.executable, "-m", "raptor", *map(str, argv)], env=env, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    shown = []
    def read():
        while True:
            try: piece = os.read(master, 1 << 16)
            except OSError: return # Linux says so when the last process closes it
            if not piece: return
            shown.append(piece)
    reader = threading.Thread(target=read); reader.start()
    try: code = process.wait(PATIENCE)
    finally: process.kill()
    reader.join(); os.close(master)
    return b"".join(shown).decode(errors="replace"), code


def test_lines_in_a_terminal_and_in_a_log_and_from_another_shell(tmp_path, monkeypatch):
    "In a terminal to the end; through a pipe with kill -9 in between: the same history, bit by bit."
    need_study()
    preset = long_teacher(tmp_path, 120)
    command, log = ("reproduce", "--preset", preset, "--only", "train_teacher"), r"\d\d:\d\d:\d\d  "
    shown, code = in_a_terminal(*command, home=tmp_path/"one")
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown).replace("\r", "\n")
    assert code == 0, text
    assert re.search(r"train_teacher +━[━╸╺ ]* +step [\d,]+ of 120 +(loss [\d.]+ +)?[\d:]+ left", text) and "tiny: 0 of 1 done, about " in text
    assert re.search(rf"(?m)^{log}train_teacher \.\.\.\s", text) and re.search(rf"{log}train_teacher: done in \d+ s\s", text) and "\ndone in" in text

    monkeypatch.setenv("RAPTOR_PROGRESS", "2")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    home = tmp_path/"two"
    said = home/"tiny"/"notebooks"/".train_teacher.status.json"
    first = start(*command, home=home)
    until(lambda: said.exists() and read_status(said).step > 25 and (home/"tiny"/"teacher"/"history.csv").exists() or first.poll() is not None)
    out = raptor("status", "--preset", preset, "--curve", "--run", "teacher", home=home).stdout
    assert first.poll() is None and re.search(r"train_teacher, step \d+ of 120, (loss [\d.]+, )?[\d:]+ left\ntiny: 0 of 1 done, about", out) and re.search(r"teacher: loss from [\d.]+ at step 5 to [\d.]+ at step \d+\n +[\d.]+ ", out), out
    first.kill(); first.communicate()
    time.sleep(3) # the job notices that its parent is gone
    assert "train_teacher, step" in (out := raptor("status", "--preset", preset, home=home).stdout) and ", stopped, last heard at " in out
    whole = pd.read_csv(home/"tiny"/"teacher"/"history.csv").step
    assert list(whole) == list(range(5, int(whole.iloc[-1]) + 1, 5))
    assert raptor("status", "--preset", preset, "--run", "teacher", "--out", tmp_path/"curve.png", home=home).returncode == 0 and (tmp_path/"curve.png").read_bytes()[1:4] == b"PNG"
    rest = raptor(*command, home=home)
    assert rest.returncode == 0 and "━" not in rest.stdout and "\x1b" not in rest.stdout, rest.stderr
    assert re.search(rf"(?m)^{log}train_teacher, step \d+ of 120, (loss [\d.]+, )?[\d:]+ left\n{log}tiny: 0 of 1 done, about", rest.stdout) and re.search(rf"(?m)^{log}train_teacher: done in \d+ s$", rest.stdout), rest.stdout
    assert (home/"tiny"/"teacher"/"history.csv").read_bytes() == (tmp_path/"one"/"tiny"/"teacher"/"history.csv").read_bytes()
    assert not [p for h in ("one", "two") for p in (tmp_path/h).rglob(".*status*")], "nothing is left"
    assert "tiny: 1 of 1 done" in raptor("status", "--preset", preset, home=home).stdout
