"""VoicePerturbation: what it changes, by how much, and what it leaves alone."""

import random

import numpy as np
import pytest

from echo_hf import EchoFeatureExtractor
from echo_hf.data.augmentation import VoicePerturbation

RATE = 16000


@pytest.fixture(scope="module")
def extractor():
    return EchoFeatureExtractor()


def vowel(f0, formant, seconds=0.6):
    """Harmonics of f0 with one resonance."""
    time = np.arange(int(seconds * RATE)) / RATE
    harmonics = np.arange(f0, 6000, f0)
    return sum(np.exp(-(((h - formant) / 200.0) ** 2)) * np.sin(2 * np.pi * h * time) for h in harmonics) * 0.2


def test_all_off_changes_nothing(extractor):
    features = extractor(vowel(150, 1000), sampling_rate=RATE)["input_features"][0]
    perturb = VoicePerturbation(extractor)
    assert not perturb.is_active
    np.testing.assert_array_equal(perturb(features), features)


def test_warp_is_what_a_faster_playback_does_to_the_spectrum(extractor):
    """The formant moves by the factor, as it does when the same vowel is made with all its frequencies higher."""
    factor = 1.25
    low = extractor(vowel(160, 1000), sampling_rate=RATE)["input_features"][0]
    high = extractor(vowel(200, 1250), sampling_rate=RATE)["input_features"][0]
    warped = VoicePerturbation(extractor, voice=0.5)._warp(low[:, :80], factor)
    middle = slice(20, 40)
    assert abs(int(warped[middle].mean(0).argmax()) - int(high[middle, :80].mean(0).argmax())) <= 1
    assert abs(int(low[middle, :80].mean(0).argmax()) - int(high[middle, :80].mean(0).argmax())) > 3


def test_voice_moves_f0_by_the_same_factor_and_keeps_unvoiced(extractor):
    features = extractor(vowel(150, 1000), sampling_rate=RATE)["input_features"][0]
    features[:, -1] = 150.0
    features[10:20, -1] = 0.0
    perturb = VoicePerturbation(extractor, voice=0.3)
    ratios = []
    for seed in range(50):
        random.seed(seed)
        out = perturb(features)
        voiced = features[:, -1] > 0
        assert (out[~voiced, -1] == 0).all()
        ratio = out[voiced, -1] / features[voiced, -1]
        assert np.ptp(ratio) < 1e-5
        ratios.append(ratio[0])
    assert np.exp(-0.3) <= min(ratios) < 0.85 and 1.15 < max(ratios) <= np.exp(0.3)


def test_tempo_changes_length_and_selects_f0(extractor):
    features = extractor(vowel(150, 1000), sampling_rate=RATE)["input_features"][0]
    features[:, -1] = np.where(np.arange(60) % 2, 100.0, 0.0)
    perturb = VoicePerturbation(extractor, tempo=0.5)
    lengths = set()
    for seed in range(30):
        random.seed(seed)
        out = perturb(features)
        lengths.add(len(out))
        assert set(np.unique(out[:, -1])) <= {0.0, 100.0}
        assert out.dtype == np.float32
    assert 60 * np.exp(-0.5) - 1 <= min(lengths) < 50 and 70 < max(lengths) <= 60 * np.exp(0.5) + 1
    np.testing.assert_allclose(perturb._stretch(features, 1.0), features)


def test_channel_stays_in_range_and_raises_silence_to_one_floor(extractor):
    features = np.random.default_rng(0).uniform(0, 2, (50, 81)).astype(np.float32)
    features[20:30, :80] = 0.0
    random.seed(1)
    out = VoicePerturbation(extractor, channel=0.3)(features)
    assert out[:, :80].min() >= 0 and out[:, :80].max() <= 2
    assert len(np.unique(out[20:30, :80])) == 1
    np.testing.assert_array_equal(out[:, -1], features[:, -1])


def test_same_seed_same_voice_and_the_input_is_left_alone(extractor):
    features = extractor(vowel(150, 1000), sampling_rate=RATE)["input_features"][0]
    kept = features.copy()
    perturb = VoicePerturbation(extractor, tempo=0.2, voice=0.2, channel=0.2)
    random.seed(3)
    first = perturb(features)
    random.seed(3)
    np.testing.assert_array_equal(perturb(features), first)
    assert perturb(features).shape != first.shape or not np.array_equal(perturb(features), first)
    np.testing.assert_array_equal(features, kept)


def test_very_short_utterances_survive(extractor):
    perturb = VoicePerturbation(extractor, tempo=1.0, voice=1.0, channel=1.0)
    for frames in (1, 2, 5):
        assert len(perturb(np.ones((frames, 81), dtype=np.float32))) >= min(frames, 4) > 0


def test_wrong_strengths_are_errors(extractor):
    with pytest.raises(ValueError, match="tempo"):
        VoicePerturbation(extractor, tempo=-0.1)
    with pytest.raises(ValueError, match="voice"):
        VoicePerturbation(extractor, voice=1.5)
    without_pitch = EchoFeatureExtractor(feature_groups={"spectrogram": 80})
    with pytest.raises(ValueError, match="f0_drop needs the feature group 'pitch'"):
        VoicePerturbation(without_pitch, f0_drop=0.1)


def test_f0_is_dropped_as_often_as_asked_and_nothing_else(extractor):
    features = np.full((20, 81), 1.5, dtype=np.float32)
    perturb = VoicePerturbation(extractor, f0_drop=0.25)
    random.seed(0)
    dropped = 0
    for _ in range(2000):
        out = perturb(features)
        np.testing.assert_array_equal(out[:, :80], features[:, :80])
        assert (out[:, -1] == 0).all() or (out[:, -1] == 1.5).all()
        dropped += bool((out[:, -1] == 0).all())
    assert abs(dropped / 2000 - 0.25) < 0.05  # five standard deviations


def test_where_f0_is_dropped_there_is_no_voicing():
    extractor = EchoFeatureExtractor(feature_groups={"spectrogram": 80, "voicing": 1, "pitch": 1})
    out = VoicePerturbation(extractor, f0_drop=1.0)(np.ones((20, 82), dtype=np.float32))
    assert (out[:, :80] == 1).all() and (out[:, 80:] == 0).all()


def test_a_pause_comes_before_or_behind_and_holds_silence_or_the_room(extractor):
    """What is said stays whole; what is added has no F0, and is silence or frames as quiet as the quietest."""
    features = np.random.default_rng(0).uniform(1, 2, (60, 81)).astype(np.float32)
    features[40:46, :80] = np.random.default_rng(1).uniform(0.1, 0.2, (6, 80))
    perturb, kinds = VoicePerturbation(extractor, pause=1.0), set()
    for seed in range(60):
        random.seed(seed)
        out = perturb(features)
        added = len(out) - 60
        assert 1 <= added <= 1000
        behind = np.array_equal(out[:60], features)
        assert behind or np.array_equal(out[-60:], features)
        pause = out[60:] if behind else out[:-60]
        assert (pause[:, -1] == 0).all()
        silent = bool((pause[:, :80] == 0).all())
        if not silent:
            assert {row.tobytes() for row in pause[:, :80]} <= {row.tobytes() for row in features[40:46, :80]}
        kinds.add((behind, silent))
    assert len(kinds) == 4
    random.seed(0)
    changed = sum(len(VoicePerturbation(extractor, pause=0.2)(features)) != 60 for _ in range(1000))
    assert 140 < changed < 260  # five standard deviations


def test_pauses_come_in_whole_batches_and_most_are_short(extractor):
    """A single long one would have all the others of its batch padded."""
    utterances, perturb = [np.ones((60, 81), dtype=np.float32)] * 4, VoicePerturbation(extractor, pause=0.5)
    chance = random.Random(0)
    longest = [[len(features) - 60 for features in perturb.batch(utterances, chance)] for _ in range(1000)]
    assert all(all(added) or not any(added) for added in longest)
    longest = [max(added) for added in longest if any(added)]
    assert 400 < len(longest) < 600
    assert max(longest) > 800 and np.median(longest) < 200
