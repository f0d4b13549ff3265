"Pages that can be copied: tutorials and how-tos run without their hidden cells; what is drawn and listed is made from the files."
import ast, builtins, importlib, importlib.util, json, os, re, subprocess, sys, tarfile
from pathlib import Path

import pytest, yaml
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"
LESSONS = sorted([*(NBS/"tutorials").glob("*.ipynb"), *(NBS/"howto").glob("*.ipynb")])
EXPLAINED = sorted([*LESSONS, *(NBS/"explains").glob("*.ipynb"), *(NBS/"api").rglob("*.ipynb")])
NEED_ZARR = {"01_first_study", "cache"} # Zarr 3 and Snakemake 9 have no release for Python 3.10


def name_of(path): return str(path.relative_to(NBS).with_suffix(""))

def code(path):
    "The code cells of a notebook: (source, directives), the source without them and with magics as Python."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for cell in (c for c in cells if c["cell_type"] == "code"):
        source = "".join(cell["source"])
        found = re.findall(r"^#\|\s*(.+?)\s*$", source, re.MULTILINE)
        yield TransformerManager().transform_cell(source), {re.sub(r"\s*:\s*", ": ", d) for d in found}

def is_hidden(directives): return bool(directives & {"hide", "echo: false", "include: false", "hide_input"})
def is_exported(directives): return any(re.match(r"exports?i?\b", d) for d in directives)

def environment(folder):
    "The surroundings of a fresh process: roots of its own, this interpreter's scripts first on PATH."
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return dict(os.environ, PATH=scripts, PYTHONPATH=str(ROOT), RAPTOR_HOME=str(folder/"runs"), TMPDIR=str(folder),
                RAPTOR_PROGRESS="0", MPLBACKEND="Agg", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")


# ---- a page can be copied

@pytest.mark.slow # nbdev_test runs all cells of these pages, and the names that they use are compared below
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", [p for p in LESSONS if any(not is_hidden(d) for _, d in code(p))], ids=name_of)
def test_the_visible_cells_run_alone(path, tmp_path):
    "In a fresh process, top to bottom, without the hidden cells and those that the page says are not run."
    if path.stem in NEED_ZARR: pytest.importorskip("zarr", reason="no Zarr 3 on Python 3.10")
    cells = [source for source, d in code(path) if not is_hidden(d) and "eval: false" not in d]
    script = tmp_path/"page.py"
    script.write_text("\n\n".join(cells), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
    assert not done.returncode, f"{name_of(path)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"

def star_names(module):
    "What `from module import *` binds."
    found = importlib.import_module(module)
    return set(getattr(found, "__all__", [n for n in vars(found) if n[0] != "_"]))

def bound_names(tree):
    "Every name that code binds, at any level."
    found = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load): found.add(n.id)
        elif isinstance(n, ast.arg): found.add(n.arg)
        elif isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)): found.add(n.name)
        elif isinstance(n, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)): found |= {n.name} - {None}
        elif isinstance(n, ast.ImportFrom) and n.names[0].name == "*": found |= star_names(n.module)
        elif isinstance(n, (ast.Import, ast.ImportFrom)):
            found |= {(a.asname or a.name).partition(".")[0] for a in n.names}
    return found

def unexplained(cells):
    "Names that visible cells use and that neither a visible nor an exported cell binds."
    shown = [ast.parse(source) for source, d in cells if not is_hidden(d)]
    known = [ast.parse(source) for source, d in cells if not is_hidden(d) or is_exported(d)]
    used = {n.id for t in shown for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return used - set().union(*map(bound_names, known)) - set(dir(builtins)) - {"display", "get_ipython", "__file__", "__name__"}

@pytest.mark.parametrize("path", EXPLAINED, ids=name_of)
def test_no_visible_cell_uses_a_name_from_a_hidden_one(path):
    assert not (names := unexplained(list(code(path)))), f"only a hidden cell defines {sorted(names)}: import them in a visible one"

@pytest.mark.parametrize("cells, names", [
    ([("import os", set()), ("os.sep", set())], set()),
    ([("import os", {"hide"}), ("os.sep", set())], {"os"}),
    ([("import os", {"echo: false"}), ("os.sep", {"echo: false"})], set()),
    ([("import os", {"export"}), ("os.sep", set())], set()),
    ([("import os", {"export", "hide"}), ("os.sep", set())], set()),
    ([("from os.path import *", set()), ("join('a'); f = lambda x: x; [y for y in f(1)]", set())], set()),
    ([("def f(a, *b):\n    try: pass\n    except OSError as e: return a, b, e, c", set())], {"c"})])
def test_hidden_names_are_found(cells, names): assert unexplained(cells) == names

@pytest.mark.parametrize("path", EXPLAINED, ids=name_of)
def test_every_figure_has_a_caption_and_a_description(path):
    for cell in (c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"):
        if not any("image/png" in o.get("data", {}) for o in cell["outputs"]): continue
        source = "".join(cell["source"])
        for what in ("fig-cap", "fig-alt"):
            assert re.search(rf'^#\|\s*{what}:\s*"\S.*\."\s*$', source, re.MULTILINE), f"no {what} in: {source[:200]}"


# ---- pages that are made from the files

@pytest.mark.parametrize("name", ["make_readme", "make_sidebar", "draw_rooms"])
def test_what_is_made_is_in_step(name):
    command = [sys.executable, "-B", ROOT/".ci"/f"{name}.py", "--check"]
    done = subprocess.run(command, env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert not done.returncode, done.stderr

@pytest.fixture(scope="module")
def drawing():
    spec = importlib.util.spec_from_file_location("draw_rooms", ROOT/".ci"/"draw_rooms.py")
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try: spec.loader.exec_module(module)
    finally: sys.dont_write_bytecode = before
    return module

def package(root, files):
    for name, text in files.items():
        path = root/"raptor"/f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root

def test_rooms_are_drawn_from_the_imports(drawing, tmp_path):
    "Lazy imports and both spellings count; an arrow that two others imply is left out."
    root = package(tmp_path, {"core": "import os", "data/base": "from ..core import x", "data/load": "from .base import y",
                              "phases": "def f():\n    from raptor.core import x",
                              "study/study": "from ..data import base\nfrom raptor.core import x\nimport raptor.phases"})
    assert drawing.graph(root).splitlines() == [
        "flowchart TD", '  core["<b>core</b>"]', '  data["<b>data</b><br/>base · load"]', '  phases["<b>phases</b>"]',
        '  study["<b>study</b><br/>study"]', "  core --> data", "  core --> phases", "  data --> study", "  phases --> study"]

@pytest.mark.parametrize("files, sentence", [
    ({"core": "def f():\n    from .phases import x", "phases": "from .core import y"}, "core imports phases"),
    ({"attic/box": "x = 1"}, "attic.* ROOMS")])
def test_a_plan_that_does_not_hold_is_not_drawn(drawing, tmp_path, files, sentence):
    with pytest.raises(SystemExit, match=sentence): drawing.graph(package(tmp_path, files))

def test_the_architecture_page_names_every_room(drawing):
    text = (NBS/"explains"/"architecture.ipynb").read_text(encoding="utf-8")
    for room in drawing.ROOMS: assert f"| [{room}](../api/" in text, room

def test_links_of_the_front_page_survive_on_a_package_index():
    "None is relative, and those into the repository lead to files that exist."
    text = re.sub(r"```.*?```", "", (ROOT/"README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)", text)
    assert len(links) > 40 and all(re.match(r"https://|#", link) for link in links)
    inside = [m for link in links if (m := re.match(r"https://[\w.]+/raptor-vit/raptor/(?:blob/)?main/(.+)", link))]
    assert len(inside) > 40
    for m in inside: assert (ROOT/m.group(1)).exists(), m.group(1)
    assert "$" not in text, "a formula prints as text there"


# ---- the distribution

def pyproject():
    try: import tomllib
    except ModuleNotFoundError: import tomli as tomllib # Python 3.10; pytest brings it
    return tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))

def test_every_room_is_packaged():
    folders = {p.parent.relative_to(ROOT) for p in (ROOT/"raptor").rglob("*.py")}
    assert set(pyproject()["tool"]["setuptools"]["packages"]) == {".".join(f.parts) for f in folders} | {"raptor.paper"}

def test_nbdev_finds_sources_through_the_entry_point():
    "Without it pages have no link to their source, and names in backticks no link to their page."
    module, _, name = pyproject()["project"]["entry-points"]["nbdev"]["raptor"].partition(":")
    index = getattr(importlib.import_module(module), name)
    page, source = index["syms"]["raptor.phases"]["raptor.phases.max_cut"]
    assert page == "api/phases.html#max_cut" and source == "raptor/phases.py"

def test_the_distribution_has_a_name_of_its_own():
    project, cff = pyproject()["project"], yaml.safe_load((ROOT/"CITATION.cff").read_text(encoding="utf-8"))
    assert project["name"] == "raptor-vit" and cff["title"].startswith("raptor-vit:")
    for path in (*NBS.rglob("*.ipynb"), ROOT/"README.md"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'pip install \\?"?raptor\b(?!-vit)', text), f"{path.name} installs another project"

def test_the_citation_is_that_of_the_conference():
    cff = yaml.safe_load((ROOT/"CITATION.cff").read_text(encoding="utf-8"))
    paper = cff["preferred-citation"]
    assert (paper["type"], paper["year"]) == ("conference-paper", 2026) and {"date-released", "keywords"} <= set(cff)
    assert cff["keywords"] == pyproject()["project"]["keywords"]
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    assert paper["title"] in readme and all(a["family-names"] in readme for a in paper["authors"])

def test_the_source_distribution_holds_what_its_tests_need(tmp_path):
    tree = tmp_path/"tree"
    subprocess.run(["bash", ROOT/".ci"/"copy_tree", tree], check=True, capture_output=True)
    build = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, tmp_path], cwd=tree, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    with tarfile.open(next(tmp_path.glob("raptor_vit-*.tar.gz"))) as tar:
        inside = {Path(*Path(m.name).parts[1:]) for m in tar if m.isfile() or m.issym()}
    files = [p.relative_to(tree) for p in tree.rglob("*") if p.is_file() and ".git" not in p.relative_to(tree).parts]
    missing = {f for f in files if not f.name.endswith(".egg-info") and "egg-info" not in str(f)} - inside
    assert not missing, f"not in the source distribution: {sorted(map(str, missing))[:10]}"

def test_workflows_render_every_change_and_look_at_new_releases():
    "A page that does not render is seen before the merge; a release that breaks something is seen within a week."
    site, tests = (yaml.safe_load((ROOT/".github"/"workflows"/f"{n}.yaml").read_text()) for n in ("docs", "test"))
    assert "pull_request" in site[True] and "schedule" in tests[True] # YAML reads the key `on` as true
    assert "pull_request" in site["jobs"]["publish"]["if"], "a pull request must not publish"
