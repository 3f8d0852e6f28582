"""The house: which module stands on which floor, what it may import, and what `import adaptergraph` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "adaptergraph"

FLOORS = {
    "errors": 0,
    "names": 1,
    "loading": 2,
    "node": 1,
    "imported": 1,
    "select": 1,
    "bodies": 1,
    "graph": 1,
    "collect": 1,
    "splicing": 1,
    "edit": 1,
    "rewrite": 1,
    "verbs": 1,
    "shapes": 2,
    "layers": 2,
    "rules": 2,
    "axes": 2,
    "features": 3,
    "adapter": 3,
    "blocks": 3,
    "methods": 3,
    "tracing": 4,
    "hosting": 4,
    "lower": 4,
    "state": 4,
    "switch": 4,
    "tasks": 4,
    "compiler": 4,
    "saving": 5,
    "cost": 6,
    "plan": 6,
    "structure": 6,
    "places": 6,
    "view": 6,
    "draw": 6,
    "batches": 7,
    "fit": 7,
}

# verbs of Graph, Node and Selection that are answered on a higher floor: one-line imports inside the method
UPWARD = {
    ("graph", "saving"),
    ("graph", "compiler"),
    ("graph", "draw"),
    ("graph", "plan"),
    ("node", "layers"),
}

THIRD_PARTY = {
    "torch": {
        "names",
        "splicing",
        "rules",
        "axes",
        "shapes",
        "loading",
        "layers",
        "tracing",
        "hosting",
        "lower",
        "state",
        "switch",
        "tasks",
    }
    | {"compiler", "saving", "cost", "batches", "fit"},
    "networkx": {"graph"},
    "pydantic": {"methods", "saving"},
    "safetensors": {"saving", "state"},
    "pygraphviz": {"draw"},
    "graphviz": {"draw"},
    "rich": {"draw", "fit", "plan"},
    "accelerate": {"fit", "batches"},
}
LAZY = {"rich", "graphviz", "pygraphviz", "accelerate", "networkx", "transformers"}


def files():
    return sorted(PACKAGE.rglob("*.py"))


def room(path):
    """The module, or for a file in a folder the folder: that is what stands on a floor."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def type_checking(tree):
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    return {id(child) for n in nodes for child in ast.walk(n)}


def imports(path):
    """(module, top level?) for each import that is more than a type."""
    tree = ast.parse(path.read_text())
    skip = type_checking(tree)
    inner = {id(c) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for c in ast.walk(f)}
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        if id(node) in skip:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], id(node) not in inner
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield (node.module or "").split(".")[0], id(node) not in inner
            elif node.level == depth:
                for name in [node.module] if node.module else [a.name for a in node.names]:
                    yield "." + name.split(".")[0], id(node) not in inner


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_floor_or_below(path):
    mine = room(path)
    if mine == "__init__":
        return
    for name, _ in imports(path):
        if name.startswith(".") and name != ".__version__":
            other = name[1:]
            assert other in FLOORS, f"{other} stands on no floor"
            assert FLOORS[other] <= FLOORS[mine] or (mine, other) in UPWARD, f"{mine} imports {other} from above"


def test_every_module_stands_on_a_floor():
    assert {room(p) for p in files()} - {"__init__"} <= set(FLOORS)


def test_upward_imports_are_inside_functions_and_all_used():
    seen = set()
    for path in files():
        for name, top in imports(path):
            if (room(path), name[1:]) in UPWARD:
                assert not top
                seen.add((room(path), name[1:]))
    assert seen == UPWARD


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_third_party_packages_stay_in_their_rooms(path):
    for name, top in imports(path):
        if name in THIRD_PARTY:
            assert room(path) in THIRD_PARTY[name], f"{room(path)} imports {name}"
        elif not name.startswith("."):
            assert name in sys.stdlib_module_names, f"{room(path)} imports {name}"
        assert not (top and name in LAZY), f"{room(path)} imports {name} at its top"


FAMILIES = ("bert", "gpt2", "llama", "roberta", "vit", "resnet", "t5", "mistral", "whisper")


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_model_family_in_the_code(path):
    tree = ast.parse(path.read_text())
    docs = {
        id(n.body[0].value)
        for n in ast.walk(tree)
        if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef) and n.body and isinstance(n.body[0], ast.Expr)
    }
    # starting values are called as in the literature, in one table
    tables = [n.value for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "INITS"]
    presets = {id(key) for table in tables if isinstance(table, ast.Dict) for key in table.keys}
    texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    words = [n.value for n in texts if id(n) not in docs | presets]
    words += [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
    for word in words:
        parts = word.lower().replace("_", ".").replace("/", ".").split(".")
        assert not set(FAMILIES) & set(parts), word


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_can_be_held_in_mind(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "a module says what it is for"
    code = [line for line in text.splitlines() if line.strip()]
    assert len(code) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node, clean=False) or ""
            assert node.end_lineno - node.lineno - doc.count("\n") <= 60, f"{node.name} is long"


def test_importing_costs_little_and_nothing_heavy():
    script = (
        "import sys, time, torch\n"
        "start = time.perf_counter()\n"
        "import adaptergraph\n"
        "print(time.perf_counter() - start)\n"
        "print([m for m in ('rich', 'graphviz', 'pygraphviz', 'accelerate', 'transformers', 'networkx')"
        " if m in sys.modules])\n"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    seconds = min(float(r.stdout.splitlines()[0]) for r in runs)
    print(f"import adaptergraph on top of torch: {seconds:.3f} s")
    assert runs[0].stdout.splitlines()[1] == "[]"
