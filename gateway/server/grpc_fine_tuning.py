"""The gRPC service patchbay.v1.FineTuning."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

from google.protobuf.json_format import ParseDict

from gateway.rpc import patchbay_pb2 as pb
from gateway.rpc import patchbay_pb2_grpc as pb_grpc
from gateway.server.context import ServerContext
from gateway.server.fine_tuning import FineTuningService
from gateway.server.grpc_calls import Call
from gateway.server.openai_schema import FineTuningJobRequest, valid
from gateway.trainer.hyperparameters import Hyperparameters, PeftOptions
from gateway.trainer.job import FineTuningEvent, FineTuningJob, FineTuningRequest

_DEFAULT_PAGE: Final = 20


class FineTuningServicer(pb_grpc.FineTuningServicer):
    """Each method gets a `Call` from the guard in place of grpc's context."""

    def __init__(self, context: ServerContext) -> None:
        self._jobs = FineTuningService(context)

    async def Create(self, request: pb.CreateFineTuningJobRequest, call: Call) -> pb.FineTuningJob:  # noqa: N802
        """Queue a job."""
        return _job(await self._jobs.create(call.principal, _request(request)))

    async def Get(self, request: pb.GetFineTuningJobRequest, call: Call) -> pb.FineTuningJob:  # noqa: N802
        """One job."""
        return _job(await self._jobs.get(call.principal, request.id))

    async def List(  # noqa: N802
        self, request: pb.ListFineTuningJobsRequest, call: Call
    ) -> pb.ListFineTuningJobsResponse:
        """The tenant's jobs, newest first."""
        after, limit = request.after or None, request.limit or _DEFAULT_PAGE
        jobs, has_more = await self._jobs.list(call.principal, after, limit)
        return pb.ListFineTuningJobsResponse(jobs=[_job(job) for job in jobs], has_more=has_more)

    async def Cancel(self, request: pb.CancelFineTuningJobRequest, call: Call) -> pb.FineTuningJob:  # noqa: N802
        """Ask a job to stop."""
        return _job(await self._jobs.cancel(call.principal, request.id))

    async def StreamEvents(  # noqa: N802
        self, request: pb.StreamFineTuningEventsRequest, call: Call
    ) -> AsyncGenerator[pb.FineTuningEvent, None]:
        """A job's events until it has ended."""
        stream = self._jobs.stream_events(call.principal, request.id, request.after or None)
        async with aclosing(stream) as events:
            async for event in events:
                yield _event(event)


def _request(request: pb.CreateFineTuningJobRequest) -> FineTuningRequest:
    """Checked by the same rules as the HTTP body."""
    body: dict[str, Any] = {"model": request.model, "training_file": request.training_file}
    body |= {name: value for name in ("validation_file", "suffix") if (value := getattr(request, name))}
    if request.HasField("seed"):
        body["seed"] = request.seed
    body["hyperparameters"] = _given(request.hyperparameters, Hyperparameters.model_fields)
    body["peft"] = _given(request.peft, ("r", "lora_alpha", "learning_rate"))
    if request.peft.target_modules:
        body["peft"]["target_modules"] = tuple(request.peft.target_modules)
    if request.peft.alias:
        body["peft"]["alias"] = request.peft.alias
    body["metadata"] = dict(request.metadata)
    return valid(FineTuningJobRequest, body).to_request()


def _given(message: pb.Hyperparameters | pb.LoraParams, names: Any) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _job(job: FineTuningJob) -> pb.FineTuningJob:
    message = pb.FineTuningJob(
        id=job.id,
        status=f"FINE_TUNING_STATUS_{job.status.upper()}",
        model=job.model,
        training_file=job.training_file,
        validation_file=job.validation_file or "",
        suffix=job.suffix or "",
        seed=job.seed,
        hyperparameters=_hyperparameters(job.hyperparameters),
        peft=_peft(job.peft),
        metadata=dict(job.metadata),
        fine_tuned_model=job.fine_tuned_model or "",
        trained_tokens=job.trained_tokens or 0,
        created_at=job.created_at,
        finished_at=job.finished_at or 0,
    )
    if job.error is not None:
        error = pb.FineTuningError(code=job.error.code, message=job.error.message, param=job.error.param or "")
        message.error.CopyFrom(error)
    return message


def _hyperparameters(values: Hyperparameters) -> pb.Hyperparameters:
    return pb.Hyperparameters(**{name: value for name, value in values if value != "auto"})


def _peft(options: PeftOptions) -> pb.LoraParams:
    return pb.LoraParams(
        r=options.r,
        lora_alpha=options.lora_alpha,
        target_modules=options.target_modules,
        learning_rate=options.learning_rate,
        alias=options.alias,
    )


def _event(event: FineTuningEvent) -> pb.FineTuningEvent:
    message = pb.FineTuningEvent(
        id=event.id,
        created_at=event.created_at,
        level=event.level,
        type=event.type,
        message=event.message,
    )
    ParseDict(dict(event.data), message.data)
    return message
