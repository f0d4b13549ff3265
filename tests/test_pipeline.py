"""The command line, as a user meets it: real processes, real files, real kills."""
import hashlib, json, os, re, shutil, signal, subprocess, sys, time

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

import raptor.pipeline.cli as pipeline
from raptor.study.controls import control_runs
from raptor.core import RaptorError, paper_root
from raptor.study.controls import all_runs
from raptor.study.presets import load_preset, preset_path
from raptor.study.steps import safetensors_digest


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
    for argv in ([], ["reproduce"], ["status"], ["run"], ["presets"], ["doctor"]):
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
    runs = [*all_runs(preset, ends).values(), *control_runs(preset, ends).values()]
    runs = [(f"train_{r.kind}", ({"name": r.name} if r.kind == "control" else {}) | r.params, r.folder) for r in runs] + [("train_teacher", {}, "teacher")]
    for *_, folder in runs:
        for path in (tmp_path/folder, tmp_path/folder/"one-of-many"): path.mkdir(parents=True); (path/"checkpoint.safetensors").touch()
        for name in ("result.csv", ".history.csv", "one-of-many/history.csv"): (tmp_path/folder/name).touch()
    for i, (notebook, params, folder) in enumerate(runs, 1):
        pipeline.clear_checkpoints(notebook, params, tmp_path)
        assert [p.name for p in (tmp_path/folder).rglob("*")] == ["result.csv"] and len(list(tmp_path.rglob("checkpoint.safetensors"))) == 2*(len(runs) - i)


@pytest.mark.parametrize("rank,fails,stays", [("0", False, False), ("1", False, True), ("0", True, True)])
def test_a_checkpoint_goes_when_the_first_process_has_its_executed_copy(tmp_path, monkeypatch, rank, fails, stays):
    checkpoint = tmp_path/"smoke"/"blocks"/"0-3-r0"/"checkpoint.safetensors"
    def run_notebook(name, parameters, output, finish):
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


def test_killed_or_interrupted_it_goes_on(tmp_path, monkeypatch):
    "kill -9 of the command while the teacher trains; then each signal to the command alone, which hands it on; then to the end."
    need_study()
    preset, home, steps = tiny(tmp_path), tmp_path/"home", 120
    values = yaml.safe_load(preset.read_text()); values["teacher"]["train"].update(steps=steps, checkpoint_every=3); preset.write_text(yaml.safe_dump(values))
    command, checkpoint = ("reproduce", "--preset", preset, "--only", "find_phases"), home/"tiny"/"teacher"/"checkpoint.safetensors"
    (tmp_path/"tmp").mkdir(); monkeypatch.setenv("TMPDIR", str(tmp_path/"tmp"))
    first = start(*command, home=home)
    until(lambda: checkpoint.exists() or first.poll() is not None)
    assert first.poll() is None, first.stderr.read()
    first.kill(); first.communicate()
    nobody_writes(checkpoint)
    left = checkpoint.with_name(".checkpoint-0123abcd.safetensors")
    left.touch()
    for number in (signal.SIGINT, signal.SIGTERM):
        seen = checkpoint.stat().st_mtime_ns
        again = start(*command, home=home, start_new_session=True)
        until(lambda: checkpoint.stat().st_mtime_ns != seen or again.poll() is not None)
        assert again.poll() is None and not left.exists()
        again.send_signal(number)
        said = "".join(again.communicate(timeout=PATIENCE))
        assert again.returncode == 128 + number and "has saved its checkpoint" in said and "Traceback" not in said, said
        assert "the last checkpoint of each training are kept: start the same command again" in said
        nobody_writes(checkpoint)
    assert raptor(*command, home=home).returncode == 0
    assert not checkpoint.exists() and json.loads((home/"tiny"/"phases"/"phases.json").read_text())["ends"]["2"][-1] == 6
    history = pd.read_csv(home/"tiny"/"teacher"/"history.csv")
    assert history.step.is_unique and history.step.iloc[-1] == steps and not left_by_killed_writers(home/"tiny")
    assert not [p for p in (tmp_path/"tmp").iterdir() if not p.name.startswith("torchinductor_")], "torch keeps a cache"


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    "The main job twice with the same seeds, side by side, each to its page: the folders, and the preset."
    need_study()
    folder = tmp_path_factory.mktemp("studies")
    preset = tiny(folder)
    for name in ("pandas", "selectors", "snakemake"): # files of a study are no modules
        for place in (folder/"two"/"tiny", folder/"two"/"tiny"/"notebooks"):
            place.mkdir(parents=True, exist_ok=True)
            (place/f"{name}.py").write_text(f"open({str(folder/'imported')!r}, 'w')")
    kernel = folder/"two"/"kernels"/"python3"/"kernel.json" # of a foreign installation
    kernel.parent.mkdir(parents=True); kernel.write_text(json.dumps({"argv": ["touch", str(folder/"imported")], "language": "python", "display_name": "x"}))
    os.environ["JUPYTER_PATH"] = str(folder/"two")
    running = [start("reproduce", "--preset", preset, home=folder/home, umask=umask) for home, umask in (("one", 0o002), ("two", 0o077))]
    del os.environ["JUPYTER_PATH"]
    try:
        said = [process.communicate(timeout=PATIENCE) for process in running]
        assert [process.returncode for process in running] == [0, 0], "\n".join(out + err for out, err in said)
    finally:
        for process in running: process.kill()
    return folder/"one"/"tiny", folder/"two"/"tiny", preset


def test_the_same_seeds_give_the_same_study(studies):
    one, two, _ = studies
    a, b = (pd.read_csv(s/"results"/"tab_probes.csv") for s in (one, two))
    assert len(a) and set(a["row"]) == {"Teacher", "Raptor k=2", "k = 2, started from the teacher"} and set(a.metric) == {"top1", "miou", "rmse"} and a["mean"].notna().all()
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    weights = [{p.relative_to(s): load_file(p) for p in s.rglob("*.safetensors")} for s in (one, two)]
    assert set(weights[0]) == set(weights[1]) and len(weights[0]) == 1 + 3 + 2 + 2 + 9, "a teacher and its heads, blocks, a Raptor and a variant, probes; no checkpoint"
    for path, tensors in weights[0].items(): assert all(t.equal(weights[1][path][name]) for name, t in tensors.items()), path


def test_the_modes_of_files_follow_the_umask(studies):
    for folder, modes in ((studies[0], {0o664, 0o775}), (studies[1], {0o600, 0o700})):
        wrong = [p for p in folder.rglob("*") if p.suffix != ".py" and p.name != "notebooks" and p.stat().st_mode & 0o777 not in modes]
        assert not wrong


def test_files_of_a_study_are_no_modules_and_foreign_kernels_are_not_started(studies): assert not (studies[2].parent/"imported").exists()


def digests(folder):
    "Tables and weights; not what tells times."
    def digest(path): return safetensors_digest(path) if path.suffix == ".safetensors" else hashlib.sha256(path.read_bytes()).hexdigest()
    return {p.relative_to(folder): digest(p) for pattern in ("*.csv", "*.safetensors", "*.json", "*.png") for p in folder.rglob(pattern)}


def test_what_is_deleted_or_damaged_is_named_and_made_again_bit_by_bit(studies, tmp_path):
    folder = tmp_path/"home"/"tiny"
    shutil.copytree(studies[0], folder)
    shutil.rmtree(folder/".snakemake")
    before = digests(folder)
    harmed = [folder/name for name in ("figures/fig_similarity.png", "probes/teacher-depth/result.csv", "raptors/k2-r0/config.json", "results/tab_probes.csv")]
    harmed[0].unlink(); harmed[1].write_bytes(bytes(99)); harmed[2].unlink(); harmed[3].write_bytes(b"")
    block = next(folder.glob("blocks/*/block.safetensors"))
    content = bytearray(block.read_bytes()); content[-5] ^= 4; block.write_bytes(content)
    again = raptor("reproduce", "--preset", studies[2], home=folder.parent)
    assert again.returncode == 0 and digests(folder) == before, again.stderr
    for path in (*harmed, block): assert re.search(f"raptor: {re.escape(str(path))} is (missing|not what its run wrote); it is made again.", again.stderr)
    ran = re.findall(r"^\S+  (\w+) .*\.\.\.$", again.stdout, re.M)
    assert sorted(ran) == ["fig_similarity", "tab_probes", "train_block", "train_probe", "train_raptor"], "nothing else is trained again"


def test_a_result_that_is_damaged_is_named_by_whoever_reads_it(studies, tmp_path):
    shutil.copytree(studies[0], tmp_path/"tiny")
    table = next((tmp_path/"tiny").glob("probes/*/result.csv"))
    table.write_bytes(bytes(99))
    assert f"{table} is damaged" in sentence(raptor("run", "tab_probes", "--preset", studies[2], home=tmp_path))


def test_k_larger_than_the_depth(studies, tmp_path):
    folder, _, preset = studies
    shutil.copytree(folder, tmp_path/"home"/"tiny", ignore=shutil.ignore_patterns("phases", ".snakemake"))
    values = yaml.safe_load(preset.read_text()); values["phases"]["ks"] = [9]; (tmp_path/"tiny.yaml").write_text(yaml.safe_dump(values))
    assert "9" in (said := sentence(raptor("run", "find_phases", "--preset", tmp_path/"tiny.yaml", home=tmp_path/"home"))) and "6" in said
    assert not (tmp_path/"home"/"tiny"/"phases"/"phases.json").exists()


def test_the_page_needs_no_network(studies):
    page = (studies[0]/"summary.html").read_text()
    assert "not run: " not in page and page.count("<img") >= 2, "every main item ran"
    assert "Content-Security-Policy" in page.partition("<style>")[0] and "script-src" not in page and "default-src 'none'" in page
    assert not re.search(r"""<script|<link|@import|(src|srcset|data)\s*=\s*["']?\s*(https?:)?//|url\(\s*["']?\s*(https?:)?//""", page)


def test_nothing_is_done_twice_but_more_replicas_are_trained_beside_those_that_are_there(studies):
    folder, _, preset = studies
    def made(): return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and not {".snakemake", ".done"} & set(p.parts) and p.name not in ("study.yaml", ".lock", ".checked")}
    before = made()
    again = raptor("reproduce", "--preset", preset, home=folder.parent)
    assert again.returncode == 0 and re.fullmatch(r"done in \d+ s: \S+summary.html\n", again.stdout), again.stdout
    assert made() == before
    assert raptor("reproduce", "--preset", preset, "--only", "train_raptor", "--replicas", "2", home=folder.parent).returncode == 0
    assert {p: t for p, t in made().items() if p in before} == before, "the first replica was trained again"
    seeds = [pd.read_csv(folder/"raptors"/name/"result.csv")["seed"].iloc[0] for name in ("k2-r0", "k2-r1")]
    assert seeds[0] != seeds[1] and not left_by_killed_writers(folder)
    drawn = raptor("run", "fig_accuracy_r2", "--preset", preset, home=folder.parent)
    assert drawn.returncode == 0 and set(pd.read_csv(folder/"results"/"fig_accuracy_r2.csv").replica) == {0}, "the second replica is not probed yet"


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


# what is said ----------------------------------------------------------------------------------------------------------
def test_what_a_preset_says_is_text_on_the_page(tmp_path):
    from raptor.pipeline.page import study_facts
    from raptor.study.study import Study
    preset = load_preset("smoke").model_copy(update={"title": "<script>alert(1)</script> | a *title*"})
    (tmp_path/"smoke"/"phases").mkdir(parents=True)
    (tmp_path/"smoke"/"phases"/"phases.json").write_text('{"ends": {"2": [2, 6]}}')
    facts = study_facts(Study(preset, tmp_path, "smoke"))
    assert "<script>" not in facts and r"&lt;script&gt;alert(1)&lt;/script&gt; \| a \*title\*" in facts and "nan%" not in facts


@pytest.mark.parametrize("ends", ['{"2": ["$(touch X)", 6]}', '{"2": [6, 2]}', '{"x": [2, 6]}', '["a"]', "3"])
def test_phases_that_are_none_are_refused_where_they_are_read(tmp_path, ends):
    from raptor.study.study import Study
    path = tmp_path/"smoke"/"phases"/"phases.json"
    path.parent.mkdir(parents=True)
    path.write_text(f'{{"ends": {ends}}}')
    with pytest.raises(RaptorError, match=re.escape(str(path))): Study.open("smoke", tmp_path).ends


@pytest.mark.parametrize("argv", [["run", "fig_similarity"], ["page"], ["reproduce", "--only", "fig_similarity", "--dry-run"]])
def test_a_preset_may_be_named_by_a_relative_path(tmp_path, monkeypatch, argv):
    "The studies of this preset have not run: what is missing is not the preset."
    tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    said = raptor(*argv, "--preset", "tiny.yaml", "--home", "home", home=tmp_path/"other")
    assert "preset file" not in said.stderr and ("phases/distance.csv" in said.stderr or "notebook summary" in said.stderr or said.returncode == 0), said.stderr


@pytest.mark.parametrize("variable", ["RAPTOR_HOME", "RAPTOR_DATA"])
def test_a_home_folder_that_does_not_exist_is_named(monkeypatch, variable):
    from raptor.core import data_root, home_root
    monkeypatch.setenv(variable, "~nobody-of-this-name/x")
    with pytest.raises(RaptorError, match=f"set {variable} to an absolute path"): (home_root if variable == "RAPTOR_HOME" else data_root)()


def test_a_working_folder_that_was_deleted_is_named(tmp_path):
    (tmp_path/"gone").mkdir()
    process = subprocess.run(["/bin/sh", "-c", f"rmdir {tmp_path/'gone'}; {sys.executable} -m raptor reproduce --preset smoke --home here --dry-run"],
                             cwd=tmp_path/"gone", env={**os.environ, "PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
    assert "set RAPTOR_HOME to an absolute path" in sentence(process)


def test_a_user_without_a_name_and_a_home_gets_both(tmp_path, monkeypatch):
    import pwd
    from raptor.pipeline.processes import name_user
    def unknown(uid): raise KeyError(uid)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "LOGNAME"): monkeypatch.delenv(name, raising=False)
    name_user()
    assert os.environ["LOGNAME"] == f"uid{os.getuid()}" and os.access(os.environ["HOME"], os.W_OK)


@pytest.mark.parametrize("profile,words", [("nowhere", "nowhere"), ("broken", "Snakemake cannot run the study")])
def test_what_snakemake_says_is_passed_on(tmp_path, profile, words):
    need_study()
    (tmp_path/"broken").mkdir(); (tmp_path/"broken"/"config.yaml").write_text("executor: [1\n")
    said = raptor("reproduce", "--preset", "smoke", "--dry-run", "--profile", tmp_path/profile, home=tmp_path/"home")
    assert words in said.stderr and sentence(said) and ("above" not in sentence(said) or len(said.stderr.splitlines()) > 2)
