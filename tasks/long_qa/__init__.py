"""long_qa: questions about dated sessions that a world simulator writes, the offline stand-in for memory benchmarks."""
