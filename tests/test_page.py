"""The page of a study: how claims came out, where files lie, what a picture shows, and what has not run."""
import base64, io, json, re
from html.parser import HTMLParser
from unittest.mock import patch

import nbformat, pandas as pd, pytest
from PIL import Image

from raptor.core import paper_root
from raptor.pipeline.page import item_names, item_title, not_run, show_item, verdicts, write_page
from raptor.study.study import Study


def picture():
    png = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(png, "PNG")
    return nbformat.v4.new_output("display_data", data={"image/png": base64.b64encode(png.getvalue()).decode()})


@pytest.fixture
def study(tmp_path):
    "A study in which two figures have run; one has statements."
    folder = tmp_path/"smoke"
    for name in ("phases", "notebooks", "results", "figures"): (folder/name).mkdir(parents=True)
    (folder/"phases"/"phases.json").write_text('{"ends": {"2": [2, 6]}}')
    for item in ("fig_speed", "fig_similarity"):
        notebook = nbformat.read(paper_root()/f"{item}.ipynb", 4)
        for cell in notebook.cells:
            if cell.cell_type == "code": cell.outputs = [picture()] if "save_figure(" in cell.source else []
        nbformat.write(notebook, folder/"notebooks"/f"{item}.ipynb")
        (folder/"figures"/f"{item}.pdf").touch()
    pd.DataFrame({"claim": ["a", "b", "c"], "verdict": ["the opposite", "shown", "the opposite"]}).to_csv(folder/"results"/"fig_speed_claims.csv", index=False)
    return Study.open("smoke", tmp_path)


def cells_of(table): return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_table_of_claims_counts_what_was_measured(study):
    head, _, *rows = cells_of(verdicts(study, ["fig_similarity", "fig_speed"]))
    assert head == ["claim of the paper", "shown", "not shown", "the opposite", "where"]
    assert [row[1:4] for row in rows] == [["–"] * 3, ["1", "0", "2"], ["1", "0", "2"]]
    assert rows[1][4] == "[Angular speed by kind of token](#fig_speed)" and rows[1][0].startswith("Cls, registers and patches turn")
    assert [row[1:4] for row in cells_of(verdicts(study, ["fig_similarity"]))[2:]] == [["–"] * 3, ["0", "0", "0"]], "of what the page shows"


def test_what_has_not_run_is_named_with_its_command(study):
    assert not_run(study, []) == ""
    said = not_run(study, ["fig_rank"])
    assert "| Rank of the updates | `raptor reproduce --preset smoke --only fig_rank` |" in said and "--all" in said


def shown(study, name):
    "What an item displays: (data by type, metadata)."
    got = []
    def keep(what, metadata=None, raw=False): got.append((what if raw else {"text/markdown": what.data}, metadata or {}))
    with patch("IPython.display.display", keep): show_item(study, name)
    return got


def test_a_figure_has_its_description_and_a_caption_that_says_what_came_out(study):
    outputs = shown(study, "fig_speed")
    drawn = [(d, m) for d, m in outputs if "image/png" in d]
    assert len(drawn) == 1 and drawn[0][1]["figure"] == "fig_speed.png" and drawn[0][1]["alt"].startswith("Two panels, teacher and Raptor")
    text = "\n".join(d.get("text/markdown", "") for d, _ in outputs)
    assert "What to see" in text and "Of 3 statements: 1 shown, 2 the opposite." in text
    plain = "\n".join(d.get("text/markdown", "") for d, _ in shown(study, "fig_similarity"))
    assert "statements:" not in plain and re.search(r"(?m)^\*Similarity .+\.\*$", plain), "no blank before the star, which would not end the italics"
    claims = pd.DataFrame({"claim": ["a", "b"], "verdict": ["as claimed, no interval", "not as claimed, no interval"]})
    claims.to_csv(study.folder/"results"/"fig_speed_claims.csv", index=False)
    assert any("Of 2 statements: none has an interval.*" in d.get("text/markdown", "") for d, _ in shown(study, "fig_speed"))


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.alternatives, self.tags = [], [], [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs); self.tags.append(tag)
        if tag == "a": self.links.append(attrs.get("href", ""))
        if tag == "img": self.alternatives.append(attrs.get("alt"))
        if "id" in attrs: self.ids.append(attrs["id"])


@pytest.fixture
def page(study):
    cells = [nbformat.v4.new_markdown_cell("# A title\n\n> A line. [Other](tab_cost.ipynb) [Here](fig_speed.ipynb)")]
    for item in ("fig_similarity", "fig_speed", "fig_rank"):
        outputs = [nbformat.v4.new_output("display_data", data=d, metadata=m) for d, m in shown(study, item)]
        cells.append(nbformat.v4.new_code_cell("shown", outputs=outputs))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), study.folder/"notebooks"/"summary.ipynb")
    return study.folder, Reader(write_page(study.folder/"notebooks"/"summary.ipynb", study.folder/"summary.html").read_text())


def test_links_of_the_page_lead_to_files_to_items_and_to_the_site(page):
    folder, read = page
    inside = [l[1:] for l in read.links if l.startswith("#")]
    files = [l for l in read.links if not l.startswith(("#", "http"))]
    assert {"fig_speed", "fig_similarity", "fig_rank"} <= set(read.ids) and "fig_speed" in inside
    assert all((folder/f).is_file() for f in files) and {"results/fig_speed_claims.csv", "figures/fig_speed.pdf", "notebooks/fig_speed.ipynb"} <= set(files)
    assert any(l.endswith("/paper/tab_cost.html") for l in read.links), "an item that is not on the page is on the site"
    assert {"nav", "main", "footer"} <= set(read.tags)


def test_every_picture_of_the_page_is_described(page):
    assert [a[:11] for a in page[1].alternatives] == ["Two matrice", "Two panels,"]


@pytest.mark.parametrize("item", [i for i in item_names()])
def test_every_figure_of_the_paper_has_a_caption_and_a_description(item):
    cells = json.loads((paper_root()/f"{item}.ipynb").read_text())["cells"]
    drawing = [s for s in ("".join(c["source"]) for c in cells if c["cell_type"] == "code") if "save_figure(" in s]
    assert all(re.match(r'#\| fig-cap: ".+What to see: .+"\n#\| fig-alt: ".+"\n', s) for s in drawing) and item_title(item) != item
    assert drawing or item.startswith("tab_")
