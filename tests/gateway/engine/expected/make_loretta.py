"""Makes `loretta_*/`: adapters of the package loretta 0.1.0 as it saves them, and what its own models answer.

It wants transformers 4. In an environment of its own, from the repository's root:

    pip install "transformers~=4.57.6" torch safetensors numpy accelerate
    pip install --no-deps loretta==0.1.0
    python -m tests.gateway.engine.expected.make_loretta
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Final

import torch
from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta.utils import TRANSFORMERS_HIDDEN_SIZE_TO_TENSOR_SHAPE
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.gateway.engine.expected.base import generate, write_base

HERE: Final = Path(__file__).parent
# The package's table has no widths as small as the base's: what a linear of this width and its rank multiply to.
SHAPES: Final = {8: {32: [4, 8, 8], 64: [8, 8, 8], 128: [8, 8, 4, 4]}, 20: {64: [8, 8, 20]}}
ADAPTERS: Final = {
    "loretta_rep": LorettaRepConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, tensor_rank=5, target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
    ),
    "loretta_adp": LorettaAdpConfig(
        bottleneck_size=8, non_linearity="tanh", tensor_rank=5, scaling=2.5, target_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "loretta_adp_of_all": LorettaAdpConfig(
        bottleneck_size=20, non_linearity="tanh", tensor_rank=4, scaling=1.5,
        target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM",
    ),
    "loretta_adp_of_some": LorettaAdpConfig(
        bottleneck_size=8, non_linearity="gelu", tensor_rank=5, scaling=0.5,
        target_modules=["0.mlp.gate_proj", "1.mlp.up_proj"], task_type="CAUSAL_LM",
    ),
}  # fmt: skip


def main() -> None:
    TRANSFORMERS_HIDDEN_SIZE_TO_TENSOR_SHAPE.update(SHAPES)
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder))
        for seed, (name, config) in enumerate(ADAPTERS.items()):
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
            generator = torch.Generator().manual_seed(seed)
            for parameter_name, parameter in model.named_parameters():
                if "lora_" in parameter_name or "adapter_" in parameter_name:
                    std = 0.25 if "lora_" in parameter_name else 0.5
                    parameter.data = std * torch.randn(parameter.shape, generator=generator)
            out = HERE / name
            shutil.rmtree(out, ignore_errors=True)
            model.save_pretrained(out)
            # It pickles: the same tensors, saved so that they may be read by others.
            weights = torch.load(out / "adapter_model.bin", weights_only=True)
            (out / "adapter_model.bin").unlink()
            save_file(
                {name: tensor.contiguous() for name, tensor in weights.items()}, out / "adapter_model.safetensors"
            )
            saved = json.loads((out / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
            (out / "adapter_config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
            save_file(generate(model), out / "expected.safetensors")


if __name__ == "__main__":
    main()
