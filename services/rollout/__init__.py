"""Rollouts: plans, stages and gates; every grant of every offer is decided here."""
