"A student without its teacher, on disk, on a hub and in other programs: each compared with the whole it was made from."
import base64
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from raptor.core import RaptorError
from raptor.model import export
from raptor.model.as_backbone import RaptorBackbone, Student
from raptor.model.card import model_card
from raptor.model.export import as_timm, export_model, open_student
from raptor.model.raptor import Raptor
from raptor.phases import Phases
from raptor.pipeline.cli import main
from raptor.teacher.backbone import Backbone

ROOT = Path(__file__).parent.parent
SMALL = dict(depth=3, embed_dim=32, num_heads=2)


def teacher_like(name="vit_nano_patch4_reg4_24", **settings):
    "A teacher with no weight at a special value."
    torch.manual_seed(0)
    teacher = Backbone.create(name, pretrained=False, mean=0.2, std=0.3, **settings)
    with torch.no_grad():
        for p in teacher.parameters(): p.add_(0.1*torch.randn_like(p))
    return teacher

def copied(teacher, **settings):
    return Raptor.from_teacher(teacher, Phases((1, teacher.depth)), **{"rank": 2, **settings})

def count(module): return sum(p.numel() for p in module.parameters())

def same(found, expected, atol=1e-5): torch.testing.assert_close(found, expected, atol=atol, rtol=1e-5)

def command(*args, code=0):
    "Run the `raptor` command in this process."
    with pytest.raises(SystemExit) as e: main(list(map(str, args)))
    assert e.value.code == code

def fresh(code, *args, **env):
    "Run Python in a process of its own; its output."
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]), **env}
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# --- without the teacher -----------------------------------------------------------------------------------------

TEACHERS = {
    "class token with a position": ("vit_tiny_patch16_224", {}, 16), "registers": ("vit_small_patch14_reg4_dinov2", {}, 14),
    "a norm before the blocks": ("vit_base_patch16_clip_224", {}, 16), "two class tokens": ("deit_tiny_distilled_patch16_224", {}, 16),
    "no class token": ("vit_base_patch16_siglip_224", {}, 16), "the mean of patches": ("vit_tiny_patch16_224", dict(global_pool="avg"), 16),
    "SwiGLU": ("vit_giant_patch14_dinov2", {}, 14), "any image size": ("vit_tiny_patch16_224", dict(dynamic_img_size=True), 16),
    "rotary positions": ("vit_small_patch16_dinov3", {}, 16), "embedded": ("vit_nano_patch4_reg4_24", {}, 4)}

@pytest.mark.parametrize("kind", TEACHERS)
def test_a_student_and_its_timm_model_are_the_whole_without_the_teachers_layers(kind):
    name, settings, patch = TEACHERS[kind]
    teacher = teacher_like(name, img_size=(2*patch, 3*patch), **SMALL, **settings)
    if kind == "rotary positions":
        raptor = Raptor.create(Phases((1, 3)), 32, 2, mlp="gelu", conditioning=(), layer_scale=0.5, eps=teacher.model.norm.eps)
    else: raptor = copied(teacher)
    whole, student = RaptorBackbone(teacher, raptor), RaptorBackbone.compact(teacher, raptor)
    images = torch.randn(2, 3, *teacher.img_size)
    embedding = [n for n, _ in teacher.model.named_parameters() if not n.startswith(("blocks.", "head", "attn_pool.", "rope."))]
    with torch.no_grad():
        same(student.features(images), whole.features(images))
        for ours, theirs in zip(student.forward_intermediates(images, norm=True)[1], whole.forward_intermediates(images, norm=True)[1]):
            same(ours, theirs)
        same(as_timm(student).forward_features(images), whole.features(images))
        state = whole.embed(images)
        same(student.cls(state), teacher.cls(state))
    positions = teacher.model.pos_embed # of prefix tokens too, perhaps: a student has the sums
    lost = 32*teacher.num_prefix if positions is not None and positions.shape[1] == teacher.num_tokens else 0
    assert count(student) == count(raptor) + sum(teacher.model.get_parameter(n).numel() for n in embedding) - lost
    for what in "depth dim num_heads num_prefix num_registers num_tokens has_cls grid img_size mean std name".split():
        assert getattr(student, what) == getattr(whole, what), what
    assert not student.training and not any(type(m).__module__.startswith("timm") for m in student.modules())


@pytest.mark.parametrize("settings", [dict(conditioning=("vectors", "low_rank")), dict(conditioning=("experts",), experts=2), None])
def test_every_parameter_of_a_student_receives_a_gradient(settings):
    "As `DistributedDataParallel` demands it."
    teacher = teacher_like()
    raptor = Raptor.create(Phases((2, 6)), 32, 2, layer_scale=0.5) if settings is None else copied(teacher, **settings)
    with torch.no_grad(): # a new router or low-rank update is zero in one factor, so that the other has no slope yet
        for p in raptor.parameters(): p.add_(0.1*torch.randn_like(p))
    student = RaptorBackbone.compact(teacher, raptor).train()
    (student(torch.randn(2, 3, 24, 24))*torch.randn(32)).sum().backward()
    without = [n for n, p in student.named_parameters() if not p.requires_grad or p.grad is None or not p.grad.abs().sum() > 0]
    assert not without and all(p.grad is None for p in [*raptor.parameters(), *teacher.parameters()])


def test_a_student_lives_apart_from_what_it_was_made_of():
    teacher = teacher_like()
    raptor, images = copied(teacher), torch.randn(1, 3, 24, 24)
    student = RaptorBackbone.compact(teacher, raptor)
    with torch.no_grad():
        before, mark = student(images), student.fingerprint
        for p in [*teacher.parameters(), *raptor.parameters()]: p.zero_()
        assert torch.equal(student(images), before) and student.fingerprint == mark
        student.backbone.proj.bias[0] += 1
    assert student.fingerprint != mark and raptor.teacher is None


def other(teacher):
    with torch.no_grad(): teacher.model.blocks[0].norm1.bias[0] += 1
    return teacher

class Odd(nn.Module):
    "A patch embedding of two convolutions."
    def __init__(self, patches):
        super().__init__()
        self.inner, self.img_size, self.patch_size, self.grid_size = patches, patches.img_size, patches.patch_size, patches.grid_size
        self.proj = patches.proj
    def forward(self, x): return self.inner(x)*2

def odd(teacher):
    teacher.model.patch_embed = Odd(teacher.model.patch_embed)
    return teacher

@pytest.mark.parametrize("change,sentence", [
    (lambda t: (t, Raptor.create(Phases((2, 5)), 32, 2)), "has depth 5 and the backbone vit_nano_patch4_reg4_24 has depth 6"),
    (lambda t: (t, Raptor.create(Phases((2, 6)), 16, 2)), "has dim 16"),
    (lambda t: (t, t), "the Raptor is a Backbone"), (lambda t: (t.model, copied(t)), "is a EmbeddedTeacher without"),
    (lambda t: (odd(t), copied(t)), "the embedding of vit_nano_patch4_reg4_24 is more than patches")])
def test_what_has_no_student(change, sentence):
    with pytest.raises(RaptorError, match=sentence): RaptorBackbone.compact(*change(teacher_like()))

def test_another_teacher_has_no_student_unless_one_insists():
    teacher = teacher_like()
    raptor = copied(teacher)
    raptor.teacher = teacher.identity()
    with pytest.raises(RaptorError, match="with fingerprint"): RaptorBackbone.compact(other(teacher), raptor)
    assert RaptorBackbone.compact(teacher, raptor, strict=False).teacher == teacher.identity() != raptor.teacher


# --- on disk -----------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path):
    teacher = teacher_like()
    student = RaptorBackbone.compact(teacher, copied(teacher, stops=(1, 3, 6)))
    return student, student.save_pretrained(tmp_path/"student", metrics={"top-1": 0.812345678, "mIoU": None}, license="mit")

def test_a_student_is_read_in_a_fresh_process_without_timm_and_its_teacher(saved, tmp_path):
    student, folder = saved
    images = torch.randn(3, 3, 24, 24)
    with torch.no_grad(): save_file({"images": images, "features": student(images)}, tmp_path/"expected.safetensors")
    out = fresh("""import sys, torch; from safetensors.torch import load_file; from raptor.model.as_backbone import RaptorBackbone
student, known = RaptorBackbone.from_pretrained(sys.argv[1]), load_file(sys.argv[2])
with torch.no_grad(): print(torch.equal(student.forward_features(known['images']), known['features']))
print(student.fingerprint, student.mean, student.stops if student.raptor.stops is None else student.raptor.stops, student.training)
print(sorted({'timm', 'torchvision'} & set(sys.modules)))""", folder, tmp_path/"expected.safetensors")
    assert out.split("\n")[:3] == ["True", f"{student.fingerprint} {student.mean} (1, 3, 6) False", "[]"]
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert sum(v.numel() for v in load_file(folder/"model.safetensors").values()) == count(student)

def test_the_lines_of_a_students_card_load_it(saved):
    student, folder = saved
    card = (folder/"README.md").read_text()
    found = {"images": torch.randn(2, 3, 24, 24)}
    exec(card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(folder)), found)
    with torch.no_grad(): assert torch.equal(found["features"], student(found["images"]))
    assert "| top-1 | 0.8123 |" in card and "| mIoU | not run |" in card and "## Licence\n\nmit\n" in card

@pytest.mark.parametrize("how,kind", [(dict(dtype="bfloat16"), torch.bfloat16), (dict(dtype=torch.float64, device="cpu"), torch.float64), ({}, torch.float32)])
def test_type_and_device_are_chosen_when_it_is_read(saved, tmp_path, how, kind):
    student, folder = saved
    student.raptor.save_pretrained(tmp_path/"raptor")
    for again in (RaptorBackbone.from_pretrained(folder, **how), Raptor.from_pretrained(tmp_path/"raptor", **how)):
        assert {p.dtype for p in again.parameters()} == {kind} and not any(m.training for m in again.modules())
    assert RaptorBackbone.from_pretrained(folder, **how)(torch.randn(1, 3, 24, 24)).dtype == kind

@pytest.mark.parametrize("how,sentence", [(dict(dtype="int8"), "dtype is 'int8', and must be a floating-point"), (dict(dtype="half-ish"), "dtype is 'half-ish'"),
    (dict(device="nowhere"), "cannot be put on device 'nowhere'"), (dict(device="cuda:99"), "cannot be put on device 'cuda:99'")])
def test_a_type_or_device_that_is_none(saved, how, sentence):
    with pytest.raises(RaptorError, match=sentence) as e: RaptorBackbone.from_pretrained(saved[1], **how)
    assert "\n" not in str(e.value)

def stem(**changes): return lambda v: v["stem"].update(changes)

@pytest.mark.parametrize("change,sentence", [
    (lambda v: v.pop("stem"), "is that of a Raptor without embedding and norm, which Raptor.from_pretrained reads"),
    (lambda v: v.pop("teacher"), "does not say what the teacher was"), (stem(patch=[4]), "describes its stem wrongly .'patch"),
    (stem(channels=2**20), "'channels"), (stem(file="/etc/passwd"), "'file'"), (stem(num_prefix=0), "class token among 0 prefix tokens"),
    (stem(patch=[2, 2]), "model.safetensors hold shape"), (stem(patch=[99, 99]), "do not fit into"), (stem(norm=None), "hold shape"),
    (stem(norm={"kind": "batch", "eps": 1e-6, "bias": True}), "'norm.kind"), (stem(num_heads=4), "saved with another config.json")])
def test_a_config_that_was_changed(saved, change, sentence):
    path = saved[1]/"config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(RaptorError, match=sentence): RaptorBackbone.from_pretrained(saved[1])

def test_a_student_is_no_raptor(saved):
    with pytest.raises(RaptorError, match="a student with embedding and norm, which RaptorBackbone.from_pretrained reads"): Raptor.from_pretrained(saved[1])


# --- the card ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("teacher,given,header", [
    (dict(name="vit_base_patch14_reg4_dinov2", source="pretrained"), None, dict(base_model="timm/vit_base_patch14_reg4_dinov2.lvd142m", license="apache-2.0")),
    (dict(name="vit_base_patch14_reg4_dinov2", source="pretrained"), "mit", dict(base_model="timm/vit_base_patch14_reg4_dinov2.lvd142m", license="mit")),
    (dict(name="vit_base_patch16_dinov3", source="pretrained"), None,
     dict(base_model="timm/vit_base_patch16_dinov3.lvd1689m", license="other", license_name="dinov3-license")),
    (dict(name="hf-hub:owner/name@main", source="pretrained"), None, dict(base_model="owner/name")),
    (dict(name="vit_base_patch14_reg4_dinov2", source="trained"), None, {}), (dict(name="vit_nano_patch4_reg4_24", source="random"), "cc-by-4.0", dict(license="cc-by-4.0"))])
def test_the_card_names_licence_and_origin(teacher, given, header):
    raptor = Raptor.create(Phases((1, 3)), 8, 2)
    raptor.teacher = dict(timm={}, img_size=[24, 24], mean=[1/3]*3, std=[.3]*3, fingerprint="0"*16, blocks="0"*16, **teacher)
    card = model_card(raptor, metrics={"top-1": 84.123456, "n": 50000, "loss": 1.23456e-7}, license=given)
    found = yaml.safe_load(card.split("---\n")[1])
    assert {k: found.get(k) for k in ("base_model", "license", "license_name")} == {"base_model": None, "license": None, "license_name": None} | header
    assert found["library_name"] == "raptor-vit" and "raptor" in found["tags"]
    for line in ("| top-1 | 84.12 |", "| n | 50000 |", "| loss | 1.235e-07 |", "| mean | [0.3333, 0.3333, 0.3333] |"): assert line in card
    assert f"mean={(1/3,)*3}" in card, "the lines that create the teacher are exact"


# --- other programs ----------------------------------------------------------------------------------------------

def expected_of(student, tmp_path):
    images = {f"{n}": torch.randn(n, 3, 24, 24) for n in (1, 3, 5)}
    with torch.no_grad(): values = {f"y{n}": student(x) for n, x in images.items()}
    save_file({**images, **values}, tmp_path/"expected.safetensors")
    return tmp_path/"expected.safetensors"

COMPARE = """
known = load_file(sys.argv[2])
print(max((run(known[n]) - known['y' + n]).abs().max().item() for n in '135') < 1e-5, 'raptor' in sys.modules)"""
READ_TIMM = """import sys, timm, torch; from safetensors.torch import load_file
torch.set_grad_enabled(False)
model = timm.create_model(sys.argv[1], pretrained=True).eval(); run = model.forward_features
print(type(model).__name__, len(model.blocks), list(model.pretrained_cfg['mean']), model.num_classes)""" + COMPARE

def test_a_graph_of_torch_export_runs_without_this_package(saved, tmp_path):
    student, folder = saved
    path = export_model(student, tmp_path/"student.pt2", "torch-export")
    out = fresh("""import sys, json, torch; from safetensors.torch import load_file
notes = {'raptor.json': ''}
run = torch.export.load(sys.argv[1], extra_files=notes).module()
print(json.loads(notes['raptor.json'])['mean'])""" + COMPARE, path, expected_of(student, tmp_path))
    assert out.splitlines() == ["[0.2, 0.2, 0.2]", "True False"]
    with torch.no_grad(): assert torch.isfinite(student(torch.randn(1, 3, 24, 24))).all(), "the student is left as it was"

def test_a_folder_of_timm_is_loaded_by_timm_alone(saved, tmp_path):
    student, folder = saved
    path = export_model(student, tmp_path/"plain", "timm", metrics={"top-1": 0.5})
    out = fresh(READ_TIMM, f"local-dir:{path}", expected_of(student, tmp_path))
    assert out.splitlines() == ["VisionTransformer 3 [0.2, 0.2, 0.2] 0", "True False"]
    header = yaml.safe_load((path/"README.md").read_text().split("---\n")[1])
    assert header["library_name"] == "timm" and "| top-1 | 0.5 |" in (path/"README.md").read_text()

@pytest.mark.parametrize("settings", [dict(stops=(1, 6), rank=2), dict(stops=(1, 6), conditioning=("experts", "scaling"), experts=2)])
def test_an_onnx_graph_has_the_features_of_the_student(tmp_path, settings, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    teacher = teacher_like()
    raptor = copied(teacher, **settings)
    folder = raptor.save_pretrained(tmp_path/"raptor", backbone=teacher)
    weights, out = teacher.save(tmp_path/"teacher.safetensors"), tmp_path/"student.onnx"
    if "rank" not in settings: export_model(RaptorBackbone(teacher, raptor), out)
    else:
        command("export", folder, "--out", out, "--weights", weights)
        assert re.search("student.onnx: raptor_k2_.*, 24 x 24 pixels; the same features within 0.0001 on 1 and 3 images", capsys.readouterr().out)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    student = RaptorBackbone(teacher, raptor)
    for n in (1, 5):
        images = torch.randn(n, 3, 24, 24)
        with torch.no_grad(): same(torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0]), student(images))
    notes = session.get_modelmeta().custom_metadata_map
    assert json.loads(notes["std"]) == [0.3]*3 and session.get_inputs()[0].shape == ["batch", 3, 24, 24]
    assert out.stat().st_size < 4*count(RaptorBackbone.compact(teacher, raptor)) + 150_000, "a block stands in it once"

def test_a_student_is_a_format_too(tmp_path):
    teacher = teacher_like()
    raptor = copied(teacher, stops=(1, 6))
    command("export", raptor.save_pretrained(tmp_path/"r", backbone=teacher), "-f", "student", "-o", tmp_path/"s",
            "--weights", teacher.save(tmp_path/"t.safetensors"))
    images = torch.randn(1, 3, 24, 24)
    with torch.no_grad(): same(open_student(tmp_path/"s")(images), RaptorBackbone(teacher, raptor)(images))
    assert type(open_student(tmp_path/"s")) is Student

def swap(**changes): return lambda t, d: (RaptorBackbone(t, Raptor.create(Phases((1, 6)), 32, 2, **changes)), d/"x", "timm")

@pytest.mark.parametrize("make,sentence", [
    (swap(), "raptor_k2_vit_nano_patch4_reg4_24 has swiglu with norms of eps 1e-05, which timm's"),
    (swap(mlp="gelu", eps=1e-6), "a block with depth scaling has no equal among the layers of vit_nano_patch4_reg4_24"),
    (swap(mlp="gelu", conditioning=()), "has norms .* beside blocks of eps 1e-05"), (swap(mlp="gelu", conditioning=(), eps=1e-3), "gelu with norms of eps 0.001"),
    (lambda t, d: (copied(t), d/"x.onnx", "onnx"), "a Raptor cannot be exported; give RaptorBackbone"),
    (lambda t, d: (None, d/"x.onnx", "onxx"), "onxx.*onnx"), (lambda t, d: (None, d/"x", "torch-export"), "such as x.pt2"),
    (lambda t, d: (None, d, "timm"), "is there already and nothing is overwritten")])
def test_what_is_not_exported(make, sentence, tmp_path):
    (tmp_path/"mine.txt").touch()
    student, out, form = make(teacher_like(), tmp_path)
    pytest.importorskip("onnxruntime") if form == "onnx" else None
    with pytest.raises(RaptorError, match=sentence) as e: export_model(student, out, form)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"] and "\n" not in str(e.value)

@pytest.mark.parametrize("form,name", [("timm", "x"), ("student", "x"), ("torch-export", "x.pt2")])
def test_what_differs_is_not_kept(saved, tmp_path, monkeypatch, form, name):
    monkeypatch.setattr(export, "TOLERANCE", -1)
    with pytest.raises(RaptorError, match="has other features than the student .by .* and is not kept"): export_model(saved[0], tmp_path/"new"/name, form)
    assert not list((tmp_path/"new").iterdir())

def test_a_format_that_is_not_installed_is_one_sentence(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else True)
    command("export", saved[1], "--out", tmp_path/"x.onnx", code=1)
    assert capsys.readouterr().err == "raptor: the format onnx needs onnxscript, not installed here; run pip install 'raptor-vit[onnx]'.\n"

@pytest.mark.parametrize("change,sentence", [
    (lambda v: None, "whose weights are published nowhere; give their file"), (lambda v: v.pop("teacher"), "does not say what its teacher was"),
    (lambda v: v["teacher"].update(timm={"checkpoint_path": "x"}, source="pretrained"), "names files of another machine"),
    (lambda v: v["teacher"].update(name="local-dir:/x", source="pretrained"), "names files of another machine")])
def test_a_raptor_whose_teacher_cannot_be_had(tmp_path, change, sentence):
    from raptor.core import fingerprint
    from raptor.model.tensors import read_note, write_tensors
    teacher = teacher_like()
    raptor = copied(teacher)
    folder = raptor.save_pretrained(tmp_path, backbone=teacher)
    values = json.loads((folder/"config.json").read_text())
    change(values)
    (folder/"config.json").write_text(json.dumps(values))
    write_tensors(folder/"model.safetensors", raptor, {**read_note(folder/"model.safetensors"), "config": fingerprint(values)})
    with pytest.raises(RaptorError, match=sentence): open_student(folder)


# --- a hub -------------------------------------------------------------------------------------------------------

class FakeHub(BaseHTTPRequestHandler):
    "The requests of a hub that an upload and a download make; files are kept in memory."
    files, commit = {}, "c"*40
    def log_message(self, *_): pass
    def answer(self, body=b"", status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for k, v in {"Content-Length": len(body), **headers}.items(): self.send_header(k.replace("_", "-"), str(v))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        place = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            return self.answer({"url": f"{place}/{name}", "name": name, "id": name})
        if self.path == "/api/validate-yaml": return self.answer({"errors": [], "warnings": []})
        repo = re.match(r"/api/models/(\w+/[\w-]+)/", self.path)[1]
        if "/preupload/" in self.path:
            return self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file": self.files[repo, line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.answer({"commitUrl": f"{place}/{repo}/commit/{self.commit}", "commitOid": self.commit, "success": True})
    def do_GET(self):
        found = re.match(r"/(\w+/[\w-]+)/resolve/[^/]+/(.*)", self.path)
        if found and (body := self.files.get(found.groups())) is not None:
            return self.answer(body, X_Repo_Commit=self.commit, ETag=f'"{hash(body):x}"')
        known = found and found[1] in {repo for repo, _ in self.files}
        self.answer(b"", 404, X_Error_Code="EntryNotFound" if known else "RepoNotFound")
    def do_HEAD(self): self.do_GET()

@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    FakeHub.files.clear()
    yield dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path/"hf"), HF_HUB_OFFLINE="0", HF_TOKEN="hf_x", HF_HUB_DISABLE_TELEMETRY="1")
    server.shutdown()
    server.server_close()

def test_what_is_pushed_to_a_hub_comes_back_from_it(saved, tmp_path, hub):
    student, folder = saved
    student.raptor.save_pretrained(tmp_path/"raptor", {"seed": 1}, {"top-1": 0.5})
    plain = export_model(student, tmp_path/"plain", "timm")
    fresh("""import sys; from raptor import Raptor, RaptorBackbone; from huggingface_hub import HfApi
print(Raptor.from_pretrained(sys.argv[1]).push_to_hub("owner/raptor", {"seed": 1}, {"top-1": 0.5}))
RaptorBackbone.from_pretrained(sys.argv[2]).push_to_hub("owner/student", license="mit")
HfApi().create_repo("owner/plain"); HfApi().upload_folder(repo_id="owner/plain", folder_path=sys.argv[3])""", tmp_path/"raptor", folder, plain, **hub)
    for name, place in (("raptor", tmp_path/"raptor"), ("plain", plain)):
        assert {k[1]: v for k, v in FakeHub.files.items() if k[0] == f"owner/{name}"} == {p.name: p.read_bytes() for p in place.iterdir()}
    out = fresh("""import sys, torch; from safetensors.torch import load_file; from raptor import Raptor, RaptorBackbone
student, raptor = RaptorBackbone.from_pretrained("owner/student", revision="main"), Raptor.from_pretrained("owner/raptor")
torch.set_grad_enabled(False); known = load_file(sys.argv[1])
print(torch.equal(student(known['3']), known['y3']), torch.equal(student.norm(raptor(student.embed(known['3']))), known['y3']))
try: Raptor.from_pretrained("owner/missing")
except Exception as e: print(type(e).__name__, e)""", expected_of(student, tmp_path), **hub)
    assert out.splitlines() == ["True True", "RaptorError owner/missing is no folder here, and config.json of a repository of that name could not be "
                                "fetched (RepositoryNotFoundError); check the name and the connection."]
    out = fresh(READ_TIMM, "hf-hub:owner/plain", tmp_path/"expected.safetensors", **hub)
    assert out.splitlines() == ["VisionTransformer 3 [0.2, 0.2, 0.2] 0", "True False"]

def test_a_hub_that_cannot_be_reached_is_said_once(tmp_path, hub):
    hub["HF_ENDPOINT"] = "http://127.0.0.1:9" # nobody listens
    out = fresh("""import contextlib, io, sys, time; time.sleep = lambda s: None
from raptor import Phases, Raptor, RaptorBackbone, RaptorError; from raptor.pipeline.cli import main
for call in (lambda: main(["export", "owner/name", "--out", "x", "-f", "timm"]), lambda: Raptor.from_pretrained("owner/name"),
             lambda: RaptorBackbone.from_pretrained("owner/name"), lambda: Raptor.create(Phases((1, 3)), 8, 2).push_to_hub("owner/name")):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try: call()
        except RaptorError as e: print(e, file=sys.stderr)
        except SystemExit as e: assert e.code == 1
    print(said.getvalue(), end="")""", **hub)
    lines = out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("raptor: owner/name is no folder here") and "could not be uploaded to owner/name" in lines[3]
    assert all("check the name" in line for line in lines)
