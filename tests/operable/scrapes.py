"""What Prometheus reads, as a dict."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

Sample = tuple[str, frozenset[tuple[str, str]]]


def scraped(text: str) -> dict[Sample, float]:
    """(name, labels) -> value."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def key(name: str, **labels: str) -> Sample:
    return name, frozenset(labels.items())


def names(text: str) -> dict[str, frozenset[str]]:
    """The names as one would look for them, each with its labels: of a histogram without suffixes."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        name = family.name + "_total" if family.type == "counter" else family.name
        labels = found.setdefault(name, set())
        for sample in family.samples:
            labels |= sample.labels.keys() - {"le"}
    return {name: frozenset(labels) for name, labels in found.items()}
