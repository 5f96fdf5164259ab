"""``python -m services.gateway``."""

from libs.rpc import serve
from services.gateway.app import build

if __name__ == "__main__":
    serve("gateway", build)
