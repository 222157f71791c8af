"""Training rows in many forms: the tasks of evaluation's families, each worded, laid out and answered in many ways.

A model that has seen a task in one form answers that form. Here everything but the task varies: what stands between
lines, where a statement stands in its line, the instruction, the question's place, solved examples before the real
problem, and how the answer is written. No text of RULER or of evaluation is among it (a test compares 13-grams).
"""
