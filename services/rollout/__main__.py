"""`python -m services.rollout`."""

from libs.rpc import serve
from services.rollout.app import NAME, build

if __name__ == "__main__":
    serve(NAME, build)
