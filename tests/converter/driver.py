"""Runs llama.cpp's own converter on a checkpoint that has no tokenizer.

    python driver.py LLAMA_CPP_FOLDER CHECKPOINT OUTFILE

The converter insists on a tokenizer; the tiny models of the tests have none. It knows how to write
a file without one (`_set_vocab_none`), so each model class is made to do that; all else is its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def main() -> None:
    folder, checkpoint, outfile = sys.argv[1:]
    sys.path.insert(0, str(Path(folder)))
    import convert_hf_to_gguf as converter  # type: ignore[import-not-found]

    find_class = converter.get_model_class

    def without_tokenizer(name: str, *args: Any, **kwargs: Any) -> Any:
        found = find_class(name, *args, **kwargs)
        found.set_vocab = lambda self: self._set_vocab_none()
        return found

    converter.get_model_class = without_tokenizer
    sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outtype", "f32", "--outfile", outfile]
    converter.main()


if __name__ == "__main__":
    main()
