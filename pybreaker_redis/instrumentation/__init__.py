"""Listeners that make breakers visible. Each is a module of its own; the first two need their extra.

prometheus: PrometheusMetrics. otel: OpenTelemetryMetrics, OpenTelemetrySpans. logging: LoggingListener.
"""
