"""Optimiser steps of both stages against the formulation of the paper's code and the machine's own matrix products. Not collected by default:

    OMP_WAIT_POLICY=passive pytest tests/benchmarks/bench_step.py --benchmark-enable

On a graphics card the sizes are those of the paper's runs (batch 64); on a processor they are small enough to wait for.
`TFLOP/s` counts what the step needs (forward, and twice that backward), not what an implementation happens to do.
"""
import gc

import pytest, torch
from torch import nn

from raptor.model.block import RecurrentBlock, block_flops
from raptor.core import mixed_precision, seed_everything
from raptor.model.raptor import Raptor
from raptor.phases import Phases
from raptor.train.stages import benchmark_step

from baseline import BaselineBlock, baseline_step
from conftest import DEVICE, ON_GPU

DIM, HEADS, TOKENS, PREFIX = 768, 12, 261, 5
PRECISION = mixed_precision("auto")
DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[PRECISION]
ROUNDS = 20 if ON_GPU else 5
BATCH = 64 if ON_GPU else 2


def step_flops(batch, span, weight):
    "Steps of the block that both losses need (the first is common to both), each once forward and twice backward."
    applied = span*(weight > 0) + span*(weight < 1) - (0 < weight < 1)
    return 3*applied*batch*block_flops(RecurrentBlock(DIM, HEADS).config, TOKENS)


def rivals(counts, batch, weight):
    "Ours, and the baseline, each a callable."
    seed_everything(0)
    span = sum(counts)
    ends = tuple(sum(counts[:j + 1]) for j in range(len(counts)))
    blocks = [RecurrentBlock(DIM, HEADS, layer_scale=0.1) for _ in counts]
    model = blocks[0] if len(counts) == 1 else Raptor(blocks, Phases(ends))
    ours = benchmark_step(DIM, HEADS, TOKENS, PREFIX, batch, span, weight, precision=PRECISION, model=model)
    theirs = nn.ModuleList([BaselineBlock(DIM, HEADS) for _ in counts]).to(DEVICE)
    return ours, baseline_step(theirs, counts, torch.randn(batch, span + 1, TOKENS, DIM, device=DEVICE), weight)


@pytest.mark.parametrize("weight", [0.5, 0.0], ids=["both losses", "autoregression"])
@pytest.mark.parametrize("span", [7, 4] if ON_GPU else [4])
def test_stage_1(work, matmul_rate, span, weight):
    ours, baseline = rivals((span,), BATCH, weight)
    work(f"stage 1, span {span}, batch {BATCH}, lambda {weight}, {PRECISION}", ours, rounds=ROUNDS, baseline=baseline, flops=step_flops(BATCH, span, weight), limit=matmul_rate(DTYPE))


def test_stage_2(work, matmul_rate):
    counts = (7, 3, 2)
    ours, baseline = rivals(counts, BATCH, 0.0)
    row = work(f"stage 2, 12 layers, batch {BATCH}, {PRECISION}", ours, rounds=ROUNDS, baseline=baseline, flops=step_flops(BATCH, 12, 0.0), limit=matmul_rate(DTYPE))
    del ours, baseline
    if ON_GPU and row: row |= {"memory of the baseline / ours": peak(counts, 1)/peak(counts, 0)}


def peak(counts, which):
    "Bytes of one of the two alone: weights, moments, activations."
    gc.collect(); torch.cuda.empty_cache(); before = torch.cuda.memory_allocated()
    step = rivals(counts, BATCH, 0.0)[which]
    gc.collect(); torch.cuda.reset_peak_memory_stats()
    step(); step(); torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
