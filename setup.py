"""Package description of megatron_rl."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "megatron_rl" / "__init__.py").read_text())
assert VERSION is not None

setup(
    name="megatron_rl",
    version=VERSION.group(1),
    description="Reinforcement learning of large language models on Megatron-Core, without Ray",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_rl", "megatron_rl.*"]),
    package_data={"megatron_rl": ["py.typed", "reporting/templates/*.html"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "megatron-core>=0.16.1,<0.20",
        "transformers>=5.0,<6",
        "omegaconf>=2.4,<3",
        "pyyaml>=6,<7",
        "numpy>=1.26,<3",
        "safetensors>=0.5,<1",
        # newer releases of megatron-core want Python 3.12 and import it also where nothing runs on it
        "triton; python_version >= '3.12' and platform_system == 'Linux'",
        # megatron-core saves checkpoints with it but does not ask for it
        "psutil>=5.9",
        "datasets>=3,<6",
        "pyarrow>=17",
        "math-verify[antlr4_13_2]>=0.8,<0.10",
        "jinja2>=3.1,<4",
        "httpx>=0.27,<1",
        "matplotlib>=3.9,<4",
        "rich>=13.7,<16",
        "tensorboard>=2.17,<3",
        "wandb>=0.19,<1",
    ],
    extras_require={
        "vllm": ["vllm>=0.26,<0.33"],
        "sglang": ["sglang>=0.5,<0.7"],
        # near-duplicate problems (tools/data/curate.py)
        "curation": ["datasketch>=1.6,<3", "rapidfuzz>=3.9,<4"],
        "te": ["transformer-engine[pytorch]>=2.9,<3"],
        "dev": [
            "mbridge==0.15.1",
            "peft>=0.18,<1",
            "einops",
            "pytest>=8.3.3,<10",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.14,<0.18",
            "mypy>=1.18,<3",
            "types-PyYAML",
        ],
        # whose verdicts the tests of evaluation compare with
        "harness": ["lm-eval==0.4.13"],
    },
)
