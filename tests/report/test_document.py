"""One document, as a terminal's text and as Markdown: all of it is there, and what a file says steers neither."""

from __future__ import annotations

import pytest

from diffharness.report.document import Document, Section, Table, to_markdown, to_text

TABLE = Table("Worst tensors", ("tensor", "type", "error"), [("blk.0.attn_q.weight", "Q4_K", "1.0e-03")])
DOCUMENT = Document(
    command="inspect",
    outcome="artifact.weights",
    summary="1 of 2 tensors drifted.",
    sections=[
        Section("Subject", pairs=[("artifact", "a.gguf")]),
        Section(tables=[TABLE], words=2, remarks=["only layer 0"]),
    ],
    commands=[("Next", "diffharness restore a.gguf --checkpoint DIR")],
)


@pytest.mark.parametrize("render", [to_text, to_markdown])
def test_everything_is_shown(render: object) -> None:
    text = render(DOCUMENT)  # type: ignore[operator]
    for part in ("artifact.weights", "1 of 2 tensors drifted", "Subject", "a.gguf", "Worst tensors", "1.0e-03"):
        assert part in text
    assert "only layer 0" in text and "diffharness restore a.gguf --checkpoint DIR" in text


def test_numbers_stand_right_and_words_left() -> None:
    lines = to_markdown(DOCUMENT).splitlines()
    assert "| --- | --- | --: |" in lines


def test_a_table_fits_a_hundred_columns() -> None:
    assert max(map(len, to_text(DOCUMENT).splitlines())) <= 100


@pytest.mark.parametrize("width", [100, 110])
def test_no_number_is_cut_off_by_long_words(width: int) -> None:
    row = ("/a/long/folder/with-a-long-name-Q4_K_M.gguf", "ok", *(f"{i}.234e-04" for i in range(6)), "987.6543")
    head = ("artifact", "", "mean KL", "control", "ratio", "limit", "median", "limit", "PPL of control")
    text = to_text(
        Document("grade", "", "", [Section(tables=[Table("", head, [row], numeric=True)], words=2)]), width=width
    )
    assert all(number in text for number in row[2:]) and max(map(len, text.splitlines())) <= width


def test_heads_fold_at_spaces_and_not_within_words() -> None:
    head = ("node", "op", "tensor", "tokens", "NMSE", "floor", "worst row", "its NMSE")
    row = ("Vcur_normed-7", "RMS_NORM F32", "-", "single", "2.2e-14", "1.0e-12", "0", "2.2e-14")
    text = to_text(Document("replay", "", "", [Section(tables=[Table("", head, [row])], words=4)]), width=80)
    assert all(word in text.split() for word in " ".join(head).split()), text
    assert all(word in text.split() for word in " ".join(row).split()), text


def test_a_command_that_judges_nothing_has_no_verdict_line() -> None:
    text = to_text(Document("grade", "", "", [Section(tables=[TABLE])]))
    assert "verdict" not in text and text.strip().startswith("Worst tensors")


def test_pass_and_fail_are_words_of_their_own() -> None:
    assert to_text(Document("gate", "pass", "all rules hold")).splitlines()[0] == "pass"


def test_strings_from_files_steer_nothing() -> None:
    evil = "x\x1b[31m|\u202e`@user"
    document = Document("inspect", "", evil, [Section("t", pairs=[(evil, evil)], remarks=[evil])], [("Next", evil)])
    for text in (to_text(document), to_markdown(document)):
        assert "\x1b" not in text and "\u202e" not in text
    assert "@user" not in to_markdown(document).replace("`x", "").partition("Next")[0]
