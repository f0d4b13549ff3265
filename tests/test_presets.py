"""Presets are data: strict to read, and the list of runs follows from them."""
import inspect
import re
import subprocess
import sys
import tempfile
from dataclasses import MISSING, fields

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import yaml
from pydantic import TypeAdapter

from raptor.core import RaptorError, fingerprint, paper_root, read_json
from raptor.model.block import BlockConfig
from raptor.pipeline import needs
from raptor.figures.style import save_figure
from raptor.pipeline import cli
from raptor.pipeline.needs import check_models, check_study, describe_data, readiness, run_needs
from raptor.pipeline.page import study_facts
from raptor.pipeline.processes import claimed_gpus, visible_gpus
from raptor.pipeline.runs import describe_runs
from raptor.probes.heads import DepthHead
from raptor.probes.train import ProbeConfig
from raptor.study.controls import all_runs, block_runs, control_runs, probe_runs, raptor_runs
from raptor.study.presets import SEEDS, STAGES, load_preset, preset_names, preset_path, preset_schema
from raptor.study.settings import FIT_DEFAULTS, PROBE_DEFAULTS, FitSettings, ProbeSettings, VariantSettings, validated
from raptor.study.specs import BLOCK_DEFAULTS, HeadSettings
from raptor.study.study import Study
from raptor.study.variants import variant_config
from raptor.train.fit import FitConfig
from raptor.train.stages import TrainConfig

PAPER = {2: (7, 12), 3: (7, 10, 12), 4: (4, 7, 10, 12)}


def write(tmp_path, change):
    values = yaml.safe_load(preset_path("smoke").read_text())
    change(values)
    path = tmp_path/"mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def changed(spec, **update): return spec.model_copy(update=update)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_that_ships_is_whole(name):
    "Its training settings are also accepted by the classes that they are meant for."
    preset = load_preset(name)
    ends = preset.phases.ends or {k: [*range(1, k), 12] for k in preset.phases.ks}
    study = Study.open(changed(preset, phases=changed(preset.phases, ends=ends)))
    assert study.stage2_config(6).seed == 6
    if preset.stage1 is not None: assert study.stage1_config((0, 1), 5).seed == 5
    else: pytest.raises(RaptorError, study.stage1_config, (0, 1), 5).match("has no stage 1 .* run train_raptor")
    for variant in preset.all_variants: assert variant_config(study, variant, 8).seed == 8
    assert study.stage2_config(0).forcing == "free", "stage 2 is autoregression alone"
    for task in preset.probes: assert study.probe_config(task, 7).seed == 7
    if preset.teacher.train: study.teacher_config()
    check_models(preset)


def test_the_defaults_of_a_training_are_those_of_the_classes():
    for cls, defaults in ((FitConfig, FIT_DEFAULTS), (TrainConfig, FIT_DEFAULTS), (ProbeConfig, PROBE_DEFAULTS)):
        assert {k: getattr(cls, k) for k in defaults} == defaults
    for defaults in BLOCK_DEFAULTS.values(): assert {k: getattr(BlockConfig, k) for k in defaults} == defaults


@pytest.mark.parametrize("cls,kind,left_out", [
    (FitConfig, FitSettings, {"seed", "stale"}), (TrainConfig, VariantSettings, {"seed", "stale"}),
    (ProbeConfig, ProbeSettings, {"seed", "stale", "steps", "eval_every"})])
def test_the_settings_are_those_of_the_classes(cls, kind, left_out):
    "They are repeated as data, since the classes need torch; every default is in range."
    values = {f.name: f.default for f in fields(cls) if f.name not in left_out}
    assert set(values) == set(TypeAdapter(kind).json_schema()["properties"]) and MISSING not in values.values()
    validated(kind, {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}, "defaults")


def test_the_settings_of_a_head_are_those_of_the_depth_head():
    left_out = {"dim", "num_prefix", "grid", "has_cls"}
    assert set(HeadSettings.__annotations__) == set(inspect.signature(DepthHead).parameters) - left_out


def test_presets_and_studies_are_opened_without_torch():
    code = ("import sys, raptor.pipeline.needs; from raptor.study.presets import preset_names; "
            "from raptor.study.study import Study; [Study.open(n).known_ends for n in preset_names()]; "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_schema_that_ships_is_that_of_the_models():
    "Otherwise: raptor presets --schema > nbs/paper/presets/preset.schema.json"
    assert read_json(paper_root()/"presets"/"preset.schema.json") == preset_schema()
    for name in preset_names():
        assert preset_path(name).read_text().startswith("# yaml-language-server: $schema=preset.schema.json\n")


def test_equal_presets_have_equal_fingerprints(tmp_path):
    "However they are spelled: whole floats, defaults, the order of keys."
    def respell(v):
        v["block"].update(mlp="swiglu", layer_scale=1)
        v["stage1"] = dict(reversed(v["stage1"].items()))
    one = load_preset(write(tmp_path, lambda v: v["block"].update(layer_scale=1.0)))
    other = load_preset(write(tmp_path, respell))
    assert one == other and fingerprint(one.model_dump()) == fingerprint(other.model_dump())
    said = {"conditioning": ["low_rank", "experts"]}
    given = said | {"rank": 8, "experts": 4, "router": "soft", "expert_attention": False, "mlp": None}
    one, other = (load_preset(write(tmp_path, lambda v: v.update(block=block))) for block in (said, given))
    assert one == other and one.block.rank == 8 and one.block.mlp == "swiglu"
    assert fingerprint(changed(one, replicas=2).model_dump()) != fingerprint(one.model_dump())
    skipping = changed(one, data=changed(one.data, on_error="skip"))
    assert str(skipping) == str(one), "what happens to an unreadable image changes no result"


@pytest.mark.parametrize("change,sentence", [
    (lambda v: v.update(replica=2), "preset mine.yaml: unknown key 'replica'; did you mean 'replicas'"),
    (lambda v: v["teacher"].update(pretained=True), "teacher: unknown key 'pretained'; did you mean 'pretrained'"),
    (lambda v: v["probes"]["depth"].update(sead=1), "probes: depth: unknown key 'sead'"),
    (lambda v: v["probes"]["depth"]["data"].pop("name"), "probes: depth: data: missing key 'name'"),
    (lambda v: v.pop("stage2"), "missing key 'stage2'"),
    (lambda v: v.update(replicas="two"), "replicas is 'two'; it must be a valid integer"),
    (lambda v: v.update(replicas=True), "replicas is True; it must be a valid integer"),
    (lambda v: v.update(replicas=0), "replicas is 0; it must be greater than or equal to 1"),
    (lambda v: v["activations"].update(source="disk"),
     "activations: source: unknown value 'disk'; known: cached, live"),
    (lambda v: v["block"].update(mlp="swiglue"), "block: mlp: unknown value 'swiglue'; did you mean 'swiglu'"),
    (lambda v: v["data"].update(limit=0), "data: limit is 0; it must be greater than or equal to 1"),
    (lambda v: v["data"].update(size=[24, "24"]), r"data: size\[1\] is '24'; it must be a valid integer"),
    # settings of trainings
    (lambda v: v["stage1"].update(seed=3), "stage1: unknown key 'seed'"),
    (lambda v: v["stage2"].update(step=5), "stage2: unknown key 'step'; did you mean 'steps'"),
    (lambda v: v["last_block"].update(los="mse"), "last_block: unknown key 'los'; did you mean 'loss'"),
    (lambda v: v["teacher"]["train"].update(stps=4), "teacher: train: unknown key 'stps'; did you mean 'steps'"),
    (lambda v: v["teacher"]["train"].update(forcing="free"), "teacher: train: unknown key 'forcing'"),
    (lambda v: v["teacher"]["train"]["loss_weights"].update(dept=1.0),
     "loss_weights: unknown key 'dept'; did you mean 'depth'"),
    (lambda v: v["teacher"]["train"].update(loss_weights={"depth": "much"}),
     "loss_weights: depth is 'much'; it must be a valid number"),
    (lambda v: v["controls"].update(train={"stepz": 1}), "controls: train: unknown key 'stepz'"),
    (lambda v: v["controls"].update(teacher={"loss_weights": {}}), "controls: teacher: unknown key 'loss_weights'"),
    (lambda v: v["controls"].update(ks=[1, 0]), r"controls: ks\[1\] is 0; it must be greater than or equal to 1"),
    (lambda v: v["controls"].update(k=4), r"controls: k is 4, but there are Raptors only for k = \[2\]"),
    (lambda v: v["controls"].update(drop_paths=["none"]),
     r"controls: drop_paths\[0\] is 'none'; it must be a valid number"),
    (lambda v: v.update(stage2=[5]), r"stage2 must hold keys and values, not \[5\]"),
    (lambda v: v["stage1"].update(lr="fast"), "stage1: lr is 'fast'; it must be a valid number"),
    (lambda v: v["stage2"].update(forcing="fre"), "stage2: forcing: unknown value 'fre'; did you mean 'free'"),
    (lambda v: v["last_block"].update(token_weights=[1, 2]),
     "last_block: token_weights is .*; it must have at least 3"),
    (lambda v: v["teacher"]["train"].update(steps=0), "teacher: train: steps is 0; it must be greater than or"),
    (lambda v: v["controls"].update(teacher={"schedule": "linear"}), "teacher: schedule: unknown value 'linear'"),
    (lambda v: v["probes"]["depth"]["train"].update(precision="bf61"),
     "precision: unknown value 'bf61'; did you mean 'bf16'"),
    # probes and other models
    (lambda v: v.update(probes={"detph": v["probes"]["depth"]}), "probes: unknown key 'detph'; did you mean 'depth'"),
    (lambda v: v.update(probes={}), "give at least one"),
    (lambda v: v["probes"]["depth"]["train"].update(epoch=1),
     "probes: depth: train: unknown key 'epoch'; did you mean 'epochs'"),
    (lambda v: v["probes"]["depth"]["train"].update(steps=1), "probes: depth: train: unknown key 'steps'"),
    (lambda v: v["probes"]["depth"]["head"].update(bin=8),
     "probes: depth: head: unknown key 'bin'; did you mean 'bins'"),
    (lambda v: v["probes"]["segmentation"].update(head={"bins": 8}), "probes: segmentation: head: unknown key 'bins'"),
    (lambda v: v.update(extra_models={"small": {"nam": "x"}}),
     "extra_models: small: unknown key 'nam'; did you mean 'name'"),
    (lambda v: v.update(extra_models={1: {"name": "x"}}), "extra_models: a key is 1; it must be a valid string"),
    # phases
    (lambda v: v.update(phases=[2]), "phases must hold keys and values"),
    (lambda v: v["phases"].update(ks=["a"]), r"phases: ks\[0\] is 'a'; it must be a valid integer"),
    (lambda v: v["phases"].update(ks=[2, 0]), r"phases: ks\[1\] is 0; it must be greater than or equal to 1"),
    (lambda v: v["phases"].update(ks=[]), "phases: ks is .*; name at least one"),
    (lambda v: v["phases"].update(ks=[2, 2]), "phases: ks is .*, and each once"),
    (lambda v: v["phases"].update(ends={3: [1, 2, 6]}), r"ends are given for k = \[3\]"),
    (lambda v: v["phases"].update(ends={2: 6}), "phases: ends: 2 is 6; it must be a valid list"),
    (lambda v: v["phases"].update(ends={2: [6, 6]}), r"phases: ends \(6, 6\) must be positive and strictly increasing"),
    (lambda v: v["phases"].update(ends={2: [2, 4, 6]}), "make 3 phases for k = 2; give 2 numbers"),
    (lambda v: v["phases"].update(ks=[2, 3], ends={2: [3, 6], 3: [3, 6, 12]}), "close with different layers"),
    # variants and their blocks
    (lambda v: v.update(variants=[]), r"variants must hold keys and values, not \[\]"),
    (lambda v: v.update(variants={"v": {}}), "variants: v: missing key 'k'"),
    (lambda v: v.update(variants={"v": {"k": 3, "stops": 2}}), "v: 2 stops are fewer than k = 3 phases; give at least 3"),
    (lambda v: v.update(variants={"v": {"k": 3, "grids": [4, [3, 6]]}}), "v: 2 stops are fewer than k = 3 phases"),
    (lambda v: v["controls"].update(variants={"v": {"k": 2, "stops": [4, 2, 6]}}),
     r"controls: variants: v: the stops \[4, 2, 6\] must increase; sort them"),
    (lambda v: v.update(variants={"v": {"k": 2, "ends": [2, 4, 6]}}), r"v: the ends \[2, 4, 6\] make 3 phases for k = 2"),
    (lambda v: v.update(variants={"v": {"k": 2, "ends": [3, 6], "grids": [[2, 6]]}}), "leave out 3, where a phase ends"),
    *((lambda v, name=name: v.update(variants={name: {"k": 2}}), f"variants: {name} is the name of another Raptor")
      for name in ("k3", "k3x", "K2", "partitions", "ablation-less", "teacher")),
    (lambda v: v["controls"].update(variants={"Relaxed": {"k": 2}}), "variants: Relaxed is the name of another Raptor"),
    (lambda v: v.update(variants={"12": {"k": 2}}), "variants: 12 reads as a number or a truth value"),
    (lambda v: v.update(extra_models={"relaxed-r0": {"name": "x", "random": True}}), "extra_models: relaxed-r0 is the name"),
    (lambda v: v.update(block={"start": "maen"}), "block: start: unknown value 'maen'; did you mean 'mean'"),
    (lambda v: v.update(block={"start": "mean", "hidden": 8}), "block: hidden is the teacher's for a block with start: mean"),
    (lambda v: v["block"].update(rank=4), r"block: rank is for conditioning: \[low_rank\]; add that, or leave rank out"),
    (lambda v: v.update(block={"conditioning": ["low_rank"], "rank": 0}), "block: rank is 0; it must be greater than"),
    (lambda v: v.update(block={"conditioning": ["experts"], "experts": 0}), "block: experts is 0; it must be greater than"),
    (lambda v: v.update(block={"conditioning": ["vectors"] * 2}), "block: conditioning is .*; name each part once"),
    (lambda v: v.update(block={"start": "zero"}), r"block: a block that starts from zero needs conditioning: \[low_rank\]"),
    (lambda v: v.update(block={"start": 3}), "block: start: 3 lies in one of k = 2 phases; say mean or middle"),
    (lambda v: v.update(variants={"v": {"k": 2, "block": {"start": "zero"}}}), "variants: v: block: a block that starts"),
    # seeds, and what it costs
    (lambda v: v.update(seeds={"blok": 5}), "seeds: unknown key 'blok'; did you mean 'block'"),
    (lambda v: v.update(seeds={"block": "five"}), "seeds: block is 'five'; it must be a valid integer"),
    (lambda v: v.update(seeds={"spans": [[0, 2], [2]]}), r"seeds: spans\[1\] is \[2\]; it must have at least 2 items"),
    (lambda v: v.update(resources={"rules": {"train_blok": {}}}),
     "resources: rules: unknown key 'train_blok'; did you mean 'train_block'"),
    (lambda v: v.update(resources={"rules": {"items": {"gpus": 1}}}),
     "resources: rules: items: unknown key 'gpus'; did you mean 'gpu'"),
    (lambda v: v.update(resources={"rules": {"items": {"gpu": None}}}),
     "resources: rules: items: gpu is None; it must be a valid integer"),
    (lambda v: v.update(resources={"rule": {"train_block": {}}}),
     "resources: unknown key 'rule'; did you mean 'rules'"),
    (lambda v: v.update(resources={"threads": {"fig_sped": 2}}),
     "resources: threads: unknown stage 'fig_sped'; did you mean 'fig_speed'"),
    (lambda v: v.update(resources={"threads": {"train_block": 0}}),
     "resources: threads: train_block is 0; it must be greater than or equal to 1"),
    (lambda v: v.update(resources={"disk_gb": "a lot"}), "resources: disk_gb is 'a lot'; it must be a valid number"),
])
def test_an_invalid_preset_gets_a_sentence_with_the_place(tmp_path, change, sentence):
    path = write(tmp_path, change)
    with pytest.raises(RaptorError, match=sentence) as e: load_preset(path)
    said = str(e.value)
    assert said.startswith("preset mine.yaml: ") and said.endswith((".", "?")) and "\n" not in said


@pytest.mark.parametrize("text,sentence", [
    ("- a\n- list", r"preset mine.yaml must hold keys and values, not \['a', 'list'\]"),
    ("", "must hold keys and values, not None"), ("just words", "not 'just words'"),
    *((text, "is not valid YAML")
      for text in ("title: [", "title: {a: b: c}", "{[1]: 2}")), (b"title: \xff", "is not text in UTF-8")])
def test_a_file_that_is_no_preset_is_one_sentence(tmp_path, text, sentence):
    (tmp_path/"mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RaptorError, match=sentence) as e: load_preset(tmp_path/"mine.yaml")
    assert "\n" not in str(e.value)


def test_seeds_that_are_not_given_are_the_usual_ones(tmp_path):
    preset = load_preset(write(tmp_path, lambda v: v.update(seeds={"block": 5})))
    assert preset.seeds == {**SEEDS, "block": 5} and all_runs(preset, PAPER)["block", "0-7-r0"].params["seed"] == 5
    assert load_preset(write(tmp_path, lambda v: v.pop("seeds", None))).seeds == SEEDS


# a preset that changes another ---------------------------------------------------------------------------------------
def write_files(folder, files):
    for name, text in files.items():
        (folder/name).parent.mkdir(exist_ok=True)
        (folder/name).write_text(text)
    return folder/next(iter(files))


@pytest.mark.parametrize("files,expected", [
    ({"mine.yaml": "base: smoke"}, {"replicas": 1, "title": "A test of the whole graph in less than a minute; its numbers mean nothing"}),
    ({"mine.yaml": "base: null\n" + preset_path("smoke").read_text()}, {"replicas": 1}),
    ({"mine.yaml": "base: smoke\nreplicas: 3\ntitle: Mine"}, {"replicas": 3, "title": "Mine"}),
    ({"mine.yaml": "base: smoke\nstage2: {steps: 40, warmup: 4}"}, {"stage2": {"steps": 40, "warmup": 4}}),
    ({"mine.yaml": "base: smoke\nvariants: {}"}, {"variants": {}}),
    ({"mine.yaml": "base: smoke\nstage1: null"}, {"stage1": None}),
    ({"mine.yaml": "base: other.yaml", "other.yaml": "base: smoke\nreplicas: 2"}, {"replicas": 2}),
    ({"mine.yaml": "base: other.yaml\nreplicas: 4", "other.yaml": "base: smoke\nreplicas: 2\ntitle: Other"},
     {"replicas": 4, "title": "Other"}),
    ({"a/mine.yaml": "base: ../b/other.yml", "b/other.yml": "base: third.yaml", "b/third.yaml": "base: smoke\nreplicas: 5"},
     {"replicas": 5}),
    ({"smoke.yaml": "base: smoke\nreplicas: 2"}, {"replicas": 2}),
    ({f"{i}.yaml": f"base: {i + 1}.yaml" if i < 7 else "base: smoke\nreplicas: 2" for i in range(8)}, {"replicas": 2}),
])
def test_a_file_replaces_keys_of_its_base_as_a_whole(tmp_path, monkeypatch, files, expected):
    path, smoke = write_files(tmp_path, files), load_preset("smoke")
    monkeypatch.chdir("/")
    found = load_preset(path)
    assert {key: getattr(found, key) for key in expected} == expected
    assert found.model_dump() == changed(smoke, name=found.name, **expected).model_dump(), "and holds the others"
    assert fingerprint(found.model_dump()) == fingerprint(changed(smoke, name=found.name, **expected).model_dump())
    assert found.name != "smoke" and found.base is None


@pytest.mark.parametrize("files,sentence", [
    ({"mine.yaml": "base: mine.yaml"}, "preset mine.yaml: base: mine.yaml has this file as its base; end the circle."),
    ({"mine.yaml": "base: b.yaml", "b.yaml": "base: ./c.yaml", "c.yaml": "base: b.yaml"},
     "preset c.yaml: base: b.yaml has this file as its base; end the circle."),
    ({f"{i}.yaml": f"base: {i + 1}.yaml" for i in range(10)}, "preset 8.yaml: base: more than 8 in a row; merge some"),
    ({"mine.yaml": "base: smok"}, "preset mine.yaml: base: unknown preset 'smok'; did you mean 'smoke'"),
    ({"mine.yaml": "base: none.yaml"}, "preset mine.yaml: base: the preset file .*none.yaml does not exist"),
    ({"mine.yaml": "base: smoke.txt"}, "preset mine.yaml: base: unknown preset '.*smoke.txt'"),
    ({"mine.yaml": "base: 3"}, "preset mine.yaml: base is 3; it must be a valid string"),
    ({"mine.yaml": "base: smoke\nreplica: 2"}, "preset mine.yaml: unknown key 'replica'; did you mean 'replicas'"),
    ({"mine.yaml": "base: b.yaml", "b.yaml": "base: smoke\nreplica: 2"},
     "preset b.yaml: unknown key 'replica'; did you mean 'replicas'"),
    ({"mine.yaml": "base: b.yaml", "b.yaml": "base: smoke\nstage2: {step: 2}"}, "preset b.yaml: stage2: unknown key"),
    ({"mine.yaml": "base: b.yaml\nstage2: {stepz: 2}", "b.yaml": "base: smoke\nstage2: {step: 2}"},
     "preset mine.yaml: stage2: unknown key 'stepz'"),
    ({"mine.yaml": "base: b.yaml", "b.yaml": "title: ["}, "preset b.yaml is not valid YAML"),
    ({"mine.yaml": "base: b.yaml", "b.yaml": "- a"}, "preset b.yaml must hold keys and values"),
    ({"mine.yaml": "base: b.yaml", "b.yaml": "title: Half"}, "preset mine.yaml: 6 faults: missing key 'data' .add it.; missing key 'teacher'"),
    ({"mine.yaml": "base: digits\nphases: {ks: [2]}\ncontrols: {k: 3}"}, "preset mine.yaml: controls: k is 3"),
])
def test_a_fault_in_a_base_is_one_sentence_with_its_file(tmp_path, files, sentence):
    with pytest.raises(RaptorError, match=sentence) as e: load_preset(write_files(tmp_path, files))
    assert str(e.value).endswith((".", "?")) and "\n" not in str(e.value)


def test_the_schema_asks_for_a_base_or_for_everything():
    schema = preset_schema()
    assert schema["properties"]["base"]["description"].startswith("the preset whose keys hold") and "required" not in schema
    assert [set(choice["required"]) & {"base", "title"} for choice in schema["anyOf"]] == [{"base"}, {"title"}]


@pytest.mark.parametrize("name,counts,seeds", [
    ("relaxed", (0, 9, 30), {"k2-r0": 1001, "k4-r2": 1203}), ("experts8", (0, 3, 12), {"k1-r0": 901, "k1-r2": 903}),
    ("elastic", (0, 9, 30), {"k3-r0": 1101, "half-r0": 2000, "elastic-r0": 2000, "elastic-r2": 2002})])
def test_the_papers_scale_with_blocks_that_start_from_the_teacher(name, counts, seeds):
    "They share teacher, probes and data with dinov2_vitb14, and all of their runs can be listed."
    base, preset = load_preset("dinov2_vitb14"), load_preset(f"dinov2_vitb14_{name}")
    for key in ("data", "teacher", "probes", "stage2", "activations", "replicas", "seeds"):
        assert getattr(preset, key) == getattr(base, key)
    runs = Study.open(preset).runs
    assert tuple(sum(kind == run.kind for run in runs.values()) for kind in ("block", "raptor", "probe")) == counts
    assert {run: runs["raptor", run].params["seed"] for run in seeds} == seeds
    assert all(run.name.startswith("partitions") for run in Study.open(preset).controls.values())


# told before any work -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change,sentence", [
    (lambda v: v["teacher"].update(name="vit_nano_patch4_reg4_42"),
     "mine: teacher: unknown timm model 'vit_nano_patch4_reg4_42'; did you mean 'vit_nano_patch4_reg4_24'"),
    (lambda v: v["teacher"].update(name="resnet50"), "mine: teacher: resnet50 .* cannot be a backbone"),
    (lambda v: v["teacher"].update(img_size=25), "mine: teacher: .*not a multiple of the patch size"),
    (lambda v: v["probes"]["depth"].update(img_size=[24, 26]), "mine: teacher: .*not a multiple of the patch size"),
    (lambda v: v.update(extra_models={"small": {"name": "vit_smal_patch14_dinov2", "random": True}}),
     "mine: extra_models: small: unknown timm model 'vit_smal_patch14_dinov2'; did you mean"),
    (lambda v: v["phases"].update(ks=[2, 7]),
     "phases: vit_nano_patch4_reg4_24 has 6 layers, which cannot be divided into k = 7 phases of at least 1"),
    (lambda v: v["phases"].update(ks=[3], min_size=3), "cannot be divided into k = 3 phases of at least 3"),
    (lambda v: v["phases"].update(ends={2: [7, 12]}),
     r"has 6 layers, and the ends \[7, 12\] close with 12; close them with 6"),
    (lambda v: v.update(variants={"v": {"k": 2, "stops": [2, 5]}}), "variants: v: .* 6 layers, and .* close with 5; close them with 6"),
    (lambda v: v.update(variants={"v": {"k": 2, "block": {"start": "mean", "conditioning": ["low_rank"], "rank": 33}}}),
     "mine: variants: v: block: rank is 33, and the matrices of a block of vit_nano_patch4_reg4_24 have at most 32; choose it in 1..32"),
    (lambda v: v.update(block={"conditioning": ["low_rank"], "rank": {"mlp.fc1.weight": 64}}), "mine: block: rank is 64, and"),
    (lambda v: v.update(variants={"v": {"k": 2, "grids": [7]}}), "variants: v: .* 6 layers, and 7 is more; choose fewer"),
    (lambda v: (v.update(variants={"v": {"k": 2, "stops": [2, 6]}}), v["phases"].update(ends={2: [3, 6]})),
     r"variants: v: .* the stops \[2, 6\] leave out 3, where a phase ends; add it"),
    (lambda v: v["probes"]["depth"]["data"].update(name="digit_scene"), "did you mean 'digit_scenes'"),
    (lambda v: v["probes"]["depth"]["data"].update(test_split="tests"),
     "unknown split of digit_scenes 'tests'; did you mean 'test'"),
])
def test_what_only_torch_can_tell_is_told_before_any_work(tmp_path, change, sentence):
    with pytest.raises(RaptorError, match=sentence): check_study(Study.open(write(tmp_path, change), tmp_path))


def test_more_blocks_than_layers_in_the_sweep_are_left_out(tmp_path):
    preset = load_preset(write(tmp_path, lambda v: v["controls"].update(ks=[1, 9])))
    check_study(Study.open(preset, tmp_path))
    assert control_runs(preset, {2: (3, 6)})["partitions-r0"].params["ks"] == [1, 2]


def test_a_model_on_a_hub_is_built_only_when_it_is_needed(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr("raptor.teacher.backbone.Backbone.create", lambda name, **kwargs: built.append(name))
    check_models(load_preset(write(tmp_path, lambda v: v["teacher"].update(name="hf-hub:nobody/nothing"))))
    assert built == []
    check_models(load_preset("smoke"))
    assert set(built) == {"vit_nano_patch4_reg4_24"}, "other models are built at once"


def test_models_are_looked_at_once(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(needs, "check_models", lambda preset: looked.append(preset) or {})
    mine = load_preset(write(tmp_path, lambda v: None))
    check_study(Study.open("smoke", tmp_path))
    assert not looked, "it ships with the package"
    check_study(Study.open(mine, tmp_path))
    check_study(Study.open(mine, tmp_path))
    assert looked == [mine], "the study keeps a mark of it"
    check_study(Study.open(changed(mine, stage2={**mine.stage2, "lr": 1e-4}), tmp_path))
    assert len(looked) == 2, "it has changed since"


def test_threads_may_be_given_to_items_too(tmp_path):
    threads = {"train_block": 2, "fig_speed": 2, "tab_cost": 1}
    preset = load_preset(write(tmp_path, lambda v: v["resources"].update(threads=threads)))
    assert preset.resources["threads"] == threads


def test_what_a_run_asks_for(tmp_path):
    rules = {"train_raptor": {"gpu": 2, "runtime": 60}, "items": {"mem_mb": 4000}}
    preset = load_preset(write(tmp_path, lambda v: v["resources"].update(rules=rules)))
    assert run_needs(preset, "train_raptor") == rules["train_raptor"]
    assert run_needs(preset, "train_control") == {**rules["train_raptor"], "gpu": 1}
    assert all(run_needs(preset, name) == rules["items"] for name in ("items", "fig_speed", "tab_probes"))
    assert run_needs(preset, "train_block") == run_needs(preset, "summary") == {}
    own = load_preset(write(tmp_path, lambda v: v["resources"].update(rules={**rules, "train_control": {"gpu": 1}})))
    assert run_needs(own, "train_control") == {"gpu": 1}
    rules = {"items": {"gpu": 4}, "train_block": {"gpu": 4}}
    more = load_preset(write(tmp_path, lambda v: v["resources"].update(rules=rules)))
    assert run_needs(more, "fig_speed") == {"gpu": 1}, "one process cannot use four GPUs"
    assert run_needs(more, "train_block") == {"gpu": 4}
    assert all(run_needs(load_preset("smoke"), stage) == {} for stage in (*STAGES, "items", "fig_speed"))


def test_names_and_files(tmp_path):
    assert {"smoke", "digits"} <= set(preset_names())
    with pytest.raises(RaptorError, match="did you mean 'smoke'"): load_preset("smok")
    with pytest.raises(RaptorError, match="does not exist"): load_preset(tmp_path/"none.yaml")
    assert load_preset(write(tmp_path, lambda v: None)).name == "mine"


def test_the_runs_of_the_paper():
    preset = changed(load_preset("smoke"), replicas=3, extra_models={"small": {}}, variants={})
    blocks, raptors, probes = block_runs(preset, PAPER), raptor_runs(preset, PAPER), probe_runs(preset, PAPER)
    assert (len(blocks), len(raptors), len(probes)) == (18, 9, 33)
    assert sorted(r.params["seed"] for r in blocks if r.params["replica"] == 1) == list(range(106, 112))
    assert {r.params["seed"] for r in raptors} == {1001, 1002, 1003, 1101, 1102, 1103, 1201, 1202, 1203}
    assert sorted(r.params["seed"] for r in probes) == [*range(4000, 4011), *range(5000, 5011), *range(6000, 6011)]


def test_one_more_replica_changes_no_seed():
    preset = load_preset("smoke")
    one, three = (all_runs(changed(preset, replicas=r), PAPER) for r in (1, 3))
    assert all(three[key].params == run.params for key, run in one.items())


def test_what_a_run_starts_from():
    runs = all_runs(load_preset("smoke"), PAPER)
    assert runs["raptor", "k4-r0"].needs == tuple(("block", f"{span}-r0") for span in ("0-4", "4-7", "7-10", "10-12"))
    assert runs["probe", "k4-r0-depth"].needs == (("raptor", "k4-r0"),) and runs["probe", "teacher-depth"].needs == ()
    assert all(need in runs for run in runs.values() for need in run.needs)


def test_ends_are_unknown_until_they_are_found(tmp_path):
    study = Study.open("smoke", tmp_path)
    assert study.known_ends is None
    for unknown in ("ends", "runs", "controls"):
        with pytest.raises(RaptorError, match="phases of smoke are not known yet"): getattr(study, unknown)
    (study.folder/"phases").mkdir(parents=True)
    (study.folder/"phases"/"phases.json").write_text('{"ends": {"2": [2, 6]}}')
    assert study.known_ends == study.ends == {2: (2, 6)} and ("block", "0-2-r0") in study.runs
    (study.folder/"phases"/"phases.json").write_text('{"ends": {"2": ["$(touch X)", 6]}}')
    with pytest.raises(RaptorError, match="phases.json .* run find_phases again"): study.runs


def test_every_wildcard_of_a_shell_line_is_quoted():
    lines = [line for line in (paper_root()/"Snakefile").read_text().splitlines() if "shell:" in line]
    used = [name for line in lines for name in re.findall(r"\{(wildcards[^}]*)\}", line)]
    assert used and all(name.endswith(":q") for name in used)


# a study that is opened once -----------------------------------------------------------------------------------------
def test_a_study_knows_its_folder_and_how_it_was_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAPTOR_HOME", str(tmp_path/"runs"))
    write(tmp_path, lambda v: None)
    mine = str(tmp_path/"mine.yaml")
    for given, origin in (("smoke", "smoke"), ("mine.yaml", mine), (load_preset("smoke"), "smoke")):
        study = Study.open(given)
        assert (study.origin, study.folder) == (origin, tmp_path/"runs"/study.name) and Study.open(study) is study
    assert Study.open("mine.yaml", "elsewhere").home == tmp_path/"elsewhere"
    assert Study.open("smoke", replicas=3).preset == changed(load_preset("smoke"), replicas=3)
    with pytest.raises(RaptorError, match="replicas is 0; it must be greater than"): Study.open("smoke", replicas=0)


def test_a_record_replaces_no_column_of_a_table(tmp_path):
    study = Study.open("smoke", tmp_path)
    frame = pd.DataFrame({"preset": ["other"], "seed": [7]})
    study.save_table("t.csv", frame, {"preset": "smoke", "seed": 3, "data": "d"})
    assert study.load_tables("t.csv").to_dict("list") == {"preset": ["other"], "seed": [7], "data": ["d"]}
    study.save_table("u.csv", pd.DataFrame({"seed": [7]}))
    assert study.load_tables("u.csv")[["seed", "preset"]].to_dict("list") == {"seed": [7], "preset": ["smoke"]}


def test_a_folder_belongs_to_one_preset(tmp_path):
    "A file with the name of a preset that ships has a folder of its own; files of one name are told apart."
    names = set()
    for place in ("a", "b"):
        (tmp_path/place).mkdir()
        for name in ("smoke", "mine"): (tmp_path/place/f"{name}.yaml").write_text(preset_path("smoke").read_text())
        names.add(load_preset(tmp_path/place/"smoke.yaml").name)
    assert len(names | {"smoke"}) == 3 and load_preset(preset_path("smoke")).name == "smoke"
    one, two = (Study.open(tmp_path/place/"mine.yaml", tmp_path) for place in ("a", "b"))
    one.folder.mkdir()
    (one.folder/"study.yaml").write_text(yaml.safe_dump({"preset": one.origin}))
    needs.check_folder(one)
    with pytest.raises(RaptorError, match=f"mine holds the study of {one.origin}; rename"): needs.check_folder(two)
    (tmp_path/"a"/"mine.yaml").unlink()
    needs.check_folder(two) # the file has moved


def test_too_small_a_disk_or_a_home_that_is_none_leaves_nothing(tmp_path):
    large = load_preset(write(tmp_path, lambda v: v["resources"].update(disk_gb=10**9)))
    with pytest.raises(RaptorError, match="GB free and the work needs"): check_study(Study.open(large, tmp_path/"home"))
    home = tmp_path/"mine.yaml"/"home"
    with pytest.raises(RaptorError, match=f"cannot write to {home/'smoke'}"): check_study(Study.open("smoke", home))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_wrong_parameter_leaves_nothing(tmp_path, monkeypatch, capsys):
    for name in ("end_with_parent", "stop_on_signals"): monkeypatch.setattr(cli, name, lambda: None)
    run = ["run", "train_block", "--preset", "smoke", "--home", str(tmp_path/"home"), "--param"]
    for param, sentence in (("wrong=x", "unknown parameter"), ("seed=[", "--param seed is not valid YAML"),
                            ("seed={a: 1, a: 2}", "'a' stands twice")):
        with pytest.raises(SystemExit): cli.main([*run, param])
        assert sentence in capsys.readouterr().err and not (tmp_path/"home").exists()


# random weights and the arguments of the teacher -----------------------------------------------------------------------
def test_random_weights_are_named_wherever_results_are_shown(tmp_path):
    def random(v):
        v["teacher"] = {"name": "vit_nano_patch4_reg4_24", "random": True}
        v["phases"]["ends"] = {2: [3, 6]}
    study, caveat = Study.open(write(tmp_path, random), tmp_path), "random weights: teacher"
    assert study.preset.caveat == study.record()["caveat"] == caveat and f"| caveat | {caveat} |" in study_facts(study)
    assert describe_data(study.preset)[0].endswith("vit_nano_patch4_reg4_24: random weights")
    figure = plt.figure()
    save_figure(figure, tmp_path/"f", study.preset.caveat)
    assert [text.get_text() for text in figure.texts] == [caveat]
    plt.close(figure)
    for name in ("smoke", "digits", "dinov2_vitb14"):
        assert load_preset(name).caveat == "" and "caveat" not in Study.open(name).record()
    assert load_preset("dinov2_reduced").caveat == "random weights: teacher, without_registers"
    assert all(".preset.caveat)" in p.read_text() for p in paper_root().glob("*.ipynb") if "save_figure(" in p.read_text())


def test_the_teacher_is_created_as_the_preset_says(tmp_path, monkeypatch):
    created = {}
    monkeypatch.setattr("raptor.teacher.backbone.Backbone.create", lambda name, pretrained, weights, img_size, **given: created.update(
        given, name=name, pretrained=pretrained, weights=weights, img_size=img_size))
    def given(v):
        v["teacher"] = {"name": "vit_base_patch16_224.mae", "weights": "mae.pth", "mean": [0, 0.5, 1], "std": [1, 1, 2],
                        "timm": {"qk_norm": True}, "img_size": [32, 48]}
    study = Study.open(write(tmp_path, given), tmp_path)
    study.teacher()
    assert created.pop("weights").name == "mae.pth"
    assert created == {"name": "vit_base_patch16_224.mae", "pretrained": False, "img_size": (32, 48),
                       "mean": (0, 0.5, 1), "std": (1, 1, 2), "qk_norm": True}
    assert study.normalisation() == {"mean": (0, 0.5, 1), "std": (1, 1, 2)} == study.normalisation("k2-r0")


def test_data_without_a_size_are_read_at_the_models(tmp_path):
    def sized(v):
        v["teacher"]["img_size"], v["probes"]["depth"]["img_size"] = 48, [24, 32]
        v["probes"]["segmentation"]["data"]["size"] = 24
    preset = load_preset(write(tmp_path, sized))
    assert preset.data.size == 48 and {t: p.data.size for t, p in preset.probes.items()} == {
        "classification": 48, "segmentation": 24, "depth": [24, 32]}
    with pytest.raises(RaptorError, match="segmentation: data has 24x24 pixels and teacher takes 48x48"):
        check_study(Study.open(preset, tmp_path))
    assert load_preset("smoke").data.size is None


# what runs, and on how many processes ---------------------------------------------------------------------------------
@pytest.mark.parametrize("only,counts", [
    ((), (6, 3, 12, 0)), (("train_block",), (6, 0, 0, 0)), (("train_raptor",), (6, 3, 0, 0)), (("fig_norms",), (3, 1, 0, 0)),
    (("fig_similarity",), (0, 0, 0, 0)), (("fig_accuracy_r2",), (6, 3, 4, 0)), (("tab_probes",), (6, 3, 12, 0)),
    (("fig_partitions",), (0, 0, 0, 1)), (("tab_ablation",), (6, 3, 4, 2)), (("fig_norms", "fig_partitions"), (3, 1, 0, 1))])
def test_the_dry_run_lists_what_is_asked_for(tmp_path, only, counts): assert counted(tmp_path, only) == counts


@pytest.mark.parametrize("only,counts", [
    ((), (6, 4, 15, 0)), (("train_raptor",), (6, 5, 0, 0)), (("tab_probes",), (6, 4, 15, 0)), (("fig_norms",), (3, 1, 0, 0)),
    (("fig_similarity",), (0, 0, 0, 0)), (("fig_partitions",), (0, 0, 0, 1)), (("tab_blocks",), (6, 5, 0, 0))])
def test_the_dry_run_lists_the_variants_that_are_asked_for(tmp_path, only, counts):
    "One that is probed, and one that only a table of the controls reads."
    probed, other = ({name: {"k": 3, "block": {"start": "mean"}}} for name in ("probed", "other"))
    assert counted(tmp_path, only, probed, other) == counts


def counted(folder, only, variants={}, others={}):
    "The lines of a dry run, by kind, of the digits study with other variants."
    values = yaml.safe_load(preset_path("digits").read_text())
    values["variants"], values["controls"]["variants"] = variants, others
    values["phases"]["ends"] = {k: list(e) for k, e in PAPER.items()}
    (folder/"mine.yaml").write_text(yaml.safe_dump(values))
    lines = describe_runs(Study.open(folder/"mine.yaml", folder), only=only).splitlines()
    return tuple(sum(line.startswith(kind) for line in lines) for kind in ("block ", "raptor ", "probe ", "control "))


def test_the_dry_run_of_a_stage_that_comes_first_lists_nothing_behind_it(tmp_path):
    study = Study.open("smoke", tmp_path)
    assert "smoke: train_teacher; nothing else" in describe_runs(study, only=("train_teacher",))
    assert "then what fig_norms needs" in describe_runs(study, only=("fig_norms",))
    with pytest.raises(RaptorError, match="did you mean 'fig_norms'"): describe_runs(study, only=("fig_norm",))


@pytest.mark.parametrize("name", preset_names())
def test_what_is_missing_here_is_told(name, tmp_path, monkeypatch):
    monkeypatch.setenv("RAPTOR_DATA", str(tmp_path))
    assert readiness(name, tmp_path/"home").startswith("ready" if name in ("smoke", "digits") else "no data in")
    assert not list(tmp_path.iterdir())


def test_processes_are_as_many_as_the_gpus_that_a_run_gets(tmp_path):
    "From the preset, or from a profile's set-resources."
    pytest.importorskip("snakemake")
    def four(v): v["phases"]["ends"], v["resources"]["rules"] = {2: [3, 6]}, {"train_block": {"gpu": 4}}
    config = tmp_path/"study.yaml"
    config.write_text(yaml.safe_dump({"preset": str(write(tmp_path, four)), "items": [], "only": ["train_raptor"]}))
    for gpus, processes in ((None, 4), (2, 2), (1, None), (0, None)):
        given = [] if gpus is None else ["--set-resources", f"train_block:gpu={gpus}"]
        command = [sys.executable, "-m", "snakemake", "--snakefile", paper_root()/"Snakefile", "--configfile", config,
                   "--directory", tmp_path/"mine", "--dry-run", "--printshellcmds", "--cores", "8", *given]
        said = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        lines = [line for line in (said.stdout + said.stderr).splitlines() if " run train_" in line]
        assert all("--num_processes" not in line for line in lines if "train_block" not in line)
        blocks = [re.search(r"--num_processes (\d+)", line) for line in lines if "run train_block" in line]
        assert [m and int(m[1]) for m in blocks] == [processes] * 2, said.stderr[-2000:]


@pytest.mark.parametrize("listed,seen", [
    ("0,1", ["0", "1"]), (" 0 , 1 ", ["0", "1"]), ("", []), ("-1", []), ("0,-1,1", ["0"]), ("1,,2", ["1"]), ("NoDevFiles", []),
    ("0,x,1", ["0"]), ("0,0", []), ("GPU-3f,GPU-41", ["GPU-3f", "GPU-41"]), ("GPU-3f,-1,GPU-41", ["GPU-3f"]), ("10", ["10"]),
    ("MIG-GPU-x/3/0,MIG-GPU-x/4/0", ["MIG-GPU-x/3/0", "MIG-GPU-x/4/0"]), ("MIG-41a", ["MIG-41a"])])
def test_a_list_of_gpus_is_read_as_cuda_reads_it(listed, seen, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("SLURM_JOB_ID", "LOCAL_RANK"): monkeypatch.delenv(name, raising=False)
    assert visible_gpus() == seen
    with claimed_gpus(1) as mine: assert mine == seen[:1]
    assert all(p.name.endswith(".lock") for p in tmp_path.iterdir())
