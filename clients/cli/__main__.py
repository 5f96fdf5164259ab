"""``python -m clients.cli``, also installed as ``swell``."""

from clients.cli.main import run

if __name__ == "__main__":
    run()
