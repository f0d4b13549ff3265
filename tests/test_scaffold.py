"The house itself: packaging, notebooks in step with the package, pages that lead somewhere, a README that is true."
import ast, base64, builtins, configparser, json, os, re, shutil, stat, subprocess, sys, zipfile
from pathlib import Path

import nbformat, pytest, yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT/"settings.ini")
SETTINGS = SETTINGS["DEFAULT"]

NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts))
PAPER = [p for p in NOTEBOOKS if p.parent == NBS/"paper"]
MODULES = [p for p in NOTEBOOKS if NBS/"api" in p.parents]
STAGES = {"train_teacher", "cache_activations", "find_phases", "train_block", "train_raptor", "train_probe", "train_control"}
FIGURES = "accuracy_r2 basins coherence convergence epsilon norms partitions perturbation rank similarity speed stochastic_depth swaps \
    fidelity pareto programs weight_recurrence"
PAPER_ITEMS = STAGES | {f"fig_{n}" for n in FIGURES.split()} | {f"tab_{n}" for n in ("ablation", "blocks", "cost", "early_exit", "probes", "segmentations")} | {"summary"}
SOURCES = [p for p in sorted((ROOT/"raptor").rglob("*.py")) if p.name != "_modidx.py"]


def name_of(path): return str(path.relative_to(NBS).with_suffix(""))
def module_of(path): return ".".join([*path.relative_to(NBS/"api").parts[:-1], path.stem.partition("_")[2]])
def read(path): return nbformat.read(path, as_version=4)
def code(path): return [c for c in read(path).cells if c.cell_type == "code"]
def pyproject():
    try: import tomllib
    except ModuleNotFoundError: import tomli as tomllib # Python 3.10; pytest brings it
    return tomllib.loads((ROOT/"pyproject.toml").read_text())

def call(*command, cwd=ROOT, path=None, python_path=ROOT):
    "Run a command with this interpreter's scripts first on PATH; its output on success, a failed test otherwise."
    env = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", PYTHONPATH=str(python_path))
    env["PATH"] = os.pathsep.join([*([str(path)] if path else []), str(Path(sys.executable).parent), env["PATH"]])
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert not done.returncode, f"{command[0]} failed\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout

@pytest.fixture
def tree(tmp_path):
    "A copy of the working tree as a clean repository. Quarto is absent from it: a stand-in does nothing."
    call(ROOT/".ci"/"copy_tree", tmp_path/"tree")
    (tmp_path/"bin").mkdir()
    (tmp_path/"bin"/"quarto").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path/"bin"/"quarto").chmod(0o755)
    return tmp_path/"tree"


# ---- notebooks are the source

def test_exporting_and_cleaning_change_nothing(tree):
    assert "in step" in call(tree/".ci"/"in_step", cwd=tree, python_path=tree)

def test_a_hand_edited_module_is_noticed(tree):
    with open(tree/"raptor"/"core.py", "a") as f: f.write("# edited by hand\n")
    call("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qam", "edit", cwd=tree)
    with pytest.raises(AssertionError, match="out of step"): call(tree/".ci"/"in_step", cwd=tree, python_path=tree)

def test_exporting_leaves_pyproject_alone(tree):
    with open(tree/"pyproject.toml", "a") as f: f.write("# a line of our own\n")
    call("nbdev_export", cwd=tree, python_path=tree)
    assert (tree/"pyproject.toml").read_text().endswith("# a line of our own\n")

def test_cleaning_keeps_the_parameters_tag(tree):
    cell = nbformat.v4.new_code_cell("seed = 0", metadata={"tags": ["parameters"], "scrolled": True}, execution_count=7)
    path = tree/"nbs"/"paper"/"some_item.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Item"), cell]), path)
    call("nbdev_clean", cwd=tree, python_path=tree)
    cleaned = read(path).cells[1]
    assert (cleaned.metadata, cleaned.execution_count) == ({"tags": ["parameters"]}, None)

@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_notebook_names_its_module(path):
    sources = [c.source for c in code(path)]
    exported = re.findall(r"^#\|\s*default_exp (\S+)", "\n".join(sources), re.MULTILINE)
    assert exported == [module_of(path)] and (ROOT/"raptor"/f"{exported[0].replace('.', '/')}.py").exists()
    assert re.fullmatch(r"\d\d_[a-z]\w*", path.stem), "a number in its folder, without letters after it"
    assert sources[-1].startswith("#| hide") and "nbdev_export()" in sources[-1]

def test_every_module_has_its_notebook():
    by_hand = {"__init__", "__main__"}
    assert sorted(map(module_of, MODULES)) == sorted(dotted(p) for p in SOURCES if p.stem not in by_hand)


# ---- the house: rooms, arrows only downward

ROOMS = ("core", "data", "teacher", "trajectories", "phases", "model", "train", "probes", "analysis", "figures", "study", "pipeline")

def dotted(path): return ".".join(path.relative_to(ROOT/"raptor").with_suffix("").parts)

def imports_of(path):
    "(module, names) of all imports of the package in a file, those inside functions included."
    here = dotted(path).split(".")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = here[:len(here) - node.level] if node.level else []
            module = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            if node.level or module.split(".")[0] == "raptor":
                module = module.removeprefix("raptor").strip(".")
                for name in node.names: # a name may be a module
                    inner = f"{module}.{name.name}".strip(".")
                    yield (inner, []) if inner in map(dotted, SOURCES) else (module, [name.name])
        elif isinstance(node, ast.Import):
            yield from ((a.name.removeprefix("raptor."), []) for a in node.names if a.name.startswith("raptor."))

def graph(): return {dotted(p): {m for m, _ in imports_of(p) if m} for p in SOURCES if p.stem not in ("__init__", "__main__")}

def test_rooms_are_those_of_the_design():
    assert {m.split(".")[0] for m in graph()} == set(ROOMS)

def test_imports_run_only_downward():
    order = {room: i for i, room in enumerate(ROOMS)}
    upward = [(a, b) for a, uses in graph().items() for b in uses if order[b.split(".")[0]] > order[a.split(".")[0]]]
    assert not upward

def test_imports_have_no_circle():
    from graphlib import TopologicalSorter
    assert len(list(TopologicalSorter(graph()).static_order())) >= len(MODULES)

def test_modules_share_only_public_names():
    private = [(dotted(p), module, name) for p in SOURCES for module, names in imports_of(p) for name in names
               if name[0] == "_" and not name.endswith("__")]
    assert not private

def test_an_upward_arrow_a_circle_and_a_private_name_are_noticed(tmp_path, monkeypatch):
    package = tmp_path/"raptor"
    for name, text in {"core.py": "def f():\n    from .data import base", "data/base.py": "from ..core import _hidden"}.items():
        (package/name).parent.mkdir(parents=True, exist_ok=True)
        (package/name).write_text(text)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "SOURCES", sorted(package.rglob("*.py")))
    for check in (test_imports_run_only_downward, test_modules_share_only_public_names):
        with pytest.raises(AssertionError): check()
    with pytest.raises(ValueError, match="cycle"): test_imports_have_no_circle()

@pytest.mark.parametrize("path", SOURCES, ids=dotted)
def test_a_module_is_short_and_its_methods_are_patched(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300 and "\n_all_ = " not in text
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = [e for target in targets for e in (target.elts if isinstance(target, ast.Tuple) else [target])]
        attached = [ast.unparse(n) for n in names if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id[0].isupper()]
        assert not attached, f"{attached}: methods of a later cell are added by fastcore's @patch"

def test_lines_are_short():
    lines = [line for p in SOURCES for line in p.read_text().splitlines()]
    assert sum(len(line) > 120 for line in lines) <= 0.01 * len(lines)


# ---- the face

def test_public_names_are_offered_and_loaded_on_first_use():
    code = "import sys, raptor; print(*dir(raptor)); print(*{'torch', 'numpy', 'pandas', 'timm'} & set(sys.modules))"
    names, heavy = call(sys.executable, "-c", code).split("\n")[:2]
    asked = """Backbone LiveTrajectories layer_distance max_cut Raptor RecurrentBlock TrainConfig train_span train_raptor
        RaptorBackbone load_dataset Study __version__""".split()
    assert set(asked) <= set(names.split()) and not heavy
    import raptor
    for name in names.split(): assert getattr(raptor, name) is not None
    with pytest.raises(AttributeError): raptor.max_cutt

def test_help_shows_what_each_argument_is():
    import raptor
    assert "k : int\n    number of phases" in raptor.max_cut.__doc__ and "Returns\n-------\n" in raptor.max_cut.__doc__
    assert "lr : float\n    peak learning rate" in raptor.TrainConfig.__doc__, "fields of a parent class too"
    assert raptor.Raptor.rollout.__doc__.count("Parameters\n----------") == 1

def test_the_command_says_its_version():
    import raptor
    assert call(sys.executable, "-m", "raptor", "--version").strip() == f"raptor {raptor.__version__}"


# ---- what is stored in a notebook

MACHINE_PATH = re.compile(r"(?<![\w.~>-])(?:/(?:root|home|work|tmp|Users|private|mnt)/[\w.-]+|[A-Z]:\\Users)")

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_is_a_page(path):
    nb = read(path)
    nbformat.validate(nb)
    assert len({c.id for c in nb.cells}) == len(nb.cells)
    first = nb.cells[0]
    assert first.cell_type == "markdown" and re.match(r"# \S.*\n+> \S", first.source), "a page starts with `# title` and `> one line`"
    assert set(nb.metadata) <= {"kernelspec"}
    assert all(c.execution_count is None for c in nb.cells if c.cell_type == "code")

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_stored_outputs_are_clean(path):
    for cell in code(path):
        for o in cell.outputs:
            assert o.output_type != "error", f"a stored error: {o.get('ename')}"
            assert o.get("name") != "stderr", f"stored stderr: {o.get('text', '')[:200]}"
            data = o.get("data", {})
            assert not any("widget" in kind for kind in data), "a stored progress bar"
            for picture in (data[k] for k in data if k in ("image/png", "image/jpeg")):
                assert len(base64.b64decode(picture)) <= 80*1024, f"a picture of {len(base64.b64decode(picture))//1024} KB after: {cell.source[-80:]}"
            text = "\n".join([o.get("text", ""), *(v for k, v in data.items() if isinstance(v, str) and not k.startswith("image/"))])
            assert not MACHINE_PATH.search(text), f"a machine's path: {MACHINE_PATH.search(text).group()}"
            assert "\r" not in text and "Warning:" not in text
        assert not MACHINE_PATH.search(cell.source), f"a machine's path in: {cell.source[:200]}"

@pytest.mark.parametrize("path, bad", [("see /root/x", True), ("/home/me/data", True), ("https://a.b/home/x", False), ("~/raptor-runs", False),
    ("/dev/null", False), (r"C:\Users\me", True), ("<folder>/tmp/x", False)])
def test_machine_paths_are_told_from_others(path, bad): assert bool(MACHINE_PATH.search(path)) == bad


# ---- the paper's notebooks

def test_the_papers_items_are_there():
    assert {p.stem for p in PAPER} == PAPER_ITEMS

@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_paper_notebook_has_one_cell_of_literal_parameters(path):
    tagged = [c for c in code(path) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    for statement in ast.parse(tagged[0].source).body:
        assert isinstance(statement, (ast.Assign, ast.AnnAssign)), f"not an assignment: {ast.unparse(statement)}"
        ast.literal_eval(statement.value) # ValueError: papermill would replace the name and leave what was computed from it

@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_paper_notebook_exports_nothing_and_stays_short(path):
    assert not any(re.search(r"^#\|\s*export", c.source, re.MULTILINE) for c in code(path))
    assert len(code(path)) <= 12

def test_paper_notebooks_are_left_out_of_nbdev_test(): assert (NBS/"paper"/".notest").exists()


# ---- the site

def links(path):
    "Targets of all links and pictures in the prose and the stored markdown of a notebook."
    texts = [c.source for c in read(path).cells if c.cell_type == "markdown"]
    texts += [o.data["text/markdown"] for c in code(path) for o in c.outputs if "text/markdown" in o.get("data", {})]
    return [t for text in texts for t in re.findall(r"\]\(([^)\s]+)", re.sub(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$", "", text, flags=re.DOTALL))]

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_links_lead_somewhere(path):
    blob = f"{SETTINGS['git_url']}/blob/{SETTINGS['branch']}/"
    for link in links(path):
        if link.startswith(blob): assert (ROOT/link[len(blob):]).exists(), link
        elif not re.match(r"(\w+:|#)", link): assert (path.parent/link.partition("#")[0]).exists(), f"{link} does not exist"

def sidebar_targets(entries):
    for e in entries:
        if isinstance(e, str): yield e
        else:
            if "href" in e: yield e["href"]
            yield from sidebar_targets(e.get("contents", []))

def test_sidebar_lists_every_page_once():
    listed = list(sidebar_targets(yaml.safe_load((NBS/"sidebar.yml").read_text())["website"]["sidebar"]["contents"]))
    assert len(listed) == len(set(listed))
    wanted = {str(p.relative_to(NBS)) for p in NOTEBOOKS}
    assert set(listed) == wanted

def test_quarto_settings_lead_somewhere():
    assert (NBS/"_quarto.yml").is_symlink() and (NBS/"_quarto.yml").resolve() == ROOT/"_quarto.yml"
    config = yaml.safe_load((ROOT/"_quarto.yml").read_text())
    assert (NBS/config["format"]["html"]["css"]).exists()
    assert config["metadata-files"] == ["nbdev.yml", "sidebar.yml"]
    assert config["execute"] == {"enabled": False}
    bar = config["website"]["navbar"]
    for item in bar["left"] + bar["right"]:
        assert item["href"].startswith("https://") or (NBS/item["href"]).exists()

def test_pages_are_processed_and_document_every_public_name(tree):
    """To build a page nbdev runs the exported cells and those with an import, and no others. A NameError here means that a
    cell has an import and code that needs an earlier example: put the import into a cell of its own."""
    pytest.importorskip("zarr", reason="a page imports zarr 3, which has no release for Python 3.10")
    call("nbdev_proc_nbs", cwd=tree, path=tree.parent/"bin", python_path=tree)
    for path in NOTEBOOKS: assert (tree/"_proc"/path.relative_to(NBS)).exists(), name_of(path)
    assert (tree/"_proc"/"_quarto.yml").read_text() == (ROOT/"_quarto.yml").read_text()
    for path in MODULES:
        page = json.loads((tree/"_proc"/path.relative_to(NBS)).read_text())
        shown = "".join("".join(o["data"]["text/markdown"]) for c in page["cells"] for o in c.get("outputs", []) if "text/markdown" in o.get("data", {}))
        if documented_names(path): assert "[source]" in shown or "blob/main/raptor" in shown, f"no link to the source on the page of {path.stem}"
        for name in documented_names(path):
            assert re.search(rf"^### (?:.*\.)?{name}$", shown, re.MULTILINE), f"{name} has no entry on the page of {path.stem}"

def documented_names(path):
    "Public functions and classes that a module notebook exports."
    exported = "\n".join(c.source for c in code(path) if re.search(r"^#\|\s*exports?\s*$", c.source, re.MULTILINE))
    return [n.name for n in ast.parse(exported).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"]

@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_parameters_are_documented(path):
    "Each parameter of a public function has a comment behind it: nbdev makes the page's table from these. (A command's have their help.)"
    missing = []
    for cell in code(path):
        if not re.search(r"^#\|\s*exports?\s*$", cell.source, re.MULTILINE): continue
        lines = cell.source.splitlines()
        for f in ast.parse(cell.source).body:
            if not isinstance(f, ast.FunctionDef) or f.name[0] == "_" or any("app.command" in ast.unparse(d) for d in f.decorator_list): continue
            missing += [] if ast.get_docstring(f) else [f"{f.name}: a docstring"]
            missing += [f"{f.name}: a comment on {a.arg}" for a in f.args.args + f.args.kwonlyargs if a.arg not in ("self", "cls") and "#" not in "\n".join(lines[a.lineno-1:a.end_lineno])]
    assert not missing, "\n".join(missing)


# ---- the front page

def test_readme_is_in_step_with_the_front_page(): call(sys.executable, ROOT/".ci"/"make_readme.py", "--check")

def test_readme_starts_with_the_two_commands():
    commands = re.findall(r"```bash\n(.*?)\n```", (ROOT/"README.md").read_text(), re.DOTALL)
    assert commands[:2] == ["pip install -e . && raptor reproduce", 'pip install -e ".[dev]" && pytest']

def test_readme_links_lead_somewhere():
    text = re.sub(r"```.*?```", "", (ROOT/"README.md").read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)", text):
        if not re.match(r"(\w+:|#)", link): assert (ROOT/link).exists(), link

@pytest.mark.parametrize("page", ["index", "explains/photographs"])
def test_numbers_on_a_page_come_from_the_results(page):
    "What is stored in the front page, and in that of the photographs, is what their code prints today."
    scope = {}
    for cell in code(NBS/f"{page}.ipynb"):
        if any("image/png" in o.get("data", {}) for o in cell.outputs): continue
        tree = ast.parse(cell.source)
        last = tree.body.pop()
        exec(compile(tree, page, "exec"), scope)
        value = eval(compile(ast.Expression(last.value), page, "eval"), scope)
        assert [o.data["text/markdown"] for o in cell.outputs] == [value.data], f"run nbs/{page}.ipynb again, then .ci/make_readme.py"


# ---- the package

def test_package_and_settings_agree():
    import raptor
    project, cff = pyproject()["project"], yaml.safe_load((ROOT/"CITATION.cff").read_text())
    assert project["name"] == "raptor-vit" and SETTINGS["lib_name"] == "raptor", "raptor itself is taken on the package index"
    assert project["requires-python"] == f">={SETTINGS['min_python']}"
    assert project["description"] == SETTINGS["description"]
    assert project["keywords"] == SETTINGS["keywords"].split()
    assert project["license"].lower() == SETTINGS["license"] and cff["license"] == project["license"]
    assert project["urls"]["Source"] == SETTINGS["git_url"] == cff["repository-code"]
    assert raptor.__version__ == SETTINGS["version"] == cff["version"]
    assert cff["preferred-citation"]["url"] == project["urls"]["Paper"]

def imported(sources):
    "Top-level names of everything that is imported anywhere in Python sources."
    found = set()
    for node in (n for s in sources for n in ast.walk(ast.parse(s))):
        if isinstance(node, ast.Import): found |= {a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level: found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"raptor"}

def required(names): return {re.match(r"[\w-]+", n).group().lower().replace("-", "_") for n in names}

def test_what_is_imported_is_declared_and_nothing_else():
    known_as = {"sklearn": "scikit_learn", "yaml": "pyyaml", "PIL": "pillow", "IPython": "ipython", "snakemake_interface_executor_plugins": "snakemake_interface_executor_plugins"}
    sources = [p.read_text() for p in SOURCES] + [c.source for p in PAPER for c in code(p)]
    used = {known_as.get(n, n) for n in imported(sources)}
    declared = required(pyproject()["project"]["dependencies"])
    extras = pyproject()["project"]["optional-dependencies"]
    optional = required(n for extra in extras.keys() - {"dev"} for n in extras[extra]) # a sentence says when one is missing
    assert not used - declared - optional, f"imported and not declared: {sorted(used - declared - optional)}"
    needed_by_others = {"jinja2"} # pandas' styled tables
    assert not declared - used - needed_by_others, f"declared and not imported: {sorted(declared - used - needed_by_others)}"

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}: raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
import importlib, pkgutil, raptor
names = [m.name for m in pkgutil.walk_packages(raptor.__path__, "raptor.") if m.name not in {left_out!r}]
for name in names: importlib.import_module(name)
print(*sorted(names))
"""

def test_package_imports_without_its_tools():
    left_out = {"raptor.__main__", "raptor.paper", "raptor.pipeline.executor"} # the last is a plugin of Snakemake
    blocked = {"nbdev", "execnb", "papermill", "snakemake", "zarr", "nbconvert", "nbformat", "jupytext", "wandb", "tensorboard"}
    names = call(sys.executable, "-c", BLOCKED.format(blocked=blocked, left_out=left_out)).split()
    assert {f"raptor.{module_of(p)}" for p in MODULES} - left_out <= set(names)

def test_the_command_starts_without_torch():
    "Snakemake starts the command once a job, and `raptor --help` should not take seconds."
    assert call(sys.executable, "-c", "import sys, raptor.pipeline.cli; print('torch' in sys.modules)").strip() == "False"

PAPER_DATA = {"Snakefile", "presets", "published", "page.css"}

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from a copy of the tree, with stand-ins for paper files that do not exist yet."
    folder = tmp_path_factory.mktemp("wheel")
    call(ROOT/".ci"/"copy_tree", folder/"tree")
    paper = folder/"tree"/"nbs"/"paper"
    for name in ("presets/probe.yaml", "published/probe.csv", "profiles/slurm/config.yaml", "probe.mplstyle", "results/digits/probe.csv"):
        (paper/name).parent.mkdir(parents=True, exist_ok=True)
        (paper/name).write_text("")
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder/"tree")
    return next(folder.glob("raptor_vit-*.whl"))

def test_wheel_carries_the_paper_but_no_results(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    paper = {n.removeprefix("raptor/paper/") for n in names if n.startswith("raptor/paper/")}
    assert {"presets/probe.yaml", "published/probe.csv", "profiles/slurm/config.yaml", "probe.mplstyle"} <= paper
    assert {p.name for p in PAPER} <= paper
    for file in (NBS/"paper").rglob("*"):
        relative = file.relative_to(NBS/"paper")
        if file.is_file() and relative.parts[0] in PAPER_DATA: assert str(relative) in paper, relative
    assert not any(n.startswith("results") for n in paper)
    assert {n for n in names if n.startswith("raptor/") and n.endswith(".py")} == {f"raptor/{p.relative_to(ROOT/'raptor')}" for p in (ROOT/"raptor").rglob("*.py")}
    assert {"raptor/py.typed", "raptor/__init__.pyi"} <= names
    assert not any(n.startswith(("tests", "nbs")) for n in names)

def test_installed_wheel_finds_the_paper(wheel, tmp_path):
    site, empty = tmp_path/"site", tmp_path/"empty"
    empty.mkdir()
    call(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)
    out = call(sys.executable, "-c", "import raptor.core as c; print(c.paper_root()); print(c.code_version())", cwd=empty, python_path=site)
    assert out.split() == [str((site/"raptor"/"paper").resolve()), SETTINGS["version"]]
    assert list(empty.iterdir()) == []
    entry = next(site.glob("raptor_vit-*.dist-info/entry_points.txt")).read_text()
    assert "raptor = raptor.__main__:main" in entry

def test_checkout_finds_the_paper(tmp_path):
    out = call(sys.executable, "-c", "import raptor.core; print(raptor.core.paper_root())", cwd=tmp_path)
    assert out.strip() == str(NBS/"paper")


# ---- continuous integration

@pytest.mark.parametrize("name", ["run", "copy_tree", "in_step"])
def test_scripts_can_be_run(name):
    script = ROOT/".ci"/name
    assert script.stat().st_mode & stat.S_IXUSR
    call("bash", "-n", script)

def test_copy_is_what_git_would_commit(tree):
    assert not shutil.which("git") or call("git", "status", "--porcelain", cwd=tree) == ""
    assert (tree/"nbs"/"_quarto.yml").is_symlink()
    assert not (tree/"_proc").exists() and not list(tree.rglob("__pycache__"))

def test_workflows_run_what_developers_run():
    job = yaml.safe_load((ROOT/".github"/"workflows"/"test.yaml").read_text())["jobs"]["test"]
    versions = {c.rpartition(" ")[2] for c in pyproject()["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)}
    assert set(job["strategy"]["matrix"]["python-version"]) == versions
    when = {s["run"]: s.get("if") for s in job["steps"] if "run" in s}
    assert when == {"bash .ci/run": "github.event_name != 'schedule'", 'bash .ci/run -m "slow or not slow"': "github.event_name == 'schedule'"}
    site = yaml.safe_load((ROOT/".github"/"workflows"/"docs.yaml").read_text())["jobs"]["site"]
    assert any(s.get("run") == "nbdev_docs" for s in site["steps"])


def test_every_name_in_a_paper_notebook_is_bound():
    "A notebook that is run on few presets may hold a name that nobody imports."
    for path in sorted((ROOT/"nbs"/"paper").glob("*.ipynb")):
        code = "\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code")
        nodes = list(ast.walk(ast.parse(code)))
        bound = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)} | {a.arg for n in nodes if isinstance(n, ast.arguments) for a in (*n.args, *n.kwonlyargs, *n.posonlyargs, *filter(None, (n.vararg, n.kwarg)))}
        bound |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)) and n.name} | {(a.asname or a.name).split(".")[0] for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert not (free := used - bound - set(dir(builtins))), f"{path.name}: {sorted(free)}"
        imported = {(a.asname or a.name).split(".")[0] for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        assert not (idle := imported - used), f"{path.name} imports {sorted(idle)} and does not use it"

def test_the_papers_prose_needs_no_formula_renderer():
    "The report shows it on a page without scripts."
    for path in PAPER:
        formulas = [c.source for c in read(path).cells if c.cell_type == "markdown" and re.search(r"\$[^$\n]+\$", c.source)]
        assert not formulas, f"{path.name}: {formulas}"
