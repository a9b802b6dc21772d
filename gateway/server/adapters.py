"""The adapters of a tenant, for both wires: uploads, versions and aliases."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import AdapterNotFound, StoreError
from adapters_store.export import PeftTar
from adapters_store.names import DEFAULT_ALIAS, check_name
from adapters_store.reports import VersionReport
from adapters_store.tags import AdapterTags
from adapters_store.upload import Staging, UploadLimits, UploadSink
from gateway.errors import AdapterNotFinite, InvalidRequest, PermissionDenied
from gateway.server.import_folder import ImportFolder

if TYPE_CHECKING:
    from adapters_store.accounts import Principal
    from adapters_store.aliases import Canary
    from adapters_store.golden import GoldenPrompt
    from adapters_store.registry import AdapterInfo
    from adapters_store.versions import AdapterVersion
    from gateway.server.context import ServerContext

logger = logging.getLogger(__name__)
T = TypeVar("T")

ARCHIVE_SUFFIXES: Final = (".tar", ".tar.gz", ".tgz", ".zip")
_CONCURRENT_TESTS: Final = 2  # those of uploads wait for none of them
_GRACE_S: Final = 10.0
_PIECE: Final = 1 << 20  # bytes that the upload's thread writes at once, while as many arrive


class AdapterService:
    """What a caller may do with adapters. An admin key reaches every tenant's, a tenant's key its own.

    Every method may raise `StoreUnavailable`; an adapter of another tenant is `AdapterNotFound`, as an absent one.
    """

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._registry = context.registry
        self._tags = AdapterTags(context.database)
        self._tests = asyncio.Semaphore(_CONCURRENT_TESTS)

    async def list(self, principal: Principal) -> Sequence[AdapterInfo]:
        """The adapters that the caller may call, by tenant and name."""
        return await asyncio.to_thread(reachable_adapters, self._context, principal)

    async def get(self, principal: Principal, tenant: str, name: str) -> AdapterInfo:
        """One adapter. Raises `AdapterNotFound`."""
        _check_reach(principal, tenant, name)
        return await asyncio.to_thread(self._registry.get, tenant, name)

    async def set_alias(
        self, principal: Principal, tenant: str, name: str, alias: str, version: int, canary: Canary | None = None
    ) -> AdapterInfo:
        """Point an alias at a version, and part of its requests at a canary, where one is given.

        Raises `AdapterNotFound`, `VersionNotReady`, `InvalidName` or `InvalidRequest`.
        """
        _check_reach(principal, tenant, name)
        if canary is not None:
            _check_canary(version, canary)
        await asyncio.to_thread(self._registry.set_alias, tenant, name, alias, version, canary)
        return await self.get(principal, tenant, name)

    async def rollback(self, principal: Principal, tenant: str, name: str, alias: str) -> AdapterInfo:
        """Drop an alias's canary, or point it at the version before.

        Raises `AdapterNotFound` or `NoPreviousVersion`.
        """
        _check_reach(principal, tenant, name)
        await asyncio.to_thread(self._registry.rollback, tenant, name, alias)
        return await self.get(principal, tenant, name)

    async def test(
        self, principal: Principal, tenant: str, name: str, version: int, golden: Sequence[GoldenPrompt]
    ) -> AdapterVersion:
        """Run a version's self-test again, and make it ready or quarantined by what comes of it.

        golden: none means those of the version's upload.
        Raises `AdapterNotFound` or `RetestConflict`. What keeps the test from running changes nothing: then it raises
        `EngineUnavailable`, `AdapterLoadFailed` or, for golden prompts that the model cannot take, `GatewayError`.
        """
        _check_reach(principal, tenant, name)
        async with self._tests:
            tested = await asyncio.to_thread(self._registry.testable, tenant, name, version)
            asked = golden or await asyncio.to_thread(self._registry.golden, tested)
            report = await self._context.self_test.run(tested, asked)
            return await asyncio.to_thread(self._registry.record_test, tested, report)

    async def set_tag(
        self, principal: Principal, tenant: str, name: str, version: int | None, key: str, value: str
    ) -> AdapterInfo:
        """Tag an adapter, or one of its versions. Raises `AdapterNotFound` or `InvalidTag`."""
        _check_reach(principal, tenant, name)
        await asyncio.to_thread(self._tags.set, tenant, name, key, value, version)
        return await self.get(principal, tenant, name)

    async def delete_tag(
        self, principal: Principal, tenant: str, name: str, version: int | None, key: str
    ) -> AdapterInfo:
        """Take a tag away. Raises `AdapterNotFound`."""
        _check_reach(principal, tenant, name)
        await asyncio.to_thread(self._tags.delete, tenant, name, key, version)
        return await self.get(principal, tenant, name)

    async def export(self, principal: Principal, tenant: str, name: str, version: int) -> PeftTar:
        """A version as a peft folder. Raises `AdapterNotFound` or `AdapterLoadFailed`."""
        _check_reach(principal, tenant, name)
        base, loop = (await self._context.router.info()).base_spec, asyncio.get_running_loop()
        return await loop.run_in_executor(self._context.transfers, self._export, tenant, name, version, base)

    def _export(self, tenant: str, name: str, version: int, base: BaseSpec) -> PeftTar:
        found = self._registry.resolve(tenant, f"{tenant}/{name}:{version}")
        return PeftTar.of(f"{name}-{version}", found.manifest, base, self._context.blobs.open(found.digest))

    async def has_alias(self, principal: Principal, tenant: str, name: str, alias: str) -> bool:
        """Whether an adapter exists and has this alias."""
        try:
            return alias in (await self.get(principal, tenant, name)).aliases
        except AdapterNotFound:
            return False

    async def delete_alias(self, principal: Principal, tenant: str, name: str, alias: str) -> AdapterInfo:
        """Take an alias and its canary away; their versions stay. Raises `AdapterNotFound`."""
        _check_reach(principal, tenant, name)
        await asyncio.to_thread(self._registry.delete_alias, tenant, name, alias)
        return await self.get(principal, tenant, name)

    async def delete(self, principal: Principal, tenant: str, name: str, version: int) -> None:
        """Retire a version: no new request gets it, and its bytes go when those that run with it have ended.

        Raises `AdapterNotFound` or `AliasInUse`.
        """
        _check_reach(principal, tenant, name)
        await asyncio.to_thread(self._registry.delete, tenant, name, version)

    def upload(self, principal: Principal) -> Upload:
        """An upload to fill and publish inside `async with`, which may raise `Overloaded`: the tenant has too many."""
        return Upload(self._context, principal)


class Upload(AbstractAsyncContextManager["Upload"]):
    """One upload on its way: nothing of it is left after the `async with` block but what was published.

    All blocking work is done, in order, by one thread of its own, so a cancelled call never races its own clean-up.
    """

    def __init__(self, context: ServerContext, principal: Principal) -> None:
        self._context = context
        self._turns = context.upload_turns
        self._principal = principal
        self._thread = ThreadPoolExecutor(1, "patchbay-upload")
        self._staged: Staging | None = None

    async def __aenter__(self) -> Self:
        config = self._context.config
        own = config.limits
        limits = UploadLimits(own.max_upload_bytes, own.max_unpacked_bytes, own.max_import_error)
        root = config.store.staging
        self._turns.begin(self._principal.tenant)
        try:
            await self.run(lambda: self._open(root, limits))
        except BaseException:
            self._close()
            self._turns.end(self._principal.tenant)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await asyncio.shield(asyncio.wrap_future(self._close()))
        finally:
            self._turns.end(self._principal.tenant)

    @property
    def _staging(self) -> Staging:
        assert self._staged is not None, "used outside of `async with`"
        return self._staged

    async def begin(self, file_name: str, *, archive: bool | None = None) -> UploadFile:
        """Begin the next file. archive: whether to unpack it; None goes by the name's suffix.

        Raises `AdapterInvalid` when the name is refused.
        """
        if archive is None:
            archive = file_name.endswith(ARCHIVE_SUFFIXES)
        begin = self._staging.begin_archive if archive else self._staging.begin_file
        sink = await self.run(lambda: begin(file_name))
        await self.run(self._staging.expect_validation)
        return UploadFile(self, sink, is_archive=archive)

    async def add_folder(self, path: str) -> None:
        """Take the peft folder at a path or URL that the operator lets the server read (`store.import_roots`).

        Raises `PermissionDenied` or `InvalidRequest`, `AdapterInvalid` or `UploadTooLarge`.
        """
        roots = self._context.config.store.import_roots
        await self.run(lambda: ImportFolder(path, roots).stage(self._staging))

    async def publish(
        self, name: str, alias: str = DEFAULT_ALIAS, base_fingerprint: str | None = None
    ) -> AdapterVersion:
        """Check and test what came, and publish it as the next version of `name` ("name" or "tenant/name").

        base_fingerprint: of the base that the adapter was trained on, where the uploader knows it. Raises
        `AdapterInvalid`, `InvalidName`, `TenantNotFound`, `PermissionDenied`, or `EngineUnavailable` when no replica
        could test it: then nothing is kept. Raises `SelfTestFailed` where the version is kept, quarantined.
        """
        tenant, own_name = self.target(name, alias)
        base = (await self._context.router.info()).base_spec
        engine = self._context.config.engine
        most = {"max_virtual_tokens": engine.max_virtual_tokens, "max_token_rows": engine.num_token_rows}
        max_rank = await self.run(lambda: self._max_rank(tenant))
        staged = await self.check(lambda: self._staging.validate(base, max_rank, base_fingerprint, **most))
        test = self._test(staged.golden) if self._context.config.store.self_test else None
        registry = self._context.registry
        version = await self.run(lambda: registry.publish(tenant, own_name, staged, alias, test=test))
        self._context.metrics.published()
        return version

    def target(self, name: str, alias: str = DEFAULT_ALIAS) -> tuple[str, str]:
        """The tenant and the name to publish under. Raises `InvalidName` or `PermissionDenied`."""
        tenant, own_name = split_name(self._principal, name)
        if self._principal.tenant not in (None, tenant):
            raise PermissionDenied(
                f"This key publishes under {self._principal.tenant}/ only, not {tenant}/.", param="name"
            )
        check_name("name", own_name)
        check_name("alias", alias)
        return tenant, own_name

    async def run(self, work: Callable[[], T]) -> T:
        """Do blocking work in the upload's thread."""
        return await asyncio.wrap_future(self.start(work))

    async def check(self, work: Callable[[], T]) -> T:
        """Unpack or validate in the upload's thread: under way until it ends, also where the call is cancelled."""
        loop = asyncio.get_running_loop()
        release = await self._turns.check(self._principal.tenant)
        checked = self.start(work)
        checked.add_done_callback(lambda _: loop.call_soon_threadsafe(release))
        return await asyncio.wrap_future(checked)

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Have the upload's thread do blocking work, after all that was started before."""
        return self._thread.submit(work)

    def _test(self, golden: Sequence[GoldenPrompt]) -> Callable[[AdapterVersion], VersionReport]:
        """The self-test for the upload's thread, which waits while this loop does it."""
        loop, self_test = asyncio.get_running_loop(), self._context.self_test
        patience = self._context.config.store.self_test_timeout_s + _GRACE_S

        def test(version: AdapterVersion) -> VersionReport:
            return asyncio.run_coroutine_threadsafe(self_test.run(version, golden), loop).result(patience)

        return test

    def _open(self, root: Path, limits: UploadLimits) -> None:
        self._staged = Staging(root, limits)

    def _close(self) -> Future[None]:
        # Queued behind whatever still runs, the opening too: so it sees the staging that is there by then.
        closed = self._thread.submit(lambda: self._staged.close() if self._staged else None)
        self._thread.shutdown(wait=False)
        return closed

    def _max_rank(self, tenant: str) -> int:
        own = self._context.accounts.get_tenant(tenant).max_rank
        config = self._context.config
        return min(own or config.limits.default_max_rank, config.engine.max_lora_rank)


class UploadFile:
    """One file of an upload, written in pieces of some size while the next one arrives."""

    def __init__(self, upload: Upload, sink: UploadSink, *, is_archive: bool) -> None:
        self._upload = upload
        self._sink = sink
        self._is_archive = is_archive
        self._chunks: list[bytes] = []
        self._num_bytes = 0
        self._writing: Future[None] | None = None

    async def write(self, chunk: bytes) -> None:
        """Take the next bytes. Raises `UploadTooLarge`, maybe a piece later."""
        self._chunks.append(chunk)
        self._num_bytes += len(chunk)
        if self._num_bytes >= _PIECE:
            await self._write_piece()

    async def finish(self) -> None:
        """The file has come whole; an archive is unpacked now. Raises `AdapterInvalid` or `UploadTooLarge`."""
        await self._write_piece()
        await self._written()
        await (self._upload.check if self._is_archive else self._upload.run)(self._sink.finish)

    async def _write_piece(self) -> None:
        await self._written()
        chunks, self._chunks, self._num_bytes = self._chunks, [], 0
        self._writing = self._upload.start(lambda: self._sink.write(b"".join(chunks)))

    async def _written(self) -> None:
        if self._writing is not None:
            await asyncio.wrap_future(self._writing)


def reachable_adapters(context: ServerContext, principal: Principal) -> Sequence[AdapterInfo]:
    """The caller's tenant's adapters; an admin's key reaches every tenant's. Blocks on the database."""
    if principal.tenant is not None:
        return context.registry.list(principal.tenant)
    return [info for tenant in context.accounts.list_tenants() for info in context.registry.list(tenant.id)]


def split_name(principal: Principal, name: str, default_tenant: str | None = None) -> tuple[str, str]:
    """ "tenant/name", or "name" in the caller's tenant. Raises `InvalidRequest` where no tenant is known.

    default_tenant: that of an admin's key.
    """
    tenant, slash, own_name = name.rpartition("/")
    if slash:
        return tenant, own_name
    own_tenant = principal.tenant or default_tenant
    if own_tenant is None:
        raise InvalidRequest("an admin key must name the adapter as tenant/name", param="name")
    return own_tenant, own_name


async def quarantine(context: ServerContext, ref: str, error: AdapterNotFinite) -> None:
    """Take a version out of service whose logits were not finite. A store that does not answer is logged."""
    report = VersionReport(passed=False, tested_at=int(time.time()), reason=error.message, finite=False)
    try:
        if await asyncio.to_thread(context.registry.quarantine, ref, report):
            context.metrics.quarantined()
            logger.warning("%s is quarantined: its logits were not finite", ref)
    except StoreError:
        logger.exception("%s could not be quarantined", ref)


def _check_canary(version: int, canary: Canary) -> None:
    if canary.version == version:
        raise InvalidRequest("the canary must be another version than the alias's own", param="canary.version")
    if not 1 <= canary.percent <= 100:
        raise InvalidRequest(f"percent must be in [1, 100], not {canary.percent}", param="canary.percent")


def _check_reach(principal: Principal, tenant: str, name: str) -> None:
    if principal.tenant not in (None, tenant):
        raise AdapterNotFound(f"{tenant}/{name}")
