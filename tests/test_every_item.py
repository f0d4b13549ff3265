"""Every table and figure of the paper, made from a whole study with its controls: `pytest -m slow`, eight minutes of two cores."""
import json, os, subprocess, sys

import pandas as pd
import pytest

from raptor.pipeline.page import item_names

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    pytest.importorskip("snakemake", reason="Snakemake 9 has no release for Python 3.10")
    home = tmp_path_factory.mktemp("home")
    for more in ([], ["--all"]): # the others are made beside the main items
        made = subprocess.run([sys.executable, "-m", "raptor", "reproduce", "--preset", "smoke", *more], text=True, capture_output=True,
                              env={**os.environ, "RAPTOR_HOME": str(home), "OMP_NUM_THREADS": "1"})
        assert made.returncode == 0, made.stderr
    return home/"smoke"


@pytest.mark.parametrize("item", item_names())
def test_an_item_leaves_its_table_and_its_figure(study, item):
    if item == "fig_fidelity": # no variant of smoke is measured while it trains: said, and nothing is drawn
        cells = json.loads((study/"notebooks"/"fig_fidelity.ipynb").read_text())["cells"]
        shown = "".join("".join(o.get("data", {}).get("text/html", "")) for c in cells for o in c.get("outputs", []))
        assert "measured during its training: not run" in shown and not (study/"results"/f"{item}.csv").exists()
        return
    table = pd.read_csv(study/"results"/f"{item}.csv")
    one_replica = {"seed", "data", *table.filter(regex="std$")} # no seed of its own where runs are put together, and no spread
    assert len(table) and not (empty := {*table.columns[table.isna().all()]} - one_replica), f"empty columns: {empty}"
    assert item.startswith("tab_") or (study/"figures"/f"{item}.pdf").stat().st_size > 1000


def test_the_page_shows_all_of_them(study):
    page = (study/"summary.html").read_text()
    assert [item for item in item_names() if item not in page] == []
