"""The gRPC service patchbay.v1.Adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from starlette.concurrency import iterate_in_threadpool

from adapters_store.aliases import Canary
from adapters_store.golden import GoldenPrompt
from adapters_store.names import DEFAULT_ALIAS
from adapters_store.registry import AdapterInfo
from adapters_store.tags import Tags
from adapters_store.versions import AdapterVersion
from gateway.errors import InvalidRequest
from gateway.rpc import patchbay_pb2 as pb
from gateway.rpc import patchbay_pb2_grpc as pb_grpc
from gateway.server.adapters import AdapterService, Upload, UploadFile, split_name
from gateway.server.context import ServerContext
from gateway.server.grpc_calls import Call
from gateway.server.openai_schema import SelfTestRequest, valid


class AdaptersServicer(pb_grpc.AdaptersServicer):
    """Each method gets a `Call` from the guard in place of grpc's context."""

    def __init__(self, context: ServerContext) -> None:
        self._adapters = AdapterService(context)

    async def Upload(  # noqa: N802
        self, requests: AsyncIterator[pb.UploadRequest], call: Call
    ) -> pb.AdapterVersion:
        """Publish the files that come as the next version."""
        async with self._adapters.upload(call.principal) as upload:
            start = await _receive(requests, upload)
            alias, fingerprint = start.alias or DEFAULT_ALIAS, start.base_fingerprint or None
            return _version(await upload.publish(start.name, alias, fingerprint))

    async def List(self, request: pb.ListAdaptersRequest, call: Call) -> pb.ListAdaptersResponse:  # noqa: N802
        """The adapters that the caller may call."""
        infos = await self._adapters.list(call.principal)
        return pb.ListAdaptersResponse(adapters=[_adapter(info) for info in infos])

    async def Get(self, request: pb.GetAdapterRequest, call: Call) -> pb.Adapter:  # noqa: N802
        """One adapter."""
        tenant, name = split_name(call.principal, request.name)
        return _adapter(await self._adapters.get(call.principal, tenant, name))

    async def SetAlias(self, request: pb.SetAliasRequest, call: Call) -> pb.Adapter:  # noqa: N802
        """Point an alias at a version."""
        tenant, name = split_name(call.principal, request.name)
        alias = request.alias or DEFAULT_ALIAS
        canary = Canary(request.canary.version, request.canary.percent) if request.HasField("canary") else None
        return _adapter(await self._adapters.set_alias(call.principal, tenant, name, alias, request.version, canary))

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, call: Call) -> pb.Adapter:  # noqa: N802
        """Take an alias away; its version stays."""
        tenant, name = split_name(call.principal, request.name)
        return _adapter(await self._adapters.delete_alias(call.principal, tenant, name, request.alias))

    async def Rollback(self, request: pb.RollbackRequest, call: Call) -> pb.Adapter:  # noqa: N802
        """Point an alias at the version before."""
        tenant, name = split_name(call.principal, request.name)
        alias = request.alias or DEFAULT_ALIAS
        return _adapter(await self._adapters.rollback(call.principal, tenant, name, alias))

    async def Test(self, request: pb.TestAdapterRequest, call: Call) -> pb.AdapterVersion:  # noqa: N802
        """Run a version's self-test again."""
        tenant, name = split_name(call.principal, request.name)
        golden = _golden(request)
        return _version(await self._adapters.test(call.principal, tenant, name, request.version, golden))

    async def SetTag(self, request: pb.SetTagRequest, call: Call) -> pb.Adapter:  # noqa: N802
        """Tag an adapter or a version."""
        tenant, name = split_name(call.principal, request.name)
        key, value = request.key, request.value
        return _adapter(await self._adapters.set_tag(call.principal, tenant, name, _number(request), key, value))

    async def DeleteTag(self, request: pb.DeleteTagRequest, call: Call) -> pb.Adapter:  # noqa: N802
        """Take a tag away."""
        tenant, name = split_name(call.principal, request.name)
        return _adapter(await self._adapters.delete_tag(call.principal, tenant, name, _number(request), request.key))

    async def Download(  # noqa: N802
        self, request: pb.DownloadAdapterRequest, call: Call
    ) -> AsyncGenerator[pb.DownloadAdapterChunk, None]:
        """A version as a tar of a peft folder."""
        tenant, name = split_name(call.principal, request.name)
        tar = await self._adapters.export(call.principal, tenant, name, request.version)
        async for data in iterate_in_threadpool(tar.chunks()):
            yield pb.DownloadAdapterChunk(data=data)

    async def Delete(self, request: pb.DeleteAdapterRequest, call: Call) -> pb.DeleteAdapterResponse:  # noqa: N802
        """Delete a version."""
        tenant, name = split_name(call.principal, request.name)
        await self._adapters.delete(call.principal, tenant, name, request.version)
        return pb.DeleteAdapterResponse()


async def _receive(requests: AsyncIterator[pb.UploadRequest], upload: Upload) -> pb.UploadStart:
    """Stage what comes; the message that came first, which is checked before any bytes are taken."""
    start: pb.UploadStart | None = None
    file: UploadFile | None = None
    async for request in requests:
        part = request.WhichOneof("part")
        if start is None:
            if part != "start":
                raise InvalidRequest("the first message must be `start`", param="start")
            start = request.start
            upload.target(start.name, start.alias or DEFAULT_ALIAS)
        elif part == "file":
            if file is not None:
                await file.finish()
            file = await upload.begin(request.file.name)
        elif part == "chunk" and file is not None:
            await file.write(request.chunk)
        else:
            raise InvalidRequest("send `start` once, then `file` and its `chunk`s, file by file", param=part)
    if start is None or file is None:
        raise InvalidRequest("the upload holds no file", param="file")
    await file.finish()
    return start


def _golden(request: pb.TestAdapterRequest) -> Sequence[GoldenPrompt]:
    """Checked by the same rules as the HTTP body."""
    golden = [{"prompt": one.prompt, "completion": one.completion} for one in request.golden]
    return valid(SelfTestRequest, {"golden": golden}).golden


def _number(request: pb.SetTagRequest | pb.DeleteTagRequest) -> int | None:
    return request.version if request.HasField("version") else None


def _adapter(info: AdapterInfo) -> pb.Adapter:
    return pb.Adapter(
        tenant=info.tenant,
        name=info.name,
        created_at=info.created_at,
        aliases=dict(info.aliases),
        canaries={alias: pb.Canary(**dataclasses.asdict(canary)) for alias, canary in info.canaries.items()},
        tags=info.tags,
        versions=[_version(version, info.version_tags.get(version.version)) for version in info.versions],
    )


def _version(version: AdapterVersion, tags: Tags | None = None) -> pb.AdapterVersion:
    manifest = version.manifest
    encoded = pb.AdapterVersion(
        ref=version.ref,
        tenant=version.tenant,
        name=version.name,
        version=version.version,
        digest=version.digest,
        rank=version.rank,
        target_modules=manifest.target_modules,
        num_parameters=manifest.num_parameters,
        size_bytes=manifest.size_bytes,
        base_fingerprint=manifest.base_fingerprint,
        created_at=version.created_at,
        status=version.status,
        kind=manifest.kind,
        num_virtual_tokens=manifest.num_virtual_tokens,
        import_error=manifest.import_error,
        tags=tags,
    )
    if version.report is not None:
        encoded.report.update(version.report.as_json)
    return encoded
