"""The rules of the house, read off the imports: floors, who knows whom, and how large things may be."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = "snn_reversible_plugin"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE
FILES = sorted(SOURCE.rglob("*.py"))
FLOORS = {
    "ops": 1, "data": 1,
    "modules": 2, "grid": 2, "tape": 2,
    "neurons": 3, "blocks": 3, "training": 3,
    "spikingjelly": 4, "snntorch": 4, "models": 4, "convert": 4,
    "compiler": 5,
    "reports": 6,
    "__init__": 7, "demo": 7, "factory": 7,
    "__main__": 8,
}  # fmt: skip
MOST_LINES, MOST_PARAMETERS = 400, 7
# Compiled kernels: what calls one another stands in one file, and a loop takes what it reads.
KERNELS = (
    "kernels.py", "triton_kernels.py", "triton_autograd_kernels.py", "gradient_kernels.py",
    "triton_gradient_kernels.py",
)  # fmt: skip
# A little longer than the rule, each for one idea. Entries go when files shrink; none may be added.
LONGER: dict[str, int] = {}


def room(module: str) -> str:
    """The room at the package's top level that a module of it stands in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def name_of(file: Path) -> str:
    parts = (PACKAGE, *file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


NAMES = {name_of(file): file for file in FILES}


@cache
def imports(file: Path) -> frozenset[str]:
    """The modules of the package that a file imports, wherever it does, but for types alone."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in NAMES else node.module)
    return frozenset(name for name in found if name.partition(".")[0] == PACKAGE)


def test_every_room_has_a_floor():
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py"}
    rooms |= {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    assert rooms == FLOORS.keys()
    assert len(rooms) <= 18
    assert len({*FLOORS.values()}) <= 8
    assert len(list(SOURCE.glob("*.py"))) <= 6


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_point_down(file):
    here = room(name_of(file))
    for module in imports(file):
        there = room(module)
        if there != here:
            assert FLOORS[there] < FLOORS[here], f"{here} imports {module}"


@pytest.mark.parametrize(
    ("rooms", "may_know"),
    [
        (("ops", "data"), ()),
        (("modules",), ("ops",)),
        (("grid",), ("ops",)),
        (("tape",), ("ops",)),
        (("neurons", "blocks"), ("ops", "modules", "grid", "tape")),
        (("spikingjelly", "snntorch"), ("ops", "modules", "grid", "tape", "neurons", "blocks")),
    ],
)
def test_who_knows_whom(rooms, may_know):
    for file in FILES:
        here = room(name_of(file))
        if here in rooms:
            known = {room(module) for module in imports(file)} - {here}
            assert known <= {*may_know}, f"{file} knows {known - {*may_know}}"


def test_there_is_no_circle():
    state = dict.fromkeys(NAMES, 0)

    def visit(name, path):
        state[name] = 1
        for module in sorted(imports(NAMES[name])):
            if module not in NAMES or module == name:
                continue
            # A package's own file hands on what its modules give: it is no step of a circle.
            if NAMES[module].name == "__init__.py" and name.startswith(module + "."):
                continue
            assert state[module] != 1, f"a circle: {[*path[path.index(module) :], module]}"
            if not state[module]:
                visit(module, [*path, module])
        state[name] = 2

    for name in NAMES:
        if not state[name]:
            visit(name, [name])


@pytest.mark.parametrize("folder", ["grid", "neurons", "ops"])
def test_forms_know_no_tape(folder):
    for file in (SOURCE / folder).rglob("*.py"):
        if file.name in ("reference.py", "in_place.py") or file.name.startswith("on_"):
            assert not any(room(module) == "tape" for module in imports(file)), file


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_files_are_short_and_functions_take_few_parameters(file):
    text, name = file.read_text(), str(file.relative_to(SOURCE))
    if file.name in KERNELS:
        return
    lines = text.count("\n")
    assert lines <= LONGER.get(name, MOST_LINES)
    assert name not in LONGER or lines > MOST_LINES, f"{name} has shrunk: take it off the list"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            # An autograd function's tensors have to be its own arguments; a public constructor is stock's.
            if names[:1] == ["ctx"] or node.name == "__init__":
                continue
            names = [one for one in names if one not in ("self", "cls")]
            allowed = PUBLIC.get(node.name, MOST_PARAMETERS)
            assert len(names) <= allowed, f"{name}: {node.name} takes {len(names)} parameters"


# Public functions whose parameters are options that users name, and stock's own signatures.
PUBLIC = {"sltt_backward": 10, "event_frames": 8, "rev_s_former": 10, "demo": 11, "compare": 11,
          "wrap_residual_blocks": 8}  # fmt: skip


def test_marks_have_one_home():
    for file in FILES:
        if '"_srp_' in file.read_text() or "'_srp_" in file.read_text():
            assert file == SOURCE / "modules" / "swap.py"


def test_sources_can_be_looked_up():
    for file in FILES:
        assert "design section" not in file.read_text().lower(), file
