"""Checkpoints: an AIR's parameters and, of a run, all that it needs to be resumed.

A checkpoint holds tensors and plain values only. Nothing in it is unpickled to code, and nothing is
taken on trust: what is not a checkpoint of this AIR raises CheckpointError, with one line that says why.
"""

import io
import os
import zipfile
from pathlib import Path

import torch

from air import AIR
from evaluation import Usual


class CheckpointError(Exception):
    """A checkpoint cannot be read or is not AIR's; the message says what is wrong with it."""


def write_file(path, content: bytes) -> None:
    """Write a file at once or not at all: beside `path`, under a name of this process's own, then renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, air: AIR, **others) -> None:
    """Write the parameters, what is needed to build the same AIR, and `others` (tensors and plain values)."""
    content = io.BytesIO()
    torch.save({"air": air.config, "parameters": air.state_dict(), **others}, content)
    write_file(path, content.getvalue())


def load_air(path) -> AIR:
    """The AIR saved at `path`, a checkpoint or the folder of a run, on the CPU."""
    checkpoint, path = read_checkpoint(path)
    return build_air(checkpoint, path)


def read_checkpoint(path) -> tuple[dict, Path]:
    """The dictionary that `save_checkpoint` wrote at `path`, a file or the folder of a run, and the file's path."""
    path = Path(path, "checkpoint.pt") if os.path.isdir(path) else Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > os.path.getsize(path):
                raise CheckpointError(f"{path} is not a checkpoint: it claims to hold more than its size")
            damaged = archive.testzip()  # PyTorch itself does not look at the checksums.
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged: {damaged} does not have its checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no such checkpoint: {path}") from None
    except CheckpointError:
        raise
    except Exception as error:  # Whatever else goes wrong in reading, the file is at fault.
        reason = str(error).strip() or type(error).__name__
        raise CheckpointError(f"{path} is not a checkpoint: {reason.splitlines()[0]}") from None
    if not isinstance(checkpoint, dict) or not {"air", "parameters"} <= checkpoint.keys():
        raise CheckpointError(f"{path} is not a checkpoint of AIR: it has no 'air' and 'parameters'")
    return checkpoint, path


def build_air(checkpoint: dict, path="checkpoint") -> AIR:
    """The AIR of a checkpoint, on the CPU. `path` is only for messages."""
    try:
        config, parameters = checkpoint["air"], checkpoint["parameters"]
        # Without memory at first: a file could claim any size.
        with torch.device("meta"):
            expected = AIR(**config).state_dict()
        for name in expected.keys() | parameters.keys():
            shapes = [list(tensors[name].shape) for tensors in (expected, parameters)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{name} has shape {shapes[1]}, expected {shapes[0]}")
        stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters.values()}
        if sum(p.nbytes for p in parameters.values()) > sum(stored.values()):
            raise ValueError("its parameters share their numbers")
        for name, parameter in parameters.items():
            if not (parameter.is_floating_point() and parameter.isfinite().all()):
                raise ValueError(f"{name} is not finite")
        air = AIR(**config)
        air.load_state_dict(parameters)
    except KeyError as error:
        raise CheckpointError(f"{path} is not a checkpoint of this AIR: one of the two has no {error}") from None
    except Exception as error:  # Whatever else goes wrong, the file is at fault.
        raise CheckpointError(f"{path} is not a checkpoint of this AIR: {' '.join(str(error).split())}") from None
    return air


def read_usual(checkpoint: dict, path="checkpoint") -> Usual | None:
    """What is usual to the AIR of a checkpoint; None if it was saved before any evaluation."""
    saved = checkpoint.get("usual")
    try:
        return None if saved is None else Usual(**{name: float(saved[name]) for name in Usual._fields})
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError):
        raise CheckpointError(f"{path} does not say what is usual: {saved!r:.100}") from None
