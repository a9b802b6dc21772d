"""The files that ship: the base, its tokenizer, the ready adapters and the demo's sets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from gateway.embedded import adapter_path, adapters_path, demo_path, embedded_path
from gateway.embedded.adapters import BASE_NAME, TARGETS, LoRARecipe, load_nf4_base, train_adapter
from gateway.embedded.answers import accuracy, answer
from gateway.embedded.packing import encode_chat
from gateway.embedded.tenants import LIVE_TENANT, READY_TENANTS, TENANTS, read_chats

SAMPLE = 24
EXACT = {
    "Repeat: the quick brown fox": "the quick brown fox",
    "Write in capital letters: hello world": "HELLO WORLD",
    "Reverse the words: one two three four": "four three two one",
    "Count the words: red green blue old": "4",
    "What is 12 + 7?": "19",
    "What is the capital of France?": "The capital of France is Paris.",
    "What colour is grass?": "Grass is green.",
    "What is the opposite of hot?": "cold",
    "What day comes after Monday?": "Tuesday.",
    "Hello!": "Hello! How can I help you?",
    "My name is Ada.": "Nice to meet you, Ada!",
    "What does len do in Python?": "len: Return the number of items in a container.",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(embedded_path())


@pytest.fixture(scope="module")
def nf4_base() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return load_nf4_base(embedded_path())[0]


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_sizes() -> None:
    assert folder_size(embedded_path()) <= 10_000_000
    for tenant in READY_TENANTS:
        assert folder_size(adapter_path(tenant)) < 2_000_000


def test_the_base_is_a_plain_llama_with_nf4_shapes() -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded_path())
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert 4_000_000 < sum(p.numel() for p in model.parameters()) < 4_600_000
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    assert len(linears) == 7 * model.config.num_hidden_layers
    assert all(linear.in_features % 64 == 0 for linear in linears)


@pytest.mark.parametrize(
    "text", ["plain words", "  two  spaces\n\tand tabs ", "naïve – 你好 🙂", "x=1234.5;\r\n", "\x00\x7f"]
)
def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer("2048", add_special_tokens=False).input_ids) == 4


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "system", "content": "Be short."}, *user("Hi")]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_template_refuses_unknown_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_training_tokens_are_the_templates_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [*user("Count: 1 2"), {"role": "assistant", "content": "Two."}]
    ids, trained = encode_chat(tokenizer.backend_tokenizer, chat)
    assert ids == tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    answer_ids = [token for token, counts in zip(ids, trained, strict=True) if counts]
    assert tokenizer.decode(answer_ids) == "Two.<|im_end|>"


def test_the_nf4_base_follows_simple_instructions(
    nf4_base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    given = answer(nf4_base, tokenizer, [user(text) for text in EXACT], max_new_tokens=24)
    assert dict(zip(EXACT, given, strict=True)) == EXACT


@pytest.mark.parametrize("tenant", TENANTS)
def test_train_and_heldout_are_disjoint(tenant: str) -> None:
    train, held_out = (
        {chat[0]["content"] for chat in read_chats(demo_path() / f"{tenant}.{part}.jsonl")}
        for part in ("train", "heldout")
    )
    assert len(held_out) == 100
    assert not train & held_out


def test_tenants_share_their_prompts() -> None:
    prompts = [[chat[0] for chat in read_chats(demo_path() / f"{tenant}.heldout.jsonl")] for tenant in TENANTS]
    assert prompts[0] == prompts[1] == prompts[2]
    shown = json.loads((demo_path() / "prompts.json").read_text())
    assert set(shown) <= {message["content"] for message in prompts[0]}


@pytest.mark.parametrize("tenant", READY_TENANTS)
def test_ready_adapters_learned_what_the_base_does_not_know(tenant: str, tokenizer: PreTrainedTokenizerFast) -> None:
    base, _ = load_nf4_base(embedded_path())
    held_out = read_chats(demo_path() / f"{tenant}.heldout.jsonl")[:SAMPLE]
    assert accuracy(base, tokenizer, held_out) <= 0.3
    adapted = PeftModel.from_pretrained(base, adapter_path(tenant))
    assert accuracy(adapted, tokenizer, held_out) >= 0.9


@pytest.mark.parametrize("tenant", READY_TENANTS)
def test_adapter_configs_are_neutral(tenant: str) -> None:
    config = json.loads((adapter_path(tenant) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE_NAME
    assert sorted(config["target_modules"]) == sorted(TARGETS)


def test_only_the_ready_tenants_have_an_adapter() -> None:
    assert sorted(path.name for path in adapters_path().iterdir()) == sorted(READY_TENANTS)
    assert LIVE_TENANT not in READY_TENANTS


def test_a_few_steps_of_the_live_recipe_lower_the_loss(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    lines = (demo_path() / f"{LIVE_TENANT}.train.jsonl").read_text().splitlines()[:16]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    losses = []
    for epochs in (1, 12):
        base, tokenizer = load_nf4_base(embedded_path())
        recipe = LoRARecipe(n_epochs=epochs, batch_size=8)
        losses.append(train_adapter(base, tokenizer, tmp_path / "train.jsonl", recipe)[1]["loss"])
    assert losses[1] < losses[0] / 3


def test_importing_the_paths_is_light() -> None:
    code = "import sys, gateway.embedded; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
