"""The probe loop: what it reports, what it freezes, and what it refuses."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from raptor.teacher.backbone import Backbone
from raptor.core import RaptorError, seed_everything
from raptor.data.load import load_dataset
from raptor.model.as_backbone import RaptorBackbone
from raptor.model.raptor import Raptor
from raptor.phases import Phases
from raptor.probes.heads import probe_task
from raptor.probes.train import (
    FeatureTable, ProbeConfig, evaluate_heads, fidelity, load_head, ordered_batches, plain_attention, save_head,
    shuffled_batches, train_probe, train_teacher
)
from raptor.train.fit import FitConfig


class Lamps:
    "Images whose class is which quarter of the patches is bright; a model that passes patches through makes it linear."
    name, eval_crop, num_classes, fingerprint = "lamps", None, 4, "lamps"
    def __init__(self, n=256): self.n = n
    def __len__(self): return self.n
    def get_batch(self, indices):
        indices = torch.as_tensor(indices)
        target = indices % 4
        return {"image": nn.functional.one_hot(target, 4).float()[:, None, :].repeat(1, 5, 1), "target": target, "index": indices}


class PassThrough(nn.Module):
    dim, num_prefix, has_cls, grid, num_tokens, name, fingerprint = 4, 1, True, (2, 2), 5, "pass", "pass"
    def __init__(self):
        super().__init__()
        self.unused, self.calls = nn.Parameter(torch.zeros(1), requires_grad=False), 0
    def features(self, images): self.calls += 1; return images


CONFIG = ProbeConfig(epochs=4, batch_size=32, lr=0.1, warmup=2, log_every=4, augment=False)


def test_a_linear_problem_is_solved_and_reported():
    head, result, history = train_probe(PassThrough(), "classification", Lamps(), Lamps(64), CONFIG)
    assert result == {"metric": "top1", "best": 1.0, "best_epoch": result["best_epoch"], "last": 1.0, "epochs": 4}
    assert history.dropna(subset=["top1"]).epoch.tolist() == [1, 2, 3, 4]


def test_best_is_the_first_best_epoch_and_last_is_the_last():
    from raptor.probes.train import _best_and_last
    import pandas as pd
    history = pd.DataFrame({"step": [8, 16, 24], "epoch": [1, 2, 3], "top1": [0.5, 0.9, 0.7], "rmse": [0.5, 0.2, 0.3]})
    up, down = _best_and_last(history, probe_task("classification")), _best_and_last(history, probe_task("depth"))
    assert (up["best"], up["best_epoch"], up["last"]) == (0.9, 2, 0.7) and (down["best"], down["best_epoch"], down["last"]) == (0.2, 2, 0.3)


def test_features_are_computed_once_when_nothing_changes_and_every_epoch_when_it_does():
    once, every = PassThrough(), PassThrough()
    train_probe(once, "classification", Lamps(), Lamps(64), CONFIG)
    train_probe(every, "classification", Lamps(), Lamps(64), ProbeConfig(**{**CONFIG.__dict__, "augment": True}))
    assert once.calls == 2 and every.calls == 1 + 4 * 8


def test_the_table_and_the_images_give_the_same_head():
    a = train_probe(PassThrough(), "classification", Lamps(), Lamps(64), CONFIG)[0]
    b = train_probe(PassThrough(), "classification", Lamps(), Lamps(64), ProbeConfig(**{**CONFIG.__dict__, "table_gb": 0.0}))[0]
    torch.manual_seed(0)
    assert a.linear.weight.shape == b.linear.weight.shape
    table = FeatureTable(PassThrough(), Lamps())
    for x, y in zip(ordered_batches(table, 50), ordered_batches(Lamps(), 50)): assert torch.equal(x["features"], y["image"]) and torch.equal(x["target"], y["target"])


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
    data = load_dataset("digit_scenes", "train", "segmentation", limit=64, train_transform=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    # a Raptor's own parameters still ask for gradients: the loop must freeze what it is handed
    train_probe(model, "segmentation", data, data, ProbeConfig(epochs=1, batch_size=32, lr=0.1, augment=augment, log_every=1))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_official_weights_are_where_a_head_starts():
    weight, bias = torch.randn(4, 8), torch.randn(4)
    head, _, _ = train_probe(PassThrough(), "classification", Lamps(64), Lamps(64), ProbeConfig(epochs=1, batch_size=32, lr=1e-12, weight_decay=0.0, augment=False, log_every=1), official=(weight, bias))
    torch.testing.assert_close(head.linear.weight.data, weight)


def test_the_teacher_is_trained_and_frozen_again():
    seed_everything(0)
    backbone = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False, drop_path_rate=0.1)
    before = backbone.fingerprint
    data = load_dataset("digit_scenes", "train", "all", limit=64)
    heads, history = train_teacher(backbone, data, FitConfig(steps=3, batch_size=32, lr=1e-3, warmup=1, log_every=1), num_classes={**data.num_classes, "depth": None}, settings={"depth": {"bins": 8}})
    assert backbone.fingerprint != before and not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    assert {"classification", "segmentation", "depth", "loss"} <= set(history.columns)
    scores = evaluate_heads(backbone, heads, load_dataset("digit_scenes", "val", "all", limit=32))
    assert set(scores) == {"top1", "miou", "rmse", "rmse_pooled"} and 0 < scores["rmse"] < 10


def test_stochastic_depth_survives_a_restart(tmp_path):
    "Drop path draws random numbers in the forward pass: a run that is cut must draw the same ones."
    from raptor.core import RaptorError
    def start(): seed_everything(0); return Backbone.create("vit_nano_patch4_reg4_24", pretrained=False, drop_path_rate=0.3)
    data = load_dataset("digit_scenes", "train", "all", limit=64)
    config = FitConfig(steps=6, batch_size=16, lr=1e-3, warmup=1, log_every=1, checkpoint_every=2)
    arguments = dict(num_classes={"classification": 10})
    whole = start(); train_teacher(whole, data, config, **arguments)
    class Cut(Exception): pass
    import raptor.probes.train as probes
    def cut(batches, device):
        for i, batch in enumerate(batches):
            if i == 4: raise Cut
            yield batch
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        patch.setattr(probes, "prefetch", cut)
        train_teacher(start(), data, config, tmp_path, **arguments)
    again = start(); train_teacher(again, data, config, tmp_path, **arguments)
    assert whole.fingerprint == again.fingerprint


def test_plain_attention_is_switched_back():
    backbone = Backbone.create("vit_nano_patch4_reg4_24", pretrained=False)
    switches = lambda: {m.fused_attn for m in backbone.modules() if hasattr(m, "fused_attn")}
    with plain_attention(backbone, "bf16"): inside = switches()
    assert inside == ({False} if not torch.cuda.is_available() else {True}) and switches() == {True}
    with plain_attention(backbone, "no"): assert switches() == {True}


def test_fidelity_of_a_perfect_and_of_a_constant_model():
    truth = torch.randn(32, 4, 3, 5)
    source = SimpleNamespace(depth=3, batches=lambda n, start, end, device: iter(truth[:, start:end + 1].split(8)))
    class Oracle:
        position = 0
        def rollout(self, state, start, end):
            out = truth[Oracle.position:Oracle.position + len(state), start:end + 1]; Oracle.position += len(state); return out
    assert fidelity(Oracle(), source, device="cpu").compute() == pytest.approx(1)
    class Mean:
        def rollout(self, state, start, end): return truth.mean((0, 2), keepdim=True).expand(len(state), -1, 3, -1)[:, start:end + 1]
    assert fidelity(Mean(), source, device="cpu").per_layer() == pytest.approx([0, 0, 0], abs=1e-6)


def test_heads_on_disk(tmp_path):
    model = PassThrough()
    head = probe_task("depth").make_head(model, None, bins=7, max_depth=3.0)
    save_head(head, tmp_path/"h.safetensors", {"bins": 7, "max_depth": 3.0})
    again = load_head(model, "depth", tmp_path/"h.safetensors")
    assert torch.equal(again.linear.weight, head.linear.weight) and torch.equal(again.centres, head.centres)
    with pytest.raises(RaptorError, match="missing or damaged"): load_head(model, "depth", tmp_path/"none.safetensors")
    (tmp_path/"h.safetensors").write_bytes((tmp_path/"h.safetensors").read_bytes()[:40])
    with pytest.raises(RaptorError, match="missing or damaged"): load_head(model, "depth", tmp_path/"h.safetensors")


def test_too_little_data_and_wrong_tasks_are_refused():
    with pytest.raises(RaptorError, match="fewer than one batch"): train_probe(PassThrough(), "classification", Lamps(8), Lamps(8), CONFIG)
    with pytest.raises(RaptorError, match="did you mean 'depth'"): train_probe(PassThrough(), "dept", Lamps(), Lamps(), CONFIG)
    with pytest.raises(RaptorError, match="cannot be drawn"): list(shuffled_batches(Lamps(3), FitConfig(steps=1, batch_size=4)))
