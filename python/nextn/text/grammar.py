"""Grammars that outputs must follow, in the language of llguidance, which computes the tokens that they allow.

What a request asks for, a JSON schema, a regular expression or a grammar, is one part of the output: the reasoning may
come before it, and tool calls in its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from llguidance import regex_to_lark

from nextn.errors import RequestError
from nextn.text.grammar_compiler import to_lark
from nextn.text.reasoning import THINK_CLOSE, THINK_OPEN, starts_inside_reasoning
from nextn.text.tokenizer import Tokenizer

MAX_GRAMMAR_LEN = 131072
"""Characters of a schema, an expression or a grammar; compiling more would hold up other requests."""

MAX_OUTPUT_GRAMMAR_LEN = 262144
"""Characters of all that a chat request asks of its answer."""

OPTIONS = "x-guidance"
"""Where llguidance looks in a schema for what is asked of it beside."""

WHITESPACE = r"[ \t]{1,2}|\n[ \t]{0,32}"
"""Between the parts of JSON. Where there may be more, a model that does not know how to go on writes nothing else."""

LAYOUT = "NL: /\\n{0,2}/\nTEXT: /(.|\\n)+/\n"
"""Newlines between the parts of an output; and text, which no tag's token is a part of."""


Check = Callable[[str], object]
"""Compiles a grammar; raises RequestError where it is wrong, or too much."""

Translate = Callable[[str], str]
"""``to_lark``, or what has it done elsewhere."""

HEAD = '%llguidance {"no_forcing": true}\n'
"""What a grammar forces is spelled in any way: of the tags' tokens, which it would prefer, no text is made."""


@dataclass(frozen=True)
class Form:
    """A part of an output. definition: as llguidance takes it, but for a name."""

    definition: Mapping[str, Any]

    def as_grammar(self) -> str:
        """The grammar of an output that is nothing but this."""
        whole = {"lark_grammar": f"{HEAD}start: @answer"}
        return json.dumps({"grammars": [whole, {"name": "answer", **self.definition}]}, ensure_ascii=False)


class Reasoning(Enum):
    """Where reasoning that is set apart from the answer may stand in an output."""

    NONE = auto()
    OPTIONAL = auto()
    BEGUN = auto()  # by the prompt

    @classmethod
    def after(cls, prompt: str) -> Reasoning:
        """What a rendered prompt leaves open: it may have begun the reasoning, or ended it."""
        if starts_inside_reasoning(prompt):
            return cls.BEGUN
        return cls.NONE if prompt.rstrip().endswith(THINK_CLOSE) else cls.OPTIONAL


def json_form(schema: Mapping[str, Any] | bool, param: str, check: Check) -> Form:
    """JSON of a schema.

    param: the field that it comes from
    Raises RequestError where the schema is wrong, or uses a keyword that cannot be enforced.
    """
    if not isinstance(schema, Mapping | bool):
        raise RequestError(f"{param}: found {schema!r:.100}, expected a JSON schema, an object", param, "invalid_value")
    plain = schema if isinstance(schema, Mapping) else {} if schema else {"enum": []}
    if OPTIONS in plain:
        raise RequestError(f"{param}: {OPTIONS!r} is not for clients to set; leave it out", param, "invalid_value")
    try:
        _check_len(json.dumps(schema), param)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{param}: {error}", param, "invalid_value") from None
    form = Form({"json_schema": {OPTIONS: {"whitespace_pattern": WHITESPACE}, **plain}})
    return _checked(form, param, check)


def regex_form(pattern: str, param: str, check: Check) -> Form:
    """Text that a regular expression matches whole. Raises RequestError where it is none."""
    _check_len(pattern, param)
    try:
        lark = regex_to_lark(pattern)
    except ValueError as error:  # half a surrogate pair
        raise RequestError(f"{param}: {error}", param, "invalid_value") from None
    return _checked(Form({"lark_grammar": f"{HEAD}start: /{lark}/"}), param, check)


def ebnf_form(text: str, param: str, check: Check, translate: Translate = to_lark) -> Form:
    """Text of a context-free grammar, written as for llama.cpp (GBNF) or Lark. Raises RequestError where it is none."""
    _check_len(text, param)
    try:
        lark = translate(text)
    except RequestError as error:
        raise RequestError(f"{param}: {error}", param, "invalid_value") from None
    return _checked(Form({"lark_grammar": lark}), param, check)


def _check_len(given: str, param: str) -> None:
    if len(given) > MAX_GRAMMAR_LEN:
        message = f"{param}: found {len(given)} characters, expected at most {MAX_GRAMMAR_LEN}"
        raise RequestError(message, param, "invalid_value")


def _checked(form: Form, param: str, check: Check) -> Form:
    try:
        check(form.as_grammar())
    except RequestError as error:
        raise RequestError(f"{param}: {error}; correct it or leave it out", param, "invalid_value") from None
    return form


class Tags:
    """How the tags of GLM's outputs are written in a grammar: as their token, which no text contains."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __contains__(self, tag: str) -> bool:
        return self._tokenizer.added_token_id(tag) is not None

    def __getitem__(self, tag: str) -> str:
        """Raises RequestError where the model has no such token."""
        token_id = self._tokenizer.added_token_id(tag)
        if token_id is None:
            raise RequestError(f"calls cannot be held to a form: the model's vocabulary has no token {tag!r}", "tools")
        return f"<[{token_id}]>"


def whole_output(
    body: str, rules: str, parts: Mapping[str, Form], tags: Tags, reasoning: Reasoning, check: Check
) -> str:
    """The grammar of an output: reasoning, as far as it may be there, then ``body``.

    body: a Lark expression of the names in ``rules`` and, behind @, in ``parts``
    Raises RequestError where there is too much of it.
    """
    before = ""
    if reasoning is not Reasoning.NONE and THINK_OPEN in tags and THINK_CLOSE in tags:
        inside = f"TEXT? {tags[THINK_CLOSE]}"
        before = f"{inside} " if reasoning is Reasoning.BEGUN else f"(NL {tags[THINK_OPEN]} {inside})? "
    lark = f"{HEAD}start: {before}NL {body}\n{rules}{LAYOUT}"
    named = [{"name": name, **form.definition} for name, form in parts.items()]
    grammar = json.dumps({"grammars": [{"lark_grammar": lark}, *named]}, ensure_ascii=False)
    if len(grammar) > MAX_OUTPUT_GRAMMAR_LEN:
        message = f"tools: their schemas make a grammar of {len(grammar)} characters, expected at most "
        raise RequestError(f"{message}{MAX_OUTPUT_GRAMMAR_LEN}; offer fewer, or none that is strict", "tools")
    try:
        check(grammar)
    except RequestError as error:
        raise RequestError(f"tools: the grammar of the answer: {error}; ask for less", "tools") from None
    return grammar
