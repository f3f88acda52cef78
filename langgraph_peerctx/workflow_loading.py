"""Workflows that a command is told of, from a file's attribute to what a supervisor takes.

A module is imported under the name by which agents import it, where `sys.path` tells one: types
of a state are stored in checkpoints under their module's name.
"""

import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
)
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dotenv import dotenv_values
from langgraph.graph import StateGraph
from langgraph.pregel import Pregel

from langgraph_peerctx.durability.workflow import checkpointer_of
from langgraph_peerctx.errors import ConfigurationError, PeerContextError, StoreError
from langgraph_peerctx.reconstruction.recoverer import SupervisedWorkflow

CONFIG_NAME = "langgraph.json"
_EXPECTED = "expected NAME=FILE.py:ATTRIBUTE"
_SHOWN = 300
"""How much of a foreign error is shown, in characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowPlace:
    """Where a workflow is found, and the name under which its runs were admitted."""

    name: str
    file: Path
    attribute: str

    def __str__(self) -> str:
        return f"workflow {self.name!r:.80} ({self.file}:{self.attribute})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What a command is told of workflows; nothing is imported yet.

    Attributes:
        places: At least one; no name twice.
        folders: What their modules import from.
        environment: Variables to set before.
    """

    places: tuple[WorkflowPlace, ...]
    folders: tuple[Path, ...]
    environment: Mapping[str, str]

    def prepare(self) -> None:
        """Set the variables and extend `sys.path`, as LangGraph's server does."""
        os.environ.update(self.environment)
        sys.path.extend(str(f) for f in self.folders if str(f) not in sys.path)


def declared(named: Sequence[str], config: Path | None) -> Declared:
    """Read what the command line and a langgraph.json say.

    Args:
        named: Each as `NAME=FILE.py:ATTRIBUTE`, relative to where we are.
        config: A langgraph.json; without it and without names, the one where we are.

    Raises:
        ConfigurationError: If it cannot be read, names nothing, or names something twice.
    """
    here = Path.cwd()
    places = [_place(one, here) for one in named]
    folders, environment = [here] if named else [], {}
    if config is None and not named:
        config = here / CONFIG_NAME
        if not config.is_file():
            raise ConfigurationError(
                f"no workflow is named: --workflow NAME=FILE.py:ATTRIBUTE, or a {CONFIG_NAME} here"
            )
    if config is not None:
        said = _read(config)
        places += _places_in(said, config)
        folders += _folders_in(said, config)
        environment = _environment_in(said, config)
    names = [place.name for place in places]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError(f"two workflows are called {twice[0]!r:.80}: name each once")
    return Declared(places=tuple(places), folders=tuple(folders), environment=environment)


@asynccontextmanager
async def opened(places: Sequence[WorkflowPlace]) -> AsyncIterator[dict[str, SupervisedWorkflow]]:
    """Import workflows and keep what they need open, on this loop, as long as the block lasts.

    Raises:
        ConfigurationError: If there is no such file or attribute, or it is no workflow that can be
            recovered.
        StoreError: If what opens it failed.
    """
    async with AsyncExitStack() as stack:
        yield {place.name: await _open(place, stack) for place in places}


# Reading


def _place(text: str, folder: Path) -> WorkflowPlace:
    name, is_named, where = text.partition("=")
    if not (is_named and name.strip()):
        raise ConfigurationError(f"--workflow {text!r:.120}: {_EXPECTED}")
    return _place_of(name.strip(), where.strip(), folder, f"--workflow {text!r:.120}")


def _place_of(name: str, where: str, folder: Path, said: str) -> WorkflowPlace:
    file, _, attribute = where.rpartition(":")
    if not file.endswith(".py") or not attribute.isidentifier():
        raise ConfigurationError(f"{said}: {_EXPECTED}")
    path = (folder / Path(file).expanduser()).resolve()
    if not path.is_file():
        raise ConfigurationError(f"{said}: there is no file {path}")
    return WorkflowPlace(name=name, file=path, attribute=attribute)


def _read(config: Path) -> dict[str, Any]:
    try:
        said = json.loads(config.read_bytes(), object_pairs_hook=_each_once)
    except OSError as error:
        raise ConfigurationError(f"{config} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigurationError(f"{config} is no valid JSON: {error}") from None
    if not isinstance(said, dict):
        raise ConfigurationError(f"{config} is no JSON object")
    return said


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; JSON itself would keep the last of two equal names without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.80} is there twice")
    return found


def _places_in(said: Mapping[str, Any], config: Path) -> list[WorkflowPlace]:
    ours = said.get("peerctx")
    workflows = ours.get("workflows") if isinstance(ours, dict) else None
    if not isinstance(workflows, dict) or not workflows:
        raise ConfigurationError(
            f'{config} names no workflow: "peerctx": {{"workflows": {{"NAME": "./file.py:attr"}}}}'
        )
    folder = config.resolve().parent
    return [
        _place_of(name, str(where), folder, f"{config}, workflow {name!r:.80}")
        for name, where in workflows.items()
    ]


def _folders_in(said: Mapping[str, Any], config: Path) -> list[Path]:
    """Return the folder of the file and its local dependencies; packages are installed already."""
    folder, local = config.resolve().parent, said.get("dependencies") or []
    if not isinstance(local, list):
        raise ConfigurationError(f'{config}: "dependencies" is no list')
    paths = [(folder / str(one)).resolve() for one in local if str(one).startswith(".")]
    return [path for path in dict.fromkeys([folder, *paths]) if path.is_dir()]


def _environment_in(said: Mapping[str, Any], config: Path) -> dict[str, str]:
    """Return the variables that LangGraph's server would set: a file's, or those written there."""
    told = said.get("env") or {}
    if isinstance(told, dict):
        return {name: str(value) for name, value in told.items()}
    file = config.resolve().parent / str(told)
    if not isinstance(told, str) or not file.is_file():
        raise ConfigurationError(f'{config}: "env" names no file: {file}')
    return {name: value for name, value in dotenv_values(file).items() if value is not None}


# Importing


def _imported(place: WorkflowPlace) -> object:
    try:
        module = _module_of(place.file)
    except Exception as error:
        raise ConfigurationError(
            f"{place} cannot be imported: {_said(error)}. What it imports must be found from here, "
            "or through PYTHONPATH"
        ) from error
    try:
        found: object = getattr(module, place.attribute)
    except AttributeError:
        raise ConfigurationError(f"{place}: there is no such attribute") from None
    return found


def _module_of(file: Path) -> ModuleType:
    for root in sorted(sys.path, key=len, reverse=True):
        name = _name_under(Path(root or Path.cwd()).resolve(), file)
        if name is not None:
            return importlib.import_module(name)
    return _module_by_itself(file)


def _name_under(root: Path, file: Path) -> str | None:
    """Return the name by which a folder of `sys.path` leads to this very file, if it does."""
    if not file.is_relative_to(root):
        return None
    parts = file.relative_to(root).with_suffix("").parts
    if not all(part.isidentifier() for part in parts):
        return None
    name = ".".join(parts)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    origin = None if spec is None else spec.origin
    return name if origin is not None and Path(origin).resolve() == file else None


def _module_by_itself(file: Path) -> ModuleType:
    """Import a file that no folder leads to, once."""
    name = file.stem
    if not name.isidentifier() or importlib.util.find_spec(name) is not None:
        name = f"peerctx_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # noqa: S101 - its name ends with .py
    assert spec.loader is not None  # noqa: S101 - the same
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


# Opening


async def _open(place: WorkflowPlace, stack: AsyncExitStack) -> SupervisedWorkflow:
    found = _imported(place)
    if not isinstance(found, Pregel | StateGraph | SupervisedWorkflow) and callable(found):
        found = await _made(place, found, stack)
    return _checked(place, found)


async def _made(place: WorkflowPlace, factory: Any, stack: AsyncExitStack) -> object:
    """Call what makes a workflow, and enter or await what it returns."""
    is_manager = hasattr(factory, "__enter__") or hasattr(factory, "__aenter__")
    if inspect.isclass(factory) and not is_manager:
        raise ConfigurationError(f"{place} is a class, not a graph or a function")
    try:
        inspect.signature(factory).bind()
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{place} is called without arguments: {error}") from None
    try:
        made = factory()
        if inspect.isawaitable(made):
            made = await made
        if isinstance(made, AbstractAsyncContextManager):
            made = await stack.enter_async_context(made)
        elif isinstance(made, AbstractContextManager):
            made = stack.enter_context(made)
    except PeerContextError:
        raise
    except Exception as error:
        raise StoreError(f"{place} cannot be opened: {_said(error)}") from error
    return made


def _checked(place: WorkflowPlace, found: Any) -> SupervisedWorkflow:
    try:
        supervised = (
            found if isinstance(found, SupervisedWorkflow) else SupervisedWorkflow(workflow=found)
        )
    except ConfigurationError as error:
        raise ConfigurationError(f"{place}: {error}") from None
    if checkpointer_of(supervised.workflow) is None:
        raise ConfigurationError(
            f"{place} has no checkpointer: compile it with the one that its agents write to"
        )
    return supervised


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:_SHOWN]}"
