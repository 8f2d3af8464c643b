"""The folders of the package are layers: imports point one way, files stay short, tests stand beside what they test."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import prefdistill

PACKAGE = Path(prefdistill.__file__).parent
TESTS = Path(__file__).parents[1]
# From the bottom to the top: a folder may import from itself and from those before it.
LAYERS = (
    "core",
    "models",
    "data",
    "sampling",
    "losses",
    "signals",
    "methods",
    "training",
    "evaluation",
    "report",
    "experiment",
    "cli",
)
MOST_FOLDERS, MOST_LINES = 12, 400
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
Graph = dict[str, set[str]]


def module_name(path: Path) -> str:
    parts = ["prefdistill", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(sources: dict[str, str]) -> Graph:
    """Which of these modules each one imports: anywhere in its code, for type checkers only too."""
    graph: Graph = {}
    for module, source in sources.items():
        imported: set[str] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: relative import"
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    imported.add(submodule if submodule in sources else str(node.module))
        graph[module] = (imported & set(sources)) - {module}
    return graph


def layer_of(module: str) -> int:
    """The place of a module's folder in LAYERS; -1 for modules in no folder: they may import all."""
    parts = module.split(".")
    return LAYERS.index(parts[1]) if len(parts) > 1 and parts[1] in LAYERS else -1


def upward_imports(graph: Graph) -> list[str]:
    return [
        f"{module} imports {imported}"
        for module, imports in graph.items()
        for imported in sorted(imports)
        if 0 <= layer_of(module) < layer_of(imported)
    ]


def import_circle(graph: Graph) -> list[str]:
    """The modules of a circle of imports, if there is one; the package itself looks names up on first use."""
    try:
        TopologicalSorter({m: found - {"prefdistill"} for m, found in graph.items() if m != "prefdistill"}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


GRAPH = import_graph({module_name(path): source for path, source in SOURCES.items()})


def test_every_folder_is_a_layer():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(LAYERS)
    assert len(LAYERS) <= MOST_FOLDERS
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == {"__init__.py", "__main__.py"}


def test_imports_point_down():
    assert upward_imports(GRAPH) == []


def test_no_import_circle():
    assert import_circle(GRAPH) == []


def test_wrong_imports_are_found():
    graph = import_graph(
        {
            "prefdistill.core.files": "if TYPE_CHECKING:\n    from prefdistill.data import load",
            "prefdistill.data.load": "def f():\n    from prefdistill.data.encode import g",
            "prefdistill.data.encode": "import prefdistill.data.load",
        }
    )
    assert upward_imports(graph) == ["prefdistill.core.files imports prefdistill.data.load"]
    assert set(import_circle(graph)) == {"prefdistill.data.load", "prefdistill.data.encode"}


def test_every_file_can_be_read_at_one_sitting():
    lengths = {str(path.relative_to(PACKAGE)): len(source.splitlines()) for path, source in SOURCES.items()}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_every_module_says_what_it_holds():
    silent = [str(path) for path, source in SOURCES.items() if not ast.get_docstring(ast.parse(source))]
    assert [path for path in silent if not path.endswith("__main__.py")] == []
    assert [str(path) for path, source in SOURCES.items() if "TODO" in source] == []


def test_tests_stand_in_the_folders_of_what_they_test():
    folders = {path.parent.name for path in TESTS.glob("*/*.py")}
    assert folders <= {*LAYERS, "support", "system", "gpu"}
    assert list(TESTS.glob("test_*.py")) == []
