"""`raptor new` and what makes presets easy to write: relative paths, all faults at once, own models from a module."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from raptor.core import RaptorError, paper_root
from raptor.phases import read_phases
from raptor.pipeline.needs import check_models, check_study
from raptor.study.module import module_files, use_module
from raptor.study.presets import load_preset, preset_path
from raptor.study.steps import first_steps, spec_of
from raptor.study.study import Study
from raptor.study.weights import weights_path
from raptor.teacher.backbone import Backbone

from stand_ins import run

NANO, MINI = "vit_nano_patch4_reg4_24", "vit_mini_patch4_reg4_24"
DINOV2, DEIT = "vit_small_patch14_reg4_dinov2", "deit_tiny_patch16_224"
TASKS = ["classification", "segmentation", "depth", "classification,segmentation", "classification,segmentation,depth"]


def write_images(folder, count=60, splits=("",)):
    for split in splits:
        for i in range(count):
            path = folder/split/"ab"[i % 2]/f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (24, 24, 3), np.uint8)).save(path)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RAPTOR_HOME", str(tmp_path/"home"))
    monkeypatch.setenv("RAPTOR_DATA", str(tmp_path/"data"))
    (tmp_path/"mine").mkdir()
    monkeypatch.chdir(tmp_path/"mine")
    return tmp_path


# ---- raptor new

@pytest.mark.parametrize("model, data, tasks", [
    *((MINI, "digit_scenes", tasks) for tasks in (None, *TASKS)), (NANO, "digits", None),
    *((model, "photos", tasks) for model in (DINOV2, DEIT) for tasks in (None, "classification", "none")),
    *((DINOV2, "imagenet", tasks) for tasks in TASKS), ("facebook/dinov2-base", "cifar10", None), ("someone/their-vit", "imagenet", "classification")])
def test_a_new_preset_passes_the_dry_run(home, capsys, model, data, tasks):
    write_images(home/"mine"/"photos")
    other = ["--from", "dinov2_vits14"] if data == "imagenet" else [] # its data for the other tasks
    asked = ["--tasks", tasks] if tasks else []
    status, out, err = run(capsys, "new", "birds", "--model", model, "--data", data, *asked, *other)
    assert (status, err) == (0, []), err
    assert "raptor reproduce --preset birds.yaml --dry-run" in out
    text, preset = Path("birds.yaml").read_text(), load_preset("birds.yaml")
    schema = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert Path(schema) == paper_root()/"presets"/"preset.schema.json"
    assert [*preset.probes] == {None: TASKS[-1].split(",") if data == "digit_scenes" else ["classification"], "none": []}.get(tasks, (tasks or "").split(","))
    status, out, err = run(capsys, "reproduce", "--preset", "birds.yaml", "--dry-run")
    assert (status, err) == (0, []) and "birds: " in out
    keys = [line for line in text.splitlines() if line[:1] not in (" ", "#", "")]
    assert all("#" in line or ":" == line[-1] for line in keys), "each section says what it is, or its keys do"
    assert not (home/"home").exists()


def test_what_is_known_of_model_and_data_is_in_the_preset(home, capsys):
    write_images(home/"photos", 40, ["train", "val"])
    assert run(capsys, "new", "birds", "--model", DINOV2, "--data", "../photos", "--k", "2,12")[0] == 0
    preset = load_preset("birds.yaml")
    assert (preset.data.name, preset.data.test_split, preset.data.size) == ("folder:../photos", "val", 224)
    assert preset.teacher.pretrained and preset.teacher.img_size == 224 and preset.phases.ks == [2, 12]
    assert preset.stage2["batch_size"] == 32 and preset.stage2["steps"] == 5000 and preset.phases.images == 40
    assert (preset.block.start, preset.block.rank, preset.stage1, preset.replicas) == ("mean", 32, None, 1)
    assert preset.probes["classification"].train["batch_size"] == 2 and not preset.probes["classification"].official_head


def test_the_settings_of_a_named_preset_are_taken_as_they_are(home, capsys):
    assert run(capsys, "new", "big", "--model", DINOV2, "--data", "imagenet", "--from", "dinov2_vits14", "--tasks", TASKS[-1])[0] == 0
    new, old = load_preset("big.yaml"), load_preset("dinov2_vits14")
    for key in ("stage1", "stage2", "last_block", "block", "replicas"): assert getattr(new, key) == getattr(old, key)
    assert new.teacher.head == old.teacher.head and new.phases.ks == old.phases.ks
    for task in new.probes:
        for key in ("train", "head", "seed", "img_size", "official_head"): assert getattr(new.probes[task], key) == getattr(old.probes[task], key)
        assert new.probes[task].data.name == old.probes[task].data.name


def test_a_file_of_weights_keeps_its_resolution_and_moves_with_the_preset(home, capsys):
    Backbone.create(NANO, pretrained=False, img_size=32).save("vit.safetensors")
    write_images(Path("photos"))
    assert run(capsys, "new", "birds", "--model", "vit.safetensors", "--data", "photos", "--k", "2")[0] == 0
    (home/"mine").rename(home/"moved")
    preset = load_preset(home/"moved"/"birds.yaml")
    assert (preset.teacher.name, preset.teacher.weights, preset.teacher.img_size, preset.data.name) == (NANO, "vit.safetensors", 32, "folder:photos")
    check_study(Study.open(preset), complete=False)


def test_a_tiny_one_finds_its_phases(home):
    "In processes of their own, as a user calls them."
    def raptor(*argv): return subprocess.run([sys.executable, "-m", "raptor", *argv], capture_output=True, text=True, timeout=800)
    made = raptor("new", "tiny", "--model", NANO, "--data", "digit_scenes", "--from", "smoke", "--k", "2,3")
    assert made.returncode == 0, made.stderr
    done = raptor("reproduce", "--preset", "tiny.yaml", "--only", "find_phases")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(read_phases(home/"home"/"tiny"/"phases"/"phases.json")) == [2, 3]


@pytest.mark.parametrize("argv, words", [
    (["--model", "vit_nano_patch4_reg4_25"], "did you mean 'vit_nano_patch4_reg4_24'"),
    (["--model", "resnet18"], "cannot be a backbone"),
    (["--model", "nowhere.pth"], "do not exist"), (["--model", "nowhere.safetensors"], "does not exist"), (["--model", "there.pth"], "name it with --arch"),
    (["--data", "nowhere/"], "nowhere/ is neither a folder nor a dataset"),
    (["--data", "digits_scenes"], "did you mean 'digit_scenes'?"), (["--data", "ade20k"], "ade20k has no classes"),
    (["--data", "loose"], "there are no class folders in"),
    (["--data", "photos", "--tasks", "depth"], "no labels for depth, only for classification; leave it out"),
    (["--tasks", "clasification"], "unknown task 'clasification'; did you mean 'classification'"),
    (["--tasks", "none"], "give at least one"), # it is to be trained
    (["--k", "2,7"], "has 6 layers, which cannot be divided into k = 7 phases"),
    (["--k", "two"], "--k 'two' is no list of numbers"), (["--k", "0"], "phases: ks[0] is 0"), (["--k", "2,2"], "and each once"),
    (["--from", "digit"], "unknown preset 'digit'; did you mean 'digits'"),
    (["--module", "../own"], "'../own' is no module's name"), (["--module", "own"], "there is no own.py in"),
    (["--out", "there.yaml"], "there.yaml exists"), (["--out", "photos/a/0.png"], "is not a folder that can be written to"),
    (["--out", "/proc/new.yaml"], "cannot write /proc/new.yaml"), (["--out", ".hidden.yaml"], "'.hidden' cannot be the name"),
    (["NAME", "digits"], "is the name of a preset that ships"), (["NAME", "a/b"], "'a/b' cannot be the name"), (["NAME", "there"], "there.yaml exists")])
def test_bad_input_is_one_sentence_and_nothing_is_written(home, capsys, argv, words):
    write_images(Path("photos"))
    Path("loose").mkdir(); Image.new("RGB", (24, 24)).save("loose/0.png")
    Path("there.yaml").write_text("precious"); Path("there.pth").write_text("no weights")
    before = sorted(home.rglob("*"))
    given = {"NAME": "birds", "--model": NANO, "--data": "digit_scenes"} | dict(zip(argv[::2], argv[1::2]))
    status, out, err = run(capsys, "new", given.pop("NAME"), *(word for option in given.items() for word in option))
    assert status == 1 and len(err) == 1 and err[0].startswith("raptor: ") and words in err[0], err
    assert sorted(home.rglob("*")) == before and Path("there.yaml").read_text() == "precious" and not out


# ---- presets NAME

def test_a_preset_that_ships_is_printed_with_its_comments(home, capsys):
    status, out, _ = run(capsys, "presets", "digits")
    assert status == 0 and out == preset_path("digits").read_text()
    status, _, err = run(capsys, "presets", "digit")
    assert status == 1 and "did you mean 'digits'" in err[0]


# ---- relative paths

def written(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder/"mine.yaml"
    path.write_text(yaml.safe_dump({"base": "smoke", **changes}))
    return path


@pytest.mark.parametrize("beside, below, expected", [
    (True, False, "mine"), (False, True, "data"), (True, True, "mine"), (False, False, "mine")])
def test_a_relative_path_starts_at_the_preset_or_where_there_is_something(home, beside, below, expected):
    for there, root in ((beside, "mine"), (below, "data")):
        if there: (home/root/"x").mkdir(parents=True); (home/root/"x"/"w.pth").write_bytes(b"")
    teacher = {"name": NANO, "weights": "x/w.pth", "head": "x/w.pth"}
    preset = load_preset(written(home/"mine", data={"name": "folder:x"}, teacher=teacher, extra_models={"e": teacher}))
    assert preset.data.folder == home/expected/"x"
    for spec in preset.backbones.values(): assert weights_path(spec.weights, spec.beside) == home/expected/"x"/"w.pth"


def test_a_relative_path_in_a_base_starts_at_the_base(home):
    written(home/"lab", data={"name": "folder:photos"})
    preset = load_preset(written(home/"mine", base="../lab/mine.yaml", probes={t: {"data": {"name": "folder:own"}, "train": {}} for t in ("classification", "depth")}))
    assert preset.data.folder == home/"mine"/".."/"lab"/"photos"
    assert preset.probes["classification"].data.folder == home/"mine"/"own"


def test_names_and_absolute_paths_stay_what_they_were(home):
    preset = load_preset(written(home/"mine", data={"name": "folder:/photos"}, teacher={"name": NANO, "weights": "https://example.org/w.pth"}))
    assert preset.data.folder == Path("/photos") and load_preset("cifar10").data.folder == home/"data"/"cifar10"
    assert weights_path(preset.teacher.weights, preset.teacher.beside) == home/"data"/"weights"/"w.pth"
    assert load_preset("smoke").data.folder is None


def test_a_study_that_is_moved_is_the_same_study(home):
    def specs():
        study = Study.open(written(home/"mine", data={"name": "folder:photos"}, teacher={"name": NANO, "weights": "w.pth"}))
        return [spec_of(study, step) for step in first_steps(study)]
    (home/"mine"/"w.pth").write_bytes(b"weights")
    first = specs()
    (home/"mine").rename(home/"moved"); (home/"moved"/"mine.yaml").unlink(); (home/"moved").rename(home/"mine")
    assert specs() == first
    (home/"mine"/"w.pth").write_bytes(b"others")
    assert specs() != first


# ---- all faults at once

@pytest.mark.parametrize("change, said", [
    ({"replica": 2, "stage2": {"step": 5, "lr": 0}, "phases": {"ks": ["a"]}},
     "4 faults: stage2: unknown key 'step' (did you mean 'steps'?); unknown key 'replica' (did you mean 'replicas'?); "
     "phases: ks[0] is 'a' (it must be a valid integer); stage2: lr is 0 (it must be greater than 0)."),
    ({"data": {}, "probes": {"depth": {"data": {"name": "digits"}}}},
     "2 faults: data: missing key 'name' (add it); probes: depth: missing key 'train' (add it)."),
    ({"data": {"nam": "digits", "limit": "all"}},
     "2 faults: data: unknown key 'nam' (did you mean 'name'?); data: limit is 'all' (it must be a valid integer)."),
    ({"probes": {"dept": {"dat": {}}}}, "probes: unknown key 'dept'; did you mean 'depth'?"), # what is below it is told when it is known
    ({"block": {"rank": {"qkv": 4}, "layer_scale": -1}},
     "2 faults: block: layer_scale is -1 (it must be greater than or equal to 0); block: rank: unknown key 'qkv' (did you mean 'qkv.weight'?)."),
    ({"data": {"name": "digits", "size": "big"}}, "data: size is 'big'; it must be a valid integer."),
])
def test_all_faults_of_a_preset_are_told_at_once(home, change, said):
    with pytest.raises(RaptorError) as e: load_preset(written(home/"mine", **change))
    assert str(e.value) == f"preset mine.yaml: {said}"


def test_faults_of_several_files_are_told_with_their_files(home):
    written(home/"lab", stage2={"step": 5})
    with pytest.raises(RaptorError) as e: load_preset(written(home/"mine", base="../lab/mine.yaml", replica=2, stage1={"step": 5}))
    assert str(e.value).startswith("preset mine.yaml: 3 faults: ") # the files have one name
    (home/"lab"/"mine.yaml").rename(home/"lab"/"theirs.yaml")
    with pytest.raises(RaptorError, match="mine.yaml: 3 faults: stage1: unknown key 'step' .*; preset theirs.yaml: stage2: unknown key 'step' .*; unknown key 'replica' "):
        load_preset(written(home/"mine", base="../lab/theirs.yaml", replica=2, stage1={"step": 5}))


# ---- modules

OWN = """
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
@register_model
def {name}(pretrained=False, **kwargs):
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"): kwargs.pop(key, None)
    return VisionTransformer(**{{"img_size": 24, "patch_size": 4, "depth": 5, "embed_dim": 32, "num_heads": 2, **kwargs}})
"""


@pytest.mark.parametrize("files, module", [
    ({"{m}.py": OWN}, "{m}"), ({"{m}/__init__.py": "from . import vits", "{m}/vits.py": OWN}, "{m}"),
    ({"{m}/__init__.py": "", "{m}/vits.py": OWN}, "{m}.vits"), ({"../path/{m}.py": OWN}, "{m}")])
def test_a_model_of_a_module_is_a_teacher(home, monkeypatch, request, files, module):
    "With arguments of timm, too; every file of the module is part of what a step starts from."
    name = f"own{abs(hash(request.node.name))}"
    monkeypatch.syspath_prepend(home/"path")
    for file, text in files.items():
        path = home/"mine"/file.format(m=name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(name=f"vit_{name}"))
    teacher = {"name": f"vit_{name}", "random": True, "timm": {"depth": 4}}
    path = written(home/"mine", module=module.format(m=name), teacher=teacher)
    study = Study.open(path)
    assert check_models(study.preset)["teacher", "data"] == (4, 32, (24, 24)) and study.teacher().depth == 4
    before = [spec_of(study, s) for s in first_steps(study)]
    plain = Study.open(load_preset(path).model_copy(update={"module": None}))
    assert [spec_of(plain, s) for s in first_steps(plain)] != before
    file = next(reversed(module_files(study.preset).values()))
    file.write_text(file.read_text() + "\n# another\n")
    assert not {*before} & {spec_of(study, s) for s in first_steps(study)}, "all steps are other steps now"
    with pytest.raises(RaptorError, match="has changed since it was imported; start a new process"): use_module(study.preset)


@pytest.mark.parametrize("module, text, words", [
    ("absent", None, "there is no absent.py in"), ("../own", None, "'../own' is no module's name"), ("own.py.", None, "is no module's name"),
    ("", None, "is no module's name"), (3, None, "module is 3; it must be a valid string"), ("a b", None, "is no module's name"),
    ("raises_a", "1/0", "raises_a cannot be imported from {home}/mine/raises_a.py (ZeroDivisionError: division by zero); correct it."),
    ("raises_b", "import sys; sys.exit(3)", "(SystemExit: 3)"), ("raises_c", "def f(:", "(SyntaxError: invalid syntax"),
    ("raises_d", "import nowhere_at_all", "(ModuleNotFoundError: No module named 'nowhere_at_all')"),
    ("raises_e", "raise ValueError('two\\nlines')", "(ValueError: two lines)"), ("raises_f.sub", "", "is not a package"),
    ("json", "", "Python has a module json already, which is not {home}/mine/json.py; rename this.")])
def test_a_module_that_cannot_be_used_is_one_sentence(home, capsys, module, text, words):
    if text is not None: Path(f"{module.partition('.')[0]}.py").write_text(text)
    written(home/"mine", module=module)
    status, _, err = run(capsys, "reproduce", "--preset", "mine.yaml", "--dry-run")
    assert status == 1 and len(err) == 1 and words.format(home=home) in err[0], err
    assert not (home/"home").exists() and not {"raises_a", "raises_e"} & sys.modules.keys()


def test_a_study_with_a_module_and_a_folder_beside_it_runs_from_anywhere(home, monkeypatch):
    "Every process of it imports the module."
    write_images(Path("photos"))
    Path("my_vits.py").write_text(OWN.format(name="vit_of_my_own"))
    def raptor(*argv): return subprocess.run([sys.executable, "-m", "raptor", *argv], capture_output=True, text=True, timeout=800)
    made = raptor("new", "own", "--model", "vit_of_my_own", "--module", "my_vits", "--data", "photos", "--random", "--k", "2")
    assert made.returncode == 0 and "module: my_vits # " in Path("own.yaml").read_text(), made.stderr
    monkeypatch.chdir(home)
    done = raptor("reproduce", "--preset", "mine/own.yaml", "--only", "find_phases")
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_phases(home/"home"/"own"/"phases"/"phases.json")[2][-1] == 5
