"""The one-file model: source that holds exactly the parts a model uses, in plain PyTorch.

Definitions are copied, comments and all, from `archzoo.export.plain`, from the modules of the zoo
that are plain already, and from the module of a part of the user's own; what a definition names
comes along. The file imports torch, and einops where a part does.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from archzoo.adapters.attach import attached
from archzoo.block import Embedding
from archzoo.decoder import Decoder
from archzoo.embeddings.digits import DigitEmbedding
from archzoo.export.folding import LONGEST_LINE, nodes_of, simplify
from archzoo.export.plain.positions import DynamicRotaryEmbedding
from archzoo.linear import Linear
from archzoo.linears.binary import BinaryLinear
from archzoo.parts import find, list_parts, named_adapters
from archzoo.positions.rotary import RotaryEmbedding
from archzoo.registry import get_preset, list_models

#: Where definitions come from, in the order in which they stand in a file.
PLAIN = ("core", "positions", "mixers", "feedforward", "embeddings", "decoder")
ZOO = {  # plain already, by the module of `archzoo.export.plain` in whose place they stand
    "positions": ("archzoo.positions.rotary", "archzoo.positions.biases"),
    "embeddings": ("archzoo.embeddings.digits",),
}
TITLES = {
    "core": "documents, states and the interface",
    "positions": "positions",
    "mixers": "mixing over time",
    "feedforward": "mixing over channels",
    "embeddings": "tokens in",
    "decoder": "the model",
}
#: What a file's decoder builds by a call that the model says, and the sizes that it hands on.
MADE = {"embedding": "vocab_size, dim", "convolution": "dim, heads", "feed_forward": "dim, width"}
#: Arguments that change how the zoo trains, and no output: see docs/export.md.
ONLY_IN_TRAINING = {"seed", "drop", "balance_over", "watch_similarity", "longest_run"}
IMPORTED = ("torch", "einops")  # what a file may import beside Python's own
RULE = "# " + "-" * 40
#: What the functions written here import.
EXTRA: dict[str, tuple[str, str | None]] = {
    "Any": ("typing", "Any"),
    "Path": ("pathlib", "Path"),
    "nn": ("torch", "nn"),
    "sys": ("sys", None),
    "torch": ("torch", None),
}
#: What a file is for: it stays.
WANTED = ("Decoder", "loss_of", "generate")
ROOTS = (*WANTED, "reorder", "build", "load", "main")


class Definition(NamedTuple):
    """A function, class or constant at the top of a module.

    Attributes:
        module: Its name.
        text: The source, with the comments above it.
        tree: The same, parsed.
        bindings: What the module's imports bind, by name: (module, name), or (module, None).
    """

    module: str
    text: str
    tree: ast.AST
    bindings: dict[str, tuple[str, str | None]]


# ---------------------------------------------------------------------------- reading


def definitions(module: Any) -> dict[str, Definition]:
    """All that a module defines at its top, by name."""
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        raise ValueError(
            f"the source of {getattr(module, '__name__', module)} cannot be read: define the part "
            "in a file"
        ) from None
    lines, tree = source.splitlines(), ast.parse(source)
    bindings: dict[str, tuple[str, str | None]] = {}
    for node in nodes_of(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                bindings[alias.asname or alias.name] = (node.module or "", alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                bindings[alias.asname or whole] = (whole, None)
    found = {}
    for node in tree.body:
        begin = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while begin and lines[begin - 1].startswith("#") and "-----" not in lines[begin - 1]:
            begin -= 1
        names: list[str] = []
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [
                n.id for target in targets for n in nodes_of(target) if isinstance(n, ast.Name)
            ]
        text = "\n".join(lines[begin : node.end_lineno])
        found.update(dict.fromkeys(names, Definition(module.__name__, text, node, bindings)))
    return found


@functools.cache
def library() -> dict[str, dict[str, Definition]]:
    """What files may be made of, by section and name."""
    found = {}
    for section in PLAIN:
        names: dict[str, Definition] = {}
        for path in ZOO.get(section, ()):
            names |= definitions(importlib.import_module(path))
        own = definitions(importlib.import_module(f"archzoo.export.plain.{section}"))
        found[section] = {n: d for n, d in names.items() if n not in own} | own
    return found


# ---------------------------------------------------------------------------- collecting


class Collection:
    """Definitions, what they name, and the imports that all of them need."""

    def __init__(self) -> None:
        self.sections = library()
        self.own: dict[str, dict[str, Definition]] = {}  # of the user's modules
        self.taken: dict[str, tuple[str, Definition, str]] = {}  # section, definition, text
        self.imports: dict[str, tuple[str, str | None]] = {}

    def take_class(self, cls: type) -> str:
        """A part's class and all that it names; what it is called in the file."""
        if not cls.__module__.startswith("archzoo."):
            self._read(cls.__module__)
            self._take_own(cls.__name__, cls.__module__)
        else:
            self.take(cls.__name__)
        return cls.__name__

    def _read(self, module: str) -> None:
        if module not in self.own:
            self.own[module] = definitions(sys.modules[module])

    def take(self, name: str, whose: str = "the zoo") -> None:
        """A definition of the library, by name."""
        if name in self.taken:
            if self.taken[name][0] not in self.sections:
                raise ValueError(
                    f"two parts are called {name}, the zoo's and that of {self.taken[name][0]}: "
                    "give yours another name"
                )
            return
        for section, names in self.sections.items():
            if name in names and (whose == "the zoo" or section != "decoder"):
                self._add(name, section, names[name])
                return
        raise ValueError(
            f"{whose} uses archzoo's {name}, which has no plain form that a file could hold: "
            "write the part with torch, einops and archzoo's interface alone"
        )

    def _take_own(self, name: str, module: str) -> None:
        if name in self.taken:
            if self.taken[name][0] != module:
                raise ValueError(
                    f"two parts are called {name}, that of {module} and that of "
                    f"{self.taken[name][0]}: give one another name"
                )
            return
        if name not in self.own[module]:
            raise ValueError(f"{module} does not define {name} at its top: a file cannot hold it")
        self._add(name, module, self.own[module][name])

    def _add(self, name: str, section: str, definition: Definition) -> None:
        self.taken[name] = (section, definition, "")
        text = self.follow(definition)
        self.taken[name] = (section, definition, text)

    def follow(self, definition: Definition) -> str:
        """Take what a definition names; its text, by the names that the file has."""
        own = self.own.get(definition.module)
        edits: list[tuple[ast.expr, str]] = []
        for node, path in references(definition.tree):
            first = path[0]
            if first in (own or {}):
                self._take_own(first, definition.module)
            elif first in definition.bindings:
                source, name = definition.bindings[first]
                if source.partition(".")[0] == "archzoo":
                    target, used = self._of_archzoo(source, name, path, definition.module)
                    if target != ".".join(path[:used]):
                        edits.append((_prefix(node, len(path) - used), target))
                    self.take(target, definition.module)
                else:
                    self._import(first, source, name, definition.module)
            elif own is None and any(first in names for names in self.sections.values()):
                self.take(first)
        for inner in nodes_of(definition.tree):
            if isinstance(inner, ast.Import | ast.ImportFrom):
                self._refuse_import(inner, definition.module)
        return _edited(definition, edits)

    def _of_archzoo(
        self, source: str, name: str | None, path: list[str], whose: str
    ) -> tuple[str, int]:
        """The definition that a dotted name of archzoo means, and how many of its words say so."""
        words = [*([name] if name else []), *path[1:]]
        place = source
        for index, word in enumerate(words):
            try:
                importlib.import_module(f"{place}.{word}")
                place = f"{place}.{word}"
            except ModuleNotFoundError:
                return word, index + (2 if name is None else 1)
        raise ValueError(f"{whose} uses the module {place} itself: name what it takes of it")

    def _import(self, bound: str, source: str, name: str | None, whose: str) -> None:
        top = source.partition(".")[0]
        if top not in IMPORTED and top not in sys.stdlib_module_names:
            raise ValueError(
                f"{whose} imports {top}: a part that is exported may import torch, einops and "
                "archzoo alone"
            )
        before = self.imports.setdefault(bound, (source, name))
        if before != (source, name):
            raise ValueError(
                f"{bound} means {'.'.join(filter(None, before))} in one module and "
                f"{'.'.join(filter(None, (source, name)))} in {whose}: take one of them"
            )

    def _refuse_import(self, node: ast.Import | ast.ImportFrom, whose: str) -> None:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            top = name.partition(".")[0]
            if top not in IMPORTED and top not in sys.stdlib_module_names:
                raise ValueError(
                    f"{whose} imports {name} within a function: a part that is exported may "
                    "import torch and einops there, and archzoo at its top"
                )


def references(tree: ast.AST) -> Iterator[tuple[ast.expr, list[str]]]:
    """The names that code reads from outside, each with its attributes: (node, [a, b, c])."""

    def visit(node: ast.AST, local: frozenset[str]) -> Iterator[tuple[ast.expr, list[str]]]:
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            inside = local | _bound(node)
            outer = [
                *getattr(node, "decorator_list", []),
                node.args,
                getattr(node, "returns", None),
            ]
            for child in filter(None, outer):
                yield from visit(child, local)
            for child in node.body if isinstance(node.body, list) else [node.body]:
                yield from visit(child, inside)
            return
        words: list[str] = []
        at: ast.AST = node
        while isinstance(at, ast.Attribute):
            words.append(at.attr)
            at = at.value
        if isinstance(at, ast.Name) and isinstance(node, ast.expr):
            if at.id not in local:
                yield node, [at.id, *words[::-1]]
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, local)

    yield from visit(tree, frozenset())


def _bound(function: ast.FunctionDef | ast.Lambda) -> set[str]:
    """The names that a function sets itself."""
    found = {node.arg for node in nodes_of(function.args) if isinstance(node, ast.arg)}
    for node in nodes_of(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.FunctionDef) and node is not function:
            found.add(node.name)
    return found


def _prefix(node: ast.expr, attributes: int) -> ast.expr:
    """A dotted name without its last attributes."""
    for _ in range(attributes):
        assert isinstance(node, ast.Attribute)
        node = node.value
    return node


def _edited(definition: Definition, edits: Iterable[tuple[ast.expr, str]]) -> str:
    """A definition's text with some expressions replaced, each of which is on one line."""
    lines = definition.text.splitlines()
    last = definition.tree.end_lineno  # type: ignore[attr-defined]
    for node, text in sorted(edits, key=lambda edit: -edit[0].col_offset):
        index = len(lines) - 1 - (last - node.lineno)
        line = lines[index].encode()
        head, tail = line[: node.col_offset].decode(), line[node.end_col_offset :].decode()
        lines[index] = head + text + tail
    return "\n".join(lines)


# ---------------------------------------------------------------------------- the model's own


def arguments_of(model: Decoder) -> dict[str, Any]:
    """The arguments of a file's `Decoder` for this model."""
    config, kind = model.config, type(model.embedding)
    found = {name: config[name] for name in ("vocab_size", "dim", "depth", "heads", "width")}
    given = {
        "tie_weights": model.tie_weights,
        "post": config["norm_placement"] == "post",
        "convolved": config["convolution"] is not None,
        "dropout": model.dropout,
        "loops": model.loops,
        "injection": model.injection,
        "reads_positions": kind.prompt_positions is not Embedding.prompt_positions,
        "assigns_positions": kind.assign_positions is not Embedding.assign_positions,
    }
    usual = {"dropout": 0.0, "loops": 1, "injection": "none"}
    return found | {n: v for n, v in given.items() if v != usual.get(n, False)}


def _call(collection: Collection, slot: str, spec: dict[str, Any], sizes: str) -> str:
    """The expression that builds a part."""
    cls = find(slot, spec["class_path"])
    arguments = dict(spec.get("init_args") or {})
    if cls is RotaryEmbedding and arguments.get("rope_type") == "dynamic":
        cls = DynamicRotaryEmbedding
    name = collection.take_class(cls)
    if name == "MixtureOfExperts" and _is_zoos(cls):
        router = arguments.pop("router", None) or "LinearRouter"
        router = {"class_path": router} if isinstance(router, str) else router
        experts, top_k = arguments.get("experts", 8), arguments.get("top_k", 2)
        arguments["router"] = _Code(_call(collection, "router", router, f"dim, {experts}, {top_k}"))
    if name == "RandomisedPositions" and _is_zoos(cls):
        inner = arguments.pop("embedding", None) or "TokenEmbedding"
        inner = {"class_path": inner} if isinstance(inner, str) else inner
        arguments["embedding"] = _Code(_call(collection, "embedding", inner, "vocab_size, dim"))
    if _is_zoos(cls):
        arguments = {n: v for n, v in arguments.items() if n not in ONLY_IN_TRAINING}
        arguments = {n: v for n, v in arguments.items() if v is not None}
        if _is_number(arguments.get("decay")):  # a text, from a command line
            arguments["decay"] = float(arguments["decay"])
    given = [sizes, *(f"{name}={value!r}" for name, value in arguments.items())]
    return f"{name}({', '.join(given)})"


def _wrapped(line: str) -> str:
    """A line that ends in a call, over several where it is long: its arguments on one, or each."""
    if len(line) <= LONGEST_LINE:
        return line
    indent = " " * (len(line) - len(line.lstrip()))
    tree: Any = ast.parse(line.strip().removeprefix("return ")).body[0]
    call = tree.value
    source = line.strip().removeprefix("return ")
    given = [ast.get_source_segment(source, node) or "" for node in (*call.args, *call.keywords)]
    head = indent + "return " * line.strip().startswith("return ") + source[: call.col_offset]
    head += (ast.get_source_segment(source, call.func) or "") + "("
    inner = [f"{indent}    {', '.join(given)}"]
    if len(inner[0]) > LONGEST_LINE:
        inner = [f"{indent}    {argument}," for argument in given]
    return "\n".join([head, *inner, f"{indent})"])


def _with_call(body: str, call: str, made: str) -> str:
    """A file whose line with this call has another one, and the lines that follow that."""
    lines = []
    for line in body.split("\n"):
        if call in line:
            first, *rest = made.splitlines()
            indent = " " * (len(line) - len(line.lstrip()))
            lines += [_wrapped(line.replace(call, first)), *(_wrapped(indent + r) for r in rest)]
        else:
            lines.append(line)
    return "\n".join(lines)


class _Code(str):
    def __repr__(self) -> str:
        return str(self)


def _is_number(value: Any) -> bool:
    try:
        return value is not None and float(value) is not None
    except ValueError:
        return False


def _is_zoos(cls: type) -> bool:
    return cls.__module__.startswith("archzoo.")


def _factories(collection: Collection, model: Decoder) -> tuple[str, dict[str, str]]:
    """The function that builds the model's mixers, and the calls that build its other parts."""
    config = model.config
    calls = {}
    for name, sizes in MADE.items():
        if config[name]:
            calls[f"make_{name}({sizes})"] = _call(collection, name, config[name], sizes)
    mixers = config["pattern"] or [config["mixer"]]
    kinds: dict[str, list[int]] = {}
    for index, spec in enumerate(mixers):
        text = (
            "\n".join(_mixer(collection, config, spec, model.blocks[index].mixer))
            if index < model.depth
            else ""
        )
        if text:
            kinds.setdefault(text, []).append(index)
    if len(kinds) == 1:  # of all layers: the block builds it itself
        text = next(iter(kinds)).replace("mixer.", "self.mixer.").replace("mixer = ", "", 1)
        return "", calls | {"make_mixer(layer, dim, heads)": text}
    lines: list[str] = []
    for text, layers in list(kinds.items())[:-1]:
        lines.append(f"{'if' if not lines else 'elif'} layer % {len(mixers)} in {layers}:")
        lines += [f"    {line}" for line in text.splitlines()]
    lines += ["else:", *(f"    {line}" for line in list(kinds)[-1].splitlines())]
    body = "\n".join(_wrapped(f"    {line}") for line in [*lines, "return mixer"])
    head = "def make_mixer(layer: int, dim: int, heads: int) -> Any:"
    return f'\n\n{head}\n    """The mixer of a block."""\n{body}', calls


def _norm(collection: Collection, config: dict[str, Any]) -> str:
    if config["norm"] == "layer":
        return f"nn.LayerNorm(dim, eps={config['norm_eps']!r})"
    collection.take("RMSNorm")
    return f"RMSNorm(dim, eps={config['norm_eps']!r})"


def _mixer(
    collection: Collection, config: dict[str, Any], spec: dict[str, Any], built: nn.Module
) -> list[str]:
    """The lines that build a mixer, with its position methods."""
    lines = [f"mixer = {_call(collection, 'mixer', spec, 'dim, heads')}"]
    inherits = any(_is_zoos(c) and c.__name__ in list_parts("mixer") for c in type(built).__mro__)
    if config["rotary"] and hasattr(built, "rotary"):
        lines.append(
            f"mixer.rotary = {_call(collection, 'rotary', config['rotary'], 'mixer.head_dim')}"
        )
    elif inherits and hasattr(built, "rotary"):
        kind = collection.take_class(type(built.rotary))
        own = "" if _is_zoos(type(built)) else "mixer.rotary or "
        lines.append(f"mixer.rotary = {own}{kind}(mixer.head_dim)")
    if config["bias"] and hasattr(built, "bias"):
        lines.append(f"mixer.bias = {_call(collection, 'bias', config['bias'], 'mixer.heads')}")
    return lines


# ---------------------------------------------------------------------------- the file


def source_of(model: Decoder, name: str = "a model", *, wrapped: bool = False) -> str:
    """A file that defines `Decoder`, which computes what this model does, and imports torch alone.

    Args:
        model: Of the zoo's parts, or of the user's own that import torch, einops and archzoo alone.
        name: For the first line.
        wrapped: For a wrapper that follows: without what one does with a model alone, and with
            the arguments of `Decoder` in DECODER.

    Raises:
        ValueError: A part that cannot be exported; the message names it.
    """
    refuse(model)
    collection = Collection()
    factories, calls = _factories(collection, model)
    calls["make_norm(dim)"] = _norm(collection, model.config)
    for wanted in ("Decoder", "reorder") if wrapped else WANTED:
        collection.take(wanted)
    sections: dict[str, list[str]] = {section: [] for section in PLAIN}
    order = {**collection.sections, **collection.own}
    done: set[str] = set()
    for section, names in order.items():
        for known in names:
            taken = collection.taken.get(known)
            if taken is None or taken[0] != section or taken[2] in done:
                continue
            if known.startswith("make_") and section == "decoder":
                continue
            done.add(taken[2])
            sections.setdefault(section, []).append(taken[2])
    collection.imports |= EXTRA
    built = ", ".join(f"{n}={v!r}" for n, v in arguments_of(model).items())
    text: list[str] = []
    for section in (*PLAIN[:-1], *collection.own, "decoder"):
        if not sections.get(section):
            continue
        text += ["", ""]
        if section != "core":
            text.append(f"{RULE} {TITLES.get(section, f'from {section}')}")
        if section == "decoder" and factories:
            text += [factories]
        before = "long" if section == "decoder" and factories else ""
        for part in sections[section]:
            short = not part.startswith(("def ", "class ", "@"))
            text += [part] if short or not before else ["", "", part]
            before = "short" if short else "long"
    body = (
        "\n".join(
            [
                *text,
                "",
                "",
                (BUILD if wrapped else MAIN).replace(
                    "    return Decoder(ARGUMENTS)", _wrapped(f"    return Decoder({built})")
                ),
            ]
        ).rstrip()
        + "\n"
    )
    frozen = [taken for taken, entry in collection.taken.items() if entry[0] in collection.own]
    body = re.sub(r"  # type: ignore\[[^\]]*\]", "", body)
    body = body.replace("INIT_STD = 0.02", f"INIT_STD = {model.init_std!r}")
    for made, text_of in calls.items():
        body = _with_call(body, made, text_of)
    if not factories:  # which alone ask for the layer
        body = body.replace("Block(layer, dim", "Block(dim").replace(
            "for layer in range", "for _ in range"
        )
        body = body.replace("        layer: int,\n", "")
    body = simplify(body, ROOTS, frozen)
    if wrapped:
        body, _, end = body.rpartition("def build()")
        call: Any = ast.parse("def build()" + end).body[0]
        given = {k.arg: ast.literal_eval(k.value) for k in call.body[-1].value.keywords}
        lines = [f'    "{argument}": {value!r},' for argument, value in given.items()]
        body += "\n".join(["DECODER: dict[str, Any] = {", *lines, "}", ""])
    body = re.sub(rf"\n+{RULE} [^\n]*\n+(?={RULE})", "\n\n", body)
    used = {node.id for node in nodes_of(ast.parse(body)) if isinstance(node, ast.Name)}
    imports = {name: entry for name, entry in collection.imports.items() if name in used}
    head = [
        _docstring(model, name, wrapped),
        "from __future__ import annotations",
        "",
        _imports(imports),
    ]
    return "\n".join([*head, body])


def refuse(model: Decoder) -> None:
    """Refuse what has no plain form.

    Raises:
        ValueError: The message names it, and says what helps.
    """
    if named_adapters(model.config):
        for _, _, adapter in attached(model):
            if not adapter.mergeable:
                raise ValueError(
                    f"a model with {type(adapter).__name__} is not exported: it cannot be merged "
                    "into the weights; archzoo.remove_adapters takes it off"
                )
        raise ValueError(
            "a model with adapters is not exported: archzoo adapter merge CHECKPOINT --out merged "
            "puts them into its weights, then export merged"
        )
    own = "archzoo.save_pretrained writes it in the zoo's own form, for archzoo.from_pretrained"
    if any(isinstance(module, BinaryLinear) for module in model.modules()):
        raise ValueError(
            f"a model of {model.config['linear']['class_path']} is not exported: its weights are "
            f"not matrices; export the dense model that it was made of, or keep it: {own}"
        )
    if model.config["linear"] and model.config["linear"]["class_path"] != "Linear":
        raise ValueError(
            f"a model whose linear is {model.config['linear']['class_path']} is not exported: its "
            f"weights are not matrices; {own}"
        )
    if isinstance(model.embedding, DigitEmbedding):
        model.embedding.known_kinds()  # refuses where the tokens of digits are not known
    for module in model.modules():
        if type(module) is not Linear and isinstance(module, Linear):
            raise ValueError(
                f"{type(module).__name__} has no plain form that a file could hold: use Linear in "
                f"its place, or keep the model: {own}"
            )


def _docstring(model: Decoder, name: str, wrapped: bool) -> str:
    lines = [f'"""{name[0].upper()}{name[1:]}: one file of plain PyTorch, made by archzoo export.']
    if not wrapped:
        lines += [
            "",
            "    python model.py 1 2 3     continue these tokens, with the weights of model.pt",
            "    python model.py           train it on a small task, from the start, and decode",
        ]
    if about := _about(model):
        lines += ["", *about]
    return "\n".join([*lines, '"""', ""])


def _about(model: Decoder) -> list[str]:
    """What the file of the model's family says of it."""
    parts = [
        model.config[slot] and model.config[slot]["class_path"]
        for slot in ("mixer", "feed_forward")
    ]
    for preset in list_models():
        found = get_preset(preset)
        theirs = [found.arguments.get("mixer"), found.arguments.get("feed_forward")]
        named = [part["class_path"] if isinstance(part, dict) else part for part in theirs]
        named = [n or d for n, d in zip(named, ("Attention", "GatedFeedForward"), strict=True)]
        embedding = found.arguments.get("embedding") or "TokenEmbedding"
        embedding = embedding["class_path"] if isinstance(embedding, dict) else embedding
        if named == parts and embedding == model.config["embedding"]["class_path"]:
            # A path within the zoo says nothing where there is none.
            within = re.compile(r" \(see(\s+)archzoo/\S+?\)([.,:]?)\s*")
            return within.sub(r"\2\1", found.about.strip()).splitlines()
    return []


def _imports(bound: dict[str, tuple[str, str | None]]) -> str:
    """The import lines of a file: Python's own, then the others."""
    plain: set[str] = set()
    of: dict[str, set[str]] = {}
    for name, (module, what) in bound.items():
        if what is None:
            plain.add(f"import {module}" + ("" if name == module else f" as {name}"))
        else:
            of.setdefault(module, set()).add(what if what == name else f"{what} as {name}")
    lines = sorted(plain) + [
        f"from {module} import {', '.join(sorted(names))}" for module, names in of.items()
    ]

    def key(line: str) -> tuple[bool, bool, str]:
        module = line.split()[1]
        return module.partition(".")[0] in IMPORTED, line.startswith("from"), module

    lines.sort(key=key)
    first = [line for line in lines if not key(line)[0]]
    return "\n".join([*first, "", *(line for line in lines if key(line)[0])])


BUILD = '''def build() -> Decoder:
    """The model, its weights drawn anew."""
    return Decoder(ARGUMENTS)
'''
MAIN = (
    BUILD
    + '''

def load(path: str | Path = Path(__file__).with_suffix(".pt")) -> Decoder:
    """The model with the weights of a file, in evaluation mode."""
    model = build()
    model.load_state_dict(torch.load(path, weights_only=True), assign=True)
    return model.eval()


def main() -> None:
    """Continue the tokens of the command line; without any, learn rows such as abababab."""
    if sys.argv[1:]:
        model = load() if Path(__file__).with_suffix(".pt").exists() else build().eval()
        return print(*generate(model, [int(token) for token in sys.argv[1:]]))
    torch.manual_seed(0)
    torch.set_num_threads(1)  # at small sizes they wait for each other
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(151):
        tokens = torch.randint(8, (16, 2)).repeat(1, 8)
        loss = loss_of(model, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    print("after 1 2 1 2 1 2:", *generate(model.eval(), [1, 2, 1, 2, 1, 2], max_tokens=6))


if __name__ == "__main__":
    main()
'''
)
