"""The registry and the batcher serve without a web framework."""

import subprocess
import sys

import pytest

CODE = """
import sys
for name in ("fastapi", "starlette", "prometheus_client", "uvicorn", "pydantic"):
    sys.modules[name] = None
import hyperclip_fast.serving.batching, hyperclip_fast.serving.task_registry
"""


@pytest.mark.slow
def test_registry_and_batcher_import_no_web_framework():
    subprocess.run([sys.executable, "-c", CODE], check=True)
