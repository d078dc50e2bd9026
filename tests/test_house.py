"""The shape of the house: who may import whom."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dpo_ds"

FLOORS = {
    0: {"losses", "logps", "metrics", "learning_rate", "dropout", "throughput", "watchdog", "memory", "traffic"},
    1: {"dpo", "data", "whole_step"},
    2: {"models"},
    3: {"engine"},
    4: {"trainer", "gate", "micro_batches"},
    5: {"cli", "__main__"},
}
LEAVES = {"config", "tracking", "report", "errors", "files", "launcher", "__init__"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "shipped" not in path.parts)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Everything the file imports, in functions too, by full name; ``from a import b`` gives ``a`` and ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(path: Path) -> set[str]:
    names = {name for name in imports_of(path) if name.startswith("dpo_ds.")}
    return {name.split(".")[1] for name in names if (PACKAGE / name.split(".")[1]).with_suffix(".py").exists()} | {
        name.split(".")[1] for name in names if (PACKAGE / name.split(".")[1]).is_dir()
    }


def floor_of(room: str) -> int | None:
    return next((floor for floor, rooms in FLOORS.items() if room in rooms), None)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_room_has_a_place_and_imports_only_from_its_floor_or_below(path):
    room = room_of(path)
    if room in LEAVES:
        above = {imported for imported in rooms_imported(path) if imported not in LEAVES}
        # The package's face names its exports for type checkers and imports them lazily.
        assert not above or room == "__init__"
        return
    floor = floor_of(room)
    assert floor is not None, f"{room} is on no floor"
    for imported in rooms_imported(path) - LEAVES:
        above = floor_of(imported)
        assert above is not None
        assert above <= floor, f"{name_of(path)} (floor {floor}) imports {imported} (floor {above})"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_only_the_engine_knows_that_other_ranks_exist(path):
    if room_of(path) == "engine":
        return
    libraries = {name for name in imports_of(path) if name.split(".")[0] == "deepspeed"}
    assert not libraries
    # What lies in _tools measures one process.
    distributed = {name for name in imports_of(path) if name.startswith("torch.distributed")}
    assert all(name.startswith("torch.distributed._tools.") for name in distributed)


def test_no_circle_of_imports():
    names = {name_of(path): path for path in modules()}
    edges = {
        name: {imported for imported in imports_of(path) if imported in names and imported != name}
        for name, path in names.items()
        if name != "dpo_ds"
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name in done or name == "dpo_ds":
            return
        for imported in edges[name]:
            visit(imported, (*trail, name))
        done.add(name)

    for name in edges:
        visit(name, ())


def test_the_launcher_needs_the_standard_library_only():
    import sys

    for path in modules():
        if room_of(path) == "launcher":
            foreign = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names) - {"dpo_ds"}
            assert not foreign
            assert rooms_imported(path) <= {"launcher", "errors", "files"}


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_every_module_says_what_it_is_for(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert len(docstring.splitlines()) <= 9


def test_no_room_is_called_after_what_it_is_not():
    assert not {path.stem for path in modules()} & {"utils", "common", "helpers", "misc"}
