"""Many runs: methods, settings and seeds compared on tasks with a known reward, as tables and pictures."""
