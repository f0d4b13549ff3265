"""Two processes that share each batch: losses equal to those of one, checkpoints resumed by another number, SIGTERM.

Tolerance: the mean over two halves is summed in another order than the mean over the whole, so losses agree to 1e-5
(relative) and outputs of the trained block to 1e-4. Weights are not compared: the bias of the keys does not affect
attention, so its gradient is pure rounding, from which AdamW makes steps of ordinary size."""
import json, os, signal, subprocess, sys, threading, time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open

from raptor.core import RaptorError, seed_everything, seed_for
from raptor.model.block import RecurrentBlock
from raptor.model.raptor import Raptor
from raptor.phases import Phases
from raptor.train.fit import Trainer, fit, make_accelerator
from raptor.train.stages import TrainConfig, train_span

CONFIG = TrainConfig(steps=24, batch_size=8, lr=1e-2, warmup=3, log_every=5, checkpoint_every=10, eval_every=8)


class Killed(Exception): pass


class Shrinking:
    "x_{l+1} = 0.8 x_l over four layers, optionally cut short or slowed down."
    depth, num_prefix, has_cls, num_images, fingerprint = 4, 1, True, 64, "shrinking"
    def __init__(self, cut=None, slow=0, ready=None): self.cut, self.slow, self.ready = cut, slow, ready
    def batches(self, batch_size, *, start=0, end=None, seed=None, first_step=0, steps=None, rank=0, world=1, **_):
        for step in range(first_step, steps):
            if step == self.cut: raise Killed
            time.sleep(self.slow)
            if self.ready and step == 2: self.ready.touch() # training has begun
            x = torch.randn(batch_size, 1, 5, 8, generator=torch.Generator().manual_seed(seed_for(seed, step)))
            states = x * 0.8**torch.arange(5).view(1, -1, 1, 1)
            yield states[rank * batch_size // world:(rank + 1) * batch_size // world, start:(end or 4) + 1]


def train(folder, **source):
    "One run of the block; its history, and the steps at which this process evaluated."
    seed_everything(1)
    block, evaluated = RecurrentBlock(8, 2, layer_scale=0.1), []
    def evaluate(step): evaluated.append(step); return {"score": float(step)}
    try: history = train_span(Shrinking(**source), block, (0, 4), CONFIG, folder, evaluate=evaluate)
    except Killed: return None, evaluated, block
    return history, evaluated, block


def train_part():
    "Half of a Raptor with each loss: its second block serves no layer of the span."
    def once(loss):
        seed_everything(1)
        raptor = Raptor.create(Phases((2, 4)), 8, 2, layer_scale=0.1)
        before = raptor.blocks[1].qkv.weight.clone()
        history = train_span(Shrinking(), raptor, (0, 2), TrainConfig(steps=6, batch_size=8, warmup=0, log_every=2, loss=loss))
        assert torch.equal(raptor.blocks[1].qkv.weight, before)
        return history
    return {loss: once(loss) for loss in ("mse", "weighted", "cosine", "mse+cosine")}


def train_aside():
    "An objective with a parameter that no loss reaches, as a timm model has that keeps its head."
    class Aside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.aside = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        def forward(self, x, step): return {"loss": self.used(x).square().mean()}
    seed_everything(1)
    objective = Aside()
    before = objective.aside.weight.clone()
    fit(objective, lambda *_: iter(torch.ones(3, 4, 2)), TrainConfig(steps=3, batch_size=8, warmup=0, checkpoint_every=0))
    assert torch.equal(objective.aside.weight, before)


def worker(folder):
    "What each of two processes does."
    rank, folder = make_accelerator().process_index, Path(folder)
    whole, evaluated, block = train(folder/"whole")
    went_on, _, _ = train(folder/"from_one")
    train(folder/"from_two", cut=13)
    with pytest.raises(RaptorError, match="cannot be shared evenly by 2 processes"):
        fit(block, None, TrainConfig(batch_size=7))
    part = train_part()
    train_aside()
    result = {"whole": whole.to_dict("list"), "went_on": went_on.to_dict("list"), "evaluated": evaluated,
              "part": {loss: history.to_dict("list") for loss, history in part.items()}}
    (folder/f"rank{rank}.json").write_text(json.dumps(result))
    if not rank: torch.save(block.state_dict(), folder/"block.pt")


def launch(*argv):
    # --multi_gpu on a machine without a GPU, too: Accelerate's --cpu starts one process unless MPI starts the others.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               __file__, *map(str, argv)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAPTOR_PROGRESS": "0", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def close(a, b):
    a, b = pd.DataFrame(a), pd.DataFrame(b)
    pd.testing.assert_frame_equal(a, b, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def alone(): return train(None)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    train(folder/"from_one", cut=13) # leaves the checkpoint of step 10
    process = launch("work", folder)
    said = process.communicate()[0]
    assert process.returncode == 0, said[-3000:]
    return folder, [json.loads((folder/f"rank{r}.json").read_text()) for r in (0, 1)]


def test_two_processes_give_the_losses_of_one(alone, together):
    folder, ranks = together
    close(ranks[0]["whole"], alone[0])
    assert str(ranks[0]["whole"]) == str(ranks[1]["whole"]), "both processes know the whole history"
    theirs, x = RecurrentBlock(8, 2, layer_scale=0.1), torch.randn(16, 5, 8)
    theirs.load_state_dict(torch.load(folder/"block.pt", weights_only=True))
    with torch.no_grad(): two, one = theirs.rollout(x, 0, 4), alone[2].rollout(x, 0, 4)
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


def test_layers_and_parameters_without_a_loss_and_every_loss_are_those_of_one_process(together):
    alone = train_part()
    for rank in together[1]:
        for loss, history in alone.items(): close(rank["part"][loss], history)


def test_one_process_evaluates_and_all_know(alone, together):
    assert alone[1] == [8, 16, 24] == together[1][0]["evaluated"] and together[1][1]["evaluated"] == []


def test_a_checkpoint_of_one_process_is_continued_by_two(alone, together): close(together[1][0]["went_on"], alone[0])


def test_a_checkpoint_of_two_processes_is_continued_by_one(alone, together):
    meta = json.loads(_note(together[0]/"from_two"/"checkpoint.safetensors"))
    assert meta["step"] == 10
    close(train(together[0]/"from_two")[0], alone[0])


def _note(path):
    with safe_open(path, "pt") as f: return f.metadata()["raptor"]


def test_sigterm_stops_both_after_the_same_step_and_the_next_start_goes_on(alone, tmp_path):
    process = launch("slow", tmp_path)
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode != 0 and len(list(tmp_path.glob("ready*"))) == 2
    meta = json.loads(_note(tmp_path/"run"/"checkpoint.safetensors"))
    assert 0 < meta["step"] < CONFIG.steps and meta["step"] % 10 == 0, said[-2000:]
    assert sorted(p.read_text() for p in tmp_path.glob("left*")) == ["143", "143"]
    close(train(tmp_path/"run")[0], alone[0])


def test_agreement_on_stopping_in_one_process():
    asked, run = threading.Event(), Trainer(RecurrentBlock(8, 2), CONFIG)
    run.done = 3
    assert not run.must_stop(asked)
    asked.set()
    assert run.must_stop(asked), "one process need not wait for the tenth step"


def slow(folder):
    rank, folder = make_accelerator().process_index, Path(folder)
    try: train(folder/"run", slow=0.3, ready=folder/f"ready{rank}")
    except SystemExit as e: (folder/f"left{rank}").write_text(str(e.code)); raise


if __name__ == "__main__": {"work": worker, "slow": slow}[sys.argv[1]](sys.argv[2])
