"""`python -m services.pki`."""

from libs.rpc import serve
from services.pki.app import build

if __name__ == "__main__":
    serve("pki", build)
