"""The rooms of the house: imports go one way, and each has a budget of lines."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From the ground up: a room imports itself and what stands above it in this list.
ROOMS = ("config", "data", "model", "weights", "exam", "run", "train", "plan", "demo")
GROUND = ("distributed", "errors", "files", "intervals", "libraries", "processes")


def imported(file):
    """Modules of medtrain that a file imports, also inside functions; not those for annotations alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in for_types and (node.module or "").startswith("medtrain"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("medtrain"))


def place(module):
    """How far up a module of the trainer stands: 0 for what everybody uses."""
    name = module.split(".")[2]
    return 0 if name in GROUND else ROOMS.index(name) + 1


@pytest.mark.parametrize("room", (*GROUND, *ROOMS))
def test_a_room_imports_only_what_stands_below_it(room):
    folder = ROOT / "trainer" / room
    files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
    own = place(f"medtrain.trainer.{room}")
    for file in files:
        for module in imported(file):
            assert not module.startswith("medtrain.benchmarks"), f"{file.relative_to(ROOT)} imports {module}"
            if module.startswith("medtrain.trainer."):
                assert place(module) <= own, f"{file.relative_to(ROOT)} imports {module}"


def test_kernels_import_nothing_of_the_trainer():
    for file in (ROOT / "kernels").rglob("*.py"):
        assert not [module for module in imported(file) if not module.startswith("medtrain.kernels")], file


# Lines per room. Whoever needs more deletes something, or raises the number in the same commit. Aims: 12,000 for kernels and
# trainer together, 400 per file.
BUDGETS = {
    "kernels": 1740,
    "trainer/config": 715,
    "trainer/data": 1705,
    "trainer/model": 1585,
    "trainer/weights": 1157,
    "trainer/exam": 2460,
    "trainer/run": 1070,
    "trainer/train": 1930,
    "trainer/plan": 260,
    "trainer/demo": 850,
    "trainer": 950,  # the files that lie in no room
    "benchmarks": 2800,
}
LONG_FILES: dict[str, int] = {}


def lines_of(file):
    return len(file.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("room", BUDGETS)
def test_a_room_keeps_to_its_budget_of_lines(room):
    folder = ROOT / room
    files = folder.glob("*.py") if room == "trainer" else folder.rglob("*.py")
    assert sum(map(lines_of, files)) <= BUDGETS[room]


def test_no_file_is_long():
    files = [file for top in ("kernels", "trainer", "benchmarks") for file in (ROOT / top).rglob("*.py")]
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        assert lines_of(file) <= LONG_FILES.get(name, 400), name
