"""Peak memory of every streamed quantity of the dynamics over N images of CIFAR-10. Not collected by default; a script, since each size wants a process of its own:

    RAPTOR_DATA=<folder that holds cifar10/> python tests/benchmarks/bench_dynamics.py 5000
    RAPTOR_DATA=<folder that holds cifar10/> python tests/benchmarks/bench_dynamics.py 50000

The two should end with the same peak: a stream of trajectories is never held, only sums over it.
"""
import resource, sys, time

import torch

from raptor.backbone import Backbone
from raptor.activations import LiveTrajectories
from raptor.data import load_dataset
from raptor.dynamics import angular_speed, directional_convergence, patch_coherence, state_norms, token_kinds, update_ranks


def main(images, name="vit_small_patch4_reg4_32"):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    backbone = Backbone.create(name, pretrained=False).to(device)
    source = LiveTrajectories(backbone, load_dataset("cifar10", "train", train_transform=False, limit=images))
    kinds = token_kinds(backbone.num_prefix, backbone.has_cls, backbone.num_tokens)
    for quantity in (directional_convergence, angular_speed, patch_coherence, state_norms, lambda stream, kinds: update_ranks(stream)):
        started = time.time()
        table = quantity(source.batches(64), kinds)
        assert table.value.notna().all()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        label = getattr(quantity, "__name__", "").replace("<lambda>", "update_ranks")
        print(f"{images:6} images  {label:24} {time.time() - started:6.1f} s  peak so far {peak:7.0f} MB" + (f"  GPU {torch.cuda.max_memory_allocated()/2**20:6.0f} MB" if device == "cuda" else ""), flush=True)


if __name__ == "__main__": main(*map(int, sys.argv[1:2]), *sys.argv[2:])
