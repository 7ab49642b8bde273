"""The marker of tests that need a GPU: `pytest -m gpu`."""


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where none is")
