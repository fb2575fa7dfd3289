"""Who may import whom. The table is the picture in docs/architecture.md."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / "src" / "liveselect"

# room -> rooms of ours that it may import; its own room is always allowed
ALLOWED = {
    "functional": set(),
    "seeding": set(),
    "pool": set(),
    "plan": set(),
    "cost": set(),
    "json_lines": set(),
    "ledger": {"json_lines"},
    "scores": set(),
    "decisions": {"protocols", "pool", "plan", "ledger"},
    "protocols": {"pool", "plan", "seeding", "cost"},
    "losses": {"protocols"},
    "distributed": {"protocols", "functional"},
    "attributes": {"protocols", "functional"},
    "snapshot": {"protocols", "functional", "attributes"},
    "influence": {"protocols", "cost", "losses", "distributed", "functional", "snapshot"},
    "regressors": {"protocols", "losses", "distributed", "functional", "seeding"},
    "selectors": {"protocols", "pool", "cost", "distributed", "functional", "seeding", "scores", "decisions"},
    "measurement": {"bits", "protocols", "cost", "distributed", "functional", "snapshot"},
    "rounds": {
        *("protocols", "pool", "plan", "ledger", "decisions", "seeding", "distributed", "functional", "snapshot"),
        *("measurement", "watch"),
    },
    "rehearsal": {"protocols", "distributed", "plan", "cost", "losses", "snapshot", "rounds"},
    "bits": {"attributes", "functional"},
    "watch": {"protocols", "pool", "plan", "ledger", "decisions", "distributed", "snapshot"},
    "monitoring": {"decisions", "ledger"},
    "report": {"ledger"},
    "callbacks": {
        *("protocols", "pool", "plan", "cost", "ledger", "losses", "distributed", "functional", "seeding"),
        *(
            "influence",
            "regressors",
            "selectors",
            "rounds",
            "snapshot",
            "decisions",
            "monitoring",
            "watch",
            "measurement",
            "rehearsal",
        ),
    },
    "datamodules": {"protocols", "pool", "plan", "seeding", "distributed", "functional"},
}
ONLY_MATH = {"torch", "numpy", "math", "collections", "typing", "dataclasses", "functools", "inspect", "contextlib"}


def room_of(path: Path) -> str:
    """Return the room that a source file stands in."""
    if path.is_relative_to(ENGINE):
        return path.relative_to(ENGINE).parts[0].removesuffix(".py")
    return path.relative_to(ROOT).parts[0]


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> list[str]:
    """Return every module that a file imports, at any depth of the code."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module if node.module != "liveselect" else f"liveselect.{node.names[0].name}")
    return found


FILES = sources("src/liveselect", "callbacks", "datamodules")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_between_rooms_is_in_the_table(path):
    room = room_of(path)
    if room in {"cli", "__init__"}:
        return
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("liveselect.")}
    assert ours - {room} <= ALLOWED[room]


@pytest.mark.parametrize("path", sources("src/liveselect/functional"), ids=lambda path: path.name)
def test_functional_imports_only_mathematics(path):
    assert {name.split(".")[0] for name in imports(path)} <= ONLY_MATH | {"liveselect"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lightning_stays_at_the_rim(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert "pytorch_lightning" not in roots
    if path.is_relative_to(ENGINE) and room_of(path) != "cli":
        assert "lightning" not in roots


@pytest.mark.parametrize("path", sources("callbacks"), ids=lambda path: path.name)
def test_callbacks_never_touch_data_files(path):
    tree = ast.parse(path.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not ({"open", "memmap"} & names)
    assert not ({"memmap", "read_text", "write_text"} & attributes)
    assert not {"datasets", "pyarrow"} & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", sources("datamodules"), ids=lambda path: path.name)
def test_datamodules_never_touch_gradients(path):
    attributes = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not {"backward", "grad", "autograd"} & attributes


@pytest.mark.parametrize("path", sources("src", "callbacks", "datamodules", "tests", "benchmarks"), ids=str)
def test_the_bare_folder_names_are_never_imported(path):
    # from the repository root `import callbacks` works too, and makes a second copy of every class
    assert not {"callbacks", "datamodules", "configs"} & {name.split(".")[0] for name in imports(path)}


def test_the_engine_imports_where_lightning_is_absent():
    modules = [
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        for path in sources("src/liveselect")
        if room_of(path) != "cli"
    ]
    code = (
        "import sys, importlib\n"
        "sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        f"for name in {modules}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_holds_the_top_level_folders_as_links():
    for name in ("callbacks", "datamodules", "configs"):
        assert (ENGINE / name).is_symlink()
        assert (ENGINE / name).resolve() == ROOT / name
