"Meters: scores by hand and by scikit-learn, merging in any order, and the errors for input that does not fit."
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, jaccard_score
from sklearn.metrics import r2_score as sklearn_r2

from raptor.core import RaptorError
from raptor.probes.heads import PROBE_TASKS, probe_task
from raptor.probes.metrics import (
    DepthMeter, IoUMeter, R2Meter, TopOneMeter, depth_rmse, mean_iou, merge_meters, r2_score, top1
)

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**20)

def random(*shape, seed=0, **kw): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kw)

def test_top1_equals_the_mean_over_all_images_and_not_that_of_the_batches():
    logits, labels = random(70, 10), torch.arange(70).remainder(10)
    parts = [TopOneMeter().update(a, b) for a, b in zip(logits.split([1, 60, 9]), labels.split([1, 60, 9]))]
    assert merge_meters(parts).compute() == (logits.argmax(1) == labels).sum().item()/70

@quick
@given(seeds, st.integers(2, 6))
def test_iou_equals_sklearn_and_is_blind_to_ignored_pixels(seed, classes):
    g = torch.Generator().manual_seed(seed)
    target, pred = torch.randint(0, classes, (2, 3, 4, 5), generator=g)
    present = sorted(set(target.flatten().tolist()) | set(pred.flatten().tolist()))
    expected = jaccard_score(target.flatten(), pred.flatten(), labels=present, average="macro", zero_division=0)
    assert mean_iou(pred, target, classes) == pytest.approx(expected)
    hole = torch.full((1, 4, 5), 255)
    assert mean_iou(torch.cat([pred, pred[:1]]), torch.cat([target, hole]), classes) == pytest.approx(expected)
    counts = IoUMeter(classes).update(pred, target).confusion.confmat
    assert (counts.numpy() == confusion_matrix(target.flatten(), pred.flatten(), labels=range(classes))).all()

def test_iou_of_logits_and_of_classes_agree():
    logits, target = random(2, 4, 3, 3), random(2, 3, 3, seed=1).abs().long().clamp(max=3)
    assert mean_iou(logits, target, 4) == mean_iou(logits.argmax(1), target, 4)

def test_iou_absent_classes_are_nan_per_class_and_out_of_the_mean():
    meter = IoUMeter(150).update(torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 2).long())
    assert meter.compute() == 1 and np.isnan(meter.per_class()[1:]).all()

@pytest.mark.parametrize("sizes", [[2], [1, 1]]) # also where a batch, or a process, has seen one image
def test_depth_rmse_is_one_root_over_the_valid_pixels_of_all_images(sizes):
    "Four pixels of an image are 1 m off and one of another 3 m; nothing was measured at two, and 11 m is out of range."
    pred, target = torch.zeros(2, 1, 4), torch.tensor([[[1., 1, 1, 1]], [[3., 0, 0, 11]]])
    meter = merge_meters([DepthMeter().update(p, t) for p, t in zip(pred.split(sizes), target.split(sizes))])
    assert meter.compute() == pytest.approx(math.sqrt((4*1 + 9)/5))
    assert meter.per_image() == pytest.approx((1 + 3)/2)
    assert depth_rmse(pred, target) == meter.compute()
    assert depth_rmse(pred[1], target[1]) == 3

@pytest.mark.parametrize("true", [0.5, 8.0])
def test_the_ends_of_the_depth_range_are_included(true):
    target = torch.tensor([[[true, true - 0.25, true + 0.25]]])
    meter = DepthMeter(min_depth=0.5, max_depth=8.0).update(target + torch.tensor([3., 4., 4.]), target)
    assert meter.pixels.sum_value == 2 and meter.compute() == pytest.approx(math.sqrt((9 + 16)/2))

def test_depth_rmse_looks_only_inside_the_crop():
    pred, target = torch.full((1, 480, 640), 2.), torch.full((1, 480, 640), 5.)
    target[:, 45:471, 41:601] = 4.
    assert depth_rmse(pred, target, crop=(45, 471, 41, 601)) == 2
    assert depth_rmse(pred, target) > 2

@quick
@given(seeds, st.integers(2, 40), st.integers(1, 6))
def test_r2_equals_sklearn(seed, n, d):
    a, b = random(2, n, d, seed=seed, dtype=torch.float64)
    assert r2_score(a, b) == pytest.approx(sklearn_r2(b, a, multioutput="variance_weighted"), abs=1e-9)

def test_r2_is_per_layer_about_the_mean_over_images_and_tokens():
    x, y = random(4, 3, 5, 2, seed=3), random(4, 3, 5, 2, seed=4)
    meter = R2Meter().update(x, y)
    expected = [sklearn_r2(y[:, l].reshape(-1, 2), x[:, l].reshape(-1, 2), multioutput="variance_weighted")
                for l in range(3)]
    assert meter.per_layer() == pytest.approx(expected) and meter.compute() == pytest.approx(np.mean(expected))

def test_r2_of_uneven_batches_is_that_of_the_whole_and_not_their_mean():
    x, y = random(9, 2, 3, 4, seed=5), random(9, 2, 3, 4, seed=6) + torch.arange(9.).view(9, 1, 1, 1)
    parts = [R2Meter().update(a, b) for a, b in zip(x.split([1, 6, 2]), y.split([1, 6, 2]))]
    mean_of_batches = np.mean([p.compute() for p in parts])
    whole = R2Meter().update(x, y).compute()
    assert merge_meters(parts).compute() == pytest.approx(whole, rel=1e-9) and abs(whole - mean_of_batches) > .1

@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("sizes", [[9], [1, 6, 2]])
def test_pooled_r2_has_one_mean_of_all_states_and_dimensions(sizes, given):
    "The paper's definition, written out; a state that is given counts, without an error of its own."
    y = random(9, 3, 5, 4, seed=5, dtype=torch.float64) + torch.tensor([0., 20, -7, 300])
    x = y + random(9, 3, 5, 4, seed=6, dtype=torch.float64)
    x[:, :given] = y[:, :given]
    meter = merge_meters([R2Meter(given).update(a, b) for a, b in zip(x.split(sizes), y.split(sizes))])
    expected = 1 - ((x - y).square().sum()/(y - y.mean()).square().sum()).item()
    assert meter.pooled() == pytest.approx(expected, abs=1e-12)
    rest = R2Meter().update(x[:, given:], y[:, given:])
    assert meter.per_layer() == pytest.approx(rest.per_layer()) and meter.pooled() - meter.compute() > .3

def test_r2_survives_means_far_above_the_spread():
    y = random(6, 1, 50, 3, seed=7, dtype=torch.float64)
    noise = .5*random(6, 1, 50, 3, seed=8, dtype=torch.float64)
    meter = R2Meter()
    for a, b in zip((y + noise + 1e8).split(1), (y + 1e8).split(1)): meter.update(a, b)
    expected = 1 - (noise.square().sum()/(y - y.mean((0, 2))).square().sum()).item()
    assert meter.compute() == pytest.approx(expected, rel=1e-6)

def test_r2_constant_dimension_counts_its_error():
    y, x = torch.tensor([[1., 5.], [3., 5.]]), torch.tensor([[1., 6.], [3., 5.]])
    assert r2_score(x, y) == pytest.approx(1 - 1/2)

def test_r2_divides_by_the_target_variance():
    y = random(50, 2, seed=9, dtype=torch.float64)
    assert r2_score(0*y, y - y.mean(0)) == pytest.approx(0, abs=1e-12)
    assert r2_score(3*y, y) < 0

@pytest.mark.parametrize("value", [0., .1, .7, 1e8 + .1])
def test_r2_of_a_constant_target_is_undefined(value):
    "The mean of three times 0.1 is not 0.1 in float64, so the squares about it are not zero."
    target = torch.full((3, 1, 1, 2), value, dtype=torch.float64)
    if value == .1: assert R2Meter().update(target, target).square.sum() > 0
    with pytest.raises(RaptorError, match="does not vary .layer 1 of 1"): R2Meter().update(target, target).compute()

def batches(task, g):
    "Random (prediction, target) of a task."
    labels = torch.randint(0, 4, (3,) if task == "classification" else (3, 4, 6), generator=g)
    if task == "depth": return torch.rand(3, 4, 6, generator=g) + .5, 9*torch.rand(3, 4, 6, generator=g) + .5
    return torch.randn(3, 4, *labels.shape[1:], generator=g), labels

@quick
@given(seeds, st.sampled_from(sorted(PROBE_TASKS)), st.integers(0, 3))
def test_merging_equals_one_meter_in_any_order_also_through_pickle(seed, task, cut):
    g = torch.Generator().manual_seed(seed)
    pairs = [batches(task, g) for _ in range(3)]
    def new(some):
        meter = probe_task(task).meter(4)
        for pair in some: meter.update(*pair)
        return meter
    a, b = new(pairs[:cut]), new(pairs[cut:])
    one = new(pairs).compute()
    assert merge_meters(pickle.loads(pickle.dumps([b, a]))).compute() == pytest.approx(one, rel=1e-12)

def test_merging_an_empty_r2_meter_changes_nothing():
    full = R2Meter().update(random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1))
    assert (R2Meter().merge(full).per_layer() == full.per_layer()).all()
    assert (pickle.loads(pickle.dumps(full)).merge(R2Meter()).per_layer() == full.per_layer()).all()

def test_a_meter_scores_its_own_process_alone(monkeypatch):
    "Evaluation runs on the main process only, which would otherwise wait for the others forever."
    def scores():
        g = torch.Generator().manual_seed(0)
        return [probe_task(t).meter(4).update(*batches(t, g)).compute() for t in PROBE_TASKS]
    alone = scores()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for name in ("barrier", "get_world_size"):
        monkeypatch.setattr(torch.distributed, name, lambda *args, **kw: pytest.fail("waits for other processes"))
    assert scores() == alone

@pytest.mark.parametrize("meter", [TopOneMeter(), IoUMeter(3), DepthMeter(), R2Meter()])
def test_a_meter_that_saw_nothing_has_no_score(meter):
    with pytest.raises(RaptorError, match="has seen no"): meter.compute()

def test_meters_that_saw_only_invalid_targets_have_no_score():
    nothing = torch.full((1, 2, 2), 255)
    with pytest.raises(RaptorError, match="no labelled pixel"): mean_iou(torch.zeros(1, 2, 2).long(), nothing, 3)
    with pytest.raises(RaptorError, match="no valid depth"): depth_rmse(torch.ones(1, 2, 2), torch.zeros(1, 2, 2))

@pytest.mark.parametrize("score", [lambda n: top1(n.new_full((1, 3), n), torch.tensor([0])),
                                   lambda n: mean_iou(n.expand(1, 3, 2, 2), torch.zeros(1, 2, 2).long(), 3),
                                   lambda n: depth_rmse(n.expand(1, 2, 2), torch.ones(1, 2, 2)),
                                   lambda n: r2_score(n.expand(3, 2), random(3, 2)),
                                   lambda n: r2_score(random(3, 2), n.expand(3, 2))])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_diverged_predictions_are_an_error_and_not_a_score(score, value):
    with pytest.raises(RaptorError, match="diverged"): score(torch.tensor(value))

SIX = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)

@pytest.mark.parametrize("match,call", [
    ("one shape", lambda: top1(torch.zeros(2, 3), torch.zeros(3).long())),
    ("one shape", lambda: top1(torch.zeros(2), torch.zeros(2).long())),
    ("label 9", lambda: top1(torch.zeros(1, 3), torch.tensor([9]))),
    ("label -1", lambda: top1(torch.zeros(1, 3), torch.tensor([-1]))),
    ("one shape", lambda: mean_iou(torch.zeros(1, 2, 2).long(), torch.zeros(1, 4, 4).long(), 3)),
    ("one shape", lambda: mean_iou(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 4).long(), 3)),
    ("label 3", lambda: mean_iou(torch.full((1, 2, 2), 3), torch.zeros(1, 2, 2).long(), 3)),
    ("one of the 300 classes", lambda: IoUMeter(300)),
    ("one shape", lambda: depth_rmse(torch.zeros(1, 2, 2), torch.zeros(1, 4, 4))),
    ("trajectories", lambda: R2Meter().update(torch.zeros(2, 3), torch.zeros(2, 3))),
    ("samples before D", lambda: r2_score(torch.zeros(3), torch.zeros(3))),
    ("cannot merge", lambda: DepthMeter().merge(DepthMeter(max_depth=80.))),
    ("cannot merge", lambda: TopOneMeter().merge(IoUMeter(3))),
    ("cannot merge", lambda: R2Meter().merge(TopOneMeter())),
    ("cannot merge", lambda: R2Meter().update(*SIX).update(*(x[:, :2] for x in SIX))),
])
def test_meters_refuse_what_does_not_fit(match, call):
    with pytest.raises(RaptorError, match=match): call()
