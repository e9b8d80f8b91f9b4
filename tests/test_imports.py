"""The import graph of archzoo/: arrows point one way, nothing heavy comes along, nothing private.

Read off the source, so that imports within functions count like all others; those for the type
checker alone do not.
"""

from __future__ import annotations

import ast
import functools
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# From bottom to top: a module imports from its own line and from those above it. A package is a
# directory or a module at the top of archzoo/, or a module that stands apart from its directory.
LAYERS = """
    _version derivatives locking names public
    numerics
    documents states auxiliary prefixes shipped
    kernels
    graph_passes low_rank
    compiled
    norm linear
    block trust
    adapters convolution decay
    parts
    adapters.targets
    adapters.attach adapters.switch freezing
    linears
    positions
    embeddings mixers feedforward
    inputs
    decoder
    conversion.rope
    registry
    models
    tasks
    checkpoint
    tasks.text tasks.mixed
    generation
    analysis
    conversion contract export
    training preferences
    analysis.compare analysis.bench
    evaluation
    demo starting
    cli
    __main__
"""
LEVELS = {
    package: level for level, line in enumerate(LAYERS.split("\n")) for package in line.split()
}
TRAINS = {"training", "tasks", "analysis", "cli", "demo"}  # who may import lightning


@functools.cache
def sources() -> dict[str, Path]:
    """The files of archzoo/ by their modules' names, without the package's own."""
    found = {}
    for path in (ROOT / "archzoo").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts[1:]
        if parts != ("__init__",):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All that is run: without what only a type checker reads."""
    for child in ast.iter_child_nodes(tree):
        if not is_for_types(child):
            yield child
            yield from nodes(child)


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name) of ``from module import name``, and (module, None) of ``import module``."""
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield from ((str(node.module), alias.name) for alias in node.names)


@functools.cache
def arrows() -> dict[str, list[str]]:
    """Which modules of archzoo/ each of them imports."""
    found: dict[str, list[str]] = {}
    for module, path in sources().items():
        found[module] = []
        for source, name in imports(path):
            inner = source.removeprefix("archzoo.")
            if not source.startswith("archzoo."):
                inner = "" if source == "archzoo" else None
            if inner is None:
                continue
            target = f"{inner}.{name}".lstrip(".") if name else inner
            target = target if target in sources() else inner
            if target and target != module:
                found[module].append(target)
    return found


def room_of(module: str) -> str:
    steps = list(itertools.accumulate(module.split("."), lambda a, b: f"{a}.{b}"))
    packages = [step for step in reversed(steps) if step in LEVELS]
    assert packages, f"say in LAYERS where {module} stands"
    return packages[0]


def test_arrows_point_down() -> None:
    upwards = [
        f"{module} imports {target}"
        for module, targets in arrows().items()
        for target in targets
        if LEVELS[room_of(target)] > LEVELS[room_of(module)]
    ]
    assert not upwards


def test_there_is_no_circle() -> None:
    """Of modules: packages of one level may import each other's."""
    graph = {module: set(targets) for module, targets in arrows().items()}
    while graph:
        done = {module for module, targets in graph.items() if not targets & graph.keys()}
        assert done, f"a circle among {sorted(graph)}"
        for module in done:
            del graph[module]


def test_nothing_private_is_taken_from_another_file() -> None:
    taken = []
    for module, path in sources().items():
        modules = set()  # names that stand for modules of ours in this file
        for source, name in imports(path):
            if name is None or source.partition(".")[0] != "archzoo":
                continue
            if name.startswith("_") and name != "__version__":
                taken.append(f"{module}: from {source} import {name}")
            if f"{source}.{name}".removeprefix("archzoo.") in sources():
                modules.add(name)
        for node in nodes(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                if private and node.value.id in modules:
                    taken.append(f"{module}: {ast.unparse(node)}")
    assert not taken


def test_lightning_stays_with_training() -> None:
    importers = {
        module
        for module, path in sources().items()
        if any(source.partition(".")[0] == "lightning" for source, _ in imports(path))
    }
    assert {module.partition(".")[0] for module in importers} <= TRAINS


def test_the_package_alone_imports_nothing_heavy() -> None:
    code = (
        "import sys, archzoo\n"
        "heavy = {'torch', 'lightning', 'matplotlib', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
