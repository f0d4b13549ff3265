"""`raptor distill MODEL IMAGES`: a Raptor and a student from a model and images, killed and resumed, refused, and used elsewhere."""
import json, os, signal, subprocess, sys, time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import raptor.pipeline.cli as cli
import raptor.pipeline.distill as command
from raptor import Backbone, LiveTrajectories, Raptor, RaptorBackbone, distill, fidelity, load_dataset, max_cut, layer_distance, seed_everything
from raptor.core import RaptorError
from raptor.data.base import ImageSubset
from raptor.pipeline.inputs import open_split
from raptor.pipeline.recipe import DistillConfig

NANO = "vit_nano_patch4_reg4_24"
ASKED = [NANO, "digits", "--random", "--k", 2, "--steps", 50, "--batch-size", 16, "--images", 200, "--held-out", 40]

@pytest.fixture(autouse=True)
def signals_stay_those_of_pytest(monkeypatch): monkeypatch.setattr(command, "stop_on_signals", lambda: None)

@pytest.fixture(scope="module")
def teacher():
    seed_everything(0)
    return Backbone.create(NANO, pretrained=False)

def call(*argv):
    "The exit status of a command in this process."
    try: cli.main(list(map(str, argv)))
    except SystemExit as e: return e.code or 0
    return 0

def run(capsys, *argv):
    "Exit status, standard output and the lines on standard error of `raptor distill`."
    status, said = call("distill", *argv), capsys.readouterr()
    return status, said.out, said.err.splitlines()

def contents(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}

def start_and_kill(folder, asked):
    "Start the command and kill it as soon as it has a checkpoint."
    argv, seen = [sys.executable, "-m", "raptor", "distill", *map(str, asked), "--out", str(folder)], folder/"training"/"all"/"checkpoint.safetensors"
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "RAPTOR_HOME": str(folder.parent)})
    while process.poll() is None and not seen.exists(): time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0].decode()
    assert process.returncode == -signal.SIGKILL, said
    return said

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A run that was not disturbed, in this process."
    folder = tmp_path_factory.mktemp("distill")/"out"
    with pytest.MonkeyPatch.context() as patch, open(folder.parent/"said", "w") as f:
        patch.setattr(command, "stop_on_signals", lambda: None)
        patch.setattr(sys, "stdout", f)
        assert call("distill", *ASKED, "--out", folder) == 0
    return SimpleNamespace(out=folder, said=(folder.parent/"said").read_text(), about=json.loads((folder/"distill.json").read_text()))


# ---- what is made

def test_a_killed_run_ends_bit_equal(made, tmp_path, capsys):
    start_and_kill(tmp_path/"out", ASKED)
    left = json.loads((tmp_path/"out"/"distill.json").read_text())
    assert "scores" not in left and not (tmp_path/"out"/"model.safetensors").exists()
    with pytest.raises(RaptorError, match="no finished run"): command.Distilled.open(tmp_path/"out")
    status, out, _ = run(capsys, *ASKED, "--out", tmp_path/"out")
    assert status == 0 and "done in" in out
    expected, found = contents(made.out), contents(tmp_path/"out")
    assert set(expected) == set(found) and [name for name in expected if expected[name] != found[name]] == []

def test_the_folder_holds_what_it_says(made):
    names = {"README.md", "config.json", "model.safetensors", "raptor/README.md", "raptor/config.json", "raptor/model.safetensors",
             "phases.json", "history.csv", "distill.json"}
    assert set(contents(made.out)) == names
    history, card = pd.read_csv(made.out/"history.csv"), (made.out/"README.md").read_text()
    assert history["step"].tolist() == list(range(1, 51)) and history["span"].unique().tolist() == ["0-6"]
    assert history["r2"].dropna().index.tolist() == [4, 9, 14, 19, 24, 29, 34, 39, 44, 49], "at every tenth"
    record = made.about["record"]
    assert (record["k"], record["steps"], record["seed"], record["held_out"], record["weights"]) == (2, 50, 0, 40, "random")
    for word in (NANO, "R2 of the states of 40 held-out images", record["code"], "RaptorBackbone.from_pretrained"): assert word in card
    assert str(made.out.parent) not in "".join(v.decode(errors="ignore") for v in contents(made.out).values()), "no path of this machine"

def test_the_phases_are_those_of_the_training_images(made, teacher):
    train = load_dataset("digits", "train", teacher=teacher, limit=200)
    distance = layer_distance(LiveTrajectories(teacher, train), limit=200, seed=0)
    about = json.loads((made.out/"phases.json").read_text())
    assert np.allclose(about["distance"], distance, atol=1e-12)
    assert about["ends"] == {str(k): list(max_cut(distance, k).ends) for k in range(1, 7)}
    assert Raptor.from_pretrained(made.out/"raptor").phases.ends == max_cut(distance, 2).ends

def test_fidelity_on_held_out_images_is_what_it_says_and_better_than_the_start(made, teacher):
    unseen = LiveTrajectories(teacher, load_dataset("digits", "test", teacher=teacher, limit=40))
    raptor = Raptor.from_pretrained(made.out/"raptor")
    found = fidelity(raptor, unseen)
    assert made.about["scores"]["r2"] == pytest.approx(found.compute(), abs=1e-6) and made.about["scores"]["r2_last"] == pytest.approx(found.per_layer()[-1], abs=1e-6)
    start = Raptor.from_teacher(teacher, raptor.phases, start="mean", rank=8)
    assert made.about["start"]["r2"] == pytest.approx(fidelity(start, unseen).compute(), abs=1e-6)
    assert made.about["scores"]["r2"] > made.about["start"]["r2"] + 0.01

def test_a_log_has_a_line_for_every_tenth(made):
    lines = [line for line in made.said.splitlines() if line.startswith("states 0-6, step")]
    assert [int(line.split()[3]) for line in lines] == list(range(5, 51, 5)) and all("loss 0." in line for line in lines)
    assert "RANDOM weights" in made.said and "200 images to train on, 40 held out" in made.said and "\r" not in made.said

FRESH = """
import sys, timm, torch
def refuse(*a, **k): raise SystemExit("the teacher was created")
timm.create_model = refuse
from raptor import RaptorBackbone
student = RaptorBackbone.from_pretrained(sys.argv[1])
torch.save(student.forward_features(torch.load(sys.argv[2])), sys.argv[3])
"""

@pytest.fixture(scope="module")
def images(teacher): return load_dataset("digits", "test", teacher=teacher, limit=5).get_batch(range(5))["image"]

@pytest.fixture(scope="module")
def features(made, teacher, images):
    with torch.no_grad(): return RaptorBackbone(teacher, Raptor.from_pretrained(made.out/"raptor")).eval().forward_features(images)

def test_it_loads_in_a_fresh_process_without_its_teacher(made, images, features, tmp_path):
    torch.save(images, tmp_path/"images.pt")
    argv = [sys.executable, "-c", FRESH, str(made.out), str(tmp_path/"images.pt"), str(tmp_path/"features.pt")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.allclose(torch.load(tmp_path/"features.pt"), features, atol=1e-5)

def test_it_runs_in_onnx_runtime(made, images, features, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    for name in ("onnx", "onnxscript"): pytest.importorskip(name)
    assert call("export", made.out, "--out", tmp_path/"student.onnx") == 0
    found, = runtime.InferenceSession(tmp_path/"student.onnx").run(None, {"images": images.numpy()})
    assert np.allclose(found, features, atol=1e-4)

def test_it_is_a_model_of_timm(made, images, features, tmp_path):
    import timm
    assert call("export", made.out, "--format", "timm", "--out", tmp_path/"timm") == 0
    model = timm.create_model(f"local-dir:{tmp_path/'timm'}", pretrained=True).eval()
    with torch.no_grad(): assert torch.allclose(model.forward_features(images), features, atol=1e-4)


# ---- the other ways

def quiet(line): pass

def weights(folder): return contents(folder)["model.safetensors"]

def test_both_stages_of_the_paper_and_an_interruption_in_each(teacher, tmp_path):
    train, unseen = (load_dataset("digits", s, teacher=teacher, limit=48) for s in ("train", "test"))
    config = DistillConfig(k=2, steps=10, stage1_steps=10, start="scratch", batch_size=8, states="live")
    said = []
    whole = distill(teacher, train, unseen, tmp_path/"whole", config, say=said.append)
    spans = ["{}-{}".format(*span) for span in whole.raptor.phases.spans]
    assert whole.history["span"].tolist() == [s for s in (*spans, "0-6") for _ in range(10)]
    assert whole.raptor.blocks[0].config.conditioning == ("scaling",) and whole.scores["r2"] > whole.start["r2"]
    for place in (f"states {spans[0]}, step 5", f"states {spans[1]}, step 7", "states 0-6, step 6"):
        def stop(line, place=place):
            if line.startswith(place): raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt): distill(teacher, train, unseen, tmp_path/"broken", config, say=stop)
    again = distill(teacher, train, unseen, tmp_path/"broken", config, say=quiet)
    assert weights(tmp_path/"broken") == weights(tmp_path/"whole")
    pd.testing.assert_frame_equal(again.history, whole.history)

def write_images(folder, names):
    for i, name in enumerate(names):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (30, 40, 3), np.uint8)).save(folder/name)

def test_a_folder_is_parted_into_images_to_train_on_and_others(teacher, tmp_path, capsys):
    write_images(tmp_path/"photos", [f"{i % 3}/{i}.png" for i in range(25)])
    (tmp_path/"photos"/"broken.png").write_bytes(b"no image")
    train, unseen, plain = open_split(str(tmp_path/"photos"), teacher, augment=True)
    assert (len(train), len(unseen), len(plain)) == (22, 3, 22) and train.augmented and not unseen.augmented and not plain.augmented
    seen = [b.get_batch(range(len(b)))["index"].tolist() for b in (train, unseen, plain)]
    assert sorted(seen[0] + seen[1]) == list(range(25)) and seen[0] == seen[2]
    assert capsys.readouterr().err.count("left out 1 unreadable items of 26 (broken.png)") == 1
    train.set_epoch(1)
    assert not torch.equal(train[0]["image"], plain[0]["image"])

def test_augmented_images_and_fewer_steps_than_layers(teacher, tmp_path):
    write_images(tmp_path/"photos", [f"{i}.png" for i in range(24)])
    train, unseen, plain = open_split(str(tmp_path/"photos"), teacher, held_out=4, augment=True)
    config = DistillConfig(k=2, steps=4, stops=4, rank=2, start="middle", batch_size=8)
    with pytest.raises(RaptorError, match="augmented"): distill(teacher, train, unseen, tmp_path/"out", config)
    result = distill(teacher, train, unseen, tmp_path/"out", config, phase_images=plain, say=quiet)
    assert result.raptor.num_steps == 4 and result.student.stops_at == list(result.raptor.stops)
    about = json.loads((tmp_path/"out"/"distill.json").read_text())
    assert about["record"]["states"] == "live" and about["record"]["images"] == "20 of photos", "augmented states are not cached"

@pytest.mark.parametrize("states, steps, images, expected", [
    ("auto", 10, 20, "cached"), ("auto", 1, 20, "live"), ("live", 10, 20, "live"), ("auto", 10**6, 10**6, "live")])
def test_states_are_cached_if_they_are_few_and_read_again(teacher, tmp_path, states, steps, images, expected):
    pytest.importorskip("zarr")
    config = DistillConfig(k=2, steps=steps, batch_size=8, states=states)
    assert command.Recipe(teacher, range(images), range(4), tmp_path, config).choose_states() == expected

def test_another_teacher_and_other_images_are_another_run(made, teacher):
    train, unseen = (load_dataset("digits", s, teacher=teacher, limit=n) for s, n in (("train", 200), ("test", 40)))
    config = DistillConfig(k=2, steps=50, batch_size=16)
    seed_everything(5)
    other = Backbone.create(NANO, pretrained=False)
    for backbone, images, word in ((other, train, "other teacher"), (teacher, ImageSubset(train, range(100)), "other training images")):
        with pytest.raises(RaptorError, match=word): distill(backbone, images, unseen, made.out, config)
    again = distill(teacher, train, unseen, made.out, config, say=quiet)
    assert again.scores == made.about["scores"], "the finished run is read"


# ---- bad input

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RAPTOR_HOME", str(tmp_path/"home"))
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path/"photos", [f"{i}.png" for i in range(12)])
    write_images(tmp_path/"one", ["0.png"])
    for name in ("empty", "broken", "study", "report"): (tmp_path/name).mkdir()
    for i in range(2): (tmp_path/"broken"/f"{i}.png").write_bytes(b"no image")
    (tmp_path/"study"/"thesis.tex").touch()
    (tmp_path/"report"/"phases.json").write_text('{"made_by": "raptor phases"}')
    return tmp_path

@pytest.mark.parametrize("argv, words", [
    ([NANO, "empty", "--random"], "there are no images below empty"),
    ([NANO, "broken", "--random"], "none of 2 images can be read; check"),
    ([NANO, "nowhere", "--random"], "neither a folder nor a dataset"),
    ([NANO, "one", "--random"], "one holds too few images (1) to hold out 1"),
    ([NANO, "photos", "--random", "--held-out", "12"], "too few images (12) to hold out 12"),
    ([NANO, "photos", "--random", "--held-out", "0"], "hold out at least 1"),
    ([NANO, "photos", "--random"], "a batch of 64 cannot be drawn from 10 images; lower batch_size"),
    (["resnet18", "photos", "--random"], "cannot be a backbone"),
    ([NANO, "photos"], "no weights of vit_nano_patch4_reg4_24 are published"),
    ([NANO, "photos", "--random", "--k", "7"], "--k is 7 and vit_nano_patch4_reg4_24 has 6 layers; choose 1..6"),
    ([NANO, "photos", "--random", "--k", "0"], "k is 0, and must be"),
    ([NANO, "photos", "--random", "--steps", "0"], "steps is 0, and must be"),
    ([NANO, "photos", "--random", "--stops", "2"], "stops is 2, and vit_nano_patch4_reg4_24 with k = 3 takes 3..6"),
    ([NANO, "photos", "--random", "--rank", "0"], "rank is 0, and must be"),
    ([NANO, "photos", "--random", "--start", "scratch", "--rank", "4"], "rank has no meaning with start scratch"),
    ([NANO, "photos", "--random", "--start", "meen"], "did you mean 'mean'"),
    ([NANO, "photos", "--random", "--lr", "nan"], "lr is nan"),
    ([NANO, "photos", "--random", "--device", "gpu"], "the device gpu cannot be used"),
    ([NANO, "photos", "--random", "--out", "study"], "study is not empty and holds no report of raptor distill"),
    ([NANO, "photos", "--random", "--out", "report"], "holds no report of raptor distill"),
    ([NANO, "photos", "--random", "--out", "photos/0.png"], "is a file"),
])
def test_bad_input_is_one_sentence(home, capsys, argv, words):
    status, _, err = run(capsys, *argv)
    assert status == 1 and len(err) == 1 and err[0].startswith("raptor: ") and words in err[0], err
    assert not list(home.rglob("distill.json")) and not (home/"home"/"distill").exists(), "a refused command leaves nothing"

def test_another_request_in_the_folder_is_one_sentence(made, capsys):
    before = contents(made.out)
    status, _, err = run(capsys, *ASKED, "--k", 3, "--steps", 60, "--out", made.out)
    assert status == 1 and len(err) == 1 and "holds a run with k 2 and not 3, steps 50 and not 60; name another folder" in err[0]
    assert contents(made.out) == before
    status, out, err = run(capsys, *ASKED, "--out", made.out)
    assert status == 0 and "holds this run, finished" in out and contents(made.out) == before
