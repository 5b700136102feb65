"""What surrounds a step? Set-up, processes, rollouts, checkpoints, logs, stopping."""
