"""The picture in docs/architecture.md holds: who may import whom, and what else keeps the rooms apart.

Each test reads all files, and names all offenders at once.
"""

import ast
import functools
import graphlib
import inspect
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / "src" / "liveselect"
LINKED = ("callbacks", "datamodules", "configs")
MATHEMATICS = {"torch", "numpy", "scipy", "torchmetrics", "math"}
MATHEMATICS |= {"collections", "typing", "dataclasses", "functools", "inspect", "contextlib", "sys"}
MATHEMATICS |= {"weakref"}  # what was found out about a model goes with it
DATA_LIBRARIES = {"datasets", "pyarrow"}

# `Any` in 1,000 lines of product code: what comparable libraries have at most
MOST_ANY_PER_THOUSAND_LINES = 6

# parts are asked for what their base class declares; these objects of torch happen to use such a name
NOT_OUR_PARTS = {("datamodules/wrapping.py", "batch_size")}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


PRODUCT = sources("src", *LINKED)


def room_of(path: Path) -> str:
    """Return the room that a source file stands in."""
    if path.is_relative_to(ENGINE):
        return path.relative_to(ENGINE).parts[0].removesuffix(".py")
    return path.relative_to(ROOT).parts[0]


def at(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Yield where a file imports which module, at any depth of the code."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((at(path, node), alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "liveselect":
                yield from ((at(path, node), f"liveselect.{alias.name}") for alias in node.names)
            else:
                yield at(path, node), node.module


def roots(path: Path) -> Iterator[tuple[str, str]]:
    return ((place, module.split(".")[0]) for place, module in imports(path))


def listed(offenders: list[str]) -> str:
    return "\n".join(["", *offenders])


def table() -> dict[str, set[str]]:
    """Return what each room may import, as the document says."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = re.search(r"^## Who may import whom\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)[1]
    _, _, *rows = (line.strip("|").split("|") for line in section.splitlines() if line.startswith("|"))
    return {
        room.strip(): {name.strip() for name in names.split(",")} - {"nothing"}
        for rooms, names, _ in rows
        for room in rooms.split(",")
    }


def test_the_table_has_a_row_for_every_room_and_no_circle():
    allowed = table()
    assert set(allowed) == {room_of(path) for path in PRODUCT} - {"__init__", "configs"}
    ours = {room: names - {"Lightning", "everything"} for room, names in allowed.items()}
    assert set().union(*ours.values()) <= set(ours)
    tuple(graphlib.TopologicalSorter(ours).static_order())  # raises CycleError with the circle


def test_every_import_is_in_the_table():
    allowed = table()
    offenders = []
    for path in PRODUCT:
        room = room_of(path)
        may = allowed.get(room, set())
        for place, module in imports(path):
            first, *rest = module.split(".")
            asked = rest[0] if first == "liveselect" and rest else {"lightning": "Lightning"}.get(first)
            if asked not in {None, room, *may} and "everything" not in may:
                offenders.append(f"{place} imports {module}, which docs/architecture.md does not allow in {room}")
    assert not offenders, listed(offenders)


def test_functional_is_mathematics_only():
    offenders = [
        f"{place} imports {root}"
        for path in sources("src/liveselect/functional")
        for place, root in roots(path)
        if root not in {*MATHEMATICS, "liveselect"}
    ]
    assert not offenders, listed(offenders)


def test_callbacks_never_touch_data_files_and_datamodules_never_touch_gradients():
    forbidden = {
        "callbacks": {"open", "memmap", "read_text", "write_text"},
        "datamodules": {"backward", "grad", "autograd"},
    }
    offenders = [
        f"{at(path, node)} uses {name}"
        for room, names in forbidden.items()
        for path in sources(room)
        for node in ast.walk(parsed(path))
        if (name := node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)) in names
    ]
    offenders += [
        f"{place} imports {root}"
        for path in sources("callbacks")
        for place, root in roots(path)
        if root in DATA_LIBRARIES
    ]
    assert not offenders, listed(offenders)


def test_the_bare_folder_names_and_the_other_lightning_are_never_imported():
    # from the repository root `import callbacks` works too, and makes a second copy of every class
    offenders = [
        f"{place} imports {root}"
        for path in (*PRODUCT, *sources("tests", "benchmarks"))
        for place, root in roots(path)
        if root in {*LINKED, "pytorch_lightning"}
    ]
    assert not offenders, listed(offenders)


def test_the_engine_imports_where_lightning_is_absent():
    modules = [
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        for path in sources("src/liveselect")
        if room_of(path) not in {"cli", "loops"}
    ]
    code = (
        "import sys, importlib\n"
        "sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        f"for name in {modules}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def declared_by_the_grammar() -> set[str]:
    """Return the names of everything that the base classes of parts declare."""
    from liveselect import grammar

    bases = (grammar.Selector, grammar.InfluenceEstimator, grammar.InfluenceRegressor, grammar.CandidateSource)
    return {
        name for base in bases for name in (*vars(base), *inspect.get_annotations(base)) if not name.startswith("_")
    }


def test_parts_are_never_probed_for_what_their_base_class_declares():
    declared = declared_by_the_grammar()
    assert {"select", "score", "predict", "candidates"} <= declared
    offenders = []
    for path in PRODUCT:
        for node in ast.walk(parsed(path)):
            match node:
                case ast.Call(func=ast.Name(id="hasattr" | "getattr"), args=[part, ast.Constant(value=name), *_]):
                    if name in declared and (str(path.relative_to(ROOT)), name) not in NOT_OUR_PARTS:
                        offenders.append(f"{at(path, node)} probes {ast.unparse(part)} for {name}")
    assert not offenders, listed(offenders)


def test_any_is_rare():
    places = [
        at(path, node)
        for path in PRODUCT
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Name) and node.id == "Any"
    ]
    lines = sum(len(path.read_text().splitlines()) for path in PRODUCT)
    share = 1000 * len(places) / lines
    assert share <= MOST_ANY_PER_THOUSAND_LINES, f"{share:.2f}, at {', '.join(places)}"


def test_the_package_holds_the_top_level_folders_as_links():
    for name in LINKED:
        assert (ENGINE / name).is_symlink()
        assert (ENGINE / name).resolve() == ROOT / name


def product_files() -> set[str]:
    """Return the files of the package, as they are called where it is installed."""
    folders = {"liveselect": ENGINE, **{f"liveselect/{name}": ROOT / name for name in LINKED}}
    return {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_that_is_made_of_the_sdist_holds_every_file_of_the_package(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("src", *LINKED):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    _build(copy, "sdist", tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        assert not [member.name for member in sdist if member.issym()]  # links would lead nowhere
        sdist.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    _build(unpacked, "wheel", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == product_files()


def _build(folder: Path, kind: str, out: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
