"""Makes `bottleneck_*/`: adapters of the package adapters 1.3.0 as it saves them, and what its own models answer.

It wants transformers 4. In an environment of its own, from the repository's root:

    pip install adapters==1.3.0 torch safetensors numpy
    python -m tests.gateway.engine.expected.make_bottleneck
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Final

import adapters
import torch
from adapters import BnConfig, DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.gateway.engine.expected.base import generate, write_base

HERE: Final = Path(__file__).parent
ADAPTERS: Final[dict[str, tuple[str, BnConfig]]] = {
    "bottleneck_seq": ("llama", SeqBnConfig(reduction_factor=8)),
    "bottleneck_double": ("llama", DoubleSeqBnConfig(reduction_factor={"0": 3, "default": 16})),
    "bottleneck_parallel": ("llama", ParBnConfig(reduction_factor=8, mh_adapter=True, non_linearity="tanh")),
    "bottleneck_around": (
        "llama",
        SeqBnConfig(
            mh_adapter=True, output_adapter=False, reduction_factor=8, non_linearity="gelu", scaling=0.5,
            original_ln_after=False, residual_before_ln=False, leave_out=[0],
        ),
    ),
    "bottleneck_mistral": ("mistral", DoubleSeqBnConfig(reduction_factor=16, original_ln_before=True)),
}  # fmt: skip


def main() -> None:
    for seed, (name, (family, config)) in enumerate(ADAPTERS.items()):
        with tempfile.TemporaryDirectory() as folder:
            base = write_base(Path(folder), family)
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
            adapters.init(model)
            model.add_adapter("support", config=config, set_active=True)
            generator = torch.Generator().manual_seed(seed)
            for parameter_name, parameter in model.named_parameters():
                if ".support." in parameter_name:
                    parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
            out = HERE / name
            shutil.rmtree(out, ignore_errors=True)
            model.save_adapter(out, "support", use_safetensors=True, with_head=False)
            saved = json.loads((out / "adapter_config.json").read_text()) | {"model_name": None}
            (out / "adapter_config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
            save_file(generate(model.eval()), out / "expected.safetensors")


if __name__ == "__main__":
    main()
