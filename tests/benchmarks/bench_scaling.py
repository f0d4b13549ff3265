"""Cost against work: time of a stage-1 step by span and by batch, and peak memory by the number of images; three sizes each, as a table and a picture.
Not collected by default; a script, since memory wants a process for each size:

    python tests/benchmarks/bench_scaling.py scaling.csv [scaling.png]
"""
import os, statistics, subprocess, sys, tempfile, time

SPANS, BATCHES, IMAGES = (2, 4, 8), (1, 2, 4), (512, 2048, 8192)
ROUNDS = 7


def step_seconds(span, batch):
    "Median of a step at width 384 and 261 tokens (768 and batches 16 times as large on a graphics card), in turns with nothing."
    import torch
    from raptor.train.stages import benchmark_step
    large = torch.cuda.is_available()
    step, times = benchmark_step(768 if large else 384, 12 if large else 6, 261, 5, batch*(16 if large else 1), span, 0.0), []
    for i in range(ROUNDS + 2):
        begun = time.perf_counter()
        step()
        if large: torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def training_peak_mb(images):
    "Largest resident memory of a process that trains a block on a cache of so many images for a hundred steps."
    import resource, torch
    torch.set_num_threads(1)
    from raptor.trajectories.live import write_cache
    from raptor.teacher.backbone import Backbone
    from raptor.model.block import RecurrentBlock
    from raptor.trajectories.cache import CachedTrajectories
    from raptor.data.load import load_dataset
    from raptor.train.stages import TrainConfig, train_span
    with tempfile.TemporaryDirectory() as folder:
        if not os.fork(): # what the writer holds is not the trainer's
            write_cache(Backbone.create("vit_mini_patch4_reg4_24", pretrained=False), load_dataset("digit_scenes", "train", augment=False, limit=images), f"{folder}/cache", chunk_images=256)
            os._exit(0)
        os.wait()
        train_span(CachedTrajectories(f"{folder}/cache"), RecurrentBlock(64, 4), (0, 12), TrainConfig(steps=100, batch_size=32, warmup=5), None)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024


def rows():
    for span in SPANS: yield {"work": "seconds per step, batch 2", "size": span, "axis": "span", "value": step_seconds(span, 2)}
    for batch in BATCHES: yield {"work": "seconds per step, span 4", "size": batch, "axis": "batch", "value": step_seconds(4, batch)}
    for images in IMAGES:
        out = subprocess.run([sys.executable, __file__, "memory", str(images)], env={**os.environ, "RAPTOR_PROGRESS": "0"}, capture_output=True, text=True, check=True).stdout
        yield {"work": "peak memory, MB", "size": images, "axis": "images", "value": float(out.split()[-1])}


def main(table, picture=None):
    import pandas as pd
    from raptor.core import code_version, hardware, versions
    frame = pd.DataFrame(rows()).assign(hardware=hardware(), versions=versions(), code=code_version())
    frame.to_csv(table, index=False)
    for work, some in frame.groupby("work", sort=False):
        grown = some.value.iloc[-1]/some.value.iloc[0]
        print(f"{work}: {', '.join(f'{s} {v:.4g}' for s, v in zip(some['size'], some.value))}: {grown:.2f} times for {some['size'].iloc[-1]/some['size'].iloc[0]:g} times the {some['axis'].iloc[0]}")
    if picture: draw(frame, picture)


def draw(frame, picture):
    import matplotlib.pyplot as plt
    from raptor.figures.style import use_style
    with use_style():
        figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.4))
        for ax, (work, some) in zip(axes, frame.groupby("work", sort=False)):
            ax.plot(some["size"], some["value"], marker="o")
            ax.set(xlabel=some["axis"].iloc[0], ylabel=work, ylim=(0, None), xticks=some["size"])
        figure.savefig(picture)


if __name__ == "__main__":
    if sys.argv[1] == "memory": print(training_peak_mb(int(sys.argv[2])))
    else: main(*sys.argv[1:])
