"""What the site generates: a page for each family of the zoo, the API reference, linked sources.

Everything is read from the sources, nothing is imported: torch is not needed to build the site.
"""

import ast
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "archzoo"
CORE = "core"  # the page of the modules that lie at the top
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".txt": "text"}


# ---------------------------------------------------------------------------- docstrings


def as_markdown(text: str) -> str:
    """A docstring with its formulas, the indented lines after ``::``, fenced."""
    lines, out = text.splitlines(), []
    while lines:
        line = lines.pop(0)
        if not line.endswith("::"):
            out.append(line)
            continue
        indent = len(line) - len(line.lstrip())
        block: list[str] = []
        while lines and (not lines[0].strip() or len(lines[0]) - len(lines[0].lstrip()) > indent):
            block.append(lines.pop(0))
        if line.strip() != "::":
            out += [line[:-1], ""]
        margin = " " * (indent + 4 * line.lstrip().startswith("* "))
        code = textwrap.dedent("\n".join(block)).strip("\n").splitlines()
        out += [margin + text for text in ("```text", *code, "```", "")]
    return "\n".join(out)


class Docstrings(griffe.Extension):
    """Docstrings as Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


# ---------------------------------------------------------------------------- the zoo


def families() -> dict[str, Path]:
    return {p.stem: p for p in sorted((PACKAGE / "models").glob("*.py")) if p.stem != "__init__"}


def table() -> tuple[str, list[str]]:
    """The heading and the rows of the README's table, which a test holds to `archzoo list`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- archzoo list --markdown -->\n(.*?)<!-- end -->", readme, re.DOTALL)
    assert found is not None, "README.md has no table of the models"
    lines = found.group(1).strip().splitlines()
    return "\n".join(lines[:2]), lines[2:]


def family_page(name: str) -> str:
    heading, rows = table()
    mine = [row for row in rows if row.startswith(f"| {name}_")]
    assert mine, f"README.md's table has no row of {name}: archzoo list --markdown"
    summary, _, rest = as_markdown(docstring(PACKAGE / "models" / f"{name}.py")).partition("\n")
    title, colon, what = summary.partition(":")
    if not colon:
        title, what = name, summary
    what = what.strip()
    source = f"archzoo/models/{name}.py"
    return f"""# {title}

{what[:1].upper()}{what[1:]}

{rest.strip()}

## Sizes

{heading}
{chr(10).join(mine)}

Parameters are counted at the preset's own vocabulary; *active* are those that one token uses. The
state is what one text carries from token to token, in float32. `archzoo show {name}_tiny` prints
the parts of one model, `archzoo.create_model("{name}_tiny")` builds it.

The whole family is one file: [`{source}`](../../{source}).
"""


def zoo_index() -> str:
    heading, rows = table()
    lines = []
    for name, path in families().items():
        lines.append(f"- [{name}]({name}.md): {docstring(path).splitlines()[0]}")
    return f"""# The zoo

Every model is one decoder with other parts in its slots, so two of them differ in what their papers
changed and in nothing else. Sizes are alike across families: about 30 thousand, 0.9, 30 and 110
million active parameters. A family whose sizes are its paper's says so on its page.

{chr(10).join(lines)}

{heading}
{chr(10).join(rows)}
"""


# ---------------------------------------------------------------------------- the API reference


def modules(place: Path) -> Iterator[str]:
    """The dotted names of the modules in a package, packages before what they hold."""
    for path in sorted(place.rglob("*.py"), key=lambda p: (p.parent, p.stem != "__init__", p)):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__init__":
            yield ".".join(parts)
        elif defines(path):
            yield ".".join(parts[:-1])


def defines(path: Path) -> bool:
    """Whether a module has public classes or functions of its own."""
    return any(
        isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
    )


def packages() -> dict[str, list[str]]:
    """Each package of archzoo with its modules; the zoo's families have pages of their own."""
    found = {CORE: [f"archzoo.{p.stem}" for p in sorted(PACKAGE.glob("[!_]*.py"))]}
    found[CORE].sort(key=lambda name: (name != "archzoo.block", name != "archzoo.decoder", name))
    for place in sorted(PACKAGE.iterdir()):
        if (place / "__init__.py").exists() and place.name != "models":
            found[place.name] = list(modules(place))
    return found


def package_page(package: str, names: list[str]) -> str:
    if package == CORE:
        about = "What every part builds on: the interface, the decoder and the registry."
    else:
        about = docstring(PACKAGE / package / "__init__.py").split("\n\n")[0]
    title = "archzoo" if package == CORE else f"archzoo.{package}"
    return f"# {title}\n\n{about}\n\n" + "\n".join(f"::: {name}\n" for name in names)


def api_index() -> str:
    stub = (PACKAGE / "__init__.pyi").read_text(encoding="utf-8")
    words = [line.split() for line in stub.splitlines()]  # from MODULE import NAME as NAME
    names = {name: place for _, place, _, name, *_ in words if not name.startswith("_")}
    exported = "\n".join(
        f"| [`archzoo.{name}`][{place}.{name}] | `{place}` |" for name, place in names.items()
    )
    lines = []
    for package in packages():
        title = "archzoo" if package == CORE else f"archzoo.{package}"
        lines.append(f"- [`{title}`]({package}.md)")
    return f"""# API reference

One page for each package of archzoo, written from its docstrings:

{chr(10).join(lines)}

## What `import archzoo` gives

| name | from |
| --- | --- |
{exported}
"""


# ---------------------------------------------------------------------------- mkdocs


def generated() -> dict[str, str]:
    """All pages that are not files, by their place under docs/."""
    pages = {"zoo/index.md": zoo_index(), "api/index.md": api_index()}
    pages |= {f"zoo/{name}.md": family_page(name) for name in families()}
    pages |= {f"api/{name}.md": package_page(name, modules) for name, modules in packages().items()}
    pages["changelog.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the two sections of the navigation whose pages are generated."""
    zoo = ["zoo/index.md", *(f"zoo/{name}.md" for name in families())]
    api = ["api/index.md", *(f"api/{package}.md" for package in packages())]
    for section in config.nav:
        if isinstance(section, dict) and "The zoo" in section:
            section["The zoo"] = zoo
        if isinstance(section, dict) and "API reference" in section:
            section["API reference"] = api
    return config


def outside(source: str, target: str) -> Path | None:
    """What a link of a page (its place under docs/) names outside docs/ but in the repository."""
    path = Path(os.path.normpath(ROOT / "docs" / Path(source).parent / target))
    if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "docs") and path.exists():
        return path
    return None


LINK = re.compile(
    r"(?<!\!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)|!\[([^\]]*)\]\(([^)\s]+)\)"
)


def linked(text: str, source: str) -> dict[str, Path]:
    found = {}
    for match in LINK.finditer(text):
        target = match.group(2) or match.group(5)
        path = None if ":" in target else outside(source, target)
        if path is not None and path.is_file():
            found[target] = path
    return found


def site_path(path: Path) -> str:
    """Where a file from outside docs/ lies in the site: text as a page, the rest as it is."""
    name = path.relative_to(ROOT).as_posix()
    return f"source/{name}.md" if path.suffix in LANGUAGES else f"source/{name}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = generated()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    texts = pages | {
        file.src_uri: file.content_string
        for file in files.documentation_pages()
        if file.src_uri not in pages
    }
    for source, text in texts.items():
        for path in linked(text, source).values():
            name = site_path(path)
            if files.get_file_from_path(name) is not None:
                continue
            if path.suffix in LANGUAGES:
                code = path.read_text(encoding="utf-8")
                title = path.relative_to(ROOT).as_posix()
                content = f"# {title}\n\n````{LANGUAGES[path.suffix]}\n{code}````\n"
                files.append(File.generated(config, name, content=content))
            else:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links that leave docs/ at their copies; a folder's name stands without a link."""
    source = page.file.src_uri

    def pointed(match: re.Match[str]) -> str:
        target = match.group(2) or match.group(5)
        path = None if ":" in target else outside(source, target)
        if path is None:
            return match.group(0)
        if path.is_dir():
            return match.group(1) or ""
        there = os.path.relpath(site_path(path), Path(source).parent)
        return match.group(0).replace(f"]({target}", f"]({there}")

    # Twice: a picture within a link's text is a match of its own.
    return LINK.sub(pointed, markdown)
