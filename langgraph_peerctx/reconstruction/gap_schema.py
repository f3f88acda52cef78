"""The form that a gap's value must have, from the workflow's own annotations."""

import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import (
    Annotated,
    Any,
    Final,
    NotRequired,
    Optional,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import typing_extensions
from langgraph.graph.state import CompiledStateGraph
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, create_model
from typing_extensions import is_typeddict

from langgraph_peerctx.durability.workflow import Workflow
from langgraph_peerctx.protocol.messages import Json

_NESTING: Final = 8
"""How deep a TypedDict is looked into: one that contains itself has no end."""
_WRAPPERS: Final = (Required, NotRequired, typing_extensions.ReadOnly)
_REFUSES_TYPING_TYPEDDICT: Final = sys.version_info < (3, 12)
"""pydantic wants `typing_extensions.TypedDict` there; LangGraph takes either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GapSchema:
    """Exactly the gaps as a pydantic model, each optional, nothing else allowed.

    Attributes:
        keys: The gaps whose type has a JSON form, sorted.
        refused: The other gaps, sorted.
        model: Its fields have the gaps as aliases: a state key may be no name that pydantic takes.
        states: The pydantic models among the workflow's schemas.
    """

    keys: tuple[str, ...]
    refused: tuple[str, ...]
    model: type[BaseModel]
    states: tuple[type[BaseModel], ...] = field(default=())

    @classmethod
    def of(cls, workflow: Workflow, gaps: Collection[str]) -> "GapSchema":
        """Read the types of these gaps."""
        annotations = {key: _annotation(workflow, key) for key in sorted(gaps)}
        typed = {key: kind for key, kind in annotations.items() if _has_json_form(key, kind)}
        return cls(
            keys=tuple(typed),
            refused=tuple(key for key in annotations if key not in typed),
            model=_model(typed),
            states=tuple(
                schema
                for schema in _schemas(workflow)
                if isinstance(schema, type) and issubclass(schema, BaseModel)
            ),
        )

    def json_schema(self) -> Json:
        """Return the JSON schema of an answer."""
        return self.model.model_json_schema()

    def validated(
        self, answer: Mapping[str, JsonValue], state: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the values that are valid, as the workflow holds them, and what the others lack.

        A workflow whose state is a pydantic model validates it before each node, so that its
        validators are asked as well.
        """
        values: dict[str, Any] = {}
        faults: dict[str, str] = {}
        for key in self.keys:
            if answer.get(key) is None:
                continue
            try:
                values[key] = self._value(key, answer[key])
            except ValidationError as error:
                faults[key] = _said(error)
            except Exception as error:  # noqa: BLE001 - anybody's validators may raise anything
                faults[key] = type(error).__name__
        for key, fault in self._refused_by_states(values, state).items():
            del values[key]
            faults[key] = fault
        return values, faults

    def _value(self, key: str, value: JsonValue) -> Any:
        # From JSON, because strictly a tuple, a moment or an enum can come from nothing else.
        read = self.model.model_validate_json(json.dumps({key: value}), strict=True)
        return getattr(read, _field_name(self.keys.index(key)))

    def _refused_by_states(
        self, values: Mapping[str, Any], state: Mapping[str, Any]
    ) -> dict[str, str]:
        faults: dict[str, str] = {}
        for schema in self.states:
            try:
                schema.model_validate({**state, **values})
            except ValidationError as error:
                faults |= _faults_in(error, values)
            except Exception as error:  # noqa: BLE001 - anybody's validators may raise anything
                faults |= dict.fromkeys(values, type(error).__name__)
        return faults


def _faults_in(error: ValidationError, values: Mapping[str, Any]) -> dict[str, str]:
    """Return which values a whole state's error is about; one about the state is about all."""
    faults: dict[str, str] = {}
    for fault in error.errors(include_url=False, include_input=False, include_context=False):
        if not fault["loc"]:
            return dict.fromkeys(values, fault["msg"])
        if (key := fault["loc"][0]) in values:
            faults[str(key)] = fault["msg"]
    return faults


def _said(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = ".".join(str(step) for step in fault["loc"][1:])
    return f"{path}: {fault['msg']}" if path else fault["msg"]


def _schemas(workflow: Workflow) -> list[Any]:
    """Return the workflow's schemas, that of its state first."""
    if not isinstance(workflow, CompiledStateGraph):
        return []
    builder = workflow.builder
    return [builder.state_schema, *(s for s in builder.schemas if s is not builder.state_schema)]


def _annotation(workflow: Workflow, key: str) -> Any:
    """Return a key's type as it is declared, with the constraints that pydantic reads."""
    for schema in _schemas(workflow):
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            if key in schema.model_fields:
                return _readable(schema.model_fields[key].rebuild_annotation())
        elif key in (hints := get_type_hints(schema, include_extras=True)):
            return _readable(hints[key])
    return _readable(getattr(workflow.channels[key], "ValueType", Any))


def _has_json_form(key: str, annotation: Any) -> bool:
    try:
        _model({key: annotation}).model_json_schema()
    except Exception:  # noqa: BLE001 - anybody's type may raise anything when it is looked at
        return False
    return True


def _model(annotations: Mapping[str, Any]) -> type[BaseModel]:
    fields: dict[str, Any] = {
        _field_name(index): (Optional[annotation], Field(default=None, alias=key, title=key))  # noqa: UP045 - of any annotation
        for index, (key, annotation) in enumerate(annotations.items())
    }
    return create_model("Gaps", __config__=ConfigDict(extra="forbid"), **fields)


def _field_name(index: int) -> str:
    return f"gap_{index}"


def _readable(annotation: Any, nesting: int = _NESTING) -> Any:
    """Return an annotation without `Required` and the like, with TypedDicts that pydantic takes."""
    if nesting == 0:
        return annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in _WRAPPERS:
        return _readable(arguments[0], nesting)
    if _REFUSES_TYPING_TYPEDDICT and is_typeddict(annotation):
        return _typed_dict(annotation, nesting - 1)
    read = tuple(_readable(argument, nesting - 1) for argument in arguments)
    if all(new is old for new, old in zip(read, arguments, strict=True)):
        return annotation
    form: Any = {UnionType: Union, Annotated: Annotated}.get(origin, origin)
    return form[read]


def _typed_dict(declared: Any, nesting: int) -> Any:
    hints = get_type_hints(declared, include_extras=True)
    fields = {
        key: Required[_readable(hint, nesting)]
        if key in declared.__required_keys__ and get_origin(hint) is not NotRequired
        else NotRequired[_readable(hint, nesting)]
        for key, hint in hints.items()
    }
    make: Any = typing_extensions.TypedDict  # type checkers want a class statement
    made = make(declared.__name__, fields)
    made.__pydantic_config__ = getattr(declared, "__pydantic_config__", ConfigDict())
    return made
