"""Write README.md from nbs/index.ipynb (the same page as the front of the site), without needing Quarto.

python .ci/make_readme.py          writes README.md
python .ci/make_readme.py --check  writes nothing; exits 1 if README.md is out of step
"""
import configparser, re, sys
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
    return re.sub(r"\]\((?!\w+:|#)([^)\s]+\.ipynb)", r"](nbs/\1", text)


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
    readme, text = ROOT/"README.md", render()
    if "--check" in sys.argv:
        if not readme.exists() or readme.read_text() != text: sys.exit("README.md is out of step: run python .ci/make_readme.py")
    else: readme.write_text(text)
