"""Training from arguments to a finished checkpoint, on top of Transformers' `Seq2SeqTrainer`.

Nothing is trained by hand here: the model's own loss, `generate()` for every word error rate that is reported, and the
Trainer's checkpoints. What this module adds is the preparation: tokenizer, extractor and config that fit each other,
the checks that would otherwise fail late, and one setting that must not reach the Trainer. Its label smoothing computes
the loss from the logits alone, and the CTC part would be lost; so `label_smoothing_factor` goes to the model's config.
"""

import copy
import inspect
import json
import math
import platform
import shutil
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate.data_loader import BatchSamplerShard
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Seq2SeqTrainer
from transformers import Seq2SeqTrainingArguments
from transformers import TrainerCallback
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import DistributedLengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.trainer_utils import HubStrategy
from transformers.trainer_utils import has_length
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils import PushInProgress
from transformers.utils import logging
from transformers.utils.hub import hf_api

from . import __version__
from .augmentation import VoicePerturbation
from .checkpoint import check_fit
from .checkpoint import check_safetensors
from .checkpoint import load_model_and_processor
from .checkpoint import parse_object
from .checkpoint import parse_overrides
from .checkpoint import read_json
from .configuration_echo import BASELINE
from .configuration_echo import PRESETS
from .configuration_echo import SIZES
from .configuration_echo import EchoConfig
from .data import MAX_JOINED_SECONDS
from .data import EchoDataCollator
from .data import PreparedData
from .data import load_sources
from .data import prepare_dataset
from .diagnostics import DiagnosticsCallback
from .diagnostics import require_tensorboard
from .feature_extraction_echo import EchoFeatureExtractor
from .metrics import make_compute_metrics
from .metrics import normalize_text
from .model_card import SUMMARY_FILE
from .model_card import TRAINING_ARGUMENTS_FILE
from .model_card import CardArguments
from .model_card import write_model_card
from .modeling_echo import EchoForConditionalGeneration
from .modeling_echo import ignore_padding
from .modeling_echo import mask_frames
from .non_speech import non_speech_table
from .optimization import describe_muon
from .processing_echo import EchoProcessor
from .tokenization_echo import EchoTokenizer

logger = logging.get_logger(__name__)

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl")  # nothing of such a name is ever pushed
BYTE_VOCABULARY = 259  # 3 special tokens and 256 bytes
TOKEN_UNITS = ("byte", "character", "subword")
WIDTHS = ("encoder_intermediate_size", "decoder_intermediate_size")  # that a checkpoint may be given more of

# What `echo-hf train` sets where the Trainer's own default is meant for fine-tuning a large language model.
TRAINING_DEFAULTS = {
    "num_train_epochs": 30.0,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # a share of all steps, since it is below 1
    "weight_decay": 0.01,
    "logging_steps": 25,
    "save_total_limit": 2,
    "metric_for_best_model": "wer",
    "greater_is_better": False,
    "predict_with_generate": True,
    "train_sampling_strategy": "group_by_length",
    "use_cache": True,  # the Trainer writes it into the config; in training the model keeps no cache, whatever it says
    "remove_unused_columns": False,  # the collator picks; removed, `length` would be measured by reading all features
}


@dataclass
class ModelArguments:
    """What is trained."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Echo checkpoint to start from: a folder, or a name on the Hub. From scratch if not given."},
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": f"Pitch mechanisms that are on, from scratch: {', '.join(PRESETS)}. EchoConfig's own if not given.",
            "choices": list(PRESETS),
        },
    )
    size: str | None = field(
        default=None,
        metadata={
            "help": f"Number of parameters, from scratch: {', '.join(SIZES)}. 10m if not given.",
            "choices": list(SIZES),
        },
    )
    token_unit: str | None = field(
        default=None,
        metadata={
            "help": "What a token is, from scratch: a character of the training text (the default), a byte, or a"
            " subword, for which vocab_size is needed. CTC learns larger units later, and takes at most one a frame.",
            "choices": list(TOKEN_UNITS),
        },
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Most tokens there may be, from scratch: at least 259 (bytes and special tokens)."},
    )
    feature_groups: str | None = field(
        default=None,
        metadata={"help": 'Channels of the features, from scratch, as JSON, e.g. \'{"spectrogram": 80, "pitch": 1}\'.'},
    )
    f0_method: str | None = field(default=None, metadata={"help": "Tracker of F0, from scratch: dio if not given."})
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention to train with, e.g. sdpa (the default) or eager, which is faster on a CPU in bfloat16."
            " The checkpoint does not remember it."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Any other fields of EchoConfig: key=value,key=value, or a JSON object, e.g."
            " dropout=0.1,apply_spec_augment=true."
        },
    )


@dataclass
class DataArguments:
    """What it is trained and evaluated on."""

    _argument_group_name = "data"

    train_data: list[str] = field(
        metadata={
            "help": "Training speech, one source or more: manifests (JSON lines with audio and text), folders (audio"
            " files with .txt beside them, or a metadata.jsonl), datasets on disk or on the Hub."
        }
    )
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "Speech to measure the word error rate on, of voices not in train_data."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of a Hub or on-disk dataset to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Split of such a dataset to evaluate on."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    audio_column: str | None = field(default=None, metadata={"help": "Column with the audio, if not `audio`."})
    text_column: str | None = field(default=None, metadata={"help": "Column with the transcript, if not `text`."})
    min_seconds: float | None = field(default=None, metadata={"help": "Training audio shorter than this is left out."})
    max_seconds: float | None = field(
        default=30.0, metadata={"help": "Training audio longer than this is left out, as it decides the memory used."}
    )
    skip_broken: bool = field(
        default=False, metadata={"help": "Report and leave out what cannot be used, instead of stopping."}
    )
    normalize_text: bool = field(
        default=False,
        metadata={
            "help": "Train on text as it is scored, lower case without punctuation: easier to learn from little speech."
        },
    )
    tempo_perturbation: float = field(
        default=0.0,
        metadata={"help": "Training speech is made faster or slower by a random factor up to exp of this; try 0.15."},
    )
    voice_perturbation: float = field(
        default=0.0,
        metadata={"help": "Its formants and F0 are moved by a random factor up to exp of this, as of another speaker."},
    )
    channel_perturbation: float = field(
        default=0.0,
        metadata={"help": "Its spectrum is tilted and its noise floor raised at random; 0.25 is 10 dB at the edges."},
    )
    f0_shift: float = field(
        default=0.0,
        metadata={"help": "Its F0 alone is moved by a random factor up to exp of this."},
    )
    f0_drop: float = field(
        default=0.0,
        metadata={"help": "With this probability all of an utterance's F0 is hidden, as unvoiced."},
    )
    pause: float = field(
        default=0.0,
        metadata={
            "help": "With this probability the utterances of a batch have silence, or their room's noise, before or"
            " behind: up to 10 s, mostly less than 2."
        },
    )
    non_speech_share: float = field(
        default=0.0,
        metadata={
            "help": "Clips without speech (silence, noise, hum, tones) that are added to train on with an empty text,"
            " as a share of the utterances; try 0.05."
        },
    )
    join: float = field(
        default=0.0,
        metadata={
            "help": "With this probability the utterances of a batch are joined, several of a language one behind the"
            " other, up to 20 s or max_seconds, so that long speech is trained where most recordings are short."
        },
    )
    consistency_weight: float = field(
        default=0.0,
        metadata={
            "help": "Each utterance is heard twice in a batch, with other masks and dropout, and this is the weight of"
            " what the two disagree on; try 0.2. A step takes twice as long. Needs apply_spec_augment or dropout."
        },
    )
    muon: bool = field(
        default=False,
        metadata={
            "help": "The matrices of all layers learn by Muon, all else by AdamW with the same learning rate. A step"
            " takes somewhat longer; in a short trial the loss fell faster by the step."
        },
    )
    average_checkpoints: int = field(
        default=0,
        metadata={
            "help": "The last so many saved checkpoints are averaged at the end, weight by weight; 0 keeps the last."
        },
    )
    start_share: float = field(
        default=0.0,
        metadata={
            "help": "At the end the weights are averaged with those of model_name_or_path, which have this share, below"
            " 1: what a model could do before it forgets less. Try 0.5."
        },
    )
    diagnostics: bool = field(
        default=False,
        metadata={"help": "Write statistics of activations and pitch, and pictures, into TensorBoard when evaluating."},
    )
    num_proc: int | None = field(default=None, metadata={"help": "Processes that compute features."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for computed features; in the cache of `datasets` if not given."}
    )


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
        consistency_weight (`float`, defaults to 0.0): above 0, every row of a training batch is given to the model
            twice, so that a step takes twice the time and memory, and the loss that is minimised and logged has this
            many times the [`disagreement`] of the two added: that of the decoder's tokens and that of the CTC head's
            frames, weighted as their losses are, both divided by the number of label tokens. The model must mask or
            drop out something in training, or the two are the same.
        muon (`bool`, defaults to `False`): the optimizer is [`Muon`], for the matrices of the model's layers.

    Raises:
        `ValueError`: the processor is not the model's; the `hub_strategy` would push the state of the optimizer;
            processes would wait for layers that others pass over; or batches are perturbed or joined in processes that
            outlive an epoch.
    """

    def __init__(
        self,
        *args,
        train_collator: EchoDataCollator | None = None,
        card_arguments: CardArguments | None = None,
        consistency_weight: float = 0.0,
        muon: bool = False,
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
        self.consistency_weight = consistency_weight
        if muon:  # `Seq2SeqTrainer` takes none of an optimizer's descriptions that the Trainer takes
            self.optimizer_cls_and_kwargs = describe_muon(self.args)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (self.consistency_weight and model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {
            name: value.repeat_interleave(2, dim=0) if torch.is_tensor(value) else value
            for name, value in inputs.items()
        }
        tokens = None if num_items_in_batch is None else 2 * num_items_in_batch
        loss, outputs = super().compute_loss(model, inputs, True, tokens)
        settings = self.args
        is_token = ignore_padding(inputs["labels"], self.model.config) != -100
        # Per token, as the model's own loss, of which the Trainer takes the mean over processes or replicas.
        if tokens is None:
            share = 1 / (inputs["labels"] != -100).sum()
        elif settings.average_tokens_across_devices:
            share = self.accelerator.num_processes // self.get_tp_size() / tokens
        else:
            share = 1 / (max(1, settings.n_gpu) * tokens)
        between = self._disagreement(outputs, inputs, is_token)
        loss = loss + self.consistency_weight * share * between
        return (loss, outputs) if return_outputs else loss

    def _disagreement(self, outputs, inputs, is_token: torch.Tensor) -> torch.Tensor:
        """Of the tokens and of the frames, weighted as their losses are; the sum over both views of all utterances."""
        is_decoder = self.model.can_generate()
        weight = self.model.config.ctc_loss_weight if is_decoder else 1.0
        total = (1 - weight) * disagreement(outputs["logits"], is_token) if is_decoder else 0.0
        frame_logits = outputs.get("ctc_logits") if is_decoder else outputs["logits"]
        if frame_logits is None:
            return total
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones(inputs["input_features"].shape[:2], device=frame_logits.device)
        lengths = self.model._get_feat_extract_output_lengths(mask.sum(-1).long())
        return total + weight * disagreement(frame_logits, mask_frames(lengths, frame_logits.shape[1]))

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
        Writes `README.md` into `output_dir`, made by [`~echo_hf.model_card.build_model_card`] from what the run left
        there; called by `push_to_hub`. A `README.md` written by hand is left as it is.

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
            if _is_json(folder / TRAINER_STATE_NAME):  # written last: what failed is to copy the model for a push
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


def disagreement(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How far two views of each utterance are apart: the Kullback-Leibler divergences of their distributions, each view
    from the other, which is held fixed. As a loss it keeps a model from learning a few utterances by heart (consistency
    regularisation of CTC, Yao et al., https://huggingface.co/papers/2410.05101; of decoders, R-Drop, Liang et al.,
    https://huggingface.co/papers/2106.14448).

    Args:
        logits (`torch.Tensor` of shape `(2 * B, positions, vocab_size)`): rows `2 * i` and `2 * i + 1` are views of the
            same utterance.
        mask (`torch.Tensor` of shape `(2 * B, positions)`): where positions are real.

    Returns:
        `torch.Tensor` of shape `()`: the sum over all rows and real positions.
    """
    scores = logits.float().log_softmax(-1)
    other = scores.detach().unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    divergence = torch.nn.functional.kl_div(scores, other, reduction="none", log_target=True).sum(-1)
    return divergence.masked_fill(~mask.bool(), 0.0).sum()


class _TellEpoch(TrainerCallback):
    """Tells a collator the epoch, before the loader's processes take their copies of it."""

    def __init__(self, collator: EchoDataCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = int((state.epoch or 0.0) + 1e-6)  # a run resumed within an epoch is at a fraction


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


class StartAveraging(TrainerCallback):
    """Gives the model, at the end of training, the mean of its weights and of those that it started from, as WiSE-FT
    (Wortsman et al., https://huggingface.co/papers/2109.01903): what it was not trained on further it forgets less.

    Args:
        share (`float`): weight of the start in the mean, above 0 and below 1.
        start (`torch.nn.Module`): the model as it was, of the same shape.

    Raises:
        `ValueError`: the share is none.
    """

    def __init__(self, share: float, start: torch.nn.Module):
        if not 0 < share < 1:
            raise ValueError(f"start_share must be at least 0 and below 1, got {share}.")
        self.share, self.start = share, start.state_dict()

    def check(self, model: torch.nn.Module, args):
        """Raises `ValueError` if the model is of another shape than the start, or FSDP keeps parts of its weights."""
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        others = {name: value.shape for name, value in self.start.items()}
        differing = [name for name in {**shapes, **others} if shapes.get(name) != others.get(name)]
        if differing:
            raise ValueError(
                "start_share needs a model of the shape that it starts with, and other are"
                f" {', '.join(differing[:3])}; leave it out, or the changes of the config."
            )
        if args.fsdp:
            raise ValueError("start_share cannot be used with FSDP, which keeps parts of the weights.")

    def on_train_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for name, value in model.named_parameters():  # which has what is tied once
                value.lerp_(self.start[name].to(value), self.share)


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


def is_write_error(error: Exception) -> bool:
    """Whether saving failed for the disk's sake. Safetensors and PyTorch raise errors of their own kind for it."""
    if isinstance(error, HfHubHTTPError):  # an OSError too
        return False
    return isinstance(error, OSError | SafetensorError) or any(
        name in str(error) for name in ("PytorchStreamWriter", "inline_container")
    )


def explain_write_error(error: Exception, folder: Path) -> OSError:
    """An error that tells what was not saved, and what there is to go on from."""
    last = find_last_checkpoint(folder.parent) or find_last_checkpoint(folder)
    kept = f"{last.name} is whole" if last else "there is no checkpoint yet"
    return OSError(f"{folder} could not be saved: {error}. Is the disk full? Make room, then use --resume; {kept}.")


def build_config(arguments: ModelArguments, label_smoothing: float = 0.0) -> EchoConfig:
    """The config of a new model; its `vocab_size` is set once the tokenizer is there."""
    settings: dict[str, Any] = {"label_smoothing": label_smoothing}
    if arguments.feature_groups:
        settings["feature_groups"] = parse_object(arguments.feature_groups, "feature_groups")
    if arguments.preset is None:  # the config's own choice of mechanisms, which no preset names
        default = EchoConfig()
        settings |= {name: getattr(default, name) for name in BASELINE}
    settings |= parse_overrides(arguments.config_overrides)
    if "vocab_size" in settings:
        raise ValueError("config_overrides: vocab_size is an option of its own, as the tokenizer follows from it.")
    return EchoConfig.from_preset(arguments.preset or "baseline", size=arguments.size or "10m", **settings)


def build_tokenizer(
    texts: Sequence[str], token_unit: str | None = None, vocab_size: int | None = None
) -> EchoTokenizer:
    """
    A tokenizer for the training text.

    Args:
        texts (`Sequence[str]`): training transcripts.
        token_unit (`str`, *optional*): of `TOKEN_UNITS`; `"character"` if not given.
        vocab_size (`int`, *optional*): most tokens there may be; needed for subwords, and not for bytes.

    Raises:
        `ValueError`: the unit is not known, or `vocab_size` does not go with it.
    """
    token_unit = token_unit or "character"
    if token_unit not in TOKEN_UNITS:
        raise ValueError(f"token_unit must be one of {', '.join(TOKEN_UNITS)}, got {token_unit!r}.")
    if vocab_size is not None and vocab_size < BYTE_VOCABULARY:
        raise ValueError(f"vocab_size must be at least {BYTE_VOCABULARY} (bytes and special tokens), got {vocab_size}.")
    if token_unit == "byte":
        if vocab_size not in (None, BYTE_VOCABULARY):
            raise ValueError(f"vocab_size is {BYTE_VOCABULARY} with bytes as tokens; leave it out, got {vocab_size}.")
        return EchoTokenizer()
    if token_unit == "character":
        return EchoTokenizer.from_characters(texts, vocab_size)
    if vocab_size is None:
        raise ValueError("token_unit subword needs a vocab_size, e.g. 1000.")
    tokenizer = EchoTokenizer().train_new_from_iterator(texts, vocab_size, show_progress=False)
    if len(tokenizer) < vocab_size:
        logger.warning(f"The training text gives {len(tokenizer)} tokens, fewer than the {vocab_size} asked for.")
    return tokenizer


def build_processor(config: EchoConfig, tokenizer: EchoTokenizer, f0_method: str | None = None) -> EchoProcessor:
    """A processor whose features are those that the config expects."""
    extractor = EchoFeatureExtractor(
        feature_groups=config.feature_groups,
        sampling_rate=config.sampling_rate,
        hop_length=config.hop_length,
        n_fft=2 * round(1.25 * config.hop_length),  # 25 ms for a hop of 10 ms
        **({} if f0_method is None else {"f0_method": f0_method}),
    )
    return EchoProcessor(extractor, tokenizer)


def build_model_and_processor(
    arguments: ModelArguments, texts: Sequence[str], label_smoothing: float = 0.0
) -> tuple[EchoForConditionalGeneration, EchoProcessor]:
    """
    A new model with its processor, or those of a checkpoint.

    Args:
        arguments ([`ModelArguments`]): which.
        texts (`Sequence[str]`): training transcripts, of which the tokenizer is made.
        label_smoothing (`float`, defaults to 0.0): goes into the config.

    Raises:
        `ValueError`: settings do not fit each other, or ask a checkpoint to be another.
    """
    if arguments.model_name_or_path is None:
        config = build_config(arguments, label_smoothing)
        tokenizer = build_tokenizer(texts, arguments.token_unit, arguments.vocab_size)
        config.vocab_size = len(tokenizer)
        processor = build_processor(config, tokenizer, arguments.f0_method)
        model = EchoForConditionalGeneration(config)
    else:
        for name in ("preset", "size", "token_unit", "vocab_size", "feature_groups", "f0_method"):
            if getattr(arguments, name) is not None:
                raise ValueError(
                    f"{name} belongs to a new model, and {arguments.model_name_or_path} is trained further. Leave it"
                    " out; fields that do not change the weights' shapes can be given as config_overrides."
                )
        overrides = {"label_smoothing": label_smoothing, **parse_overrides(arguments.config_overrides)}
        widths = {name: overrides.pop(name) for name in WIDTHS if name in overrides}
        model, processor = load_model_and_processor(
            arguments.model_name_or_path, EchoForConditionalGeneration, **overrides
        )
        if "max_target_positions" in overrides:  # the checkpoint's own way of writing has its old one
            model.generation_config.max_length = model.config.max_target_positions
        add_nothing(model, EchoConfig.from_pretrained(arguments.model_name_or_path))
        model = widen(model, **widths)
    check_fit(processor, model.config)
    if arguments.attn_implementation is not None:
        model.set_attn_implementation(arguments.attn_implementation)
    # Not in the file, since they are tied; else the Trainer warns that they are missing when it loads the best weights.
    model._keys_to_ignore_on_save = set(model.all_tied_weights_keys)
    return model, processor


@torch.no_grad()
def add_nothing(model: EchoForConditionalGeneration, before: EchoConfig):
    """
    Sets what the layers beyond those of a checkpoint add to 0, so that the deeper model starts as the checkpoint.

    Args:
        model ([`EchoForConditionalGeneration`]): changed in place.
        before ([`EchoConfig`]): of the checkpoint whose weights it has.
    """
    encoder, decoder = model.model.encoder, model.model.decoder
    new = [*encoder.stem_layers[before.stem_num_layers :], *encoder.layers[before.encoder_num_hidden_layers :]]
    for layer in [*new, *decoder.layers[before.decoder_num_hidden_layers :]]:
        for name, module in layer.named_modules():
            if name.endswith(("o_proj", "down_proj")):
                module.weight.zero_()


@torch.no_grad()
def widen(model: EchoForConditionalGeneration, **widths: int) -> EchoForConditionalGeneration:
    """
    The model with wider feed-forwards, which compute what it computes: what they have more starts by adding 0.

    Args:
        model ([`EchoForConditionalGeneration`])
        widths: larger values of the config's `encoder_intermediate_size` and `decoder_intermediate_size`.

    Raises:
        `ValueError`: a width is smaller than the model's, or no number.
    """
    widths = {name: width for name, width in widths.items() if width != getattr(model.config, name)}
    if not widths:
        return model
    for name, width in widths.items():
        if not isinstance(width, int) or width < getattr(model.config, name):
            raise ValueError(
                f"{name} is to be {width}, and is {getattr(model.config, name)} in the checkpoint, whose feed-forwards"
                " can only be made wider; give more, or leave it out."
            )
    wider = EchoForConditionalGeneration(EchoConfig.from_dict({**model.config.to_dict(), **widths}))
    weights = wider.state_dict()
    for name, value in model.state_dict().items():
        if name.endswith("mlp.down_proj.weight"):
            weights[name].zero_()
        weights[name][tuple(slice(size) for size in value.shape)] = value
    wider.generation_config = model.generation_config
    return wider


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete `checkpoint-<step>` folders in `output_dir`, oldest first. A run that was killed while it saved
    leaves a folder without a readable `trainer_state.json`, which is written last."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = [
        path
        for path in Path(output_dir).glob(f"{prefix}*")
        if path.name.removeprefix(prefix).isdigit() and _is_json(path / TRAINER_STATE_NAME)
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)))


def find_last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete `checkpoint-<step>` folder in `output_dir`, if there is one."""
    return next(reversed(list_checkpoints(output_dir)), None)


def _is_json(path: Path) -> bool:
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


def count_beyond_ctc(data: PreparedData, config: EchoConfig) -> int:
    """Utterances with more tokens than encoder frames to emit them at (repeated tokens need a blank between them)."""
    stride = math.prod(config.stem_strides)
    special = {config.pad_token_id, config.bos_token_id, *config.ends_of_sequence}
    count = 0
    for length, labels in zip(data.dataset["length"], data.dataset["labels"]):
        tokens = [token for token in labels if token not in special]
        repeats = sum(first == second for first, second in pairwise(tokens))
        count += len(tokens) + repeats > math.ceil(length / stride)
    return count


def train(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training_arguments: Seq2SeqTrainingArguments,
    resume: bool = False,
    callbacks: list[TrainerCallback] | None = None,
    card_arguments: CardArguments | None = None,
) -> dict[str, Any]:
    """
    Trains a model and leaves a complete checkpoint in `output_dir`: weights, config, generation config, processor and
    the code for `trust_remote_code`, with `train_results.json`, `eval_results.json`, `trainer_state.json`,
    `run_summary.json` and a model card beside them. With `push_to_hub` it is pushed at the end.

    Args:
        model_arguments ([`ModelArguments`]): what is trained.
        data_arguments ([`DataArguments`]): on what.
        training_arguments (`Seq2SeqTrainingArguments`): how; see `TRAINING_DEFAULTS`.
        resume (`bool`, defaults to `False`): whether to go on from the last checkpoint in `output_dir`.
        callbacks (`list[TrainerCallback]`, *optional*): more callbacks for the Trainer.
        card_arguments ([`CardArguments`], *optional*): what the model card says beside what was measured.

    Returns:
        `dict[str, Any]`: the summary that `run_summary.json` holds.

    Raises:
        `ValueError`: data cannot be used, settings do not fit each other, there is no checkpoint to resume from, or
            `output_dir` holds another run; or the last checkpoint is damaged.
        `OSError`: the disk is full, or what was trained could not be pushed; it is saved then.
    """
    started = time.monotonic()
    output_dir = Path(training_arguments.output_dir)
    if training_arguments.push_to_hub:
        check_hub_strategy(training_arguments)
    if data_arguments.diagnostics:
        require_tensorboard()
    for name in ("non_speech_share", "join"):
        if not 0 <= getattr(data_arguments, name) <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {getattr(data_arguments, name)}.")
    if data_arguments.consistency_weight < 0:
        raise ValueError(f"consistency_weight must not be negative, got {data_arguments.consistency_weight}.")
    if data_arguments.muon:
        describe_muon(training_arguments)  # refuses what does not go with it
    if data_arguments.start_share and model_arguments.model_name_or_path is None:
        raise ValueError("start_share is set, and there is no model_name_or_path to start from; leave one out.")
    if data_arguments.average_checkpoints:
        averaging = CheckpointAveraging(data_arguments.average_checkpoints)
        averaging.check(training_arguments)
        callbacks = [*(callbacks or []), averaging]
    checkpoint = find_last_checkpoint(output_dir)
    if resume and checkpoint is None:
        raise ValueError(f"There is no checkpoint to resume from in {output_dir}; start without --resume.")
    if not resume and checkpoint is not None:
        raise ValueError(
            f"{output_dir} holds a run already ({checkpoint.name}): go on with it by --resume, or take another folder."
        )
    if not resume and (output_dir / "config.json").is_file():
        raise ValueError(f"{output_dir} holds a model already; take another folder.")
    # Set before the model is made, so that its weights follow from the seed.
    set_seed(training_arguments.seed)
    # The model's own loss smooths, as it knows CTC; the Trainer is not to do it again.
    label_smoothing = training_arguments.label_smoothing_factor
    training_arguments = copy.copy(training_arguments)
    training_arguments.label_smoothing_factor = 0.0
    started_from = model_arguments.model_name_or_path

    train_table = load_table(data_arguments, data_arguments.train_data, data_arguments.train_split)
    eval_table = None
    if data_arguments.eval_data:
        eval_table = load_table(data_arguments, data_arguments.eval_data, data_arguments.eval_split)
        _warn_of_overlap(train_table, eval_table)
    if resume:
        check_checkpoint(checkpoint)
        # The tokenizer above all must be the one that the weights have learned.
        model_arguments = ModelArguments(
            model_name_or_path=str(checkpoint), attn_implementation=model_arguments.attn_implementation
        )
        label_smoothing = EchoConfig.from_pretrained(checkpoint).label_smoothing
    model, processor = build_model_and_processor(
        model_arguments, [text or "" for text in train_table["text"]], label_smoothing
    )

    if data_arguments.start_share:
        start, _ = load_model_and_processor(started_from, EchoForConditionalGeneration)
        averaging = StartAveraging(data_arguments.start_share, start)
        averaging.check(model, training_arguments)
        callbacks = [*(callbacks or []), averaging]
    config = model.config
    masked = config.apply_spec_augment and (config.mask_time_prob or config.mask_feature_prob)
    if data_arguments.consistency_weight and not (masked or config.dropout or config.attention_dropout):
        raise ValueError(
            "consistency_weight is set, and the two views of an utterance would be the same: set"
            " --config_overrides apply_spec_augment=true, or dropout."
        )
    perturb = VoicePerturbation(
        processor.feature_extractor,
        tempo=data_arguments.tempo_perturbation,
        voice=data_arguments.voice_perturbation,
        channel=data_arguments.channel_perturbation,
        f0_shift=data_arguments.f0_shift,
        f0_drop=data_arguments.f0_drop,
        pause=data_arguments.pause,
    )
    options = {
        "max_label_length": model.config.max_target_positions,
        "skip_broken": data_arguments.skip_broken,
        "num_proc": data_arguments.num_proc,
        "cache_dir": data_arguments.cache_dir,
    }
    # Of several processes one computes the features, and the others wait for its cache.
    train_data = prepare_dataset(
        train_table,
        processor,
        min_seconds=data_arguments.min_seconds,
        max_seconds=data_arguments.max_seconds,
        **options,
    )
    num_recorded = len(train_data.dataset)
    if data_arguments.non_speech_share:
        train_data = add_non_speech(
            train_data, data_arguments.non_speech_share, processor, training_arguments.seed, **options
        )
    eval_data = prepare_dataset(eval_table, processor, **options) if eval_table is not None else None
    if model.config.ctc_loss_weight > 0 and (beyond := count_beyond_ctc(train_data, model.config)):
        logger.warning(
            f"{beyond} of {len(train_data.dataset)} utterances have more tokens than encoder frames, and the CTC loss"
            " leaves them out. Subwords are fewer tokens (token_unit); smaller stem_strides give more frames."
        )

    if data_arguments.diagnostics:
        callbacks = [*(callbacks or []), DiagnosticsCallback((eval_data or train_data).dataset, processor)]
    trainer = EchoTrainer(
        model=model,
        args=training_arguments,
        data_collator=EchoDataCollator(processor),
        train_collator=EchoDataCollator(
            processor,
            perturb=perturb.batch if perturb.is_active else None,
            join=data_arguments.join,
            max_joined_seconds=min(MAX_JOINED_SECONDS, data_arguments.max_seconds or MAX_JOINED_SECONDS),
            max_label_length=model.config.max_target_positions,
            seed=training_arguments.seed,
        ),
        train_dataset=train_data.dataset,
        eval_dataset=eval_data.dataset if eval_data else None,
        processing_class=processor,
        compute_metrics=make_compute_metrics(processor.tokenizer) if training_arguments.predict_with_generate else None,
        callbacks=callbacks,
        card_arguments=card_arguments,
        consistency_weight=data_arguments.consistency_weight,
        muon=data_arguments.muon,
    )
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
    # As the Trainer calls it itself: otherwise it would push at once, before the model is evaluated.
    try:
        trainer.save_model(_internal_call=True)
    except Exception as error:
        if is_write_error(error):
            raise explain_write_error(error, output_dir) from error
        raise
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics = {}
    if eval_data:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    summary = {
        "output_dir": str(output_dir),
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0.0, 2),
        "resumed_from": checkpoint.name if resume else None,
        "base_model": started_from if started_from and not Path(started_from).exists() else None,
        # The Trainer notes the best whether or not it takes it.
        "best_checkpoint": trainer.state.best_model_checkpoint if training_arguments.load_best_model_at_end else None,
        "seconds": round(time.monotonic() - started, 1),
        "train": {
            **_describe(train_data, data_arguments.train_data),
            "without_speech": len(train_data.dataset) - num_recorded,
        },
        "eval": _describe(eval_data, data_arguments.eval_data) if eval_data else None,
        "train_loss": result.metrics["train_loss"],
        "metrics": {key.removeprefix("eval_"): value for key, value in metrics.items()},
        "versions": {
            "echo_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    if trainer.is_world_process_zero():
        (output_dir / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        trainer.create_model_card()
    if training_arguments.push_to_hub:
        try:
            commit = trainer.push_to_hub()
            if commit is not None:  # the first of several processes, which is the one that pushes
                summary["pushed_to"] = str(commit.repo_url)
        except Exception as error:  # of the connection, the Hub or the file system; what was trained is safe from each
            raise OSError(
                f"The model is trained and saved in {output_dir}, but could not be pushed: {error}. Push it later with:"
                f" hf upload {trainer.hub_model_id} {output_dir} . --exclude 'checkpoint-*'"
            ) from error
    return summary


def add_non_speech(data: PreparedData, share: float, processor: EchoProcessor, seed: int, **options) -> PreparedData:
    """
    The data with clips added that hold no speech and have an empty text, so that a model learns to write nothing there.

    Args:
        data ([`PreparedData`]): to train on.
        share (`float`): clips to add for each utterance, above 0.
        processor ([`EchoProcessor`]): as in [`prepare_dataset`].
        seed (`int`): of the clips.
        options: of [`prepare_dataset`].
    """
    count = math.ceil(share * len(data.dataset))
    table = non_speech_table(count, seed, sampling_rate=processor.feature_extractor.sampling_rate)
    added = prepare_dataset(table, processor, allow_empty_text=True, **options)
    # What the clips do not have, such as a language, is None for them.
    return PreparedData(
        dataset=datasets.concatenate_datasets([data.dataset, added.dataset]),
        skipped=data.skipped,
        seconds=data.seconds + added.seconds,
    )


def load_table(arguments: DataArguments, sources: list[str], split: str) -> datasets.Dataset:
    """The utterances of `sources` as [`load_sources`] reads them, with texts normalised if `arguments` say so."""
    table = load_sources(sources, split, arguments.dataset_config, arguments.audio_column, arguments.text_column)
    if arguments.normalize_text:
        texts = [text if text is None else normalize_text(text) for text in table["text"]]
        table = table.remove_columns("text").add_column("text", texts)
    return table


def _warn_of_overlap(train_table, eval_table) -> None:
    def paths_of(table) -> list[str]:
        return [entry["path"] for entry in table["audio"] if entry and entry["path"] and entry["bytes"] is None]

    paths = set(paths_of(train_table))
    shared = sum(path in paths for path in paths_of(eval_table))
    if shared:
        logger.warning(
            f"{shared} of {len(eval_table)} recordings to evaluate on are trained on too; the word error rate on them"
            " says nothing about new speech."
        )


def _describe(data: PreparedData, sources: list[str]) -> dict[str, Any]:
    return {
        "sources": list(sources),
        "from_hub": [source for source in sources if not Path(source).expanduser().exists()],
        "utterances": len(data.dataset),
        "hours": round(data.seconds / 3600, 3),
        "skipped": len(data.skipped),
    }


__all__ = [
    "TRAINING_DEFAULTS",
    "DataArguments",
    "EchoTrainer",
    "ModelArguments",
    "find_last_checkpoint",
    "train",
]
