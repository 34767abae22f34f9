"""Who may import whom: imports point down the ranks, and heavy libraries stay in their rooms."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import sft_jax

HOME = Path(sft_jax.__file__).parent
RANKS = {
    **dict.fromkeys(("errors", "names", "paths", "archives", "assets", "gguf", "machine"), 0),
    "config": 1,
    **dict.fromkeys(("mesh", "nn", "data", "weights"), 2),
    **dict.fromkeys(("models", "adapt"), 3),
    "tasks": 4,
    "train": 5,
    **dict.fromkeys(("checks", "infer", "export", "convert", "report", "study"), 6),
    "inputs": 7,
    **dict.fromkeys(("run", "scores"), 8),
    **dict.fromkeys(("heads", "grid", "estimate", "publish"), 9),
    "jobs": 10,
    "console": 11,
    "cli": 12,
    "__main__": 13,
}
FLAX = {"nn", "models", "adapt"}  # the only rooms that may
NO_JAX = {"errors", "names", "paths", "archives", "assets", "gguf", "machine", "config", "data"}
FILES = {
    ".".join(("sft_jax", *file.relative_to(HOME).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in HOME.rglob("*.py")
}


def imports(source: str) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted name, whether it runs on import) of each import, those inside functions included."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    later = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name, id(node) not in later) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            outer = "." * node.level + (node.module or "")
            inner = [f"{outer}.{name.name}" for name in node.names]
            yield from ((node.lineno, name if name in FILES else outer, id(node) not in later) for name in inner)


def offences(module: str, source: str) -> list[str]:
    """`module:line: what`, for each import of a module that its room may not make."""
    room, found = module.split(".")[1], []
    for line, name, _ in imports(source):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        base = RANKS[room] == 0 and RANKS.get(target) == 0  # the files at the bottom may import each other
        if top == "sft_jax" and target != room and not base and RANKS.get(target, 99) >= RANKS[room]:
            found.append(f"{module}:{line}: {name} is not below {room}")
        if top == "torch" or (top == "flax" and room not in FLAX) or (top == "jax" and room in NO_JAX) or not top:
            found.append(f"{module}:{line}: {room} may not import {name or 'relatively'}")
    return found


def test_imports_point_down():
    """Every import of the package goes to a lower rank, and flax, torch and jax stay where they may be."""
    assert RANKS.keys() >= {name.split(".")[1] for name in FILES if "." in name}, "a room without a rank"
    found = [text for name, file in FILES.items() if "." in name for text in offences(name, file.read_text())]
    assert not found, "\n".join(found)


def test_modules_import_without_cycles():
    """No module needs itself to be imported: graphlib finds no cycle among the imports outside functions."""
    graph = {
        name: {target for _, target, at_once in imports(file.read_text()) if at_once and target in FILES}
        for name, file in FILES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_offences_are_found():
    """Control: imports that go up, sideways or to a forbidden library are each found, with their line."""
    source = "import jax\ndef f():\n    from sft_jax.train import step\nfrom sft_jax.nn import heads\nimport torch.nn\n"
    expected = {
        "data": {"1: data may not import jax", "3: sft_jax.train.step is", "4: sft_jax.nn.heads is", "5: data may not"},
        "train": {"5: train may not import torch.nn"},
        "tasks": {"3: sft_jax.train.step is not below tasks", "5: tasks may not import torch.nn"},
    }
    for room, wanted in expected.items():
        found = offences(f"sft_jax.{room}.made_up", source)
        assert len(found) == len(wanted)
        assert all(any(f"sft_jax.{room}.made_up:{part}" in text for text in found) for part in wanted)
    assert offences("sft_jax.train.made_up", "from flax import nnx") and not offences("sft_jax.nn.x", "import flax")
    assert offences("sft_jax.train.made_up", "from . import step")
