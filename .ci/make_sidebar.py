"""Write nbs/sidebar.yml from the notebooks that exist, grouped by kind of page.

python .ci/make_sidebar.py          writes it
python .ci/make_sidebar.py --check  writes nothing; exits 1 if it is out of step
"""
import sys
from pathlib import Path

import yaml
from draw_rooms import ROOMS

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"

# Pages in the order of reading; a page that is not named here follows in alphabetical order.
HOWTO = ("new_preset", "phases", "foreign", "inside", "readout", "alignment", "patching", "progress", "cluster", "cache", "share", "deploy",
         "new_figure", "contribute")
EXPLAINS = ("method", "beyond", "photographs", "gallery", "differences", "architecture", "reliability", "speed")
PAPER = ("tab_probes", "tab_segmentations", "fig_similarity", "fig_accuracy_r2", "tab_ablation", "fig_partitions",
         "fig_stochastic_depth", "fig_swaps", "fig_epsilon", "fig_convergence", "fig_basins", "fig_perturbation",
         "fig_speed", "fig_coherence", "fig_rank", "fig_norms", "tab_cost", "tab_blocks", "fig_pareto", "fig_fidelity",
         "fig_weight_recurrence", "fig_programs", "tab_early_exit")
STAGES = ("train_teacher", "cache_activations", "find_phases", "train_block", "train_raptor", "train_probe",
          "train_control")


def pages(folder, order=(), keep=lambda name: True):
    "The notebooks of a folder below nbs: first those of `order`, then the others by name."
    names = sorted(p.stem for p in (NBS/folder).glob("*.ipynb") if keep(p.stem))
    names.sort(key=lambda n: order.index(n) if n in order else len(order))
    return [f"{folder}/{n}.ipynb" for n in names]


def section(title, contents): return [{"section": title, "contents": contents}] if contents else []


def modules():
    "The module notebooks: those at the top of nbs/api and the folders, in the order of the rooms."
    entries = []
    for room in ROOMS:
        entries += [str(p.relative_to(NBS)) for p in (NBS/"api").glob("*.ipynb") if p.stem.partition("_")[2] == room]
        entries += section(room.capitalize(), pages(f"api/{room}"))
    return entries


def sidebar():
    "The text of nbs/sidebar.yml."
    def item(name): return name.startswith(("tab_", "fig_"))
    summary = {"text": "Summary", "href": "paper/summary.ipynb"}
    stages = pages("paper", STAGES, lambda n: not item(n) and n != "summary")
    contents = ["index.ipynb", *section("Tutorials", pages("tutorials")), *section("How to", pages("howto", HOWTO)),
                *section("Explanations", pages("explains", EXPLAINS)),
                *section("Paper", [summary, *section("Tables and figures", pages("paper", PAPER, item)),
                                   *section("Stages", stages)]),
                *section("API", modules())]
    note = "# Made by .ci/make_sidebar.py: edit its lists, not this file.\n"
    return note + yaml.safe_dump({"website": {"sidebar": {"contents": contents}}}, sort_keys=False)


if __name__ == "__main__":
    path = NBS/"sidebar.yml"
    if "--check" in sys.argv:
        if path.read_text(encoding="utf-8") != sidebar(): sys.exit("nbs/sidebar.yml: run python .ci/make_sidebar.py")
    else: path.write_text(sidebar(), encoding="utf-8")
