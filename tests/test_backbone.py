"The backbone against timm's own forward pass, and hostile or broken weight files."
import json
import struct
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save_file

from raptor.core import RaptorError
from raptor.teacher.backbone import Backbone
from raptor.teacher.weights import load_linear_head, read_weights

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
    ("swin_tiny_patch4_window7_224", "hierarchical"), ("resnet18", "convolutional"), ("samvit_base_patch16", "windows"),
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


def test_pretrained_weights_arrive_through_timm(monkeypatch):
    torch.manual_seed(3); state = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=28, **TINY).state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **kwargs: dict(state))
    backbone = Backbone.create("vit_small_patch14_reg4_dinov2", img_size=28, **TINY)
    assert torch.equal(backbone.model.blocks[2].attn.qkv.weight, state["blocks.2.attn.qkv.weight"])


@pytest.mark.parametrize("settings, said", [(dict(img_size=(30, 28)), "not a multiple of the patch size"),
    (dict(depht=3), "timm cannot create"), (dict(num_heads=5), "timm cannot create")])
def test_settings_that_do_not_fit(settings, said):
    with pytest.raises(RaptorError, match=said):
        Backbone.create("vit_small_patch14_reg4_dinov2", pretrained=False, **{"img_size": 28, **TINY, **settings})
