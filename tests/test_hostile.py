"""Files from somebody else: a pickle in the place of what belongs there does not run, and sizes that a file only claims are never made.

The same for author checkpoints is in test_import.py, for weights of a backbone and linear heads in test_backbone.py, for lists of images in test_paper_scale.py."""
import errno, json, os, pickle, resource, struct

import numpy as np, pytest, torch, yaml
from safetensors.torch import load_file, save_file
from torch import nn

from raptor.teacher.backbone import Backbone
from raptor.model.block import RecurrentBlock, load_block, save_block
from raptor.trajectories.cache import CachedTrajectories, CacheSpec
from raptor.trajectories.live import begin_cache, finish_cache, write_chunk
from raptor.core import RaptorError
from raptor.train.checkpoint import load_checkpoint, save_checkpoint
from raptor.probes.heads import probe_task
from raptor.model.raptor import Raptor
from raptor.phases import Phases
from raptor.study.presets import load_preset, preset_path
from raptor.probes.train import load_head, save_head


class Shape:
    "All that a head wants to know of a model."
    name, dim, num_prefix, grid, has_cls = "shape", 6, 2, (2, 2), True


class Trained(nn.Module):
    "What a checkpoint belongs to, with its optimiser."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.parameters())
        self.linear(torch.ones(1, 3)).sum().backward(); self.optimizer.step()


META = dict(step=1, made_for="this", history=[], sums={}, count=0)
def begin(path): run = Trained(); save_checkpoint(path, run, run.optimizer, META)
def resume(path): run = Trained(); return load_checkpoint(path, run, run.optimizer, "this")

def save_raptor(folder): return Raptor.create(Phases((1, 2)), 8, 2).save_pretrained(folder)

def make_cache(folder):
    pytest.importorskip("zarr")
    spec = CacheSpec("0123", "by hand", "numbers", num_images=6, depth=2, layers=(0, 2), num_tokens=4, dim=2,
                     num_prefix=1, has_cls=True, dtype="float16", chunk_images=4, targets="int64")
    states, targets = torch.arange(144.).view(6, 3, 4, 2).half(), np.arange(6)
    begin_cache(folder, spec)
    for c in range(2): write_chunk(folder, spec, c, states[4*c:4*c + 4], targets[4*c:4*c + 4])
    finish_cache(folder)
    return folder

def read_cache(folder): return list(CachedTrajectories(folder).batches(3, labels=True))


# name -> (write an honest one into a folder, the file that is replaced, read from the folder)
LOADERS = {
    "backbone": (lambda d: Backbone.create("vit_nano_patch4_reg4_24", pretrained=False).save(d/"w.safetensors"),
                 "w.safetensors", lambda d: Backbone.create("vit_nano_patch4_reg4_24", weights=d/"w.safetensors")),
    "head": (
        lambda d: save_head(probe_task("depth").make_head(Shape, None, bins=4), d/"head.safetensors", {"bins": 4}),
        "head.safetensors", lambda d: load_head(Shape, "depth", d/"head.safetensors")),
    "checkpoint": (lambda d: begin(d/"c.safetensors"), "c.safetensors", lambda d: resume(d/"c.safetensors")),
    "block": (
        lambda d: save_block(d/"b.safetensors", RecurrentBlock(8, 2), (0, 2)), "b.safetensors",
        lambda d: load_block(d/"b.safetensors")),
    "raptor, weights": (save_raptor, "model.safetensors", Raptor.from_pretrained),
    "raptor, config": (save_raptor, "config.json", Raptor.from_pretrained),
    "cache": (make_cache, "zarr.json", read_cache),
    "cache, array": (make_cache, "states/zarr.json", read_cache),
    "cache, states": (make_cache, "states/c/0/1/0/0", read_cache),
    "cache, targets": (make_cache, "targets/c/1", read_cache),
}

@pytest.fixture(params=LOADERS)
def loader(request, tmp_path):
    write, name, read = LOADERS[request.param]
    folder = tmp_path/"given"
    if not request.param.startswith("cache"): folder.mkdir() # a cache makes its own
    write(folder)
    return folder, folder/name, read


class Command:
    "Pickles to a command that leaves a file behind."
    def __init__(self, target): self.target = target
    def __reduce__(self): return os.system, (f"touch '{self.target}'",)


def refused(read, folder, match=None):
    with pytest.raises(RaptorError, match=match) as e: read(folder)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


def test_the_pickle_would_run(tmp_path):
    "The command that the tests below are about works where it is let run."
    pickle.loads(pickle.dumps(Command(tmp_path/"ran")))
    assert (tmp_path/"ran").exists()


WEIGHTS = ["head", "checkpoint", "block", "raptor, weights"]

@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("place", [-1, -9])
def test_a_flipped_bit_among_the_numbers_is_noticed(tmp_path, name, place):
    write, file, read = LOADERS[name]
    write(tmp_path)
    raw = bytearray((tmp_path/file).read_bytes())
    raw[place] ^= 1
    (tmp_path/file).write_bytes(raw)
    refused(read, tmp_path, f"{file} is damaged .*differ from the digest")


@pytest.mark.parametrize("name", [*WEIGHTS, "raptor, config"])
def test_a_file_of_another_user_is_not_called_damaged(tmp_path, monkeypatch, name):
    write, file, read = LOADERS[name]
    write(tmp_path)
    usual = os.open
    def denied(path, *rest, **more):
        if str(path).endswith(file): raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path, *rest, **more)
    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(RaptorError, match=rf"{file} is not readable \(permission denied\); change its") as e: read(tmp_path)
    assert "damaged" not in str(e.value)


@pytest.mark.parametrize("how", ["pickle", "torch.save", "torch.save, old", "numpy"])
def test_a_pickled_command_does_not_run(loader, tmp_path, how):
    folder, path, read = loader
    evil = {"weight": Command(tmp_path/"ran"), "bias": torch.ones(2)}
    if how == "pickle": path.write_bytes(pickle.dumps(evil))
    elif how == "numpy":
        with open(path, "wb") as f: np.save(f, np.array([evil], object), allow_pickle=True)
    else: torch.save(evil, path, _use_new_zipfile_serialization=how == "torch.save")
    refused(read, folder)
    assert not (tmp_path/"ran").exists()


def test_the_honest_file_is_read(loader): loader[2](loader[0])


# --- a safetensors header that lies -----------------------------------------------------------------------------

def with_header(path, change):
    "Rewrite the header of a safetensors file."
    raw = path.read_bytes(); size, = struct.unpack("<Q", raw[:8])
    values = json.loads(raw[8:8 + size]); values = change(values) or values
    text = json.dumps(values).encode() if not isinstance(values, bytes) else values
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size:])

def first(values): return values[next(k for k in values if k != "__metadata__")]

@pytest.mark.parametrize("change", [
    lambda v: first(v).update(shape=[2**40]), lambda v: first(v).update(shape=[2**62, 4]), lambda v: first(v).update(shape=[-1]), lambda v: first(v).update(data_offsets=[0, 2**50]), lambda v: first(v).update(dtype="F64"),
    lambda v: first(v).update(dtype="object"), lambda v: v.update(more={"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}), lambda v: v.update(__metadata__={"raptor": "[" * 10**5, "settings": "[" * 10**5}),
    lambda v: v.update(__metadata__={"raptor": "9" * 5000, "settings": "9" * 5000}), lambda v: b"[" * 10**5, lambda v: b"{" + b" " * 10**6])
@pytest.mark.parametrize("name", ["head", "checkpoint", "block"])
def test_a_header_that_lies(tmp_path, name, change):
    write, file, read = LOADERS[name]
    write(tmp_path)
    with_header(tmp_path/file, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(read, tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18 # KiB


# --- heads and checkpoints: the honest tensors beside notes that lie ---------------------------------------------

def noted(path, **notes):
    "The same tensors with other notes."
    save_file(load_file(path), path, {k: v if isinstance(v, str) else json.dumps(v) for k, v in notes.items()})

@pytest.mark.parametrize("notes", [{}, *({"settings": value} for value in (
    "null", [1], "{", {}, '{"bins":' * 10**5, '{"bins": ' + "9" * 5000 + "}",
    *({"bins": bins} for bins in (1e13, 10**13, -1, "4", [4], None, 8)),
    *({"bins": 4, **more} for more in (
        {"grid": [10**6, 10**6]}, {"dim": 10**9}, {"min_depth": "x"}, {"max_depth": float("nan")}, {"max_depth": -1},
        {"no\nsuch": 1}))))])
def test_a_head_with_other_settings(tmp_path, notes):
    write, file, read = LOADERS["head"]
    write(tmp_path); noted(tmp_path/file, **notes) # as earlier versions wrote them
    refused(read, tmp_path)
    for value in notes.values(): # as they stand in the note
        noted(tmp_path/file, raptor='{"settings": %s}' % (value if isinstance(value, str) else json.dumps(value)))
    refused(read, tmp_path)


@pytest.mark.parametrize("task", ["classification", "segmentation", "depth"])
@pytest.mark.parametrize("change", [
    lambda t: t.clear(), lambda t: t.pop("linear.weight"), lambda t: t.pop("linear.bias"),
    lambda t: t.update({"linear.weight": torch.tensor(1.)}), lambda t: t.update({"linear.weight": torch.ones(2, 2)}),
    lambda t: t.update({"linear.bias": torch.ones(9)}), lambda t: t.update(more=torch.ones(1)),
    lambda t: t.update({"linear.weight": torch.empty(0, 12)})])
def test_a_head_with_other_tensors(tmp_path, task, change):
    settings = {"bins": 4} if task == "depth" else {}
    save_head(probe_task(task).make_head(Shape, 4, **settings), tmp_path/"h.safetensors", settings)
    assert load_head(Shape, task, tmp_path/"h.safetensors").linear.weight.shape[0] == 4
    tensors = load_file(tmp_path/"h.safetensors"); change(tensors)
    save_file(tensors, tmp_path/"h.safetensors", {"settings": json.dumps(settings)})
    refused(lambda d: load_head(Shape, task, d/"h.safetensors"), tmp_path)


@pytest.mark.parametrize("change", [
    lambda t: t.clear(), lambda t: t.pop("param/linear.weight"), lambda t: t.pop("exp_avg/linear.bias"),
    lambda t: t.pop("step/linear.weight"), lambda t: t.update({"param/linear.weight": torch.ones(2, 2)}),
    lambda t: t.update({"param/linear.weight": torch.tensor(1.)}),
    lambda t: t.update({"param/linear.bias": torch.ones(3)}),
    lambda t: t.update({"exp_avg/linear.weight": torch.ones(3)}),
    lambda t: t.update({"step/linear.weight": torch.ones(2, 3)}),
    lambda t: t.update({"exp_avg_sq/linear.bias": torch.tensor(0.)})])
def test_a_checkpoint_with_other_tensors(tmp_path, change):
    write, file, read = LOADERS["checkpoint"]
    write(tmp_path)
    tensors = load_file(tmp_path/file); change(tensors)
    save_file(tensors, tmp_path/file, {"raptor": json.dumps(META)})
    refused(read, tmp_path)


@pytest.mark.parametrize("notes", [
    {}, {"raptor": "{"}, {"raptor": "[" * 10**5}, {"raptor": '{"made_for":' * 10**5}, {"raptor": [1]},
    {"raptor": "null"}, {"raptor": {}}, {"raptor": '{"made_for": ' + "9" * 5000 + "}"},
    {"raptor": {**META, "made_for": "other"}}, *({"raptor": {k: META[k] for k in META if k != left_out}} for left_out in META)])
def test_a_checkpoint_with_other_notes(tmp_path, notes):
    write, file, read = LOADERS["checkpoint"]
    write(tmp_path); noted(tmp_path/file, **notes)
    refused(read, tmp_path)


# --- sizes that a description claims -----------------------------------------------------------------------------

def change_cache(folder, **fields):
    "Change what a cache says about itself, in the description of its arrays too, so that all agree."
    about = json.loads((folder/"zarr.json").read_text())
    spec = about["attributes"]["raptor"]; spec.update(fields)
    (folder/"zarr.json").write_text(json.dumps(about))
    n, (a, b), c = spec["num_images"], spec["layers"], spec["chunk_images"]
    for name, shape, chunk in (("states", [n, b - a + 1, spec["num_tokens"], spec["dim"]], [c, spec["chunk_states"], spec["num_tokens"], spec["dim"]]), ("targets", [n], [c])):
        array = json.loads((folder/name/"zarr.json").read_text())
        array["shape"], array["chunk_grid"]["configuration"]["chunk_shape"] = shape, chunk
        if name == "targets": array["data_type"] = spec["targets"]
        (folder/name/"zarr.json").write_text(json.dumps(array))

@pytest.mark.parametrize("fields,sentence", [
    (dict(num_images=10**13), "num_images Input should be less"), (dict(num_images=6.0), "num_images .*valid integer"),
    (dict(num_images=True, chunk_images=True), "num_images .*valid integer"), (dict(num_images=-6), "num_images .*greater"),
    (dict(num_images=10**8), "2 chunks and needs 25000000"), (dict(num_images=9), "2 chunks and needs 3"),
    (dict(num_images=10**8, chunk_images=10**8), "first chunk"), (dict(chunk_images=7), "larger than the cache"),
    (dict(chunk_states=2), "one state or all"), (dict(chunk_states=True), "chunk_states .*valid integer"),
    (dict(chunk_states=3), "first chunk"), (dict(dim=10**12), "dim .*less"), (dict(dim=3), "first chunk"),
    (dict(num_tokens=10**12), "num_tokens .*less"), (dict(num_tokens=40), "first chunk"),
    (dict(depth=10**9, layers=[0, 10**9]), "depth .*less"), (dict(layers=[0, 5]), "not a span"),
    (dict(layers=[-3, 2]), "not a span"), (dict(layers=[0, 1.0]), "layers.1 .*valid integer"),
    (dict(num_prefix=10**9), "prefix"), (dict(num_prefix="1"), "prefix"), (dict(has_cls=1), "has_cls"),
    (dict(dtype="object"), "dtype"), (dict(targets="O"), "targets"), (dict(targets=["int64"]), "targets"),
    (dict(checksums=7), "no checksum for each file"), (dict(checksums="00"), "no checksum for each file"),
    (dict(checksums=[0]*8), "no checksum for each file"), (dict(checksums="zz"*32), "no checksum for each file"),
    (dict(checksums="0"*64), "is not the one"), (dict(augmented=1), "augmented"), (dict(owner=3), "owner"),
    (dict(fingerprint=3), "fingerprint .*valid string"), ({"evil\nkey": 1}, "evil key")])
def test_a_cache_that_is_larger_than_its_files(tmp_path, fields, sentence):
    folder = make_cache(tmp_path/"cache")
    change_cache(folder, **fields)
    refused(read_cache, folder, sentence)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"attributes":' * 10**5, '{"attributes": {"raptor": {"num_images": ' + "9" * 5000 + "}}}", "[]", "3"])
@pytest.mark.parametrize("file", ["zarr.json", "states/zarr.json"])
def test_a_description_of_a_cache_that_is_none(tmp_path, file, text):
    folder = make_cache(tmp_path/"cache")
    (folder/file).write_text(text)
    refused(read_cache, folder, "zarr.json")


def test_a_cache_without_chunks(tmp_path):
    folder = make_cache(tmp_path/"cache")
    (folder/"states"/"c").rename(tmp_path/"elsewhere")
    refused(read_cache, folder, "0 chunks and needs 2")


@pytest.mark.parametrize("text", ["[" * 10**5, "9" * 5000, '{"format": ' + "9" * 5000 + "}"])
def test_a_configuration_of_a_raptor_that_is_none(tmp_path, text):
    save_raptor(tmp_path)
    (tmp_path/"config.json").write_text(text)
    refused(Raptor.from_pretrained, tmp_path, "config.json")


@pytest.mark.parametrize("grid", ["[1000000, 1000000]", "[0, 0]", "[-1, 36]", "null", "[" * 10**5, "9" * 5000, '["6", "6"]', "[4, 9, 1]"])
def test_weights_that_lie_about_their_grid(tmp_path, grid):
    "The grid decides how the position embedding is resampled."
    torch.manual_seed(0)
    path = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False).save(tmp_path/"w.safetensors")
    noted(path, name="vit_nano_patch4_reg4_24", img_size="[24, 24]", grid=grid)
    refused(lambda _: Backbone.create("vit_nano_patch4_reg4_24", weights=path, img_size=32), path, "do not fit")


# --- names that become folders -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["../../elsewhere", "/elsewhere", "a/b", ".."])
def test_a_preset_cannot_name_a_folder_outside_its_study(tmp_path, name):
    values = yaml.safe_load(preset_path("smoke").read_text())
    (tmp_path/"mine.yaml").write_text(yaml.safe_dump({**values, "extra_models": {name: {"name": "vit_nano_patch4_reg4_24", "random": True}}}))
    refused(load_preset, tmp_path/"mine.yaml", "extra_models")


def test_the_name_of_a_preset_file_is_the_name_of_a_folder(tmp_path):
    (tmp_path/"...yaml").write_text(preset_path("smoke").read_text())
    refused(load_preset, tmp_path/"...yaml")
