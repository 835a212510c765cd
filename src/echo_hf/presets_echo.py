"""Values of `EchoConfig`: named settings of the pitch mechanisms and named sizes for `EchoConfig.from_preset`, and the
bounds of each number."""

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
    "theta": {"theta_mode": "contour"},
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

SIDES = ("encoder", "decoder")

# Smallest and largest value of each number. They refuse a damaged or malicious config before anything is allocated.
BOUNDS = {
    "vocab_size": (1, 10_000_000),
    **dict.fromkeys(("sampling_rate", "hop_length", "mask_time_length", "mask_feature_length"), (1, 1_000_000)),
    **dict.fromkeys(("mask_time_min_masks", "mask_feature_min_masks"), (0, 1_000_000)),
    **dict.fromkeys(("mask_time_prob", "mask_feature_prob", "ctc_loss_weight"), (0, 1)),
    "stem_num_layers": (0, 1000),
    **{f"{side}_hidden_size": (1, 65_536) for side in SIDES},
    **{f"{side}_intermediate_size": (1, 262_144) for side in SIDES},
    **{f"{side}_num_hidden_layers": (1, 1000) for side in SIDES},
    **{f"{side}_num_attention_heads": (1, 4096) for side in SIDES},
    **{f"{side}_num_key_value_heads": (1, 4096) for side in SIDES},
    "encoder_kernel_size": (1, 1001),
    "max_target_positions": (1, 100_000),
    "initializer_range": (0, 10),
    "rms_norm_eps": (1e-7, 1),  # a smaller one is lost beside a mean square in float32
    "rotary_theta": (1e-3, 1e9),
    **dict.fromkeys(("mel_corner_frequency", "mel_max_frequency", "tokens_per_second"), (1e-3, 1e6)),
    "silence_threshold": (0, 1e6),
}
MAX_GROUP_WIDTH = 1024  # channels
MAX_STRIDES, MAX_FRAMES_PER_ENCODER_FRAME = 16, 1024
MAX_FRAMES_PER_TOKEN = 10_000
MAX_PARAMETERS = 10_000_000_000
