"""What a study is made of: protocols, jobs, executors, the plan, statistics and verdicts."""
