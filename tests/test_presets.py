"""Presets are data: strict to read, and the list of runs follows from them."""
from dataclasses import replace

import pytest
import yaml

from raptor.core import RaptorError
from raptor.presets import all_runs, block_runs, load_preset, preset_names, preset_path, probe_runs, raptor_runs, study_ends
from raptor.study import Study

PAPER = {2: (7, 12), 3: (7, 10, 12), 4: (4, 7, 10, 12)}


def write(tmp_path, change):
    values = yaml.safe_load(preset_path("smoke").read_text())
    change(values)
    path = tmp_path/"mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_that_ships_is_whole(name):
    "Its training settings are real settings too, although they are only read when a notebook needs them."
    preset = load_preset(name)
    study = Study(replace(preset, phases=replace(preset.phases, ends=preset.phases.ends or {k: [*range(1, k), 12] for k in preset.phases.ks})))
    assert study.stage1_config((0, 1), 5).seed == 5 and study.stage2_config(6).seed == 6
    assert study.stage2_config(0).forcing == "free", "stage 2 is autoregression alone"
    for task in preset.probes: assert study.probe_config(task, 7).seed == 7
    if preset.teacher.train: study.teacher_config()


@pytest.mark.parametrize("change,sentence", [
    (lambda v: v.update(replica=2), "mine.yaml.*unknown key 'replica'; did you mean 'replicas'"),
    (lambda v: v["teacher"].update(pretained=True), "teacher: unknown key 'pretained'; did you mean 'pretrained'"),
    (lambda v: v["probes"]["depth"].update(sead=1), "probes: depth: unknown key 'sead'"),
    (lambda v: v["probes"]["depth"]["data"].pop("name"), "probes: depth: data: missing key 'name'"),
    (lambda v: v.pop("stage2"), "missing key 'stage2'"),
    (lambda v: v.update(replicas="two"), "replicas is 'two'; it must be int"),
    (lambda v: v.update(replicas=True), "replicas is True; it must be int"),
    (lambda v: v.update(replicas=0), "at least 1"),
    (lambda v: v.update(probes={"detph": v["probes"]["depth"]}), "did you mean 'depth'"),
    (lambda v: v["activations"].update(source="disk"), "activation source"),
    (lambda v: v["phases"].update(ends={3: [1, 2, 6]}), "ends are given for k = \\[3\\]"),
    (lambda v: v.update(phases=[2]), "must hold keys and values"),
])
def test_a_preset_that_is_wrong_is_told_where(tmp_path, change, sentence):
    with pytest.raises(RaptorError, match=sentence): load_preset(write(tmp_path, change))


def test_unknown_settings_of_training_are_told(tmp_path):
    study = Study.open(write(tmp_path, lambda v: v["stage2"].update(step=3)), tmp_path)
    with pytest.raises(RaptorError, match="stage2: unknown key 'step'; did you mean 'steps'"): study.stage2_config(0)


def test_names_and_files(tmp_path):
    assert {"smoke", "digits"} <= set(preset_names())
    with pytest.raises(RaptorError, match="did you mean 'smoke'"): load_preset("smok")
    with pytest.raises(RaptorError, match="does not exist"): load_preset(tmp_path/"none.yaml")
    assert load_preset(write(tmp_path, lambda v: None)).name == "mine"


def test_the_runs_of_the_paper():
    preset = replace(load_preset("smoke"), replicas=3, extra_models={"small": {}})
    blocks, raptors, probes = block_runs(preset, PAPER), raptor_runs(preset, PAPER), probe_runs(preset, PAPER)
    assert (len(blocks), len(raptors), len(probes)) == (18, 9, 33)
    assert sorted(r.params["seed"] for r in blocks if r.params["replica"] == 1) == list(range(106, 112))
    assert {r.params["seed"] for r in raptors} == {1001, 1002, 1003, 1101, 1102, 1103, 1201, 1202, 1203}
    assert sorted(r.params["seed"] for r in probes) == [*range(4000, 4011), *range(5000, 5011), *range(6000, 6011)]


def test_one_more_replica_changes_no_seed():
    preset = load_preset("smoke")
    one, three = (all_runs(replace(preset, replicas=r), PAPER) for r in (1, 3))
    assert all(three[key].params == run.params for key, run in one.items())


def test_what_a_run_starts_from():
    runs = all_runs(load_preset("smoke"), PAPER)
    assert runs["raptor", "k4-r0"].needs == tuple(("block", f"{s}-{e}-r0") for s, e in ((0, 4), (4, 7), (7, 10), (10, 12)))
    assert runs["probe", "k4-r0-depth"].needs == (("raptor", "k4-r0"),) and runs["probe", "teacher-depth"].needs == ()
    assert all(need in runs for run in runs.values() for need in run.needs)


def test_ends_are_unknown_until_they_are_found(tmp_path):
    preset = load_preset("smoke")
    assert study_ends(preset, tmp_path) is None
    (tmp_path/"smoke"/"phases").mkdir(parents=True)
    (tmp_path/"smoke"/"phases"/"phases.json").write_text('{"ends": {"2": [2, 6]}}')
    assert study_ends(preset, tmp_path) == {2: (2, 6)}
