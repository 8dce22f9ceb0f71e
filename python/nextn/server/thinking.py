"""Whether the model is to think, in all the ways in which clients say it, as variables of the chat template."""

from __future__ import annotations

from nextn.server.errors import unsupported
from nextn.server.openai_request import agreed
from nextn.server.requests import ChatRequest, ChatTemplateOptions, Thinking
from nextn.text.tokenizer import Tokenizer


def thinking_variables(asked: ChatRequest, tokenizer: Tokenizer) -> dict[str, bool]:
    """The template's enable_thinking and clear_thinking, where the request says something about them.

    Raises ApiError 400 where two fields contradict each other, or the template does not read the variable.
    """
    options = asked.chat_template_kwargs or ChatTemplateOptions()
    thinking = asked.thinking or Thinking()
    effort = asked.reasoning_effort
    wishes = {
        "enable_thinking": {
            "thinking.type": None if thinking.type is None else thinking.type == "enabled",
            "reasoning_effort": None if effort is None else effort != "none",
            "enable_thinking": asked.enable_thinking,
            "chat_template_kwargs.enable_thinking": options.enable_thinking,
        },
        "clear_thinking": {
            "thinking.clear_thinking": thinking.clear_thinking,
            "chat_template_kwargs.clear_thinking": options.clear_thinking,
        },
    }
    found = {variable: agreed(wish) for variable, wish in wishes.items()}
    for variable, wish in found.items():
        if wish is not None and not tokenizer.template_reads(variable):
            param = wish[0]
            message = (
                f"'{param}' is not supported: this model's chat template does not read '{variable}'; leave it out."
            )
            raise unsupported(message, param)
    return {variable: wish[1] for variable, wish in found.items() if wish is not None}
