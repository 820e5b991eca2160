"""Code cells of a Jupyter notebook, read as one script."""

import codecs
import re

from pydantic import BaseModel

# What IPython takes besides Python: %magics, !commands, ?help, and what is assigned from them.
_NO_PYTHON = re.compile(r"(\s*)(?:%{1,2}[a-zA-Z].*|[!?].*|[\w.]+\?{1,2}\s*)")
_ASSIGNED = re.compile(r"(\s*[\w, ]+=\s*)[%!][a-zA-Z].*")
_PYTHON_CELL = re.compile(r"%%(time|timeit|capture|prun|python3?)\b|%%writefile\b.*\.py\s*$")


class _Cell(BaseModel):
    cell_type: str
    source: str | list[str] = ""


class _Notebook(BaseModel):
    cells: list[_Cell]


def code_cells(source: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """The code of a notebook's JSON, and the cell and the line in it, both from 1, of each line of that code.

    Cells count as the notebook shows them, text included. Raises ValueError: this is no notebook.
    """
    lines: list[str] = []
    places: list[tuple[int, int]] = []
    for number, cell in enumerate(_Notebook.model_validate_json(source.removeprefix(codecs.BOM_UTF8)).cells, 1):
        if cell.cell_type == "code":
            code = _python("".join(cell.source).splitlines())
            lines += code
            places += [(number, line) for line in range(1, len(code) + 1)]
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"), places


def _python(lines: list[str]) -> list[str]:
    """A cell's lines, with `pass` in the place of what is no Python."""
    first = next((line for line in lines if line.strip()), "")
    if first.startswith("%%") and not _PYTHON_CELL.match(first):
        return ["pass"] * len(lines)
    python, continued = list[str](), False
    for line in lines:
        command, assigned = _NO_PYTHON.fullmatch(line), _ASSIGNED.fullmatch(line)
        if not continued:
            python.append(f"{command[1]}pass" if command else f"{assigned[1]}None" if assigned else line)
        else:
            python.append("")
        continued = line.endswith("\\") and (continued or command is not None or assigned is not None)
    return python
