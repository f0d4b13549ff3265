"""Presets that ask for what cannot be, by the table key x bad value: one sentence, exit status 1, and nothing written; and odd ones that are right."""
import copy
import importlib.util

import pytest
import torch
import yaml
from safetensors.torch import save_file

from raptor.pipeline import cli, runs
from raptor.study.presets import load_preset, preset_path
from raptor.study.settings import parse_yaml
from raptor.teacher.backbone import Backbone

SMOKE = yaml.safe_load(preset_path("smoke").read_text())
NAN, INF, HUGE = float("nan"), float("inf"), 10**30
RANDOM = {"name": "vit_nano_patch4_reg4_24", "random": True}
NUMBER = ["much", True, [1], {}, NAN, INF, -1, HUGE] # what no number of a preset is
COUNT = ["3", True, None, 1.5, 0, -1, HUGE]
WHOLE = ["3", True, 1.5, -1, HUGE]

KEYS = { # section -> {key: bad values}
    **{stage: {"lr": [*NUMBER, 0], "min_lr": NUMBER, "steps": COUNT, "batch_size": COUNT, "clip": [-1, 0, NAN, "off"], "weight_decay": [-1, NAN, INF, 2]}
       for stage in ("stage1", "stage2", "teacher/train")},
    "stage1": {"lr": [*NUMBER, 0], "min_lr": [*NUMBER, 1.0], "steps": COUNT, "batch_size": COUNT, "clip": [-1, 0, NAN, "off"], "weight_decay": [-1, NAN, INF, 2],
               "warmup": [*WHOLE, 31], "warmup_start": [-0.1, 1.1, NAN], "anneal": [-0.1, 1.1, NAN], "noise": [-1, NAN, INF], "log_every": COUNT,
               "checkpoint_every": WHOLE, "eval_every": WHOLE, "schedule": ["linear", 1, None], "precision": ["bf61", False, 16], "loss": ["l2", None],
               "forcing": ["none", True], "log_with": ["comet", 1], "token_weights": [["a", "b", "c"], [0, 0, 0], [1, 2], [1, 2, NAN], 1]},
    "last_block": {"lr": [0, NAN], "min_lr": [0.1]},
    "teacher/train": {"lr": [0, NAN, INF], "steps": COUNT, "loss_weights": [{"depth": -1}, {"depth": NAN}, {"classification": 0, "segmentation": 0, "depth": 0}, {"edges": 1}]},
    "teacher": {"name": ["", "vit_nano\n", 5, None, "resnet50", "vit_nano_patch4_reg4_42", "vit_base_patch16_224.nope"], "drop_path": [-1, 1, NAN, "a"], "random": [True, "yes"],
                "img_size": [0, -24, 25, 10**6, [24], [24, 24, 24], [24, "24"], 24.0, "big", True], "pretrained": ["on", 1, True], "weights": ["", 7, "nowhere.pth"],
                "head": ["", "nowhere.pth"], "mean": [[0.5] * 3, [0.5], "imagenet"], "std": [[0, 1, 1], [0.2] * 3],
                "timm": [{"weights": "w.pth"}, {"checkpoint_path": "w.pth"}, {"no_such_argument": 1}, [1], {1: 2}]},
    "data": {"name": ["", "digit_scene", 3, "folder:"], "split": ["trian", ""], "test_split": ["valid", 0], "size": [0, -1, [24], "24", NAN, 48], "limit": [0, -5, 1.5, "all", 16, 10**9],
             "test_limit": [0, HUGE], "workers": [-1, 10**6, "four"], "on_error": ["ignore", None], "download": ["yes", 1, True]},
    "phases": {"ks": [[], [0], [2, 2], [7], [2.0], 2, None], "images": COUNT, "eps": [[NAN], [-0.1], [1.1], 0.2], "min_size": [0, 4, "one"], "ends": [{2: [6, 6]}, {2: [3, 7]}, {2: [10**12, 10**13]}, {}.keys]},
    "block": {"layer_scale": NUMBER, "hidden": [0, -1, HUGE, "4D"], "conditioning": ["yes", 1, None, ["scalin"], {}], "mlp": ["relu"], "start": ["maen", 0, "", None, 3, -1, True], "rank": [0, -1, 8, "full", HUGE, {}, {"qkv": 4}], "experts": [0, 65, 4], "router": ["hard", "hat"], "expert_attention": ["yes", True]},
    "activations": {"source": ["disk"], "dtype": ["float64"], "chunk_images": COUNT, "precision": ["half"]},
    "probes/depth": {"seed": ["one", -1, 1.5], "img_size": [0, [24], 26], "official_head": [True, "no"], "head": [{"bins": 0}, {"bins": 1}, {"min_depth": -1}, {"max_depth": INF}, {"min_depth": 20}, {"hidden": 0}, {"hidden": HUGE}]},
    "probes/classification": {"official_head": [True], "head": [{"bins": 8}, {"hidden": 8}]},
    "probes/segmentation/train": {"epochs": COUNT, "table_gb": NUMBER, "eval_batch_size": COUNT, "batch_size": [0, 1024], "augment": ["yes", 1], "lr": [0, NAN], "min_lr": [1.0]},
    "controls": {"k": [3, "two"], "ks": [[0], ["a"]], "contiguous": [-1, 10**9], "fragmented": [10**9], "drop_paths": [[-1], [1], [NAN], [], [0.1, 0.1]], "snapshots": [[-1], [11]],
                 "train_images": [0, 8, HUGE], "images": [0], "orders": [0, 10**9]},
    "seeds": {"teacher": [-1, 2**40, "a"], "block": [1.5], "spans": [[[0, 2], [2]], [[2, 0]]]},
    "resources": {"disk_gb": [NAN, INF, -1, "a lot"], "threads": [{"train_block": 0}, {"train_block": 10**9}], "rules": [{"train_block": {"gpu": -1}}, {"train_block": {"gpu": 3}}, {"items": {"mem_mb": 0}}]},
    "": {"title": ["", 3, "two\nlines", "\x07"], "replicas": [*COUNT, 101], "name": [], "surprise": [1], "stage1": [[], "fast"], "base": [3, "", [], "digit", "nowhere.yaml", "mine.yaml", "./mine.yml\n", "x" * 999 + ".yaml"], "probes": [{}, []],
         "extra_models": [{"k2-r0": {"name": "vit_nano_patch4_reg4_24", "random": True}}, {"Teacher": {"name": "vit_nano_patch4_reg4_24", "random": True}}, {"x": {"name": "vit_nano_patch4_reg4_24"}},
                          {"x": SMOKE["teacher"]}, {"relaxed-r0": RANDOM}, {"Student-r1": RANDOM}, {"1e5": {"name": "vit_nano_patch4_reg4_24", "random": True}}, {"a/b": {"name": "vit_nano_patch4_reg4_24", "random": True}}]}}
PARTS = {"vectors": {"conditioning": ["vectors"]}, "low_rank": {"conditioning": ["low_rank"]}, "experts": {"conditioning": ["experts"]}, "mean": {"start": "mean", "conditioning": []}}
BLOCKS = [{**PARTS["low_rank"], "rank": 0}, {**PARTS["low_rank"], "rank": 10**6}, {**PARTS["low_rank"], "rank": {"qkv.bias": 2}}, {**PARTS["low_rank"], "rank": {"qkv.weight": 0}}, {**PARTS["experts"], "experts": 0},
          {**PARTS["experts"], "router": "hats"}, {**PARTS["experts"], "rank": 4}, {**PARTS["vectors"], "rank": 4}, {**PARTS["vectors"], "experts": 2}, {**PARTS["mean"], "hidden": 8}, {**PARTS["mean"], "mlp": "gelu"},
          {**PARTS["mean"], "layer_scale": 1.0}, {**PARTS["mean"], "start": "maen"}, {**PARTS["mean"], "start": 3}, {**PARTS["mean"], "start": 1.5}, {"conditioning": ["vectors", "vectors"]}, {"conditioning": ["vector"]},
          {**PARTS["vectors"], "start": "zero"}, {"start": "zero"}, 3, "mean", ["mean"]] # as the study's block, and as a variant's
VARIANTS = [[], "relaxed", {"v": None}, {"v": {}}, {"v": {"k": 0}}, {"v": {"k": "two"}}, {"v": {"k": 7}}, {"v": {"k": 2, "stop": 3}}, {"v": {"k": 2, "title": ""}}, {"v": {"k": 2, "train": {"step": 3}}},
            {"v": {"k": 2, "train": {"warmup": 31}}}, {"v": {"k": 2, "train": {"targets": "first"}}},
            *({"v": {"k": 2, "grids": [4, 3], "train": {"shares": shares}}} for shares in ([1, 1], [1, 1, 1, 1], [1, 0, 1], [1, 1, 2.5], [1, -1, 1], [], 3, ["one", 1, 1])),
            {"v": {"k": 2, "train": {"shares": [1, 1]}}}, *({"v": {"k": 2, "stops": stops}} for stops in ([3, 2, 6], [3, 3, 6], [], [6], 1, 0, 7, "six", [2, 5], [2, 9], [0, 6], 2.5)),
            *({"v": {"k": 2, "grids": grids}} for grids in (3, [1], [7], [[3, 2, 6]], [[2, 5]], [[6]], ["all"], [[]])), *({"v": {"k": 2, "ends": ends}} for ends in ([6], [6, 3], [2, 9], [], 6, [0, 6])), {"v": {"k": 2, "ends": [3, 6], "stops": [2, 6]}},
            {"v": {"k": 2, "ends": [3, 6], "grids": [[2, 4, 6]]}}, *({name: {"k": 2}} for name in ("k3", "k3x", "K3", "a/b", "..", "", "1e5", "true", "teacher", "partitions", "ablation-less", "x" * 101)), {"v": {"k": 2}, "V": {"k": 2}}]
KEYS[""] |= {"block": BLOCKS, "variants": VARIANTS + [{"v": {"k": 2, "block": block}} for block in BLOCKS]}
KEYS["controls"]["variants"] = [*VARIANTS, {"relaxed": {"k": 2}}, {"Relaxed": {"k": 2}}]
KEYS["phases"]["ends"].pop() # a placeholder is no value
ROWS = [(section, key, value) for section, keys in KEYS.items() for key, values in keys.items() for value in values]

TEXTS = ["title: [", "- a\n- list", "", "just words", "a: b: c", "{[1]: 2}", "\x00", "title: a\ntitle: b", "stage1: {lr: 1, lr: 2}", "[" * 5000, "{a: " * 5000, "a: &a [*a]", "!!python/object:os.system {}",
         "--- {}\n--- {}", "a: *b", "\n".join(f"a{i}: &a{i} [{f'*a{i-1}, *a{i-1}' if i else 0}]" for i in range(64)), "# " + "x" * 10**6, "9: " + "9" * 5000, "title: !!binary aGk=", b"\xff\xfe", b"title: \xe9"]


def with_value(section, key, value):
    values = copy.deepcopy(SMOKE)
    at = values
    for step in filter(None, section.split("/")): at = at.setdefault(step, {})
    at[key] = value
    return yaml.safe_dump(values)


def assert_refused(text, tmp_path, capsys, monkeypatch):
    "By the dry run and by the run itself, with and without a folder of datasets, in one sentence, before anything is written."
    monkeypatch.setattr(runs, "_snakemake", lambda *a: pytest.fail("it was accepted"))
    monkeypatch.setattr(runs, "check_writable", lambda *a: pytest.fail("it was accepted"))
    path, said = tmp_path/"mine.yaml", []
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for option, root in (["--dry-run"], tmp_path/"none"), ([], tmp_path):
        monkeypatch.setenv("RAPTOR_DATA", str(root))
        with pytest.raises(SystemExit) as e: cli.main(["reproduce", "--preset", str(path), "--home", str(tmp_path/"home"), *option])
        assert e.value.code == 1
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] and said[0].startswith("raptor: ") and said[0].count("\n") == 1 and len(said[0]) < 600 and said[0].rstrip().endswith((".", "?")), said
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"], "nothing is written"


def test_there_are_enough_of_them(): assert len(ROWS) + len(TEXTS) >= 215


@pytest.mark.parametrize("section,key,value", ROWS, ids=lambda v: repr(v)[:30])
def test_a_value_that_cannot_be_is_one_sentence(section, key, value, tmp_path, capsys, monkeypatch):
    assert_refused(with_value(section, key, value), tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize("text", TEXTS, ids=lambda v: repr(v)[:30])
def test_a_text_that_is_no_preset_is_one_sentence(text, tmp_path, capsys, monkeypatch): assert_refused(text, tmp_path, capsys, monkeypatch)


def test_a_tracker_that_is_not_installed(tmp_path, capsys, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr("raptor.pipeline.needs.find_spec", lambda name: None if name == "wandb" else there(name))
    assert_refused(with_value("stage2", "log_with", "wandb"), tmp_path, capsys, monkeypatch)


# files that a preset names --------------------------------------------------------------------------------------------
def cut(model):
    "A network with fewer layers."
    return {k: v for k, v in model.state_dict().items() if not k.startswith(("blocks.4", "blocks.5"))}


@pytest.mark.parametrize("key,tensors,words", [
    ("weights", None, "cannot be read"), ("weights", lambda m: cut(m), "do not fit"),
    ("head", None, "cannot be read"), ("head", lambda m: {"weight": torch.zeros(10, 160), "bias": torch.zeros(10)}, "reads 160 features and the model gives 64"),
    ("head", lambda m: {"weight": torch.zeros(1000, 64), "bias": torch.zeros(1000)}, "has 1000 classes and data has 10"), ("head", lambda m: {"weight": torch.zeros(10, 64)}, "is not a linear head")])
def test_the_content_of_a_file_is_looked_at_before_the_first_run(key, tensors, words, tmp_path, capsys, monkeypatch):
    path = tmp_path.parent/f"{tmp_path.name}.safetensors"
    if tensors is None: path.write_bytes(b"<!DOCTYPE html>")
    else: save_file({k: v.contiguous() for k, v in tensors(Backbone.create("vit_nano_patch4_reg4_24", pretrained=False).model).items()}, path)
    assert_refused(with_value("teacher", key, str(path)), tmp_path, capsys, monkeypatch)
    with pytest.raises(SystemExit): cli.main(["reproduce", "--preset", str(tmp_path/"mine.yaml"), "--home", str(tmp_path/"home"), "--dry-run"])
    assert words in capsys.readouterr().err


# odd ones that are right ----------------------------------------------------------------------------------------------
TEXT = preset_path("smoke").read_text()
RIGHT = {
    "BOM": "\ufeff" + TEXT, "CRLF": TEXT.replace("\n", "\r\n"), "document marks": f"--- # one\n{TEXT}\n...\n", "no last line break": TEXT.rstrip("\n"), "comments": "# é\n" * 99 + TEXT, "JSON": str(
        __import__("json").dumps(SMOKE)), "anchor": TEXT.replace("last_block: {loss", "last_block: &weighted {loss"), "alias": TEXT.replace("replicas: 1", "replicas: &one 1\nseeds: {block: *one}"),
    "merge": TEXT.replace("stage1: {steps", "stage1: &s {steps").replace("stage2: {steps: 30", "stage2: {<<: *s, steps: 30"), "quoted": TEXT.replace("loss: mse", "loss: 'mse'").replace("title:", '"title":'),
    **{f"title {t[:9]!r}": with_value("", "title", t) for t in ("Ünïcödé ünd 漢字", "😀👩‍🔬", "no", "2024-01-01", "'quoted'", "a: b # c", "12:30", "x" * 900, "مرحبا", "<b>bold</b>")},
    **{f"lr {n}": TEXT.replace("lr: 3.0e-3", f"lr: {n}") for n in ("3e-3", "3E-3", ".003", "+0.003", "1", "3.e-3")},
    "int for a float": with_value("block", "layer_scale", 1), "no clip": with_value("stage1", "clip", None), "tilde": TEXT.replace("replicas: 1", "extra_models: {}").replace("forcing: free", "forcing: free, clip: ~"),
    "True": TEXT.replace("augment: false", "augment: False"), "hexadecimal": TEXT.replace("replicas: 1", "replicas: 0x1"), "block style": yaml.safe_dump(SMOKE, default_flow_style=False),
    "warm-up of all steps": with_value("stage1", "warmup", 30), "extra": with_value("", "extra_models", {"né-1.2+x": {"name": "vit_nano_patch4_reg4_24", "random": True}, "y": {"name": "vit_nano_patch4_reg4_24", "random": True}}),
    "size": with_value("data", "size", [24, 24]), "sizes": with_value("teacher", "img_size", 24), "mean and std": with_value("teacher", "mean", [0.5, 0.5, 0]).replace("  mean:", "  std: [0.2, 1, 0.3]\n  mean:")}


@pytest.mark.parametrize("name", RIGHT)
def test_an_odd_preset_that_is_right_is_accepted(name, tmp_path, capsys):
    path = tmp_path/"ünd-very.long_name+of-a-preset-{}.yaml".format("x" * 100)
    path.write_bytes(RIGHT[name].encode())
    load_preset(path)
    if name in ("BOM", "merge", "sizes", "extra"):
        with pytest.raises(SystemExit) as e: cli.main(["reproduce", "--preset", str(path), "--home", str(tmp_path/"home"), "--dry-run"])
        assert e.value.code == 0, capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text,value", [
    ("1e-3", 1e-3), ("[1e-3, 2E5, 3.e1]", [1e-3, 2e5, 30.0]), ("{a: 1e-3}", {"a": 1e-3}), ("on", "on"), ("off", "off"), ("yes", "yes"), ("no", "no"), ("n", "n"), ("true", True), ("~", None), ("", None), ("null", None),
    ("010", 10), ("0x10", 16), ("1_000", "1_000"), ("12:30:45", "12:30:45"), ("2024-01-01", "2024-01-01"), ("+5", 5), ("-0.5", -0.5), ("e3", "e3"), ("é", "é"), ("[5, 9]", [5, 9]), ("'1e-3'", "1e-3"), ("=", "="), ("--", "--")])
def test_yaml_is_that_of_1_2(text, value):
    assert (found := parse_yaml(text, "it")) == value and type(found) is type(value)
    assert cli._parse(f"x={text}") == ("x", value)
