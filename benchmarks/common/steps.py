"""Outer steps whose update is wanted whole, as the tests make them."""

from whole_update import commit, placing

__all__ = ["commit", "placing"]
