"""Named settings of the pitch mechanisms and named sizes, for `EchoConfig.from_preset`."""

# All pitch mechanisms off: a plain rotary transformer. Every preset starts from here.
BASELINE = {
    "theta_mode": "none",
    "radius_mode": "unit",
    "pitch_bias": "none",
    "silence_scaling": False,
    "pitch_gate": False,
    "pitch_stem": False,
    "token_pitch": "none",
}

MECHANISMS = {
    "theta": {"theta_mode": "phase"},
    "radius": {"radius_mode": "bounded"},
    "bias": {"pitch_bias": "gaussian"},
    "silence": {"silence_scaling": True},
    "gate": {"pitch_gate": True},
    "pitch_input": {"pitch_stem": True},
    "token_pitch": {"token_pitch": "mean"},
}

# Shared by both settings of the published prototype.
PUBLISHED = {
    "rotary_frequencies": "mel",
    "rotary_theta": 10000.0,
    "mel_corner_frequency": 700.0,
    "mel_max_frequency": 8000.0,
    "learn_theta": True,
}

PRESETS = {
    "baseline": {},
    **MECHANISMS,
    "all": {name: value for mechanism in MECHANISMS.values() for name, value in mechanism.items()},
    "published_mean_sigmoid": {"theta_mode": "mean", "radius_mode": "sigmoid", **PUBLISHED},
    "published_frame_raw": {"theta_mode": "frame", "radius_mode": "raw", **PUBLISHED},
}

# Layers, width, heads and inner width of each size, named by its parameters with the byte vocabulary. The decoder is
# small, since generation reads all of its weights for every token.
SIZES = {
    "2m": {"encoder": (5, 144, 4, 384), "decoder": (1, 144, 4, 384)},
    "5m": {"encoder": (6, 208, 4, 560), "decoder": (2, 208, 4, 560)},
    "10m": {"encoder": (8, 256, 4, 688), "decoder": (2, 256, 4, 688)},
    "27m": {"encoder": (11, 384, 6, 1024), "decoder": (2, 256, 4, 688)},
    "80m": {"encoder": (17, 576, 9, 1536), "decoder": (3, 384, 6, 1024)},
}
