"""float32 stays float32: what building a reference leaves torch's settings at, without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diffharness.errors import SettingsError
from diffharness.reference.device import usable

SHOWN = """
import torch
{before}
parts = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
parts += [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv]
print(*(part.fp32_precision for part in parts))
from diffharness.reference.runner import Reference
from tests.reference.random_source import LLAMA, RandomSource
Reference(RandomSource(LLAMA))
print(*(part.fp32_precision for part in parts))
print(torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
print(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)
"""
COARSE = {
    "by default": ("", ""),
    "by the old switches": ("torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True", ""),
    "by the new switch": ("torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = 'tf32'", ""),
    "by one word, and the environment": ("torch.set_float32_matmul_precision('medium')", "1"),
}


@pytest.mark.parametrize("how", COARSE)
def test_building_a_reference_turns_coarser_products_off(how: str) -> None:
    """In another process, in which nothing else was set."""
    before, override = COARSE[how]
    done = subprocess.run(
        [sys.executable, "-c", SHOWN.format(before=before)],
        capture_output=True, text=True,
        env={"PYTHONPATH": ":".join(sys.path), "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": override},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    coarse, *exact = done.stdout.splitlines()
    assert "tf32" in coarse or "bf16" in coarse  # torch alone takes it, at least for convolutions
    assert exact == ["ieee ieee ieee ieee ieee", "False False", "False"]


@pytest.mark.parametrize("name", ["nonsense", "meta"])  # meta computes shapes and no values
def test_a_device_that_is_not_there(name: str) -> None:
    assert usable("cpu").type == "cpu"
    with pytest.raises(SettingsError, match=f"found '{name}'"):
        usable(name)
