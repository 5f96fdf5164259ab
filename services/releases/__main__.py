"""``python -m services.releases``."""

from libs.rpc import serve
from services.releases.app import build

if __name__ == "__main__":
    serve("releases", build)
