"""The recurrent block, the Raptor, its place as a backbone, and what its files are checked for."""
import json
import math
import os
import struct
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from raptor.core import RaptorError
from raptor.model import hub
from raptor.model.as_backbone import RaptorBackbone
from raptor.model.block import BlockConfig, RecurrentBlock, block_flops, load_block, save_block
from raptor.model.layer import attend, flop_matched_hidden
from raptor.model.raptor import Raptor
from raptor.model.tensors import fill, read_note, weights_digest, write_tensors
from raptor.phases import FragmentedPhases, Phases
from raptor.teacher import stored
from raptor.teacher.stored import NOTE
from raptor.teacher.backbone import Backbone


def awake(module):
    "Random weights everywhere, so that no part of the computation is near the identity."
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters(): p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype)*0.3)
    return module


def by_hand(block, x, t):
    "One step in numpy, written from the equations, one image and one head at a time."
    w = {n: p.detach().double().numpy() for n, p in block.named_parameters()}
    x, D, H = x.double().numpy().copy(), block.config.dim, block.config.num_heads
    d = D//H
    def norm(v, n):
        c = v - v.mean(-1, keepdims=True)
        return c/np.sqrt((c**2).mean(-1, keepdims=True) + 1e-5)*w[f"{n}.weight"] + w[f"{n}.bias"]
    sigmoid = lambda v: 1/(1 + np.exp(-v))
    a = b = c = np.ones(D)
    if "scaling" in block.config.conditioning:
        h = w["scaling.fc1.weight"][:, 0]*t + w["scaling.fc1.bias"]
        scales = 1 + w["scaling.fc2.weight"] @ (h*sigmoid(h)) + w["scaling.fc2.bias"]
        a, b, c = scales[:D], scales[D:2*D], scales[2*D:]
    for image in range(len(x)):
        y = norm(x[image], "norm1") @ w["qkv.weight"].T + w["qkv.bias"]
        out = np.zeros_like(x[image])
        for head in range(H):
            q, k, v = (y[:, i*D + head*d:i*D + (head + 1)*d] for i in range(3))
            e = np.exp(q @ k.T/np.sqrt(d))
            out[:, head*d:(head + 1)*d] = e/e.sum(1, keepdims=True) @ v
        x[image] += a*w["gamma1"]*(out @ w["proj.weight"].T + w["proj.bias"])
        u = norm(x[image], "norm2") @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        if block.config.mlp == "swiglu":
            u, value = np.split(u, 2, axis=1)
            u = u*sigmoid(u)*value
        else: u = u*0.5*(1 + np.vectorize(math.erf)(u/np.sqrt(2)))
        x[image] += b*w["gamma2"]*(u @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"])
    return torch.from_numpy(c*x)


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize("conditioning", [("scaling",), ()])
def test_block_equals_the_equations(mlp, conditioning):
    block = awake(RecurrentBlock(12, 3, mlp, hidden=20, conditioning=conditioning).double())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    for t in (1, 7.): torch.testing.assert_close(block(x, t), by_hand(block, x, t), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("tokens,dim,heads", [(1, 4, 1), (7, 12, 3), (41, 64, 4)])
def test_attention_equals_torch_multihead(tokens, dim, heads):
    block = awake(RecurrentBlock(dim, heads).double())
    reference = nn.MultiheadAttention(dim, heads, batch_first=True).double()
    reference.load_state_dict({
        "in_proj_weight": block.qkv.weight, "in_proj_bias": block.qkv.bias,
        "out_proj.weight": block.proj.weight, "out_proj.bias": block.proj.bias})
    x = torch.randn(3, tokens, dim, dtype=torch.float64)
    torch.testing.assert_close(block.attention(x), reference(x, x, x, need_weights=False)[0], atol=1e-12, rtol=1e-12)


def test_bfloat16_attention_agrees_with_float32():
    q, k, v = torch.randn(3, 2, 4, 41, 16)
    low = attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).float()
    torch.testing.assert_close(low, attend(q, k, v), atol=0.03, rtol=0.03)


def test_depth_may_be_a_number_or_one_for_each_state():
    block = awake(RecurrentBlock(8, 2))
    x = torch.randn(3, 5, 8)
    each = block(x, torch.tensor([2, 9, 4]))
    for i, t in enumerate((2., 9, torch.tensor(4))): torch.testing.assert_close(each[i:i + 1], block(x[i:i + 1], t))
    assert (block(x, 2) - block(x, 9)).abs().max() > 1e-3
    with pytest.raises(RaptorError, match="2 depths were given for 3 states"): block(x, torch.tensor([1, 2]))


def test_new_block_starts_near_the_identity():
    torch.manual_seed(0)
    block, x = RecurrentBlock(16, 2), torch.randn(2, 6, 16)
    torch.testing.assert_close(RecurrentBlock(16, 2, conditioning=())(x, 12), x, atol=1e-4, rtol=0.)
    torch.testing.assert_close(block(x, 12), x, atol=1e-4, rtol=0.02)
    assert block.scaling.fc2.weight.std().item() == pytest.approx(1e-4, rel=0.2)
    assert torch.equal(block.gamma1, torch.full((16,), 1e-5))


def test_depth_scaling_keeps_its_precision_under_autocast():
    block, x = awake(RecurrentBlock(8, 2, layer_scale=0.)), torch.randn(1, 3, 8)
    with torch.no_grad():
        for gamma in (block.gamma1, block.gamma2): gamma.zero_()
    with torch.autocast("cpu", dtype=torch.bfloat16): low = block(x, 11)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, block(x, 11), atol=1e-6, rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 3), st.integers(0, 4), st.integers(1, 3), st.booleans())
def test_rollouts_compose_and_teacher_forcing_is_single_steps(start, length, batch, scaled):
    block = awake(RecurrentBlock(8, 2, conditioning=("scaling",) if scaled else ()).double())
    x = torch.randn(batch, 3, 8, dtype=torch.float64)
    whole = block.rollout(x, start, start + length)
    assert torch.equal(whole[:, 0], x) and whole.shape[1] == length + 1
    torch.testing.assert_close(whole[:, -1], block.advance(x, start, start + length))
    if length:
        torch.testing.assert_close(block.rollout(whole[:, 1], start + 1, start + length), whole[:, 1:])
        torch.testing.assert_close(block.predict_next(whole, start), whole[:, 1:]) # its own trajectory is a fixed point


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.data())
def test_teacher_forcing_of_any_partition_equals_its_steps(labels, data):
    names = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    phases = FragmentedPhases(tuple(names[label] for label in labels))
    torch.manual_seed(0)
    raptor = Raptor([RecurrentBlock(8, 2, layer_scale=0.5).double() for _ in range(phases.k)], phases)
    start = data.draw(st.integers(0, len(labels) - 1))
    end = data.draw(st.integers(start + 1, len(labels)))
    states = torch.randn(2, end - start + 1, 3, 8, dtype=torch.float64)
    steps = [raptor.step(states[:, i], start + i + 1) for i in range(end - start)]
    torch.testing.assert_close(raptor.predict_next(states, start), torch.stack(steps, 1))
    last = raptor.rollout(states[:, 0], start, end)[:, -1]
    torch.testing.assert_close(raptor.advance(states[:, 0], start, end), last)


def test_gradient_reaches_every_weight():
    raptor = awake(Raptor.create(Phases((1, 3)), 8, 2))
    raptor(torch.randn(2, 4, 8)).square().sum().backward()
    # the key bias shifts all logits of a query alike, so softmax cancels it; everything else must move
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in raptor.parameters())


def test_same_seed_same_weights():
    a, b = ((torch.manual_seed(3), Raptor.create(Phases((2, 4)), 8, 2))[1] for _ in range(2))
    assert weights_digest(a) == weights_digest(b)


def test_weights_are_drawn_in_the_order_of_the_parts():
    torch.manual_seed(3)
    block = RecurrentBlock(8, 2)
    torch.manual_seed(3)
    shapes = {"qkv": (8, 24), "proj": (8, 8), "mlp.fc1": (8, 64), "mlp.fc2": (32, 8), "scaling.fc1": (1, 16)}
    drawn = {name: nn.Linear(*shape).weight for name, shape in list(shapes.items())[:2]}
    nn.init.xavier_uniform_(drawn["qkv"])
    drawn |= {name: nn.Linear(*shape).weight for name, shape in list(shapes.items())[2:]}
    for name, weight in drawn.items(): assert torch.equal(block.get_submodule(name).weight, weight), name


@pytest.mark.parametrize("dim,std,bound", [(192, 0.05103, 0.08839), (288, 0.04167, 0.07217)]) # of U(-b, b), b = (6/4D)^.5
def test_attention_starts_as_torch_multihead(dim, std, bound):
    torch.manual_seed(0)
    block, reference = RecurrentBlock(dim, 3), nn.MultiheadAttention(dim, 3)
    for weight in (block.qkv.weight, reference.in_proj_weight):
        assert float(weight.detach().std()) == pytest.approx(std, rel=5e-3)
        assert float(weight.detach().abs().max()) == pytest.approx(bound, rel=1e-3)
    assert float(block.proj.weight.detach().std()) == pytest.approx((3*dim)**-0.5, rel=0.01) # as nn.Linear starts
    for layer in (block.qkv, block.proj): assert not layer.bias.any()


@pytest.mark.parametrize("mlp,hidden,layers", [
    ("swiglu", None, 16), ("gelu", None, 12), ("swiglu", flop_matched_hidden(24), 12)])
def test_counts_of_weights_and_flops(mlp, hidden, layers):
    block = RecurrentBlock(24, 3, mlp, hidden, conditioning=())
    assert sum(p.numel() for p in block.parameters() if p.ndim == 2) == layers*24**2
    x = torch.randn(1, 10, 24)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH): block(x, 1)
    assert block_flops(block.config, 10) == counter.get_total_flops() == 2*10*layers*24**2 + 4*10**2*24


def test_flops_of_depth_scaling():
    block = RecurrentBlock(24, 3)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH): block(torch.randn(1, 10, 24), 1)
    assert block_flops(block.config, 10) == counter.get_total_flops()


def test_flops_of_a_raptor_sum_over_layers():
    raptor = Raptor([RecurrentBlock(8, 2, hidden=8), RecurrentBlock(8, 2, hidden=16)], Phases((1, 4)))
    narrow, wide = (block_flops(BlockConfig(8, 2, hidden=hidden), 5) for hidden in (8, 16))
    assert raptor.flops(5) == narrow + 3*wide


@pytest.mark.parametrize("arguments,sentence", [
    (dict(num_heads=3), "not a multiple"), (dict(dim=0), "dim is '0'"), (dict(num_heads=True), "num_heads is 'True'"),
    (dict(dim=10**9), "1..65536"), (dict(mlp="swish"), "unknown mlp"), (dict(hidden=0), "hidden is '0'"),
    (dict(layer_scale=float("nan")), "finite"), (dict(qk_norm=1), "true or false")])
def test_impossible_blocks_are_refused(arguments, sentence):
    with pytest.raises(RaptorError, match=sentence): RecurrentBlock(**{"dim": 8, "num_heads": 2, **arguments})


def test_impossible_raptors_are_refused():
    block = RecurrentBlock(8, 2)
    for blocks, ends, sentence in (
        ([block], (1, 2), "1 blocks were given for 2"), ([block, block], (1, 2), "given twice"),
        ([block, RecurrentBlock(16, 2)], (1, 2), r"widths \[8, 16\]"), ([block], (2000,), "at most 1024")):
        with pytest.raises(RaptorError, match=sentence): Raptor(blocks, Phases(ends))
    raptor = Raptor([block], Phases((3,)))
    x = torch.zeros(1, 2, 8)
    for call in (
        lambda: raptor.step(x, 0), lambda: raptor.step(x, 4), lambda: raptor.rollout(x, 2, 1),
        lambda: raptor.rollout(x, 0, 4), lambda: raptor.predict_next(x.expand(1, 4, 2, 8), 1)):
        with pytest.raises(RaptorError, match="cannot go from state"): call()
    with pytest.raises(RaptorError, match="hold no pair"): raptor.predict_next(x[:, None])
    with pytest.raises(RaptorError, match=r"must be \(B, N, 8\)"): raptor(torch.zeros(1, 2, 9))


# --- in the place of a backbone ----------------------------------------------------------------------------------

class Teacher(nn.Module):
    "Six tokens (cls, one register, 2 x 2 patches) of width 8; the embedding reads the image."
    depth, dim, num_heads, num_prefix, num_registers, has_cls, grid, img_size = 4, 8, 2, 2, 1, True, (2, 2), (4, 4)
    mean, std, name, fingerprint = (0.5,)*3, (0.5,)*3, "teacher", "f00d"
    def embed(self, images): return images.flatten(1)[:, :48].reshape(-1, 6, 8)
    def norm(self, state): return state + 1
    def cls(self, state): return state[:, 0]
    def patches(self, state): return state[:, 2:]


@pytest.fixture
def student():
    torch.manual_seed(1)
    return RaptorBackbone(Teacher(), Raptor.create(Phases((1, 4)), 8, 2, layer_scale=0.5)).eval()


def test_student_answers_as_its_teacher_does(student):
    images = torch.randn(2, 3, 4, 4)
    states = student.raptor.rollout(student.embed(images))
    torch.testing.assert_close(student.trajectory(images), states)
    torch.testing.assert_close(student.trajectory(images, 1, 3), states[:, 1:4])
    torch.testing.assert_close(torch.stack(list(student.states(states[:, 1], 1, 3)), 1), states[:, 2:4])
    torch.testing.assert_close(student.features(images), states[:, 4] + 1)
    torch.testing.assert_close(student(images), student.forward_features(images))
    assert torch.equal(student.cls(states[:, 4]), states[:, 4, 0])
    assert torch.equal(student.patches(states[:, 4]), states[:, 4, 2:])
    assert (student.depth, student.dim, student.num_prefix, student.grid, student.mean) == (4, 8, 2, (2, 2), (.5,)*3)
    assert (student.num_features, student.embed_dim, student.num_prefix_tokens) == (8, 8, 2)


def test_intermediates_follow_timm(student):
    images = torch.randn(2, 3, 4, 4)
    states = student.trajectory(images)
    final, maps = student.forward_intermediates(images, indices=2)
    assert len(maps) == 2
    torch.testing.assert_close(maps[0][1, :, 1, 0], states[1, 3, 2 + 2]) # row 1, column 0 is the third patch
    torch.testing.assert_close(final, states[:, 4] + 1)
    [(patches, prefix)] = student.forward_intermediates(
        images, [-1], return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(torch.cat([prefix, patches], 1), states[:, 4] + 1)
    for bad in ([4], 5, 0, [-5], [], "all", "3", [1.5], 2.0, ["0"], [None], [[0]]):
        with pytest.raises(RaptorError, match="indices"): student.forward_intermediates(images, bad)


@pytest.mark.parametrize("indices", [[2, 0], [0, 2], [-2, 0, 2]])
@pytest.mark.parametrize("early,last", [(True, 3), (False, 4)])
def test_intermediates_are_sorted_and_the_final_state_is_the_last_unless_stopped(student, indices, early, last):
    images = torch.randn(2, 3, 4, 4)
    states = student.trajectory(images)
    final, maps = student.forward_intermediates(images, indices, stop_early=early, output_fmt="NLC")
    torch.testing.assert_close(torch.stack(maps, 1), states[:, [1, 3], 2:])
    torch.testing.assert_close(final, states[:, last] + 1)


def test_intermediates_agree_with_a_timm_model():
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=32, num_classes=0, depth=3, embed_dim=8, num_heads=2, reg_tokens=1)
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    class Wrapped(nn.Module):
        depth, dim, num_prefix, grid, name, fingerprint = 3, 8, 2, (2, 2), "tiny", "0"
        def embed(self, images): return model.norm_pre(model._pos_embed(model.patch_embed(images)))
        def norm(self, state): return model.norm(state)
    class Layers(Raptor): # a Raptor whose steps are the teacher's own layers
        def step(self, x, t, stride=1): return model.blocks[t - 1](x)
    student = RaptorBackbone(Wrapped(), Layers([RecurrentBlock(8, 2)], Phases((3,))))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(student.forward_features(images), model.forward_features(images))
    for arguments in (
        dict(indices=[2, 0]), dict(indices=2, norm=True, output_fmt="NLC"), dict(return_prefix_tokens=True),
        dict(indices=[0, -1], intermediates_only=True), dict(indices=[1], stop_early=True), dict(indices=[1])):
        ours, theirs = (m.forward_intermediates(images, **arguments) for m in (student, model))
        torch.testing.assert_close(ours, theirs)


def test_fingerprint_of_a_student_follows_its_weights(student):
    before = student.fingerprint
    assert student.fingerprint == before
    with torch.no_grad(): student.raptor.blocks[1].gamma2[3] += 1e-3
    assert student.fingerprint != before


def test_a_student_of_a_real_backbone_has_what_the_backbone_has():
    backbone = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False)
    student = RaptorBackbone(backbone, Raptor.create(Phases((2, 6)), backbone.dim, backbone.num_heads))
    for name in "depth dim num_heads num_prefix num_registers num_tokens has_cls grid img_size mean std".split():
        assert getattr(student, name) == getattr(backbone, name)
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        for block in student.raptor.blocks: # they do nothing
            for weight in (block.gamma1, block.gamma2, *block.scaling.fc2.parameters()): weight.zero_()
        torch.testing.assert_close(student.features(images), backbone.norm(backbone.embed(images)))
        assert torch.equal(student.trajectory(images)[:, 0], backbone.embed(images))
    assert not any(p.requires_grad for p in student.backbone.parameters())
    assert all(p.requires_grad for p in student.raptor.parameters())


def test_a_student_of_another_teacher_is_refused():
    for ends, dim, sentence in (((5,), 8, "depth 5 .* depth 4"), ((4,), 16, "dim 16 .* dim 8")):
        with pytest.raises(RaptorError, match=sentence): RaptorBackbone(Teacher(), Raptor.create(Phases(ends), dim, 2))


def backbone_like(name="vit_nano_patch4_reg4_24", seed=0, **settings):
    torch.manual_seed(seed)
    return Backbone.create(name, pretrained=False, **settings)

def raptor_of(backbone):
    torch.manual_seed(1)
    raptor = Raptor.create(Phases((2, backbone.depth)), backbone.dim, backbone.num_heads)
    raptor.teacher = backbone.identity()
    return raptor

NANO = dict(depth=6, embed_dim=32, num_heads=2)
@pytest.mark.parametrize("other, sentence", [
    (dict(seed=1), "trained on vit_nano_patch4_reg4_24 with fingerprint .* strict=False"), # other random weights
    (dict(name="vit_tiny_patch16_224", img_size=48, **NANO), "the backbone vit_tiny_patch16_224 has"),
    (dict(mean=0.157), r"images of mean \[0.5, 0.5, 0.5\]"), (dict(std=0.29), "images of std"),
    (dict(seed=1, img_size=32), "fingerprint"), (dict(act_layer="relu"), "fingerprint")])
def test_a_raptor_that_knows_its_teacher_refuses_another(other, sentence):
    raptor, backbone = raptor_of(backbone_like()), backbone_like(**other)
    with pytest.raises(RaptorError, match=sentence) as e: RaptorBackbone(backbone, raptor)
    assert "\n" not in str(e.value) and "Backbone.create('vit_nano_patch4_reg4_24'" in str(e.value)
    assert RaptorBackbone(backbone, raptor, strict=False).backbone is backbone
    raptor.teacher = None # an imported Raptor does not know
    assert RaptorBackbone(backbone, raptor).backbone is backbone


def test_a_raptor_follows_its_teacher_to_another_image_size(tmp_path):
    backbone = backbone_like()
    larger = Backbone.create(backbone.name, weights=backbone.save(tmp_path/"w.safetensors"), img_size=(32, 48))
    assert RaptorBackbone(larger, raptor_of(backbone)).grid == (8, 12)
    with torch.no_grad(): larger.model.blocks[5].mlp.fc2.bias[0] += 1e-3
    with pytest.raises(RaptorError, match="fingerprint"): RaptorBackbone(larger, raptor_of(backbone))


def test_what_is_no_backbone_and_no_raptor():
    timm = pytest.importorskip("timm")
    backbone = backbone_like()
    for module, sentence in (
        (timm.create_model("vit_nano_patch4_reg4_24"), r"EmbeddedTeacher .* Backbone\(model\)"),
        (raptor_of(backbone), "the backbone is a Raptor"), (nn.Linear(2, 2), "the backbone is a Linear")):
        with pytest.raises(RaptorError, match=sentence): RaptorBackbone(module, raptor_of(backbone))
    with pytest.raises(RaptorError, match="the Raptor is a Backbone"): RaptorBackbone(backbone, backbone)


def published(tmp_path, kind):
    "A teacher as it is after training, what a reader of its card has of it, and the lines' stand-ins for his paths."
    if kind == "embedded": # trained here: its weights are a file, its normalisation that of its images
        teacher = backbone_like(mean=0.157, std=0.29)
        with torch.no_grad(): awake(teacher.model)
        path = teacher.save(tmp_path/"teacher.safetensors")
        return Backbone.create(teacher.name, weights=path), {"path/to/the/weights/of/the/teacher.safetensors": str(path)}
    folder = tmp_path/"hub" # in the layout of a hub, with settings of its own
    folder.mkdir()
    model = backbone_like("vit_tiny_patch16_224", num_classes=0, **NANO).model
    save_file(model.state_dict(), folder/"model.safetensors")
    config = dict(num_classes=0, input_size=[3, 224, 224], mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    (folder/"config.json").write_text(json.dumps(
        dict(architecture="vit_tiny_patch16_224", num_classes=0, pretrained_cfg=config)))
    return Backbone.create(f"local-dir:{folder}", img_size=(32, 48), **NANO), {}

@pytest.mark.parametrize("kind", ["embedded", "hub"])
def test_the_lines_of_the_card_give_the_student_back(tmp_path, kind):
    teacher, paths = published(tmp_path, kind)
    raptor = Raptor.create(Phases((2, 6)), teacher.dim, teacher.num_heads, layer_scale=0.5)
    folder = raptor.save_pretrained(tmp_path/"model", backbone=teacher)
    card = (folder/"README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0]
    for line, path in {"path/to/this/folder": str(folder), **paths}.items():
        assert line in lines
        lines = lines.replace(line, path)
    found = {"images": torch.randn(2, 3, *teacher.img_size)}
    exec(lines, found)
    with torch.no_grad(): expected = teacher.norm(raptor(teacher.embed(found["images"])))
    assert torch.equal(found["features"], expected)
    assert (found["model"].mean, found["model"].std) == (teacher.mean, teacher.std)
    assert f"| fingerprint | {teacher.fingerprint} |" in card and found["raptor"].teacher == teacher.identity()


# --- on disk -----------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(2)
    raptor = awake(Raptor.create(Phases((1, 3)), 8, 2))
    return raptor, raptor.save_pretrained(tmp_path/"model", {"backbone": "teacher", "seed": 7}, {"top-1": 0.5})


@pytest.mark.parametrize("phases,arguments", [
    (Phases((1, 3)), {}), (FragmentedPhases((0, 1, 0)), dict(mlp="gelu", conditioning=())),
    (Phases((2,)), dict(hidden=flop_matched_hidden(8)))])
def test_saved_and_read_back_bit_for_bit(tmp_path, phases, arguments):
    raptor = awake(Raptor.create(phases, 8, 2, **arguments))
    raptor.save_pretrained(tmp_path)
    again = Raptor.from_pretrained(str(tmp_path))
    assert again.phases == phases and again.config == raptor.config
    assert weights_digest(again) == weights_digest(raptor) == read_note(tmp_path/"model.safetensors")["digest"]
    assert all(p.requires_grad for p in again.parameters())
    again.save_pretrained(tmp_path) # over the file that it was read from
    x = torch.randn(1, 3, 8)
    assert torch.equal(Raptor.from_pretrained(tmp_path).rollout(x), raptor.rollout(x))


def test_saving_twice_gives_the_same_bytes(saved, tmp_path):
    raptor, folder = saved
    raptor.save_pretrained(tmp_path/"other", {"backbone": "teacher", "seed": 7}, {"top-1": 0.5})
    for path in folder.iterdir(): assert path.read_bytes() == (tmp_path/"other"/path.name).read_bytes()


def test_low_precision_survives(tmp_path):
    raptor = Raptor.create(Phases((2,)), 8, 2).bfloat16()
    raptor.save_pretrained(tmp_path)
    assert {p.dtype for p in Raptor.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}


def test_card_says_what_is_known_and_what_is_not(saved):
    raptor, folder = saved
    lines = (folder/"README.md").read_text().splitlines()
    weights = sum(p.numel() for p in raptor.blocks[0].parameters())
    assert lines[0] == "---" and "| top-1 | 0.5 |" in lines and "| seed | 7 |" in lines
    assert f"| 2 | 2, 3 | 2 | swiglu, 32 wide | {weights:,} |" in lines
    raptor.save_pretrained(folder)
    text = (folder/"README.md").read_text()
    assert "## Results\n\nnot run" in text and "## Run\n\nnot recorded" in text


def test_an_interrupted_save_leaves_the_old_files(saved, monkeypatch):
    raptor, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    def breaks(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(stored, "save_file", breaks)
    with pytest.raises(OSError): awake(Raptor.create(Phases((3,)), 8, 2)).save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def edit_config(folder, **changes):
    path = folder/"config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


TEACHER = dict(name="vit_nano_patch4_reg4_24", timm={}, source="file", img_size=[24, 24], mean=[.2]*3, std=[.3]*3,
               fingerprint="0123456789abcdef", blocks="0123456789abcdef")

@pytest.mark.parametrize("changes", [
    dict(fingerprint="x"), dict(fingerprint=3), dict(name="x"*999), dict(name=None), dict(source="../../x"), dict(mean=[1]),
    dict(std=["1"]*3), dict(std=[float("nan")]*3), dict(img_size=[24.5, 24]), dict(img_size=[10**9, 1]), dict(timm=[]),
    dict(evil=1), dict(blocks=...)])
def test_a_false_teacher_is_refused_in_one_sentence(saved, changes):
    teacher = {k: v for k, v in {**TEACHER, **changes}.items() if v is not ...}
    edit_config(saved[1], teacher=teacher)
    with pytest.raises(RaptorError, match="config.json describes its teacher wrongly") as e:
        Raptor.from_pretrained(saved[1])
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_a_teacher_of_another_folder_is_noticed(saved):
    edit_config(saved[1], teacher=TEACHER)
    with pytest.raises(RaptorError, match="another config.json"): Raptor.from_pretrained(saved[1])


BLOCK = json.loads(json.dumps(asdict(BlockConfig(8, 2))))
def second(**changes): return dict(blocks=[BLOCK, {**BLOCK, **changes}])

@pytest.mark.parametrize("changes,sentence", [
    (dict(format=...), "must have the keys"), (dict(weights="../../etc/passwd"), "must have the keys"),
    (dict(format=2), "this version reads 1"), (dict(format=[0]*999), "has format"),
    (dict(phases=[1, 3]), "'ends' or 'assignment'"), (dict(phases={}), "'ends' or 'assignment'"),
    (dict(phases={"ends": [1, 3], "x": 1}), "'ends' or 'assignment'"),
    (dict(phases={"ends": [1, 10**9]}), "integers in 0..1024"),
    (dict(phases={"ends": list(range(1, 3000))}), "integers in"), (dict(phases={"ends": [1, 2.5]}), "integers in"),
    (dict(phases={"ends": [3, 1]}), "config.json: .*increasing"), (dict(phases={"ends": [3]}), "one block for each of its 1"),
    (dict(phases={"assignment": [0, 2, 2]}), "every block"), (dict(blocks=[BLOCK]), "one block for each"),
    (second(dim=10**9), "dim is '1000000000'"), (second(hidden=10**12), "hidden is"), (second(path="../x"), "'path'"),
    (dict(blocks=[BLOCK, {k: v for k, v in BLOCK.items() if k != "mlp"}]), "'mlp'"),
    (dict(blocks=[BLOCK, "..."]), "not by its sizes; copy"), (second(mlp="../../x"), "unknown mlp"),
    (second(mlp=["x"]), "unknown mlp"), (second(dim="8"), "dim is '8'"),
    (second(hidden=16), "where the configuration needs"),
    (dict(blocks=[{**BLOCK, "dim": 65536}]*2), "where the configuration needs"),
    (second(conditioning=()), "where the configuration needs nothing"),
    (dict(phases={"assignment": [0, 1, 0]}), "another config.json"),
    (dict(phases={"ends": [2, 3]}), "another config.json")])
def test_a_false_configuration_is_refused_in_one_sentence(saved, changes, sentence):
    edit_config(saved[1], **changes)
    with pytest.raises(RaptorError, match=sentence) as e: Raptor.from_pretrained(saved[1])
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


@pytest.mark.parametrize("content,sentence", [
    ("{", "not valid JSON"), ("[" * 200_000, "config.json"), ("[]", "must have the keys"),
    (" " * (2**20 + 1), "at most 1,048,576"), ("\xff", "config.json")])
def test_a_configuration_that_is_no_json_is_refused(saved, content, sentence):
    (saved[1]/"config.json").write_bytes(content.encode("latin1"))
    with pytest.raises(RaptorError, match=sentence): Raptor.from_pretrained(saved[1])


def header(raw): return json.loads(raw[8:8 + struct.unpack("<Q", raw[:8])[0]])
def with_header(raw, change):
    "The same file with another header."
    values = header(raw)
    change(values)
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + struct.unpack("<Q", raw[:8])[0]:]

def lie(name, **entry):
    def change(values): values[name].update(entry)
    return change

GAMMA = "blocks.0.gamma1"
@pytest.mark.parametrize("damage,sentence", [
    *((lambda raw, n=n: raw[:n], "is damaged") for n in (-1, 100, 4, 0)),
    (lambda raw: raw + b"\0", "is damaged"), (lambda raw: b"\x80\x02]q\0." + raw, "is damaged"),
    (lambda raw: struct.pack("<Q", 2**62) + raw[8:], "is damaged"),
    (lambda raw: with_header(raw, lie(GAMMA, shape=[10**9])), "is damaged"),
    (lambda raw: with_header(raw, lie(GAMMA, shape=[2**63])), "is damaged"),
    (lambda raw: with_header(raw, lie(GAMMA, shape=[4, 2])), r"shape \(4, 2\) for"),
    (lambda raw: with_header(raw, lie(GAMMA, dtype="I32")), "as I32"),
    (lambda raw: with_header(raw, lie(GAMMA, dtype="F64")), "is damaged"),
    (lambda raw: with_header(raw, lie(GAMMA, data_offsets=[0, 2**40])), "is damaged"),
    (lambda raw: with_header(raw, lambda h: h.update({"blocks.9.x": h.pop(GAMMA)})), f"hold nothing for {GAMMA}"),
    (lambda raw: with_header(raw, lambda h: h.pop("__metadata__")), "no note"),
    (lambda raw: with_header(raw, lambda h: h["__metadata__"].update(raptor="{")), "no note"),
    (lambda raw: with_header(raw, lambda h: h["__metadata__"].update(raptor="[" * 100_000)), "no note")])
def test_damaged_weights_are_refused_in_one_sentence(saved, damage, sentence):
    path = saved[1]/"model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RaptorError, match=sentence) as e: Raptor.from_pretrained(saved[1])
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved[1]/name).unlink()
    with pytest.raises(RaptorError, match=f"has no {name} .* so it is no saved Raptor"):
        Raptor.from_pretrained(saved[1])


@pytest.mark.parametrize("make, sentence", [
    (lambda p: p.mkdir(), "has no config.json .it has nothing."), (lambda p: p.write_text("{}"), "is a file; give the folder"),
    (lambda p: (p/"blocks").mkdir(parents=True), "has no config.json .it has blocks."),
    (lambda p: (p.mkdir(), os.mkfifo(p/"config.json")), "config.json is not a regular file"),
    (lambda p: (p/"config.json").mkdir(parents=True), "config.json is not (readable|a regular file)"),
    (lambda p: (p.mkdir(), (p/"config.json").symlink_to("/dev/zero")), "config.json is not a regular file")])
def test_a_wrong_folder_is_called_what_it_is(tmp_path, make, sentence):
    make(tmp_path/"given")
    with pytest.raises(RaptorError, match=sentence): Raptor.from_pretrained(tmp_path/"given")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_byte_gives_the_same_weights_or_a_sentence(tmp_path_factory, position, flip):
    folder = tmp_path_factory.mktemp("flip")
    raptor = Raptor.create(Phases((1,)), 4, 1, hidden=4)
    path = raptor.save_pretrained(folder)/"model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] ^= flip
    path.write_bytes(raw)
    try: again = Raptor.from_pretrained(folder)
    except RaptorError as e: assert "\n" not in str(e)
    else: assert weights_digest(again) == weights_digest(raptor) and again.config == raptor.config


def test_files_of_earlier_versions_have_no_digest(saved):
    raptor, folder = saved
    path = folder/"model.safetensors"
    note = read_note(path)
    for digest, readable in ((note.pop("digest"), True), ("0"*16, False)):
        save_file(load_file(path), path, {NOTE: json.dumps(note if readable else {**note, "digest": digest})})
        if readable: assert weights_digest(Raptor.from_pretrained(folder)) == weights_digest(raptor)
        else:
            with pytest.raises(RaptorError, match="differ from the digest"): Raptor.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(saved, value, tmp_path):
    raptor, folder = saved
    path = folder/"model.safetensors"
    state, note = load_file(path), {k: v for k, v in read_note(path).items() if k != "digest"}
    state["blocks.1.mlp.fc2.weight"][3, 4] = value
    save_file(state, path, {NOTE: json.dumps(note)}) # as another program would write it
    with pytest.raises(RaptorError, match=r"model.safetensors is damaged \(its tensor blocks.1.mlp.fc2.weight is not"):
        Raptor.from_pretrained(folder)
    with torch.no_grad(): raptor.blocks[0].gamma1[2] = value
    for write in (lambda: raptor.save_pretrained(tmp_path/"r"),
                  lambda: save_block(tmp_path/"b.safetensors", raptor.blocks[0], (0, 1))):
        with pytest.raises(RaptorError, match="gamma1 is not finite"): write()
    assert not list(tmp_path.rglob("[rb]*.safetensors"))


def tie(raptor): raptor.blocks[1].qkv.weight = raptor.blocks[0].qkv.weight; return raptor
def share(raptor): raptor.blocks[1].qkv.weight.data = raptor.blocks[0].qkv.weight.data; return raptor

@pytest.mark.parametrize("how", [tie, share])
def test_blocks_that_share_a_weight_are_refused_or_stored_one_by_one(how, tmp_path):
    raptor = how(awake(Raptor.create(Phases((1, 3)), 8, 2)))
    with pytest.raises(RaptorError, match="blocks 1 and 2 share the weight qkv.weight"): Raptor(raptor.blocks, Phases((1, 3)))
    again = Raptor.from_pretrained(raptor.save_pretrained(tmp_path))
    assert weights_digest(again) == weights_digest(raptor) and again.check_blocks() is None


def test_one_weight_under_two_names_of_a_block_is_stored_twice(tmp_path):
    block = awake(RecurrentBlock(8, 2))
    block.norm2.weight = block.norm1.weight
    again, _ = load_block(save_block(tmp_path/"b.safetensors", block, (0, 2)))
    assert torch.equal(again.norm2.weight, block.norm1.weight)


def learned(span=None, trajectories=None):
    block = RecurrentBlock(8, 2)
    block.span, block.trained_on = span, trajectories
    return block

@pytest.mark.parametrize("blocks,sentence", [
    ([learned((0, 2)), learned((2, 3))], None), ([learned(), learned((2, 3), "a")], None),
    ([learned(None, "a"), learned(None, "a")], None),
    ([learned((2, 3)), learned((0, 2))], r"phase \(0, 2\) learned the states of \(2, 3\)"),
    ([learned((0, 1)), learned()], r"learned the states of \(0, 1\)"),
    ([learned(None, "b"), learned(None, "a")], r"different trajectories \(a, b\)")])
def test_blocks_are_put_together_as_they_were_trained(blocks, sentence, tmp_path):
    if sentence:
        with pytest.raises(RaptorError, match=sentence): Raptor(blocks, Phases((2, 3)))
        return
    raptor = Raptor(blocks, Phases((2, 3)))
    again = Raptor.from_pretrained(raptor.save_pretrained(tmp_path))
    assert again.trained_on == raptor.trained_on == next((b.trained_on for b in blocks if b.trained_on), None)
    save_block(tmp_path/"b.safetensors", blocks[1], (2, 3))
    block, span = load_block(tmp_path/"b.safetensors")
    assert (block.trained_on, block.span, span) == (blocks[1].trained_on, (2, 3), (2, 3))


@pytest.mark.parametrize("change", [
    lambda w: w.neg_(), lambda w: w.add_(1e-8), lambda w: w.copy_(w.flip(0)), lambda w: w.mul_(0)])
def test_the_digest_follows_every_value(change):
    torch.manual_seed(0)
    linear = nn.Linear(2, 1)
    before = weights_digest(linear)
    with torch.no_grad(): change(linear.weight.view(-1))
    assert weights_digest(linear) != before


# --- a hub -------------------------------------------------------------------------------------------------------

def test_a_repository_is_fetched_file_by_file(saved, monkeypatch):
    asked = []
    def fetch(repo, name, **how):
        asked.append((repo, name, how))
        return str(saved[1]/name)
    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    assert Raptor.from_pretrained("someone/some-raptor", revision="v1", token="t").config == saved[0].config
    how = {"revision": "v1", "token": "t"}
    assert asked == [("someone/some-raptor", name, how) for name in ("config.json", "model.safetensors")]


def fails(*_, **__): raise ConnectionError("no route\nto host")

def test_a_hub_out_of_reach_is_one_sentence(saved, monkeypatch):
    monkeypatch.setattr(hub, "hf_hub_download", fails)
    monkeypatch.setattr(HfApi, "create_repo", fails)
    for call, sentence in ((lambda: Raptor.from_pretrained("some/raptor"), "could not be fetched"),
        (lambda: saved[0].push_to_hub("some/raptor"), "could not be uploaded to some/raptor"),
        (lambda: saved[0].push_to_hub("no/such/name"), "could not be uploaded to no/such/name")):
        with pytest.raises(RaptorError, match=sentence) as e: call()
        assert "\n" not in str(e.value)


def test_a_push_uploads_what_a_save_writes(saved, monkeypatch):
    raptor, folder = saved
    uploads = []
    def create(self, repo_id, **how):
        uploads.append(how)
        return type("Url", (), {"repo_id": f"someone/{repo_id}"})
    def upload(self, *, repo_id, folder_path, **how):
        uploads.append((repo_id, {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}, how))
        return "the commit"
    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    record, metrics = {"backbone": "teacher", "seed": 7}, {"top-1": 0.5} # those of `saved`
    assert raptor.push_to_hub("mine", record, metrics, private=True, branch="b") == "the commit"
    (created, (repo, files, how)) = uploads
    assert created["private"] and repo == "someone/mine" and how["revision"] == "b"
    assert files == {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("where", [
    "/no/such/folder", "./nowhere", "../nowhere", "nowhere", "a/b/c", "tests/nowhere", "~/nowhere-at-all"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_a_hub(where, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(RaptorError, match="does not exist"): Raptor.from_pretrained(where)


def test_blocks_are_kept_with_their_span(tmp_path):
    blocks = [awake(RecurrentBlock(8, 2, mlp)) for mlp in ("swiglu", "gelu")]
    paths = [save_block(tmp_path/f"{span[0]}.safetensors", b, span) for b, span in zip(blocks, ((0, 2), (2, 3)))]
    raptor = Raptor.from_blocks(reversed(paths))
    assert raptor.phases == Phases((2, 3)) and [b.config.mlp for b in raptor.blocks] == ["swiglu", "gelu"]
    x = torch.randn(1, 4, 8)
    assert torch.equal(raptor(x), blocks[1](blocks[0].advance(x, 0, 2), 3))
    assert Raptor.from_blocks([(blocks[0], (0, 2))]).depth == 2
    for spans in ([(0, 2), (3, 4)], [(0, 2), (1, 3)], [(1, 2)], []):
        with pytest.raises(RaptorError, match="do not close up"): Raptor.from_blocks(list(zip(blocks, spans)))


@pytest.mark.parametrize("span", [[3, 3], [-1, 2], [0], "01", [0, 10**9], [0, 1.5], None])
def test_a_block_with_a_false_span_is_refused(tmp_path, span):
    block = RecurrentBlock(8, 2)
    path = write_tensors(tmp_path/"b.safetensors", block, {"block": BLOCK, "span": span})
    with pytest.raises(RaptorError, match="span"): load_block(path)


def test_a_foreign_file_is_no_block(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path/"w.safetensors")
    with pytest.raises(RaptorError, match="no note"): load_block(tmp_path/"w.safetensors")
    raptor = Raptor.create(Phases((1,)), 8, 2)
    raptor.save_pretrained(tmp_path)
    with pytest.raises(RaptorError, match="not those of one block"): load_block(tmp_path/"model.safetensors")


def test_weights_of_another_shape_are_not_filled_in(tmp_path):
    path = write_tensors(tmp_path/"w.safetensors", nn.Linear(2, 3), {})
    with pytest.raises(RaptorError, match=r"hold shape \(3,\) for bias, where the configuration needs shape \(4,\)"):
        fill(nn.Linear(2, 4), path)
