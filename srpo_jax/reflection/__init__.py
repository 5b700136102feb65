"""Stage 1's data: attempts of the policy, reflections of a teacher, checks, a data set."""
