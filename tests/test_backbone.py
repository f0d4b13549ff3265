"The backbone against timm's own forward pass, and hostile or broken weight files."
import argparse
import collections
import json
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from raptor.core import RaptorError
from raptor.data.load import load_dataset
from raptor.teacher.backbone import Backbone
from raptor.teacher.models import timm_name
from raptor.teacher.weights import load_linear_head, read_weights
from raptor.trajectories.live import LiveTrajectories

TINY = dict(depth=3, embed_dim=48, num_heads=2)
FAMILIES = { # name -> (image size, settings, has a class token, registers, the norm is applied by forward_features)
    "vit_small_patch14_reg4_dinov2": ((28, 42), {}, True, 4, True),
    "vit_base_patch14_dinov2": ((28, 28), {}, True, 0, True),
    "vit_large_patch14_reg4_dinov2": ((28, 42), {}, True, 4, True),
    "vit_giant_patch14_reg4_dinov2": ((28, 42), {}, True, 4, True), # SwiGLU
    "vit_small_patch16_dinov3": ((32, 48), {}, True, 4, True),
    "vit_large_patch16_dinov3": ((32, 48), {}, True, 4, True),
    "vit_7b_patch16_dinov3": ((32, 48), {}, True, 4, True), # SwiGLU
    "vit_small_patch16_rope_mixed_224": ((32, 48), {}, True, 0, True),
    "eva02_tiny_patch14_224": ((28, 42), {}, True, 0, False),
    "deit3_small_patch16_224": ((32, 48), {}, True, 0, True),
    "deit_tiny_distilled_patch16_224": ((32, 32), {}, True, 1, True),
    "vit_base_patch16_clip_224": ((32, 48), {}, True, 0, True),
    "vit_base_patch16_siglip_224": ((32, 32), {}, False, 0, True),
    "vit_so400m_patch14_siglip_224": ((28, 28), {}, False, 0, True), # an MLP of 3.7 D
    "vit_base_patch16_224": ((32, 48), {}, True, 0, True),
    "vit_base_patch16_224.mae": ((32, 32), {}, True, 0, True),
    "vit_small_patch16_224": ((32, 32), dict(global_pool="avg"), True, 0, False),
    "vit_medium_patch16_reg4_gap_256": ((32, 32), {}, False, 4, False),
    "vit_nano_patch4_reg4_24": ((24, 24), {}, True, 4, True),
}


def tiny(name, randomise=True, **more):
    size, settings, *_ = FAMILIES[name]
    backbone = Backbone.create(name, pretrained=False, img_size=size, **{**TINY, **settings, **more})
    if randomise: # LayerScale starts so small that every block is the identity
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in backbone.parameters(): p.normal_(std=0.2, generator=generator)
    return backbone


@pytest.mark.parametrize("name", FAMILIES)
def test_states_are_timms_own_bit_for_bit(name):
    size, _, has_cls, registers, normed = FAMILIES[name]
    backbone, images = tiny(name), torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    calls = []
    backbone.model.blocks[0].register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    for block in backbone.model.blocks: block.register_forward_hook(lambda module, args, out: calls.append(out))
    final = backbone.model.forward_features(images)
    seen = torch.stack(calls[:4], 1)
    assert torch.equal(backbone.trajectory(images), seen)
    assert torch.equal(backbone.trajectory(images, 1, 2), seen[:, 1:3])
    assert torch.equal(backbone.advance(seen[:, 1], 1, 3), seen[:, 3]) # the state is enough, with rotary models too
    assert (backbone.has_cls, backbone.num_registers, backbone.num_tokens) == (has_cls, registers, seen.shape[2])
    assert (backbone.depth, backbone.dim, backbone.num_heads) == (3, 48, 2)
    assert torch.equal(backbone.features(images), final) == normed
    if not normed: # timm normalises after pooling: the same norm, on every token
        assert torch.equal(backbone.features(images), backbone.model.fc_norm(final))
    expected = seen[:, 2, 0] if has_cls else seen[:, 2, registers:].mean(1)
    assert torch.equal(backbone.cls(seen[:, 2]), expected)


@pytest.mark.parametrize("name, expected", [ # at full size, without storage: (depth, dim, heads, grid, prefix)
    ("vit_small_patch14_reg4_dinov2", (12, 384, 6, (37, 37), 5)),
    ("vit_base_patch14_reg4_dinov2", (12, 768, 12, (37, 37), 5)),
    ("vit_large_patch14_reg4_dinov2", (24, 1024, 16, (37, 37), 5)),
    ("vit_giant_patch14_reg4_dinov2", (40, 1536, 24, (37, 37), 5)),
    ("vit_large_patch16_dinov3", (24, 1024, 16, (16, 16), 5)),
    ("vit_so400m_patch14_siglip_224", (27, 1152, 16, (16, 16), 0))])
def test_the_sizes_of_the_large_models(name, expected):
    with torch.device("meta"): backbone = Backbone.create(name, pretrained=False)
    assert (backbone.depth, backbone.dim, backbone.num_heads, backbone.grid, backbone.num_prefix) == expected
    state = torch.empty(1, backbone.num_tokens, backbone.dim, device="meta")
    assert backbone.advance(state, backbone.depth - 1, backbone.depth).shape == state.shape


def test_the_papers_depth_size_has_35_by_46_patches():
    tiny = dict(depth=1, embed_dim=12, num_heads=2)
    backbone = Backbone.create("vit_small_patch14_reg4_dinov2", pretrained=False, img_size=(490, 644), **tiny)
    assert backbone.grid == (35, 46) and backbone.features(torch.zeros(1, 3, 490, 644)).shape == (1, 5 + 35*46, 12)


@pytest.mark.parametrize("name, reason", [
    ("swin_tiny_patch4_window7_224", "hierarchical"), ("resnet18", "convolutional"),
    ("efficientnet_b0", "no attention"), ("mixer_b16_224", "no attention"), ("samvit_base_patch16", "windows"),
    ("vit_base_r50_s16_224", "deep convolutional network"), ("beit_base_patch16_224", "relative positions"),
    ("naflexvit_base_patch16_gap", "packed")])
@pytest.mark.parametrize("pretrained", [True, False])
def test_models_with_other_blocks_are_refused_before_any_download(name, reason, pretrained):
    with pytest.raises(RaptorError, match=reason): Backbone.create(name, pretrained=pretrained)


def test_random_weights_depend_on_the_seed_alone():
    torch.manual_seed(4); ours = Backbone.create("vit_mini_patch4_reg4_24", pretrained=False)
    torch.manual_seed(4); timms = timm.create_model("vit_mini_patch4_reg4_24")
    assert all(torch.equal(a, b) for a, b in zip(ours.model.state_dict().values(), timms.state_dict().values()))
    model = ours.model
    assert (ours.depth, ours.dim, ours.num_heads, ours.grid, ours.num_prefix) == (12, 64, 4, (6, 6), 5)
    for p in (model.pos_embed, model.reg_token, model.cls_token): assert 0.1 < p.std() < 0.3


def test_frozen_until_unfrozen_and_gradients_reach_the_input():
    backbone = tiny("vit_small_patch16_dinov3", drop_path_rate=0.5)
    images = torch.randn(2, 3, 32, 48, requires_grad=True)
    backbone.train()
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    backbone.features(images).sum().backward()
    assert images.grad.abs().sum() > 0
    backbone.unfreeze()
    assert backbone.training and all(p.requires_grad for p in backbone.parameters())
    drop_path = backbone.model.blocks[-1].drop_path1
    assert drop_path.drop_prob == 0.5 and drop_path.training
    assert not backbone.eval().training and backbone.train().training


# --- models that exist already, and classes of their own ---

class Adds(VisionTransformer):
    def forward_features(self, x): return super().forward_features(x) + 3

class Prepares(VisionTransformer):
    def forward(self, x): return super().forward(2 * x - 1)

class Plain(VisionTransformer): pass

class Skips(VisionTransformer):
    def forward_features(self, x, attn_mask=None):
        return self.norm(self.blocks[:-1](self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))))

@pytest.mark.parametrize("kind, what", [(Adds, "forward_features does more"), (Prepares, "forward does more"),
                                        (Skips, "forward_features does more"), (Plain, None)])
def test_a_class_with_a_forward_pass_of_its_own(kind, what):
    torch.manual_seed(0)
    model, images = kind(img_size=32, **TINY).eval(), torch.randn(2, 3, 32, 32)
    if what is None: assert torch.equal(Backbone(model, "mine").features(images), model.forward_features(images))
    else:
        with pytest.raises(RaptorError, match=what): Backbone(model, "mine")


def test_a_forward_pass_replaced_on_the_instance():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY).eval()
    own = model.forward_features
    model.forward_features = lambda x, **more: own(x, **more) + 1
    with pytest.raises(RaptorError, match="forward_features does more"): Backbone(model, "vit_tiny_patch16_224")


@pytest.mark.parametrize("wrap", [
    nn.DataParallel, lambda m: torch.compile(m, backend="eager"),
    lambda m: nn.DataParallel(torch.compile(m, backend="eager"))])
def test_wrappers_are_taken_off(wrap):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY)
    assert Backbone(wrap(model), "vit_tiny_patch16_224", copy=False).model is model


HuggingFace = type("SwinModel", (nn.Module,), {"__module__": "transformers.models.swin"})
HuggingFaceAttention = type("SwinSelfAttention", (nn.Module,), {"__module__": "transformers.models.swin"})

def hugging_face():
    model = HuggingFace()
    model.attention = HuggingFaceAttention()
    return model

class Blocks(nn.Module): # as in the code of a paper
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.MultiheadAttention(8, 2)])

@pytest.mark.parametrize("model, said", [
    (torchvision.models.swin_t, "of torchvision, only VisionTransformer can be converted"),
    (torchvision.models.resnet18, "convolutional"), (hugging_face, "of transformers, only ViTModel, .* can be converted"),
    (Blocks, "its class comes from test_backbone and not from timm"), (lambda: nn.Linear(2, 2), "no attention")])
def test_models_of_other_libraries_are_called_what_they_are(model, said):
    with pytest.raises(RaptorError, match=f"{said}.*choose a plain vision transformer of timm"):
        Backbone(model(), "theirs")


@pytest.mark.parametrize("name, known", [
    ("dinov2_vits14", "vit_small_patch14_dinov2.lvd142m"), ("dinov2_vitg14_reg", "vit_giant_patch14_reg4_dinov2.lvd142m"),
    ("facebook/dinov2-with-registers-base", "vit_base_patch14_reg4_dinov2.lvd142m"),
    ("facebook/dinov2-large", "vit_large_patch14_dinov2.lvd142m"), ("dinov3_vitb16", "vit_base_patch16_dinov3.lvd1689m"),
    ("facebook/dinov3-vits16-pretrain-lvd1689m", "vit_small_patch16_dinov3.lvd1689m"),
    ("hf-hub:facebook/dinov3-vits16plus-pretrain-lvd1689m", "vit_small_plus_patch16_dinov3.lvd1689m"),
    ("facebook/dinov3-vitl16-pretrain-sat493m", "vit_large_patch16_dinov3.sat493m"),
    ("facebook/dinov3-vit7b16-pretrain-lvd1689m", "vit_7b_patch16_dinov3.lvd1689m"),
    ("dino_vits8", "vit_small_patch8_224.dino"), ("facebook/dino-vitb16", "vit_base_patch16_224.dino"),
    ("ViT-B/16", "vit_base_patch16_224"), ("vit_b_16", "vit_base_patch16_224"), ("vit_l_32", "vit_large_patch32_224"),
    ("facebook/vit-mae-base", "vit_base_patch16_224.mae"), ("facebook/vit-mae-huge", "vit_huge_patch14_224.mae"),
    ("google/vit-base-patch16-224-in21k", "vit_base_patch16_224"),
    ("facebook/deit-small-patch16-224", "deit_small_patch16_224"),
    ("openai/clip-vit-large-patch14", "vit_large_patch14_clip_224.openai"),
    ("google/siglip-so400m-patch14-384", "vit_so400m_patch14_siglip_384.webli"),
    ("google/siglip2-base-patch16-224", "vit_base_patch16_siglip_224.v2_webli"),
    ("timm/vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224.augreg_in21k"),
    ("bert-base", None), ("facebook/dinov2-tiny", None)])
def test_what_other_libraries_call_it(name, known):
    assert timm_name(name) == known
    if known:
        assert timm.get_pretrained_cfg(known).hf_hub_id or "." not in known # weights that exist
        with pytest.raises(RaptorError, match=f"timm calls it {known}"): Backbone.create(name)


@pytest.mark.parametrize("name, said", [
    ("vit_tiny_patch16_224.augreg", "unknown tag .* did you mean 'augreg_in21k"),
    ("vit_nano_patch4_reg4_24.mine", "unknown tag .* known: untrained"), ("vit_tiny_patch16_244", "did you mean"),
    (nn.Linear(2, 2), r"got a Linear; .* Backbone\(model\)"), (None, "got a NoneType"),
    (Path("vit_tiny_patch16_224"), "got a PosixPath")])
@pytest.mark.parametrize("pretrained", [True, False])
def test_names_that_are_none(name, said, pretrained):
    with pytest.raises(RaptorError, match=said): Backbone.create(name, pretrained=pretrained)


@pytest.mark.parametrize("img_size", [64.0, "64", 0, -16, (32,), (32, 32, 32), (32, 32.5), True, 10**6, [None, 32]])
def test_sizes_that_are_none(img_size):
    with pytest.raises(RaptorError, match="img_size"):
        Backbone.create("vit_tiny_patch16_224", pretrained=False, img_size=img_size, **TINY)


@pytest.mark.parametrize("img_size", [None, 384])
def test_a_models_own_size_need_not_be_a_multiple_of_its_patch(img_size):
    name = "vit_so400m_patch14_siglip_384"
    assert Backbone.create(name, pretrained=False, img_size=img_size, **TINY).grid == (27, 27)
    with pytest.raises(RaptorError, match=r"take \(392, 392\)"):
        Backbone.create(name, pretrained=False, img_size=400, **TINY)


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224",
                                  "vit_small_patch16_rope_mixed_224"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_are_cast_to_the_type_of_the_weights(name, dtype):
    backbone, images = tiny(name).to(dtype), torch.randn(2, 3, *FAMILIES[name][0])
    states = backbone.trajectory(images)
    assert states.dtype == dtype and torch.equal(states, backbone.trajectory(images.to(dtype)))


def test_a_bfloat16_backbone_streams_its_trajectories():
    backbone = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False).bfloat16()
    live = LiveTrajectories(backbone, load_dataset("digits", "test", limit=4, teacher=backbone))
    images = torch.stack([live.dataset[i]["image"] for i in range(4)])
    assert torch.equal(live.compute(images), backbone.trajectory(images.bfloat16()))


@pytest.mark.parametrize("images, said", [
    (torch.zeros(1, 3, 24, 24, dtype=torch.uint8), "uint8; scale them"), (torch.zeros(3, 24, 24), "such a batch"),
    (torch.zeros(1, 1, 24, 24), "such a batch"), (torch.zeros(1, 3, 32, 24), r"img_size=\(32, 24\)")])
def test_images_that_do_not_fit(images, said):
    backbone = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False)
    with pytest.raises(RaptorError, match=said): backbone.embed(images)


# --- how images are prepared ---

def prepared(backbone):
    config = timm.data.resolve_model_data_config(backbone.model)
    assert (config["mean"], config["std"]) == (backbone.mean, backbone.std)
    assert config["input_size"] == (3, *backbone.img_size)
    return backbone.mean, backbone.std, backbone.img_size


def test_a_teachers_normalisation_and_size_are_kept_with_its_weights(tmp_path):
    create = Backbone.create
    backbone = create("vit_nano_patch4_reg4_24", pretrained=False, img_size=(24, 32), mean=0.157, std=(0.29, 0.3, 0.31))
    ours = (0.157,)*3, (0.29, 0.3, 0.31), (24, 32)
    assert prepared(backbone) == ours and backbone.source == "random"
    path = backbone.save(tmp_path/"w.safetensors")
    again = create("vit_nano_patch4_reg4_24", weights=path)
    assert prepared(again) == ours and again.source == "file" and again.fingerprint == backbone.fingerprint
    given = create("vit_nano_patch4_reg4_24", weights=path, img_size=24, mean=(0.1, 0.2, 0.3), std=1)
    assert prepared(given) == ((0.1, 0.2, 0.3), (1, 1, 1), (24, 24))
    given.mean, given.std = (0, 0, 0), 0.5
    assert prepared(given) == ((0, 0, 0), (0.5,)*3, (24, 24))


def test_weights_of_another_recipe(tmp_path):
    torch.save(tiny("vit_base_patch16_224").model.state_dict(), tmp_path/"mae.pth")
    def create(name, **more):
        return prepared(Backbone.create(name, weights=tmp_path/"mae.pth", img_size=(32, 48), **TINY, **more))[:2]
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert create("vit_base_patch16_224") == ((0.5,)*3, (0.5,)*3) # of the name's own recipe
    assert create("vit_base_patch16_224.mae") == create("vit_base_patch16_224", mean=imagenet[0], std=imagenet[1]) == imagenet


@pytest.mark.parametrize("given", [dict(mean=(1, 2)), dict(std=0), dict(std=(1, 1, -1)), dict(mean=float("nan")),
                                   dict(mean="0.5"), dict(std=[1, 1, None])])
def test_normalisations_that_are_none(given):
    with pytest.raises(RaptorError, match="must be three finite numbers"):
        Backbone.create("vit_nano_patch4_reg4_24", pretrained=False, **given)


def test_the_identity_tells_backbones_apart():
    def create(**more):
        torch.manual_seed(0)
        return Backbone.create("vit_nano_patch4_reg4_24", pretrained=False, **more)
    a, larger = create(), create(img_size=32)
    assert json.loads(json.dumps(a.identity())) == a.identity()
    assert {k: a.identity()[k] for k in ("name", "timm", "source", "img_size", "mean")} == dict(
        name="vit_nano_patch4_reg4_24", timm={}, source="random", img_size=[24, 24], mean=[0.5]*3)
    larger.model.load_state_dict({k: v for k, v in a.model.state_dict().items() if k != "pos_embed"}, strict=False)
    assert a.identity()["blocks"] == larger.identity()["blocks"] and a.fingerprint != larger.fingerprint
    with torch.no_grad(): larger.model.blocks[2].norm1.bias[0] += 1
    assert a.identity()["blocks"] != larger.identity()["blocks"]
    assert a.unfreeze().freeze().source == "trained"
    name, tiny = "vit_small_patch14_dinov2", dict(depth=1, embed_dim=12, num_heads=2, pretrained=False)
    assert "Meta's rule" in Backbone.create(name, img_size=224, **tiny).identity()["note"]
    assert "note" not in Backbone.create(name, **tiny).identity()


# --- fingerprints and files ---

def test_fingerprint_follows_weights_size_and_name_only():
    torch.manual_seed(0); a = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False)
    b = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False, drop_path_rate=0.3, num_classes=7)
    b.model.load_state_dict(a.model.state_dict(), strict=False)
    assert a.fingerprint == b.fingerprint # neither stochastic depth nor a head changes the frozen trunk
    before = a.fingerprint
    with torch.no_grad(): a.model.blocks[3].mlp.fc1.weight[0, 0].add_(1e-3)
    assert a.fingerprint != before
    with torch.no_grad(): a.model.blocks[3].mlp.fc1.weight[0, 0] = b.model.blocks[3].mlp.fc1.weight[0, 0]
    assert a.fingerprint == before
    torch.manual_seed(0)
    assert Backbone.create("vit_nano_patch4_reg4_24", pretrained=False, img_size=32).fingerprint != before


@pytest.mark.parametrize("name", FAMILIES)
def test_save_and_load_again(name, tmp_path):
    size, settings, *_ = FAMILIES[name]
    backbone = tiny(name)
    path = backbone.save(tmp_path/"w.safetensors")
    again = Backbone.create(name, weights=path, img_size=size, **{**TINY, **settings})
    assert again.fingerprint == backbone.fingerprint
    images = torch.randn(1, 3, *size)
    assert torch.equal(again.trajectory(images), backbone.trajectory(images))
    assert [f.name for f in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_non_square_position_embedding_is_resampled_from_its_own_grid(tmp_path):
    wide = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False, img_size=(16, 36)) # 36 patches, as 24 x 24 has
    rows = torch.cat([torch.zeros(5), torch.arange(4.).repeat_interleave(9)])[None, :, None]
    with torch.no_grad(): wide.model.pos_embed.copy_(rows.expand_as(wide.model.pos_embed))
    path = wide.save(tmp_path/"w.safetensors")
    assert Backbone.create("vit_nano_patch4_reg4_24", weights=path).img_size == (16, 36) # the size that it was saved at
    square = Backbone.create("vit_nano_patch4_reg4_24", weights=path, img_size=24)
    rows = square.model.pos_embed[0, 5:, 0].view(6, 6)
    assert torch.allclose(rows, rows[:, :1].expand(6, 6), atol=1e-5)
    assert (rows[1:, 0] > rows[:-1, 0]).all() # still a gradient from top to bottom


@pytest.mark.parametrize("name, img_size", [
    ("flexivit_small", 128), ("vit_base_patch16_radio_v3", 128), ("vit_large_patch16_radio_v3", 96), # bilinear
    ("vit_base_patch16_224", 128), ("vit_base_patch16_224", (112, 448)), # as many patches on another grid
    ("vit_small_patch14_reg4_dinov2", 224), ("vit_base_patch16_clip_224", (448, 112)), ("eva02_tiny_patch14_224", 112),
    ("vit_so400m_patch14_siglip_384", 378)])
@pytest.mark.parametrize("written_by", ["timm", "save"])
def test_position_tables_are_resampled_as_timm_does_for_the_model(tmp_path, name, img_size, written_by):
    tiny = dict(depth=1, embed_dim=24, num_heads=2, num_classes=0)
    torch.manual_seed(0)
    model = timm.create_model(name, **tiny)
    torch.save(model.state_dict(), tmp_path/"w.pth")
    path = tmp_path/"w.pth" if written_by == "timm" else Backbone(model, name).save(tmp_path/"w.safetensors")
    overlay = dict(file=str(tmp_path/"w.pth"), num_classes=0)
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=img_size, **tiny)
    ours = Backbone.create(name, weights=path, img_size=img_size, **tiny)
    assert torch.equal(ours.model.pos_embed, theirs.pos_embed)


def official_dinov2(backbone):
    "The names in Meta's files: one tensor of register tokens, no registers in the position embedding, a mask token."
    state = {k.replace("reg_token", "register_tokens"): v.clone() for k, v in backbone.model.state_dict().items()}
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 48), state["pos_embed"]], 1)
    return {**state, "mask_token": torch.zeros(1, 48)}


def official_dinov3(backbone):
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    state = {renamed(k, names): v.clone() for k, v in backbone.model.state_dict().items()}
    return {**state, "mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.zeros(4)}


def wrapped_deit3(backbone):
    names = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
    state = {f"module.{renamed(k, names)}": v.clone() for k, v in backbone.model.state_dict().items()}
    return {"model": state, "epoch": 3}


def renamed(key, names):
    for old, new in names.items(): key = key.replace(old, new)
    return key


@pytest.mark.parametrize("name, official", [("vit_small_patch14_reg4_dinov2", official_dinov2),
    ("vit_small_patch16_dinov3", official_dinov3), ("deit3_small_patch16_224", wrapped_deit3)])
def test_official_checkpoints(tmp_path, name, official):
    backbone, size = tiny(name), FAMILIES[name][0]
    with torch.no_grad(): backbone.model.cls_token.zero_() # timm's translation adds its position to DINOv2's
    torch.save(official(backbone), tmp_path/"w.pth")
    again = Backbone.create(name, weights=tmp_path/"w.pth", img_size=size, num_classes=0, **TINY)
    images = torch.randn(1, 3, *size)
    assert torch.equal(again.trajectory(images), backbone.trajectory(images))


def test_weights_of_another_architecture_say_which_tensors(tmp_path):
    path = tiny("vit_base_patch16_224").save(tmp_path/"w.safetensors")
    for more, said in ((dict(depth=4), r"lack blocks.3.norm1.weight, .* \.\.\.;"),
                       (dict(depth=2), r"have too many: blocks.2.*, .* \.\.\.;"),
                       (dict(embed_dim=24), "have another shape in cls_token, pos_embed, ")):
        with pytest.raises(RaptorError, match=said):
            Backbone.create("vit_base_patch16_224", weights=path, img_size=(32, 48), **{**TINY, **more})


@pytest.mark.parametrize("rename", [
    lambda k: k, lambda k: f"module.{k}", lambda k: f"module.module.{k}", lambda k: f"_orig_mod.{k}",
    lambda k: f"module._orig_mod.{k}", lambda k: f"model.{k}", lambda k: f"teacher.backbone.{k}",
    lambda k: f"backbone.{k}", lambda k: f"model.backbone.module.{k}", lambda k: f"_fsdp_wrapped_module.{k}",
    lambda k: k.replace("blocks.", "blocks.0."), lambda k: f"teacher.backbone.{k.replace('blocks.', 'blocks.1.')}",
    lambda k: k.replace("blocks.2.", "blocks.2._orig_mod.")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_names_as_wrappers_of_modules_leave_them(tmp_path, rename, suffix):
    backbone = tiny("vit_base_patch16_224")
    state = {rename(k): v.clone() for k, v in backbone.model.state_dict().items()}
    state |= {"teacher.dino_head.weight": torch.ones(2), "student.backbone.cls_token": torch.ones(2)}
    torch.save({"state_dict": state}, tmp_path/"w.pth") if suffix == ".pth" else save_file(state, tmp_path/f"w{suffix}")
    again = Backbone.create("vit_base_patch16_224", weights=tmp_path/f"w{suffix}", img_size=(32, 48), **TINY)
    assert again.fingerprint == backbone.fingerprint


def test_two_tensors_of_one_name(tmp_path):
    torch.save({"module.w": torch.ones(2), "w": torch.zeros(2)}, tmp_path/"w.pth")
    with pytest.raises(RaptorError, match="w and module.w are both w of a model"): read_weights(tmp_path/"w.pth")


class DictConfig: pass # of OmegaConf, which is not installed: its pickle has the same form
DictConfig.__module__ = "omegaconf.dictconfig"

def defaults():
    found = collections.defaultdict(list)
    found["lr"].append(0.1)
    return found

@pytest.mark.parametrize("beside", [
    np.float64(0.8), np.float32(0.8), np.int64(3), np.bool_(True), np.ones(3), np.dtype("float32"), Path("runs/1"),
    argparse.Namespace(lr=0.1, out=Path("x"), best=np.float64(1)), defaults(), {"deep": [{"er": np.float64(1)}]},
    complex(1, 2), {1, 2}, range(3), collections.OrderedDict(a=1), "config"])
def test_options_beside_the_weights_are_passed_over(tmp_path, monkeypatch, beside):
    if isinstance(beside, str): # as if it had been pickled where OmegaConf is installed
        for name in ("omegaconf", "omegaconf.dictconfig"):
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(DictConfig=DictConfig))
        beside = DictConfig()
        beside.__dict__.update(_content={"lr": 0.1}, _parent=None, ref_type=dict)
    torch.save({"model": {"w": torch.ones(2)}, "beside": beside}, tmp_path/"w.pth")
    assert read_weights(tmp_path/"w.pth")[0].keys() == {"w"}


def write_text(text): return lambda path: path.write_text(text)
def save(value): return lambda path: torch.save(value() if callable(value) else value, path)
def script(path): torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write, said", [
    (write_text("<!DOCTYPE html><html>404</html>"), "is a web page"), (write_text("\n <html>"), "is a web page"),
    (write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "git-lfs pointer .* git lfs pull"),
    (write_text('{"weight_map": {}}'), "is text"), (write_text(""), "is empty"), (os.mkfifo, "not a regular file"),
    (os.mkdir, "not readable|not a regular file"), (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    (save(lambda: nn.Linear(2, 2)), "holds a pickled module .* save model.state_dict"), (script, "TorchScript"),
    (save(lambda: {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}), "w is quantised"),
    (save(lambda: torch.ao.nn.quantized.dynamic.Linear(2, 2).state_dict()), "quantised"),
    (save({"w": torch.ones(2).to_sparse()}), "sparse"), (save([1]), "holds a list"), (save({"epoch": 3}), "no tensors")])
def test_files_that_hold_no_weights_are_called_what_they_are(tmp_path, write, said):
    write(tmp_path/"w.pth")
    with pytest.raises(RaptorError, match=f"w.pth .*({said})") as e: read_weights(tmp_path/"w.pth")
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_safetensors_under_another_name(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path/"pytorch_model.bin")
    assert read_weights(tmp_path/"pytorch_model.bin")[0]["w"].tolist() == [1, 1]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_another_user_are_not_called_damaged(tmp_path, monkeypatch, suffix):
    path = tmp_path/f"w{suffix}"
    torch.save({"w": torch.ones(2)}, path) if suffix == ".pth" else save_file({"w": torch.ones(2)}, path)
    def denied(*_): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("raptor.core.os.open", denied)
    with pytest.raises(RaptorError, match=f"w{suffix} is not readable"): read_weights(path)


@pytest.mark.parametrize("change, said", [
    (lambda t: t["norm.bias"].fill_(float("nan")), "norm.bias that are not finite"),
    (lambda t: t["blocks.1.attn.qkv.weight"][0].fill_(float("inf")), "qkv.weight that are not finite"),
    (lambda t: t.update({"norm.bias": t["norm.bias"].to(torch.int8)}), "norm.bias as torch.int8"),
    (lambda t: t.update({"cls_token": t["cls_token"].to(torch.float8_e4m3fn)}), "cls_token as torch.float8")])
def test_numbers_that_are_no_weights(tmp_path, change, said):
    state = {k: v.clone() for k, v in tiny("vit_base_patch16_224").model.state_dict().items()}
    change(state)
    torch.save(state, tmp_path/"w.pth")
    with pytest.raises(RaptorError, match=said):
        Backbone.create("vit_base_patch16_224", weights=tmp_path/"w.pth", img_size=(32, 48), **TINY)


def test_a_flipped_bit_in_saved_weights_is_noticed(tmp_path):
    path = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False).save(tmp_path/"w.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-10] ^= 1
    path.write_bytes(raw)
    with pytest.raises(RaptorError, match="w.safetensors .*differ from the digest"):
        Backbone.create("vit_nano_patch4_reg4_24", weights=path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    backbone = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False)
    with torch.no_grad(): backbone.model.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(RaptorError, match="w.safetensors is not written, because blocks.1.mlp.fc1.weight of .* is not finite"):
        backbone.save(tmp_path/"w.safetensors")
    assert not list(tmp_path.iterdir())


def test_weights_with_names_of_another_library_show_one(tmp_path):
    torch.save(torchvision.models.VisionTransformer(32, 16, 1, 2, 48, 96).state_dict(), tmp_path/"w.pth")
    with pytest.raises(RaptorError, match="lack cls_token, .*the file holds class_token, conv_proj.weight"):
        Backbone.create("vit_base_patch16_224", weights=tmp_path/"w.pth", img_size=32, **TINY)


def test_saved_weights_of_another_model_of_the_same_shapes(tmp_path):
    settings = dict(pretrained=False, img_size=32, **TINY)
    path = Backbone.create("vit_base_patch16_clip_quickgelu_224", **settings).save(tmp_path/"w.safetensors")
    with pytest.raises(RaptorError, match="saved from vit_base_patch16_clip_quickgelu_224"):
        Backbone.create("vit_base_patch16_clip_224", weights=path, **TINY)


@pytest.mark.parametrize("key, value", [
    *(("mean", v) for v in ("[1, 2]", "[NaN, 0, 0]", '"x"', "[" * 10**5, "null", "{}")), ("std", "[0.0, 1.0, 1.0]"),
    *(("img_size", v) for v in ("[100000, 100000]", "[0, 24]", "[24]", '["24", "24"]', "[16000, 16000]", "[24.0, 24.0]"))])
def test_notes_that_lie(tmp_path, key, value):
    path = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False).save(tmp_path/"w.safetensors")
    notes = dict(name="vit_nano_patch4_reg4_24", img_size="[24, 24]", grid="[6, 6]", mean="[0.5, 0.5, 0.5]", std="[1.0, 1.0, 1.0]")
    save_file(load_file(path), path, {**notes, key: value})
    with pytest.raises(RaptorError, match="do not fit") as e: Backbone.create("vit_nano_patch4_reg4_24", weights=path)
    assert len(str(e.value)) < 400


# --- hostile and broken files ---

class Payload:
    def __init__(self, target): self.target = str(target)
    def __reduce__(self): return exec, (f"open({self.target!r}, 'w').close()",)


READERS = [read_weights, load_linear_head, lambda p: Backbone.create("vit_nano_patch4_reg4_24", weights=p)]

@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_command_is_refused_and_does_not_run(tmp_path, reader, zipped):
    evil = {"weight": torch.ones(2), "bias": Payload(tmp_path/"ran")}
    torch.save(evil, tmp_path/"evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(RaptorError, match="evil.pth cannot be read: it asks for code to be run") as e:
        reader(tmp_path/"evil.pth")
    assert not (tmp_path/"ran").exists() and "\n" not in str(e.value)


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01", pickle.dumps({"w": 1}, 4), bytes(range(255, 0, -1))], ids=["a photograph", "another pickle", "noise"])
def test_what_is_no_checkpoint_is_not_accused_of_running_code(tmp_path, content):
    (tmp_path/"w.pth").write_bytes(content)
    with pytest.raises(RaptorError, match="w.pth cannot be read: it is no checkpoint that torch.save wrote, or a damaged one"): read_weights(tmp_path/"w.pth")


def lying(header):
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 64


@pytest.mark.parametrize("name, content", [
    ("sizes.safetensors", lying({"w": {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 4_000_000]}})),
    ("shape.safetensors", lying({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 64]}})),
    ("header.safetensors", struct.pack("<Q", 2**60) + b"{}"), ("text.safetensors", b"not at all"),
    ("nothing.safetensors", b""), ("list.safetensors", lying([])), ("none.safetensors", lying({})),
    ("empty.pth", b""), ("text.pth", b"<html>404</html>"),
])
def test_broken_files_are_named(tmp_path, name, content):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(RaptorError, match=name) as e: read_weights(tmp_path/name)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize("reader", READERS)
def test_a_compressed_archive_is_refused(tmp_path, reader):
    torch.save({"weight": torch.zeros(1000, 1000), "bias": torch.zeros(1000)}, tmp_path/"plain.pth")
    packed = zipfile.ZipFile(tmp_path/"bomb.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path/"plain.pth") as z, packed as bomb:
        for record in z.namelist(): bomb.writestr(record, z.read(record))
    assert (tmp_path/"bomb.pth").stat().st_size < 10_000
    with pytest.raises(RaptorError, match="bomb.pth cannot be read: .*compressed") as e: reader(tmp_path/"bomb.pth")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("reader", READERS)
def test_a_few_numbers_do_not_become_many(tmp_path, reader):
    torch.save({"weight": torch.zeros(1).half().expand(10**4, 10**3), "bias": torch.zeros(10**4)}, tmp_path/"wide.pth")
    with pytest.raises(RaptorError, match="wide.pth cannot be read: .*more numbers than the file"):
        reader(tmp_path/"wide.pth")


def test_a_dictionary_that_holds_itself(tmp_path):
    state = {"weight": torch.ones(2)}
    state["model"] = state
    torch.save(state, tmp_path/"loop.pth")
    assert read_weights(tmp_path/"loop.pth")[0]["weight"].tolist() == [1, 1]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_files_are_named(tmp_path, suffix, keep):
    path, state = tmp_path/f"w{suffix}", {"weight": torch.randn(100, 100)}
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * keep)])
    with pytest.raises(RaptorError, match=f"w{suffix} cannot be read"): read_weights(path)


def test_linear_head(tmp_path):
    torch.save({"weight": torch.arange(6.).view(2, 3), "bias": torch.tensor([5., 7.])}, tmp_path/"head.pth")
    weight, bias = load_linear_head(tmp_path/"head.pth")
    assert weight[1].tolist() == [3, 4, 5] and bias.tolist() == [5, 7]
    torch.save({"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}, tmp_path/"head.pth")
    with pytest.raises(RaptorError, match=r"holds bias \(3,\), weight \(2, 3\)"): load_linear_head(tmp_path/"head.pth")
    with pytest.raises(RaptorError, match="do not exist"): load_linear_head(tmp_path/"absent.pth")


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    def unreachable(*args, **kwargs): raise OSError("no route\nto host")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    with pytest.raises(RaptorError, match="could not be downloaded .*weights=PATH") as e:
        Backbone.create("vit_tiny_patch16_224")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("more", [{}, dict(pretrained=False)])
def test_a_model_of_a_hub_out_of_reach_is_one_sentence_once(monkeypatch, capsys, caplog, more):
    from huggingface_hub import logging as hub_logging
    def unreachable(*args, **kwargs):
        hub_logging.get_logger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("no route\nto host")
    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", unreachable)
    with pytest.raises(RaptorError, match="the model hf-hub:owner/name could not be downloaded .*; check") as e:
        Backbone.create("hf-hub:owner/name", **more)
    assert "\n" not in str(e.value) and "Retry" not in capsys.readouterr().err + caplog.text


def test_pretrained_weights_arrive_through_timm(monkeypatch):
    torch.manual_seed(3); state = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=28, **TINY).state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **kwargs: dict(state))
    backbone = Backbone.create("vit_small_patch14_reg4_dinov2", img_size=28, **TINY)
    assert torch.equal(backbone.model.blocks[2].attn.qkv.weight, state["blocks.2.attn.qkv.weight"])


@pytest.mark.parametrize("settings, said", [(dict(img_size=(30, 28)), "not a multiple of the patch size"),
    (dict(depht=3), "timm cannot create"), (dict(num_heads=5), "timm cannot create"),
    (dict(pos_embed="none of timm's"), r"\(AssertionError\); change")])
def test_settings_that_do_not_fit(settings, said):
    with pytest.raises(RaptorError, match=said):
        Backbone.create("vit_small_patch14_reg4_dinov2", pretrained=False, **{"img_size": 28, **TINY, **settings})
