"""Conversations with tools: which tool, which arguments (copied from the request), and what to say with the result."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from nextn.demo.corpus import facts, slots


@dataclass(frozen=True)
class ToolUse:
    category: str
    key: str
    question: str
    reasoning: str
    name: str
    arguments: dict[str, Any]
    result: str  # JSON, as the tool gives it back
    answer: str


@dataclass(frozen=True)
class Tool:
    """One tool in the spelling that a conversation uses: the name and the argument keys vary, to be read and copied."""

    name: str
    keys: tuple[str, ...]
    description: str
    types: tuple[str, ...]

    def schema(self) -> dict[str, Any]:
        """The tool in the form of the OpenAI API."""
        properties = {key: {"type": type_} for key, type_ in zip(self.keys, self.types, strict=True)}
        parameters = {"type": "object", "properties": properties, "required": list(self.keys)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


def weather_tool(rng: Random) -> Tool:
    name = rng.choice(("get_weather", "get_weather", "get_current_weather", "weather"))
    key = rng.choice(("city", "city", "location", "place"))
    return Tool(name, (key,), f"Get the current weather for a {key}", ("string",))


def calculator_tool(rng: Random) -> Tool:
    name = rng.choice(("calculator", "calculator", "calculate", "evaluate"))
    key = rng.choice(("expression", "expression", "formula"))
    return Tool(name, (key,), "Evaluate an arithmetic expression", ("string",))


def search_tool(rng: Random) -> Tool:
    name = rng.choice(("search", "search", "web_search", "search_web"))
    return Tool(name, (rng.choice(("query", "query", "text")),), "Search the web for information", ("string",))


def calendar_tool(rng: Random) -> Tool:
    name = rng.choice(("create_event", "create_event", "add_event", "add_to_calendar"))
    return Tool(name, (rng.choice(("title", "title", "event")), "day", "time"), "Add an event to the calendar",
                ("string", "string", "string"))  # fmt: skip


def timer_tool(rng: Random) -> Tool:
    name = rng.choice(("set_timer", "set_timer", "start_timer"))
    return Tool(name, (rng.choice(("minutes", "minutes", "duration")),), "Start a timer for some minutes", ("integer",))


def use_weather(rng: Random, tool: Tool) -> ToolUse:
    place = slots.city(rng)
    phrasings = ["What is the weather in {}?", "What's the weather like in {}?", "How is the weather in {} today?",
                 "Is it raining in {}?", "Do I need an umbrella in {}?", "Tell me the weather in {}.",
                 "How warm is it in {} right now?", "Check the weather for {}, please."]  # fmt: skip
    degrees = rng.randint(-10, 38)
    sky = rng.choice(("sunny", "cloudy", "rainy", "windy", "snowy", "clear"))
    return ToolUse("weather", f"weather/{place}", rng.choice(phrasings).format(place),
                   f"The user asks about the weather in {place}. I call {tool.name}.", tool.name,
                   {tool.keys[0]: place}, json.dumps({"temperature": degrees, "condition": sky}),
                   f"It is {degrees} degrees and {sky} in {place}.")  # fmt: skip


def use_calculator(rng: Random, tool: Tool) -> ToolUse:
    sum_ = slots.expression(rng)
    phrasings = ["What is {}?", "Calculate {}.", "Use the calculator for {}.", "Please work out {} for me.",
                 "Compute {}.", "How much is {}?"]  # fmt: skip
    value = rng.randint(1, 10 ** rng.randint(1, 5))
    return ToolUse("calculator", f"calculator/{sum_}", rng.choice(phrasings).format(sum_),
                   f"The user wants to know {sum_}. I call {tool.name}.", tool.name, {tool.keys[0]: sum_},
                   json.dumps({"result": value}), f"The result of {sum_} is {value}.")  # fmt: skip


def use_search(rng: Random, tool: Tool) -> ToolUse:
    query = slots.query(rng)
    phrasings = ["Search for {}.", "Search the web for {}.", "Find information about {}.", "Look up {} for me.",
                 "Can you search for {}?", "Find {} on the web."]  # fmt: skip
    hit = f"{slots.made_up_word(rng)} {rng.choice(('Guide', 'Journal', 'Archive', 'Handbook', 'News'))}"
    return ToolUse("search", f"search/{query}", rng.choice(phrasings).format(query),
                   f"The user wants to find {query}. I call {tool.name}.", tool.name, {tool.keys[0]: query},
                   json.dumps({"title": hit}), f'I found "{hit}" about {query}.')  # fmt: skip


def use_calendar(rng: Random, tool: Tool) -> ToolUse:
    title, day, time = slots.event(rng), rng.choice(facts.DAYS), slots.clock_time(rng)
    phrasings = ["Add {t} on {d} at {c} to my calendar.", "Schedule {t} for {d} at {c}.",
                 "Put {t} in my calendar on {d} at {c}.", "Please plan {t} on {d} at {c}.",
                 "Create an event: {t}, {d} at {c}."]  # fmt: skip
    return ToolUse("calendar", f"calendar/{title}/{day}/{time}", rng.choice(phrasings).format(t=title, d=day, c=time),
                   f"The user wants to plan {title} on {day} at {time}. I call {tool.name}.", tool.name,
                   dict(zip(tool.keys, (title, day, time), strict=True)), json.dumps({"status": "ok"}),
                   f"I added {title} on {day} at {time} to your calendar.")  # fmt: skip


def use_timer(rng: Random, tool: Tool) -> ToolUse:
    minutes = rng.randint(1, 120)
    phrasings = ["Set a timer for {} minutes.", "Start a timer of {} minutes.", "Remind me in {} minutes.",
                 "Wake me in {} minutes."]  # fmt: skip
    index = rng.randrange(len(phrasings))
    return ToolUse("timer", f"timer/{minutes}/{index}", phrasings[index].format(minutes),
                   f"The user wants a timer for {minutes} minutes. I call {tool.name}.", tool.name,
                   {tool.keys[0]: minutes}, json.dumps({"status": "started"}),
                   f"The timer is set for {minutes} minutes.")  # fmt: skip


TOOLBOX: list[tuple[Callable[[Random], Tool], Callable[[Random, Tool], ToolUse]]] = [
    (weather_tool, use_weather), (calculator_tool, use_calculator), (search_tool, use_search),
    (calendar_tool, use_calendar), (timer_tool, use_timer),
]  # fmt: skip


class DrawnUse:
    """A set of one to three tools in random order, and one use of one of them; `key` decides the split."""

    def __init__(self, rng: Random) -> None:
        chosen = rng.sample(range(len(TOOLBOX)), rng.choices((1, 2, 3), (3, 4, 2))[0])
        drawn = [TOOLBOX[index][0](rng) for index in chosen]
        which = rng.randrange(len(drawn))
        self.schemas = [tool.schema() for tool in drawn]
        self.use = TOOLBOX[chosen[which]][1](rng, drawn[which])
        self.key = self.use.key
