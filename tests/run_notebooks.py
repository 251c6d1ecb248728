"""Runs the notebooks from top to bottom on the small real models (`make notebooks`).

    PYTHONPATH=. python tests/run_notebooks.py [FOLDER]

A cell that raises fails the run. Executed copies, with outputs, go to FOLDER when one is given; the
notebooks in the repository stay without outputs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent.parent / "examples/notebooks"


def run(notebook: Path, folder: Path) -> None:
    """Executes one notebook beside the examples; what it saves goes to a folder that is deleted."""
    content = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "real_models.py").symlink_to(NOTEBOOKS.parent / "real_models.py")
        work = Path(place) / "work"
        work.mkdir()
        NotebookClient(content, timeout=1800, resources={"metadata": {"path": str(work)}}).execute()
    nbformat.write(content, folder / notebook.name)
    print(f"{notebook.name}: {sum(cell.cell_type == 'code' for cell in content.cells)} cells run")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch)
        for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
            run(notebook, folder)


if __name__ == "__main__":
    main()
