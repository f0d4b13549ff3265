"""Draw the rooms of the package from its imports, as a Mermaid graph for nbs/explains/architecture.ipynb.

python .ci/draw_rooms.py          prints the graph
python .ci/draw_rooms.py --write  puts it into the page
python .ci/draw_rooms.py --check  writes nothing; exits 1 if the page shows another graph
"""
import ast, json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT/"nbs"/"explains"/"architecture.ipynb"
FENCE = re.compile(r"(?<=```\{mermaid\}\n).*?(?=\n```)", re.DOTALL)

# The order of the rooms: each imports only from those before it.
ROOMS = ("core", "data", "teacher", "trajectories", "phases", "model", "train", "probes", "analysis", "figures",
         "study", "pipeline")


def modules(root=ROOT):
    "{dotted name below raptor: path} of every module that holds code, sorted by name."
    paths = sorted((root/"raptor").rglob("*.py"))
    return {".".join(p.relative_to(root/"raptor").with_suffix("").parts): p for p in paths if p.name[0] != "_"}


def imported_modules(path, name):
    "Dotted names (below raptor) that a module imports, also inside its functions."
    here, found = ["raptor", *name.split(".")], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = here[:len(here) - node.level] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            found |= {full, *(f"{full}.{a.name}" for a in node.names)} # `from ..model import block` names a module
        elif isinstance(node, ast.Import): found |= {a.name for a in node.names}
    return {n.removeprefix("raptor.") for n in found if n.startswith("raptor.")}


def arrows(root=ROOT):
    "{(room that is imported, room that imports it)}."
    known = modules(root)
    used = {(other, name) for name, path in known.items() for other in imported_modules(path, name) if other in known}
    pairs = {tuple(n.partition(".")[0] for n in pair) for pair in used}
    return {(a, b) for a, b in pairs if a != b}


def direct(pairs):
    "The arrows that no longer path replaces: the transitive reduction of an acyclic graph."
    after = {}
    for a, b in sorted(pairs, key=lambda p: -ROOMS.index(p[0])): after.setdefault(a, set()).update({b}, after.get(b, ()))
    return {(a, b) for a, b in pairs if not any(b in after.get(c, ()) for x, c in pairs if x == a and c != b)}


def graph(root=ROOT):
    "The Mermaid source: one node a room with its modules, one arrow from each room to those that build on it."
    rooms, pairs = {}, arrows(root)
    for name in modules(root): rooms.setdefault(name.partition(".")[0], []).append(name.partition(".")[2])
    if unknown := sorted(set(rooms) - set(ROOMS)): sys.exit(f"{unknown} are not in ROOMS; add them in their order.")
    upward = sorted(f"{b} imports {a}" for a, b in pairs if ROOMS.index(a) > ROOMS.index(b))
    if upward: sys.exit(f"imports run upward: {', '.join(upward)}; move what is shared to the room above.")
    lines = ["flowchart TD"]
    for room in (r for r in ROOMS if r in rooms):
        names = [m for m in rooms[room] if m]
        lines.append(f'  {room}["<b>{room}</b>' + (f"<br/>{' · '.join(names)}" if names else "") + '"]')
    lines += [f"  {a} --> {b}" for a, b in sorted(direct(pairs), key=lambda p: [ROOMS.index(r) for r in p])]
    return "\n".join(lines)


def main(arguments):
    text = graph()
    if not arguments: return print(text)
    page = json.loads(PAGE.read_text(encoding="utf-8"))
    cell = next(c for c in page["cells"] if FENCE.search("".join(c["source"])))
    shown = "".join(cell["source"])
    if "--check" in arguments:
        if FENCE.search(shown).group() != text: sys.exit(f"{PAGE.name} is out of step: run python .ci/draw_rooms.py --write")
    else:
        cell["source"] = FENCE.sub(lambda m: text, shown).splitlines(keepends=True)
        PAGE.write_text(json.dumps(page, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__": main(sys.argv[1:])
