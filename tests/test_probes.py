"""The training loop of the probes: what it reports, what it freezes, and the errors it raises."""
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

import raptor.probes.train as probes
from raptor.core import RaptorError, seed_everything
from raptor.data.load import load_dataset
from raptor.model.as_backbone import RaptorBackbone
from raptor.model.raptor import Raptor
from raptor.phases import Phases
from raptor.probes.heads import probe_task
from raptor.probes.train import (
    FeatureTable, ProbeConfig, best_and_last, evaluate_heads, fidelity, load_head, ordered_batches, plain_attention,
    save_head, train_probe, train_teacher
)
from raptor.teacher.backbone import Backbone
from raptor.train.fit import FitConfig, learning_rate


class Lamps:
    "Images whose class is which quarter of the patches is bright; a model that passes patches through makes it linear."
    name, eval_crop, num_classes, fingerprint = "lamps", None, 4, "lamps"
    def __init__(self, n=256): self.n = n
    def __len__(self): return self.n
    def get_batch(self, indices):
        indices = torch.as_tensor(indices)
        image = nn.functional.one_hot(indices % 4, 4).float()[:, None, :].repeat(1, 5, 1)
        return {"image": image, "target": indices % 4, "index": indices}


class PassThrough(nn.Module):
    dim, num_prefix, has_cls, grid, num_tokens, name, fingerprint = 4, 1, True, (2, 2), 5, "pass", "pass"
    def __init__(self):
        super().__init__()
        self.unused, self.calls = nn.Parameter(torch.zeros(1), requires_grad=False), 0
    def features(self, images):
        self.calls += 1
        return images


CONFIG = ProbeConfig(epochs=4, batch_size=32, lr=0.1, warmup=2, log_every=4, augment=False)


def test_a_linear_problem_is_solved_and_reported():
    head, result, history = train_probe(PassThrough(), "classification", Lamps(), Lamps(64), CONFIG)
    assert result == {"metric": "top1", "best": 1.0, "best_epoch": result["best_epoch"], "last": 1.0, "epochs": 4}
    assert history.dropna(subset=["top1"]).epoch.tolist() == [0, 1, 2, 3, 4]


ROWS = {"epoch": [0, 1, 2, None, 3, 4], "top1": [0.1, 0.5, 0.9, None, 0.9, 0.7], "rmse": [0.9, 0.5, 0.2, None, 0.2, 0.3],
        "rmse_per_image": [0.8, 0.1, 0.3, None, 0.4, 0.2]}

@pytest.mark.parametrize("task,changes,expected", [
    ("classification", {}, dict(best=0.9, best_epoch=2, last=0.7, epochs=4)),
    ("depth", {}, dict(best=0.2, best_epoch=2, last=0.3, epochs=4, best_rmse_per_image=0.3, last_rmse_per_image=0.2)),
    ("classification", {"top1": [0.95, 0.5, 0.9, None, 0.9, 0.7]}, dict(best=0.95, best_epoch=0, last=0.7, epochs=4)),
])
def test_best_is_the_first_best_epoch_from_0_on_and_last_is_the_last(task, changes, expected):
    spec = probe_task(task)
    assert best_and_last(pd.DataFrame(ROWS | changes), spec) == {"metric": spec.metric_name, **expected}


def test_features_are_computed_once_when_nothing_changes_and_every_epoch_when_it_does():
    once, every = PassThrough(), PassThrough()
    train_probe(once, "classification", Lamps(), Lamps(64), CONFIG)
    train_probe(every, "classification", Lamps(), Lamps(64), replace(CONFIG, augment=True))
    assert once.calls == 2 and every.calls == 1 + 4 * 8


def test_the_table_and_the_images_give_the_same_head():
    def weight(config):
        seed_everything(0)
        return train_probe(PassThrough(), "classification", Lamps(), Lamps(64), config)[0].linear.weight
    assert torch.equal(weight(CONFIG), weight(replace(CONFIG, table_gb=0.0)))
    table = FeatureTable(PassThrough(), Lamps())
    for x, y in zip(ordered_batches(table, 50), ordered_batches(Lamps(), 50), strict=True):
        assert torch.equal(x["features"], y["image"]) and torch.equal(x["target"], y["target"])


def test_same_seed_same_head():
    def run():
        seed_everything(3)
        return train_probe(PassThrough(), "classification", Lamps(), Lamps(64), CONFIG)[0].linear.weight
    assert torch.equal(run(), run())


@pytest.mark.parametrize("augment", [False, True]) # features computed once, and in every step
def test_a_probe_leaves_the_backbone_alone(augment):
    seed_everything(0)
    backbone = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False)
    model = RaptorBackbone(backbone, Raptor.create(Phases((2, 6)), backbone.dim, backbone.num_heads))
    data = load_dataset("digit_scenes", "train", "segmentation", limit=64, augment=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    # the parameters of a new Raptor require gradients: the loop must freeze the model that it is given
    config = ProbeConfig(epochs=1, batch_size=32, lr=0.1, augment=augment, log_every=1)
    train_probe(model, "segmentation", data, data, config)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_official_weights_are_where_a_head_starts():
    weight, bias = torch.randn(4, 8), torch.randn(4)
    config = ProbeConfig(epochs=1, batch_size=32, lr=1e-12, weight_decay=0.0, augment=False, log_every=1)
    head, _, _ = train_probe(PassThrough(), "classification", Lamps(64), Lamps(64), config, official=(weight, bias))
    torch.testing.assert_close(head.linear.weight.data, weight)

@pytest.mark.parametrize("folder", [False, True])
def test_an_official_head_is_scored_before_the_first_step_and_can_be_the_best(folder, tmp_path):
    "A head that is right from its start, and a learning rate that ruins it in its first epoch."
    weight = torch.cat([torch.zeros(4, 4), torch.eye(4)], 1)
    config = ProbeConfig(epochs=1, batch_size=32, lr=1e3, warmup=0, clip=None, augment=False, log_every=1)
    class Mixed(Lamps): # the classes of the first images are wrong in training
        def get_batch(self, indices): return {**(b := super().get_batch(indices)), "target": (b["target"] + 1) % 4}
    for _ in range(1 + folder): # the second time, the finished run is only read
        _, result, history = train_probe(PassThrough(), "classification", Mixed(), Lamps(64), config,
                                         tmp_path if folder else None, official=(weight, torch.zeros(4)))
        assert (result["best"], result["best_epoch"], result["epochs"]) == (1.0, 0, 1) and result["last"] < 1
        assert history[["step", "epoch"]].iloc[0].tolist() == [0, 0] and history["step"].is_unique


def test_the_learning_rate_of_the_published_probes():
    "100 steps from 1 % of 1e-4, then half a cosine to 1 %: step / warm-up, so that the first step has 1 % itself."
    config = ProbeConfig(epochs=15, batch_size=512, lr=1e-4).for_data(512*300)
    rates = [learning_rate(s, config) for s in (0, 1, 50, 99, 100, config.steps)]
    assert rates == pytest.approx([1e-6, 1.99e-6, 50.5e-6, 99.01e-6, 1e-4, 1e-6], rel=1e-9)
    assert learning_rate(0, replace(config, warmup_start=0.0)) == pytest.approx(1e-6) # (step + 1) / warm-up, as in stage 1


def test_the_teacher_is_trained_and_frozen_again():
    seed_everything(0)
    backbone = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False, drop_path_rate=0.1)
    before = backbone.fingerprint
    data = load_dataset("digit_scenes", "train", "all", limit=64)
    config = FitConfig(steps=3, batch_size=32, lr=1e-3, warmup=1, log_every=1)
    classes = {**data.num_classes, "depth": None}
    heads, history = train_teacher(backbone, data, config, num_classes=classes, settings={"depth": {"bins": 8}})
    assert backbone.fingerprint != before and not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())
    assert {"classification", "segmentation", "depth", "loss"} <= set(history.columns)
    scores = evaluate_heads(backbone, heads, load_dataset("digit_scenes", "val", "all", limit=32))
    assert set(scores) == {"top1", "miou", "rmse", "rmse_per_image"} and 0 < scores["rmse"] < 10


def test_stochastic_depth_survives_a_restart(tmp_path):
    "Drop path draws random numbers in the forward pass: a run that is interrupted must draw the same ones."
    def start(rate=0.3):
        seed_everything(0)
        return Backbone.create("vit_nano_patch4_reg4_24", pretrained=False, drop_path_rate=rate)
    data = load_dataset("digit_scenes", "train", "all", limit=64)
    config = FitConfig(steps=6, batch_size=16, lr=1e-3, warmup=1, log_every=1, checkpoint_every=2)
    arguments = dict(num_classes={"classification": 10})
    whole = start()
    train_teacher(whole, data, config, **arguments)
    class Cut(Exception): pass
    def cut(batches, device):
        for i, batch in enumerate(batches):
            if i == 4: raise Cut
            yield batch
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        patch.setattr(probes, "prefetch", cut)
        train_teacher(start(), data, config, tmp_path, **arguments)
    again = start()
    train_teacher(again, data, config, tmp_path, **arguments)
    assert whole.fingerprint == again.fingerprint
    with pytest.raises(RaptorError, match="belongs to another run"): train_teacher(start(0.1), data, config, tmp_path, **arguments)


def test_plain_attention_is_switched_back():
    backbone = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False)
    def switches(): return {m.fused_attn for m in backbone.modules() if hasattr(m, "fused_attn")}
    with plain_attention(backbone, "bf16"): inside = switches()
    assert inside == ({False} if not torch.cuda.is_available() else {True}) and switches() == {True}
    with plain_attention(backbone, "no"): assert switches() == {True}


def test_fidelity_of_a_perfect_and_of_a_constant_model():
    truth = torch.randn(32, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    source = SimpleNamespace(depth=3, batches=lambda n, start, end, device: iter(truth[:, start:end + 1].split(8)))
    batches = iter(truth.split(8))
    oracle = SimpleNamespace(rollout=lambda state, start, end: next(batches)[:, start:end + 1])
    mean = truth.mean((0, 2), keepdim=True).expand(8, -1, 3, -1)
    constant = SimpleNamespace(rollout=lambda state, start, end: mean[:, start:end + 1])
    assert fidelity(oracle, source, device="cpu").compute() == pytest.approx(1)
    meter = fidelity(constant, source, device="cpu")
    assert meter.per_layer() == pytest.approx([0, 0, 0], abs=1e-6)
    seen, y = mean[:1].expand_as(truth).clone(), truth
    assert meter.pooled() == pytest.approx(1 - ((seen - y).square().sum()/(y - y.mean()).square().sum()).item(), abs=1e-5)


def test_heads_on_disk(tmp_path):
    path, settings = tmp_path/"h.safetensors", {"bins": 7, "max_depth": 3.0}
    head = probe_task("depth").make_head(PassThrough(), None, **settings)
    save_head(head, path, settings)
    again = load_head(PassThrough(), "depth", path)
    assert torch.equal(again.linear.weight, head.linear.weight) and torch.equal(again.centres, head.centres)
    before = path.read_bytes()
    save_head(head, path, settings)
    assert path.read_bytes() == before
    path.write_bytes(before[:40])
    with pytest.raises(RaptorError, match="damaged"): load_head(PassThrough(), "depth", path)


def test_an_unknown_task_is_refused():
    with pytest.raises(RaptorError, match="did you mean 'depth'"):
        train_probe(PassThrough(), "dept", Lamps(), Lamps(), CONFIG)
