"""The reader's own code: what a run was trained with, and whether a module of his works."""
import ast
import hashlib
import os
from pathlib import Path

import torch

from support.console import explained

# The code through which numbers pass.  Of support/, not what only talks or stores: a reworded
# message there must not make every run another.
FILES = ("senetv2.py", "data.py", "train.py", "support/hardware.py", "support/images.py",
         "support/shapes.py", "support/weights.py")


def digests(weights=None):
    """File -> a digest of its code, which comments, docstrings and layout do not change: of FILES
    and of files of one's own that these import; and one of the file of weights that a run starts
    from, if it is there."""
    root, found, names = Path(__file__).parents[1], {}, [*FILES]
    for name in names:
        found[name] = digest(text := (root / name).read_text("utf-8-sig"))
        names += [file for file in imported(text) if (root / file).is_file()
                  and file not in names and not file.startswith("support/")]
    for file in (weights, os.path.join(weights, "last.pt")) if weights else ():
        if os.path.isfile(file):
            with explained(f"{file} cannot be read", "give weights that can"):
                found[file] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    return found


def imported(text):
    """Where the modules that this code imports would lie, if they lay in this folder."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            package = getattr(node, "module", None)
            for module in [package] * bool(package) + [
                    f"{package}.{alias.name}" if package else alias.name for alias in node.names]:
                yield from (module.replace(".", "/") + end for end in (".py", "/__init__.py"))


def digest(text):
    """Alike under all versions of Python, which ast.dump and ast.unparse are not."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
    return hashlib.sha256(repr(plain(tree)).encode()).hexdigest()[:16]


def plain(node):
    """A syntax tree as tuples without positions; empty fields differ between versions."""
    if isinstance(node, ast.AST):
        fields = ((field, getattr(node, field, None)) for field in sorted(node._fields)
                  if field not in ("kind", "type_comment"))
        return (type(node).__name__, *((field, plain(value)) for field, value in fields
                                       if value not in (None, [])))
    return tuple(map(plain, node)) if isinstance(node, list) else repr(node)


def changed(before, now):
    """The files whose digests differ, in words, or ""."""
    return ", ".join(name for name in now if before.get(name) != now[name])


def try_module(module, x):
    """One pass forward and back.  Raises TypeError, with the place of the module's forward, unless
    its output is a tensor of the shape and the type of x, and ValueError unless it is finite."""
    y = module(x.detach().requires_grad_() * 1)     # no leaf: a module may work in place
    if not (torch.is_tensor(y) and (y.shape, y.dtype) == (x.shape, x.dtype)):
        place, found = type(module).forward.__code__, type(y).__name__
        if torch.is_tensor(y):
            found = f"{y.dtype}, {tuple(y.shape)}"
        raise TypeError(f"{type(module).__name__}.forward (file \"{place.co_filename}\", line "
                        f"{place.co_firstlineno}) returned {found}; its input was {x.dtype}, "
                        f"{tuple(x.shape)}, and its output must be alike")
    if not y.isfinite().all():
        why = "; in the last stage, 32 pixels are one" if x.shape[-1] == 1 else ""
        raise ValueError(f"the forward of {type(module).__name__} returned numbers that are not "
                         f"finite, for an input of {tuple(x.shape)}{why}")
    y.sum().backward()
