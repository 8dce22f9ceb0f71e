"""The chat template in GLM-4.5's form, and the same rendering in plain Python for the corpus.

The Jinja text ships with the checkpoint. `render` produces the same characters many times faster and says which of
them the model is to learn; a test holds the two together.
"""

import json
from dataclasses import dataclass
from typing import Any

TOOLS_HEAD = "# Tools\n\nYou can call these functions. Their signatures are inside <tools></tools>:\n<tools>\n"
TOOLS_TAIL = (
    "</tools>\n\nWrite each call in this form:\n<tool_call>{name}\n<arg_key>{key}</arg_key>\n"
    "<arg_value>{value}</arg_value>\n</tool_call>"
)

CHAT_TEMPLATE = (
    """\
[gMASK]<sop>
{%- macro visible_text(content) -%}
    {%- if content is string -%}{{- content -}}
    {%- elif content is iterable and content is not mapping -%}
        {%- for part in content -%}
            {%- if part is string -%}{{- part -}}
            {%- elif part is mapping and part.type == 'text' -%}{{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- elif content is none or content is not defined -%}
    {%- else -%}{{- content -}}
    {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
    {{- '<|system|>\\n"""
    + TOOLS_HEAD.replace("\n", "\\n")
    + """' -}}
    {%- for tool in tools -%}{{- tool | tojson(ensure_ascii=False) + '\\n' -}}{%- endfor -%}
    {{- '"""
    + TOOLS_TAIL.replace("\n", "\\n")
    + """' -}}
{%- endif -%}
{%- set ns = namespace(last_user=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
    {%- if m.role == 'system' -%}
        {{- '<|system|>\\n' + visible_text(m.content) -}}
    {%- elif m.role == 'user' -%}
        {%- set text = visible_text(m.content) -%}
        {{- '<|user|>\\n' + text -}}
        {%- if enable_thinking is defined and not enable_thinking and not text.endswith('/nothink') -%}
            {{- '/nothink' -}}
        {%- endif -%}
    {%- elif m.role == 'assistant' -%}
        {%- set content = visible_text(m.content) -%}
        {%- set reasoning = '' -%}
        {%- if m.reasoning_content is string -%}
            {%- set reasoning = m.reasoning_content -%}
        {%- elif '</think>' in content -%}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] -%}
            {%- set content = content.split('</think>')[-1] -%}
        {%- endif -%}
        {{- '<|assistant|>\\n<think>' -}}
        {%- if loop.index0 > ns.last_user -%}{{- reasoning.strip() -}}{%- endif -%}
        {{- '</think>' -}}
        {%- if content.strip() -%}{{- '\\n' + content.strip() -}}{%- endif -%}
        {%- if m.tool_calls -%}
            {%- for call in m.tool_calls -%}
                {%- set f = call.function if call.function else call -%}
                {{- '\\n<tool_call>' + f.name + '\\n' -}}
                {%- for key, value in f.arguments.items() -%}
                    {{- '<arg_key>' + key + '</arg_key>\\n<arg_value>' -}}
                    {{- value if value is string else value | tojson(ensure_ascii=False) -}}
                    {{- '</arg_value>\\n' -}}
                {%- endfor -%}
                {{- '</tool_call>' -}}
            {%- endfor -%}
        {%- endif -%}
    {%- elif m.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|observation|>' -}}{%- endif -%}
        {{- '\\n<tool_response>\\n' + visible_text(m.content) + '\\n</tool_response>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{- '\\n<think></think>' -}}{%- endif -%}
{%- endif -%}
"""
)


@dataclass(frozen=True)
class Span:
    """A piece of a rendered conversation and how much each of its tokens counts in the loss."""

    text: str
    weight: float


USER_WEIGHT = 0.1
TOOLS_WEIGHT = 0.0


def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, thinking: bool) -> list[Span]:
    """A whole conversation as spans whose texts join to what the template gives, closed by the turn's end token.

    Without `thinking` the messages' reasoning is left out, as a model that does not think would have none.
    Reasoning that the template hides, and the empty pair that stands in its place, carry no weight: the model must
    not learn to leave its reasoning out.
    """
    spans = [Span("[gMASK]<sop>", 0.0)]
    if tools:
        listed = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools)
        spans.append(Span(f"<|system|>\n{TOOLS_HEAD}{listed}{TOOLS_TAIL}", TOOLS_WEIGHT))
    last_user = max(index for index, message in enumerate(messages) if message["role"] == "user")
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "system":
            spans.append(Span(f"<|system|>\n{message['content']}", USER_WEIGHT))
        elif role == "user":
            # The marker that ends the turn before is the model's to write; it was counted there.
            spans += [Span("<|user|>", 1.0 if index else 0.0), Span("\n" + message["content"], USER_WEIGHT)]
            if not thinking:
                spans.append(Span("/nothink", 0.0))
        elif role == "assistant":
            spans += _assistant_spans(message, shows_reasoning=thinking and index > last_user)
        elif role == "tool":
            first = messages[index - 1]["role"] != "tool"
            spans += [Span("<|observation|>", 1.0)] if first else []
            spans.append(Span(f"\n<tool_response>\n{message['content']}\n</tool_response>", USER_WEIGHT))
    spans.append(Span("<|observation|>" if messages[-1].get("tool_calls") else "<|user|>", 1.0))
    return spans


def prompt_text(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, thinking: bool) -> str:
    """What the template gives with `add_generation_prompt`: everything up to where the assistant speaks."""
    text = "".join(span.text for span in render(messages, tools, thinking)[:-1])
    return text + "<|assistant|>" + ("" if thinking else "\n<think></think>")


def _assistant_spans(message: dict[str, Any], shows_reasoning: bool) -> list[Span]:
    spans = [Span("<|assistant|>", 0.0)]
    if shows_reasoning:
        spans.append(Span(f"\n<think>{message.get('reasoning_content', '')}</think>", 1.0))
    else:
        spans.append(Span("\n<think></think>", 0.0))
    text = "\n" + message["content"] if message["content"] else ""
    for call in message.get("tool_calls", ()):
        text += f"\n<tool_call>{call['function']['name']}\n"
        for key, value in call["function"]["arguments"].items():
            value_text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            text += f"<arg_key>{key}</arg_key>\n<arg_value>{value_text}</arg_value>\n"
        text += "</tool_call>"
    spans.append(Span(text, 1.0))
    return spans
