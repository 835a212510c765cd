"""Errors of each F0 tracker on synthetic voices whose F0 is known: clean, in noise and band-limited.

python benchmarks/f0_trackers.py
"""

from typing import Any

from echo_hf.metrics import f0_metrics, f0_test_signals, format_table
from echo_hf.pitch_echo import TRACKERS, estimate_f0

SAMPLING_RATE, HOP_LENGTH = 16000, 160  # Hz; samples


def benchmark_trackers() -> list[dict[str, Any]]:
    """A row for each signal and tracker, as [`f0_metrics`] defines the errors: shares in percent, and cents."""
    rows = []
    for signal, (waveform, reference) in f0_test_signals().items():
        for method in TRACKERS:
            f0 = estimate_f0(waveform, SAMPLING_RATE, HOP_LENGTH, method)[: len(reference)]
            errors = f0_metrics(reference, f0)
            shares = {f"{name.upper()} %": 100 * errors[name] for name in ("gpe", "vde", "ffe", "rpa", "rca")}
            rows.append({"signal": signal, "tracker": method, **shares, "cents": errors["cents"]})
    return rows


if __name__ == "__main__":
    print(format_table(benchmark_trackers()))
