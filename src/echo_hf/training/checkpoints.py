"""The checkpoints of a run: the newest whole one, whether it can be read, what failed when it was saved, their mean."""

import errno
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..checkpoint import check_safetensors, read_json

logger = logging.get_logger(__name__)

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete `checkpoint-<step>` folders in `output_dir`, oldest first. A run that was killed while it saved
    leaves a folder without a readable `trainer_state.json`, which is written last."""
    return [path for path in numbered_checkpoints(output_dir) if is_json(path / TRAINER_STATE_NAME)]


def numbered_checkpoints(output_dir: str | Path) -> list[Path]:
    """All `checkpoint-<step>` folders in `output_dir`, complete or not, in the order of their steps."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = [path for path in Path(output_dir).glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)))


def find_last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete `checkpoint-<step>` folder in `output_dir`, if there is one."""
    return next(reversed(list_checkpoints(output_dir)), None)


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


class CheckpointAveraging(TrainerCallback):
    """Gives the model, at the end of training, the mean of its weights in the last checkpoints, as in Vaswani et al.
    (https://huggingface.co/papers/1706.03762, section 6.1). The weights are read from `output_dir`, so that a run that
    was interrupted and resumed ends where it would have ended.

    Args:
        count (`int`): checkpoints to average, at least 2.

    Where fewer were saved by then, the weights stay as they are, with a warning.

    Raises:
        `ValueError`: there is nothing to average in a single checkpoint.
    """

    def __init__(self, count: int):
        if count < 2:
            raise ValueError(f"average_checkpoints must be 0, or at least 2, got {count}.")
        self.count = count

    def check(self, args):
        """Raises `ValueError` if the settings save no checkpoints, keep fewer, or take the best one instead."""
        if args.save_strategy == "no":
            raise ValueError(f"average_checkpoints is {self.count}, and none are saved; set save_strategy.")
        if args.save_total_limit is not None and args.save_total_limit < self.count:
            raise ValueError(
                f"average_checkpoints is {self.count}, and save_total_limit keeps {args.save_total_limit}; raise it."
            )
        if args.load_best_model_at_end:
            raise ValueError(
                "average_checkpoints and load_best_model_at_end both decide what the weights are at the end; leave one"
                " of them out (--load_best_model_at_end false)."
            )
        if args.save_total_limit == self.count and args.eval_strategy != "no":
            raise ValueError(
                f"average_checkpoints is {self.count}, and of as many as save_total_limit keeps one is the best,"
                f" which may be old; raise it to {self.count + 1}."
            )
        if args.fsdp:
            raise ValueError("average_checkpoints cannot be used with FSDP, which keeps parts of the weights.")

    def on_train_end(self, args, state, control, model=None, **kwargs):
        # The first process alone writes checkpoints, and may not be through with the last.
        with args.main_process_first(local=False, desc="averaging"):
            self._average(args, model)

    def _average(self, args, model):
        folders = list_checkpoints(args.output_dir)[-self.count :]
        if len(folders) < self.count:
            logger.warning(
                f"Not averaged: average_checkpoints is {self.count}, and only {len(folders)} checkpoints were saved in"
                f" {args.output_dir}. The weights are the last ones; save more often (save_steps)."
            )
            return
        weights = [load_file(folder / SAFE_WEIGHTS_NAME) for folder in folders]
        means = {
            name: torch.stack([each[name].double() for each in weights]).mean(0).to(value.dtype)
            for name, value in weights[0].items()
        }
        missing, unexpected = model.load_state_dict(means, strict=False)
        # What is tied is saved under one of its names.
        untied = set(missing) - set(model.all_tied_weights_keys)
        if untied or unexpected:
            raise ValueError(f"{folders[-1]} holds weights of another model: {', '.join([*untied, *unexpected])}.")
        logger.info(f"The weights are the mean of those of {', '.join(folder.name for folder in folders)}.")


__all__ = ["CheckpointAveraging", "check_checkpoint", "find_last_checkpoint", "list_checkpoints"]
