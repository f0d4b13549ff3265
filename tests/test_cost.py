"Cost: operations against hand counts, and the memory of a call."
import math

import torch

from raptor.analysis.cost import count_parameters, counted_flops, peak_memory, vit_block_flops
from raptor.model.raptor import Raptor
from raptor.phases import Phases
from raptor.study.study import Study


def test_operations_of_the_embedded_teacher_are_those_counted_by_hand():
    teacher = Study.open("digits").teacher(trained=False)
    state = torch.zeros(1, teacher.num_tokens, teacher.dim)
    assert counted_flops(teacher.advance, state, 0, 12) == 12*vit_block_flops(teacher.dim, teacher.num_tokens)
    raptor = Raptor.create(Phases((5, 9, 12)), teacher.dim, teacher.num_heads)
    assert counted_flops(raptor, state) == raptor.flops(teacher.num_tokens)


def test_a_shared_parameter_counts_once():
    layer = torch.nn.Linear(3, 4)
    assert count_parameters(torch.nn.Sequential(layer, layer)) == 16


def test_peak_memory_sees_what_is_freed_again():
    calls = []
    def build():
        calls.append(1)
        torch.zeros(20_000_000).add_(1)
    for warm in (False, True):
        held = peak_memory(build, warm=warm)
        assert math.isnan(held) or 70e6 < held < 200e6
    assert torch.cuda.is_available() or len(calls) == 3, "a function is called once before, unless it is warm"
