"""Source without what it never does: branches, arguments and methods that one model does not need.

A file is made for one model, whose settings are known. Where the test of a branch is settled by
them the branch goes, and after it whatever nothing reads any more: attributes, arguments, methods,
functions. Comments and the layout of all that stays are kept, for the text is edited and not
printed anew.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

LONGEST_LINE = 100
UNKNOWN = object()
#: Methods that torch or whoever uses the file calls.
CALLED_FROM_OUTSIDE = {"forward", "init_state", "step", "after_step"}


class Edit(NamedTuple):
    """Replace the text from one place to another, (line, column) counted from 0."""

    begin: tuple[int, int]
    end: tuple[int, int]
    text: str


def nodes_of(tree: ast.AST) -> Iterator[ast.AST]:
    """A node and all within it."""
    left = [tree]
    while left:
        node = left.pop()
        left += ast.iter_child_nodes(node)
        yield node


def simplify(text: str, roots: Collection[str], frozen: Collection[str] = ()) -> str:
    """The same program in fewer lines.

    Args:
        text: Of a module without its imports.
        roots: Names at its top that stay: others go once nothing names them.
        frozen: Classes that stay as they are, and with them those that they inherit from.
    """
    for _ in range(50):
        edits = _Program(text, set(roots), set(frozen)).edits()
        if not edits:
            return re.sub(r"\n{3,}(?=\n\n\S)", "\n", text)
        text = _apply(text, edits)
    return text


def _apply(text: str, edits: list[Edit]) -> str:
    """The text with those edits that lie within no other."""
    edits = sorted(edits, key=lambda e: (e.begin, (-e.end[0], -e.end[1])))
    kept: list[Edit] = []
    for edit in edits:
        if not kept or edit.begin >= kept[-1].end:
            kept.append(edit)
    lines = text.split("\n")
    for (line, column), (last, stop), new in reversed(kept):
        whole = lines[line][:column] + new + lines[last][stop:]
        lines[line : last + 1] = whole.split("\n")
    return "\n".join(lines)


class _Program:
    """A module's text, parsed, and what is known of its classes."""

    def __init__(self, text: str, roots: set[str], frozen: set[str]) -> None:
        self.lines, self.tree, self.roots = text.split("\n"), ast.parse(text), roots
        self.classes = {n.name: n for n in self.tree.body if isinstance(n, ast.ClassDef)}
        self.lines_of = {name: self._line_of(name) for name in self.classes}
        self.inside = {
            name: [n for n in nodes_of(cls) if isinstance(n, _ASSIGNMENTS)]
            for name, cls in self.classes.items()
        }
        self.calls: list[tuple[str, ast.Call, str | None]] = []  # called, call, class that calls
        for top in self.tree.body:
            where = top.name if isinstance(top, ast.ClassDef) else None
            for node in nodes_of(top):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    self.calls.append((node.func.id, node, where))
        self.built = {name for name, _, _ in self.calls}
        self.frozen = {c for name in frozen for c in self.line_of(name)}
        self.read, self.written = self._attributes()
        self.stored = {
            node.attr if isinstance(node, ast.Attribute) else node.id
            for node in nodes_of(self.tree)
            if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store)
        }
        self.texts = Counter(n.value for n in nodes_of(self.tree) if isinstance(n, ast.Constant))
        self.facts: dict[str, dict[str, Any]] = {}
        for name in self.classes:
            self.facts[name] = self._arguments_of(name)
        for name in self.classes:
            self.facts[name] |= self._settled(name)

    # ------------------------------------------------------------------------ what is known

    def line_of(self, name: str) -> list[str]:
        """A class and those that it inherits from, of this module."""
        return self.lines_of.get(name, [])

    def _line_of(self, name: str) -> list[str]:
        found = [name] if name in self.classes else []
        for base in self.classes[name].bases if found else []:
            if isinstance(base, ast.Name):
                found += self._line_of(base.id)
        return found

    def heirs_of(self, name: str) -> list[str]:
        return [other for other in self.classes if name in self.line_of(other)]

    def _attributes(self) -> tuple[set[str], set[str]]:
        """Attributes and texts that are read anywhere, and attributes set from outside."""
        read, written = set(), set()
        for node in nodes_of(self.tree):
            if isinstance(node, ast.Attribute):
                if isinstance(node.ctx, ast.Load):
                    read.add(node.attr)
                elif not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                    written.add(node.attr)
            elif isinstance(node, ast.Call) and _called(node) in ("getattr", "hasattr"):
                read |= {str(a.value) for a in node.args if isinstance(a, ast.Constant)}
        return read, written

    def _init_of(self, name: str) -> ast.FunctionDef | None:
        for node in self.classes[name].body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                return node
        return None

    def _calls_of(self, name: str) -> Iterator[tuple[ast.Call, str | None]]:
        """The calls that reach a class's own __init__, each with the class that it stands in."""
        reaching = [
            heir
            for heir in self.heirs_of(name)
            if next((c for c in self.line_of(heir) if self._init_of(c)), None) == name
        ]
        for called, call, inside in self.calls:
            if called in reaching:
                yield call, inside
        for heir in self.heirs_of(name):
            init = self._init_of(heir)
            line = [c for c in self.line_of(heir)[1:] if self._init_of(c)]
            if heir != name and init is not None and line[:1] == [name]:
                for node in nodes_of(init):
                    if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__":
                        yield node, heir

    def _arguments_of(self, name: str) -> dict[str, Any]:
        """Arguments with a default on whose value all calls agree."""
        init = self._init_of(name)
        if init is None or name in self.frozen:
            return {}
        found: dict[str, Any] = {}
        calls = list(self._calls_of(name))
        for argument, default in _defaults(init):
            values = []
            for call, inside in calls:
                given = next((k.value for k in call.keywords if k.arg == argument), default)
                known = (
                    {} if inside is None else self.facts.get(inside) or self._arguments_of(inside)
                )
                values.append(self.value(given, known))
            place = (
                [a.arg for a in init.args.args].index(argument)
                if _is_positional(init, argument)
                else None
            )
            if place is not None and any(len(call.args) >= place for call, _ in calls):
                continue
            if values and all(v is not UNKNOWN and v == values[0] for v in values):
                found[argument] = values[0]
        return found

    def _settled(self, name: str) -> dict[str, Any]:
        """Attributes that are set once, to what is known."""
        found: dict[str, list[Any]] = {}
        if name in self.frozen:
            return {}
        for cls in dict.fromkeys([*self.line_of(name), *self.heirs_of(name)]):
            for target, value in (pair for node in self.inside[cls] for pair in _pairs(node)):
                if isinstance(target, ast.Attribute) and _is_self(target.value):
                    known = self.value(value, self.facts[cls]) if value else UNKNOWN
                    found.setdefault(target.attr, []).append(known)
        heirs = [h for h in self.heirs_of(name) if h in self.built] or [name]
        of_heirs = [self._class_values(heir) for heir in heirs]
        of_class = {
            attribute: value
            for attribute, value in of_heirs[0].items()
            if all(values.get(attribute, UNKNOWN) == value for values in of_heirs)
        }
        settled = {f"self.{a}": v for a, v in of_class.items() if a not in found}
        for attribute, values in found.items():
            if len(values) == 1 and values[0] is not UNKNOWN and attribute not in of_class:
                settled[f"self.{attribute}"] = values[0]
        return {a: v for a, v in settled.items() if a.removeprefix("self.") not in self.written}

    def _class_values(self, name: str) -> dict[str, Any]:
        """Constants in the bodies of a class and those it inherits from."""
        found: dict[str, Any] = {}
        for cls in reversed(self.line_of(name)):
            for node in self.classes[cls].body:
                if isinstance(node, ast.Assign):
                    for target, value in _pairs(node):
                        if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
                            found[target.id] = value.value
        return found

    def value(self, node: ast.expr | None, known: dict[str, Any]) -> Any:
        """What an expression is, or UNKNOWN."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name | ast.Attribute):
            return known.get(ast.unparse(node), UNKNOWN)
        if isinstance(node, ast.Call) and _called(node) == "getattr" and len(node.args) == 3:
            name = self.value(node.args[1], known)
            unset = name is not UNKNOWN and self.texts[name] == 1 and name not in self.stored
            return self.value(node.args[2], known) if unset else UNKNOWN
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            inner = self.value(node.operand, known)
            if inner is UNKNOWN:
                return UNKNOWN
            return not inner if isinstance(node.op, ast.Not) else -inner
        if isinstance(node, ast.BoolOp):
            values = [self.value(part, known) for part in node.values]
            ends = isinstance(node.op, ast.Or)
            settled = [v for v in values if v is not UNKNOWN and bool(v) is ends]
            if settled:  # whatever the others are, for none has an effect
                return settled[0]
            return UNKNOWN if any(v is UNKNOWN for v in values) else values[-1]
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = self.value(node.left, known), self.value(node.comparators[0], known)
            if left is UNKNOWN or right is UNKNOWN:
                return UNKNOWN
            compared = {
                ast.Eq: lambda: left == right,
                ast.NotEq: lambda: left != right,
                ast.Is: lambda: left is right,
                ast.IsNot: lambda: left is not right,
                ast.Gt: lambda: left > right,
                ast.In: lambda: left in right,
            }.get(type(node.ops[0]))
            return UNKNOWN if compared is None else compared()
        if isinstance(node, ast.IfExp):
            test = self.value(node.test, known)
            return (
                UNKNOWN
                if test is UNKNOWN
                else self.value(node.body if test else node.orelse, known)
            )
        return UNKNOWN

    # ------------------------------------------------------------------------ what goes

    def edits(self) -> list[Edit]:
        """Of one round; what they leave unused goes in the next."""
        found: list[Edit] = []
        for name, cls in self.classes.items():
            if name not in self.frozen:
                for function in [n for n in cls.body if isinstance(n, ast.FunctionDef)]:
                    known = self.facts[name]
                    if function.name != "__init__":  # its arguments go by no other's names
                        own = {a.arg for a in nodes_of(function) if isinstance(a, ast.arg)}
                        known = {n: v for n, v in known.items() if "." in n and n not in own}
                    found += self._branches(function, known)
        if found:
            return found
        for name, cls in self.classes.items():
            if name not in self.frozen:
                found += self._unread(cls)
        found += self._unnamed()
        if found:
            return found
        for name, cls in self.classes.items():
            if name not in self.frozen:
                found += self._arguments(name)
                for function in [n for n in cls.body if isinstance(n, ast.FunctionDef)]:
                    found += self._aliases(function)
        return found or self._empty() or self._flat()

    def _branches(self, function: ast.FunctionDef, known: dict[str, Any]) -> Iterator[Edit]:
        for node in nodes_of(function):
            if isinstance(node, ast.If):
                test = self.value(node.test, known)
                if test is not UNKNOWN:
                    yield self._branch(node, node.body if test else node.orelse)
                else:
                    yield from self._tests(node.test, known)
            elif isinstance(node, ast.IfExp):
                test = self.value(node.test, known)
                if test is not UNKNOWN:
                    yield self._chosen(node, node.body if test else node.orelse)
                else:
                    yield from self._tests(node.test, known)

    def _chosen(self, node: ast.IfExp, chosen: ast.expr) -> Edit:
        """One side of a conditional expression, without the brackets that only that needed."""
        edit = self._replaced(node, self._source(chosen))
        (line, column), (last, stop), text = edit
        before, after = self.lines[line][:column], self.lines[last][stop:]
        atom = isinstance(chosen, ast.Name | ast.Attribute | ast.Call | ast.Constant)
        if atom and re.search(r"[=+\-*/] \($", before) and after.startswith(")"):
            return Edit((line, column - 1), (last, stop + 1), text)
        return edit

    def _tests(self, node: ast.expr, known: dict[str, Any]) -> Iterator[Edit]:
        """A test without the parts that decide nothing."""
        if isinstance(node, ast.BoolOp):
            left = [p for p in node.values if self.value(p, known) is UNKNOWN]
            if len(left) < len(node.values):
                word = " or " if isinstance(node.op, ast.Or) else " and "
                yield self._replaced(node, word.join(map(self._source, left)))

    def _branch(self, node: ast.If, body: list[ast.stmt]) -> Edit:
        begin = self._above(node.lineno - 1)
        if not body:
            return self._without(node)
        first = self._above(body[0].lineno - 1, node.lineno)
        lines = self.lines[first : body[-1].end_lineno]
        if body is node.orelse and self.lines[body[0].lineno - 1].lstrip().startswith("elif"):
            lines[0] = lines[0].replace("elif", "if", 1)
        else:
            spare = body[0].col_offset - node.col_offset
            lines = [line[spare:] for line in lines]
        assert node.end_lineno is not None
        end = (node.end_lineno - 1, len(self.lines[node.end_lineno - 1]))
        return Edit((begin, 0), end, "\n".join(lines))

    def _unread(self, cls: ast.ClassDef) -> Iterator[Edit]:
        """Methods that nothing calls and attributes that nothing reads."""
        init = self._init_of(cls.name)
        for function in [n for n in cls.body if isinstance(n, ast.FunctionDef)]:
            yield from self._after_return(function)
            read = _read_in(function)
            for node in nodes_of(function):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    harmless = all(isinstance(n, _HARMLESS) for n in nodes_of(node.value))
                    if harmless and len(node.targets) == 1 and node.targets[0].id not in read:
                        yield self._without(node)
        for node in cls.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("__"):
                if node.name not in self.read | CALLED_FROM_OUTSIDE:
                    yield self._without(node)
            elif isinstance(node, ast.AnnAssign | ast.Assign) and "NamedTuple" not in map(
                ast.unparse, cls.bases
            ):
                names = [t.id for t, _ in _pairs(node) if isinstance(t, ast.Name)]
                if names and not set(names) & self.read:
                    yield self._without(node)
        for node in init.body if init else []:
            if not isinstance(node, ast.Assign | ast.AnnAssign):
                continue
            pairs = _pairs(node)
            unread = [
                isinstance(t, ast.Attribute)
                and t.attr not in self.read
                and (v is None or all(isinstance(n, _HARMLESS) for n in nodes_of(v)))
                for t, v in pairs
            ]
            if all(unread):
                yield self._without(node)
            elif any(unread) and len(node.targets if isinstance(node, ast.Assign) else [0]) == 1:
                kept = [pair for pair, gone in zip(pairs, unread, strict=True) if not gone]
                targets = ", ".join(self._source(target) for target, _ in kept)
                values = ", ".join(self._source(value) for _, value in kept if value)
                yield self._replaced(node, f"{targets} = {values}")

    def _after_return(self, function: ast.FunctionDef) -> Iterator[Edit]:
        """What stands behind a return."""
        for node in nodes_of(function):
            body = getattr(node, "body", None)
            for before, after in itertools.pairwise(body if isinstance(body, list) else []):
                if isinstance(before, ast.Return):
                    yield self._without(after)

    def _aliases(self, function: ast.FunctionDef) -> Iterator[Edit]:
        """Names for an attribute that the function does not set: the attribute says it itself."""
        names = [n for n in nodes_of(function) if isinstance(n, ast.Name)]
        set_here = Counter(n.id for n in names if isinstance(n.ctx, ast.Store))
        set_here |= Counter(a.arg for a in nodes_of(function) if isinstance(a, ast.arg))
        kept = {
            n.attr
            for n in nodes_of(function)
            if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
        }
        for node in function.body:
            pairs = _pairs(node) if isinstance(node, ast.Assign | ast.AnnAssign) else []
            for target, value in pairs[:1] if len(pairs) == 1 else []:
                if not isinstance(value, ast.Attribute) or not isinstance(target, ast.Name):
                    continue
                if not _is_self(value.value) or value.attr in kept:
                    continue
                read = [n for n in names if n.id == target.id and n is not target]
                if set_here[target.id] == 1 and read:
                    yield self._without(node)
                    yield from (self._replaced(n, f"self.{value.attr}") for n in read)

    def _arguments(self, name: str) -> Iterator[Edit]:
        """Arguments with a default that __init__ does not read."""
        init = self._init_of(name)
        if init is None:
            return
        read = {n.id for n in nodes_of(init) if isinstance(n, ast.Name)}
        by_name = {argument.arg for argument in init.args.kwonlyargs}
        gone = {argument for argument, _ in _defaults(init) if argument in by_name - read}
        if not gone:
            return
        yield self._signature(init, gone)
        for call, _ in self._calls_of(name):
            given = [*call.args, *call.keywords]
            for before, keyword in itertools.pairwise([call.func, *given]):
                if isinstance(keyword, ast.keyword) and keyword.arg in gone:
                    if before is call.func:  # up to what follows
                        after = given[1] if len(given) > 1 else None
                        yield self._between(
                            _begin(keyword), _begin(after) if after else _end(keyword)
                        )
                    else:
                        yield self._between(_end(before), _end(keyword))

    def _signature(self, init: ast.FunctionDef, gone: set[str]) -> Edit:
        arguments = init.args
        comments = {}
        for argument in (*arguments.args, *arguments.kwonlyargs):
            line = self.lines[(argument.end_lineno or 1) - 1]
            if "  # " in line:
                comments[argument.arg] = line.partition("  # ")[2]
        defaults = dict(_defaults(init))
        parts = []
        for kind in (arguments.args, arguments.kwonlyargs):
            if kind is arguments.kwonlyargs and any(a.arg not in gone for a in kind):
                parts.append(("*", ""))
            for argument in kind:
                if argument.arg not in gone:
                    default = defaults.get(argument.arg)
                    shown = self._source(argument)
                    shown += "" if default is None else f" = {self._source(default)}"
                    parts.append((shown, comments.get(argument.arg, "")))
        line = f"    def __init__({', '.join(shown for shown, _ in parts)}) -> None:"
        if len(line) > LONGEST_LINE or any(comment for _, comment in parts):
            inner = [f"        {s}," + (f"  # {c}" if c else "") for s, c in parts]
            together = f"        {', '.join(shown for shown, _ in parts)}"
            if len(together) <= LONGEST_LINE and not any(comment for _, comment in parts):
                inner = [together]
            line = "\n".join(["    def __init__(", *inner, "    ) -> None:"])
        last = init.body[0].lineno - 1
        while not self.lines[last - 1].rstrip().endswith(":"):
            last -= 1
        return Edit((init.lineno - 1, 0), (last - 1, len(self.lines[last - 1])), line)

    def _unnamed(self) -> list[Edit]:
        """What stands at the top and nothing names."""
        found = []
        reads = [(node, _read_in(node)) for node in self.tree.body]
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names = {node.name}
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                names = {t.id for t, _ in _pairs(node) if isinstance(t, ast.Name)}
            else:
                continue
            if not names & self.roots and not any(read & names for at, read in reads if at != node):
                found.append(self._without(node))
        return found

    def _empty(self) -> list[Edit]:
        """A class that holds nothing and has one heir, which can inherit past it."""
        names = [node for node in nodes_of(self.tree) if isinstance(node, ast.Name)]
        for name, cls in self.classes.items():
            named = [node for node in names if node.id == name]
            heirs = [h for h in self.classes.values() if any(b in named for b in h.bases)]
            if len(cls.body) == 1 and len(named) == len(heirs) == 1 and name not in self.frozen:
                return [self._replaced(named[0], self._source(cls.bases[0])), self._without(cls)]
        return []

    def _flat(self) -> list[Edit]:
        """A class that nothing but its one heir names, and its members as the heir's own."""
        names = Counter(n.id for n in nodes_of(self.tree) if isinstance(n, ast.Name))
        for name, base in self.classes.items():
            heirs = [h for h in self.heirs_of(name) if h != name]
            heir = self.classes[heirs[0]] if len(heirs) == 1 else None
            if heir is None or names[name] != 1 or {name, heir.name} & self.frozen:
                continue
            ours, theirs = ({*map(_member, cls.body)} - {""} for cls in (base, heir))
            calls_base = any(
                isinstance(n, ast.Attribute) and ast.unparse(n.value) == "super()"
                for n in nodes_of(heir)
                if not (isinstance(n, ast.Attribute) and n.attr == "__init__")
            )
            if ours & theirs or "__init__" in ours or calls_base or len(heir.bases) != 1:
                continue
            body = base.body[1:] if not _member(base.body[0]) else base.body
            init = self._init_of(heir.name)
            set_there = {n.attr for n in nodes_of(init or heir) if isinstance(n, ast.Attribute)}
            fields = [
                n
                for n in body
                if not isinstance(n, ast.FunctionDef)
                and not (isinstance(n, ast.AnnAssign) and not n.value and _member(n) in set_there)
            ]
            methods = [n for n in body if isinstance(n, ast.FunctionDef)]
            first = next((n for n in heir.body if isinstance(n, ast.FunctionDef)), None)
            if not body or first is None or not heir.body[:1] or _member(heir.body[0]):
                continue
            edits = [self._replaced(heir.bases[0], self._source(base.bases[0]))]
            edits.append(self._without(base))
            if fields:
                about = _end(heir.body[0])
                text = "\n".join(["", "", *(self._whole(n) for n in fields)])
                edits.append(self._between(about, about, text))
            last = _end(heir.body[-1])
            text = "".join(f"\n\n{self._whole(n)}" for n in methods)
            return [*edits, self._between(last, last, text)]
        return []

    # ------------------------------------------------------------------------ text

    def _whole(self, node: Any) -> str:
        """The lines of a statement, with its comments and decorators."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        return "\n".join(self.lines[self._above(first) : node.end_lineno])

    def _source(self, node: ast.AST) -> str:
        (first, begin), (last, end), _ = self._between(_begin(node), _end(node))
        lines = self.lines[first : last + 1]
        lines[-1] = lines[-1][:end]
        return "\n".join([lines[0][begin:], *lines[1:]])

    def _replaced(self, node: ast.AST, text: str) -> Edit:
        return self._between(_begin(node), _end(node), text)

    def _between(self, begin: tuple[int, int], end: tuple[int, int], text: str = "") -> Edit:
        """From one place to another, in the tree's own count of bytes."""
        places = [
            (line, len(self.lines[line].encode()[:column].decode()))
            for line, column in (begin, end)
        ]
        return Edit(places[0], places[1], text)

    def _above(self, line: int, stop: int = 0) -> int:
        """The first of the comment lines above a line, counted from 0."""
        while line > stop and self.lines[line - 1].lstrip().startswith("#"):
            if "-----" in self.lines[line - 1]:
                break
            line -= 1
        return line

    def _without(self, node: Any) -> Edit:
        """The lines of a statement away, with its comments and the blank lines before them."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        begin = self._above(first)
        while begin and not self.lines[begin - 1].strip():
            begin -= 1
        if begin == 0:
            return Edit((0, 0), (node.end_lineno, 0), "")
        end = (node.end_lineno - 1, len(self.lines[node.end_lineno - 1]))
        return Edit((begin - 1, len(self.lines[begin - 1])), end, "")


_ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)
_HARMLESS = (
    ast.Name, ast.Constant, ast.Compare, ast.BoolOp, ast.boolop, ast.cmpop, ast.expr_context,
    ast.Attribute, ast.UnaryOp, ast.unaryop, ast.Tuple, ast.BinOp, ast.operator, ast.IfExp,
)  # fmt: skip


def _pairs(node: Any) -> list[tuple[ast.expr, ast.expr | None]]:
    """What an assignment sets, each with its value; None where that is not written beside it."""
    if not isinstance(node, ast.Assign):
        return [(node.target, None if isinstance(node, ast.AugAssign) else node.value)]
    found: list[tuple[ast.expr, ast.expr | None]] = []
    for target in node.targets:
        if not isinstance(target, ast.Tuple):
            found.append((target, node.value if len(node.targets) == 1 else None))
        elif isinstance(node.value, ast.Tuple) and len(node.targets) == 1:
            found += zip(target.elts, node.value.elts, strict=True)
        else:
            found += [(part, None) for part in target.elts]
    return found


def _member(node: ast.stmt) -> str:
    """The name that a statement of a class's body binds; "" of its docstring."""
    if isinstance(node, ast.FunctionDef):
        return node.name
    names = (
        [t.id for t, _ in _pairs(node) if isinstance(t, ast.Name)]
        if isinstance(node, ast.Assign | ast.AnnAssign)
        else []
    )
    return names[0] if names else ""


def _begin(node: Any) -> tuple[int, int]:
    return node.lineno - 1, node.col_offset


def _end(node: Any) -> tuple[int, int]:
    return node.end_lineno - 1, node.end_col_offset


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _read_in(tree: ast.AST) -> set[str]:
    """The names that code reads."""
    names = (n for n in nodes_of(tree) if isinstance(n, ast.Name))
    return {n.id for n in names if isinstance(n.ctx, ast.Load)}


def _defaults(init: ast.FunctionDef) -> list[tuple[str, ast.expr]]:
    """The arguments that have a default, with it."""
    arguments = init.args
    count = len(arguments.defaults)
    found = list(
        zip(
            (a.arg for a in arguments.args[len(arguments.args) - count :]),
            arguments.defaults,
            strict=True,
        )
    )
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is not None:
            found.append((argument.arg, default))
    return found


def _is_positional(init: ast.FunctionDef, name: str) -> bool:
    return any(a.arg == name for a in init.args.args)
