"""What the Trainer of Echo does otherwise than Transformers' own."""

import pytest

from echo_hf.data import EchoDataCollator, load_sources, prepare_dataset
from echo_hf.data.augmentation import VoicePerturbation
from echo_hf.training import EchoTrainer, ModelArguments, build_model_and_processor
from tiny_training import TINY, TINY_FEATURES, trainer_arguments, write_six_tones


@pytest.fixture
def manifest(tmp_path):
    return write_six_tones(tmp_path)


def test_only_training_batches_are_perturbed(manifest, tmp_path):
    model, processor = build_model_and_processor(
        ModelArguments(preset="all", config_overrides=TINY, feature_groups=TINY_FEATURES), ["low", "high"], 0.0
    )
    data = prepare_dataset(load_sources([str(manifest)]), processor, cache_dir=tmp_path / "cache").dataset
    perturb = VoicePerturbation(processor.feature_extractor, voice=0.3).batch
    trainer = EchoTrainer(
        model=model,
        args=trainer_arguments(tmp_path / "run", per_device_train_batch_size=6, per_device_eval_batch_size=6),
        data_collator=EchoDataCollator(processor),
        train_collator=EchoDataCollator(processor, perturb=perturb),
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor,
    )
    persistent = {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}
    with pytest.raises(ValueError, match="dataloader_persistent_workers"):
        EchoTrainer(
            model=model,
            args=trainer_arguments(tmp_path / "run", **persistent),
            train_collator=EchoDataCollator(processor, perturb=perturb),
            train_dataset=data,
            processing_class=processor,
        )
    pitches = {round(float(row["input_features"][:, -1].max()), 2) for row in data}
    for loader, equal in ((trainer.get_eval_dataloader(), True), (trainer.get_train_dataloader(), False)):
        batch = next(iter(loader))
        heard = {round(float(value), 2) for value in batch["input_features"][..., -1].amax(-1)}
        assert (heard <= pitches) == equal
