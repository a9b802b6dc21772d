"""Makes the embedded base, the demo's data and the ready adapters: `python -m gateway.embedded.build --out FOLDER`.

The stages: "base" (text, tokenizer, training; minutes on one H200), "finish" (a few small steps more, on a CPU),
"demo" (the tenants' files), "adapters" (LoRA on the NF4 base, about a minute each on two CPU cores, and their
accuracies) and "evaluate" (the NF4 base's accuracies on the instructions).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gateway.embedded import tenants
from gateway.embedded.adapters import LoRARecipe, load_nf4_base, save_adapter, train_adapter
from gateway.embedded.answers import accuracy
from gateway.embedded.instructions import Sources, chats, make_turn, task_names, to_messages
from gateway.embedded.packing import Rows, chat_rows, text_rows
from gateway.embedded.stories import story
from gateway.embedded.text import builtin_summaries, common_words, corpus, module_summaries
from gateway.embedded.tokenizer import render_turns, train_tokenizer
from gateway.embedded.train import Phase, PhaseData, Recipe, base_config, train_base

VOCAB_SIZE, MAX_LENGTH, NUM_WORDS = 2048, 1024, 3000
NUM_TRAIN, NUM_HELDOUT, DEMO_SEED = 320, 100, 7
EVALUATION_SEED = 999
OPEN_TASKS = {"tell", "continue_sentence", "write_sentence", "listing"}
FINISH_STEPS = 160
RECIPES = {
    "harbor": LoRARecipe(n_epochs=6),
    "juniper": LoRARecipe(),
    "quarry": LoRARecipe(n_epochs=12, rank=16, alpha=32),
}
STAGES = ("base", "finish", "demo", "adapters", "evaluate")


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is generated and trained. `steps` are those of the plain, the NF4 and the long NF4 phase."""

    steps: tuple[int, int, int]
    tokens_per_step: int
    num_chats: int
    text_passes: int
    num_stories: int


FULL = Size(steps=(5646, 2157, 2040), tokens_per_step=65_536, num_chats=2_400_000, text_passes=4, num_stories=1500)
TINY = Size(steps=(6, 3, 2), tokens_per_step=2048, num_chats=4000, text_passes=1, num_stories=20)
FINISH_CHATS = 16_000


def main() -> None:
    options = _options()
    out = Path(options.out)
    if "base" in options.stages:
        build_base(out / "base", TINY if options.tiny else FULL, options.device, options.seed)
    if "finish" in options.stages:
        finish_base(out / "base", 5 if options.tiny else FINISH_STEPS, options.device, options.seed)
    if "demo" in options.stages:
        tenants.write_demo(out / "demo", NUM_TRAIN, NUM_HELDOUT, DEMO_SEED)
    if "adapters" in options.stages:
        build_adapters(out, options.device)
    if "evaluate" in options.stages:
        evaluate_base(out / "base", options.device, options.seed)


@dataclasses.dataclass(frozen=True)
class Texts:
    """The corpus, split, and what the instruction data takes from it."""

    train: list[str]
    held_out: list[str]
    sources: Sources


def gather_texts(seed: int) -> Texts:
    """Read the running Python's text; 20 documents are held out."""
    documents = corpus()
    Random(seed).shuffle(documents)
    held_out, train = documents[:20], documents[20:]
    return Texts(train, held_out, Sources(common_words(train, NUM_WORDS), module_summaries(), builtin_summaries()))


def build_base(folder: Path, size: Size, device: str, seed: int) -> None:
    """Make the corpus and the instruction data, train tokenizer and model, and write the Hugging Face folder."""
    started = time.perf_counter()
    texts = gather_texts(seed)
    random = Random(seed)
    stories = [" ".join(story(random) for _ in range(5)) for _ in range(size.num_stories)]
    chat_texts = _chat_texts(seed, texts.sources, 20_000)
    tokenizer = train_tokenizer([*texts.train, *chat_texts], VOCAB_SIZE, MAX_LENGTH)
    backend, workers = tokenizer.backend_tokenizer, os.cpu_count() or 1

    @cache
    def data(length: int) -> PhaseData:
        num_chats = size.num_chats if length < MAX_LENGTH else size.num_chats // 4
        return PhaseData(
            text=text_rows(backend, texts.train + stories, length, size.text_passes, seed),
            chats=chat_rows(backend, texts.sources, length, num_chats, seed + length, workers),
            val_text=text_rows(backend, texts.held_out, length, 1, seed),
            val_chats=chat_rows(backend, texts.sources, length, 4000, EVALUATION_SEED, workers),
        )

    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    config = base_config(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    model = LlamaForCausalLM(config).to(device)
    recipe = _recipe(size, seed)
    losses = train_base(model, recipe, data)
    save_base(model, tokenizer, folder)
    record = {
        "recipe": dataclasses.asdict(recipe),
        "data": {
            **dataclasses.asdict(size),
            "documents": len(texts.train),
            "text_characters": sum(map(len, texts.train)),
            "rows": {name: _shape(rows) for name, rows in vars(data(recipe.phases[0].length)).items()},
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        **_environment(device),
        "seconds": round(time.perf_counter() - started),
        "losses": losses,
    }
    _write_json(folder / "training.json", record)


def finish_base(folder: Path, steps: int, device: str, seed: int) -> None:
    """A few small steps that add the finishing tasks: answers to any customer, and saying what it cannot do."""
    started = time.perf_counter()
    texts = gather_texts(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    backend, length = tokenizer.backend_tokenizer, 256
    recipe = Recipe(
        phases=(Phase(steps, length, nf4=True),),
        tokens_per_step=2048,
        text_share=0.125,
        peak_lr=5e-4,
        warmup_steps=10,
        decay_share=0.8,
        seed=seed + 1,
    )
    rows = PhaseData(
        text=text_rows(backend, texts.train, length, 1, seed),
        chats=chat_rows(backend, texts.sources, length, FINISH_CHATS, seed + 1, 2, finishing=True),
        val_chats=chat_rows(backend, texts.sources, length, 2000, EVALUATION_SEED, 2, finishing=True),
    )
    losses = train_base(model, recipe, lambda _: rows, log_every=10)
    save_base(model, tokenizer, folder)
    record = json.loads((folder / "training.json").read_text())
    seconds = round(time.perf_counter() - started)
    finish = {"recipe": dataclasses.asdict(recipe), "chats": FINISH_CHATS, **_environment(device)}
    _write_json(folder / "training.json", {**record, "finish": {**finish, "seconds": seconds, "losses": losses}})


def _environment(device: str) -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": "one H200" if device == "cuda" else "2 CPU cores",
    }


def _shape(rows: Rows) -> dict[str, int]:
    return {"rows": len(rows), "tokens": rows.ids.size, "trained_tokens": int(rows.trained.sum())}


def _recipe(size: Size, seed: int) -> Recipe:
    plain, nf4, long = size.steps
    phases = (Phase(plain, 256, nf4=False), Phase(nf4, 256, nf4=True), Phase(long, MAX_LENGTH, nf4=True))
    return Recipe(phases=phases, tokens_per_step=size.tokens_per_step, seed=seed)


def _chat_texts(seed: int, sources: Sources, count: int) -> list[str]:
    return ["".join(text for text, _ in render_turns(chat)) for chat in islice(chats(seed, sources), count)]


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights (bfloat16), config, generation config, tokenizer and chat template."""
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=128,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    _write_json(path, {key: value for key, value in config.items() if key not in ("is_local", "local_files_only")})


def build_adapters(out: Path, device: str) -> None:
    """Train each tenant's adapter, keep the ready ones, and record all accuracies beside the files."""
    report: dict[str, object] = {}
    for tenant in tenants.TENANTS:
        held_out = tenants.read_chats(out / "demo" / f"{tenant}.heldout.jsonl")
        recipe = RECIPES[tenant]
        base, tokenizer = load_nf4_base(out / "base")
        before = accuracy(base.to(device), tokenizer, held_out)
        model, trained = train_adapter(base, tokenizer, out / "demo" / f"{tenant}.train.jsonl", recipe)
        report[tenant] = {
            "base": before,
            "adapter": accuracy(model, tokenizer, held_out),
            **trained,
            "recipe": recipe.to_json(),
        }
        print(tenant, report[tenant], flush=True)
        if tenant in tenants.READY_TENANTS:
            save_adapter(model, out / "adapters" / tenant)
    live = {"live_tenant": tenants.LIVE_TENANT, **RECIPES[tenants.LIVE_TENANT].to_json()}
    _write_json(out / "demo" / "recipe.json", live)
    _write_json(out / "demo" / "accuracies.json", {"threads": torch.get_num_threads(), "device": device, **report})


def evaluate_base(folder: Path, device: str, seed: int) -> None:
    """Add the NF4 base's accuracies on the instructions to training.json."""
    base, tokenizer = load_nf4_base(folder)
    scores = instruction_accuracies(base.to(device), tokenizer, gather_texts(seed).sources)
    record = json.loads((folder / "training.json").read_text())
    _write_json(folder / "training.json", {**record, "nf4_accuracies": scores})


def instruction_accuracies(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sources: Sources, count: int = 40
) -> dict[str, float]:
    """Exact match on fresh examples of each task that has one right answer."""
    random = Random(EVALUATION_SEED)
    scores: dict[str, float] = {}
    for task in sorted(set(task_names()) - OPEN_TASKS):
        turns = [make_turn(task, random, sources) for _ in range(count)]
        scores[task] = accuracy(model, tokenizer, [to_messages([turn]) for turn in turns])
        print(f"{task}: {scores[task]:.2f}", flush=True)
    return scores


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gateway.embedded.build", description=__doc__)
    parser.add_argument("--out", required=True, help="folder to write base/, demo/ and adapters/ into")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--tiny", action="store_true", help="a few steps only, to try the build itself")
    return parser.parse_args()


if __name__ == "__main__":
    main()
