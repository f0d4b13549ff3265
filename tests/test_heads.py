"Heads, losses and tasks: known values, agreement with plain formulas, and what bad input says."
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from raptor.core import RaptorError
from raptor.probes.heads import (
    ClassificationHead, DepthHead, SegmentationHead, bin_target, depth_loss, masked_cross_entropy, probe_task,
    over_processes, scale_invariant_loss
)
from raptor.probes.metrics import depth_rmse

def random(*shape, seed=0, **kw): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kw)
def backbone(**kw): return SimpleNamespace(**{**dict(dim=6, num_prefix=5, grid=(2, 3), has_cls=True), **kw})

# ---- heads

def test_classification_reads_cls_and_mean_patch_and_no_register():
    head, x = ClassificationHead(6, 3, num_prefix=5), random(2, 11, 6)
    expected = torch.cat([x[:, 0], x[:, 5:].mean(1)], 1) @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(x), expected)
    y = x.clone()
    y[:, 1:5] += 7
    torch.testing.assert_close(head(y), head(x))

def test_classification_without_cls_uses_the_mean_patch_twice():
    head, x = ClassificationHead(6, 3, num_prefix=0, has_cls=False), random(2, 6, 6)
    mean = x.mean(1)
    torch.testing.assert_close(head(x), torch.cat([mean, mean], 1) @ head.linear.weight.T + head.linear.bias)

def test_load_official_copies_and_refuses_the_four_layer_head():
    head = ClassificationHead(4, 3, num_prefix=1)
    w, b = random(3, 8, seed=1), random(3, seed=2)
    assert head.load_official(w, b) is head
    assert torch.equal(head.linear.weight, w) and torch.equal(head.linear.bias, b) and head.linear.weight.requires_grad
    with pytest.raises(RaptorError, match="one-layer"): head.load_official(random(3, 20), b)

def test_segmentation_puts_each_patch_in_its_place():
    head = SegmentationHead(1, 2, num_prefix=1, grid=(2, 3))
    head.linear.load_state_dict({"weight": torch.tensor([[1.], [-1.]]), "bias": torch.zeros(2)})
    out = head(torch.tensor([99., 0, 1, 2, 3, 4, 5]).view(1, 7, 1))
    assert out[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]] and out[0, 1].tolist() == [[0, -1, -2], [-3, -4, -5]]
    assert head(random(1, 7, 1), (37, 5)).shape == (1, 2, 37, 5)

@pytest.mark.parametrize("has_cls", [True, False])
def test_depth_head_equals_upsampling_features_then_one_by_one_convolution(has_cls):
    head = DepthHead(6, num_prefix=5, grid=(2, 3), bins=16, has_cls=has_cls)
    x = random(2, 11, 6)
    patches = x[:, 5:]
    summary = x[:, 0] if has_cls else patches.mean(1)
    features = torch.cat([patches, summary[:, None].expand(-1, 6, -1)], -1).transpose(1, 2).reshape(2, 12, 2, 3)
    up = F.interpolate(features, scale_factor=4, mode="bilinear", align_corners=False)
    logits = F.conv2d(up, head.linear.weight[:, :, None, None], head.linear.bias)
    out = head(x, (9, 13))
    torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=1e-5)
    depth = torch.einsum("bkhw,k->bhw", logits.softmax(1), head.centres)
    resized = F.interpolate(depth[:, None], size=(9, 13), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(out.depth, resized, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head(x).depth, depth, atol=1e-4, rtol=1e-4)

def test_depth_stays_float32_and_in_range_under_autocast():
    head = DepthHead(6, num_prefix=5, grid=(2, 3))
    with torch.autocast("cpu", torch.bfloat16): out = head(100*random(2, 11, 6), (8, 8))
    assert out.depth.dtype == out.logits.dtype == torch.float32
    assert 0.001 <= out.depth.min() and out.depth.max() <= 10

def test_depth_bins_are_not_in_the_checkpoint_and_follow_the_range():
    head = DepthHead(6, 5, (2, 3))
    assert sorted(head.state_dict()) == ["linear.bias", "linear.weight"]
    width = (10 - .001)/256
    assert head.centres[[0, -1]].tolist() == pytest.approx([.001 + width/2, 10 - width/2], rel=1e-5)

@pytest.mark.parametrize("tokens", [(2, 11, 5), (2, 12, 6), (11, 6), (2, 5, 6)])
@pytest.mark.parametrize("make", [lambda: SegmentationHead(6, 3, 5, (2, 3)), lambda: DepthHead(6, 5, (2, 3))])
def test_heads_refuse_tokens_that_do_not_fit(make, tokens):
    with pytest.raises(RaptorError): make()(torch.zeros(tokens))

@pytest.mark.parametrize("kw", [dict(bins=1), dict(min_depth=-1.), dict(min_depth=2., max_depth=2.)])
def test_depth_head_refuses_senseless_bins(kw):
    with pytest.raises(RaptorError, match="at least 2 bins"): DepthHead(6, 5, (2, 3), **kw)

# ---- losses

def test_cross_entropy_by_hand_ignores():
    logits = torch.tensor([[math.log(3.), 0.], [0., 0.], [5., -5.]])
    labels = torch.tensor([0, 1, 255])
    assert masked_cross_entropy(logits, labels).item() == pytest.approx((math.log(4/3) + math.log(2))/2)

def test_all_ignored_gives_zero_loss_and_zero_gradient():
    logits = random(1, 3, 4, 4).requires_grad_()
    loss = masked_cross_entropy(logits, torch.full((1, 4, 4), 255, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))

def test_imagenet_class_255_counts():
    loss = probe_task("classification").loss(torch.zeros(1, 1000), torch.tensor([255]))
    assert loss.item() == pytest.approx(math.log(1000))

def test_scale_invariant_loss_by_hand():
    p, g = torch.tensor([[[1., 2., 3.]]]), torch.tensor([[[2., 2., 0.]]])
    d = math.log(1.001) - math.log(2.001)  # the second pixel is right, the third not measured
    assert scale_invariant_loss(p, g).item() == pytest.approx(10*(d**2/2 - .85*(d/2)**2), rel=1e-5)

def test_depth_loss_has_finite_gradients_where_nothing_is_measured():
    head = DepthHead(6, 5, (2, 3), bins=8)
    for target in (torch.zeros(1, 8, 12), torch.tensor(3.).where(random(1, 8, 12) > 0, 0.)):
        head.zero_grad()
        depth_loss(head(random(1, 11, 6), (8, 12)), target).backward()
        assert torch.isfinite(head.linear.weight.grad).all()
        if not target.any(): assert head.linear.weight.grad.abs().max() == 0

def test_invalid_pixels_belong_to_no_bin():
    centres = DepthHead(6, 5, (2, 3)).centres
    bins = bin_target(torch.tensor([[[0., -1., .001, 10., 12., 5.0005]]]), centres, (1, 6))
    assert bins[0, 0, :5].tolist() == [-100, -100, 0, 255, 255] and bins[0, 0, 5] in (127, 128)

@pytest.mark.parametrize("width,sampled", [(2, [1, 4]), (3, [1, 3, 5]), (4, [0, 2, 3, 5]), (6, [0, 1, 2, 3, 4, 5])])
def test_bins_are_those_of_the_pixels_under_the_centres(width, sampled):
    "Six pixels of depths 0.5, 1.5, ...: position i of `width` takes pixel floor((i + 1/2) 6/width)."
    depths, centres = torch.arange(6.).view(1, 1, 6) + .5, torch.arange(6.) + .5
    assert bin_target(depths, centres, (1, width))[0, 0].tolist() == sampled

def test_a_depth_head_can_be_fitted():
    torch.manual_seed(0)
    head, x = DepthHead(6, 5, (2, 3), bins=32), random(1, 11, 6)
    target = torch.linspace(1, 8, 6).view(1, 2, 3).repeat_interleave(4, 1).repeat_interleave(4, 2)
    optimiser = torch.optim.Adam(head.parameters(), 5e-2)
    for _ in range(150):
        optimiser.zero_grad()
        depth_loss(head(x, (8, 12)), target).backward()
        optimiser.step()
    assert depth_rmse(head(x, (8, 12)).depth, target) < 1.0 < depth_rmse(torch.full_like(target, 4.5), target)

@pytest.mark.parametrize("match,call", [
    ("out_size", lambda: masked_cross_entropy(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 4).long())),
    ("label 3", lambda: masked_cross_entropy(torch.zeros(1, 3), torch.tensor([3]))),
    ("label -1", lambda: masked_cross_entropy(torch.zeros(1, 3), torch.tensor([-1]))),
    ("out_size", lambda: scale_invariant_loss(torch.ones(1, 2, 2), torch.ones(1, 4, 4)))])
def test_losses_refuse_what_does_not_fit(match, call):
    with pytest.raises(RaptorError, match=match): call()

# ---- several processes

def shared_losses():
    "Losses of a batch of four whose halves hold 3 and 20 valid pixels: (loss(prediction, target), prediction, target)."
    depth, logits = 1 + random(4, 3, 4).abs(), random(4, 5, 3, 4)
    keep = torch.arange(48).view(4, 3, 4)
    keep = (keep < 3) | (keep >= 28)
    metres = torch.where(keep, depth + random(4, 3, 4, seed=1).abs(), 0.)
    return {"cross-entropy": (masked_cross_entropy, logits, torch.where(keep, torch.arange(48).view(4, 3, 4) % 5, 255)),
            "scale-invariant": (lambda p, t: scale_invariant_loss(p.abs(), t), depth, metres)}

class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.3))
    def forward(self, loss, prediction, target): return loss(self.scale*prediction, target)

def half_of_a_batch(rank, folder):
    "One of two processes: its loss and the gradient that DistributedDataParallel gives it."
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name, (loss, *batch) in shared_losses().items():
        model = torch.nn.parallel.DistributedDataParallel(Scaled())
        value = model(loss, *(x[2*rank:2*rank + 2] for x in batch))
        value.backward()
        found[name] = value.item(), model.module.scale.grad.item()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()

def test_two_processes_have_the_masked_losses_and_gradients_of_one(tmp_path):
    "Numerators and denominators are summed over processes; a mean of two means would be something else."
    torch.multiprocessing.spawn(half_of_a_batch, (tmp_path,), nprocs=2)
    halves = [torch.load(tmp_path/f"{rank}.pt") for rank in (0, 1)]
    for name, (loss, *batch) in shared_losses().items():
        model = Scaled()
        value = model(loss, *batch)
        value.backward()
        for half in halves: assert half[name] == pytest.approx((value.item(), model.scale.grad.item()), rel=1e-5)
        mean = sum(model(loss, *(x[i:i + 2] for x in batch)).item() for i in (0, 2))/2
        assert mean != pytest.approx(value.item(), rel=1e-2)

def test_one_process_sums_over_itself():
    x = random(3)
    assert over_processes(x) is x

# ---- tasks

@pytest.mark.parametrize("name,metric,higher", [
    ("classification", "top1", True), ("segmentation", "miou", True), ("depth", "rmse", False)])
def test_task_directions(name, metric, higher):
    task = probe_task(name)
    assert (task.metric_name, task.higher_is_better) == (metric, higher)

@pytest.mark.parametrize("has_cls,num_prefix", [(True, 5), (True, 1), (False, 0)])
def test_every_task_learns_on_every_kind_of_backbone(has_cls, num_prefix):
    b = backbone(has_cls=has_cls, num_prefix=num_prefix)
    tokens = random(3, num_prefix + 6, 6)
    masks = torch.arange(18).view(3, 2, 3).remainder(4).repeat_interleave(4, 1).repeat_interleave(4, 2)
    targets = dict(classification=torch.tensor([0, 1, 2]), segmentation=masks, depth=1. + masks)
    for name, target in targets.items():
        torch.manual_seed(0)
        task, losses = probe_task(name), []
        head = task.make_head(b, 4)
        optimiser = torch.optim.Adam(head.parameters(), 3e-2)
        for _ in range(20):
            loss = task.loss(head(tokens, task.out_size(target)), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < .9*losses[0]
        assert math.isfinite(task.meter(4).update(head(tokens, task.out_size(target)), target).compute())
