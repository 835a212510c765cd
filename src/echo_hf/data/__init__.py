"""Speech with transcripts: read, checked, turned into features once, and made into batches."""

from .collator import EchoDataCollator
from .features import PreparedData, features_fingerprint, prepare_dataset
from .sources import load_sources

__all__ = [
    "EchoDataCollator",
    "PreparedData",
    "features_fingerprint",
    "load_sources",
    "prepare_dataset",
]
