"""A stage-1 step from live trajectories (decoded images on the device, the teacher's forward pass, the step) against the same step from states that are
there already, and against the teacher's forward pass alone. Not collected by default:

    pytest tests/benchmarks/bench_live.py --benchmark-enable
"""
import torch

from raptor.trajectories.live import LiveTrajectories
from raptor.teacher.backbone import Backbone
from raptor.core import mixed_precision, seed_everything
from raptor.train.stages import benchmark_step

from conftest import DEVICE, ON_GPU

NAME, BATCH, SPAN, ROUNDS = ("vit_base_patch14_reg4_dinov2", 64, (0, 7), 20) if ON_GPU else ("vit_small_patch14_reg4_dinov2", 4, (0, 4), 5)


class Images:
    "Decoded images on the device."
    fingerprint = "benchmark"
    def __init__(self, n): self.images = torch.randn(n, 3, 224, 224, device=DEVICE)
    def __len__(self): return len(self.images)
    def get_batch(self, indices): return {"image": self.images[torch.as_tensor(indices, device=DEVICE)], "target": torch.zeros(len(indices)), "index": torch.tensor(indices)}


def test_live_against_states_in_memory(work):
    seed_everything(0)
    precision = mixed_precision("auto")
    backbone = Backbone.create(NAME, pretrained=False, img_size=224).to(DEVICE)
    source = LiveTrajectories(backbone, Images(4*BATCH), dtype={"bf16": torch.bfloat16}.get(precision))
    step = benchmark_step(backbone.dim, backbone.num_heads, backbone.num_tokens, backbone.num_prefix, BATCH, SPAN[1] - SPAN[0])
    batches = source.batches(BATCH, start=SPAN[0], end=SPAN[1], seed=0, device=DEVICE)
    held = next(batches)
    work(f"stage 1 from live trajectories, {NAME}, batch {BATCH}, states {SPAN[0]}-{SPAN[1]}, {precision}", lambda: step(next(batches)), rounds=ROUNDS,
         **{"states in memory": lambda: step(held), "teacher alone": lambda: next(batches)}, note="states in memory / ours is the share of the speed that is kept")
