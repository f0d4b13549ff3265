"""Blocks that know their depth, start from the teacher's layers, and take fewer steps than it has layers."""
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from raptor.core import RaptorError
from raptor.model.as_backbone import RaptorBackbone
from raptor.model.block import MAX_DEPTH, BlockConfig, RecurrentBlock, block_config, load_block, save_block
from raptor.model.conditioning import Experts, LowRank, Step, Steps
from raptor.model.deploy import early_exit, materialize, settled, sure
from raptor.model.layer import average, layer_shape, layer_weights, low_rank_factors
from raptor.model.raptor import Raptor, block_steps
from raptor.model.recurrence import cut_stops, even, walk
from raptor.phases import FragmentedPhases, Phases, cut_weight
from raptor.probes.train import fidelity
from raptor.teacher.backbone import Backbone
from raptor.train.stages import SpanObjective, TrainConfig, train_raptor

UNIT = tuple((t, t + 1) for t in range(4))
ALL = dict(conditioning=("scaling", "vectors", "low_rank", "experts"), rank=2, experts=3, router="hat", steps=UNIT)


def awake(module, scale=0.3):
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters(): p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * scale)
    return module


def block_of(**settings): return awake(RecurrentBlock(8, 2, "gelu", 16, **settings))


# Teachers whose layers can be copied: name and further arguments, small but of the real kinds
TEACHERS = {
    "dinov2-reg": ("vit_small_patch14_reg4_dinov2", dict(img_size=28)),
    "dinov2-g": ("vit_giant_patch14_reg4_dinov2", dict(img_size=28, embed_dim=64, num_heads=4, mlp_ratio=4)), # SwiGLU
    "deit3": ("deit3_small_patch16_224", dict(img_size=32)),
    "clip": ("vit_base_patch32_clip_224", dict(img_size=64, embed_dim=64, num_heads=4)),
    "clip-openai": ("vit_base_patch32_clip_quickgelu_224", dict(img_size=64, embed_dim=64, num_heads=4)),
    "siglip": ("vit_base_patch16_siglip_224", dict(img_size=32, embed_dim=64, num_heads=4)),
    "qk-norm": ("vit_tiny_patch16_224", dict(img_size=32, qk_norm=True)),
    "no-bias": ("vit_tiny_patch16_224", dict(img_size=32, qkv_bias=False)),
}

@pytest.fixture(scope="module", params=TEACHERS)
def teacher(request):
    name, more = TEACHERS[request.param]
    torch.manual_seed(0)
    backbone = Backbone.create(name, pretrained=False, depth=4, **more)
    with torch.no_grad():
        for p in backbone.model.blocks.parameters(): p.add_(torch.randn_like(p) * 0.02)
    return backbone


def images_for(backbone): return torch.randn(2, 3, *backbone.img_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("start", ["mean", "middle", 2])
def test_at_full_rank_the_raptor_is_the_teacher(teacher, start):
    raptor = Raptor.from_teacher(teacher, Phases((2, 4)), start=start, rank=teacher.dim) if start != 2 else Raptor(
        [RecurrentBlock.from_layers(teacher, (0, 4), start=2, rank=teacher.dim)], Phases((4,)))
    with torch.no_grad():
        true = teacher.trajectory(images_for(teacher))
        torch.testing.assert_close(raptor.rollout(true[:, 0]), true, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("conditioning", [(), ("vectors",), ("low_rank",), ("vectors", "low_rank"), ("experts",), ("experts", "vectors", "low_rank")])
@pytest.mark.parametrize("stops", [None, (1, 2, 4)])
def test_a_materialized_raptor_is_a_timm_model_with_the_same_features(teacher, conditioning, stops):
    raptor = Raptor.from_teacher(teacher, Phases((2, 4)), stops=stops, conditioning=conditioning, rank=3, experts=2, expert_attention=True).eval()
    awake(raptor, 0.05)
    plain, images = materialize(teacher, raptor), images_for(teacher)
    assert len(plain.blocks) == len(stops or UNIT) and type(plain) is type(teacher.model)
    with torch.no_grad():
        ours = teacher.norm(raptor(teacher.embed(images)))
        theirs = teacher.norm(plain.forward_features(images)) if isinstance(plain.norm, nn.Identity) else plain.forward_features(images)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


def test_the_weights_of_a_materialized_raptor_load_in_timm():
    teacher = Backbone.create("deit3_small_patch16_224", pretrained=False, depth=4, img_size=32)
    raptor = Raptor.from_teacher(teacher, Phases((2, 4)), stops=(1, 2, 4), rank=2)
    plain = materialize(teacher, raptor)
    again = timm.create_model("deit3_small_patch16_224", depth=3, img_size=32).eval()
    again.load_state_dict(plain.state_dict())
    x = images_for(teacher)
    with torch.no_grad(): assert torch.equal(again.forward_features(x), plain.forward_features(x))
    assert not any(p is q for p in plain.parameters() for q in raptor.parameters())


@pytest.mark.parametrize("name, more, said", [
    ("eva02_tiny_patch14_224", {}, "cannot be copied"),
    ("vit_small_patch16_18x2_224", {}, "cannot be copied"), # parallel branches
    ("vit_tiny_patch16_224", dict(norm_layer=timm.layers.RmsNorm), "cannot be copied"),
    ("vit_tiny_patch16_224", dict(act_layer="relu"), "Mlp with ReLU")])
def test_layers_that_cannot_be_copied_are_refused(name, more, said):
    model = timm.create_model(name, depth=1, **more)
    with pytest.raises(RaptorError, match=said): layer_shape(model.blocks, name)


def test_the_weights_of_a_layer_by_our_names():
    layer = timm.create_model("vit_tiny_patch16_224", depth=1, qkv_bias=False, init_values=0.5).blocks[0]
    weights = layer_weights(layer)
    block = RecurrentBlock(192, 3, "gelu", conditioning=())
    assert set(weights) == {name for name, _ in block.named_parameters()}
    assert weights["qkv.weight"].equal(layer.attn.qkv.weight) and not weights["qkv.bias"].any()
    assert weights["gamma1"].equal(torch.full((192,), 0.5))


def test_a_step_over_several_layers_adds_their_updates_up():
    a, b = ({"gamma1": torch.ones(2) * g, "gamma2": torch.ones(2), "qkv.weight": torch.ones(6, 2) * w} for g, w in ((1., 2.), (3., 4.)))
    mean = average([a, b])
    assert mean["gamma1"].tolist() == [4., 4.] and mean["gamma2"].tolist() == [2., 2.] and mean["qkv.weight"].unique().item() == 3


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_low_rank_factors_are_the_best_of_their_rank(rank):
    matrix = torch.randn(5, 3, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    up, down = low_rank_factors(matrix, rank)
    lost = torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt() # Eckart-Young
    assert torch.linalg.matrix_norm(matrix - up @ down).item() == pytest.approx(lost.item(), abs=1e-12)


def test_one_expert_is_the_block_itself():
    torch.manual_seed(0)
    plain = RecurrentBlock(8, 2, "gelu", 16, conditioning=())
    one = RecurrentBlock(8, 2, "gelu", 16, conditioning=("experts",), experts=1, steps=UNIT)
    one.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 5, 8)
    for t in (1, 4): torch.testing.assert_close(one(x, t), plain(x, t), atol=1e-7, rtol=0)


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_a_one_hot_router_is_one_of_the_experts(chosen):
    block = block_of(conditioning=("experts",), experts=3, steps=UNIT)
    experts = block.changes["experts"]
    with torch.no_grad():
        for p in experts.router.fc2.parameters(): p.zero_()
        experts.router.fc2.bias[chosen] = 1000.
    plain, own = block_of(conditioning=()), dict(block.own_weights())
    if chosen: own |= {name: getattr(experts, name.replace(".", "_"))[chosen - 1] for name in experts.names}
    plain.load_state_dict(own)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(block(x, 2), plain(x, 2), atol=1e-6, rtol=1e-6)


def test_positions_are_shares_of_the_span():
    steps = Steps([(t, t + 1) for t in range(12)])
    assert [12 * steps.position(Step(t - 1, t))[0] for t in range(1, 13)] == pytest.approx(range(1, 13))
    assert steps.position(Step(4, 6)) == (0.5, pytest.approx(1/6)) # experts need no row of their own


def test_a_hat_router_interpolates_between_its_knots():
    experts = Experts({"mlp.fc1.weight": (3, 2), "mlp.fc1.bias": (3,)}, [(0, 1), (1, 2), (2, 4)], 3, "hat")
    gates = experts.logits().softmax(-1)
    torch.testing.assert_close(gates, torch.tensor([[.5, .5, 0], [0, 1, 0], [0, 0, 1]]), atol=1e-5, rtol=0)
    soft = Experts({"mlp.fc1.weight": (3, 2), "mlp.fc1.bias": (3,)}, [(0, 1), (1, 4)], 4)
    assert soft.logits().softmax(-1).unique().tolist() == [0.25] # as published


def test_every_parameter_receives_a_gradient():
    block = block_of(**ALL)
    block.predict_next(torch.randn(2, 5, 5, 8)).square().mean().backward()
    assert [name for name, p in block.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_teacher_forcing_takes_each_step_with_its_own_weights():
    block, states = block_of(**ALL), torch.randn(2, 5, 5, 8)
    expected = torch.stack([block(states[:, t], t + 1) for t in range(4)], 1)
    torch.testing.assert_close(block.predict_next(states), expected)


@pytest.mark.parametrize("change", [
    lambda b: b.qkv.weight.data.add_(1.), # leaves no trace in the version
    lambda b: b.changes["low_rank"].qkv_weight_up.mul_(2.),
    lambda b: b.load_state_dict({k: v + 0.1 for k, v in b.state_dict().items()}),
    lambda b: b.half().float()])
@torch.no_grad()
def test_merged_weights_follow_a_changed_parameter(change):
    block, x = block_of(**ALL).eval(), torch.randn(1, 5, 8)
    first = block(x, 2)
    assert block.merged(Step(1, 2)) is block.merged(Step(1, 2)) # kept
    change(block)
    block.eval() # a fused optimiser or `.data` changes a weight without a trace
    fresh = RecurrentBlock(**asdict(block.config))
    fresh.load_state_dict(block.state_dict())
    assert torch.equal(block(x, 2), fresh(x, 2)) and not torch.equal(block(x, 2), first)


def test_merged_weights_are_not_kept_where_gradients_flow():
    block = block_of(**ALL).eval()
    with torch.no_grad(): block(torch.randn(1, 5, 8), 1)
    block(torch.randn(1, 5, 8), 1).sum().backward()
    assert block.changes["low_rank"].qkv_weight_up.grad[0].any()


def test_weights_are_merged_in_full_precision_under_autocast():
    block = block_of(**ALL).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(): low = block.merged(Step(0, 1))["qkv.weight"]
    assert low.dtype == torch.float32
    block.eval()
    with torch.no_grad(): assert torch.equal(low, block.merged(Step(0, 1))["qkv.weight"])


def test_a_conditioned_block_is_saved_with_all_its_settings(tmp_path):
    block = block_of(**ALL)
    again, span = load_block(save_block(tmp_path/"block.safetensors", block, (0, 4)))
    assert span == (0, 4) and again.config == block.config
    x = torch.randn(1, 5, 8)
    assert torch.equal(again(x, 3), block(x, 3))


@pytest.mark.parametrize("changes, said", [
    (dict(conditioning=["low_rnk"]), "did you mean 'low_rank'"), (dict(conditioning=["vectors"]), "needs the steps"),
    (dict(steps=[[0, 0]]), "no pair"), (dict(steps=[[0, 1], [0, 1]]), "must differ"), (dict(steps=[[0, 1.0]]), "no pair"),
    (dict(steps=[[0, 1, 2]]), "no pair"), (dict(steps=[[0, MAX_DEPTH + 1]]), "no pair"), (dict(steps=[[-1, 1]]), "no pair"),
    (dict(experts=0), "experts is '0'"), (dict(experts=10**6), "must be an integer in 1..64"), (dict(rank=0), "rank is '0'"),
    (dict(rank={"qkv.weight": 10**9}), "must be an integer"), (dict(router="hard"), "unknown router"), (dict(eps="x"), "eps is 'x'"),
    (dict(qk_norm=1), "true or false"), (dict(expert_attention="yes"), "true or false"), (dict(steps=7), "steps"),
    (dict(conditioning=None), "conditioning"), (dict(conditioning=["scaling", "scaling"]), "names scaling twice")])
def test_a_false_setting_is_refused_in_one_sentence(changes, said):
    values = json.loads(json.dumps(asdict(BlockConfig(8, 2)))) | changes
    with pytest.raises(RaptorError, match=said): block_config(values, "config.json")


@pytest.mark.parametrize("conditioning", [("vectors", "low_rank"), ("experts", "vectors", "low_rank")])
def test_vectors_and_low_rank_correct_what_the_experts_leave(conditioning):
    teacher = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False)
    raptor = Raptor.from_teacher(teacher, Phases((2, 6)), conditioning=conditioning, rank=teacher.dim, experts=2, router="hat")
    with torch.no_grad():
        true = teacher.trajectory(images_for(teacher))
        torch.testing.assert_close(raptor.rollout(true[:, 0]), true, atol=2e-5, rtol=1e-4)


def test_a_rank_of_an_unknown_matrix_is_refused():
    with pytest.raises(RaptorError, match="did you mean 'qkv.weight'"): LowRank({"qkv.weight": (24, 8)}, UNIT, {"qkv.weigth": 2})


@pytest.mark.parametrize("rank, said", [({"qkv.weight": 9}, "rank 9 of qkv.weight does not lie in 1..8"), (9, "rank 9 is above that of every matrix; choose it in 1..8")])
def test_a_rank_above_the_matrix_is_refused(rank, said):
    with pytest.raises(RaptorError, match=said): LowRank({"qkv.weight": (24, 8), "proj.weight": (8, 8)}, UNIT, rank)


@pytest.mark.parametrize("conditioning", [("vectors",), ("low_rank",), ("vectors", "experts")])
def test_stops_that_a_block_has_nothing_for_are_refused_before_it_runs(conditioning):
    raptor = Raptor.create(Phases((2, 4)), 8, 2, conditioning=conditioning, rank=2)
    with pytest.raises(RaptorError, match=r"has nothing for \(0, 2\)"): raptor.at((2, 4))


def test_experts_alone_run_at_any_stops():
    assert Raptor.create(Phases((2, 4)), 8, 2, conditioning=("experts",)).at((2, 4)).rollout(torch.zeros(1, 3, 8)).shape[1] == 3


@pytest.mark.parametrize("stops, said", [
    ((2, 2, 4), "increasing"), ((3, 2, 4), "increasing"), ((2, 3), "must close with 4"), ((), "increasing"), ((0, 2, 4), "increasing"),
    ((1, 4), "lack 2, where a phase ends"), ((2, 4, 5), "must close with 4"), ((2.0, 4), "increasing"), ((True, 2, 4), "increasing")])
def test_stops_that_make_no_sense_are_refused(stops, said):
    raptor = Raptor.create(Phases((2, 4)), 8, 2)
    for make in (lambda: Raptor(raptor.blocks, raptor.phases, stops), lambda: raptor.at(stops), lambda: block_steps(raptor.phases, stops)):
        with pytest.raises(RaptorError, match=said): make()


def test_stops_need_contiguous_phases():
    with pytest.raises(RaptorError, match="contiguous"): Raptor.create(FragmentedPhases((0, 1, 0)), 8, 2, stops=(1, 3))


@pytest.mark.parametrize("depth, steps, ends, expected", [
    (12, 12, (), tuple(range(1, 13))), (12, 4, (), (3, 6, 9, 12)), (12, 3, (3, 7, 12), (3, 7, 12)), (12, 5, (3, 7, 12), (3, 5, 7, 9, 12)),
    (7, 2, (), (4, 7)), (1, 1, (), (1,))])
def test_even_stops(depth, steps, ends, expected): assert even(depth, steps, ends) == expected


@pytest.mark.parametrize("args", [((3, 4), 0, 2, None), ((3, 4), 1, 4, None), ((3, 4), 0, None, 3), (None, 3, 2, None), (None, -1, 2, None)])
def test_no_path_leads_past_the_stops(args): assert walk(*args) is None


def test_states_of_a_raptor_with_stops_keep_the_teachers_numbers():
    raptor, x = awake(Raptor.create(Phases((2, 4)), 8, 2, stops=(1, 2, 4))), torch.randn(1, 5, 8)
    assert raptor.path(0) == [(0, 1), (1, 2), (2, 4)] and raptor.num_steps == 3 and raptor.depth == 4
    states = raptor.rollout(x)
    torch.testing.assert_close(states[:, 3], raptor.blocks[1](states[:, 2], 4, 2))
    torch.testing.assert_close(raptor.advance(states[:, 1], 1, 4), states[:, 3])
    torch.testing.assert_close(raptor.predict_next(states), states[:, 1:])
    with pytest.raises(RaptorError, match="of the stops"): raptor.advance(x, 3, 4)
    whole = raptor.at(None)
    assert whole.path(0) == [(t, t + 1) for t in range(4)] and whole.blocks[0] is raptor.blocks[0]
    assert raptor.flops(5) == pytest.approx(whole.flops(5) * 3 / 4)


def test_one_checkpoint_runs_at_every_grid_it_was_made_for():
    teacher = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False)
    L = teacher.depth
    grids = ((2, L), tuple(range(1, L + 1)))
    raptor = Raptor.from_teacher(teacher, Phases((2, L)), grids=grids, rank=2)
    x = torch.randn(1, teacher.num_tokens, teacher.dim)
    for stops in grids: assert raptor.at(stops).rollout(x).shape[1] == len(stops) + 1
    if L > 5:
        with pytest.raises(RaptorError, match="has nothing for"): raptor.at((2, 4, L))(x)


@pytest.mark.parametrize("make, said", [
    (lambda t: RecurrentBlock.from_layers(t, (2, 2)), "is not in 0.."), (lambda t: RecurrentBlock.from_layers(t, (0, 99)), "is not in 0.."),
    (lambda t: RecurrentBlock.from_layers(t, (0, 2), start=3), "start is 3"), (lambda t: RecurrentBlock.from_layers(t, (0, 2), start="avg"), "start is 'avg'"),
    (lambda t: Raptor.from_teacher(t, Phases((2, 5))), "use the phases of this teacher"),
    (lambda t: Raptor.from_teacher(t, Phases((2, t.depth)), rank=0), "rank is '0'")])
def test_a_start_that_makes_no_sense_is_refused(make, said):
    with pytest.raises(RaptorError, match=said): make(Backbone.create("vit_nano_patch4_reg4_24", pretrained=False))


def test_each_image_leaves_when_its_own_state_has_settled():
    teacher = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False)
    images = torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): states = teacher.trajectory(images)
    cosine = torch.cosine_similarity(teacher.cls(states[:, :-1]), teacher.cls(states[:, 1:]), dim=-1)
    threshold = cosine[:, 0].median().item()
    expected = [next((i for i, c in enumerate(row, 1) if c >= threshold), teacher.depth) for row in cosine.tolist()]
    last, steps = early_exit(teacher, images, settled(threshold, teacher))
    assert steps.tolist() == expected and len(set(expected)) > 1
    torch.testing.assert_close(last, states[range(6), expected], atol=1e-5, rtol=1e-5)


def test_a_sure_head_lets_images_leave():
    teacher = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False)
    head = lambda features: torch.stack([100 * (features[:, 0, 0] > 0).float(), torch.zeros(len(features))], -1) # noqa: E731
    images = torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): states = teacher.norm(teacher.trajectory(images))
    _, steps = early_exit(teacher, images, sure(0.9, teacher, head))
    assert steps.tolist() == [next((i for i in range(1, teacher.depth) if s[i, 0, 0] > 0), teacher.depth) for s in states]


def test_a_raptor_with_stops_is_saved_and_read(tmp_path):
    raptor = awake(Raptor.create(Phases((2, 4)), 8, 2, mlp="gelu", stops=(1, 2, 4), conditioning=("vectors", "low_rank"), rank=2))
    again = Raptor.from_pretrained(raptor.save_pretrained(tmp_path/"r"))
    x = torch.randn(1, 5, 8)
    with torch.no_grad(): assert again.stops == (1, 2, 4) and torch.equal(again.rollout(x), raptor.eval().rollout(x))
    for stops in ([1, 4], [1, 2, "4"], 7, [2, 1, 4], [0, 2, 4]):
        config = json.loads((tmp_path/"r/config.json").read_text()) | {"stops": stops}
        (tmp_path/"r/config.json").write_text(json.dumps(config))
        with pytest.raises(RaptorError, match="makes no Raptor"): Raptor.from_pretrained(tmp_path/"r")


def test_intermediates_of_a_raptor_are_those_at_its_stops():
    teacher = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False)
    student = RaptorBackbone(teacher, Raptor.from_teacher(teacher, Phases((2, 6)), stops=(2, 4, 6), rank=2))
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        states = student.trajectory(images)
        outputs = {k: student.forward_intermediates(images, indices=k, output_fmt="NLC", intermediates_only=True) for k in (None, 1, (3,))}
    for indices, wanted in ((None, (1, 2, 3)), (1, (3,)), ((3,), (2,))):
        for found, i in zip(outputs[indices], wanted, strict=True): assert torch.equal(found, states[:, i, student.num_prefix:])
    with pytest.raises(RaptorError, match="does not stop after layer 1"): student.forward_intermediates(images, indices=[0])


class Turning:
    "Trajectories of a rotation by an angle that grows with depth; a stand-in for a teacher of six layers."
    depth, num_prefix, has_cls, fingerprint, num_images = 6, 1, True, "turning", 64

    def batches(self, batch_size, *, start=0, end=None, states=None, seed=None, first_step=0, steps=None, rank=0, world=1,
                device=None, dtype=torch.float32):
        wanted = list(states) if states is not None else list(range(start, (end or self.depth) + 1))
        for step in range(first_step, steps if steps is not None else first_step + 1):
            g = torch.Generator().manual_seed(1000*(seed or 0) + step)
            a, b = torch.randn(2, batch_size, 3, 4, generator=g)
            angles = torch.tensor([0.1*t + 0.02*t*t for t in wanted])[:, None, None]
            turned = [torch.cat([a*c - b*s, a*s + b*c], -1) for c, s in zip(angles.cos(), angles.sin())]
            yield torch.stack(turned, 1)


GRIDS = ((2, 4, 6), (2, 6))


def elastic(seed=0):
    torch.manual_seed(seed)
    settings = dict(mlp="gelu", layer_scale=0.1, conditioning=("vectors", "low_rank"), rank=2)
    return Raptor.create(Phases((2, 6)), 8, 2, grids=(None, *GRIDS), **settings)


def test_every_choice_of_stops_gets_its_share_of_the_steps_and_reads_its_own_states():
    config, raptor = TrainConfig(steps=300, batch_size=2, seed=3), elastic()
    objective = SpanObjective(raptor, 0, config, grids=GRIDS, end=6)
    assert objective.wanted == [0, 1, 2, 3, 4, 5, 6]
    states = torch.arange(7.).reshape(1, 7, 1, 1).expand(2, 7, 3, 8)
    drawn = [objective.draw(states, step) for step in range(300)]
    for view, read in drawn: assert read[0, :, 0, 0].tolist() == [0, *(end for _, end in view.path(0))]
    counts = [sum(view.num_steps == n for view, _ in drawn) for n in (6, 3, 2)]
    assert sum(counts) == 300 and min(counts) > 70, counts # 100 each, by the seed alone
    other = SpanObjective(raptor, 0, replace(config, seed=4), grids=GRIDS, end=6)
    again, others = ([o.draw(states, s)[0].num_steps for s in range(300)] for o in (objective, other))
    assert [view.num_steps for view, _ in drawn] == again != others


@pytest.mark.parametrize("shares,expected", [((1, 1, 1), (100, 100, 100)), ((1, 1, 4), (50, 50, 200)),
                                             ((10**9, 1, 1), (300, 0, 0)), ((2, 1, 1), (150, 75, 75))])
def test_choices_of_stops_are_drawn_as_often_as_their_shares_say(shares, expected):
    config = TrainConfig(steps=300, batch_size=2, seed=3, shares=shares)
    objective, states = SpanObjective(elastic(), 0, config, grids=GRIDS, end=6), torch.zeros(1, 7, 3, 8)
    drawn = [objective.draw(states, step)[0].num_steps for step in range(300)]
    for n, wanted in zip((6, 3, 2), expected):
        assert abs(drawn.count(n) - wanted) <= 3*math.sqrt(wanted*(300 - wanted)/300), (n, drawn.count(n), wanted)
    if len({*shares}) == 1:
        equal = SpanObjective(elastic(), 0, replace(config, shares=()), grids=GRIDS, end=6)
        assert drawn == [equal.draw(states, step)[0].num_steps for step in range(300)]


@pytest.mark.parametrize("shares,grids", [((1, 1), GRIDS), ((1, 1, 1, 1), GRIDS), ((1, 0, 1), GRIDS), ((1, 2), ())])
def test_shares_that_do_not_fit_the_choices_of_stops_are_refused(shares, grids):
    with pytest.raises(RaptorError, match=rf"do not fit {1 + len(grids)} choices of stops; give a whole number"):
        SpanObjective(elastic(), 0, TrainConfig(shares=shares), grids=grids, end=6)


def test_an_elastic_raptor_learns_all_its_stops():
    raptor, config = elastic(), TrainConfig(steps=240, batch_size=32, lr=1e-2, warmup=5, log_every=40)
    before = [fidelity(raptor.at(g), Turning()).compute() for g in (None, *GRIDS)]
    train_raptor(Turning(), raptor, config, grids=GRIDS)
    after = [fidelity(raptor.at(g), Turning()).compute() for g in (None, *GRIDS)]
    assert all(a > 0.8 and a > b for a, b in zip(after, before)), (before, after)


def test_fidelity_of_a_raptor_with_stops_is_that_of_the_states_it_hits():
    raptor = elastic().at((2, 4, 6))
    states = whole = next(Turning().batches(8, seed=1, steps=1))
    class One(Turning):
        def batches(self, *a, states=None, **k): yield whole[:, list(states)]
    with torch.no_grad(): predicted = raptor.rollout(states[:, 0])[:, 1:].double()
    truth = states[:, [2, 4, 6]].double()
    spread = (truth - truth.mean((0, 2), keepdim=True)).square().sum((0, 2, 3))
    expected = 1 - (predicted - truth).square().sum((0, 2, 3)) / spread
    assert fidelity(raptor, One()).per_layer() == pytest.approx(expected.numpy(), abs=1e-5)


def test_the_last_state_alone_can_be_the_target():
    raptor, states = elastic(), next(Turning().batches(4, seed=1, steps=1))
    config = TrainConfig(steps=10, forcing="free", targets="last")
    with torch.no_grad(): loss = SpanObjective(raptor, 0, config)(states, 0)["loss"]
    with torch.no_grad(): expected = (raptor.advance(states[:, 0]) - states[:, 6]).square().mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(RaptorError, match="did you mean 'last'"):
        SpanObjective(raptor, 0, replace(config, targets="lats"))


def test_experts_are_kept_apart_in_training():
    torch.manual_seed(0)
    settings = dict(mlp="gelu", conditioning=("experts",), experts=3, layer_scale=0.1)
    raptor, states = Raptor.create(Phases((6,)), 8, 2, **settings), next(Turning().batches(4, seed=1, steps=1))
    plain = SpanObjective(raptor, 0, TrainConfig(steps=10, expert_weights=(0, 0, 0)))(states, 0)
    whole = SpanObjective(raptor, 0, TrainConfig(steps=10, expert_weights=(1, 2, 3)))(states, 0)
    bank = raptor.blocks[0].changes["experts"].bank(raptor.blocks[0].own_weights()).detach()
    cosines = [float(torch.cosine_similarity(bank[i], bank[j], dim=0))**2 for i, j in ((0, 1), (0, 2), (1, 2))]
    expected = 1*0 + 2*math.log(3)**2 + 3*sum(cosines)/3 # equal gates at the start
    assert float(whole["experts"]) == pytest.approx(expected, rel=1e-5) and float(plain["experts"]) == 0
    assert float(whole["loss"] - plain["loss"]) == pytest.approx(expected, rel=1e-4)


def test_a_block_that_starts_from_zero_is_its_updates_alone():
    torch.manual_seed(0)
    backbone = Backbone.create("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=3, embed_dim=16, num_heads=2)
    block = RecurrentBlock.from_layers(backbone, (0, 3), start="zero", rank=16)
    assert not any(p.count_nonzero() or p.requires_grad for p in block.own_weights().values())
    layer = layer_weights(backbone.model.blocks[1])
    for name, value in block.step_weights(Step(1, 2)).items(): assert torch.allclose(value, layer[name], atol=1e-5), name


@pytest.mark.parametrize("steps,ends,expected", [(2, (), (4, 6)), (3, (2, 6), (2, 4, 6)), (6, (3,), (1, 2, 3, 4, 5, 6))])
def test_stops_at_the_ends_of_a_max_cut_hold_the_ends_of_the_phases(steps, ends, expected):
    layers = np.array([0, 0, 1, 1, 5, 6.])
    distance = np.abs(np.subtract.outer(layers, layers))
    assert cut_stops(distance, steps, ends) == expected
    inside = [c for c in combinations(range(1, 6), steps - 1) if {*ends} <= {*c, 6}]
    assert expected in max((cut_weight(distance, (*c, 6)), (*c, 6)) for c in inside) # by enumeration


ELASTIC_WORKER = """
    import sys, time
    sys.path.insert(0, {tests!r})
    import torch; torch.set_num_threads(1)
    from safetensors.torch import save_file
    from test_beyond import GRIDS, Turning, elastic
    from raptor.train.stages import TrainConfig, train_raptor
    class Slow(Turning):
        def batches(self, *a, **k):
            for b in super().batches(*a, **k): time.sleep(float(sys.argv[2])); yield b
    raptor, config = elastic(), TrainConfig(steps=50, batch_size=4, lr=1e-2, warmup=5, log_every=7, checkpoint_every=10)
    train_raptor(Slow(), raptor, config, sys.argv[1], grids=GRIDS)
    save_file(raptor.state_dict(), sys.argv[1] + "/done.safetensors")
"""


def test_an_elastic_run_that_is_killed_ends_with_the_same_weights(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(ELASTIC_WORKER.format(tests=os.path.dirname(__file__)))]
    for name in ("cut", "whole"): (tmp_path/name).mkdir()
    cut = subprocess.Popen([*command, tmp_path/"cut", "0.1"], stderr=subprocess.DEVNULL)
    while not (tmp_path/"cut"/"checkpoint.safetensors").exists():
        assert cut.poll() is None
        time.sleep(0.02)
    time.sleep(0.25) # into the steps after the checkpoint
    cut.kill()
    assert cut.wait() == -signal.SIGKILL and not (tmp_path/"cut"/"done.safetensors").exists()
    for name in ("cut", "whole"): assert subprocess.run([*command, tmp_path/name, "0"]).returncode == 0
    cut, whole = (load_file(tmp_path/name/"done.safetensors") for name in ("cut", "whole"))
    assert cut.keys() == whole.keys() and all(torch.equal(cut[k], whole[k]) for k in cut)


def test_a_checkpoint_of_other_grids_is_refused(tmp_path):
    config = TrainConfig(steps=4, batch_size=2, warmup=0, checkpoint_every=2)
    class Broken(Turning):
        def batches(self, *a, **k):
            for i, batch in enumerate(super().batches(*a, **k)):
                if i == 3: raise KeyboardInterrupt
                yield batch
    with pytest.raises(KeyboardInterrupt): train_raptor(Broken(), elastic(), config, tmp_path, grids=GRIDS)
    with pytest.raises(RaptorError, match="belongs to another run"):
        train_raptor(Turning(), elastic(), config, tmp_path, grids=GRIDS[:1])


def test_a_raptor_that_was_read_is_in_evaluation_mode(tmp_path):
    raptor = elastic()
    raptor.save_pretrained(tmp_path)
    assert raptor.training and not any(m.training for m in Raptor.from_pretrained(tmp_path).modules())
