"""Forks of a warm process stand in for fresh ones: streams, folder, environment, exit status, signals, and ends of all kinds."""
import os, signal, socket, struct, subprocess, sys, tempfile, textwrap, time
from contextlib import contextmanager

import psutil
import pytest

import raptor
from raptor.pipeline.warm import can_fork, is_fork, warm_command, warm_process

pytestmark = pytest.mark.skipif(not can_fork(), reason="processes start afresh here")

def importable():
    "A warm process imports zarr, which has no release for Python 3.10; there everything starts afresh."
    pytest.importorskip("zarr", reason="the warm process imports zarr 3, which has no release for Python 3.10")

ENTRIES = """
import os, sys, time
def tell(): print(os.getcwd(), os.environ["WHO"], sys.argv[1:], "torch" in sys.modules, sep="|"); print("aside", file=sys.stderr); print(sys.stdin.read())
def leave(): sys.exit(int(sys.argv[1]))
def complain(): sys.exit("it went wrong")
def fail(): raise ValueError("not this way")
def last_words(): import atexit; atexit.register(lambda: print("bye"))
def wait():
    print(os.getpid(), flush=True)
    time.sleep(60)
def until_told():
    print(os.getpid(), flush=True)
    sys.exit(int(sys.stdin.readline()))
def mark(): open(sys.argv[1], "w").close()
def where():
    import raptor; from raptor.pipeline.warm import is_fork
    print(raptor.__file__, "" in sys.path or os.getcwd() in sys.path, is_fork(), sep="|")
def stay():
    import signal
    def on(*_): print("stopping", flush=True); sys.exit(7)
    signal.signal(signal.SIGTERM, on); print(os.getpid(), flush=True)
    time.sleep(60)
def threads(): import torch; print(torch.get_num_threads())
"""

@pytest.fixture(scope="module")
def warm(entries, misleading):
    "A warm process, started where a folder is named like the package."
    importable()
    with warm_started_in(misleading): yield

@contextmanager
def warm_started_in(folder):
    before = os.getcwd()
    os.chdir(folder)
    with warm_process(): os.chdir(before); yield

@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    "The functions above, where every process finds them."
    folder = tmp_path_factory.mktemp("entries")
    (folder/"entries.py").write_text(ENTRIES)
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
        yield folder

@pytest.fixture(scope="module")
def misleading(tmp_path_factory):
    folder = tmp_path_factory.mktemp("misleading")
    for name in ("raptor", "torch"):
        (folder/name).mkdir()
        (folder/name/"__init__.py").write_text(f"raise ImportError('this is not {name}')")
    return folder

@pytest.fixture
def bare(entries):
    "A warm process without any imports, to be treated badly: the process, and where it listens."
    with tempfile.TemporaryDirectory(prefix="raptor-") as folder:
        address = f"{folder}/warm"
        server = subprocess.Popen([sys.executable, "-c", "import sys; from raptor.pipeline.warm import serve; serve(sys.argv[1])", address], stdin=subprocess.PIPE)
        until(lambda: connected(address))
        yield server, address
        server.kill(); server.wait()

def connected(address):
    "A client's socket, None where nobody listens."
    s = socket.socket(socket.AF_UNIX)
    try: s.connect(address)
    except OSError: s.close(); return None
    return s

def until(holds, seconds=10):
    end = time.time() + seconds
    while not (value := holds()): assert time.time() < end; time.sleep(0.02)
    return value

def command(name, *arguments, address=None): return [*warm_command(f"entries:{name}", address), *arguments]
def run(name, *arguments, **kwargs): return subprocess.run(command(name, *arguments), capture_output=True, text=True, timeout=60, **kwargs)
def alive(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return True
def gone(pid, seconds=10):
    until(lambda: not alive(pid), seconds)
    return True

def test_a_fork_has_the_streams_folder_environment_and_arguments_of_the_one_that_asked(warm, tmp_path):
    said = run("tell", "a", "b c", cwd=tmp_path, env={**os.environ, "WHO": "me"}, input="typed")
    assert said.stdout.splitlines() == [f"{tmp_path}|me|['a', 'b c']|True", "typed"], "torch is there without having been imported"
    assert said.stderr == "aside\n" and said.returncode == 0

@pytest.mark.parametrize(["name", "arguments", "status", "words"], [("leave", ["0"], 0, ""), ("leave", ["3"], 3, ""), ("complain", [], 1, "it went wrong"), ("fail", [], 1, "not this way")])
def test_exit_status_is_that_of_the_fork(warm, name, arguments, status, words):
    said = run(name, *arguments)
    assert said.returncode == status and words in said.stderr

def test_what_was_registered_for_the_end_is_done(warm): assert run("last_words").stdout == "bye\n"

@pytest.mark.parametrize("count", ["1", "2"])
def test_threads_come_with_the_environment(warm, count): assert run("threads", env={**os.environ, "OMP_NUM_THREADS": count}).stdout.strip() == count

def test_forks_share_nothing(warm):
    first, second = run("tell", env={**os.environ, "WHO": "first"}, input=""), run("tell", env={**os.environ, "WHO": "second"}, input="")
    assert "|first|" in first.stdout and "|second|" in second.stdout

def test_signals_are_handed_on(warm):
    p = subprocess.Popen(command("stay"), stdout=subprocess.PIPE, text=True)
    p.stdout.readline()
    p.send_signal(signal.SIGTERM)
    assert p.stdout.readline() == "stopping\n" and p.wait(10) == 7

def test_a_fork_ends_with_the_one_that_asked_even_by_sigkill(warm):
    p = subprocess.Popen(command("wait"), stdout=subprocess.PIPE, text=True)
    fork = int(p.stdout.readline())
    p.kill(); p.wait()
    assert gone(fork)

def test_a_killed_fork_is_a_failure(warm):
    p = subprocess.Popen(command("wait"), stdout=subprocess.PIPE, text=True)
    os.kill(int(p.stdout.readline()), signal.SIGKILL)
    assert p.wait(10) == 128 + signal.SIGKILL

def test_all_end_when_the_owner_of_the_warm_process_is_killed(entries):
    importable()
    script = textwrap.dedent("""
        import os, subprocess, time
        from raptor.pipeline.warm import warm_command, warm_process
        with warm_process():
            print(os.environ["RAPTOR_WARM"], flush=True)
            p = subprocess.Popen([*warm_command("entries:wait")])
            time.sleep(60)
        """)
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    address, fork = owner.stdout.readline().strip(), int(owner.stdout.readline())
    owner.kill(); owner.wait()
    assert gone(fork)
    until(lambda: not os.path.exists(os.path.dirname(address)))

def test_clients_that_break_off_harm_nobody_else(bare):
    "Each way to leave a request unfinished, beside a run that goes on; and one that never says a word."
    server, address = bare
    other = subprocess.Popen(command("until_told", address=address), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    fork, held = int(other.stdout.readline()), len(os.listdir(f"/proc/{server.pid}/fd"))
    whole = b'{"entry": "entries:wait", "argv": [], "env": {}, "cwd": "/"}'
    for body, length, streams in [(whole, len(whole), 3), (whole[:20], len(whole), 3), (b"", len(whole), 3), (b"x", 1, 3), (whole, len(whole), 1), (b"[]", 2, 3), (b"", None, 0)]:
        with connected(address) as s:
            if streams: socket.send_fds(s, [struct.pack("!I", length)], [server.stdin.fileno()]*streams)
            s.sendall(body)
    silent = connected(address)
    assert subprocess.run(command("leave", "5", address=address), timeout=30).returncode == 5 and server.poll() is None
    until(lambda: len(os.listdir(f"/proc/{server.pid}/fd")) == held)
    until(lambda: [p.pid for p in psutil.Process(server.pid).children()] == [fork])
    silent.close()
    assert other.communicate("3")[0] == "" and other.returncode == 3

@pytest.mark.parametrize("status", [0, 6])
def test_a_fork_comes_to_its_end_without_the_warm_process(bare, status):
    server, address = bare
    p, q = (subprocess.Popen(command("until_told", address=address), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2))
    ours, other = (int(asks.stdout.readline()) for asks in (p, q))
    assert psutil.Process(ours).ppid() == psutil.Process(other).ppid() == server.pid
    server.kill(); server.wait()
    os.kill(other, signal.SIGKILL)
    assert q.wait(10) == 143, "nobody is left to say by what it was killed"
    p.communicate(f"{status}\n", timeout=10)
    assert p.returncode == status

def test_the_socket_goes_with_the_owner(bare):
    server, address = bare
    server.stdin.close()
    assert server.wait(10) == 0 and not os.path.exists(os.path.dirname(address))

@pytest.fixture
def importing():
    "Where somebody listens, and does not answer yet."
    with tempfile.TemporaryDirectory(prefix="raptor-") as folder, socket.socket(socket.AF_UNIX) as s:
        s.bind(f"{folder}/warm"); s.listen()
        yield s, f"{folder}/warm"

@pytest.fixture
def asked(entries, importing):
    "A process that waits for its fork, whose request has been read: the process, and the socket to answer it."
    listening, address = importing
    p = subprocess.Popen(command("leave", "0", address=address), stderr=subprocess.PIPE, text=True)
    with listening.accept()[0] as conn:
        until(lambda: b"argv" in conn.recv(1 << 16))
        yield p, conn
        p.kill(); p.communicate()

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_anything_has_begun_ends_in_silence(asked, number):
    p, _ = asked
    p.send_signal(number)
    assert p.communicate(timeout=10)[1] == "" and p.returncode == 128 + number

def test_a_signal_between_the_start_of_the_fork_and_the_news_of_it_is_handed_on(asked):
    "The one that asked is held back while the fork says who it is, and learns of both at once."
    p, conn = asked
    p.send_signal(signal.SIGSTOP)
    until(lambda: psutil.Process(p.pid).status() == psutil.STATUS_STOPPED)
    fork = subprocess.Popen([sys.executable, "-c", ENTRIES + "stay()"], stdout=subprocess.PIPE, text=True)
    fork.stdout.readline()
    conn.sendall(struct.pack("!i", fork.pid))
    for number in (signal.SIGTERM, signal.SIGCONT): p.send_signal(number)
    assert fork.communicate(timeout=10)[0] == "stopping\n" and fork.returncode == 7
    conn.sendall(struct.pack("!i", 7))
    assert p.wait(10) == 7

def test_nothing_starts_afresh_for_a_parent_that_is_gone(entries, importing, tmp_path):
    listening, address = importing
    parent = subprocess.Popen([sys.executable, "-c", "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); p.wait()", *command("mark", str(tmp_path/"ran"), address=address)], stdout=subprocess.PIPE, text=True)
    asks, conn = int(parent.stdout.readline()), listening.accept()[0]
    parent.kill(); parent.wait(); conn.close()
    assert gone(asks) and not (tmp_path/"ran").exists()

@pytest.mark.parametrize("address", [None, ""])
def test_a_folder_named_like_the_package_is_not_imported(warm, misleading, address):
    said = subprocess.run(command("where", address=address), capture_output=True, text=True, cwd=misleading)
    assert said.stdout == f"{raptor.__file__}|False|{address is None}\n", said.stderr
    assert not is_fork()

def test_without_a_warm_process_python_starts_afresh(warm, tmp_path):
    for address in ("", str(tmp_path/"nobody")):
        said = subprocess.run([*command("tell", address=address), "x"], capture_output=True, text=True, env={**os.environ, "WHO": "me"}, input="")
        assert said.stdout.splitlines()[0] == f"{os.getcwd()}|me|['x']|False" and said.returncode == 0

def test_a_warm_process_that_cannot_be_made_ready_is_no_obstacle_and_says_so(entries, tmp_path, monkeypatch, capfd):
    (tmp_path/"torch.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
    with warm_process():
        assert run("leave", "5").returncode == 5
        said = until(lambda: capfd.readouterr().err)
    assert said == "raptor: notebooks start afresh, each some seconds slower: ImportError: broken\n"

def test_switched_off(monkeypatch):
    monkeypatch.setenv("RAPTOR_WARM", "0")
    assert not can_fork()
