"ADE20K and NYUv2 in their exact formats, on files made here."
import os, shutil, tempfile, warnings

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from raptor.core import RaptorError
from raptor.data.dense import (
    ade_labels, crop_and_flip, crop_window, depth_metres, eigen_crop, frame_padding, resize_pair
)
from raptor.data.load import load_dataset


@pytest.fixture(autouse=True)
def home(tmp_path, tmp_path_factory, monkeypatch):
    "Where lists of unreadable files are kept; loader processes that fail leave their folders with pytest's."
    monkeypatch.setenv("RAPTOR_HOME", str(tmp_path/"home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.getbasetemp()))


def ade20k(split, root, **settings): return load_dataset("ade20k", split, "segmentation", root=root, **settings)
def nyuv2(split, root, **settings): return load_dataset("nyuv2", split, "depth", root=root, **settings)


quick = settings(max_examples=60, deadline=None)
RAW = dict(mean=(0,)*3, std=(1,)*3) # pixels in 0..1, so that values are known


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def block_values(h, w): # four quadrants: 0, 1, 2, 3
    return (np.arange(h)[:, None] >= h//2)*2 + (np.arange(w) >= w//2)


def bits_of(path): # bit depth as written in the PNG header
    return path.read_bytes()[24]


# --- both -----------------------------------------------------------------------------------------

def unambiguous(size, new):
    "Where the centre of a pixel does not fall between two pixels; there Pillow's choice depends on rounding."
    rows, cols = (torch.tensor([(2*i + 1)*n % (2*m) > 0 for i in range(m)]) for n, m in zip(size, new))
    return rows[:, None] & cols


@pytest.mark.parametrize("size, new", [((512, 683), (518, 518)), ((256, 256), (518, 518)), ((683, 512), (70, 56)),
                                       ((480, 640), (250, 330)), ((361, 481), (480, 640)), ((7, 5), (7, 5))])
def test_maps_are_resized_to_the_nearest_pixel_centres_as_by_pillow(size, new):
    raw = np.random.default_rng(0).integers(0, 150, size, np.uint8)
    pillow = torch.from_numpy(np.array(Image.fromarray(raw).resize(new[::-1], Image.Resampling.NEAREST)))
    clear = unambiguous(size, new)
    assert clear.float().mean() > 0.85
    for target in (torch.from_numpy(raw), torch.from_numpy(raw).float()/10): # classes, metres
        image, resized = resize_pair(torch.zeros(3, *size), target, new)
        assert image.shape == (3, *new) and type(resized) is torch.Tensor and resized.dtype == target.dtype
        assert torch.equal(resized[clear], (pillow if target.dtype == torch.uint8 else pillow.float()/10)[clear])


@pytest.mark.parametrize("scale, ratio, mean", [((0.5, 1), (0.75, 1.33), 0.660), ((0.5, 2), (4/3, 4/3), 0.75)])
def test_crops_follow_torchvisions_law_and_are_never_larger_than_the_image(scale, ratio, mean):
    "The area is uniform in 50 to 100 % at the image's own ratio; a large window of another ratio fits less often."
    place, areas, mirrored = torch.arange(480*640).view(480, 640), [], []
    torch.manual_seed(0)
    for _ in range(400):
        image, target = crop_and_flip(place.expand(3, -1, -1), place, scale, ratio)
        (h, w), columns = target.shape, target[0]
        assert torch.equal(image[0], target) and ratio[0] - 0.005 <= w/h <= ratio[1] + 0.005
        areas.append(h*w/(480*640))
        mirrored.append(bool(columns[0] > columns[-1]))
        assert torch.equal(columns.sort().values - columns.min(), torch.arange(w))
    assert 0.49 < min(areas) and max(areas) <= 1 and np.mean(areas) == pytest.approx(mean, abs=0.025)
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.1)


# --- ADE20K ---------------------------------------------------------------------------------------

@pytest.fixture
def ade(tmp_path):
    "Quadrants q = 0..3 with grey 60 q and raw class q (0 is unlabelled)."
    for part in ("training", "validation"):
        for name in ("ADE_1", "ADE_2"):
            q = block_values(60, 80)
            folder, grey = tmp_path/"ADEChallengeData2016", np.repeat((60*q).astype(np.uint8)[..., None], 3, 2)
            save(folder/f"images/{part}/{name}.jpg", grey, quality=95)
            save(folder/f"annotations/{part}/{name}.png", q.astype(np.uint8))
    return tmp_path


def test_raw_labels_from_a_file(tmp_path):
    save(tmp_path/"m.png", np.array([[0, 1, 2], [149, 150, 0]], np.uint8))
    assert ade_labels(Image.open(tmp_path/"m.png")).tolist() == [[255, 0, 1], [148, 149, 255]]


def test_evaluation_squeezes_the_whole_image_to_518(ade):
    data = ade20k("val", ade, **RAW)
    item = data[1]
    assert item["image"].shape == (3, 518, 518) and item["target"].shape == (518, 518)
    assert item["target"].dtype == torch.int64 and type(item["image"]) is torch.Tensor is type(item["target"])
    wanted = torch.from_numpy(block_values(518, 518)) - 1
    wanted[wanted == -1] = 255
    assert torch.equal(item["target"], wanted)
    assert abs(item["image"][0, 50, 400] - 60/255) < 0.02 and abs(item["image"][2, 400, 400] - 180/255) < 0.02
    assert data.num_classes == 150 and len(data) == 2 and data.labels is None


def test_masks_are_those_that_pillow_resizes(ade):
    raw = np.random.default_rng(0).integers(0, 151, (60, 80), np.uint8)
    save(ade/"ADEChallengeData2016/annotations/validation/ADE_1.png", raw)
    wanted = torch.from_numpy(np.array(Image.fromarray(raw).resize((70, 70), Image.Resampling.NEAREST))).long() - 1
    clear = unambiguous((60, 80), (70, 70))
    assert torch.equal(ade20k("val", ade, size=70)[0]["target"][clear], wanted.where(wanted >= 0, 255)[clear])


def test_image_and_mask_go_through_the_same_crop(ade):
    data = ade20k("train", ade, size=70, **RAW)
    shares, lefts = [], []
    for epoch in range(25):
        data.set_epoch(epoch)
        item = data[0]
        seen = (item["image"][0]*255/60).round().long() - 1 # the class that the grey level means
        seen[seen == -1] = 255
        assert (seen == item["target"]).float().mean() > 0.97 # all but pixels on an edge
        shares.append((item["target"] == 2).float().mean().item())
        lefts.append(seen[0, 0] < seen[0, -1])
    assert len(set(shares)) > 20 and {bool(x) for x in lefts} == {True, False} # mirrored in some epochs


def test_workers_and_epochs(ade):
    data = ade20k("train", ade, size=56)
    batch = next(iter(DataLoader(data, batch_size=2, num_workers=2)))
    assert torch.equal(batch["image"], data.get_batch([0, 1])["image"])
    assert torch.equal(batch["target"][1], data[1]["target"])
    data.set_epoch(1)
    assert not torch.equal(data[1]["image"], batch["image"][1])


@pytest.mark.parametrize("mask, said", [
    (np.zeros((80, 60), np.uint8), "is 60 x 80 and its image 80 x 60"),
    (np.full((60, 80), 151, np.uint8), "holds the value 151"),
    (np.full((60, 80), 3, np.uint16), "not an 8-bit single-channel"),
    (np.zeros((60, 80, 3), np.uint8), "not an 8-bit single-channel"),
])
def test_wrong_masks_are_named(ade, mask, said):
    save(ade/"ADEChallengeData2016/annotations/validation/ADE_2.png", mask)
    data = ade20k("val", ade, size=56)
    data[0]
    with pytest.raises(RaptorError, match=f"ADE_2.png.*{said}"): data[1]
    with pytest.raises(RaptorError, match="ADE_2.png"): list(DataLoader(data, num_workers=1))
    with pytest.warns(UserWarning, match="left out 1 unreadable items of 2"):
        assert len(ade20k("val", ade, size=56, on_error="skip")) == 1


def test_missing_parts_of_ade(ade):
    with pytest.raises(RaptorError, match="ADEChallengeData2016/images/training"): ade20k("train", ade/"x")


def test_missing_masks_are_an_error_before_any_item_is_read(ade, monkeypatch):
    masks = ade/"ADEChallengeData2016/annotations/validation"
    images = ade/"ADEChallengeData2016/images/validation"
    for i in range(3, 8): shutil.copy(images/"ADE_1.jpg", images/f"ADE_{i}.jpg")
    said = "5 of 7 images have no mask, the first is .*annotations/validation/ADE_3.png; restore"
    with pytest.raises(RaptorError, match=said) as e: ade20k("val", ade)
    assert "\n" not in str(e.value)
    assert len(ade20k("train", ade)) == 2 # the other split is whole
    with pytest.warns(UserWarning, match="left out 5 unreadable items of 7"):
        assert len(ade20k("val", ade, size=56, on_error="skip")) == 2
    for i in range(3, 8): shutil.copy(masks/"ADE_1.png", masks/f"ADE_{i}.png")
    asked, real = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, *a, **k: (asked.append(str(path)), real(path, *a, **k))[1])
    ade20k("val", ade)
    assert not [p for p in asked if "ADE_" in p] # two folders are listed; 20,000 files are not asked for one by one


# --- NYUv2 ----------------------------------------------------------------------------------------

@pytest.fixture
def nyu(tmp_path):
    """The real formats at the real size. Image: quadrants of grey 60 q. Depth: (q + 1) m in both codings, with a hole
    (0) of 20 x 30 at the top left."""
    q = block_values(480, 640)
    folder = tmp_path/"nyuv2/data"
    for name in ("a", "b"): save(folder/f"{name}.png", np.repeat((60*q).astype(np.uint8)[..., None], 3, 2))
    metres = (q + 1).astype(float)
    metres[:20, :30] = 0
    save(folder/"test.png", (1000*metres).astype(np.uint16))
    save(folder/"train.png", np.round(25.5*metres).astype(np.uint8))
    for split in ("train", "test"):
        (folder/f"nyu2_{split}.csv").write_text("".join(f"data/{n}.png,data/{split}.png\n" for n in "ab"))
    return tmp_path


def test_both_codings_are_what_the_files_say(nyu):
    assert (bits_of(nyu/"nyuv2/data/train.png"), bits_of(nyu/"nyuv2/data/test.png")) == (8, 16)
    train8 = depth_metres(Image.open(nyu/"nyuv2/data/train.png"), "train")
    test16 = depth_metres(Image.open(nyu/"nyuv2/data/test.png"), "val")
    assert test16[0, 0] == 0 and test16[479, 639] == 4 and train8[0, 0] == 0
    assert train8[479, 639] == pytest.approx(102*10/255)
    assert (train8 - test16).abs().max() <= 10/255/2 + 1e-6 # half a grey level
    with pytest.raises(RaptorError, match="test.png.*8-bit"):
        depth_metres(Image.open(nyu/"nyuv2/data/test.png"), "train", "test.png")


def test_frame_is_padded_in_its_centre(nyu):
    data = nyuv2("val", nyu)
    item = data[0]
    image, depth = item["image"], item["target"]
    assert image.shape == (3, 490, 644) and depth.shape == (490, 644) and depth.dtype == torch.float32
    inner = depth[5:485, 2:642]
    wanted = torch.from_numpy(block_values(480, 640) + 1).float()
    wanted[:20, :30] = 0
    assert torch.equal(inner, wanted)
    outside = torch.ones(490, 644, dtype=torch.bool)
    outside[5:485, 2:642] = False
    assert (depth[outside] == 0).all() and (image[:, outside] == 0).all() # mean colour, never scored
    grey = image[:, 5:485, 2:642]*torch.tensor(data.std)[:, None, None] + torch.tensor(data.mean)[:, None, None]
    assert torch.allclose(grey, torch.from_numpy(60*block_values(480, 640)/255).float().expand(3, -1, -1), atol=1e-5)


def test_eigen_crop_cuts_its_own_rows_and_columns(nyu):
    metres = np.full((480, 640), 2000, np.uint16)
    metres[45:471, 41:601] = 1000
    save(nyu/"nyuv2/data/test.png", metres)
    data = nyuv2("val", nyu)
    depth, (top, bottom, left, right) = data[0]["target"], data.eval_crop
    assert (top, bottom, left, right) == (50, 476, 43, 603) and data.padding == (5, 5, 2, 2)
    assert (depth[top:bottom, left:right] == 1).all() and (depth == 1).sum() == 426*560


@quick
@given(st.tuples(st.integers(1, 700), st.integers(1, 700)))
def test_padding_reaches_whole_patches_and_is_centred(size):
    top, bottom, left, right = frame_padding(size)
    assert (size[0] + top + bottom) % 14 == 0 and (size[1] + left + right) % 14 == 0
    assert 0 <= bottom - top <= 1 and 0 <= right - left <= 1 and bottom < 14 and right < 14


def test_eigen_crop_at_half_the_resolution():
    assert frame_padding((240, 320)) == (6, 6, 1, 1)
    assert eigen_crop((240, 320)) == (22 + 6, 236 + 6, 20 + 1, 300 + 1)


@quick
@given(st.floats(0.5, 2), *[st.floats(0, 1, allow_subnormal=False)]*2)
def test_window_lies_inside_or_around_the_image(scale, down, right):
    top, left, h, w = crop_window((480, 640), scale, (down, right))
    assert abs(h*w/(480*640) - scale) < 0.01 and abs(w/h - 4/3) < 0.01
    for start, length, side in ((top, h, 480), (left, w, 640)):
        if length <= side: assert 0 <= start <= side - length
        else: assert side - length <= start <= 0


@pytest.mark.parametrize("name, zooms_out", [("nyuv2", False), ("nyuv2_zoom_out", True)])
def test_training_crops_move_image_and_depth_together(nyu, name, zooms_out):
    data = load_dataset(name, "train", "depth", root=nyu, **RAW)
    data.jitter = lambda image: image # grey levels must stay readable here
    shares, mirrored = [], set()
    for epoch in range(16):
        data.set_epoch(epoch)
        item = data[1]
        image, depth = item["image"][0, 5:485, 2:642], item["target"][5:485, 2:642]
        valid = depth > 0
        assert ((image*255/60).round()[valid] + 1 - depth[valid]).abs().lt(0.1).float().mean() > 0.98
        assert set((depth*25.5).round().long().unique().tolist()) <= {0, 26, 51, 76, 77, 102} # nothing interpolated
        shares.append(valid.float().mean().item())
        mirrored.add(bool(depth[300][valid[300]][0] > depth[300][valid[300]][-1]))
    assert (min(shares) < 0.8) == zooms_out and max(shares) > 0.98 and mirrored == {True, False}


def test_jitter_is_on_in_training_only_and_repeatable(nyu):
    data = nyuv2("train", nyu)
    item = data[0]
    assert torch.equal(item["image"], nyuv2("train", nyu)[0]["image"])
    batch = next(iter(DataLoader(data, batch_size=2, num_workers=2)))
    # contrast is about a mean, and a mean differs in its last bit with the number of threads: a worker has one
    torch.testing.assert_close(batch["image"][0], item["image"], rtol=0, atol=1e-6)
    assert not torch.allclose(batch["image"][1], item["image"], rtol=0, atol=1e-2)
    plain = nyuv2("train", nyu, augment=False)
    plain.set_epoch(9)
    assert torch.equal(plain[0]["image"], nyuv2("val", nyu)[0]["image"])


def test_reduced_resolution(nyu):
    data = nyuv2("val", nyu, size=28)
    depth = data[0]["target"]
    assert data.size == (28, 28) == tuple(depth.shape) and data.eval_crop == (3, 27, 2, 26)
    assert depth[2:, 2:].unique().tolist() == [1, 2, 3, 4] and depth[27, 27] == 4


def test_wrong_lists_are_an_error_that_names_the_line(nyu):
    table = nyu/"nyuv2/data/nyu2_test.csv"
    table.write_text("data/a.png,data/test.png\n\ndata/a.png,data/gone.png\n")
    with pytest.raises(RaptorError, match="nyu2_test.csv line 3 names the missing .*gone.png"): nyuv2("val", nyu)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = nyuv2("val", nyu, on_error="skip")
    assert len(data) == 1 and len(data.skipped) == 1 and len(caught) == 1
    table.write_text("data/a.png\n")
    with pytest.raises(RaptorError, match="line 1 has 1 columns instead of 2"): nyuv2("val", nyu)
    table.write_text("data/../../a.png,data/test.png\n")
    with pytest.raises(RaptorError, match=r"line 1 names 'data/../../a.png', which leaves"): nyuv2("val", nyu)
    table.write_text("")
    with pytest.raises(RaptorError, match="no images for nyuv2 val"): nyuv2("val", nyu)
    table.unlink()
    with pytest.raises(RaptorError, match="there is no .*nyuv2/data/nyu2_test.csv"): nyuv2("val", nyu)


def test_wrong_depth_files_are_named(nyu):
    save(nyu/"nyuv2/data/test.png", np.full((480, 640), 9, np.uint8))
    with pytest.raises(RaptorError, match="test.png has Pillow mode L.*16-bit"): nyuv2("val", nyu)[0]
    save(nyu/"nyuv2/data/test.png", np.full((48, 64), 9, np.uint16))
    with pytest.raises(RaptorError, match="test.png is 64 x 48 and its image 640 x 480"): nyuv2("val", nyu)[0]
