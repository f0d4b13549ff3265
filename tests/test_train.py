"""Losses of known value and sign, schedules, the loop against plain torch, and runs that are killed and resumed."""
import json, os, signal, subprocess, sys, textwrap, time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raptor.core import RaptorError, seed_everything, seed_for
from raptor.model.block import RecurrentBlock
from raptor.model.raptor import Raptor
from raptor.model.recurrence import walk
from raptor.phases import Phases
from raptor.train.checkpoint import load_checkpoint, save_checkpoint
from raptor.train.fit import FitConfig, Trainer, fit, learning_rate
from raptor.train.losses import StateLoss, ar_loss, tf_loss
from raptor.train.stages import SpanObjective, TrainConfig, benchmark_step, train_raptor, train_span


class Rotating:
    "Six layers that turn every token by the same angle in the plane of its first two coordinates."
    depth, num_prefix, has_cls, num_images, fingerprint = 6, 1, True, 64, "rotating"

    def batches(self, batch_size, *, start=0, end=None, seed=None, first_step=0, steps=None, **_):
        angles = torch.arange(self.depth + 1) * 0.3
        cos, sin = angles.cos(), angles.sin()
        turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
        for step in range(first_step, steps):
            x = torch.randn(batch_size, 5, 8, generator=torch.Generator().manual_seed(seed_for(seed, step)))
            plane = torch.einsum("lij,bnj->blni", turn, x[..., :2])
            states = torch.cat([plane, x[:, None, :, 2:].expand(-1, self.depth + 1, -1, -1)], -1)
            yield states[:, start:(self.depth if end is None else end) + 1]


def new_block(seed=1): seed_everything(seed); return RecurrentBlock(8, 2, layer_scale=0.1)
def weights(m): return {k: v.clone() for k, v in m.state_dict().items()}
def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)
SHORT = TrainConfig(steps=30, batch_size=16, lr=1e-2, warmup=3, log_every=10, checkpoint_every=10)


# losses ---------------------------------------------------------------------------------------------------------------
def test_cosine_is_a_distance_not_a_similarity():
    x = torch.randn(4, 3, 6, 8)
    near, far = StateLoss("cosine")(x + 0.1 * torch.randn_like(x), x), StateLoss("cosine")(-x, x)
    assert 0 < near < 0.1 and far == pytest.approx(2, abs=1e-6)
    assert StateLoss("mse+cosine")(-x, x) == pytest.approx(0.5 * 4 * float(x.square().mean()) + 1, rel=1e-5)


def test_descending_the_cosine_loss_aligns_the_states():
    x, y = torch.randn(1, 1, 4, 8), nn.Parameter(torch.randn(1, 1, 4, 8))
    before = torch.cosine_similarity(y, x, dim=-1).mean()
    optimizer = torch.optim.SGD([y], lr=5.0)
    for _ in range(50): optimizer.zero_grad(); StateLoss("cosine")(y, x).backward(); optimizer.step()
    assert torch.cosine_similarity(y, x, dim=-1).mean() > max(0.95, before)


@pytest.mark.parametrize("prefix,has_cls,kind,weight", [
    (5, True, 0, 0.34), (5, True, 2, 0.33), (5, True, 8, 0.33), (1, True, 0, 0.34 / 0.67),
    (0, False, 3, 1.0), (4, False, 1, 0.5)])
def test_weights_of_token_kinds(prefix, has_cls, kind, weight):
    "An error of 1 on all tokens of one kind costs the weight of that kind; missing kinds pass theirs on."
    x, y = torch.zeros(2, 1, 12, 4), torch.zeros(2, 1, 12, 4)
    cls = int(has_cls)
    tokens = slice(0, cls) if kind < cls else slice(cls, prefix) if kind < prefix else slice(prefix, 12)
    y[:, :, tokens] = 1
    assert StateLoss("weighted", (0.34, 0.33, 0.33), prefix, has_cls)(y, x) == pytest.approx(weight, rel=1e-5)


def test_weights_that_reach_no_token_are_refused():
    x = torch.zeros(1, 1, 3, 2)
    with pytest.raises(RaptorError, match="no weight"): StateLoss("weighted", (1, 0, 0), 0, False)(x, x)
    with pytest.raises(RaptorError, match="three numbers"): StateLoss("weighted", (1, -1, 1))


def test_teacher_forcing_and_autoregression_by_hand():
    block, states = new_block(), torch.randn(3, 4, 5, 8)
    pairs = [(block(states[:, i], i + 3) - states[:, i + 1]).square().mean() for i in range(3)]
    torch.testing.assert_close(tf_loss(block, states, 2), sum(pairs) / 3)
    x, errors = states[:, 0], []
    for i in range(3): x = block(x, i + 3); errors.append((x - states[:, i + 1]).square().mean())
    torch.testing.assert_close(ar_loss(block, states, 2), sum(errors) / 3)


def test_a_perfect_model_has_no_loss():
    block = new_block()
    states = block.rollout(torch.randn(2, 5, 8), 1, 5)
    assert tf_loss(block, states, 1) < 1e-10 and ar_loss(block, states, 1) < 1e-10


# schedules ------------------------------------------------------------------------------------------------------------
@given(st.integers(2, 500), st.integers(0, 400), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_learning_rate_stays_in_its_bounds(steps, warmup, start):
    c = FitConfig(steps=steps, warmup=warmup, warmup_start=start, lr=2.0, min_lr=0.5)
    rates = [learning_rate(s, c) for s in range(steps)]
    assert max(rates) <= 2.0 + 1e-9 and min(rates[warmup:] or [0.5]) >= 0.5 - 1e-9
    assert all(a <= b + 1e-12 for a, b in zip(rates[:warmup], rates[1:warmup]))
    assert all(a >= b - 1e-12 for a, b in zip(rates[warmup:], rates[warmup + 1:]))


def test_configurations_that_cannot_train_are_refused():
    for bad in (dict(steps=0), dict(batch_size=0), dict(log_every=0), dict(lr=0.0)):
        with pytest.raises(RaptorError, match=f"{next(iter(bad))} is 0"): FitConfig(**bad)


# the loop -------------------------------------------------------------------------------------------------------------
def test_one_step_is_adamw_with_clipping():
    "The first step against the same step written out with torch alone."
    config = TrainConfig(steps=1, batch_size=16, lr=1e-2, warmup=0, clip=0.1, weight_decay=0.1, forcing="free")
    ours, reference = new_block(), new_block()
    train_span(Rotating(), ours, (0, 3), config)
    states = next(Rotating().batches(16, start=0, end=3, seed=0, steps=1))
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1)
    ar_loss(reference, states).backward()
    nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    optimizer.step()
    for a, b in zip(ours.parameters(), reference.parameters()): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_training_learns_the_rotation():
    "After 250 steps the rollout is far closer to the truth than standing still."
    block, config = new_block(), TrainConfig(steps=250, batch_size=32, lr=1e-2, warmup=10, log_every=25)
    history = train_span(Rotating(), block, (0, 6), config)
    states = next(Rotating().batches(64, seed=99, steps=1))
    still = (states[:, 1:] - states[:, :1]).square().mean()
    with torch.no_grad(): assert ar_loss(block, states) < 0.15 * still
    assert history.tf.notna().sum() >= 2 and np.isnan(history.tf.iloc[-1]), "teacher forcing ends after a quarter"


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    a, b, c = new_block(), new_block(), new_block()
    train_span(Rotating(), a, (0, 3), SHORT)
    train_span(Rotating(), b, (0, 3), SHORT)
    train_span(Rotating(), c, (0, 3), replace(SHORT, seed=9))
    assert same(weights(a), weights(b)) and not same(weights(a), weights(c))


def test_noise_is_a_function_of_seed_and_step(monkeypatch):
    states = torch.zeros(64, 3, 5, 8)
    def noise(step=0, seed=0, rank=0):
        monkeypatch.setenv("RANK", str(rank))
        torch.rand(7) # another state of the global generator changes nothing
        return SpanObjective(new_block(), 0, TrainConfig(noise=0.1, seed=seed)).noise(states, step)
    drawn = [noise(), noise(step=1), noise(step=2), noise(seed=1), noise(rank=1)]
    assert torch.equal(noise(), drawn[0]) and float(drawn[0].std()) == pytest.approx(0.1, rel=0.05)
    correlation = torch.corrcoef(torch.stack([n.flatten() for n in drawn]))
    assert (correlation - torch.eye(5)).abs().max() < 0.05 # 7,680 numbers: four standard deviations of independent ones


class Unit(nn.Module):
    "A model that stops at every state."
    def path(self, start, end=None, count=None): return walk(None, start, end, count)


def test_noise_enters_the_inputs_and_not_the_targets():
    seen, states = [], torch.randn(2, 3, 5, 8)
    class Copy(Unit):
        def predict_next(self, x, start): seen.append(x); return states[:, 1:]
    objective = SpanObjective(Copy(), 0, TrainConfig(noise=0.1, forcing="teacher"))
    assert objective(states, 4)["loss"] == 0 and torch.equal(seen[0], states + objective.noise(states, 4))


@pytest.mark.parametrize("step", [0, 20, 60]) # teacher forcing, both, autoregression
def test_noise_precedes_every_step(step):
    "A model that stands still sums the noise of the steps, and each teacher-forced step has its own."
    class Still(Unit):
        def predict_next(self, x, start): return x[:, :-1]
        def step(self, x, t, stride): return x
    states = torch.zeros(4, 4, 5, 8)
    objective = SpanObjective(Still(), 2, TrainConfig(steps=160, noise=0.1))
    noise, scalars = objective.noise(states, step)[:, :3], objective(states, step)
    for name, error in (("tf", noise), ("ar", noise.cumsum(1))):
        if name in scalars: torch.testing.assert_close(scalars[name], error.square().mean())
    assert set(scalars) - {"loss", "lambda"} == {0: {"tf"}, 20: {"tf", "ar"}, 60: {"ar"}}[step]


def test_a_noisy_run_is_reproducible():
    a, b = new_block(), new_block()
    train_span(Rotating(), a, (0, 3), replace(SHORT, noise=0.1))
    torch.rand(7)
    train_span(Rotating(), b, (0, 3), replace(SHORT, noise=0.1))
    assert same(weights(a), weights(b))


def test_stage_two_trains_every_block():
    seed_everything(0)
    raptor = Raptor.create(Phases((2, 6)), 8, 2, layer_scale=0.1)
    before = weights(raptor)
    config = replace(SHORT, steps=40, forcing="free", loss="weighted", token_weights=(0.45, 0.1, 0.45))
    history = train_raptor(Rotating(), raptor, config)
    assert history.loss.iloc[-1] < history.loss.iloc[0] and "tf" not in history
    changed = {k.split(".")[1] for k, v in raptor.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"0", "1"}


def test_a_diverging_run_stops_with_its_step():
    class Bad(Rotating):
        def batches(self, *a, **k): return (b * float("inf") for b in super().batches(*a, **k))
    with pytest.raises(RaptorError, match="loss is nan at step 10"): train_span(Bad(), new_block(), (0, 3), SHORT)


class Breaks(nn.Module):
    "One weight, whose loss or gradient is NaN at step `at` and finite at all others."
    def __init__(self, what, at):
        super().__init__()
        self.w, self.what, self.at = nn.Parameter(torch.ones(())), what, at
    def forward(self, batch, step):
        loss = self.w.square()
        if step == self.at: loss = loss*float("nan") if self.what == "loss" else loss + 0*(self.w - self.w.detach()).sqrt()
        return {"loss": loss}

@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("at,kept", [(5, None), (12, 10), (29, 20)]) # the last step of the checkpoint that is left
def test_nothing_that_is_not_finite_is_saved(tmp_path, clip, what, at, kept):
    config = FitConfig(steps=30, warmup=0, lr=0.1, clip=clip, log_every=1000, checkpoint_every=10)
    assert torch.isfinite(Breaks(what, at)(None, at)["loss"]) == (what == "gradient")
    with pytest.raises(RaptorError, match="at step [123]0; lower lr, or look for bad data"):
        fit(Breaks(what, at), lambda first, *_: iter([None]*(30 - first)), config, tmp_path)
    path = tmp_path/"checkpoint.safetensors"
    assert path.exists() == (kept is not None)
    if kept: assert json.loads(_metadata(path)["raptor"])["step"] == kept and all(map(torch.isfinite, load_file(path).values()))
    with pytest.raises(RaptorError, match="not finite|is nan"): # without a folder, too
        fit(Breaks(what, at), lambda first, *_: iter([None]*(30 - first)), config)


def test_an_evaluation_never_sees_weights_that_are_not_finite():
    config = FitConfig(steps=4, warmup=0, clip=None, checkpoint_every=0)
    with pytest.raises(RaptorError, match="the weight w is not finite at step 4"):
        fit(Breaks("gradient", 3), lambda *_: iter([None]*4), config, evaluate=lambda step: pytest.fail("evaluated"))


def test_a_row_tells_of_a_gradient_that_is_not_finite():
    config = FitConfig(steps=8, warmup=0, log_every=2, checkpoint_every=0)
    with pytest.raises(RaptorError, match="norm of the gradient is nan at step 4"):
        fit(Breaks("gradient", 3), lambda *_: iter([None]*8), config)


def test_the_loop_can_do_without_float64(tmp_path):
    "Apple's GPUs have none: with float32 sums no tensor of the loop is float64, from start to resume."
    class Narrow(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            assert not any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_leaves(out)), func
            return out
    def start():
        run = Trainer(SpanObjective(new_block(), 0, SHORT), SHORT, None)
        run.wide, run.folder, run.path, run.made_for = torch.float32, tmp_path, tmp_path/"checkpoint.safetensors", "x"
        run.table_path = tmp_path/"history.csv"
        return run
    batches = list(Rotating().batches(16, end=3, seed=0, steps=3))
    with Narrow():
        run = start()
        for batch in batches: run.step(batch)
        run.save()
        again = start()
        again.resume(again.optimizer.optimizer)
        run.close_row(), again.close_row()
    assert again.done == 3 and again.history == run.history and run.wide == torch.float32
    assert Trainer(new_block(), SHORT).wide == torch.float64 # as the stored results were made


def test_evaluations_are_rows_of_the_history_and_leave_the_model_in_training_mode():
    block, modes = new_block(), []
    class Watched(Rotating):
        def batches(self, *a, **k):
            for batch in super().batches(*a, **k): modes.append(block.training); yield batch
    def evaluate(step):
        block.eval()
        return {"score": float(step)}
    history = train_span(Watched(), block, (0, 3), replace(SHORT, eval_every=10), evaluate=evaluate)
    assert history.dropna(subset=["score"])[["step", "score"]].values.tolist() == [[10, 10], [20, 20], [30, 30]]
    assert modes == [True]*30 and not block.training


def test_fit_ends_in_training_mode_and_train_span_in_evaluation_mode():
    for evaluate in (None, lambda step: block.eval() and {"score": 0.0}):
        objective = SpanObjective(block := new_block(), 0, SHORT)
        fit(objective, lambda *_: Rotating().batches(16, end=3, seed=0, steps=30), SHORT, evaluate=evaluate)
        assert block.training
        train_span(Rotating(), block, (0, 3), SHORT, evaluate=evaluate)
        assert not block.training and not any(m.training for m in block.modules())


# checkpoints ----------------------------------------------------------------------------------------------------------
def test_a_checkpoint_brings_back_moments_too(tmp_path):
    block = new_block(); optimizer = torch.optim.AdamW(block.parameters())
    tf_loss(block, torch.randn(2, 3, 5, 8)).backward(); optimizer.step()
    meta = {"step": 1, "made_for": "x", "history": [], "sums": {}, "count": 0}
    save_checkpoint(tmp_path/"c.safetensors", block, optimizer, meta)
    other = new_block(5); again = torch.optim.AdamW(other.parameters())
    assert load_checkpoint(tmp_path/"c.safetensors", other, again, "x") == meta
    assert same(weights(block), weights(other))
    for p, q in zip(block.parameters(), other.parameters()):
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], again.state[q]["exp_avg_sq"])
        assert float(again.state[q]["step"]) == 1


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    train_span(Rotating(), new_block(), (0, 3), SHORT, tmp_path)
    path = tmp_path/"checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "truncate": data = data[:len(data) // 2]
    elif damage == "flip": data[4] ^= 0xff # the header's length
    else: data = b""
    path.write_bytes(data)
    with pytest.raises(RaptorError, match="checkpoint.safetensors is damaged"):
        train_span(Rotating(), new_block(), (0, 3), SHORT, tmp_path)


def made(seed=1, heads=2, **block): seed_everything(seed); return RecurrentBlock(8, heads, **{"layer_scale": 0.1, **block})

@pytest.mark.parametrize("change", [
    dict(span=(1, 4)), dict(fingerprint="other"), dict(block=lambda: made(mlp="gelu")), dict(block=lambda: made(seed=2)),
    dict(block=lambda: made(layer_scale=0.2)), dict(block=lambda: made(heads=4)),
    *(dict(config=c) for c in (dict(lr=2e-2), dict(noise=0.1), dict(clip=None), dict(seed=3), dict(weight_decay=0.0)))])
def test_a_checkpoint_made_for_something_else_is_refused_or_replaced(tmp_path, change, capsys):
    train_span(Rotating(), made(), (0, 3), SHORT, tmp_path)
    source, config, make = Rotating(), replace(SHORT, **change.get("config", {})), change.get("block", made)
    source.fingerprint, span = change.get("fingerprint", "rotating"), change.get("span", (0, 3))
    with pytest.raises(RaptorError, match="checkpoint.safetensors belongs to another run, .* delete it, or choose"):
        train_span(source, make(), span, config, tmp_path)
    replaced, fresh = make(), make()
    train_span(source, replaced, span, replace(config, stale="replace"), tmp_path)
    assert "checkpoint.safetensors is of other settings; this run starts afresh" in capsys.readouterr().out
    train_span(source, fresh, span, config)
    assert same(weights(replaced), weights(fresh))
    train_span(source, make(), span, config, tmp_path) # its checkpoint has taken the place
    assert not capsys.readouterr().out


def test_stage_two_does_not_go_on_from_other_blocks(tmp_path):
    def start(lr): # stage 1, then stage 2 with the same settings
        block = made()
        train_span(Rotating(), block, (0, 6), replace(SHORT, lr=lr))
        return train_raptor(Rotating(), Raptor([block], Phases((6,))), replace(SHORT, steps=10), tmp_path)
    start(1e-2), start(1e-2)
    with pytest.raises(RaptorError, match="first weights"): start(2e-2)


def test_blocks_stay_with_the_trajectories_that_they_learned():
    block, other = made(), Rotating()
    other.fingerprint = "another teacher"
    train_span(Rotating(), block, (0, 6), replace(SHORT, steps=2))
    assert (block.trained_on, block.span) == ("rotating", (0, 6))
    raptor = Raptor([block], Phases((6,)))
    for train in (lambda: train_span(other, block, (0, 6), SHORT), lambda: train_raptor(other, raptor, SHORT)):
        with pytest.raises(RaptorError, match=r"learned the trajectories rotating, and these \(another teacher\)"): train()
    block.trained_on = None # to insist
    train_raptor(other, raptor, replace(SHORT, steps=2))
    assert raptor.trained_on == "another teacher"


def test_blocks_that_come_to_share_a_weight_are_refused_before_training():
    raptor = raptor_of((2, 6))
    raptor.blocks[1].qkv.weight = raptor.blocks[0].qkv.weight
    with pytest.raises(RaptorError, match="share the weight qkv.weight"): train_raptor(Rotating(), raptor, SHORT)


def test_evaluation_batches_may_change_between_two_starts_and_the_seed_may_not():
    @dataclass(frozen=True)
    class Config(FitConfig): eval_batch_size:int = 8
    changes = {}, {"eval_batch_size": 16}, {"checkpoint_every": 7}, {"stale": "replace"}, {"seed": 1}
    *alike, other = (Trainer(new_block(), Config(**c)).made_for for c in changes)
    assert len(set(alike)) == 1 and other not in alike


WORKER = """
    import sys, time
    sys.path.insert(0, {tests!r})
    import torch; torch.set_num_threads(1)
    from safetensors.torch import save_file
    from test_train import Rotating, new_block
    from raptor.train.stages import TrainConfig, train_span
    class Slow(Rotating):
        def batches(self, *a, **k):
            for b in super().batches(*a, **k): time.sleep(float(sys.argv[2])); yield b
    block = new_block()
    config = TrainConfig(steps=60, batch_size=8, lr=1e-2, warmup=5, log_every=7, checkpoint_every=10, noise=0.01)
    train_span(Slow(), block, (0, 4), config, sys.argv[1])
    save_file(block.state_dict(), sys.argv[1] + "/done.safetensors")
"""


def start_worker(folder, delay, tests=os.path.dirname(__file__)):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", textwrap.dedent(WORKER.format(tests=tests)), str(folder), str(delay)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert start_worker(folder, 0).wait() == 0
    return load_file(folder/"done.safetensors")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_resumes_and_ends_with_the_same_weights(tmp_path, how, uninterrupted):
    "A real process and a real signal: the second start reaches the weights of an uninterrupted run, bit for bit."
    cut = start_worker(tmp_path/"cut", 0.1)
    while not (tmp_path/"cut"/"checkpoint.safetensors").exists():
        assert cut.poll() is None
        time.sleep(0.02)
    time.sleep(0.25) # into the steps after the checkpoint
    cut.send_signal(how)
    assert cut.wait() == (-9 if how == signal.SIGKILL else 143)
    assert not (tmp_path/"cut"/"done.safetensors").exists()
    assert start_worker(tmp_path/"cut", 0).wait() == 0
    assert same(load_file(tmp_path/"cut"/"done.safetensors"), uninterrupted)


def _metadata(path):
    head = path.read_bytes()
    return json.loads(head[8:8 + int.from_bytes(head[:8], "little")])["__metadata__"]

def test_checkpoints_hold_no_pickle(tmp_path):
    train_span(Rotating(), new_block(), (0, 3), SHORT, tmp_path)
    assert json.loads(_metadata(tmp_path/"checkpoint.safetensors")["raptor"])["step"] == 30


def test_golden_run():
    """Ten steps from a fixed seed against recorded losses: a guard against unintended change, no proof of correctness.

    It notices a change of initialisation, data order, loss or update that leaves all other tests valid, and so would
    change results between versions. A change on purpose records new numbers (float32, any x86 or Arm machine)."""
    config = TrainConfig(steps=10, batch_size=8, lr=1e-2, warmup=2, log_every=5)
    history = train_span(Rotating(), new_block(), (0, 4), config)
    np.testing.assert_allclose(history.loss, [0.084423, 0.114375], rtol=1e-3)


# the shared first step, and the step for benchmarks -------------------------------------------------------------------
def raptor_of(ends, dim=8, heads=2):
    seed_everything(2)
    return Raptor([RecurrentBlock(dim, heads, layer_scale=0.3) for _ in ends], Phases(ends))


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("make,start,n", [
    (new_block, 0, 1), (new_block, 2, 4), (lambda: raptor_of((2, 5)), 0, 5), (lambda: raptor_of((1,)), 0, 1)])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_sharing_the_first_step_changes_neither_loss_nor_gradient(weight, make, start, n, noise):
    states = torch.randn(3, n + 1, 5, 8, generator=torch.Generator().manual_seed(4))
    config = TrainConfig(steps=10, loss="weighted", noise=noise)
    objective = SpanObjective(make(), start, config)
    objective.weight = lambda step: weight
    objective(states, 0)["loss"].backward()
    plain = make().double()
    added = objective.noise(states, 0).double() if noise else torch.zeros_like(states).double()
    distance, x, rolled = StateLoss("weighted", config.token_weights), states[:, 0].double(), []
    forced = distance(plain.predict_next(states.double() + added, start), states[:, 1:].double())
    for i in range(n): rolled.append(x := plain.step(x + added[:, i], start + i + 1))
    rolled = distance(torch.stack(rolled, 1), states[:, 1:].double())
    (weight * forced + (1 - weight) * rolled).backward()
    for (name, p), q in zip(objective.model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_step_for_benchmarks_is_that_of_the_loop(weight):
    "One step of `fit` on the same states from the same weights ends with the same weights."
    seed_everything(7)
    timed, states = new_block(), torch.empty(0)
    trained = new_block()
    torch.manual_seed(11); step = benchmark_step(8, 2, 5, 1, 4, 3, weight, precision="no", model=timed)
    torch.manual_seed(11); states = torch.randn(4, 4, 5, 8)
    objective = SpanObjective(trained, 0, TrainConfig())
    objective.weight = lambda step: weight
    config = FitConfig(steps=1, batch_size=4, warmup=0, schedule="constant", lr=3e-4)
    history = fit(objective, lambda *_: iter([states]), config)
    assert float(step()) == pytest.approx(float(history["loss"].iloc[-1]), rel=1e-6)
    assert same(weights(timed), weights(trained)) and not same(weights(timed), weights(new_block()))


@pytest.mark.parametrize("precision,tolerance", [("no", 1e-5), ("bf16", 1e-2)]) # relative
@pytest.mark.parametrize("make", [lambda: raptor_of((6,), 32, 4).blocks[0], lambda: raptor_of((2, 6), 32, 4)])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_losses_and_states_of_each_precision_are_those_of_float64(precision, tolerance, make, weight):
    model, exact = make(), make().double()
    states = torch.randn(3, 7, 9, 32, generator=torch.Generator().manual_seed(5))
    objective = SpanObjective(model, 0, TrainConfig(loss="weighted"))
    objective.weight = lambda step: weight
    distance, wide = StateLoss("weighted", TrainConfig().token_weights), states.double()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, rolled = objective(states, 0)["loss"], model.rollout(states[:, 0], 0, 6)
        truth = exact.rollout(wide[:, 0], 0, 6)
        forced, free = distance(exact.predict_next(wide, 0), wide[:, 1:]), distance(truth[:, 1:], wide[:, 1:])
    assert float(loss) == pytest.approx(float(weight*forced + (1 - weight)*free), rel=tolerance)
    assert float((rolled.double() - truth).norm()/truth.norm()) < tolerance


@pytest.mark.parametrize("step", [0, 20, 100]) # teacher forcing, both, autoregression
def test_losses_are_those_at_the_stops(step):
    raptor = Raptor.create(Phases((2, 6)), 8, 2, layer_scale=0.5, stops=(2, 3, 6))
    states = torch.randn(4, 7, 5, 8)[:, [0, 2, 3, 6]]
    scalars = SpanObjective(raptor, 0, TrainConfig(steps=160))(states, step)
    x, expected = states[:, 0], {"tf": [], "ar": []}
    for i, (a, b) in enumerate(((0, 2), (2, 3), (3, 6))):
        block, x = raptor.blocks[b > 2], raptor.blocks[b > 2](x, b, b - a)
        expected["tf"].append((block(states[:, i], b, b - a) - states[:, i + 1]).square().mean())
        expected["ar"].append((x - states[:, i + 1]).square().mean())
    for name in set(scalars) & set(expected): torch.testing.assert_close(scalars[name], sum(expected[name]) / 3)


def test_a_raptor_with_stops_reads_the_states_that_it_hits():
    read = []
    class Source(Rotating):
        def batches(self, *a, states=None, **k): read.append(states); return (b[:, states] for b in super().batches(*a, **k))
    raptor = Raptor.create(Phases((2, 6)), 8, 2, layer_scale=0.1, stops=(2, 3, 6))
    history = train_raptor(Source(), raptor, replace(SHORT, steps=40))
    assert read == [(0, 2, 3, 6)] and history.loss.iloc[-1] < history.loss.iloc[0]
