"""Callbacks that make a worker of a framework's trainer; docs/integrations.md has what they do.

>>> from diloco_client.integrations.transformers import DilocoCallback  # doctest: +SKIP
>>> from diloco_client.integrations.lightning import DilocoCallback  # doctest: +SKIP
"""
