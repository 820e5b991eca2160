"""What a server counts, in Prometheus' format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
MEDIA_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        """`waiting` is the number of pieces of text or recordings that wait for a batch."""
        self.registry = CollectorRegistry()

        def histogram(name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"speechtune_{name}", what, labels, registry=self.registry, buckets=buckets)

        self.requests = Counter(
            "speechtune_requests", "Answered requests", ("endpoint", "status"), registry=self.registry
        )
        self.seconds = histogram("request_seconds", "From a request to the end of its answer", SECONDS, "endpoint")
        self.first_audio = histogram("first_audio_seconds", "From a request to its first audio", SECONDS)
        self.batch_size = histogram("batch_size", "Pieces in a batch", (1, 2, 4, 8, 16, 32, 64))
        self.audio_seconds = Counter("speechtune_audio_seconds", "Generated audio", registry=self.registry)
        Gauge("speechtune_waiting", "Pieces that wait for a batch", registry=self.registry).set_function(waiting)

    def text(self) -> bytes:
        """All of it, as a scraper reads it."""
        return generate_latest(self.registry)
