"""The reader's own code: what a run was trained with, and whether a module of his works."""
import ast
import hashlib
import os
from pathlib import Path

import torch
from torchvision.models.resnet import Bottleneck

from support.console import explained

# Files that only talk or store: a reworded message there must not make every run another.
TALKERS = {f"support/{name}.py" for name in (
    "__init__", "checkpoint", "console", "flags", "source", "workers")}


def digests(weights=None):
    """File -> a digest of its code, which comments, docstrings and layout do not change: of
    train.py and of all that it imports from here, one's own files, too, but TALKERS; and one of the
    file of weights that a run starts from, if it is there."""
    root, found, names = Path(__file__).parents[1], {}, ["train.py"]
    for name in names:
        found[name] = digest(text := (root / name).read_text("utf-8-sig"))
        names += sorted({file for file in imported(text, name) if (root / file).is_file()}
                        - {*names} - TALKERS)
    for file in (weights, os.path.join(weights, "last.pt")) if weights else ():
        if os.path.isfile(file):
            with explained(f"{file} cannot be read", "give weights that can"):
                found[file] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    return found


def imported(text, file):
    """Where the modules that this code of `file` imports would lie, if they lay in this folder."""
    here = Path(file).parts[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            level = getattr(node, "level", 0)               # 1 in "from .a import b"
            package = here[:len(here) + 1 - level] if level else ()
            outer = (getattr(node, "module", None) or "").split(".")
            for alias in node.names:
                module = [part for part in (*package, *outer, *alias.name.split(".")) if part]
                for end in range(1, len(module) + 1):
                    yield from ("/".join(module[:end]) + last for last in (".py", "/__init__.py"))


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


@torch.no_grad()
def try_gates(net, size):
    """Try each gate on a map of the shape that it gets from images of size x size pixels."""
    for block in net.modules():
        if isinstance(block, Bottleneck):
            block.gate.register_forward_pre_hook(lambda gate, inputs: try_module(gate, *inputs))
    net(torch.randn(2, 3, size, size))


@torch.enable_grad()
def try_module(module, x):
    """One pass forward and back.  Raises TypeError, with the place of the module's forward, unless
    its output is a tensor of the shape and the type of x, and ValueError unless it is finite."""
    y = module.forward(x.detach().requires_grad_() * 1)     # no leaf: a module may work in place
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
