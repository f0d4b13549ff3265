"Heads, losses and tasks: known values, agreement with plain formulas, and what bad input says."
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file

from raptor.core import RaptorError
from raptor.probes.heads import (
    ClassificationHead, DepthHead, SegmentationHead, bin_target, depth_loss, masked_cross_entropy, probe_task,
    over_processes, scale_invariant_loss
)
from raptor.probes.metrics import depth_rmse
from raptor.probes.train import ProbeConfig, load_head, save_head, train_probe
from raptor.study.specs import HeadSettings

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

# ---- the hidden layer of the depth head

def test_a_head_without_hidden_is_the_linear_head_as_before():
    "Its parameters, their order and their draws are those of one nn.Linear; a None in the settings says the same."
    for settings in ({}, {"hidden": None}):
        torch.manual_seed(3)
        head = DepthHead(6, 5, (2, 3), bins=8, **settings)
        torch.manual_seed(3)
        linear = torch.nn.Linear(12, 8)
        assert [n for n, _ in head.named_parameters()] == list(head.state_dict()) == ["linear.weight", "linear.bias"]
        assert torch.equal(head.linear.weight, linear.weight) and torch.equal(head.linear.bias, linear.bias)

@pytest.mark.parametrize("has_cls", [True, False])
def test_a_head_with_hidden_is_two_layers_at_each_patch_and_then_upsampled(has_cls):
    torch.manual_seed(0)
    head, x = DepthHead(6, 5, (2, 3), bins=4, has_cls=has_cls, hidden=3), random(2, 11, 6)
    w1, b1, w2, b2 = random(3, 12, seed=1), random(3, seed=2), random(4, 3, seed=3), random(4, seed=4)
    head.load_state_dict({"hidden.weight": w1, "hidden.bias": b1, "linear.weight": w2, "linear.bias": b2})
    patches = x[:, 5:]
    z = torch.cat([patches, (x[:, 0] if has_cls else patches.mean(1))[:, None].expand(-1, 6, -1)], -1) @ w1.T + b1
    logits = (z*(1 + torch.erf(z/math.sqrt(2)))/2 @ w2.T + b2).transpose(1, 2).reshape(2, 4, 2, 3)
    up = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
    out = head(x, (9, 13))
    torch.testing.assert_close(out.logits, up, atol=1e-5, rtol=1e-5)
    depth = torch.einsum("bkhw,k->bhw", up.softmax(1), head.centres)
    torch.testing.assert_close(head(x).depth, depth, atol=1e-4, rtol=1e-4)
    assert out.depth.shape == (2, 9, 13)

def test_both_layers_start_after_the_same_rule():
    "That of nn.Linear: uniform within one over the root of the number of inputs, weights and biases."
    torch.manual_seed(0)
    head = DepthHead(32, 1, (2, 2), bins=64, hidden=256)
    for layer, inputs in ((head.hidden, 64), (head.linear, 256)):
        assert layer.weight.shape[1] == inputs and layer.weight.abs().max() <= inputs**-.5
        assert layer.weight.std().item() == pytest.approx(inputs**-.5/math.sqrt(3), rel=.03)
        assert 0 < layer.bias.abs().max() <= inputs**-.5

class Distances:
    "Tokens whose depth is a distance, in metres; a model that passes them through is probed for it."
    name, eval_crop, num_classes, fingerprint = "distances", None, None, "distances"
    def __len__(self): return 64
    def get_batch(self, indices):
        indices = torch.as_tensor(indices)
        x = random(64, 5, 1)[indices]
        return {"image": x, "target": 1 + 2*x[:, 1:, 0].abs().view(-1, 2, 2), "index": indices}

class PassThrough(torch.nn.Module):
    dim, num_prefix, has_cls, grid, num_tokens, name, fingerprint = 1, 1, True, (2, 2), 5, "pass", "pass"
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    def features(self, images): return images

def test_a_probe_with_a_hidden_layer_is_trained_on_images_and_on_a_table_of_features():
    "Both give the same head, and it learns distances that a linear head does not."
    config, found = ProbeConfig(epochs=20, batch_size=16, lr=.02, warmup=2, log_every=40, augment=False), []
    for gigabytes in (2., 1e-9):
        torch.manual_seed(0)
        head, result, _ = train_probe(PassThrough(), "depth", Distances(), Distances(),
                                      replace(config, table_gb=gigabytes), settings={"bins": 16, "hidden": 8})
        found.append((result["last"], head.hidden.weight))
    assert found[0][0] == pytest.approx(found[1][0]) and torch.equal(found[0][1], found[1][1])
    torch.manual_seed(0)
    linear = train_probe(PassThrough(), "depth", Distances(), Distances(), config, settings={"bins": 16})[1]
    assert found[0][0] < .8*linear["last"]

@pytest.mark.parametrize("hidden", [0, -1])
def test_depth_head_refuses_a_hidden_layer_without_units(hidden):
    with pytest.raises(RaptorError, match=f"width {hidden}; use at least 1"): DepthHead(6, 5, (2, 3), hidden=hidden)

@pytest.mark.parametrize("settings,fine", [
    ({}, True), ({"hidden": 1}, True), ({"bins": 8, "hidden": 256}, True), ({"hidden": 10**5}, True),
    *(({"hidden": value}, False) for value in (0, -1, 10**6, None, True, "64", 1.5, [64])), ({"hiden": 8}, False)])
def test_what_a_preset_may_say_of_hidden(settings, fine):
    if fine: assert TypeAdapter(HeadSettings).validate_python(settings, strict=True) == settings
    else:
        with pytest.raises(ValidationError): TypeAdapter(HeadSettings).validate_python(settings, strict=True)

@pytest.mark.parametrize("hidden", [{}, {"hidden": 5}])
def test_heads_on_disk_keep_their_hidden_layer(tmp_path, hidden):
    path, settings, model = tmp_path/"h.safetensors", {"bins": 4, **hidden}, backbone(name="b")
    torch.manual_seed(0)
    head, x = probe_task("depth").make_head(model, None, **settings), random(2, 11, 6)
    save_head(head, path, settings)
    again = load_head(model, "depth", path)
    assert torch.equal(again(x).logits, head(x).logits) and list(again.state_dict()) == list(head.state_dict())
    assert len(load_file(path)) == (4 if hidden else 2)

@pytest.mark.parametrize("made,said", [(5, 6), (5, None), (5, 10**13), (5, "5"), (5, 5.0), (None, 5), (1, True)])
def test_a_file_whose_settings_name_another_hidden_width_is_refused(tmp_path, made, said):
    path, model = tmp_path/"h.safetensors", backbone(name="b")
    save_head(DepthHead(6, 5, (2, 3), bins=4, hidden=made), path, {"bins": 4, "hidden": said})
    with pytest.raises(RaptorError, match="damaged.*run the step") as e: load_head(model, "depth", path)
    assert len(str(e.value)) < 300 + len(str(path)) and "\n" not in str(e.value)

@pytest.mark.parametrize("change", [
    lambda t: t.update({"hidden.weight": torch.tensor(1.)}), lambda t: t.update({"hidden.weight": torch.ones(5, 7)}),
    lambda t: t.update({"hidden.bias": torch.ones(9)}), lambda t: t.update({"linear.weight": torch.ones(4, 12)}),
    lambda t: t.pop("hidden.weight"), lambda t: t.pop("hidden.bias")])
def test_a_hidden_layer_with_other_tensors_is_refused(tmp_path, change):
    path = tmp_path/"h.safetensors"
    tensors = DepthHead(6, 5, (2, 3), bins=4, hidden=5).state_dict()
    change(tensors)
    save_file(tensors, path, {"settings": '{"bins": 4, "hidden": 5}'}) # as earlier versions wrote them
    with pytest.raises(RaptorError): load_head(backbone(name="b"), "depth", path)

@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_the_other_heads_have_no_hidden_layer(tmp_path, task):
    model, path = backbone(name="b"), tmp_path/"h.safetensors"
    save_head(probe_task(task).make_head(model, 4), path, {"hidden": 4})
    with pytest.raises(RaptorError, match="damaged"): load_head(model, task, path)
    with pytest.raises(TypeError): probe_task(task).make_head(model, 4, hidden=4)

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
