#!/usr/bin/env python
"""Print every error sentence of the package with its place, so that they can be read at once: python .ci/sentences.py"""
import ast
from pathlib import Path

ERRORS = ("RaptorError", "ValueError")


def text(node):
    "A string expression with what it would fill in, as source code in braces."
    if isinstance(node, ast.Constant): return str(node.value)
    if isinstance(node, ast.JoinedStr): return "".join(map(text, node.values))
    if isinstance(node, ast.FormattedValue): return f"{{{ast.unparse(node.value)}}}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add): return text(node.left) + text(node.right)
    return f"{{{ast.unparse(node)}}}"


def sentences(path):
    "[(line, sentence)] of a module: what is given to an error."
    calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and n.args)
    return sorted((n.lineno, text(n.args[0])) for n in calls if getattr(n.func, "id", "") in ERRORS)


if __name__ == "__main__":
    root = Path(__file__).parents[1]
    for path in sorted((root/"raptor").rglob("*.py")):
        for line, sentence in sentences(path): print(f"{path.relative_to(root)}:{line}\t{sentence}")
