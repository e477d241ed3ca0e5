"""Files of tensors that may come from elsewhere."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch


def load_tensors(source: Path | bytes, name: Path | str) -> Any:
    """What ``torch.load`` finds without running code, on the CPU.

    Args:
        source: a file, or what one holds.
        name: of it, for the message.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, or holds other things than tensors and plain values.
    """
    try:
        file = source if isinstance(source, Path) else io.BytesIO(source)
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged archive makes torch raise almost anything
        reason = type(error).__name__
        raise ValueError(f"{name} is damaged, or holds other things than tensors ({reason}).") from error
