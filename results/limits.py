"""How large what a run folder holds may be. Rows, `run.json` and a run's configuration have the same limits.

A configuration checks its values against these before the first row, so that nothing is measured that no command can
read afterwards. Files of a folder from elsewhere are read within them, too.
"""

MOST_JOBS = 256
LEAST_SEED, MOST_SEED = -(2**63), 2**63 - 1
"""Seeds are whole numbers of 64 bits: what the columns of tables and Parquet files hold."""
MOST_COUNT = 2**53
"""Bytes, tokens, prompts, operations: floating-point numbers hold every whole number up to here, and sums of a few
hundred of them still fit 64 bits."""
MOST_LENGTH_TOKENS = 2**40
MOST_SECONDS = 1e9
MOST_NAME_CHARS = 1_000
"""Characters of a name: of a model, task, method label, question type or context."""
MOST_METHODS = 1_000
MOST_TASKS = 1_000
MOST_LENGTHS = 1_000
MOST_QUESTION_TYPES = 1_000
"""Kinds of questions over all tasks of a run."""
MOST_CELLS = 200_000
"""Methods x tasks x lengths of a run: reports have a row for each."""
MOST_REQUESTS = 256
"""Requests to a server that are under way at a time."""
MOST_BATCH = 4_096
"""Answers that are decoded in one step."""
MOST_REFRESHES = 1_000_000
"""Refreshes of the resident set while one prompt is answered."""
MOST_NESTED = 64
"""Levels of lists and objects within each other."""
MOST_LINE_BYTES = 16 * 2**20
MOST_RUN_FILE_BYTES = 64 * 2**20
MOST_ROWS_FILE_BYTES = 8 * 2**30
"""A file of rows: lines, or Parquet once unpacked."""
