"""Kills and damages studies, starts them again, and compares the end with a study that nobody disturbed.

    python tests/campaign.py --kill 20 --term 10 --int 10 --damage 20 > campaign.csv

A trial of a signal runs `raptor reproduce --preset smoke` from nothing, sends the signal to that one process at a random moment, and
starts the same command again. A trial of damage truncates, zeroes, flips a bit of, deletes or replaces one file of a copy of the
finished study, and starts the command. One CSV row a trial; the summary goes to standard error. No part of the usual tests: it takes hours."""
import argparse, csv, hashlib, json, os, random, re, shutil, signal, subprocess, sys, tempfile, threading, time
from contextlib import suppress
from pathlib import Path

import psutil
from safetensors import safe_open

from raptor.study.steps import safetensors_digest

COLUMNS = ("trial", "seed", "disturbance", "moment", "end", "twice", "left", "said")
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
SUFFIXES = (".csv", ".safetensors", ".json", ".png", ".ipynb", ".html", ".pdf")


def start(preset, home, temporary):
    env = {**os.environ, "RAPTOR_HOME": str(home), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "raptor", "reproduce", "--preset", preset], env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def study_in(home): return next((p for p in home.iterdir() if p.is_dir()), home)


def digests(home):
    "What must be equal bit by bit: tables, weights, figures, phases. Executed notebooks, and the page, hold times."
    kept = [p for pattern in ("*.csv", "*.safetensors", "*.json", "*.png") for p in study_in(home).rglob(pattern) if not p.name.startswith(".")]
    def content(path): return re.sub(rb"\d+\.\d+\.\d+\+[0-9a-f]{9}(-dirty)?", b"", path.read_bytes()) # but the commit may be another
    def digest(path): return safetensors_digest(path) if path.suffix == ".safetensors" else hashlib.sha256(content(path)).hexdigest()
    return {str(p.relative_to(home)): digest(p) for p in kept if ".snakemake" not in p.parts and "activations" not in p.parts}


def left_behind(home, temporary, processes):
    "Processes, temporary files, checkpoints of finished runs and half-written files that outlive the command."
    alive = [f"process {p.pid}" for p in psutil.wait_procs(processes, timeout=10)[1]]
    files = [str(p.relative_to(home)) for p in study_in(home).rglob("*") if re.fullmatch(r"\..+-[0-9a-f]{8}(\.\w+)?|checkpoint.safetensors|\.history\.csv|\..*\.status\.json|.*\.failed\.ipynb", p.name)]
    return alive + files + [p.name for p in temporary.iterdir() if not p.name.startswith("torchinductor_")] # torch's own cache, for all


def steps(home):
    "{checkpoint: its step}; a checkpoint that is just being replaced is left out."
    found = {}
    for path in (Path(folder)/"checkpoint.safetensors" for folder, _, _ in os.walk(study_in(home))): # folders may vanish meanwhile
        with suppress(Exception), safe_open(path, "pt") as f: found[path] = json.loads(f.metadata()["raptor"])["step"]
    return found


def finished(home): return {p: p.stat().st_mtime_ns for p in study_in(home).rglob("train_*.ipynb") if ".failed." not in p.name and p.name[0] != "."}


def finish(preset, home, temporary, before, done):
    "Start the study again, to its end: status, output, and what it trained twice: steps before a checkpoint, or finished runs."
    process, twice = start(preset, home, temporary), set()
    reader = threading.Thread(target=lambda: output.extend(process.communicate()))
    output = []
    reader.start()
    while reader.is_alive():
        twice |= {str(p.relative_to(home)) for p, step in steps(home).items() if step < before.get(p, 0)}
        reader.join(0.3)
    now = finished(home)
    return process.returncode, output[1], sorted(twice | {str(p.relative_to(home)) for p, time in done.items() if now.get(p) != time})


def damage(path, kind, others):
    content = bytearray(path.read_bytes())
    if kind == "delete": path.unlink()
    elif kind == "truncate": path.write_bytes(content[:random.randrange(len(content))])
    elif kind == "zero": path.write_bytes(bytes(len(content)))
    elif kind == "replace": path.write_bytes(random.choice(others).read_bytes())
    elif kind == "flip":
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        path.write_bytes(content)


def harm(home):
    "Damage one file of a finished study, chosen by the seed."
    there = [p for p in sorted(study_in(home).rglob("*")) if p.suffix in SUFFIXES and p.is_file() and not p.name.startswith(".") and p.stat().st_size]
    path = random.choice([p for p in there if not {".snakemake", "activations"} & set(p.parts)])
    others = [p for p in there if p.suffix == path.suffix and p.read_bytes() != path.read_bytes()]
    kind = random.choice(["truncate", "zero", "flip", "delete", *(["replace"] if others else [])])
    damage(path, kind, others)
    return f"{kind} {path.relative_to(study_in(home))}"


def interrupt(preset, home, temporary, number, moment):
    "Start the study, send it a signal after `moment` seconds, and wait: its output, and how long it took to end."
    process = start(preset, home, temporary)
    time.sleep(moment)
    try: children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess: children = []
    process.send_signal(number)
    sent = time.time()
    out, err = process.communicate()
    psutil.wait_procs(children, timeout=30) # jobs notice that their command is gone
    return [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE], time.time() - sent, err


def trial(kind, seed, preset, work, reference, seconds):
    "One trial: what was done, and how it ended."
    random.seed(seed)
    home, temporary, said = work/f"home-{seed}", work/f"tmp-{seed}", ""
    shutil.rmtree(home, ignore_errors=True); shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    children = []
    if kind == "damage":
        shutil.copytree(reference, home)
        what, moment = harm(home), ""
    else:
        home.mkdir()
        moment = round(random.uniform(2, seconds), 1)
        what = SIGNALS[kind].name
        children, took, err = interrupt(preset, home, temporary, SIGNALS[kind], moment)
        if took > 60: said = f"took {took:.0f} s to stop. "
        if "Traceback" in err: said += f"traceback: {err.splitlines()[-1]}. "
    known = kind != "damage" and any(home.iterdir())
    code, err, twice = finish(preset, home, temporary, *((steps(home), finished(home)) if known else ({}, {})))
    if code: end = "one sentence" if len(re.findall("^raptor: ", err, re.M)) in (1, 2) and "Traceback" not in err else "FAILED"
    else: end = "bit-equal" if digests(home) == digests(reference) else "DIFFERENT"
    said += " / ".join(line for line in err.splitlines() if line.startswith("raptor: ")).replace(str(home), "")
    left = left_behind(home, temporary, children)
    if end == "bit-equal" and not (left or twice): shutil.rmtree(home); shutil.rmtree(temporary)
    return dict(seed=seed, disturbance=what, moment=moment, end=end, twice=" ".join(twice), left=" ".join(left), said=said)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in (*SIGNALS, "damage"): parser.add_argument(f"--{kind}", type=int, default=0, metavar="N", help="trials")
    parser.add_argument("--seeds", type=int, metavar="N", help="trials of every kind")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--preset", default="smoke")
    parser.add_argument("--work", type=Path, help="folder; a finished study in its reference/ is used again")
    args = parser.parse_args()
    work = (args.work or Path(tempfile.mkdtemp(prefix="campaign-"))).absolute()
    reference, temporary, clock = work/"reference", work/"tmp", work/"seconds"
    temporary.mkdir(parents=True, exist_ok=True)
    if not clock.exists():
        began = time.time()
        if (process := start(args.preset, reference, temporary)).wait(): sys.exit(process.stderr.read())
        clock.write_text(str(time.time() - began))
    writer, bad, kinds = csv.DictWriter(sys.stdout, COLUMNS), 0, (*SIGNALS, "damage")
    writer.writeheader()
    plan = [kind for kind in kinds for _ in range(args.seeds or getattr(args, kind))]
    for i, kind in enumerate(plan, 1):
        row = trial(kind, args.first + i, args.preset, work, reference, float(clock.read_text()))
        bad += row["end"] not in ("bit-equal", "one sentence") or bool(row["twice"] or row["left"] or "traceback" in row["said"])
        writer.writerow({"trial": i, **row}); sys.stdout.flush()
    print(f"{len(plan)} trials, {bad} of them not as promised; {work}", file=sys.stderr)
    sys.exit(bool(bad))


if __name__ == "__main__": main()
