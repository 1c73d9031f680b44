"""Where a forward computes, and that its float32 is float32: torch's coarser ways are turned off, whoever chose them.

On NVIDIA's GPUs torch takes TF32 (10 bits of mantissa) for convolutions unless it is told not to, and for products
where the environment or other code allowed it; on processors with AMX it may take bfloat16 likewise.
"""

from __future__ import annotations

import torch

from diffharness.errors import SettingsError


def usable(device: str) -> torch.device:
    """The device of that name, on which float32 stays float32; SettingsError if torch cannot use it."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError) as error:
        said = str(error).partition("\n")[0].partition(". ")[0]
        raise SettingsError(
            f"expected a device that torch can use, found {device!r}: {said}", hint="cpu always works"
        ) from error
    keep_float32()
    return found


def keep_float32() -> None:
    """No TF32 and no bfloat16 inside of float32 products and convolutions, in this process from here on.

    Products of bfloat16 keep their sums in float32, too.
    """
    cuda, cudnn, cpu = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    cuda.allow_tf32 = cudnn.allow_tf32 = False
    cuda.allow_bf16_reduced_precision_reduction = False
    # Since 2.9 each kind of operation has a word of its own, by default that of the whole of torch. The switches above
    # are set all the same, as torch refuses to tell them where the two disagree.
    kinds = [cuda, *(getattr(of, kind, None) for of in (cudnn, cpu) for kind in ("conv", "rnn", "matmul"))]
    for kind in kinds:
        if kind is not None and hasattr(kind, "fp32_precision"):
            kind.fp32_precision = "ieee"
