"""Checkpoints: an AIR's parameters and, of a run, all that it needs to be resumed; tensors and plain values only.

What is damaged, or is not a checkpoint of this AIR, raises DataError, with one line that says why.
"""

import io
import os
import zipfile
from pathlib import Path

import torch

from air import AIR
from evaluation import ReferenceStats
from multi_mnist import DataError, one_line


def write_file(path: Path, content: bytes) -> None:
    """Write a file at once or not at all: beside `path` first, where one that was killed may have left a part of it."""
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, air: AIR, **others) -> None:
    """Write the parameters, what is needed to build the same AIR, and `others` (tensors and plain values)."""
    content = io.BytesIO()
    torch.save({"air": air.config, "parameters": air.state_dict(), **others}, content)
    write_file(path, content.getvalue())


def load_air(path) -> AIR:
    """The AIR saved at `path`, a checkpoint or the folder of a run, on the CPU."""
    return build_air(*read_checkpoint(path))


def read_checkpoint(path) -> tuple[dict, Path]:
    """The dictionary that `save_checkpoint` wrote at `path`, a file or the folder of a run, and the file's path."""
    path = Path(path, "checkpoint.pt") if os.path.isdir(path) else Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # PyTorch itself does not look at the checksums.
        if damaged is not None:
            raise ValueError(f"{damaged} does not have its checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not {"air", "parameters"} <= checkpoint.keys():
            raise ValueError("it has no 'air' and 'parameters'")
    except FileNotFoundError:
        raise DataError(f"no such checkpoint: {path}") from None
    except Exception as error:  # Whatever else goes wrong in reading, the file is at fault.
        raise DataError(f"{path} is damaged or not a checkpoint: {one_line(error)}") from None
    return checkpoint, path


def build_air(checkpoint: dict, path="checkpoint") -> AIR:
    """The AIR of a checkpoint, on the CPU. `path` is only for messages."""
    try:
        air = AIR(**checkpoint["air"])
        air.load_state_dict(checkpoint["parameters"])
        for name, value in air.state_dict().items():
            if not value.isfinite().all():
                raise ValueError(f"{name} is not finite")
    except Exception as error:  # Whatever goes wrong, the file is at fault.
        raise DataError(f"{path} is not a checkpoint of this AIR: {one_line(error)}") from None
    return air


def read_reference(checkpoint: dict, path="checkpoint") -> ReferenceStats | None:
    """What is ordinary to the AIR of a checkpoint; None if its run was not finished."""
    saved = checkpoint.get("reference")
    if saved is None:
        return None
    try:
        return ReferenceStats(**{name: value and float(value) for name, value in saved.items()})
    except Exception:  # Whatever goes wrong, the file is at fault.
        raise DataError(f"{path} has no readable 'reference': {saved!r:.100}") from None
