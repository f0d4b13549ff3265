"Trajectory sources: the order of batches, live against cached, a killed writer, and damaged caches."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import raptor.trajectories.cache as cache_module
import raptor.trajectories.live as live_module
from raptor.core import RaptorError, fingerprint
from raptor.data.load import DATASETS, load_dataset
from raptor.phases import layer_distance
from raptor.pipeline.cli import check_caches, main
from raptor.study.presets import load_preset, preset_names
from raptor.study.study import Study
from raptor.teacher.backbone import Backbone
from raptor.trajectories.cache import CachedTrajectories, cache_faults, chunk_shape, estimate_cache_bytes
from raptor.trajectories.live import LiveTrajectories, estimate_cache
from raptor.trajectories.order import BatchPlan, fetch_batches, permutation, prefetch


def zarr_or_skip(): return pytest.importorskip("zarr", reason="writing a cache needs zarr 3 and so Python 3.11")

def write_cache(*args, **kwargs):
    "The package's own; a test that needs a cache is skipped where none can be written."
    zarr_or_skip()
    return live_module.write_cache(*args, **kwargs)


class Noise(torch.utils.data.Dataset):
    "Image i is noise drawn from i, and from the epoch where `augmented`."
    name, split, epoch = "noise", "train", 0

    def __init__(self, n=50, augmented=False, target="class"):
        self.n, self.augmented, self.target, self.fingerprint = n, augmented, target, f"noise-{n}"
    def __len__(self): return self.n
    def set_epoch(self, epoch): self.epoch = epoch
    def __getitem__(self, i):
        if not 0 <= i < self.n: raise IndexError(i)
        generator = torch.Generator().manual_seed(i + 1000 * self.epoch * self.augmented)
        targets = {"class": torch.tensor(i * 3), "map": torch.full((2, 2), i), "all": {"a": torch.tensor(i)},
                   "real": torch.tensor(i / 2)}
        return {"image": torch.randn(3, 8, 8, generator=generator), "target": targets[self.target], "index": i}


def make_backbone(seed):
    torch.manual_seed(seed)
    return Backbone.create("vit_nano_patch4_reg4_24", pretrained=False, img_size=8, depth=3, embed_dim=16)


@pytest.fixture(scope="module")
def backbone():
    return make_backbone(0)


@pytest.fixture(scope="module")
def stored(backbone, tmp_path_factory): # 50 images in 13 chunks of 4 (the last holds 2), so 5 pools of 3
    path = tmp_path_factory.mktemp("cache")/"c"
    write_cache(backbone, Noise(), path, chunk_images=4, chunk_states=1, batch_size=3)
    return path


@pytest.fixture(scope="module")
def kept(backbone): # the same in 16 bits, in memory
    return torch.cat(list(LiveTrajectories(backbone, Noise()).batches(50))).half()


@pytest.fixture(scope="module", params=["one state a file", "all states in a file"])
def either(request, stored, backbone, tmp_path_factory): # the same cache in both layouts
    if "one" in request.param: return stored
    return write_cache(backbone, Noise(), tmp_path_factory.mktemp("whole")/"c", chunk_images=4, batch_size=3).path


@pytest.fixture
def copy(stored, tmp_path):
    return Path(shutil.copytree(stored, tmp_path/"copy"))


def images_of(source, **kwargs):
    "Which images a source visits, by their labels."
    return [(y // 3).tolist() for _, y in source.batches(labels=True, **kwargs)]


# --- the order ---

plans = dict(n=st.integers(1, 60), batch=st.integers(1, 20), seed=st.integers(0, 5), epochs=st.integers(1, 3))

@given(**plans)
def test_every_epoch_visits_each_image_once_but_for_the_tail(n, batch, seed, epochs):
    if n < batch: return
    plan = BatchPlan(n, batch, seed, steps=epochs * (n // batch))
    for epoch in range(epochs):
        positions = [i for e, a, b in plan if e == epoch for i in range(a, b)]
        assert positions == list(range(n - n % batch))


@given(first=st.integers(0, 12), more=st.integers(0, 9), world=st.integers(1, 4), **plans)
def test_resuming_and_splitting_lose_nothing(n, batch, seed, epochs, first, more, world):
    if n < batch or world > batch: return
    whole = list(BatchPlan(n, batch, seed, steps=first + more))
    assert list(BatchPlan(n, batch, seed, first, first + more)) == whole[first:]
    parts = [list(BatchPlan(n, batch, seed, 0, first + more, r, world)) for r in range(world)]
    for step, (epoch, start, stop) in enumerate(whole):
        mine = [parts[r][step] for r in range(world)]
        assert [i for _, a, b in mine for i in range(a, b)] == list(range(start, stop))
        assert max(b - a for _, a, b in mine) - min(b - a for _, a, b in mine) <= 1


@given(first=st.integers(0, 9), steps=st.integers(0, 9))
def test_an_ordered_pass_ends_with_its_images_or_before_the_given_step(first, steps):
    whole = [(0, 0, 4), (0, 4, 8), (0, 8, 10)]
    assert list(BatchPlan(10, 4)) == whole
    assert list(BatchPlan(10, 4, first_step=first, steps=steps)) == whole[first:steps]


@pytest.mark.parametrize("kwargs, said", [
    (dict(batch_size=0), "at least 1"), (dict(batch_size=51, seed=0), "cannot be drawn from 50"),
    (dict(batch_size=2, rank=2, world=2), "rank 2 of 2"), (dict(batch_size=2, world=3), "cannot share"),
    (dict(batch_size=2, start=3, end=1), "states 3..1"), (dict(batch_size=2, end=4), "choose them from 0..3")])
def test_impossible_batches(backbone, stored, kwargs, said):
    for source in (LiveTrajectories(backbone, Noise()), CachedTrajectories(stored)):
        with pytest.raises(RaptorError, match=said): source.batches(**kwargs)


@pytest.mark.parametrize("make", ["live", "cached", "cached small pools"])
def test_order_of_a_source(backbone, stored, make):
    source = LiveTrajectories(backbone, Noise())
    if make != "live": source = CachedTrajectories(stored, pool_chunks=3 if "small" in make else 16)
    assert images_of(source, batch_size=7) == [list(range(i, min(i + 7, 50))) for i in range(0, 50, 7)]
    whole = images_of(source, batch_size=8, seed=3, steps=18) # three epochs of six batches
    for epoch in range(3):
        visited = sum(whole[6*epoch:6*epoch + 6], [])
        assert len(set(visited)) == 48 and visited != sorted(visited)
    assert whole[:6] != whole[6:12]
    assert images_of(source, batch_size=8, seed=3, first_step=7, steps=18) == whole[7:]
    parts = [images_of(source, batch_size=8, seed=3, steps=18, rank=r, world=3) for r in range(3)]
    assert [a + b + c for a, b, c in zip(*parts)] == whole
    assert images_of(source, batch_size=8, seed=4, steps=6) != whole[:6]
    assert images_of(source, batch_size=8, seed=3, steps=6, start=2, end=3) == whole[:6] # whatever the span


def test_every_pool_has_a_permutation_of_its_own(stored):
    "The images of pool i lie together, ordered by the permutation that (seed, epoch, i) names."
    cached, at, ranks = CachedTrajectories(stored, pool_chunks=3), 0, []
    order = cached.order(3, 1)
    for i, pool in enumerate(cached.pools(3, 1)):
        images = [image for chunk in pool for image in range(4 * chunk, min(4 * chunk + 4, 50))]
        part, at = order[at:at + len(images)], at + len(images)
        assert part.tolist() == [images[k] for k in permutation(len(images), 3, 1, i)]
        if len(images) == 12: ranks.append([images.index(k) for k in part])
    assert at == 50 and len(ranks) >= 3 and len({tuple(r) for r in ranks}) == len(ranks)


# --- live ---

def test_live_gives_the_backbones_states(backbone):
    data = Noise()
    (batch, target), *_ = LiveTrajectories(backbone, data).batches(5, start=1, end=2, labels=True)
    assert torch.equal(batch, backbone.trajectory(torch.stack([data[i]["image"] for i in range(5)]))[:, 1:3])
    assert target.tolist() == [0, 3, 6, 9, 12] and not batch.requires_grad


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_is_a_function_of_the_epoch(backbone, workers):
    data = Noise(12, augmented=True)
    live = LiveTrajectories(backbone, data, workers=workers)
    got = list(live.batches(5, seed=1, first_step=1, steps=4)) # epochs 0, 1, 1
    for step, batch in zip((1, 2, 3), got):
        epoch, i = divmod(step, 2)
        data.set_epoch(epoch)
        images = torch.stack([data[int(k)]["image"] for k in live.order(1, epoch)[5*i:5*i + 5]])
        assert torch.allclose(batch, backbone.trajectory(images), atol=1e-5)


LIVE = """
import os, signal, sys, time; sys.path.insert(0, {tests!r})
from test_trajectories import Noise, make_backbone
from raptor.trajectories.live import LiveTrajectories
batches = LiveTrajectories(make_backbone(0), Noise(), workers=2).batches(5, seed=0)
next(batches)
"""

IMAGES = """
import time
from raptor.trajectories.order import BatchPlan, image_batches
class Numbers:
    def __len__(self): return 50
    def get_batch(self, indices): return indices
opened = [image_batches(Numbers(), BatchPlan(50, 5, seed=0), workers=2) for _ in range(2)]
for batches in opened: next(batches)
"""

@pytest.fixture
def start_group():
    "Start a script in a process group of its own, whose temporary files end with the test."
    with TemporaryDirectory() as folder: # short: its name is part of a socket's
        def start(code):
            code, env = code.replace("{tests!r}", repr(str(Path(__file__).parent))), {**os.environ, "TMPDIR": folder}
            command = [sys.executable, "-c", code]
            return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=env)
        yield start

def gone(group):
    "Whether a process group has no process left before the test's own time is up."
    for _ in range(3000):
        try: os.killpg(group, 0)
        except ProcessLookupError: return True
        time.sleep(0.02)
    os.killpg(group, signal.SIGKILL)
    return False


def test_sigterm_to_the_whole_group_leaves_the_workers_to_the_parent(start_group):
    "SLURM ends a job like this: the parent must still get its batches, and must still be able to end its workers."
    process = start_group(LIVE + """
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
for _ in range(3): next(batches) # each of the workers has started
print("ready", flush=True)
while not asked: time.sleep(0.01)
for _ in range(20): next(batches) # more than the workers had ready
print("done", flush=True) # the batches are still open when the script ends: its workers must end with it
""")
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate()[0] == "done\n" and process.returncode == 0
    assert gone(process.pid)


def test_workers_end_when_their_loader_is_closed_or_their_parent_is_gone(start_group):
    process = start_group(IMAGES + """
import multiprocessing
workers = multiprocessing.active_children()
del batches; opened.pop()
print(sorted(w.exitcode for w in workers if w.exitcode is not None), flush=True)
time.sleep(600)
""")
    assert process.stdout.readline() == "[0, 0]\n" # two of four, by themselves: torch would kill a worker that hangs
    process.kill(); process.wait(); process.stdout.close()
    os.killpg(process.pid, signal.SIGTERM) # no process is left that needs their batches
    assert gone(process.pid)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_fetched_by_the_datasets_own_function_in_the_order_of_their_keys(workers):
    class Squares:
        epoch = 0
        def set_epoch(self, epoch): self.epoch = epoch
        def get_batch(self, indices): return {"value": torch.tensor([i * i + 1000 * self.epoch for i in indices])}
    keys = [[(0, 3), (0, 1)], [(2, 4)], [(0, 2), (0, 2)]]
    assert [b["value"].tolist() for b in fetch_batches(Squares(), keys, workers)] == [[9, 1], [2016], [4, 4]]


def test_prefetching_changes_neither_batches_nor_order():
    batches = [{"image": torch.ones(2), "target": {"b": [torch.tensor([i]), "name"]}, "index": i} for i in range(5)]
    for device in ("cpu", torch.device("cpu"), None):
        for got, batch in zip(prefetch(iter(batches), device), batches, strict=True):
            assert got["image"] is batch["image"] and got["target"]["b"][0] is batch["target"]["b"][0]
            assert got["target"]["b"][1] == "name" and got["index"] == batch["index"]
    assert [int(t) for t in prefetch((torch.tensor(i) for i in range(3)), "cpu")] == [0, 1, 2]
    assert list(prefetch([], "cpu")) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies ahead are made on a GPU")
@pytest.mark.parametrize("pinned", [False, True])
def test_prefetching_to_a_gpu(pinned):
    batches = [{"image": torch.randn(64, 3, 64, 64), "target": {"a": torch.tensor([i])}, "index": i} for i in range(9)]
    given = ({**b, "image": b["image"].pin_memory()} if pinned else b for b in batches)
    for got, wanted in zip(prefetch(given, "cuda"), batches, strict=True):
        torch.empty(64, 3, 64, 64, device="cuda").fill_(7) # memory that is released too early would be overwritten
        assert got["image"].is_cuda and torch.equal(got["image"].cpu(), wanted["image"])
        assert got["target"]["a"].tolist() == wanted["target"]["a"].tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies ahead are made on a GPU")
def test_one_batch_more_than_those_in_use_is_fetched():
    fetched = []
    def source():
        for i in range(4): fetched.append(i); yield torch.tensor([i])
    for i, batch in enumerate(prefetch(source(), "cuda")): assert batch.item() == i and len(fetched) == min(i + 2, 4)


def test_autocast_and_dtype(backbone):
    exact = next(LiveTrajectories(backbone, Noise()).batches(4))
    rough = next(LiveTrajectories(backbone, Noise(), dtype=torch.bfloat16).batches(4))
    assert rough.dtype == torch.float32 and 0 < (rough - exact).abs().max() < 0.1
    assert torch.equal(next(LiveTrajectories(backbone, Noise()).batches(4, dtype=torch.float16)), exact.half())


# --- cached ---

@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("states, chunk", [(None, 4), (4, 4), (1, 1)]) # states of 288 bytes are kept together
def test_cached_equals_live_up_to_16_bits_and_zarr_reads_it(backbone, tmp_path, dtype, states, chunk):
    zarr = zarr_or_skip()
    live = LiveTrajectories(backbone, Noise())
    cached = write_cache(backbone, Noise(), tmp_path/"c", dtype=dtype, chunk_images=8, chunk_states=states)
    exact = torch.cat(list(live.batches(8)))
    kept = exact.to(getattr(torch, dtype))
    assert torch.equal(torch.cat(list(cached.batches(7))), kept.float())
    assert torch.equal(torch.cat(list(cached.batches(7, dtype=kept.dtype))), kept)
    assert torch.equal(torch.cat(list(cached.batches(9, start=1, end=2))), kept[:, 1:3].float())
    group = zarr.open(tmp_path/"c", mode="r")
    assert group["states"].shape == (50, 4, 9, 16) and group["states"].chunks == (8, chunk, 9, 16)
    assert np.array_equal(group["states"][:], kept.numpy() if dtype == "float16" else kept.view(torch.uint16).numpy())
    assert group["targets"][:].tolist() == [3 * i for i in range(50)]
    assert len(group.attrs["raptor"]["checksums"]) == 8*cached.checksums.size and cached.fingerprint == live.fingerprint
    for name in ("num_images", "depth", "num_tokens", "dim", "num_prefix", "has_cls", "layers"):
        assert getattr(cached, name) == getattr(live, name)


@pytest.mark.parametrize("most", [1024, 5, 1]) # images of one system call
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("first, last", [(0, 3), (0, 0), (1, 2), (3, 3)])
def test_every_span_in_every_order_is_what_was_written(either, kept, monkeypatch, first, last, dtype, most):
    cached = CachedTrajectories(either, pool_chunks=3)
    monkeypatch.setattr("raptor.trajectories.cache._most", most)
    monkeypatch.setattr("raptor.trajectories.cache._near", 5000) # a few images
    for batch, kwargs in ((50, {}), (7, {}), (1, {}), (13, dict(seed=4, steps=6))):
        order = np.concatenate([cached.order(4, e)[:39] for e in range(2)]) if kwargs else np.arange(50)
        got = torch.cat(list(cached.batches(batch, start=first, end=last, dtype=dtype, **kwargs)))
        assert torch.equal(got, kept[order, first:last + 1].to(dtype))


def test_images_that_lie_one_behind_the_other_come_in_one_call(either, monkeypatch):
    calls, real = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, pieces, *a: (calls.append(len(pieces)), real(fd, pieces, *a))[1])
    cached = CachedTrajectories(either)
    list(cached.batches(50, dtype=torch.float16))
    assert sorted(c for c in calls if c > 1) == sorted(([4]*12 + [2]) * cached.spec.num_files) # the chunks' sizes


def test_a_chunk_has_one_state_or_all():
    assert chunk_shape(4096, 13, 41*64*2) == (456, 13) and chunk_shape(1_281_167, 13, 261*768*2) == (83, 1)
    assert chunk_shape(5, 4, 10**5, images=32, states=4) == (5, 4)


def test_same_shuffled_batches_as_live_when_one_pool_holds_the_cache(backbone, stored):
    live, cached = LiveTrajectories(backbone, Noise()), CachedTrajectories(stored, pool_chunks=13)
    shuffled = dict(batch_size=8, seed=2, steps=9, labels=True)
    for (a, y), (b, z) in zip(live.batches(**shuffled), cached.batches(**shuffled), strict=True):
        assert y.tolist() == z.tolist() and torch.allclose(a, b, atol=2e-3)


def test_an_epoch_opens_each_file_of_the_span_once_and_no_other(stored, monkeypatch):
    opened, real, cached = [], os.open, CachedTrajectories(stored, pool_chunks=3)
    monkeypatch.setattr(os, "open", lambda path, flags: (opened.append(str(path)), real(path, flags))[1])
    list(cached.batches(5, start=1, end=2, seed=0, steps=10))
    names = [str(Path(p).relative_to(stored)) for p in opened]
    assert sorted(names) == sorted(f"states/c/{c}/{s}/0/0" for c in range(13) for s in (1, 2))


def test_first_step_does_not_touch_what_it_skips(copy):
    cached = CachedTrajectories(copy, pool_chunks=3)
    whole = list(cached.batches(4, seed=6, steps=12))
    order, used = cached.order(6, 0), set()
    for image in order[32:]: used.add(image // 4)
    skipped = {int(c) for pool in cached.pools(6, 0) if not used & set(pool) for c in pool}
    assert skipped
    for c in skipped: (copy/f"states/c/{c}/0/0/0").unlink()
    resumed = cached.batches(4, seed=6, first_step=8, steps=12)
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole[8:], strict=True))
    with pytest.raises(RaptorError, match="cannot be read"): list(cached.batches(4, seed=6, steps=12))


def test_stopping_early_closes_the_files(stored):
    count = lambda: len(os.listdir("/proc/self/fd"))
    before, cached = count(), CachedTrajectories(stored, pool_chunks=3)
    batches = cached.batches(4, seed=0)
    next(batches)
    assert count() > before
    batches.close()
    assert count() == before
    list(cached.batches(4, seed=0, steps=30))
    assert count() == before


def test_part_of_the_layers(backbone, tmp_path):
    cached = write_cache(backbone, Noise(10), tmp_path/"c", layers=(1, 2))
    assert (cached.depth, cached.layers) == (3, (1, 2))
    live = next(LiveTrajectories(backbone, Noise(10)).batches(10, start=1, end=2))
    assert torch.allclose(next(cached.batches(10, start=1)), live, atol=2e-3)
    with pytest.raises(RaptorError, match="states 0..2 are not available; choose them from 1..2"): cached.batches(10)
    with pytest.raises(RaptorError, match="states 2..4 cannot be cached"):
        write_cache(backbone, Noise(10), tmp_path/"d", layers=(2, 4))


@pytest.mark.parametrize("target, kept", [("real", [0, .5, 1, 1.5]), ("map", None), ("all", None)])
def test_targets_are_kept_when_they_are_scalars(backbone, tmp_path, target, kept):
    cached = write_cache(backbone, Noise(4, target=target), tmp_path/"c")
    if kept: assert next(cached.batches(4, labels=True))[1].tolist() == kept
    else:
        with pytest.raises(RaptorError, match="no scalar targets"): next(cached.batches(4, labels=True))


def test_an_augmented_data_set_is_kept_as_epoch_0_shows_it(backbone, tmp_path):
    data = Noise(6, augmented=True)
    data.set_epoch(5)
    cached = write_cache(backbone, data, tmp_path/"c")
    images = torch.stack([Noise(6)[i]["image"] for i in range(6)])
    assert torch.allclose(next(cached.batches(6)), backbone.trajectory(images), atol=2e-3)


# --- a writer that is killed ---

SCRIPT = """
import sys, time; sys.path.insert(0, {tests!r})
from test_trajectories import Noise, make_backbone
from raptor.trajectories.live import write_cache
class Slow(Noise):
    def __getitem__(self, i): time.sleep(0.02); return super().__getitem__(i)
write_cache(make_backbone(0), Slow(), {path!r}, chunk_images=4, chunk_states=1, batch_size=3)
"""

def test_sigkill_and_resume(backbone, stored, tmp_path):
    path = tmp_path/"c"
    code = SCRIPT.format(tests=str(Path(__file__).parent), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (path/"targets/c/3").exists() and process.poll() is None: time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    process.stderr.close()
    with pytest.raises(RaptorError, match="is unfinished; run write_cache again"): CachedTrajectories(path)
    done = {f: f.stat().st_mtime_ns for c in range(3) for f in (path/f"states/c/{c}").rglob("0") if f.is_file()}
    assert len(done) == 12
    half = path/"states/c/2/1/0/0"
    half.write_bytes(half.read_bytes()[:-8]); del done[half] # as a crash of the machine may leave it
    with pytest.raises(RaptorError, match="is unfinished"): CachedTrajectories(path)
    for left in ("states/c/2/1/0/.0-12345678", "targets/c/.4-12345678"): (path/left).write_bytes(b"half")
    cached = write_cache(backbone, Noise(), path, chunk_images=4, chunk_states=1, batch_size=3)
    assert all(f.stat().st_mtime_ns == t for f, t in done.items() if "/c/2/" not in str(f)) # written once
    for a, b in zip(cached.batches(10, labels=True), CachedTrajectories(stored).batches(10, labels=True), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not [f for f in path.rglob(".*")] # nothing half-written is left over


def test_writing_again_changes_nothing(backbone, copy, capsys):
    before = {f: f.stat().st_mtime_ns for f in (copy/"states").rglob("*") if f.is_file()}
    write_cache(backbone, Noise(), copy, chunk_images=4, chunk_states=1, batch_size=3)
    assert {f: f.stat().st_mtime_ns for f in before} == before and capsys.readouterr().out == ""


# --- what is refused ---

def test_another_cache_in_the_folder(backbone, copy, tmp_path):
    other = make_backbone(1)
    theirs, ours = CachedTrajectories(copy).fingerprint, LiveTrajectories(other, Noise()).fingerprint
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"thesis.tex").write_text("x")
    for said, model, path, kwargs in (
        (f"{theirs} .*not trajectories {ours}", other, copy, {}),
        ("holds dtype=float16 instead of bfloat16; choose", backbone, copy, dict(chunk_states=1, dtype="bfloat16")),
        ("holds chunk_states=1 instead of 4; choose", backbone, copy, {}),
        ("is not empty and holds no cache", backbone, tmp_path/"mine", {})):
        with pytest.raises(RaptorError, match=said): write_cache(model, Noise(), path, chunk_images=4, **kwargs)
    with pytest.raises(RaptorError, match=f"holds trajectories {theirs} .*{ours} was expected"):
        CachedTrajectories(copy, expect=ours)
    with pytest.raises(RaptorError, match="nowhere holds no trajectory cache"): CachedTrajectories(tmp_path/"nowhere")


def test_states_of_another_precision_are_other_states(backbone, copy, tmp_path):
    full, half, other = (LiveTrajectories(backbone, Noise(), dtype=t) for t in (None, torch.bfloat16, torch.float16))
    assert full.fingerprint == fingerprint([backbone.fingerprint, "noise-50"])
    assert len({full.fingerprint, half.fingerprint, other.fingerprint}) == 3
    said = r"\(vit_nano\w+ on noise train\), not trajectories \w+ \(vit_nano\w+ in bfloat16 on noise train\); choose"
    with pytest.raises(RaptorError, match=said):
        write_cache(backbone, Noise(), copy, chunk_images=4, autocast=torch.bfloat16)
    rough = write_cache(backbone, Noise(), tmp_path/"rough", autocast=torch.bfloat16)
    assert rough.fingerprint == half.fingerprint
    assert torch.equal(next(rough.batches(50)), next(half.batches(64)).half().float())
    with pytest.raises(RaptorError, match=f"in bfloat16 on noise train\\) where {full.fingerprint} was expected"):
        CachedTrajectories(tmp_path/"rough", expect=full.fingerprint)


@pytest.mark.parametrize("damage, said", [
    (lambda f: f.unlink(), "states/c/2/1/0/0 cannot be read"), (lambda f: f.write_bytes(b""), "has 0 bytes"),
    (lambda f: f.write_bytes(f.read_bytes()[:-1]), "has 1155 bytes and needs 1156"),
    (lambda f: f.write_bytes(f.read_bytes() + b"x"), "has 1157 bytes and needs 1156")])
@pytest.mark.parametrize("seed", [None, 0])
def test_damaged_chunks_are_named(copy, damage, said, seed):
    damage(copy/"states/c/2/1/0/0")
    cached = CachedTrajectories(copy)
    with pytest.raises(RaptorError, match=said): list(cached.batches(10, seed=seed, steps=5))
    assert len(list(cached.batches(10, start=2))) == 5


def test_damaged_targets_are_named(copy):
    (copy/"targets/c/12").unlink()
    with pytest.raises(RaptorError, match="targets/c/12"): next(CachedTrajectories(copy).batches(4, labels=True))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def instead(path, make): path.unlink(); make(path)


SAME_SIZE = { # what becomes of a file, and what the sentence says of it
    "zeros": (lambda f: f.write_bytes(bytes(f.stat().st_size)), "is damaged"),
    "a bit of the first number": (lambda f: flip(f, 0), "is damaged"),
    "a bit of the last number": (lambda f: flip(f, -5), "is damaged"),
    "a bit of the checksum": (lambda f: flip(f, -1), "is damaged"),
    "another chunk": (lambda f: shutil.copy(str(f).replace("c/2/1", "c/3/1"), f), "is not the one"),
    "another state": (lambda f: shutil.copy(str(f).replace("c/2/1", "c/2/0"), f), "is not the one"),
    "a pipe": (lambda f: instead(f, os.mkfifo), "is not a regular file"),
    "a device": (lambda f: instead(f, lambda f: f.symlink_to("/dev/zero")), "is not a regular file"),
    "a folder": (lambda f: instead(f, Path.mkdir), "is not a regular file"),
    "a link to nothing": (lambda f: instead(f, lambda f: f.symlink_to("nowhere")), "cannot be read"),
}

@pytest.mark.parametrize("damage, said", SAME_SIZE.values(), ids=SAME_SIZE)
def test_damage_of_the_same_size_is_named_and_mended(backbone, copy, kept, damage, said):
    bad = copy/"states/c/2/1/0/0"
    damage(bad)
    cached, said = CachedTrajectories(copy), f"chunk {bad} {said}"
    before = len(os.listdir("/proc/self/fd"))
    for seed in (None, 0):
        with pytest.raises(RaptorError, match=said): list(cached.batches(10, seed=seed, steps=5))
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(list(cached.batches(10, start=2))) == 5 # other files
    assert [said in f for f in cache_faults(copy)] == [True]
    if bad.is_dir(): bad.rmdir() # a folder is not ours to delete
    mended = write_cache(backbone, Noise(), copy, chunk_images=4, chunk_states=1, batch_size=3)
    assert torch.equal(torch.cat(list(mended.batches(50, dtype=torch.float16))), kept) and not cache_faults(copy)


def test_a_damaged_target_is_named(copy):
    flip(copy/"targets/c/3", 0)
    with pytest.raises(RaptorError, match="targets/c/3 is damaged"): CachedTrajectories(copy).targets()


def test_damage_of_an_unfinished_cache_is_mended(backbone, copy, kept):
    change(copy/"zarr.json", lambda v: v["attributes"]["raptor"].update(checksums=None))
    flip(copy/"states/c/5/0/0/0", 7)
    mended = write_cache(backbone, Noise(), copy, chunk_images=4, chunk_states=1, batch_size=3)
    assert torch.equal(torch.cat(list(mended.batches(50, dtype=torch.float16))), kept)


def test_a_file_is_compared_with_its_checksum_once(copy, monkeypatch):
    seen, real = [], cache_module.check_file
    monkeypatch.setattr(cache_module, "check_file", lambda fd, path, *a: (seen.append(path), real(fd, path, *a)))
    cached = CachedTrajectories(copy, pool_chunks=3)
    list(cached.batches(5, end=0, seed=0, steps=40)) # four epochs; two readers may meet at a file in the first
    assert len(set(seen)) == 13 and len(seen) < 26
    seen.clear()
    list(cached.batches(5, end=0, seed=0, steps=40))
    assert not seen
    flip(copy/"states/c/2/0/0/0", 0) # while the cache is in use
    with pytest.raises(RaptorError, match="c/2/0/0/0 is damaged"): list(cached.batches(5, end=0, seed=0, steps=10))


def test_zarr_notices_damage_too(copy):
    zarr = zarr_or_skip()
    flip(copy/"states/c/2/1/0/0", 9)
    with pytest.raises(ValueError, match="checksum"): zarr.open(copy, mode="r")["states"][8:12]


def test_a_cache_without_checksums_is_refused(backbone, copy):
    change(copy/"states/zarr.json", lambda v: v["codecs"].pop())
    for use in (lambda: CachedTrajectories(copy), lambda: write_cache(backbone, Noise(), copy, chunk_images=4, chunk_states=1)):
        with pytest.raises(RaptorError, match="has no checksums, as an earlier version wrote it; delete the folder"): use()


def test_only_the_owner_replaces_a_cache(copy, tmp_path):
    other = make_backbone(1)
    def write(owner, path=copy): return write_cache(other, Noise(), path, chunk_images=4, owner=owner)
    for owner in (None, "me"): # nobody owns it
        with pytest.raises(RaptorError, match="choose another folder or delete it"): write(owner)
    change(copy/"zarr.json", lambda v: v["attributes"]["raptor"].update(owner="me"))
    (tmp_path/"link").symlink_to(copy)
    for owner, path in ((None, copy), ("you", copy), ("me", tmp_path/"link")): # a folder elsewhere is left alone
        with pytest.raises(RaptorError, match="choose another folder or delete it"): write(owner, path)
    assert write("me").fingerprint == LiveTrajectories(other, Noise()).fingerprint
    assert write("you").spec.owner == "me" # the same numbers, whoever asks


def small_study(tmp_path, **data):
    "A study whose teacher is as it was before its training."
    smoke = load_preset("smoke")
    data = smoke.data.model_copy(update={"limit": 32, "test_limit": 8, **data})
    study = Study.open(smoke.model_copy(update={"data": data, "activations": smoke.activations.model_copy(update={"chunk_images": 8})}), tmp_path)
    retrain(study, 0)
    return study

def retrain(study, seed):
    torch.manual_seed(seed)
    study.teacher(trained=False).save(study.folder/"teacher"/"backbone.safetensors")

def test_a_study_replaces_its_own_cache_when_its_teacher_was_trained_again(tmp_path):
    zarr_or_skip()
    study = small_study(tmp_path)
    first = study.cache()
    same = {f: f.stat().st_mtime_ns for f in (first.path/"states").rglob("*")}
    study.cache()
    assert same == {f: f.stat().st_mtime_ns for f in (first.path/"states").rglob("*")}
    retrain(study, 1)
    with pytest.raises(RaptorError, match="was expected; write the cache again, or use another folder"): study.source()
    assert study.cache().fingerprint == study.source().fingerprint != first.fingerprint


def test_doctor_reads_the_caches_of_all_studies(tmp_path, capsys):
    zarr_or_skip()
    study = small_study(tmp_path)
    study.cache()
    def doctor(*options):
        with pytest.raises(SystemExit) as e: main(["doctor", *options, "--home", str(tmp_path)])
        return e.value.code, *capsys.readouterr()
    code, out, _ = doctor()
    assert code == 0 and "\ncache " not in out
    code, out, _ = doctor("--deep")
    assert code == 0 and f"{study.folder}/activations (intact)" in out
    bad = study.folder/"activations/states/c/2/0/0/0"
    flip(bad, 100)
    (tmp_path/"other/activations").mkdir(parents=True)
    code, out, err = doctor("--deep")
    assert code == 1 and f"chunk {bad} is damaged" in out and "other/activations holds no trajectory cache" in out
    assert "the caches have the 2 faults above; run `raptor cache" in err
    study.cache()
    shutil.rmtree(tmp_path/"other")
    assert not [f for _, found in check_caches(tmp_path) for f in found]


# --- images for the teacher ---

def test_a_study_and_its_lines_by_hand_see_the_same_images(tmp_path):
    "What `raptor reproduce` compares are the states that the README's lines compute."
    study = small_study(tmp_path)
    teacher, live = study.teacher(), study.source("train", limit=16)
    data = load_dataset("digit_scenes", "train", teacher=teacher, limit=16)
    assert teacher.mean == data.mean == (0.157,)*3 and data.fingerprint == live.dataset.fingerprint
    assert torch.equal(next(LiveTrajectories(teacher, data).batches(16)), next(live.batches(16)))
    with pytest.raises(RaptorError, match="size .24, 24. and vit_nano_patch4_reg4_24 takes .32, 32."):
        LiveTrajectories(study.teacher(img_size=(32, 32)), data)


@pytest.mark.parametrize("name", preset_names())
def test_presets_normalise_images_as_their_teacher_takes_them(tmp_path, name):
    study = Study.open(name, tmp_path)
    teacher = SimpleNamespace(**study.normalisation(), img_size=study.preset.teacher.img_size or study.preset.data.size)
    if study.preset.teacher.train is not None: # before and after its training
        assert (study.teacher(trained=False).mean, study.teacher(trained=False).std) == (teacher.mean, teacher.std)
    info = DATASETS[study.preset.data.name]
    assert all(len(v) == 3 for v in study.normalisation().values()) and (info.folder or study.dataset().mean == teacher.mean)

class Sized(Noise):
    "Noise that says what it is."
    def __init__(self, **about): super().__init__(4); self.__dict__.update(about)

half = (0.5, 0.5, 0.5)

@pytest.mark.parametrize("about, said", [
    ({}, None), (dict(size=(8, 8), mean=half, std=half), None), (dict(size=8, mean=0.5, std=np.float32(0.5)), None),
    (dict(mean=(0.500004, 0.5, 0.5)), None), (dict(mean=torch.tensor(half)), None), (dict(mean=lambda: 3), None),
    (dict(size=(8, 16)), r"size \(8, 16\) and vit_nano_patch4_reg4_24 takes \(8, 8\)"),
    (dict(size=24), r"size \(24\)"), (dict(mean=(0.485, 0.456, 0.406)), r"mean \(0.485, 0.456, 0.406\) .*takes \(0.5, 0.5"),
    (dict(mean=half, std=(0.229, 0.224, 0.225)), r"std \(0.229.*open them with load_dataset\(..., teacher=...\)")])
def test_images_that_the_backbone_does_not_take_are_refused(backbone, tmp_path, about, said):
    if said is None: assert len(LiveTrajectories(backbone, Sized(**about))) == 4; return
    for use in (LiveTrajectories, lambda *a: write_cache(*a, tmp_path/"c"), estimate_cache):
        with pytest.raises(RaptorError, match=f"the images of noise train have {said}"): use(backbone, Sized(**about))
    assert not (tmp_path/"c").exists()


def test_layers_are_not_compared_on_augmented_images(backbone, tmp_path):
    data = Noise(augmented=True)
    for source in (LiveTrajectories(backbone, data), write_cache(backbone, data, tmp_path/"c")):
        assert source.augmented
        with pytest.raises(RaptorError, match="are augmented.*augment=False"): layer_distance(source)
    assert layer_distance(LiveTrajectories(backbone, Noise())).shape == (3, 3)


def change(path, edit):
    value = json.loads(path.read_text()); edit(value); path.write_text(json.dumps(value))


@pytest.mark.parametrize("file, edit, said", [
    ("zarr.json", lambda v: v["attributes"].clear(), "does not describe a trajectory cache"),
    ("zarr.json", lambda v: v["attributes"]["raptor"].pop("dim"), "does not describe a trajectory cache"),
    ("zarr.json", lambda v: v["attributes"]["raptor"].update(chunk_images=0), "chunk_images Input should be greater"),
    ("zarr.json", lambda v: v["attributes"]["raptor"].update(dim="16"), "does not describe a trajectory cache"),
    ("zarr.json", lambda v: v["attributes"]["raptor"].update(num_images=60), "does not agree"),
    ("zarr.json", lambda v: v["attributes"]["raptor"].update(dtype="bfloat16"), "does not agree"),
    ("states/zarr.json", lambda v: v.update(codecs=[{"name": "bytes"}, {"name": "zstd"}]), "does not agree"),
    ("states/zarr.json", lambda v: v.pop("shape"), "does not agree"),
    ("targets/zarr.json", lambda v: v.update(data_type="int32"), "does not agree")])
def test_corrupt_metadata(copy, file, edit, said):
    change(copy/file, edit)
    with pytest.raises(RaptorError, match=said) as e: CachedTrajectories(copy)
    assert "\n" not in str(e.value)


def test_metadata_that_is_not_json(copy):
    (copy/"states/zarr.json").write_bytes(b"\0" * 40)
    with pytest.raises(RaptorError, match="not valid JSON"): CachedTrajectories(copy)
    (copy/"zarr.json").write_text("{")
    with pytest.raises(RaptorError, match="not valid JSON"): CachedTrajectories(copy)


class Scaled:
    "A backbone whose states are far too large."
    def __init__(self, backbone, factor): self.inner, self.factor = backbone, factor
    def __getattr__(self, name): return getattr(self.inner, name)
    def trajectory(self, *args): return self.inner.trajectory(*args) * self.factor


def test_overflow_is_an_error_that_suggests_bfloat16(backbone, tmp_path):
    with pytest.raises(RaptorError, match="overflows float16; use dtype='bfloat16'"):
        write_cache(Scaled(backbone, 1e6), Noise(8), tmp_path/"c")
    wide = write_cache(Scaled(backbone, 1e6), Noise(8), tmp_path/"d", dtype="bfloat16")
    assert next(wide.batches(8)).abs().max() > 65504
    with pytest.raises(RaptorError, match="not finite"):
        write_cache(Scaled(backbone, float("nan")), Noise(8), tmp_path/"e")


def test_a_full_disk_and_a_failing_writer(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr("raptor.core.shutil.disk_usage", lambda path: type("Usage", (), dict(free=1000)))
    with pytest.raises(RaptorError, match="GB free"): write_cache(backbone, Noise(), tmp_path/"c")
    monkeypatch.undo()
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(live_module, "write_chunk", full)
    with pytest.raises(OSError, match="No space left"): write_cache(backbone, Noise(), tmp_path/"d", chunk_images=4)


def test_size_and_time_are_known_before(backbone, capsys, tmp_path):
    assert estimate_cache_bytes(10, 12, 261, 768, "float32") == 2 * estimate_cache_bytes(10, 12, 261, 768, "bfloat16")
    with pytest.raises(RaptorError, match="did you mean 'float16'"): estimate_cache_bytes(1, 1, 1, 1, "flaot16")
    size, seconds = estimate_cache(backbone, Noise(), sample=8)
    assert size == 50 * 4 * 9 * 16 * 2 and seconds > 0
    write_cache(backbone, Noise(), tmp_path/"c")
    assert "50 images x 4 states x 9 tokens x 16 in float16: 5.76e-05 GB" in capsys.readouterr().out
    on_disk = sum(f.stat().st_size for f in (tmp_path/"c"/"states").rglob("*") if f.is_file() and f.name != "zarr.json")
    assert on_disk <= 0.52 * estimate_cache_bytes(50, 3, 9, 16, "float32")


def timed(monkeypatch):
    "A clock that stands still, but for what a test adds to it."
    clock = [0.]
    monkeypatch.setattr(live_module, "perf_counter", lambda: clock[0])
    return clock


@pytest.mark.parametrize("sample, workers", [(24, 0), (24, 2), (7, 0), (80, 0)])
def test_the_estimate_is_the_time_of_a_sample_times_its_share(backbone, monkeypatch, sample, workers):
    clock, real = timed(monkeypatch), live_module.fetch_batches
    def fetch(*args):
        for batch in real(*args):
            clock[0] += 0.01 * len(batch["index"])
            yield batch
    monkeypatch.setattr(live_module, "fetch_batches", fetch)
    assert estimate_cache(backbone, Noise(), sample=sample, workers=workers)[1] == pytest.approx(50 * 0.01)


def test_the_estimate_computes_as_the_writer_will(backbone, monkeypatch):
    seen, real = [], Backbone.trajectory
    def trajectory(self, images, *span):
        seen.append(torch.is_autocast_enabled("cpu"))
        return real(self, images, *span)
    monkeypatch.setattr(Backbone, "trajectory", trajectory)
    for autocast in (None, torch.bfloat16): estimate_cache(backbone, Noise(), sample=4, autocast=autocast)
    assert seen == [False, False, True, True]


def test_the_estimate_counts_a_slow_disk(backbone, monkeypatch, tmp_path):
    clock, real = timed(monkeypatch), live_module.atomic_path
    def slow(path):
        clock[0] += 0.1
        return real(path)
    monkeypatch.setattr(live_module, "atomic_path", slow)
    assert estimate_cache(backbone, Noise(), sample=8)[1] == 0
    seconds = estimate_cache(backbone, Noise(), sample=8, path=tmp_path/"not"/"yet")[1]
    assert seconds == pytest.approx(4 * 0.1 * 50 / 8) and not list(tmp_path.iterdir()) # a file for each of 4 states


def test_memory_does_not_grow_with_the_number_of_images(backbone, tmp_path):
    peaks = []
    for n in (512, 2048): # both more than the two pools that are open at a time
        tracemalloc.start()
        cached = write_cache(backbone, Noise(n), tmp_path/f"{n}", chunk_images=32, batch_size=16)
        for _ in cached.batches(16, seed=0, steps=n // 16): pass
        peaks.append(tracemalloc.get_traced_memory()[1]); tracemalloc.stop()
    assert peaks[1] < peaks[0] + 256 * 1024 # the cache itself grows by 1.7 MiB


def test_no_progress_debris_in_a_log(backbone, tmp_path, capfd):
    write_cache(backbone, Noise(), tmp_path/"c")
    assert capfd.readouterr().err == ""



def test_some_states_are_those_of_the_whole_trajectory(either, backbone):
    for source in (CachedTrajectories(either), LiveTrajectories(backbone, Noise())):
        whole = next(source.batches(24, seed=3))
        for states in ((0, 2, 3), (1,), (1, 2)):
            assert torch.equal(next(source.batches(24, seed=3, states=states)), whole[:, states])
        for states in ((), (2, 1), (1, 1), (0, 99), (-1, 2)):
            with pytest.raises(RaptorError, match="choose them from 0"): next(source.batches(4, states=states))
