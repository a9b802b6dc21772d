"""Training files and fine-tune jobs, for both wires. All belong to the tenant of the caller's key."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, BinaryIO, Final, cast

from adapters_store.errors import UploadTooLarge, telling_full_disk
from gateway.errors import Conflict, InvalidRequest, ModelNotFound, PermissionDenied
from gateway.trainer.job import event_number

if TYPE_CHECKING:
    from adapters_store.accounts import Principal
    from gateway.server.context import ServerContext
    from gateway.trainer.files import TrainingFile
    from gateway.trainer.job import FineTuningEvent, FineTuningJob, FineTuningRequest

MAX_PAGE: Final = 100
_POLL_SECONDS: Final = 0.5
_EVENTS_AT_ONCE: Final = 1000


class FineTuningService:
    """A tenant's jobs. Every method may raise `StoreUnavailable`; another tenant's job is `NotFound`."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._jobs = context.jobs

    async def create(self, principal: Principal, request: FineTuningRequest) -> FineTuningJob:
        """Queue a job. Raises `ModelNotFound` for another model than the base, and `InvalidRequest`."""
        if not self._context.config.trainer.enabled:
            raise Conflict("This deployment runs no trainer (trainer.enabled is false).")
        base = (await self._context.router.info()).model_name
        if request.model != base:
            raise ModelNotFound(f"Only the base {base!r} can be fine-tuned, not {request.model!r}.", param="model")
        config = self._context.config
        most = min(principal.max_rank or config.limits.default_max_rank, config.engine.max_lora_rank)
        if request.peft.r > most:
            raise InvalidRequest(f"r may be at most {most}, not {request.peft.r}", param="peft.r")
        return await asyncio.to_thread(self._jobs.create, tenant_of(principal), request)

    async def get(self, principal: Principal, job_id: str) -> FineTuningJob:
        """One job. Raises `NotFound`."""
        return await asyncio.to_thread(self._jobs.get, tenant_of(principal), job_id)

    async def list(self, principal: Principal, after: str | None, limit: int) -> tuple[Sequence[FineTuningJob], bool]:
        """Jobs older than `after`, newest first, and whether there are more."""
        _check_page(limit)
        return await asyncio.to_thread(self._jobs.list, tenant_of(principal), after=after, limit=limit)

    async def cancel(self, principal: Principal, job_id: str) -> FineTuningJob:
        """Ask a job to stop. Raises `NotFound` or `Conflict`."""
        return await asyncio.to_thread(self._jobs.cancel, tenant_of(principal), job_id)

    async def latest_events(
        self, principal: Principal, job_id: str, after: str | None, limit: int
    ) -> tuple[Sequence[FineTuningEvent], bool]:
        """Events older than `after`, newest first (OpenAI's order), and whether there are more."""
        _check_page(limit)
        before = event_number(after) if after else None
        return await asyncio.to_thread(
            self._jobs.latest_events, tenant_of(principal), job_id, before=before, limit=limit
        )

    async def stream_events(
        self, principal: Principal, job_id: str, after: str | None
    ) -> AsyncGenerator[FineTuningEvent, None]:
        """Events after `after`, oldest first, then new ones as they come, until the job has ended."""
        tenant = tenant_of(principal)
        last = event_number(after) if after else 0
        while True:
            ended, events = await asyncio.to_thread(self._new_events, tenant, job_id, last)
            for event in events:
                last = event.number
                yield event
            if ended and len(events) < _EVENTS_AT_ONCE:
                return
            if not events:
                await asyncio.sleep(_POLL_SECONDS)

    def _new_events(self, tenant: str, job_id: str, last: int) -> tuple[bool, Sequence[FineTuningEvent]]:
        # The status first: an event that comes between the two reads is seen in this round or the next.
        ended = self._jobs.get(tenant, job_id).finished
        return ended, self._jobs.events(tenant, job_id, after=last, limit=_EVENTS_AT_ONCE)


class FileService:
    """A tenant's training files. Another tenant's file is `NotFound`."""

    def __init__(self, context: ServerContext) -> None:
        self._files = context.training_files
        self._transfers = context.transfers
        self._max_bytes = context.config.limits.max_training_file_bytes

    @asynccontextmanager
    async def receive(self) -> AsyncGenerator[ReceivedFile, None]:
        """Room on disk for a file that arrives; it is gone after the `async with` block, which may raise `DiskFull`."""
        with telling_full_disk(), tempfile.TemporaryFile(prefix="patchbay-upload-") as file:
            yield ReceivedFile(cast("BinaryIO", file), self._max_bytes)

    async def create(self, principal: Principal, filename: str, purpose: str, received: ReceivedFile) -> TrainingFile:
        """Keep a received file. Raises `InvalidRequest` or `UploadTooLarge`."""
        tenant, source, loop = tenant_of(principal), received.rewound(), asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._transfers, self._files.create, tenant, filename, purpose, source, self._max_bytes
        )

    async def get(self, principal: Principal, file_id: str) -> TrainingFile:
        """One file. Raises `NotFound`."""
        return await asyncio.to_thread(self._files.get, tenant_of(principal), file_id)

    async def list(self, principal: Principal, after: str | None, limit: int) -> tuple[Sequence[TrainingFile], bool]:
        """Files older than `after`, newest first, and whether there are more."""
        return await asyncio.to_thread(self._files.list, tenant_of(principal), after=after, limit=limit)

    async def open(self, principal: Principal, file_id: str) -> BinaryIO:
        """The bytes of a file. Raises `NotFound`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._transfers, self._files.open, tenant_of(principal), file_id)

    async def delete(self, principal: Principal, file_id: str) -> None:
        """Remove a file. Raises `NotFound`, or `Conflict` while a job needs it."""
        await asyncio.to_thread(self._files.delete, tenant_of(principal), file_id)


class ReceivedFile:
    """A file on its way to disk."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._num_bytes = 0

    async def write(self, chunk: bytes) -> None:
        """Take the next bytes. Raises `UploadTooLarge`."""
        self._num_bytes += len(chunk)
        if self._num_bytes > self._max_bytes:
            raise UploadTooLarge("the training file", self._max_bytes)
        await asyncio.to_thread(self._file.write, chunk)

    async def finish(self) -> None:
        """The file has come whole."""

    def rewound(self) -> BinaryIO:
        """The file, to be read from its start."""
        self._file.seek(0)
        return self._file


def tenant_of(principal: Principal) -> str:
    """The caller's tenant. Raises `PermissionDenied` for an admin key, which owns nothing."""
    if principal.tenant is None:
        raise PermissionDenied("This needs a tenant's key: an admin key owns no files and no jobs.")
    return principal.tenant


def _check_page(limit: int) -> None:
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest(f"limit must be in [1, {MAX_PAGE}], not {limit}", param="limit")
