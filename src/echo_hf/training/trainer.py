"""[`EchoTrainer`]: a `Seq2SeqTrainer` with what Echo's training would lose work or get wrong results without.

Each method that it overrides says what would break without it.
"""

import copy
import inspect
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import DistributedLengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, has_length
from transformers.utils import logging
from transformers.utils.hub import hf_api

from ..checkpoint import check_fit
from ..configuration_echo import EchoConfig
from ..data.collator import EchoDataCollator
from ..processing_echo import EchoProcessor
from .model_card import TRAINING_ARGUMENTS_FILE, CardArguments, write_model_card

logger = logging.get_logger(__name__)

PICKLES = [f"*{suffix}" for suffix in (".bin", ".pt", ".pth", ".pkl")]  # nothing of such a name is ever pushed


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
        if given.get("args") is not None:
            check_hub_strategy(given["args"])
        processor, config = given.get("processing_class"), getattr(given.get("model"), "config", None)
        if isinstance(processor, EchoProcessor) and isinstance(config, EchoConfig):
            check_fit(processor, config)  # a token too many is an "index out of range" in the middle of training
        super().__init__(*args, **kwargs)
        self.card_arguments = card_arguments or CardArguments()
        self.train_collator = train_collator or self.data_collator
        draws = isinstance(self.train_collator, EchoDataCollator) and self.train_collator.draws
        if draws and self.args.dataloader_persistent_workers:
            raise ValueError(
                "dataloader_persistent_workers: processes that outlive an epoch would change the next one alike; leave"
                " it out."
            )
        if draws and not (self.train_dataset is not None and has_length(self.train_dataset)):
            self.train_collator.epoch = None
        self.add_callback(EpochCallback(self))
        if self.args.push_to_hub and self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            # The Trainer's own way to push while it trains would write and push its pickled arguments.
            self.args = copy.copy(self.args)
            self.args.hub_strategy = HubStrategy.END
            self.add_callback(PushCallback(self))

    def get_train_dataloader(self):
        """With the collator of training: else evaluation would be perturbed as training is, or neither would be."""
        collator, self.data_collator = self.data_collator, self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

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
        self.train_sampler = DistributedLengthGroupedSampler(
            settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size,
            dataset=dataset,
            num_replicas=1,  # accelerate shares its batches out
            rank=0,
            seed=settings.seed if settings.data_seed is None else settings.data_seed,
            lengths=dataset[column][:] if has_column else None,
            model_input_name=self.model.main_input_name,
        )
        return self.train_sampler

    def _run_epoch(self, *args, **kwargs):
        """None, after the last step: the Trainer asks after a step whether it was the last, so that a run resumed after
        its last, where that is not an epoch's too, would take another and end with other weights."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        """Each utterance counts once. Several processes fill their last batches with utterances they had before, and
        `Seq2SeqTrainer` gathers these too, so that an error in one of them would count twice."""
        self.gather_function = partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Saves no pickle: the Trainer's arguments hold the token for the Hub, and would be pushed with it."""
        if type(self.model).__module__.startswith("torch.distributed."):
            # FSDP2 changes the model's class to one that PyTorch defines; its files would be saved as the model's code.
            type(self.model)._auto_class = None
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            (folder / TRAINING_ARGUMENTS_FILE).write_text(self.args.to_json_string() + "\n", encoding="utf-8")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

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
        run left there. The Trainer's own card, which `push_to_hub` writes, would overwrite it and know no error counts.
        A `README.md` written by hand is left as it is.

        Args:
            language, license, tags, model_name, finetuned_from, dataset_tags, dataset: as in `Trainer`; win over
                `card_arguments`. `dataset` names the data that was evaluated on.
            tasks, dataset_args: accepted as the Trainer has them, but the task of this model is known, and `dataset`
                takes the whole name.
        """
        if not self.is_world_process_zero():
            return
        given = {
            "card_license": license,
            "card_language": as_list(language),
            "card_datasets": as_list(dataset_tags),
            "card_eval_name": ", ".join(as_list(dataset) or []),
            "card_tags": [*(self.card_arguments.card_tags or []), *(as_list(tags) or [])],
        }
        arguments = replace(self.card_arguments, **{name: value for name, value in given.items() if value})
        write_model_card(self.args.output_dir, arguments, model_name, finetuned_from, self.hub_model_id)


class EpochCallback(TrainerCallback):
    """Tells the epoch to what draws by it: the training collator, before the loader's processes take their copies, and
    the sampler, which accelerate's loaders do not reach in all their forms."""

    def __init__(self, trainer: EchoTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int((state.epoch or 0.0) + 1e-6)  # a run resumed within an epoch is at a fraction
        collator, sampler = self.trainer.train_collator, getattr(self.trainer, "train_sampler", None)
        if isinstance(collator, EchoDataCollator) and collator.epoch is not None:
            collator.epoch = epoch
        if sampler is not None:
            sampler.set_epoch(epoch)


class PushCallback(TrainerCallback):
    """Pushes the model at each saving while training goes on, without what PyTorch pickles. A saving that comes while
    the one before is still being pushed is passed over, unless `hub_always_push`. A push that fails is a warning: what
    is pushed at the end of the run is whole."""

    def __init__(self, trainer: EchoTrainer):
        self.trainer = trainer
        self.jobs: list[Future] = []

    def on_save(self, args, state, control, **kwargs):
        self.jobs = [job for job in self.jobs if not self._is_done(job)]
        if not state.is_world_process_zero or (self.jobs and not args.hub_always_push):
            return
        job = hf_api().upload_folder(
            repo_id=self.trainer.hub_model_id,
            folder_path=Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}",
            commit_message=f"Training in progress, step {state.global_step}",
            token=args.hub_token,
            run_as_future=True,
            ignore_patterns=[*PICKLES, TRAINER_STATE_NAME],
            revision=args.hub_revision,
        )
        self.jobs.append(job)

    def on_train_end(self, args, state, control, **kwargs):
        self.jobs = [job for job in self.jobs if not self._is_done(job, wait=True)]

    def _is_done(self, job: Future, wait: bool = False) -> bool:
        if not (wait or job.done()):
            return False
        if (error := job.exception()) is not None:
            logger.warning(f"The model could not be pushed while it trained: {error}")
        return True


def as_list(value: str | Sequence[str] | None) -> list[str] | None:
    """One name or several as a list; None stays None."""
    return [value] if isinstance(value, str) else list(value) if value is not None else None


def check_hub_strategy(arguments: Seq2SeqTrainingArguments) -> None:
    """
    Raises:
        `ValueError`: the strategy pushes whole checkpoints, and so the state of the optimizer, which is pickled.
    """
    strategy = arguments.hub_strategy
    if arguments.push_to_hub and strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"hub_strategy {strategy.value!r} pushes the state of the optimizer, which is a pickle, and whoever loads a"
            " pickle runs what is in it. Take 'every_save' or 'end'."
        )


__all__ = ["EchoTrainer"]
