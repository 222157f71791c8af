"""What the command line tells about methods, tasks, models and this machine."""
