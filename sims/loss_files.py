"""Losses out of a Python file that is no part of the project."""

import importlib.util
import inspect
import sys
import traceback
from pathlib import Path

from theory._check import unknown
from theory.losses import Loss


def losses_in(path: str | Path, name: str | None = None) -> list[type[Loss]]:
    """The public loss classes defined in a file, in order of definition; `name` picks one by class or registry name.

    The file is run. ValueError: it does not parse or run (with the line), or has no loss, or none of that name.
    """
    path = Path(path).resolve()  # as tracebacks name it
    if not path.is_file():
        raise ValueError(f"no such file: {str(path)!r}")
    stem = f"_losses_in_{path.stem}"
    spec = importlib.util.spec_from_file_location(stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} must be a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[stem] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == spec.origin]
        at = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"{path}{at}: {type(error).__name__}: {error}") from error
    finally:
        sys.modules.pop(stem, None)
    found = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, Loss) and c.__module__ == stem and not c.__name__.startswith("_")
    ]
    if not found:
        raise ValueError(f"{path} defines no loss: derive a class from MarginLoss, Loss or TokenLoss of theory.losses")
    if name is None:
        return found
    chosen = [c for c in found if name in (c.__name__, c.name)]
    if not chosen:
        raise ValueError(f"{path}: " + unknown("loss", name, [c.__name__ for c in found]))
    return chosen
