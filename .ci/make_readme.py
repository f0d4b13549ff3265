"""Write README.md from nbs/index.ipynb (the same page as the front of the site), without needing Quarto.

The front page shows a few pictures; they are those stored in the paper's notebooks, taken out into nbs/images.

python .ci/make_readme.py          writes README.md and its pictures
python .ci/make_readme.py --check  writes nothing; exits 1 if one of them is out of step
"""
import base64, configparser, re, sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^#\|\s*(.+?)\s*$", re.MULTILINE)


def tag_cell(cell):
    "Turn nbdev's directives into the tags that nbconvert removes cells, inputs and outputs by."
    found = [re.sub(r"\s*:\s*", ": ", d) for d in DIRECTIVE.findall(cell.source)]
    tags = {"hide": "drop", "echo: false": "drop-input", "output: false": "drop-output"}
    cell.metadata["tags"] = [tags[d] for d in found if d in tags]
    cell.source = DIRECTIVE.sub("", cell.source).strip("\n")


def site_to_repository(text, git_url, branch):
    "Links of the site (relative to nbs/, or to the repository's pages) as links relative to the repository's root."
    text = text.replace(f"]({git_url}/blob/{branch}/", "](")
    return re.sub(r"\]\((?!\w+:|#)([^)\s]+\.(?:ipynb|png))", r"](nbs/\1", text)


def pictures():
    "The pictures that the front page shows: {path: bytes}, each the last one stored in the notebook of its name."
    source, found = (ROOT/"nbs"/"index.ipynb").read_text(), {}
    for name in re.findall(r"\]\(images/(\w+)\.png\)", source):
        cells = nbformat.read(ROOT/"nbs"/"paper"/f"{name}.ipynb", as_version=4).cells
        stored = [o.data["image/png"] for c in cells if c.cell_type == "code" for o in c.outputs if "image/png" in o.get("data", {})]
        if not stored: sys.exit(f"nbs/paper/{name}.ipynb has no stored picture; run the study and `raptor collect`.")
        found[ROOT/"nbs"/"images"/f"{name}.png"] = base64.b64decode(stored[-1])
    return found


def render():
    "The text of README.md."
    settings = configparser.ConfigParser()
    settings.read(ROOT/"settings.ini")
    notebook = nbformat.read(ROOT/"nbs"/"index.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code": tag_cell(cell)
    config = Config({"TagRemovePreprocessor": dict(enabled=True, remove_cell_tags={"drop"},
        remove_input_tags={"drop-input"}, remove_all_outputs_tags={"drop-output"})})
    exporter = MarkdownExporter(config=config)
    exporter.register_preprocessor("nbconvert.preprocessors.TagRemovePreprocessor", enabled=True)
    body, _ = exporter.from_notebook_node(notebook)
    body = site_to_repository(body, settings["DEFAULT"]["git_url"], settings["DEFAULT"]["branch"])
    note = "<!-- Made from nbs/index.ipynb by .ci/make_readme.py: edit the notebook, not this file. -->"
    return note + "\n\n" + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


if __name__ == "__main__":
    files = {ROOT/"README.md": render().encode(), **pictures()}
    if "--check" in sys.argv:
        if stale := [p.name for p, new in files.items() if not p.exists() or p.read_bytes() != new]: sys.exit(f"{', '.join(stale)} out of step: run python .ci/make_readme.py")
    else:
        for path, new in files.items(): path.parent.mkdir(exist_ok=True); path.write_bytes(new)
