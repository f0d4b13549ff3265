"Models in hand: those of other libraries against their own hidden states, those of timm against `Backbone.create`."
import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from torch import nn

from raptor.core import RaptorError
from raptor.model.as_backbone import RaptorBackbone
from raptor.model.raptor import Raptor
from raptor.phases import Phases
from raptor.teacher.backbone import Backbone
from raptor.teacher.foreign import timm_key

try: import transformers
except ImportError: transformers = None
needs_transformers = pytest.mark.skipif(transformers is None, reason="transformers is an extra")

SMALL = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8)
GATED = dict(num_register_tokens=2, use_gated_mlp=True, hidden_act="silu", intermediate_size=96, mlp_bias=False)
CLASSES = { # name -> (class, configuration, timm's name, prefix tokens, takes images of other sizes)
    "ViT": ("ViT", dict(intermediate_size=100), "vit_base_patch8_224", 1, True),
    "ViT, no bias, relu": ("ViT", dict(qkv_bias=False, hidden_act="relu"), "vit_base_patch8_224", 1, True),
    "DINOv2": ("Dinov2", dict(layer_norm_eps=1e-5), "vit_base_patch14_dinov2", 1, True),
    "DINOv2 giant": ("Dinov2", dict(use_swiglu_ffn=True), "vit_giant_patch14_dinov2", 1, True),
    "registers": ("Dinov2WithRegisters", {}, "vit_base_patch14_reg4_dinov2", 5, True),
    "no registers": ("Dinov2WithRegisters", dict(num_register_tokens=0), "vit_base_patch14_reg4_dinov2", 1, True),
    "DINOv3": ("DINOv3ViT", dict(num_register_tokens=4, rope_theta=50.), "vit_base_patch16_dinov3_qkvb", 5, True),
    "DINOv3, no bias": ("DINOv3ViT", dict(query_bias=False, value_bias=False), "vit_base_patch16_dinov3", 1, True),
    "DINOv3, SwiGLU": ("DINOv3ViT", GATED, "vit_huge_plus_patch16_dinov3_qkvb", 3, True),
    "CLIP": ("CLIPVision", {}, "vit_base_patch16_clip_quickgelu_224", 1, True),
    "LAION's CLIP": ("CLIPVision", dict(hidden_act="gelu", patch_size=16), "vit_xsmall_patch16_clip_224", 1, True),
    "SigLIP": ("SiglipVision", {}, "vit_base_patch32_siglip_256", 0, True),
    "torchvision": (None, {}, "vit_base_patch8_224", 1, False)}
HF = [name for name in CLASSES if name != "torchvision"]
every_class = pytest.mark.parametrize("name", [pytest.param(n, marks=needs_transformers if n in HF else ()) for n in CLASSES])


def drawn(model, seed=0):
    "Weights that are large enough to see every one of them."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(std=0.2, generator=generator)
    return model

def made(name, **more):
    kind, settings, *_ = CLASSES[name]
    if kind is None: return drawn(torchvision.models.VisionTransformer(32, 8, 3, 4, 48, 100, dropout=0.1))
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **settings, **more})
    return drawn(getattr(transformers, f"{kind}Model")(config))

def pixels(*size, seed=1): return torch.randn(2, 3, *(size or (32, 32)), generator=torch.Generator().manual_seed(seed))

@torch.no_grad()
def theirs(model, images, **more):
    "States 0..L and the tokens after the final norm, as the library gives them."
    model.eval()
    if isinstance(model, torchvision.models.VisionTransformer):
        states, final = [], []
        layers = [*model.encoder.layers]
        hooks = [layers[0].register_forward_pre_hook(lambda m, args: states.append(args[0])),
                 *(layer.register_forward_hook(lambda m, args, out: states.append(out)) for layer in layers),
                 model.encoder.register_forward_hook(lambda m, args, out: final.append(out))]
        model(images)
        for hook in hooks: hook.remove()
        return states, final[0]
    out = model(images, output_hidden_states=True, **more)
    clip = hasattr(model, "pre_layrnorm") # CLIP's last state is given without a norm, which it applies to the class token
    return out.hidden_states, model.post_layernorm(out.last_hidden_state) if clip else out.last_hidden_state

def assert_same(backbone, states, final, images, rtol=1e-5):
    ours = backbone.trajectory(images)
    assert len(states) == ours.shape[1] == backbone.depth + 1
    for i, state in enumerate(states): torch.testing.assert_close(ours[:, i], state, rtol=rtol, atol=rtol)
    torch.testing.assert_close(backbone.features(images), final, rtol=rtol, atol=rtol)


# --- against the libraries themselves ---

@every_class
def test_all_states_are_the_librarys_own(name):
    model, images = made(name).train(), pixels()
    backbone = Backbone(model)
    assert model.training and all(p.requires_grad for p in model.parameters()) # it is as it was
    assert_same(backbone, *theirs(model, images), images)
    _, _, timms, prefix, _ = CLASSES[name]
    assert (backbone.name, backbone.num_prefix, backbone.source) == (timms, prefix, "given")
    assert (backbone.depth, backbone.dim, backbone.num_heads, backbone.img_size) == (3, 48, 4, (32, 32))


@every_class
def test_it_is_a_model_of_timm_that_is_saved_and_created_again(name, tmp_path):
    backbone, images = Backbone(made(name)), pixels()
    path, settings = backbone.save(tmp_path/"w.safetensors"), backbone.identity()["timm"]
    again = Backbone.create(backbone.name, weights=path, **settings)
    assert again.fingerprint == backbone.fingerprint
    assert torch.equal(again.trajectory(images), backbone.trajectory(images))
    assert torch.equal(Backbone(backbone.model).features(images), backbone.features(images))
    assert Backbone(backbone.model, backbone.name).fingerprint == backbone.fingerprint # also where settings are found


@needs_transformers
@pytest.mark.parametrize("size", [(48, 48), (32, 64)])
@pytest.mark.parametrize("name", [n for n in HF if n != "LAION's CLIP"])
def test_other_sizes_follow_the_librarys_own_rule(name, size):
    model, images, kind = made(name), pixels(*size), CLASSES[name][0]
    more = {} if "DINO" in kind.upper() else dict(interpolate_pos_encoding=True)
    assert_same(Backbone(model, img_size=size), *theirs(model, images, **more), images)


def test_torchvision_at_another_size_is_resampled_as_timm_does():
    backbone = Backbone(made("torchvision"), img_size=(48, 32))
    own = Backbone(made("torchvision"))
    own.model.set_input_size((48, 32))
    assert backbone.img_size == (48, 32) and torch.equal(backbone.model.pos_embed, own.model.pos_embed)


@needs_transformers
def test_the_official_sizes_need_no_settings_and_have_the_fingerprint_of_timms(tmp_path):
    sizes = dict(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, layer_norm_eps=1e-6)
    model = drawn(transformers.ViTModel(transformers.ViTConfig(**sizes, patch_size=16, image_size=384)))
    backbone = Backbone(model)
    assert (backbone.name, backbone.settings) == ("vit_tiny_patch16_384", {})
    timms = timm.create_model("vit_tiny_patch16_384", num_classes=0)
    timms.load_state_dict(backbone.model.state_dict())
    assert Backbone(timms).fingerprint == backbone.fingerprint
    torch.save(timms.state_dict(), tmp_path/"w.pth")
    assert Backbone.create("vit_tiny_patch16_384", weights=tmp_path/"w.pth").fingerprint == backbone.fingerprint


@needs_transformers
@pytest.mark.parametrize("name", ["DINOv2", "DINOv3", "CLIP"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_type_of_the_weights_is_kept(name, dtype):
    model, images = made(name).to(dtype), pixels()
    backbone = Backbone(model)
    assert {p.dtype for p in backbone.parameters()} == {dtype}
    if dtype == torch.float64: assert_same(backbone, *theirs(model, images.double()), images)


@needs_transformers
def test_siglips_pooling_comes_along():
    model, images = made("SigLIP"), pixels()
    backbone = Backbone(model)
    with torch.no_grad(): pooled = model.eval()(images).pooler_output
    torch.testing.assert_close(backbone.model.forward_head(backbone(images)), pooled, rtol=1e-5, atol=1e-5)
    headless = made("SigLIP", vision_use_head=False)
    assert_same(Backbone(headless), *theirs(headless, images), images)


@needs_transformers
def test_the_vision_transformer_inside_a_larger_model_is_found():
    config = transformers.ViTConfig(**SMALL, num_labels=5)
    classifier = drawn(transformers.ViTForImageClassification(config))
    text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    clip = drawn(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=SMALL)))
    images = pixels()
    assert_same(Backbone(classifier), *theirs(classifier.vit, images), images)
    assert_same(Backbone(nn.DataParallel(clip)), *theirs(clip.vision_model, images), images)
    with pytest.raises(RaptorError, match="holds several vision transformers; give Backbone one of them"):
        Backbone(nn.ModuleList([classifier, clip]))


@pytest.mark.parametrize("theirs, timms", [ # of transformers 4
    ("embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight"),
    ("encoder.layer.11.attention.attention.key.weight", "blocks.11.attn.k.weight"),
    ("encoder.layer.0.attention.output.dense.bias", "blocks.0.attn.proj.bias"),
    ("encoder.layer.0.intermediate.dense.weight", "blocks.0.mlp.fc1.weight"),
    ("encoder.layer.0.output.dense.weight", "blocks.0.mlp.fc2.weight"),
    ("encoder.layer.0.layernorm_before.weight", "blocks.0.norm1.weight"), ("layernorm.bias", "norm.bias"),
    ("encoder.layer.0.mlp.weights_in.weight", "blocks.0.mlp.fc1.weight"),
    ("encoder.layer.0.mlp.weights_out.bias", "blocks.0.mlp.fc2.bias"),
    ("encoder.layer.0.layer_scale2.lambda1", "blocks.0.ls2.gamma"),
    ("layer.5.attention.o_proj.weight", "blocks.5.attn.proj.weight"), # DINOv3
    ("layer.5.mlp.up_proj.weight", "blocks.5.mlp.fc1.weight"), ("embeddings.patch_embeddings.bias", "patch_embed.proj.bias"),
    ("vision_model.embeddings.class_embedding", "cls_token"), ("vision_model.pre_layrnorm.weight", "norm_pre.weight"),
    ("vision_model.embeddings.position_embedding.weight", "pos_embed"), ("vision_model.post_layernorm.bias", "norm.bias"),
    ("vision_model.encoder.layers.2.self_attn.out_proj.weight", "blocks.2.attn.proj.weight"),
    ("vision_model.embeddings.position_ids", None), ("embeddings.mask_token", None), ("pooler.dense.bias", None)])
def test_names_of_an_earlier_transformers(theirs, timms): assert timm_key(theirs) == timms


# --- how images are prepared ---

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

@needs_transformers
@pytest.mark.parametrize("config, given, expected", [
    ({}, {}, ((0.5,) * 3, (0.5,) * 3)), # of vit_base_patch8_224
    (dict(_name_or_path="facebook/dino-vits8"), {}, IMAGENET),
    (dict(_name_or_path="my/own"), {}, ((0.5,) * 3, (0.5,) * 3)),
    (dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4] * 3), {}, ((0.1, 0.2, 0.3), (0.4,) * 3)),
    (dict(_name_or_path="facebook/dino-vits8"), dict(mean=0.25, std=(1, 2, 3)), ((0.25,) * 3, (1, 2, 3)))])
def test_normalisation(config, given, expected):
    model = made("ViT")
    for key, value in config.items(): setattr(model.config, key, value)
    backbone = Backbone(model, **given)
    assert (backbone.mean, backbone.std) == expected


def test_torchvisions_normalisation_is_imagenets():
    backbone = Backbone(made("torchvision"))
    assert (backbone.mean, backbone.std) == IMAGENET
    assert Backbone(made("torchvision"), mean=0.5).mean == (0.5,) * 3


# --- bad input ---

class Adds(torchvision.models.VisionTransformer):
    def _process_input(self, x): return super()._process_input(x) + 1

def adapter():
    model = made("ViT")
    model.layers[0].attention.q_proj.lora_A = nn.Linear(48, 2, bias=False)
    return model

def quantised():
    model = made("torchvision")
    model.encoder.layers[1].mlp[0].weight = nn.Parameter(torch.zeros(100, 48, dtype=torch.int8), requires_grad=False)
    return model

def with_key_bias(): return made("DINOv3", key_bias=True)
def on_meta():
    with torch.device("meta"): return torchvision.models.VisionTransformer(32, 8, 1, 4, 48, 96)

@pytest.mark.parametrize("model, said", [
    (lambda: Adds(32, 8, 2, 4, 48, 96), "Adds cannot be converted .*: its states differ .* take what it adds out"),
    (quantised, "quantised to torch.int8"), (on_meta, "not loaded yet"),
    (lambda: torchvision.models.VisionTransformer(32, 8, 0, 4, 48, 96), "it has no layers"),
    (torchvision.models.resnet18, "it has no attention"),
    (lambda: torchvision.models.swin_t(), "of torchvision, only VisionTransformer can be converted"),
    pytest.param(adapter, "no place for its layers.0.attention.q_proj.lora_A", marks=needs_transformers),
    pytest.param(with_key_bias, "the keys of its attention have a bias", marks=needs_transformers),
    pytest.param(lambda: made("ViT", hidden_act="gelu_10"), "no model of timm computes the same", marks=needs_transformers),
    pytest.param(lambda: transformers.BeitModel(transformers.BeitConfig(**SMALL, intermediate_size=48)),
                 r"\(BeitModel\) cannot be a backbone: of transformers, only ViTModel, .*SiglipVisionModel can",
                 marks=needs_transformers)])
def test_models_that_cannot_be_converted(model, said):
    with pytest.raises(RaptorError, match=said) as e: Backbone(model())
    assert str(e.value).endswith(".") and "\n" not in str(e.value)


@pytest.mark.parametrize("given, said", [
    (dict(name="vit_base_patch16_dinov3"), "vit_base_patch16_dinov3 computes the same"),
    (dict(name="facebook/dinov2-small"), "timm calls it vit_small_patch14_dinov2"), (dict(name="vit_bas_patch8_224"), "did you mean"),
    (dict(img_size=36), "not a multiple of the patch size"), (dict(img_size="32"), "must be one or two whole numbers"),
    (dict(mean=(1, 2)), "must be three finite numbers")])
def test_what_cannot_be_asked_of_a_converted_model(given, said):
    with pytest.raises(RaptorError, match=said): Backbone(made("torchvision"), **given)


def test_transformers_is_not_imported_for_other_models():
    code = ("import sys, torchvision, raptor\n"
            "raptor.Backbone(torchvision.models.VisionTransformer(32, 8, 1, 2, 8, 8))\n"
            "assert 'transformers' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


# --- models of timm ---

TINY = dict(depth=3, embed_dim=48, num_heads=2)

@pytest.mark.parametrize("name, settings", [
    ("vit_tiny_patch16_224", TINY), ("vit_tiny_patch16_224.augreg_in21k", dict(TINY, patch_size=8, mlp_ratio=3.5)),
    ("vit_small_patch14_reg4_dinov2", dict(TINY, reg_tokens=2)), ("vit_small_patch16_dinov3", dict(TINY, qkv_bias=True)),
    ("vit_giant_patch14_dinov2", TINY), ("vit_base_patch16_clip_224", dict(TINY, act_layer="quick_gelu")),
    ("eva02_tiny_patch14_224", dict(depth=2)), ("vit_nano_patch4_reg4_24", {})])
def test_name_and_settings_of_a_timm_model_are_found(name, settings):
    size = 56 if "14" in name else 48
    model = timm.create_model(name, img_size=size, **settings)
    ours, backbone = Backbone.create(name, pretrained=False, img_size=size, **settings), Backbone(model)
    ours.model.load_state_dict(model.state_dict())
    assert ours.freeze().fingerprint == backbone.fingerprint
    assert backbone.name.split(".")[0] == name.split(".")[0] and backbone.settings == settings
    assert (backbone.mean, backbone.std) == (ours.mean, ours.std)


def test_a_timm_model_in_hand_is_left_as_it_is_or_taken_at_the_callers_word():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY).train()
    model.blocks[0].norm1.weight.grad = torch.ones(48)
    before, backbone = model.state_dict(), Backbone(model, img_size=(32, 64), mean=0.1)
    assert model.training and all(p.requires_grad for p in model.parameters()) and model.patch_embed.img_size == (32, 32)
    assert backbone.img_size == (32, 64) and backbone.model is not model and model.pretrained_cfg["mean"] != (0.1,) * 3
    with torch.no_grad(): model.blocks[0].norm1.weight += 1
    assert backbone.fingerprint != Backbone(model, img_size=(32, 64)).fingerprint
    taken = Backbone(model, copy=False)
    assert taken.model is model and not model.training and not any(p.requires_grad for p in model.parameters())
    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize("size", [(32, 64), (64, 64)])
@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_small_patch16_dinov3"])
def test_another_size_is_that_of_create(name, size, tmp_path):
    backbone = Backbone(drawn(timm.create_model(name, img_size=32, **TINY)))
    path = backbone.save(tmp_path/"w.safetensors")
    other = Backbone.create(name, weights=path, img_size=size, **TINY)
    assert Backbone(backbone.model, img_size=size).fingerprint == other.fingerprint


def test_a_model_without_a_name():
    model = timm.models.VisionTransformer(img_size=32, **TINY)
    with pytest.raises(RaptorError, match=r"has no name; give one: Backbone\(model, name\)"): Backbone(model)
    assert Backbone(model, "mine").identity()["timm"] == {}


# --- timm's interface, for teacher and student ---

@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224"])
@pytest.mark.parametrize("given", [{}, dict(indices=2), dict(indices=[2, 0], norm=True), dict(indices=[-3], stop_early=True),
                                   dict(indices=(1,), output_fmt="NLC", return_prefix_tokens=True)])
def test_the_interface_is_timms(name, given):
    size = 28 if "14" in name else 32
    model = drawn(timm.create_model(name, img_size=size, **TINY)).eval()
    backbone, images = Backbone(model), pixels(size, size)
    with torch.no_grad(): (final, maps), (ours, our_maps) = (m.forward_intermediates(images, **given) for m in (model, backbone))
    flat = lambda maps: [t for m in maps for t in (m if isinstance(m, tuple) else (m,))]
    if backbone.num_prefix or not given.get("return_prefix_tokens"):
        assert [t.shape for t in flat(maps)] == [t.shape for t in flat(our_maps)]
        assert all(torch.equal(a, b) for a, b in zip(flat(maps), flat(our_maps)))
    assert torch.equal(final, ours)
    assert torch.equal(backbone.forward_features(images), model.forward_features(images))
    assert [{k: i[k] for k in ("num_chs", "reduction")} for i in model.feature_info] == [
        {k: i[k] for k in ("num_chs", "reduction")} for i in backbone.feature_info]
    assert backbone.get_submodule(backbone.feature_info[1]["module"]) is backbone.model.blocks[1]
    if hasattr(model, "get_intermediate_layers"):
        for n in (1, 2, [0, 2]):
            a, b = (m.get_intermediate_layers(images, n, reshape=True, norm=True) for m in (model, backbone))
            assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def test_a_norm_after_pooling_is_applied_to_every_token():
    model = drawn(timm.create_model("vit_small_patch16_224", img_size=32, global_pool="avg", **TINY)).eval()
    backbone, images = Backbone(model, settings=dict(global_pool="avg", **TINY)), pixels()
    tokens = model.forward_features(images) # timm's: not normalised
    assert torch.equal(backbone.forward_features(images), model.fc_norm(tokens))
    assert torch.equal(backbone.forward_intermediates(images, 1, norm=True)[1][0].flatten(2).mT, model.fc_norm(tokens)[:, 1:])


def test_teacher_and_student_are_exchanged_in_a_line():
    teacher = Backbone(drawn(timm.create_model("vit_nano_patch4_reg4_24")))
    student = RaptorBackbone(teacher, Raptor.create(Phases((3, 6)), teacher.dim, teacher.num_heads))
    images = pixels(24, 24)
    def use(model):
        final, maps = model.forward_intermediates(images, [1, 5])
        layers = model.get_intermediate_layers(images, 2, return_prefix_tokens=True)
        numbers = model.num_features, model.embed_dim, model.num_prefix_tokens, len(model.feature_info)
        assert torch.equal(model(images), final) and torch.equal(model.forward_features(images), final)
        assert all(isinstance(model.get_submodule(i["module"]), nn.Module) for i in model.feature_info)
        return numbers, [t.shape for t in (final, *maps, *(t for pair in layers for t in pair))], model.cls(final).shape
    with torch.no_grad(): assert use(teacher) == use(student)
    assert [i["module"] for i in student.feature_info] == [f"raptor.blocks.{j}" for j in (0, 0, 0, 1, 1, 1)]
    assert SimpleNamespace(**student.feature_info[0]).reduction == 4
