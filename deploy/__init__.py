"""Running Groundswell: topics, and the local stack of real servers."""
