"""Reading pickled modules without running them: the same trajectories as the module itself, and no way to run anything."""
import io, os, pickle, struct, sys, zipfile

import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from raptor.model.raptor import Raptor, authors as author_checkpoint
from raptor.model.authors import import_author_checkpoint, read_pickle
from raptor.model.block import RecurrentBlock
from raptor.core import RaptorError
from raptor.phases import Phases


# --- modules laid out as research code usually does it ----------------------------------------------------------

class LayerScale(nn.Module):
    def __init__(self, dim): super().__init__(); self.gamma = nn.Parameter(torch.ones(dim))
    def forward(self, x): return x*self.gamma

class SwiGLUFFN(nn.Module):
    def __init__(self, dim, hidden): super().__init__(); self.w12, self.w3 = nn.Linear(dim, 2*hidden), nn.Linear(hidden, dim)
    def forward(self, x):
        x1, x2 = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(x1)*x2)

class Mlp(nn.Module):
    def __init__(self, dim, hidden): super().__init__(); self.fc1, self.act, self.drop, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, dim)
    def forward(self, x): return self.fc2(self.drop(self.act(self.fc1(x))))

class Block(nn.Module):
    def __init__(self, dim=8, heads=2, mlp=SwiGLUFFN, scaled=True, hidden=None, eps=1e-5):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ls1, self.mlp, self.ls2 = LayerScale(dim), mlp(dim, hidden or 4*dim), LayerScale(dim)
        self.scaler = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 3*dim)) if scaled else None
    def forward(self, x, t):
        a, b, c = (1 + self.scaler(torch.tensor([[float(t)]], dtype=x.dtype)))[:, None].chunk(3, -1) if self.scaler is not None else (1., 1., 1.)
        y = self.norm1(x)
        x = x + a*self.ls1(self.attn(y, y, y, need_weights=False)[0])
        return c*(x + b*self.ls2(self.mlp(self.norm2(x))))

class RaptorModel(nn.Module):
    def __init__(self, blocks, **attributes):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        for name, value in attributes.items(): setattr(self, name, value)


class Stack(RaptorModel): pass


def awake(module):
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in module.parameters(): p.copy_(torch.randn(p.shape, generator=g)*0.3)
    return module.eval()

def saved(value, tmp_path, **how):
    path = tmp_path/"checkpoint.pt"
    torch.save(value, path, **how)
    return path

def compare(ours, blocks, ends):
    "The same states at every layer, in float64, so that the tolerance is one of meaning and not of rounding."
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): torch.testing.assert_close(ours.double().rollout(x, 0, ends[-1]), run([b.double() for b in blocks], ends, x), atol=1e-6, rtol=1e-9)

def run(blocks, ends, x):
    states, start = [x], 0
    for block, end in zip(blocks, ends):
        for t in range(start + 1, end + 1): states.append(block(states[-1], t))
        start = end
    return torch.stack(states, 1)


# --- the same trajectories --------------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("arguments", [{}, dict(mlp=Mlp), dict(scaled=False), dict(hidden=13)])
def test_a_pickled_block_becomes_the_same_block(tmp_path, arguments, protocol):
    block = awake(Block(**arguments))
    ours = import_author_checkpoint(saved(block, tmp_path, pickle_protocol=protocol))
    assert isinstance(ours, RecurrentBlock) and ours.config.num_heads == 2
    compare(ours, [block], [5])


@pytest.mark.parametrize("attributes,ends", [(dict(ends=[2, 5]), None), (dict(phase_ends=(0, 2, 5)), None), (dict(counts=[2, 3]), None), (dict(n_iters=(2, 3), layer_ends=[2, 5]), None), ({}, (2, 5)), (dict(ends=[2, 5]), (2, 5))])
def test_a_pickled_model_becomes_the_same_raptor(tmp_path, attributes, ends):
    model = awake(RaptorModel([Block(), Block(mlp=Mlp, heads=4)], **attributes))
    ours = import_author_checkpoint(saved(model, tmp_path), depth=5, ends=ends)
    assert isinstance(ours, Raptor) and ours.phases == Phases((2, 5))
    ours.save_pretrained(tmp_path/"again")
    again = Raptor.from_pretrained(tmp_path/"again")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), ours.parameters()))
    compare(ours, model.blocks, [2, 5])


def test_state_dicts_and_training_checkpoints(tmp_path):
    model = awake(RaptorModel([Block(), Block()]))
    expected = import_author_checkpoint(saved(model, tmp_path), depth=5, ends=(2, 5)).state_dict()
    for value, more in ((model.state_dict(), {}), ({"epoch": 3, "model": model.state_dict()}, {}), ({"_orig_mod." + k: v for k, v in model.state_dict().items()}, {}),
        ({"model": model.state_dict(), "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}, dict(ignore=("optimizer",)))):
        ours = import_author_checkpoint(saved(value, tmp_path), depth=5, ends=(2, 5), num_heads=2, **more).state_dict()
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_class_named_by_the_caller_and_weights_that_share_a_storage(tmp_path):
    model = awake(Stack([Block(), Block()], ends=[1, 2]))
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    offset = 0
    for p in model.parameters(): p.data = flat[offset:offset + p.numel()].view(p.shape); offset += p.numel()
    path = saved(model, tmp_path)
    with pytest.raises(RaptorError, match=r"asks for [\w.]*test_import.Stack"): import_author_checkpoint(path, depth=2)
    ours = import_author_checkpoint(path, depth=2, classes=("Stack",))
    ours.save_pretrained(tmp_path/"again") # its weights no longer share one
    compare(ours, model.blocks, [1, 2])


class SeparateGate(nn.Module):
    def __init__(self, dim, hidden): super().__init__(); self.up_proj, self.gate_proj, self.down_proj = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)
    def forward(self, x): return self.down_proj(F.silu(self.gate_proj(x))*self.up_proj(x))

class Renamed(nn.Module):
    "Norms defined in the other order, LayerScale as bare parameters, no biases in the MLP's gate."
    def __init__(self, dim=8):
        super().__init__()
        self.gamma_2, self.gamma_1 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.ln_2, self.ln_1 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.core, self.ffn = nn.ModuleDict({"mha": nn.MultiheadAttention(dim, 2, batch_first=True)}), SeparateGate(dim, 12)
        self.ffn.gate_proj.bias = self.ffn.up_proj.bias = None
    def forward(self, x, t):
        y = self.ln_1(x)
        x = x + self.gamma_1*self.core["mha"](y, y, y)[0]
        return x + self.gamma_2*self.ffn(self.ln_2(x))


def test_other_names_and_another_layout(tmp_path):
    block = awake(Renamed())
    ours = import_author_checkpoint(saved(block, tmp_path), classes=("Renamed", "SeparateGate"))
    assert (ours.config.mlp, ours.config.hidden, ours.config.depth_scaling) == ("swiglu", 12, False)
    compare(ours, [block], [3])


# --- what is not recognised is said -----------------------------------------------------------------------------

def changed(change, **arguments):
    block = Block(**arguments); change(block); return block

@pytest.mark.parametrize("make,sentence", [
    (lambda: Block(eps=1e-6), "eps=1e-06"), (lambda: changed(lambda b: setattr(b, "router", nn.Linear(8, 3))), "make no MLP"),
    (lambda: changed(lambda b: b.register_parameter("query", nn.Parameter(torch.ones(3)))), "query, for which"), (lambda: changed(lambda b: setattr(b, "norm3", nn.LayerNorm(8))), "3 tensors that look like norm"),
    (lambda: changed(lambda b: delattr(b, "norm2")), "1 tensors that look like norm"), (lambda: changed(lambda b: setattr(b.scaler, "0", nn.Linear(1, 32)) or setattr(b.scaler, "2", nn.Linear(32, 24))), "cannot be imported"),
    (lambda: changed(lambda b: setattr(b.mlp, "act", nn.GELU("tanh")), mlp=Mlp), "approximate=tanh"), (lambda: changed(lambda b: setattr(b, "attn", nn.MultiheadAttention(8, 2, add_zero_attn=True))), "add_zero_attn=True"),
    (lambda: changed(lambda b: setattr(b, "attn", nn.MultiheadAttention(8, 2, add_bias_kv=True))), "bias_k, attn.bias_v|attn.bias_k"), (lambda: changed(lambda b: setattr(b.mlp, "act", nn.ReLU()), mlp=Mlp), "activation.ReLU"),
    (lambda: changed(lambda b: setattr(b, "norm1", nn.RMSNorm(8))), "RMSNorm"), (lambda: {"a": torch.ones(2)}, "no multi-head attention"), (lambda: 3, "no multi-head attention"),
    (lambda: RaptorModel([Block(), Block()]), "does not say where their phases end"), (lambda: RaptorModel([Block(), Block()], ends=[2, 24]), r"\(2, 24\), which does not close with depth=12"),
    (lambda: RaptorModel([Block(), Block()], norm=nn.LayerNorm(8)), "norm.weight, norm.bias outside its blocks"), (lambda: RaptorModel([Block() for _ in range(13)]), "at most 12"),
    (lambda: Block().state_dict(), "pass num_heads="), (lambda: {"x.attn.in_proj_weight": torch.ones(24, 8)}, "num_heads")])
def test_what_is_no_recurrent_block_is_refused_in_one_sentence(tmp_path, make, sentence):
    with pytest.raises(RaptorError, match=sentence) as e: import_author_checkpoint(saved(make(), tmp_path))
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_state_dict_of_any_shapes_gives_a_block_or_a_sentence(tmp_path_factory, data):
    state = Block().state_dict()
    for name in data.draw(st.lists(st.sampled_from(sorted(state)), min_size=1, max_size=3)):
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 8, 16, 24, 32]), max_size=3))
        if data.draw(st.booleans()): state.pop(name, None)
        else: state[name] = torch.zeros(shape, dtype=data.draw(st.sampled_from([torch.float32, torch.float16, torch.int64])))
    try: import_author_checkpoint(saved(state, tmp_path_factory.mktemp("state")), num_heads=2)
    except RaptorError as e: assert "\n" not in str(e)


def test_contradictions_are_refused(tmp_path):
    path = saved(RaptorModel([Block(), Block()], ends=[2, 12]), tmp_path)
    with pytest.raises(RaptorError, match=r"end at \(2, 12\), and ends=\(3, 12\)"): import_author_checkpoint(path, ends=(3, 12))
    with pytest.raises(RaptorError, match="num_heads=2, and 4 was given"): import_author_checkpoint(path, num_heads=4)
    with pytest.raises(RaptorError, match="2 blocks were given for 3"): import_author_checkpoint(saved(RaptorModel([Block(), Block()]), tmp_path), ends=(1, 2, 12))
    with pytest.raises(RaptorError, match="does not say"): import_author_checkpoint(saved(RaptorModel([Block(), Block()], ends=[2, 12], splits=[3, 12]), tmp_path))
    with pytest.raises(RaptorError, match="not a multiple of num_heads"): import_author_checkpoint(saved(Block().state_dict(), tmp_path), num_heads=3)


# --- nothing runs -----------------------------------------------------------------------------------------------

class Calls:
    "Pickles to a call."
    def __init__(self, function, *arguments): self.call = function, arguments
    def __reduce__(self): return self.call

def attacks(flag):
    write = f"open({str(flag)!r}, 'w').write('x')"
    import builtins, importlib, operator, runpy, subprocess
    return {"posix.system|nt.system": Calls(os.system, f"touch '{flag}'"), "builtins.eval": Calls(eval, write), "builtins.exec": Calls(exec, write), "io.open|builtins.open|_io.open": Calls(open, str(flag), "w"),
        "builtins.getattr": Calls(getattr, Calls(importlib.import_module, "os"), "system"), "subprocess.Popen": Calls(subprocess.Popen, ["touch", str(flag)]), "importlib.import_module": Calls(importlib.import_module, "this"),
        "operator.methodcaller": Calls(operator.methodcaller, "x"), "torch.storage._load_from_bytes": Calls(torch.storage._load_from_bytes, b""), "torch.serialization.load": Calls(torch.load, "x"), "torch.hub.load": Calls(torch.hub.load, "x", "y"),
        "torch.jit._serialization.load": Calls(torch.jit.load, "x"), "builtins.__import__": Calls(builtins.__import__, "this"), "runpy._run_code|runpy.run_path": Calls(runpy.run_path, "x"), "torch._utils._rebuild_wrapper_subclass": Calls(torch._utils._rebuild_wrapper_subclass)}

@pytest.mark.parametrize("where,protocol", [("bare", 0), ("bare", 2), ("bare", 4), ("zip", 2), ("zip", 4), ("inside a module", 2), ("inside a module", 4)])
def test_no_call_is_run_and_its_name_is_said(tmp_path, where, protocol):
    flag = tmp_path/"ran"
    for name, attack in attacks(flag).items():
        path = tmp_path/"bad.pt"
        if where == "bare": path.write_bytes(pickle.dumps({"x": attack}, protocol=protocol))
        else: torch.save({"x": attack} if where == "zip" else changed(lambda b: setattr(b, "note", attack)), path, pickle_protocol=protocol)
        first = name if name != "builtins.getattr" else "builtins.getattr|importlib.import_module"
        with pytest.raises(RaptorError, match=f"asks for ({first.replace('.', '[.]')}),") as e: import_author_checkpoint(path)
        assert not flag.exists() and "\n" not in str(e.value)


def test_a_class_that_is_let_in_by_name_is_still_inert(tmp_path):
    flag = tmp_path/"ran"
    path = saved(changed(lambda b: setattr(b, "note", Calls(os.system, f"touch '{flag}'"))), tmp_path)
    assert isinstance(import_author_checkpoint(path, classes=("system",)), RecurrentBlock) and not flag.exists()


def archive(tmp_path, data, records=(("byteorder", b"little"),), compression=zipfile.ZIP_STORED):
    path = tmp_path/"made.pt"
    with zipfile.ZipFile(path, "w", compression) as z:
        if data is not None: z.writestr("a/data.pkl", data)
        for name, content in records: z.writestr(f"a/{name}", content)
    return path

def program(*ops): return b"\x80\x02" + b"".join(ops) + b"."
GLOBAL = lambda module, name: f"c{module}\n{name}\n".encode()
STORAGE = lambda count, kind="FloatStorage", key="0": b"(" + b"X\x07\0\0\0storage" + GLOBAL("torch", kind) + b"X" + struct.pack("<I", len(key)) + key.encode() + b"X\x03\0\0\0cpu" + b"\x8a\x08" + struct.pack("<q", count) + b"tQ"
NUMBER = lambda n: b"\x8a\x08" + struct.pack("<q", n)
def tensor(storage, offset, size, stride):
    return GLOBAL("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + NUMBER(offset) + b"(" + b"".join(map(NUMBER, size)) + b"t" + b"(" + b"".join(map(NUMBER, stride)) + b"t" + b"\x89" + b"}" + b"tR"
FOUR = (("byteorder", b"little"), ("data/0", struct.pack("<4f", 1, 2, 3, 4)))

def test_a_tensor_made_by_hand_is_read(tmp_path):
    assert read_pickle(archive(tmp_path, program(tensor(STORAGE(4), 1, (3,), (1,))), FOUR))[0][""].tolist() == [2, 3, 4]
    assert read_pickle(archive(tmp_path, program(tensor(STORAGE(4), 0, (2, 2), (1, 2))), FOUR[1:]))[0][""].tolist() == [[1, 3], [2, 4]] # without a byte order, as older files

@pytest.mark.parametrize("data,records", [
    (program(tensor(STORAGE(5), 0, (4,), (1,))), FOUR), (program(tensor(STORAGE(2**40), 0, (4,), (1,))), FOUR), (program(tensor(STORAGE(-1), 0, (4,), (1,))), FOUR), (program(tensor(STORAGE(4), 1, (4,), (1,))), FOUR),
    (program(tensor(STORAGE(4), 0, (10**9,), (0,))), FOUR), (program(tensor(STORAGE(4), -1, (2,), (1,))), FOUR), (program(tensor(STORAGE(4), 0, (2,), (-1,))), FOUR), (program(tensor(STORAGE(4), 0, (2,), (2**62,))), FOUR),
    (program(tensor(STORAGE(4), 0, (2, 2), (1,))), FOUR), (program(tensor(STORAGE(4, key="../0"), 0, (2,), (1,))), FOUR), (program(tensor(STORAGE(4, key="7"), 0, (2,), (1,))), FOUR), (program(tensor(b"N", 0, (2,), (1,))), FOUR),
    (program(GLOBAL("torch", "float32") + b")R"), FOUR), (program(b"K\x01Q"), FOUR), (program(b"}r\xff\xff\xff\xff"), FOUR), (b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b".", FOUR), (b"\x80\x05\x8e" + struct.pack("<Q", 2**60) + b".", FOUR),
    (program(b"h\x07"), FOUR), (b"", FOUR), (b"\x80\x02", FOUR), (b"\xff"*50, FOUR), (program(b"}"), (("byteorder", b"big"),)), (None, FOUR), (program(GLOBAL("__main__", "Block") + b")\x81N\x85b"), FOUR),
    (program(b"]q\0h\0a" + b"h\0a"*100), FOUR), (program(b"]q\0" + b"".join(b"]q" + bytes([i + 1]) + b"(h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60)) + b"h\x3c"), FOUR)])
def test_false_archives_are_refused_in_one_sentence(tmp_path, data, records):
    with pytest.raises(RaptorError, match="cannot be imported") as e: import_author_checkpoint(archive(tmp_path, data, records))
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


def test_compressed_records_are_refused(tmp_path):
    bomb = (("byteorder", b"little"), ("data/0", bytes(2**24)))
    with pytest.raises(RaptorError, match="compressed"): read_pickle(archive(tmp_path, program(tensor(STORAGE(4), 0, (2,), (1,))), bomb, zipfile.ZIP_DEFLATED))


STATE, SLOTS = b"}X\x01\0\0\0xK\x01sb", b"N}X\x01\0\0\0xK\x01s\x86b" # BUILD of {"x": 1}: into __dict__, and by setattr

@pytest.mark.parametrize("build", [STATE, SLOTS])
@pytest.mark.parametrize("module,name", [("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("collections", "OrderedDict"), ("torch", "FloatStorage"), ("torch", "float32"), ("torch", "Size"),
    ("torch.nn.modules.linear", "Linear"), ("builtins", "set")])
def test_nothing_that_a_name_stands_for_can_be_written_into(tmp_path, module, name, build):
    with pytest.raises(RaptorError, match="cannot be imported"): read_pickle(archive(tmp_path, program(GLOBAL(module, name) + build), FOUR))


QUADRUPLE = lambda *ops: b"(" + b"".join(ops) + b"t"
HUGE = [QUADRUPLE(STORAGE(count), NUMBER(0), b"(" + NUMBER(5*10**10) + b"t", b"(" + NUMBER(step) + b"t") for count, step in ((4, 0), (4, 1), (0, 1))] # for Tensor.set_
@pytest.mark.parametrize("state", [*HUGE, b"(\x88}}t", b"(\x88N}t", STATE[:-1], SLOTS[:-1]])
def test_a_tensor_cannot_be_changed_once_it_is_made(tmp_path, state):
    "BUILD calls __setstate__, which a real tensor has: it would take another size, ask for gradients, carry hooks."
    made = tensor(STORAGE(4), 0, (4,), (1,))
    with pytest.raises(RaptorError, match="cannot be imported"): read_pickle(archive(tmp_path, program(made, state, b"b"), FOUR))


def test_a_tensor_may_share_numbers_but_not_multiply_them(tmp_path):
    shared = b"}(" + b"".join(b"X\x02\0\0\0" + b"%02d" % i + (tensor(STORAGE(1000), 0, (1000,), (1,)) + b"q\x09" if i == 0 else b"h\x09") for i in range(99)) + b"u"
    with pytest.raises(RaptorError, match="more numbers than the file"): read_pickle(archive(tmp_path, program(shared), (("data/0", bytes(4000)),)))


NESTED = b"N" + b"\x85"*5000
@pytest.mark.parametrize("data", [b"}" + NESTED + b"Ns", b"]" + NESTED + b"a", b"\x8f(" + NESTED + b"\x90", b"N" + b"q\0h\0\x86"*200, b"(" + b"("*200 + b"t"*200 + b"l", GLOBAL("torch._utils", "_rebuild_parameter") + b"q\0" + b"N" + b"q\1h\0h\1\x85R"*200])
def test_deep_nesting_is_refused_before_anything_is_hashed(tmp_path, data):
    "Python's hash of a tuple recurses without a limit: a million nested ones would end the process."
    with pytest.raises(RaptorError, match="nested"): read_pickle(archive(tmp_path, program(data), FOUR))


@pytest.mark.parametrize("module,name,arguments", [("torch", "Size", 100), ("torch", "Size", None), ("builtins", "set", 1000), ("collections", "OrderedDict", 1)])
def test_containers_are_made_from_little(tmp_path, module, name, arguments):
    "A list of a million and a call in two bytes would be a million copies of it."
    made = GLOBAL(module, name) + (b"NN\x86R" if arguments is None else b"](" + (b"K\1" if name != "OrderedDict" else b"K\1K\2\x86")*arguments + b"e\x85R")
    with pytest.raises(RaptorError, match="cannot be imported"): read_pickle(archive(tmp_path, program(made), FOUR))


@pytest.mark.parametrize("data,sentence", [(b"}X" + struct.pack("<I", 5000) + b"k"*5000 + b"]s", "nested"), (b"}" + b"\x8b" + struct.pack("<I", 4000) + b"\x7f"*4000 + b"}s", "number is out of"),
    (b"".join(b"ca%d\nMlp\n0" % i for i in range(2000)) + b"}", "kinds of layer"), (b"0"*5, None), (b"N0"*2**19, "MiB")])
def test_outsized_names_and_numbers(tmp_path, data, sentence):
    with pytest.raises(RaptorError, match=sentence) as e: import_author_checkpoint(archive(tmp_path, program(data), FOUR))
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


@pytest.mark.parametrize("change", [lambda b: setattr(b.attn, "num_heads", 10**5000), lambda b: setattr(b.norm1, "eps", 10**5000), lambda b: vars(b).update({5: [1, 2]}), lambda b: setattr(b, "_non_persistent_buffers_set", 5)])
def test_attributes_of_other_kinds(tmp_path, change):
    try: import_author_checkpoint(saved(changed(change), tmp_path))
    except RaptorError as e: assert "\n" not in str(e)


def test_a_size_is_no_place_for_large_numbers(tmp_path):
    "The product of many long numbers takes hours."
    long = b"\x8b" + struct.pack("<I", 4000) + b"\x7f"*4000 + b"q\x09"
    made = GLOBAL("torch._utils", "_rebuild_tensor_v2") + b"(" + STORAGE(4) + b"K\0(" + long + b"h\x09"*10**5 + b"tq\x08h\x08\x89}tR"
    with pytest.raises(RaptorError, match="cannot be imported"): read_pickle(archive(tmp_path, program(made), FOUR))


def test_attributes_of_stand_ins_cannot_reach_python(tmp_path):
    "A stand-in takes any attribute, also those that Python looks up by itself; none of them runs anything of the file."
    layer, classes = GLOBAL("torch.nn.modules.linear", "Linear") + b")\x81", [c for c in vars(author_checkpoint).values() if isinstance(c, type)]
    before = [dict(vars(c)) for c in classes]
    for name in ("__setstate__", "__class__", "__dict__", "__reduce__", "__del__", "__hash__"):
        key = b"X" + struct.pack("<I", len(name)) + name.encode()
        for value in (GLOBAL("builtins", "set"), GLOBAL("torch._utils", "_rebuild_tensor_v2"), b"}", GLOBAL("torch.nn.modules.linear", "Linear")):
            for state in (b"}" + key + value + b"sb", b"N}" + key + value + b"s\x86b"):
                try: read_pickle(archive(tmp_path, program(layer + state + b"}" + key + b"Nsb"), FOUR))
                except RaptorError as e: assert "cannot be imported" in str(e)
    assert [dict(vars(c)) for c in classes] == before and len(classes) > 3


def test_no_module_is_imported_by_asking_torch_for_a_name(tmp_path, monkeypatch):
    "torch imports some of its own modules, such as _inductor, when they are looked up in it."
    asked = []
    monkeypatch.setitem(vars(torch), "__getattr__", lambda name: asked.append(name))
    for name in ("_inductor", "_dynamo", "onnx", "load", "float7"):
        with pytest.raises(RaptorError, match=f"asks for torch.{name}"): read_pickle(archive(tmp_path, program(GLOBAL("torch", name)), FOUR))
    assert not asked


@pytest.mark.parametrize("past", [8, 1000, 10**6, 2**31])
def test_a_record_that_runs_past_the_end_of_the_file(tmp_path, past):
    path = archive(tmp_path, None, (("first", bytes(4096)), *FOUR, ("data.pkl", program(tensor(STORAGE(4), 0, (4,), (1,))))))
    raw, size = bytearray(path.read_bytes()), struct.pack("<II", *[len(program(tensor(STORAGE(4), 0, (4,), (1,))))]*2)
    for at in (raw.find(size), raw.rfind(size)): raw[at:at + 8] = struct.pack("<II", *[struct.unpack("<I", size[:4])[0] + past]*2)
    path.write_bytes(raw)
    with pytest.raises(RaptorError, match="cannot be imported") as e: import_author_checkpoint(path)
    assert "\n" not in str(e.value)


def test_other_files_are_refused(tmp_path):
    path = saved(Block(), tmp_path, _use_new_zipfile_serialization=False)
    with pytest.raises(RaptorError, match="no zip archive"): import_author_checkpoint(path)
    with pytest.raises(RaptorError, match="does not exist"): import_author_checkpoint(tmp_path/"nowhere.pt")
    path = saved(Block(), tmp_path)
    whole = path.read_bytes()
    for cut in (1, 30, 4000, len(whole) - 10, len(whole) - 4000):
        path.write_bytes(whole[:cut])
        with pytest.raises(RaptorError, match="cannot be imported"): import_author_checkpoint(path)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_give_a_block_or_a_sentence(tmp_path_factory, flips):
    "Mutations inside data.pkl, with the archive's checksum renewed: the unpickler itself is tried, not the checksum."
    buffer = io.BytesIO(); torch.save(Block(), buffer)
    with zipfile.ZipFile(buffer) as z: records = {i.filename.split("/", 1)[1]: z.read(i) for i in z.infolist()}
    data = bytearray(records.pop("data.pkl"))
    for position, flip in flips: data[position % len(data)] ^= flip
    path = archive(tmp_path_factory.mktemp("flip"), bytes(data), tuple(records.items()))
    try: import_author_checkpoint(path)
    except RaptorError as e: assert "\n" not in str(e)


def test_importing_never_imports(tmp_path):
    "No module of the file is imported, even one that is there."
    (tmp_path/"innocent_layers.py").write_text("raise SystemExit('imported')")
    data = program(GLOBAL("innocent_layers", "Block") + b")\x81}b")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(RaptorError, match="no multi-head attention"): import_author_checkpoint(archive(tmp_path, data))
        assert "innocent_layers" not in sys.modules
    finally: sys.path.remove(str(tmp_path))
