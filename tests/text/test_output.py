"""Detokenization and stop strings: nothing may depend on how tokens are grouped."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nextn.text.detokenizer import MAX_HELD_BACK, Detokenizer
from nextn.text.output import OutputAssembler, TextDelta
from nextn.text.tokenizer import Tokenizer

from tests.text.chunks import cut, cuts

BROKEN = [bytes([byte]) for byte in b"\xe6\x97\xa5\xf0\x9f\xa6\x8a\xed\xc3\xff"]
"""Bytes of 日 and 🦊 and some that begin or break other characters; in any order most make no character."""


def assemble(assembler: OutputAssembler, pieces: list[list[int]]) -> tuple[str, str | None, int]:
    """(text, stop string, tokens used) of an output that arrives in pieces."""
    text, used = "", 0
    for number, piece in enumerate(pieces, start=1):
        delta = assembler.push(piece, finished=number == len(pieces))
        text += delta.text
        used += delta.num_tokens
        if delta.stopped:
            return text, delta.stop, used
    return text, None, used


def token_ids(tokenizer: Tokenizer, *texts: str) -> list[int]:
    return [token_id for text in texts for token_id in tokenizer.encode(text)]


@settings(deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pieces_join_to_the_text_of_all_tokens(tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40))
    detokenizer = Detokenizer(tokenizer, skip)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids, skip)
    assert detokenizer.flush() == ""


@settings(deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_long_runs_of_broken_characters_are_let_go_and_join(
    tokenizer: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    byte_ids = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in BROKEN]
    unshown = [*tokenizer.encode("<|user|>"), tokenizer.vocab_size + 1]
    ids = data.draw(st.lists(st.sampled_from(byte_ids + unshown), min_size=30, max_size=120))
    detokenizer = Detokenizer(tokenizer, skip)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("text", ["\ufffd", "<|user|>"])
def test_what_is_never_complete_does_not_pile_up(tokenizer: Tokenizer, text: str) -> None:
    lead = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xe6")
    run = [lead] * 100 if text == "\ufffd" else tokenizer.encode(text) * 100
    detokenizer = Detokenizer(tokenizer)
    shown = detokenizer.push_all(run)
    assert len(tokenizer.decode(run)) - len(shown) <= MAX_HELD_BACK
    assert shown + detokenizer.flush() == tokenizer.decode(run)


@settings(deadline=None)
@given(text=st.text("ab é日🦊", max_size=30).map(str.strip))
def test_characters_of_several_byte_fallback_tokens_come_whole(fallback_tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(fallback_tokenizer)
    pieces = [detokenizer.push(token_id) for token_id in fallback_tokenizer.encode(text.replace(" ", "▁"))]
    assert not any("�" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 262), max_size=40))
def test_no_order_of_byte_fallback_tokens_breaks_the_stream(fallback_tokenizer: Tokenizer, ids: list[int]) -> None:
    detokenizer = Detokenizer(fallback_tokenizer)
    text = "".join(detokenizer.push(token_id) for token_id in ids) + detokenizer.flush()
    num_letters = sum(token_id in (257, 258) for token_id in ids)
    assert sum(text.count(letter) for letter in "ab") >= num_letters


@settings(deadline=None)
@given(text=st.text(max_size=30))
def test_no_piece_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token_id) for token_id in tokenizer.encode(text)]
    assert "�" in text or not any("�" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


def test_an_output_cut_within_a_character_flushes_what_there_is(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦊")[:-1]
    assert OutputAssembler(tokenizer).push(ids, finished=True).text == "a�"


@settings(deadline=None)
@given(
    words=st.lists(st.sampled_from(["a", "ab", "aba", "ST", "STOP", "é", "日本", "🦊", " x"]), max_size=12),
    stop=st.lists(st.sampled_from(["STOP", "ab", "bab", "本 ", "🦊a", "x"]), max_size=3),
    cuts=cuts(),
    min_new_tokens=st.integers(0, 8),
    keep_stop=st.booleans(),
)
def test_stop_strings_do_not_depend_on_how_tokens_arrive(
    tokenizer: Tokenizer, words: list[str], stop: list[str], cuts: list[int], min_new_tokens: int, keep_stop: bool
) -> None:
    ids = token_ids(tokenizer, *words)

    def run(pieces: list[list[int]]) -> tuple[str, str | None, int]:
        return assemble(
            OutputAssembler(tokenizer, stop=stop, min_new_tokens=min_new_tokens, keep_stop=keep_stop), pieces
        )

    text, found, used = run(cut(ids, cuts))
    assert (text, found, used) == run([ids])
    if found is None:
        assert text == tokenizer.decode(ids)
        assert used == len(ids)
    else:
        assert tokenizer.decode(ids).startswith(text if keep_stop else text + found)
        assert found in tokenizer.decode(ids[:used])
        assert found not in tokenizer.decode(ids[: used - 1]) or min_new_tokens
    if min_new_tokens == 0 and not keep_stop:
        assert not any(word in text for word in stop)


def test_a_stop_across_pushes_is_held_back_until_it_is_certain(tokenizer: Tokenizer) -> None:
    assembler = OutputAssembler(tokenizer, stop=["STOP"])
    assert assembler.push(token_ids(tokenizer, "a ST"), False) == TextDelta(
        "a ", num_tokens=len(tokenizer.encode("a ST"))
    )
    delta = assembler.push(token_ids(tokenizer, "OP", " more"), False)
    assert (delta.text, delta.stopped, delta.stop) == ("", True, "STOP")
    assert delta.num_tokens == len(tokenizer.encode("OP"))
    assert assembler.push(token_ids(tokenizer, "more"), True) == TextDelta("", stopped=True)


def test_what_was_held_back_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    assembler = OutputAssembler(tokenizer, stop=["STOP"])
    assert assembler.push(token_ids(tokenizer, "a STO"), False).text == "a "
    assert assembler.push([], True).text == "STO"


def test_a_kept_stop_string_ends_the_text(tokenizer: Tokenizer) -> None:
    delta = OutputAssembler(tokenizer, stop=["STOP"], keep_stop=True).push(token_ids(tokenizer, "a STOP here"), True)
    assert (delta.text, delta.stop) == ("a STOP", "STOP")


def test_stop_strings_of_the_first_tokens_do_not_count(tokenizer: Tokenizer) -> None:
    ids = token_ids(tokenizer, "STOP", "a", "STOP", "b")
    before = len(tokenizer.encode("STOP"))
    assembler = OutputAssembler(tokenizer, stop=["STOP"], min_new_tokens=before + 1)
    assert assemble(assembler, [ids]) == ("STOPa", "STOP", len(ids) - 1)


def test_special_tokens_show_on_request(tokenizer: Tokenizer) -> None:
    ids = token_ids(tokenizer, "a<|user|>b")
    assert OutputAssembler(tokenizer).push(ids, True).text == "ab"
    assert OutputAssembler(tokenizer, skip_special_tokens=False).push(ids, True).text == "a<|user|>b"


def test_a_special_token_can_be_within_a_stop_string(tokenizer: Tokenizer) -> None:
    assembler = OutputAssembler(tokenizer, stop=["x<|user|>"], skip_special_tokens=False)
    assert assemble(assembler, [[token_id] for token_id in token_ids(tokenizer, "ax<|user|>b")])[:2] == (
        "a",
        "x<|user|>",
    )
