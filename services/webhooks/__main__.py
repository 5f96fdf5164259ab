"""``python -m services.webhooks``."""

from libs.rpc import serve
from services.webhooks.app import build

if __name__ == "__main__":
    serve("webhooks", build)
