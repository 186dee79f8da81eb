"""Training: from a method, a backbone and a few pictures to a run folder that holds the concept."""
