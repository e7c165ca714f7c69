"""What the project promises itself: its layout, its public interface, its recipes.

After a wanted change of a public name or signature: ``make api``, and read the diff.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_meansparse"
SNAPSHOT = ROOT / "tests" / "public_api.txt"
API = importlib.import_module("lightning_meansparse")
NAMES: list[str] = API.__all__
HOMES: dict[str, str] = {name: home for home, names in API._ROOMS.items() for name in names}

# A room imports only from rooms to its left. `demo` holds data and one network, so anyone may.
ORDER = [
    "demo",
    "networks",
    "kernels",
    "layer",
    "moments",
    "meeting",  # torch.distributed alone; whoever waits for other processes needs it
    "sites",
    "classifier",
    "data",
    "rewrite",
    "surgery",
    "adapter",
    "attacks",
    "robustbench",
    "records",
    "metrics",
    "callback",
    "deployment",
    "tasks",
    "report",
    "card",
    "hub",
    "hugging_face",
    "cli",
]
# Installed with an extra, so a file may import them inside functions only.
OPTIONAL = {"datasets", "matplotlib", "scipy", "torchattacks", "transformers"}
OPTIONAL |= {"onnx", "onnxruntime", "onnxscript"}


def sources() -> list[Path]:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    return files


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """Line and full module name of every import in a tree, also inside functions."""
    package = ("lightning_meansparse", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            if module == "lightning_meansparse":  # `from lightning_meansparse import surgery`
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def test_rooms_import_only_from_rooms_before_them() -> None:
    seen, wrong = 0, []
    for path in sources():
        here = room(path)
        if here == "__init__":
            continue
        assert here in ORDER, f"{path.name} is no room of the design; add it to ORDER with a reason"
        for line, module in imports(ast.parse(path.read_text()), path):
            top, _, rest = module.partition(".")
            there = rest.partition(".")[0]
            if top != "lightning_meansparse" or there == here:
                continue
            seen += 1
            if there == "__version__":
                continue
            there = HOMES.get(there, there)  # a public name, imported as a user would
            if there not in ORDER or ORDER.index(there) >= ORDER.index(here):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert seen > 10
    assert not wrong, "\n".join(wrong)


def test_optional_dependencies_are_imported_inside_functions() -> None:
    """Except in a file that subclasses a class of theirs, which is itself imported lazily."""
    seen = 0
    for path in sources():
        tree = ast.parse(path.read_text())
        top_level = ast.Module([n for n in tree.body if not type_checking(n)], [])
        for node in ast.walk(top_level):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = []
        tops = {module.partition(".")[0] for _, module in imports(top_level, path)}
        seen += len(tops)
        allowed = {"attacks": {"torchattacks"}, "hugging_face": {"transformers"}}.get(
            room(path), set()
        )
        assert not tops & OPTIONAL - allowed, f"{path.relative_to(ROOT)}: {tops & OPTIONAL}"
    assert seen > 10


def type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def run(code: str) -> str:
    """Standard output of a fresh interpreter, in which every warning is an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = run("import sys, lightning_meansparse; print(*sorted(sys.modules))").split()
    assert "lightning_meansparse" in loaded
    assert not {"torch", "lightning", "timm", *OPTIONAL} & {m.partition(".")[0] for m in loaded}


def test_the_core_works_without_the_extras() -> None:
    """All public names can be imported where no extra is installed."""
    code = f"""
        import sys

        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {OPTIONAL!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Missing())
        # Lightning and torchmetrics look for these in the installed distributions, not by import.
        import importlib.metadata, importlib.util
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, package=None: (
            None if name.partition(".")[0] in {OPTIONAL!r} else find(name, package)
        )
        from_name = importlib.metadata.Distribution.from_name.__func__

        def without(cls, name):
            if name.partition(".")[0].lower() in {OPTIONAL!r}:
                raise importlib.metadata.PackageNotFoundError(name)
            return from_name(cls, name)

        importlib.metadata.Distribution.from_name = classmethod(without)
        import lightning_meansparse

        for name in lightning_meansparse.__all__:
            getattr(lightning_meansparse, name)
        print(len(lightning_meansparse.__all__))
    """
    assert int(run(code)) == len(NAMES)


def test_the_three_lists_of_public_names_agree() -> None:
    """__all__, the imports that type checkers see, and the rooms that the interpreter asks."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (checked,) = (node for node in tree.body if type_checking(node))
    static = {
        (str(node.module).removeprefix("lightning_meansparse."), alias.name)
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert static == {(home, name) for name, home in HOMES.items()}
    assert sorted(HOMES) == sorted(NAMES)
    assert set(NAMES) <= set(dir(API))
    with pytest.raises(AttributeError, match="no attribute 'sparsify'"):
        API.sparsify  # noqa: B018


def test_no_file_hides_a_standard_module_or_is_a_drawer_for_anything() -> None:
    for path in sources():
        if path.name != "__init__.py":
            assert path.stem not in sys.stdlib_module_names, path
        assert path.stem not in {"utils", "util", "helpers", "common", "misc"}, path


def test_no_file_grows_past_400_lines() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    long = {name: count for name, count in lines.items() if count > 400}
    assert not long, f"make a folder of the same name: {long}"


def test_dependencies_are_stated_where_they_are_imported() -> None:
    """Every third-party package imported by the package stands in pyproject.toml, core or extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    stated = {
        re.split(r"[\[<>=!~ ]", requirement)[0].replace("-", "_").lower()
        for requirement in [*project["dependencies"], *(r for name in extras for r in extras[name])]
    }
    # Part of the core through torchvision, whose images these are.
    stated |= {"numpy", "pil"}
    # A dependency of Lightning which it does not pass on under a name of its own.
    stated |= {"yaml"}
    seen = 0
    for path in sources():
        for line, module in imports(ast.parse(path.read_text()), path):
            top = module.partition(".")[0]
            if top in sys.stdlib_module_names or top == "lightning_meansparse":
                continue
            seen += 1
            assert top.lower() in stated, f"{path.relative_to(ROOT)}:{line} imports {module}"
    assert seen > 10


# ---- the public interface -------------------------------------------------------------------


def node_of(obj: object) -> ast.ClassDef | ast.FunctionDef:
    node = ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]  # type: ignore[arg-type]
    assert isinstance(node, ast.ClassDef | ast.FunctionDef)
    return node


def signature(node: ast.FunctionDef, name: str) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{name}({ast.unparse(node.args)}){returns}"


def describe(name: str) -> Iterator[str]:
    """The source's own signature lines: the same under every Python version."""
    node = node_of(getattr(API, name))
    if isinstance(node, ast.FunctionDef):
        yield signature(node, name)
        return
    yield f"class {name}({', '.join(map(ast.unparse, node.bases))})"
    for item in node.body:
        if isinstance(item, ast.AnnAssign):
            yield f"    {ast.unparse(item)}"
        elif isinstance(item, ast.FunctionDef) and (
            not item.name.startswith("_") or item.name == "__init__"
        ):
            marks = "".join(f"@{ast.unparse(mark)} " for mark in item.decorator_list)
            yield f"    {marks}{signature(item, item.name)}"


def public_api() -> str:
    return "".join(f"{line}\n" for name in sorted(NAMES) for line in describe(name))


def test_public_names_and_signatures_are_the_recorded_ones() -> None:
    assert public_api() == SNAPSHOT.read_text(), "wanted? then `make api`, and read the diff"


@pytest.mark.parametrize("name", NAMES)
def test_public_names_have_a_docstring_with_an_example(name: str) -> None:
    thing = getattr(API, name)
    doc = inspect.getdoc(thing)
    assert doc
    # "Examples:" is the heading that the API reference shows as code.
    assert "\nExamples:\n    >>>" in doc, f"{name} lacks `Examples:` with a doctest"
    for parameter in inspect.signature(thing).parameters:
        assert re.search(rf"\b{parameter}\b", doc), f"{name} does not describe {parameter!r}"


def test_docstrings_are_markdown() -> None:
    """The API reference reads Markdown and would show Sphinx's roles as they stand."""
    for path in sources():
        found = re.findall(r":(?:func|class|meth|data|mod|attr|math):`", path.read_text())
        assert not found, f"{path.relative_to(ROOT)}: write `name` instead of {found}"


def test_public_names_stand_in_the_api_reference() -> None:
    reference = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^::: lightning_meansparse\.(\w+)$", reference, flags=re.MULTILINE)
    assert len(NAMES) > 10
    assert sorted(listed) == sorted(NAMES)


def test_the_version_is_one() -> None:
    from lightning_meansparse import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "docs" / "changelog.md").read_text()


# ---- recipes --------------------------------------------------------------------------------


def test_recipes_parse_and_have_a_row_each() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    readme = (ROOT / "recipes" / "README.md").read_text()
    for recipe in recipes:
        assert isinstance(yaml.safe_load(recipe.read_text()), dict), recipe
        assert any(recipe.name in row for row in readme.splitlines() if row.startswith("|")), recipe
    assert not list((ROOT / "recipes").rglob("*.py")), "recipes hold no Python logic"


if __name__ == "__main__":
    SNAPSHOT.write_text(public_api())
