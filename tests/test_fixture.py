"""Fixtures: llama-perplexity's protocol, what is refused, and files that are whole or absent."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffharness import fixture as fx
from diffharness.errors import FixtureError, OutputError
from diffharness.fixture import Fixture, first_difference, from_ids, from_text

BOS = 99


def encode_with_bos(text: str) -> list[int]:
    """A toy tokenizer: BOS, then one id for every character."""
    return [BOS, *(ord(c) % 90 for c in text)]


def encode_plain(text: str) -> list[int]:
    return [ord(c) % 90 for c in text]


def written(tmp_path: Path, **changes: Any) -> Path:
    """A fixture file with some keys changed (None removes)."""
    data: dict[str, Any] = {"schema": fx.SCHEMA, "name": "t", "ids": list(range(20)), "chunk": 8, **changes}
    path = tmp_path / "f.json"
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    return path


# -- the protocol ---------------------------------------------------------------------------------------


def perplexity_protocol(n_tokens: int, n_ctx: int) -> list[int]:
    """Scored rows as llama.cpp's tools/perplexity counts them, whole chunks only."""
    rows: list[int] = []
    for chunk in range(n_tokens // n_ctx):
        first = n_ctx // 2
        rows += [chunk * n_ctx + first + i for i in range(n_ctx - first - 1)]
    return rows


@given(st.integers(3, 40), st.integers(1, 6))
def test_whole_chunks_are_scored_as_llama_perplexity_does(chunk: int, n_chunks: int) -> None:
    fixture = from_ids(range(chunk * n_chunks), chunk=chunk)
    assert fixture.scored_positions().tolist() == perplexity_protocol(chunk * n_chunks, chunk)
    assert fixture.next_ids().tolist() == [row + 1 for row in perplexity_protocol(chunk * n_chunks, chunk)]


def test_the_default_scores_255_of_each_512() -> None:
    fixture = from_ids(range(1024))
    scored = fixture.scored_positions()
    assert len(scored) == 2 * 255
    assert (scored[0], scored[254], scored[255]) == (256, 510, 768)


def test_a_short_fixture_is_one_chunk_scored_in_its_second_half() -> None:
    fixture = from_ids(range(9))
    assert [c.tolist() for c in fixture.chunks()] == [list(range(9))]
    assert fixture.scored_positions().tolist() == [4, 5, 6, 7]


def test_the_last_chunk_may_be_short_and_a_single_token_is_dropped() -> None:
    assert [len(c) for c in from_ids(range(20), chunk=8).chunks()] == [8, 8, 4]
    assert from_ids(range(20), chunk=8).scored_positions().tolist() == [4, 5, 6, 12, 13, 14, 18]
    dropped = from_ids(range(17), chunk=8)
    assert [len(c) for c in dropped.chunks()] == [8, 8]
    assert dropped.n_tokens == 16
    assert from_ids(range(18), chunk=8).n_tokens == 18


def test_bos_replaces_the_first_token_of_each_chunk_and_no_target() -> None:
    fixture = from_ids(range(20), chunk=8, bos_id=BOS)
    chunks = fixture.chunks()
    assert [c[0] for c in chunks] == [BOS] * 3
    assert [c[1:].tolist() for c in chunks] == [list(range(1, 8)), list(range(9, 16)), list(range(17, 20))]
    assert BOS not in fixture.next_ids()
    assert fixture.ids == tuple(range(20))
    assert np.array_equal(np.concatenate(chunks), fixture.input_ids())


@given(st.integers(2, 12), st.integers(3, 60))
def test_chunks_cover_the_rows_and_no_scored_row_ends_one(chunk: int, n: int) -> None:
    try:
        fixture = from_ids(range(n), chunk=chunk)
    except FixtureError:
        assert chunk == 2  # the second of two tokens has no successor
        return
    joined = np.concatenate(fixture.chunks())
    assert joined.tolist() == list(range(fixture.n_tokens))
    assert n - fixture.n_tokens in (0, 1)
    ends = {end - 1 for _, end in fixture.chunk_bounds()}
    scored = fixture.scored_positions()
    assert not ends & set(scored.tolist())
    assert (np.diff(scored) > 0).all()
    assert all(2 <= len(c) <= chunk for c in fixture.chunks())


# -- first(n) and other variants ------------------------------------------------------------------------


def test_first_takes_the_beginning_and_scores_its_second_half() -> None:
    whole = from_text("abcdefghijklmnopqrstuvwxyz", encode_with_bos, name="t", chunk=16)
    part = whole.first(10)
    assert part.ids == whole.ids[:10]
    assert part.scored_positions().tolist() == [5, 6, 7, 8]
    assert (part.adds_bos, part.bos_id) == (True, BOS)
    assert not part.whole_text
    assert part.text == whole.text
    assert whole.first(len(whole.ids)) is whole


def test_first_over_several_chunks_keeps_their_size() -> None:
    assert [len(c) for c in from_ids(range(40), chunk=8).first(20).chunks()] == [8, 8, 4]


def test_first_keeps_scored_positions_given_by_hand() -> None:
    fixture = Fixture(name="t", ids=tuple(range(20)), chunk=8, scored=(1, 5, 12, 18))
    assert fixture.first(14).scored == (1, 5, 12)
    assert fixture.first(13).scored == (1, 5)  # nothing follows 12 any more
    assert fixture.first(9).scored == (1, 5)
    with pytest.raises(FixtureError, match="empty"):
        fixture.first(2)


@pytest.mark.parametrize("n", [21, 1, 0, -3])
def test_first_refuses_what_there_is_not(n: int) -> None:
    with pytest.raises(FixtureError, match=r"21 tokens were asked for|at least 2"):
        from_ids(range(20)).first(n)


def test_rechunked() -> None:
    assert [len(c) for c in from_ids(range(20)).rechunked(6).chunks()] == [6, 6, 6, 2]


# -- making ---------------------------------------------------------------------------------------------


def test_from_text_finds_out_whether_bos_is_added() -> None:
    with_bos = from_text("hello", encode_with_bos, name="t")
    assert (with_bos.adds_bos, with_bos.bos_id, with_bos.ids[0]) == (True, BOS, BOS)
    plain = from_text("hello", encode_plain, name="t")
    assert (plain.adds_bos, plain.bos_id, len(plain.ids)) == (False, None, 5)
    assert plain.text_sha256 == hashlib.sha256(b"hello").hexdigest()


def test_a_token_added_only_at_the_end_is_no_bos() -> None:
    fixture = from_text("hello", lambda text: [*encode_plain(text), 98], name="t")
    assert not fixture.adds_bos


def test_ids_sha256_is_of_int32() -> None:
    assert from_ids([1, 2, 3]).ids_sha256 == hashlib.sha256(bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0])).hexdigest()


# -- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": []}, "0 tokens; at least 2"),
        ({"ids": [5]}, "1 token; at least 2"),
        ({"ids": [1, 2, -3, 4]}, "id -3 at position 2"),
        ({"ids": [1, 2, 2**31]}, "id 2147483648 at position 2"),
        ({"ids": [1, 2.5, 3]}, r"ids\.1"),
        ({"ids": [1, True, 3]}, r"ids\.1"),
        ({"ids": "123"}, "ids"),
        ({"ids": None}, "ids: Field required"),
        ({"ids": [1, 2]}, "no position is scored"),
        ({"chunk": 2}, "no position is scored"),
        ({"chunk": 1}, "chunks of 1"),
        ({"chunk": 0}, "chunks of 0"),
        ({"chunk": -5}, "chunks of -5"),
        ({"chunk": "8"}, "chunk"),
        ({"scored": []}, "empty"),
        ({"scored": [3, 20]}, "20 lies outside of its 20 tokens"),
        ({"scored": [-1]}, "-1 lies outside"),
        ({"scored": [7]}, "7 is the last of its chunk"),
        ({"scored": [19]}, "19 is the last of its chunk"),
        ({"scored": [3, 3]}, "found 3 after 3"),
        ({"scored": [5, 4]}, "found 4 after 5"),
        ({"text": "abc"}, "text_sha256 says None"),
        ({"text": "abc", "text_sha256": "0" * 64}, "the text was edited"),
        ({"text": "\ud800", "text_sha256": "0" * 64}, "surrogate"),
        ({"adds_bos": True}, "bos_id is None"),
        ({"adds_bos": True, "bos_id": -1}, "bos_id is -1"),
        ({"schema": "diffharness.fixture/2"}, "expected 'diffharness.fixture/1'"),
        ({"schema": None}, "schema None"),
        ({"surprise": 1}, "surprise"),
        ({"tokenizer_kind": "spm"}, "tokenizer_kind"),
    ],
)
def test_a_bad_fixture_file_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FixtureError, match=message):
        fx.load_fixture(written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "schema None"),
        (b"GGUF\x03\x00\x00\x00", "not JSON"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(FixtureError, match=message):
        fx.load_fixture(path)


def test_a_file_that_is_too_big_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    with path.open("wb") as file:
        file.truncate(fx.MAX_FILE_BYTES + 1)  # sparse
    with pytest.raises(FixtureError, match="at most"):
        fx.load_fixture(path)
    with pytest.raises(FixtureError, match="at most"):
        fx.read_text(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(FixtureError, match="cannot read"):
            fx.load_fixture(path)


def test_texts_must_be_utf8_and_not_empty(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(FixtureError, match="not UTF-8: byte 3"):
        fx.read_text(path)
    path.write_bytes(b"")
    with pytest.raises(FixtureError, match="empty"):
        fx.read_text(path)
    path.write_bytes("café\r\n".encode())
    assert fx.read_text(path) == "café\r\n"


def test_check_vocab_names_the_first_offender() -> None:
    fixture = from_ids([1, 2, 50, 3, 60])
    fixture.check_vocab(61)
    with pytest.raises(FixtureError, match=r"id 50 at position 2 .* 40 tokens \(2 such ids\)"):
        fixture.check_vocab(40)
    with pytest.raises(FixtureError, match="BOS id 99"):
        from_ids(range(9), bos_id=BOS).check_vocab(50)


def test_check_context() -> None:
    fixture = from_ids(range(20), chunk=512)
    fixture.check_context(20)
    with pytest.raises(FixtureError, match="chunks of 20 tokens, the model's context holds 19"):
        fixture.check_context(19)
    with pytest.raises(FixtureError, match="holds 0") as error:
        fixture.check_context(0)
    assert error.value.hint is None  # no --tokens could help
    from_ids(range(20), chunk=8).check_context(8)


def test_check_tokenizer_says_which_one_it_was_made_with() -> None:
    fixture = from_text(
        "hello",
        encode_plain,
        name="t",
        tokenizer_kind="tokenizer.json",
        tokenizer_sha256="a" * 64,
        provenance={"tokenizer": "Alpha/tokenizer.json"},
    )
    fixture.check_tokenizer("tokenizer.json", "a" * 64, "Alpha")
    fixture.check_tokenizer("gguf", "b" * 64, "another kind has another hash")
    with pytest.raises(FixtureError, match=r"made with the tokenizer Alpha/tokenizer.json \(SHA-256 aaaa.*Beta has"):
        fixture.check_tokenizer("tokenizer.json", "b" * 64, "Beta")
    from_ids(range(9)).check_tokenizer("tokenizer.json", "b" * 64, "ids have no tokenizer")


# -- files ------------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    fixture = from_text("naïve — “text” 20°\r\n", encode_with_bos, name="t", chunk=8, provenance={"by": "é"})
    fx.save_fixture(fixture, tmp_path / "f.json")
    assert fx.load_fixture(tmp_path / "f.json") == fixture
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]
    data = json.loads((tmp_path / "f.json").read_text("utf-8"))
    assert data["schema"] == fx.SCHEMA


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        fx.save_fixture(from_ids(range(9)), tmp_path / "taken")
    with pytest.raises(OutputError, match="cannot write"):
        fx.save_fixture(from_ids(range(9)), tmp_path / "no" / "folder" / "f.json")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_names_resolve_to_shipped_texts_and_fixtures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "plain.txt").write_text("some words")
    fx.save_fixture(from_ids(range(9), name="made"), tmp_path / "made.json")
    monkeypatch.setattr(fx.files, "fixtures_dir", lambda: tmp_path)
    assert fx.known_names() == ["made", "plain"]
    assert fx.load_fixture(fx.resolve("made")).name == "made"
    assert fx.text_path("plain") == tmp_path / "texts" / "plain.txt"
    assert fx.resolve("plain") == fx.text_path("plain")
    assert fx.resolve(str(tmp_path / "made.json")) == tmp_path / "made.json"
    for bad in ("nothing", "../made", "texts/plain"):
        with pytest.raises(FixtureError, match=r"neither a file .*known: made, plain"):
            fx.resolve(bad)
    with pytest.raises(FixtureError, match="no text named 'made'"):
        fx.text_path("made")


def test_the_shipped_english_text() -> None:
    raw = fx.text_path("english").read_bytes()
    text = raw.decode("utf-8")
    assert len(text.split()) >= 6000
    assert b"\r" not in raw
    lines = [line for line in text.splitlines() if len(line) > 40]
    assert len(set(lines)) == len(lines), "the text is meant not to repeat itself"


# -- differences ------------------------------------------------------------------------------------------


def piece(token: int) -> str:
    return f"<{token}>"


def test_first_difference() -> None:
    found = first_difference([1, 2, 3, 4, 5], [1, 2, 9, 4, 5, 6], piece, context=2)
    assert found is not None
    assert (found.position, found.id_a, found.id_b) == (2, 3, 9)
    assert (found.piece_a, found.piece_b) == ("<3>", "<9>")
    assert found.before == ("<1>", "<2>")
    assert (found.after_a, found.after_b) == (("<3>", "<4>"), ("<9>", "<4>"))
    assert (found.n_a, found.n_b) == (5, 6)


def test_the_same_ids_do_not_differ() -> None:
    assert first_difference([1, 2], (1, 2), piece) is None
    assert first_difference([], [], piece) is None


def test_an_end_is_a_difference() -> None:
    found = first_difference([1, 2, 3], [1, 2], piece)
    assert found is not None
    assert (found.position, found.id_a, found.id_b, found.piece_b) == (2, 3, None, None)


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_everything_before_the_first_difference_is_shared(a: list[int], b: list[int]) -> None:
    found = first_difference(a, b, piece)
    if found is None:
        assert a == b
    else:
        assert a[: found.position] == b[: found.position]
        assert (found.id_a, found.id_b) != (None, None)
        assert found.id_a != found.id_b
