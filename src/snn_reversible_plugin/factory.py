"""The user's model, as the command line gets it: ``module:factory``, and the shapes of its inputs.

The idea: what a user wrote wrongly is refused in a sentence, and what went wrong in code of the user's is
shown as Python shows it, without what stands around it here.
"""

import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from torch import nn

_HERE = str(Path(__file__).parent) + os.sep
_LIBRARIES = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib"))
_MOST_FRAMES = 3


def move(device: str, model: "nn.Module") -> "nn.Module":
    """The model on a device, or a word on a device that is not there."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(str(error).splitlines()[0], param_hint="--device") from None


def run_once(model: "nn.Module", inputs: Sequence[Any]) -> None:
    """Refuse a shape that the model does not take, in the model's own words."""
    import torch

    from snn_reversible_plugin.modules.as_it_ran import unchanged

    try:
        with unchanged(model), torch.no_grad():
            model(*inputs)
    except Exception as error:
        names = {module: name for name, module in model.named_modules()}
        running = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        inside = [names[one] for one in running if isinstance(one, torch.nn.Module) and one in names]
        where = f" in {inside[-1]}" if inside and inside[-1] else ""
        given = ", ".join("x".join(map(str, one.shape)) for one in inputs)
        raise typer.BadParameter(
            f"the model does not take an input of {given}: {type(error).__name__}{where}: {error}\n"
            "Inputs are random floats of that shape; a model that wants something else can be wrapped in a "
            "module that makes it from them: name a factory of that one."
        ) from None


def shape_of(text: str) -> tuple[int, ...]:
    """``"8,16,2"`` as ``(8, 16, 2)``."""
    if {"N", "T"} & {*text.split(",")}:
        raise typer.BadParameter(
            f"{text!r}: letters are for fit, which looks for N; give numbers here, as in 8,16,2,32,32",
            param_hint="--shape",
        )
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise typer.BadParameter(
            f"{text!r} is no shape: give sizes from 1 up with commas between, as in 8,16,2,32,32",
            param_hint="--shape",
        )
    return sizes


def _script(file: str) -> Any:
    """A file as a module: what stands under ``if __name__ == "__main__"`` does not run."""
    path = Path(file)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # what lies beside a script is imported by it
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _remedy(missing: str) -> str:
    """What to do about a module that is not there."""
    framework, _, part = missing.partition(".")
    if framework not in ("spikingjelly", "snntorch"):
        return "run in its folder, set PYTHONPATH, or install what it needs"
    if part:
        return f"install the release of {framework} that it was written for"
    return f"pip install 'snn-reversible-plugin[{framework}]'"


def build(target: str) -> Any:
    """The model that ``package.module:factory`` makes."""
    from torch import nn

    def refuse(why: str) -> typer.BadParameter:
        return typer.BadParameter(f"{target!r} {why}", param_hint="FACTORY")

    module_name, colon, name = target.rpartition(":")
    if not (module_name and colon and name):
        raise refuse("names no factory: give module:factory, as in mypackage.models:build or train.py:Net")
    is_file = module_name.endswith(".py")
    if is_file and not Path(module_name).exists():
        raise refuse("is not there: give the file's path from here")
    try:
        module = _script(module_name) if is_file else importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise refuse(f"cannot be imported ({error}): {_remedy(error.name or '')}") from error
    except Exception as error:
        if isinstance(error, ImportError) and "relative import" in str(error):
            raise refuse(f"is a part of a package ({error}): name it as package.module:factory") from error
        raise _of_the_users(target, error) from None
    if not hasattr(module, name):
        raise refuse(f"is not there: {module_name} has no {name!r}")
    factory = getattr(module, name)
    if not callable(factory):
        raise refuse(f"is of type {type(factory).__name__}: name something that makes a model when called")
    if isinstance(factory, nn.Module):  # built already
        return factory
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise refuse(
            f"does not work without arguments ({error}): name a function that gives them"
        ) from error
    try:
        model = factory()
    except Exception as error:
        raise _of_the_users(target, error) from None
    if not isinstance(model, nn.Module):
        raise refuse(f"made something of type {type(model).__name__}: it has to make a torch.nn.Module")
    return model


def _of_the_users(target: str, error: Exception) -> typer.Exit:
    """Show what went wrong in the user's own code, and leave."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_HERE, "<frozen"))
    ]
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)] or frames
    lines = [*traceback.format_list(own[-_MOST_FRAMES:]), *traceback.format_exception_only(error)]
    typer.echo(f"{target!r} fails in its own code:\n{''.join(lines)}", err=True, nl=False)
    return typer.Exit(1)
