"What several test modules share: linear systems with known answers, and the command in this process."
import math

import torch

from raptor.pipeline import cli


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(dim, theta, dtype=torch.float64):
    "Turns every plane (0, 1), (2, 3), ... by theta: every vector turns by exactly theta."
    block = torch.tensor([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]], dtype=dtype)
    return torch.block_diag(*[block]*(dim//2))


class System:
    "x -> A x at every layer, and a record of the calls."
    def __init__(self, A, depth): self.A, self.depth = A, depth
    def advance(self, state, start, end):
        for _ in range(start, end): state = state @ self.A.to(state.dtype).T
        return state
    def trajectory(self, state): return torch.stack([self.advance(state, 0, l) for l in range(self.depth+1)], 1)


def run(capsys, *argv):
    "The command in this process: exit status, standard output and the lines on standard error."
    status = 0
    try: cli.main(list(map(str, argv)))
    except SystemExit as e: status = e.code
    said = capsys.readouterr()
    return status or 0, said.out, said.err.splitlines()
