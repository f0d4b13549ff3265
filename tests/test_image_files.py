"CIFAR-10, ImageNet and folders, on files made here."
import errno, hashlib, os, shutil, warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader

import raptor.data.files as image_files
from raptor.core import RaptorError
from raptor.data.load import load_dataset
from raptor.data.files import FileTable, for_each, hash_split, ImageArrays, ImageFiles, read_image, seeded


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    "Where lists of unreadable files are kept."
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("RAPTOR_HOME", str(folder))
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
            for j in range(2): save(tmp_path/f"imagenet/{split}/{name}/{j}.JPEG", noise(80, 100, 10*c + j), format="JPEG")
    return tmp_path


# --- CIFAR-10 -------------------------------------------------------------------------------------

def test_cifar_val_is_the_last_tenth_of_each_class_and_not_in_train(cifar):
    train, val, test = (load_dataset("cifar10", s, root=cifar) for s in ("train", "val", "test"))
    names = [set(d.files.table.paths.flat) for d in (train, val, test)]
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
    plain = load_dataset("cifar10", "train", root=cifar, train_transform=False)
    seen = set()
    pad = torch.nn.functional.pad(plain.images[18], (4,)*4)
    for epoch in range(12): # shift up to four, mirrored or not
        a.set_epoch(epoch)
        pixels = (a[18]["image"]*torch.tensor(a.std)[:, None, None] + torch.tensor(a.mean)[:, None, None]).mul(255).round().byte()
        hit = [(y, x, f) for y in range(9) for x in range(9) for f in (0, 1) if torch.equal(pad[:, y:y + 32, x:x + 32].flip(-1) if f else pad[:, y:y + 32, x:x + 32], pixels)]
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
    again = load_dataset("cifar10", "train", root=cifar, limit=60, train_transform=False)
    assert torch.equal(data.labels, again.labels) and len(again.images) == 60


def test_cifar_with_a_class_missing_is_told(cifar):
    shutil.rmtree(cifar/"cifar10/test/c3")
    with pytest.raises(RaptorError, match="9 class folders instead of 10"): load_dataset("cifar10", "test", root=cifar)


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
    with pytest.raises(RaptorError, match="'n99'"): load_dataset("imagenet", "val", root=photos)


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


def test_drawing_an_item_leaves_the_global_stream_alone(photos):
    data = load_dataset("imagenet", "train", root=photos, size=32)
    torch.manual_seed(5); wanted = torch.rand(3)
    torch.manual_seed(5); data[0]
    assert torch.equal(torch.rand(3), wanted)
    with pytest.raises(ZeroDivisionError):
        with seeded("x"): 1/0
    torch.manual_seed(5)
    with seeded("x"): torch.rand(9)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "I;16"])
def test_every_pillow_mode_gives_three_channels(tmp_path, mode):
    image = Image.fromarray(np.full((70, 70), 1000, np.uint16)) if mode == "I;16" else Image.fromarray(noise(70, 70)).convert(mode)
    path = tmp_path/("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    assert read_image(path).mode == "RGB" and read_image(path).size == (70, 70)


# --- folders --------------------------------------------------------------------------------------

def test_hash_split_is_fixed_and_about_80_10_10():
    counts = {s: sum(hash_split(f"class/{i:05}.png") == s for i in range(5000)) for s in ("train", "val", "test")}
    assert abs(counts["train"] - 4000) < 120 and abs(counts["val"] - 500) < 90 and sum(counts.values()) == 5000
    for path in ("cat/1.png", "dog/é.jpg"):
        digit = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 10
        assert hash_split(path) == {8: "val", 9: "test"}.get(digit, "train")


def test_folder_without_splits_is_divided_and_files_never_move(tmp_path):
    for c in ("cat", "dog"):
        for j in range(40): save(tmp_path/c/f"{j}.png", grey(j, 16))
    def files(): return {s: {os.fsdecode(p) for p in load_dataset(f"folder:{tmp_path}", s).files.table.paths.flat} for s in ("train", "val", "test")}
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
    assert train.class_names == ("cat", "ein Hund") and train.labels.tolist() == [0, 1] and train.images[:, 0, 0, 0].tolist() == [8, 7]
    assert val.labels.tolist() == [0] and val.size == (16, 16) and val.name == f"folder:{tmp_path.name}"
    with pytest.raises(RaptorError, match="there is no folder .*test"): load_dataset(f"folder:{tmp_path}", "test")


def test_small_folders_stay_in_memory_large_ones_do_not(tmp_path):
    for j in range(3): save(tmp_path/f"a/val/c/{j}.png", noise(64, 48, j)); save(tmp_path/f"b/val/c/{j}.png", noise(65, 48, j))
    a, b = (load_dataset(f"folder:{tmp_path/x}", "val") for x in "ab")
    assert isinstance(a, ImageArrays) and a.size == (64, 48) and isinstance(b, ImageFiles) and b.size == (224, 224)
    assert load_dataset(f"folder:{tmp_path/'b'}", "val", size=30)[0]["image"].shape == (3, 30, 30)


def test_small_images_of_other_sizes_are_resized(tmp_path):
    save(tmp_path/"val/c/a.png", grey(50, 20)); save(tmp_path/"val/c/b.png", grey(90, 40))
    data = load_dataset(f"folder:{tmp_path}", "val")
    assert data.images.shape == (2, 3, 20, 20) and data.images[:, 0].float().mean((1, 2)).tolist() == [50, 90]


def test_nothing_there_is_told_with_the_path(tmp_path):
    for name, said in (("imagenet", "imagenet/val"), ("cifar10", "cifar10/train"), (f"folder:{tmp_path/'x'}", "x")):
        with pytest.raises(RaptorError, match=f"there is no folder {tmp_path}.*{said}"): load_dataset(name, "val", root=tmp_path)
    (tmp_path/"imagenet/val").mkdir(parents=True)
    with pytest.raises(RaptorError, match="has no class folders"): load_dataset("imagenet", "val", root=tmp_path)
    (tmp_path/"imagenet/val/n01").mkdir()
    with pytest.raises(RaptorError, match="no images for imagenet val"): load_dataset("imagenet", "val", root=tmp_path)


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


@pytest.mark.parametrize("break_it", [truncate, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"text"), lambda p: p.write_bytes(p.read_bytes()[:60])])
@pytest.mark.parametrize("form", ["png", "jpg"])
def test_every_kind_of_damage_is_one_sentence(tmp_path, break_it, form):
    path = save(tmp_path/f"bad.{form}", noise(40, 40))
    break_it(path)
    with pytest.raises(RaptorError, match=f"cannot decode .*bad.{form}") as e: read_image(path)
    assert "\n" not in str(e.value)


def test_skip_leaves_out_counts_names_and_warns_once(photos, home):
    whole = load_dataset("imagenet", "val", root=photos, size=32)
    before = whole[4]["image"], whole.fingerprint
    truncate(photos/"imagenet/val/n02/0.JPEG"); truncate(photos/"imagenet/val/n02/1.JPEG")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_dataset("imagenet", "val", root=photos, size=32, on_error="skip")
    list_of_them, = (home/"unreadable").glob("*.json")
    assert [str(w.message) for w in caught] == [f"imagenet val: left out 2 unreadable items of 6 (val/n02/0.JPEG, val/n02/1.JPEG); they are listed in {list_of_them}, delete it to have all files looked at again"]
    assert [Path(p).name for p in data.skipped] == ["0.JPEG", "1.JPEG"] and data.labels.tolist() == [0, 0, 2, 2]
    assert torch.equal(data[2]["image"], before[0]) and data.fingerprint != before[1]
    assert len(list(DataLoader(data, batch_size=3, num_workers=1))) == 2


@pytest.mark.parametrize("time", ["first", "second"])
def test_skip_with_all_files_broken_is_an_error(photos, time):
    for p in (photos/"imagenet/val").rglob("*.JPEG"): p.write_bytes(b"")
    if time == "second": test_skip_with_all_files_broken_is_an_error(photos, "first")
    with pytest.raises(RaptorError, match="none of the 6 images.*n01/0.JPEG"): load_dataset("imagenet", "val", root=photos, on_error="skip")


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
    whole = bad.read_bytes(); truncate(bad)
    first = skipping(photos)
    assert len(decoded) == 6; decoded.clear()
    again = skipping(photos)
    assert decoded == [] and again.skipped == first.skipped == [str(bad)] and again.fingerprint == first.fingerprint
    assert torch.equal(again.labels, first.labels) and len(again) == 5
    with pytest.warns(UserWarning, match="left out 1 unreadable items of 6 .val/n02/0.JPEG"): load_dataset("imagenet", "val", root=photos, on_error="skip")
    assert len(skipping(photos, limit=3)) + len(skipping(photos, limit=3).skipped) == 3 and len(decoded) == 3; decoded.clear() # another table: its own list
    bad.write_bytes(whole) # mended: its size tells
    assert skipping(photos).skipped == [] and len(decoded) == 6; decoded.clear()
    assert len(skipping(photos)) == 6 and decoded == []
    shutil.rmtree(photos/"imagenet/val/n03")
    assert len(skipping(photos)) == 4 == len(decoded)


@pytest.mark.filterwarnings("ignore:imagenet val. left out 1")
def test_processes_that_open_a_data_set_together_decode_it_once(photos, decoded):
    truncate(photos/"imagenet/val/n01/1.JPEG")
    with ThreadPoolExecutor(4) as pool: sets = list(pool.map(lambda _: load_dataset("imagenet", "val", root=photos, on_error="skip"), range(4)))
    assert len(decoded) == 6 and {len(s.skipped) for s in sets} == {1}


def test_the_list_lies_beside_the_data_where_runs_cannot_be_written(photos, decoded, monkeypatch, home):
    (home/"file").write_text(""); monkeypatch.setenv("RAPTOR_HOME", str(home/"file"/"below"))
    truncate(photos/"imagenet/val/n01/0.JPEG")
    assert len(skipping(photos).skipped) == 1 == len(list((photos/"imagenet/.unreadable").glob("*.json"))); decoded.clear()
    assert len(skipping(photos).skipped) == 1 and decoded == []
    shutil.rmtree(photos/"imagenet/.unreadable")
    def refuse(folder): raise RaptorError("read-only")
    monkeypatch.setattr(image_files, "check_writable", refuse)
    for _ in range(2): # nowhere to keep it: said, and looked for again
        with pytest.warns(UserWarning, match="n01/0.JPEG.; the list could not be kept"): load_dataset("imagenet", "val", root=photos, on_error="skip")
    assert len(decoded) == 12


@pytest.mark.parametrize("damage", ["", "[1]", '{"positions": [6]}', '{"positions": ["0"]}', '{"positions": 3}'])
def test_a_damaged_list_is_made_again(photos, decoded, home, damage):
    truncate(photos/"imagenet/val/n01/0.JPEG"); skipping(photos)
    path, = (home/"unreadable").glob("*.json"); kept = path.read_text()
    path.write_text(damage); decoded.clear()
    assert len(skipping(photos).skipped) == 1 and len(decoded) == 6 and path.read_text() == kept


def test_what_a_disk_refuses_for_the_moment_is_not_remembered(photos, monkeypatch, home):
    real = image_files.read_image
    def fails(path, *a):
        if path.name == "1.JPEG": raise RaptorError("cannot decode") from OSError(errno.EIO, "Input/output error")
        return real(path, *a)
    monkeypatch.setattr(image_files, "read_image", fails)
    assert len(skipping(photos).skipped) == 3 and not list((home/"unreadable").glob("*.json"))
    monkeypatch.undo(); monkeypatch.setenv("RAPTOR_HOME", str(home))
    assert skipping(photos).skipped == []


def test_skip_in_memory(cifar):
    (cifar/"cifar10/test/c4/0001.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out 1"): data = load_dataset("cifar10", "test", root=cifar, on_error="skip")
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
    table = FileTable("/data", rows)
    assert [table[i] for i in range(len(table))] == [[Path("/data")/f for f in row] for row in rows]


def test_for_each_keeps_order_and_stops_at_the_first_error():
    assert for_each(lambda i: -i, 1000, "x") == [-i for i in range(1000)]
    def fails(i):
        if i == 700: raise RaptorError("seven hundred")
    with pytest.raises(RaptorError, match="seven hundred"): for_each(fails, 10000, "x")
