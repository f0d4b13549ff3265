"CIFAR, ImageNet and folders, on files made here."
import errno, hashlib, io, os, pickle, re, shutil, tarfile, tempfile, threading, warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from raptor.core import RaptorError
from raptor.data import files as image_files, folders
from raptor.data.load import load_dataset
from raptor.data.base import DatasetSpec
from raptor.data.cifar import SOURCES
from raptor.data.files import FileDataset, ImageArrays, ImageFiles, read_image
from raptor.pipeline.cli import main
from raptor.study.presets import load_preset
from raptor.study.study import Study


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    "Where lists of unreadable files are kept; loader processes that fail leave their folders with pytest's."
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("RAPTOR_HOME", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.getbasetemp()))
    return folder


def save(path, pixels, **options):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def noise(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def grey(value, side=32): return np.full((side, side, 3), value, np.uint8)


def truncate(path): path.write_bytes(path.read_bytes()[:-(path.stat().st_size//2)])


@pytest.fixture
def cifar(tmp_path):
    "Twenty training and two test files a class; grey level 12 c + j in class c."
    for c in range(10):
        for j in range(20): save(tmp_path/f"cifar10/train/c{c}/{j:04}.png", grey(12*c + j))
        for j in range(2): save(tmp_path/f"cifar10/test/c{c}/{j:04}.png", grey(200 + j))
    return tmp_path


@pytest.fixture
def photos(tmp_path):
    "Three classes, two photographs each, train and val, 80 x 100."
    for split in ("train", "val"):
        for c, name in enumerate(("n01", "n02", "n03")):
            for j in range(2): save(tmp_path/f"imagenet/{split}/{name}/{j}.JPEG", noise(80, 100, 10*c + j))
    return tmp_path


# --- CIFAR-10 -------------------------------------------------------------------------------------

def test_cifar_val_is_the_last_tenth_of_each_class_and_not_in_train(cifar):
    train, val, test = (load_dataset("cifar10", s, root=cifar) for s in ("train", "val", "test"))
    names = [set(d.files.paths.flat) for d in (train, val, test)]
    assert len(names[0] & names[1]) == 0 and (len(train), len(val), len(test)) == (180, 20, 20)
    assert torch.bincount(val.labels).tolist() == [2]*10 and torch.bincount(train.labels).tolist() == [18]*10
    assert val.images[:, 2, 31, 31].tolist() == [12*c + j for c in range(10) for j in (18, 19)]
    assert val.class_names == tuple(f"c{c}" for c in range(10)) and val.num_classes == 10


def test_cifar_augmentation_is_a_function_of_seed_epoch_and_index(cifar):
    for c in range(10): save(cifar/f"cifar10/train/c{c}/0000.png", noise(32, 32, c))
    a, b = (load_dataset("cifar10", "train", root=cifar) for _ in range(2))
    a[3], a[100] # other items first
    assert torch.equal(a.get_batch([0, 18])["image"][1], b[18]["image"])
    first = b[18]["image"]
    b.set_epoch(1)
    assert not torch.equal(b[18]["image"], first)
    assert not torch.equal(load_dataset("cifar10", "train", root=cifar, seed=1)[18]["image"], first)
    plain = load_dataset("cifar10", "train", root=cifar, augment=False)
    seen = set()
    pad = torch.nn.functional.pad(plain.images[18], (4,)*4)
    for epoch in range(12): # shift up to four, mirrored or not
        a.set_epoch(epoch)
        mean, std = (torch.tensor(v)[:, None, None] for v in (a.mean, a.std))
        pixels = (a[18]["image"]*std + mean).mul(255).round().byte()
        windows = {(y, x): pad[:, y:y + 32, x:x + 32] for y in range(9) for x in range(9)}
        hit = [(*k, f) for k, w in windows.items() for f in (0, 1) if torch.equal(w.flip(-1) if f else w, pixels)]
        assert len(hit) == 1
        seen.add(hit[0])
    assert len(seen) > 8 and {f for _, _, f in seen} == {0, 1}


def test_cifar_at_another_size_is_resized_as_drawn(cifar):
    data = load_dataset("cifar10", "test", root=cifar, size=48)
    assert data.images.shape[-2:] == (32, 32) and data.size == (48, 48)
    image = data[0]["image"]
    assert image.shape == (3, 48, 48)
    assert torch.allclose(image.mean((1, 2)), (200/255 - torch.tensor(data.mean))/torch.tensor(data.std), atol=1e-4)


def test_limit_keeps_all_classes_in_view(cifar):
    data = load_dataset("cifar10", "train", root=cifar, limit=60)
    assert len(data) == 60 and len(set(data.labels.tolist())) >= 9
    again = load_dataset("cifar10", "train", root=cifar, limit=60, augment=False)
    assert torch.equal(data.labels, again.labels) and len(again.images) == 60


@pytest.mark.parametrize("kind, classes", [("cifar10", 10), ("cifar100", 100)])
def test_image_files_of_the_wrong_number_of_classes_are_an_error(cifar, kind, classes):
    if kind == "cifar100": (cifar/"cifar10").rename(cifar/"cifar100")
    shutil.rmtree(cifar/kind/"test/c3")
    said = f"{kind}/test has images of 9 classes instead of {classes}"
    with pytest.raises(RaptorError, match=said): load_dataset(kind, "test", root=cifar)


# --- CIFAR in the original archives ---------------------------------------------------------------

def write_archive(folder, kind, monkeypatch):
    """The original format with 40 training and 10 test images; image i has grey level i in red, 2 i in green, 3 i in
    blue, and class i % 10 (of 100). torchvision's checksums are replaced by those of these files."""
    source, hundred = SOURCES[kind], kind == "cifar100"
    batches = folder/source.base_folder
    batches.mkdir(parents=True)
    def write(name, content):
        (batches/name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((batches/name).read_bytes()).hexdigest()]
    def images(n): # rows of 1024 red, 1024 green and 1024 blue values
        pixels = np.arange(n, dtype=np.uint8)[:, None]*np.repeat([1, 2, 3], 1024).astype(np.uint8)
        return {"data": pixels, "fine_labels" if hundred else "labels": [i % 10 for i in range(n)]}
    train, test = (("train", 40), ("test", 10)) if hundred else (("data_batch_1", 40), ("test_batch", 10))
    names = [f"name{c}" for c in range(100 if hundred else 10)]
    meta = write("meta" if hundred else "batches.meta", {"fine_label_names" if hundred else "label_names": names})
    monkeypatch.setattr(source, "train_list", [write(train[0], images(train[1]))])
    monkeypatch.setattr(source, "test_list", [write(test[0], images(test[1]))])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": meta[1]})
    archive = folder/source.filename
    with tarfile.open(archive, "w:gz") as tar: tar.add(batches, batches.name)
    monkeypatch.setattr(source, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    shutil.rmtree(batches)
    return archive


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_archives_are_unpacked_and_read(tmp_path, monkeypatch, kind):
    write_archive(tmp_path/kind, kind, monkeypatch)
    train, val, test = (load_dataset(kind, s, root=tmp_path, augment=False) for s in ("train", "val", "test"))
    assert (tmp_path/kind/SOURCES[kind].base_folder).is_dir()
    assert (len(train), len(val), len(test)) == (40, 0, 10) # a tenth of four is none
    assert train.images[7, :, 31, 0].tolist() == [7, 14, 21] and train.labels.tolist() == [*range(10)]*4
    assert train.size == (32, 32) and train.num_classes == (10 if kind == "cifar10" else 100)
    assert train.class_names[9] == "name9" and test[3]["target"] == 3
    mean, std = torch.tensor(test.mean), torch.tensor(test.std)
    assert torch.allclose(test[3]["image"][:, 5, 5], (torch.tensor([3, 6, 9])/255 - mean)/std)
    few = load_dataset(kind, "train", root=tmp_path, limit=15, size=48)
    assert len(few) == 15 and few[0]["image"].shape == (3, 48, 48) and few.fingerprint != train.fingerprint
    assert few.transform == "shift 4, flip True"
    assert test.fingerprint == load_dataset(kind, "test", root=tmp_path).fingerprint


def test_archives_may_lie_in_the_root_as_torchvision_puts_them(tmp_path, monkeypatch):
    write_archive(tmp_path, "cifar10", monkeypatch)
    assert len(load_dataset("cifar10", "test", root=tmp_path)) == 10 and not (tmp_path/"cifar10").exists()


@pytest.fixture
def server(tmp_path):
    "The address of the files in `server/`."
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path/"server")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_archives_are_downloaded_only_on_request(tmp_path, monkeypatch, server):
    archive = write_archive(tmp_path/"server", "cifar10", monkeypatch)
    monkeypatch.setattr(SOURCES["cifar10"], "url", f"{server}/{archive.name}")
    said = f"no intact {archive.name} in {tmp_path}/data/cifar10.*put {server}/{archive.name} there"
    with pytest.raises(RaptorError, match=said) as e: load_dataset("cifar10", "test", root=tmp_path/"data")
    assert "\n" not in str(e.value) and not (tmp_path/"data").exists()
    assert len(load_dataset("cifar10", "test", root=tmp_path/"data", download=True)) == 10
    archive.unlink() # the second time nothing is fetched
    assert len(load_dataset("cifar10", "train", root=tmp_path/"data", download=True)) == 40


@pytest.mark.parametrize("by", ["command", "preset"])
def test_a_command_and_a_preset_fetch_an_archive(tmp_path, monkeypatch, server, capsys, by):
    archive = write_archive(tmp_path/"server", "cifar10", monkeypatch)
    monkeypatch.setattr(SOURCES["cifar10"], "url", f"{server}/{archive.name}")
    monkeypatch.setenv("RAPTOR_DATA", str(tmp_path/"data"))
    if by == "preset":
        preset = load_preset("photos")
        with pytest.raises(RaptorError, match="fetch it with `raptor data cifar10`"): Study.open(preset, tmp_path).dataset()
        fetching = preset.model_copy(update={"data": preset.data.model_copy(update={"download": True})})
        assert str(fetching) == str(preset), "where the data come from is no setting of a study"
        assert len(Study.open(fetching, tmp_path).dataset()) == 40
    else:
        with pytest.raises(SystemExit, match="0"): main(["data", "cifar10"])
        assert capsys.readouterr().out.splitlines() == [f"cifar10 {split}: {n} images, 32 x 32 pixels, classification" for split, n in (("train", 40), ("val", 0), ("test", 10))] + [f"folder: {tmp_path}/data/cifar10"]
    assert (tmp_path/"data"/"cifar10"/archive.name).exists()


def test_damaged_archives_are_an_error(tmp_path, monkeypatch):
    archive = write_archive(tmp_path/"cifar10", "cifar10", monkeypatch)
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-9])
    with pytest.raises(RaptorError, match=f"no intact {archive.name}"): load_dataset("cifar10", "val", root=tmp_path)
    archive.write_bytes(whole)
    load_dataset("cifar10", "train", root=tmp_path)
    (tmp_path/"cifar10/cifar-10-batches-py/data_batch_1").write_bytes(b"")
    assert len(load_dataset("cifar10", "train", root=tmp_path)) == 40 # unpacked again
    monkeypatch.setattr(SOURCES["cifar10"], "test_list", [["gone", "0"*32]])
    with pytest.raises(RaptorError, match="cannot be fetched or unpacked"): load_dataset("cifar10", "train", root=tmp_path)


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(SOURCES["cifar10"], "url", (tmp_path/"nowhere.tar.gz").as_uri())
    with pytest.raises(RaptorError, match="nowhere.tar.gz cannot be fetched or unpacked in .*cifar10 .*No such file"):
        load_dataset("cifar10", "train", root=tmp_path/"data", download=True)
    assert not (tmp_path/"data"/"cifar10").exists()


# --- ImageNet -------------------------------------------------------------------------------------

def test_evaluation_sees_the_central_224_of_256(tmp_path):
    pixels = grey(0, 256)
    pixels[16:240, 16:240] = 255
    save(tmp_path/"imagenet/val/n01/a.png", pixels)
    data = load_dataset("imagenet", "val", root=tmp_path, mean=(0,)*3, std=(1,)*3)
    assert data[0]["image"].shape == (3, 224, 224) and (data[0]["image"] == 1).all()
    small = load_dataset("imagenet", "val", root=tmp_path, size=28, mean=(0,)*3, std=(1,)*3)[0]["image"]
    assert small.shape == (3, 28, 28) and small[:, 2:-2, 2:-2].min() > 0.99 and small.mean() > 0.97


def test_evaluation_crops_the_longer_side(tmp_path):
    "512 wide, 256 high: columns 144..367 remain."
    pixels = np.zeros((256, 512, 3), np.uint8)
    pixels[:, 144:368] = 255
    save(tmp_path/"imagenet/val/n01/a.png", pixels)
    image = load_dataset("imagenet", "val", root=tmp_path, mean=(0,)*3, std=(1,)*3)[0]["image"]
    assert (image == 1).all()


def test_classes_are_numbered_by_the_training_folders(photos):
    shutil.rmtree(photos/"imagenet/val/n02")
    val = load_dataset("imagenet", "val", root=photos)
    assert val.labels.tolist() == [0, 0, 2, 2] and val.class_names == ("n01", "n02", "n03")
    save(photos/"imagenet/val/n99/a.png", noise(9, 9))
    with pytest.raises(RaptorError, match="val/n99 has no counterpart"): load_dataset("imagenet", "val", root=photos)


def test_training_items_depend_on_seed_epoch_and_index_only(photos):
    data = load_dataset("imagenet", "train", root=photos, size=32)
    items = [data[i]["image"] for i in range(6)]
    shuffled = {i: data[i]["image"] for i in (5, 2, 2, 0)}
    assert all(torch.equal(items[i], shuffled[i]) for i in shuffled)
    for workers in (1, 2):
        for batch in DataLoader(data, batch_size=2, num_workers=workers):
            for i, image in zip(batch["index"].tolist(), batch["image"]): assert torch.equal(image, items[i])
    data.set_epoch(1)
    assert not any(torch.equal(data[i]["image"], items[i]) for i in range(6))
    data.set_epoch(0)
    assert torch.equal(data[4]["image"], items[4])
    assert not torch.equal(load_dataset("imagenet", "train", root=photos, size=32, seed=1)[4]["image"], items[4])


def test_drawing_an_item_leaves_the_global_stream_alone(photos, monkeypatch):
    data = load_dataset("imagenet", "train", root=photos, size=32)
    torch.manual_seed(5); wanted = torch.rand(3)
    torch.manual_seed(5); data[0]
    assert torch.equal(torch.rand(3), wanted)
    monkeypatch.setattr(data, "read", lambda i: 1/0)
    torch.manual_seed(5)
    with pytest.raises(ZeroDivisionError): data[0]
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "I;16"])
def test_every_pillow_mode_gives_three_channels(tmp_path, mode):
    image = Image.fromarray(noise(70, 70)).convert(mode if mode != "I;16" else "RGB")
    if mode == "I;16": image = Image.fromarray(np.full((70, 70), 1000, np.uint16))
    path = tmp_path/("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    assert read_image(path).mode == "RGB" and read_image(path).size == (70, 70)


# --- folders --------------------------------------------------------------------------------------

def test_hash_split_is_fixed_and_about_80_10_10():
    counts = Counter(folders._hash_split(f"class/{i:05}.png") for i in range(5000))
    assert abs(counts["train"] - 4000) < 120 and abs(counts["val"] - 500) < 90 and sum(counts.values()) == 5000
    for path in ("cat/1.png", "dog/é.jpg"):
        digit = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 10
        assert folders._hash_split(path) == {8: "val", 9: "test"}.get(digit, "train")


def test_folder_without_splits_is_divided_and_files_never_move(tmp_path):
    for c in ("cat", "dog"):
        for j in range(40): save(tmp_path/c/f"{j}.png", grey(j, 16))
    splits = "train", "val", "test"
    def files(): return {s: set(load_dataset(f"folder:{tmp_path}", s).files.paths.flat) for s in splits}
    before = files()
    assert sum(map(len, before.values())) == 80 == len(set().union(*before.values()))
    for j in range(40, 60): save(tmp_path/"dog"/f"{j}.png", grey(j, 16))
    after = files()
    assert all(before[s] <= after[s] for s in before)


def test_folder_with_splits_and_odd_names(tmp_path):
    save(tmp_path/"train/ein Hund/ü 1.png", grey(7, 16)); save(tmp_path/"train/cat/deep/er/2.PNG", grey(8, 16))
    save(tmp_path/"val/cat/3.png", grey(9, 16)); save(tmp_path/"train/cat/.hidden.png", grey(9, 16))
    (tmp_path/"train/cat/notes.txt").write_text("no image")
    train, val = (load_dataset(f"folder:{tmp_path.name}", s, root=tmp_path.parent) for s in ("train", "val"))
    assert train.class_names == ("cat", "ein Hund") and train.labels.tolist() == [0, 1]
    assert train.images[:, 0, 0, 0].tolist() == [8, 7]
    assert val.labels.tolist() == [0] and val.size == (16, 16) and val.name == f"folder:{tmp_path.name}"
    said = r"holds train/, val/ and nothing for the split 'test'; use 'val' \(in a preset, data: \{test_split: val\}\)"
    with pytest.raises(RaptorError, match=said): load_dataset(f"folder:{tmp_path}", "test")
    with pytest.raises(RaptorError, match="imagenet has no split 'test'; use 'val'"): load_dataset("imagenet", "test")


def quiet(name, split, **kwargs): # without warnings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_dataset(name, split, **kwargs)


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Train", "VAL", "Test"), ("training", "valid", "testing"), ("Training", "Validation", "TEST")])
def test_split_folders_by_their_usual_names(tmp_path, names):
    for i, name in enumerate(names):
        for c in ("cat", "dog"): save(tmp_path/name/c/"1.png", grey(10*i))
    for i, split in enumerate(("train", "val", "test")):
        data = quiet(f"folder:{tmp_path}", split)
        assert data.class_names == ("cat", "dog") and data.images[:, 0, 0, 0].tolist() == [10*i]*2


def test_two_folders_for_one_split_are_an_error(tmp_path):
    for name in ("val", "Validation"): save(tmp_path/name/"cat"/"1.png", grey(1))
    with pytest.raises(RaptorError, match="has both Validation/ and val/; keep one"): load_dataset(f"folder:{tmp_path}", "val")


def test_a_class_may_be_named_like_a_split(tmp_path):
    for name in ("bus", "car", "train"):
        for j in range(9): save(tmp_path/name/f"{j}.png", grey(j))
    assert quiet(f"folder:{tmp_path}", "train").class_names == ("bus", "car", "train")


LEFT_OUT = { # file -> what a warning says of it; None: nothing, for nobody means it
    "cat/.ipynb_checkpoints/3-checkpoint.png": None, ".cache/cat/1.png": None, "cat/a/.b/1.png": None, "cat/._1.png": None,
    "__MACOSX/cat/1.png": None, "cat/@eaDir/1.png": None, "cat/1.heic": "passed over 1 files .1 .heic.; read are .bmp",
    "cat/a/b/c.avif": ".1 .avif.", "cat/Thumbs.db": ".1 .db.", "cat/README": ".1 without suffix.",
    "9.png": ".1 .png.", "dog": ".1 without suffix."} # beside the class folders; a file in the place of one

@pytest.mark.parametrize("file, said", LEFT_OUT.items(), ids=LEFT_OUT)
@pytest.mark.parametrize("above", ["", "val/"])
def test_what_is_no_image_of_a_class_is_left_out(tmp_path, above, file, said):
    for j in range(20): save(tmp_path/f"{above}cat/{j}.png", grey(7))
    save(tmp_path/"x.png", grey(9))
    (tmp_path/above/file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path/"x.png").rename(tmp_path/above/file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sets = [load_dataset(f"folder:{tmp_path}", s) for s in (("val",) if above else ("train", "val", "test"))]
    assert sum(map(len, sets)) == 20 and {x.class_names for x in sets} == {("cat",)}
    assert bool(caught) == bool(said) and all(re.search(said, str(w.message)) for w in caught)


@pytest.mark.parametrize("empty, said", [
    ({}, "dog holds no images; read are .bmp .gif .jpeg"), ({"a.heic": 3}, "dog holds no images, but 3 .heic, passed over"),
    ({".hidden.png": 1}, "dog holds no images; ")])
def test_a_class_folder_without_images_is_an_error(tmp_path, empty, said):
    save(tmp_path/"train/cat/1.png", grey(1)); (tmp_path/"train/dog").mkdir(); (tmp_path/"train/cow").mkdir()
    save(tmp_path/"train/cow/1.png", grey(1)); save(tmp_path/"val/cat/1.png", grey(1))
    for name, n in empty.items():
        for i in range(n): (tmp_path/"train/dog"/(name if n == 1 else f"{i}{name}")).touch()
    with pytest.raises(RaptorError, match=said): load_dataset(f"folder:{tmp_path}", "train")
    with pytest.warns(UserWarning, match=r"no images of 2 of 3 classes \(cow, dog\)"): # numbered by train/
        assert load_dataset(f"folder:{tmp_path}", "val").num_classes == 3


def test_links_to_folders_are_followed_and_circles_are_not(tmp_path):
    save(tmp_path/"data/val/cat/1.png", grey(1)); save(tmp_path/"more/2.png", grey(2))
    cat = tmp_path/"data/val/cat"
    (cat/"more").symlink_to(tmp_path/"more")
    (cat/"up").symlink_to(cat.parent); (tmp_path/"more/self").symlink_to(tmp_path/"more"); (cat/"again").symlink_to(cat)
    (tmp_path/"data/val/dog").symlink_to(tmp_path/"more") # a class folder
    data = quiet(f"folder:{tmp_path/'data'}", "val")
    assert data.class_names == ("cat", "dog") and data.labels.tolist().count(1) == 1
    assert sorted(set(data.images[data.labels == 0][:, 0, 0, 0].tolist())) == [1, 2]


@pytest.mark.parametrize("make, said", [
    (lambda p: p.symlink_to(p.name), "not readable .too many levels"), (lambda p: p.symlink_to("gone.png"), "does not exist"),
    (os.mkfifo, "is not a regular file"), (lambda p: p.symlink_to("/dev/zero"), "is not a regular file"),
    (Path.touch, r"cannot be decoded \(it is not JPEG, PNG"), (lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "cannot be decoded"),
    (lambda p: Image.fromarray(np.full((8, 8), .5, np.float32)).save(p, "TIFF"), "32 bits and no known range: save it with 8 or 16"),
    (lambda p: Image.fromarray(np.full((8, 8), 70000, np.int32)).save(p, "TIFF"), "32 bits and no known range")])
def test_files_that_are_no_images_are_one_sentence(tmp_path, make, said):
    save(tmp_path/"val/cat/1.png", grey(1)); make(tmp_path/"val/cat/2.png")
    with pytest.raises(RaptorError, match=f"image {tmp_path}/val/cat/2.png .*{said}.*; replace it or load") as e:
        load_dataset(f"folder:{tmp_path}", "val").images
    assert "\n" not in str(e.value)
    with pytest.warns(UserWarning, match="left out 1 unreadable items of 2"):
        assert load_dataset(f"folder:{tmp_path}", "val", on_error="skip").images[:, 0, 0, 0].tolist() == [1]


def test_names_that_are_not_utf8(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"val", b"\xe9t\xe9")
    os.makedirs(folder)
    save(tmp_path/"x.png", grey(5)).rename(os.fsdecode(os.path.join(folder, b"\xff.png")))
    data = quiet(f"folder:{tmp_path}", "val")
    assert data.class_names == (r"\xe9t\xe9",) and data.images[0, 0, 0, 0] == 5
    assert data.class_names[0].encode() and load_dataset(f"folder:{tmp_path}", "val", on_error="skip").fingerprint == data.fingerprint


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    save(tmp_path/"val/cat/1.png", grey(1)); real = os.scandir
    def scandir(place):
        if str(place).endswith("cat"): raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return real(place)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(RaptorError, match="val/cat cannot be listed .Permission denied.; make it readable"): load_dataset(f"folder:{tmp_path}", "val")


# --- pixels ---

def tagged(path, orientation, form): # a red half on the left, a blue one on the right, 16 wide and 8 high
    pixels = np.zeros((8, 16, 3), np.uint8); pixels[:, :8, 0] = 255; pixels[:, 8:, 2] = 255
    exif = Image.Exif(); exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, form, exif=exif, **({"quality": 100, "subsampling": 0} if form == "JPEG" else {}))

@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation, size, red", [
    (1, (8, 16), "left"), (2, (8, 16), "right"), (3, (8, 16), "right"), (4, (8, 16), "left"), (5, (16, 8), "top"),
    (6, (16, 8), "top"), (7, (16, 8), "bottom"), (8, (16, 8), "bottom")])
def test_photographs_of_a_folder_are_turned_upright(tmp_path, form, orientation, size, red):
    (tmp_path/"val/cat").mkdir(parents=True)
    tagged(tmp_path/"val/cat/1.png", orientation, form)
    data = load_dataset(f"folder:{tmp_path}", "val")
    image = data.images[0].float()
    halves = {"left": image[0, :, :4], "right": image[0, :, -4:], "top": image[0, :4], "bottom": image[0, -4:]}
    assert data.size == size and halves[red].min() > 200 and max(halves, key=lambda k: halves[k].mean()) == red
    assert read_image(tmp_path/"val/cat/1.png").size == (16, 8) or form == "TIFF" # as it is stored, for ImageNet


def saved(array_or_image, form="PNG", **options):
    out = io.BytesIO()
    (array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)).save(out, form, **options)
    return out.getvalue()

def palette(**options):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 10, 20, 30])
    return saved(image, **options)

deep = np.full((4, 4), 0x80ff, np.uint16)
PIXELS = { # file -> the colour that must come out
    "16-bit PNG": (saved(deep), (128,)*3), "16-bit TIFF": (saved(deep, "TIFF"), (128,)*3),
    "16-bit TIFF, big-endian": (saved(Image.fromarray(deep.astype(">u2")), "TIFF"), (128,)*3),
    "16-bit PGM": (b"P5 4 4 65535\n" + deep.astype(">u2").tobytes(), (128,)*3),
    "12 bits in a PGM": (b"P5 4 4 4095\n" + np.full(16, 2056, ">u2").tobytes(), (128,)*3),
    "16-bit white": (saved(np.full((4, 4), 65535, np.uint16)), (255,)*3),
    "8-bit grey": (saved(np.full((4, 4), 77, np.uint8)), (77,)*3), "1 bit": (saved(Image.new("1", (4, 4), 1)), (255,)*3),
    "palette": (palette(), (10, 20, 30)), "palette with a transparent colour": (palette(transparency=1), (10, 20, 30)),
    "palette with transparency": (palette(transparency=bytes([0, 128])), (10, 20, 30)),
    "RGBA": (saved(Image.new("RGBA", (4, 4), (10, 20, 30, 0))), (10, 20, 30)),
    "grey with transparency": (saved(Image.new("LA", (4, 4), (40, 0))), (40,)*3),
    "CMYK TIFF": (saved(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "CMYK JPEG": (saved(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG", quality=100), (254, 0, 0)),
    "animation": (saved(Image.new("RGB", (4, 4), (10, 20, 30)), "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), (200, 0, 0))]), (10, 20, 30)),
    "animated PNG": (saved(Image.new("RGB", (4, 4), (10, 20, 30)), save_all=True, append_images=[Image.new("RGB", (4, 4), (200, 0, 0))]), (10, 20, 30))}

@pytest.mark.parametrize("content, colour", PIXELS.values(), ids=PIXELS)
def test_pixels_of_every_kind_of_file(tmp_path, content, colour):
    (tmp_path/"val/cat").mkdir(parents=True); (tmp_path/"val/cat/1.png").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_dataset(f"folder:{tmp_path}", "val").images[0]
    assert image.shape == (3, 4, 4) and (image.flatten(1).int() - torch.tensor(colour)[:, None]).abs().max() <= 1


def test_small_folders_stay_in_memory_large_ones_do_not(tmp_path):
    for j in range(3):
        for folder, h in (("a", 64), ("b", 65)): save(tmp_path/f"{folder}/val/c/{j}.png", noise(h, 48, j))
    a, b = (load_dataset(f"folder:{tmp_path/x}", "val") for x in "ab")
    assert isinstance(a, ImageArrays) and a.size == (64, 48)
    assert isinstance(b, ImageFiles) and b.size == (224, 224)
    assert load_dataset(f"folder:{tmp_path/'b'}", "val", size=30)[0]["image"].shape == (3, 30, 30)


def test_small_images_of_other_sizes_are_resized(tmp_path):
    save(tmp_path/"val/c/a.png", grey(50, 20)); save(tmp_path/"val/c/b.png", grey(90, 40))
    data = load_dataset(f"folder:{tmp_path}", "val")
    assert data.images.shape == (2, 3, 20, 20) and data.images[:, 0].float().mean((1, 2)).tolist() == [50, 90]


def test_missing_data_are_an_error_that_names_the_path(tmp_path):
    for name, said in (("imagenet", "imagenet/val"), (f"folder:{tmp_path/'x'}", "x")):
        with pytest.raises(RaptorError, match=f"no class folders in {tmp_path}.*{said}"):
            load_dataset(name, "val", root=tmp_path)
    (tmp_path/"imagenet/val").mkdir(parents=True)
    with pytest.raises(RaptorError, match="there are no class folders"): load_dataset("imagenet", "val", root=tmp_path)
    (tmp_path/"imagenet/val/n01").mkdir()
    with pytest.raises(RaptorError, match="imagenet/val/n01 holds no images"): load_dataset("imagenet", "val", root=tmp_path)


# --- broken files ---------------------------------------------------------------------------------

def test_truncated_image_is_named_wherever_it_is_drawn(photos):
    bad = photos/"imagenet/val/n02/1.JPEG"
    truncate(bad)
    data = load_dataset("imagenet", "val", root=photos, size=32)
    assert data[2]["index"] == 2
    for draw in (lambda: data[3], lambda: data.get_batch([0, 3]), lambda: list(DataLoader(data, num_workers=2))):
        with pytest.raises(RaptorError, match="n02/1.JPEG"): draw()


def test_missing_image_is_named(photos):
    data = load_dataset("imagenet", "val", root=photos, size=32)
    (photos/"imagenet/val/n01/0.JPEG").unlink()
    with pytest.raises(RaptorError, match="n01/0.JPEG does not exist"): data[0]


@pytest.mark.parametrize("break_it", [truncate, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"text"),
    lambda p: p.write_bytes(p.read_bytes()[:60])])
@pytest.mark.parametrize("form", ["png", "jpg"])
def test_every_kind_of_damage_is_one_sentence(tmp_path, break_it, form):
    path = save(tmp_path/f"bad.{form}", noise(40, 40))
    break_it(path)
    with pytest.raises(RaptorError, match=f"bad.{form} cannot be decoded") as e: read_image(path)
    assert "\n" not in str(e.value)


def test_skip_leaves_out_counts_names_and_warns_once(photos, home):
    whole = load_dataset("imagenet", "val", root=photos, size=32)
    before = whole[4]["image"], whole.fingerprint
    truncate(photos/"imagenet/val/n02/0.JPEG"); truncate(photos/"imagenet/val/n02/1.JPEG")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_dataset("imagenet", "val", root=photos, size=32, on_error="skip")
    list_of_them, = (home/"unreadable").glob("*.json")
    assert [str(w.message) for w in caught] == ["imagenet val: left out 2 unreadable items of 6 "
        f"(val/n02/0.JPEG, val/n02/1.JPEG); delete the list {list_of_them} to read all files again"]
    assert [Path(p).name for p in data.skipped] == ["0.JPEG", "1.JPEG"] and data.labels.tolist() == [0, 0, 2, 2]
    assert torch.equal(data[2]["image"], before[0]) and data.fingerprint != before[1]
    assert len(list(DataLoader(data, batch_size=3, num_workers=1))) == 2


@pytest.mark.parametrize("time", ["first", "second"])
def test_skip_with_all_files_broken_is_an_error(photos, time):
    for p in (photos/"imagenet/val").rglob("*.JPEG"): p.write_bytes(b"")
    if time == "second": test_skip_with_all_files_broken_is_an_error(photos, "first")
    with pytest.raises(RaptorError, match="none of 6 images.*n01/0.JPEG"): skipping(photos)


@pytest.fixture
def decoded(monkeypatch):
    "The files that are decoded, as they are."
    names, real = [], image_files.read_image
    monkeypatch.setattr(image_files, "read_image", lambda path, *a: (names.append(path.name), real(path, *a))[1])
    return names


def skipping(root, **kwargs):
    "What is skipped of the photographs, without the warning."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_dataset("imagenet", "val", root=root, size=32, on_error="skip", **kwargs)


def test_unreadable_files_are_looked_for_once(photos, decoded):
    bad = photos/"imagenet/val/n02/0.JPEG"
    whole = bad.read_bytes()
    truncate(bad)
    first = skipping(photos)
    assert len(decoded) == 6
    decoded.clear()
    again = skipping(photos)
    assert decoded == [] and again.skipped == first.skipped == [str(bad)] and again.fingerprint == first.fingerprint
    assert torch.equal(again.labels, first.labels) and len(again) == 5
    with pytest.warns(UserWarning, match="left out 1 unreadable items of 6 .val/n02/0.JPEG"):
        load_dataset("imagenet", "val", root=photos, on_error="skip")
    few = [skipping(photos, limit=3) for _ in range(2)]
    assert {len(data) + len(data.skipped) for data in few} == {3} == {len(decoded)} # a list of their own
    decoded.clear()
    bad.write_bytes(whole) # repaired: its size differs
    assert skipping(photos).skipped == [] and len(decoded) == 6
    decoded.clear()
    assert len(skipping(photos)) == 6 and decoded == []
    shutil.rmtree(photos/"imagenet/val/n03")
    assert len(skipping(photos)) == 4 == len(decoded)


@pytest.mark.filterwarnings("ignore:imagenet val. left out 1")
def test_processes_that_open_a_data_set_together_decode_it_once(photos, decoded):
    truncate(photos/"imagenet/val/n01/1.JPEG")
    def load(_): return load_dataset("imagenet", "val", root=photos, on_error="skip")
    with ThreadPoolExecutor(4) as pool: sets = list(pool.map(load, range(4)))
    assert len(decoded) == 6 and {len(s.skipped) for s in sets} == {1}


def test_the_list_lies_beside_the_data_where_runs_cannot_be_written(photos, decoded, monkeypatch, home):
    (home/"file").write_text("")
    monkeypatch.setenv("RAPTOR_HOME", str(home/"file"/"below"))
    truncate(photos/"imagenet/val/n01/0.JPEG")
    assert len(skipping(photos).skipped) == 1 == len(list((photos/"imagenet/.unreadable").glob("*.json")))
    decoded.clear()
    assert len(skipping(photos).skipped) == 1 and decoded == []
    shutil.rmtree(photos/"imagenet/.unreadable")
    def refuse(folder): raise RaptorError("read-only")
    monkeypatch.setattr(image_files, "check_writable", refuse)
    for _ in range(2): # nowhere to keep it: a warning says so, and all files are read again
        with pytest.warns(UserWarning, match="n01/0.JPEG.; their list cannot be saved"):
            load_dataset("imagenet", "val", root=photos, on_error="skip")
    assert len(decoded) == 12


@pytest.mark.parametrize("damage", ["", "[1]", '{"positions": [6]}', '{"positions": ["0"]}', '{"positions": 3}'])
def test_a_damaged_list_is_made_again(photos, decoded, home, damage):
    truncate(photos/"imagenet/val/n01/0.JPEG")
    skipping(photos)
    path, = (home/"unreadable").glob("*.json")
    kept = path.read_text()
    path.write_text(damage)
    decoded.clear()
    assert len(skipping(photos).skipped) == 1 and len(decoded) == 6 and path.read_text() == kept


def test_what_a_disk_refuses_for_the_moment_is_not_remembered(photos, monkeypatch, home):
    real = image_files.read_image
    def fails(path, *a):
        if path.name == "1.JPEG": raise RaptorError("no image") from OSError(errno.EIO, "Input/output error")
        return real(path, *a)
    monkeypatch.setattr(image_files, "read_image", fails)
    assert len(skipping(photos).skipped) == 3 and not list((home/"unreadable").glob("*.json"))
    monkeypatch.undo()
    monkeypatch.setenv("RAPTOR_HOME", str(home))
    assert skipping(photos).skipped == []


def test_skip_in_memory(cifar):
    (cifar/"cifar10/test/c4/0001.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out 1"):
        data = load_dataset("cifar10", "test", root=cifar, on_error="skip")
    assert len(data.skipped) == 1 and data.images.shape[0] == 19 == len(data.labels)
    with pytest.raises(RaptorError, match="c4/0001.png"): load_dataset("cifar10", "test", root=cifar)[0]


# --- fingerprints and tables ----------------------------------------------------------------------

def test_fingerprint_is_that_of_the_files_not_of_the_place(photos, tmp_path):
    a = load_dataset("imagenet", "val", root=photos).fingerprint
    shutil.copytree(photos/"imagenet", tmp_path/"moved/imagenet")
    assert load_dataset("imagenet", "val", root=tmp_path/"moved").fingerprint == a
    x, y = (load_dataset(f"folder:{p}", "val").fingerprint for p in (photos/"imagenet", tmp_path/"moved/imagenet"))
    assert x == y != a
    with open(tmp_path/"moved/imagenet/val/n01/0.JPEG", "ab") as f: f.write(b"\0")
    assert load_dataset("imagenet", "val", root=tmp_path/"moved").fingerprint != a
    assert load_dataset("imagenet", "val", root=photos, limit=2).fingerprint != a


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.text("abcäß日 .-", min_size=1), st.text("xyz/", min_size=1)), min_size=1, max_size=5))
def test_paths_survive_the_table(rows):
    spec = DatasetSpec("folder:x", "val", "classification", (8, 8), (0,)*3, (1,)*3, False, None, 0)
    data = FileDataset(spec, "/data", rows)
    assert [data.files(i) for i in range(len(data))] == [[Path("/data")/f for f in row] for row in rows]


def test_threads_stop_at_the_first_error():
    called = set()
    def fails(i):
        called.add(i)
        if i == 700: raise RaptorError("seven hundred")
    with pytest.raises(RaptorError, match="seven hundred"): image_files._for_each(fails, 10**6, "x")
    assert len(called) < 10**6 # the calls that wait are cancelled
