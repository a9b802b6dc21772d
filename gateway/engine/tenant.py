"""Whose requests an engine serves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Tenant:
    """What fairness between tenants goes by.

    weight: its share beside others. served: virtual tokens, that is tokens by their cost and divided by the weight.
    """

    weight: float = 1.0
    served: float = 0.0

    def charge(self, tokens: float) -> None:
        """Count service."""
        self.served += tokens / self.weight
