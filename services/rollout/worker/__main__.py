"""`python -m services.rollout.worker`."""

from services.rollout.worker.app import main

if __name__ == "__main__":
    main()
