"""`raptor phases MODEL IMAGES`: the command as a user meets it, and the comparison of layers behind it."""
import json, os, re, shutil, subprocess, sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from raptor.analysis.layers import compare_layers, gram_products, linear_cka, recursive_levels, segmentations
from raptor.core import RaptorError, seed_everything
from raptor.phases import FragmentedPhases, cut_weight, layer_distance, max_cut, read_phases, recursive_max_cut

from stand_ins import run

NANO = "vit_nano_patch4_reg4_24"


# ---- CKA and the distances

def song(K, L):
    "The unbiased estimate of HSIC as Song et al. (2012), equation 5, write it."
    K, L, n = K - np.diag(np.diag(K)), L - np.diag(np.diag(L)), len(K)
    return (np.trace(K@L) + K.sum()*L.sum()/(n-1)/(n-2) - 2*(K@L).sum()/(n-2)) / (n*(n-3))

@pytest.mark.parametrize("n, width, offset", [(4, 3, 0), (30, 8, 0), (20, 50, 5)])
def test_cka_is_the_formula_of_its_papers(n, width, offset):
    x = np.random.default_rng(n).normal(size=(n, 3, width)).cumsum(1) + offset
    K = [x[:, i]@x[:, i].T for i in range(3)]
    expected = np.array([[song(a, b) for a in K] for b in K])
    assert np.allclose(gram_products(x), expected, rtol=1e-7, atol=1e-9)
    assert np.isclose(linear_cka(gram_products(x))[0, 2], np.clip(expected[0, 2]/np.sqrt(expected[0, 0]*expected[2, 2]), -1, 1))

def test_cka_of_a_layer_that_is_the_same_for_all_images_is_zero():
    x = np.random.default_rng(0).normal(size=(10, 2, 3))
    x[:, 1] = 7
    assert np.allclose(linear_cka(gram_products(x)), np.eye(2))

class States(SimpleNamespace):
    def __len__(self): return len(self.states)
    def batches(self, size, start=1, **_): return (s[:, start:] for s in self.states.split(size))

def source(n=20, layers=4, cls=1, registers=2, patches=6, width=5):
    states = torch.randn(n, layers + 1, cls + registers + patches, width, generator=torch.Generator().manual_seed(n)).cumsum(1)
    return States(states=states, num_prefix=cls + registers, has_cls=bool(cls), depth=layers, num_tokens=states.shape[2], dim=width)

@pytest.mark.parametrize("cls, registers, first", [(1, 2, "cls + patches"), (1, 0, "cls + patches"), (0, 2, "patches"), (0, 0, "patches")])
def test_the_first_distances_are_those_that_phases_are_cut_from(cls, registers, first):
    s = source(cls=cls, registers=registers)
    found = compare_layers(s)
    assert next(iter(found)) == first and ("registers" in found) == bool(registers) and ("cls" in found) == bool(cls)
    for metric in ("cosine", "mse"): assert np.allclose(found[first][metric], layer_distance(s, metric), atol=1e-12)

def test_every_token_is_compared_with_itself():
    s = source()
    found, x = compare_layers(s, all_tokens=True), s.states[:, 1:].double()
    cos = torch.nn.functional.cosine_similarity(x[:, 0], x[:, 3], dim=-1)
    for kind, tokens in {"all tokens": slice(None), "cls": slice(0, 1), "registers": slice(1, 3), "patches": slice(3, None)}.items():
        assert np.isclose(found[kind]["cosine"][0, 3], 1 - cos[:, tokens].mean())
        assert np.isclose(found[kind]["mse"][0, 3], (x[:, 0] - x[:, 3]).square()[:, tokens].mean())

@pytest.mark.parametrize("n", [20, 600]) # one group of images, and two
def test_batches_do_not_change_a_distance_and_cka_is_averaged_over_groups(n):
    s = source(n, width=3, patches=2)
    found, other = compare_layers(s), compare_layers(s, batch_size=7)
    for kind, by in found.items():
        for metric, d in by.items(): assert np.allclose(d, other[kind][metric], atol=1e-9), (kind, metric)
    mean = s.states[:, 1:, 3:].mean(2)
    assert np.allclose(1 - found["patches"]["cka"], linear_cka(sum(map(gram_products, mean.split(300)))), atol=1e-6)

def test_states_that_are_not_finite_are_refused():
    s = source()
    s.states[3, 2] = float("nan")
    with pytest.raises(RaptorError, match="not finite"): compare_layers(s)


# ---- both solvers

def matrix(seed, n):
    d = np.random.default_rng(seed).random((n, n))
    return np.triu(d, 1) + np.triu(d, 1).T

@pytest.mark.parametrize("seed", range(12))
def test_levels_are_what_the_recursive_solver_finds(seed):
    d = matrix(seed, 4 + seed % 7)
    levels = recursive_levels(d, most=10)
    assert all(recursive_max_cut(d, eps) == p and p.k == k for k, (eps, p) in levels.items()) and 1 in levels
    assert {recursive_max_cut(d, e).k for e in np.linspace(0, 1, 401)} <= set(levels)
    assert {k: p for k, (_, p) in recursive_levels(d, most=2).items()} == {k: p for k, (_, p) in levels.items() if k <= 2}

def test_both_solvers_stand_side_by_side():
    d = matrix(0, 8)
    for row in segmentations(d, range(1, 9)):
        assert row["ends"] == max_cut(d, row["k"]).ends and np.isclose(row["weight"], cut_weight(d, row["ends"]))
        if other := row["recursive"]: assert np.isclose(other["cut"], cut_weight(d, FragmentedPhases(other["assignment"]))/(d.sum()/2))
    assert [r["recursive"] for r in segmentations(matrix(0, 25), [2])] == [None], "too many layers to enumerate"
    assert [r["cut"] for r in segmentations(np.zeros((5, 5)), [1, 2])] == [0, 0]


# ---- the command

def saved_teacher(folder):
    from raptor import Backbone
    seed_everything(1)
    return Backbone.create(NANO, pretrained=False).save(folder/"teacher"/"backbone.safetensors")

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "Two models side by side, one by name and one as a file, in a process of their own."
    home = tmp_path_factory.mktemp("phases")
    argv = ["phases", NANO, saved_teacher(home), "digit_scenes", "--random", "--images", "24", "--k", "3", "--out", home/"out"]
    env = {**os.environ, "RAPTOR_HOME": str(home/"home")}
    done = subprocess.run([sys.executable, "-m", "raptor", *map(str, argv)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=home/"out", home=home/"home", said=done.stdout, warned=done.stderr)

def test_the_segmentations_are_printed(two):
    assert f"{NANO} (random): RANDOM weights, as asked for" in two.said and "not trained" in two.said
    assert f"{NANO} (teacher/backbone): weights from" in two.said
    assert len(re.findall(r"^ +[1-6]  [\d-]+ +[\d.e-]+ +[\d.]+%    \S", two.said, re.MULTILINE)) == 12, "k = 1..6 of two models"
    assert two.said.count("The exact and the recursive solver") == 2

def test_the_files_agree(two):
    about, table = json.loads((two.out/"phases.json").read_text()), pd.read_csv(two.out/"distance.csv")
    assert about["k"] == 3 and [m["name"] for m in about["models"]] == list(table["model"].unique())
    assert set(table["token_kind"]) == {"cls + patches", "cls", "registers", "patches"} and set(table["metric"]) == {"cosine", "mse", "cka"}
    for model in about["models"]:
        some = table[(table["model"] == model["name"]) & (table["token_kind"] == model["tokens"]) & (table["metric"] == "cosine")]
        d = some.pivot(index="layer_i", columns="layer_j", values="distance").to_numpy()
        assert model["ends"] == {str(k): list(max_cut(d, k).ends) for k in range(1, 7)}
    assert [m["teacher"]["source"] for m in about["models"]] == ["random", "file"]
    assert about["record"]["images"] == "24 images of digit_scenes" and about["record"]["seed"] == 0
    assert Image.open(two.out/"similarity.png").width > 900 and (two.out/"similarity.pdf").stat().st_size > 5000
    assert not two.home.exists(), "nothing is written elsewhere"

def test_the_page_stands_alone(two):
    pytest.importorskip("plotly")
    page = (two.out/"phases.html").read_text()
    assert len(page.encode()) < 6e6
    ours = page[:page.index("<script>")] + page[page.rindex("<script>"):] # without plotly's own code
    assert not re.search(r"(src|href)=|https?://|@import", ours)
    assert "Random weights" in ours and "connect-src" not in ours and "default-src 'none'" in ours

MOVE = """<script>
addEventListener("load", () => setTimeout(() => {
  const state = () => [document.querySelectorAll(".shapelayer path").length, at("says0").textContent].join("|");
  const seen = [state()];
  for (const [id, value] of [["k", 2], ["k", 5], ["tokens", "registers"], ["metric", "cka"]]) {
    at(id).value = value; at(id).dispatchEvent(new Event("input", {bubbles: true})); seen.push(state());
  }
  document.body.innerHTML = "<pre id=seen>" + seen.join("\\n") + "\\n" + location.hash + "</pre>";
}, 300));</script></body>"""

def test_the_slider_redraws_the_frames(two, tmp_path):
    pytest.importorskip("plotly")
    if not (browser := shutil.which("chromium") or shutil.which("google-chrome")): pytest.skip("no browser")
    page = (two.out/"phases.html").read_text()
    (tmp_path/"moved.html").write_text(page[:page.rindex("</body>")] + MOVE + page[page.rindex("</body>") + len("</body>"):])
    argv = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path/'profile'}", "--virtual-time-budget=8000",
            "--dump-dom", f"file://{tmp_path/'moved.html'}"]
    dom = subprocess.run(argv, capture_output=True, text=True, timeout=300).stdout
    *seen, link = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL).group(1).splitlines()
    about = json.loads((two.out/"phases.json").read_text())["models"]
    def expected(k, tokens, metric): # two lines a frame, and the recursive solver's where it parts
        rows = [m["cuts"][tokens][metric][k - 1] for m in about]
        parted = [r["recursive"] for r in rows if r["recursive"] and r["recursive"]["ends"] != r["ends"]]
        return 2*k*len(rows) + sum(len(re.findall(r"((.)\2*)", "".join(map(str, p["assignment"])))) for p in parted), "-".join(map(str, rows[0]["ends"]))
    asked = [(3, "cls + patches", "cosine"), (2, "cls + patches", "cosine"), (5, "cls + patches", "cosine"), (5, "registers", "cosine"), (5, "registers", "cka")]
    for line, view in zip(seen, asked, strict=True):
        frames, ends = expected(*view)
        assert line.startswith(f"{frames}|k = {view[0]}: phases end at {ends};"), view
    assert link.replace("&amp;", "&") == "#k=5&tokens=registers&metric=cka"

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RAPTOR_HOME", str(tmp_path/"home"))
    return tmp_path

def write_images(folder, names):
    for i, name in enumerate(names):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (30, 40, 3), np.uint8)).save(folder/name)

def test_a_folder_of_any_layout_is_read_and_what_cannot_be_read_is_named(home, capsys):
    write_images(home/"photos", ["0.png", "a/1.JPG", "a/b/c/2.png", "train/x/3.png", "val/4.png", "a/5.png"])
    (home/"photos"/"a"/"broken.png").write_bytes(b"no image")
    status, out, err = run(capsys, "phases", NANO, home/"photos", "--random")
    assert status == 0 and "6 images of 24 x 24 pixels" in out
    assert len(err) - any("plotly" in line for line in err) == 1 and "left out 1 unreadable items of 7 (a/broken.png)" in err[0]
    folder, = (home/"home"/"phases").iterdir()
    assert read_phases(folder/"phases.json")[6] == (1, 2, 3, 4, 5, 6) and f"written to {folder}" in out

def test_without_plotly_all_but_the_page_is_written(home, capsys, monkeypatch):
    for name in ("plotly", "plotly.offline"): monkeypatch.setitem(sys.modules, name, None)
    (home/"out").mkdir()
    (home/"out"/"phases.html").write_text("of other models")
    (home/"out"/"phases.json").write_text('{"made_by": "raptor phases"}')
    status, out, err = run(capsys, "phases", NANO, "digits", "--random", "--images", 8, "--out", home/"out", "--all-tokens")
    assert status == 0 and len(err) == 1 and "pip install plotly" in err[0] and "all tokens" in out
    assert sorted(p.name for p in (home/"out").iterdir()) == ["distance.csv", "phases.json", "similarity.pdf", "similarity.png"]

def make_bad(folder):
    write_images(folder/"photos", ["0.png"])
    for name in ("empty", "others", "broken", "study"): (folder/name).mkdir()
    (folder/"others"/"a.heic").touch()
    for i in range(2): (folder/"broken"/f"{i}.png").write_bytes(b"no image")
    (folder/"study"/"thesis.tex").touch()
    torch.save({"weight": torch.ones(2)}, folder/"plain.pth")

@pytest.mark.parametrize("argv, words", [
    ([NANO], "name both"),
    ([NANO, "empty", "--random"], "there are no images below"),
    ([NANO, "others", "--random"], "but 1 .heic, passed over"),
    ([NANO, "broken", "--random"], "none of 2 images can be read; check"),
    ([NANO, "nowhere", "--random"], "neither a folder nor a dataset"),
    ([NANO, "photos"], "no weights of vit_nano_patch4_reg4_24 are published; give a file with --weights FILE"),
    ([NANO, "photos", "--random", "--k", "7"], "--k is 7 and vit_nano_patch4_reg4_24 has 6 layers; choose 1..6"),
    ([NANO, "photos", "--random", "--k", "0"], "choose 1..6"),
    ([NANO, "photos", "--random", "--out", "study"], "holds no report of raptor phases"),
    ([NANO, "photos", "--random", "--out", "photos/0.png"], "is a file"),
    ([NANO, "photos", "--random", "--device", "gpu"], "the device gpu cannot be used"),
    ([NANO, "photos", "--random", "--size", "25"], "not a multiple of the patch size"),
    ([NANO, "photos", "--random", "--weights", "plain.pth"], "exclude each other"),
    ([NANO, "photos", "--weights", "plain.pth", "--weights", "plain.pth"], "2 files for 1 models"),
    ([NANO, "photos", "--weights", "nowhere.pth"], "do not exist"),
    ([NANO, "photos", "--random", "--arch", NANO], "--arch says"),
    (["plain.pth", "photos"], "name it with --arch"),
    (["plain.pth", "photos", "--arch", NANO], "do not fit"),
    (["resnet18", "photos", "--random"], "cannot be a backbone"),
    (["vit_nano_patch4_reg4_25", "photos", "--random"], "did you mean 'vit_nano_patch4_reg4_24'"),
    ([NANO, "cifar10", "--random"], "cifar"),
])
def test_bad_input_is_one_sentence(home, capsys, monkeypatch, argv, words):
    monkeypatch.setenv("RAPTOR_DATA", str(home/"data"))
    monkeypatch.chdir(home)
    make_bad(home)
    status, _, err = run(capsys, "phases", *argv)
    assert status == 1 and len(err) == 1 and err[0].startswith("raptor: ") and words in err[0], err
    assert not list(home.rglob("phases.json")) and not (home/"home"/"phases").exists(), "a refused command leaves nothing"

@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "someone/their-vit"])
def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path, model):
    write_images(tmp_path/"photos", ["0.png"])
    env = {**os.environ, "RAPTOR_HOME": str(tmp_path/"home"), "HF_HOME": str(tmp_path/"hf"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    argv = [sys.executable, "-m", "raptor", "phases", model, str(tmp_path/"photos")]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "could not be downloaded (the hub cannot be reached)" in done.stderr and "--random" in done.stderr
