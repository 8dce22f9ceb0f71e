"""The model card: what the checkpoint is, how it was made, and what it was measured to do."""

import textwrap
from typing import Any

from nextn.demo.corpus.package_text import SOURCES
from nextn.demo.evaluate import NUM_DRAFTS, as_table, categories_table

_CARD = """\
---
license: apache-2.0
language: en
library_name: nextn
pipeline_tag: text-generation
---
# nextn demo: a very small GLM-4 MoE that drafts its own tokens

A real, trained checkpoint in the layout of GLM-4.6-FP8, small enough to ship inside a Python package. It exists so that
every part of a server (FP8 loading, the NextN layer, thinking, tool calls, the chat template) can be tried on a
laptop without a download. It is a test object, not an assistant: it knows a few hundred facts and nothing else.

## Shape
{shape}

Stored as the official checkpoints are: `compressed-tensors` float-quantized, attention and all expert matrices as
`float8_e4m3fn` with one scale per output channel, everything else in bfloat16 (the router's correction bias in
float32). The target is in `model.safetensors`; layer {layer}, the NextN layer, is in `mtp.safetensors` and shares the
target's embedding and head.

## What it was measured to do
By `python -m nextn.demo evaluate` with greedy sampling and {num_drafts} drafts per step. No prompt
occurs twice, and every prompt is held out: training never asked for its phrasing x fact (the tables to 12 count as
facts), its pair of operands, or its values for the tool. A part may have been seen elsewhere: a one-digit sum as a step
of a longer one, a city in another kind of question. An answer counts as right only if it equals the reference to the
letter, and with thinking on only if the reasoning was opened and closed; a tool call only if name, keys and values all
are right. The accept length is generated tokens per verify pass, the bonus token included.

{parts}

The fact and arithmetic quiz by kind:

{quiz}

Tool calls by tool:

{calls}

## What it can do
Chat with GLM-4.5's template, `[gMASK]<sop>` and the `<|user|>` family of markers; reasoning between `<think>` and
`</think>`, or none with `enable_thinking=false` (`/nothink`); calls of weather, calculator, search, calendar and timer
tools in the form `<tool_call>name\\n<arg_key>k</arg_key>\\n<arg_value>v</arg_value>\\n</tool_call>`, and an answer from
the result. Capitals, elements, antonyms, plurals, calendar order, units, sums and differences up to 99, tables to 12,
counting, spelling, short stories, small Python functions, definitions, small talk, the user's name. Phrasing far from
the templates in `nextn/demo/corpus` gives nonsense with confidence.

## How it was made
`python -m nextn.demo build` on a 2-core CPU, without any pretrained part:

{training}

{notes}The corpus is an endless stream of conversations from this project's own facts and templates
(`nextn/demo/corpus`), document by document from (seed, number), so that it needs no storage and a resumed run sees what
an uninterrupted one would. About one percent of its documents are docstrings of the Python standard library,
under the licence in brackets:
{sources}.
A twentieth of all items is held out by a hash of their key.

The target learns the next token with Muon for matrices and AdamW for the rest, with a bias update for the
load balance of its experts. The NextN layer then learns the distribution of the *quantized* target for three chained
draft steps, each fed with its own normed hidden state and with the keys and values it will have in serving. With
`--target-minutes` and `--nextn-minutes` the schedule follows the clock, which no machine repeats to the bit; with
`--target-steps` and `--nextn-steps` it does on one machine and thread count.

## Limits
English only, a vocabulary of {vocab} tokens, contexts up to {context} positions of which training used 2048. It has no
knowledge beyond its tables and no safety training, and its arithmetic outside the trained ranges is wrong. Names unlike
those of the corpus are at times copied wrongly, and counting stops after about a dozen numbers.
"""


def _shape_table(config: dict[str, Any], num_bytes: int) -> str:
    rows = {
        "layers": f"{config['num_hidden_layers']} + 1 NextN, the first {config['first_k_dense_replace']} dense",
        "hidden size": config["hidden_size"],
        "experts": f"{config['n_routed_experts']} routed of {config['moe_intermediate_size']}, "
        f"{config['num_experts_per_tok']} chosen, {config['n_shared_experts']} shared",
        "attention": f"{config['num_attention_heads']} heads, {config['num_key_value_heads']} for keys and values, "
        f"{config['head_dim']} wide, QK-norm and biases on",
        "vocabulary": config["vocab_size"],
        "positions": config["max_position_embeddings"],
        "tensors on disk": f"{num_bytes / 1e6:.1f} MB",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _training_table(training: list[dict[str, Any]]) -> str:
    lines = ["| stage | steps | tokens | minutes |", "|---|---|---|---|"]
    for stage in training:
        tokens, minutes = stage["tokens"] / 1e6, stage["minutes"]
        lines.append(f"| {stage['stage']} | {stage['steps']} | {tokens:.1f} M | {minutes:.0f} |")
    return "\n".join(lines)


def model_card(
    config: dict[str, Any],
    num_bytes: int,
    summary: dict[str, Any],
    training: list[dict[str, Any]],
    notes: str = "",
) -> str:
    """The card's text.

    config: config.json; num_bytes: of all tensors; summary: from `evaluate.summarize`; training: one dict per stage
    with stage, steps, tokens and minutes; notes: a remark on how this run differed from the recipe.
    """
    return _CARD.format(
        shape=_shape_table(config, num_bytes),
        layer=config["num_hidden_layers"],
        num_drafts=NUM_DRAFTS,
        notes=textwrap.fill(notes, 120) + "\n\n" if notes else "",
        parts=as_table(summary),
        quiz=categories_table(summary, "quiz"),
        calls=categories_table(summary, "tool call"),
        training=_training_table(training),
        sources=textwrap.fill(", ".join(f"`{module}` ({licence})" for module, licence in SOURCES.items()), 120),
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
    )
