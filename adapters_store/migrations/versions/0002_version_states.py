"""Versions have a status and a report; an alias may name a canary beside its version."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # What was published before was served before.
    op.add_column("adapter_versions", sa.Column("status", sa.Text(), server_default="ready", nullable=False))
    op.add_column("adapter_versions", sa.Column("report", sa.JSON(none_as_null=True), nullable=True))
    op.create_index(op.f("ix_adapter_versions_status"), "adapter_versions", ["status"])
    op.add_column("aliases", sa.Column("canary_version", sa.Integer(), nullable=True))
    op.add_column("aliases", sa.Column("canary_percent", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("aliases", "canary_percent")
    op.drop_column("aliases", "canary_version")
    op.drop_index(op.f("ix_adapter_versions_status"), "adapter_versions")
    op.drop_column("adapter_versions", "report")
    op.drop_column("adapter_versions", "status")
