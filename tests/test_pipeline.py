"""The command line, as a user meets it: real processes, real files, real kills."""
import json, os, signal, subprocess, sys, time

import pandas as pd
import pytest
import yaml

from raptor.core import paper_root
from raptor.presets import preset_path


def raptor(*argv, home, timeout=110, **kwargs):
    env = {**os.environ, "RAPTOR_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "raptor.pipeline", *map(str, argv)], env=env, capture_output=True, text=True, timeout=timeout, **kwargs)


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
    for key, value in changes.items(): values[key] = value
    path = tmp_path/"tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


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
    (["reproduce", "--preset", "smoke", "--replicas", "0"], "at least 1"),
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


def test_a_home_that_cannot_be_written_is_told_before_any_work(tmp_path):
    (tmp_path/"file").write_text("in the way")
    assert "cannot write to" in sentence(raptor("reproduce", "--preset", "smoke", home=tmp_path/"file"/"home"))


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


def test_k_larger_than_the_depth(tmp_path):
    pytest.importorskip("zarr", reason="the smoke study keeps a cache, and zarr 3 has no release for Python 3.10")
    preset = tiny(tmp_path)
    assert raptor("run", "train_teacher", "--preset", preset, home=tmp_path).returncode == 0
    assert raptor("run", "cache_activations", "--preset", preset, home=tmp_path).returncode == 0
    values = yaml.safe_load(preset.read_text()); values["phases"]["ks"] = [9]; preset.write_text(yaml.safe_dump(values))
    assert "9" in (said := sentence(raptor("run", "find_phases", "--preset", preset, home=tmp_path))) and "6" in said
    assert not (tmp_path/"tiny"/"phases"/"phases.json").exists()


def test_two_commands_do_not_share_a_study(tmp_path):
    import fcntl
    (tmp_path/"smoke").mkdir()
    with open(tmp_path/"smoke"/".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        assert "another raptor is at work" in sentence(raptor("reproduce", "--preset", "smoke", home=tmp_path))


def test_a_missing_step_says_which_notebook_to_run(tmp_path):
    assert "run the notebook train_teacher first" in sentence(raptor("run", "find_phases", "--preset", "smoke", home=tmp_path))


def start(preset, home):
    env = {**os.environ, "RAPTOR_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "raptor.pipeline", "reproduce", "--preset", str(preset), "--only", "find_phases"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.timeout(180)
def test_killed_anywhere_it_goes_on_and_does_nothing_twice(tmp_path):
    "kill -9 of the command while the teacher trains, a restart, and a third start that finds nothing to do."
    for needed in ("snakemake", "zarr"): pytest.importorskip(needed, reason=f"{needed} has no release that fits for Python 3.10")
    preset, home = tiny(tmp_path), tmp_path/"home"
    values = yaml.safe_load(preset.read_text()); values["teacher"]["train"].update(steps=60, checkpoint_every=3); preset.write_text(yaml.safe_dump(values))
    first = start(preset, home)
    checkpoint = home/"tiny"/"teacher"/"checkpoint.safetensors"
    end = time.time() + 60
    while not checkpoint.exists(): assert time.time() < end and first.poll() is None; time.sleep(0.05)
    first.send_signal(signal.SIGKILL); first.wait()
    time.sleep(3) # its notebook and kernel notice that their parent is gone
    seen = checkpoint.stat().st_mtime_ns
    time.sleep(1.5)
    assert checkpoint.stat().st_mtime_ns == seen, "an orphan is still training"
    assert start(preset, home).wait(100) == 0
    made = {p: p.stat().st_mtime_ns for p in (home/"tiny").rglob("result.csv")} | {p: p.stat().st_mtime_ns for p in (home/"tiny").rglob("*.ipynb")}
    third = raptor("reproduce", "--preset", preset, "--only", "find_phases", home=home)
    assert third.returncode == 0 and all(p.stat().st_mtime_ns == t for p, t in made.items())
    assert not checkpoint.exists() and json.loads((home/"tiny"/"phases"/"phases.json").read_text())["ends"]["2"][-1] == 6
    history = pd.read_csv(home/"tiny"/"teacher"/"history.csv")
    assert history.step.is_unique and history.step.iloc[-1] == 60


def test_dry_run_changes_nothing(tmp_path):
    result = raptor("reproduce", "--preset", "smoke", "--dry-run", home=tmp_path/"home")
    assert result.returncode == 0 and "train_teacher" in result.stdout and not (tmp_path/"home").exists()


def test_every_item_has_a_notebook_and_every_notebook_a_rule():
    names = {p.stem for p in paper_root().glob("*.ipynb")}
    snakefile = (paper_root()/"Snakefile").read_text()
    from raptor.pipeline import MAIN_ITEMS, STAGES
    assert set(MAIN_ITEMS) | set(STAGES) | {"summary"} <= names
    assert all(f"rule {s}:" in snakefile or f"checkpoint {s}:" in snakefile for s in STAGES)
