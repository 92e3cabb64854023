"""The notebooks of examples/notebooks, run from the top: a cell that fails, fails this.

With ``--write`` the outputs are stored in them, as they are committed. Source: nbclient.
"""

import argparse
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"


def main() -> int:
    """1 where a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="store the outputs")
    write, good = parser.parse_args().write, True
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        try:
            NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(FOLDER)}}).execute()
        except CellExecutionError as error:
            print(f"{path.name}: {error}")
            good = False
            continue
        if write:
            for cell in notebook.cells:
                cell.metadata.pop("execution", None)  # times, which differ with every run
                if "outputs" in cell:  # what libraries say of themselves, with paths of this machine
                    cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
            nbformat.write(notebook, path)
        print(f"{path.name}: {len(notebook.cells)} cells, all run")
    return not good


if __name__ == "__main__":
    sys.exit(main())
