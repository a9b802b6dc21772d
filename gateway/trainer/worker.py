"""The fine-tune worker: takes jobs from the queue, one after the other, and publishes what they make."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch
from sqlalchemy import Connection

from adapters_store.accounts import Accounts
from adapters_store.database import Database
from adapters_store.errors import StoreUnavailable
from adapters_store.registry import AdapterRegistry
from adapters_store.reports import VersionReport
from adapters_store.upload import Staging
from adapters_store.versions import AdapterVersion
from gateway.config import GatewayConfig
from gateway.errors import EngineUnavailable, InvalidRequest, ModelNotFound, public_message, wire_error
from gateway.trainer.dataset import MIN_EXAMPLES, TokenizedExample, TrainingFileInvalid, load_chat_dataset
from gateway.trainer.files import TrainingFiles
from gateway.trainer.hyperparameters import Hyperparameters, TrainingSettings, resolve_settings
from gateway.trainer.job import FineTuningJob, JobError
from gateway.trainer.job_queue import JobLost, JobQueue
from gateway.trainer.lease import JobCancelled, JobLease, WorkerStopping
from gateway.trainer.lora_trainer import LoRATrainer, TrainingResult
from gateway.trainer.training_base import TrainingBase, load_training_base

_CHUNK: Final = 1 << 20
_RETEST_S: Final = 1.0

logger = logging.getLogger(__name__)


class TrainerWorker:
    """Runs fine-tune jobs, one at a time, in the calling thread. The base is loaded once, at the first job.

    test: the self-test of what a job has made, or None; raises `EngineUnavailable` while nothing can run it.
    """

    def __init__(
        self,
        config: GatewayConfig,
        database: Database,
        registry: AdapterRegistry,
        files: TrainingFiles,
        test: Callable[[AdapterVersion], VersionReport] | None = None,
    ) -> None:
        self._config = config
        self._registry = registry
        self._files = files
        self._test = test
        self._accounts = Accounts(database)
        self._queue = JobQueue(database)
        self._name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._base: TrainingBase | None = None

    def run_next(self, stop: threading.Event) -> bool:
        """Check the files of every new job, then run the oldest queued one to its end.

        Returns whether there was anything to do. Once `stop` is set it returns soon, and the job it was on goes back
        to the queue. Raises `StoreUnavailable`; a job's own failure ends that job only.
        """
        if self._config.trainer.torch_threads is not None:
            torch.set_num_threads(self._config.trainer.torch_threads)
        self._queue.recover()
        busy = False
        while not stop.is_set() and (job := self._queue.claim_to_validate(self._name)) is not None:
            self._hold(job, stop)
            busy = True
        if stop.is_set() or (job := self._queue.claim_to_run(self._name)) is None:
            return busy
        self._hold(job, stop)
        return True

    def _hold(self, job: FineTuningJob, stop: threading.Event) -> None:
        """Do the job's next part under a lease, and bring it to the state that follows, whatever happens."""
        logger.info("fine-tune job %s: %s", job.id, job.status)
        with JobLease(self._queue, job, self._name, stop) as lease:
            try:
                if job.status == "running":
                    self._run(job, lease)
                else:
                    self._validate(job, lease)
            except JobLost:
                logger.info("fine-tune job %s is no longer ours", job.id)
            except StoreUnavailable:
                raise  # no state can be written now; the claim goes stale and the job is taken up again
            except Exception as error:
                self._end(job, lease, error)

    def _end(self, job: FineTuningJob, lease: JobLease, error: Exception) -> None:
        try:
            lease.flush()
            if isinstance(error, JobCancelled):
                self._queue.cancel(job, self._name)
            elif isinstance(error, WorkerStopping):
                self._queue.give_back(job, self._name)
            else:
                self._queue.fail(job, self._name, _job_error(job, error))
        except JobLost:
            logger.info("fine-tune job %s is no longer ours", job.id)

    def _validate(self, job: FineTuningJob, lease: JobLease) -> None:
        base, max_rank = self._loaded_base(), self._max_rank(job.tenant)
        if job.model != base.name:
            raise ModelNotFound(f"Only the base {base.name!r} can be fine-tuned, not {job.model!r}.", param="model")
        if job.peft.r > max_rank:
            raise InvalidRequest(f"The rank {job.peft.r} is above your limit of {max_rank}.", param="peft.r")
        train, _ = self._datasets(job, lease)
        settings = self._settings(job, len(train))
        steps, limit = settings.total_steps(len(train)), self._config.trainer.max_steps
        if steps > limit:
            raise InvalidRequest(
                f"The job would take {steps:,} steps; the limit is {limit:,}. Use fewer epochs or larger batches.",
                param="hyperparameters",
            )
        lease.check()
        self._queue.queue(job, self._name)

    def _run(self, job: FineTuningJob, lease: JobLease) -> None:
        train, valid = self._datasets(job, lease)
        settings = self._settings(job, len(train))
        self._queue.set_hyperparameters(job, self._name, _used(job.hyperparameters, settings))
        with tempfile.TemporaryDirectory(prefix="patchbay-adapter-") as name:
            folder = Path(name)
            result = self._train(settings, train, valid, lease, folder)
            lease.flush()
            lease.check()  # a cancellation after this line comes too late
            version = self._publish(job, folder, result.trained_tokens, lease)
        logger.info("fine-tune job %s published %s", job.id, version.ref)

    def _train(
        self,
        settings: TrainingSettings,
        train: list[TokenizedExample],
        valid: list[TokenizedExample],
        lease: JobLease,
        folder: Path,
    ) -> TrainingResult:
        trainer = LoRATrainer(self._loaded_base(), settings, lease.check)
        try:
            result = trainer.train(train, valid, lease.record)
            trainer.save(folder)
        finally:
            trainer.close()
        return result

    def _publish(self, job: FineTuningJob, folder: Path, trained_tokens: int, lease: JobLease) -> AdapterVersion:
        """The way of every upload: validated in the confined process, tested, published as the job succeeds.

        Waits for a replica as long as it takes: training it again would cost more.
        """

        def succeed(connection: Connection, version: AdapterVersion) -> None:
            self._queue.succeed(connection, job, self._name, version.ref, trained_tokens)

        base, max_rank = self._loaded_base(), self._max_rank(job.tenant)
        root = self._config.store.staging
        with Staging(root) as staging:
            for path in sorted(folder.iterdir()):
                staging.add_file(path.name, _chunks(path))
            staged = staging.validate(base.spec, max_rank)
            while True:
                try:
                    return self._registry.publish(
                        job.tenant, job.adapter_name, staged, job.peft.alias, also=succeed, test=self._test
                    )
                except EngineUnavailable as error:
                    logger.warning("fine-tune job %s waits to be tested: %s", job.id, error)
                    lease.check()
                    time.sleep(_RETEST_S)

    def _datasets(self, job: FineTuningJob, lease: JobLease) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
        """The training and the validation examples; the latter are none without a validation file."""
        train = self._dataset(job.tenant, job.training_file, "training_file", MIN_EXAMPLES, lease)
        if job.validation_file is None:
            return train, []
        return train, self._dataset(job.tenant, job.validation_file, "validation_file", 1, lease)

    def _dataset(
        self, tenant: str, file_id: str, param: str, min_examples: int, lease: JobLease
    ) -> list[TokenizedExample]:
        base = self._loaded_base()
        with self._files.open(tenant, file_id) as source:
            return load_chat_dataset(
                source,
                base.tokenizer,
                max_seq_len=min(self._config.trainer.max_seq_len, base.max_positions),
                param=param,
                min_examples=min_examples,
                check=lease.check,
            )

    def _settings(self, job: FineTuningJob, num_examples: int) -> TrainingSettings:
        return resolve_settings(
            job.hyperparameters,
            job.peft,
            num_examples=num_examples,
            hidden_size=self._loaded_base().hidden_size,
            seed=job.seed,
        )

    def _max_rank(self, tenant: str) -> int:
        own = self._accounts.get_tenant(tenant).max_rank
        allowed = self._config.limits.default_max_rank if own is None else own
        return min(allowed, self._config.engine.max_lora_rank)

    def _loaded_base(self) -> TrainingBase:
        if self._base is None:
            engine = self._config.engine
            # The trainer may run without the GPU that its replicas have.
            if engine.device == "cuda":
                engine = dataclasses.replace(engine, device="auto")
            self._base = load_training_base(engine)
        return self._base


def _used(asked: Hyperparameters, settings: TrainingSettings) -> Hyperparameters:
    multiplier = asked.learning_rate_multiplier
    return Hyperparameters(
        n_epochs=settings.n_epochs,
        batch_size=settings.batch_size,
        learning_rate_multiplier=1.0 if multiplier == "auto" else multiplier,
    )


def _job_error(job: FineTuningJob, error: Exception) -> JobError:
    """What the tenant is told; an unexpected error's own text goes to the log alone."""
    wire = wire_error(error)
    if wire.http >= 500:
        logger.error("fine-tune job %s failed", job.id, exc_info=error)
    code = "invalid_training_file" if isinstance(error, TrainingFileInvalid) else wire.code
    return JobError(code, public_message(error), getattr(error, "param", None))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
