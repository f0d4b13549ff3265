"""The paper's own scale without its data: exact recipes and seeds, the formats in miniature, the whole graph on random weights."""
import json, os, re, shutil, signal, subprocess, sys, time

import nbformat
import pandas as pd
import pytest
import torch
import yaml
from safetensors import safe_open

import paper_files
from raptor.model.block import RecurrentBlock, block_flops, load_block
from raptor.core import RaptorError, paper_root
from raptor.data.load import DATASETS, load_dataset
from raptor.model.raptor import Raptor
from raptor.pipeline.needs import check_study, costs, data_uses, profile_path, run_needs
from raptor.study.controls import all_runs
from raptor.study.presets import load_preset, preset_path
from raptor.study.study import Study
from raptor.train.stages import TrainConfig


PATIENCE = 600 # seconds: a limit for what hangs, not for what is slow on a busy machine


def raptor(*argv, home, data, **kwargs):
    env = {**os.environ, "RAPTOR_HOME": str(home), "RAPTOR_DATA": str(data), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "raptor", *map(str, argv)], env=env, capture_output=True, text=True, timeout=PATIENCE, **kwargs)


@pytest.fixture(scope="module")
def data(tmp_path_factory): return paper_files.make(tmp_path_factory.mktemp("data"))


@pytest.fixture
def at(data, tmp_path, monkeypatch):
    "A home of one's own, and the small data."
    monkeypatch.setenv("RAPTOR_DATA", str(data)); monkeypatch.setenv("RAPTOR_HOME", str(tmp_path/"home"))
    return tmp_path


def changed(at, preset="dinov2_reduced", name="small", **changes):
    "A preset with other values, as a file."
    values = yaml.safe_load(preset_path(preset).read_text())
    for path, value in changes.items():
        *outer, last = path.split("__")
        place = values
        for key in outer: place = place[key]
        place[last] = value
    (at/f"{name}.yaml").write_text(yaml.safe_dump(values))
    return at/f"{name}.yaml"


def run_cells(name, **parameters):
    "Execute the cells of a notebook of the paper in this process: what papermill does, without a kernel."
    space = {"__name__": "__main__"}
    for cell in nbformat.read(paper_root()/f"{name}.ipynb", 4).cells:
        if cell.cell_type != "code": continue
        exec(compile(cell.source, name, "exec"), space)
        if "parameters" in cell.metadata.get("tags", []):
            assert set(parameters) <= set(space), f"{name} has no parameter {set(parameters) - set(space)}"
            space.update(parameters)
    return space


def test_tables_show_the_best_epoch_beside_the_published_one_and_the_last_in_a_column_of_its_own(at):
    "Two replicas of one number of blocks; the paper reports the best epoch, and its R2 is the pooled one."
    study = Study.open(changed(at, phases__ks=[2], phases__ends={2: [7, 12]}, extra_models={}))
    def write(path, rows):
        (study.folder/path).parent.mkdir(parents=True)
        pd.DataFrame(rows).to_csv(study.folder/path, index=False)
    for model, best, last in (("teacher", 0.8, 0.7), ("k2-r0", 0.6, 0.4), ("k2-r1", 0.7, 0.5)):
        for task, metric in (("classification", "top1"), ("segmentation", "miou"), ("depth", "rmse")):
            write(f"probes/{model}-{task}/result.csv", [dict(model=model, task=task, metric=metric, best=best, last=last, seed=1, data="d")])
    for r in (0, 1):
        values = {"r2_mean": 0.5 + r/10, "r2_pooled": 0.9 + r/20, "r2": 0.1}
        write(f"raptors/k2-r{r}/result.csv", [dict(measure=m, value=v, stage=2, k=2, replica=r, seed=r) for m, v in values.items()])
    shown = run_cells("tab_probes", preset=str(study.origin))["shown"]
    table = study.load_tables("results/tab_probes.csv").set_index(["row", "metric"])
    expected = {"mean": 0.65, "std": 0.005**0.5, "last": 0.45, "last_std": 0.005**0.5, "share": 0.65/0.8}
    assert table.loc[("Raptor k=2", "top1"), list(expected)].tolist() == pytest.approx(list(expected.values()))
    assert table.loc[("Raptor k=2", "rmse"), "share"] == pytest.approx(0.8/0.65)
    cells = {source.split(": ")[1]: shown.loc["Raptor k=2", source]["top-1, %"] for source in shown.columns.unique(0)}
    assert cells == {"DINOv2 ViT-B": "81.2 ± 0.2 (96.1%)", "small": "65.0 ± 7.1 (81.2%)", "small, last epoch": "45.0 ± 7.1 (64.3%)"}
    figure = run_cells("fig_accuracy_r2", preset=str(study.origin))
    frame = study.load_tables("results/fig_accuracy_r2.csv")
    assert frame[["accuracy", "accuracy_last", "r2", "r2_pooled", "teacher", "teacher_last"]].values.tolist() == [
        pytest.approx([0.6, 0.4, 0.5, 0.9, 0.8, 0.7]), pytest.approx([0.7, 0.5, 0.6, 0.95, 0.8, 0.7])]
    assert figure["teacher"] == 0.8


# the presets ----------------------------------------------------------------------------------------------------------
def test_the_dry_run_lists_the_papers_sixty_runs(tmp_path):
    said = raptor("reproduce", "--preset", "dinov2_vitb14", "--dry-run", home=tmp_path/"home", data=tmp_path)
    assert said.returncode == 0 and not (tmp_path/"home").exists()
    runs = [re.match(r"(block|raptor|probe) +(\S+) .*seed=(\d+)", line).groups() for line in said.stdout.splitlines() if line.startswith(("block", "raptor", "probe"))]
    seeds = {kind: [int(s) for k, _, s in runs if k == kind] for kind in ("block", "raptor", "probe")}
    assert seeds["block"] == [*range(100, 118)]
    assert sorted(seeds["raptor"]) == [1001, 1002, 1003, 1101, 1102, 1103, 1201, 1202, 1203]
    assert seeds["probe"] == [*range(4000, 4011), *range(5000, 5011), *range(6000, 6011)]
    assert [name for k, name, s in runs if k == "block" and int(s) < 106] == [f"{span}-r0" for span in ("0-7", "7-10", "0-4", "4-7", "10-12", "7-12")]
    assert "18 block runs, 9 raptor runs, 33 probe runs; disk_gb: 5, gpu_hours: 112" in said.stdout
    for folder in ("imagenet", "ADEChallengeData2016", "nyuv2"): assert f"{tmp_path/folder} (not found)" in said.stdout


def test_the_recipe_is_the_papers():
    study = Study.open("dinov2_vitb14")
    own = dict(log_every=100, eval_every=15_625, precision="bf16", stale="replace")
    assert study.stage1_config((0, 7), 100) == TrainConfig(seed=100, loss="mse", **own), "the defaults of TrainConfig are the paper's stage 1"
    assert study.stage1_config((7, 12), 105) == TrainConfig(seed=105, loss="weighted", token_weights=(0.34, 0.33, 0.33), **own)
    assert study.stage2_config(1001) == TrainConfig(seed=1001, loss="weighted", token_weights=(0.45, 0.10, 0.45), forcing="free", **own)
    assert TrainConfig().steps == 20 * 15_625, "an epoch is 15,625 steps, whatever the number of images"
    expected = {"classification": (1e-4, 1e-2, 1.0, 100, "cosine", 15, 512), "segmentation": (1e-3, 1e-2, 1.0, 100, "cosine", 10, 32), "depth": (1e-3, 1e-3, None, 0, "constant", 25, 128)}
    for task, values in expected.items():
        c = study.probe_config(task, 1)
        assert (c.lr, c.weight_decay, c.clip, c.warmup, c.schedule, c.epochs, c.batch_size) == values and c.augment and c.warmup_start == 0.01
        filled = c.for_data(50_000)
        assert filled.min_lr == pytest.approx(0.01 * c.lr) and filled.steps == c.epochs * (50_000 // c.batch_size)
    assert study.preset.activations.source == "live" and study.preset.activations.precision == "bf16"


@pytest.mark.parametrize("name", ["dinov2_vitb14", "dinov2_vits14"])
def test_all_of_imagenet_is_behind_the_states_and_the_header_says_what_precision(name):
    "The authors iterate all 1,281,167 images; a limit of a million would leave out 22 %."
    study = Study.open(name)
    assert study.preset.data.limit is None and all(probe.data.limit is None for probe in study.preset.probes.values())
    assert study.preset.stage1["steps"] == study.preset.stage2["steps"] == 312_500
    header = [line for line in preset_path(name).read_text().splitlines() if line.startswith("#")]
    assert any("Precision:" in line and "float32" in line and "fp16" in line and "bf16" in line for line in header)


@pytest.mark.parametrize("name,width,hours", [("dinov2_vitb14", 768, 112), ("dinov2_vits14", 384, 29)])
def test_gpu_hours_follow_from_the_stated_formula(name, width, hours):
    def teacher(n, d=width): return n * (24 * d * d + 4 * n * d)
    def block(n): return n * (32 * width**2 + 4 * n * width)
    assert block(261) == pytest.approx(block_flops(RecurrentBlock(width, width // 64).config, 261), rel=0.02)
    images = 312_500 * 64
    total = 3 * images * (52 * teacher(261) + 24 * 3.75 * block(261)) + 9 * images * (12 * teacher(261) + 36 * block(261))
    for n, seen in ((261, 15 * 1_331_167), (1374, 10 * 22_210), (1615, 25 * 51_342)):
        total += seen * 12 * (9 * block(n) + teacher(n) + (teacher(n, 384) if width == 768 else 0))
    assert load_preset(name).resources["gpu_hours"] == hours == pytest.approx(total / 250e12 / 3600, rel=0.03)


def test_every_stage_of_the_paper_asks_for_a_card_memory_and_time():
    for name in ("dinov2_vitb14", "dinov2_vits14"):
        for stage in ("find_phases", "train_block", "train_raptor", "train_probe"): assert set(run_needs(load_preset(name), stage)) == {"gpu", "mem_mb", "runtime"}
        assert "{" not in costs(load_preset(name))


def test_phases_of_the_smaller_model_are_found_not_given():
    preset = load_preset("dinov2_vits14")
    assert Study.open(preset).known_ends is None and all_runs(preset, {2: (7, 12)})["block", "0-7-r0"].params["seed"] == 100


# what the images are like -------------------------------------------------------------------------------------------
def test_images_are_normalised_for_the_model_that_sees_them(at):
    clip = (0.48145466, 0.4578275, 0.40821073)
    study = Study.open(changed(at, teacher__name="vit_base_patch16_clip_224.openai"))
    assert study.normalisation()["mean"] == clip and study.dataset("test", "depth", study.preset.probes["depth"].data).mean == clip
    assert study.dataset("train", model="without_registers").mean == (0.485, 0.456, 0.406), "an extra model has its own"
    for name in ("digits", "cifar10"): # a teacher that is trained here takes the data's
        own = DATASETS[load_preset(name).data.name]
        assert Study.open(name).normalisation() == {"mean": own.mean, "std": own.std}


def test_unreadable_images_may_be_skipped_by_choice(at, tmp_path, monkeypatch):
    root = paper_files.make(tmp_path/"broken"); monkeypatch.setenv("RAPTOR_DATA", str(root))
    study = Study.open(changed(at))
    first = study.dataset("test").files(0)[0]; first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(RaptorError, match=str(first)): check_study(study)
    values = yaml.safe_load((at/"small.yaml").read_text())
    values["data"]["on_error"] = values["probes"]["classification"]["data"]["on_error"] = "skip"; (at/"small.yaml").write_text(yaml.safe_dump(values))
    with pytest.warns(UserWarning, match="left out 1 unreadable"): assert len(Study.open(at/"small.yaml").dataset("test").skipped) == 1


@pytest.mark.parametrize("row", ["../../../etc/passwd,data/a.png", "/etc/passwd,data/a.png", "data/../../a.jpg,data/a.png"])
def test_a_list_that_leads_out_of_its_folder_is_refused(data, tmp_path, row):
    folder = tmp_path/"nyuv2"/"data"; folder.mkdir(parents=True)
    (folder/"nyu2_test.csv").write_text(row + "\n")
    for on_error in ("raise", "skip"):
        with pytest.raises(RaptorError, match=r"line 1 names .* which leaves"): load_dataset("nyuv2", "val", "depth", tmp_path, on_error=on_error)


# told before any work -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gone,words", [("imagenet/val", "imagenet val: there are no class folders"), ("ADEChallengeData2016/annotations/training", "there is no folder"), ("nyuv2/data/nyu2_test.csv", "there is no")])
def test_a_missing_part_is_named_before_any_work(data, tmp_path, gone, words):
    shutil.copytree(data, tmp_path/"data", symlinks=True)
    (tmp_path/"data"/gone).rename(tmp_path/"elsewhere")
    said = raptor("reproduce", "--preset", "dinov2_reduced", home=tmp_path/"home", data=tmp_path/"data")
    assert said.returncode == 1 and words in said.stderr and str(tmp_path/"data"/gone) in said.stderr and "Traceback" not in said.stderr
    assert not list((tmp_path/"home").rglob("*.ipynb"))


def test_a_missing_weight_file_is_named_before_any_work(at):
    preset = load_preset(changed(at, teacher__random=False, teacher__weights="nowhere/model.safetensors"))
    with pytest.raises(RaptorError, match=f"teacher: there is no file {at}/nowhere/model.safetensors;"): check_study(Study.open(preset))
    preset = load_preset(changed(at, teacher__head="https://localhost:1/head.pth"))
    with pytest.raises(RaptorError, match="could not be downloaded .* put it at .*weights/head.pth"): check_study(Study.open(preset))


def test_every_use_of_data_is_opened(at):
    check_study(Study.open("dinov2_reduced"))
    assert [(u[0], u[2]) for u in data_uses(load_preset("dinov2_reduced"))] == [(p, s) for p in ("trajectories", "classification", "segmentation", "depth") for s in ("train", "test")]


# random weights and official heads ------------------------------------------------------------------------------------
def test_random_weights_are_those_of_the_study_at_every_size(at):
    study = Study.open("dinov2_reduced")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two, large = study.teacher(), Study.open("dinov2_reduced").teacher(), study.teacher(img_size=[70, 84])
    assert one.fingerprint == two.fingerprint and torch.equal(torch.get_rng_state(), before)
    assert large.grid == (5, 6) and not large.model.pos_embed.requires_grad
    for name, value in one.model.blocks.state_dict().items(): assert torch.equal(value, large.model.blocks.state_dict()[name])


def test_each_model_starts_from_the_head_of_its_own_backbone(at):
    weights = {n: torch.randn(8, 768) for n in ("teacher", "extra")}
    for n, w in weights.items(): torch.save({"weight": w, "bias": torch.zeros(8)}, at/f"{n}.pth")
    path = changed(at, teacher__head=str(at/"teacher.pth"), extra_models__without_registers={"name": "vit_small_patch14_dinov2", "random": True, "img_size": 56, "head": str(at/"extra.pth")})
    study = Study.open(path)
    assert torch.equal(study.official_head("k3-r0")[0], weights["teacher"]) and torch.equal(study.official_head("without_registers")[0], weights["extra"])
    check_study(study)


# the graph ------------------------------------------------------------------------------------------------------------
def test_the_whole_graph_in_the_papers_formats(at):
    "All stages, runs and main items of one k at 28 pixels, by the notebooks' own cells; with an official head, and validation on the way."
    torch.save({"weight": torch.randn(8, 768) * 0.01, "bias": torch.zeros(8)}, at/"head.pth")
    path = changed(at, teacher={"name": "vit_small_patch14_reg4_dinov2", "random": True, "img_size": 28, "head": str(at/"head.pth")}, extra_models={}, data__limit=32, data__test_limit=8, data__size=28, phases__images=16,
                   phases__ks=[2], phases__ends={2: [7, 12]}, stage1__steps=4, stage2__steps=4, stage1__eval_every=2, stage2__eval_every=2, stage1__warmup=1, stage2__warmup=1, stage1__batch_size=4, stage2__batch_size=4,
                   probes__classification__data={"name": "imagenet", "test_split": "val", "size": 28, "limit": 32, "test_limit": 8}, probes__classification__official_head=True,
                   probes__classification__train__epochs=1)
    study = Study.open(path)
    run_cells("find_phases", preset=str(path))
    for run in all_runs(study.preset, study.ends).values(): run_cells(f"train_{run.kind}", preset=str(path), **run.params)
    for item in ("tab_probes", "fig_accuracy_r2", "tab_segmentations", "fig_similarity"): run_cells(item, preset=str(path))
    table = study.load_tables("results/tab_probes.csv")
    assert set(table["row"]) == {"Teacher", "Raptor k=2"} and set(table.metric) == {"top1", "miou", "rmse"} and table["mean"].notna().all()
    history = study.load_tables("blocks/0-7-r0/history.csv").dropna(subset=["own_top1"])
    assert history.step.tolist() == [2, 4] and history.r2_end.lt(1).all(), "validated on the way: the teacher's remaining layers, its official head, R2 of the end state"


def test_cifar10_teacher_is_trained_on_its_one_task(at):
    path = changed(at, "cifar10", teacher={"name": "vit_small_patch4_reg4_32", "drop_path": 0.1, "train": {"steps": 3, "batch_size": 16, "warmup": 1, "log_every": 1}}, data__limit=64, data__test_limit=32)
    study = Study.open(path)
    assert study.teacher_task == "classification"
    run_cells("train_teacher", preset=str(path))
    result = study.load_tables("teacher/result.csv")
    assert 0 <= result.top1[0] <= 1 and result.drop_path[0] == 0.1 and "miou" not in result
    assert set(study.teacher_heads(study.teacher())) == {"classification"} and study.dataset("train").mean == (0.4914, 0.4822, 0.4465)


# the command line -----------------------------------------------------------------------------------------------------
def test_cache_is_estimated_from_a_sample_then_written(at, data):
    path = changed(at, data__limit=24)
    said = raptor("cache", "--estimate", "--sample", "8", "--preset", path, home=at/"home", data=data)
    size = 24 * 13 * 21 * 384 * 2
    assert said.returncode == 0 and f"24 images: {size/1e9:,.3f} GB in 16 bits" in said.stdout and "(from 8 images)" in said.stdout and not (at/"home"/"small").exists()
    pytest.importorskip("zarr")
    assert raptor("cache", "--sample", "8", "--preset", path, home=at/"home", data=data).returncode == 0
    study = Study.open(changed(at, data__limit=24, activations__source="cached"))
    files = sum(p.stat().st_size for p in (study.folder/"activations"/"states").rglob("*") if p.is_file())
    assert size <= files < 1.1 * size and study.source("train").num_images == 24


class Block(torch.nn.Module):
    "A recurrent block as the authors' code pickles it: attention as nn.MultiheadAttention."
    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.norm1, self.attn, self.norm2 = torch.nn.LayerNorm(dim), torch.nn.MultiheadAttention(dim, heads, batch_first=True), torch.nn.LayerNorm(dim)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(dim, 4*dim), torch.nn.GELU(), torch.nn.Linear(4*dim, dim))
        self.gamma1, self.gamma2 = torch.nn.Parameter(torch.ones(dim)), torch.nn.Parameter(torch.ones(dim))


def test_import_from_the_command_line(tmp_path):
    torch.save(Block(), tmp_path/"block.pth")
    torch.save(torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([Block(), Block()])}), tmp_path/"raptor.pth")
    done = raptor("import", tmp_path/"raptor.pth", tmp_path/"out", "--depth", "12", "--ends", "7,12", home=tmp_path, data=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Raptor.from_pretrained(tmp_path/"out").phases.ends == (7, 12) and (tmp_path/"out"/"README.md").exists()
    assert "--span START-END" in raptor("import", tmp_path/"block.pth", tmp_path/"one", home=tmp_path, data=tmp_path).stderr
    assert raptor("import", tmp_path/"block.pth", tmp_path/"one", "--span", "7-10", home=tmp_path, data=tmp_path).returncode == 0
    assert tuple(load_block(tmp_path/"one"/"block.safetensors")[1]) == (7, 10)


class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f"touch {self.path}",)


def test_import_runs_nothing(tmp_path):
    torch.save({"model": Evil(tmp_path/"ran")}, tmp_path/"evil.pth")
    said = raptor("import", tmp_path/"evil.pth", tmp_path/"out", home=tmp_path, data=tmp_path)
    assert said.returncode == 1 and "system" in said.stderr and not (tmp_path/"ran").exists() and not (tmp_path/"out").exists()


def test_a_preempted_notebook_saves_the_step_that_it_has_reached(at, data):
    "SIGTERM to the command between two regular checkpoints, of steps 100 and 200."
    path = changed(at, stage1__steps=100_000, stage1__checkpoint_every=100, stage1__eval_every=0, stage1__batch_size=4, data__limit=32, data__test_limit=4)
    argv = [sys.executable, "-m", "raptor", "run", "train_block", "--preset", str(path), "--param", "start=10", "--param", "end=12", "--param", "seed=104"]
    env = {**os.environ, "RAPTOR_HOME": str(at/"home"), "RAPTOR_DATA": str(data), "OMP_NUM_THREADS": "1"}
    (at/"home"/"small"/"phases").mkdir(parents=True)
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoint = at/"home"/"small"/"blocks"/"10-12-r0"/"checkpoint.safetensors"
    while not checkpoint.exists(): assert process.poll() is None, process.stderr.read(); time.sleep(0.05)
    time.sleep(0.1) # some more steps
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 1 and "has saved its checkpoint" in said, said[-800:]
    with safe_open(checkpoint, "pt") as f: assert 100 < json.loads(f.metadata()["raptor"])["step"] < 200


# many nodes -----------------------------------------------------------------------------------------------------------
def snakemake(at, data, *argv):
    "Snakemake's own view of the paper's preset, with the SLURM profile."
    pytest.importorskip("snakemake")
    (at/"study").mkdir()
    (at/"study.yaml").write_text(yaml.safe_dump({"preset": "dinov2_vitb14", "items": ["tab_probes"], "only": []}))
    command = [sys.executable, "-m", "snakemake", "--snakefile", paper_root()/"Snakefile", "--directory", at/"study", "--configfile", at/"study.yaml", "--dry-run", *argv]
    return subprocess.run(list(map(str, command)), env={**os.environ, "RAPTOR_HOME": str(at), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=PATIENCE)


def test_snakemake_accepts_the_slurm_profile(at, data):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    said = snakemake(at, data, "--profile", profile_path("slurm"), "--cores", 16, ".done/blocks/0-7-r0/train_block", ".done/raptors/k3-r0/train_raptor", ".done/probes/k3-r0-depth/train_probe")
    assert said.returncode == 0, said.stderr[-2000:]
    jobs = {m[1]: m[2] for m in re.finditer(r"^rule (\w+):\n((?: {4}.*\n)+)", said.stdout + said.stderr, re.MULTILINE)}
    for rule, memory, minutes in (("train_block", 48000, 1440), ("train_raptor", 48000, 1440), ("train_probe", 64000, 1440)):
        assert f"mem_mb={memory}" in jobs[rule] and f"runtime={minutes}" in jobs[rule] and "gpu=1" in jobs[rule] and "threads: 13" in jobs[rule], jobs[rule]


def test_the_profile_names_the_rules_there_are():
    profile = yaml.safe_load((paper_root()/"profiles"/"slurm"/"config.yaml").read_text())
    rules = set(re.findall(r"(?:rule|checkpoint) (\w+):", (paper_root()/"Snakefile").read_text()))
    assert profile["executor"] == "slurm" and set(profile["set-resources"]) | set(profile["set-threads"]) <= rules
    for needs in profile["set-resources"].values(): assert set(needs) == {"gpu", "mem_mb", "runtime"}
    assert profile_path("slurm").endswith("profiles/slurm") and profile_path("./slurm") == "./slurm"
