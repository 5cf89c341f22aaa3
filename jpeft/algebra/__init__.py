"""Adapters as things to calculate with: pure functions from adapters to adapters."""

from jpeft.algebra.combine import combine as combine
