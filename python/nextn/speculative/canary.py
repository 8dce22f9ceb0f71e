"""Before the first user comes: does the draft reach what a working NextN head reaches, on text that is easy to draft?

Every known way to silence a NextN head lowers acceptance and raises no error. The canary decodes repeated sentences
greedily with the draft on and a fixed number of drafts, and compares acceptance with what a working head reaches.

Measured on the embedded model, with these prompts and 3 drafts. "after" is the acceptance of position 2 where position
1 was accepted, the ratio of the two positions' rates:

    head                                           position 1   after   accept length
    as it is                                          0.92       0.95       3.59
    no residual in the block                          0.86       0.87       3.15
    no draft KV over the prompt                       0.86       0.90       3.28
    never sees the target's hidden state              0.53       0.57       1.98
    no norm of the embedding                          0.31       0.12       1.35
    random embedding                                  0.14       0.07       1.15
    FP8 codes without their scales                    0.13       0.08       1.15
    norms off by one                                  0.04       0.00       1.04
    halves of the concat swapped                      0.01       0.00       1.01
    random head; all weights random                   0.00       0.00       1.00

The thresholds stand between: the published accept lengths of GLM-4.5 … 4.7 with 3 drafts, 2.0 to 3.1 on ordinary text,
mean that position 1 is accepted at 0.54 or more, and repeated sentences are easier than ordinary text. What costs less
than that, like the first three lines below "as it is", is for tests to find: it cannot be told from a weaker head.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from nextn.protocol.draft_health import Acceptance, CanaryResult

SENTENCES = (
    "What is the capital of France?",
    "What is 7 times 8?",
    "Hello! Who are you?",
    "What is the opposite of hot?",
    "The sun rises in the east and sets in the west.",
    "Name the days of the week.",
    "How do you spell apple?",
    "What colour is the sky?",
)
REPETITIONS = 4
MAX_NEW_TOKENS = 32
NUM_DRAFTS = 3

DEAD_BELOW = 0.2
HEALTHY_FROM = 0.4
AFTER_FROM = 0.4
MIN_CHAINS = 16
"""Fewer chains than this say nothing. With a true rate of 0.54, the some 120 chains of a start
fall below 0.4 once in 1,300 starts."""

_DEAD = (
    "Likely: FP8 codes taken for weights without their scales, a random or missing embedding or head, the halves of "
    "eh_proj's input swapped, norm weights off by one"
)
_WEAK = (
    "Likely: wrong scales in part of the layer, a norm or residual that is missing or applied twice, no draft KV over "
    "the prompt, draft positions off by one, a NextN layer of another model"
)
_UNCARRIED = (
    "The first draft works and those after it do not. Likely: the hidden state carried from draft to draft not normed "
    "or normed twice, draft positions or KV that do not advance or are not rewound"
)


def canary_prompts(tokenizer_folder: Path) -> list[list[int]]:
    """Each sentence several times over, as a user's turn in GLM's format; none where the folder has no tokenizer."""
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    except Exception:  # the library raises nothing narrower
        return []
    turns = [" ".join([sentence] * REPETITIONS) for sentence in SENTENCES]
    return [
        list(tokenizer.encode(f"[gMASK]<sop><|user|>\n{turn}<|assistant|>", add_special_tokens=False).ids)
        for turn in turns
    ]


def skipped(reason: str) -> CanaryResult:
    return CanaryResult(verdict="skipped", message=f"canary skipped: {reason}")


def judge(outcomes: Sequence[tuple[int, int]], num_drafts: int, seconds: float) -> CanaryResult:
    """outcomes: (drafted, accepted) of each chain, of at most num_drafts drafts."""
    acceptance = Acceptance(
        num_chains=len(outcomes),
        drafted_per_position=[sum(drafted > j for drafted, _ in outcomes) for j in range(num_drafts)],
        accepted_per_position=[sum(accepted > j for _, accepted in outcomes) for j in range(num_drafts)],
    )
    if len(outcomes) < MIN_CHAINS:
        return skipped(f"the model ended its answers after {len(outcomes)} drafted chains; {MIN_CHAINS} are needed")
    first = acceptance.accepted_per_position[0] / len(outcomes)
    after = [accepted > 1 for drafted, accepted in outcomes if drafted > 1 and accepted > 0]
    ratio = sum(after) / len(after) if len(after) >= MIN_CHAINS else None
    found = f"position 1 accepted {first:.0%}"
    found += f", position 2 after it {ratio:.0%}" if ratio is not None else ""
    found += f", accept length {acceptance.accept_length:.2f} over {len(outcomes)} chains"
    likely = None
    if first < HEALTHY_FROM:
        likely = _DEAD if first < DEAD_BELOW else _WEAK
        expected = f"position 1 at {HEALTHY_FROM:.0%} or more"
    elif ratio is not None and ratio < AFTER_FROM:
        likely, expected = _UNCARRIED, f"position 2 after it at {AFTER_FROM:.0%} or more"
    if likely is None:
        return CanaryResult(verdict="healthy", message=f"canary: {found}", acceptance=acceptance, seconds=seconds)
    message = f"canary: the draft is sick: {found}; a working head reaches {expected}. {likely}"
    return CanaryResult(verdict="sick", message=message, acceptance=acceptance, seconds=seconds)
