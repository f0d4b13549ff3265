"""Pickled modules are read without being run: their trajectories are the same, and nothing in the file is executed."""
import builtins
import importlib
import io
import operator
import os
import pickle
import resource
import runpy
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.serialization import get_safe_globals

from raptor.core import RaptorError
from raptor.model.authors import import_author_checkpoint, read_pickle
from raptor.model.block import RecurrentBlock
from raptor.model.raptor import Raptor
from raptor.phases import Phases


# --- modules laid out as research code usually does it ----------------------------------------------------------

class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
    def forward(self, x): return x*self.gamma

class SwiGLUFFN(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2*hidden), nn.Linear(hidden, dim)
    def forward(self, x):
        x1, x2 = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(x1)*x2)

class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.1)
    def forward(self, x): return self.fc2(self.drop(self.act(self.fc1(x))))

class Block(nn.Module):
    def __init__(self, dim=8, heads=2, mlp=SwiGLUFFN, scaled=True, hidden=None, eps=1e-5):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ls1, self.mlp, self.ls2 = LayerScale(dim), mlp(dim, hidden or 4*dim), LayerScale(dim)
        self.scaler = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 3*dim)) if scaled else None
    def forward(self, x, t):
        a = b = c = 1.
        if self.scaler is not None: a, b, c = (1 + self.scaler(x.new_tensor([[float(t)]])))[:, None].chunk(3, -1)
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
    with torch.no_grad():
        states = run([b.double() for b in blocks], ends, x)
        torch.testing.assert_close(ours.double().rollout(x, 0, ends[-1]), states, atol=1e-6, rtol=1e-9)

def run(blocks, ends, x):
    states, start = [x], 0
    for block, end in zip(blocks, ends):
        for t in range(start + 1, end + 1): states.append(block(states[-1], t))
        start = end
    return torch.stack(states, 1)


# --- the same trajectories --------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments", [{}, dict(mlp=Mlp), dict(scaled=False), dict(hidden=13)])
def test_a_pickled_block_becomes_the_same_block(tmp_path, arguments):
    block = awake(Block(**arguments))
    ours = import_author_checkpoint(saved(block, tmp_path))
    assert isinstance(ours, RecurrentBlock) and ours.config.num_heads == 2
    compare(ours, [block], [5])


@pytest.mark.parametrize("attributes,ends", [
    (dict(ends=[2, 5]), None), (dict(phase_ends=(0, 2, 5)), None), (dict(counts=[2, 3]), None),
    (dict(n_iters=(2, 3), layer_ends=[2, 5]), None), (dict(thresholds=[2]), None), (dict(thresholds=(0, 2, 5)), None),
    ({}, (2, 5)), (dict(ends=[2, 5]), (2, 5))])
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
    state, optimizer = model.state_dict(), {"state": {0: {"exp_avg": torch.ones(3)}}}
    for value, more in (
        (state, {}), ({"epoch": 3, "model": state}, {}), ({"_orig_mod." + k: v for k, v in state.items()}, {}),
        ({"model": model, "dtype": torch.float32, "device": torch.device("cpu")}, dict(num_heads=None)),
        ({"model": state, "optimizer": optimizer}, dict(ignore=("optimizer",)))):
        more = {"num_heads": 2, **more}
        ours = import_author_checkpoint(saved(value, tmp_path), depth=5, ends=(2, 5), **more).state_dict()
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_what_is_read_does_not_depend_on_the_file_any_more(tmp_path):
    block, before = awake(Block()), set(get_safe_globals())
    path = saved(block, tmp_path)
    ours = import_author_checkpoint(path)
    path.write_bytes(bytes(path.stat().st_size))
    compare(ours, [block], [3])
    assert set(get_safe_globals()) == before # the stand-ins are allowed for one file only


def test_a_class_named_by_the_caller_and_weights_that_share_a_storage(tmp_path):
    model = awake(Stack([Block(), Block()], ends=[1, 2]))
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    offset = 0
    for p in model.parameters():
        p.data = flat[offset:offset + p.numel()].view(p.shape)
        offset += p.numel()
    path = saved(model, tmp_path)
    with pytest.raises(RaptorError, match=r"asks for [\w.]*test_import.Stack,"): import_author_checkpoint(path, depth=2)
    ours = import_author_checkpoint(path, depth=2, classes=("Stack",))
    ours.save_pretrained(tmp_path/"again") # its weights no longer share one
    compare(ours, model.blocks, [1, 2])


class SeparateGate(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.up_proj, self.gate_proj = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.down_proj = nn.Linear(hidden, dim)
    def forward(self, x): return self.down_proj(F.silu(self.gate_proj(x))*self.up_proj(x))

class Renamed(nn.Module):
    "Norms defined in the other order, LayerScale as bare parameters, no biases in the MLP's gate."
    def __init__(self, dim=8):
        super().__init__()
        self.gamma_2, self.gamma_1 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.ln_2, self.ln_1 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.core = nn.ModuleDict({"mha": nn.MultiheadAttention(dim, 2, batch_first=True)})
        self.ffn = SeparateGate(dim, 12)
        self.ffn.gate_proj.bias = self.ffn.up_proj.bias = None
    def forward(self, x, t):
        y = self.ln_1(x)
        x = x + self.gamma_1*self.core["mha"](y, y, y)[0]
        return x + self.gamma_2*self.ffn(self.ln_2(x))


def test_other_names_and_another_layout(tmp_path):
    block = awake(Renamed())
    ours = import_author_checkpoint(saved(block, tmp_path), classes=("Renamed", "SeparateGate"))
    assert (ours.config.mlp, ours.config.hidden, ours.config.conditioning) == ("swiglu", 12, ())
    compare(ours, [block], [3])


# --- what is not recognised is said -----------------------------------------------------------------------------

def changed(change, **arguments):
    block = Block(**arguments)
    change(block)
    return block

def attribute(name, value, **arguments):
    module, _, leaf = name.rpartition(".")
    return changed(lambda b: setattr(b.get_submodule(module), leaf, value), **arguments)

def two(**attributes): return RaptorModel([Block(), Block()], **attributes)

@pytest.mark.parametrize("make,sentence", [
    (lambda: Block(eps=1e-6), "eps=1e-06"), (lambda: attribute("router", nn.Linear(8, 3)), "make no MLP"),
    (lambda: attribute("query", nn.Parameter(torch.ones(3))), "query, for which"),
    (lambda: attribute("norm3", nn.LayerNorm(8)), "3 tensors that look like norm"),
    (lambda: changed(lambda b: delattr(b, "norm2")), "1 tensors that look like norm"),
    (lambda: attribute("scaler", nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 24))), "cannot be imported"),
    (lambda: attribute("mlp.act", nn.GELU("tanh"), mlp=Mlp), "approximate=tanh"),
    (lambda: attribute("attn", nn.MultiheadAttention(8, 2, add_zero_attn=True)), "add_zero_attn=True"),
    (lambda: attribute("attn", nn.MultiheadAttention(8, 2, add_bias_kv=True)), "attn.bias_[kv]"),
    (lambda: attribute("mlp.act", nn.ReLU(), mlp=Mlp), "activation.ReLU,"),
    (lambda: attribute("norm1", nn.RMSNorm(8)), "RMSNorm,"),
    (lambda: {"a": torch.ones(2)}, "no multi-head attention"), (lambda: 3, "no multi-head attention"),
    (lambda: two(), "does not state where their phases end"),
    (lambda: two(ends=[2, 24]), r"\(2, 24\), which does not close with depth=12"),
    (lambda: two(norm=nn.LayerNorm(8)), "norm.weight, norm.bias outside its blocks"),
    (lambda: RaptorModel([Block() for _ in range(13)]), "at most 12"),
    (lambda: Block().state_dict(), "pass num_heads="),
    (lambda: {"x.attn.in_proj_weight": torch.ones(24, 8)}, "num_heads")])
def test_what_is_no_recurrent_block_is_refused_in_one_sentence(tmp_path, make, sentence):
    with pytest.raises(RaptorError, match=sentence) as e: import_author_checkpoint(saved(make(), tmp_path))
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


DTYPES = torch.float32, torch.float16, torch.int64

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_state_dict_of_any_shapes_gives_a_block_or_a_sentence(tmp_path_factory, data):
    state = Block().state_dict()
    for name in data.draw(st.lists(st.sampled_from(sorted(state)), min_size=1, max_size=3)):
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 8, 16, 24, 32]), max_size=3))
        if data.draw(st.booleans()): state.pop(name, None)
        else: state[name] = torch.zeros(shape, dtype=data.draw(st.sampled_from(DTYPES)))
    try: import_author_checkpoint(saved(state, tmp_path_factory.mktemp("state")), num_heads=2)
    except RaptorError as e: assert "\n" not in str(e)


def test_contradictions_are_refused(tmp_path):
    for value, arguments, sentence in (
        (two(ends=[2, 12]), dict(ends=(3, 12)), r"end at \(2, 12\), and ends=\(3, 12\)"),
        (two(ends=[2, 12]), dict(num_heads=4), "num_heads=2, and 4 was given"),
        (two(), dict(ends=(1, 2, 12)), "2 blocks were given for 3"),
        (two(ends=[2, 12], splits=[3, 12]), {}, "does not state"),
        (Block().state_dict(), dict(num_heads=3), "not a multiple of num_heads")):
        with pytest.raises(RaptorError, match=sentence): import_author_checkpoint(saved(value, tmp_path), **arguments)


# --- nothing runs -----------------------------------------------------------------------------------------------

class Calls:
    "Pickles to a call."
    def __init__(self, function, *arguments): self.call = function, arguments
    def __reduce__(self): return self.call

def attacks(flag):
    write = f"open({str(flag)!r}, 'w').write('x')"
    return {
        "posix.system|nt.system": Calls(os.system, f"touch '{flag}'"), "builtins.eval": Calls(eval, write),
        "builtins.exec": Calls(exec, write), "io.open|_io.open|builtins.open": Calls(open, str(flag), "w"),
        "builtins.getattr|importlib.import_module": Calls(getattr, Calls(importlib.import_module, "os"), "system"),
        "subprocess.Popen": Calls(subprocess.Popen, ["touch", str(flag)]),
        "operator.methodcaller": Calls(operator.methodcaller, "x"),
        "importlib.import_module": Calls(importlib.import_module, "this"),
        "torch.storage._load_from_bytes": Calls(torch.storage._load_from_bytes, b""),
        "torch.serialization.load": Calls(torch.load, "x"), "torch.hub.load": Calls(torch.hub.load, "x", "y"),
        "torch.jit._serialization.load": Calls(torch.jit.load, "x"),
        "builtins.__import__": Calls(builtins.__import__, "this"),
        "runpy._run_code|runpy.run_path": Calls(runpy.run_path, "x"), # torch itself would allow the next one
        "torch._utils._rebuild_wrapper_subclass": Calls(torch._utils._rebuild_wrapper_subclass)}

@pytest.mark.parametrize("where", ["zip", "inside a module"])
def test_no_call_is_run_and_its_name_is_stated(tmp_path, where):
    flag = tmp_path/"ran"
    for name, attack in attacks(flag).items():
        path = saved({"x": attack} if where == "zip" else attribute("note", attack), tmp_path)
        sentence = f"asks for ({name.replace('.', '[.]')}),"
        with pytest.raises(RaptorError, match=sentence) as e: import_author_checkpoint(path)
        assert not flag.exists() and "\n" not in str(e.value)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_call_of_a_bare_pickle_or_of_another_protocol_is_run(tmp_path, protocol):
    flag, path = tmp_path/"ran", tmp_path/"bad.pt"
    for attack in attacks(flag).values():
        path.write_bytes(pickle.dumps({"x": attack}, protocol=protocol))
        with pytest.raises(RaptorError, match="no zip archive"): import_author_checkpoint(path)
        torch.save({"x": attack}, path, pickle_protocol=protocol)
        with pytest.raises(RaptorError, match="asks for|has protocol|damaged"): import_author_checkpoint(path)
        assert not flag.exists()
    with pytest.raises(RaptorError, match="has protocol 4; save it again with protocol 2"):
        import_author_checkpoint(saved(Block(), tmp_path, pickle_protocol=4))


def test_a_class_that_is_allowed_by_name_is_still_inert(tmp_path):
    flag = tmp_path/"ran"
    write = f"open({str(flag)!r}, 'w').write('x')"
    path = saved(attribute("note", Calls(eval, write)), tmp_path)
    assert isinstance(import_author_checkpoint(path, classes=("eval",)), RecurrentBlock) and not flag.exists()
    for note, name in ((Calls(os.system, f"touch '{flag}'"), "system"), (torch.Size([3]), "Size")): # torch decides on both
        with pytest.raises(RaptorError, match="cannot be imported"):
            import_author_checkpoint(saved(attribute("note", note), tmp_path), classes=(name,))
        assert not flag.exists()


ENVELOPE = (("version", b"3\n"), ("byteorder", b"little"))
def archive(tmp_path, data, records=ENVELOPE, compression=zipfile.ZIP_STORED):
    path = tmp_path/"made.pt"
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, content in (("data.pkl", data), *records):
            if content is not None: z.writestr(f"a/{name}", content)
    return path

def program(*ops): return b"\x80\x02" + b"".join(ops) + b"."
def name_of(module, name): return f"c{module}\n{name}\n".encode()
def text(value): return b"X" + struct.pack("<I", len(value)) + value.encode()
def number(n): return b"\x8a\x08" + struct.pack("<q", n)
def storage(count, kind="FloatStorage", key="0"):
    return b"(" + text("storage") + name_of("torch", kind) + text(key) + text("cpu") + number(count) + b"tQ"
def tensor(storage, offset, size, stride):
    sizes = (b"(" + b"".join(map(number, s)) + b"t" for s in (size, stride))
    rebuild = name_of("torch._utils", "_rebuild_tensor_v2")
    return rebuild + b"(" + storage + number(offset) + b"".join(sizes) + b"\x89}tR"
NUMBERS = ("data/0", struct.pack("<4f", 1, 2, 3, 4))
FOUR = (*ENVELOPE, NUMBERS)
MADE = tensor(storage(4), 0, (4,), (1,))


def test_a_tensor_made_by_hand_is_read(tmp_path):
    def read(made, records=FOUR): return read_pickle(archive(tmp_path, program(made), records))[0][""].tolist()
    assert read(tensor(storage(4), 1, (3,), (1,))) == [2, 3, 4]
    assert read(tensor(storage(4), 0, (2, 2), (1, 2)), (ENVELOPE[0], NUMBERS)) == [[1, 3], [2, 4]] # as in older files
    swapped = (ENVELOPE[0], ("byteorder", b"big"), ("data/0", struct.pack(">4f", 1, 2, 3, 4)))
    assert read(MADE, swapped) == [1, 2, 3, 4]

def refused(path, sentence="cannot be imported", read=read_pickle):
    with pytest.raises(RaptorError, match=sentence) as e: read(path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600 and "made.pt" in str(e.value)

@pytest.mark.parametrize("made", [
    tensor(storage(5), 0, (4,), (1,)), tensor(storage(2**40), 0, (4,), (1,)), tensor(storage(-1), 0, (4,), (1,)),
    tensor(storage(4), 1, (4,), (1,)), tensor(storage(4), 0, (10**9,), (0,)), tensor(storage(4), -1, (2,), (1,)),
    tensor(storage(4), 0, (2,), (-1,)), tensor(storage(4), 0, (2,), (2**62,)), tensor(storage(4), 0, (2, 2), (1,)),
    tensor(storage(4, key="../0"), 0, (2,), (1,)), tensor(storage(4, key="7"), 0, (2,), (1,)),
    tensor(b"N", 0, (2,), (1,)), name_of("torch", "float32") + b")R", b"K\x01Q", b"h\x07",
    name_of("__main__", "Block") + b")\x81N\x85b",
    *(op + struct.pack("<Q", 2**60) for op in (b"\x96", b"\x8e")), # a bytearray and a string of 8-byte lengths
    b"]q\0h\0a" + b"h\0a"*100, b"]q\0" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(60)) + b"h\x3c"])
def test_false_pickles_are_refused_in_one_sentence(tmp_path, made): refused(archive(tmp_path, program(made), FOUR))

@pytest.mark.parametrize("data", [None, b"", b"\x80\x02", b"\xff"*50])
def test_what_is_no_pickle_is_refused(tmp_path, data): refused(archive(tmp_path, data, FOUR))


def test_archives_that_torch_does_not_write(tmp_path):
    bomb = (*ENVELOPE, ("data/0", bytes(2**24)))
    refused(archive(tmp_path, program(MADE), bomb, zipfile.ZIP_DEFLATED), "compressed")
    with pytest.warns(UserWarning, match="Duplicate"):
        path = archive(tmp_path, program(MADE), (*FOUR, ("data.pkl", b"N.")))
    refused(path, "repeated")
    refused(archive(tmp_path, None, (*FOUR, ("constants.pkl", program(MADE)))), "no data.pkl")
    refused(archive(tmp_path, program(MADE), (*FOUR, ("constants.pkl", b"N."))))


# BUILD of {"x": 1}: into __dict__, and by setattr
STATE, SLOTS = b"}" + text("x") + b"K\1sb", b"N}" + text("x") + b"K\1s\x86b"

@pytest.mark.parametrize("build", [STATE, SLOTS])
@pytest.mark.parametrize("module,name", [
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("collections", "OrderedDict"),
    ("torch", "FloatStorage"), ("torch", "float32"), ("torch.nn.modules.linear", "Linear"), ("__builtin__", "set")])
def test_nothing_that_a_name_stands_for_can_be_written_into(tmp_path, module, name, build):
    refused(archive(tmp_path, program(name_of(module, name) + build), FOUR))


def sized(count, step):
    return b"(" + storage(count) + number(0) + b"(" + number(5*10**10) + b"t(" + number(step) + b"tt"

@pytest.mark.parametrize("state", [sized(4, 0), sized(4, 1), sized(0, 1), STATE[:-1], SLOTS[:-1]])
def test_a_tensor_cannot_grow_after_it_is_made(tmp_path, state):
    "BUILD calls the __setstate__ of a tensor, which could give it another size."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(archive(tmp_path, program(MADE, state, b"b"), FOUR))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18 # KiB


def test_no_hook_of_the_file_stays_on_a_weight(tmp_path):
    hooks = b"}K\1" + name_of("torch._utils", "_rebuild_parameter") + b"s"
    hooked = name_of("torch._utils", "_rebuild_parameter") + b"(" + MADE + b"\x88" + hooks + b"tR"
    tensors, _ = read_pickle(archive(tmp_path, program(hooked), FOUR))
    assert not tensors[""].requires_grad and not tensors[""]._backward_hooks


def test_a_tensor_may_share_numbers_but_not_multiply_them(tmp_path):
    first = text("0") + tensor(storage(1000), 0, (1000,), (1,)) + b"q\x09"
    data = program(b"}(" + first + b"".join(text(f"{i}") + b"h\x09" for i in range(1, 99)) + b"u")
    refused(archive(tmp_path, data, (*ENVELOPE, ("data/0", bytes(4000)))), "more numbers than the file")


NESTED = b"N" + b"\x85"*30_000
@pytest.mark.parametrize("data", [
    b"}" + NESTED + b"Ns", b"]" + NESTED + b"a", b"N" + b"q\0h\0\x86"*30_000, b"("*30_000 + b"t"*30_000])
def test_deep_nesting_is_refused_before_anything_is_hashed(tmp_path, data):
    "Python's hash of a tuple recurses without a limit: a million nested ones would end the process."
    refused(archive(tmp_path, program(data), FOUR), "nests")


LIST = b"](" + b"".join(b"J" + struct.pack("<i", i) for i in range(10**5)) + b"e\x85q\0" # a tuple of one long list
@pytest.mark.parametrize("kind", ["__builtin__ set", "collections OrderedDict", "torch Size"])
def test_a_long_list_is_not_copied_many_times(tmp_path, kind):
    "A list of a hundred thousand numbers and ten thousand calls of three bytes would be a billion numbers."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = program(LIST, name_of(*kind.split()), b"q\1h\0R", b"h\1h\0R"*10**4)
    refused(archive(tmp_path, data, FOUR), "copies containers|asks for torch.Size")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18 # KiB


@pytest.mark.parametrize("asked", [
    "builtins bytearray", "torch Tensor", "torch FloatTensor", "_codecs encode", "collections Counter"])
def test_what_torch_allows_and_a_model_does_not_need_is_refused(tmp_path, asked):
    "torch would call bytearray(10**11)."
    call = name_of(*asked.split()) + number(10**11) + b"\x85R"
    refused(archive(tmp_path, program(call), FOUR), f"asks for {asked.replace(' ', '.')},")


@pytest.mark.parametrize("data,sentence", [
    (b"}" + text("k"*5000) + b"}s", "nested"),
    (b"}" + b"\x8b" + struct.pack("<I", 4000) + b"\x7f"*4000 + b"}s", "damaged"),
    (b"(" + b"".join(b"ca%d\nMlp\n" % i for i in range(2000)) + b"t", "kinds of layers"), (b"N0"*2**19, "MiB"),
    (b"}" + text("__setstate__") + b"Ns", "sets attributes")])
def test_outsized_names_and_numbers(tmp_path, data, sentence): refused(archive(tmp_path, program(data), FOUR), sentence)


@pytest.mark.parametrize("change", [
    lambda b: setattr(b.attn, "num_heads", 10**5000), lambda b: setattr(b.norm1, "eps", 10**5000),
    lambda b: vars(b).update({5: [1, 2]}), lambda b: setattr(b, "_non_persistent_buffers_set", 5)])
def test_attributes_of_other_kinds(tmp_path, change):
    try: import_author_checkpoint(saved(changed(change), tmp_path))
    except RaptorError as e: assert "\n" not in str(e)


def test_attributes_of_stand_ins_cannot_reach_python(tmp_path):
    "A stand-in takes any attribute except those that Python itself looks up."
    layer = name_of("torch.nn.modules.linear", "Linear") + b")\x81"
    for name in ("__setstate__", "__class__", "__dict__", "__reduce__", "__del__", "__hash__"):
        for state in (b"}" + text(name) + layer + b"sb", b"N}" + text(name) + layer + b"s\x86b"):
            refused(archive(tmp_path, program(layer, state), FOUR), "sets attributes")


@pytest.mark.parametrize("name", ["_inductor", "_dynamo", "onnx", "load", "float7"])
def test_no_module_is_imported_by_asking_torch_for_a_name(tmp_path, monkeypatch, name):
    "torch imports some of its own modules, such as _inductor, when they are looked up in it."
    asked = []
    monkeypatch.setitem(vars(torch), "__getattr__", lambda name: asked.append(name))
    refused(archive(tmp_path, program(name_of("torch", name)), FOUR), f"asks for torch.{name},")
    assert name not in asked


@pytest.mark.parametrize("past", [8, 1000, 10**6, 2**31])
def test_a_record_that_runs_past_the_end_of_the_file(tmp_path, past):
    path = archive(tmp_path, None, (("first", bytes(4096)), *FOUR, ("data.pkl", program(MADE))))
    raw, size = bytearray(path.read_bytes()), len(program(MADE))
    sizes = struct.pack("<II", size, size)
    for at in (raw.find(sizes), raw.rfind(sizes)): raw[at:at + 8] = struct.pack("<II", size + past, size + past)
    path.write_bytes(raw)
    refused(path)


def test_other_files_are_refused(tmp_path):
    path = saved(Block(), tmp_path, _use_new_zipfile_serialization=False)
    with pytest.raises(RaptorError, match="no zip archive"): import_author_checkpoint(path)
    with pytest.raises(RaptorError, match="does not exist"): import_author_checkpoint(tmp_path/"nowhere.pt")
    path = saved(Block(), tmp_path)
    whole = path.read_bytes()
    for cut in (1, 30, 4000, len(whole) - 10, len(whole) - 4000):
        path.write_bytes(whole[:cut])
        with pytest.raises(RaptorError, match="cannot be imported"): import_author_checkpoint(path)


@pytest.fixture(scope="module")
def pickled():
    "A saved block, its records, its weights as we read them, and all numbers that it holds."
    buffer = io.BytesIO()
    block = awake(Block())
    torch.save(block, buffer)
    with zipfile.ZipFile(buffer) as z: records = {i.filename.split("/", 1)[1]: z.read(i) for i in z.infolist()}
    numbers = torch.cat([p.detach().flatten() for p in block.parameters()])
    return buffer.getvalue(), records, numbers


def read_or_sentence(path):
    try: return import_author_checkpoint(path)
    except RaptorError as e: assert "\n" not in str(e)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_flipped_byte_gives_the_same_block_or_a_sentence(tmp_path_factory, pickled, position, flip):
    path = tmp_path_factory.mktemp("flip")/"checkpoint.pt"
    path.write_bytes(pickled[0])
    expected = import_author_checkpoint(path).state_dict()
    raw = bytearray(pickled[0])
    raw[position % len(raw)] ^= flip
    path.write_bytes(raw)
    ours = read_or_sentence(path)
    assert ours is None or all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@settings(max_examples=150, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
def test_a_changed_program_gives_numbers_of_the_file_or_a_sentence(tmp_path_factory, pickled, flips):
    "Mutations inside data.pkl, with the checksum of the archive renewed: the reader itself is tried, not the checksum."
    records = dict(pickled[1])
    data = bytearray(records.pop("data.pkl"))
    for position, flip in flips: data[position % len(data)] ^= flip
    ours = read_or_sentence(archive(tmp_path_factory.mktemp("flip"), bytes(data), tuple(records.items())))
    if ours is None: return
    assert isinstance(ours, RecurrentBlock) and (ours.config.dim, ours.config.num_heads) == (8, 2)
    given = torch.cat([pickled[2], torch.tensor([0., 1.])]) # a missing bias is 0, a missing LayerScale 1
    assert all(torch.isin(p.detach().float(), given).all() for p in ours.parameters())


def test_importing_never_imports(tmp_path, monkeypatch):
    "No module of the file is imported, even one that exists."
    (tmp_path/"innocent_layers.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    refused(archive(tmp_path, program(name_of("innocent_layers", "Block") + b")\x81}b")), "no multi-head", import_author_checkpoint)
    assert "innocent_layers" not in sys.modules
