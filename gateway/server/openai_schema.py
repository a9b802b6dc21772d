"""OpenAI's request bodies, with vLLM's extra sampling fields, and what they mean to the engine.

Fields that OpenAI documents and that change nothing here are accepted; fields that would change the answer and are not
supported, and unknown fields, are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from adapters_store.golden import MAX_GOLDEN, GoldenPrompt
from gateway.engine.sampling_params import SamplingParams
from gateway.errors import InvalidRequest
from gateway.trainer.hyperparameters import Hyperparameters, PeftOptions
from gateway.trainer.job import FineTuningRequest

Prompt = str | Sequence[int]
Body = TypeVar("Body", bound=BaseModel)

_NOTHING: Final[tuple[Any, ...]] = (None, False, "", [], {})


def _unsupported(why: str, *allowed: Any) -> AfterValidator:
    def refuse(value: Any) -> Any:
        if value in _NOTHING or value in allowed:
            return value
        raise PydanticCustomError("unsupported", "is not supported: {why}", {"why": why})

    return AfterValidator(refuse)


def _as_strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_text(value: Any) -> Any:
    """Join content parts of type text, as vLLM does for templates that take strings."""
    if not isinstance(value, list):
        return value
    return "\n".join([_text_of(part) for part in value])


def _text_of(part: Any) -> str:
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
    if kind != "text" or not isinstance(text, str):
        raise PydanticCustomError(
            "unsupported", "must be text: content parts of type {kind} are not supported", {"kind": ascii(kind)[:80]}
        )
    return text


_TOKEN_IDS: Final = 1 << 31  # more than any vocabulary has; the engine knows its own


def _as_prompts(value: Any) -> list[Prompt]:
    prompts = [value] if isinstance(value, str) or _is_token_list(value) else value
    if (
        not isinstance(prompts, list)
        or not prompts
        or not all(isinstance(p, str) or _is_token_list(p) for p in prompts)
    ):
        raise PydanticCustomError(
            "prompt", "must be a string, a list of strings, a list of token ids or a list of those"
        )
    for prompt in prompts:
        _check_prompt(prompt)
    return prompts


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _check_prompt(prompt: Prompt) -> None:
    """That it can be sent to a replica."""
    if not isinstance(prompt, str):
        if not all(abs(token) < _TOKEN_IDS for token in prompt):
            raise PydanticCustomError("prompt", "token ids must be in the vocabulary")
        return
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", "half of a surrogate pair") from None


_SCALARS: Final = (
    *("temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty", "top_k", "min_p"),
    *("repetition_penalty", "min_tokens", "ignore_eos", "skip_special_tokens", "num_speculative_tokens"),
)


class _Closed(BaseModel):
    # Any limit of length makes pydantic refuse half of a surrogate pair, which nothing behind this can encode.
    model_config = ConfigDict(extra="forbid", strict=True, str_min_length=0)


class StreamOptions(_Closed):
    """`include_usage` adds a last chunk that holds the token counts and no choices."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, _unsupported("chunks are not padded")] = None


class _Sampling(_Closed):
    """What both completion routes accept."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    max_tokens: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_as_strings)] = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # vLLM's, through `extra_body`.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Annotated[int, Field(gt=-_TOKEN_IDS, lt=_TOKEN_IDS)]] | None = None
    skip_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = None
    # Patchbay's: tokens guessed ahead.
    num_speculative_tokens: int | None = None
    # Keeps a user on one side of an alias with a canary; never changes the answer of a version.
    user: str | None = None

    @property
    def caller(self) -> str | None:
        """Whose request it is, where the request says so."""
        return self.user

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _sampling_params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        given = {name: value for name in _SCALARS if (value := getattr(self, name)) is not None}
        return SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=_token_biases(self.logit_bias or {}),
            **given,
        )


def _token_biases(biases: Mapping[str, float]) -> dict[int, float]:
    try:
        by_id = {int(token): bias for token, bias in biases.items()}
    except ValueError:
        raise InvalidRequest("the keys of logit_bias must be token ids", param="logit_bias") from None
    if not all(abs(token_id) < _TOKEN_IDS for token_id in by_id):
        raise InvalidRequest("the keys of logit_bias must be in the vocabulary", param="logit_bias")
    return by_id


class CompletionRequest(_Sampling):
    """POST /v1/completions."""

    prompt: Annotated[Any, AfterValidator(_as_prompts)]
    logprobs: int | None = None
    best_of: int | None = None
    echo: Annotated[Any, _unsupported("the prompt is not repeated in the answer")] = None
    suffix: Annotated[Any, _unsupported("text is only continued, never filled in")] = None

    def to_sampling_params(self) -> SamplingParams:
        """Raises `InvalidRequest` naming the field that is out of range."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest("best_of is supported only where it equals n", param="best_of")
        return self._sampling_params(max_tokens=self.max_tokens, logprobs=self.logprobs)


class ChatMessage(_Closed):
    """One turn. Content parts of type text become one string; what the SDK echoes of an answer is accepted empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text)]
    name: str | None = None
    refusal: Annotated[Any, _unsupported("only text can be given back to the model")] = None
    annotations: Annotated[Any, _unsupported("only text can be given back to the model")] = None
    audio: Annotated[Any, _unsupported("only text can be given back to the model")] = None
    function_call: Annotated[Any, _unsupported("tool calling")] = None
    tool_calls: Annotated[Any, _unsupported("tool calling")] = None

    def to_template(self) -> dict[str, str]:
        """The message as chat templates take it; "developer" is the newer name of "system"."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatCompletionRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    safety_identifier: str | None = None  # OpenAI's newer name of `user`
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # Inert: they change billing, bookkeeping or caching at OpenAI, never the answer.
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None
    store: Annotated[Any, _unsupported("answers are not kept")] = None
    modalities: Annotated[Any, _unsupported("the only modality is text", ["text"])] = None
    response_format: Annotated[Any, _unsupported("the only format is text", {"type": "text"})] = None
    tools: Annotated[Any, _unsupported("tool calling")] = None
    tool_choice: Annotated[Any, _unsupported("tool calling", "none", "auto")] = None
    functions: Annotated[Any, _unsupported("tool calling")] = None
    function_call: Annotated[Any, _unsupported("tool calling", "none", "auto")] = None
    audio: Annotated[Any, _unsupported("the only modality is text")] = None
    prediction: Annotated[Any, _unsupported("predicted outputs")] = None
    moderation: Annotated[Any, _unsupported("no moderation model is served")] = None
    reasoning_effort: Annotated[Any, _unsupported("the model does not reason in a block of its own", "none")] = None
    verbosity: Annotated[Any, _unsupported("ask for it in the prompt")] = None
    web_search_options: Annotated[Any, _unsupported("nothing is searched")] = None

    @property
    def caller(self) -> str | None:
        """Whose request it is, where the request says so."""
        return self.user or self.safety_identifier

    def to_sampling_params(self) -> SamplingParams:
        """Raises `InvalidRequest` naming the field that is out of range."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequest("give max_completion_tokens or max_tokens, not both", param="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        limit = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return self._sampling_params(max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class SupervisedMethod(_Closed):
    """`method.supervised`."""

    model_config = ConfigDict(extra="forbid", strict=False)
    hyperparameters: Hyperparameters = Hyperparameters()


class FineTuningMethod(_Closed):
    """`method`: supervised fine-tuning is the one that the trainer runs."""

    type: Literal["supervised"]
    supervised: SupervisedMethod | None = None


class FineTuningJobRequest(_Closed):
    """POST /v1/fine_tuning/jobs; `peft` is Patchbay's own block, through `extra_body`."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    training_file: Annotated[str, Field(min_length=1, max_length=64)]
    validation_file: Annotated[str, Field(max_length=64)] | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    method: FineTuningMethod | None = None
    hyperparameters: Hyperparameters | None = None
    peft: Annotated[PeftOptions, Field(strict=False)] = PeftOptions()
    integrations: Annotated[Any, _unsupported("events are read from the job itself")] = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None

    def chosen_hyperparameters(self) -> Hyperparameters:
        """Those of `method`, else those of the older top-level field, else all "auto"."""
        if self.method is not None and self.method.supervised is not None:
            return self.method.supervised.hyperparameters
        return self.hyperparameters or Hyperparameters()

    def to_request(self) -> FineTuningRequest:
        """What the trainer's queue takes."""
        return FineTuningRequest(
            model=self.model,
            training_file=self.training_file,
            validation_file=self.validation_file,
            suffix=self.suffix,
            seed=self.seed,
            hyperparameters=self.chosen_hyperparameters(),
            peft=self.peft,
            metadata=self.metadata or {},
        )


class TenantRequest(_Closed):
    """POST /v1/tenants. max_rank: the largest adapter rank that the tenant may upload or train."""

    id: Annotated[str, Field(min_length=1, max_length=64)]
    max_rank: Annotated[int, Field(ge=1, le=1024)] | None = None


class KeyRequest(_Closed):
    """POST /v1/keys. A tenant's key names its tenant; an admin key names none."""

    role: Literal["tenant", "admin"] = "tenant"
    tenant: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class CanaryRequest(_Closed):
    """A second version behind an alias, and the share of its callers in percent."""

    version: Annotated[int, Field(ge=1)]
    percent: int


class AliasRequest(_Closed):
    """PUT /v1/adapters/{tenant}/{name}/aliases/{alias}."""

    version: Annotated[int, Field(ge=1)]
    canary: CanaryRequest | None = None


class LoadLoRARequest(_Closed):
    """POST /v1/load_lora_adapter, vLLM's. lora_path: a folder that the server reads."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadLoRARequest(_Closed):
    """POST /v1/unload_lora_adapter, vLLM's. lora_int_id is vLLM's own number, of no meaning here."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_int_id: int | None = None


class TagRequest(_Closed):
    """PUT .../tags/{key}, of an adapter or of a version."""

    value: str


class RollbackRequest(_Closed):
    """POST /v1/adapters/{tenant}/{name}/rollback."""

    alias: Annotated[str, Field(min_length=1, max_length=64)] = "default"


class SelfTestRequest(_Closed):
    """POST /v1/adapters/{tenant}/{name}/versions/{version}/test. golden: in the place of its upload's, if any."""

    golden: Annotated[list[GoldenPrompt], Field(max_length=MAX_GOLDEN)] = []


def invalid_request(kind: str, path: Sequence[str | int], message: str) -> InvalidRequest:
    """One of pydantic's complaints (its type, its path inside the body, its text) as the error that callers see."""
    param = _dotted(path)
    if kind == "extra_forbidden":
        key = str(path[-1]).encode(errors="replace").decode()
        param = ".".join(filter(None, (_dotted(path[:-1]), key)))
        return InvalidRequest(f"Unrecognized request argument supplied: {param}", param=param)
    if kind == "string_unicode":
        message = "is no text: it holds half of a surrogate pair, such as \\ud83d; send whole characters"
        param = param or "a key of the body"
    if not param:
        return InvalidRequest("The body must be a JSON object (Content-Type: application/json).")
    if kind == "missing":
        return InvalidRequest(f"Missing required parameter: {param!r}.", param=param)
    message = message[:1].lower() + message[1:]
    return InvalidRequest(f"{param} {message}" if message.startswith("is ") else f"{param}: {message}", param=param)


def valid(model: type[Body], fields: Mapping[str, Any]) -> Body:
    """The fields of a gRPC request, checked by the rules of the HTTP body. Raises `InvalidRequest`."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise invalid_request(first["type"], first["loc"], first["msg"]) from None


def _dotted(path: Sequence[str | int]) -> str:
    """("messages", 0, "content") as OpenAI writes it: messages[0].content. Names of union branches are left out."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in ("int", "float", "str"):
            text += f".{part}" if text else part
    return text
