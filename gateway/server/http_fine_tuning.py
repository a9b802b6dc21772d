"""OpenAI's routes for files and fine-tune jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, BinaryIO, Final

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from gateway.errors import InvalidRequest
from gateway.server.context import ServerContext
from gateway.server.fine_tuning import FileService, FineTuningService, ReceivedFile
from gateway.server.http_adapters import check_fields
from gateway.server.http_routes import Caller, PolicyRoute
from gateway.server.multipart import read_form
from gateway.server.openai_schema import FineTuningJobRequest
from gateway.trainer.files import TrainingFile
from gateway.trainer.job import FineTuningEvent, FineTuningJob

_CHUNK: Final = 1 << 18

After = Annotated[str | None, Query(max_length=64)]
Limit = Annotated[int, Query(ge=1, le=100)]
FileLimit = Annotated[int, Query(ge=1, le=10_000)]


def file_routes(context: ServerContext) -> APIRouter:
    """/v1/files."""
    router = APIRouter(route_class=PolicyRoute)
    service = FileService(context)

    @router.post("/v1/files")
    async def create_file(request: Request, caller: Caller) -> Response:
        names: list[str] = []
        async with service.receive() as received:

            async def on_file(field: str, file_name: str) -> ReceivedFile:
                if field != "file" or names:
                    raise InvalidRequest("the form must hold one file, in the field `file`", param=field)
                names.append(file_name)
                return received

            fields = await read_form(request.headers.get("content-type"), request.stream(), on_file)
            check_fields(fields, required=("purpose",), known=("purpose",))
            if not names:
                raise InvalidRequest("Missing required form field: 'file'.", param="file")
            file = await service.create(caller, names[0], fields["purpose"], received)
        return JSONResponse(_file_body(file))

    @router.get("/v1/files")
    async def list_files(
        caller: Caller, after: After = None, limit: FileLimit = 10_000, purpose: After = None, order: After = None
    ) -> Response:
        if order not in (None, "desc"):
            raise InvalidRequest("files are listed newest first (order desc)", param="order")
        files, has_more = await service.list(caller, after, limit)
        return JSONResponse(_page([_file_body(file) for file in files if purpose in (None, file.purpose)], has_more))

    @router.get("/v1/files/{file_id}")
    async def get_file(file_id: str, caller: Caller) -> Response:
        return JSONResponse(_file_body(await service.get(caller, file_id)))

    @router.get("/v1/files/{file_id}/content")
    async def get_file_content(file_id: str, caller: Caller) -> Response:
        file = await service.get(caller, file_id)
        source = await service.open(caller, file_id)
        headers = {"content-length": str(file.bytes), "x-content-type-options": "nosniff"}
        return StreamingResponse(_pieces(source), headers=headers, media_type="application/octet-stream")

    @router.delete("/v1/files/{file_id}")
    async def delete_file(file_id: str, caller: Caller) -> Response:
        await service.delete(caller, file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    return router


def fine_tuning_routes(context: ServerContext) -> APIRouter:
    """/v1/fine_tuning/jobs."""
    router = APIRouter(route_class=PolicyRoute)
    service = FineTuningService(context)

    @router.post("/v1/fine_tuning/jobs")
    async def create_job(body: FineTuningJobRequest, caller: Caller) -> Response:
        return JSONResponse(_job_body(await service.create(caller, body.to_request())))

    @router.get("/v1/fine_tuning/jobs")
    async def list_jobs(caller: Caller, after: After = None, limit: Limit = 20) -> Response:
        jobs, has_more = await service.list(caller, after, limit)
        return JSONResponse(_page([_job_body(job) for job in jobs], has_more))

    @router.get("/v1/fine_tuning/jobs/{job_id}")
    async def get_job(job_id: str, caller: Caller) -> Response:
        return JSONResponse(_job_body(await service.get(caller, job_id)))

    @router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
    async def cancel_job(job_id: str, caller: Caller) -> Response:
        return JSONResponse(_job_body(await service.cancel(caller, job_id)))

    @router.get("/v1/fine_tuning/jobs/{job_id}/events")
    async def list_events(job_id: str, caller: Caller, after: After = None, limit: Limit = 20) -> Response:
        events, has_more = await service.latest_events(caller, job_id, after, limit)
        return JSONResponse(_page([_event_body(event) for event in events], has_more))

    return router


async def _pieces(source: BinaryIO) -> AsyncGenerator[bytes, None]:
    try:
        while piece := await asyncio.to_thread(source.read, _CHUNK):
            yield piece
    finally:
        source.close()


def _file_body(file: TrainingFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,
    }


def _job_body(job: FineTuningJob) -> dict[str, Any]:
    error = job.error
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "estimated_finish": None,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.tenant,
        "status": job.status,
        "error": None if error is None else {"code": error.code, "message": error.message, "param": error.param},
        "hyperparameters": job.hyperparameters.model_dump(),
        "method": job.method,
        "peft": job.peft.model_dump(mode="json"),
        "seed": job.seed,
        "suffix": job.suffix,
        "trained_tokens": job.trained_tokens,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": [],
        "integrations": [],
        "metadata": dict(job.metadata),
    }


def _event_body(event: FineTuningEvent) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "type": event.type,
        "message": event.message,
        "data": dict(event.data),
    }


def _page(data: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": data,
        "has_more": has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
