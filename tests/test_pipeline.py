"""The command line, as a user meets it: real processes, real files, real kills."""
import json, os, re, shutil, signal, subprocess, sys, time

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

import raptor.pipeline.cli as pipeline
from raptor.study.controls import control_runs
from raptor.core import RaptorError, paper_root
from raptor.study.controls import all_runs
from raptor.study.presets import load_preset, preset_path


def start(*argv, home, **kwargs):
    env = {**os.environ, "RAPTOR_HOME": str(home), "OMP_NUM_THREADS": "1"}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) # tests that a script starts in the background have it ignored, and hand that on
    return subprocess.Popen([sys.executable, "-m", "raptor", *map(str, argv)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard, **kwargs)


PATIENCE = 600 # seconds: a limit for what hangs, not for what is slow on a busy machine


def raptor(*argv, home, timeout=PATIENCE):
    process = start(*argv, home=home)
    try: out, err = process.communicate(timeout=timeout)
    finally: process.kill()
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def until(holds, seconds=PATIENCE):
    end = time.time() + seconds
    while not (value := holds()): assert time.time() < end; time.sleep(0.05)
    return value


def sentence(result):
    "The one sentence of a failed command: a single line on standard error, and no traceback."
    assert result.returncode != 0 and "Traceback" not in result.stderr + result.stdout, result.stderr
    lines = [l for l in result.stderr.splitlines() if l.startswith("raptor: ")]
    assert lines, result.stderr
    return lines[0]


def tiny(tmp_path, **changes):
    "The smoke preset cut down to its stages' minimum, under another name."
    values = yaml.safe_load(preset_path("smoke").read_text())
    values["teacher"]["train"].update(steps=4, warmup=1, checkpoint_every=2)
    for stage in ("stage1", "stage2"): values[stage].update(steps=4, warmup=1, checkpoint_every=2)
    values["data"].update(limit=128, test_limit=64)
    values["phases"].update(images=128)
    for probe in values["probes"].values(): probe["data"].update(limit=64, test_limit=64); probe["train"].update(epochs=1, warmup=1)
    for key, value in changes.items(): values[key] = value
    path = tmp_path/"tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def need_study():
    for needed in ("snakemake", "zarr"): pytest.importorskip(needed, reason=f"{needed} has no release that fits for Python 3.10")


def test_help_reads_well(tmp_path):
    for argv in ([], ["reproduce"], ["run"], ["presets"], ["doctor"]):
        result = raptor(*argv, "--help", home=tmp_path)
        assert result.returncode == 0 and "Usage: raptor" in result.stdout
    assert "whatever is missing" in raptor("reproduce", "--help", home=tmp_path).stdout


def test_presets_and_doctor(tmp_path):
    listed = raptor("presets", home=tmp_path).stdout
    assert "digits" in listed and "smoke" in listed
    said = raptor("doctor", home=tmp_path/"new").stdout
    assert "torch" in said and str(tmp_path/"new") in said and "preset digits" in said and "free disk" in said
    assert not (tmp_path/"new").exists(), "looking changes nothing"


@pytest.mark.parametrize("argv,words", [
    (["reproduce", "--preset", "digit"], "did you mean 'digits'"),
    (["reproduce", "--preset", "nowhere.yaml"], "does not exist"),
    (["reproduce", "--preset", "smoke", "--only", "fig_similar"], "did you mean 'fig_similarity'"),
    (["reproduce", "--preset", "smoke", "--replicas", "0"], "greater than or equal to 1"),
    (["run", "fig_similarty", "--preset", "smoke"], "did you mean 'fig_similarity'"),
    (["run", "train_block", "--preset", "smoke", "--param", "sede=3"], "unknown parameter of notebook train_block: 'sede'; did you mean 'seed'"),
    (["run", "train_block", "--preset", "smoke", "--param", "seed"], "NAME=VALUE"),
])
def test_wrong_names_are_told_with_the_near_ones(tmp_path, argv, words):
    result = raptor(*argv, home=tmp_path/"home")
    assert words in sentence(result) and result.returncode == 1
    assert not list((tmp_path/"home").rglob("*.ipynb")), "nothing half-written"


def test_debug_shows_the_traceback(tmp_path):
    assert "Traceback" in raptor("--debug", "reproduce", "--preset", "digit", home=tmp_path).stderr


@pytest.mark.parametrize("argv", [["reproduce"], ["run", "train_teacher"]])
def test_a_home_that_cannot_be_written_is_told_before_any_work(tmp_path, argv):
    (tmp_path/"file").write_text("in the way")
    assert f"cannot write to {tmp_path/'file'/'home'/'smoke'}" in sentence(raptor(*argv, "--preset", "smoke", home=tmp_path/"file"/"home"))


def test_any_other_file_that_cannot_be_used_is_named(tmp_path):
    (tmp_path/"file").write_text("in the way")
    argv = ("run", "fig_similarity", "--preset", "smoke", "--output", tmp_path/"file"/"copy.ipynb")
    said = raptor(*argv, home=tmp_path/"home")
    assert sentence(said).startswith(f"raptor: {tmp_path/'file'}: ") and said.returncode == 1
    assert "Traceback" in raptor("--debug", *argv, home=tmp_path/"home").stderr


def test_a_disk_that_is_too_small_is_told_before_any_work(tmp_path):
    preset = tiny(tmp_path, resources={"disk_gb": 10**9})
    assert "GB free and the work needs" in sentence(raptor("reproduce", "--preset", preset, home=tmp_path/"home"))
    assert [p.name for p in (tmp_path/"home").rglob("*") if p.is_file()] == []


def test_an_unknown_backbone_is_told_through_the_notebook(tmp_path):
    preset = tiny(tmp_path)
    preset.write_text(preset.read_text().replace("vit_nano_patch4_reg4_24", "vit_nano_patch4_reg4_42"))
    said = sentence(raptor("run", "train_teacher", "--preset", preset, home=tmp_path))
    assert "vit_nano_patch4_reg4_24" in said
    assert (tmp_path/"tiny"/"notebooks"/"train_teacher.failed.ipynb").exists() and not (tmp_path/"tiny"/"teacher"/"backbone.safetensors").exists()


def test_two_commands_do_not_share_a_study(tmp_path):
    import fcntl
    (tmp_path/"smoke").mkdir()
    with open(tmp_path/"smoke"/".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        assert "another raptor is at work" in sentence(raptor("reproduce", "--preset", "smoke", home=tmp_path))


def test_a_missing_step_says_which_notebook_to_run(tmp_path):
    assert "run the notebook train_teacher first" in sentence(raptor("run", "find_phases", "--preset", "smoke", home=tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_before_it_trains_says_so(tmp_path, number):
    "While it loads its libraries there is nothing to save; a training saves its checkpoint (test_paper_scale.py)."
    process = start("run", "train_teacher", "--preset", "smoke", home=tmp_path)
    assert "train_teacher ..." in process.stdout.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert re.search("asked to stop.*(goes|go) on", err) and "Traceback" not in out + err and process.returncode in (1, 143), err


def test_ctrl_c_before_anything_runs_is_one_sentence(tmp_path):
    need_study()
    process = start("reproduce", "--preset", tiny(tmp_path), home=tmp_path/"home", start_new_session=True)
    until(lambda: (tmp_path/"home"/"tiny"/"study.yaml").exists())
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in out + err and re.fullmatch("raptor: .* start the same command again to go on.", err.splitlines()[-1]) and process.returncode != 0, err


# checkpoints and leftovers -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name,ends", [("smoke", {2: (3, 6)}), ("digits", {2: (5, 12), 3: (5, 9, 12)})])
def test_the_checkpoints_of_every_run_are_found(tmp_path, name, ends):
    preset = load_preset(name)
    runs = [(f"train_{r.kind}", r.params, r.folder) for r in all_runs(preset, ends).values()]
    runs += [("train_control", {"name": r.name, **r.params}, r.folder) for r in control_runs(preset, ends).values()] + [("train_teacher", {}, "teacher")]
    for *_, folder in runs:
        for path in (tmp_path/folder, tmp_path/folder/"one-of-many"): path.mkdir(parents=True); (path/"checkpoint.safetensors").touch()
        (tmp_path/folder/"result.csv").touch()
    for i, (notebook, params, folder) in enumerate(runs, 1):
        pipeline.clear_checkpoints(notebook, params, tmp_path)
        assert [p.name for p in (tmp_path/folder).rglob("*")] == ["result.csv"] and len(list(tmp_path.rglob("checkpoint.safetensors"))) == 2*(len(runs) - i)


@pytest.mark.parametrize("rank,fails,stays", [("0", False, False), ("1", False, True), ("0", True, True)])
def test_a_checkpoint_goes_when_the_first_process_has_its_executed_copy(tmp_path, monkeypatch, rank, fails, stays):
    checkpoint = tmp_path/"smoke"/"blocks"/"0-3-r0"/"checkpoint.safetensors"
    def run_notebook(name, parameters, output):
        assert checkpoint.exists()
        if fails: raise RaptorError("train_block failed")
    for name, stand_in in (("run_notebook", run_notebook), ("end_with_parent", lambda: None), ("stop_on_signals", lambda: None)): monkeypatch.setattr(pipeline, name, stand_in)
    for name, value in (("RANK", rank), ("RAPTOR_HOME", str(tmp_path)), ("RAPTOR_PROGRESS", "0"), ("OMP_NUM_THREADS", "1"), ("OMP_WAIT_POLICY", "passive")): monkeypatch.setenv(name, value)
    checkpoint.parent.mkdir(parents=True); checkpoint.touch(); (checkpoint.parent/"block.safetensors").touch()
    try: pipeline.run_command("train_block", preset="smoke", param=["start=0", "end=3"])
    except RaptorError: assert fails
    assert checkpoint.exists() == stays


# whole studies -------------------------------------------------------------------------------------------------------
def left_by_killed_writers(folder): return [p for p in folder.rglob(".*-????????*") if ".snakemake" not in p.parts]


def nobody_writes(checkpoint):
    time.sleep(3) # notebooks and kernels notice that their parent is gone
    seen = checkpoint.stat().st_mtime_ns
    time.sleep(1.5)
    assert checkpoint.stat().st_mtime_ns == seen, "an orphan is still training"


def test_killed_or_interrupted_it_goes_on(tmp_path):
    "kill -9 of the command while the teacher trains; then Ctrl-C, as a terminal sends it to the whole group of processes; then to the end."
    need_study()
    preset, home, steps = tiny(tmp_path), tmp_path/"home", 90
    values = yaml.safe_load(preset.read_text()); values["teacher"]["train"].update(steps=steps, checkpoint_every=3); preset.write_text(yaml.safe_dump(values))
    command, checkpoint = ("reproduce", "--preset", preset, "--only", "find_phases"), home/"tiny"/"teacher"/"checkpoint.safetensors"
    first = start(*command, home=home)
    until(lambda: checkpoint.exists() or first.poll() is not None)
    assert first.poll() is None, first.stderr.read()
    first.kill(); first.communicate()
    nobody_writes(checkpoint)
    seen, left = checkpoint.stat().st_mtime_ns, checkpoint.with_name(".checkpoint-0123abcd.safetensors")
    left.touch()
    second = start(*command, home=home, start_new_session=True)
    until(lambda: checkpoint.stat().st_mtime_ns != seen or second.poll() is not None)
    assert second.poll() is None and not left.exists()
    os.killpg(second.pid, signal.SIGINT)
    said = "".join(second.communicate(timeout=PATIENCE))
    assert second.returncode != 0 and "start the same command again" in said and "Traceback" not in said, said
    nobody_writes(checkpoint)
    assert raptor(*command, home=home).returncode == 0
    assert not checkpoint.exists() and json.loads((home/"tiny"/"phases"/"phases.json").read_text())["ends"]["2"][-1] == 6
    history = pd.read_csv(home/"tiny"/"teacher"/"history.csv")
    assert history.step.is_unique and history.step.iloc[-1] == steps and not left_by_killed_writers(home/"tiny")


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    "The main job twice with the same seeds, side by side, each to its page: the folders, and the preset."
    need_study()
    folder = tmp_path_factory.mktemp("studies")
    preset = tiny(folder)
    running = [start("reproduce", "--preset", preset, home=folder/home) for home in ("one", "two")]
    try:
        for process in running: assert process.wait(PATIENCE) == 0, process.stderr.read()
    finally:
        for process in running: process.kill(); process.communicate()
    return folder/"one"/"tiny", folder/"two"/"tiny", preset


def test_the_same_seeds_give_the_same_study(studies):
    one, two, _ = studies
    a, b = (pd.read_csv(s/"results"/"tab_probes.csv") for s in (one, two))
    assert len(a) and set(a["row"]) == {"Teacher", "Raptor k=2"} and set(a.metric) == {"top1", "miou", "rmse"} and a["mean"].notna().all()
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    weights = [{p.relative_to(s): load_file(p) for p in s.rglob("*.safetensors")} for s in (one, two)]
    assert set(weights[0]) == set(weights[1]) and len(weights[0]) == 1 + 3 + 2 + 1 + 6, "a teacher and its heads, blocks, a Raptor, probes; no checkpoint"
    for path, tensors in weights[0].items(): assert all(t.equal(weights[1][path][name]) for name, t in tensors.items()), path


def test_k_larger_than_the_depth(studies, tmp_path):
    folder, _, preset = studies
    shutil.copytree(folder, tmp_path/"home"/"tiny", ignore=shutil.ignore_patterns("phases", ".snakemake"))
    values = yaml.safe_load(preset.read_text()); values["phases"]["ks"] = [9]; (tmp_path/"tiny.yaml").write_text(yaml.safe_dump(values))
    assert "9" in (said := sentence(raptor("run", "find_phases", "--preset", tmp_path/"tiny.yaml", home=tmp_path/"home"))) and "6" in said
    assert not (tmp_path/"home"/"tiny"/"phases"/"phases.json").exists()


def test_the_page_needs_no_network(studies):
    page = (studies[0]/"summary.html").read_text()
    assert "not run: " not in page and page.count("<img") >= 2, "every main item ran"
    assert not re.search(r"""<script|<link|@import|(src|srcset|data)\s*=\s*["']?\s*(https?:)?//|url\(\s*["']?\s*(https?:)?//""", page)


def test_nothing_is_done_twice_but_more_replicas_are_trained_beside_those_that_are_there(studies):
    folder, _, preset = studies
    def made(): return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and ".snakemake" not in p.parts and p.name not in ("study.yaml", ".lock", ".checked")}
    before = made()
    again = raptor("reproduce", "--preset", preset, home=folder.parent)
    assert again.returncode == 0 and re.fullmatch(r"done in \d+ s: \S+summary.html\n", again.stdout), again.stdout
    assert made() == before
    assert raptor("reproduce", "--preset", preset, "--only", "train_raptor", "--replicas", "2", home=folder.parent).returncode == 0
    assert {p: t for p, t in made().items() if p in before} == before, "the first replica was trained again"
    seeds = [pd.read_csv(folder/"raptors"/name/"result.csv")["seed"].iloc[0] for name in ("k2-r0", "k2-r1")]
    assert seeds[0] != seeds[1] and not left_by_killed_writers(folder)


def test_dry_run_changes_nothing(tmp_path):
    result = raptor("reproduce", "--preset", "smoke", "--dry-run", home=tmp_path/"home")
    assert result.returncode == 0 and "train_teacher" in result.stdout and not (tmp_path/"home").exists()


def test_every_item_has_a_notebook_and_every_notebook_a_rule():
    names = {p.stem for p in paper_root().glob("*.ipynb")}
    snakefile = (paper_root()/"Snakefile").read_text()
    from raptor.pipeline.runs import MAIN_ITEMS
    from raptor.study.presets import STAGES
    assert set(MAIN_ITEMS) | set(STAGES) | {"summary"} <= names
    assert all(f"rule {s}:" in snakefile or f"checkpoint {s}:" in snakefile for s in STAGES)
