"""Roots, atomic files and records."""
import os, signal, stat, subprocess, sys, textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from raptor.core import (
    RaptorError, atomic_path, check_name, check_writable, data_root, file_digest, fingerprint, home_root, read_json,
    run_record, seed_for, write_json
)


def test_argument_beats_environment_beats_default(monkeypatch, tmp_path):
    for root, variable in ((home_root, "RAPTOR_HOME"), (data_root, "RAPTOR_DATA")):
        monkeypatch.delenv(variable, raising=False)
        assert root().parent == type(tmp_path).home()
        monkeypatch.setenv(variable, str(tmp_path/"env"))
        assert root() == tmp_path/"env" and root(tmp_path/"arg") == tmp_path/"arg"


def test_roots_do_not_depend_on_where_one_stands(monkeypatch, tmp_path):
    monkeypatch.setenv("RAPTOR_HOME", "~/x")
    assert home_root().is_absolute() and "~" not in str(home_root())


@given(st.lists(st.one_of(st.integers(), st.text(max_size=8)), max_size=4), st.lists(st.one_of(st.integers(), st.text(max_size=8)), max_size=4))
def test_seeds_differ_when_labels_do(a, b):
    assert (seed_for(*a) == seed_for(*b)) == (a == b) and 0 <= seed_for(*a) < 2**63


def test_seed_is_the_same_on_every_machine():
    assert seed_for("scenes", 1, 2) == 5552706393379920919


def test_fingerprint_ignores_order_and_sees_values():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": (1, 2), "a": 1}) != fingerprint({"a": 1, "b": [2, 1]})
    assert len(fingerprint("")) == 16


def test_file_digest_reads_every_byte(tmp_path):
    (tmp_path/"a").write_bytes(b"\0" * (3 << 20)); (tmp_path/"b").write_bytes(b"\0" * (3 << 20) + b"\1")
    assert file_digest(tmp_path/"a") != file_digest(tmp_path/"b")


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    write_json(tmp_path/"a.json", 1)
    with pytest.raises(KeyboardInterrupt):
        with atomic_path(tmp_path/"a.json") as t: t.write_text("2"); raise KeyboardInterrupt
    assert read_json(tmp_path/"a.json") == 1 and os.listdir(tmp_path) == ["a.json"]


def test_what_cannot_be_written_is_named_as_it_was_asked_for(tmp_path):
    with pytest.raises(OSError) as failed:
        with atomic_path(tmp_path/"a.json") as t: t.mkdir(); t.write_text("a folder is no file")
    assert failed.value.filename == str(tmp_path/"a.json") and os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path):
    (tmp_path/"a.json").write_text("1")
    with pytest.raises(RaptorError, match="a.json cannot be written: no space left on device; free some space there"):
        with atomic_path(tmp_path/"a.json") as t:
            t.write_text("2")
            Path("/dev/full").write_text("2")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["1"]


def test_a_killed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path/"a.json", 1)
    code = f"""
        import time
        from raptor.core import atomic_path
        with atomic_path({str(tmp_path/'a.json')!r}) as t: t.write_text("2"); print("written", flush=True); time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL); process.wait()
    assert read_json(tmp_path/"a.json") == 1


def test_near_names():
    with pytest.raises(RaptorError, match="did you mean 'digits'"): check_name("digitz", ["digits", "smoke"], "preset")
    with pytest.raises(RaptorError, match="known: digits, smoke"): check_name("zzz", ["smoke", "digits"], "preset")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RaptorError, match="cannot write"): check_writable(tmp_path/"new")
    finally: tmp_path.chmod(0o700)


def test_a_file_in_the_way_and_a_full_disk(tmp_path):
    (tmp_path/"f").write_text("")
    with pytest.raises(RaptorError, match="cannot write to"): check_writable(tmp_path/"f"/"x")
    with pytest.raises(RaptorError, match="GB free"): check_writable(tmp_path, 10**19)
    assert os.listdir(tmp_path) == ["f"]


def test_records_hold_no_clock_and_no_path():
    record = run_record(seed=1, data="d", span="0-5")
    assert record == run_record(seed=1, data="d", span="0-5") and set(record) == {"span", "seed", "data", "code", "hardware", "versions"}
    assert not any(os.sep in str(v) for v in record.values())


def test_broken_json_is_named(tmp_path):
    (tmp_path/"a.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(RaptorError, match="a.json is not text in UTF-8"): read_json(tmp_path/"a.json")
    with pytest.raises(RaptorError, match="does not exist"): read_json(tmp_path/"b.json")


def put_pipe(path): os.mkfifo(path)
def put_folder(path): path.mkdir()
def put_device(path): path.symlink_to("/dev/zero")
def put_large(path): path.write_bytes(b"x" * 11)
def put_nested(path): path.write_text("[" * 9 + "1")


@pytest.mark.parametrize("put, why", [
    (put_pipe, "not a regular file"), (put_folder, "is a directory"), (put_device, "not a regular file"),
    (put_large, "has 11 bytes where at most 10"), (put_nested, "not valid JSON")])
def test_only_small_regular_files_are_read(tmp_path, put, why):
    put(tmp_path/"a.json")
    with pytest.raises(RaptorError, match=rf"a\.json .*{why}"): read_json(tmp_path/"a.json", limit=10)


@pytest.mark.parametrize("umask, mode", [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_the_mode_of_a_file_follows_the_umask(tmp_path, umask, mode):
    from safetensors.numpy import save_file
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path/"a.safetensors") as t: save_file({"x": np.zeros(2)}, t) # 0600 on its own
        assert os.umask(umask) == umask # as it was
    finally: os.umask(before)
    assert stat.S_IMODE((tmp_path/"a.safetensors").stat().st_mode) == mode
