"""`python -m services.registry`."""

from libs.rpc import serve
from services.registry.app import build

if __name__ == "__main__":
    serve("registry", build)
