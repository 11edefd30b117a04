"""Serving over HTTP: a registry of tasks, micro-batches across tasks, the application. It imports no framework."""
