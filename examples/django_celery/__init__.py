"""A Django project with Celery tasks. Its views and its tasks share one breaker for the payment service."""
