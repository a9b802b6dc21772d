"""Structured logs of the gateway's processes: one JSON object a line on standard error, which Ray collects."""

from __future__ import annotations

import json
import logging
from typing import Final

_OURS: Final = ("gateway", "adapters_store")


class JsonFormatter(logging.Formatter):
    """Time, level, process, logger and message, and the traceback if there is one."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure_logging(process: str) -> None:
    """Send this process' own log, from INFO up, to standard error; libraries keep their settings."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(process))
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
