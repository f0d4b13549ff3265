"""Every table and figure of the paper, made from a whole study with its controls: `pytest -m slow`, five minutes of two cores."""
import os, subprocess, sys

import pandas as pd
import pytest

from raptor.pipeline.page import item_names

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    pytest.importorskip("snakemake", reason="Snakemake 9 has no release for Python 3.10")
    home = tmp_path_factory.mktemp("home")
    made = subprocess.run([sys.executable, "-m", "raptor", "reproduce", "--preset", "smoke", "--all"], text=True, capture_output=True,
                          env={**os.environ, "RAPTOR_HOME": str(home), "OMP_NUM_THREADS": "1"})
    assert made.returncode == 0, made.stderr
    return home/"smoke"


@pytest.mark.parametrize("item", item_names())
def test_an_item_leaves_its_table_and_its_figure(study, item):
    table = pd.read_csv(study/"results"/f"{item}.csv")
    assert len(table) and not table.isna().all().any(), f"empty columns: {[*table.columns[table.isna().all()]]}"
    assert item.startswith("tab_") or (study/"figures"/f"{item}.pdf").stat().st_size > 1000


def test_the_page_shows_all_of_them(study):
    page = (study/"summary.html").read_text()
    assert [item for item in item_names() if item not in page] == []
