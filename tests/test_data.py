"Digits, digit scenes and what all datasets share."
import hashlib, subprocess, sys

from types import SimpleNamespace

import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader

import raptor.data.digits
from raptor.core import RaptorError
from raptor.data.base import DatasetSpec, limited, normalise, shifted_crop
from raptor.data.digits import INK, digit_split, draw_scenes, interpolation_matrix, render_scenes
from raptor.data.load import load_dataset

quick = settings(max_examples=30, deadline=None)


def same(a, b):
    "Two items or batches are bit for bit equal."
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def spec(**changes):
    fixed = dict(name="digits", split="train", task="classification", size=(24, 24), mean=(0,)*3, std=(1,)*3)
    return DatasetSpec(**fixed, **{**dict(train_transform=False, limit=None, seed=0), **changes})


# --- digits ---------------------------------------------------------------------------------------

def test_splits_take_the_same_fraction_of_every_class():
    whole = torch.bincount(torch.cat([digit_split(s)[1] for s in ("train", "val", "test")]))
    for s, fraction in (("train", 0.60), ("val", 0.15), ("test", 0.25)):
        assert ((torch.bincount(digit_split(s)[1])/whole - fraction).abs() < 0.01).all()


def test_enlarged_three_times_the_middle_of_each_block_is_the_scan():
    from sklearn.datasets import load_digits
    data = load_dataset("digits", "test")
    place = digit_split("test")[2][10]
    scan = load_digits().images[place]
    assert np.array_equal(data.images[10, 0, 1::3, 1::3].numpy(), np.round(scan*255/16).astype(np.uint8))
    assert data.labels[10] == load_digits().target[place]


def test_augmented_digit_is_a_shift_by_at_most_two_pixels():
    plain, moved = load_dataset("digits", "train", augment=False), load_dataset("digits", "train")
    padded = F.pad(plain[3]["image"], (2,)*4, value=-plain.mean[0]/plain.std[0])
    windows = [padded[:, y:y + 24, x:x + 24] for y in range(5) for x in range(5)]
    seen = set()
    for epoch in range(60):
        moved.set_epoch(epoch)
        image = moved[3]["image"]
        hits = [k for k, w in enumerate(windows) if torch.allclose(w, image, atol=1e-5)]
        assert hits
        seen.add(hits[0])
    assert len(seen) > 12 # 25 shifts, drawn 60 times


def test_normalised_training_sets_have_mean_0_and_std_1():
    for name in ("digits", "digit_scenes"):
        x = load_dataset(name, "train", augment=False).get_batch(range(1000))["image"]
        assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
        assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])


def test_the_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits
    data = load_digits()
    for split in ("train", "val", "test"):
        glyphs, classes, places = digit_split(split)
        assert np.array_equal(16*glyphs, data.images[places]) and np.array_equal(classes, data.target[places])


# Digests of what this dataset has always been: caches and records of older runs depend on every bit.
@pytest.mark.parametrize("name, split, images, fingerprint", [
    ("digits", "train", "dcd001f56f962a17", "digits-train-80418304d337c8f9"),
    ("digits", "test", "8255260bce1a15e9", "digits-test-72edbf37544a2c3b"),
    ("digit_scenes", "train", "2339f936a01b6288", "digit_scenes-train-18f70a3ce34ce955"),
    ("digit_scenes", "val", "d289fd2046f1fa0f", "digit_scenes-val-6a331098129b0a0f"),
])
def test_images_and_fingerprints_never_change(name, split, images, fingerprint):
    data = load_dataset(name, split)
    pixels = data.images.numpy().tobytes()
    assert (hashlib.sha256(pixels).hexdigest()[:16], data.fingerprint) == (images, fingerprint)


# --- rendering ------------------------------------------------------------------------------------

@pytest.fixture
def short_lens(monkeypatch):
    "A camera whose 28 px at 1 m make whole numbers: 3.5 m is 8 px, 2 m is 14 px."
    monkeypatch.setattr(raptor.data.digits, "FOCAL", 70.)


def test_one_scene_by_hand(short_lens):
    "3.5 m is 8 px: samples are copied; the nearer one (2 m, 14 px) lies over it."
    glyphs = torch.zeros(1, 2, 8, 8)
    glyphs[0, 0] = 0.75
    glyphs[0, 1, 0, 7], glyphs[0, 1, 7, 0], glyphs[0, 1, 7, 7] = 1.0, 0.25, 0.2 # ink, just ink, no ink
    depth, corner = torch.tensor([[2., 3.5]]), torch.tensor([[[9., 0.], [2., 4.]]])
    images, classes, metres = render_scenes(glyphs, torch.tensor([[4, 9]]), depth, corner)
    expected = torch.full((24, 24), 10)
    expected[2, 11], expected[9, 4] = 9, 9
    expected[9:23, 0:14] = 4 # covers (9, 4)
    assert torch.equal(classes[0].long(), expected)
    assert images[0, 0, [2, 9, 9, 0], [11, 4, 11, 0]].tolist() == [255, 191, 191, 0]
    assert metres[0, 2, 11] == 3.5 and metres[0, 9, 4] == 2 and metres[0, 0, 0] == 5


def test_the_farther_digit_shows_through_holes_of_the_nearer(short_lens):
    glyphs = torch.ones(1, 2, 8, 8)
    glyphs[0, 0, 2:6, 2:6] = 0
    depth, corner = torch.tensor([[2., 3.5]]), torch.tensor([[[5., 5.], [8., 8.]]])
    _, classes, _ = render_scenes(glyphs, torch.tensor([[0, 1]]), depth, corner)
    assert classes[0, 12, 12] == 1 and classes[0, 5, 5] == 0


@quick
@given(st.integers(0, 10**6))
def test_rendering_agrees_with_grid_sample(seed):
    g = torch.Generator().manual_seed(seed)
    glyph, depth = torch.rand(1, 1, 8, 8, generator=g), 2 + 2*torch.rand(1, generator=g)
    size = 40/depth
    top, left = (24 - size)*torch.rand(1, generator=g), (24 - size)*torch.rand(1, generator=g)
    glyphs = torch.cat([glyph, torch.zeros(1, 1, 8, 8)], 1)
    corner = torch.stack([top, left], 1).expand(2, 2)[None]
    images, classes, _ = render_scenes(glyphs, torch.tensor([[3, 5]]), torch.stack([depth, depth], 1), corner)
    y, x = ((torch.arange(24) + 0.5 - corner)/size*2 - 1 for corner in (top, left))
    grid = torch.stack([x[None, :].expand(24, 24), y[:, None].expand(24, 24)], -1)[None]
    grey = F.grid_sample(glyph, grid, mode="bilinear", padding_mode="border", align_corners=False)[0, 0]
    inside = (grid[0].abs() < 1 - 1e-5).all(-1)
    clear = inside & ((grey - INK).abs() > 1e-4)
    assert torch.equal((classes[0] == 3)[clear], (grey >= INK)[clear])
    ink = clear & (grey >= INK)
    assert ((images[0, 0][ink].float() - 255*grey[ink]).abs() <= 0.51).all()
    assert (images[0, 0][(grid[0].abs() > 1 + 1e-5).any(-1)] == 0).all()


@quick
@given(st.floats(2, 4), st.floats(0, 1, allow_subnormal=False))
def test_height_in_pixels_reveals_depth(depth, place):
    "A box of 40/z px covers that many pixel centres, give or take one."
    extent = 40/depth
    rows = interpolation_matrix(torch.tensor([place*(24 - extent)]), torch.tensor([extent]), 24)[0].sum(1)
    assert torch.all((rows == 0) | ((rows - 1).abs() < 1e-5))
    assert abs(int(rows.round().sum()) - extent) <= 1


def test_twice_the_size_is_the_same_scene(short_lens):
    glyphs, labels, depth = torch.ones(1, 2, 8, 8), torch.tensor([[1, 2]]), torch.tensor([[2., 3.5]])
    corner = torch.tensor([[[0., 0.], [12., 12.]]])
    small, large = (render_scenes(glyphs, labels, depth, corner, (s, s))[1] for s in (24, 48))
    assert torch.equal(large[:, ::2, ::2], small) and torch.equal(large[:, 1::2, 1::2], small)


# --- scenes ---------------------------------------------------------------------------------------

def test_class_depth_and_map_of_scenes_agree():
    _, classes, metres, labels = draw_scenes(2000, "val", 7)
    ink = classes < 10
    assert ((metres == 5) == ~ink).all() # the wall, and only the wall, is at 5 m
    assert metres[ink].min() >= 2 and metres[ink].max() <= 4
    for c, z, label in zip(classes[:500], metres[:500], labels[:500]):
        depths = z[c < 10].unique()
        assert 1 <= len(depths) <= 2
        assert (c[z == depths[0]] == label).all()
        if len(depths) == 2: assert depths[1]/depths[0] >= 1.25 - 1e-6


def test_scenes_show_only_digits_of_their_own_split(monkeypatch):
    marks = {"train": 2, "val": 5, "test": 8}
    def marked(split): return torch.ones(3, 8, 8), torch.full((3,), marks[split]), torch.arange(3)
    monkeypatch.setattr(raptor.data.digits, "digit_split", marked)
    for s, mark in marks.items():
        data = load_dataset("digit_scenes", s, "segmentation", limit=20)
        assert set(data.targets["segmentation"].unique().tolist()) == {mark, 10} and set(data.labels.tolist()) == {mark}


def test_scene_does_not_depend_on_limit_order_or_task():
    few, many = (load_dataset("digit_scenes", "test", "all", limit=n) for n in (20, 1500))
    for i in (0, 7, 19): assert same(few[i], many[i])
    batch, item = many.get_batch([1499, 7, 7, 1024]), few[7]
    assert batch["index"].tolist() == [1499, 7, 7, 1024]
    assert torch.equal(batch["image"][1], item["image"])
    assert torch.equal(batch["target"]["depth"][2], item["target"]["depth"])
    depth = load_dataset("digit_scenes", "test", "depth", limit=20)
    assert torch.equal(depth[7]["target"], item["target"]["depth"]) and torch.equal(depth[7]["image"], item["image"])


def test_seed_and_split_change_the_scenes():
    cases = ("val", 0), ("val", 1), ("test", 0)
    a, b, c = (load_dataset("digit_scenes", split, limit=50, seed=seed).images for split, seed in cases)
    assert not torch.equal(a, b) and not torch.equal(a, c)


def test_epochs_draw_new_scenes_only_in_training():
    fixed, fresh = (load_dataset("digit_scenes", "train", limit=40, augment=t) for t in (False, True))
    first = fixed.images
    assert torch.equal(fresh.images, first) # epoch 0 is the fixed set
    for data in (fixed, fresh): data.set_epoch(3)
    assert torch.equal(fixed.images, first)
    third = fresh.images
    assert (third.flatten(1) != first.flatten(1)).any(1).all()
    for epoch in (0, 3): fresh.set_epoch(epoch)
    assert torch.equal(fresh.images, third)


def test_default_sizes_and_attributes():
    sizes = {s: len(load_dataset("digit_scenes", s)) for s in ("train", "val", "test")}
    assert sizes == {"train": 8192, "val": 1024, "test": 2048}
    tasks = "classification", "segmentation", "depth"
    assert [load_dataset("digit_scenes", "val", task).num_classes for task in tasks] == [10, 11, None]
    data = load_dataset("digit_scenes", "val", "segmentation")
    assert data.class_names == (*"0123456789", "wall") and data.eval_crop is None and data.size == (24, 24)


# --- items, batches, workers ----------------------------------------------------------------------

@pytest.mark.parametrize("task", ["classification", "segmentation", "depth", "all"])
def test_batches_and_workers_give_the_items(task):
    data = load_dataset("digit_scenes", "train", task, limit=24)
    data.set_epoch(2)
    whole = data.get_batch(range(24))
    for batch in DataLoader(data, batch_size=8, num_workers=2):
        assert same(batch, data.get_batch(batch["index"]))
    item = data[5]
    assert item["index"] == 5 and torch.equal(item["image"], whole["image"][5])


def test_index_counts_from_the_end_and_stops():
    data = load_dataset("digits", "val")
    assert same(data[-1], data[len(data) - 1])
    with pytest.raises(IndexError): data[len(data)]
    with pytest.raises(IndexError): data.get_batch([0, -len(data) - 1])
    assert sum(1 for _ in load_dataset("digits", "val", limit=5)) == 5


@quick
@given(st.integers(-3, 3), st.integers(-3, 3), st.booleans(), st.integers(1, 3))
def test_shifted_crop_agrees_with_numpy(dy, dx, flip, channels):
    x = torch.randint(0, 256, (2, channels, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    got = shifted_crop(x, torch.tensor([[dy, dx], [0, 0]]), torch.tensor([flip, False]), 3)
    window = np.pad(x[0].numpy(), ((0, 0), (3, 3), (3, 3)))[:, 3 + dy:9 + dy, 3 + dx:8 + dx]
    assert np.array_equal(got[0].numpy(), window[:, :, ::-1] if flip else window)
    assert torch.equal(got[1], x[1])


@quick
@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 5))
def test_limited_subsets_are_the_beginnings_of_one_order(n, limit, seed):
    kept = limited(n, spec(limit=limit, seed=seed)).tolist()
    assert len(kept) == min(n, limit) == len(set(kept)) and set(kept) <= set(range(n))
    assert kept == limited(n, spec(limit=limit + 1, seed=seed)).tolist()[:len(kept)]
    assert limited(n, spec()).tolist() == list(range(n))


def test_any_part_of_a_subset_of_sorted_files_shows_many_classes():
    classes = np.arange(1000)//100 # as files come: one class after another
    kept = classes[limited(1000, spec(limit=200))]
    assert all(len(set(kept[i:i + 50])) >= 8 for i in range(0, 200, 50)) and (np.diff(kept) < 0).any()


def test_normalisation_and_size_can_be_set():
    own = load_dataset("digits", "val", mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0), size=(24, 48))
    image = own[0]["image"]
    assert image.shape == (3, 24, 48)
    grey = own.images[0, 0].float()/255
    for channel, std in zip(image, (0.5, 0.25, 1.0)): assert torch.allclose(channel, (grey - 0.5)/std, atol=1e-5)
    resized = normalise(torch.full((1, 1, 4, 4), 51, dtype=torch.uint8), (0,)*3, (1,)*3, (8, 6))
    assert resized.shape == (1, 3, 8, 6) and torch.allclose(resized, torch.tensor(0.2))


# --- fingerprints ---------------------------------------------------------------------------------

def test_fingerprint_follows_what_decides_the_pixels():
    base = dict(name="digit_scenes", split="train", limit=10)
    variants = [{}, {"split": "val", "augment": True}, {"size": 48}, {"limit": 11}, {"seed": 1},
        {"augment": False}, {"mean": (0, 0, 0)}, {"name": "digits"}]
    prints = [load_dataset(**{**base, **v}).fingerprint for v in variants]
    assert len(set(prints)) == len(variants)
    assert load_dataset(**base, task="depth").fingerprint == prints[0]
    assert load_dataset(**base, root="/elsewhere").fingerprint == prints[0]


def test_digits_need_neither_torchvision_nor_pillow():
    code = ("import sys; sys.modules['torchvision'] = sys.modules['PIL'] = None\n"
        "from raptor.data.load import load_dataset; assert 'torch' not in sys.modules # the table needs no torch\n"
        "print(load_dataset('digit_scenes', 'val')[0]['image'].shape[0])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "3"


# --- bad input ------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, said", [
    (dict(name="digits:x", split="train"), "digits"),
    (dict(name="digits", split="valid"), "'val'"),
    (dict(name="nyuv2", split="test", task="depth"), "nyuv2 has no split 'test'; use 'val'"),
    (dict(name="nyuv2", split="val"), "it has depth."),
    (dict(name="cifar10", split="val", task="all"), "it has classification."),
    (dict(name="digits", split="val", limit=-1), "limit=-1"),
    (dict(name="digits", split="val", size=0), "size="),
    (dict(name="digits", split="val", size=(3, 4, 5)), "size="),
    (dict(name="digits", split="val", on_error="ignore"), "on_error"),
    (dict(name="nyuv2", split="val", task="depth", download=True), "nyuv2 cannot be downloaded"),
])
def test_wrong_requests_are_errors(arguments, said):
    with pytest.raises(RaptorError, match=said.replace(".", r"\.")) as e: load_dataset(**arguments)
    assert "\n" not in str(e.value)


# --- images for a teacher ---

given = dict(img_size=(16, 16), mean=(.5, .4, .3), std=(.2, .3, .4))

@pytest.mark.parametrize("teacher, asked, got", [
    (given, {}, ((16, 16), (.5, .4, .3), (.2, .3, .4), False)), (given, {"augment": True}, ((16, 16), (.5, .4, .3), (.2, .3, .4), True)),
    ({**given, "img_size": 16}, {}, ((16, 16), (.5, .4, .3), (.2, .3, .4), False)), (given, {"size": 16}, ((16, 16), (.5, .4, .3), (.2, .3, .4), False)),
    (dict(img_size=None, mean=None, std=None), {}, ((24, 24), (0.157,)*3, (0.290,)*3, False)),
    (None, {}, ((24, 24), (0.157,)*3, (0.290,)*3, True)), (None, {"augment": False}, ((24, 24), (0.157,)*3, (0.290,)*3, False))])
def test_a_dataset_is_opened_as_the_teacher_takes_it(teacher, asked, got):
    data = load_dataset("digit_scenes", "train", limit=20, teacher=teacher and SimpleNamespace(**teacher), **asked)
    assert (data.size, data.mean, data.std, data.augmented) == got
    plain = load_dataset("digit_scenes", "train", limit=20, augment=got[3], size=got[0], mean=got[1], std=got[2])
    assert data.fingerprint == plain.fingerprint and torch.equal(data[3]["image"], plain[3]["image"])


@pytest.mark.parametrize("asked, said", [
    ({"size": 24}, r"have size \(24, 24\) and the teacher takes \(16, 16\)"), ({"mean": (.5,)*3}, r"have mean \(0.5, 0.5, 0.5\)"),
    ({"std": (.2, .3, .5)}, r"have std .*open them with load_dataset\(..., teacher=...\)"), ({"teacher": object()}, "object has no img_size and no mean")])
def test_what_contradicts_the_teacher_is_refused(asked, said):
    with pytest.raises(RaptorError, match=said): load_dataset("digits", "train", **{"teacher": SimpleNamespace(**given), **asked})
