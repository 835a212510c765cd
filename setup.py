"""Packaging of echo_hf. The base install is what inference needs; extras add training, pictures, the demo, serving and tests."""

import re
from pathlib import Path

from setuptools import find_packages
from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "src/echo_hf/__init__.py").read_text(), re.MULTILINE).group(1)

TRAIN = ["accelerate>=1.1", "datasets>=4.0", "evaluate>=0.4.6", "filelock>=3.15", "jiwer>=4.0", "tensorboard>=2.17"]
PLOT = ["matplotlib>=3.9"]
DEMO = [*PLOT, "gradio>=6.0"]
SERVE = ["transformers[serving]", "python-multipart>=0.0.20"]
TEST = [*TRAIN, *DEMO, "pytest>=8.0", "pytest-xdist>=3.6"]
TEST += ["ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10", "peft>=0.17"]

setup(
    name="echo-hf",
    version=VERSION,
    description="Echo: speech recognition that hears the pitch of the voice, for Hugging Face Transformers",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"echo_hf": ["assets/*/*", "speech_errors/README.md"]},
    install_requires=[
        "huggingface_hub>=2.0",
        "numpy>=2.0",
        # pyworld itself asks for pkg_resources, which setuptools no longer has; this is the same code, mended.
        "pyworld-prebuilt>=0.3.6",
        "safetensors>=0.7",
        "soundfile>=0.13",
        "soxr>=0.5",
        "tokenizers>=0.22",
        "torch>=2.9",
        "transformers>=5.23,<6",
    ],
    extras_require={"train": TRAIN, "plot": PLOT, "demo": DEMO, "serve": SERVE, "test": TEST},
    entry_points={"console_scripts": ["echo-hf=echo_hf.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
    ],
)
