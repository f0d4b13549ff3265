"Interventions: pushes in systems with known answers, and orders of layers that are complete and distinct."
import math
from itertools import product

import numpy as np
import pytest
import torch

from raptor.analysis.dynamics import ALL_TOKENS, token_kinds
from raptor.analysis.interventions import advance_with_order, perturbation_decay, sample_replacements, sample_swaps
from raptor.core import RaptorError
from raptor.phases import FragmentedPhases, Phases
from raptor.teacher.backbone import Backbone

from stand_ins import System, noise, rotation

KINDS = token_kinds(3, True, 10)


# perturbations

@pytest.mark.parametrize("size", [1e-6, 0.1, 10.0])
def test_a_rotation_neither_forgets_nor_amplifies_a_push(size):
    x = noise(3, 1, 10, 6, dtype=torch.float64)
    t = perturbation_decay(System(rotation(6, .7), 4), x, [0, 3], [size], KINDS)
    assert t.value.values == pytest.approx(math.atan(size), rel=1e-9) and t["std"].max() < 1e-9
    assert t.query("start_layer == 3").layer.unique().tolist() == [3, 4]
    assert t.query("start_layer == 0 and layer == 0")["count"].tolist() == [3, 6, 21]


def test_a_contraction_forgets_a_push_and_an_expansion_amplifies_it():
    axis = torch.eye(6, dtype=torch.float64)[0].expand(2, 1, 10, 6)
    for factor in (0.5, 1.5):
        A = torch.diag(torch.tensor([1.] + [factor]*5, dtype=torch.float64))
        t = perturbation_decay(System(A, 4), axis, [1], [0.2], ALL_TOKENS)
        assert t.value.values == pytest.approx(np.arctan(0.2*factor**np.arange(4)), abs=1e-12)


def test_the_push_depends_on_the_seed_and_is_shared_by_models_and_sizes():
    x, A = noise(3, 1, 10, 6), torch.diag(torch.arange(1., 7))
    shallow, deep = System(A, 2), System(A, 3)
    a, b, c = (perturbation_decay(m, x, [0], [.3], KINDS, seed=s) for m, s in ((shallow, 0), (deep, 0), (shallow, 1)))
    np.testing.assert_array_equal(a.query("layer == 1").value, b.query("layer == 1").value)
    assert (a.query("layer == 1").value.values != c.query("layer == 1").value.values).all()


@pytest.mark.parametrize("starts, sizes", [([4], [.1]), ([-1], [.1]), ([0], [0]), ([0], [float("nan")]), ([0], [-1])])
def test_impossible_perturbations_are_refused(starts, sizes):
    with pytest.raises(RaptorError, match="give layers in 0..3"):
        perturbation_decay(System(torch.eye(6), 4), noise(2, 1, 10, 6), starts, sizes, KINDS)


# orders

def test_advance_with_order_on_a_real_backbone():
    backbone = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False)
    state = backbone.embed(noise(2, 3, 24, 24))
    with torch.no_grad():
        assert torch.equal(advance_with_order(backbone, state, range(1, 7)), backbone.advance(state, 0, 6))
        blocks = backbone.model.blocks
        assert torch.equal(advance_with_order(backbone, state, (2, 1)), blocks[0](blocks[1](state)))
        assert torch.equal(advance_with_order(backbone, state, ()), state)
    for order in ((0,), (7,)):
        with pytest.raises(RaptorError, match="outside 1..6"): advance_with_order(backbone, state, order)


@pytest.mark.parametrize("phases", [Phases((3, 5, 8)), FragmentedPhases((0, 1, 0, 2, 1))])
@pytest.mark.parametrize("within", [True, False])
def test_swaps_are_all_and_only_the_transpositions_of_a_kind(phases, within):
    identity = tuple(range(1, phases.depth+1))
    swaps = sample_swaps(phases, within)
    assert len(set(swaps)) == len(swaps)
    for order in swaps:
        i, j = [l for l in identity if order[l-1] != l]
        assert (order[i-1], order[j-1]) == (j, i) and (phases.block_of(i) == phases.block_of(j)) == within
    inside = sum(c*(c-1)//2 for c in phases.counts)
    assert len(swaps) == (inside if within else phases.depth*(phases.depth-1)//2 - inside)


def test_swaps_are_seeded_limited_and_can_keep_a_distance():
    phases = Phases((7, 10, 12))
    first, again, other = (sample_swaps(phases, True, 5, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    every = sample_swaps(phases, True)
    assert len(every) == 25 and set(sample_swaps(phases, True, 25)) == set(every)
    assert len(sample_swaps(phases, True, gap=1)) == 9 and len(sample_swaps(phases, False, gap=1)) == 2
    with pytest.raises(RaptorError, match="there are 25"): sample_swaps(phases, True, 26)


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_replacements_cover_exactly_what_exists(within, K):
    phases, identity = Phases((2, 3, 5)), (1, 2, 3, 4, 5)
    def allowed(order):
        replaced = [(phases.block_of(o), phases.block_of(l)) for o, l in zip(order, identity) if o != l]
        return len(replaced) == K and all((a == b) == within for a, b in replaced)
    every = {o for o in product(identity, repeat=5) if allowed(o)}
    assert set(sample_replacements(phases, K, within, len(every))) == every
    with pytest.raises(RaptorError, match=f"there are {len(every)}"):
        sample_replacements(phases, K, within, len(every)+1)


def test_replacements_refuse_what_cannot_be():
    with pytest.raises(RaptorError, match="there are 0"): sample_replacements(Phases((1, 2)), 1, True, 1)
    with pytest.raises(RaptorError, match="give at least 1"): sample_replacements(Phases((3,)), 0, True, 1)
    first, again, other = (sample_replacements(Phases((7, 12)), 3, True, 6, seed=seed) for seed in (4, 4, 5))
    assert first == again != other
