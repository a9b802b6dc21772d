"""The metadata database: every table of Patchbay. Times are integer unix seconds."""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

metadata: Final = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

tenants: Final = Table(
    "tenants",
    metadata,
    Column("id", Text, primary_key=True),
    Column("max_rank", Integer),
    Column("created_at", BigInteger, nullable=False),
)

api_keys: Final = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, ForeignKey("tenants.id")),  # null for an admin key
    Column("role", Text, nullable=False),
    Column("hash", Text, nullable=False),  # SHA-256 of the whole key, in hex
    Column("created_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
)

adapters: Final = Table(
    "adapters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", Text, ForeignKey("tenants.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("last_version", Integer, nullable=False),  # never reused, also after the version is deleted
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("tenant", "name"),
)

adapter_versions: Final = Table(
    "adapter_versions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("adapter_id", Integer, ForeignKey("adapters.id"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("digest", Text, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("manifest", JSON, nullable=False),
    Column("status", Text, nullable=False, server_default="ready"),  # adapters_store.registry.VersionStatus
    Column("report", JSON(none_as_null=True)),
    Column("created_at", BigInteger, nullable=False),
    Column("golden", JSON(none_as_null=True)),  # adapters_store.golden.GoldenPrompt of its upload, null without any
    UniqueConstraint("adapter_id", "version"),
    Index(None, "digest"),
    Index(None, "status"),
)

aliases: Final = Table(
    "aliases",
    metadata,
    Column("adapter_id", Integer, ForeignKey("adapters.id"), primary_key=True),
    Column("alias", Text, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("canary_version", Integer),  # null, or what takes part of the alias's requests
    Column("canary_percent", Integer),
    Column("updated_at", BigInteger, nullable=False),
)

alias_history: Final = Table(
    "alias_history",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("adapter_id", Integer, ForeignKey("adapters.id"), nullable=False),
    Column("alias", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index(None, "adapter_id", "alias"),
)

adapter_tags: Final = Table(
    "adapter_tags",
    metadata,
    Column("adapter_id", Integer, ForeignKey("adapters.id"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

version_tags: Final = Table(
    "version_tags",
    metadata,
    Column("adapter_id", Integer, ForeignKey("adapters.id"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

training_files: Final = Table(
    "training_files",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, ForeignKey("tenants.id"), nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("digest", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index(None, "tenant", "created_at"),
    Index(None, "digest"),
)

fine_tuning_jobs: Final = Table(
    "fine_tuning_jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, ForeignKey("tenants.id"), nullable=False),
    Column("model", Text, nullable=False),
    Column("suffix", Text),
    Column("training_file", Text, nullable=False),
    Column("validation_file", Text),
    Column("seed", BigInteger, nullable=False),
    Column("hyperparameters", JSON, nullable=False),
    Column("method", JSON, nullable=False),
    Column("peft", JSON, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("status", Text, nullable=False),
    Column("error", JSON(none_as_null=True)),
    Column("fine_tuned_model", Text),
    Column("trained_tokens", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Column("cancel_requested", Boolean, nullable=False),
    Column("claimed_by", Text),
    Column("heartbeat_at", BigInteger),
    Index(None, "tenant", "created_at"),
    Index(None, "status", "created_at"),
)

fine_tuning_events: Final = Table(
    "fine_tuning_events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("job_id", Text, ForeignKey("fine_tuning_jobs.id"), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("level", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON(none_as_null=True)),
    Index(None, "job_id", "id"),
)
