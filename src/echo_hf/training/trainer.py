"""[`EchoTrainer`]: a `Seq2SeqTrainer` with what Echo's training would lose work or get wrong results without."""

import inspect
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from accelerate.data_loader import BatchSamplerShard
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import DistributedLengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, has_length
from transformers.utils import PushInProgress
from transformers.utils.hub import hf_api

from ..checkpoint import check_fit
from ..configuration_echo import EchoConfig
from ..data.collator import EchoDataCollator
from ..processing_echo import EchoProcessor
from .checkpoints import explain_write_error, is_json, is_write_error
from .model_card import TRAINING_ARGUMENTS_FILE, CardArguments, write_model_card

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl")  # nothing of such a name is ever pushed


class EchoTrainer(Seq2SeqTrainer):
    """A `Seq2SeqTrainer` whose training batches have a collator of their own, so that only they are perturbed, and that
    leaves no pickle where a model is shared from.

    The Trainer pickles its arguments, token for the Hub included, into `training_args.bin` beside the weights, and
    pushes it. Here they are in `training_args.json`, without tokens. What it pickles in `checkpoint-<step>` folders to
    resume from (`optimizer.pt`, `scheduler.pt`, `rng_state.pth`) stays there and is never pushed.

    Args:
        train_collator (`Callable`, *optional*): makes a training batch; `data_collator` makes the others, and all if
            not given.
        card_arguments ([`CardArguments`], *optional*): what to say in the model card that cannot be measured.

    Raises:
        `ValueError`: the processor is not the model's; the `hub_strategy` would push the state of the optimizer;
            or batches are perturbed or joined in processes that outlive an epoch.
    """

    def __init__(
        self,
        *args,
        train_collator: EchoDataCollator | None = None,
        card_arguments: CardArguments | None = None,
        **kwargs,
    ):
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        settings = given.get("args")
        if settings is not None and settings.push_to_hub:
            check_hub_strategy(settings)
        processor, config = given.get("processing_class"), getattr(given.get("model"), "config", None)
        if isinstance(processor, EchoProcessor) and isinstance(config, EchoConfig):
            check_fit(processor, config)  # a token too many is an "index out of range" in the middle of training
        super().__init__(*args, **kwargs)
        self.train_collator = train_collator or self.data_collator
        if isinstance(self.train_collator, EchoDataCollator) and self.train_collator.draws:
            if self.args.dataloader_persistent_workers:
                raise ValueError(
                    "dataloader_persistent_workers: processes that outlive an epoch would change the next one alike;"
                    " leave it out."
                )
            if self.train_dataset is not None and has_length(self.train_dataset):
                self.add_callback(_TellEpoch(self.train_collator))
            else:
                self.train_collator.epoch = None
        self.card_arguments = card_arguments or CardArguments()

    def _get_train_sampler(self, train_dataset=None):
        """The Trainer's, but for `group_by_length`: its sampler draws an order from the random state of the process.
        Dropout moves that on at another pace in each process, so that from the second epoch on some utterances would be
        heard twice and some never. Here seed and epoch give the order, the same for any number of processes with the
        same total batch, within which lengths are alike."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        settings = self.args
        if settings.train_sampling_strategy != "group_by_length" or not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        column = settings.length_column_name
        has_column = column in (getattr(dataset, "column_names", None) or [])
        return DistributedLengthGroupedSampler(
            settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size,
            dataset=dataset,
            num_replicas=1,  # accelerate shares its batches out
            rank=0,
            seed=settings.seed if settings.data_seed is None else settings.data_seed,
            lengths=dataset[column][:] if has_column else None,
            model_input_name=self.model.main_input_name,
        )

    def _run_epoch(self, *args, **kwargs):
        # The Trainer asks after a step whether it was the last, so that a run resumed after its last, where that is not
        # an epoch's too, would take another.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def get_train_dataloader(self):
        collator, self.data_collator = self.data_collator, self.train_collator
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = collator
        shard = getattr(loader, "batch_sampler", None)
        if isinstance(shard, BatchSamplerShard):
            # A loader tells the epoch to samplers two layers down, and resuming within an epoch adds a third.
            shard.sampler = shard.batch_sampler.sampler
        return loader

    def evaluation_loop(self, *args, **kwargs):
        # Several processes fill their last batches with utterances they had before. `Seq2SeqTrainer` sets a function
        # that gathers these too, and an error in one of them would count twice.
        self.gather_function = partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )
        return super().evaluation_loop(*args, **kwargs)

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Writes `README.md` into `output_dir`, made by [`~echo_hf.training.model_card.build_model_card`] from what the
        run left there; called by `push_to_hub`. A `README.md` written by hand is left as it is.

        Args:
            language, license, tags, model_name, finetuned_from, dataset_tags, dataset: as in `Trainer`; win over
                `card_arguments`. `dataset` names the data that was evaluated on.
            tasks, dataset_args: accepted as the Trainer has them, but the task of this model is known, and `dataset`
                takes the whole name.
        """
        if not self.is_world_process_zero():
            return
        given = CardArguments(
            card_license=license or self.card_arguments.card_license,
            card_language=as_list(language) or self.card_arguments.card_language,
            card_datasets=as_list(dataset_tags) or self.card_arguments.card_datasets,
            card_eval_name=", ".join(as_list(dataset) or []) or self.card_arguments.card_eval_name,
            card_tags=[*(self.card_arguments.card_tags or []), *(as_list(tags) or [])],
            card_samples=self.card_arguments.card_samples,
        )
        write_model_card(self.args.output_dir, given, model_name, finetuned_from, self.hub_model_id)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if type(self.model).__module__.startswith("torch.distributed."):
            # FSDP2 changes the model's class to one that PyTorch defines; its files would be saved as the model's code.
            type(self.model)._auto_class = None
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            (folder / TRAINING_ARGUMENTS_FILE).write_text(self.args.to_json_string() + "\n", encoding="utf-8")

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if not is_write_error(error):
                raise
            if is_json(folder / TRAINER_STATE_NAME):  # written last: what failed is to copy the model for a push
                raise explain_write_error(error, folder.parent) from error
            # Of no use, and on a full disk in the way.
            shutil.rmtree(folder, ignore_errors=True)
            raise explain_write_error(error, folder) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes the model as it is, while training goes on. The Trainer's own way would pickle its arguments, too."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # Copied, since the checkpoint may be deleted for a newer one before it is uploaded.
        for path in Path(checkpoint_folder).iterdir():
            if path.is_file() and path.suffix not in PICKLE_SUFFIXES and path.name != TRAINER_STATE_NAME:
                shutil.copyfile(path, Path(self.args.output_dir) / path.name)
        job = hf_api().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=self.args.output_dir,
            commit_message=f"Training in progress, step {self.state.global_step}",
            token=self.args.hub_token,
            run_as_future=True,
            ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*", *(f"*{suffix}" for suffix in PICKLE_SUFFIXES)],
            revision=self.args.hub_revision,
        )
        if busy:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])


class _TellEpoch(TrainerCallback):
    """Tells a collator the epoch, before the loader's processes take their copies of it."""

    def __init__(self, collator: EchoDataCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = int((state.epoch or 0.0) + 1e-6)  # a run resumed within an epoch is at a fraction


def as_list(value: str | Sequence[str] | None) -> list[str] | None:
    """One name or several as a list; None stays None."""
    return [value] if isinstance(value, str) else list(value) if value is not None else None


def check_hub_strategy(arguments: Seq2SeqTrainingArguments) -> None:
    """
    Raises:
        `ValueError`: the strategy pushes whole checkpoints, and so the state of the optimizer, which is pickled.
    """
    if arguments.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"hub_strategy {arguments.hub_strategy.value!r} pushes the state of the optimizer, which is a pickle, and"
            " whoever loads a pickle runs what is in it. Take 'every_save' or 'end'."
        )


__all__ = ["EchoTrainer"]
