"""Prometheus metrics of a service: latency by stage, batches, cache, unknown ids, scores."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hllm_torchrec.serving.engine import Engine

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class ServiceMetrics:
    """Metrics of one service; `text` is the answer of /metrics. engine: function that returns the engine in use;
    waiting: function that returns the number of accepted requests without an answer."""

    def __init__(self, engine: Callable[[], Engine], waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("hllm_requests", "Answers", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "hllm_stage_seconds",
            "Time of a request (request: all of it; queue: until its batch began) and of a batch (batch)",
            ["stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        sizes = [2.0**power for power in range(9)]
        self.batch = Histogram("hllm_batch_requests", "Requests of a batch", buckets=sizes, registry=self.registry)
        self.unknown = Counter("hllm_unknown_ids", "Requests with ids that are not known", registry=self.registry)
        self.probability = Histogram(
            "hllm_score_probability",
            "Probabilities of the scored candidates: their drift shows a change of inputs or model",
            buckets=[number / 10 for number in range(1, 11)],
            registry=self.registry,
        )
        self.reloads = Counter(
            "hllm_reloads", "Reloads of the model, by result (done or refused)", ["result"], registry=self.registry
        )
        waiting_gauge = Gauge("hllm_queue_requests", "Accepted requests without an answer", registry=self.registry)
        waiting_gauge.set_function(waiting)
        self.registry.register(_EngineCollector(engine))

    def observe_batch(self, size: int, waited: Sequence[float], seconds: float) -> None:
        """Count a batch; see `MicroBatcher`."""
        self.batch.observe(size)
        self.seconds.labels("batch").observe(seconds)
        for one in waited:
            self.seconds.labels("queue").observe(one)

    def observe_scores(self, probabilities: NDArray[np.floating]) -> None:
        """Observe a sample of a request's probabilities: at most 19, evenly spaced in the order of its candidates.

        So the cost does not grow with the number of candidates.
        """
        step = max(1, probabilities.size // 10)
        for one in probabilities[::step].tolist():
            self.probability.observe(one)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class _EngineCollector:
    """Collector of the values that the engine in use counts itself."""

    def __init__(self, engine: Callable[[], Engine]) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        engine = self._engine()
        states, counts = engine.states, engine.states.counts
        for name, value in (("hits", counts.hits), ("misses", counts.misses), ("evictions", counts.evictions)):
            yield CounterMetricFamily(f"hllm_state_cache_{name}", f"{name} of the cache of user states", value=value)
        yield GaugeMetricFamily("hllm_state_cache_bytes", "Bytes of the cached user states", value=states.nbytes)
        yield GaugeMetricFamily("hllm_state_cache_users", "Users with a cached state", value=len(states))
        yield GaugeMetricFamily("hllm_items", "Items that are known", value=engine.scorer.num_items - 1)
        model = GaugeMetricFamily("hllm_model", "1 for the model in use", labels=["model"])
        model.add_metric([engine.mark], 1)
        yield model
