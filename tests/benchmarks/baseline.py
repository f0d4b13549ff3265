"""The formulation of the paper's released code, in our own words and for the stopwatch only: float32, attention as `nn.MultiheadAttention` called with
one input three times (it computes and averages weight maps that nobody reads), teacher forcing and autoregression in separate passes, AdamW as torch
makes it by default. Never imported by the package."""
import torch
from torch import nn


class BaselineBlock(nn.Module):
    "The recurrent block of the method, with SwiGLU of width 4D, LayerScale and depth scaling."
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(dim, 8*dim), nn.Linear(4*dim, dim)
        self.scale1, self.scale2 = nn.Parameter(torch.full((dim,), 0.1)), nn.Parameter(torch.full((dim,), 0.1))
        self.depth = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 3*dim))

    def forward(self, x, t):
        a, b, c = (1 + self.depth(t[:, None]))[:, None].chunk(3, -1)
        y = self.norm1(x)
        x = x + a*self.scale1*self.attention(y, y, y)[0]
        gate, value = self.fc1(self.norm2(x)).chunk(2, -1)
        return c*(x + b*self.scale2*self.fc2(nn.functional.silu(gate)*value))


def baseline_step(blocks, counts, states, teacher_weight):
    "A callable that runs one optimiser step of `blocks`, block j applied counts[j] times, on states (B, n+1, N, D)."
    optimizer = torch.optim.AdamW(blocks.parameters(), lr=3e-4, weight_decay=1e-4)
    ends = [sum(counts[:j + 1]) for j in range(len(counts))]
    depths = torch.arange(1., states.shape[1], device=states.device)

    def forced(): # all pairs of a block at once
        parts = [block(states[:, s:e].flatten(0, 1), depths[s:e].repeat(len(states))).unflatten(0, (len(states), e - s)) for block, s, e in zip(blocks, [0, *ends], ends)]
        return torch.cat(parts, 1)

    def rolled():
        x, reached = states[:, 0], []
        for t in range(1, states.shape[1]):
            x = blocks[next(j for j, e in enumerate(ends) if t <= e)](x, depths[t - 1].repeat(len(x)))
            reached.append(x)
        return torch.stack(reached, 1)

    def step():
        loss = 0.
        if teacher_weight > 0: loss = loss + teacher_weight*nn.functional.mse_loss(forced(), states[:, 1:])
        if teacher_weight < 1: loss = loss + (1 - teacher_weight)*nn.functional.mse_loss(rolled(), states[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(blocks.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()
    return step
