"""`patchbay finetune`: fine-tune jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gateway.cli.failures import CommandFailed, ExitCode
from gateway.cli.options import DEFAULT_URL, ApiKey, AsJson, Timeout, Url, connect, given
from gateway.cli.output import print_json, print_table, say, training_bar, transfer_bar, when
from gateway.client import ENDED_STATUSES, GatewayClient

app = typer.Typer(no_args_is_help=True, help="Create, watch, list and cancel fine-tune jobs.")
JobId = Annotated[str, typer.Argument(help="The job: ftjob-...")]


@app.command()
def create(
    training_file: Annotated[str, typer.Argument(help="A file of JSON lines of chat messages, or file-...")],
    suffix: Annotated[str | None, typer.Option(help="The adapter to publish: tenant/SUFFIX.")] = None,
    model: Annotated[str | None, typer.Option(help="The base.", show_default=False)] = None,
    validation_file: Annotated[str | None, typer.Option(help="A second file, to measure on.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    learning_rate_multiplier: Annotated[float | None, typer.Option(min=0.0)] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Instead of a multiple of the default.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The LoRA's rank.")] = None,
    alpha: Annotated[float | None, typer.Option(min=0.0, help="The LoRA's alpha.")] = None,
    target_module: Annotated[list[str] | None, typer.Option(help="A linear to adapt; repeat.")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and show the progress.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout: Timeout = 300.0,
    as_json: AsJson = False,
) -> None:
    """Upload a training file and queue a job that makes an adapter from it."""
    tuned = given(n_epochs=epochs, batch_size=batch_size, learning_rate_multiplier=learning_rate_multiplier)
    peft = given(r=rank, lora_alpha=alpha, learning_rate=learning_rate, target_modules=target_module or None)
    with connect(url, api_key, timeout) as client:
        job = client.create_job(
            model=model or client.base_model(),
            training_file=_file_id(client, training_file, as_json),
            validation_file=None if validation_file is None else _file_id(client, validation_file, as_json),
            suffix=suffix,
            seed=seed,
            method={"type": "supervised", "supervised": {"hyperparameters": tuned}},
            peft=peft or None,
        )
        if not as_json:
            say(f"Queued {job['id']}. Follow it: patchbay finetune watch {job['id']}")
        elif not watch:
            print_json(job)
        if watch:
            _watch(client, job["id"], as_json)


@app.command()
def watch(
    job_id: JobId,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Follow a job to its end: exits 0 only if it succeeded, 7 if it failed or was cancelled.

    With --json, prints each event and last the job, one JSON document a line.
    """
    with connect(url, api_key, timeout) as client:
        _watch(client, job_id, as_json)


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many, the newest first.")] = 20,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """List the newest jobs."""
    with connect(url, api_key, timeout) as client:
        jobs = client.jobs(limit)
    if as_json:
        print_json(jobs)
        return
    rows = [(job["id"], job["status"], job.get("fine_tuned_model"), when(job["created_at"])) for job in jobs]
    print_table(("JOB", "STATUS", "MODEL", "CREATED"), rows, "No jobs yet: patchbay finetune create FILE")


@app.command()
def cancel(
    job_id: JobId,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Ask a queued or running job to stop."""
    with connect(url, api_key, timeout) as client:
        job = client.cancel_job(job_id)
    if as_json:
        print_json(job)
    elif job["status"] in ENDED_STATUSES:
        say(f"{job_id} is {job['status']}.")
    else:
        say(f"Asked {job_id} to stop; it does so at its next step.")


def _file_id(client: GatewayClient, file: str, as_json: bool) -> str:
    if file.startswith("file-") and not Path(file).exists():
        return file
    with transfer_bar(f"Uploading {Path(file).name}", quiet=as_json) as on_progress:
        return str(client.upload_file(file, on_progress)["id"])


def _watch(client: GatewayClient, job_id: str, as_json: bool) -> None:
    with training_bar("Training", quiet=as_json) as update:
        for event in client.watch_job(job_id):
            if as_json:
                print_json(event)
            elif event["type"] == "metrics":
                update(event["data"])
            else:
                typer.echo(event["message"], err=True)
    _finish(client.job(job_id), as_json)


def _finish(job: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(job)
    if job["status"] == "succeeded":
        if not as_json:
            model = job["fine_tuned_model"]
            say(f"Published {model}. Try it: patchbay chat {model} 'Hello'")
        return
    reason = (job.get("error") or {}).get("message") or "no reason was given"
    raise CommandFailed(f"The job {job['id']} is {job['status']}: {reason}", ExitCode.UNSUCCESSFUL)
