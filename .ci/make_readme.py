"""Write README.md from nbs/index.ipynb (the same page as the front of the site), without needing Quarto.

The front page shows a few figures; they are those stored in the paper's notebooks, copied to nbs/images. Links and
figures are absolute addresses, so that they also work on a package index.

python .ci/make_readme.py          writes README.md and its figures
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
    "Turn nbdev's directives into the tags by which nbconvert removes cells, inputs and outputs."
    found = [re.sub(r"\s*:\s*", ": ", d) for d in DIRECTIVE.findall(cell.source)]
    tags = {"hide": "drop", "echo: false": "drop-input", "output: false": "drop-output"}
    cell.metadata["tags"] = [tags[d] for d in found if d in tags]
    cell.source = DIRECTIVE.sub("", cell.source).strip("\n")


def absolute(text, git_url, branch):
    "Relative links (to notebooks and figures below nbs/) as addresses of the repository; a figure's is that of its bytes."
    raw = git_url.replace("https://github.com/", "https://raw.githubusercontent.com/")
    text = re.sub(r"!\[([^]]*)\]\((?!\w+:)([^)\s]+)\)", rf"![\1]({raw}/{branch}/nbs/\2)", text)
    return re.sub(r"(?<!!)(\[[^]]*\])\((?!\w+:|#)([^)\s]+\.ipynb)", rf"\1({git_url}/blob/{branch}/nbs/\2", text)


def figures():
    "The figures that the front page shows: {path: bytes}, each the last one stored in the notebook of its name."
    source, found = (ROOT/"nbs"/"index.ipynb").read_text(encoding="utf-8"), {}
    for name in re.findall(r"\]\(images/(\w+)\.png\)", source):
        cells = nbformat.read(ROOT/"nbs"/"paper"/f"{name}.ipynb", as_version=4).cells
        outputs = [o for c in cells if c.cell_type == "code" for o in c.outputs]
        stored = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
        if not stored: sys.exit(f"nbs/paper/{name}.ipynb has no stored figure; run the study and `raptor collect`.")
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
    body = absolute(body, settings["DEFAULT"]["git_url"], settings["DEFAULT"]["branch"])
    note = "<!-- Made from nbs/index.ipynb by .ci/make_readme.py: edit the notebook, not this file. -->"
    return note + "\n\n" + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


if __name__ == "__main__":
    files = {ROOT/"README.md": render().encode(), **figures()}
    if "--check" in sys.argv:
        stale = [p.name for p, new in files.items() if not p.exists() or p.read_bytes() != new]
        if stale: sys.exit(f"{', '.join(stale)} out of step: run python .ci/make_readme.py")
    else:
        for path, new in files.items(): path.parent.mkdir(exist_ok=True); path.write_bytes(new)
