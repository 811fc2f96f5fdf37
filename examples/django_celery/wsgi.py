"""Django's part of the project, for a web server: `gunicorn django_celery.wsgi`."""

from __future__ import annotations

import os

from django.core.wsgi import get_wsgi_application

from .celery import app as celery  # so that tasks are sent to its broker  # noqa: F401

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "django_celery.settings")
application = get_wsgi_application()
