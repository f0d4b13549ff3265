"Inside a model: attention maps, sites, lens, neighbours, alignment and patching, each against a value known from elsewhere."
import copy
from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import nn

from raptor import Backbone, LiveTrajectories, Phases, Raptor, RaptorBackbone, load_dataset, seed_everything
from raptor.analysis.alignment import best_matches, compare_models, path_statistics
from raptor.analysis.dynamics import token_kinds
from raptor.analysis.inside import at_sites, attention_maps, attention_shares, check_layers, inside, site_trajectory, update_sizes
from raptor.analysis.layers import compare_layers
from raptor.analysis.patching import patching_effects, run_patched
from raptor.analysis.readout import knn_accuracy, logit_lens, reader
from raptor.core import RaptorError
from raptor.model.recurrence import Recurrence
from raptor.probes.heads import ClassificationHead
from raptor.teacher.face import TimmFace

SHAPE = dict(img_size=24, patch_size=8, embed_dim=32, depth=3, num_heads=2)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

IMAGES = noise(4, 3, 24, 24)

def moved(module):
    "Weights that are far from their small initial values, so that every part has an effect."
    with torch.no_grad():
        for i, (name, p) in enumerate(module.named_parameters()):
            p += noise(*p.shape, seed=i)*(0.2 if p.ndim > 1 else 0.3)
    return module

@cache
def model_of(kind):
    seed_everything(0)
    if kind == "plain": return Backbone(moved(VisionTransformer(**SHAPE, num_classes=5)), kind)
    if kind == "scaled": # LayerScale, normalised queries and keys, registers
        return Backbone(moved(VisionTransformer(**SHAPE, num_classes=5, init_values=0.1, qk_norm=True, reg_tokens=2)), kind)
    if kind == "post": return Backbone(moved(VisionTransformer(**SHAPE, num_classes=5, block_fn=ResPostBlock, init_values=0.1)), kind)
    if kind == "pooled": return Backbone(moved(VisionTransformer(**SHAPE, num_classes=5, global_pool="avg", class_token=False)), kind)
    if kind == "rotary": return Backbone(moved(Eva(**SHAPE, num_classes=5, use_rot_pos_emb=True, init_values=0.1)), kind)
    teacher = model_of("plain")
    if kind == "raptor": raptor = Raptor.from_teacher(teacher, Phases((2, 3)), rank=4)
    if kind == "short": raptor = Raptor.from_teacher(teacher, Phases((2, 3)), stops=(2, 3), rank=4)
    if kind == "depth": raptor = moved(Raptor.create(Phases((1, 3)), 32, 2, layer_scale=0.5, qk_norm=True))
    return RaptorBackbone(teacher, raptor.eval())

TEACHERS, RAPTORS = ["plain", "scaled", "post", "pooled", "rotary"], ["raptor", "short", "depth"]

def steps_of(model): return list(zip((0, *model.stops_at), model.stops_at))

def same(a, b, atol=1e-6): torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


# ---- attention maps

@pytest.mark.parametrize("kind", TEACHERS)
def test_maps_are_those_of_timm(kind):
    "A hook on timm's own dropout, in a copy whose fused attention is off everywhere; the model itself stays as it was."
    model, seen = model_of(kind), []
    timm = copy.deepcopy(model.model)
    for block in timm.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, i, o: seen.append(o))
    before = model.features(IMAGES)
    with torch.no_grad(): timm.forward_features(IMAGES)
    found = attention_maps(model, IMAGES)
    assert list(found) == [1, 2, 3] and len(seen) == 3
    for ours, theirs in zip(found.values(), seen): same(ours, theirs)
    assert all(b.attn.fused_attn for b in model.model.blocks) and torch.equal(model.features(IMAGES), before)
    assert not any(m._forward_hooks for m in model.modules())

def from_qkv(qkv, heads, norms):
    q, k, _ = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = norms[0](q), norms[1](k)
    return torch.einsum("bhnd,bhmd->bhnm", q, k).div(q.shape[-1]**0.5).softmax(-1)

@pytest.mark.parametrize("kind", ["plain", "scaled", "pooled"])
@torch.no_grad()
def test_maps_of_a_teacher_from_its_queries_and_keys(kind):
    model = model_of(kind)
    states = model.trajectory(IMAGES)
    for layer, ours in attention_maps(model, IMAGES).items():
        block = model.model.blocks[layer - 1]
        same(ours, from_qkv(block.attn.qkv(block.norm1(states[:, layer - 1])), 2, (block.attn.q_norm, block.attn.k_norm)))

@pytest.mark.parametrize("kind", RAPTORS)
@torch.no_grad()
def test_maps_of_a_raptor_from_its_queries_and_keys(kind):
    "With the weights that the step has, not those that all steps share."
    model = model_of(kind)
    states, found = model.trajectory(IMAGES), attention_maps(model, IMAGES)
    assert list(found) == model.stops_at
    for i, (start, end) in enumerate(steps_of(model)):
        block = model.get_submodule(model.module_of(end))
        w = block.step_weights((start, end)) if block.changes else block.own_weights()
        x = F.layer_norm(states[:, i], (32,), w["norm1.weight"], w["norm1.bias"], block.config.eps)
        norms = (block.q_norm, block.k_norm) if block.config.qk_norm else (nn.Identity(), nn.Identity())
        same(found[end], from_qkv(F.linear(x, w["qkv.weight"], w["qkv.bias"]), 2, norms))


# ---- what a layer adds

@pytest.mark.parametrize("kind", TEACHERS + RAPTORS)
@torch.no_grad()
def test_the_parts_of_a_layer_add_up(kind):
    model = model_of(kind)
    states, found = model.trajectory(IMAGES), site_trajectory(model, IMAGES, ("attn", "mlp", "scale", "state"))
    assert torch.equal(found["state"], states[:, 1:]), "looking changes nothing"
    added = (states[:, :-1] + found["attn"]) + found["mlp"]
    if kind != "depth": assert torch.equal(added, states[:, 1:]) and not found["scale"].any()
    for i, (start, end) in enumerate(steps_of(model) if kind == "depth" else ()):
        c = model.get_submodule(model.module_of(end)).scaling(torch.tensor([float(end)]))[2]
        same(found["scale"][:, i], (c - 1)*added[:, i], 1e-5)
        assert found["scale"][:, i].abs().max() > 0.1

@pytest.mark.parametrize("kind", ["scaled", "plain"])
@torch.no_grad()
def test_sites_are_taken_behind_the_layer_scale(kind):
    model = model_of(kind)
    states, found = model.trajectory(IMAGES), site_trajectory(model, IMAGES)
    for i, block in enumerate(model.model.blocks):
        x = states[:, i]
        same(found["attn"][:, i], block.ls1(block.attn(block.norm1(x))))
        x = x + found["attn"][:, i]
        same(found["mlp"][:, i], block.ls2(block.mlp(block.norm2(x))))

def test_one_layer_is_held_at_a_time(monkeypatch):
    "What is not asked for is not even looked at, and layers behind the last one are not run."
    model, run = model_of("plain"), []
    monkeypatch.setattr(type(model), "advance", lambda self, s, a, b, f=type(model).advance: run.append(b) or f(self, s, a, b))
    found = inside(model, model.embed(IMAGES), "map", layers=2)
    assert not run
    assert [(layer, set(values)) for layer, values in found] == [(2, {"map"})] and run == [1, 2]

@torch.no_grad()
def test_attention_without_a_preference_goes_by_number():
    "All queries are zero: a kind of token gets its share of the tokens, in every head."
    model = copy.deepcopy(model_of("scaled"))
    for block in model.model.blocks: block.attn.q_norm = nn.LayerNorm(16).requires_grad_(False)
    for block in model.model.blocks: nn.init.zeros_(block.attn.q_norm.weight)
    kinds = token_kinds(3, True, 12)
    found = attention_shares(model, [s[:, None] for s in model.embed(IMAGES).split(3)], kinds, layers=[1, 3])
    assert len(found) == 2*2*9 and found["std"].max() < 1e-6
    assert found.query("source == 'cls'")["count"].eq(4).all() and found.query("source == 'patch'")["count"].eq(36).all()
    for kind, share in (("cls", 1/12), ("register", 2/12), ("patch", 9/12)):
        assert found.query(f"target == '{kind}'").value.values == pytest.approx(share, rel=1e-5)

@pytest.mark.parametrize("kind", ["scaled", "depth"])
@torch.no_grad()
def test_shares_and_sizes_are_means_over_tokens_and_images(kind):
    model = model_of(kind)
    kinds = token_kinds(model.num_prefix, True, model.num_tokens)
    stream = [s[:, None] for s in model.embed(IMAGES).split(3)]
    maps, patch = attention_maps(model, IMAGES), kinds["patch"]
    found = attention_shares(model, stream, kinds).set_index(["layer", "head", "source", "target"]).value
    assert found[2, 1, "patch", "cls"] == pytest.approx(maps[2][:, 1, patch, 0].mean().item(), rel=1e-5)
    states, parts = model.trajectory(IMAGES), site_trajectory(model, IMAGES, ("attn", "mlp", "scale"))
    sizes = update_sizes(model, stream, kinds, layers=2).set_index(["site", "token_kind"]).value
    for site in parts:
        relative = (parts[site][:, 1].norm(dim=-1)/states[:, 1].norm(dim=-1))[:, patch].mean().item()
        assert sizes[site, "patch"] == pytest.approx(relative, rel=1e-3, abs=1e-6)


# ---- logit lens

@pytest.mark.parametrize("kind", TEACHERS)
@torch.no_grad()
def test_at_the_last_layer_the_lens_is_the_model(kind):
    "Its own head, with the pooling and the norm that timm gives it."
    model = model_of(kind)
    logits = model.model(IMAGES)
    same(reader(model)(model.advance(model.embed(IMAGES))), logits)
    target = torch.tensor([0, 1, 4, 2])
    found = logit_lens(model, [(s[:, None], t) for s, t in zip(model.embed(IMAGES).split(3), target.split(3))])
    assert found.layer.unique().tolist() == [0, 1, 2, 3] and found["count"].eq(4).all()
    last = found.query("layer == 3").set_index("quantity").value
    assert last.cross_entropy == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
    assert last.accuracy == (logits.argmax(-1) == target).double().mean().item()
    assert last.agreement == 1 and last.kl == pytest.approx(0, abs=1e-12)

@torch.no_grad()
def test_the_lens_of_a_raptor_reads_its_stops():
    model, head, target = model_of("short"), ClassificationHead(32, 3, 1), torch.tensor([0, 1, 2, 2])
    states = model.trajectory(IMAGES) # 0, 2, 3
    found = logit_lens(model, [(states[:, :1], {"classification": target})], head).set_index(["layer", "quantity"]).value
    last = head(model.norm(states[:, 2])).double().log_softmax(-1)
    for i, layer in enumerate((0, 2, 3)):
        logits = head(model.norm(states[:, i])).double()
        assert found[layer, "cross_entropy"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
        kl = F.kl_div(logits.log_softmax(-1), last, log_target=True, reduction="batchmean").item()
        assert found[layer, "kl"] == pytest.approx(kl, rel=1e-4, abs=1e-12)
    assert set(logit_lens(model, states[:, :1], head, layers=2).quantity) == {"agreement", "kl"}, "without labels"

@torch.no_grad()
def test_a_linear_head_reads_the_class_token_or_the_mean_patch_as_well():
    model = model_of("scaled")
    state = model.embed(IMAGES)
    tokens, head = model.norm(state), nn.Linear(32, 5)
    same(reader(model, head)(state), head(tokens[:, 0]))
    official = nn.Linear(64, 5)
    same(reader(model, official)(state), official(torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], -1)))


# ---- nearest neighbours

class Still(Recurrence, TimmFace):
    "Layers that change nothing: what is known of the images is known of every state."
    name, depth, dim, num_prefix, has_cls = "still", 3, 8, 1, True
    def advance(self, state, start=0, end=None): return state
    def norm(self, state): return state
    def embed(self, images): return images

@pytest.mark.parametrize("k, temperature", [(1, 0.07), (20, 0.07), (7, 1.0), (90, 0.07)])
@pytest.mark.parametrize("size", [1, 32, 100])
def test_neighbours_vote_as_those_of_scikit_learn(k, temperature, size):
    "All cosines at once, weighted by exp(cosine/temperature); the batches of the stream do not matter."
    x, y = noise(150, 1, 2, 8, dtype=torch.float64), torch.arange(150) % 4
    x[:, 0, 0] += 0.4*noise(8, 4, seed=1, dtype=torch.float64).T[y] # half told apart
    x = x.float()
    def stream(s, t): return list(zip(s.split(size), t.split(size)))
    found = knn_accuracy(Still(), stream(x[:90], y[:90]), stream(x[90:], y[90:]), k, temperature)
    oracle = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d)/temperature))
    oracle.fit(x[:90, 0, 0], y[:90])
    assert found.value.tolist() == [oracle.score(x[90:, 0, 0], y[90:])] and found["count"].tolist() == [60]

@torch.no_grad()
def test_neighbours_at_every_stop_by_brute_force():
    model, y = model_of("short"), torch.arange(30) % 3
    images = noise(30, 3, 24, 24, seed=5) + noise(3, 3, 24, 24, seed=6)[y]
    state = model.embed(images)[:, None]
    found = knn_accuracy(model, [(state[:20], y[:20])], [(state[20:], y[20:])], k=5, layers=(2, 3))
    for row, i in zip(found.itertuples(), (1, 2)):
        feature = F.normalize(model.norm(model.trajectory(images)[:, i])[:, 0], dim=-1)
        cosine, near = (feature[20:] @ feature[:20].T).topk(5)
        votes = (F.one_hot(y[near], 3)*(cosine/0.07).exp()[..., None]).sum(1)
        assert row.value == (votes.argmax(-1) == y[20:]).double().mean().item()


# ---- alignment

def unbiased(x, y):
    "CKA from Song et al.'s estimate of HSIC, term by term."
    def hsic(a, b):
        n = len(a)
        k, l = (g - np.diag(np.diag(g)) for g in (a @ a.T, b @ b.T))
        return (np.trace(k @ l) + k.sum()*l.sum()/((n - 1)*(n - 2)) - 2*(k @ l).sum()/(n - 2))/(n*(n - 3))
    return hsic(x, y)/np.sqrt(hsic(x, x)*hsic(y, y))

class Source(SimpleNamespace):
    def __len__(self): return len(self.states)
    def batches(self, size, start=1): return (s[:, start:] for s in self.states.split(size))

def source_of(states, num_prefix=2, **about):
    _, depth, tokens, dim = states.shape
    return Source(**dict(dict(states=states, num_prefix=num_prefix, has_cls=True, depth=depth - 1, num_tokens=tokens, dim=dim), **about))

def test_cka_of_two_models_by_its_definition():
    "Of other depth, width and number of tokens; without registers on one side, these are not compared."
    a = noise(30, 5, 7, 6, dtype=torch.float64).cumsum(1)
    b = noise(30, 4, 5, 9, seed=1, dtype=torch.float64) + a[:, [0, 4, 2, 1]].mean(2, keepdim=True) @ noise(6, 9, seed=2, dtype=torch.float64)
    found = compare_models(source_of(a), source_of(b, 1), batch_size=7)
    assert list(found) == ["cls", "patches"] and found["cls"].shape == (4, 3)
    for kind, parts in {"cls": (slice(0, 1), slice(0, 1)), "patches": (slice(2, None), slice(1, None))}.items():
        x, y = (s[:, 1:, part].float().mean(2).double().numpy() for s, part in zip((a, b), parts))
        wanted = [[unbiased(x[:, i], y[:, j]) for j in range(3)] for i in range(4)]
        np.testing.assert_allclose(found[kind].to_numpy(), wanted, atol=1e-9)

@pytest.mark.parametrize("order", [(1, 2, 3, 4), (4, 3, 2, 1), (2, 1, 4, 3), (2, 3, 4, 4)])
def test_layers_that_are_rotated_copies_are_found(order):
    "Turned, stretched and shifted into more dimensions, CKA stays exactly 1; all else follows from one model's own matrix."
    states = noise(25, 5, 4, 6, dtype=torch.float64).cumsum(1)
    turn = torch.linalg.qr(noise(9, 9, seed=1, dtype=torch.float64))[0][:6]
    found = compare_models(source_of(states), source_of(3*states[:, [0, *order]] @ turn + 1))["cls"]
    own = 1 - compare_layers(source_of(states))["cls"]["cka"]
    np.testing.assert_allclose(found.to_numpy(), own[:, [o - 1 for o in order]], atol=1e-6)
    path = best_matches(found)
    assert all(order[row.match - 1] == row.layer and row.value == pytest.approx(1) for row in path.itertuples() if row.layer in order)

@pytest.mark.parametrize("groups", [1, 3])
def test_groups_of_images_are_averaged(groups, monkeypatch):
    "Above the size of a group, CKA is that of mean inner products, and still 1 for a copy."
    monkeypatch.setattr("raptor.analysis.layers._GROUP", 48//groups)
    states = noise(48, 3, 3, 5, dtype=torch.float64).cumsum(1)
    found = compare_models(source_of(states), source_of(-2*states), batch_size=10)["patches"]
    assert np.diag(found) == pytest.approx(1, abs=1e-9)

@pytest.mark.parametrize("cka, rho, displacement", [
    (np.eye(5), 1, 0), (np.eye(4)[::-1], -1, 2), (np.ones((4, 4)), 1, 0), # equal everywhere: each its own depth
    (np.eye(4)[[1, 2, 3, 3]], np.corrcoef([1, 2, 3, 4], [1, 2, 3.5, 3.5])[0, 1], 0.75),
    (np.kron(np.eye(3), np.ones((2, 1))), np.corrcoef([1, 2, 3, 4, 5, 6], [1.5, 1.5, 3.5, 3.5, 5.5, 5.5])[0, 1], 0.5), # half as deep
    (pd.DataFrame(np.eye(3), [2, 5, 6], [1, 5, 6]), 1, 1/3), # stops
    (np.array([[0.1, 0.9], [0.2, 0.8]]), np.nan, 0.5), (np.eye(1), np.nan, 0)])
def test_paths_with_a_known_answer(cka, rho, displacement):
    found = path_statistics(cka)
    assert found["spearman"] == pytest.approx(rho, nan_ok=True) and found["mean_displacement"] == pytest.approx(displacement)

def test_a_raptor_is_compared_at_its_stops():
    seed_everything(0)
    teacher = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False)
    digits = load_dataset("digits", "test", teacher=teacher, limit=40)
    student = RaptorBackbone(teacher, Raptor.from_teacher(teacher, Phases((3, 6)), stops=(1, 3, 6), rank=8))
    first, second = LiveTrajectories(teacher, digits), LiveTrajectories(student, digits)
    found = compare_models(first, second)
    assert list(found) == ["cls", "registers", "patches"] and found["cls"].shape == (6, 3)
    assert list(found["cls"].columns) == [1, 3, 6]
    own = compare_models(second, second)["patches"].to_numpy()
    np.testing.assert_allclose(own, 1 - compare_layers(second)["patches"]["cka"], atol=1e-6)
    assert path_statistics(compare_models(first, first)["patches"]) == {"spearman": 1, "mean_displacement": 0}


# ---- patching

@pytest.mark.parametrize("kind", TEACHERS + RAPTORS)
@torch.no_grad()
def test_a_whole_state_makes_the_donors_run_and_ones_own_makes_none(kind):
    model, others = model_of(kind), noise(4, 3, 24, 24, seed=7)
    state, clean, donor = model.embed(IMAGES), model.trajectory(IMAGES), model.trajectory(others)
    own = site_trajectory(model, IMAGES)
    for i, layer in enumerate((0, *model.stops_at)):
        same(run_patched(model, state, layer, donor[:, i]), donor[:, -1])
        same(run_patched(model, state, layer, clean[:, i, [2, 5]], [5, 2][::-1]), clean[:, -1])
        for site in ("attn", "mlp") if layer else ():
            same(run_patched(model, state, layer, own[site][:, i - 1], site=site), clean[:, -1])
    assert not any(m._forward_hooks for m in model.modules())

@torch.no_grad()
def test_one_token_of_the_attention_is_replaced_by_hand():
    model, others = model_of("scaled"), noise(4, 3, 24, 24, seed=7)
    block, x = model.model.blocks[1], model.advance(model.embed(IMAGES), 0, 1)
    donor = site_trajectory(model, others, "attn", 2)["attn"][:, 0]
    attn = block.ls1(block.attn(block.norm1(x)))
    attn[:, 4] = donor[:, 4]
    x = x + attn
    x = x + block.ls2(block.mlp(block.norm2(x)))
    same(run_patched(model, model.embed(IMAGES), 2, donor[:, 4:5], 4, "attn"), model.model.blocks[2](x))

def test_the_shift_of_a_mean_is_the_share_of_the_tokens():
    "Donors differ by one vector in all tokens, and the mean over tokens is read."
    x = noise(6, 1, 1, 8, dtype=torch.float64).expand(6, 1, 5, 8)
    kinds = {"one": 3, "two": [0, -1], "most": slice(1, None), "all": slice(None)}
    found = patching_effects(Still(), x.split(4), kinds, read=lambda state: state.mean(1), layers=(0, 2))
    assert found["count"].eq(5).all() and found["std"].max() < 1e-9
    for kind, share in (("one", 1/5), ("two", 2/5), ("most", 4/5), ("all", 1)):
        assert found.query(f"token_kind == '{kind}'").value.values == pytest.approx(share)

@pytest.mark.parametrize("kind, site", [("scaled", "state"), ("scaled", "attn"), ("short", "mlp"), ("depth", "attn")])
@torch.no_grad()
def test_effects_are_those_of_single_runs(kind, site):
    "The donor is the image before; the size of the batches does not matter."
    model = model_of(kind)
    state, head = model.embed(noise(5, 3, 24, 24, seed=8)), nn.Linear(32, 4)
    read, layer, tokens = reader(model, head), 2, [0, 6]
    found = patching_effects(model, state[:, None].split(2), {"some": tokens}, read, layer, site)
    whole = patching_effects(model, state[:, None], {"some": tokens}, read, layer, site)
    np.testing.assert_allclose(found.value, whole.value, rtol=1e-3, atol=1e-6)
    _, patch = next(inside(model, state[:-1], site, layer))
    clean, other = read(model.advance(state[1:])), read(model.advance(state[:-1]))
    moved = read(run_patched(model, state[1:], layer, patch[site][:, tokens], tokens, site)) - clean
    shift = ((moved*(other - clean)).sum(-1)/(other - clean).square().sum(-1)).mean().item()
    assert found.query("quantity == 'shift'").value.item() == pytest.approx(shift, rel=1e-3, abs=1e-6)
    assert found["count"].tolist() == [4, 4]

def test_an_image_whose_donor_has_the_same_output_is_left_out():
    x = noise(4, 1, 5, 8)
    found = patching_effects(Still(), torch.cat([x[:2], x[1:]]), layers=1)
    assert found["count"].tolist() == [3, 3] and found.value.tolist() == pytest.approx([1, 1])


# ---- one sentence for each mistake

@pytest.mark.parametrize("call, sentence", [
    (lambda m: site_trajectory(m, IMAGES, "atn"), "atn"),
    (lambda m: site_trajectory(m, IMAGES, ()), "site"),
    (lambda m: attention_maps(m, IMAGES, 4), "no state after layer 4; choose from 1..3"),
    (lambda m: attention_maps(m, IMAGES, 0), "no state after layer 0; choose from 1..3"),
    (lambda m: attention_maps(m, IMAGES, "2"), "no state after layer '2'"),
    (lambda m: attention_maps(m, IMAGES, 2.0), "no state after layer 2.0"),
    (lambda m: attention_maps(m, IMAGES, True), "no state after layer True"),
    (lambda m: attention_maps(m, IMAGES, []), r"no state after layer \[\]"),
    (lambda m: attention_maps(model_of("short"), IMAGES, [1, 2]), r"no state after layer 1; choose from its stops \(2, 3\)"),
    (lambda m: check_layers(m.model), r"the model is a VisionTransformer; give a Backbone, such as Backbone\(model\)"),
    (lambda m: check_layers(model_of("raptor").raptor), r"the model is a Raptor; give a Backbone.*RaptorBackbone\(teacher, raptor\)"),
    (lambda m: reader(m, nn.Linear(48, 5)), r"the head reads width 48 and the states of .* have 32; give a head of width 32"),
    (lambda m: logit_lens(m, m.embed(IMAGES)[:, None], ClassificationHead(48, 3, 1)), r"the head reads tokens \(B, N, 48\)"),
    (lambda m: logit_lens(m, m.embed(IMAGES)[:, None], nn.Identity()), r"the head gives \(4, 10, 32\); give one that classifies"),
    (lambda m: logit_lens(m, [(m.embed(IMAGES)[:, None], torch.tensor([0, 1, 2, 9]))]), "class 9 and the head knows 5 classes"),
    (lambda m: logit_lens(m, [(m.embed(IMAGES)[:, None], torch.zeros(4, 24, 24).long())]), "are no classes of 4 images"),
    (lambda m: logit_lens(m, iter(())), "the stream holds no batch"),
    (lambda m: reader(RaptorBackbone.compact(m, model_of("raptor").raptor)), "brings no linear head; give one"),
    (lambda m: knn_accuracy(m, *neighbours(m), k=5), "k is 5 and there are 4 training images"),
    (lambda m: knn_accuracy(m, *neighbours(m), k=0), "k is 0"),
    (lambda m: knn_accuracy(m, *neighbours(m), temperature=0), "temperature 0"),
    (lambda m: knn_accuracy(m, m.embed(IMAGES)[:, None], neighbours(m)[1], k=1), "read the stream with labels=True"),
    (lambda m: knn_accuracy(m, neighbours(m)[0], [], k=1), "the stream of test images is empty"),
    (lambda m: compare_models(source_of(noise(8, 3, 4, 5)), source_of(noise(9, 3, 4, 5))), "the same images, at least 4, and got 8 and 9"),
    (lambda m: compare_models(source_of(noise(3, 3, 4, 5)), source_of(noise(3, 3, 4, 5))), "at least 4, and got 3 and 3"),
    (lambda m: compare_models(source_of(noise(8, 3, 4, 5)), source_of(noise(8, 3, 4, 5), augmented=True)), "augment=False"),
    (lambda m: compare_models(source_of(noise(8, 3, 4, 5)), source_of(noise(8, 3, 4, 5)/0)), "a state is not finite"),
    (lambda m: path_statistics(np.full((2, 2), np.nan)), r"the similarities \(2, 2\) are empty or not finite"),
    (lambda m: run_patched(m, m.embed(IMAGES), 2, m.embed(IMAGES)[:, :3]), r"the patch is \(4, 3, 32\) and must be \(4, 10, 32\)"),
    (lambda m: run_patched(m, m.embed(IMAGES), 2, m.embed(IMAGES)[:2], site="mlp"), r"the patch is \(2, 10, 32\) and must be"),
    (lambda m: run_patched(m, m.embed(IMAGES), 2, m.embed(IMAGES)[:, :1], 10), r"tokens 10 are not among 0..9"),
    (lambda m: run_patched(m, m.embed(IMAGES), 2, m.embed(IMAGES)[:, :0], slice(20, 30)), "are not among 0..9"),
    (lambda m: run_patched(m, m.embed(IMAGES), None, m.embed(IMAGES)), "no state after layer None"),
    (lambda m: run_patched(m, m.embed(IMAGES), 0, m.embed(IMAGES), site="attn"), "no state after layer 0; choose from 1..3"),
    (lambda m: run_patched(m, m.embed(IMAGES), 1, m.embed(IMAGES), site="map"), "map"),
    (lambda m: patching_effects(m, m.embed(IMAGES)[:1, None]), "the stream has one image; give at least two"),
    (lambda m: patching_effects(m, m.embed(IMAGES)[:, None], {"far": 11}), "tokens 11 are not among 0..9")])
def test_a_mistake_is_told_in_one_sentence(call, sentence):
    with pytest.raises(RaptorError, match=sentence) as e: call(model_of("plain"))
    assert "\n" not in str(e.value) and str(e.value).count(". ") == 0

def neighbours(model): return [[(model.embed(IMAGES)[:, None], torch.arange(4) % 2)] for _ in range(2)]

def test_layers_that_add_both_at_once_have_no_sites():
    model = Backbone(VisionTransformer(**SHAPE, num_classes=0, block_fn=ParallelScalingBlock), "parallel")
    with pytest.raises(RaptorError, match="ParallelScalingBlock.* neither has a name"): attention_maps(model, IMAGES)
    assert not any(m._forward_hooks for m in model.modules())
    assert patching_effects(model, model.embed(IMAGES)[:, None], layers=2).value.tolist() == pytest.approx([1, 1], abs=1e-5)

def test_hooks_go_when_the_layer_fails():
    model = model_of("plain")
    with pytest.raises(ZeroDivisionError), at_sites(model, 1, {"map": lambda value: 1/0}): model.advance(model.embed(IMAGES), 0, 1)
    assert model.model.blocks[0].attn.fused_attn and not any(m._forward_hooks for m in model.modules())
