"""Ready-made listeners, one module for each tool. The first two need the extra of their name.

prometheus: PrometheusMetrics. otel: OpenTelemetryMetrics, OpenTelemetrySpans. logging: LoggingListener.
"""
