from __future__ import annotations

import pytest

from diffharness.errors import SettingsError
from diffharness.pipeline import overrides

TYPES = {"a.base": "FLOAT32", "a.window": "UINT32", "a.heads": "ARRAY[INT32]", "a.flag": "BOOL", "a.name": "STRING"}


def test_overrides_of_the_keys_own_type_pass() -> None:
    fit = ["a.base=float:1e4", "a.window=int:32", "a.flag=bool:true", "a.name=str:x"]
    assert overrides.check(fit, TYPES) == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("a.base=int:5", ("FLOAT32", "a.base=float:VALUE")),
        ("a.window=float:5", ("UINT32", "a.window=int:VALUE")),
        ("a.heads=int:5", ("array",)),
        ("a.base=5", ("KEY=TYPE:VALUE",)),
    ],
)
def test_what_llama_cpp_would_ignore_is_refused(override: str, words: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as error:
        overrides.check([override], TYPES)
    for word in words:
        assert word in str(error.value), word


def test_a_key_that_the_file_lacks_is_noted() -> None:
    [note] = overrides.check(["a.windwo=int:32"], TYPES)
    assert note.kind is None and "a.windwo=int:32" in note.message
