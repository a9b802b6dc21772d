"""Trained tokens as peft up to 0.21 writes them: `trainable_token_indices` of a LoRA, and a kind of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Final

from pydantic import Field, StrictInt

from adapters_store.adapter_config import AdapterConfig, ManyPatterns, Pattern
from adapters_store.adapter_contents import AdapterContents
from adapters_store.base_spec import EMBEDDINGS, BaseSpec, module_path
from adapters_store.manifest import EmbeddingModule
from adapters_store.module_matching import choose, refuse

TokenIds = Annotated[tuple[StrictInt, ...], Field(min_length=1, max_length=1 << 16)]
TokensByModule = Annotated[dict[Pattern, TokenIds], Field(min_length=1, max_length=2)]
_DELTA: Final = "trainable_tokens_delta"
_FIELD: Final = "trainable_token_indices"


class TrainableTokensConfig(AdapterConfig):
    """Rows of some tokens and nothing else; a tied base's two modules have them alike, each in a tensor of its own."""

    kind = "TRAINABLE_TOKENS"
    inert: ClassVar = frozenset({"init_weights"})

    token_indices: TokenIds
    target_modules: ManyPatterns | Pattern | None = None

    def contents(self, base: BaseSpec) -> AdapterContents:
        contents, paths = AdapterContents(), base.paths(EMBEDDINGS)
        targets = self.target_modules or (module_path(0, "embed_tokens"),)
        modules: list[EmbeddingModule] = [paths[path][1] for path in choose(paths, targets, what="embedding")]  # type: ignore[misc]
        _check_ids(base, self.token_indices, "token_indices")
        if base.tied and len(modules) > 1:
            raise refuse("target_modules", "the base ties lm_head to embed_tokens; name embed_tokens alone")
        tied = base.tied and modules == ["embed_tokens"]
        for module in EMBEDDINGS if tied else modules:
            contents.add_token_rows(base, (module,), _DELTA, self.token_indices)
        return contents


def add_trained_tokens(
    contents: AdapterContents, base: BaseSpec, trained: tuple[int, ...] | Mapping[str, tuple[int, ...]], *, tie: bool
) -> None:
    """What `trainable_token_indices` calls for: ids of the input embeddings, or of each module that it names.

    A tied base's lm_head has the rows of embed_tokens too, unless it is given others. tie: where `ensure_weight_tying`
    forbids that. Raises `AdapterInvalid`.
    """
    by_module = _by_module(trained)
    for ids in by_module.values():
        _check_ids(base, ids, _FIELD)
    embedded = by_module.get("embed_tokens")
    is_tied = base.tied and embedded is not None and by_module.get("lm_head", embedded) == embedded
    if base.tied and tie and embedded is not None and not is_tied:
        raise refuse(_FIELD, "the tokens of tied modules differ, which ensure_weight_tying forbids")
    groups = [EMBEDDINGS] if is_tied else [(module,) for module in EMBEDDINGS if module in by_module]
    whole = {module for rows in contents.token_rows for module in rows.modules}
    for modules in groups:
        if whole.intersection(modules):
            raise refuse(_FIELD, f"{' and '.join(modules)} cannot be trained whole by modules_to_save beside it")
        contents.add_token_rows(base, modules, f"token_adapter.{_DELTA}", by_module[modules[0]])


def _by_module(trained: tuple[int, ...] | Mapping[str, tuple[int, ...]]) -> dict[EmbeddingModule, tuple[int, ...]]:
    if not isinstance(trained, Mapping):
        return {"embed_tokens": trained}
    by_module: dict[EmbeddingModule, tuple[int, ...]] = {}
    for name, ids in trained.items():
        module = next((module for module in EMBEDDINGS if module_path(0, module).endswith(name)), None)
        if module is None or module in by_module:
            reason = "leads to neither embed_tokens nor lm_head" if module is None else f"is {module} a second time"
            raise refuse(_FIELD, f"{name[:80]!r} {reason}")
        by_module[module] = ids
    return by_module


def _check_ids(base: BaseSpec, ids: tuple[int, ...], field: str) -> None:
    wrong = next((token for token in ids if not 0 <= token < base.vocab_size), None)
    if wrong is not None:
        reason = f"the base has no token {wrong}, only {base.vocab_size}; tokens that were added are not served"
        raise refuse(field, reason)
    if len(set(ids)) < len(ids):
        raise refuse(field, "names a token twice")
