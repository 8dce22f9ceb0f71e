"""The grammar of GLM's tool calls (see tool_calls.py), which holds a call to the tools of a request and their schemas.

Arguments come in the order of the schema's properties; those that are not required may be left out. A value is text
where the schema says string, so that of a string's keywords only ``enum`` and ``const`` can be enforced, beside null as
well; any other value is JSON of its schema. Where a schema allows both, or says nothing, the value is free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nextn.errors import RequestError
from nextn.text.grammar import MAX_GRAMMAR_LEN, Check, Form, Tags, json_form
from nextn.text.reasoning import THINK_CLOSE, THINK_OPEN
from nextn.text.tool_calls import CALL_CLOSE, CALL_OPEN, KEY_CLOSE, KEY_OPEN, VALUE_CLOSE, VALUE_OPEN
from nextn.text.tool_schema import NOTES, ToolSchemas, refers_into_root

_VALUE = "VALUE: /(.|\\n)+/ & ~/(.|\\n)*<\\/arg_value>(.|\\n)*/"
"""A value is not to spell its closing tag out, letter by letter."""


class ToolGrammar:
    """Rules for calls of some tools, and for text with such calls.

    tools: those that may be called, in OpenAI's form, by their index in the request
    enforce_all: hold calls to what can be enforced of any tool's schema. Else only tools that are ``strict`` are held
        to theirs, and then to all of it
    rules: Lark, with the expressions ``calls``, ``one_call`` and ``text_and_calls`` among others
    parts: what the rules refer to
    Raises RequestError where the schema of a strict tool cannot be enforced.
    """

    def __init__(self, tools: Mapping[int, Mapping[str, Any]], tags: Tags, check: Check, *, enforce_all: bool) -> None:
        self.parts: dict[str, Form] = {}
        self._check = check
        self._schemas = ToolSchemas(list(tools.values()))
        key_open, key_close, value_open, value_close = (
            tags[tag] for tag in (KEY_OPEN, KEY_CLOSE, VALUE_OPEN, VALUE_CLOSE)
        )
        between, after = f"{key_close} NL {value_open}", f"{value_close} NL"
        lines = [
            f"one_call: {' | '.join(f'call_{i}' for i in tools)}",
            "calls: one_call (NL one_call)*",
            "text_and_calls: text (one_call text)*",
            f"text: (TEXT | {tags[THINK_OPEN]} | {tags[THINK_CLOSE]})*",
            f"any_argument: {key_open} KEY {between} VALUE? {after}",
            "KEY: /[^<>]{1,256}/",
            _VALUE,
        ]
        for i, tool in tools.items():
            function = tool["function"]
            if function.get("strict"):
                _check_arguments(function.get("parameters") or {}, f"tools[{i}].function.parameters")
            arguments = "any_argument*"
            if function.get("strict") or (enforce_all and _lists_arguments(function)):
                arguments = " ".join(
                    f"({key_open} {_quoted(key)} {between} {value} {after}){'' if is_needed else '?'}"
                    for key, value, is_needed in self._arguments(i, function)
                )
            lines.append(
                f"call_{i}: {tags[CALL_OPEN]} NL {_quoted(function['name'])} NL {arguments} {tags[CALL_CLOSE]}"
            )
        self.rules = "\n".join(lines) + "\n"

    def _arguments(self, i: int, function: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
        """Of each argument of the i-th tool the key, the Lark expression of its value, and whether it must be there."""
        arguments, param = self._schemas.arguments_of(function["name"]), f"tools[{i}].function.parameters"
        is_long = len(json.dumps(function.get("parameters"))) > MAX_GRAMMAR_LEN
        return [
            (key, self._value(f"value_{i}_{j}", function, key, schema, param, is_long), is_needed)
            for j, (key, schema, is_needed) in enumerate(arguments)
        ]

    def _value(self, part: str, function: Mapping[str, Any], key: str, schema: Any, param: str, is_long: bool) -> str:
        """is_long: whether the tool's whole schema is, so that no argument can be held to what refers into it"""
        value_type, at = self._schemas.type_of(function["name"], key), f"{param}.properties.{key:.100}"
        if value_type.types is None or "string" in value_type.types:
            options = self._schemas.texts_of(function["name"], key)
            if options and not any(VALUE_CLOSE in option for option in options):
                return f"({' | '.join(map(_quoted, options))})"
            if function.get("strict") and not self._schemas.allows_any_text(function["name"], key):
                message = (
                    f"{at}: of a string nothing but 'enum' and 'const' can be enforced; leave the rest out, or strict"
                )
                raise RequestError(message, at, "invalid_value")
            return "VALUE?"
        try:
            if is_long and refers_into_root(schema):
                message = f"{at}: refers into a schema of more than {MAX_GRAMMAR_LEN} characters; shorten it"
                raise RequestError(message, at, "invalid_value")
            self.parts[part] = json_form(schema, at, self._check)
        except RequestError:
            if function.get("strict"):
                raise
            return "VALUE?"
        return f"@{part}"


_OF_ARGUMENTS = NOTES | {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}


def _check_arguments(parameters: Mapping[str, Any], at: str) -> None:
    """Refuse what calls cannot be held to. Raises RequestError."""
    required = parameters.get("required", [])
    properties = parameters.get("properties", {})
    wrong = sorted(set(parameters) - _OF_ARGUMENTS)
    if wrong:
        raise RequestError(f"{at}.{wrong[0]}: cannot be enforced; leave it out, or strict", at, "invalid_value")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise RequestError(f"{at}.required: found {required!r:.100}, expected a list of names", at, "invalid_value")
    for key in (*properties, *required):
        if KEY_CLOSE in key or key != key.strip():
            raise RequestError(
                f"{at}: a call cannot name the argument {key!r:.100}; call it another", at, "invalid_value"
            )


def _lists_arguments(function: Mapping[str, Any]) -> bool:
    """Whether the schema says which arguments there are. Without one there are none."""
    parameters = function.get("parameters")
    return parameters is None or "properties" in parameters


def _quoted(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)
