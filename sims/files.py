"""Writing results so that a reader never sees half a file."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def write_atomically(path: Path, data: str | bytes) -> Path:
    """Write to a temporary name in the same folder, then replace: the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def plain(value: Any) -> Any:
    """The value as strict JSON: arrays as lists, infinities and NaN as the strings "inf", "-inf", "nan"."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def to_json(value: Any) -> str:
    """Strict JSON text (RFC 8259: no NaN or Infinity)."""
    return json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
