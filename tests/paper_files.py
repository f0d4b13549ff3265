"""A folder for RAPTOR_DATA with a few images in the formats of ImageNet, ADE20K, NYUv2 and CIFAR-10:

    python tests/paper_files.py FOLDER [ARCHIVE]

ARCHIVE is a tar file of <anything>/<wnid>/<image>; its images then stand for ImageNet's (four of five in train,
one in val)."""
import csv, sys, tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(rng, size=(96, 80)):
    "A photograph of nothing: smooth colours with an edge, so that images differ in more than noise."
    coarse = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    coarse.paste(tuple(rng.integers(0, 256, 3).tolist()), (size[0]//3, size[1]//3, size[0]//2, size[1]))
    return coarse


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def imagenet(root, classes=8, train=32, val=4, seed=0):
    rng = np.random.default_rng(seed)
    for c in range(classes):
        for split, n in (("train", train), ("val", val)):
            for i in range(n): save(picture(rng), root/"imagenet"/split/f"n{c:08d}"/f"{split}_{i}.JPEG")


def imagenet_from(archive, root):
    "One image for each class: every class has a folder in train/, which numbers it; every fifth image goes to val/."
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar if m.isfile()), key=lambda m: m.name)
        for i, m in enumerate(members):
            *_, wnid, name = Path(m.name).parts
            (root/"imagenet"/"train"/wnid).mkdir(parents=True, exist_ok=True)
            path = root/"imagenet"/("val" if i % 5 == 0 else "train")/wnid/name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar.extractfile(m).read())


def ade20k(root, train=12, val=4, seed=1):
    rng = np.random.default_rng(seed)
    for part, n in (("training", train), ("validation", val)):
        for i in range(n):
            mask = np.kron(rng.integers(0, 151, (4, 6), dtype=np.uint8), np.ones((20, 16), np.uint8)) # 0 is "other"
            save(picture(rng), root/"ADEChallengeData2016"/"images"/part/f"ADE_{i:08d}.jpg")
            save(Image.fromarray(mask), root/"ADEChallengeData2016"/"annotations"/part/f"ADE_{i:08d}.png")


def nyuv2(root, train=12, test=4, seed=2):
    rng, folder = np.random.default_rng(seed), root/"nyuv2"
    for split, n in (("train", train), ("test", test)):
        rows = []
        for i in range(n):
            metres = np.kron(rng.uniform(0.5, 9.5, (6, 8)), np.ones((80, 80)))
            metres *= rng.random((480, 640)) > 0.05 # some pixels were not measured
            per_metre, dtype = (25.5, np.uint8) if split == "train" else (1000, np.uint16)
            depth = np.round(metres * per_metre).astype(dtype)
            rows.append((f"data/nyu2_{split}/{i}.jpg", f"data/nyu2_{split}/{i}_depth.png"))
            save(picture(rng, (640, 480)), folder/rows[-1][0])
            save(Image.fromarray(depth), folder/rows[-1][1])
        with open(folder/"data"/f"nyu2_{split}.csv", "w", newline="") as f: csv.writer(f).writerows(rows)


def cifar10(root, train=40, test=10, seed=3):
    rng = np.random.default_rng(seed)
    for c in range(10):
        for split, n in (("train", train), ("test", test)):
            for i in range(n): save(picture(rng, (32, 32)), root/"cifar10"/split/f"class{c}"/f"{i}.png")


def make(root, archive=None):
    root = Path(root)
    imagenet_from(archive, root) if archive else imagenet(root)
    ade20k(root); nyuv2(root); cifar10(root)
    return root


if __name__ == "__main__": print(make(*sys.argv[1:]))
