"""The base of the committed results: any release of transformers loads the same numbers from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import save_file

PROMPT: Final = tuple(range(40, 52))
NUM_TOKENS: Final = 4  # that each result has greedily behind the prompt, the last of them without logits of its own
_HIDDEN, _KV, _MLP, _VOCAB, _LAYERS = 64, 32, 128, 320, 2


def write_base(folder: Path, family: str = "llama") -> Path:
    """A two-layer Llama or Mistral of seeded fp32 weights, as Hugging Face saves it, without a tokenizer.

    Logits are less than 1 or so, where fp32 itself is off by 1e-6 and not 1e-5.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "vocab_size": _VOCAB,
        "hidden_size": _HIDDEN,
        "intermediate_size": _MLP,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (_VOCAB, _HIDDEN), "lm_head": (_VOCAB, _HIDDEN)}
    for layer in range(_LAYERS):
        of_layer = {
            "self_attn.q_proj": (_HIDDEN, _HIDDEN),
            "self_attn.k_proj": (_KV, _HIDDEN),
            "self_attn.v_proj": (_KV, _HIDDEN),
            "self_attn.o_proj": (_HIDDEN, _HIDDEN),
            "mlp.gate_proj": (_MLP, _HIDDEN),
            "mlp.up_proj": (_MLP, _HIDDEN),
            "mlp.down_proj": (_HIDDEN, _MLP),
            "input_layernorm": (_HIDDEN,),
            "post_attention_layernorm": (_HIDDEN,),
        }
        shapes |= {f"model.layers.{layer}.{module}": shape for module, shape in of_layer.items()}
    shapes["model.norm"] = (_HIDDEN,)
    random = np.random.RandomState(0)  # whose numbers are the same in every release of numpy
    tensors = {}
    for name, shape in shapes.items():
        numbers = random.standard_normal(shape)
        std = 0.025 if name == "lm_head" else 0.25
        values = std * numbers if len(shape) > 1 else 1 + 0.1 * numbers
        tensors[f"{name}.weight"] = torch.from_numpy(values.astype(np.float32))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def generate(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Token ids [len(PROMPT) + NUM_TOKENS], greedy behind the prompt, and the logits [NUM_TOKENS, vocab] of these."""
    ids, logits = list(PROMPT), []
    with torch.no_grad():
        for _ in range(NUM_TOKENS):
            logits.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].float())
            ids.append(int(logits[-1].argmax()))
    return {"token_ids": torch.tensor(ids), "logits": torch.stack(logits)}
