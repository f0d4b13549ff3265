"""Images per second of a FLOP-matched Raptor against its timm teacher, at the same precision, compiled and not. Not collected by default:

    pytest tests/benchmarks/bench_inference.py --benchmark-enable
"""
import pytest, torch

from raptor.teacher.backbone import Backbone
from raptor.model.layer import flop_matched_hidden
from raptor.core import mixed_precision, seed_everything
from raptor.model.as_backbone import RaptorBackbone
from raptor.model.deploy import materialize
from raptor.model.raptor import Raptor
from raptor.model.recurrence import even
from raptor.phases import Phases

from conftest import DEVICE, ON_GPU

NAME, BATCH, ROUNDS = ("vit_base_patch14_reg4_dinov2", 256, 20) if ON_GPU else ("vit_small_patch14_reg4_dinov2", 4, 7)


@pytest.fixture(scope="module")
def models():
    seed_everything(0)
    teacher = Backbone.create(NAME, pretrained=False, img_size=224).to(DEVICE)
    raptor = Raptor.create(Phases((7, 10, 12)), teacher.dim, teacher.num_heads, hidden=flop_matched_hidden(teacher.dim)).to(DEVICE).eval()
    return teacher, RaptorBackbone(teacher, raptor).eval()


def timed(work, models, name, precision):
    "One batch through the features of a teacher and of what stands in for it, in turns."
    images = torch.randn(BATCH, 3, 224, 224, device=DEVICE)
    def forward(features):
        def run():
            with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"): features(images)
        return run
    teacher, raptor = map(forward, models)
    work(f"inference of {NAME}, batch {BATCH}, {precision}, {name}", raptor, rounds=ROUNDS, teacher=teacher, note="teacher / ours is the share of the teacher's images per second")


def need(precision):
    if precision == "bf16" and mixed_precision("auto") != "bf16": pytest.skip("bfloat16 is emulated on this machine")


@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_inference(work, models, precision, compiled):
    need(precision)
    timed(work, [torch.compile(m.features) if compiled else m.features for m in models], precision=precision, name="compiled" if compiled else "as it is")


@pytest.mark.parametrize("count", [12, 8, 6, 4])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_fewer_steps(work, models, precision, count):
    "k = 3 started from the teacher, rank 8, with weights that are merged once."
    need(precision)
    teacher, phases = models[0], Phases((7, 10, 12))
    raptor = Raptor.from_teacher(teacher, phases, stops=None if count == 12 else even(12, count, phases.ends), conditioning=("vectors", "low_rank"), rank=8).to(DEVICE).eval()
    timed(work, [teacher.features, RaptorBackbone(teacher, raptor).eval().features], precision=precision, name=f"k = 3, rank 8, M = {count}")


@pytest.mark.parametrize("name, size, batch, rounds", [("vit_mini_patch4_reg4_24", 24, 64, 200), (NAME, 224, BATCH, 3*ROUNDS)], ids=["embedded", "paper"])
def test_merged_weights(work, name, size, batch, rounds):
    """Twelve steps with low-rank updates that are merged and kept, against one plain block in each phase, and against the same twelve
    steps as a timm model. Neither of the last two merges anything; the plain block finds its weights in the CPU's cache, as twelve layers do not."""
    seed_everything(0)
    teacher, images = Backbone.create(name, pretrained=False, img_size=size).to(DEVICE), torch.randn(batch, 3, size, size, device=DEVICE)
    def student(**how): return Raptor.from_teacher(teacher, Phases((7, 10, 12)), **how).to(DEVICE).eval()
    merged = student(conditioning=("vectors", "low_rank"), rank=8)
    ordinary = materialize(teacher, merged).to(DEVICE).eval()
    def forward(call):
        def run():
            with torch.inference_mode(): call(images)
        return run
    plain = RaptorBackbone(teacher, student(conditioning=())).eval().features
    work(f"merged weights, {name}, batch {batch}", forward(RaptorBackbone(teacher, merged).eval().features), rounds=rounds,
         plain=forward(plain), timm=forward(ordinary.forward_features), note="share of the plain block's images per second, and of the same steps' in timm")
