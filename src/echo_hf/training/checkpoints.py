"""The checkpoints of a run: the newest whole one, whether it can be read, what failed when it was saved."""

import errno
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoint import check_safetensors, read_json

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def numbered_checkpoints(output_dir: str | Path) -> list[Path]:
    """All `checkpoint-<step>` folders in `output_dir`, complete or not, in the order of their steps."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = [path for path in Path(output_dir).glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)))


def find_last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete `checkpoint-<step>` folder in `output_dir`, if there is one. A run that was killed while it
    saved leaves a folder without a readable `trainer_state.json`, which is written last."""
    found = reversed(numbered_checkpoints(output_dir))
    return next((path for path in found if is_json(path / TRAINER_STATE_NAME)), None)


def is_json(path: Path) -> bool:
    """Whether there is a file that holds JSON."""
    try:
        read_json(path)
    except (OSError, ValueError):
        return False
    return True


def check_checkpoint(folder: Path) -> None:
    """
    Checks that what a run is resumed from can be read, before anything is computed.

    Raises:
        `ValueError`: a file is missing or cut off; the message names it, and the checkpoint to go on from without it.
    """
    if not any((folder / name).is_file() for name in ("optimizer.pt", "optimizer.bin")):  # the latter of FSDP
        raise ValueError(
            f"{folder} has no optimizer.pt, as after save_only_model, so that training cannot go on where it was."
            " Start a new run from its weights: --model_name_or_path."
        )
    try:
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise ValueError(f"{folder} has no weights (*.safetensors).")
        for path in weights:
            check_safetensors(path)
        for path in sorted(folder.glob("*.json")):
            read_json(path)
        names = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state*.pth")  # random states: one a process
        for path in sorted(path for name in names for path in folder.glob(name)):
            if not zipfile.is_zipfile(path):  # PyTorch's files are archives, whose index comes last
                raise ValueError(f"{path} is cut off or damaged.")
    except ValueError as error:
        raise ValueError(
            f"{error} Nothing was changed. To go on from an earlier checkpoint, delete {folder} and resume again."
        ) from error


@contextmanager
def explained_write_errors(output_dir: str | Path) -> Iterator[None]:
    """
    What is done within may fail to write into `output_dir`, and then says what was not saved and how to go on. The
    unfinished folder of a checkpoint is removed: it is of no use, and in the way on a full disk.

    Raises:
        `OSError`: the disk is full, or cannot be written to. Other errors pass through.
    """
    try:
        yield
    except Exception as error:
        if not is_write_error(error):
            raise
        last = find_last_checkpoint(output_dir)
        unfinished = [path for path in numbered_checkpoints(output_dir) if not is_json(path / TRAINER_STATE_NAME)]
        for path in unfinished:
            shutil.rmtree(path, ignore_errors=True)
        kept = f"{last.name} is whole" if last else "there is no checkpoint yet"
        raise OSError(
            f"{unfinished[-1] if unfinished else output_dir} could not be saved: {error}. Is the disk full? Make room,"
            f" then use --resume; {kept}."
        ) from error


def is_write_error(error: Exception) -> bool:
    """Whether an error says that a disk could not be written to. Safetensors and PyTorch have errors of their own."""
    if isinstance(error, HfHubHTTPError):  # an OSError too
        return False
    if isinstance(error, OSError):
        return error.errno in WRITE_ERRORS
    return isinstance(error, SafetensorError) or any(
        name in str(error) for name in ("PytorchStreamWriter", "inline_container")
    )


__all__ = ["check_checkpoint", "find_last_checkpoint"]
