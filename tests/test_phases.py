from collections import Counter
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from raptor.core import RaptorError
from raptor.phases import (
    FragmentedPhases, Phases, all_segmentations, as_phases, best_bisection, check_distance, cut_weight,
    layer_distance, layer_norms, max_cut, published_distance, published_segmentations, random_fragmented,
    random_segmentations, read_phases, recursive_max_cut
)
from raptor.trajectories.order import BatchPlan, epoch_order


def random_distance(depth, seed, integer=False):
    rng = np.random.default_rng(seed)
    d = np.triu(rng.integers(0, 4, (depth, depth)).astype(float) if integer else rng.random((depth, depth)), 1)
    return d + d.T


def pairs_cut(d, labels):
    return sum(d[i, j] for i, j in combinations(range(len(d)), 2) if labels[i] != labels[j])


matrices = st.builds(random_distance, st.integers(1, 9), st.integers(0, 10**6), st.booleans())


def source(states, num_prefix=1, **more):
    def batches(batch_size, *, start=0, end=None, **_):
        return (b[:, start:None if end is None else end+1] for b in states.split(batch_size))
    return SimpleNamespace(batches=batches, num_prefix=num_prefix, depth=states.shape[1]-1, **more)


# the published matrix

def test_published_matrix_and_both_solvers():
    W = published_distance()
    assert W[0, 11] == 1.08 and W[2, 3] == 0.05 and W[10, 11] == 0.75 and W.sum()/2 == pytest.approx(33.88)
    published = {0.2: (7, 12), 0.1: (7, 10, 12), 0.09: (4, 7, 10, 12)}
    assert {e: p.ends for e, p in published_segmentations().items()} == published
    assert {e: recursive_max_cut(W, e).ends for e in published} == published
    assert [max_cut(W, k).ends for k in (1, 2, 3, 4)] == [(12,), (7, 12), (5, 9, 12), (4, 7, 10, 12)]
    assert cut_weight(W, (5, 9, 12)) > cut_weight(W, (7, 10, 12))


# exact solver

@settings(deadline=None, max_examples=80)
@given(matrices, st.integers(1, 9), st.integers(1, 3))
def test_max_cut_equals_enumeration_with_the_documented_tie_break(d, k, min_size):
    if k*min_size > len(d): return
    every = all_segmentations(len(d), k, min_size)
    best = max(pairs_cut(d, p.assignment) for p in every)
    winners = [p for p in every if pairs_cut(d, p.assignment) >= best - 1e-9]
    assert max_cut(d, k, min_size) == winners[0]


@settings(deadline=None, max_examples=40)
@given(matrices, st.sampled_from([1e-6, 0.1, 3.0, 1e7]))
def test_max_cut_ignores_scale_and_more_phases_never_cut_less(d, scale):
    weights = [cut_weight(d, max_cut(d, k)) for k in range(1, len(d)+1)]
    assert all(a <= b + 1e-9 for a, b in zip(weights, weights[1:]))
    assert weights[0] == 0 and weights[-1] == pytest.approx(d.sum()/2)
    for k in range(1, len(d)+1): assert max_cut(scale*d, k) == max_cut(d, k)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 1000))
def test_max_cut_finds_planted_blocks(counts, seed):
    block = np.repeat(np.arange(len(counts)), counts)
    d = np.where(block[:, None] == block, 0.1, 1.0) * (1 - np.eye(len(block)))
    noise = random_distance(len(block), seed)*0.001
    assert max_cut(d + noise, len(counts)).counts == tuple(counts)


def test_max_cut_ties_are_broken_by_the_smallest_ends_despite_rounding():
    d = np.full((30, 30), 0.1) - 0.1*np.eye(30) # 0.1 has no exact binary form
    assert max_cut(d, 4).ends == (7, 14, 22, 30)
    assert max_cut(np.zeros((7, 7)), 3, min_size=2).ends == (2, 4, 7)


def test_max_cut_of_48_layers_in_12_phases():
    "Far beyond enumeration (10^10 segmentations): twelve planted phases of 1..8 layers."
    counts = (1, 8, 2, 6, 3, 5, 4, 4, 3, 6, 5, 1)
    block = np.repeat(range(12), counts)
    assert max_cut((block[:, None] != block) + random_distance(48, 0)*0.001, 12).counts == counts


# cut weight

@settings(deadline=None)
@given(matrices, st.data())
def test_cut_and_within_add_up_to_the_total(d, data):
    labels = data.draw(st.lists(st.integers(0, 3), min_size=len(d), max_size=len(d)))
    within = sum(d[i, j] for i, j in combinations(range(len(d)), 2) if labels[i] == labels[j])
    assert cut_weight(d, labels) + within == pytest.approx(d.sum()/2)


def test_cut_weight_reads_every_way_of_writing_a_partition():
    d = random_distance(6, 1)
    expected = pairs_cut(d, [0, 0, 1, 1, 1, 2])
    forms = [(2, 5, 6), [2, 5, 6], np.array([2, 5, 6]), Phases((2, 5, 6)), (0, 0, 1, 1, 1, 2),
             FragmentedPhases((2, 2, 0, 0, 0, 1))]
    assert [cut_weight(d, f) for f in forms] == [pytest.approx(expected)]*6
    assert cut_weight(torch.tensor(d), (2, 5, 6)) == cut_weight(pd.DataFrame(d), (2, 5, 6)) == pytest.approx(expected)


# recursive solver

@settings(deadline=None, max_examples=60)
@given(matrices)
def test_best_bisection_equals_brute_force(d):
    n = len(d)
    cuts = [pairs_cut(d, (0, *s)) for s in product((0, 1), repeat=n-1) if any(s)]
    gain, far = best_bisection(d)
    if not cuts: assert (gain, far) == (0.0, None); return
    assert gain == pytest.approx(max(cuts)) and gain == pytest.approx(pairs_cut(d, far))
    assert not far[0] and 1 <= far.sum() <= n - 1


def test_bisection_prefers_an_interval_among_equals():
    gain, far = best_bisection(np.ones((6, 6)) - np.eye(6))
    assert gain == 9 and far.tolist() == [False]*3 + [True]*3


@settings(deadline=None, max_examples=40)
@given(matrices, st.floats(0, 1))
def test_recursive_splits_once_then_judges_each_half_alone(d, eps):
    total, result = d.sum()/2, np.array(recursive_max_cut(d, eps).assignment)
    def parts(members):
        gain, far = best_bisection(d[np.ix_(members, members)])
        if gain <= (eps + 1e-10)*total or len(members) < 4: return [members]
        return parts(members[~far]) + parts(members[far])
    expected = parts(np.arange(len(d)))
    assert {tuple(p) for p in expected} == {tuple(np.flatnonzero(result == j)) for j in set(result)}


@pytest.mark.parametrize("layers, min_size, ends", [
    (4, 2, (3, 4)), (5, 2, (4, 5)), (3, 2, (3,)), (5, 3, (5,)), (6, 3, (5, 6)), (2, 1, (1, 2))])
def test_min_size_decides_which_clusters_are_tried_and_a_half_may_be_one_layer(layers, min_size, ends):
    d = np.ones((layers, layers)) - np.eye(layers)
    d[-1, :-1] = d[:-1, -1] = 9 # the last layer alone is far from the others
    assert recursive_max_cut(d, 0.5, min_size).ends == ends


def test_recursive_handles_flat_small_and_large_clusters():
    assert recursive_max_cut(np.zeros((8, 8)), 0).ends == (8,)
    assert recursive_max_cut(random_distance(3, 0), 0).ends == (3,) # fewer than 2*min_size
    assert recursive_max_cut([[0]], 0).ends == (1,)
    with pytest.raises(RaptorError, match="whole number"): recursive_max_cut(np.zeros((5, 5)), 0.1, min_size=0)
    with pytest.raises(RaptorError, match="use max_cut"): recursive_max_cut(random_distance(25, 0), 0.1)


def test_recursive_runs_at_the_enumeration_limit():
    block = np.repeat([0, 1], [14, 10])
    assert recursive_max_cut((block[:, None] != block)*1.0, 0.1).ends == (14, 24)


# controls

def test_all_segmentations_are_counted_by_the_binomial():
    for depth, k, m, count in [(12, 3, 1, 55), (12, 3, 2, 28), (6, 6, 1, 1), (6, 3, 2, 1), (1, 1, 1, 1)]:
        every = all_segmentations(depth, k, m)
        assert len(every) == len(set(every)) == count and every == sorted(every, key=lambda p: p.ends)
        assert all(p.depth == depth and p.k == k and min(p.counts) >= m for p in every)
    with pytest.raises(RaptorError, match="random_segmentations"): all_segmentations(48, 12)


def test_random_segmentations_are_uniform_distinct_and_seeded():
    first = Counter(random_segmentations(7, 3, 1, seed)[0] for seed in range(3000))
    assert len(first) == 15 and max(abs(c - 200) for c in first.values()) < 5*np.sqrt(200)
    drawn = random_segmentations(40, 12, 50, seed=3, min_size=3)
    assert len(set(drawn)) == 50 and all(min(p.counts) >= 3 and p.depth == 40 for p in drawn)
    again, other = (random_segmentations(40, 12, 50, seed, min_size=3) for seed in (3, 4))
    assert drawn == again != other
    assert random_segmentations(5, 2, 0, seed=0) == []


def test_random_fragmented_covers_exactly_the_non_contiguous_partitions():
    # counts (2, 2, 1) of 5 layers: 5!/(2! 2! 1!)/2! = 15 partitions, 3 of them contiguous
    drawn = random_fragmented((2, 2, 1), 12, seed=0)
    assert len({as_phases(f, 5) for f in drawn}) == 12 and all(f.counts == (2, 2, 1) for f in drawn)
    with pytest.raises(RaptorError, match="in 0..12"): random_fragmented((2, 2, 1), 13, seed=0)
    tally = Counter(as_phases(random_fragmented((2, 2, 1), 1, seed)[0], 5) for seed in range(2400))
    assert len(tally) == 12 and max(abs(c - 200) for c in tally.values()) < 5*np.sqrt(200)


# types

@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_phases_interface_is_consistent(counts):
    p = Phases(np.cumsum(counts))
    assert p.counts == tuple(counts) and p.depth == sum(counts) and p.k == len(counts)
    assert [p.block_of(l) for l in range(1, p.depth+1)] == list(p.assignment)
    assert all(p.block_of(e) == j and p.block_of(s+1) == j for j, (s, e) in enumerate(p.spans))
    same = FragmentedPhases(p.assignment)
    assert (same.k, same.counts, same.depth, same.spans) == (p.k, p.counts, p.depth, p.spans)
    assert as_phases(same, p.depth) == p and hash(p) == hash(Phases(p.ends)) and all(type(e) is int for e in p.ends)


def test_fragmented_spans_name_each_run():
    f = FragmentedPhases((1, 0, 0, 1, 1, 2))
    assert f.spans == [(0, 1), (1, 3), (3, 5), (5, 6)] and f.counts == (2, 3, 1)
    assert [f.block_of(e) for _, e in f.spans] == [1, 0, 1, 2]


@pytest.mark.parametrize("ends", [(), (0, 3), (3, 3), (5, 2), (1.0, 2), (True, 2), 7, "ab", (-1, 2)])
def test_bad_ends_are_refused(ends):
    with pytest.raises(RaptorError): Phases(ends)


@pytest.mark.parametrize("assignment", [(), (1, 1), (0, 2), (0, -1), (0, 0.5), None])
def test_bad_assignments_are_refused(assignment):
    with pytest.raises(RaptorError): FragmentedPhases(assignment)


def test_segmentations_are_read_with_their_number_of_phases(tmp_path):
    (tmp_path/"phases.json").write_text('{"ends": {"1": [6], "2": [2, 6]}, "record": {"seed": 3}}')
    assert read_phases(tmp_path/"phases.json") == {1: (6,), 2: (2, 6)}


@pytest.mark.parametrize("text", [
    '{"ends": {"2": ["$(touch X)", 6]}}', '{"ends": {"2; touch X": [2, 6]}}', '{"ends": {"2": "26"}}', '{"ends": {"2": 6}}',
    '{"ends": {"2": null}}', '{"ends": {"2": [2.0, 6]}}', '{"ends": {"2": [true, 6]}}', '{"ends": {"2": [6, 2]}}',
    '{"ends": {"3": [2, 6]}}', '{"ends": {"02": [2, 6]}}', '{"ends": {"2": [2, 6], "3": [1, 2, 7]}}',
    '{"ends": {"2": [2, 1025]}}', '{"ends": {}}', '{"ends": [[2, 6]]}', '{"end": {"2": [2, 6]}}', "[]", "2", "{", "",
    "[" * 10**5, '{"ends": {"2": {"2": 1, "6": 2}}}'])
def test_segmentations_that_are_none_are_refused(tmp_path, text):
    (tmp_path/"phases.json").write_text(text)
    with pytest.raises(RaptorError, match="phases.json") as e: read_phases(tmp_path/"phases.json")
    assert "\n" not in str(e.value) and len(str(e.value)) < 500 and "again" in str(e.value)


@pytest.mark.parametrize("bad, says", [
    (np.full((3, 3), np.nan), "NaN or infinite"), ([[0, np.inf], [np.inf, 0]], "NaN or infinite"),
    ([[0, 1], [2, 0]], "not symmetric"), ([[0, -1], [-1, 0]], "negative"), (np.eye(3), "itself"),
    (np.zeros((2, 3)), "square"), (np.zeros(4), "square"), (np.zeros((0, 0)), "square"),
    ([["a"]], "not a number"), ([[0, 1], [1]], "not a number")])
def test_every_solver_refuses_a_bad_matrix_in_one_sentence(bad, says):
    for solve in (lambda: max_cut(bad, 1), lambda: recursive_max_cut(bad, 0.1), lambda: cut_weight(bad, (2,))):
        with pytest.raises(RaptorError, match=says) as e: solve()
        assert "\n" not in str(e.value) and str(e.value).endswith(".")


@pytest.mark.parametrize("place, says", [((0, 0), "itself"), ((0, 1), "not symmetric"), ((2, 1), "not symmetric")])
def test_rounding_is_forgiven_up_to_a_millionth_of_the_largest_distance(place, says):
    for size in (0.001, 1.0, 500.0):
        d = size*(np.ones((3, 3)) - np.eye(3))
        d[place] += 0.9e-6*size
        assert check_distance(d)[place] == d[place]
        d[place] += 0.2e-6*size
        with pytest.raises(RaptorError, match=says): check_distance(d)


def test_a_distance_may_be_negative_by_rounding_alone():
    d = np.array([[0, 1, -0.9e-6], [1, 0, 1], [-0.9e-6, 1, 0]])
    assert check_distance(d)[0, 2] == -0.9e-6
    d[0, 2] = d[2, 0] = -1.1e-6
    with pytest.raises(RaptorError, match="negative"): check_distance(d)


@pytest.mark.parametrize("k, min_size", [(0, 1), (6, 1), (3, 2), (-1, 1), (2.0, 1), (1, 0)])
def test_impossible_k_is_refused_everywhere(k, min_size):
    d = random_distance(5, 0)
    for solve in (lambda: max_cut(d, k, min_size), lambda: all_segmentations(5, k, min_size),
                  lambda: random_segmentations(5, k, 1, 0, min_size)):
        with pytest.raises(RaptorError, match="cannot be split"): solve()


@pytest.mark.parametrize("call, says", [
    (lambda: recursive_max_cut(np.zeros((4, 4)), 1.5), "fraction"),
    (lambda: recursive_max_cut(np.zeros((4, 4)), float("nan")), "fraction"),
    (lambda: as_phases((2, 4), 5), "close it with 5"), (lambda: as_phases(Phases((5,)), 4), "covers 5 layers"),
    (lambda: Phases((3,)).block_of(4), "1..3"), (lambda: Phases((3,)).block_of(0), "1..3"),
    (lambda: random_segmentations(5, 2, 5, 0), "in 0..4"), (lambda: random_segmentations(5, 2, -1, 0), "-1 "),
    (lambda: random_fragmented((3, 0), 1, 0), "at least 1"), (lambda: random_fragmented((1, 1), 1, 0), "in 0..0")])
def test_other_mistakes_say_what_was_wrong(call, says):
    with pytest.raises(RaptorError, match=says): call()


# distances

def reference_distance(states, num_prefix, has_cls, metric):
    x, total, n = states.double().numpy(), 0, 0
    for image in x:
        kinds = ([image[1:, 0]] if has_cls else []) + [image[1:, num_prefix:].mean(1)]
        for v in kinds:
            norm = np.linalg.norm(v, axis=-1)
            if metric == "mse": pair = ((v[:, None] - v[None])**2).mean(-1)
            else: pair = 1 - (v[:, None]*v[None]).sum(-1)/norm[:, None]/norm
            total, n = total + pair, n + 1
    return total/n


@pytest.mark.parametrize("metric", ["cosine", "mse"])
@pytest.mark.parametrize("num_prefix, has_cls", [(5, True), (1, True), (0, False)])
def test_layer_distance_matches_the_definition(metric, num_prefix, has_cls):
    states = torch.randn(7, 6, 11, 8, generator=torch.Generator().manual_seed(0)).double()
    expected = reference_distance(states, num_prefix, has_cls, metric)
    for batch_size in (2, 7):
        got = layer_distance(source(states, num_prefix), metric, batch_size=batch_size)
        assert got.dtype == np.float64 and np.abs(got - expected).max() < 1e-6
        assert (got == got.T).all() and (np.diag(got) == 0).all()


def test_registers_do_not_matter_and_has_cls_is_believed():
    states = torch.randn(4, 5, 9, 8, generator=torch.Generator().manual_seed(1))
    other = states.clone(); other[:, :, 1:4] += 100
    assert np.array_equal(layer_distance(source(states, 4)), layer_distance(source(other, 4)))
    other = states.clone(); other[:, :, :4] += 100 # prefix of registers only: no cls
    before, after = (layer_distance(source(s, 4, has_cls=False)) for s in (states, other))
    assert np.array_equal(before, after)


def test_limit_stops_reading_and_half_precision_is_enough():
    states = torch.randn(9, 5, 6, 8, generator=torch.Generator().manual_seed(2))
    read = []
    def batches(batch_size, *, start=0, **_):
        for b in states.split(batch_size): read.append(len(b)); yield b[:, start:]
    lazy = SimpleNamespace(batches=batches, num_prefix=1, depth=4)
    first = layer_distance(source(states[:3]), batch_size=2)
    assert np.array_equal(layer_distance(lazy, limit=3, batch_size=2), first) and read == [2, 2]
    assert np.abs(layer_distance(source(states.half())) - layer_distance(source(states))).max() < 1e-3


class Numbered:
    "n images of one layer, whose tokens are the image's number; drawn as every trajectory source draws them."
    num_prefix, depth = 1, 1
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def batches(self, batch_size, *, start, seed, steps):
        plan = BatchPlan(self.n, batch_size, seed, steps=steps)
        self.read = [epoch_order(self.n, seed, epoch)[a:b] for epoch, a, b in plan]
        return (torch.tensor(images, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 1) for images in self.read)


@pytest.mark.parametrize("n, limit, batch_size, sizes", [
    (8, 7, 3, [2]*4), (9, 7, 3, [3]*3), (8, 4, 4, [4]), (64, 10, 4, [4]*3), (11, 10, 7, [5]*2), (7, 6, 4, [3]*2)])
def test_a_seeded_limit_reads_the_fewest_batches_that_fit_into_an_epoch(n, limit, batch_size, sizes):
    images = Numbered(n)
    mean = layer_norms(images, limit, batch_size, seed=3).value[0]
    drawn = np.concatenate(images.read)[:limit]
    assert list(map(len, images.read)) == sizes and len(set(drawn)) == limit and mean == pytest.approx(drawn.mean())


def test_distance_is_tiny_but_right_for_almost_parallel_states():
    angle = 1e-5
    v = torch.tensor([[1, 0], [1, 0], [np.cos(angle), np.sin(angle)]], dtype=torch.float64)
    states = v[None, :, None].repeat(3, 1, 2, 1)
    states[:, :, 1] = v[0] # the patch stays
    assert layer_distance(source(states))[0, 1] == pytest.approx(angle**2/4, rel=1e-3)


@pytest.mark.parametrize("states, kwargs, says", [
    (torch.full((2, 3, 4, 5), float("nan")), {}, "NaN"), (torch.zeros(0, 3, 4, 5), {}, "no images"),
    (torch.ones(2, 3, 4, 5), dict(limit=0), "at least 1"), (torch.ones(2, 3, 4, 5), dict(metric="l2"), "metric")])
def test_bad_sources_are_refused(states, kwargs, says):
    with pytest.raises(RaptorError, match=says): layer_distance(source(states), **kwargs)


def test_layer_norms_known_values():
    states = torch.zeros(4, 3, 6, 2)
    states[:, 1, 0, 0], states[:, 2, 0, 1] = 3, torch.tensor([1., 1, 3, 3])
    states[:, 1, 1:, 0], states[:, 2, 1:, 0] = torch.tensor([1., 2, 3, 4, 5]), torch.tensor([1., -1, 1, -1, 0])
    norms = layer_norms(source(states), batch_size=3).set_index(["token_kind", "layer"])
    assert norms.value["cls"].tolist() == [3, 2] and norms["std"]["cls"].tolist() == [0, 1]
    assert norms.value["patch_mean"].tolist() == pytest.approx([3, 0])
