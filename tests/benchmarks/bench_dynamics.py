"""Does the memory of the dynamics grow with the number of images? A script, since each size wants a process of its own:

    RAPTOR_DATA=<folder that holds cifar10/> python tests/benchmarks/bench_dynamics.py [SMALL LARGE] [--model NAME] [--table FILE.csv]

The images are CIFAR-10's 45,000 for training, then its 5,000 for validation; the teacher has random weights. Decoded pixels are
held by the data set and do grow: they are there before the first measurement. Each quantity is then computed once on one batch,
for what is loaded once, and once on all images; its extra memory is the highest resident memory of the second time (on a
graphics card, the highest allocated) beyond what was held before. It should be the same for both sizes: a stream of
trajectories is never held, only sums over it. The decay of perturbations has a fiftieth of the images.
"""
import argparse, json, os, subprocess, sys, time

BATCH = 64

def some(images): return BATCH*max(1, images//50//BATCH) # for what costs many passes an image: whole batches of about every 50th


class Together:
    "Two data sets as one."
    def __init__(self, first, second): self.first, self.second, self.fingerprint = first, second, f"{first.fingerprint}+{second.fingerprint}"
    def __len__(self): return len(self.first) + len(self.second)
    def get_batch(self, indices):
        import torch
        n = len(self.first)
        parts = [data.get_batch(which) for data, which in ((self.first, [i for i in indices if i < n]), (self.second, [i - n for i in indices if i >= n])) if which]
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]} # asked in order, so given in order


def cifar(images):
    "So many images, decoded."
    from raptor.data.load import load_dataset
    train = load_dataset("cifar10", "train", augment=False, limit=images)
    parts = [train] if len(train) == images else [train, load_dataset("cifar10", "val", augment=False, limit=images - len(train))]
    for part in parts: part.images
    data = Together(*parts) if len(parts) == 2 else train
    if len(data) < images: sys.exit(f"there are {len(data)} images, not {images}")
    return data


def quantities(source, backbone):
    "{name: function(images) -> table or fitted model}, each of which reads the stream once."
    import torch
    from raptor.analysis.baselines import fit_dmd, fit_linear
    from raptor.analysis.dynamics import (
        angular_speed, brh_epsilon, directional_convergence, patch_coherence, state_norms, token_kinds, update_ranks
    )
    from raptor.analysis.interventions import perturbation_decay
    from raptor.model.raptor import Raptor
    from raptor.phases import Phases
    kinds = token_kinds(backbone.num_prefix, backbone.has_cls, backbone.num_tokens)
    phases = Phases((backbone.depth//3, 2*backbone.depth//3, backbone.depth))
    student = Raptor.create(phases, backbone.dim, backbone.num_heads).to(next(backbone.parameters()).device).eval()
    def stream(n, **span): return source.batches(BATCH, steps=-(-n//BATCH), **span)
    def pairs(n):
        with torch.no_grad(): # around what is done with a pair as well
            for true in stream(n): yield student.rollout(true[:, 0]), true
    streamed = {f.__name__: lambda n, f=f: f(stream(n), kinds) for f in (directional_convergence, angular_speed, patch_coherence, state_norms, update_ranks)}
    return streamed | {"brh_epsilon": lambda n: brh_epsilon(pairs(n), kinds),
                       "perturbation_decay": lambda n: perturbation_decay(backbone, stream(some(n), end=0), [0, backbone.depth//2], [0.1, 1.0], kinds),
                       "fit_linear": lambda n: fit_linear(stream(n), phases), "fit_dmd": lambda n: fit_dmd(stream(n), phases)}


def measure(images, name):
    "Print a row of JSON for each quantity."
    import torch
    from raptor.trajectories.live import LiveTrajectories
    from raptor.teacher.backbone import Backbone
    from raptor.analysis.cost import peak_memory
    torch.manual_seed(0)
    backbone = Backbone.create(name, pretrained=False, img_size=32).to("cuda" if torch.cuda.is_available() else "cpu")
    source = LiveTrajectories(backbone, cifar(images))
    for title, quantity in quantities(source, backbone).items():
        with torch.no_grad():
            quantity(BATCH)
            begun = time.perf_counter()
            extra = peak_memory(quantity, images, warm=True)/2**20
        print(json.dumps({"quantity": title, "images": some(images) if title == "perturbation_decay" else images, "extra, MB": extra, "seconds": time.perf_counter() - begun}), flush=True)


def main(small, large, model, table):
    import pandas as pd, torch
    from raptor.core import hardware, versions
    rows = []
    print(f"{'quantity':24}{'images':>8}{'extra, MB':>12}{'seconds':>10}")
    for images in (small, large):
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"} # what is let go returns to the system at once: memory in use is measured, not what the allocator keeps
        with subprocess.Popen([sys.executable, __file__, "measure", str(images), model], env=env, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                rows.append(json.loads(line))
                print("{quantity:24}{images:8}{extra, MB:12.0f}{seconds:10.1f}".format(**rows[-1]), flush=True)
        if process.returncode: sys.exit(process.returncode)
    for few, many in zip(rows, rows[len(rows)//2:]): print(f"{few['quantity']}: {many['extra, MB'] - few['extra, MB']:+.0f} MB from {few['images']} to {many['images']} images")
    if table: pd.DataFrame(rows).assign(teacher=model, hardware=hardware(), versions=versions(), threads=torch.get_num_threads()).to_csv(table, index=False)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]: measure(int(sys.argv[2]), sys.argv[3])
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("small", nargs="?", type=int, default=5000); parser.add_argument("large", nargs="?", type=int, default=50000)
        parser.add_argument("--model", default="vit_small_patch4_reg4_32", help="a teacher for 32 x 32 images; a narrow one takes minutes where the default takes an hour on two cores")
        parser.add_argument("--table", help="write the rows to this CSV file, with hardware and versions")
        main(**vars(parser.parse_args()))
