"""How deep the package is: files, lines, floors of imports, open names, `Any`, circles.

    python tests/benchmarks/structure.py [probdiff]

A file's floor is one above the highest of the files of ours that it imports when it is loaded; an
`__init__` is as high as what it lists, and whoever imports from a folder stands on it. Open names
are those that a module defines at its top level without a leading underscore, `__init__` files left
out.
"""

import ast
import re
import sys
from pathlib import Path


def files_of(root):
    return {
        ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in root.rglob("*.py")
    }


def imports_of(path, modules, name):
    """Modules of ours that a file imports when it is loaded."""
    body = [n for n in ast.parse(path.read_text()).body if not isinstance(n, ast.If)]
    found = set()
    for node in body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in modules}
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            parts = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
            is_whole = len(parts) < len(node.names)
            found |= parts | ({node.module} if is_whole and node.module != "probdiff" else set())
    return found - {name}


def open_names(path):
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                names |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def main():
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "probdiff").resolve()
    modules = files_of(root)
    imports = {name: imports_of(path, modules, name) for name, path in modules.items()}
    circles, floors = [], {}

    def floor(name, above):
        if name in above:
            circles.append(" -> ".join([*above[above.index(name) :], name]))
            return 0
        if name not in floors:
            below = [floor(other, (*above, name)) for other in sorted(imports[name])]
            floors[name] = 1 + max(below, default=0)
        return floors[name]

    for name in modules:
        if name != root.name:
            floor(name, ())
    text = {name: path.read_text() for name, path in modules.items()}
    code = [path for path in modules.values() if path.name != "__init__.py"]
    shapes = sum(len(re.findall(r"\b(?:Float|Int|Bool|Shaped)\[", t)) for t in text.values())
    print(f"files {len(modules)}, lines {sum(len(t.splitlines()) for t in text.values())}")
    folders = sorted({path.relative_to(root).parts[0] for path in code})
    for folder in folders:
        of = [p for p in modules.values() if p.relative_to(root).parts[0] == folder]
        if len(of) > 1:
            lines = sum(len(p.read_text().splitlines()) for p in of)
            print(f"  {folder}: {len(of)} files, {lines} lines")
    highest = max(floors, key=floors.get)
    print(f"floors {floors[highest]} ({highest})")
    print(f"open names {sum(len(open_names(path)) for path in code)}")
    any_ = sum(len(re.findall(r"\bAny\b", t)) for t in text.values())
    print(f"Any {any_}, shapes {shapes}")
    print(f"circles {len(circles)}", *circles)


if __name__ == "__main__":
    main()
