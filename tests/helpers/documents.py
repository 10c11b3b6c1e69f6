"""Code of documents and notebooks, run as a reader would."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

__all__ = ["code_cells", "python_blocks", "run_cells"]


def python_blocks(document: Path) -> list[str]:
    """Fenced blocks of a Markdown page that are Python, in order."""
    return re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.S | re.M)


def code_cells(notebook: Path) -> list[str]:
    """Code cells of a notebook, in order."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_cells(cells: list[str]) -> tuple[dict[str, Any], list[Any]]:
    """Run cells one after the other in one namespace.

    Returns:
        The namespace, and what the last line of each cell gave, as a notebook would show it; None for a statement.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for number, cell in enumerate(cells):
        tree = ast.parse(cell, f"cell {number}")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), names)
        value = None
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        shown.append(value)
    return names, shown
