"""Does memory grow with the number of images? Largest resident memory of a process that goes through a source once.

    python tests/benchmarks/bench_memory.py [SMALL LARGE] [--table FILE.csv]

Each measurement is a process of its own; the baseline is the same process before its first batch. Mapped file pages count as
resident too, so a reader that keeps what it has read would show."""
import argparse, os, subprocess, sys, tempfile
from pathlib import Path


def peak_mb(): # since the process began, in MB
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Noise:
    "Images made on access, as a stand-in for files that are decoded on access."
    name, split, task, epoch = "noise", "train", "classification", 0
    def __init__(self, n): self.n, self.fingerprint = n, f"noise-{n}"
    def __len__(self): return self.n
    def set_epoch(self, epoch): self.epoch = epoch
    def __getitem__(self, i):
        import torch
        return {"image": torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(int(i))), "target": torch.tensor(int(i) % 10), "index": int(i)}


def measure(kind, images, folder):
    import torch
    torch.set_num_threads(1)
    from raptor.trajectories.cache import CachedTrajectories
    from raptor.trajectories.live import LiveTrajectories, write_cache
    from raptor.teacher.backbone import Backbone
    torch.manual_seed(0)
    backbone, data, path = Backbone.create("vit_mini_patch4_reg4_24", pretrained=False), Noise(images), Path(folder)/f"cache-{images}"
    if kind == "cached": # written by another process, so that the writer is not measured
        subprocess.run([sys.executable, __file__, "write", str(images), folder], check=True, stdout=subprocess.DEVNULL)
    if kind == "write": before = peak_mb(); write_cache(backbone, data, path, chunk_images=64); print(before, peak_mb()); return
    source = LiveTrajectories(backbone, data) if kind == "live" else CachedTrajectories(path)
    before = peak_mb()
    for batch in source.batches(64, seed=0, steps=images // 64): batch.sum()
    print(before, peak_mb())


def main(small=512, large=4096, table=None):
    import pandas as pd
    from raptor.core import hardware, versions
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAPTOR_PROGRESS": "0"}
    print(f"{'source':10}{'images':>8}{'start, MB':>12}{'peak, MB':>12}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("live", "write", "cached"):
            for images in (small, large):
                out = subprocess.run([sys.executable, __file__, kind, str(images), tempfile.mkdtemp(dir=folder)], env=env, capture_output=True, text=True, check=True).stdout
                before, after = map(float, out.split()[-2:])
                rows.append({"source": kind, "images": images, "start, MB": before, "peak, MB": after})
                print(f"{kind:10}{images:8}{before:12.0f}{after:12.0f}", flush=True)
            few, many = (r["peak, MB"] - r["start, MB"] for r in rows[-2:])
            print(f"{kind}: {many - few:+.0f} MB from {small} to {large} images", flush=True)
    if table: pd.DataFrame(rows).assign(hardware=hardware(), versions=versions()).to_csv(table, index=False)


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] in ("live", "write", "cached"): measure(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("small", nargs="?", type=int, default=512); parser.add_argument("large", nargs="?", type=int, default=4096)
        parser.add_argument("--table", help="write the rows to this CSV file, with hardware and versions")
        main(**vars(parser.parse_args()))
