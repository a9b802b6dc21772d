"""The engine for scripts: prompts in, completions out, in this process and without a server, in vLLM's style."""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from adapters_store.blobs import BlobStore
from adapters_store.file_names import KEPT_FILES
from adapters_store.upload import Staging
from gateway.config import EngineConfig, from_dict
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef, FinishReason, GenerateRequest, TokenDelta, TokenLogprob, Usage
from gateway.engine.sampling_params import SamplingParams

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
_CHUNK = 1 << 20


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's `n` completions. logprobs: one entry a token where they were asked for, else empty."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class RequestOutput:
    """What became of one prompt. error: why, where a completion's finish reason is "error"."""

    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    usage: Usage | None = None
    error: BaseException | None = None

    def add(self, delta: TokenDelta) -> None:
        """Take what one step added to one of the completions."""
        output = self.outputs[delta.index]
        output.text += delta.text
        output.token_ids += delta.token_ids
        output.logprobs += delta.logprobs
        output.finish_reason = delta.finish_reason
        self.usage = delta.usage or self.usage
        self.error = delta.error or self.error


class LLM:
    """A base and any adapters of it. Not for several threads at once.

        with LLM("embedded") as llm:
            pirate = llm.load_adapter("path/to/peft/folder")
            outputs = llm.generate(["Hello", "Hello"], SamplingParams(max_tokens=16), adapters=[None, pirate])

    model: a Hugging Face folder, or "embedded" for the model that ships with Patchbay. settings: `EngineConfig`'s.
    Raises `ConfigInvalid` or `BaseModelUnsupported`.
    """

    def __init__(self, model: str = "embedded", **settings: Any) -> None:
        config = from_dict(EngineConfig, {"base": model, **settings}, "engine")
        self._folder = tempfile.TemporaryDirectory(prefix="patchbay-llm-")
        self._blobs = BlobStore(f"file://{Path(self._folder.name) / 'blobs'}")
        self._ready = threading.Event()
        self._config = config
        self._engine = LLMEngine(config, self._blobs, self._ready.set)
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and remove the adapters' copies."""
        self._engine.close()
        self._folder.cleanup()

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer, of transformers."""
        return self._engine.model.tokenizer

    def load_adapter(self, folder: str | Path) -> AdapterRef:
        """Check an adapter in peft's format as an upload is checked, and keep a copy to serve.

        Raises `AdapterInvalid`, naming the file and the field or tensor at fault.
        """
        folder = Path(folder)
        with Staging(Path(self._folder.name) / "staging") as staging:
            for name in KEPT_FILES:
                if (folder / name).exists():
                    with (folder / name).open("rb") as file:
                        staging.add_file(name, iter(partial(file.read, _CHUNK), b""))
            staged = staging.validate(
                self._engine.model.spec,
                self._config.max_lora_rank,
                max_virtual_tokens=self._config.max_virtual_tokens,
                max_token_rows=self._config.num_token_rows,
            )
            self._blobs.put(staged.manifest.digest, staged.path)
        return AdapterRef.of(f"local/{folder.name}:1", staged.manifest)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapters: AdapterRef | Sequence[AdapterRef | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, texts or token ids, in one batch; in their order.

        sampling_params, adapters: one for all, or one for each prompt. Raises `InvalidRequest` or
        `ContextLengthExceeded` before anything runs when a prompt is refused; what fails later is in its output.
        """
        many = [prompts] if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)) else prompts
        return self._run([{"prompt": prompt} for prompt in many], sampling_params, adapters)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapters: AdapterRef | Sequence[AdapterRef | None] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, lists of {"role", "content"}, by the base's chat template; otherwise as `generate`."""
        many = [messages] if messages and isinstance(messages[0], Mapping) else messages
        return self._run([{"messages": conversation} for conversation in many], sampling_params, adapters)

    def _run(
        self,
        inputs: Sequence[dict[str, Any]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        adapters: AdapterRef | Sequence[AdapterRef | None] | None,
    ) -> list[RequestOutput]:
        given_params = SamplingParams() if sampling_params is None else sampling_params
        params = _for_each(given_params, SamplingParams, len(inputs), "sampling_params")
        refs = _for_each(adapters, (AdapterRef, type(None)), len(inputs), "adapters")
        requests = [
            GenerateRequest(str(next(self._numbers)), sampling, adapter=ref, **given)
            for given, sampling, ref in zip(inputs, params, refs, strict=True)
        ]
        prompts = [self._engine.encode(request) for request in requests]
        outputs = {
            request.request_id: RequestOutput(prompt, [CompletionOutput(i) for i in range(request.sampling.n)])
            for request, prompt in zip(requests, prompts, strict=True)
        }
        try:
            for request, prompt in zip(requests, prompts, strict=True):
                self._engine.add(request, prompt)
            for delta in self._deltas():
                outputs[delta.request_id].add(delta)
        except BaseException as error:
            self._engine.abort_all("error", error)
            raise
        return list(outputs.values())

    def _deltas(self) -> Iterator[TokenDelta]:
        """What the steps bring, until nothing is left to do."""
        while self._engine.has_work:
            self._ready.clear()
            step = self._engine.step()
            yield from step.deltas
            if step.num_tokens == 0 and self._engine.has_work:
                self._ready.wait(self._engine.poll_interval)


def _for_each(given: Any, kind: Any, count: int, name: str) -> list[Any]:
    """One of `kind` for all, or a sequence with one for each. Raises ValueError when their number differs."""
    if isinstance(given, kind):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{len(given)} {name} for {count} prompts; give one for all, or one for each")
    return list(given)
