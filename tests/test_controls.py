"""The controls: which runs there are, what they are trained with, and what is measured."""
import math

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raptor.model.block import save_block
from raptor.study.controls import (
    ABLATION, all_runs, block_runs, control_k, control_runs, probe_runs, random_partitions, variant_runs
)
from raptor.core import RaptorError
from raptor.study.experiments import (
    assess, cached_source, order_accuracy, own_scores, test_images as images_of, train_one_stage, train_snapshots,
    train_stage1
)
from raptor.model.as_backbone import RaptorBackbone
from raptor.model.raptor import Raptor
from raptor.phases import FragmentedPhases, Phases
from raptor.study.presets import load_preset, preset_path
from raptor.study.results import published
from raptor.study.specs import BlockSpec, VariantSpec
from raptor.study.study import Study
from raptor.study.variants import find_variant, new_raptor, replicas_of, study_phases, study_stops, variant_config
from raptor.train.stages import TrainConfig

ENDS = {2: (7, 12), 3: (7, 10, 12), 4: (4, 7, 10, 12)}


def changed(spec, **update): return spec.model_copy(update=update)


# ---- the list of runs

def test_a_control_differs_in_what_it_is_about_and_shares_the_seeds_of_its_replica():
    preset = changed(load_preset("digits"), replicas=2)
    runs = control_runs(preset, ENDS)
    assert len(runs) == 2*(2 + 1 + len(preset.controls.drop_paths) + len(preset.controls.variants))
    for r in (0, 1):
        ours = [run for run in runs.values() if run.params["replica"] == r]
        assert {run.params["seed"] for run in ours if not run.name.startswith("ablation")} == {2000 + r}
        first = next(b for b in block_runs(preset, ENDS) if b.name == f"0-7-r{r}")
        assert {run.params["seed"] for run in ours if run.name.startswith("ablation")} == {first.params["seed"]}


def test_one_more_replica_changes_no_run():
    one, three = (control_runs(changed(load_preset("digits"), replicas=r), ENDS) for r in (1, 3))
    assert all(three[name] == run for name, run in one.items())


@pytest.mark.parametrize("table, head, row, rmse", [
    ("table1", None, "Raptor k=3", 0.618), ("revit", "linear", "Raptor k=3", 0.567), ("revit", "MLP", "Raptor k=3", 0.506),
    ("table1", None, "DINOv2 ViT-S", 0.600), ("revit", "linear", "DINOv2 ViT-S", 0.590), ("revit", "MLP", "DINOv2 ViT-S", 0.527)])
def test_both_published_sets_of_depth_are_there_and_apart(table, head, row, rmse):
    rows = published(table).query("task == 'depth' and row == @row")
    assert (rows if head is None else rows[rows["head"] == head])["mean"].tolist() == [rmse]


def test_the_ablation_has_the_papers_rows_under_the_papers_names():
    assert list(published("ablation")["row"]) == [label for row, label in ABLATION.items() if row != "long"]
    runs = control_runs(load_preset("digits"), ENDS).values()
    rows = {row: what for run in runs for row, what in run.params.get("ablation", {}).items()}
    assert set(rows) == {"tf", "ar", "depth", "long"}, "the other rows are runs of the study"
    assert rows["tf"]["stage1"]["forcing"] == "teacher" and "forcing" not in rows["ar"]["stage1"]
    assert rows["ar"]["block"] == {"conditioning": []} and "block" not in rows["depth"]
    assert rows["long"]["stage1"]["steps"] == 300 + 900, "those of both stages"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 60), st.integers(0, 10), st.integers(0, 5))
def test_random_partitions_are_rivals_of_the_max_cut(contiguous, fragmented, seed):
    preset = load_preset("digits")
    controls = changed(preset.controls, contiguous=contiguous, fragmented=fragmented)
    preset = changed(preset, controls=controls, seeds={**preset.seeds, "phases": seed})
    found = random_partitions(preset, ENDS)
    assert len(set(found["contiguous"])) == len(found["contiguous"]) == min(contiguous, math.comb(11, 2) - 1)
    assert all(p.k == 3 and p.depth == 12 and p.ends != ENDS[3] for p in found["contiguous"])
    assert len(found["fragmented"]) == fragmented
    assert all(p.counts == (7, 3, 2) and p.ends is None for p in found["fragmented"])


def test_k_beyond_the_depth_is_left_out_and_the_compared_k_is_always_there():
    preset = load_preset("digits")
    preset = changed(preset, controls=changed(preset.controls, ks=[1, 5, 40]))
    assert control_runs(preset, ENDS)["partitions-r0"].params["ks"] == [1, 3, 5]


def test_which_k_is_compared():
    preset = load_preset("digits")
    assert control_k(preset, ENDS) == 3 and control_k(preset, {2: (4, 12), 4: (1, 2, 3, 12)}) == 4
    seven = changed(preset, controls=changed(preset.controls, k=7))
    with pytest.raises(RaptorError, match=r"k is 7, but .* only for k = \[2, 3, 4\]"): control_k(seven, ENDS)


def test_a_study_without_a_teacher_of_its_own_trains_no_further_ones():
    preset = load_preset("digits")
    untrained = changed(preset, teacher=changed(preset.teacher, train=None))
    assert not any(name.startswith("teacher") for name in control_runs(untrained, ENDS))
    teachers = [run for name, run in control_runs(preset, ENDS).items() if name.startswith("teacher")]
    assert [run.params["snapshots"][0] == 0 for run in teachers] == [True, False, False], "all start alike"


def test_parameters_survive_the_command_line():
    "The Snakefile writes NAME=VALUE with Python's repr, the command reads YAML."
    for run in control_runs(load_preset("digits"), ENDS).values():
        for key, value in run.params.items(): assert yaml.safe_load(f"{value}") == value, key


# ---- variants

RELAXED = BlockSpec(start="mean", conditioning=["vectors", "low_rank"], rank=2)


def with_variants(preset, probed=(), others=()):
    spec = VariantSpec(k=2, block=RELAXED)
    controls = changed(preset.controls, variants=dict.fromkeys(others, spec))
    return changed(preset, variants=dict.fromkeys(probed, spec), controls=controls)


def test_the_variants_of_a_replica_share_one_seed():
    preset = changed(with_variants(load_preset("digits"), ["a", "b"], ["c"]), replicas=2)
    runs = variant_runs(preset, preset.variants)
    assert [(r.kind, r.name, r.folder, r.params, r.needs) for r in runs] == [
        ("raptor", f"{name}-r{r}", f"raptors/{name}-r{r}", {"ends": [], "variant": name, "replica": r, "seed": 2000 + r}, ())
        for name in ("a", "b") for r in (0, 1)]
    assert [r.params["seed"] for r in control_runs(preset, ENDS).values() if r.params.get("variant") == "c"] == [2000, 2001]
    probes = {r.name: r for r in probe_runs(preset, ENDS)}
    first = preset.probes["depth"].seed
    assert [probes[f"{model}-depth"].params["seed"] - first for model in ("a-r0", "b-r0", "a-r1", "b-r1")] == [500, 500, 501, 501]
    assert probes["b-r1-depth"].needs == (("raptor", "b-r1"),) and "c-r0-depth" not in probes
    assert ("raptor", "a-r0") in all_runs(preset, ENDS) and ("raptor", "c-r0") not in all_runs(preset, ENDS)


@pytest.mark.parametrize("more", [
    lambda p: changed(p, replicas=3), lambda p: with_variants(p, ["b", "a", "z"], ["c"]), lambda p: with_variants(p, ["a"], ["d", "c"])])
def test_another_replica_or_variant_changes_no_seed_of_the_others(more):
    few = with_variants(load_preset("digits"), ["a"], ["c"])
    for made in (all_runs, control_runs):
        before, after = made(few, ENDS), made(more(few), ENDS)
        assert all(after[name] == run for name, run in before.items())


def test_blocks_that_start_from_layers_have_no_fragmented_partitions():
    preset = changed(load_preset("digits"), block=RELAXED)
    found = random_partitions(preset, ENDS)
    assert found["fragmented"] == [] and len(found["contiguous"]) == preset.controls.contiguous == 8


@pytest.fixture
def measured(tmp_path):
    "A study of six layers whose distances are known: three groups of 1, 2 and 3 layers, and a slope within them."
    study = Study(load_preset("smoke"), tmp_path, "smoke")
    group = np.array([0, 1, 1, 2, 2, 2])
    distance = np.abs(group[:, None] - group) + 0.01*np.abs(np.subtract.outer(range(6), range(6)))
    rows = [(m, i, j, distance[i, j] if m == "cosine" else 0) for m in ("cosine", "l2") for i in range(6) for j in range(6)]
    study.save_table("phases/distance.csv", pd.DataFrame(rows, columns=["metric", "layer_i", "layer_j", "distance"]))
    (study.folder/"phases"/"phases.json").write_text('{"ends": {"2": [2, 6]}}')
    return study


@pytest.mark.parametrize("k,ends", [(1, (6,)), (2, (2, 6)), (3, (1, 3, 6)), (6, (1, 2, 3, 4, 5, 6))])
def test_phases_are_those_of_the_study_or_of_its_distances(measured, k, ends):
    "k = 2 is what the study has found, whatever the distances say."
    assert study_phases(measured, k) == Phases(ends)


@pytest.mark.parametrize("ends,stops,expected", [
    ((2, 6), None, None), ((2, 6), 6, None), ((2, 6), [2, 4, 6], (2, 4, 6)), ((6,), 3, (1, 3, 6)), ((1, 6), 3, (1, 3, 6)),
    ((3, 6), 2, (3, 6)), ((2, 6), 4, (1, 2, 3, 6))])
def test_a_number_of_stops_stands_for_the_cut_that_holds_the_phases(measured, ends, stops, expected):
    assert study_stops(measured, Phases(ends), stops) == expected


def test_fewer_stops_than_phases_are_refused(measured):
    with pytest.raises(RaptorError, match=r"2 steps cannot lead through the ends \[1, 3, 6\]"):
        study_stops(measured, Phases((1, 3, 6)), 2)


def test_an_unknown_variant_is_refused(measured):
    with pytest.raises(RaptorError, match="preset smoke has no variant 'relaxt'; it has .*relaxed"): find_variant(measured, "relaxt")
    assert find_variant(measured, "relaxed").k == 2 and variant_config(measured, "relaxed", 7).forcing == "annealed"
    assert variant_config(measured, "last", 7).forcing == "free" and variant_config(measured, "last", 7).targets == "last"


# ---- tiny runs through the library

@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "The smoke preset cut to a few steps, with a teacher that was never trained and known phases."
    home = tmp_path_factory.mktemp("home")
    values = yaml.safe_load(preset_path("smoke").read_text())
    values["data"].update(limit=64, test_limit=32)
    values["activations"] = {"source": "live"}
    values["phases"] = {"ks": [2], "ends": {2: [2, 6]}}
    values["teacher"]["train"].update(steps=4, warmup=1)
    for stage in ("stage1", "stage2"): values[stage].update(steps=4, warmup=1, batch_size=8)
    path = home/"tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return Study.open(path, home)


@pytest.fixture(scope="module")
def snapshots(study): return train_snapshots(study, 0.3, 5, {"steps": 4}, steps=(0, 2))


def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_snapshots_are_the_network_at_those_steps(study, snapshots):
    kept, history = snapshots
    assert [s.step for s in kept] == [0, 2, 4] and history.step.iloc[-1] == 4
    (again, *_), _ = train_snapshots(study, 0.0, 5, {"steps": 1}, steps=(0,))
    assert torch.equal(weights(kept[0].backbone), weights(again.backbone)), "every rate starts from the same weights"
    for one, next_one in zip(kept, kept[1:]): assert not torch.equal(weights(one.backbone), weights(next_one.backbone))
    assert all(not p.requires_grad for s in kept for p in s.backbone.parameters())
    assert all(set(s.heads) == {"classification", "segmentation", "depth"} for s in kept)
    short, _ = train_snapshots(study, 0.3, 5, {"steps": 4}, steps=())
    assert torch.equal(weights(short[-1].backbone), weights(kept[-1].backbone)), "looking on the way changes nothing"


def test_one_stage_trains_any_partition_and_the_seed_decides(study, snapshots):
    backbone = snapshots[0][-1].backbone
    source = cached_source(study, backbone, study.folder/"none", 32)
    train = {"steps": 2, "batch_size": 8, "warmup": 1}
    first, history = train_one_stage(study, backbone, source, FragmentedPhases((0, 1, 0, 1, 1, 0)), 7, train)
    again, _ = train_one_stage(study, backbone, source, FragmentedPhases((0, 1, 0, 1, 1, 0)), 7, train)
    other, _ = train_one_stage(study, backbone, source, FragmentedPhases((0, 1, 0, 1, 1, 0)), 8, train)
    assert torch.equal(weights(first), weights(again)) and not torch.equal(weights(first), weights(other))
    assert history.step.tolist() == [2] and "tf" in history, "teacher forcing is annealed"
    assert not torch.equal(weights(first.blocks[0]), weights(first.blocks[1]))


def test_a_block_that_does_not_differ_is_the_studys_own(study, snapshots):
    backbone = snapshots[0][-1].backbone
    source = cached_source(study, backbone, study.folder/"none", 32)
    run = block_runs(study.preset, study.ends)[0]
    own = study.new_block(backbone, 99)
    save_block(study.folder/run.folder/"block.safetensors", own, (0, 2))
    raptor, history = train_stage1(study, backbone, source, Phases((2, 6)), 0, {"loss": "mse"})
    assert torch.equal(weights(raptor.blocks[0]), weights(own)), "read"
    assert set(history.start) == {2}, "the last block has another loss here than in the study, and is trained"
    flat, history = train_stage1(study, backbone, source, Phases((2, 6)), 0, {"loss": "mse"}, conditioning=())
    assert set(history.start) == {0, 2} and all(b.scaling is None for b in flat.blocks)
    with pytest.raises(RaptorError, match="unknown key 'step'"):
        train_stage1(study, backbone, source, Phases((2, 6)), 0, {"step": 3})


@pytest.mark.parametrize("spec,ends,stops,grids", [
    (VariantSpec(k=2, block=RELAXED), (2, 6), None, ()), (VariantSpec(k=2, stops=[2, 4, 6], block=RELAXED), (2, 6), (2, 4, 6), ()),
    (VariantSpec(k=2, ends=[3, 6], grids=[[3, 6]], block=RELAXED), (3, 6), None, ((3, 6),)), (VariantSpec(k=2), (2, 6), None, ())])
def test_a_variant_is_what_its_preset_says(study, snapshots, spec, ends, stops, grids):
    backbone = snapshots[0][-1].backbone
    raptor, learned = new_raptor(study, backbone, spec, 7)
    assert (raptor.phases.ends, raptor.stops, learned) == (ends, stops, grids)
    assert torch.equal(weights(new_raptor(study, backbone, spec, 7)[0]), weights(raptor))
    kinds = {tuple(block.changes) for block in raptor.blocks}
    assert kinds == ({("low_rank", "vectors")} if spec.block else {()}), "the study's block where it names none"


def test_what_is_measured_of_a_raptor(study, snapshots):
    last = snapshots[0][-1]
    source, labelled = images_of(study, 24, last.backbone)
    assert source.num_images == len(labelled) == 24 and images_of(study, 10**6, last.backbone)[0].num_images == 32
    raptor = Raptor([study.new_block(last.backbone, j) for j in range(2)], Phases((2, 6))).eval()
    table = assess(raptor, source, batch_size=10)
    true = next(source.batches(24))
    error = (raptor.rollout(true[:, 0]) - true)[:, 1:].double()
    epsilon = table.query("measure == 'epsilon_absolute'").value
    assert np.allclose(epsilon, error.detach().flatten(2).norm(dim=2).mean(0), rtol=1e-5)
    assert table.query("measure == 'epsilon_absolute_max'").value.item() == epsilon.max()
    assert np.isclose(table.query("measure == 'r2_mean'").value.item(), table.query("measure == 'r2'").value.mean())
    scores = own_scores(RaptorBackbone(last.backbone, raptor), last.heads, labelled)
    assert {"own_top1", "own_miou", "own_rmse"} <= set(scores.measure) and own_scores(raptor, {}, labelled).empty


class Own(torch.nn.Module):
    "A teacher's own layers in the place of recurrent blocks."
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.scale = backbone, torch.nn.Parameter(torch.ones(()))

    def advance(self, state, start, end): return self.backbone.advance(state, start, end) * self.scale
    def rollout(self, state, start, end): return torch.stack([state, *self.backbone.states(state, start, end)], 1)


def test_a_block_is_validated_in_its_place(study, snapshots, monkeypatch):
    last = snapshots[0][-1]
    monkeypatch.setattr(Study, "teacher_heads", lambda self, backbone: last.heads)
    config = TrainConfig(steps=4, eval_every=2)
    source, labelled = images_of(study, None, last.backbone)
    scores = {name: value for name, value in own_scores(last.backbone, last.heads, labelled).itertuples(index=False)}
    own = Own(last.backbone).train()
    assert study.validation(own, (2, 4), last.backbone, config)(2) == pytest.approx({"r2_end": 1, "r2_mean": 1, **scores})
    assert not own.training
    raptor = Raptor([study.new_block(last.backbone, j) for j in range(2)], Phases((2, 6)))
    found, whole = study.validation(raptor, (0, 6), last.backbone, config)(2), RaptorBackbone(last.backbone, raptor)
    expected = {name: value for name, value in own_scores(whole, last.heads, labelled).itertuples(index=False)}
    r2 = assess(raptor, source).set_index(["measure", "layer"]).value
    assert found == pytest.approx({"r2_end": r2["r2", 6], "r2_mean": r2["r2_mean"].item(), **expected})
    assert study.validation(raptor, (0, 6), last.backbone, TrainConfig()) is None, "unless the preset asks for it"


def test_a_validation_reads_no_more_images_than_the_test_split_has(study, snapshots, monkeypatch):
    "A limit above the size of the split makes further scenes: 5,000 of the 2,048 were scored."
    asked, data = [], study.preset.data.model_copy(update={"test_limit": None})
    whole = Study.open(study.preset.model_copy(update={"data": data}), study.home)
    monkeypatch.setattr(Study, "teacher_heads", lambda self, backbone: {})
    monkeypatch.setattr(Study, "source", lambda self, split, backbone, limit: asked.append((split, limit)))
    backbone, config = snapshots[0][-1].backbone, TrainConfig(steps=4, eval_every=2)
    for of in (whole, study): of.validation(Own(backbone), (0, 6), backbone, config)
    assert asked == [("test", len(whole.dataset("test"))), ("test", 32)] == [("test", 2048), ("test", 32)]


def test_the_usual_order_scores_what_the_head_scores(study, snapshots):
    last = snapshots[0][-1]
    _, labelled = images_of(study, 32, last.backbone)
    usual, swapped = (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 6, 5)
    found = order_accuracy(last.backbone, last.heads["classification"], labelled, [usual, swapped, usual], batch_size=9)
    top1 = own_scores(last.backbone, {"classification": last.heads["classification"]}, labelled).value.item()
    assert found[0] == found[2] == pytest.approx(top1)


def test_replicas_are_those_that_are_there(tmp_path):
    "More than the preset asks for, in numerical order, and not those of a variant whose name begins alike."
    for name in ("relaxed-r10", "relaxed-r2", "relaxed-r0", "relaxed-ranked-r1", "half-r3"):
        (tmp_path/"smoke"/"raptors"/name).mkdir(parents=True)
        if name != "relaxed-r2": (tmp_path/"smoke"/"raptors"/name/"result.csv").touch()
    study = Study.open("smoke", tmp_path)
    assert replicas_of(study, "relaxed") == [0, 10] and replicas_of(study, "relaxed-ranked") == [1] and replicas_of(study, "none") == []
