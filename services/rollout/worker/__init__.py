"""The Faust worker: takes the check-in stream to the rollout leader. `python -m services.rollout.worker`."""
