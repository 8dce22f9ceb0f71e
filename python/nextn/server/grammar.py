"""What a request asks of its output's form, as a grammar: a schema, an expression, calls of tools."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec

from nextn.server.chat_text import separates_reasoning
from nextn.server.decoding import check_depth
from nextn.server.errors import invalid, unsupported
from nextn.server.proving import IsGone
from nextn.server.requests import ChatRequest, NamedTool, SamplingFields
from nextn.server.services import Services
from nextn.server.tool_choice import Tools, forced_tools
from nextn.text.grammar import Check, Form, Reasoning, Tags, Translate, ebnf_form, json_form, regex_form, whole_output
from nextn.text.grammar_compiler import UnknownGrammar
from nextn.text.tool_grammar import ToolGrammar

T = TypeVar("T")

ANY_OBJECT = {"type": "object"}
OWN_FIELDS = ("json_schema", "regex", "ebnf")

MAX_TURN = 5.0
"""Seconds that one request may have its grammars compiled before no more of them are begun; each has a limit too."""


class _Prover(NamedTuple):
    """What compiles and translates the parts of a request's grammar."""

    check: Check
    translate: Translate


async def own_grammar(services: Services, fields: SamplingFields, is_gone: IsGone, prefix: str = "") -> str | None:
    """The grammar of an output that is nothing but what the sampling fields ask for; None if they do not.

    prefix: where the fields stand in the body
    Raises ApiError 400 or RequestError, naming the field, and what ``ProvingLine.run`` raises.
    """
    given = [name for name in OWN_FIELDS if getattr(fields, name) is not None]
    if not given:
        return None
    _check(services, fields, prefix, given[0])
    form = await _proven(services, lambda prover: _form(fields, prefix, prover), is_gone)
    return None if form is None else form.as_grammar()


async def chat_grammar(
    services: Services, asked: ChatRequest, offered: Tools, prompt: str, is_gone: IsGone
) -> str | None:
    """The grammar of a chat answer, its reasoning included; None if any text will do.

    offered: the tools that the model is told of
    prompt: the rendered prompt, whose end tells where reasoning may stand
    Raises ApiError 400 or RequestError, naming the field, and what ``ProvingLine.run`` raises.
    """
    forced = forced_tools(asked, offered)
    is_strict = any(tool["function"].get("strict") for tool in offered.values())
    if not forced and not is_strict and not _asks_for_form(asked):
        return None
    own = [name for name in OWN_FIELDS if getattr(asked, name) is not None]
    _check(services, asked, "", (*own, "response_format" if _asks_for_form(asked) else "tools")[0])
    return await _proven(
        services, lambda prover: _chat_grammar(services, asked, offered, forced, prompt, prover), is_gone
    )


async def _proven(services: Services, make: Callable[[_Prover], T], is_gone: IsGone) -> T:
    """What ``make`` builds of grammars that it has checked: at once where they are known, else when its turn comes."""
    check, translate = services.check_grammar, services.translate_grammar
    try:
        return await asyncio.to_thread(make, _Prover(partial(check, at_once=True), partial(translate, at_once=True)))
    except UnknownGrammar:
        return await services.proving.run(lambda: make(_in_turn(check, translate)), is_gone)


def _in_turn(check: Check, translate: Translate) -> _Prover:
    """Both, until the turn that begins now has taken too long: tools may come with a thousand grammars."""
    end = time.monotonic() + MAX_TURN

    def checked(grammar: str) -> None:
        if time.monotonic() > end:
            raise invalid(f"The grammars of this request take more than {MAX_TURN:g} s to compile; ask for less.")
        check(grammar)

    return _Prover(checked, translate)


def _chat_grammar(
    services: Services,
    asked: ChatRequest,
    offered: Tools,
    forced: Tools,
    prompt: str,
    prover: _Prover,
) -> str:
    check, form = prover.check, _response_form(asked, prover)
    if forced and form is not None:
        message = "'tool_choice' asks for a call, and something else for another form of the answer; send one of them."
        raise invalid(message, "tool_choice", "invalid_value")
    tags = Tags(services.require_tokenizer())
    reasoning = Reasoning.after(prompt) if separates_reasoning(services, asked) else Reasoning.NONE
    calls = ToolGrammar(forced or offered, tags, check, enforce_all=bool(forced)) if offered else None
    parts = {} if calls is None else calls.parts
    rules = "" if calls is None else calls.rules
    if forced:
        is_one = isinstance(asked.tool_choice, NamedTool) or asked.parallel_tool_calls is False
        return whole_output("one_call" if is_one else "calls", rules, parts, tags, reasoning, check)
    if form is None:  # reasoning is a part of the text
        return whole_output("text_and_calls", rules, parts, tags, Reasoning.NONE, check)
    body = "@answer" if calls is None else "(@answer | calls)"
    return whole_output(body, rules, {**parts, "answer": form}, tags, reasoning, check)


def _asks_for_form(asked: ChatRequest) -> bool:
    is_given = asked.response_format is not None and asked.response_format.type != "text"
    return is_given or any(getattr(asked, name) is not None for name in OWN_FIELDS)


def _check(services: Services, fields: SamplingFields, prefix: str, asking: str) -> None:
    """Refuse what cannot go with a grammar.

    asking: the field that asks for one
    """
    if not services.args.serves_grammars:
        flag = "--skip-tokenizer-init" if services.tokenizer is None else "--grammar-backend none"
        message = f"'{prefix}{asking}' is not supported: this server was started with {flag}; leave it out."
        raise unsupported(message, f"{prefix}{asking}")
    if fields.ignore_eos:
        message = f"'{prefix}ignore_eos' cannot go with a schema or a grammar: the answer ends where that does."
        raise invalid(message, f"{prefix}ignore_eos", "invalid_value")


def _response_form(asked: ChatRequest, prover: _Prover) -> Form | None:
    own, form = _form(asked, "", prover), asked.response_format
    if form is None or form.type == "text":
        return own
    if own is not None:
        raise invalid("'response_format' and a grammar contradict each other; send one of them.", "response_format")
    if form.json_schema is None:
        return json_form(ANY_OBJECT, "response_format", prover.check)
    check_depth(form.json_schema.schema, "response_format.json_schema.schema")
    schema = form.json_schema.schema
    param = "response_format.json_schema.schema"
    return json_form(ANY_OBJECT if schema is None else schema, param, prover.check)


def _form(fields: SamplingFields, prefix: str, prover: _Prover) -> Form | None:
    names = [name for name in OWN_FIELDS if getattr(fields, name) is not None]
    if len(names) > 1:
        message = f"'{prefix}{names[0]}' and '{prefix}{names[1]}' contradict each other; send one of them."
        raise invalid(message, f"{prefix}{names[0]}", "invalid_value")
    if fields.json_schema is not None:
        param = f"{prefix}json_schema"
        return json_form(_schema(fields.json_schema, param), param, prover.check)
    if fields.regex is not None:
        return regex_form(fields.regex, f"{prefix}regex", prover.check)
    return None if fields.ebnf is None else ebnf_form(fields.ebnf, f"{prefix}ebnf", *prover)


def _schema(given: str | dict[str, Any] | bool, param: str) -> dict[str, Any] | bool:
    if isinstance(given, str):
        try:
            given = msgspec.json.decode(given)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise invalid(f"'{param}' is not valid JSON.", param, "invalid_value") from None
    if not isinstance(given, dict | bool):
        raise invalid(f"'{param}' must be a JSON schema, an object.", param, "invalid_value")
    check_depth(given, param)
    return given
