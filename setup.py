"""Packaging metadata. Static: nothing is probed, built or downloaded here."""

import re

from setuptools import find_packages, setup

TRAIN = [
    "accelerate>=1.12",
    "datasets>=4.0",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "pyyaml>=6.0",
    "rich>=13.0",
    "safetensors>=0.6",
    "tokenizers>=0.22",
    "transformers>=5.10",
]
LORA = ["peft>=0.18"]
QLORA = [*LORA, "bitsandbytes>=0.49"]
JUDGE = ["openai>=2.0"]
BENCH = ["matplotlib>=3.9", "pytest>=8.0", "pytest-benchmark>=5.0"]
TEST = [
    *TRAIN,
    *BENCH,
    *QLORA,
    *JUDGE,
    "codespell>=2.3",
    "hypothesis>=6.100",
    "mypy>=1.15",
    "pytest-xdist>=3.6",  # make test uses both cores
    "numpy>=2.0",  # the Triton interpreter computes with it
    "ruff>=0.12",
    "setuptools>=77",  # a test builds the wheel
    "types-PyYAML",
]

with open("exo_kernels/__init__.py", encoding="utf-8") as file:  # its text: importing it needs torch
    VERSION = re.search(r'^__version__ = "(.+)"$', file.read(), re.MULTILINE)[1]

setup(
    name="exo-kernels",
    version=VERSION,
    description="Fused, exact losses for preference alignment of language models: EXO and DPO on K completions",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["exo", "exo.*", "exo_kernels", "exo_kernels.*"]),
    package_data={
        "exo": [
            "py.typed",
            "evaluation/templates/*.txt",
            "presets/*.yaml",
            "experiments/recipes/*.yaml",
            "reporting/*.j2",
        ],
        "exo_kernels": ["py.typed"],
    },
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={
        "train": TRAIN,
        "lora": [*TRAIN, *LORA],
        "qlora": [*TRAIN, *QLORA],
        "judge": [*TRAIN, *JUDGE],
        "bench": BENCH,
        "docs": [*TRAIN, "mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"],
        "test": TEST,
        "deepspeed": [*TRAIN, "deepspeed>=0.19"],
        "flash": ["flash-attn>=2.7"],
        # QuACK, which needs a recent NVIDIA GPU, is not among them: pip install quack-kernels
        "peers": ["cut-cross-entropy>=25.1", "liger-kernel>=0.8", "trl>=1.16"],
    },
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
