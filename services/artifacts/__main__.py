"""``python -m services.artifacts``."""

from libs.rpc import serve
from services.artifacts.app import build

if __name__ == "__main__":
    serve("artifacts", build)
