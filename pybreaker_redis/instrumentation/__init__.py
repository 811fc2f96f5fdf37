"""Listeners that make breakers visible; each is a module of its own, and the first two need their extra.

prometheus: PrometheusMetrics. otel: OpenTelemetryMetrics, OpenTelemetrySpans. logging: LoggingListener.
"""
