"""When a step of a study is finished: whatever was killed, edited, replaced, damaged or deleted is made again."""
import json

import pytest

from raptor.core import RaptorError, write_json
from raptor.pipeline.notebooks import flag_of, refresh
from raptor.study import steps
from raptor.study.presets import load_preset
from raptor.study.steps import damage, first_steps, is_finished, later_steps, other_code, run_folder, seal, spec_of, step
from raptor.study.study import Study

ITEMS = ["fig_similarity", "tab_probes"]


def changed(spec, **update): return spec.model_copy(update=update)


def files_of(s):
    "What a step would write, by name."
    if s.notebook in steps.TRAINED_IN: return [f"{run_folder(s.notebook, s.params)}/{f}" for f in ("model.safetensors", "config.json", "history.csv", "result.csv")]
    known = {"find_phases": ["phases/distance.csv"], "cache_activations": ["activations.csv"], "summary": ["summary.html"]}
    return known.get(s.notebook, [f"results/{s.notebook}.csv", f"figures/{s.notebook}.png"])


@pytest.fixture
def study(tmp_path):
    "A study that has run, as far as its files can tell."
    study = Study(load_preset("smoke"), tmp_path, "smoke")
    write_json(study.folder/"phases"/"phases.json", {"ends": {"2": [2, 6]}})
    for s in all_steps(study):
        for name in files_of(s):
            (study.folder/name).parent.mkdir(parents=True, exist_ok=True)
            (study.folder/name).write_bytes(f"what {s.copy} writes to {name}".encode())
        write_json(study.folder/s.copy, {"cells": [{"source": s.copy}], "metadata": {}})
        seal(study, step(study, s.notebook, s.given), study.folder/s.copy)
    return study


def all_steps(study): return first_steps(study) + later_steps(study, ITEMS)
def flags(study): return {s.copy for s in all_steps(study) if (study.folder/flag_of(s.copy)).exists()}
def unfinished(study): return {s.notebook for s in all_steps(study) if not is_finished(study, s)}


def behind(study, copy):
    "The copies that start from this one, directly or not, and itself."
    found = {copy}
    for s in all_steps(study):
        if found & set(s.after): found.add(s.copy)
    return found


def test_what_has_run_is_finished_whatever_the_time_of_its_files(study):
    (study.folder/"phases"/"distance.csv").touch()
    assert refresh(study, ITEMS) == [] and flags(study) == {s.copy for s in all_steps(study)}
    assert len({(study.folder/flag_of(copy)).stat().st_mtime for copy in flags(study)}) == 1, "none is newer than another"


def test_a_page_that_lacks_what_is_asked_for_is_made_again(study):
    more = [*ITEMS, "fig_speed"] # as with --all, after the main items
    refresh(study, more, ITEMS)
    assert flags(study) == {s.copy for s in all_steps(study)}
    refresh(study, more, more)
    assert flags(study) == {s.copy for s in all_steps(study)} - {"notebooks/summary.ipynb"}


def flip(path): content = bytearray(path.read_bytes()); content[len(content)//2] ^= 1; path.write_bytes(content)
def truncate(path): path.write_bytes(path.read_bytes()[:-9])
def zero(path): path.write_bytes(bytes(path.stat().st_size))
def empty(path): path.write_bytes(b"")
def replace(path): path.write_bytes(next(p for p in sorted(path.parents[1].rglob(f"*{path.suffix}")) if p.read_bytes() != path.read_bytes()).read_bytes())
def a_folder(path): path.unlink(); path.mkdir()


BLOCK = "blocks/0-2-r0/train_block.ipynb"
FILES = [("blocks/0-2-r0/model.safetensors", BLOCK), ("blocks/0-2-r0/result.csv", BLOCK), (BLOCK, BLOCK),
         ("raptors/k2-r0/config.json", "raptors/k2-r0/train_raptor.ipynb"), ("phases/distance.csv", "notebooks/find_phases.ipynb"),
         ("phases/phases.json", "notebooks/find_phases.ipynb"), ("figures/fig_similarity.png", "notebooks/fig_similarity.ipynb"),
         ("results/tab_probes.csv", "notebooks/tab_probes.ipynb"), ("summary.html", "notebooks/summary.ipynb")]


@pytest.mark.parametrize("harm", [flip, truncate, zero, empty, replace, a_folder, lambda path: path.unlink()])
@pytest.mark.parametrize("name,copy", FILES)
def test_what_is_damaged_or_missing_is_named_and_made_again(study, name, copy, harm):
    spared = flags_after(study, copy)
    try: harm(study.folder/name)
    except StopIteration: pytest.skip("there is no other such file")
    told = refresh(study, ITEMS)
    if name == copy and (harm is replace or not (study.folder/copy).exists()): assert told == [], "it has not run, or another has"
    else: assert len(told) == 1 and told[0].startswith(str(study.folder/name)) and told[0].endswith("it is made again.")
    there = {c for c in spared if (study.folder/flag_of(c)).exists()}
    assert not (study.folder/flag_of(copy)).exists() and (there == spared or copy == "notebooks/find_phases.ipynb")


def flags_after(study, copy): return {s.copy for s in all_steps(study)} - behind(study, copy)


def probe(preset, **train): return changed(preset, probes={**preset.probes, "depth": changed(preset.probes["depth"], train={**preset.probes["depth"].train, **train})})


ITEM = {"fig_similarity", "tab_probes"}
EDITS = [
    (lambda p: changed(p, stage1={**p.stage1, "lr": 0.5}), {"train_block", "train_control"}),
    (lambda p: changed(p, stage2={**p.stage2, "steps": 9}), {"train_raptor", "train_control"}),
    (lambda p: changed(p, block=changed(p.block, layer_scale=0.5)), {"train_block", "train_raptor", "train_control"}),
    (lambda p: probe(p, lr=0.5), {"train_probe"} | ITEM),
    (lambda p: changed(p, phases=changed(p.phases, images=7)), {"find_phases", "train_control"} | ITEM),
    (lambda p: changed(p, title="another"), {"summary"}),
    (lambda p: changed(p, variants={"relaxed": changed(p.variants["relaxed"], train={"lr": 0.5})}), {"train_raptor"} | ITEM),
    (lambda p: changed(p, controls=changed(p.controls, variants={})), ITEM), # other control runs do not know them
    (lambda p: changed(p, controls=changed(p.controls, images=7)), {"train_control"} | ITEM),
    (lambda p: changed(p, teacher=changed(p.teacher, drop_path=0.5)), None),
    (lambda p: changed(p, data=changed(p.data, limit=3)), None),
    (lambda p: changed(p, seeds={**p.seeds, "teacher": 5}), None),
    # what changes no number
    (lambda p: changed(p, data=changed(p.data, workers=3)), set()),
    (lambda p: changed(p, data=changed(p.data, download=True)), set()),
    (lambda p: changed(p, stage1={**p.stage1, "log_every": 1, "checkpoint_every": 1}), set()),
    (lambda p: probe(p, eval_batch_size=3), set()),
    (lambda p: changed(p, resources={}, replicas=1), set())]


@pytest.mark.parametrize("edit,again", EDITS)
def test_an_edited_preset_makes_again_what_it_changes_and_undoing_it_nothing(study, edit, again):
    edited = Study(edit(study.preset), study.home, study.origin)
    assert unfinished(edited) == (again if again is not None else {s.notebook for s in all_steps(study)})
    assert unfinished(study) == set(), "looking changes nothing"


def test_what_a_step_read_is_part_of_what_it_started_from(study):
    "The block is made again, with another content: the Raptor no longer holds. With the same content it does."
    block, raptor = step(study, "train_block", {"end": 2}), step(study, "train_raptor", {"ends": [2, 6], "seed": 1001})
    weights = study.folder/"blocks"/"0-2-r0"/"model.safetensors"
    before = weights.read_bytes()
    for content, holds in ((b"other", False), (before, True)):
        weights.write_bytes(content)
        seal(study, block, study.folder/block.copy)
        assert is_finished(study, raptor) == holds


@pytest.mark.parametrize("key", ["weights", "head"])
def test_a_file_that_is_replaced_in_place_is_another_start(study, tmp_path, key):
    file = tmp_path/"file.safetensors"
    file.write_bytes(b"one")
    named = Study(changed(study.preset, teacher=changed(study.preset.teacher, **{key: str(file)})), study.home, study.origin)
    specs = {spec_of(named, step(named, "train_block"))}
    for content in (b"two", b"three"):
        file.write_bytes(content)
        specs.add(spec_of(named, step(named, "train_block")))
    assert len(specs) == 3


@pytest.mark.parametrize("note", [None, 3, [], {}, {"spec": 1}, {"files": []}])
def test_a_note_that_is_none_is_no_finished_run(study, note):
    path = study.folder/BLOCK
    notebook = json.loads(path.read_text())
    notebook["metadata"]["raptor"] = {**notebook["metadata"]["raptor"], **note} if isinstance(note, dict) and note else note
    write_json(path, notebook)
    assert unfinished(study) >= {"train_block"}


def test_results_of_other_code_are_named_and_hold(study, monkeypatch):
    assert other_code(study) == {}
    now = steps.source_of
    monkeypatch.setattr(steps, "source_of", lambda notebook: "another" if notebook == "train_block" else now(notebook))
    (copies,) = other_code(study).values()
    assert copies == [BLOCK, "blocks/2-6-r0/train_block.ipynb"] and "train_block" not in unfinished(study)


@pytest.mark.parametrize("notebook,params", [("train_probe", {"model": "../x"}), ("train_control", {"name": "/tmp/x"}), ("train_teacher", {"name": "."})])
def test_no_run_works_outside_its_study(notebook, params):
    with pytest.raises(RaptorError, match="outside the study"): run_folder(notebook, params)


def test_a_checkpoint_of_a_finished_run_goes(study):
    "It was left by a command that was killed after the executed notebook had got its name."
    left = study.folder/"blocks"/"0-2-r0"/"checkpoint.safetensors"
    left.touch()
    refresh(study, ITEMS)
    assert not left.exists() and damage(study, step(study, "train_block", {"end": 2})) == ""


def test_runs_that_are_no_longer_asked_for_leave_the_tables_once_their_settings_change(study):
    "Another replica, whose settings hold, stays; after an edit it would stand beside results of other settings."
    for settings, told in ((study.preset, 0), (changed(study.preset, stage1={**study.preset.stage1, "lr": 0.5}), 2)):
        other = Study(settings, study.home, study.origin)
        if not told:
            for end, start in ((2, 0), (6, 2)):
                params = {"start": start, "end": end, "replica": 7, "seed": 5}
                extra = step(study, "train_block", params)
                for name in files_of(extra): (study.folder/name).parent.mkdir(parents=True, exist_ok=True); (study.folder/name).write_text(name)
                write_json(study.folder/extra.copy, {"cells": [], "metadata": {"papermill": {"parameters": {"preset": "smoke", **params}}}})
                seal(study, extra, study.folder/extra.copy)
        said = [line for line in refresh(other, ITEMS) if "no run of this preset" in line]
        assert len(said) == told and len(list(study.folder.glob("blocks/*-r7"))) == 2 - told and len(list(study.folder.glob(".old/blocks/*-r7/result.csv"))) == told


def test_the_order_of_a_header_is_left_to_chance_and_the_rest_counts(tmp_path):
    def file(header, data=b"1234"):
        text = json.dumps(header).encode()
        (tmp_path/"a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        return steps.safetensors_digest(tmp_path/"a.safetensors")
    one = {"__metadata__": {"a": "1", "b": "2"}, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    same = {"w": one["w"], "__metadata__": {"b": "2", "a": "1"}}
    assert file(one) == file(same) and len({file(one), file(one, b"1235"), file({**one, "__metadata__": {"a": "2"}})}) == 3
    (tmp_path/"a.safetensors").write_bytes(b"\xff"*40)
    assert len(steps.safetensors_digest(tmp_path/"a.safetensors")) == 16
