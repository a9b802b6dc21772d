"""How far fp8 pages are from those of the compute dtype, over the embedded base and the demo's messages.

    python -m benchmarks.kv_cache

Each message with the base's own greedy answer is one prefill: every query reads its keys and values out of pages.
Attention's error is that of a layer's output, o_proj included, from the same input; the log-probabilities are those of
the answer's tokens, after all layers. The two runs differ in the pages alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters_store.lora_layout import LoRALayout
from adapters_store.slots import AdapterSlots
from benchmarks.record import record
from gateway.config import EngineConfig
from gateway.embedded import demo_path
from gateway.embedded.tenants import LIVE_TENANT, read_chats
from gateway.engine.kv_cache import KVCache
from gateway.engine.sampling_params import SamplingParams
from gateway.layers.forward_batch import ForwardBatch
from gateway.layers.rotary import RotaryTable
from gateway.llm import LLM
from gateway.models.decoder import Decoder
from gateway.models.loader import LoadedModel, load_model
from lora_kernels.attention import AttentionMetadata
from lora_kernels.layer_cache import FP8

BLOCK_SIZE, NUM_DIALOGUES, MAX_TOKENS = 16, 100, 64
Dialogue = tuple[list[int], list[int]]  # the token ids of a prompt and of its answer


@dataclass(frozen=True)
class Fp8Error:
    """attention: rms error over rms, the mean of the layers. mean_drift, max_drift: of log-probabilities, in nats.

    same_likeliest: the share of the answers' positions whose likeliest token is the same.
    """

    attention: float
    mean_drift: float
    max_drift: float
    same_likeliest: float


@torch.inference_mode()
def fp8_error(model: LoadedModel, dialogues: Iterable[Dialogue]) -> Fp8Error:
    """The error over the dialogues, each run by itself."""
    attention, drifts, same = [], [], []
    for prompt, answer in dialogues:
        ids = torch.tensor(prompt + answer, device=model.decoder.device)
        batch = _batch(model, ids)
        exact, fp8 = (_pages(model.decoder, len(ids), dtype) for dtype in (model.decoder.dtype, FP8))
        attention.append(_attention_error(model.decoder, batch, exact, fp8))
        of_answer = slice(len(prompt) - 1, -1)
        a, b = (model.decoder(batch, pages.layers).float().log_softmax(-1)[of_answer] for pages in (exact, fp8))
        drifts.append((a - b).gather(1, ids[len(prompt) :, None]).abs().flatten())
        same.append(a.argmax(-1) == b.argmax(-1))
    drift = torch.cat(drifts)
    return Fp8Error(
        attention=math.fsum(attention) / len(attention),
        mean_drift=float(drift.mean()),
        max_drift=float(drift.max()),
        same_likeliest=float(torch.cat(same).float().mean()),
    )


def demo_dialogues(count: int) -> list[Dialogue]:
    """So many of the demo's held-out messages with the embedded base's greedy answers."""
    chats = read_chats(demo_path() / f"{LIVE_TENANT}.heldout.jsonl")[:count]
    with LLM("embedded", device="cpu") as llm:
        outputs = llm.chat([chat[:-1] for chat in chats], SamplingParams(temperature=0, max_tokens=MAX_TOKENS))
    return [(output.prompt_token_ids, output.outputs[0].token_ids) for output in outputs]


def _batch(model: LoadedModel, ids: Tensor) -> ForwardBatch:
    """One prompt whose logits are wanted at every position, at the front of its pages."""
    decoder, spec, length = model.decoder, model.spec, len(ids)
    config = decoder.config
    table = RotaryTable(config.inv_freq, config.rope_attention_scaling, length, decoder.device, decoder.dtype)
    positions = torch.arange(length, device=decoder.device)
    cos, sin = table.at(positions)
    blocks = list(range(_num_blocks(length)))
    layout = LoRALayout.from_linears(spec.linears, spec.num_layers)
    return ForwardBatch(
        input_ids=ids,
        slot_mapping=positions,
        attention=AttentionMetadata.build([length], [length], [blocks], BLOCK_SIZE, decoder.device),
        cos=cos,
        sin=sin,
        last_rows=None,
        adapters=AdapterSlots(layout, 1, 1, decoder.dtype, decoder.device),
        segments=None,
        invariant=False,
    )


def _pages(decoder: Decoder, length: int, dtype: torch.dtype) -> KVCache:
    return KVCache.zeros(decoder.config, _num_blocks(length), BLOCK_SIZE, decoder.device, dtype)


def _num_blocks(length: int) -> int:
    return -(-length // BLOCK_SIZE)


def _attention_error(decoder: Decoder, batch: ForwardBatch, exact: KVCache, fp8: KVCache) -> float:
    """The mean of the layers, each of which gets what it gets without fp8."""
    x, delta = F.embedding(batch.input_ids, decoder.embed_tokens), None
    errors = []
    for layer, same, pages in zip(decoder.layers, exact.layers, fp8.layers, strict=True):
        normed = layer.input_norm(x, delta)
        attended = layer.attention(normed, batch, same)
        error = layer.attention(normed, batch, pages).float() - attended.float()
        errors.append(float(error.norm() / attended.float().norm()))
        delta = layer.mlp(layer.post_norm(x, attended), batch)
    return math.fsum(errors) / len(errors)


def main() -> None:
    """Measure the embedded base and record its figures."""
    model = load_model(EngineConfig(device="cpu"))
    dialogues = demo_dialogues(NUM_DIALOGUES)
    error = fp8_error(model, dialogues)
    note = f"{len(dialogues)} messages, {sum(len(answer) for _, answer in dialogues)} tokens of answers"
    for metric, value, unit in (
        ("attention_relative_error", error.attention, "x"),
        ("logprob_drift_mean", error.mean_drift, "nat"),
        ("logprob_drift_max", error.max_drift, "nat"),
        ("same_likeliest", error.same_likeliest, "x"),
    ):
        record("kv_cache", "fp8, embedded base", metric, value, unit, note=note)


if __name__ == "__main__":
    main()
